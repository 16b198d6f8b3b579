#pragma once
// Keys on their way through shared memory. All threads copy: each one key of every stage, some
// stages ahead. Of two blocks the keys lie in turns, see block_maxima. Barriers instead of
// __syncthreads let the warpgroups drift apart, so that one reduces while another multiplies.

#include <cuda_fp16.h>

#include "csrc/cuda/ptx/cp_async.cuh"
#include "csrc/cuda/ptx/mbarrier.cuh"
#include "csrc/cuda/ptx/wgmma_half.cuh"
#include "csrc/cuda/sm90/tile_maxima/work.cuh"

namespace rtpurbo::cuda::sm90::maxima {

class KeyRing {
  static constexpr unsigned kStages = 8;
  static constexpr unsigned kCopied = 4;   // stages ahead for which a thread starts its copies
  static constexpr unsigned kArrived = 2;  // and for which it says that they have arrived

 public:
  struct Shared {
    alignas(1024) uint8_t keys[kStages][kStageKeys * kKeyBytes];
    ptx::Mbarrier full[kStages];   // all warps' copies are there
    ptx::Mbarrier empty[kStages];  // all warps have read them
  };

  /// Once, by one thread.
  static __device__ void init(Shared& shared) {
    for (unsigned i = 0; i < kStages; ++i) {
      shared.full[i].init(kThreads / 32);
      shared.empty[i].init(kThreads / 32);
    }
    ptx::fence_mbarrier_init();
  }

  /// `keys` are the rows of the first of `count` stages, of which `rows` exist.
  __device__ KeyRing(Shared& shared, const __half* keys, int64_t stride, int64_t rows,
                     unsigned count)
      : shared_(shared), stride_(stride), count_(count) {
    const int row = static_cast<int>(threadIdx.x);
    from_ = keys + row * stride;
    rows_left_ = rows - row;
    for (unsigned i = 0; i < kCopied; ++i) copy(i);
    for (unsigned i = 0; i < kArrived; ++i) publish(i);
  }

  /// The keys of stage `i`, once they are there.
  __device__ __forceinline__ const uint8_t* acquire(unsigned i) {
    shared_.full[i % kStages].wait(i / kStages % 2);
    return shared_.keys[i % kStages];
  }

  /// Goes on with the copies of later stages; once in every stage.
  __device__ __forceinline__ void advance(unsigned i) {
    copy(i + kCopied);
    publish(i + kArrived);
  }

  /// This warp has read stage `i`.
  __device__ __forceinline__ void release(unsigned i) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) shared_.empty[i % kStages].arrive();
  }

 private:
  static_assert(kThreads == kStageKeys, "a thread copies one key of every stage");

  /// Where a key lies in its stage.
  static __device__ __forceinline__ int row_of(int key) {
    constexpr int kPair = 2 * tiles::kBlock;
    return key / kPair * kPair + key % tiles::kBlock * 2 + key / tiles::kBlock % 2;
  }

  __device__ __forceinline__ void copy(unsigned i) {
    if (i < count_) {
      if (i >= kStages) shared_.empty[i % kStages].wait((i / kStages + 1) % 2);
      uint8_t* to = shared_.keys[i % kStages];
      const bool valid = rows_left_ > 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ptx::cp_async_16(to + ptx::offset_in_32_byte_rows(row_of(threadIdx.x), half),
                         from_ + half * 8, valid);
      }
      from_ += kStageKeys * stride_;
      rows_left_ -= kStageKeys;
    }
    ptx::cp_async_commit();
  }

  /// kCopied - kArrived stages were begun after this one.
  __device__ __forceinline__ void publish(unsigned i) {
    ptx::cp_async_wait<kCopied - kArrived>();
    ptx::fence_shared_for_wgmma();
    __syncwarp();
    if (threadIdx.x % 32 == 0 && i < count_) shared_.full[i % kStages].arrive();
  }

  Shared& shared_;
  const __half* from_;
  const int64_t stride_;
  int64_t rows_left_;
  const unsigned count_;
};

}  // namespace rtpurbo::cuda::sm90::maxima
