#pragma once
// The two matrix products of a warpgroup, which start here and end behind a ptx::wgmma_wait, and
// the first one by a warp alone.

#include "csrc/cuda/ptx/ldmatrix.cuh"
#include "csrc/cuda/ptx/mma.cuh"
#include "csrc/cuda/ptx/wgmma.cuh"
#include "csrc/cuda/sm90/attention_shared.cuh"

namespace rtpurbo::cuda::sm90 {

inline constexpr int kStep = 16;  // of the inner dimension
inline constexpr int kPanelSteps = kBoxColumns / kStep;
inline constexpr int kRowBytes = kBoxColumns * 2;    // of a row of a panel
inline constexpr int kPanelStep = kStep * 2;         // bytes to the next columns
inline constexpr int kRowsStep = kStep * kRowBytes;  // bytes to the next rows

/// 16 columns of a warp's 16 rows of queries, as the first operand; `thread` of the warpgroup.
__device__ __forceinline__ void load_query(uint32_t (&fragment)[4], const unsigned char* panels,
                                           int thread, int step) {
  const int row = thread / 32 * 16 + thread % 16;
  const int chunk = step % kPanelSteps * 2 + thread % 32 / 16;
  ptx::ldmatrix_x4(fragment, panels + step / kPanelSteps * kBoxBytes + swizzled(row, chunk));
}

/// The queries of a warpgroup's 64 rows: in registers, which spares shared memory a third of the
/// traffic of Q K^T, or where they are.
template <int kDim, bool kInRegisters>
struct Queries;

template <int kDim>
struct Queries<kDim, false> {
  const unsigned char* panels;

  __device__ void load(const unsigned char* shared, int) { panels = shared; }

  template <typename T, int kKeys, bool kAccumulate>
  __device__ void multiply(float (&scores)[kKeys / 2], int step, uint64_t keys) const {
    const int offset = step / kPanelSteps * kBoxBytes + step % kPanelSteps * kPanelStep;
    const uint64_t queries = ptx::matrix_descriptor(panels, 0) + (offset >> 4);
    ptx::wgmma_rows<T, kKeys, kAccumulate>(scores, queries, keys);
  }
};

template <int kDim>
struct Queries<kDim, true> {
  uint32_t fragments[kDim / kStep][4];

  __device__ void load(const unsigned char* shared, int thread) {
#pragma unroll
    for (int step = 0; step < kDim / kStep; ++step) {
      load_query(fragments[step], shared, thread, step);
    }
  }

  template <typename T, int kKeys, bool kAccumulate>
  __device__ void multiply(float (&scores)[kKeys / 2], int step, uint64_t keys) const {
    ptx::wgmma_rows<T, kKeys, kAccumulate>(scores, fragments[step], keys);
  }
};

/// Starts scores = Q K^T for kKeys keys, whose panels of 64 columns are panel_bytes apart.
template <typename T, int kKeys, int kDim, bool kInRegisters>
__device__ __forceinline__ void multiply_keys(float (&scores)[kKeys / 2],
                                              const Queries<kDim, kInRegisters>& queries,
                                              const unsigned char* shared, int panel_bytes) {
  const uint64_t keys = ptx::matrix_descriptor(shared, 0);
  ptx::pin(scores);
  ptx::wgmma_fence();
  queries.template multiply<T, kKeys, false>(scores, 0, keys);
#pragma unroll
  for (int step = 1; step < kDim / kStep; ++step) {
    const int offset = step / kPanelSteps * panel_bytes + step % kPanelSteps * kPanelStep;
    queries.template multiply<T, kKeys, true>(scores, step, keys + (offset >> 4));
  }
  ptx::wgmma_commit();
}

/// scores = Q K^T of a warp's own rows, by the warp alone, when it returns.
template <typename T, int kKeys, int kDim>
__device__ __forceinline__ void multiply_keys_alone(float (&scores)[kKeys / 2],
                                                    const unsigned char* queries,
                                                    const unsigned char* shared, int panel_bytes) {
  const int lane = threadIdx.x % 32, key = lane / 16 * 8 + lane % 8;
#pragma unroll
  for (float& score : scores) score = 0.0f;
#pragma unroll 1
  for (int step = 0; step < kDim / kStep; ++step) {
    uint32_t q[4];
    load_query(q, queries, threadIdx.x % kWarpgroup, step);
    const int chunk = step % kPanelSteps * 2 + lane / 8 % 2;
    const unsigned char* keys = shared + step / kPanelSteps * panel_bytes + swizzled(key, chunk);
#pragma unroll
    for (int j = 0; j < kKeys / 8; j += 2) {
      uint32_t k[4];
      ptx::ldmatrix_x4(k, keys + j * 8 * kRowBytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(scores[4 * (j + i)]), q, k[2 * i],
                             k[2 * i + 1]);
      }
    }
  }
}

/// Starts out += weights V for kKeys keys.
template <typename T, int kKeys, int kDim, int kSteps>
__device__ __forceinline__ void multiply_values(float (&out)[kDim / 2],
                                                uint32_t (&weights)[kSteps][4],
                                                const unsigned char* shared, int panel_bytes) {
  const uint64_t values = ptx::matrix_descriptor(shared, panel_bytes);
  ptx::pin(out);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) ptx::pin(weights[step]);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kKeys / kStep; ++step) {
    ptx::wgmma_columns<T, kDim>(out, weights[step], values + (step * kRowsStep >> 4));
  }
  ptx::wgmma_commit();
}

}  // namespace rtpurbo::cuda::sm90
