"""HeadMap: which query heads retrieve, and the file formats in which that is written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtpurbo.files import check_format, read_json, write_json, write_text

FORMAT_VERSION = 1
DEFAULT_SHARE = 0.15
_KNOWN_KEYS = {
    "format", "version", "model_id", "kv_heads", "share", "scores", "roles", "stability",
}  # fmt: skip
_RTP_LLM_SETTINGS = {"sink_token_num": 4, "swa_token_num": 8192, "seqlen_threshold": 16384}


@dataclass(frozen=True, eq=False)
class HeadMap:
    """Scores and roles of the query heads of one model.

    Attributes:
        scores: float32 [layers, query heads], the retrieval score R_h of every head, in [0, 1].
        roles: bool of the same shape, True for a retrieval head.
        share: share of all heads that retrieve.
        stability: how far documents and lengths agree (see `detect_heads`); empty if unknown.
        model_id: which model this is for (`rtpurbo.families.identity`); None fits any model.
        kv_heads: KV heads a layer, needed by formats that speak of KV heads; None if unknown.
    """

    scores: Tensor
    roles: Tensor
    share: float
    stability: dict[str, Any] = field(default_factory=dict)
    model_id: str | None = None
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        scores = torch.as_tensor(self.scores, dtype=torch.float32).cpu()
        roles = torch.as_tensor(self.roles).cpu()
        if scores.dim() != 2 or roles.shape != scores.shape or roles.dtype != torch.bool:
            raise ValueError(
                "rtpurbo.HeadMap: scores and roles must have one shape [layers, query heads] and "
                f"roles be bool, got {list(scores.shape)}, {list(roles.shape)} and {roles.dtype}"
            )
        if not torch.isfinite(scores).all():
            raise ValueError("rtpurbo.HeadMap: scores must be finite, got NaN or inf")
        if self.kv_heads is not None and (self.kv_heads < 1 or scores.shape[1] % self.kv_heads):
            raise ValueError(
                f"rtpurbo.HeadMap: kv_heads must divide the {scores.shape[1]} query heads, "
                f"got {self.kv_heads}"
            )
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "roles", roles)

    @classmethod
    def from_scores(
        cls,
        scores: Tensor,
        share: float | None = None,
        *,
        threshold: float | None = None,
        stability: dict[str, Any] | None = None,
        model_id: str | None = None,
        kv_heads: int | None = None,
    ) -> HeadMap:
        """Retrieval heads by their scores, all layers ranked together.

        Args:
            scores: [layers, query heads].
            share: the top `share` of all heads retrieve, ties to lower layers; default 0.15.
            threshold: instead of a share: every head with at least this score retrieves.
        """
        check_choice("rtpurbo.HeadMap", share, threshold)
        if threshold is not None:
            roles = scores >= threshold
            share = roles.float().mean().item()
        else:
            share = DEFAULT_SHARE if share is None else share
            order = scores.flatten().argsort(descending=True, stable=True)
            roles = torch.zeros(scores.numel(), dtype=torch.bool)
            roles[order[: round(share * scores.numel())].cpu()] = True
            roles = roles.view(scores.shape)
        return cls(scores, roles, share, stability or {}, model_id, kv_heads)

    @classmethod
    def from_roles(
        cls, roles: Any, *, model_id: str | None = None, kv_heads: int | None = None
    ) -> HeadMap:
        """A map made by hand: roles [layers, query heads], bool or 0 and 1 (retrieves)."""
        marked = _roles(roles)
        return cls(marked.float(), marked, marked.float().mean().item(), {}, model_id, kv_heads)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadMap) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.model_id, self.roles.numpy().tobytes()))

    def __repr__(self) -> str:
        layers, heads = self.roles.shape
        return f"HeadMap({int(self.roles.sum())} of {layers}x{heads} heads retrieve)"

    @property
    def threshold(self) -> float:
        """The lowest score of a retrieval head; inf if there is none."""
        return self.scores[self.roles].min().item() if self.roles.any() else float("inf")

    def retrieval_heads(self, layer: int) -> list[int]:
        """The retrieval heads of a layer, ascending."""
        return self.roles[layer].nonzero().flatten().tolist()

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws scores and roles (needs the extra `plots`); see `rtpurbo.plots.plot_heads`."""
        from rtpurbo.plots import plot_heads

        return plot_heads(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with its version."""
        return {
            "format": "rtpurbo.HeadMap",
            "version": FORMAT_VERSION,
            "model_id": self.model_id,
            "kv_heads": self.kv_heads,
            "share": self.share,
            "scores": self.scores.tolist(),
            "roles": self.roles.int().tolist(),
            "stability": self.stability,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HeadMap:
        """Reads `to_dict`'s form. Unknown keys warn, a newer version is refused."""
        check_format(data, "rtpurbo.HeadMap", FORMAT_VERSION, _KNOWN_KEYS)
        missing = {"scores", "roles", "share"} - data.keys()
        if missing:
            raise ValueError(f"rtpurbo.HeadMap: the keys {sorted(missing)} are missing")
        if isinstance(data["share"], bool) or not isinstance(data["share"], int | float):
            raise ValueError(f"rtpurbo.HeadMap: share must be a number, got {data['share']!r}")
        return cls(
            _rows(data, "scores").float(),
            _roles(_rows(data, "roles")),
            float(data["share"]),
            data.get("stability") or {},
            data.get("model_id"),
            data.get("kv_heads"),
        )

    def save(self, path: str | Path) -> None:
        """Writes the map as JSON, all or nothing."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> HeadMap:
        """Reads what `save` wrote."""
        return cls.from_dict(read_json(Path(path)))

    def to_headwise_config(self, **settings: int) -> dict[str, Any]:
        """rtp-llm's `headwise_config`: a list of 0/1 per layer index, 1 for a retrieval head.

        Args:
            settings: `sink_token_num`, `swa_token_num` and `seqlen_threshold`, where they differ
                from rtp-llm's 4, 8192 and 16384.
        """
        unknown = settings.keys() - _RTP_LLM_SETTINGS.keys()
        if unknown:
            raise TypeError(f"rtpurbo.HeadMap: unknown headwise settings {sorted(unknown)}")
        layers = {str(layer): row for layer, row in enumerate(self.roles.int().tolist())}
        return {**_RTP_LLM_SETTINGS, **settings, **layers}

    @classmethod
    def from_headwise_config(
        cls, config: dict[str, Any], *, layers: int | None = None, model_id: str | None = None
    ) -> HeadMap:
        """Reads rtp-llm's `headwise_config`; a layer that it leaves out retrieves in every head.

        Args:
            config: the dict itself, or a model's config.json with it inside.
            layers: number of layers, where trailing ones may be left out.
        """
        config = config.get("headwise_config", config)
        rows = {int(key): value for key, value in config.items() if str(key).isdigit()}
        if not rows:
            raise ValueError("rtpurbo.HeadMap: headwise_config holds no layer")
        for key, row in rows.items():
            if not isinstance(row, list) or not all(value in (0, 1) for value in row):
                raise ValueError(
                    f"rtpurbo.HeadMap: headwise_config[{str(key)!r}] must be a list of 0 and 1, "
                    f"got {row!r}"
                )
        widths = {len(row) for row in rows.values()}
        count = max(rows) + 1 if layers is None else layers
        if len(widths) != 1 or max(rows) >= count:
            raise ValueError(
                "rtpurbo.HeadMap: headwise_config must hold equally long rows for layers below "
                f"{count}, got lengths {sorted(widths)} and layer {max(rows)}"
            )
        full = [1] * widths.pop()
        return cls.from_roles([rows.get(i, full) for i in range(count)], model_id=model_id)

    def to_duo_attention(
        self,
        folder: str | Path,
        *,
        kv_heads: int | None = None,
        sink_size: int = 4,
        recent_size: int = 8192,
    ) -> None:
        """DuoAttention's head files: a row a layer, a column a KV head, 1 if any head retrieves.

        Args:
            folder: receives full_attention_heads.tsv and config.json.
            kv_heads: KV heads a layer, needed if the map does not know them.
        """
        kv_heads = kv_heads or self.kv_heads
        if kv_heads is None or self.roles.shape[1] % kv_heads:
            raise ValueError(
                f"rtpurbo.HeadMap: kv_heads must divide the {self.roles.shape[1]} query heads, "
                f"got {kv_heads}; pass kv_heads="
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        full = self.roles.view(self.roles.shape[0], kv_heads, -1).any(-1).float().tolist()
        rows = "\n".join("\t".join(f"{value:.6f}" for value in row) for row in full)
        write_text(folder / "full_attention_heads.tsv", rows + "\n")
        write_json(folder / "config.json", {"sink_size": sink_size, "recent_size": recent_size})

    @classmethod
    def from_duo_attention(
        cls,
        folder: str | Path,
        *,
        group: int = 1,
        threshold: float = 0.5,
        model_id: str | None = None,
    ) -> HeadMap:
        """Reads DuoAttention's head files.

        Args:
            group: query heads per KV head; all of a full KV head's query heads retrieve.
            threshold: from which gate value a KV head counts as full.
        """
        text = (Path(folder) / "full_attention_heads.tsv").read_text(encoding="utf-8")
        rows = [[float(value) for value in line.split("\t")] for line in text.splitlines() if line]
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"rtpurbo.HeadMap: {folder} must hold rows of one length")
        gates = torch.tensor(rows).clamp(0, 1).repeat_interleave(group, dim=1)
        roles = gates >= threshold
        return cls(gates, roles, roles.float().mean().item(), {}, model_id, len(rows[0]))


def check_choice(who: str, share: float | None, threshold: float | None) -> None:
    """ValueError unless at most one of the two is given, and lies in [0, 1]."""
    if share is not None and threshold is not None:
        raise ValueError(
            f"{who}: give share or threshold, not both, got share={share}, threshold={threshold}"
        )
    for name, value in (("share", share), ("threshold", threshold)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{who}: {name} must be in [0, 1], got {value}")


def _roles(roles: Any) -> Tensor:
    """Roles as bool; ValueError for anything but bool, or ints that are 0 or 1."""
    given = torch.as_tensor(roles)
    if given.is_floating_point() or not ((given == 0) | (given == 1)).all():
        raise ValueError(
            f"rtpurbo.HeadMap: roles must be bool, or ints that are 0 or 1, got {given.dtype} in "
            f"[{given.min().item():g}, {given.max().item():g}]; make them with scores >= threshold"
        )
    return given.bool()


def _rows(data: dict[str, Any], key: str) -> Tensor:
    try:
        return torch.tensor(data[key])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"rtpurbo.HeadMap: {key} must be one row of numbers a layer, all of one length: {error}"
        ) from error
