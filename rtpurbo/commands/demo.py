"""The command `rtpurbo demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtpurbo.commands.app import console
from rtpurbo.commands.options import SeedOption


def demo(
    model: Annotated[
        str | None, typer.Option(help="Your own model [default: SmolLM2-135M, 32K].")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A short run.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all files.")] = Path(
        "out/demo"
    ),
    cache: Annotated[
        Path | None, typer.Option(help="Where the download is kept [default: ~/.cache/rtpurbo].")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Run the whole method on a small real model, start to finish."""
    from rtpurbo.demo import FAST, FULL, run

    run(FAST if fast else FULL, model=model, output=output, cache=cache, seed=seed, console=console)
