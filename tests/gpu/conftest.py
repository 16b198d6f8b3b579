"""Tests that need a CUDA device; elsewhere they skip and say why."""

from collections.abc import Iterator

import pytest
import torch

import rtpurbo


@pytest.fixture(autouse=True)
def cuda_device():
    if not rtpurbo.build_info()["cuda"]:
        pytest.skip("rtpurbo was built without CUDA")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return torch.device("cuda")


@pytest.fixture
def memory_is_given_back() -> Iterator[None]:
    """To the other test files, which run beside this one."""
    yield
    torch.cuda.empty_cache()
