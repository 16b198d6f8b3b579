#include <ATen/ATen.h>

#include <catch2/catch.hpp>
#include <limits>

#include "csrc/ops/common/top_p_by_sort.h"
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

TEST_CASE("top_p by a sort takes the same set", "[top_p]") {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (int seed = 0; seed < 200; ++seed) {
    at::manual_seed(seed);
    const int64_t n = at::randint(1, 400, {1}).item<int64_t>();
    const int64_t floor = seed % 3 == 0 ? at::randint(0, 500, {1}).item<int64_t>() : 0;
    at::Tensor scores = at::randn({6, n + 5}).mul(seed % 7).narrow(1, 2, n);
    scores.masked_fill_(at::rand(scores.sizes()) < 0.2 * (seed % 4), -kInf);
    scores[0].fill_(-kInf);
    scores[1][n / 2] = kInf;
    scores[2][n - 1] = std::numeric_limits<float>::quiet_NaN();
    if (seed % 5 == 0) scores = scores.to(seed % 2 ? at::kHalf : at::kBFloat16);
    std::optional<at::Tensor> forced;
    if (seed % 2 == 0) {
      forced = at::randn({6}).mul(3);
      forced->slice(0, 4, 5).fill_(seed % 4 == 0 ? -kInf : kInf);
    }
    const double p = seed % 11 == 0 ? 1.0 : at::rand({1}).item<double>() * 0.99 + 0.005;
    const auto [indices, counts, mass] = rtpurbo::top_p(scores, p, floor, forced);
    const auto [by_sort, sort_counts, sort_mass] = rtpurbo::top_p_by_sort(scores, p, floor, forced);
    INFO("seed " << seed);
    CHECK(by_sort.equal(indices));
    CHECK(sort_counts.equal(counts));
    CHECK(at::allclose(sort_mass, mass, 1e-6, 1e-6, /*equal_nan=*/true));
  }
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
