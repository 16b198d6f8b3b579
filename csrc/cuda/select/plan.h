#pragma once
// How many blocks work on a problem, and where their scores are.

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "csrc/cuda/alignment.h"
#include "csrc/cuda/integers.h"
#include "csrc/cuda/select/coded_keys.cuh"
#include "csrc/cuda/select/members.cuh"
#include "csrc/cuda/workspace.h"

namespace rtpurbo::cuda {

/// Whether keys, and blocks of codes, may be loaded whole, and HalfScorer's key offsets take one
/// product.
inline bool keys_are_wide(const SelectParams& p) {
  return p.dim == 16 && rows_are_aligned(p.k_index, p.k_type == ElementType::kFloat32 ? 4 : 2) &&
         std::abs(p.k_index.row_stride) <= INT32_MAX / 4 &&
         (p.coded == 0 || coded_blocks_are_packed(p.codes, p.ranges, p.code_bits));
}

/// The last stages merge a part of each block.
constexpr int64_t kMostInTeam = 512;

constexpr int64_t kMembersAtOnce = 1 << 25;

/// What a round takes beside its members, in members that a block scores meanwhile; and with a
/// sieve, for its sample.
constexpr int64_t kRoundMembers = 3 << 12;
constexpr int64_t kSampleMembers = 1 << 13;

/// More rounds than so many times the fewest, or than so many, are not tried: where there are many,
/// the blocks that are idle in the last hardly matter.
constexpr int64_t kMostMore = 4, kMostRounds = 16;

/// In percent of the time of few rounds by `time_of`, what that of more has to be below where a
/// sieve scans: idle blocks leave the others more of the memory's speed. (On an H100 83 % by this
/// count are 92 to 95 measured, 87 are 103.)
constexpr int64_t kSievePercent = 85;

/// Whether a team's blocks have so many members that a sieve spares more than its sample costs.
inline bool team_may_sift(const SelectParams& p, int64_t team_size) {
  constexpr int64_t kManyMembers = 32768;
  return p.keys >= team_size * kManyMembers;
}

/// Whether long runs of groups leave no warp more than a sixteenth more of them than single groups.
inline bool long_runs_are_even(int64_t groups, int64_t warps) {
  const auto most = [&](int shift) { return divide_up(groups, warps << shift) << shift; };
  return most(kLongRun) * 16 <= most(0) * 17;
}

/// How long the rounds take, in members that a block scores meanwhile. A problem takes as long as
/// `more` members beside its own; of these a sieve spares the ranking, three eighths of their time.
inline int64_t time_of(const SelectParams& p, int64_t rounds, int64_t team_size, int64_t more,
                       bool sieves) {
  const int64_t members = divide_up(p.keys, p.block_size);
  const int64_t of_problem = (sieves ? members * 5 / 8 : members) + more;
  return rounds * (kRoundMembers + (sieves ? kSampleMembers : 0) + of_problem / team_size);
}

/// Fits teams into `blocks` resident blocks of which each may have `score_bytes` of scores; `more`
/// and `sieves` as above.
inline SelectPlan plan_teams(const SelectParams& p, int blocks, size_t score_bytes,
                             int64_t more = 0, bool sieves = false) {
  const int64_t problems = p.batch * p.heads * p.rows;
  const int64_t of_group = kGroupKeys / p.block_size;
  const int64_t groups = divide_up(p.keys, kGroupKeys) + 1;  // rows may begin within one
  const int64_t fitting =
      std::max<int64_t>(1, kMembersAtOnce / (divide_up(p.keys, kGroupKeys) * of_group));
  // Rounds of equal size, as a last one of few problems would leave most blocks idle; more than
  // need be, where those that fit do not divide the blocks well. A sieve serves small teams only.
  const int64_t most_teams = std::min({problems, fitting, static_cast<int64_t>(blocks)});
  const int64_t fewest = divide_up(problems, most_teams);
  const int64_t most_rounds = std::max(fewest, std::min(kMostMore * fewest, kMostRounds));
  const int64_t most = std::max<int64_t>(1, divide_up(groups, kSelectWarps));
  SelectPlan plan{};
  int64_t below = INT64_MAX;
  for (int64_t rounds = fewest; rounds <= most_rounds; ++rounds) {
    const int64_t teams = divide_up(problems, rounds);
    const int64_t size = std::min({blocks / teams, most, kMostInTeam});
    const int64_t time = time_of(p, rounds, size, more, sieves);
    if (rounds > fewest && sieves && !team_may_sift(p, size)) continue;
    if (time >= below) continue;
    plan.teams = static_cast<int>(teams);
    plan.team_size = static_cast<int>(size);
    plan.time = time;
    below = rounds == fewest && sieves ? time * kSievePercent / 100 : time;
  }
  plan.sieves = sieves;
  plan.blocks = blocks;
  const int64_t warps = plan.team_size * kSelectWarps;
  const int64_t far_groups = divide_up(std::max<int64_t>(1, p.keys - p.window), kGroupKeys) + 1;
  // What a sieve samples are long runs.
  if (sieves || long_runs_are_even(far_groups, warps)) plan.run_shift = kLongRun;
  plan.warp_groups = static_cast<int>(divide_up(groups, warps << plan.run_shift) << plan.run_shift);
  const size_t bytes =
      static_cast<size_t>(warp_room(plan.warp_groups, p.block_size)) * kSelectWarps * sizeof(float);
  plan.scores_in_shared = bytes <= score_bytes;
  plan.shared_bytes = plan.scores_in_shared ? bytes : 0;
  return plan;
}

/// Whether a sieve may serve: members are keys, and no group with far keys ends behind the last
/// key.
inline bool may_sift(const SelectParams& p, const SelectPlan& plan) {
  return p.rows == 1 && p.block_size == 1 && p.p < 1.0 && !p.refine && !p.near_is_scored &&
         p.window >= kGroupKeys && team_may_sift(p, plan.team_size);
}

/// Takes the workspace apart, or with a null base only measures it. `masks`: problems whose mask
/// of selected keys is kept there.
inline size_t lay_out(const SelectParams& p, const SelectPlan& plan, int64_t masks, char* base,
                      SelectWorkspace& w) {
  const int64_t blocks = static_cast<int64_t>(plan.teams) * plan.team_size;
  w.block_members = warp_room(plan.warp_groups, p.block_size) * kSelectWarps;
  const int64_t members = blocks * w.block_members;
  w.teams = plan.teams;
  w.team_size = plan.team_size;
  w.shared_bytes = static_cast<int32_t>(plan.shared_bytes);
  w.run_shift = plan.run_shift;
  w.shared_blocks = plan.shared_blocks;
  w.warp_groups = plan.warp_groups;
  w.groups = divide_up(p.keys, kGroupKeys);
  w.chunks = divide_up(w.groups, kGroupKeys);
  WorkspaceParts parts{base};
  parts.take(w.arrivals, plan.teams);
  parts.take(w.stats, blocks);
  const int64_t histograms = plan.teams * (plan.sieves ? kSiftedHistograms : p.refine ? 2 : 1);
  parts.take(w.bin_mass, histograms * kBins);
  parts.take(w.bin_count, histograms * kBins);
  parts.take(w.cut_members, members);
  parts.take(w.cut_counts, blocks);
  parts.take(w.scores, plan.sieves ? 2 * members : plan.scores_in_shared ? 0 : members);
  parts.take(w.selected, masks * w.groups);
  parts.take(w.chunk_counts, masks * w.chunks);
  const int64_t shared_blocks = static_cast<int64_t>(plan.teams) * plan.shared_blocks;
  parts.take(w.edges, plan.shared_blocks > 0 ? plan.teams : 0);
  parts.take(w.list_counts, shared_blocks * kSelectWarps);
  parts.take(w.shared_stats, shared_blocks);
  return parts.bytes;
}

}  // namespace rtpurbo::cuda
