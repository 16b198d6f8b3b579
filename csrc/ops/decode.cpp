#include "csrc/ops/decode.h"

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "csrc/cpu/decode.h"
#include "csrc/ops/common/check.h"
#include "csrc/ops/common/heads.h"
#ifdef RTPURBO_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "csrc/cuda/decode.h"
#include "csrc/cuda/limits.h"
#include "csrc/ops/common/cuda_arguments.h"
#include "csrc/ops/common/cuda_check.h"
#endif

namespace rtpurbo {
namespace {

constexpr const char* kOp = "decode";

using Result = std::tuple<at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

void check_lists(const at::Tensor& q, int64_t lists, const MaybeTensor& indices,
                 const MaybeTensor& counts, int64_t block_size) {
  TORCH_CHECK_VALUE(indices.has_value() == counts.has_value(),
                    "rtpurbo::decode: indices and counts must be given together");
  TORCH_CHECK_VALUE(block_size >= 1, "rtpurbo::decode: block_size must be >= 1, got ", block_size);
  if (!indices) return;
  check_tensor(kOp, "indices", *indices, "[B, R, 1, C]", {q.size(0), lists, 1, kAnySize});
  check_tensor(kOp, "counts", *counts, "[B, R, 1]", {q.size(0), lists, 1});
  check_dtype(kOp, "indices", *indices, at::kInt);
  check_dtype(kOp, "counts", *counts, at::kInt);
  check_device(kOp, "indices", *indices, "q", q);
  check_device(kOp, "counts", *counts, "q", q);
}

/// Returns N.
int64_t check_length(const at::Tensor& q, const at::Tensor& k, int64_t length) {
  TORCH_CHECK_VALUE(q.size(2) == 1, "rtpurbo::decode: q must have one row, got M = ", q.size(2),
                    "; use attention for more");
  if (k.size(1) == 0) {
    TORCH_CHECK_VALUE(length >= 1,
                      "rtpurbo::decode: length must be the number of keys so far when no KV head "
                      "is stored whole, got ",
                      length);
    return length;
  }
  TORCH_CHECK_VALUE(length == -1 || length == k.size(2),
                    "rtpurbo::decode: length must be -1 or N = ", k.size(2), ", got ", length);
  return k.size(2);
}

/// The checked arguments as kernel parameters, with the results and the tensors that these point
/// into.
class Arguments {
 public:
  Arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
            at::IntArrayRef retrieval_heads, int64_t window, int64_t near_window, int64_t sinks,
            double scale, const MaybeTensor& indices, const MaybeTensor& counts, int64_t block_size,
            const MaybeTensor& k_local, const MaybeTensor& v_local, const MaybeTensor& start,
            int64_t length) {
    const int64_t kv_heads =
        check_heads_and_keys(kOp, q, k, v, retrieval_heads, start, k_local, v_local);
    check_mask(kOp, window, sinks, scale);
    TORCH_CHECK_VALUE(near_window >= 1, "rtpurbo::decode: near_window must be >= 1, got ",
                      near_window);
    const int64_t keys = check_length(q, k, length);
    const int64_t lists = static_cast<int64_t>(retrieval_heads.size());
    check_lists(q, lists, indices, counts, block_size);
    if (k_local) {
      TORCH_CHECK_VALUE(k_local->size(1) == 0 || k_local->size(2) == sinks + window,
                        "rtpurbo::decode: k_local must have sinks + window = ", sinks + window,
                        " slots, got ", k_local->size(2));
    }
    out_ = at::empty({q.size(0), 1, q.size(1), q.size(3)}, q.options()).transpose(1, 2);
    lse_ =
        at::empty({q.size(0), q.size(1), 1}, q.options().dtype(at::toOpMathType(q.scalar_type())));
    sets_ =
        head_sets(retrieval_heads, q.size(1), kv_heads, indices.has_value(), k_local.has_value());
    if (indices) indices_ = indices->contiguous();
    if (counts) counts_ = counts->contiguous();
    params_ = {
        .dtype = q.scalar_type(),
        .q = heads_view(q),
        .k = heads_view(k),
        .v = heads_view(v),
        .k_local = k_local ? heads_view(*k_local) : HeadsView{},
        .v_local = v_local ? heads_view(*v_local) : HeadsView{},
        .out = heads_view(out_),
        .lse_ptr = lse_.mutable_data_ptr(),
        .start_ptr = start_ptr(start, start_),
        .indices_ptr = indices ? indices_.const_data_ptr<int32_t>() : nullptr,
        .counts_ptr = counts ? counts_.const_data_ptr<int32_t>() : nullptr,
        .batch = q.size(0),
        .heads = q.size(1),
        .length = keys,
        .slots = k_local ? k_local->size(2) : 0,
        .dim = q.size(3),
        .lists = lists,
        .capacity = indices ? indices->size(3) : 0,
        .block_size = block_size,
        .window = std::min(window, keys),
        .near_window = std::min(near_window, keys),
        .sinks = std::min(sinks, keys),
        .scale = scale,
        .head_sets = &sets_,
    };
  }
  Arguments(const Arguments&) = delete;

  const cpu::DecodeParams& params() const { return params_; }
  Result result() const { return {out_, lse_}; }

 private:
  at::Tensor out_, lse_, indices_, counts_, start_;
  std::vector<cpu::HeadSet> sets_;
  cpu::DecodeParams params_;
};

Result decode_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  at::IntArrayRef retrieval_heads, int64_t window, int64_t near_window,
                  int64_t sinks, double scale, const MaybeTensor& indices,
                  const MaybeTensor& counts, int64_t block_size, const MaybeTensor& k_local,
                  const MaybeTensor& v_local, const MaybeTensor& start, int64_t length) {
  const Arguments arguments(q, k, v, retrieval_heads, window, near_window, sinks, scale, indices,
                            counts, block_size, k_local, v_local, start, length);
  cpu::decode_kernel(arguments.params());
  return arguments.result();
}

#ifdef RTPURBO_WITH_CUDA
/// Adds the heads as sets of at most kMaxHeads that share every load.
void add_sets(cuda::DecodeParams& params, cuda::DecodeSet set, at::IntArrayRef heads) {
  constexpr int kMost = cuda::DecodeSet::kMaxHeads;
  for (size_t first = 0; first < heads.size(); first += kMost) {
    const auto part = heads.slice(first, std::min<size_t>(kMost, heads.size() - first));
    set.heads_count = static_cast<uint8_t>(part.size());
    set.first_slot = static_cast<int16_t>(params.slots_count);
    params.sets[params.sets_count++] = set;
    for (const int64_t head : part) {
      const auto slot = static_cast<int16_t>(params.slots_count++);
      params.slot_heads[slot] = static_cast<int16_t>(head);
      auto& slots = params.head_slots[head];
      slots[slots[0] < 0 ? 0 : 1] = slot;
    }
  }
}

/// The CPU's sets, with the near keys of listed heads as sets of their own: all heads of a KV head
/// whose windows are equal load them together.
void fill_sets(cuda::DecodeParams& params, const std::vector<cpu::HeadSet>& sets) {
  for (auto& slots : params.head_slots) std::fill(std::begin(slots), std::end(slots), -1);
  const bool one_window = params.window == params.near_window;
  for (size_t i = 0; i < sets.size();) {
    const int64_t kv_head = sets[i].kv_head;
    const bool from_local = sets[i].from_local;
    cuda::DecodeSet set{.from_local = from_local, .kv_head = static_cast<int16_t>(kv_head)};
    std::vector<int64_t> near;
    std::vector<int64_t> listed_near;
    for (; i < sets.size() && sets[i].kv_head == kv_head && sets[i].from_local == from_local; ++i) {
      const std::vector<int64_t>& heads = sets[i].heads;
      if (sets[i].keys == cpu::KeySet::kVisible) {
        set.keys = cuda::DecodeKeys::kVisible;
        add_sets(params, set, heads);
      } else if (sets[i].keys == cpu::KeySet::kListed) {
        set.keys = cuda::DecodeKeys::kListed;
        set.list = static_cast<int16_t>(sets[i].list);
        add_sets(params, set, heads);
        auto& list = one_window ? near : listed_near;
        list.insert(list.end(), heads.begin(), heads.end());
      } else {
        near.insert(near.end(), heads.begin(), heads.end());
      }
    }
    set.keys = cuda::DecodeKeys::kNear;
    add_sets(params, set, near);
    set.near_window = true;
    add_sets(params, set, listed_near);
  }
}

Result decode_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   at::IntArrayRef retrieval_heads, int64_t window, int64_t near_window,
                   int64_t sinks, double scale, const MaybeTensor& indices,
                   const MaybeTensor& counts, int64_t block_size, const MaybeTensor& k_local,
                   const MaybeTensor& v_local, const MaybeTensor& start, int64_t length) {
  cuda::check_not_double(kOp, "q", q.scalar_type());
  const Arguments arguments(q, k, v, retrieval_heads, window, near_window, sinks, scale, indices,
                            counts, block_size, k_local, v_local, start, length);
  TORCH_CHECK_VALUE(q.size(1) <= cuda::DecodeParams::kMaxHeads && q.size(3) <= cuda::kMaxHeadDim,
                    "rtpurbo::decode: q on CUDA must have Hq <= ", cuda::DecodeParams::kMaxHeads,
                    " and D <= ", cuda::kMaxHeadDim, ", got Hq = ", q.size(1),
                    " and D = ", q.size(3));
  if (q.size(0) == 0) return arguments.result();
  const c10::cuda::CUDAGuard guard(q.device());
  const cpu::DecodeParams& in = arguments.params();
  cuda::DecodeParams params{
      .type = cuda::element_type(in.dtype),
      .q = in.q,
      .k = in.k,
      .v = in.v,
      .k_local = in.k_local,
      .v_local = in.v_local,
      .out = in.out,
      .lse_ptr = static_cast<float*>(in.lse_ptr),
      .start_ptr = in.start_ptr,
      .indices_ptr = in.indices_ptr,
      .counts_ptr = in.counts_ptr,
      .batch = in.batch,
      .heads = in.heads,
      .length = in.length,
      .slots = in.slots,
      .dim = in.dim,
      .lists = in.lists,
      .capacity = in.capacity,
      .block_size = std::min(in.block_size, std::max<int64_t>(1, in.length)),
      .window = in.window,
      .near_window = in.near_window,
      .sinks = in.sinks,
      .scale = static_cast<float>(in.scale),
      .splits = 1,
  };
  fill_sets(params, *in.head_sets);
  params.splits = cuda::decode_splits(params, cuda::multiprocessors());
  const at::Tensor workspace = at::empty({static_cast<int64_t>(cuda::decode_workspace(params))},
                                         q.options().dtype(at::kByte));
  RTPURBO_CUDA_CHECK(kOp, cuda::launch_decode(params, workspace.mutable_data_ptr(),
                                              c10::cuda::getCurrentCUDAStream()));
  return arguments.result();
}
#endif

}  // namespace

Result decode(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
              at::IntArrayRef retrieval_heads, int64_t window, int64_t near_window, int64_t sinks,
              double scale, const MaybeTensor& indices, const MaybeTensor& counts,
              int64_t block_size, const MaybeTensor& k_local, const MaybeTensor& v_local,
              const MaybeTensor& start, int64_t length) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rtpurbo::decode", "")
                             .typed<decltype(decode)>();
  return op.call(q, k, v, retrieval_heads, window, near_window, sinks, scale, indices, counts,
                 block_size, k_local, v_local, start, length);
}

TORCH_LIBRARY_FRAGMENT(rtpurbo, m) {
  m.def(
      "decode(Tensor q, Tensor k, Tensor v, int[] retrieval_heads, int window, int near_window,"
      " int sinks, float scale, Tensor? indices=None, Tensor? counts=None, int block_size=1,"
      " Tensor? k_local=None, Tensor? v_local=None, Tensor? start=None, int length=-1)"
      " -> (Tensor out, Tensor lse)");
}
TORCH_LIBRARY_IMPL(rtpurbo, CPU, m) { m.impl("decode", &decode_cpu); }
#ifdef RTPURBO_WITH_CUDA
TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) { m.impl("decode", &decode_cuda); }
#endif

}  // namespace rtpurbo
