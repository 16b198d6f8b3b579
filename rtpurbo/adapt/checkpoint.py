"""Training checkpoints: safetensors and JSON in a folder that appears whole or not at all.

    checkpoint-00000100/
        parameters.safetensors   what is trained
        optimizer.safetensors    exp_avg.NAME, exp_avg_sq.NAME, step.NAME
        rng-00000.safetensors    the random state of each process
        state.json               format version, step, the run's identity, size and sha256 of
                                 every other file

A folder is written beside its place and renamed into it; two are kept.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rtpurbo.files import check_files, list_files, read_format, require, require_files, write_json

FORMAT_VERSION = 1
_FORMAT = "rtpurbo.training"
_KEYS = {"format", "version", "step", "identity", "extra", "files"}
_STATE = "state.json"
_KEPT = 2
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """What a run resumes from."""

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    extra: dict[str, Any]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None):
    """Writes a safetensors file atomically."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, scratch, metadata=metadata)
    _sync(scratch)
    scratch.replace(path)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The state of an optimizer whose parameters, in order, have these names."""
    flat = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            flat[f"{key}.{names[index]}"] = value
    return flat


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str], flat: dict[str, Tensor]
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    place = {name: index for index, name in enumerate(names)}
    for key, value in flat.items():
        field, name = key.split(".", 1)
        state.setdefault(place[name], {})[field] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


class CheckpointFolder:
    """The checkpoints of one run under `output_dir`.

    Args:
        identity: what must be the same for a run to go on: task, schedule, data, seed.
        rank, world: this process among those of the run. Every process writes its random state,
            the first one all else.
    """

    def __init__(self, output_dir: Path, identity: dict[str, Any], rank: int = 0, world: int = 1):
        self._output_dir = output_dir
        self._identity = {**identity, "processes": world}
        self._rank = rank
        self._world = world

    def begin(self, step: int) -> Path:
        """The scratch folder of a checkpoint; `add_rng` and `finish` fill it."""
        scratch = self._output_dir / f".{_PREFIX}{step:08d}"
        if self._rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        return scratch

    def add_rng(self, scratch: Path, state: dict[str, Tensor]) -> None:
        write_tensors(scratch / f"rng-{self._rank:05d}.safetensors", state)

    def finish(
        self,
        scratch: Path,
        step: int,
        parameters: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        extra: dict[str, Any],
    ) -> Path:
        """First process: writes the rest, puts the folder in place and drops the oldest."""
        write_tensors(scratch / "parameters.safetensors", parameters)
        write_tensors(scratch / "optimizer.safetensors", optimizer)
        content = {
            "format": _FORMAT,
            "version": FORMAT_VERSION,
            "step": step,
            "identity": self._identity,
            "extra": extra,
            "files": list_files(scratch, scratch.iterdir()),
        }
        write_json(scratch / _STATE, content)
        _sync(scratch / _STATE)
        place = self._output_dir / f"{_PREFIX}{step:08d}"
        shutil.rmtree(place, ignore_errors=True)
        scratch.rename(place)
        _sync(self._output_dir)
        for old in self._complete()[:-_KEPT]:
            shutil.rmtree(old)
        return place

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or None where there is none.

        Raises:
            ValueError: it is damaged, from a newer rtpurbo, or belongs to a different run.
        """
        complete = self._complete()
        if not complete:
            return None
        folder = complete[-1]
        where, remedy = "rtpurbo: checkpoint", f"delete {folder} to go on from the one before"
        if not (folder / _STATE).is_file():
            raise ValueError(f"{where}: the file {folder / _STATE} is missing; {remedy}")
        content = read_format(folder / _STATE, _FORMAT, FORMAT_VERSION, _KEYS)
        identity = require(content, "identity", dict, where)
        files = require_files(content, where)
        check_files(folder, files, where, remedy)
        _check_identity(folder, identity, json.loads(json.dumps(self._identity)))
        names = "parameters", "optimizer", f"rng-{self._rank:05d}"
        for name in names:
            if f"{name}.safetensors" not in files:
                raise ValueError(f"{where}: {folder / _STATE} lists no {name}; {remedy}")
        parameters, optimizer, rng = (load_file(folder / f"{name}.safetensors") for name in names)
        return Checkpoint(
            step=require(content, "step", int, where),
            parameters=parameters,
            optimizer=optimizer,
            rng=rng,
            extra=require(content, "extra", dict, where),
        )

    def _complete(self) -> list[Path]:
        return sorted(path for path in self._output_dir.glob(f"{_PREFIX}*") if path.is_dir())


def _check_identity(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    different = sorted(
        key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)
    )
    if different:
        if different == ["model"]:
            raise ValueError(
                f"rtpurbo: checkpoint {folder} was written from a model of other weights or "
                "settings; a run of all weights that was interrupted leaves its model changed, so "
                "load the original model again to go on, or choose another output_dir"
            )
        details = ", ".join(f"{key}: {found.get(key)} -> {expected.get(key)}" for key in different)
        raise ValueError(
            f"rtpurbo: checkpoint {folder} belongs to another run ({details}); "
            "choose another output_dir, or repeat the arguments of that run to go on"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
