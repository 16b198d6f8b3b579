"""Baselines of other projects, without those: what they are asked for and how they are judged."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.attention import Layer
from benchmarks.decode_cuda import baselines
from benchmarks.measure import measure
from benchmarks.peers import cudnn_bsa, decode, flash4, flash_sparse, flashinfer, lists
from benchmarks.peers.peer import Peer, PeerError
from benchmarks.peers.prefill import listed_peers, windowed
from benchmarks.peers.problems import Lists, Windows, check
from benchmarks.prefill_layer import SINKS, Prefill
from benchmarks.random_lists import ListPlan, draw_batch
from benchmarks.registry import Case
from rtpurbo.tiles import TILE_BLOCK
from tests.test_benchmark_masks import listed_mask, near_mask

LAYER, KEYS, WINDOW = Layer(4, 2, 16, (1, 2)), 512, 100


@pytest.fixture
def prefill():
    torch.manual_seed(0)
    return Prefill(LAYER, KEYS, "cpu")


def drawn(prefill, diagonal=False):
    made = ListPlan(KEYS, 1, SINKS, 0.6).draw(LAYER.heads, "cpu")
    return Lists(prefill.q, prefill.k, prefill.v, *made, diagonal)


def whole_mask(problem):
    rows = torch.arange(KEYS)
    return torch.stack([problem.visible(0, head, rows) for head in range(LAYER.heads)])


def masked(q, k, v, mask):
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)


def test_masks_are_those_of_the_operators(prefill):
    problem = windowed(prefill, [1, 2], WINDOW)
    mask = whole_mask(problem)
    assert torch.equal(mask[0], near_mask(KEYS, WINDOW, SINKS))
    assert torch.equal(mask[1], torch.ones(KEYS, KEYS).tril().bool())
    check(prefill.attend([1, 2], WINDOW), problem)
    problem = drawn(prefill)
    assert torch.equal(whole_mask(problem), listed_mask(problem.indices, problem.counts, KEYS))
    given = problem.indices, problem.counts
    check(prefill.attend(range(LAYER.heads), 1, given), problem)


def test_the_check_sees_other_masks(prefill):
    out = prefill.attend([1, 2], WINDOW)
    for heads, window in (([1, 2], WINDOW + 1), ([1, 2], WINDOW - 1), ([1, 3], WINDOW)):
        with pytest.raises(RuntimeError, match="differs from SDPA"):
            check(out, windowed(prefill, heads, window))
    without_sinks = windowed(prefill, [1, 2], WINDOW)
    without_sinks.sinks = 0
    with pytest.raises(RuntimeError, match="differs from SDPA"):
        check(out, without_sinks)
    with pytest.raises(RuntimeError, match="head 0 differs"):
        check(torch.full_like(out, torch.nan), without_sinks)
    with pytest.raises(RuntimeError, match="shape"):
        check(out[:, :2], without_sinks)


def test_a_list_for_either_half_of_a_tile(prefill):
    problem = drawn(prefill, diagonal=True)
    indices, counts = lists.of_blocks(problem.indices, problem.counts)
    blocks = torch.zeros(LAYER.heads, *[KEYS // TILE_BLOCK] * 2, dtype=torch.bool)
    for head, row in torch.cartesian_prod(*map(torch.arange, counts.shape[1:])).tolist():
        blocks[head, row, indices[0, head, row, : counts[0, head, row]].long()] = True
    mask = blocks.repeat_interleave(TILE_BLOCK, 1).repeat_interleave(TILE_BLOCK, 2)
    assert torch.equal(mask, whole_mask(problem))


def fake_bsa(q, k, v, indices, q2k_block_nums, sparse_block_size, kv_splits):
    mask = torch.zeros(q.shape[1], q.shape[2], k.shape[2] + TILE_BLOCK, dtype=torch.bool)
    for head, row in torch.cartesian_prod(*map(torch.arange, q2k_block_nums.shape[1:])).tolist():
        for block in indices[0, head, row, : q2k_block_nums[0, head, row]].tolist():
            at = slice(row * TILE_BLOCK, (row + 1) * TILE_BLOCK)
            mask[head, at, block * TILE_BLOCK : (block + 1) * TILE_BLOCK] = True
    return {"o_tensor": masked(q, k, v, mask[..., : k.shape[2]])}


def test_lists_as_cudnn_takes_them(prefill, monkeypatch):
    fake = SimpleNamespace(BSA=SimpleNamespace(block_sparse_attention_forward=fake_bsa))
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    problem = drawn(prefill, diagonal=True)
    check(cudnn_bsa.attention(problem)(), problem)


def test_lists_as_flash_attention_4_takes_them(prefill, monkeypatch):
    def attend(q, k, v, mask_mod, block_sparse_tensors, pack_gqa):
        parts = []
        for counts, indices in (block_sparse_tensors.cut, block_sparse_tensors.full):
            assert indices.shape[:3] == counts.shape
            part = Lists(*(x.transpose(1, 2) for x in (q, k, v)), indices, counts)
            parts.append(whole_mask(part))
        assert not (parts[0] & parts[1]).any()
        return masked(*(x.transpose(1, 2) for x in (q, k, v)), parts[0] | parts[1]).transpose(1, 2)

    def tensors(cut_counts, cut, full_counts, full, block_size):
        # Blocks before the tile must not need the mask.
        first = torch.arange(full_counts.shape[-1])[:, None] * block_size[0] // block_size[1]
        used = torch.arange(full.shape[-1]) < full_counts[..., None]
        assert (full < first)[used].all()
        return SimpleNamespace(cut=(cut_counts, cut), full=(full_counts, full))

    for name, content in {
        "flash_attn": {},
        "flash_attn.cute": {},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": tensors},
        "flash_attn.cute.interface": {"flash_attn_func": attend},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    monkeypatch.setattr(flash4, "causal", lambda: None)
    problem = drawn(prefill)
    check(flash4.attention(problem)(), problem)


class FakeFlashSparse:
    """As its documentation has it."""

    def flash_dense_attn_func(self, q, k, v, is_causal, window_sizes, is_autotune):
        assert is_causal and q.is_contiguous() and k.is_contiguous() and not is_autotune
        sinks, left, right, near = window_sizes.repeat_interleave(len(q[0, 0]) // len(k[0, 0]), 0).T
        distance = torch.arange(KEYS)[:, None] - torch.arange(KEYS)
        sinks, left, right, near = (x[:, None, None] for x in (sinks, left, right, near))
        mask = (distance < near) | (distance >= near + right) & (distance < near + right + left)
        mask = (distance >= 0) & (mask | (torch.arange(KEYS) < sinks))
        return masked(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)

    def flash_dense_attn_with_kvcache_func(
        self, q, k, v, is_autotune, num_splits, window_sizes=None, gather_kv_indices=None
    ):
        keys = k.shape[1]
        mask = torch.zeros(len(q), 1, 1, keys + 1, dtype=torch.bool)
        if window_sizes is None:
            assert gather_kv_indices.shape[1] % flash_sparse.PADDED == 0
            places = torch.where(gather_kv_indices < 0, keys, gather_kv_indices).long()
            mask[:, 0, 0].scatter_(1, places, True)
        else:
            sinks, window, gap, near = window_sizes.unique(dim=0)[0].tolist()
            assert gap == near == 0
            mask[..., :sinks] = mask[..., keys - window :] = True
        return masked(
            q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), mask[..., :keys]
        )[:, :, 0]  # fmt: skip


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setattr(flash_sparse, "package", FakeFlashSparse)
    monkeypatch.setattr(flash_sparse, "splits", lambda sequences, device: [1])


@pytest.mark.parametrize("heads", [[], [1, 2], [2, 3]])
def test_windows_as_flash_sparse_attention_takes_them(prefill, package, heads):
    problem = windowed(prefill, heads, WINDOW)
    check(flash_sparse.prefill(problem)(), problem)


class FakePages:
    """Either wrapper of FlashInfer, as its documentation has it: pages "HND" or "NHD"."""

    def __init__(self, workspace, layout, use_tensor_cores=False, backend="auto"):
        self.is_hnd = {"HND": True, "NHD": False}[layout]

    def plan(self, *of, q_data_type, kv_data_type, causal=False):
        *rows, begins, pages, last, self.heads, self.kv_heads, self.dim, self.size = of
        rows = rows[0] if rows else torch.arange(len(begins), dtype=torch.int32)
        assert {x.dtype for x in (rows, begins, pages, last)} == {torch.int32}
        assert rows.device == begins.device == last.device == torch.device("cpu")
        assert len(rows) == len(begins) == len(last) + 1 and begins[-1] == len(pages)
        self.rows, self.begins, self.causal = rows.tolist(), begins.tolist(), causal
        self.pages, self.last = pages.long(), last.tolist()

    def run(self, q, kv, out):
        assert q.shape == out.shape == (self.rows[-1], self.heads, self.dim)
        for i, last in enumerate(self.last):
            rows = slice(self.rows[i], self.rows[i + 1])
            pages = self.pages[self.begins[i] : self.begins[i + 1]]
            k, v = (x[pages] if self.is_hnd else x[pages].transpose(1, 2) for x in kv)
            assert k.shape[1:] == (self.kv_heads, self.size, self.dim)
            seen = (len(pages) - 1) * self.size + last
            k, v = (x.transpose(0, 1).flatten(1, 2)[:, :seen] for x in (k, v))
            mask = torch.ones(rows.stop - rows.start, seen, dtype=torch.bool)
            if self.causal:  # the last row sees all
                mask = mask.tril(seen - len(mask))
            out[rows] = masked(q[rows].transpose(0, 1), k, v, mask).transpose(0, 1)
        return out


@pytest.fixture
def pages(monkeypatch):
    wrappers = "BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"
    fake = SimpleNamespace(**dict.fromkeys(wrappers, FakePages))
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(flashinfer, "workspace", lambda device: None)
    monkeypatch.setattr(flashinfer, "fastest", lambda runs: list(runs)[-1])


@pytest.mark.parametrize("window", [1, 300])
def test_lists_as_flashinfer_takes_them(pages, window):
    torch.manual_seed(0)
    few = Prefill(LAYER, KEYS, "cpu", lengths=[KEYS] * 2)
    plans = [ListPlan.of_far(KEYS, window, SINKS, share) for share in (0.3, 0.6)]
    problem = Lists(few.q, few.k, few.v, *draw_batch(plans, LAYER.heads, "cpu"))
    check(flashinfer.attention(problem)(), problem)


def test_lists_of_a_prefill_are_given_to_flashinfer(prefill, pages):
    given = ListPlan(KEYS, 1, SINKS, 0.6).draw(LAYER.heads, "cpu")
    (out,) = listed_peers(prefill, given)["flashinfer"]()
    assert out.shape == prefill.q.shape


def token_step(heads, keys, window=30, near_window=30):
    q, (k, v) = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 2, keys, 16)
    counts = torch.randint(1, 50, (2, len(heads), 1), dtype=torch.int32)
    indices = torch.rand(2, len(heads), 1, 200).argsort(-1).to(torch.int32)
    lists = indices, counts
    near = dict(window=window, near_window=near_window)
    return SimpleNamespace(q=q, k=k, v=v, retrieval=heads, lists=lists, **near)


@pytest.mark.parametrize("heads", [[], [1], [3, 0], [0, 1, 2, 3]])
def test_tokens_as_flashinfer_takes_them(pages, heads):
    torch.manual_seed(0)
    problem = decode.token(token_step(heads, 300), SINKS)
    check(flashinfer.decode(problem)(), problem)


def test_decode_steps_are_given_to_flashinfer(pages):
    torch.manual_seed(0)
    steps = [token_step([0, 3], 320, near_window=320) for _ in range(2)]
    for step, out in zip(steps, baselines(steps)["step"]["flashinfer"](), strict=True):
        torch.testing.assert_close(out, sdpa(step.q, step.k, step.v, enable_gqa=True))
    by_tokens = decode.decode_peers(steps, SINKS)["flashinfer by tokens"]
    assert [out.shape for out in by_tokens()] == [step.q.shape for step in steps]
    assert "flashinfer" not in baselines([token_step([0, 3], 300, near_window=300)])["step"]


def test_only_retrieval_heads_have_the_near_window():
    step = token_step([1], 300, near_window=5)
    step.lists[1].zero_()
    problem = decode.token(step, SINKS)
    sees = [problem.visible(0, head, torch.tensor([299]))[0].tolist() for head in (0, 1)]
    for seen, near in zip(sees, (30, 5), strict=True):
        assert seen == [True] * SINKS + [False] * (300 - SINKS - near) + [True] * near


@pytest.mark.parametrize("heads", [[1], [0, 3], [0, 1, 2, 3]])
def test_tokens_as_flash_sparse_attention_takes_them(package, heads):
    torch.manual_seed(0)
    step = token_step(heads, 300)
    indices, counts = step.lists
    problem = decode.token(step, SINKS)
    chosen = torch.zeros(300, dtype=torch.bool)
    chosen[indices[1, 0, 0, : counts[1, 0, 0]].long()] = True
    chosen[270:] = chosen[:SINKS] = True
    assert torch.equal(problem.visible(1, heads[0], torch.tensor([299]))[0], chosen)
    check(flash_sparse.decode(problem)(), problem)
    counts[1] = -1
    with pytest.raises(RuntimeError, match="no list says"):
        decode.token(step, SINKS)


@pytest.mark.parametrize("module, name", [("cudnn", "cudnn-bsa"), ("flashinfer", "flashinfer")])
def test_a_peer_that_is_not_there_is_a_note(prefill, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    given = ListPlan(KEYS, 1, SINKS, 0.6).draw(LAYER.heads, "cpu")
    peer = listed_peers(prefill, given)[name]
    (row,) = measure([Case({}, int, {name: peer})], 1)
    assert "ModuleNotFoundError" in row["notes"][name] and row["ratios"] == {}


def test_a_peer_that_computes_something_else_is_not_timed(prefill):
    problem = windowed(prefill, [], WINDOW)
    out = prefill.attend([], WINDOW)
    solved = []

    def solve(asked):
        solved.append(asked)
        return lambda: out

    peer = Peer(solve, lambda: problem, lambda: [problem, problem])
    assert len(peer()) == 2 and len(solved) == 3
    peer()
    assert len(solved) == 3
    wrong = Windows(problem.q, problem.k, problem.v, [WINDOW - 20] * 4, SINKS)
    with pytest.raises(PeerError, match="differs from SDPA"):
        Peer(solve, lambda: wrong, lambda: [problem])()
    with pytest.raises(PeerError, match=r"differs from SDPA by 0\.1"):
        Peer(lambda _: lambda: out * 1.1, lambda: problem, lambda: [problem])()
    with pytest.raises(PeerError, match="differs from SDPA"):
        Peer(solve, lambda: problem, lambda: [problem, wrong])()


def test_token_lists_are_padded():
    chosen = torch.rand(1, 2, 3000) < 0.3
    made = flash_sparse.token_lists(chosen, [1, 0], 2)
    assert made.dtype == torch.int32 and made.shape[1] % flash_sparse.PADDED == 0
    assert sorted(made[0][made[0] >= 0].tolist()) == (chosen[0, 0].nonzero()[:, 0] + 3000).tolist()
