"""How many prompts of which lengths a prefill is of, and in which type."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.attention import LAYERS, Layer
from benchmarks.prefill_layer import Prefill
from benchmarks.registry import Case, Wanted


@dataclass(frozen=True)
class Shape:
    """Lengths and rows are those of `Prefill`; `kind` names what is special."""

    kind: str
    keys: int
    layer: Layer = LAYERS[0]
    lengths: tuple[int, ...] = ()
    rows: int | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "heads": self.layer.shape,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": len(self.lengths) or 1,
            **({} if self.rows is None else {"rows": self.rows}),
            "keys": self.keys,
        }

    def draw(self, device: str) -> Prefill:
        return Prefill(
            self.layer,
            self.keys,
            device,
            lengths=self.lengths,
            rows=self.rows,
            dtype=self.dtype,
        )


def by_shape(
    shapes: Sequence[Shape],
    parameters_of: Callable[[Shape], list[dict[str, Any]]],
    cases_at: Callable[[Shape, list[dict[str, Any]]], list[Case]],
    wanted: Wanted,
) -> Iterator[list[Case]]:
    """The wanted cases of each shape, on a GPU."""
    if not torch.cuda.is_available():
        return
    for shape in shapes:
        chosen = [parameters for parameters in parameters_of(shape) if wanted(parameters)]
        if chosen:
            yield cases_at(shape, chosen)
            torch.cuda.empty_cache()
