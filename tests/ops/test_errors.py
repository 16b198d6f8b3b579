"""A bad argument is refused by the names of operator and argument, and nothing is written."""

import re
from typing import Any

import pytest
import torch

from tests.samples import Sample, samples

SAMPLES = {str(sample): sample for sample in samples()}
ints = torch.int64


def change(name: str, function) -> Any:
    """The sample's argument `name` put through `function`."""
    return lambda arguments: {name: function(arguments[name])}


def with_value(**values: Any) -> Any:
    return lambda arguments: values


def last_dim_strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def shorter(axis: int) -> Any:
    return lambda tensor: tensor.narrow(axis, 0, tensor.shape[axis] - 1)


BAD = [
    ("attention-mixed", "q", change("q", lambda t: t[0])),
    ("attention-mixed", "q", change("q", lambda t: t[..., :12])),
    ("attention-mixed", "q", change("q", lambda t: t[:, :5])),
    ("attention-mixed", "q", change("q", last_dim_strided)),
    ("attention-mixed", "q", change("q", lambda t: t.to(ints))),
    ("attention-mixed", "k", change("k", lambda t: t[..., :8])),
    ("attention-mixed", "k", change("k", shorter(0))),
    ("attention-mixed", "k", lambda a: dict(k=a["k"][:, :, :20], v=a["v"][:, :, :20])),
    ("attention-mixed", "k", change("k", lambda t: t.half())),
    ("attention-mixed", "k", change("k", last_dim_strided)),
    ("attention-mixed", "v", change("v", shorter(2))),
    ("attention-mixed", "v", change("v", last_dim_strided)),
    ("attention-mixed", "v", change("v", lambda t: t.double())),
    ("attention-mixed", "retrieval_heads", with_value(retrieval_heads=[4, 1])),
    ("attention-mixed", "retrieval_heads", with_value(retrieval_heads=[1, 1])),
    ("attention-mixed", "retrieval_heads", with_value(retrieval_heads=[6])),
    ("attention-mixed", "retrieval_heads", with_value(retrieval_heads=[-1])),
    ("attention-mixed", "window", with_value(window=0)),
    ("attention-mixed", "sinks", with_value(sinks=-1)),
    ("attention-mixed", "scale", with_value(scale=float("nan"))),
    ("attention-padded", "start", change("start", lambda t: t.int())),
    ("attention-padded", "start", change("start", shorter(0))),
    ("attention-blocks", "block_indices", change("block_indices", lambda t: t.long())),
    ("attention-blocks", "block_indices", change("block_indices", shorter(1))),
    ("attention-blocks", "block_counts", change("block_counts", shorter(2))),
    ("attention-blocks", "block_counts", with_value(block_counts=None)),
    ("attention-blocks", "tile", with_value(tile=0)),
    ("attention-blocks", "block_size", with_value(block_size=0)),
    ("attention-split", "v_local", with_value(v_local=None)),
    ("attention-split", "k", with_value(retrieval_heads=[])),
    ("attention-split", "k_local", change("k_local", shorter(0))),
    (
        "attention-split",
        "k_local",
        lambda a: dict(k_local=a["q"][:, :1, :20], v_local=a["q"][:, :1, :20]),
    ),
    ("attention-split", "start_local", change("start_local", lambda t: t.int())),
    ("decode-tokens", "q", change("q", lambda t: t.expand(-1, -1, 2, -1))),
    ("decode-tokens", "q", change("q", last_dim_strided)),
    ("decode-tokens", "k", change("k", lambda t: t.half())),
    ("decode-tokens", "v", change("v", shorter(2))),
    ("decode-tokens", "near_window", with_value(near_window=0)),
    ("decode-tokens", "window", with_value(window=0)),
    ("decode-tokens", "retrieval_heads", with_value(retrieval_heads=[4, 1])),
    ("decode-tokens", "indices", change("indices", lambda t: t.long())),
    ("decode-tokens", "indices", change("indices", lambda t: t[:, :1])),
    ("decode-tokens", "counts", with_value(counts=None)),
    ("decode-tokens", "block_size", with_value(block_size=0)),
    ("decode-tokens", "start", change("start", lambda t: t.float())),
    ("decode-tokens", "length", with_value(length=7)),
    ("decode-ring", "k_local", lambda a: dict(k_local=a["k"], v_local=a["v"])),
    ("decode-ring", "v_local", with_value(v_local=None)),
    ("decode-only_rings", "length", with_value(length=-1)),
    ("near_lse-basic", "q", change("q", lambda t: t[..., :12])),
    ("near_lse-basic", "k", change("k", lambda t: t[:, :, :4])),
    ("near_lse-basic", "k", change("k", lambda t: t.half())),
    ("near_lse-basic", "q_heads", with_value(q_heads=[6, 0])),
    ("near_lse-basic", "k_heads", with_value(k_heads=[2, 0])),
    ("near_lse-basic", "k_heads", with_value(k_heads=[1])),
    ("near_lse-basic", "window", with_value(window=0)),
    ("near_lse-padded", "start", change("start", shorter(0))),
    ("top_p-forced", "scores", change("scores", lambda t: t[0])),
    ("top_p-forced", "scores", change("scores", lambda t: t.to(ints))),
    ("top_p-forced", "scores", change("scores", last_dim_strided)),
    ("top_p-forced", "p", with_value(p=0.0)),
    ("top_p-forced", "p", with_value(p=1.0001)),
    ("top_p-forced", "p", with_value(p=float("nan"))),
    ("top_p-forced", "min_members", with_value(min_members=-1)),
    ("top_p-forced", "forced_lse", change("forced_lse", shorter(0))),
    ("top_p-forced", "forced_lse", change("forced_lse", lambda t: t.double())),
    ("top_p-forced", "forced_lse", change("forced_lse", last_dim_strided)),
    ("retrieval_scores-basic", "q", change("q", lambda t: t[..., :12])),
    ("retrieval_scores-basic", "q", change("q", lambda t: t[:, :5])),
    ("retrieval_scores-basic", "q", change("q", lambda t: t[:, :, :0])),
    ("retrieval_scores-basic", "k", change("k", lambda t: t.half())),
    ("retrieval_scores-basic", "k", change("k", last_dim_strided)),
    ("retrieval_scores-basic", "k", lambda a: dict(k=a["k"][:, :, :4], pre_begin=0, pre_end=2)),
    ("retrieval_scores-basic", "pre_begin", with_value(pre_begin=-1)),
    ("retrieval_scores-basic", "pre_end", with_value(pre_end=41)),
    ("retrieval_scores-basic", "pre_end", with_value(pre_end=3)),
    ("retrieval_scores-padded", "start", change("start", lambda t: t.int())),
    ("index_project-basic", "q", change("q", lambda t: t[0])),
    ("index_project-basic", "q", change("q", last_dim_strided)),
    (
        "index_project-basic",
        "q",
        lambda a: {n: a[n][..., :0] for n in ("q", "k", "w_q", "w_k")},
    ),
    ("index_project-basic", "k", change("k", shorter(0))),
    ("index_project-basic", "k", change("k", lambda t: t.half())),
    ("index_project-basic", "w_q", change("w_q", lambda t: t[:2])),
    ("index_project-basic", "w_q", change("w_q", lambda t: t[..., :8])),
    ("index_project-basic", "w_q", lambda a: {n: a[n][:, :0] for n in ("w_q", "w_k")}),
    ("index_project-basic", "w_k", change("w_k", lambda t: t[:, :2])),
    ("index_project-basic", "w_k", change("w_k", lambda t: t.half())),
    ("index_project-basic", "q_heads", with_value(q_heads=[1, 2, 6])),
    ("index_project-basic", "k_heads", with_value(k_heads=[0, -1])),
    ("index_project-basic", "dtype", with_value(dtype=torch.int32)),
    ("sparse_decode-beyond", "q", change("q", lambda t: t.expand(-1, -1, 2, -1))),
    ("sparse_decode-beyond", "k", change("k", lambda t: t.half())),
    ("sparse_decode-beyond", "near_window", with_value(near_window=0)),
    ("sparse_decode-beyond", "retrieval_heads", with_value(retrieval_heads=[])),
    ("sparse_decode-beyond", "q_index", change("q_index", lambda t: t.expand(-1, -1, 2, -1))),
    ("sparse_decode-beyond", "k_index", change("k_index", shorter(2))),
    ("sparse_decode-beyond", "index_map", with_value(index_map=[0, 2])),
    ("sparse_decode-beyond", "p", with_value(p=0.0)),
    ("sparse_decode-beyond", "min_tokens", with_value(min_tokens=-1)),
    ("sparse_decode-beyond", "block_size", with_value(block_size=8)),
    ("sparse_decode-beyond", "offset", change("offset", shorter(0))),
    ("sparse_decode-eight_bits", "ranges", with_value(codes=None)),
    ("select-beyond", "q_index", change("q_index", lambda t: t[0])),
    ("select-beyond", "q_index", change("q_index", lambda t: t.to(ints))),
    ("select-beyond", "k_index", change("k_index", lambda t: t[..., :2])),
    ("select-beyond", "k_index", change("k_index", lambda t: t[:, :, :3])),
    ("select-beyond", "k_index", change("k_index", last_dim_strided)),
    ("select-beyond", "index_map", with_value(index_map=[0, 0, 2])),
    ("select-beyond", "q_index", with_value(index_map=[0, 0])),
    ("select-beyond", "p", with_value(p=0.0)),
    ("select-beyond", "p", with_value(p=1.5)),
    ("select-beyond", "window", with_value(window=0)),
    ("select-beyond", "sinks", with_value(sinks=-1)),
    ("select-beyond", "min_tokens", with_value(min_tokens=-1)),
    ("select-beyond", "block_size", with_value(block_size=0)),
    ("select-beyond", "near_lse", change("near_lse", shorter(2))),
    ("select-beyond", "offset", change("offset", shorter(0))),
    ("select-beyond", "start", change("start", lambda t: t.int())),
    ("select-beyond", "capacity", with_value(capacity=-1)),
    ("select-four_bits", "codes", with_value(ranges=None)),
    ("select-four_bits", "ranges", with_value(codes=None)),
    ("select-four_bits", "codes", change("codes", lambda t: t.to(ints))),
    ("select-four_bits", "codes", change("codes", lambda t: t[:, :1])),
    ("select-four_bits", "codes", change("codes", lambda t: t[..., :1])),
    ("select-four_bits", "codes", change("codes", shorter(2))),
    ("select-four_bits", "ranges", change("ranges", shorter(2))),
    ("select-four_bits", "ranges", change("ranges", shorter(3))),
    ("select-four_bits", "ranges", change("ranges", lambda t: t.float())),
    (
        "select-four_bits",
        "k_index",
        lambda a: {n: a[n][:, :, :0] for n in ("k_index", "codes", "ranges")},
    ),
    ("select-refine", "refine", with_value(codes=None, ranges=None)),
    ("select-refine", "block_size", with_value(block_size=16)),
    ("select-refine", "k_index", change("k_index", lambda t: t[:, :, :319])),
    ("select-refine", "codes", change("codes", shorter(2))),
    ("select_tiles-four_bits", "codes", with_value(ranges=None)),
    ("quantize_index-four", "k_index", change("k_index", shorter(2))),
    ("quantize_index-four", "k_index", change("k_index", lambda t: t[0])),
    ("quantize_index-four", "k_index", change("k_index", lambda t: t.to(ints))),
    ("quantize_index-four", "k_index", change("k_index", last_dim_strided)),
    ("quantize_index-four", "bits", with_value(bits=16)),
    ("select_tiles-beyond", "q_index", change("q_index", last_dim_strided)),
    ("select_tiles-beyond", "k_index", change("k_index", lambda t: t[..., :2])),
    ("select_tiles-beyond", "index_map", with_value(index_map=[0, 0, 2])),
    ("select_tiles-beyond", "threshold", change("threshold", shorter(0))),
    ("select_tiles-beyond", "threshold", change("threshold", lambda t: t.to(ints))),
    ("select_tiles-beyond", "min_blocks", with_value(min_blocks=-1)),
    ("select_tiles-beyond", "tile", with_value(tile=0)),
    ("select_tiles-beyond", "block_size", with_value(block_size=0)),
    ("select_tiles-beyond", "near_lse", change("near_lse", shorter(2))),
    ("select_tiles-beyond", "offset", change("offset", shorter(0))),
    ("select_tiles-beyond", "rank", with_value(rank="mean")),
    ("select_tiles-beyond", "capacity", with_value(capacity=-1)),
    ("index_kl-beyond", "q_index", change("q", shorter(2))),
    ("index_kl-beyond", "q", change("q", last_dim_strided)),
    ("index_kl-beyond", "k", change("k", lambda t: t.half())),
    ("index_kl-beyond", "q_index", change("q_index", lambda t: t[:, :2])),
    ("index_kl-beyond", "k_index", change("k_index", shorter(2))),
    ("index_kl-beyond", "rows", change("rows", lambda t: t.int())),
    ("index_kl-beyond", "rows", change("rows", shorter(1))),
    ("index_kl-beyond", "retrieval_heads", with_value(retrieval_heads=[4, 2, 0])),
    ("index_kl-beyond", "index_map", with_value(index_map=[0, 0, 2])),
    ("index_kl-beyond", "offset", change("offset", shorter(0))),
    ("index_kl-beyond", "window", with_value(window=0)),
    ("index_kl-beyond", "start", change("start", lambda t: t.int())),
    ("cache_append-basic", "k", change("k", lambda t: t[0])),
    ("cache_append-basic", "v", change("v", shorter(2))),
    ("cache_append-basic", "k_ring", change("k_ring", lambda t: t.half())),
    ("cache_append-basic", "v_ring", change("v_ring", lambda t: t[:, :1])),
    ("cache_append-basic", "k_pages", change("k_pages", lambda t: t[:, :, :15])),
    ("cache_append-basic", "v_pages", change("v_pages", lambda t: t[..., :8])),
    ("cache_append-basic", "full_heads", with_value(full_heads=[3])),
    ("cache_append-basic", "position", with_value(position=-1)),
    ("cache_append-basic", "sinks", with_value(sinks=-1)),
    ("cache_append-basic", "k_ring", with_value(sinks=9)),
    ("cache_append-basic", "start", change("start", lambda t: t.int())),
    ("cache_append-index", "index_pages", with_value(index_pages=None)),
    ("cache_append-index", "k_index", with_value(k_index=None)),
    ("cache_append-index", "k_index", change("k_index", shorter(2))),
    ("cache_append-index", "k_index", change("k_index", shorter(0))),
    ("cache_append-index", "index_pages", change("index_pages", lambda t: t.half())),
    ("cache_append-index", "index_pages", with_value(index_slot=60)),
    ("cache_append-index", "index_slot", with_value(index_slot=-2)),
    ("cache_append-index", "index_pages", with_value(index_slot=2**63 - 1)),
    ("cache_append-index", "position", with_value(position=2**63 - 1)),
    ("cache_append-basic", "k_pages", with_value(position=2**63 - 6)),
    ("cache_append-basic", "index_slot", with_value(index_slot=3)),
    ("cache_append_projected-basic", "v", change("v", shorter(2))),
    ("cache_append_projected-basic", "k_pages", change("k_pages", lambda t: t[:, :, :15])),
    (
        "cache_append_projected-basic",
        "v_ring",
        with_value(sinks=9, k_ring=torch.zeros(2, 2, 10, 16)),
    ),
    ("cache_append_projected-basic", "start", change("start", lambda t: t.int())),
    ("cache_append_projected-basic", "q_pre", change("q_pre", shorter(2))),
    ("cache_append_projected-basic", "q_pre", change("q_pre", last_dim_strided)),
    ("cache_append_projected-basic", "q_pre", change("q_pre", lambda t: t.to(ints))),
    ("cache_append_projected-basic", "k_pre", change("k_pre", shorter(1))),
    ("cache_append_projected-basic", "k_pre", change("k_pre", lambda t: t.half())),
    ("cache_append_projected-basic", "w_q", change("w_q", shorter(0))),
    ("cache_append_projected-basic", "w_q", change("w_q", lambda t: t[..., :8])),
    ("cache_append_projected-basic", "w_k", change("w_k", lambda t: t[:, :2])),
    ("cache_append_projected-basic", "w_k", change("w_k", lambda t: t.half())),
    ("cache_append_projected-basic", "q_heads", with_value(q_heads=[1, 2, 6])),
    ("cache_append_projected-basic", "k_heads", with_value(k_heads=[0, 3])),
    ("cache_append_projected-basic", "index_pages", change("index_pages", shorter(0))),
    ("cache_append_projected-basic", "index_pages", change("index_pages", shorter(1))),
    ("cache_append_projected-basic", "index_pages", change("index_pages", shorter(3))),
    ("cache_append_projected-basic", "index_pages", change("index_pages", lambda t: t.to(ints))),
    ("cache_append_projected-basic", "index_pages", with_value(index_slot=60)),
    ("cache_append_projected-basic", "index_pages", with_value(index_slot=2**63 - 1)),
    ("cache_append_projected-basic", "index_slot", with_value(index_slot=-2)),
    ("cache_append_projected-basic", "position", with_value(position=-1)),
    ("cache_append_index-basic", "index_pages", with_value(position=2**62)),
    ("cache_unroll-basic", "position", with_value(position=2**63 - 2)),
    ("cache_append_index-basic", "index_pages", with_value(position=60)),
    ("cache_append_index-basic", "index_pages", change("index_pages", lambda t: t[:, :2])),
    ("cache_append_index-basic", "position", with_value(position=-1)),
    ("cache_unroll-basic", "ring", change("ring", lambda t: t.half())),
    ("cache_unroll-basic", "ring", with_value(sinks=9)),
    ("cache_unroll-basic", "new", change("new", lambda t: t[0])),
    ("cache_unroll-basic", "local_heads", with_value(local_heads=[0, 3])),
    ("cache_unroll-basic", "position", with_value(position=-1)),
    ("cache_unroll-basic", "start", change("start", shorter(0))),
]
IDS = [f"{sample}-{argument}-{i}" for i, (sample, argument, _) in enumerate(BAD)]


@pytest.mark.parametrize(("sample", "argument", "spoil"), BAD, ids=IDS)
def test_bad_argument(sample, argument, spoil):
    sample: Sample = SAMPLES[sample]
    good = sample.with_tensors(torch.clone)
    message = rf"rtpurbo::{sample.op}: .*\b{argument}\b"
    with pytest.raises((ValueError, TypeError)) as raised:
        sample.outputs(good | spoil(good))
    text = str(raised.value)
    assert re.search(message, text), text
    assert re.search("must|needs|cannot", text), text
    for name in sample.written:
        assert torch.equal(good[name], sample.arguments[name])


@pytest.mark.parametrize(
    ("sample", "left_out", "given"),
    [
        ("decode-tokens", "counts", "indices"),
        ("attention-blocks", "block_indices", "block_counts"),
        ("attention-split", "v_local", "k_local"),
        ("select-four_bits", "codes", "ranges"),
        ("cache_append-index", "k_index", "index_pages"),
    ],
)
def test_of_half_a_pair_the_message_says_which(sample, left_out, given):
    sample: Sample = SAMPLES[sample]
    with pytest.raises(ValueError, match=f"must be given together, got only {given}$"):
        sample.outputs(sample.with_tensors(torch.clone) | {left_out: None})


def test_a_gradient_that_does_not_exist_is_refused():
    """k_local is forward only."""
    sample = SAMPLES["attention-split"]
    arguments = sample.with_tensors(torch.clone)
    arguments["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="k_local"):
        sample.outputs(arguments)[0].sum().backward()
