// Selects the keys that hold 90 % of one query's attention, from C++ alone.
#include <ATen/ATen.h>
#include <rtpurbo/ops/top_p.h>

#include <iostream>

int main() {
  const at::Tensor scores = at::randn({1, 4096}) * 4;
  const auto [indices, counts, mass] = rtpurbo::top_p(scores, 0.9);
  std::cout << counts.item<int>() << " of 4096 keys hold " << mass.item<float>()
            << " of the mass\n";
  return mass.item<float>() >= 0.9F ? 0 : 1;
}
