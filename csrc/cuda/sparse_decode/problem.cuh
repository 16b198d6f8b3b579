#pragma once
// What the kernel works on, besides its parameters, and which form of it.

#include <cstdint>

#include "csrc/cuda/decode/keys.cuh"
#include "csrc/cuda/select/problem.cuh"
#include "csrc/cuda/sparse_decode.h"

namespace rtpurbo::cuda::sparse {

/// A team's and the grid's results in the workspace.
struct Workspace {
  SelectWorkspace select;
  Partials near;    // of splits and slots
  Partials listed;  // [B, R, team_size]
  uint32_t* done;   // blocks whose parts are written
};

/// Sets by what is done with them.
struct Sets {
  int near_count = 0;
  int16_t near[DecodeParams::kMaxSets];
  int16_t listed[DecodeParams::kMaxHeads];        // set of each list
  int16_t list_of_head[DecodeParams::kMaxHeads];  // -1: none
};

/// Whether a sieve holds back members, and whether heads that share index keys are scanned
/// together.
enum class Sifting { kNone, kAlone, kShared };

struct Form {
  const void* kernel;
  int blocks_of_sm;  // that are meant to be resident
  Sifting sifting;
  int near_bytes;  // of shared memory, for near keys
};

/// A sieve has two blocks on a multiprocessor. Heads of 256 have one form: one block, no sieve.
/// Each is instantiated in a file of its own, in instances/.
template <typename T, int kDim>
Form form_of(int blocks_of_sm, Sifting sifting);

}  // namespace rtpurbo::cuda::sparse
