#pragma once
// The main scan where heads share index keys: each key is loaded once, and scored for all its heads
// by one product of the tensor cores. What a head's sieve keeps goes to lists of that head.

#include "csrc/cuda/ptx/mad_wide.cuh"
#include "csrc/cuda/ptx/mma.cuh"
#include "csrc/cuda/select/half_keys.cuh"
#include "csrc/cuda/select/key_heads.h"
#include "csrc/cuda/select/shared_runs.cuh"
#include "csrc/cuda/select/stats.cuh"

namespace rtpurbo::cuda {

/// Products m16n8k16 of 16 keys and the heads' queries, of which a lane with g = lane / 4 and
/// t = lane % 4 gets the scores of keys g and g + 8 for heads 2t and 2t + 1. Dimensions are
/// permuted: lane t of a row has 4t to 4t + 3, so that a warp loads whole lines of memory.
class SharedScan {
  static constexpr int kDim = 16, kHeads = KeyHeads::kMostOfOne;
  static constexpr int kTiles = 4, kTileKeys = 16;  // of a step
  static constexpr int kStepKeys = kTiles * kTileKeys;
  static constexpr int kStepsOfRun = SharedRuns::kKeys / kStepKeys;

 public:
  struct Shared {
    float query[kHeads][kDim];
    BlockStats of_head[kHeads][kSelectWarps];
  };

  /// By all threads of each block of the grid, between two barriers of it.
  static __device__ __forceinline__ void run(const SelectParams& p, const SelectWorkspace& w,
                                             const KeyHeads& keys, Shared& shared) {
    const int scan = static_cast<int>(blockIdx.x) / w.shared_blocks;
    const int rank = static_cast<int>(blockIdx.x) - scan * w.shared_blocks;
    if (scan >= p.batch * keys.count) return;
    const int batch = scan / keys.count, number = scan - batch * keys.count;
    const int16_t* heads = keys.heads + keys.first[number];
    const int heads_count = keys.first[number + 1] - keys.first[number];
    const int first_problem = batch * static_cast<int>(p.heads);
    const Row row = row_of(p, first_problem + heads[0]);
    const auto problem_of = [&](int head) { return first_problem + heads[head]; };
    load_queries(p, heads_count, problem_of, shared);

    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const SharedRuns runs(row, w.shared_blocks);
    const int own_warp = warp * w.shared_blocks + rank;
    Sift sift(w, runs.list(own_warp), heads_count, problem_of, shared);
    const int own_runs = sift.is_wanted() ? runs.runs_of(own_warp) : 0;
    const Keys source(key_rows<__half>(p, p.k_index, row), p.k_index.row_stride);

    // The last run of all may not be whole.
    const bool whole =
        own_runs == 0 || runs.first_key(own_warp, own_runs - 1) <= runs.end - SharedRuns::kKeys;
    const int steps = (own_runs - !whole) * kStepsOfRun;
    const auto first_key = [&](int step) {
      return runs.first_key(own_warp, step / kStepsOfRun) + step % kStepsOfRun * kStepKeys;
    };
    Tile tiles[kTiles] = {};
    if (steps > 0) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) tiles[i] = source.tile(source.own(first_key(0)), i);
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int key = first_key(step) + lane / 4;
      const char* next = source.own(first_key(min(step + 1, steps - 1)));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const Tile now = tiles[i];
        tiles[i] = source.tile(next, i);  // a step ahead; the last one loads its own again
        sift.template add<false>(now, key + i * kTileKeys, runs.end, source);
      }
    }
    if (!whole) {
      const int first = runs.first_key(own_warp, own_runs - 1) + lane / 4;
#pragma unroll 1
      for (int n = first; n - lane / 4 < runs.end; n += kTileKeys) {
        sift.template add<true>(source.tile_before(n, runs.end), n, runs.end, source);
      }
    }
    if (__any_sync(0xffffffffu, sift.poisoned())) {
      // Once more with care: a NaN may come of an infinite key and the lower halves.
      sift.forget();
#pragma unroll 1
      for (int run = 0; run < own_runs; ++run) {
        const int first = runs.first_key(own_warp, run) + lane / 4;
#pragma unroll 1
        for (int n = first; n < first + SharedRuns::kKeys; n += kTileKeys) {
          sift.template add<true, true>(source.tile_before(n, runs.end), n, runs.end, source);
        }
      }
    }
    sift.put(w, own_warp, heads_count, problem_of, shared);
    __syncthreads();
    static_assert(kHeads <= kSelectWarps);
    if (warp >= heads_count) return;
    const BlockStats all = merge_stats(shared.of_head[warp], kSelectWarps, true);
    if (lane == 0) {
      w.shared_stats[static_cast<int64_t>(problem_of(warp)) * w.shared_blocks + rank] = all;
    }
  }

 private:
  /// The lane's dimensions of keys g and g + 8.
  struct Tile {
    uint2 dims[2];
  };

  class Keys {
   public:
    __device__ Keys(const __half* keys, int64_t stride)
        : keys_(reinterpret_cast<const char*>(keys)),
          stride_(static_cast<int>(stride * sizeof(__half))) {}

    /// Where the lane's dimensions are of the keys from this one on.
    __device__ const char* own(int first) const {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      return ptx::offset_by(keys_ + lane_bytes(), first + lane / 4, stride_);
    }

    /// Read once.
    __device__ Tile tile(const char* own, int i) const {
      const int64_t half = int64_t{stride_} * (kTileKeys / 2);
      return {__ldcs(reinterpret_cast<const uint2*>(own + 2 * i * half)),
              __ldcs(reinterpret_cast<const uint2*>(own + (2 * i + 1) * half))};
    }

    /// A tile from the lane's key n on, of which those from `end` on repeat the last before it.
    __device__ Tile tile_before(int n, int end) const {
      const auto dims = [&](int key) {
        return __ldg(reinterpret_cast<const uint2*>(
            ptx::offset_by(keys_ + lane_bytes(), min(key, end - 1), stride_)));
      };
      return {dims(n), dims(n + kTileKeys / 2)};
    }

    __device__ const uint4* whole(int n) const {
      return reinterpret_cast<const uint4*>(ptx::offset_by(keys_, n, stride_));
    }

   private:
    static __device__ int lane_bytes() { return static_cast<int>(threadIdx.x % 4 * sizeof(uint2)); }

    const char* const keys_;
    const int stride_;  // bytes
  };

  /// What a lane knows of its two heads. Scores are scaled by a power of two as the head's query
  /// is, so large that the lower halves of it need no scale of their own.
  class Sift {
   public:
    template <typename ProblemOf>
    __device__ Sift(const SelectWorkspace& w, int list, int heads_count,
                    const ProblemOf& problem_of, const Shared& shared)
        : queries_(shared.query[lane() % 4 * 2]) {
      constexpr int kTopExponent = 13;  // of the largest value, then
      const float* query = shared.query[lane() / 4];
      const int exponent = exponent_of<kDim>(query) + 1 - kTopExponent;
      const float scale = ldexpf(1.0f, -exponent), unscale = ldexpf(1.0f, exponent);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* pair = query + lane() % 4 * 4 + 2 * i;
        const float a = pair[0] * scale, b = pair[1] * scale;
        upper_[i] = ptx::pack_pair<__half>(a, b);
        lower_[i] = ptx::pack_pair<__half>(a - __half2float(__float2half_rn(a)),
                                           b - __half2float(__float2half_rn(b)));
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int head = lane() % 4 * 2 + h;
        unscale_[h] = __shfl_sync(0xffffffffu, unscale, head * 4);
        const bool real = head < heads_count;
        const float2 edge = real ? __ldcg(&w.edges[problem_of(head)]) : make_float2(INFINITY, 0.0f);
        scale_[h] = __shfl_sync(0xffffffffu, scale, head * 4);
        edge_[h] = edge.x * scale_[h];
        shift_[h] = edge.y;
        lists_[h] = edge.x < INFINITY ? lists_of(w, problem_of(head)) + list : nullptr;
      }
      forget();
    }

    __device__ void forget() {
      poisoned_ = 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top_[h] = -INFINITY;
        dropped_[h] = 0.0f;
        kept_[h] = 0;
      }
    }

    /// By all lanes: whether a head has a sieve.
    __device__ bool is_wanted() const { return __any_sync(0xffffffffu, lists_[0] || lists_[1]); }

    /// Whether a score is not finite, but for -inf.
    __device__ bool poisoned() const { return poisoned_ != 0; }

    /// Keys of which the lane's first is `key`; up to `end` with kEnds, and with care with
    /// kRepairs. Masses first, so that their latencies overlap.
    template <bool kEnds, bool kRepairs = false>
    __device__ __forceinline__ void add(const Tile& keys, int key, int end, const Keys& source) {
      const uint2 &a = keys.dims[0], &b = keys.dims[1];
      float scores[4] = {}, masses[4];
      ptx::mma_m16n8k16<__half>(scores, {a.x, b.x, a.y, b.y}, upper_[0], upper_[1]);
      ptx::mma_m16n8k16<__half>(scores, {a.x, b.x, a.y, b.y}, lower_[0], lower_[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = key + i / 2 * (kTileKeys / 2);
        if (kEnds && n >= end) {
          scores[i] = -INFINITY;
        } else if (kRepairs && !(fabsf(scores[i]) < INFINITY)) {
          scores[i] = half_dot(source.whole(n), queries_ + i % 2 * kDim) * scale_[i % 2];
        }
        masses[i] = mass(i % 2, scores[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        keep(i % 2, scores[i], masses[i], key + i / 2 * (kTileKeys / 2));
      }
    }

    /// Counts of the lists, and statistics of the warp.
    template <typename ProblemOf>
    __device__ void put(const SelectWorkspace& w, int warp, int heads_count,
                        const ProblemOf& problem_of, Shared& shared) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t poisoned = poisoned_ >> h & 1;
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
          top_[h] = fmaxf(top_[h], __shfl_xor_sync(0xffffffffu, top_[h], distance));
          dropped_[h] += __shfl_xor_sync(0xffffffffu, dropped_[h], distance);
          poisoned |= __shfl_xor_sync(0xffffffffu, poisoned, distance);
        }
        const int head = lane() % 4 * 2 + h;
        if (lane() < 4 && head < heads_count) {
          const uint32_t top_key = top_[h] == -INFINITY ? 0 : ordered_key(top_[h] * unscale_[h]);
          shared.of_head[head][threadIdx.x / 32] = {top_key, poisoned, kept_[h], shift_[h],
                                                    dropped_[h]};
          const int64_t lists = int64_t{w.shared_blocks} * kSelectWarps;
          w.list_counts[problem_of(head) * lists + warp] = kept_[h];
        }
      }
    }

   private:
    static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

    __device__ float mass(int h, float scaled) {
      top_[h] = fmaxf(top_[h], scaled);  // passes over a NaN
      return fast_exp2(fmaf(scaled, unscale_[h] * kLog2E, -shift_[h] * kLog2E));
    }

    __device__ __forceinline__ void keep(int h, float scaled, float mass, int key) {
      const bool keeps = !(scaled < edge_[h]);  // a NaN, too
      const uint32_t lanes = __ballot_sync(0xffffffffu, keeps);
      if (!keeps) dropped_[h] += mass;
      if (lanes == 0) return;
      const uint32_t of_head = lanes & 0x11111111u << lane() % 4;
      if (keeps && lists_[h]) {
        const int place = kept_[h] + __popc(of_head & ((1u << lane()) - 1));
        lists_[h][place] = make_float2(scaled * unscale_[h], __int_as_float(key));
        poisoned_ |= static_cast<uint32_t>(!(scaled < INFINITY)) << h;
      }
      kept_[h] += __popc(of_head);
    }

    const float* const queries_;  // of the two heads
    uint32_t upper_[2], lower_[2];
    float scale_[2], unscale_[2], edge_[2], shift_[2];
    float2* lists_[2];  // null: not wanted
    float top_[2], dropped_[2];
    int kept_[2];
    uint32_t poisoned_;  // bit h
  };

  /// The heads' queries, zeros for heads that are not there.
  template <typename ProblemOf>
  static __device__ void load_queries(const SelectParams& p, int heads_count,
                                      const ProblemOf& problem_of, Shared& shared) {
    if (threadIdx.x < kHeads * kDim) {
      const int head = static_cast<int>(threadIdx.x) / kDim;
      const int dim = static_cast<int>(threadIdx.x) % kDim;
      shared.query[head][dim] =
          head < heads_count ? scaled_query(p, row_of(p, problem_of(head)), dim) : 0.0f;
    }
    __syncthreads();
  }
};

}  // namespace rtpurbo::cuda
