#include <algorithm>

#include "csrc/cuda/integers.h"
#include "csrc/cuda/select.h"
#include "csrc/cuda/select/emit.cuh"

namespace rtpurbo::cuda {
namespace {

constexpr int64_t kMembersAtOnce = 1 << 24;
constexpr int64_t kMaxGridY = 65535;

int64_t member_count(const SelectParams& p) { return round_up(divide_up(p.keys, p.block_size), 4); }

/// Problems of one launch.
int64_t problems_at_once(const SelectParams& p) {
  const int64_t fitting = std::max<int64_t>(1, kMembersAtOnce / (member_count(p) + 3 * kBins));
  return std::min({fitting, kMaxGridY, p.batch * p.heads * p.rows});
}

/// Takes the workspace apart, or with a null base only measures it.
size_t lay_out(const SelectParams& p, char* base, Workspace& w, size_t& zeroed) {
  const int64_t count = problems_at_once(p);
  w.count = count;
  w.members = member_count(p);
  w.scan_chunks = divide_up(p.keys, kScanKeys);
  w.chunks = divide_up(w.members, kChunk);
  size_t offset = 0;
  const auto take = [&]<typename T>(T*& pointer, int64_t elements) {
    pointer = reinterpret_cast<T*>(base + offset);
    offset = static_cast<size_t>(round_up(offset + elements * sizeof(T), 256));
  };
  take(w.problems, count);
  take(w.bin_mass, count * kBins);
  take(w.bin_count, count * kBins);
  zeroed = offset;
  take(w.scores, count * w.members);
  take(w.near, count * w.scan_chunks);
  take(w.list, count * w.members);
  take(w.chunk_counts, count * w.chunks);
  return offset;
}

template <typename TK>
void launch_scan(const SelectParams& p, const Workspace& w, dim3 grid, cudaStream_t stream) {
  const HeadsView& k = p.k_index;
  constexpr int64_t kPerLoad = 8;  // alignas(16) of half a key
  const bool aligned = p.dim == 16 && reinterpret_cast<uintptr_t>(k.ptr) % 16 == 0 &&
                       k.batch_stride % kPerLoad == 0 && k.head_stride % kPerLoad == 0 &&
                       k.row_stride % kPerLoad == 0;
  if (aligned) {
    scan_kernel<TK, true><<<grid, kScanThreads, 0, stream>>>(p, w);
  } else {
    scan_kernel<TK, false><<<grid, kScanThreads, 0, stream>>>(p, w);
  }
}

}  // namespace

size_t select_workspace(const SelectParams& params) {
  Workspace w;
  size_t zeroed;
  return lay_out(params, nullptr, w, zeroed);
}

cudaError_t launch_select(const SelectParams& params, void* workspace, int sm_count,
                          cudaStream_t stream) {
  Workspace w;
  size_t zeroed;
  lay_out(params, static_cast<char*>(workspace), w, zeroed);
  const int64_t total = params.batch * params.heads * params.rows;
  const int64_t at_once = w.count;
  for (w.first = 0; w.first < total; w.first += at_once) {
    w.count = std::min(at_once, total - w.first);
    const auto rows = static_cast<unsigned>(w.count);
    if (const cudaError_t error = cudaMemsetAsync(workspace, 0, zeroed, stream)) return error;
    const cudaError_t scanned = dispatch_element(params.k_type, [&](auto element) {
      launch_scan<decltype(element)>(params, w, dim3(static_cast<unsigned>(w.scan_chunks), rows),
                                     stream);
      return cudaGetLastError();
    });
    if (scanned != cudaSuccess) return scanned;

    const int64_t wanted_blocks = std::max<int64_t>(1, 2 * sm_count / w.count);
    const int64_t blocks =
        std::max(std::min(wanted_blocks, w.chunks), divide_up(w.members, kBinKeys));
    const int64_t members_of_block = round_up(divide_up(w.members, blocks), 4);
    histogram_kernel<<<dim3(static_cast<unsigned>(blocks), rows), kBinsThreads, 0, stream>>>(
        params, w, members_of_block);
    cut_kernel<<<rows, kCutThreads, 0, stream>>>(params, w);
    collect_kernel<<<dim3(static_cast<unsigned>(w.chunks), rows), kCollectThreads, 0, stream>>>(
        params, w);
    finish_kernel<<<rows, kFinishThreads, 0, stream>>>(params, w);
    const int64_t emit_chunks = std::max(w.chunks, divide_up(params.capacity, kChunk));
    emit_kernel<<<dim3(static_cast<unsigned>(emit_chunks), rows), kCollectThreads, 0, stream>>>(
        params, w);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

}  // namespace rtpurbo::cuda
