"""Repeated calls on a GPU give the bits of the ordinary way: in graphs, on streams, other GPUs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
import support
import torch
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.backends import _launcher
from flash_attn.core import autograd, repeated

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


def varlen() -> tuple[Call, Callable[[], Tensors]]:
    def call(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> tuple[Tensor, ...]:
        return (flash_attn_varlen_func(q, k, v, cu, cu, 77, 77, causal=True),)

    def make() -> Tensors:
        cut = int(torch.randint(1, 76, ()))
        tensors = {name: randn(90, 4, 64) for name in "qkv"}
        return tensors | {"cu": ints(0, cut, cut, 77)}

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
    "varlen": varlen,
    "decode": lambda: decode(1),
    "split": lambda: decode(3),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    repeated.clear()
    autograd._dense.clear()


def ordinary(call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
    """The call as if it were the first; what is known of others is known afterwards."""
    caches = (repeated._calls, autograd._dense)
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
    # The backward pass of larger head dims may run on two streams.
    if "head dim" not in name:
        assert "usual path" not in caplog.text
    assert any(isinstance(known, repeated._Known) for known in repeated._calls.values())
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
    call, make = dense()
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
    call, make = dense()
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_that_is_not_current() -> None:
    call, make = dense()
    for _ in range(4):
        tensors = make()
        there = {key: x.to("cuda:1") for key, x in tensors.items()}
        assert torch.cuda.current_device() == 0
        assert_equal(call(**there), call(**tensors))
    assert torch.cuda.current_device() == 0
