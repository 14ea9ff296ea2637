"""Times the host side of one attention call, layer by layer, in microseconds.

Calls are issued back to back on tensors so small that the GPU keeps up; the best of several rounds
counts. Every backend that is named is timed in turn: "auto" is the Hopper kernels on GPUs of
compute capability 9.0, but for the single row of flash_attn_with_kvcache.

Without a GPU the launches end in a stub instead of the driver, on CPU tensors that are taken for a
Hopper GPU's: what remains is the cost of Python and of allocation, on CPU time, so that a busy
machine matters less.

    python benchmarks/host_cost.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    use_backend,
)
from flash_attn.backends import _launcher
from flash_attn.backends._launcher import Launcher, Repeat, recording
from flash_attn.backends.triton import BACKEND as PORTABLE
from flash_attn.core import ops, registry, repeated
from flash_attn.core.attend import attend
from flash_attn.core.outputs import empty_lse, empty_out

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
Calls = dict[str, Callable[[], object]]


@triton.jit
def nothing(x, BLOCK: tl.constexpr):
    pass


def microseconds(call: Callable[[], object], calls: int, rounds: int = 10) -> float:
    """The best time of one call."""
    clock = time.perf_counter if ON_GPU else time.thread_time
    best = float("inf")
    for _ in range(rounds + 1):  # the first one warms up
        if ON_GPU:
            torch.cuda.synchronize()
        started = clock()
        for _ in range(calls):
            call()
        best = min(best, (clock() - started) / calls)
    return best * 1e6


def random(*shape: int, grad: bool = False) -> Tensor:
    made = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
    return made.requires_grad_(grad)


def launches(q: Tensor, k: Tensor, v: Tensor) -> Calls:
    """Triton's usual path and direct launches, of an empty kernel and of the forward kernel."""
    with recording() as empty_tape:
        Launcher(nothing)[(1,)](q, BLOCK=16)
    empty = Repeat(empty_tape, [q])
    problem = ops.dense_problem(q, k, v, 0.0, None, False, -1, -1, 0.0, None)
    backend = registry.select(problem)
    with recording() as tape:
        result = backend.forward(problem)
    tensors = (q, k, v, result.out, result.softmax_lse, result.rng_state)
    forward = Repeat(tape, tensors)
    addresses = [x.data_ptr() for x in tensors]
    kernel, grid, _, arguments, keywords, *_ = tape.launches[0]
    return {
        "empty kernel, direct": lambda: empty([addresses[0]]),
        "empty kernel, usual path": lambda: nothing[(1,)](q, BLOCK=16),
        "forward kernel, direct": lambda: forward(addresses.copy()),
        "forward kernel, usual path": lambda: kernel[grid](*arguments, **keywords),
        "both allocations": lambda: (empty_out(problem), empty_lse(problem)),
    }


def layers(q: Tensor, k: Tensor, v: Tensor) -> Calls:
    """From the backend to the operator."""
    problem = ops.dense_problem(q, k, v, 0.0, None, False, -1, -1, 0.0, None)
    for _ in range(3):
        attend(problem)
    call = repeated.identify(problem)
    solve = None if call is None else repeated.find(call.signature)
    if call is None or solve is None:
        raise RuntimeError("the call is not repeated: see the log at level INFO")
    backend = registry.select(problem)
    flat = (q, k, v, 0.0, q.shape[-1] ** -0.5, False, -1, -1, 0.0, None, False)
    return {
        "solve (allocate, launch)": lambda: solve(call.tensors),
        "identify": lambda: repeated.identify(problem),
        "attend": lambda: attend(problem),
        "backend.forward, not repeated": lambda: backend.forward(problem),
        "operator": lambda: ops.forward(*flat),
    }


def public(args: argparse.Namespace) -> tuple[Calls, Calls]:
    """Public functions, without and with gradients."""
    q, k, v = (random(args.batch, args.seqlen, args.nheads, args.headdim) for _ in "qkv")
    one_row = q[:, :1].contiguous()
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    cu = torch.arange(args.batch + 1, dtype=torch.int32, device=DEVICE) * args.seqlen
    lengths = torch.full((args.batch,), args.seqlen, dtype=torch.int32, device=DEVICE)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    bounds = (cu, cu, args.seqlen, args.seqlen)
    without = {
        "flash_attn_func": lambda: flash_attn_func(q, k, v),
        "flash_attn_func, causal": lambda: flash_attn_func(q, k, v, causal=True),
        "flash_attn_func, with LSE": lambda: flash_attn_func(q, k, v, return_attn_probs=True),
        "flash_attn_varlen_func": lambda: flash_attn_varlen_func(*packed, *bounds),
        "flash_attn_with_kvcache": lambda: flash_attn_with_kvcache(
            one_row, k, v, cache_seqlens=lengths
        ),
    }
    with_gradients = {
        "flash_attn_func, recorded": lambda: flash_attn_func(*leaves),
        "flash_attn_func and backward": lambda: torch.autograd.grad(
            flash_attn_func(*leaves), leaves, dout
        ),
    }
    return without, with_gradients


def of_pytorch(args: argparse.Namespace) -> tuple[Calls, Calls]:
    """PyTorch's own flash attention on the same sizes."""
    shape = (args.batch, args.nheads, args.seqlen, args.headdim)
    q, k, v = (random(*shape) for _ in "qkv")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    return (
        {"PyTorch SDPA": lambda: F.scaled_dot_product_attention(q, k, v)},
        {
            "PyTorch SDPA, recorded": lambda: F.scaled_dot_product_attention(*leaves),
            "PyTorch SDPA and backward": lambda: torch.autograd.grad(
                F.scaled_dot_product_attention(*leaves), leaves, dout
            ),
        },
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("batch", 1), ("seqlen", 128), ("nheads", 8), ("headdim", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--calls", type=int, default=200, help="in one round")
    parser.add_argument("--backends", nargs="+", default=["auto", "triton"], metavar="NAME")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    return parser.parse_args(argv)


def stub(stack: ExitStack) -> None:
    """Let our kernels for GPUs take CPU tensors and launch nothing."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from stub_driver import stub_driver

    from flash_attn.backends import sm90

    stack.enter_context(stub_driver(silent=True))
    for owner, name, value in (
        (registry, "own_families", lambda device: ("sm90", "triton")),
        (sm90, "_place_reasons", lambda q: []),
        (sm90.launch, "multiprocessors_of", lambda index: 132),
        (PORTABLE, "unsupported", lambda problem, backward: []),
    ):
        stack.enter_context(mock.patch.object(owner, name, value))


def take(calls: Calls, count: int) -> dict[str, float]:
    """Time, print and return."""
    figures: dict[str, float] = {}
    for name, call in calls.items():
        figures[name] = microseconds(call, count)
        print(f"{figures[name]:8.2f}  {name}", flush=True)
    return figures


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Our calls, by the backend in use."""
    q, k, v = (random(args.batch, args.seqlen, args.nheads, args.headdim) for _ in "qkv")
    without, with_gradients = public(args)
    with torch.no_grad():
        figures = take(launches(q, k, v) | layers(q, k, v) | without, args.calls)
    return figures | take(with_gradients, args.calls)


def measure_pytorch(args: argparse.Namespace) -> dict[str, float]:
    without, with_gradients = of_pytorch(args)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.no_grad():
            figures = take(without, args.calls)
        return figures | take(with_gradients, args.calls)


def served(args: argparse.Namespace) -> str:
    """Who computes both passes under the choice in force."""
    q, k, v = (random(args.batch, args.seqlen, args.nheads, args.headdim) for _ in "qkv")
    problem = ops.dense_problem(q, k, v, 0.0, None, False, -1, -1, 0.0, None)
    passes = (("forward", False), ("backward", True))
    return ", ".join(f"{which} {registry.select(problem, x).name}" for which, x in passes)


def main(argv: list[str]) -> None:
    args = parse(argv)
    with ExitStack() as stack:
        if not ON_GPU:
            stub(stack)
        device = torch.cuda.get_device_name() if ON_GPU else "no GPU, launches end in a stub"
        versions = (
            f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"triton {triton.__version__}"
        )
        print(f"{device}; {versions}; direct launches: {_launcher.undisturbed()}")
        figures = {}
        for name in args.backends:
            with use_backend(name):
                print(f"{name} ({served(args)})")
                figures[name] = measure(args)
        if ON_GPU:
            print("PyTorch")
            figures["PyTorch"] = measure_pytorch(args)
    if args.out:
        table = {"device": device, "versions": versions, "microseconds": figures}
        args.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
