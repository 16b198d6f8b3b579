#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <catch2/catch.hpp>
#include <cmath>

#include "csrc/ops/common/index.h"
#include "csrc/ops/index_kl.h"
#include "csrc/ops/index_project.h"
#include "csrc/ops/quantize_index.h"
#include "csrc/ops/retrieval_scores.h"
#include "csrc/ops/select.h"
#include "csrc/ops/select_tiles.h"

namespace {

/// One head whose logits are `logits`: r = 1, q = 1, k = logits.
at::Tensor keys_of(const std::vector<float>& logits) {
  return at::tensor(logits).view({1, 1, static_cast<int64_t>(logits.size()), 1});
}

}  // namespace

TEST_CASE("index_project multiplies the heads it is told", "[index_project]") {
  const at::Tensor q = at::randn({2, 7, 6, 16}).transpose(1, 2);
  const at::Tensor k = at::randn({2, 2, 300, 16});
  const at::Tensor w_q = at::randn({2, 4, 16});
  const at::Tensor w_k = at::randn({3, 4, 16});
  const auto [q_index, k_index] = rtpurbo::index_project(q, k, w_q, w_k, {5, 2}, {1, 0, 1});
  CHECK(at::allclose(q_index.select(1, 1), q.select(1, 2).matmul(w_q[1].t()), 1e-4, 1e-5));
  CHECK(at::allclose(k_index.select(1, 2), k.select(1, 1).matmul(w_k[2].t()), 1e-4, 1e-5));
  const auto half = rtpurbo::index_project(q, k, w_q, w_k, {5, 2}, {1, 0, 1}, at::kHalf);
  CHECK(std::get<1>(half).scalar_type() == at::kHalf);
}

TEST_CASE("retrieval_scores is the attention on the needle", "[retrieval_scores]") {
  const at::Tensor q = at::randn({1, 4, 5, 8});
  const at::Tensor k = at::randn({1, 2, 300, 8});
  const at::Tensor logits = q.matmul(k.repeat_interleave(2, 1).transpose(2, 3)) * 0.5 +
                            at::full({5, 300}, -INFINITY).triu(296);
  const at::Tensor expected = logits.softmax(-1).slice(3, 20, 60).sum(-1).mean(-1);
  CHECK(at::allclose(rtpurbo::retrieval_scores(q, k, 20, 60, 0.5), expected, 1e-4, 1e-6));
}

TEST_CASE("select lists far keys until the mass is reached", "[select]") {
  // Sink 0 and the last two keys are near; the far ones weigh 1, 4, 2, 1 of 10 with near mass 2.
  const at::Tensor keys = keys_of({9.0F, 0.0F, std::log(4.0F), std::log(2.0F), 0.0F, 9.0F, 9.0F});
  const at::Tensor query = at::ones({1, 1, 1, 1});
  const at::Tensor near = at::full({1, 1, 1}, std::log(2.0F));
  const auto [indices, counts, mass] = rtpurbo::select(query, keys, {0}, 0.75, 2, 1, 0, 1, near);
  CHECK(counts.item<int>() == 2);
  CHECK(indices[0][0][0].slice(0, 0, 3).equal(at::tensor({2, 3, -1}, at::kInt)));
  CHECK(mass.item<float>() == Approx(0.8));

  const auto floor = rtpurbo::select(query, keys, {0}, 0.75, 2, 1, 3, 1, near);
  CHECK(std::get<0>(floor)[0][0][0].slice(0, 0, 3).equal(at::tensor({1, 2, 3}, at::kInt)));

  const auto overflow = rtpurbo::select(query, keys, {0}, 0.75, 2, 1, 0, 1, near, std::nullopt,
                                        std::nullopt, /*capacity=*/1);
  CHECK(std::get<1>(overflow).item<int>() == -1);
  CHECK(std::get<0>(overflow).item<int>() == -1);
}

TEST_CASE("select counts near keys by their index logits without near_lse", "[select]") {
  const at::Tensor keys = keys_of({5.0F, 0.0F, 0.0F, 5.0F});
  const auto [indices, counts, mass] =
      rtpurbo::select(at::ones({1, 1, 1, 1}), keys, {0}, 0.9, 1, 1, 0);
  CHECK(counts.item<int>() == 0);
  CHECK(mass.item<float>() == Approx(std::exp(5.0) / (std::exp(5.0) + 1)));
}

TEST_CASE("select_tiles forces near blocks and adds the heaviest", "[select_tiles]") {
  at::Tensor keys = at::zeros({1, 1, 256, 1});
  keys[0][0].slice(0, 64, 80) = 6.0F;  // block 4 of 16 keys
  const at::Tensor queries = at::ones({1, 1, 16, 1});
  const at::Tensor near = at::zeros({1, 1, 16});
  const auto [blocks, counts, mass] =
      rtpurbo::select_tiles(queries, keys, {0}, at::tensor({0.9F}), 16, 4, 0, 16, 16, near);
  CHECK(counts.item<int>() == 4);
  CHECK(blocks[0][0][0].slice(0, 0, 4).equal(at::tensor({0, 4, 14, 15}, at::kInt)));
  CHECK(mass.item<float>() > 0.9);
}

TEST_CASE("index_kl is zero where index and attention agree", "[index_kl]") {
  const at::Tensor q = at::randn({1, 1, 40, 8});
  const at::Tensor k = at::randn({1, 1, 500, 8});
  const at::Tensor rows = at::arange(400, 440).view({1, 40});
  const double scale = std::pow(8.0, -0.5);
  for (const bool beyond : {false, true}) {
    const auto [kl, kl_rows, grad_q, grad_k, grad_offset] =
        rtpurbo::index_kl(q, k, q, k, rows, {0}, {0}, std::nullopt, 16, 2, scale, beyond);
    CHECK(kl.abs().item<float>() < 1e-6);
    CHECK(grad_q.abs().max().item<float>() < 1e-6);
    CHECK(grad_k.abs().max().item<float>() < 1e-6);
  }
}

TEST_CASE("index_kl repeats its bits, whatever the number of threads", "[index_kl]") {
  const at::Tensor q = at::randn({1, 2, 300, 8});
  const at::Tensor k = at::randn({1, 1, 900, 8});
  const at::Tensor q_index = at::randn({1, 2, 300, 4});
  const at::Tensor k_index = at::randn({1, 1, 900, 4});
  const at::Tensor rows = at::randint(0, 900, {1, 300}, at::kLong);
  const auto run = [&] {
    return rtpurbo::index_kl(q, k, q_index, k_index, rows, {0, 1}, {0, 0}, at::zeros({2}), 50, 4,
                             0.3, true);
  };
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto first = run();
  at::set_num_threads(2);
  const auto again = run();
  at::set_num_threads(threads);
  CHECK(std::get<0>(first).equal(std::get<0>(again)));
  CHECK(std::get<2>(first).equal(std::get<2>(again)));
  CHECK(std::get<3>(first).equal(std::get<3>(again)));
  CHECK(std::get<4>(first).equal(std::get<4>(again)));
}

TEST_CASE("quantize_index packs two dimensions a byte, and select reads them", "[quantize_index]") {
  // Dimension 0 counts 0 to 15 over and over, dimension 1 backwards from 30 by twos.
  const at::Tensor count = at::arange(64, at::kFloat).remainder(16);
  const at::Tensor keys = at::stack({count, 30 - 2 * count}, -1).view({1, 1, 64, 2});
  const auto [codes, ranges] = rtpurbo::quantize_index(keys, 4);
  CHECK(codes.flatten().equal((count + 16 * (15 - count)).to(at::kByte)));
  CHECK(ranges.flatten().equal(at::tensor({0.0F, 0.0F, 1.0F, 2.0F}).to(at::kHalf)));

  const at::Tensor query = at::randn({1, 1, 1, 2});
  const at::Tensor tail = at::randn({1, 1, 3, 2});
  const auto plain = rtpurbo::select(query, at::cat({keys, tail}, 2), {0}, 0.9, 2, 1, 4);
  const auto coded = rtpurbo::select(query, tail, {0}, 0.9, 2, 1, 4, 1, std::nullopt, std::nullopt,
                                     std::nullopt, 0, true, codes, ranges);
  CHECK(std::get<0>(coded).equal(std::get<0>(plain)));
  CHECK(std::get<2>(coded).equal(std::get<2>(plain)));
}

TEST_CASE("codes are spelt out as select reads them", "[quantize_index]") {
  for (const int64_t bits : {4, 8}) {
    for (const int64_t dim : {1, 5, 16}) {
      const at::Tensor far = at::randn({2, 3, 128, dim});
      const auto [codes, ranges] = rtpurbo::quantize_index(far, bits);
      const at::Tensor tail = at::randn({2, 3, 7, dim});
      const at::Tensor keys = rtpurbo::with_dequantised(tail, codes, ranges);
      CHECK(keys.narrow(2, 128, 7).equal(tail));
      CHECK((keys.narrow(2, 0, 128) - far).abs().max().item<float>() < (bits == 4 ? 0.3 : 0.03));
      const at::Tensor query = at::randn({2, 3, 1, dim});
      const auto coded = rtpurbo::select(query, tail, {0, 1, 2}, 0.5, 3, 1, 0, 1, std::nullopt,
                                         std::nullopt, std::nullopt, 0, true, codes, ranges);
      const auto plain = rtpurbo::select(query, keys, {0, 1, 2}, 0.5, 3, 1, 0);
      CHECK(std::get<2>(coded).allclose(std::get<2>(plain), 1e-5, 1e-6));
    }
  }
}

TEST_CASE("select with refine trusts the keys, not the codes", "[select]") {
  // By codes key 7 is best and 5 next, by the keys themselves 5 is.
  at::Tensor keys = at::zeros({1, 1, 66, 1});
  keys[0][0][5] = 8.0;
  keys[0][0][7] = 10.0;
  const auto [codes, ranges] = rtpurbo::quantize_index(keys.narrow(2, 0, 64), 8);
  keys[0][0][7] = 4.0;
  const auto chosen = [&](const at::Tensor& k_index, bool refine) {
    const auto [indices, counts, mass] =
        rtpurbo::select(at::ones({1, 1, 1, 1}), k_index, {0}, 0.8, 1, 0, 0, 1, std::nullopt,
                        std::nullopt, std::nullopt, 0, true, codes, ranges, refine);
    CHECK(counts.item<int>() == 1);
    return indices.flatten()[0].item<int>();
  };
  CHECK(chosen(keys.narrow(2, 64, 2), false) == 7);
  CHECK(chosen(keys, true) == 5);
  CHECK_THROWS_WITH(
      rtpurbo::select(at::ones({1, 1, 1, 1}), keys, {0}, 0.8, 1, 0, 0, 1, std::nullopt,
                      std::nullopt, std::nullopt, 0, true, std::nullopt, std::nullopt, true),
      Catch::Contains("refine needs codes"));
}

TEST_CASE("the index operators name what is wrong", "[select][index_kl]") {
  const at::Tensor one = at::ones({1, 1, 1, 4});
  CHECK_THROWS_WITH(rtpurbo::select(one, one, {1}, 0.9, 1, 0, 0), Catch::Contains("index_map"));
  CHECK_THROWS_WITH(rtpurbo::select(one, one, {0}, 0.9, 1, 0, 0, 3),
                    Catch::Contains("block_size must be 1, 16, 32 or 64, got 3"));
  const at::Tensor q = at::ones({1, 1, 1, 8});
  CHECK_THROWS_WITH(rtpurbo::index_kl(q, q, one, one, at::ones({1, 1}, at::kLong), {0}, {0},
                                      std::nullopt, 1, 0, 1.0, true),
                    Catch::Contains("rows must"));
}
