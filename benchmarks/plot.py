"""Times over the number of keys, a panel for each benchmark: `python -m benchmarks --plot FILE`."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def curves(results: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(keys, seconds) by line: cases that differ in nothing but their keys, and baselines."""
    lines: dict[str, dict[int, float]] = {}
    for result in results:
        if "keys" not in result:
            continue
        # What a benchmark varies besides; the same everywhere in a panel says nothing.
        names = [n for n in parameters(result) if n != "keys" and varies(results, n)]
        lines.setdefault(label(result, names) or "ours", {})[result["keys"]] = result["seconds"]
        for baseline, seconds in result["baseline_seconds"].items():
            case = label(result, telling_apart(results, baseline, names))
            line = f"{baseline}, {case}" if case else baseline
            lines.setdefault(line, {})[result["keys"]] = seconds
    return {name: sorted(points.items()) for name, points in lines.items() if len(points) > 1}


def parameters(result: dict[str, Any]) -> list[str]:
    """The names of a case's parameters, which stand before its seconds."""
    names = list(result)
    return names[: names.index("seconds")]


def label(result: dict[str, Any], names: list[str]) -> str:
    return " ".join(f"{name} {result[name]}" for name in names if name in result)


def telling_apart(results: list[dict[str, Any]], baseline: str, names: list[str]) -> list[str]:
    """Those of the parameters on which a baseline depends: cases may share its times."""
    kept = list(names)
    for name in names:
        others = [n for n in kept if n != name]
        times: dict[tuple[Any, ...], set[float]] = {}
        for result in results:
            if "keys" in result and baseline in result["baseline_seconds"]:
                place = result["keys"], *(result.get(n) for n in others)
                times.setdefault(place, set()).add(result["baseline_seconds"][baseline])
        if all(len(seconds) == 1 for seconds in times.values()):
            kept = others
    return kept


def varies(results: list[dict[str, Any]], name: str) -> bool:
    return len({str(result.get(name)) for result in results}) > 1


def plot(report: dict[str, Any], path: Path) -> Figure:
    """Draws every benchmark that has times at several numbers of keys, and writes the picture.

    Raises:
        ValueError: there is none.
    """
    drawn = {name: lines for name, r in report["results"].items() if (lines := curves(r))}
    if not drawn:
        raise ValueError(
            "benchmarks.plot: no benchmark was run at several numbers of keys, got "
            f"{', '.join(report['results']) or 'no results'}"
        )
    figure = Figure(figsize=(6.5 * len(drawn), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (name, lines) in zip(panels, drawn.items(), strict=True):
        for label, points in lines.items():
            keys, seconds = zip(*points, strict=True)
            baseline = any(label.startswith(b) for b in baselines(report["results"][name]))
            style = dict(linestyle="--", alpha=0.7) if baseline else dict(linewidth=2.2)
            axes.plot(keys, [s * 1e3 for s in seconds], marker="o", label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(name)
        axes.set_xlabel("keys")
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    hardware = report["hardware"]
    figure.suptitle(", ".join(hardware["gpus"] or [hardware["cpu"]]), fontsize=9)
    figure.savefig(path, dpi=150)
    return figure


def baselines(results: list[dict[str, Any]]) -> set[str]:
    return {name for result in results for name in result["baseline_seconds"]}
