"""How calls behave on a device: graphs, streams, other GPUs, synchronisation, repeatability.

By the automatic choice and, where that is not the portable kernels, by these too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import support
import torch
from torch import Tensor

from flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    use_backend,
)
from flash_attn.backends.triton import launch_backward

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("each_choice")]

Call = Callable[[], tuple[Tensor, ...]]


def randn(*shape: int, device: str = "cuda") -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def dense(device: str = "cuda", headdim: int = 128, **options: object) -> Call:
    """Forward and backward of a dense call; the portable kernels run the backward pass of head dim
    128 on two streams."""
    q = randn(2, 200, 4, headdim, device=device).requires_grad_()
    k, v = (randn(2, 200, 2, headdim, device=device).requires_grad_() for _ in "kv")
    dout = torch.randn_like(q)

    def call() -> tuple[Tensor, ...]:
        out = flash_attn_func(q, k, v, **options)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    return call


def varlen(device: str = "cuda") -> Call:
    q, k, v = (randn(90, 4, 64, device=device).requires_grad_() for _ in "qkv")
    cu = torch.tensor([0, 30, 30, 77], device=device, dtype=torch.int32)
    dout = torch.randn_like(q)

    def call() -> tuple[Tensor, ...]:
        out = flash_attn_varlen_func(q, k, v, cu, cu, 47, 47, causal=True)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    return call


def decode(device: str = "cuda", num_splits: int = 3) -> Call:
    q, new = randn(2, 1, 4, 64, device=device), randn(2, 1, 2, 64, device=device)
    k_cache, v_cache = (randn(2, 256, 2, 64, device=device) for _ in "kv")
    cos, sin = (randn(256, 16, device=device) for _ in "cs")
    lengths = torch.tensor([100, 37], device=device, dtype=torch.int32)

    def call() -> tuple[Tensor, ...]:
        out = flash_attn_with_kvcache(
            q, k_cache, v_cache, new, new, cos, sin, lengths, causal=True, num_splits=num_splits
        )
        return out, k_cache

    return call


def paged(device: str = "cuda") -> Call:
    """Cached queries with a row appended, and packed ones over the same pages."""
    q, new = randn(5, 4, 64, device=device), randn(2, 1, 2, 64, device=device)
    pages = [randn(20, 16, 2, 64, device=device) for _ in "kv"]
    table = torch.arange(16, device=device, dtype=torch.int32).view(2, 8).flip(1)
    cu_q, cu_k = (
        torch.tensor(x, device=device, dtype=torch.int32) for x in ([0, 4, 5], [0, 9, 99])
    )
    lengths = torch.tensor([100, 37], device=device, dtype=torch.int32)

    def call() -> tuple[Tensor, ...]:
        cached = flash_attn_with_kvcache(
            q[:2, None], *pages, new, new, cache_seqlens=lengths, block_table=table, num_splits=2
        )
        packed = flash_attn_varlen_func(
            q, *pages, cu_q, cu_k, 4, 90, causal=True, block_table=table
        )
        return cached, packed, pages[0]

    return call


def empty(device: str = "cuda") -> Call:
    """No keys at all, and sequences without queries or keys among others."""
    q, k = randn(1, 3, 2, 64, device=device), randn(1, 0, 2, 64, device=device)
    x = randn(9, 2, 64, device=device).requires_grad_()
    cu_q, cu_k = (
        torch.tensor(bounds, device=device, dtype=torch.int32)
        for bounds in ([0, 0, 4, 9, 9], [0, 5, 5, 8, 9])
    )

    def call() -> tuple[Tensor, ...]:
        out = flash_attn_varlen_func(x, x, x, cu_q, cu_k, 5, 5, causal=True)
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        return out.detach(), grad, flash_attn_func(q, k, k)

    return call


CALLS: dict[str, Callable[..., Call]] = {
    "dense": dense,
    "causal": lambda device="cuda": dense(device, causal=True),
    "window": lambda device="cuda": dense(device, headdim=64, window_size=(30, 5)),
    "d256": lambda device="cuda": dense(device, headdim=256, causal=True, deterministic=True),
    "varlen": varlen,
    "decode": decode,
    "paged": paged,
    "empty": empty,
}


def assert_equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.cpu(), y.cpu())


@pytest.mark.parametrize("name", list(CALLS))
def test_no_call_synchronises(name: str) -> None:
    call = CALLS[name]()
    call()
    with support.no_synchronisation():
        call()


def test_dropout_does_not_synchronise() -> None:
    call = dense(headdim=64, dropout_p=0.1)
    call()
    with support.no_synchronisation():
        call()


@pytest.mark.parametrize("name", list(CALLS))
def test_side_streams_give_the_same_bits(name: str) -> None:
    call = CALLS[name]()
    want = call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000)
        got = call()
    stream.synchronize()
    assert_equal(got, want)


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


STEPS = ["_launch_row_statistics", "_launch_dkdv", "_launch_dq"]


def delay(monkeypatch: pytest.MonkeyPatch, step: str, cycles: int = 20_000_000) -> None:
    """Let the portable backward pass run on two streams, and ``step`` start ``cycles`` later."""
    launch = getattr(launch_backward, step)

    def late(*arguments: object) -> None:
        torch.cuda._sleep(cycles)
        launch(*arguments)

    monkeypatch.setattr(launch_backward, step, late)
    monkeypatch.setattr(launch_backward, "overlaps_backward", lambda key, seqlen: True)


@pytest.fixture
def portable(each_choice: str) -> Iterator[None]:
    """Inside of the choice of the file, so that this one wins."""
    with use_backend("triton"):
        yield


@pytest.mark.usefixtures("uninitialised_memory_is_nan", "portable")
@pytest.mark.parametrize("step", STEPS)
def test_two_streams_of_a_backward_pass_wait(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    call = dense()
    want = call()
    delay(monkeypatch, step)
    assert_equal(call(), want)


@pytest.mark.usefixtures("uninitialised_memory_is_nan", "portable")
@pytest.mark.parametrize("step", ["_launch_row_statistics", "_launch_dq"])
def test_a_stream_that_does_not_wait_is_noticed(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """That the test above can fail. A host that loses half a second on its way to the copy, as
    among many processes on one GPU, comes too late to notice: one of some tries is in time."""
    call = dense()
    want = call()
    delay(monkeypatch, step, 1_000_000_000)
    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda self, other: None)

    def is_noticed() -> bool:
        got = call()
        early = got[1].cpu()
        torch.cuda.synchronize()
        return not torch.equal(early, want[1].cpu())

    assert any(is_noticed() for _ in range(5))


def capture(call: Call) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    # PyTorch writes the generator's state on the capturing stream when a capture begins and on the
    # current one before a replay; on a busy GPU the first can come after the second.
    torch.cuda.synchronize()
    return graph, results


@pytest.mark.parametrize("name", list(CALLS))
def test_graph_replays_equal_eager_calls(name: str) -> None:
    call = CALLS[name]()
    want = call()
    graph, got = capture(call)
    for _ in range(3):
        for x in got[:1]:
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(got, want)


@pytest.mark.parametrize("captured", [1, 200])
def test_graphs_follow_lengths_on_the_device(captured: int) -> None:
    """Captured short and replayed long, and the other way round."""
    q = randn(2, 1, 4, 64)
    k_cache, v_cache = (randn(2, 256, 2, 64) for _ in "kv")
    lengths = torch.full((2,), captured, device="cuda", dtype=torch.int32)

    def call() -> tuple[Tensor, ...]:
        return (flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, num_splits=2),)

    graph, got = capture(call)
    for length in (0, 1, 17, 100, 256):
        lengths.fill_(length)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(got, call())


def test_dropout_differs_between_replays_and_repeats_with_the_seed() -> None:
    q, k, v = (randn(1, 64, 2, 64) for _ in "qkv")
    graph, got = capture(lambda: (flash_attn_func(q, k, v, dropout_p=0.5),))
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        for _ in range(2):
            graph.replay()
            torch.cuda.synchronize()
            drawn.append(got[0].clone())
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])


@pytest.mark.parametrize("name", ["dense", "causal", "window", "d256", "varlen"])
def test_a_thousand_repeats_are_equal(name: str) -> None:
    call = CALLS[name]()
    want = call()
    different = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        for x, y in zip(call(), want, strict=True):
            different += (x != y).sum()
    assert int(different) == 0


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
@pytest.mark.parametrize("name", list(CALLS))
def test_tensors_on_another_gpu_than_the_current(name: str) -> None:
    torch.manual_seed(0)
    want = CALLS[name]("cuda:0")()
    torch.manual_seed(0)
    with torch.cuda.device(0):
        call = CALLS[name]("cuda:1")
        got = call()
        torch.cuda.synchronize(1)
        again = call()
        torch.cuda.synchronize(1)
    assert got[0].device == torch.device("cuda:1")
    assert_equal(got, again)
    assert [x.shape for x in got] == [x.shape for x in want]
    with torch.cuda.device(1):
        assert_equal(call(), got)


def test_mixed_devices_are_named() -> None:
    q = randn(1, 8, 2, 64)
    with pytest.raises(ValueError, match="`k` must be on cuda"):
        flash_attn_func(q, q.cpu(), q)
