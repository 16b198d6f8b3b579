"""The command `rtpurbo info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import rtpurbo
from rtpurbo.checkpoint import MANIFEST, read_manifest
from rtpurbo.commands.app import console, fail
from rtpurbo.commands.tables import figures_table
from rtpurbo.environment import environment
from rtpurbo.units import human_bytes


def info(
    model: Annotated[
        str | None, typer.Argument(help="A sparse model's folder or a head map to describe.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the build and the machine, or what a saved sparse model or head map holds."""
    facts = environment() if model is None else describe(Path(model))
    if as_json:
        typer.echo(json.dumps(facts, indent=1, default=str))
    else:
        console.print(figures_table(model or "rtpurbo", facts))


def describe(path: Path) -> dict[str, Any]:
    """What a head map or the folder of a sparse model holds."""
    if path.is_file():
        heads = rtpurbo.HeadMap.load(path)
        return {"heads": repr(heads), "model": heads.model_id, "stability": heads.stability}
    if not (path / MANIFEST).is_file():
        fail(f"{path} is neither a head map nor a folder that rtpurbo.save_pretrained wrote")
    manifest = read_manifest(path)
    config = rtpurbo.RTPurboConfig.from_dict(manifest["config"])
    settings = {k: v for k, v in config.to_dict().items() if k not in ("heads", "format")}
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    return {
        "heads": repr(config.heads),
        "model": manifest["base_model"]["identity"],
        "index trained": manifest["index"]["trained"],
        "size": human_bytes(size),
        **settings,
    }
