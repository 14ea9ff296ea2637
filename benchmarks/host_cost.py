"""Times the host side of one attention call, in microseconds: beside PyTorch's, layer by layer.

Calls are issued back to back on tensors so small that the GPU keeps up; the best of several rounds
counts. First the public functions, PyTorch's SDPA and, with ``--peers``, FlashAttention-3's
operators in turns; all must agree. Then the layers of every backend that is named: "auto" is the
Hopper kernels on GPUs of compute capability 9.0, but for the single row of flash_attn_with_kvcache.

Without a GPU the launches end in a stub instead of the driver, on CPU tensors that are taken for a
Hopper GPU's: what remains is the cost of Python and of allocation, on CPU time, so that a busy
machine matters less.

    python benchmarks/host_cost.py --peers FOLDER --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from cells import Cell
from options import existing_folder
from peers import add_peers, fa3_kernels, fa3_operators
from recording import new_result, write_json
from stub import install_stub
from timing import rotations
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    hopper_interface,
    use_backend,
)
from flash_attn.backends import _launcher
from flash_attn.backends._launcher import Launcher, Repeat, recording
from flash_attn.core import ops, registry, repeated
from flash_attn.core.attend import attend
from flash_attn.core.outputs import empty_lse, empty_out

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
Calls = dict[str, Callable[[], object]]
BESIDE = "side by side"
# Of calls side by side, in bfloat16.
WRONG_ABOVE = 2e-2


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
        "FA3's flash_attn_func": lambda: hopper_interface.flash_attn_func(q, k, v),
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
    """PyTorch's own flash attention on the same numbers as :func:`beside`."""
    q, k, v, dout = (x.transpose(1, 2) for x in same_numbers(args))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return (
        {"SDPA": lambda: F.scaled_dot_product_attention(q, k, v)},
        {
            "SDPA, recorded": lambda: F.scaled_dot_product_attention(*leaves),
            "SDPA and backward": lambda: torch.autograd.grad(
                F.scaled_dot_product_attention(*leaves), leaves, dout
            ),
        },
    )


def same_numbers(args: argparse.Namespace) -> list[Tensor]:
    """q, k, v and dout, (batch, seqlen, nheads, headdim), the same at every call."""
    torch.manual_seed(0)
    return [random(args.batch, args.seqlen, args.nheads, args.headdim) for _ in range(4)]


def of_ours(args: argparse.Namespace) -> tuple[Calls, Calls]:
    """The public function on the same numbers."""
    q, k, v, dout = same_numbers(args)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return (
        {"flash_attn_func": lambda: flash_attn_func(q, k, v)},
        {
            "flash_attn_func, recorded": lambda: flash_attn_func(*leaves),
            "flash_attn_func and backward": lambda: torch.autograd.grad(
                flash_attn_func(*leaves), leaves, dout
            ),
        },
    )


def of_fa3(args: argparse.Namespace) -> tuple[Calls, Calls]:
    """FlashAttention-3's operators, which record no graph, on the same numbers."""
    q, k, v, dout = same_numbers(args)
    cell = Cell(args.headdim, False, args.seqlen, args.batch, args.nheads)
    kernels, forward = fa3_kernels(cell, q.device), fa3_operators().fwd

    def both() -> object:
        return kernels.backward(dout, q, k, v, *kernels.forward(q, k, v))

    return {"FA3 fwd": lambda: forward(q, k, v, num_splits=1)[0]}, {"FA3 fwd and bwd": both}


def agree(calls: Calls) -> None:
    """End the program if a result is not the first call's of as many tensors."""
    wanted: dict[int, list[Tensor]] = {}
    for name, call in calls.items():
        result = call()
        found = list(result) if isinstance(result, (list, tuple)) else [result]
        want = wanted.setdefault(len(found), found)
        for got, y in zip(found, want, strict=True):
            x = got if got.shape == y.shape else got.transpose(1, 2)
            x, y = x.detach().float(), y.detach().float()
            error = float((x - y).norm() / y.norm())
            if not error < WRONG_ABOVE:
                raise SystemExit(f"{name} is wrong: it differs by {error:.1e}")


def in_turns(calls: Calls, count: int, rounds: int = 10) -> dict[str, float]:
    """The best microseconds of each, in an order that rotates; what they begin with warms up."""
    best = dict.fromkeys(calls, math.inf)
    for order in rotations(list(calls), rounds):
        for name in order:
            best[name] = min(best[name], microseconds(calls[name], count, rounds=1))
    for name, figure in best.items():
        print(f"{figure:8.2f}  {name}", flush=True)
    return best


def beside(args: argparse.Namespace) -> dict[str, float]:
    """Ours, PyTorch's and, where it is there, FlashAttention-3's, in turns."""
    sources = [of_ours] + [of_pytorch] * ON_GPU + [of_fa3] * (args.peers is not None)
    without: Calls = {}
    with_gradients: Calls = {}
    for source in sources:
        first, second = source(args)
        without |= first
        with_gradients |= second
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        if ON_GPU:
            agree(without | with_gradients)
        with torch.no_grad():
            figures = in_turns(without, args.calls)
        return figures | in_turns(with_gradients, args.calls)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("batch", 1), ("seqlen", 128), ("nheads", 8), ("headdim", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--calls", type=int, default=200, help="in one round")
    parser.add_argument("--backends", nargs="+", default=["auto", "triton"], metavar="NAME")
    parser.add_argument("--peers", type=existing_folder, help="of FlashAttention-3")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="no backend after it")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--commit", help="recorded instead of asking git")
    return parser.parse_args(argv)


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


def served(args: argparse.Namespace) -> str:
    """Who computes both passes under the choice in force."""
    q, k, v = (random(args.batch, args.seqlen, args.nheads, args.headdim) for _ in "qkv")
    problem = ops.dense_problem(q, k, v, 0.0, None, False, -1, -1, 0.0, None)
    passes = (("forward", False), ("backward", True))
    return ", ".join(f"{which} {registry.select(problem, x).name}" for which, x in passes)


def main(argv: Sequence[str]) -> int:
    """Measure, print and write; 1 if a backend was left out."""
    args = parse(argv)
    until = time.monotonic() + args.max_seconds
    settings = {x: getattr(args, x) for x in ("batch", "seqlen", "nheads", "headdim", "calls")}
    settings |= {"dtype": "bfloat16", "direct": _launcher.undisturbed(), "stub": not ON_GPU}
    data = new_result("host_cost", args.commit, settings)
    data |= {"microseconds": {}, "served": {}, "left_out": []}
    figures = data["microseconds"]
    print(data["environment"], settings)
    with ExitStack() as stack:
        if args.peers is not None:
            add_peers(args.peers)
        if not ON_GPU:
            install_stub(stack)
        print(BESIDE)
        figures[BESIDE] = beside(args)
        if args.out:
            write_json(args.out, data)
        for name in args.backends:
            if time.monotonic() > until:
                data["left_out"].append(name)
                continue
            with use_backend(name):
                data["served"][name] = served(args)
                print(f"{name} ({data['served'][name]})")
                figures[name] = measure(args)
            if args.out:
                write_json(args.out, data)
    if args.out:
        write_json(args.out, data)
    return int(bool(data["left_out"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
