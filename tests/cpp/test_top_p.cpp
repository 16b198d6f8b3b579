#include <ATen/ATen.h>

#include <catch2/catch.hpp>
#include <limits>

#include "csrc/ops/top_p.h"

TEST_CASE("top_p takes the smallest set that holds the mass", "[top_p]") {
  const at::Tensor scores = at::tensor({0.6F, 0.3F, 0.1F}).log().unsqueeze(0);
  const auto [indices, counts, mass] = rtpurbo::top_p(scores, 0.7);
  CHECK(counts.item<int>() == 2);
  CHECK(indices.equal(at::tensor({0, 1, -1}, at::kInt).unsqueeze(0)));
  CHECK(mass.item<float>() == Approx(0.9));
}

TEST_CASE("top_p reads strided rows", "[top_p]") {
  const at::Tensor scores = at::randn({9, 50}).narrow(1, 7, 20);
  const auto strided = rtpurbo::top_p(scores, 0.8);
  const auto packed = rtpurbo::top_p(scores.contiguous(), 0.8);
  CHECK(std::get<0>(strided).equal(std::get<0>(packed)));
}

TEST_CASE("top_p repeats its bits", "[top_p]") {
  const at::Tensor scores = at::randn({4, 3000});
  const auto first = rtpurbo::top_p(scores, 0.9);
  for (int run = 0; run < 20; ++run) {
    const auto again = rtpurbo::top_p(scores, 0.9);
    CHECK(std::get<0>(again).equal(std::get<0>(first)));
    CHECK(std::get<2>(again).equal(std::get<2>(first)));
  }
}

TEST_CASE("top_p names what is wrong", "[top_p]") {
  CHECK_THROWS_WITH(rtpurbo::top_p(at::zeros({2, 3}), 0.0),
                    Catch::Contains("p must be in (0, 1], got 0"));
  CHECK_THROWS_WITH(rtpurbo::top_p(at::zeros({6}), 0.5), Catch::Contains("[rows, N]"));
}
