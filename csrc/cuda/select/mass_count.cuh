#pragma once

namespace rtpurbo::cuda {

/// How much mass some keys have, and how many they are.
template <typename Mass>
struct MassCount {
  Mass mass;
  long long count;

  __device__ MassCount operator+(const MassCount& other) const {
    return {mass + other.mass, count + other.count};
  }
  __device__ bool reaches(const MassCount& wanted) const {
    return mass >= wanted.mass && count >= wanted.count;
  }
};

}  // namespace rtpurbo::cuda
