"""``deterministic`` reaches the backend that computes the gradients, from every surface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn
from flash_attn import hopper_interface
from flash_attn.core import registry, repeated
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


class Recorder(Listener):
    """A listener whose calls are repeated: a repeated backward pass notes what the one that was
    recorded asked for."""

    def repeats_now(self) -> bool:
        return True

    def record_forward(
        self, problem: AttentionProblem, tensors: Sequence[Tensor]
    ) -> tuple[AttentionResult, repeated.Solve]:
        def solve(
            tensors: Sequence[Tensor], asked: int = 2, addresses: list[int] | None = None
        ) -> tuple[Tensor, ...]:
            result = self.forward(problem._replace(**dict(zip("qkv", tensors, strict=False))))
            return (result.out, result.softmax_lse)[:asked]

        return self.forward(problem), solve

    def record_backward(
        self, problem: AttentionProblem, inputs: BackwardInputs, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, repeated.Solve]:
        def solve(
            tensors: Sequence[Tensor], asked: int = 1, addresses: list[int] | None = None
        ) -> tuple[Tensor, ...]:
            own = BackwardInputs(*tensors[-6:], rng_state=inputs.rng_state)
            asked_of = problem._replace(**dict(zip("qkv", tensors, strict=False)))
            self.repeats += 1
            return (self.backward(asked_of, own),)

        return self.backward(problem, inputs), solve

    def __init__(self) -> None:
        super().__init__()
        self.repeats = 0


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder()
    monkeypatch.setitem(registry._loaded, "reference", made)
    repeated.clear()
    with flash_attn.use_backend("reference"):
        yield made
    repeated.clear()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "dense with sinks"])
def test_repeated_calls_are_told_apart(recorder: Recorder, name: str, first: bool) -> None:
    asked = [first] * 5 + [not first] * 5 + [first, not first]
    for wanted in asked:
        out = CALLS[name](deterministic=wanted)
        out.backward(torch.ones_like(out))  # not an expanded number, which is another call
    assert recorder.heard == asked
    assert recorder.repeats >= 5


@pytest.mark.parametrize("name", [name for name in CALLS if name != "dense with sinks"])
def test_what_pytorch_is_told_counts_for_repeated_calls(recorder: Recorder, name: str) -> None:
    asked = [False] * 5 + [True] * 5 + [False, True]
    try:
        for wanted in asked:
            out = CALLS[name]()
            torch.use_deterministic_algorithms(wanted)
            out.backward(torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert recorder.heard == asked
    assert recorder.repeats >= 5
