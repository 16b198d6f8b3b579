#include "csrc/ops/common/heads.h"

#include <algorithm>
#include <cmath>

#include "csrc/ops/common/check.h"

namespace rtpurbo {

namespace {

/// How many KV heads hold a retrieval head.
int64_t count_full_heads(at::IntArrayRef retrieval_heads, int64_t group) {
  int64_t full = 0;
  int64_t previous = -1;
  for (const int64_t head : retrieval_heads) {
    full += head / group != previous;
    previous = head / group;
  }
  return full;
}

}  // namespace

std::vector<cpu::HeadSet> head_sets(at::IntArrayRef retrieval_heads, int64_t num_heads,
                                    int64_t num_kv_heads, bool listed, bool split_cache) {
  const int64_t group = num_heads / num_kv_heads;
  std::vector<cpu::HeadSet> sets;
  int64_t full = 0;
  int64_t list = 0;
  for (int64_t kv = 0; kv < num_kv_heads; ++kv) {
    std::vector<int64_t> local;
    std::vector<int64_t> retrieval;
    for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
      const bool retrieves =
          std::binary_search(retrieval_heads.begin(), retrieval_heads.end(), head);
      (retrieves ? retrieval : local).push_back(head);
    }
    const bool from_local = split_cache && retrieval.empty();
    const int64_t place = !split_cache ? kv : from_local ? kv - full : full;
    full += !retrieval.empty();
    if (!local.empty()) {
      sets.push_back({cpu::KeySet::kNear, from_local, place, -1, local, local});
    }
    if (retrieval.empty()) continue;
    if (!listed) {
      sets.push_back({cpu::KeySet::kVisible, false, place, -1, retrieval, retrieval});
      continue;
    }
    for (const int64_t head : retrieval) {
      sets.push_back({cpu::KeySet::kListed, false, place, list++, {head}, {head}});
    }
  }
  return sets;
}

HeadsView heads_view(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

const int64_t* start_ptr(const std::optional<at::Tensor>& tensor, at::Tensor& keep) {
  if (!tensor) return nullptr;
  keep = tensor->contiguous();
  return keep.const_data_ptr<int64_t>();
}

void check_qkv(const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
               const char* k_name, const char* v_name) {
  check_floating(op, "q", q);
  check_tensor(op, "q", q, "[B, Hq, M, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  TORCH_CHECK_VALUE(q.size(3) > 0 && q.size(3) % 8 == 0, "rtpurbo::", op,
                    ": q must have a head dim D that is a multiple of 8, got ", q.size(3));
  check_tensor(op, k_name, k, "[B, heads, N, D]", {q.size(0), kAnySize, kAnySize, q.size(3)});
  check_tensor(op, v_name, v, "[B, heads, N, D]", {q.size(0), k.size(1), k.size(2), q.size(3)});
  for (const auto& [name, tensor] : {std::pair{k_name, &k}, std::pair{v_name, &v}}) {
    check_dtype(op, name, *tensor, q.scalar_type());
    check_device(op, name, *tensor, "q", q);
  }
}

void check_rows(const char* op, const at::Tensor& q, const at::Tensor& k, const char* k_name) {
  TORCH_CHECK_VALUE(k.size(1) == 0 || k.size(2) >= q.size(2), "rtpurbo::", op, ": ", k_name,
                    " must hold at least the keys of the M = ", q.size(2),
                    " query rows, got N = ", k.size(2),
                    "; the rows of q are the last M of the N positions");
}

int64_t check_heads_and_keys(const char* op, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v, at::IntArrayRef retrieval_heads,
                             const std::optional<at::Tensor>& start,
                             const std::optional<at::Tensor>& k_local,
                             const std::optional<at::Tensor>& v_local) {
  check_pair(op, "k_local", k_local, "v_local", v_local);
  check_qkv(op, q, k, v, "k", "v");
  if (k_local) check_qkv(op, q, *k_local, *v_local, "k_local", "v_local");
  const int64_t kv_heads = k.size(1) + (k_local ? k_local->size(1) : 0);
  TORCH_CHECK_VALUE(kv_heads > 0 && q.size(1) > 0 && q.size(1) % kv_heads == 0, "rtpurbo::", op,
                    ": q must have a positive multiple of the ", kv_heads,
                    " KV heads, got Hq = ", q.size(1));
  check_heads(op, "retrieval_heads", retrieval_heads, q.size(1));
  check_start(op, start, "q", q);
  if (k_local) {
    const int64_t full = count_full_heads(retrieval_heads, q.size(1) / kv_heads);
    TORCH_CHECK_VALUE(k.size(1) == full, "rtpurbo::", op, ": with k_local, k must hold the ", full,
                      " KV heads that have a retrieval head, got ", k.size(1));
  }
  return kv_heads;
}

void check_blocks(const char* op, const at::Tensor& q, int64_t lists,
                  const std::optional<at::Tensor>& block_indices,
                  const std::optional<at::Tensor>& block_counts, int64_t tile, int64_t block_size) {
  check_pair(op, "block_indices", block_indices, "block_counts", block_counts);
  TORCH_CHECK_VALUE(tile >= 1, "rtpurbo::", op, ": tile must be >= 1, got ", tile);
  TORCH_CHECK_VALUE(block_size >= 1, "rtpurbo::", op, ": block_size must be >= 1, got ",
                    block_size);
  if (!block_indices) return;
  const int64_t tiles = (q.size(2) + tile - 1) / tile;
  check_tensor(op, "block_indices", *block_indices, "[B, R, T, C]",
               {q.size(0), lists, tiles, kAnySize});
  check_tensor(op, "block_counts", *block_counts, "[B, R, T]", {q.size(0), lists, tiles});
  check_dtype(op, "block_indices", *block_indices, at::kInt);
  check_dtype(op, "block_counts", *block_counts, at::kInt);
  check_device(op, "block_indices", *block_indices, "q", q);
  check_device(op, "block_counts", *block_counts, "q", q);
}

void check_mask(const char* op, int64_t window, int64_t sinks, double scale) {
  TORCH_CHECK_VALUE(window >= 1, "rtpurbo::", op, ": window must be >= 1, got ", window);
  TORCH_CHECK_VALUE(sinks >= 0, "rtpurbo::", op, ": sinks must be >= 0, got ", sinks);
  TORCH_CHECK_VALUE(std::isfinite(scale) && scale > 0, "rtpurbo::", op,
                    ": scale must be positive and finite (normally D^-0.5), got ", scale);
}

}  // namespace rtpurbo
