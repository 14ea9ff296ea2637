"""Eager calls may go past the dispatcher, but whoever watches operators sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_varlen_func
from flash_attn.core import eager, ops
from flash_attn.errors import ConstraintError

FORWARD, BACKWARD = "flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_backward"


def qkv(**options: object) -> list[Tensor]:
    return [torch.randn(2, 5, 2, 16, **options) for _ in "qkv"]


class Watcher(TorchDispatchMode):
    """Notes the names of the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class FunctionWatcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operators(monkeypatch) -> list[str]:
    """The names of the operators as they are called by the package."""
    called: list[str] = []

    def noted(name: str) -> Callable[..., object]:
        operator = getattr(ops, name)

        def call(*arguments: object) -> object:
            called.append(name)
            return operator(*arguments)

        return call

    for name in ("forward", "varlen_forward", "backward", "varlen_backward"):
        monkeypatch.setattr(ops, name, noted(name))
    return called


def test_nobody_watches_here():
    assert eager.nobody_watches()
    assert eager.is_unobserved(*qkv(), None)


def test_plain_calls_go_past_the_dispatcher(operators):
    q, k, v = qkv(requires_grad=True)
    flash_attn_func(q, k, v, causal=True).sum().backward()
    with torch.no_grad():
        flash_attn_func(q, k, v, dropout_p=0.1)
        flash_attn_kvpacked_func(q, torch.stack([k, v], 2))
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    packed = [x[0].detach().requires_grad_() for x in (q, k, v)]
    flash_attn_varlen_func(*packed, cu, cu, 3, 3).sum().backward()
    assert operators == []


def test_where_watchers_cannot_be_told_every_call_goes_through(operators, monkeypatch):
    assert eager.CAN_TELL
    monkeypatch.setattr(eager, "CAN_TELL", False)
    for _ in range(3):
        flash_attn_func(*qkv())
    assert operators == ["forward"] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"dropout_p": torch.tensor(0.0)},
        {"softmax_scale": torch.tensor(0.3)},
        {"softcap": torch.tensor(2.0)},
        {"softcap": True},
    ],
)
def test_what_needs_an_operators_care_goes_through_it(operators, options):
    q, k, v = qkv()
    for _ in range(3):
        flash_attn_func(q, k, v, **options)
    assert operators == ["forward"] * 3


def test_the_operator_converts_and_refuses_as_ever():
    q, k, v = qkv()
    for _ in range(3):
        with pytest.raises((RuntimeError, TypeError)):
            flash_attn_func(q, k, v, causal="yes")


def by_mode(mode: TorchDispatchMode | TorchFunctionMode) -> Callable[[], str]:
    def run() -> str:
        q, k, v = qkv(requires_grad=True)
        with mode:
            flash_attn_func(q, k, v).sum().backward()
        return " ".join(mode.seen)

    return run


def by_flop_counter() -> str:
    q, k, v = qkv(requires_grad=True)
    seen: list[str] = []

    def count(name: str) -> Callable[..., int]:
        def formula(*shapes: object, **_: object) -> int:
            seen.append(f"flash_attn::{name}")
            return 1

        return formula

    names = ("_flash_attn_forward", "_flash_attn_backward")
    mapping = {getattr(torch.ops.flash_attn, name): count(name) for name in names}
    with FlopCounterMode(display=False, custom_mapping=mapping):
        flash_attn_func(q, k, v).sum().backward()
    return " ".join(seen)


def by_profiler() -> str:
    q, k, v = qkv(requires_grad=True)
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        flash_attn_func(q, k, v).sum().backward()
    return " ".join(event.name for event in profile.function_events)


def by_make_fx(tracing_mode: str) -> Callable[[], str]:
    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(flash_attn_func(q, k, v).sum(), (q, k, v))

    def run() -> str:
        graph = make_fx(step, tracing_mode=tracing_mode)(*qkv(requires_grad=True))
        return graph.code.replace("torch.ops.flash_attn.", "flash_attn::")

    return run


WATCHERS: dict[str, Callable[[], str]] = {
    "dispatch mode": by_mode(Watcher()),
    "flop counter": by_flop_counter,
    "profiler": by_profiler,
    "make_fx": by_make_fx("real"),
    "make_fx on fake tensors": by_make_fx("fake"),
}


@pytest.mark.parametrize("name", WATCHERS)
def test_watchers_see_both_operators(name):
    for _ in range(3):  # what a call finds the second time is another thing than the first time
        seen = WATCHERS[name]()
        assert FORWARD in seen
        assert BACKWARD in seen


def test_a_mode_around_the_backward_pass_alone_sees_it():
    q, k, v = qkv(requires_grad=True)
    out = flash_attn_func(q, k, v)
    with Watcher() as watcher:
        out.sum().backward()
    assert BACKWARD in watcher.seen
    assert FORWARD not in watcher.seen


def test_function_modes_see_the_operator():
    with FunctionWatcher() as watcher:
        flash_attn_func(*qkv())
    assert any("_flash_attn_forward" in name for name in watcher.seen)


def test_fake_tensors_stay_fake():
    with FakeTensorMode():
        out = flash_attn_func(*qkv())
    assert type(out).__name__ == "FakeTensor"


@contextmanager
def tracing() -> Iterator[None]:
    """Tracing is deprecated, and said to be so."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_traces_hold_the_operator():
    with tracing():
        traced = torch.jit.trace(lambda q, k, v: flash_attn_func(q, k, v), tuple(qkv()))
        assert FORWARD in str(traced.graph)
        others = qkv()
        torch.testing.assert_close(traced(*others), flash_attn_func(*others))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_reach_the_operator(operators):
    q, k, v = (torch.stack(qkv()) for _ in "qkv")
    out = torch.vmap(flash_attn_func)(q, k, v)
    assert operators == ["forward"]
    want = torch.stack([flash_attn_func(*x) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(out, want)


class Subclass(Tensor):
    """A tensor of another class, which sees what is done to it."""


def test_subclasses_reach_the_operator(operators):
    q, k, v = qkv()
    flash_attn_func(q.as_subclass(Subclass), k, v)
    flash_attn_func(q, k, v.as_subclass(Subclass))
    assert operators == ["forward"] * 2


def test_tensors_that_are_not_what_lies_in_memory(operators):
    q, k, v = qkv()
    want = flash_attn_func(-q, k, v)
    for _ in range(3):
        torch.testing.assert_close(flash_attn_func(torch._neg_view(q), k, v), want)
    with pytest.raises(ConstraintError, match="stride 0"):  # as the operator gets it
        flash_attn_func(q, k, torch._efficientzerotensor(q.shape))
    assert operators == ["forward"] * 4


def test_gradients_that_are_not_what_lies_in_memory():
    q, k, v = qkv(requires_grad=True)
    dout = torch.randn(2, 5, 2, 16)
    want = torch.autograd.grad(flash_attn_func(q, k, v), q, -dout)
    got = torch.autograd.grad(flash_attn_func(q, k, v), q, torch._neg_view(dout))
    torch.testing.assert_close(got, want)


def test_compiled_graphs_hold_the_operator():
    graphs: list[str] = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    q, k, v = qkv()
    flash_attn_func(q, k, v)
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(q, k, v), flash_attn_func(q, k, v))
    assert len(graphs) == 1
    assert "_flash_attn_forward" in graphs[0]


def test_the_state_that_operators_return_is_always_the_same():
    q, k, v = qkv()
    for _ in range(3):
        state = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False
        )[3]
        assert state.tolist() == [0, 0]
