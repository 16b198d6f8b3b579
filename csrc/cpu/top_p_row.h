#pragma once
// Top-p over one row of logits without sorting it: a histogram of log-weights finds the threshold
// bin, and only that bin's members are ordered.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace rtpurbo::cpu::CPU_CAPABILITY {

/// A bin spans 2^(1/32) in weight; the last one holds everything below 2^-64 of the maximum.
inline constexpr int64_t kTopPBins = 2048;
inline constexpr double kTopPBinsPerNat = 32.0 * 1.4426950408889634;

/// Whether the rest of a bin may be added to what is above it: where the bin has few members beside
/// that, of about one weight.
inline bool may_add_bin(int64_t bin, int64_t of_bin, int64_t above) {
  constexpr int64_t kShare = 4, kFew = 32;
  return bin < kTopPBins - 1 && of_bin <= above / kShare + kFew;
}

struct TopPResult {
  int64_t count;
  double mass;
};

/// Buffers that a thread keeps between rows.
struct TopPScratch {
  std::vector<double> bin_mass = std::vector<double>(kTopPBins);
  std::vector<int64_t> bin_count = std::vector<int64_t>(kTopPBins);
  std::vector<std::pair<double, int64_t>> members;
};

/// Writes the ascending positions of the smallest set of scores[0..n) that, with a mass of
/// exp(forced_lse) outside the row, holds the share `p` of all mass, and at least min_members
/// candidates (score > -inf); ties join by lower position. Without `exact` the rest of the bin that
/// the last one is in may join. `out` needs room for n entries.
/// A NaN or +inf score selects every candidate and gives a NaN mass; no mass at all gives (0, 1).
/// A mass of exp(left_out_lse) counts in all mass and cannot be selected.
template <typename T>
TopPResult top_p_row(const T* scores, int64_t n, double p, int64_t min_members, double forced_lse,
                     bool exact, int32_t* out, TopPScratch& scratch,
                     double left_out_lse = -std::numeric_limits<double>::infinity()) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  double top = -kInf;
  int64_t candidates = 0;
  bool poisoned = std::isnan(forced_lse) || forced_lse == kInf;
  for (int64_t i = 0; i < n; ++i) {
    const double score = static_cast<double>(scores[i]);
    poisoned |= !(score < kInf);
    candidates += !(score == -kInf);
    top = std::max(top, score);
  }
  if (poisoned || p >= 1.0) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (static_cast<double>(scores[i]) != -kInf) out[count++] = static_cast<int32_t>(i);
    }
    return {count, poisoned ? std::numeric_limits<double>::quiet_NaN() : 1.0};
  }
  const double reference = std::max({top, forced_lse, left_out_lse});
  if (reference == -kInf) return {0, 1.0};

  auto& bin_mass = scratch.bin_mass;
  auto& bin_count = scratch.bin_count;
  std::fill(bin_mass.begin(), bin_mass.end(), 0.0);
  std::fill(bin_count.begin(), bin_count.end(), 0);
  const auto bin_of = [top](double score) {
    return static_cast<int64_t>(std::min((top - score) * kTopPBinsPerNat, kTopPBins - 1.0));
  };
  for (int64_t i = 0; i < n; ++i) {
    const double score = static_cast<double>(scores[i]);
    if (score == -kInf) continue;
    const int64_t bin = bin_of(score);
    bin_mass[bin] += std::exp(score - reference);
    ++bin_count[bin];
  }
  const double forced = std::exp(forced_lse - reference);
  double total = forced + std::exp(left_out_lse - reference);
  for (const double mass : bin_mass) total += mass;

  const double target = p * total;
  const int64_t floor_count = std::min(min_members, candidates);
  double mass = forced;
  int64_t count = 0;
  const auto done = [&] { return mass >= target && count >= floor_count; };
  int64_t bin = 0;
  while (!done() && bin < kTopPBins) {
    const double with_bin = mass + bin_mass[bin];
    const int64_t count_with_bin = count + bin_count[bin];
    const bool is_last = with_bin >= target && count_with_bin >= floor_count;
    if (is_last && (exact || !may_add_bin(bin, bin_count[bin], count))) break;
    mass = with_bin;
    count = count_with_bin;
    ++bin;
  }
  // Members of bins before `bin` are in; of `bin` itself those down to (cut_score, cut_position).
  double cut_score = kInf;
  int64_t cut_position = -1;
  if (!done() && bin < kTopPBins) {
    auto& members = scratch.members;
    members.clear();
    for (int64_t i = 0; i < n; ++i) {
      const double score = static_cast<double>(scores[i]);
      if (score != -kInf && bin_of(score) == bin) members.emplace_back(-score, i);
    }
    std::sort(members.begin(), members.end());
    for (const auto& [negated, position] : members) {
      if (done()) break;
      cut_score = -negated;
      cut_position = position;
      mass += std::exp(cut_score - reference);
      ++count;
    }
  }
  int64_t written = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double score = static_cast<double>(scores[i]);
    if (score == -kInf) continue;
    const int64_t own_bin = bin_of(score);
    if (own_bin < bin ||
        (own_bin == bin && (score > cut_score || (score == cut_score && i <= cut_position)))) {
      out[written++] = static_cast<int32_t>(i);
    }
  }
  return {written, std::min(1.0, mass / total)};
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
