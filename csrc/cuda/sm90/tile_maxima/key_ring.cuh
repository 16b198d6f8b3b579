#pragma once
// Keys on their way through shared memory, copied by the copy engine some stages ahead. Barriers
// instead of __syncthreads let the warpgroups drift apart, so that one reduces while another
// multiplies.

#include "csrc/cuda/ptx/tma.cuh"
#include "csrc/cuda/sm90/tile_maxima/work.cuh"

namespace rtpurbo::cuda::sm90::maxima {

class KeyRing {
  static constexpr unsigned kStages = 8;
  static constexpr unsigned kAhead = 6;  // stages whose copies have begun

 public:
  struct Shared {
    alignas(1024) uint8_t keys[kStages][kStageKeys * kKeyBytes];
    ptx::Mbarrier full[kStages];   // the copies are there
    ptx::Mbarrier empty[kStages];  // all warps have read them
  };

  /// Once, by one thread.
  static __device__ void init(Shared& shared) {
    for (unsigned i = 0; i < kStages; ++i) {
      shared.full[i].init(1);
      shared.empty[i].init(kThreads / 32);
    }
    ptx::fence_mbarrier_init();
  }

  /// Keys of `stages`, counted from key 0, of a head.
  __device__ KeyRing(Shared& shared, const CUtensorMap& map, int batch, int head,
                     const Range& stages)
      : shared_(shared),
        map_(map),
        batch_(batch),
        head_(head),
        first_(stages.begin),
        count_(stages.end - stages.begin) {
    if (threadIdx.x == 0) {
      for (unsigned i = 0; i < kAhead; ++i) copy(i);
    }
    __syncwarp();
  }

  /// The keys of stage i, counted from the first, once they are there.
  __device__ __forceinline__ const uint8_t* acquire(unsigned i) {
    shared_.full[i % kStages].wait(i / kStages % 2);
    return shared_.keys[i % kStages];
  }

  /// Begins the copies of a later stage; once in every stage.
  __device__ __forceinline__ void advance(unsigned i) {
    if (threadIdx.x == 0) copy(i + kAhead);
    __syncwarp();
  }

  /// This warp has read stage i.
  __device__ __forceinline__ void release(unsigned i) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) shared_.empty[i % kStages].arrive();
  }

 private:
  __device__ __forceinline__ void copy(unsigned i) {
    if (i >= count_) return;
    const unsigned at = i % kStages;
    if (i >= kStages) shared_.empty[at].wait((i / kStages + 1) % 2);
    shared_.full[at].arrive_expect(kStageKeys * kKeyBytes);
#pragma unroll
    for (int part = 0; part < kStageKeys / kBoxKeys; ++part) {
      const int block =
          static_cast<int>(first_ + i) * (kStageKeys / tiles::kBlock) + part * kBoxBlocks;
      ptx::load_box(shared_.keys[at] + part * kBoxKeys * kKeyBytes, map_, 0, block, 0, head_,
                    batch_, shared_.full[at]);
    }
  }

  Shared& shared_;
  const CUtensorMap& map_;
  const int batch_, head_;
  const unsigned first_, count_;
};

}  // namespace rtpurbo::cuda::sm90::maxima
