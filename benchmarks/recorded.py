"""The `sparse_decode` calls of a sparse model's decode step, with the tensors of its caches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rtpurbo import data, families
from rtpurbo.cache import RTPurboCache
from rtpurbo.evaluate.modes import cache_argument
from rtpurbo.ops.sparse_decode import unpacked

SPARSE_DECODE = torch.ops.rtpurbo.sparse_decode.default


@dataclass(frozen=True)
class Call:
    """One call, of one sequence without padding: its arguments by name, and what it selected."""

    arguments: dict[str, Any]
    selected: Tensor
    mass: Tensor

    def __call__(self) -> object:
        return SPARSE_DECODE(**self.arguments)

    def far_positions(self) -> list[Tensor]:
        """Ascending positions of the selected keys outside sinks and window, by head."""
        keys = self.arguments["k"].shape[2]
        far = unpacked(self.selected[0, :, 0], keys - self.arguments["near_window"])
        far[:, : self.arguments["sinks"]] = False
        return [head.nonzero()[:, 0] for head in far]

    @property
    def bytes(self) -> int:
        """Keys, values and index keys that it must read; each list counts for itself."""
        given = self.arguments
        k, k_local, k_index = given["k"], given.get("k_local"), given["k_index"]
        codes, ranges = given.get("codes"), given.get("ranges")
        keys, sinks, near_window = k.shape[2], given["sinks"], given["near_window"]
        near = min(keys, sinks + max(given["window"], near_window))
        ring = min(keys, sinks + given["window"])
        rows = k.shape[1] * near + (0 if k_local is None else k_local.shape[1] * ring)
        rows += sum(len(positions) for positions in self.far_positions())
        begin = sinks if codes is None else codes.shape[2]  # of far keys in 16 bits
        scanned = k_index.shape[1] * max(0, keys - near_window - begin) * k_index.shape[3]
        coded = sum(part.nbytes for part in (codes, ranges) if part is not None)
        return rows * 2 * k[0, 0, 0].nbytes + scanned * k_index.element_size() + coded


class Recorder(TorchDispatchMode):
    """Keeps every `sparse_decode` that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is SPARSE_DECODE:
            names = [argument.name for argument in func._schema.arguments]
            arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.calls.append(Call(arguments, selected=result[2], mass=result[4]))
        return result


@torch.no_grad()
def recorded(model: Any, tokens: list[int]) -> list[Call]:
    """The calls for the last token, one a layer with retrieval heads; the others are prefilled."""
    decoder, argument = families.decoder(model), cache_argument(model)
    ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
    cache = RTPurboCache(model)
    decoder(input_ids=ids[:, :-1], use_cache=True, **{argument: cache})
    with Recorder() as recorder:
        decoder(input_ids=ids[:, -1:], use_cache=True, **{argument: cache})
    return recorder.calls


def texts(kind: str, tokenizer: Any, keys: int, count: int) -> list[list[int]]:
    """Held-out prose; kind "needles" ends in a question about one of eight statements in it."""
    prose = data.prose(split="held_out")
    if kind == "prose":
        return data.excerpts(tokenizer, prose, keys, count)
    return [p.tokens for p in data.needle_prompts(tokenizer, prose, keys, count, needles=8)]


def selection_facts(calls: Sequence[Call]) -> dict[str, float]:
    """Far tokens a head, and the share of the mass that the index sees in what it attends to."""
    counts = [len(positions) for call in calls for positions in call.far_positions()]
    masses = torch.cat([call.mass.flatten() for call in calls])
    return {
        "selected": sum(counts) / len(counts),
        "selected_max": max(counts),
        "mass": masses.mean().item(),
        "mass_min": masses.min().item(),
    }
