"""PyTorch's own attention on our operators, after it was told to use FlashAttention-3."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_interface as fa3

pytestmark = [
    pytest.mark.gpu,
    # That is what activating an implementation means.
    pytest.mark.filterwarnings(r"ignore:[\s\S]*[Oo]verriding a previously registered kernel"),
]


@pytest.fixture
def activated() -> Iterator[None]:
    if not hasattr(attention, "activate_flash_attention_impl"):
        pytest.skip("this PyTorch cannot be told which implementation to use")
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("PyTorch uses FlashAttention-3 on compute capability 9.0 alone")
    attention.activate_flash_attention_impl("FA3")
    yield
    attention.restore_flash_attention_impl()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def test_scaled_dot_product_attention(activated: None) -> None:
    """Bit by bit what our function gives, with strides like the query's."""
    q, k, v = randn(2, 4, 200, 64), randn(2, 4, 200, 64), randn(2, 4, 200, 64)
    dout = torch.randn_like(q)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    want = fa3.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, num_splits=0)
    true = torch.autograd.grad(want, (q, k, v), dout.transpose(1, 2))
    assert out.stride() == q.stride()
    assert torch.equal(out.transpose(1, 2), want)
    for x, y in zip(grads, true, strict=True):
        torch.testing.assert_close(x, y)


def test_compiled_scaled_dot_product_attention(activated: None) -> None:
    q, k, v = randn(2, 4, 200, 64), randn(2, 4, 200, 64), randn(2, 4, 200, 64)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        want = attend(q, k, v)
        out = torch.compile(attend, fullgraph=True)(q, k, v)
        assert torch.equal(out, want)
        out.sum().backward()
    assert bool(q.grad.isfinite().all())


def test_varlen_attn(activated: None) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    q, k, v = randn(90, 4, 64), randn(90, 4, 64), randn(90, 4, 64)
    bounds = torch.tensor([0, 30, 30, 90], device="cuda", dtype=torch.int32)
    out = varlen.varlen_attn(q, k, v, bounds, bounds, 60, 60, window_size=(-1, 0))
    want = fa3.flash_attn_varlen_func(q, k, v, bounds, bounds, 60, 60, causal=True)
    torch.testing.assert_close(out, want)
    dout = torch.randn_like(out)
    for x, y in zip(
        torch.autograd.grad(out, (q, k, v), dout),
        torch.autograd.grad(want, (q, k, v), dout),
        strict=True,
    ):
        torch.testing.assert_close(x, y)
