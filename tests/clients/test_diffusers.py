"""Hugging Face Diffusers: its attention backends that call FlashAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clients import DEVICE, as_if_there_were_a_gpu, error

pytest.importorskip("diffusers", reason="make test-clients installs it")
pytestmark = pytest.mark.filterwarnings("ignore")
# (name, with a mask): masks go to the varlen backends alone, and the operator that Diffusers
# registers for the last of the backends is for GPUs.
BACKENDS = [
    ("flash", False),
    ("flash_varlen", False),
    ("flash_varlen", True),
    ("_flash_varlen_3", False),
    ("_flash_varlen_3", True),
    *([("_flash_3", False)] if DEVICE == "cuda" else []),
]


@pytest.fixture(scope="module")
def dispatch() -> Any:
    with as_if_there_were_a_gpu():
        from diffusers.models import attention_dispatch
    assert attention_dispatch._CAN_USE_FLASH_ATTN
    assert attention_dispatch._CAN_USE_FLASH_ATTN_3
    return attention_dispatch


@pytest.mark.parametrize(("backend", "masked"), BACKENDS)
def test_backend(dispatch, backend, masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 4, 64, device=DEVICE, dtype=torch.bfloat16).unbind()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = None
    if masked:
        mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
        mask[0, 25:] = False
    with dispatch.attention_backend(backend):
        out = dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in exact),
        attn_mask=None if mask is None else mask[:, None, None],
    ).transpose(1, 2)
    assert error(out, expected) < 4e-3
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    for grad, want in zip(grads, wanted, strict=True):
        assert error(grad, want) < 1e-2
