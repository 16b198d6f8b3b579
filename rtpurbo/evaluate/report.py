"""EvalReport: what an evaluation measured, as a table, JSON and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rtpurbo.files import check_format, read_json, write_json
from rtpurbo.units import human_bytes

FORMAT_VERSION = 1
_FORMAT = "rtpurbo.EvalReport"


@dataclass(frozen=True)
class EvalRow:
    """One task at one length in one mode.

    Attributes:
        task, length, mode: e.g. "niah", 4096 tokens, "sparse".
        score: share of exact matches, or the mean KL or NLL a token in nats.
        samples: prompts or texts behind the score.
        by_seed: the score of each seed, in the order of the seeds.
        window: of the local heads; None for dense.
        attended_tokens: keys that a query head reads in a decode step, on average.
        attended_fraction: the same as a share of the visible keys; 1 for dense.
        kv_bytes, index_bytes, dense_bytes: cache of a sequence at its end: keys and values, index
            keys, and what full attention stores.
        seconds: spent on it.

    The attended figures and the bytes are None for tasks that do not decode.
    """

    task: str
    length: int
    mode: str
    score: float
    samples: int
    by_seed: list[float]
    window: int | None = None
    attended_tokens: float | None = None
    attended_fraction: float | None = None
    kv_bytes: int | None = None
    index_bytes: int | None = None
    dense_bytes: int | None = None
    seconds: float = 0.0

    @property
    def is_share(self) -> bool:
        """Whether the score is a share of prompts, higher being better."""
        return not self.task.endswith(("kl", "nll"))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % Wilson interval of a share; None for a mean."""
        if not self.is_share or not self.samples:
            return None
        z, n, p = 1.96, self.samples, self.score
        centre = p + z * z / (2 * n)
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

    @property
    def cache_fraction(self) -> float | None:
        """Bytes of keys, values and index keys as a share of dense."""
        if self.kv_bytes is None or not self.dense_bytes:
            return None
        return (self.kv_bytes + (self.index_bytes or 0)) / self.dense_bytes


_HEADINGS = (
    "task", "length", "mode", "window", "score", "95 %", "samples",
    "attended", "of dense", "cache", "of dense", "s",
)  # fmt: skip
_NARROW = (0, 1, 2, 3, 4, 5, 8, 10)
_SHORT = {8: "attended", 10: "cache"}


@dataclass(frozen=True)
class EvalReport:
    """All rows of an evaluation.

    Attributes:
        rows: one for each task, length and mode.
        model_id: of the model (`rtpurbo.families.identity`).
        settings: config, seeds, versions, hardware and everything else needed to run it again.
    """

    rows: list[EvalRow]
    model_id: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def row(self, task: str, length: int, mode: str) -> EvalRow:
        """The one row of a task, a length and a mode."""
        for row in self.rows:
            if (row.task, row.length, row.mode) == (task, length, mode):
                return row
        raise KeyError(f"rtpurbo.EvalReport: no row {task!r}, {length}, {mode!r}")

    @property
    def scores(self) -> dict[str, dict[int, dict[str, float]]]:
        """Scores by task, length and mode."""
        table: dict[str, dict[int, dict[str, float]]] = {}
        for row in self.rows:
            table.setdefault(row.task, {}).setdefault(row.length, {})[row.mode] = row.score
        return table

    def cells(self) -> list[list[str]]:
        """The table's rows as text, under the headings of `to_markdown`."""
        return [_cells(row) for row in self.rows]

    def to_markdown(self) -> str:
        """A Markdown table."""
        return markdown(_HEADINGS, self.cells())

    def table(self, width: int | None = None) -> Any:
        """A rich table (needs the extra `demo`).

        Args:
            width: columns of the terminal; where they do not hold everything, attended keys and
                cache are there as shares of dense only, and samples and seconds are left out.
        """
        from rich import box
        from rich.table import Table

        headings, cells = list(_HEADINGS), self.cells()
        table = Table(title="Evaluation")
        if width is not None and _width(headings, cells) > width:
            caption = "attended keys and cache bytes are shares of dense"
            look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
            table = Table(title="Evaluation", caption=caption, **look)
            headings = [_SHORT.get(i, headings[i]) for i in _NARROW]
            cells = [[row[i] for i in _NARROW] for row in cells]
        for heading in headings:
            left = heading in ("task", "mode")
            table.add_column(heading, justify="left" if left else "right", no_wrap=True)
        for row in cells:
            table.add_row(*row)
        return table

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws scores and attended share over lengths; see `rtpurbo.plots.plot_lengths`."""
        from rtpurbo.plots import plot_lengths

        return plot_lengths(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with its version."""
        return {
            "format": _FORMAT,
            "version": FORMAT_VERSION,
            "model_id": self.model_id,
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EvalReport:
        """Reads `to_dict`'s form. Unknown keys warn, a newer version is refused."""
        known = {"format", "version", "model_id", "settings", "rows"}
        check_format(data, _FORMAT, FORMAT_VERSION, known)
        names = {f.name for f in fields(EvalRow)}
        rows = [EvalRow(**{k: v for k, v in row.items() if k in names}) for row in data["rows"]]
        return cls(rows, data.get("model_id"), data.get("settings") or {})

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, all or nothing."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> EvalReport:
        """Reads what `save` wrote."""
        return cls.from_dict(read_json(Path(path)))

    def __str__(self) -> str:
        return self.to_markdown()


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of text cells."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _width(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Columns that a rich table with these cells takes."""
    columns = zip(headings, *rows, strict=True)
    return 1 + sum(3 + max(map(len, column)) for column in columns)


def _cells(row: EvalRow) -> list[str]:
    interval = row.interval
    share = row.cache_fraction
    return [
        row.task,
        f"{row.length:,}",
        row.mode,
        "–" if row.window is None else f"{row.window:,}",
        f"{row.score:.3f}" if row.is_share else f"{row.score:.4f}",
        "–" if interval is None else f"{interval[0]:.2f}–{interval[1]:.2f}",
        str(row.samples),
        "–" if row.attended_tokens is None else f"{row.attended_tokens:,.0f}",
        "–" if row.attended_fraction is None else f"{row.attended_fraction:.3f}",
        "–" if row.kv_bytes is None else human_bytes(row.kv_bytes + (row.index_bytes or 0)),
        "–" if share is None else f"{share:.3f}",
        f"{row.seconds:.0f}",
    ]
