"""Which peers can do a prefill, and the small problems on which they show that they do."""

from collections.abc import Sequence
from functools import partial

from benchmarks.peers import cudnn_bsa, flash4, flash_sparse, flashinfer
from benchmarks.peers.peer import Peer
from benchmarks.peers.problems import Lists, Windows
from benchmarks.prefill_layer import SINKS, Prefill
from benchmarks.prefill_layer import Lists as BlockLists
from benchmarks.random_lists import ListPlan

SMALL, SMALL_WINDOW, SMALL_DENSITY = 1024, 200, 0.5


def windowed(prefill: Prefill, heads: Sequence[int], window: int) -> Windows:
    reach = [prefill.keys if h in heads else window for h in range(prefill.layer.heads)]
    return Windows(prefill.q, prefill.k, prefill.v, reach, SINKS)


def windowed_peers(prefill: Prefill, heads: Sequence[int], window: int) -> dict[str, Peer]:
    """`heads` are dense, the others see the window and the sinks."""

    def small() -> Windows:
        few = Prefill(prefill.layer, SMALL, prefill.device)
        return windowed(few, heads, min(window, SMALL_WINDOW))

    def problems() -> list[Windows]:
        return [windowed(prefill, heads, window)]

    if len(heads) == prefill.layer.heads:
        return {"flash-attn-4": Peer(flash4.dense, small, problems)}
    return {"flash-sparse-attn": Peer(flash_sparse.prefill, small, problems)}


def listed_peers(prefill: Prefill, lists: BlockLists) -> dict[str, Peer]:
    """Every head attends by lists."""

    def small(diagonal: bool) -> Lists:
        few = Prefill(prefill.layer, SMALL, prefill.device)
        plan = ListPlan(SMALL, 1, SINKS, SMALL_DENSITY)
        drawn = plan.draw(prefill.layer.heads, prefill.device)
        return Lists(few.q, few.k, few.v, *drawn, diagonal)

    def problems(diagonal: bool) -> list[Lists]:
        return [Lists(prefill.q, prefill.k, prefill.v, *lists, diagonal)]

    return {
        name: Peer(attention, partial(small, diagonal), partial(problems, diagonal))
        for name, attention, diagonal in (
            ("cudnn-bsa", cudnn_bsa.attention, True),
            ("flash-attn-4", flash4.attention, False),
            ("flashinfer", flashinfer.attention, False),
        )
    }
