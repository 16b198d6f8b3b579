"""The command `rtpurbo bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import rtpurbo
from rtpurbo.commands.app import fail
from rtpurbo.commands.inputs import check_files


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks [default: all].")] = None,
    repeats: Annotated[int, typer.Option(help="Runs, of which the median counts.")] = 3,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Results, JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Times over keys, .png or .svg.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Only cases with these, NAME=VALUE; repeatable.")
    ] = None,
    baselines: Annotated[
        list[str] | None, typer.Option(help="Only against these, repeatable; none: nothing.")
    ] = None,
) -> None:
    """Run the operator benchmarks of a source checkout."""
    root = Path(rtpurbo.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        fail("the benchmarks come with a source checkout; clone the repository and `make bench`")
    check_files(output, picture=plot)
    command = [sys.executable, "-m", "benchmarks", *(names or []), "--repeats", str(repeats)]
    if output is not None:
        command += ["--output", str(output.resolve())]
    if plot is not None:
        command += ["--plot", str(plot.resolve())]
    if where:
        command += ["--where", *where]
    if baselines:
        command += ["--baselines", *baselines]
    raise typer.Exit(subprocess.run(command, cwd=root, check=False).returncode)
