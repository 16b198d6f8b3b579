#include "csrc/ops/sparse_decode.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <bit>
#include <vector>

#include "csrc/ops/common/check.h"
#include "csrc/ops/common/decode_arguments.h"
#include "csrc/ops/common/index.h"
#include "csrc/ops/decode.h"
#include "csrc/ops/near_lse.h"
#include "csrc/ops/select.h"
#ifdef RTPURBO_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/sparse_decode.h"
#include "csrc/ops/common/cuda_check.h"
#include "csrc/ops/common/decode_cuda.h"
#include "csrc/ops/common/select_cuda.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "sparse_decode";
constexpr int64_t kWordKeys = 64;

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

/// The checked arguments of both halves.
struct Checked {
  DecodeArguments attended;
  IndexArguments indexed;

  Checked(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
          at::IntArrayRef retrieval_heads, const at::Tensor& q_index, const at::Tensor& k_index,
          at::IntArrayRef index_map, double p, int64_t window, int64_t near_window, int64_t sinks,
          int64_t min_tokens, double scale, int64_t block_size, const MaybeTensor& offset,
          const MaybeTensor& k_local, const MaybeTensor& v_local, const MaybeTensor& start,
          int64_t length, const Quantised& quantised)
      : attended(kOp, true, q, k, v, retrieval_heads, window, near_window, sinks, scale, {}, {},
                 block_size, k_local, v_local, start, length),
        indexed(kOp, q_index, k_index, index_map, near_window, sinks, block_size, {}, offset, start,
                quantised) {
    check_selection(kOp, p, min_tokens, block_size);
    TORCH_CHECK_VALUE(!retrieval_heads.empty(),
                      "rtpurbo::sparse_decode: retrieval_heads must name a query head; use decode "
                      "without one");
    check_tensor(kOp, "q_index", q_index, "[B, R, 1, r]",
                 {q.size(0), static_cast<int64_t>(retrieval_heads.size()), 1, kAnySize});
    check_device(kOp, "q_index", q_index, "q", q);
    TORCH_CHECK_VALUE(indexed.params().keys == keys(),
                      "rtpurbo::sparse_decode: k_index must hold the N = ", keys(),
                      " keys of k (those before it in codes), got ", indexed.params().keys);
  }

  int64_t keys() const { return attended.params().length; }
};

/// Where each retrieval head's KV head stands in k.
std::vector<int64_t> key_heads(const at::Tensor& q, const at::Tensor& k,
                               at::IntArrayRef retrieval_heads, const MaybeTensor& k_local) {
  const int64_t kv_heads = k.size(1) + (k_local ? k_local->size(1) : 0);
  const int64_t group = q.size(1) / kv_heads;
  std::vector<int64_t> heads;
  int64_t place = -1, previous = -1;
  for (const int64_t head : retrieval_heads) {
    place += head / group != previous;
    previous = head / group;
    heads.push_back(k_local ? place : previous);
  }
  return heads;
}

/// The members' keys as bits, from indices [B, R, 1, C] that are -1 beyond the members.
at::Tensor key_mask(const at::Tensor& all_indices, const at::Tensor& counts, int64_t keys,
                    int64_t block_size) {
  // On CUDA the longest list is not known without a synchronisation.
  const bool knows_longest = all_indices.is_cpu() && counts.numel() > 0;
  const at::Tensor indices =
      knows_longest ? all_indices.narrow(-1, 0, counts.max().item<int32_t>()) : all_indices;
  const int64_t words = (keys + kWordKeys - 1) / kWordKeys;
  const int64_t of_word = kWordKeys / block_size;  // a power of two, as block_size is
  const int64_t word_shift = std::countr_zero(static_cast<uint64_t>(of_word));
  const int64_t member = block_size == kWordKeys ? -1 : (int64_t{1} << block_size) - 1;
  const at::Tensor place = indices.to(at::kLong);
  // Padding goes to a word of its own.
  const at::Tensor word =
      at::where(at::lt(place, 0), words, at::bitwise_right_shift(place, word_shift));
  const at::Tensor bits = at::bitwise_left_shift(
      at::full_like(place, member), at::mul(at::bitwise_and(place, of_word - 1), block_size));
  const at::Tensor mask = at::zeros({indices.size(0), indices.size(1), 1, words + 1},
                                    indices.options().dtype(at::kLong));
  return mask.scatter_add_(-1, word, bits).narrow(-1, 0, words).contiguous();
}

Result composed(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                at::IntArrayRef retrieval_heads, const at::Tensor& q_index,
                const at::Tensor& k_index, at::IntArrayRef index_map, double p, int64_t window,
                int64_t near_window, int64_t sinks, int64_t min_tokens, double scale,
                int64_t block_size, bool beyond_window, const MaybeTensor& offset,
                const MaybeTensor& k_local, const MaybeTensor& v_local, const MaybeTensor& start,
                int64_t length, const MaybeTensor& codes, const MaybeTensor& ranges, bool exact) {
  const Checked checked(q, k, v, retrieval_heads, q_index, k_index, index_map, p, window,
                        near_window, sinks, min_tokens, scale, block_size, offset, k_local, v_local,
                        start, length, {codes, ranges});
  MaybeTensor near;
  if (beyond_window) {
    near = near_lse(q, k, retrieval_heads, key_heads(q, k, retrieval_heads, k_local), near_window,
                    sinks, scale, start);
  }
  const auto [indices, counts, mass] =
      select(q_index, k_index, index_map, p, near_window, sinks, min_tokens, block_size, near,
             offset, start, 0, exact, codes, ranges);
  const auto [out, lse] = decode(q, k, v, retrieval_heads, window, near_window, sinks, scale,
                                 indices, counts, block_size, k_local, v_local, start, length);
  return {out, lse, key_mask(indices, counts, checked.keys(), block_size), counts, mass};
}

#ifdef RTPURBO_WITH_CUDA
Result launch(const at::Tensor& q_index, const Checked& checked, cuda::SparseDecodeParams& params,
              const cuda::SparseDecodePlan& plan) {
  const auto empty = [&](at::IntArrayRef sizes, at::ScalarType type) {
    return at::empty(sizes, q_index.options().dtype(type));
  };
  const int64_t batch = q_index.size(0), heads = q_index.size(1);
  const at::Tensor selected = empty({batch, heads, 1, params.words}, at::kLong);
  const at::Tensor counts = empty({batch, heads, 1}, at::kInt);
  const at::Tensor mass = empty({batch, heads, 1}, at::kFloat);
  params.selected_ptr = reinterpret_cast<uint64_t*>(selected.mutable_data_ptr<int64_t>());
  params.select.counts_ptr = counts.mutable_data_ptr<int32_t>();
  params.select.mass_ptr = mass.mutable_data_ptr<float>();
  const at::Tensor workspace = empty({static_cast<int64_t>(plan.workspace_bytes)}, at::kByte);
  RTPURBO_CUDA_CHECK(kOp, cuda::launch_sparse_decode(params, plan, workspace.mutable_data_ptr(),
                                                     c10::cuda::getCurrentCUDAStream()));
  const auto [out, lse] = checked.attended.result();
  return {out, lse, selected, counts, mass};
}

Result fused(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
             at::IntArrayRef retrieval_heads, const at::Tensor& q_index, const at::Tensor& k_index,
             at::IntArrayRef index_map, double p, int64_t window, int64_t near_window,
             int64_t sinks, int64_t min_tokens, double scale, int64_t block_size,
             bool beyond_window, const MaybeTensor& offset, const MaybeTensor& k_local,
             const MaybeTensor& v_local, const MaybeTensor& start, int64_t length,
             const MaybeTensor& codes, const MaybeTensor& ranges, bool exact) {
  const Checked checked(q, k, v, retrieval_heads, q_index, k_index, index_map, p, window,
                        near_window, sinks, min_tokens, scale, block_size, offset, k_local, v_local,
                        start, length, {codes, ranges});
  if (q.size(0) > 0) {
    const c10::cuda::CUDAGuard guard(q.device());
    cuda::SparseDecodeParams params{
        .decode = cuda::decode_params(kOp, checked.attended.params()),
        .select = cuda::select_params(kOp, checked.indexed.params()),
        .selected_ptr = nullptr,
        .words = (checked.keys() + kWordKeys - 1) / kWordKeys,
    };
    params.select.near_is_scored = !beyond_window;
    params.select.min_members = min_members(min_tokens, block_size);
    params.select.p = p;
    params.select.whole_bins = !exact;
    cuda::SparseDecodePlan plan;
    const cudaError_t planned = cuda::plan_sparse_decode(params, cuda::multiprocessors(), plan);
    if (planned != cudaErrorNotSupported) {
      RTPURBO_CUDA_CHECK(kOp, planned);
      return launch(q_index, checked, params, plan);
    }
  }
  return composed(q, k, v, retrieval_heads, q_index, k_index, index_map, p, window, near_window,
                  sinks, min_tokens, scale, block_size, beyond_window, offset, k_local, v_local,
                  start, length, codes, ranges, exact);
}
#endif

}  // namespace

Result sparse_decode(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     at::IntArrayRef retrieval_heads, const at::Tensor& q_index,
                     const at::Tensor& k_index, at::IntArrayRef index_map, double p, int64_t window,
                     int64_t near_window, int64_t sinks, int64_t min_tokens, double scale,
                     int64_t block_size, bool beyond_window, const MaybeTensor& offset,
                     const MaybeTensor& k_local, const MaybeTensor& v_local,
                     const MaybeTensor& start, int64_t length, const MaybeTensor& codes,
                     const MaybeTensor& ranges, bool exact) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::sparse_decode", "")
                             .typed<decltype(sparse_decode)>();
  return op.call(q, k, v, retrieval_heads, q_index, k_index, index_map, p, window, near_window,
                 sinks, min_tokens, scale, block_size, beyond_window, offset, k_local, v_local,
                 start, length, codes, ranges, exact);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "sparse_decode(Tensor q, Tensor k, Tensor v, int[] retrieval_heads, Tensor q_index,"
      " Tensor k_index, int[] index_map, float p, int window, int near_window, int sinks,"
      " int min_tokens, float scale, int block_size=1, bool beyond_window=True,"
      " Tensor? offset=None, Tensor? k_local=None, Tensor? v_local=None, Tensor? start=None,"
      " int length=-1, Tensor? codes=None, Tensor? ranges=None, bool exact=True)"
      " -> (Tensor out, Tensor lse, Tensor selected, Tensor counts, Tensor mass)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("sparse_decode", &composed); }
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("sparse_decode", &fused); }
#endif

}  // namespace rtpurbo
