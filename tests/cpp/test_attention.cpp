#include <ATen/ATen.h>

#include <catch2/catch.hpp>
#include <vector>

#include "csrc/ops/attention.h"
#include "csrc/ops/attention_backward.h"
#include "csrc/ops/decode.h"
#include "csrc/ops/near_lse.h"
#include "csrc/ops/sparse_decode.h"

namespace {

constexpr int64_t kWindow = 40;
constexpr int64_t kSinks = 4;
constexpr double kScale = 0.25;
const std::vector<int64_t> kRetrievalHeads{1, 5};

struct Inputs {
  at::Tensor q, k, v;
};

Inputs make_inputs(int64_t rows, int64_t keys) {
  const auto heads = [](int64_t count, int64_t length) {
    return at::randn({2, length, count, 32}, at::kDouble).transpose(1, 2);
  };
  return {heads(6, rows), heads(2, keys), heads(2, keys)};
}

/// bool [Hq, M, N]: which keys the rows of each head see.
at::Tensor mask(int64_t rows, int64_t keys) {
  const at::Tensor m = at::arange(keys - rows, keys).unsqueeze(1);
  const at::Tensor n = at::arange(keys).unsqueeze(0);
  const at::Tensor visible = n.le(m);
  at::Tensor seen =
      visible.logical_and(n.lt(kSinks).logical_or((m - n).lt(kWindow))).repeat({6, 1, 1});
  for (const int64_t head : kRetrievalHeads) seen[head] = visible;
  return seen;
}

/// out and lse from whole matrices.
std::tuple<at::Tensor, at::Tensor> naive(const Inputs& in) {
  const at::Tensor k = in.k.repeat_interleave(3, 1);
  const at::Tensor v = in.v.repeat_interleave(3, 1);
  const at::Tensor logits =
      (at::matmul(in.q, k.transpose(2, 3)) * kScale)
          .masked_fill(mask(in.q.size(2), in.k.size(2)).logical_not(), -INFINITY);
  return {at::matmul(logits.softmax(-1), v), logits.logsumexp({-1})};
}

}  // namespace

TEST_CASE("attention equals the naive one, with a prefix and without", "[attention]") {
  for (const int64_t rows : {1, 33, 150}) {
    const Inputs in = make_inputs(rows, 150);
    const auto [out, lse] =
        rtpurbo::attention(in.q, in.k, in.v, kRetrievalHeads, kWindow, kSinks, kScale);
    const auto [expected, expected_lse] = naive(in);
    CHECK(out.allclose(expected, 1e-10, 1e-12));
    CHECK(lse.allclose(expected_lse, 1e-10, 1e-12));
    CHECK(out.transpose(1, 2).is_contiguous());
  }
}

TEST_CASE("attention_backward gives the slope of attention", "[attention]") {
  const Inputs in = make_inputs(60, 70);
  const at::Tensor grad_out = at::randn_like(in.q);
  const auto run = [&](const Inputs& at) {
    return rtpurbo::attention(at.q, at.k, at.v, kRetrievalHeads, kWindow, kSinks, kScale);
  };
  const auto [out, lse] = run(in);
  const auto [grad_q, grad_k, grad_v] = rtpurbo::attention_backward(
      grad_out, in.q, in.k, in.v, out, lse, kRetrievalHeads, kWindow, kSinks, kScale, std::nullopt,
      std::nullopt, std::nullopt, 128, 64);
  const Inputs step{at::randn_like(in.q), at::randn_like(in.k), at::randn_like(in.v)};
  constexpr double kStep = 1e-6;
  const auto moved = [&](double by) {
    const Inputs to{in.q + by * step.q, in.k + by * step.k, in.v + by * step.v};
    return (std::get<0>(run(to)) * grad_out).sum().item<double>();
  };
  const double slope = (moved(kStep) - moved(-kStep)) / (2 * kStep);
  const at::Tensor predicted =
      (grad_q * step.q).sum() + (grad_k * step.k).sum() + (grad_v * step.v).sum();
  CHECK(predicted.item<double>() == Approx(slope).epsilon(1e-6));
}

TEST_CASE("near_lse is the lse of local heads", "[near_lse]") {
  const Inputs in = make_inputs(50, 90);
  const at::Tensor near =
      rtpurbo::near_lse(in.q, in.k, {0, 2, 4}, {0, 0, 1}, kWindow, kSinks, kScale);
  const at::Tensor lse = std::get<1>(naive(in));
  CHECK(near.allclose(lse.index_select(1, at::tensor({0, 2, 4}, at::kLong)), 1e-10, 1e-12));
}

TEST_CASE("decode merges near keys, listed keys and rings", "[decode]") {
  const Inputs in = make_inputs(1, 3000);
  const auto [out, lse] =
      rtpurbo::decode(in.q, in.k, in.v, kRetrievalHeads, kWindow, kWindow, kSinks, kScale);
  const auto [expected, expected_lse] = naive(in);
  CHECK(out.allclose(expected, 1e-10, 1e-12));
  CHECK(lse.allclose(expected_lse, 1e-10, 1e-12));

  const at::Tensor everything = at::arange(3000, at::kInt).repeat({2, 2, 1, 1});
  const at::Tensor counts = at::full({2, 2, 1}, 3000, at::kInt);
  const auto [listed, listed_lse] = rtpurbo::decode(in.q, in.k, in.v, kRetrievalHeads, kWindow, 7,
                                                    kSinks, kScale, everything, counts);
  CHECK(listed.allclose(expected, 1e-10, 1e-12));

  const at::Tensor nothing = in.k.narrow(1, 0, 0);
  const at::Tensor ring = at::cat({in.k.narrow(2, 2960, kWindow), in.k.narrow(2, 0, kSinks)}, 2);
  const auto [local, local_lse] =
      rtpurbo::decode(in.q, nothing, nothing, {}, kWindow, 7, kSinks, kScale, std::nullopt,
                      std::nullopt, 1, ring, at::ones_like(ring), std::nullopt, 3000);
  CHECK(local.allclose(at::ones_like(local)));
  CHECK(local_lse.select(1, 0).allclose(expected_lse.select(1, 0)));
}

TEST_CASE("attention names what is wrong", "[attention]") {
  const Inputs in = make_inputs(4, 8);
  CHECK_THROWS_WITH(rtpurbo::attention(in.q, in.k, in.v, {6}, kWindow, kSinks, kScale),
                    Catch::Contains("retrieval_heads must be ascending head numbers in [0, 6)"));
  CHECK_THROWS_WITH(rtpurbo::near_lse(in.q, in.k, {0}, {0}, 0, kSinks, kScale),
                    Catch::Contains("window must be >= 1, got 0"));
}

TEST_CASE("sparse_decode attends to what it selects", "[sparse_decode]") {
  constexpr int64_t kKeys = 130;
  const auto [q, k, v] = make_inputs(1, kKeys);
  const at::Tensor q_index = at::randn({2, 2, 1, 4});
  const at::Tensor k_index = at::randn({2, 2, kKeys, 4});
  const auto step = [&](double p, int64_t floor) {
    return rtpurbo::sparse_decode(q, k, v, kRetrievalHeads, q_index, k_index, {0, 1}, p, kWindow,
                                  kWindow, kSinks, floor, kScale);
  };
  const auto [out, lse, selected, counts, mass] = step(1.0, 0);
  const auto dense = rtpurbo::decode(q, k, v, kRetrievalHeads, kWindow, kWindow, kSinks, kScale);
  CHECK(at::allclose(out, std::get<0>(dense), 1e-10, 1e-12));
  CHECK(at::allclose(lse, std::get<1>(dense), 1e-10, 1e-12));
  CHECK(counts.eq(kKeys - kWindow - kSinks).all().item<bool>());
  CHECK(mass.allclose(at::ones_like(mass)));
  // Far keys are 4 to 89 of words of 64.
  const at::Tensor words = at::tensor({~int64_t{15}, (int64_t{1} << (90 - 64)) - 1, int64_t{0}});
  CHECK(selected.eq(words).all().item<bool>());

  const auto few = step(1e-9, 7);
  CHECK(std::get<3>(few).eq(7).all().item<bool>());
  CHECK_FALSE(at::allclose(std::get<0>(few), out, 1e-3, 1e-3));
  CHECK_THROWS_WITH(step(0.0, 0), Catch::Contains("sparse_decode: p must be in (0, 1], got 0"));
}
