"""The device that the command line runs on, checked before anything is loaded."""

from __future__ import annotations

import re

import torch


def checked_device(name: str) -> torch.device:
    """The device of an option `--device`.

    Raises:
        ValueError: it is neither cpu, cuda nor cuda:N, or not there.
    """
    found = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]*))?", name)
    if not found:
        raise ValueError(f"rtpurbo: --device must be cpu, cuda or cuda:N, got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(found[1] or 0) >= count:  # before torch.device, whose numbers wrap
        raise ValueError(
            f"rtpurbo: --device must be one of the {count} GPUs that torch sees here, got "
            f"{name!r}; see `rtpurbo info`, or leave it out to run on the CPU"
        )
    return torch.device(name)
