"""What holds for every operator on CUDA: memory, offsets beyond 32 bits, devices of arguments."""

import math
import re

import pytest
import torch
from torch import Tensor

from tests.gpu.samples import tensor_core_samples
from tests.gpu.stores import same_bits
from tests.samples import Sample, samples

SMALL = [
    s for dtype in (torch.float32, torch.float16) for s in samples(dtype) if s.op != "index_kl"
]
SAMPLES = [*SMALL, *tensor_core_samples()]
SEVERAL = [sample for sample in SAMPLES if len(sample.tensors()) > 1]


def name_of(sample: Sample) -> str:
    dtype = next(iter(sample.tensors().values())).dtype
    return f"{sample}-{dtype}".replace("torch.", "")


each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=name_of)


def spread(tensor: Tensor, axis: int, distance: int) -> Tensor:
    """On the GPU, the places along `axis` that many elements apart. All take the same memory."""
    memory = torch.empty(11 << 30, dtype=torch.uint8, device="cuda").view(tensor.dtype)
    strides = list(tensor.contiguous().stride())
    strides[axis] = distance
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


def outputs_of_spread(sample: Sample, name: str, axis: int, distance: int) -> list[Tensor]:
    view = spread(sample.arguments[name], axis, distance)
    results = sample.outputs(sample.with_tensors(torch.Tensor.cuda) | {name: view})
    return [result.cpu() for result in results]


@each_sample
def test_outputs_do_not_depend_on_fresh_memory(sample, request):
    """Nor on that of workspaces."""

    def outputs() -> list[Tensor]:
        return [out.cpu() for out in sample.outputs(sample.with_tensors(torch.Tensor.cuda))]

    expected = outputs()
    request.getfixturevalue("poisoned_memory")
    assert torch.empty(99, device="cuda").isnan().all()
    assert (torch.empty(99, device="cuda", dtype=torch.uint8) == 255).all()
    for got, want in zip(outputs(), expected, strict=True):
        assert same_bits(got, want)


@pytest.mark.usefixtures("memory_is_given_back")
@each_sample
def test_offsets_beyond_two_billion_elements(sample):
    """The last quarter of an axis lies 2^31 elements behind its begin, and that changes nothing."""
    for name, tensor in sample.tensors().items():
        for axis, places in enumerate(tensor.shape[:-1]):
            if places == 1 or tensor.numel() == 0:
                continue
            least = 2**31 / math.ceil(0.75 * (places - 1)), tensor.numel()
            distances = (64 * math.ceil(distance / 64) for distance in least)
            got, want = (outputs_of_spread(sample, name, axis, d) for d in distances)
            for one, other in zip(got, want, strict=True):
                assert torch.equal(one, other), (name, axis)


@each_sample
def test_on_another_device_than_the_current_one(sample):
    """Nothing is copied between the two: that would let kernels of the one reach the other."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device on this machine")
    assert torch.cuda.current_device() == 0
    outputs = []
    for device in ("cuda:0", "cuda:1"):
        results = sample.outputs(sample.with_tensors(lambda t, device=device: t.to(device)))
        assert all(result.device == torch.device(device) for result in results)
        outputs.append([result.cpu() for result in results])
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("elsewhere", ["cpu", "cuda:1"])
@pytest.mark.parametrize("sample", SEVERAL, ids=name_of)
def test_arguments_on_two_devices_are_refused(sample, elsewhere):
    if elsewhere == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device on this machine")
    together = sample.with_tensors(torch.Tensor.cuda)
    for name in list(sample.tensors())[1:]:
        moved = {name: sample.arguments[name].to(elsewhere)}
        with pytest.raises(ValueError, match="must be on the device of") as raised:
            sample.outputs(together | moved)
        assert re.search(rf"rtpurbo::{sample.op}: .*\b{name}\b", str(raised.value)), name
