"""Repeated calls on a GPU give the bits of the ordinary way: in graphs, on streams, other GPUs.

By the automatic choice and, where that is not the portable kernels, by these too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import support
import torch
from torch import Tensor

from flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    hopper_interface,
)
from flash_attn.backends import _launcher
from flash_attn.core import autograd, registry, repeated

pytestmark = pytest.mark.gpu

Tensors = dict[str, Tensor]
Call = Callable[..., tuple[Tensor, ...]]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def dense(headdim: int = 64, **options: object) -> tuple[Call, Callable[[], Tensors]]:
    def call(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_attn_func(*leaves, **options)
        with torch.no_grad():
            again = flash_attn_func(q, k, v, **options)
        return again, out.detach(), *torch.autograd.grad(out, leaves, dout)

    def make() -> Tensors:
        q, dout = randn(2, 200, 4, headdim), randn(2, 200, 4, headdim)
        return {"q": q, "k": randn(2, 200, 2, headdim), "v": randn(2, 200, 2, headdim)} | {
            "dout": dout
        }

    return call, make


def varlen(backward: bool, same: bool) -> tuple[Call, Callable[[], Tensors]]:
    def call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, ...]:
        if same:
            cu_k = cu_q
        out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 77, 77, causal=True)
        if not backward:
            return (out,)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        recorded = flash_attn_varlen_func(*leaves, cu_q, cu_k, 77, 77, causal=True)
        return out, recorded.detach(), *torch.autograd.grad(recorded, leaves, q)

    def make() -> Tensors:
        cut, other = torch.randint(1, 76, (2,)).tolist()
        tensors = {name: randn(90, 4, 64) for name in "qkv"}
        return tensors | {"cu_q": ints(0, cut, cut, 77), "cu_k": ints(0, other, other, 77)}

    return call, make


def hopper(packed: bool) -> tuple[Call, Callable[[], Tensors]]:
    """FlashAttention-3's functions."""

    def call(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"causal": True, "return_attn_probs": True}
        if packed:
            return hopper_interface.flash_attn_varlen_func(q, k, v, cu, cu, 77, 77, **options)
        q, k, v = (x[None] for x in (q, k, v))
        alone = hopper_interface.flash_attn_func(q, k, v, softmax_scale=0.3)
        return alone, *hopper_interface.flash_attn_func(q, k, v, **options)

    def make() -> Tensors:
        tensors = {name: randn(90, 4, 64) for name in "qkv"}
        return tensors | {"cu": ints(0, int(torch.randint(1, 76, ())), 77)}

    return call, make


def sinks() -> tuple[Call, Callable[[], Tensors]]:
    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        return (flash_attn_func(q, k, v, causal=True, s_aux=sinks),)

    def make() -> Tensors:
        tensors = {name: randn(2, 300, 4, 128) for name in "qkv"}
        return tensors | {"sinks": torch.randn(4, device="cuda")}

    return call, make


def decode(num_splits: int) -> tuple[Call, Callable[[], Tensors]]:
    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        return flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, num_splits=num_splits, return_softmax_lse=True
        )

    def make() -> Tensors:
        lengths = torch.randint(0, 257, (2,), device="cuda", dtype=torch.int32)
        cache = {name: randn(2, 256, 2, 64) for name in "kv"}
        return {"q": randn(2, 1, 4, 64), **cache, "lengths": lengths}

    return call, make


CALLS = {
    "dense": dense,
    "head dim 128": lambda: dense(128),
    "causal": lambda: dense(causal=True),
    "window and softcap": lambda: dense(window_size=(30, 5), softcap=4.0),
    "odd head dim": lambda: dense(72),
    "causal, head dim 256": lambda: dense(256, causal=True),
    "sinks": sinks,
    "varlen": lambda: varlen(backward=False, same=True),
    "varlen backward": lambda: varlen(backward=True, same=False),
    "varlen backward, the same lengths": lambda: varlen(backward=True, same=True),
    "hopper": lambda: hopper(packed=False),
    "hopper varlen": lambda: hopper(packed=True),
    "decode": lambda: decode(1),
    "split": lambda: decode(3),
}


@pytest.fixture(autouse=True)
def fresh(each_choice: str) -> None:
    repeated.clear()
    autograd._known.clear()


def is_served_by_hopper(name: str) -> bool:
    """Whether kernels of Hopper compute a forward pass of the call."""
    choice, _ = registry.choice()
    families = registry.own_families(torch.device("cuda", torch.cuda.current_device()))
    few_queries = name in ("decode", "split")
    return choice == "auto" and families[0] == "sm90" and not few_queries


def ordinary(call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
    """The call as if it were the first; what is known of others is known afterwards."""
    caches = (repeated._calls, autograd._known)
    before = [dict(cache) for cache in caches]
    for cache in caches:
        cache.clear()
    try:
        return call(**tensors)
    finally:
        for cache, content in zip(caches, before, strict=True):
            cache.clear()
            cache.update(content)


def assert_equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert x.stride() == y.stride()
        assert torch.equal(x.cpu(), y.cpu())


def warm(call: Call, make: Callable[[], Tensors]) -> None:
    for _ in range(3):
        call(**make())


def test_direct_launches_work_here() -> None:
    assert _launcher.KNOWN_VERSION
    assert _launcher.undisturbed()


@pytest.mark.parametrize("name", CALLS)
def test_repeated_calls_give_the_same_bits(name: str, caplog: pytest.LogCaptureFixture) -> None:
    call, make = CALLS[name]()
    with caplog.at_level(logging.INFO, logger="flash_attn"):
        warm(call, make)
    # The portable backward pass of larger head dims may run on two streams, and Hopper's of packed
    # sequences is not repeated.
    is_exempt = "varlen backward" in name and is_served_by_hopper(name)
    if "head dim" not in name and not is_exempt:
        assert "usual path" not in caplog.text
    if torch.version.hip is None:
        assert "launched by Triton's function" not in caplog.text
    known = [x for x in repeated._calls.values() if isinstance(x, repeated._Known)]
    assert known
    served = {x.backend.name for x in known}
    assert ("sm90" in served) == is_served_by_hopper(name)
    several = [make() for _ in range(3)]
    got = [call(**tensors) for tensors in several]
    for tensors, results in zip(several, got, strict=True):
        assert_equal(results, ordinary(call, tensors))


@pytest.mark.parametrize("name", CALLS)
def test_repeated_calls_can_be_captured(name: str) -> None:
    call, make = CALLS[name]()
    warm(call, make)
    held = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call(**held)
        with torch.cuda.graph(graph, stream=stream):
            results = call(**held)
    stream.synchronize()
    for _ in range(2):
        others = make()
        for key, x in others.items():
            held[key].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        copies = tuple(x.clone() for x in results)
        assert_equal(copies, ordinary(call, others))


def test_repeated_calls_run_on_the_current_stream() -> None:
    call, make = dense(causal=True)
    warm(call, make)
    tensors = make()
    want = ordinary(call, tensors)
    source = {key: x.clone() for key, x in tensors.items()}
    for x in tensors.values():
        x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # on another stream, the zeros would be read
        for key, x in source.items():
            tensors[key].copy_(x)
        got = call(**tensors)
    stream.synchronize()
    assert_equal(got, want)


def test_repeated_calls_do_not_synchronise() -> None:
    call, make = dense()
    warm(call, make)
    tensors = make()
    with support.no_synchronisation():
        call(**tensors)


def test_addresses_that_are_used_again() -> None:
    """The allocator hands out memory that earlier calls had, in other layouts too."""
    for _ in range(6):
        for shape in ((2, 64, 4, 64), (2, 4, 64, 64), (1, 128, 4, 64)):
            q, k, v = (randn(*shape) for _ in "qkv")
            got = flash_attn_func(q, k, v)
            want = ordinary(lambda q, k, v: (flash_attn_func(q, k, v),), {"q": q, "k": k, "v": v})
            assert_equal((got,), want)
            del q, k, v, got, want


def test_threads() -> None:
    call, make = dense(causal=True)
    warm(call, make)
    inputs = [make() for _ in range(4)]
    want = [call(**tensors) for tensors in inputs]
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    got = call(**inputs[number])
                torch.cuda.current_stream().synchronize()
                assert_equal(got, want[number])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_a_thread_that_has_not_used_the_gpu() -> None:
    """It has no context before its first launch, which the driver refuses then."""
    q, k, v = (randn(2, 200, 4, 64) for _ in "qkv")
    with torch.no_grad():
        for _ in range(4):
            want = flash_attn_func(q, k, v)
        for _ in range(3):
            found: list[Tensor] = []
            worker = threading.Thread(target=lambda: found.append(_unrecorded(q, k, v)))  # noqa: B023
            worker.start()
            worker.join()
            assert torch.equal(found[0], want)


@torch.no_grad()
def _unrecorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v)


def graph_of(call: Call, held: Tensors) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(**held)
    return graph, results


@pytest.mark.parametrize("name", ["causal", "varlen", "sinks"])
def test_graphs_and_calls_at_a_time(name: str) -> None:
    """Two graphs and eager calls, each on a stream of its own: schedules do not mix."""
    call, make = CALLS[name]()
    warm(call, make)
    inputs = [make() for _ in range(3)]
    want = [ordinary(call, tensors) for tensors in inputs]
    graphs = [graph_of(call, tensors) for tensors in inputs[:2]]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(50):
        for (graph, _), stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            got = call(**inputs[2])
    torch.cuda.synchronize()
    for (_, results), expected in zip(graphs, want, strict=False):
        assert_equal(results, expected)
    assert_equal(got, want[2])


def test_counters_are_left_at_zero() -> None:
    call, make = CALLS["varlen"]()
    warm(call, make)
    with torch.cuda.stream(torch.cuda.Stream()):
        warm(call, make)
    torch.cuda.synchronize()
    if is_served_by_hopper("varlen"):
        assert _launcher._counters
    assert all(int(x) == 0 for x in _launcher._counters.values())


# PyTorch begins with a graph of nothing, which its own warning is not kept from.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("name", ["causal", "dense"])
def test_compiled_with_graphs_of_its_own(name: str) -> None:
    """Graphs of torch.compile are warmed up in a memory pool that nothing else may stay in."""
    torch._dynamo.reset()  # or a graph that another choice of backends recorded is replayed
    call, make = CALLS[name]()
    tensors = make()
    want = ordinary(call, tensors)[0]
    options = {"causal": name == "causal"}
    torch.cuda.synchronize()  # nobody uses them any more
    _launcher._counters.clear()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q * 1.0, k, v, **options) + 0.0

    with torch.no_grad():
        compiled = torch.compile(attend, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            got = compiled(*(tensors[name] for name in "qkv")).clone()
            assert_equal((got,), (want,))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_that_is_not_current() -> None:
    call, make = dense(causal=True)
    for _ in range(4):
        tensors = make()
        there = {key: x.to("cuda:1") for key, x in tensors.items()}
        assert torch.cuda.current_device() == 0
        assert_equal(call(**there), call(**tensors))
    assert torch.cuda.current_device() == 0
