"""index_kl and its gradients over random odd shapes, and what it must not look at."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests import reference
from tests.properties import DTYPES, layers
from tests.reference.masks import visible

ALL_DTYPES = [torch.float64, *DTYPES]


@given(
    layer=layers(max_rows=1, max_keys=200, dtypes=ALL_DTYPES),
    shared=st.booleans(),
    index_dim=st.sampled_from([4, 8, 16]),
    rows=st.integers(1, 20),
    beyond_window=st.booleans(),
    shifted=st.booleans(),
)
def test_index_kl_equals_the_reference(layer, shared, index_dim, rows, beyond_window, shifted):
    generator = layer.generator()
    _, k, _ = layer.qkv()
    heads = list(layer.retrieval_heads)
    owners = sorted({head // layer.group for head in heads})
    index_map = [owners.index(head // layer.group) for head in heads] if shared else None
    keys = len(owners) if shared else len(heads)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(layer.dtype)

    arguments = layer.mask() | dict(
        q=draw(layer.batch, layer.heads, rows, layer.dim),
        k=k,
        q_index=draw(layer.batch, len(heads), rows, index_dim),
        k_index=draw(layer.batch, keys, layer.keys, index_dim),
        rows=torch.randint(0, layer.keys, (layer.batch, rows), generator=generator).sort().values,
        retrieval_heads=heads,
        index_map=index_map or list(range(len(heads))),
        offset=draw(len(heads)).to(torch.promote_types(layer.dtype, torch.float32))
        if shifted
        else None,
        beyond_window=beyond_window,
    )
    expected = reference.index_kl(**arguments)
    upstream = torch.rand(len(heads), generator=generator)
    names = ["q_index", "k_index", "offset"] if shifted else ["q_index", "k_index"]
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    kl, kl_rows, *_ = ops.index_kl(**arguments | leaves)
    gradients = torch.autograd.grad(kl, list(leaves.values()), upstream.to(kl.dtype))

    torch.testing.assert_close(kl.double(), expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kl_rows.double(), expected[1], atol=1e-5, rtol=1e-4)
    grad_q, grad_k, grad_offset = (grad.clone() for grad in expected[2:])
    grad_q *= upstream[:, None, None]
    grad_k *= upstream[:, None, None]
    whole = torch.zeros(layer.batch, keys, layer.keys, index_dim, dtype=torch.float64)
    whole.index_add_(1, torch.tensor(arguments["index_map"], dtype=torch.int64), grad_k)
    for got, want in zip(gradients, [grad_q, whole, grad_offset * upstream], strict=False):
        rounding = 4 * torch.finfo(got.dtype).eps
        largest = want.abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(
            got.double(), want, atol=rounding * largest + 1e-5, rtol=rounding + 1e-4
        )


@given(layer=layers(max_rows=1, max_keys=150), beyond_window=st.booleans())
def test_index_kl_reads_no_hidden_key(layer, beyond_window):
    generator = layer.generator()
    _, k, _ = layer.qkv()
    heads = list(range(layer.heads))
    last = layer.keys - 1 - layer.keys // 4
    positions = torch.tensor([last // 2, last]).expand(layer.batch, 2).contiguous()
    arguments = layer.mask() | dict(
        q=torch.randn(layer.batch, layer.heads, 2, layer.dim, generator=generator).to(k.dtype),
        k=k,
        q_index=torch.randn(layer.batch, layer.heads, 2, 8, generator=generator).to(k.dtype),
        k_index=torch.randn(layer.batch, layer.heads, layer.keys, 8, generator=generator),
        rows=positions,
        retrieval_heads=heads,
        index_map=heads,
        offset=torch.zeros(layer.heads),
        beyond_window=beyond_window,
    )
    arguments["k_index"] = arguments["k_index"].to(k.dtype)
    expected = ops.index_kl(**arguments)
    seen = visible(positions[:, -1:], layer.keys, arguments["start"])[:, 0]
    for b in range(layer.batch):
        k[b, :, ~seen[b]] = torch.nan
        arguments["k_index"][b, :, ~seen[b]] = torch.nan
    got = ops.index_kl(**arguments)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    hidden = ~seen[:, None, :, None].expand_as(got[3])
    assert (got[3][hidden] == 0).all()
