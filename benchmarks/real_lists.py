"""`decode` of a large layer by the lists that a model selected, against as many random keys.

| part | what is read |
|---|---|
| pattern | the lists, sinks and the model's window |
| gather | the lists and sinks |
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.decode_layer import LAYER
from benchmarks.gathers import as_members, groups, mean_run, random_like
from benchmarks.recorded import Call
from benchmarks.registry import Case, Run, in_turn
from rtpurbo import ops

PARTS = ("pattern", "gather")

Group = list[Tensor]
"""A list of keys for each retrieval head of the layer."""


@dataclass(frozen=True)
class TextLists:
    """The lists of one text in groups, as selected and at random, and q, k, v to read with them."""

    qkv: tuple[Tensor, Tensor, Tensor]
    real: list[Group]
    drawn: list[Group]
    window: int
    sinks: int

    @classmethod
    def of(cls, qkv: tuple[Tensor, Tensor, Tensor], calls: list[Call]) -> "TextLists":
        """`calls`: of one step, all layers'."""
        arguments = calls[0].arguments
        window, sinks = arguments["near_window"], arguments["sinks"]
        far_end = arguments["k"].shape[2] - window
        lists = [positions for call in calls for positions in call.far_positions()]
        real = groups(lists, len(LAYER.retrieval_heads))
        drawn = [random_like(group, sinks, far_end) for group in real]
        return cls(qkv, real, drawn, window, sinks)

    def attend(self, group: Group, part: str) -> Run:
        window = self.window if part == "pattern" else 1
        layer = *self.qkv, LAYER.retrieval_heads, window, window, self.sinks, LAYER.dim**-0.5
        return partial(ops.decode, *layer, *as_members(group))


def case_of(parameters: dict[str, Any], texts: list[TextLists]) -> Case:
    """Over all texts one group, or all of them."""
    number, part = parameters["group"], parameters["part"]
    numbers = range(len(texts[0].real)) if number == "all" else [number]
    pairs = [(text, i) for text in texts for i in numbers]
    real = [positions for text, i in pairs for positions in text.real[i]]
    drawn = [positions for text, i in pairs for positions in text.drawn[i]]
    return Case(
        parameters=parameters,
        run=in_turn([text.attend(text.real[i], part) for text, i in pairs]),
        baselines={"random keys": in_turn([text.attend(text.drawn[i], part) for text, i in pairs])},
        rounds=len(pairs),
        device=texts[0].qkv[0].device.type,
        facts={
            "selected": sum(map(len, real)) / len(real),
            "selected_max": max(map(len, real)),
            "run": mean_run(real),
            "random_run": mean_run(drawn),
        },
    )
