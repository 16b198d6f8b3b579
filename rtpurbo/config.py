"""RTPurboConfig: everything that decides how a model runs sparse."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from rtpurbo.files import check_format
from rtpurbo.heads import HeadMap

FORMAT_VERSION = 1
_CHOICES: dict[str, tuple[Any, ...]] = {
    "index": ("beyond_window", "full"),
    "block_size": (1, 16, 32, 64),
    "prefill": ("dense", "sparse"),
    "share_index_keys": (False, True),
    "index_bits": (16, 8, 4),
    "refine": (False, True),
    "exact_sets": (False, True),
}
_AT_LEAST = {"window": 1, "sinks": 0, "index_dim": 1, "min_tokens": 0, "recent": 1}


@dataclass(frozen=True)
class RTPurboConfig:
    """How a model runs sparse. Validated on construction.

    Attributes:
        heads: which query heads retrieve.
        window: a local head sees this many latest keys, the query's own included.
        sinks: first keys of a sequence that every head sees.
        index_dim: dimensions r of an index query and an index key. CUDA selects quickly with 16;
            with others sparse prefill of 16-bit models reads every key there, unless `select_from`
            is given.
        index: "beyond_window" (near keys count with their true logits and only keys outside the
            window are indexed) or "full" (the paper's: every key is indexed).
        top_p: share of the softmax mass that a selection must reach, in (0, 1].
        min_tokens: so many indexed tokens are selected whatever their mass.
        recent: latest keys that "full" always selects; "beyond_window" uses `window`.
        block_size: tokens that are selected together in decode; sparse prefill always selects
            blocks of 64.
        prefill: "dense" (retrieval heads see every key) or "sparse" (blocks chosen by the index).
            Each pass cuts its own rows into tiles of 128, which select together. A prompt in chunks
            selects what it selects in one pass only where every chunk but the last is a multiple of
            128 rows, the last has more than one (a row alone decodes), index_bits is 16 (later
            chunks read codes of earlier keys) and `select_from` decides alike for all passes.
        share_index_keys: one index key per KV head instead of one per retrieval head.
        index_bits: bits of an index-key dimension, once its token is outside the window: 16, or 8
            or 4 with a minimum and a step for each block of 64 tokens. A key of r = 16 then weighs
            32, 17 or 9 bytes.
        select_from: keys outside window and sinks from which a decode step, and a pass of sparse
            prefill, selects; the retrieval heads read all of fewer. None: 1 on a CPU; on CUDA from
            where that is quicker by `rtpurbo.short_inputs`, so that more of a short context is
            read. Then the size of a pass counts: a prompt in many short chunks may read more keys
            than in one pass.
        refine: with index_bits 8 or 4 and block_size 1: decode takes twice the tokens that the
            codes select, scores them again with 16-bit index keys, and selects among them. Those
            keys are kept for all tokens then, so that an index key of r = 16 weighs 49 or 41 bytes,
            and a step on a GPU takes three launches, longer than with index_bits 16.
        exact_sets: a decode step on CUDA selects the smallest sets that reach top_p, as on a CPU or
            with refine it does anyway. Without, tokens join whose weights lie within 2.2 % of the
            last one's, at most 32 more than a quarter of the others: a step then takes up to a
            sixth less time.
    """

    heads: HeadMap
    window: int = 8192
    sinks: int = 4
    index_dim: int = 16
    index: Literal["beyond_window", "full"] = "beyond_window"
    top_p: float = 0.9
    min_tokens: int = 64
    recent: int = 64
    block_size: int = 1
    prefill: Literal["dense", "sparse"] = "dense"
    share_index_keys: bool = False
    index_bits: int = 16
    select_from: int | None = None
    refine: bool = False
    exact_sets: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.heads, HeadMap):
            raise TypeError(
                f"rtpurbo.RTPurboConfig: heads must be a HeadMap, got {type(self.heads).__name__}; "
                "make one with rtpurbo.detect_heads or HeadMap.from_roles"
            )
        for name, lowest in _AT_LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise ValueError(
                    f"rtpurbo.RTPurboConfig: {name} must be an int >= {lowest}, got {value!r}"
                )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices or type(value) is not type(choices[0]):
                raise ValueError(
                    f"rtpurbo.RTPurboConfig: {name} must be one of {choices}, got {value!r}"
                )
        if self.refine and self.index_bits == 16:
            raise ValueError(
                "rtpurbo.RTPurboConfig: refine must be False with index_bits=16, got True; choose "
                "index_bits=8 or 4, keys of 16 bits have nothing to refine"
            )
        if self.refine and self.block_size != 1:
            raise ValueError(
                "rtpurbo.RTPurboConfig: block_size must be 1 with refine=True, which scores single "
                f"keys again, got {self.block_size}"
            )
        if self.select_from is not None and (
            type(self.select_from) is not int or self.select_from < 0
        ):
            raise ValueError(
                "rtpurbo.RTPurboConfig: select_from must be None or an int >= 0, "
                f"got {self.select_from!r}"
            )
        if not isinstance(self.top_p, float | int) or not 0 < self.top_p <= 1:
            raise ValueError(f"rtpurbo.RTPurboConfig: top_p must be in (0, 1], got {self.top_p!r}")

    @property
    def near_window(self) -> int:
        """Latest keys that a retrieval head always attends: `window` or, in form full, `recent`."""
        return self.window if self.index == "beyond_window" else self.recent

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with its version and the head map inside."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["heads"] = self.heads.to_dict()
        return {"format": "rtpurbo.RTPurboConfig", "version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RTPurboConfig:
        """Reads `to_dict`'s form. Unknown keys warn, a newer version is refused."""
        names = {f.name for f in fields(cls)}
        check_format(data, "rtpurbo.RTPurboConfig", FORMAT_VERSION, names | {"format", "version"})
        if "heads" not in data:
            raise ValueError("rtpurbo.RTPurboConfig: the key 'heads' is missing")
        values = {name: data[name] for name in names & data.keys()}
        return cls(**{**values, "heads": HeadMap.from_dict(values["heads"])})
