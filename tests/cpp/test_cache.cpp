#include <ATen/ATen.h>

#include <catch2/catch.hpp>
#include <cmath>

#include "csrc/ops/cache.h"
#include "csrc/ops/cache_append_projected.h"

namespace {

/// Tokens first .. first + count - 1 of 2 KV heads: head h, position n holds 100 h + n.
at::Tensor tokens(int64_t first, int64_t count) {
  const at::Tensor positions = at::arange(first, first + count, at::kFloat).view({1, 1, count, 1});
  return (positions + at::tensor({0.0F, 100.0F}).view({1, 2, 1, 1})).repeat({1, 1, 1, 8});
}

at::Tensor first_column(const at::Tensor& rows) { return rows[0][0].select(1, 0); }

}  // namespace

TEST_CASE("the cache keeps sinks and window in a ring, other heads whole", "[cache]") {
  at::Tensor k_ring = at::full({1, 1, 5, 8}, NAN);
  at::Tensor v_ring = k_ring.clone();
  at::Tensor k_pages = at::full({1, 1, 12, 8}, NAN);
  at::Tensor v_pages = k_pages.clone();
  const auto append = [&](int64_t position, int64_t count) {
    const at::Tensor k = tokens(position, count);
    rtpurbo::cache_append(k, k, k_ring, v_ring, k_pages, v_pages, {1}, position, 2);
  };
  append(0, 4);
  append(4, 5);
  CHECK(first_column(k_ring).equal(at::tensor({0.0F, 1.0F, 8.0F, 6.0F, 7.0F})));
  CHECK(v_ring.equal(k_ring));
  CHECK(first_column(k_pages).slice(0, 0, 9).equal(at::arange(100, 109, at::kFloat)));
  CHECK(k_pages.slice(2, 9).isnan().all().item<bool>());

  const auto [keys, start] = rtpurbo::cache_unroll(k_ring, tokens(9, 2), {0}, 9, 2);
  CHECK(first_column(keys).equal(at::tensor({0.0F, 1.0F, 6.0F, 7.0F, 8.0F, 9.0F, 10.0F})));
  CHECK(start.item<int64_t>() == 0);
}

TEST_CASE("a short cache unrolls right-aligned behind zeros", "[cache]") {
  at::Tensor ring = at::full({1, 2, 5, 8}, NAN);
  at::Tensor other = ring.clone();
  at::Tensor pages = at::empty({1, 0, 0, 8});
  at::Tensor other_pages = pages.clone();
  const at::Tensor start = at::full({1}, 2, at::kLong);
  const at::Tensor k = tokens(0, 5);
  rtpurbo::cache_append(k, k, ring, other, pages, other_pages, {}, 0, 1, start);
  const auto [keys, start_local] = rtpurbo::cache_unroll(ring, tokens(5, 1), {0, 1}, 5, 1, start);
  CHECK(first_column(keys).equal(at::tensor({0.0F, 0.0F, 2.0F, 3.0F, 4.0F, 5.0F})));
  CHECK(start_local.item<int64_t>() == 2);
}

TEST_CASE("index keys are projected into their slots, index queries returned", "[cache]") {
  at::Tensor ring = at::full({1, 1, 5, 8}, NAN);
  at::Tensor other_ring = ring.clone();
  at::Tensor pages = at::full({1, 1, 12, 8}, NAN);
  at::Tensor other_pages = pages.clone();
  at::Tensor index_pages = at::full({1, 1, 12, 3}, NAN, at::kHalf);
  const at::Tensor k = tokens(4, 2);
  const at::Tensor q_pre = at::randn({1, 4, 2, 16});
  const at::Tensor k_pre = at::randn({1, 2, 2, 16});
  const at::Tensor w_q = at::randn({2, 3, 16});
  const at::Tensor w_k = at::randn({1, 3, 16});
  const at::Tensor q_index =
      rtpurbo::cache_append_projected(k, k, ring, other_ring, pages, other_pages, {1}, 4, 2, q_pre,
                                      k_pre, w_q, w_k, {3, 0}, {1}, index_pages, std::nullopt, 7);
  const auto product = [](const at::Tensor& x, const at::Tensor& w) {
    return x.matmul(w.t()).to(at::kHalf);
  };
  CHECK(at::allclose(q_index[0][0], product(q_pre[0][3], w_q[0]), 1e-2, 1e-2));
  CHECK(at::allclose(index_pages[0][0].slice(0, 7, 9), product(k_pre[0][1], w_k[0]), 1e-2, 1e-2));
  CHECK(index_pages.isnan().sum().item<int64_t>() == 10 * 3);
  CHECK(first_column(pages).slice(0, 4, 6).equal(at::tensor({104.0F, 105.0F})));
  CHECK(first_column(ring).slice(0, 4, 5).equal(at::tensor({4.0F})));
}

TEST_CASE("full pages are refused before anything is written", "[cache]") {
  at::Tensor pages = at::zeros({1, 2, 4, 8});
  CHECK_THROWS_WITH(rtpurbo::cache_append_index(tokens(3, 2), pages, 3),
                    Catch::Contains("index_pages must have room for 2 tokens from slot 3 on"));
  CHECK(pages.eq(0).all().item<bool>());
}
