"""Pictures: head maps, training curves, scores over lengths. Needs the extra `plots`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtpurbo.evaluate import EvalReport
    from rtpurbo.heads import HeadMap

_DPI = 150


def check_picture(path: str | Path) -> None:
    """Refuses a path that no picture can be drawn to, before what it shows is computed."""
    figure, _ = _figure((1.0, 1.0))
    kinds = sorted(figure.canvas.get_supported_filetypes())
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in kinds:
        raise ValueError(
            f"rtpurbo.plots: path must end in one of {', '.join(kinds)}, got {str(path)!r}"
        )


def plot_heads(heads: HeadMap, path: str | Path | None = None) -> Any:
    """Heat map of the retrieval scores, layers down and query heads across, roles outlined.

    Args:
        path: also writes the picture there; the suffix says the format (.png, .svg, .pdf).

    Returns:
        A matplotlib Figure. It belongs to no window, so nothing needs to be closed.
    """
    layers, width = heads.scores.shape
    size = (min(16.0, 3.0 + 0.3 * width), min(16.0, 2.0 + 0.2 * layers))
    figure, (axes,) = _figure(size)
    image = axes.imshow(heads.scores.numpy(), cmap="magma", vmin=0, aspect="auto")
    for layer, head in heads.roles.nonzero().tolist():
        axes.add_patch(_outline(head, layer))
    title = heads.model_id.split("/")[0] if heads.model_id else "head map"
    axes.set_title(f"{title}: {int(heads.roles.sum())} of {heads.roles.numel()} heads retrieve")
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="retrieval score $R_h$ (outlined: retrieval head)")
    return _finish(figure, path)


def plot_training(source: Any, path: str | Path | None = None) -> Any:
    """Loss over steps, each step's and its running mean.

    Args:
        source: a TrainResult, a list of losses, a metrics.jsonl or the folder that holds one.
        path: also writes the picture there.
    """
    steps, losses, label = _curve(source)
    if not losses:
        raise ValueError("rtpurbo.plots: there is no training step to draw")
    figure, (axes,) = _figure((7.0, 4.0))
    axes.plot(steps, losses, linewidth=0.8, alpha=0.4, label="each step")
    axes.plot(steps, _running_mean(losses), linewidth=1.8, label="running mean")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
    return _finish(figure, path)


def plot_lengths(report: EvalReport, path: str | Path | None = None) -> Any:
    """Scores of each task over lengths, a line a mode, and the share of keys attended.

    Args:
        report: of `rtpurbo.evaluate`.
        path: also writes the picture there.
    """
    tasks = list(report.scores)
    if not tasks:
        raise ValueError("rtpurbo.plots: the report has no rows")
    measured = [row for row in report.rows if row.attended_fraction is not None]
    columns = len(tasks) + bool(measured)
    figure, axes = _figure((4.0 * columns, 3.6), columns)
    for place, task in zip(axes, tasks, strict=False):
        rows = [row for row in report.rows if row.task == task]
        _lines(place, rows, "score")
        place.set_title(task)
        place.set_ylabel("exact match" if rows[0].is_share else "nats a token")
        if rows[0].is_share:
            place.set_ylim(-0.03, 1.03)
        place.legend()
    if measured:
        first = [row for row in measured if row.task == measured[0].task]
        _lines(axes[-1], first, "attended_fraction")
        axes[-1].set_title("decode")
        axes[-1].set_ylabel("attended share of keys")
        axes[-1].set_ylim(0, 1.03)
    return _finish(figure, path)


def _lines(axes: Any, rows: list[Any], value: str) -> None:
    for mode in dict.fromkeys(row.mode for row in rows):
        points = sorted((row.length, getattr(row, value)) for row in rows if row.mode == mode)
        axes.plot(*zip(*points, strict=True), marker="o", label=mode)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_thousands)
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3)


def _thousands(length: float, _: int) -> str:
    return f"{length / 1024:g}K"


def _curve(source: Any) -> tuple[list[int], list[float], str]:
    """Steps, losses and the loss's name."""
    if isinstance(source, str | Path):
        file = Path(source)
        file = file / "metrics.jsonl" if file.is_dir() else file
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [line["step"] for line in lines], [line["loss"] for line in lines], "loss"
    losses = list(getattr(source, "losses", source))
    last = getattr(source, "steps", len(losses))
    return list(range(last - len(losses) + 1, last + 1)), losses, "loss"


def _running_mean(values: list[float]) -> list[float]:
    """Exponential mean over about a tenth of the run."""
    weight = 1 / max(1.0, len(values) / 10)
    mean, means = values[0], []
    for value in values:
        mean += weight * (value - mean)
        means.append(mean)
    return means


def _figure(size: tuple[float, float], columns: int = 1) -> tuple[Any, Any]:
    """A figure of no window, and its axes side by side."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "rtpurbo.plots: drawing needs matplotlib; install it with: pip install 'rtpurbo[plots]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _outline(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="tab:cyan", linewidth=1.4
    )


def _finish(figure: Any, path: str | Path | None) -> Any:
    if path is not None:
        target = Path(path)
        scratch = target.with_name(f".{target.name}.part{target.suffix}")
        figure.savefig(scratch, dpi=_DPI)
        scratch.replace(target)
    return figure
