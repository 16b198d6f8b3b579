#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace rtpurbo {

/// Appends the tokens at positions position .. position + M - 1 to the headwise KV cache. KV heads
/// in full_heads keep every token, slot = position; the others keep sinks and window in a ring:
/// with t = n - start, t < sinks goes to slot t, later ones to sinks + (t - sinks) % window, and
/// padding (t < 0) is not stored.
///
/// k, v             [B, Hk, M, D]
/// k_ring, v_ring   [B, Hk - F, sinks + window, D], written in place
/// k_pages, v_pages [B, F, capacity, D], position + M <= capacity, written in place
/// full_heads       ascending KV heads, F of them
/// start            int64 [B], first real key of each sequence (left padding)
/// k_index          [B, Rk, M, r] index keys of the tokens, for
/// index_pages      [B, Rk, capacity, r], from slot index_slot on (-1: position), written in place
void cache_append(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_ring, at::Tensor& v_ring,
                  at::Tensor& k_pages, at::Tensor& v_pages, at::IntArrayRef full_heads,
                  int64_t position, int64_t sinks,
                  const std::optional<at::Tensor>& start = std::nullopt,
                  const std::optional<at::Tensor>& k_index = std::nullopt,
                  const std::optional<at::Tensor>& index_pages = std::nullopt,
                  int64_t index_slot = -1);

/// Appends rows of any kind for each index key head, k_index [B, Rk, M, r], to index_pages
/// [B, Rk, capacity, r], slot = position: codes, ranges, or index keys.
void cache_append_index(const at::Tensor& k_index, at::Tensor& index_pages, int64_t position);

/// The keys that the local KV heads' rows see in chunked prefill, in order of position: what the
/// ring holds of the `position` tokens before the chunk, then the chunk. Call it before
/// cache_append, for keys and again for values.
///
/// ring        [B, L, sinks + window, D]; chunk [B, Hk, M, D], read at the L heads local_heads
/// returns     keys [B, L, sinks + window + M, D] and start_local int64 [B], its first real key.
///             With t = position - start tokens cached: t <= sinks + window are right-aligned
///             behind zeros, start_local = sinks + window - t; more are the sinks and the last
///             `window`.
std::tuple<at::Tensor, at::Tensor> cache_unroll(
    const at::Tensor& ring, const at::Tensor& chunk, at::IntArrayRef local_heads, int64_t position,
    int64_t sinks, const std::optional<at::Tensor>& start = std::nullopt);

}  // namespace rtpurbo
