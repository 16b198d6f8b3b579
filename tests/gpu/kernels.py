"""Which kernels a call launches."""

import os
from collections.abc import Callable

import pytest
import torch

PORTABLE = os.environ.get("RTPURBO_PORTABLE") == "1"  # asks for those that every device runs


def skip_unless_sm90() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only compute capability 9.0 has kernels of its own")


def kernels_of(step: Callable[[], object]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
