#include "csrc/cuda/alignment.h"
#include "csrc/cuda/attention.h"
#include "csrc/cuda/element.cuh"
#include "csrc/cuda/prefers_portable.h"
#ifdef RTPURBO_WITH_SM90
#include "csrc/cuda/sm90/attention.h"
#endif
namespace rtpurbo::cuda {

// Each is instantiated in a file of its own, in instances/.
template <typename T, int kDim>
cudaError_t launch_attention_mma(const AttentionParams& params, cudaStream_t stream);
template <int kDim>
cudaError_t launch_attention_simt(const AttentionParams& params, cudaStream_t stream);

namespace {

template <typename T, int kDim>
cudaError_t launch_dim(const AttentionParams& params, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    return launch_attention_simt<kDim>(params, stream);
  } else {
    return launch_attention_mma<T, kDim>(params, stream);
  }
}

#ifdef RTPURBO_WITH_SM90
bool runs_on_sm90(const AttentionParams& params) {
  return !prefers_portable() && sm90::takes_attention(params);
}
#endif

}  // namespace

bool rows_are_aligned(const AttentionParams& params) {
  const int64_t bytes = params.type == ElementType::kFloat32 ? 4 : 2;
  bool aligned = true;
  for (const HeadsView* view :
       {&params.q, &params.k, &params.v, &params.k_local, &params.v_local}) {
    aligned = aligned && rows_are_aligned(*view, bytes);
  }
  return aligned;
}

int64_t attention_parts([[maybe_unused]] const AttentionParams& params) {
#ifdef RTPURBO_WITH_SM90
  if (runs_on_sm90(params)) return sm90::attention_parts(params);
#endif
  return 0;
}

cudaError_t launch_attention(const AttentionParams& params, cudaStream_t stream) {
#ifdef RTPURBO_WITH_SM90
  if (runs_on_sm90(params)) {
    const cudaError_t error = sm90::launch_attention(params, stream);
    if (error != cudaErrorNotSupported) return error;
  }
#endif
  AttentionParams checked = params;
  checked.vectorized = rows_are_aligned(params);
  return dispatch_element(params.type, [&](auto element) {
    using T = decltype(element);
    if (params.dim <= 64) return launch_dim<T, 64>(checked, stream);
    if (params.dim <= 128) return launch_dim<T, 128>(checked, stream);
    if (params.dim <= kMaxHeadDim) return launch_dim<T, 256>(checked, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace rtpurbo::cuda
