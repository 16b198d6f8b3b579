"""One decoded token of a layer on the GPU: `sparse_decode` against dense SDPA, and its parts.

The index picks exactly `selected` far tokens a head (a floor at a tiny p), so that bytes are known.
Inputs rotate, so that from 8K keys on little of a window is still in the L2 cache; times are of
graph replays.
Kernels of other projects join in where they are installed (`benchmarks/peers`): they attend to the
same tokens and choose none, which makes `attend` their like.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.dense import BACKENDS, dense
from benchmarks.peers.decode import decode_peers
from benchmarks.registry import Case, Wanted, benchmark, in_turn
from rtpurbo import ops
from rtpurbo.short_inputs import fewest_to_select_from

HEADS, KV_HEADS, DIM, INDEX_DIM = 32, 4, 128, 16
ROW = 2 * DIM * 2  # bytes of a key and its value
RETRIEVAL = [1, 9, 10, 17, 30]
WINDOW, SINKS, SELECTED = 8192, 4, 8192
SCALE = DIM**-0.5
BLOCK = 64  # keys that are quantised together


class Step:
    """The tensors of one decode step and its parts; `shared`: an index key for each KV head."""

    def __init__(
        self,
        batch: int,
        keys: int,
        retrieval: list[int],
        bits: int = 16,
        shared: bool = False,
        selected: int = SELECTED,
    ) -> None:
        def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=dtype)

        group = HEADS // KV_HEADS
        owners = [head // group for head in retrieval]
        self.retrieval, self.owners, self.bits = retrieval, owners, bits
        self.index_map = owners if shared else list(range(len(retrieval)))
        self.q = draw(batch, HEADS, 1, DIM)
        self.k, self.v = draw(batch, KV_HEADS, keys, DIM), draw(batch, KV_HEADS, keys, DIM)
        self.q_index = draw(batch, len(retrieval), 1, INDEX_DIM, dtype=torch.float16)
        index_heads = KV_HEADS if shared else len(retrieval)
        self.k_index = draw(batch, index_heads, keys, INDEX_DIM, dtype=torch.float16)
        self.every_index = self.k_index
        self.coded: dict[str, Tensor] = {}
        if bits < 16:
            far = max(0, keys - WINDOW) // BLOCK * BLOCK
            codes, ranges = ops.quantize_index(self.k_index[:, :, :far], bits)
            self.coded = dict(codes=codes, ranges=ranges)
            self.k_index = self.k_index[:, :, far:].contiguous()
        self.floor = min(selected, max(1, keys - WINDOW - SINKS))
        self.near = self.near_lse()
        self.lists = self.select()

    def near_lse(self) -> Tensor:
        return ops.near_lse(self.q, self.k, self.retrieval, self.owners, WINDOW, SINKS, SCALE)

    def select(self) -> tuple[Tensor, Tensor]:
        return self.lists_by(self.k_index)

    def refine(self) -> tuple[Tensor, Tensor]:
        """`select` with codes, and again among twice as many with all keys in 16 bits."""
        return self.lists_by(self.every_index, refine=True)

    def lists_by(self, k_index: Tensor, refine: bool = False) -> tuple[Tensor, Tensor]:
        indices, counts, _ = ops.select(
            self.q_index, k_index, self.index_map, 1e-9, WINDOW, SINKS, self.floor,
            near_lse=self.near, capacity=2 * self.floor, **self.coded, refine=refine,
        )  # fmt: skip
        return indices, counts

    def attend(self) -> Tensor:
        return ops.decode(
            self.q, self.k, self.v, self.retrieval, WINDOW, WINDOW, SINKS, SCALE, *self.lists
        )[0]

    @property
    def selects(self) -> bool:
        """Whether a model would select, rather than read all far keys."""
        batch, _, keys, _ = self.k.shape
        read = len(set(self.owners)) * ROW
        index_key = INDEX_DIM * self.bits // 8
        heads, floor = len(self.retrieval), self.floor * ROW
        fewest = fewest_to_select_from(batch, heads, read, index_key, floor)
        return keys - WINDOW - SINKS >= fewest

    def whole(self) -> Tensor:
        """As a model does it."""
        if self.selects:
            return self.select_and_attend()
        layer = self.q, self.k, self.v, self.retrieval
        return ops.decode(*layer, WINDOW, WINDOW, SINKS, SCALE)[0]

    def bytes(self, part: str) -> int:
        """Keys, values and index keys that a part must read; each list counts for itself."""
        batch, _, keys, _ = self.k.shape
        near, owners = min(keys, WINDOW + SINKS), len(set(self.owners))
        index = self.coded.values() or [self.k_index[:, :, near:]]
        scan = sum(tensor.numel() * tensor.element_size() for tensor in index)
        listed = batch * len(self.retrieval) * self.floor * ROW
        every = {
            "near_lse": batch * owners * near * ROW // 2,
            "select": scan,
            "refine": scan + batch * len(self.retrieval) * 2 * self.floor * INDEX_DIM * 2,
            "attend": batch * KV_HEADS * near * ROW + listed,
            "dense": batch * (owners * keys + (KV_HEADS - owners) * near) * ROW,
        }
        every["sparse_decode"] = every["attend"] + scan
        every["step"] = every["sparse_decode" if self.selects else "dense"]
        return every[part]

    def select_and_attend(self, block_size: int = 1) -> Tensor:
        return ops.sparse_decode(
            self.q, self.k, self.v, self.retrieval, self.q_index, self.k_index, self.index_map,
            1e-9, WINDOW, WINDOW, SINKS, self.floor, SCALE, block_size=block_size, **self.coded,
        )[0]  # fmt: skip

    def fixed_blocks(self) -> Tensor:
        """Quest's budget: as many tokens, in blocks of 16 by their mass under the index."""
        return self.select_and_attend(block_size=16)


PARTS = {
    "step": Step.whole,
    "sparse_decode": Step.select_and_attend,
    "near_lse": Step.near_lse,
    "select": Step.select,
    "attend": Step.attend,
}


def baselines(steps: list[Step]) -> dict[str, dict[str, Callable[[], object]]]:
    """By part."""
    runs = {
        name: in_turn([partial(dense, b, step.q, step.k, step.v) for step in steps])
        for name, b in BACKENDS.items()
    }
    if steps[0].k.shape[2] <= WINDOW + SINKS:
        return {"step": runs}
    runs["fixed blocks of 16"] = in_turn([step.fixed_blocks for step in steps])
    peers = decode_peers(steps, WINDOW, SINKS)
    return {"step": {**runs, **peers}, "sparse_decode": {**peers}, "attend": {**peers}}


EVERY_HEAD = list(range(HEADS))
SHAPES = [
    *[dict(batch=1, keys=keys) for keys in (16, 256, 1024)],
    *[dict(batch=1, keys=2**i * 1024) for i in range(2, 11)],
    *[dict(batch=1, keys=keys, bits=4) for keys in (131_072, 1_048_576)],
    *[dict(batch=batch, keys=2**i * 1024) for batch in (4, 16) for i in (3, 5, 7, 9)],
    *[
        dict(batch=1, keys=keys, selected=selected)
        for keys in (131_072, 1_048_576)
        for selected in (512, 2048, 16_384)
    ],
    *[dict(batch=64, keys=keys) for keys in (1024, 8192, 32_768)],
    *[dict(batch=1, keys=131_072, heads="all", shared=shared) for shared in (False, True)],
    dict(batch=1, keys=1_048_576, heads="all"),
    dict(batch=1, keys=1_048_576, heads="all", bits=4),
]


@benchmark
def decode_cuda(wanted: Wanted) -> Iterator[Case]:
    if not torch.cuda.is_available():
        return
    for shape in SHAPES:
        batch, keys, bits = shape["batch"], shape["keys"], shape.get("bits", 16)
        heads = EVERY_HEAD if shape.get("heads") == "all" else RETRIEVAL
        rounds = 6 if batch * keys <= 524_288 else 3 if batch * keys <= 4_194_304 else 1
        apart = keys in (131_072, 1_048_576) and batch == 1 and "selected" not in shape
        parts = PARTS if apart else {"step": Step.whole}
        if bits < 16:
            parts = {**parts, "refine": Step.refine}
        parameters = {part: {"part": part, "selected": SELECTED, **shape} for part in parts}
        chosen = [part for part in parts if wanted(parameters[part])]
        if not chosen:
            continue
        options = {name: shape[name] for name in ("shared", "selected") if name in shape}
        steps = [Step(batch, keys, heads, bits, **options) for _ in range(rounds)]
        against = baselines(steps)
        for part in chosen:
            yield Case(
                parameters=parameters[part],
                run=in_turn([partial(parts[part], step) for step in steps]),
                baselines=against.get(part, {}),
                bytes=steps[0].bytes(part),
                rounds=len(steps),
                device="cuda",
            )
        del steps, against
        torch.cuda.empty_cache()
