#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace rtpurbo {

/// One block list per tile of query rows and head, by the tile's pooled mass under the index.
///
/// Rows, near keys and logits are as in `select`. Blocks that hold a near key of any row of the
/// tile are forced. The weight of a block is the mean over the tile's rows of its far keys' share
/// of the row's mass; others join by decreasing weight, ties by lower block, until the pooled share
/// reaches the head's threshold and at least min_blocks have joined.
///
/// q_index   [B, R, M, r]; k_index [B, Rk, N, r]; index_map, near_lse, offset, start,
///           codes, ranges as in `select`
/// threshold [R]; tiles are rows [t tile, (t + 1) tile), blocks are keys n / block_size
/// rank      "sum": a block counts with its exp-sum; "max": with the exp of its largest logit
/// capacity  room for blocks, 0 for all; a tile that needs more has count -1 (attend densely)
/// returns   block_indices int32 [B, R, T, capacity], complete lists, ascending, -1 padded;
///           block_counts int32 [B, R, T]; mass [B, R, T], the pooled share. A tile without a valid
///           row: count 0, mass 1. NaN or +inf logits: all visible blocks, mass NaN.
/// CUDA      tile <= 1024; on Hopper maxima may be float16, see rtpurbo/ops/select_tiles.py
std::tuple<at::Tensor, at::Tensor, at::Tensor> select_tiles(
    const at::Tensor& q_index, const at::Tensor& k_index, at::IntArrayRef index_map,
    const at::Tensor& threshold, int64_t window, int64_t sinks, int64_t min_blocks,
    int64_t tile = 128, int64_t block_size = 64,
    const std::optional<at::Tensor>& near_lse = std::nullopt,
    const std::optional<at::Tensor>& offset = std::nullopt,
    const std::optional<at::Tensor>& start = std::nullopt, int64_t capacity = 0,
    std::string_view rank = "sum", const std::optional<at::Tensor>& codes = std::nullopt,
    const std::optional<at::Tensor>& ranges = std::nullopt);

}  // namespace rtpurbo
