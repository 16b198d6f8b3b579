"""`python -m benchmarks [NAME ...]`: runs the benchmarks and writes one JSON file."""

import argparse
import importlib
import json
import pkgutil
import platform
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import benchmarks
from benchmarks.choice import Choice
from benchmarks.measure import measure
from benchmarks.registry import BENCHMARKS, Case
from rtpurbo.environment import hardware

RESULTS = Path(__file__).parent / "results"


def describe(name: str, result: dict[str, Any]) -> str:
    parameters = " ".join(
        f"{key}={value}" for key, value in result.items() if isinstance(value, int | str)
    )
    ratios = [
        f"{ratio:.2f}x {baseline}"
        + (f" (goal {result['goals'][baseline]:.2f})" if baseline in result["goals"] else "")
        for baseline, ratio in result["ratios"].items()
    ]
    notes = [f"no {baseline} ({note})" for baseline, note in result["notes"].items()]
    peak = result["peak_extra_bytes"]["ours"] / 2**20
    share = [f"{result['copy_share']:.0%} of a copy's rate"] if result["copy_share"] else []
    facts = [f"{fact} {value:.4g}" for fact, value in result["facts"].items()]
    taken = f"{result['seconds'] * 1e3:.4g} ms"
    if result["goal_seconds"] is not None:
        taken += f" (goal {result['goal_seconds'] * 1e3:.4g})"
    times = [taken, *ratios, *share, *notes]
    return f"{name} {parameters}: {', '.join([*times, f'+{peak:.0f} MiB', *facts])}"


def measured(name: str, choice: Choice, repeats: int) -> Iterator[dict[str, Any]]:
    """The rows of a benchmark, a list of cases at a time."""
    for cases in BENCHMARKS[name](choice.wants):
        group = [cases] if isinstance(cases, Case) else cases
        wanted = [choice.narrowed(case) for case in group if choice.wants(case.parameters)]
        if wanted:
            yield from measure(wanted, repeats)
        del cases, group, wanted  # their tensors make room for the next ones


def main() -> None:
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name != "__main__":
            importlib.import_module(f"benchmarks.{module.name}")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--where",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="only cases with these parameters; several values of one name allow each",
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="only against these; none: against nothing",
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/TIME.json")
    parser.add_argument("--plot", type=Path, help="also draw times over keys, .png or .svg")
    arguments = parser.parse_args()
    named = {n: [m for m in (n, f"{n}_cuda") if m in BENCHMARKS] for n in arguments.names}
    if unknown := [name for name, found in named.items() if not found]:
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )

    try:
        choice = Choice.parse(arguments.where, arguments.baselines)
    except ValueError as error:
        parser.error(str(error))

    torch.manual_seed(0)
    report: dict[str, Any] = {
        "hardware": hardware(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "results": {},
    }
    output = arguments.output or RESULTS / time.strftime("%Y%m%d-%H%M%S.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    met = {"none"}  # names of baselines
    for name in dict.fromkeys(chain(*named.values())) or BENCHMARKS:
        results = report["results"].setdefault(name, [])
        for result in measured(name, choice, arguments.repeats):
            results.append(result)
            met |= {*result["baseline_seconds"], *result["notes"]}
            print(describe(name, result), flush=True)
            # Each time, so that a run that is cut off leaves what it has.
            output.write_text(json.dumps(report, indent=2) + "\n")
    if not any(report["results"].values()):
        raise SystemExit(
            "benchmarks: no case was run; no parameters fit --where, or there is no GPU for them"
        )
    print(f"written to {output}")
    if unmet := choice.baselines - met:
        raise SystemExit(f"benchmarks: no case has the baseline {', '.join(sorted(unmet))}")
    if arguments.plot:
        from benchmarks.plot import plot  # matplotlib is an extra

        plot(report, arguments.plot)


if __name__ == "__main__":
    main()
