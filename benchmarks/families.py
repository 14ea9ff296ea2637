"""Times forward passes of small problems by the portable and by the Hopper kernels.

Each call is captured in a graph, many times in a row, so that the host does not count; families
take turns, and the best turn counts. The automatic choice is marked with a star, and the line with
a word where the other family is more than five percent faster: by that the rule in `backends/sm90`
is to be judged.

    python benchmarks/families.py --out FILE.json
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from recording import environment, write_json
from torch import Tensor

import flash_attn

FAMILIES = ("triton", "sm90")
SLOWER = 1.05


class Shape(NamedTuple):
    """A problem: ``batch`` sequences of the same lengths, dense or packed."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    headdim: int
    causal: bool
    packed: bool


def shapes() -> list[Shape]:
    """Around the bound of the rule, many and few programs, short and long keys."""
    heads, lengths = ((1, 8, 8), (4, 32, 8), (64, 16, 16)), (16, 32, 64, 65, 96, 128, 256)
    kinds = ((64, True), (128, False), (128, True))
    found = []
    for (batch, *counts), seqlen_q, kind in itertools.product(heads, lengths, kinds):
        places = [(seqlen_k, False) for seqlen_k in sorted({seqlen_q, 512, 4096})]
        for seqlen_k, packed in (*places, (seqlen_q, True)):
            found.append(Shape(batch, seqlen_q, seqlen_k, *counts, *kind, packed))
    return found


def call_of(shape: Shape) -> Callable[[], Tensor]:
    """The forward pass of ``shape`` on random numbers."""

    def random(seqlen: int, heads: int) -> Tensor:
        rows = (shape.batch * seqlen,) if shape.packed else (shape.batch, seqlen)
        return torch.randn(*rows, heads, shape.headdim, dtype=torch.bfloat16, device="cuda")

    q = random(shape.seqlen_q, shape.nheads)
    k, v = (random(shape.seqlen_k, shape.nheads_k) for _ in "kv")
    if not shape.packed:
        return lambda: flash_attn.flash_attn_func(q, k, v, causal=shape.causal)
    steps = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda")
    bounds = (steps * shape.seqlen_q, steps * shape.seqlen_k, shape.seqlen_q, shape.seqlen_k)
    return lambda: flash_attn.flash_attn_varlen_func(q, k, v, *bounds, causal=shape.causal)


def graph_of(call: Callable[[], Tensor], count: int) -> torch.cuda.CUDAGraph:
    """``count`` calls in a row, as they are launched outside of graphs.

    A captured call sets the counter of its schedule to 0 first, by a launch that others need not
    make. One graph runs at a time here: it may use the stream's counter.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        torch.cuda.graph(graph, stream=stream),
    ):
        for _ in range(count):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """One call of a replay."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) * 1e3 / count


def measure(shape: Shape, count: int, rounds: int) -> dict[str, float]:
    """The best microseconds of a call, by family."""
    graphs, call = {}, call_of(shape)
    for name in FAMILIES:
        with flash_attn.use_backend(name):
            graphs[name] = graph_of(call, count)
    best = dict.fromkeys(FAMILIES, float("inf"))
    for _, name in itertools.product(range(rounds), FAMILIES):
        best[name] = min(best[name], microseconds(graphs[name], count))
    return best


def chosen_for(shape: Shape) -> str:
    """The automatic choice; `shape` has nothing that only one family serves."""
    from flash_attn.backends.sm90 import BACKEND
    from flash_attn.core import ops

    def meta(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16, device="meta")

    q = meta(shape.batch, shape.seqlen_q, shape.nheads, shape.headdim)
    k = meta(shape.batch, shape.seqlen_k, shape.nheads_k, shape.headdim)
    problem = ops.dense_problem(q, k, k, 0.0, None, shape.causal, -1, -1, 0.0, None)
    return "triton" if not shape.packed and BACKEND.better_elsewhere(problem) else "sm90"


def main(argv: Sequence[str]) -> int:
    """Time all shapes; 2 where the GPU is not of compute capability 9.0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="calls in a graph")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--commit", help="recorded instead of asking git")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("needs a GPU of compute capability 9.0", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for shape in shapes():
            figures, chosen = measure(shape, args.count, args.rounds), chosen_for(shape)
            other = FAMILIES[chosen == "triton"]
            wrong = figures[chosen] > SLOWER * figures[other]
            rows.append({**shape._asdict(), **figures, "chosen": chosen})
            cells = (f"{n} {figures[n]:8.2f}{'*' if n == chosen else ' '}" for n in FAMILIES)
            print(*cells, shape, "SLOWER" if wrong else "", flush=True)
    if args.out:
        write_json(args.out, {"environment": environment(args.commit), "microseconds": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
