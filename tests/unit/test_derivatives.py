"""First derivatives in reverse mode, also by function transforms; others are refused, never 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import flash_attn
from flash_attn.errors import UnsupportedProblemError
from flash_attn.hopper_interface import _flash_attn_forward
from flash_attn.hopper_interface import flash_attn_func as hopper_func
from flash_attn.layers.rotary import (
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from flash_attn.modules.mha import MHA
from flash_attn.ops.activations import swiglu
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

MODULE = MHA(64, 4, causal=True, rotary_emb_dim=16, use_flash_attn=True)
BOUNDS = torch.tensor([0, 2, 5], dtype=torch.int32)
Q, KV, QKV = (2, 5, 4, 16), (2, 5, 2, 2, 16), (2, 5, 3, 4, 16)


def func(q: Tensor, **options: Any) -> Tensor:
    return flash_attn.flash_attn_func(q, q, q, causal=True, **options)


ATTENTION: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "dense": (func, [Q]),
    "alibi": (lambda q: func(q, alibi_slopes=torch.ones(4)), [Q]),
    "packed qkv": (lambda qkv: flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), [QKV]),
    "packed kv": (flash_attn.flash_attn_kvpacked_func, [Q, KV]),
    "varlen": (
        lambda q: flash_attn.flash_attn_varlen_func(q, q, q, BOUNDS, BOUNDS, 3, 3),
        [(5, 4, 16)],
    ),
    "sinks and mask": (
        lambda q, s, m: func(q, s_aux=s, attn_mask=m),
        [Q, (4,), (1, 1, 5, 5)],
    ),
    "FlashAttention-3": (lambda q: hopper_func(q, q, q), [Q]),
    "its log-sum-exp": (lambda q: hopper_func(q, q, q, return_attn_probs=True)[1], [Q]),
}
TABLES = torch.rand(5, 8), torch.rand(5, 8)
AROUND: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "cross entropy": (lambda x: cross_entropy_loss(x, torch.tensor([1, 0, 2]))[0], [(3, 4)]),
    "swiglu": (swiglu, [(3, 4), (3, 4)]),
    "rotary": (lambda x: apply_rotary_emb(x, *TABLES), [Q]),
    "rotary in place": (lambda x: apply_rotary_emb_qkv_(x * 1, *TABLES), [QKV]),
    "rotary of keys": (lambda x: apply_rotary_emb_kv_(x * 1, *TABLES), [KV]),
    "a module with rotary embedding": (lambda x: MODULE(x), [(2, 5, 64)]),
}
OTHERS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "FlashAttention-3, private": (lambda q: _flash_attn_forward(q, q, q)[0], [Q]),
    "cross entropy": AROUND["cross entropy"],
    "swiglu": AROUND["swiglu"],
}


def leaves(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("name", [*ATTENTION, *AROUND])
def test_function_transforms_give_the_gradients(name: str) -> None:
    function, shapes = (ATTENTION | AROUND)[name]

    def loss(*xs: Tensor) -> Tensor:
        return (function(*xs) ** 2).sum()

    given = leaves(shapes)
    loss(*given).backward()
    by_transform = torch.func.grad(loss, tuple(range(len(given))))(*(x.detach() for x in given))
    for x, grad in zip(given, by_transform, strict=True):
        assert x.grad is not None
        assert x.grad.any()
        assert torch.equal(grad, x.grad)


def test_vmap_is_a_loop_over_calls() -> None:
    q = torch.randn(3, *Q)
    found = torch.func.vmap(func)(q)
    assert torch.equal(found, torch.stack([func(x) for x in q]))


# With `linear`, the incoming gradient is a constant: what PyTorch's once_differentiable lets pass.
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("name", [*ATTENTION, *OTHERS])
def test_second_derivatives_are_refused(name: str, linear: bool) -> None:
    function, shapes = (ATTENTION | OTHERS)[name]
    given = leaves(shapes)
    out = function(*given)
    loss = out.sum() if linear else (out**2).sum()
    grads = torch.autograd.grad(loss, given, create_graph=True)
    penalty = sum((grad**2).sum() for grad in grads)
    with pytest.raises(UnsupportedProblemError, match="no second derivative.*create_graph"):
        (loss + penalty).backward(retain_graph=True)
    with pytest.raises(UnsupportedProblemError, match="no second derivative.*create_graph"):
        torch.autograd.grad(penalty, given, allow_unused=True)


def test_gradients_that_keep_their_graph_are_the_same() -> None:
    (q,) = leaves([Q])
    (plain,) = torch.autograd.grad(func(q).sum(), q)
    (kept,) = torch.autograd.grad(func(q).sum(), q, create_graph=True)
    assert torch.equal(plain, kept)
    assert not plain.requires_grad
    assert kept.requires_grad


@pytest.mark.parametrize("name", ATTENTION)
def test_tangents_are_refused(name: str) -> None:
    function, shapes = ATTENTION[name]
    given = [x.detach() for x in leaves(shapes)]
    function(*given)
    with pytest.raises(UnsupportedProblemError, match="no forward-mode derivative.*`q(kv)?`"):
        torch.func.jvp(function, tuple(given), tuple(given))
    with forward_ad.dual_level():
        expected = function(*given)
        duals = [forward_ad.make_dual(x, x) for x in given]
        with pytest.raises(UnsupportedProblemError, match="carries a tangent"):
            function(*duals)
    assert torch.equal(function(*given), expected)


def test_tangents_of_caches_and_masks_are_refused() -> None:
    q, cache = torch.randn(2, 1, 4, 16), torch.randn(2, 5, 4, 16)
    mask = torch.randn(1, 1, 1, 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(cache, cache)
        with pytest.raises(UnsupportedProblemError, match="`v_cache` carries a tangent"):
            flash_attn.flash_attn_with_kvcache(q, cache, dual)
        dual = forward_ad.make_dual(mask, mask)
        with pytest.raises(UnsupportedProblemError, match="`attn_mask` carries a tangent"):
            flash_attn.flash_attn_func(q, cache, cache, attn_mask=dual)


def test_slopes_get_no_gradient() -> None:
    """As documented, and as upstream: neither an error nor an output that depends on them."""
    slopes = torch.rand(4, requires_grad=True)
    q = torch.randn(Q)
    assert not flash_attn.flash_attn_func(q, q, q, alibi_slopes=slopes).requires_grad
    q.requires_grad_()
    flash_attn.flash_attn_func(q, q, q, alibi_slopes=slopes).sum().backward()
    assert q.grad is not None
    assert slopes.grad is None


COMPILED = {
    "one tensor as q, k and v": (lambda x: func(x), [Q]),
    "one tensor as k and v": (lambda q, k: flash_attn.flash_attn_func(q, k, k), [Q, Q]),
    "packed": ATTENTION["varlen"],
    "swiglu": AROUND["swiglu"],
    "rotary": AROUND["rotary"],
    "cross entropy": AROUND["cross entropy"],
    "a module with rotary embedding": AROUND["a module with rotary embedding"],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_gradients(name: str) -> None:
    """Also where PyTorch's compiler has gone wrong before."""
    function, shapes = COMPILED[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain, traced = leaves(shapes), leaves(shapes)
    (function(*plain) ** 2).sum().backward()
    (compiled(*traced) ** 2).sum().backward()
    for x, y in zip(plain, traced, strict=True):
        torch.testing.assert_close(y.grad, x.grad)
