// CUDA tensors where there is no CUDA kernel: a refusal that says what to do instead.

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace rtpurbo {
namespace {

#ifdef RTPURBO_WITH_CUDA
void train_on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              ": no CUDA kernel yet; train the index on the CPU (model.to('cpu'))");
}
#else
void rebuild(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(),
      ": rtpurbo was built without CUDA; rebuild with RTPURBO_CUDA=1, or run on the CPU "
      "(model.to('cpu'))");
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(rtpurbo, CUDA, m) {
#ifdef RTPURBO_WITH_CUDA
  for (const char* op : {"index_kl", "index_project_backward"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&train_on_the_cpu>());
  }
#else
  for (const char* op : {"attention", "attention_backward", "cache_append", "cache_append_index",
                         "cache_append_projected", "cache_unroll", "decode", "index_kl",
                         "index_project", "index_project_backward", "near_lse", "quantize_index",
                         "retrieval_scores", "select", "select_tiles", "sparse_decode", "top_p"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&rebuild>());
  }
#endif
}

}  // namespace rtpurbo
