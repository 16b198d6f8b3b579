"""What holds for every operator: the reference, opcheck, torch.compile, views, memory, threads."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rtpurbo import ops
from tests import reference
from tests.samples import Sample, samples

SAMPLES = samples()
DIFFERENTIABLE = [sample for sample in SAMPLES if sample.differentiable]
DOUBLE = [s for s in samples(torch.float64) if s.differentiable and "dtype" not in s.arguments]
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)
each_differentiable = pytest.mark.parametrize("sample", DIFFERENTIABLE, ids=str)
TOLERANCE = {
    torch.float64: dict(atol=1e-12, rtol=1e-10),
    torch.float32: dict(atol=1e-5, rtol=1e-4),
    torch.bfloat16: dict(atol=2e-2, rtol=2e-2),
    torch.float16: dict(atol=2e-3, rtol=2e-3),
}


def cloned(sample: Sample) -> dict[str, Any]:
    return sample.with_tensors(torch.clone)


def require_grad(sample: Sample, arguments: dict[str, Any]) -> list[Tensor]:
    return [arguments[name].requires_grad_() for name in sample.differentiable]


def objective(outputs: tuple[Tensor, ...]) -> Tensor:
    """A scalar of every differentiable output, with another weight for each element."""
    terms = [out.double() for out in outputs if out.requires_grad]
    return sum((t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in terms)


def results(sample: Sample, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Outputs, and gradients of the arguments that have one."""
    leaves = [arguments[name].detach().requires_grad_() for name in sample.differentiable]
    outputs = sample.outputs(arguments | dict(zip(sample.differentiable, leaves, strict=True)))
    gradients = torch.autograd.grad(objective(outputs), leaves) if leaves else ()
    return *(out.detach() for out in outputs), *gradients


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)


def test_every_operator_has_samples_and_a_reference():
    assert {sample.op for sample in SAMPLES} == set(ops.__all__) == set(reference.__all__)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("number", range(len(SAMPLES)), ids=[str(s) for s in SAMPLES])
def test_equals_the_reference(number, dtype):
    sample = samples(dtype)[number]
    if sample.arguments.get("exact") is False:
        pytest.skip("the fast mode may select more")
    outputs = sample.outputs(cloned(sample))
    arguments = cloned(sample)
    result = getattr(reference, sample.op)(**arguments)
    results = () if result is None else result if isinstance(result, tuple) else (result,)
    expected = (*results, *(arguments[name] for name in sample.written))
    assert len(outputs) == len(expected)
    for got, want in zip(outputs, expected, strict=True):
        if not want.is_floating_point():
            assert torch.equal(got, want)
            continue
        accumulated = {torch.float32, torch.float64} - {dtype}
        tight = torch.float32 if got.dtype in accumulated else got.dtype
        torch.testing.assert_close(got.double(), want.double(), **TOLERANCE[tight])


@each_sample
def test_opcheck(sample):
    arguments = cloned(sample)
    require_grad(sample, arguments)
    torch.library.opcheck(getattr(torch.ops.rtpurbo, sample.op).default, (), arguments)


@each_sample
def test_fake_outputs_have_the_real_layout(sample):
    real = sample.outputs(cloned(sample))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = sample.outputs(sample.with_tensors(mode.from_tensor))
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@each_sample
def test_compiles_whole(sample):
    torch._dynamo.reset()
    compiled = torch.compile(sample.outputs, fullgraph=True, backend="aot_eager")
    assert_same(compiled(cloned(sample)), sample.outputs(cloned(sample)))


@each_differentiable
def test_compiles_with_its_gradient(sample):
    torch._dynamo.reset()
    compiled = torch.compile(sample.outputs, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (compiled, sample.outputs):
        arguments = cloned(sample)
        leaves = require_grad(sample, arguments)
        gradients.append(torch.autograd.grad(objective(function(arguments)), leaves))
    assert_same(*gradients)


@each_sample
def test_inputs_are_left_alone(sample):
    arguments = cloned(sample)
    sample.outputs(arguments)
    for name, before in sample.tensors().items():
        if name not in sample.written:
            torch.testing.assert_close(arguments[name], before, atol=0, rtol=0)


@each_sample
def test_outputs_do_not_depend_on_fresh_memory(sample, request):
    expected = results(sample, cloned(sample))
    request.getfixturevalue("poisoned_memory")
    assert_same(results(sample, cloned(sample)), expected)


@each_sample
def test_bits_do_not_depend_on_threads_or_runs(sample):
    expected = results(sample, cloned(sample))
    try:
        for run in range(20):
            torch.set_num_threads(1 + run % 3)
            assert_same(results(sample, cloned(sample)), expected)
    finally:
        torch.set_num_threads(1)


def surrounded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A strided view with the tensor's values, in memory that is a sentinel everywhere else.

    Four dimensions lie as [B, S, H, D], the others in order; the last one starts off alignment.
    """
    sentinel = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    swapped = tensor.dim() == 4
    value = tensor.transpose(1, 2) if swapped else tensor
    memory = tensor.new_full([size + 3 for size in value.shape], sentinel)
    view = memory[tuple(slice(1, 1 + size) for size in value.shape)]
    view.copy_(value)
    return (view.transpose(1, 2) if swapped else view), memory


@each_sample
def test_strided_views_among_sentinels(sample):
    expected = results(sample, cloned(sample))
    views = {name: surrounded(tensor) for name, tensor in sample.tensors().items()}
    arguments = sample.arguments | {name: view for name, (view, _) in views.items()}
    assert_same(results(sample, arguments), expected)
    for name, (view, memory) in views.items():
        if name in sample.written:
            view.copy_(sample.arguments[name])
        fresh = surrounded(sample.arguments[name])[1]
        torch.testing.assert_close(memory, fresh, atol=0, rtol=0, equal_nan=True)


@each_sample
def test_one_sequence_shared_by_the_batch(sample):
    """Batch stride 0, as expand() makes it."""
    shared = {
        name: tensor[:1].expand_as(tensor)
        for name, tensor in sample.tensors().items()
        if tensor.dim() == 4 and name not in sample.written
    }
    dense = {name: tensor.clone() for name, tensor in shared.items()}
    other = cloned(sample)
    assert_same(sample.outputs(other | shared), sample.outputs(cloned(sample) | dense))


@each_sample
def test_offsets_beyond_two_billion_elements(sample, tmp_path):
    """The second sequence lies 2^31 elements after the first, in a sparse file."""
    distance = 2**31 + 64
    memory = torch.from_file(
        str(tmp_path / "memory"), shared=True, size=distance + 2**17, dtype=torch.float32
    )
    arguments, offset = cloned(sample), 0
    for name, tensor in sample.tensors().items():
        if tensor.dim() == 4 and tensor.dtype == torch.float32:
            strides = distance, *arguments[name].stride()[1:]
            arguments[name] = memory.as_strided(tensor.shape, strides, offset).copy_(tensor)
            offset += tensor.numel()
    assert_same(results(sample, arguments), results(sample, cloned(sample)))


@each_differentiable
def test_gradient_of_a_plain_sum(sample):
    """sum() sends back one number with strides of 0."""
    gradients = []
    for weights in (torch.ones(()), None):
        arguments = cloned(sample)
        leaves = require_grad(sample, arguments)
        outputs = [out for out in sample.outputs(arguments) if out.requires_grad]
        upstream = [
            torch.ones_like(out) if weights is None else weights.to(out.dtype).expand_as(out)
            for out in outputs
        ]
        gradients.append(torch.autograd.grad(outputs, leaves, upstream))
    assert_same(*gradients)


@each_differentiable
def test_each_gradient_alone(sample):
    every = results(sample, cloned(sample))[-len(sample.differentiable) :]
    for name, expected in zip(sample.differentiable, every, strict=True):
        arguments = cloned(sample)
        leaf = arguments[name].requires_grad_()
        (gradient,) = torch.autograd.grad(objective(sample.outputs(arguments)), [leaf])
        torch.testing.assert_close(gradient, expected, atol=0, rtol=0)
        assert all(t.grad is None for t in arguments.values() if isinstance(t, Tensor))


@pytest.mark.parametrize("sample", DOUBLE, ids=str)
def test_gradcheck(sample):
    arguments = cloned(sample)
    leaves = require_grad(sample, arguments)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = sample.outputs(arguments | dict(zip(sample.differentiable, values, strict=True)))
        return tuple(out for out in outputs if out.requires_grad)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
