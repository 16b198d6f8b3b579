"""Operators without a CUDA kernel say so, and what to do instead."""

import pytest
import torch

from rtpurbo import ops
from tests.samples import (
    index_kl_samples,
    index_project_samples,
)


def on_cuda(sample):
    return sample.with_tensors(torch.Tensor.cuda)


def test_index_kl():
    for sample in index_kl_samples(torch.float32):
        with pytest.raises(
            NotImplementedError, match="rtpurbo::index_kl: no CUDA kernel yet; train the index on"
        ):
            ops.index_kl(**on_cuda(sample))


def test_index_project_backward():
    arguments = on_cuda(index_project_samples(torch.float32)[0])
    arguments["w_q"].requires_grad_()
    q_index, _ = ops.index_project(**arguments)
    with pytest.raises(
        NotImplementedError,
        match="rtpurbo::index_project_backward: no CUDA kernel yet; train the index on the CPU",
    ):
        q_index.sum().backward()
