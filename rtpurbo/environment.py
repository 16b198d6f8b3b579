"""Where something ran: hardware and versions, for reports and `rtpurbo info`."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rtpurbo._C import build_info
from rtpurbo.ops._library import rtpurbo_ops

_PACKAGES = ("rtpurbo", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors")


def hardware() -> dict[str, Any]:
    """As reports of measurements tell it."""
    return {
        "cpu": _cpu_name(),
        "capability": rtpurbo_ops.cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def environment() -> dict[str, Any]:
    """Hardware, versions of the packages that matter (those installed) and the build.

    `cpu_capability` names the copy of the CPU kernels that runs: AVX512, AVX2 or DEFAULT.
    """
    machine = hardware()
    return {
        "cpu": machine["cpu"],
        "threads": machine["threads"],
        "cpu_capability": machine["capability"],
        "gpus": machine["gpus"],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "build": build_info(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
