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


def test_a_gradient_that_does_not_exist_is_refused():
    """k_local is forward only."""
    sample = SAMPLES["attention-split"]
    arguments = sample.with_tensors(torch.clone)
    arguments["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="k_local"):
        sample.outputs(arguments)[0].sum().backward()
