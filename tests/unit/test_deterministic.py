"""``deterministic`` reaches the backend that computes the gradients, from every surface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn
from flash_attn import hopper_interface
from flash_attn.core import registry
from flash_attn.core.problem import AttentionProblem, AttentionResult, BackwardInputs
from flash_attn.flash_attn_interface import flash_attn_gpu

BOUNDS = torch.tensor([0, 5, 12], dtype=torch.int32)


class Listener:
    """Notes what the problems of backward passes ask for; the CPU backend computes."""

    name = "reference"

    def __init__(self) -> None:
        self.heard: list[bool] = []

    def unsupported(self, problem: AttentionProblem, backward: bool) -> list[str]:
        return []

    def forward(self, problem: AttentionProblem, out: Tensor | None = None) -> AttentionResult:
        return registry.load("cpu").forward(problem, out)

    def backward(self, problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
        self.heard.append(problem.deterministic)
        return registry.load("cpu").backward(problem, inputs)


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    made = Listener()
    monkeypatch.setitem(registry._loaded, "reference", made)
    with flash_attn.use_backend("reference"):
        yield made


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def dense() -> tuple[Tensor, ...]:
    return leaf(2, 6, 2, 16), leaf(2, 6, 2, 16), leaf(2, 6, 2, 16)


def packed() -> tuple[Any, ...]:
    return leaf(12, 2, 16), leaf(12, 2, 16), leaf(12, 2, 16), BOUNDS, BOUNDS, 7, 7


CALLS: dict[str, Callable[..., Any]] = {
    "dense": lambda **more: flash_attn.flash_attn_func(*dense(), **more),
    "dense with sinks": lambda **more: flash_attn.flash_attn_func(
        *dense(), s_aux=torch.zeros(2), **more
    ),
    "dense qkv": lambda **more: flash_attn.flash_attn_qkvpacked_func(leaf(2, 6, 3, 2, 16), **more),
    "dense kv": lambda **more: flash_attn.flash_attn_kvpacked_func(
        leaf(2, 6, 2, 16), leaf(2, 6, 2, 2, 16), **more
    ),
    "packed": lambda **more: flash_attn.flash_attn_varlen_func(*packed(), **more),
    "packed qkv": lambda **more: flash_attn.flash_attn_varlen_qkvpacked_func(
        leaf(12, 3, 2, 16), BOUNDS, 7, **more
    ),
    "packed kv": lambda **more: flash_attn.flash_attn_varlen_kvpacked_func(
        leaf(12, 2, 16), leaf(12, 2, 2, 16), BOUNDS, BOUNDS, 7, 7, **more
    ),
    "FA3 dense": lambda **more: hopper_interface.flash_attn_func(*dense(), **more),
    "FA3 qkv": lambda **more: hopper_interface.flash_attn_qkvpacked_func(
        leaf(2, 6, 3, 2, 16), **more
    ),
    "FA3 packed": lambda **more: hopper_interface.flash_attn_varlen_func(*packed(), **more),
}


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_functions(listener: Listener, name: str, wanted: bool) -> None:
    CALLS[name](deterministic=wanted).sum().backward()
    assert listener.heard == [wanted]


@pytest.mark.parametrize("name", CALLS)
def test_what_pytorch_is_told_counts_when_the_gradients_are_computed(
    listener: Listener, name: str
) -> None:
    out = CALLS[name]()
    torch.use_deterministic_algorithms(True)
    try:
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert listener.heard == [True]


@pytest.mark.parametrize("wanted", [False, True])
def test_operators(listener: Listener, wanted: bool) -> None:
    q, k, v = (x.detach() for x in dense())
    out, lse, _, state = torch.ops.flash_attn._flash_attn_forward(
        q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False
    )
    grads = [torch.empty_like(x) for x in (q, k, v)]
    torch.ops.flash_attn._flash_attn_backward(
        out, q, k, v, out, lse, *grads, 0.0, 0.25, False, -1, -1, 0.0, None, wanted, state
    )
    flash_attn_gpu.bwd(
        out, q, k, v, out, lse, *grads, None, 0.0, 0.25, False, -1, -1, 0.0, wanted, None, state
    )
    hopper_interface._flash_attn_backward(
        out, q, k, v, out, lse, dq=grads[0], dk=grads[1], dv=grads[2], softmax_scale=0.25,
        deterministic=wanted,
    )  # fmt: skip
    assert listener.heard == [wanted] * 3


def test_repeated_calls_are_told_apart(listener: Listener) -> None:
    q, k, v = dense()
    for wanted in (False, False, False, True, False):
        flash_attn.flash_attn_func(q, k, v, deterministic=wanted).sum().backward()
    assert listener.heard == [False, False, False, True, False]
