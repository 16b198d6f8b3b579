"""Tests that need a CUDA device; elsewhere they skip and say why."""

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
