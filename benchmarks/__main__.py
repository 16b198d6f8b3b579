"""`python -m benchmarks [NAME ...]`: runs the benchmarks and writes one JSON file."""

import argparse
import importlib
import json
import pkgutil
import time
from pathlib import Path
from typing import Any

import torch

import benchmarks
from benchmarks.measure import measure
from benchmarks.registry import BENCHMARKS
from rtpurbo.environment import environment

RESULTS = Path(__file__).parent / "results"


def describe(name: str, result: dict[str, Any]) -> str:
    parameters = " ".join(
        f"{key}={value}" for key, value in result.items() if isinstance(value, int | str)
    )
    ratios = ", ".join(
        f"{ratio:.2f}x {baseline}"
        + (f" (goal {result['goals'][baseline]:.2f})" if baseline in result["goals"] else "")
        for baseline, ratio in result["ratios"].items()
    )
    peak = result["peak_extra_bytes"]["ours"] / 2**20
    return f"{name} {parameters}: {result['seconds'] * 1e3:.4g} ms, {ratios}, +{peak:.0f} MiB"


def main() -> None:
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name != "__main__":
            importlib.import_module(f"benchmarks.{module.name}")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/TIME.json")
    parser.add_argument("--plot", type=Path, help="also draw times over keys, .png or .svg")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )

    torch.manual_seed(0)
    where = environment()
    report: dict[str, Any] = {
        "hardware": {
            "cpu": where["cpu"],
            "capability": where["cpu_capability"],
            "threads": where["threads"],
            "gpus": where["gpus"],
        },
        "versions": {"torch": torch.__version__, "python": where["python"]},
        "results": {},
    }
    for name in arguments.names or BENCHMARKS:
        results = report["results"].setdefault(name, [])
        for case in BENCHMARKS[name]():
            results.append(measure(case, arguments.repeats))
            print(describe(name, results[-1]), flush=True)
    output = arguments.output or RESULTS / time.strftime("%Y%m%d-%H%M%S.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {output}")
    if arguments.plot:
        from benchmarks.plot import plot  # matplotlib is an extra

        plot(report, arguments.plot)


if __name__ == "__main__":
    main()
