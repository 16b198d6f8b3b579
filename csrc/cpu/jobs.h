#pragma once
// Threads that take jobs of unequal length one after the other.

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace rtpurbo::cpu::CPU_CAPABILITY {

/// Multiply-adds that are worth a thread: waking one costs as much where the cores are busy.
inline constexpr double kWorkPerThread = 1 << 21;

/// Runs body(next) once a thread, on as many threads as `work` multiply-adds are worth. next()
/// hands out the jobs 0, 1, ... `jobs` - 1, each once, and then -1.
template <typename Body>
void run_jobs(size_t jobs, double work, const Body& body) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), jobs);
  const int64_t useful = std::clamp<int64_t>(static_cast<int64_t>(work / kWorkPerThread), 1,
                                             std::max<int64_t>(threads, 1));
  std::atomic<size_t> taken{0};
  const auto next = [&taken, jobs] {
    const size_t job = taken++;
    return job < jobs ? static_cast<int64_t>(job) : int64_t{-1};
  };
  at::parallel_for(0, useful, 1, [&](int64_t, int64_t) { body(next); });
}

}  // namespace rtpurbo::cpu::CPU_CAPABILITY
