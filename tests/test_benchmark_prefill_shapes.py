"""Prefill of several prompts and of the last rows: cases, masks and dense baselines, on the CPU."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks import dense_prefill, prefill_layer, prefill_shapes_cuda, prefill_short_cuda
from benchmarks.attention import Layer
from benchmarks.prefill_layer import Prefill
from benchmarks.prefill_shape import Shape
from rtpurbo import ops
from tests.reference.attention import attention, listed
from tests.reference.masks import last_positions, near, visible

LAYER = Layer(4, 2, 16, (1, 2))
SHAPES = [
    Shape("batch", 512, LAYER, lengths=(512, 512)),
    Shape("padded", 512, LAYER, lengths=(512, 384, 128)),
    Shape("chunk", 1024, LAYER, rows=256),
    Shape("fp16", 512, LAYER, dtype=torch.float16),
    Shape("dim", 512, Layer(2, 1, 256, (1,))),
    Shape("group", 512, Layer(3, 3, 16, (0, 2))),
]
by_kind = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)


def parameters_of(mode):
    return {"mode": mode, "window": 100}


@pytest.fixture
def dense_on_cpu(monkeypatch):
    """The backends of CUDA by whichever the CPU has; packed prompts one by one."""

    def dense(backend, q, k, v, **more):
        return sdpa(q, k, v, enable_gqa=True, **more)

    def varlen(q, k, v, begins, key_begins, longest, most_keys, window_size):
        assert begins.dtype == torch.int32 and window_size == (-1, 0)
        assert torch.equal(begins, key_begins) and longest == most_keys == begins.diff().max()
        ends = begins.tolist()
        return torch.cat(
            [
                dense(None, *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True)[0]
                for a, b in pairwise(ends)
            ],
            1,
        ).transpose(0, 1)

    monkeypatch.setattr(dense_prefill, "dense", dense)
    monkeypatch.setattr(dense_prefill, "varlen_attn", varlen)


@by_kind
def test_every_mode_attends_to_what_its_rate_counts(monkeypatch, shape):
    cases = prefill_shapes_cuda.cases_at(
        shape, [parameters_of(mode) for mode in prefill_shapes_cuda.MODES], "cpu"
    )
    calls, operator = [], ops.attention
    monkeypatch.setattr(
        prefill_layer.ops, "attention", lambda *a, **of: calls.append((a, of)) or operator(*a, **of)
    )
    for case, retrieval in zip(cases, (True, False, None, None), strict=True):
        out = case.run()
        (args, options), *more = calls
        assert not more
        calls.clear()
        q, _, _, heads, window = args[:5]
        every = list(range(q.shape[1]))
        assert heads == {True: every, False: [], None: list(shape.layer.retrieval_heads)}[retrieval]
        assert q.dtype == shape.dtype and window == 100
        expected, _ = attention(*args, **options)
        assert (out - expected).abs().max() < (0.002 if shape.dtype == torch.float16 else 0.02)
        assert case.flops == 4 * shape.layer.dim * pairs_seen(*args, **options)
        assert case.goals == dict.fromkeys(case.baselines, 1.0)
    *_, layer, sparse = cases
    assert sparse.facts["density"] < 1.0 and sparse.flops < layer.flops


def pairs_seen(q, k, v, heads, window, sinks, scale, start, **lists):
    positions, keys = last_positions(q.shape[2], k.shape[2], q.shape[0]), k.shape[2]
    seen = (q.shape[1] - len(heads)) * int(near(positions, keys, start, window, sinks).sum())
    causal = visible(positions, keys, start)
    for entry in range(len(heads)):
        of = causal
        if lists["block_indices"] is not None:
            indices, counts = (lists[f"block_{name}"][:, entry] for name in ("indices", "counts"))
            of = causal & listed(indices, counts, q.shape[2], keys, 128, 64)
        seen += int(of.sum())
    return seen


def test_a_selection_is_of_its_rows_without_the_padding():
    for shape in SHAPES[1:3]:
        prefill = shape.draw("cpu")
        lse = prefill.near_lse(100)
        if prefill.is_padded:
            positions = torch.arange(prefill.keys)
            padding = positions < prefill.start[:, None]
            assert torch.equal(lse.isinf().all(1), padding)
        _, counts = prefill.select_tiles(100, lse)
        tiles = prefill.rows // 128
        assert counts.shape == (len(prefill.lengths), 2, tiles)
        first_tile = [tiles - min(n, prefill.rows) // 128 for n in prefill.lengths]
        for sequence, first in enumerate(first_tile):
            assert (counts[sequence, :, :first] == 0).all()
            assert (counts[sequence, :, first:] > 0).all()


def test_form_full_selects_without_near_lse(monkeypatch):
    prefill, calls = SHAPES[2].draw("cpu"), []
    monkeypatch.setattr(prefill, "near_lse", lambda *of: calls.append(of))
    monkeypatch.setattr(prefill, "select_tiles", lambda *of: calls.append(of))
    monkeypatch.setattr(prefill, "attend", lambda *of: calls.append(of))
    prefill.sparse(100, "lists")
    assert calls == [(100,), (100, None), ([1, 2], 100, "lists")]
    calls.clear()
    prefill.sparse(100, "lists", 64)
    assert calls == [(64, None), ([1, 2], 100, "lists")]


@by_kind
def test_dense_baselines_are_dense_heads(dense_on_cpu, shape):
    prefill = shape.draw("cpu")
    ours = prefill.attend(range(shape.layer.heads), 1).float()
    runs = {**dense_prefill.flash(prefill), **dense_prefill.cudnn(prefill)}
    assert list(runs) == {
        "padded": ["flash varlen", "cudnn with padding", "cudnn a prompt", "cudnn masked"],
        "chunk": ["flash", "cudnn in two"],
    }.get(shape.kind, ["flash", "cudnn"])
    outs = {name: run() for name, run in runs.items()}
    if shape.kind == "padded":
        packed = outs.pop("flash varlen").split(list(shape.lengths))
        alone, masked = outs.pop("cudnn a prompt"), outs.pop("cudnn masked")
        for i, n in enumerate(shape.lengths):
            real = ours[i, :, -n:]
            for out in (packed[i].transpose(0, 1), alone[i][0], masked[i, :, -n:]):
                assert (out.float() - real).abs().max() < 0.02
        with_padding = outs.pop("cudnn with padding").float()
        assert (with_padding[0] - ours[0]).abs().max() < 0.02
        assert (with_padding[1] - ours[1])[:, -256:].abs().max() > 0.02
    outs.pop("cudnn in two", None)
    for out in outs.values():
        assert (out.float() - ours).abs().max() < 0.02


def test_two_calls_see_every_key_of_a_chunk_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        dense_prefill, "dense", lambda backend, q, k, v, **more: calls.append((q, k, v, more))
    )
    prefill = Prefill(LAYER, 1024, "cpu", rows=256)
    dense_prefill.cudnn(prefill)["cudnn in two"]()
    (q, k, v, more), (own_q, own_k, own_v, own_more) = calls
    assert q is own_q is prefill.q and q.shape[2] == own_k.shape[2] == 256
    assert more == {} and own_more == {"is_causal": True}
    assert torch.equal(torch.cat([k, own_k], 2), prefill.k)
    assert torch.equal(torch.cat([v, own_v], 2), prefill.v)


def test_a_large_batch_has_no_mask(monkeypatch):
    monkeypatch.setattr(dense_prefill, "MASKED_UP_TO", 511)
    assert "cudnn masked" not in dense_prefill.cudnn(SHAPES[1].draw("cpu"))


@pytest.mark.parametrize("lengths, rows", [([512, 384], 128), ([384], None), ([640], None)])
def test_rows_and_lengths_that_do_not_fit_are_refused(lengths, rows):
    with pytest.raises(ValueError, match="the longest prompt must have all keys"):
        Prefill(LAYER, 512, "cpu", lengths=lengths, rows=rows)


@pytest.mark.parametrize("module", [prefill_shapes_cuda, prefill_short_cuda])
def test_the_shapes_of_a_benchmark_have_lists_and_little_memory(module):
    seen = []
    for shape in module.SHAPES:
        layer, lengths = shape.layer, shape.lengths or (shape.keys,)
        rows = shape.rows or shape.keys
        has_lists = shape.keys > prefill_short_cuda.RECENT
        assert not has_lists or all(n % 128 == 0 for n in (*lengths, rows))
        assert max(lengths) == shape.keys
        elements = (
            len(lengths) * layer.dim * (2 * rows * layer.heads + 2 * shape.keys * layer.kv_heads)
        )
        assert 3 * 2 * elements < 40e9  # q, k, v and outputs, packed ones, what runs beside
        seen += [tuple(parameters.items()) for parameters in module.parameters_of(shape)]
    assert len(seen) == len(set(seen))
