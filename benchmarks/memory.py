"""Measures the peak memory that forward and backward take beyond their inputs.

Attention that keeps its scores needs memory that grows with the square of the length; these
kernels need only what grows with the length. The exponent of the growth is fitted and recorded.

    python benchmarks/memory.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attention import (
    SCHEMA,
    Cell,
    backward_of,
    describe,
    environment,
    make_inputs,
    make_ours,
    write_json,
)

SEQLENS = (4096, 8192, 16384, 32768, 65536)
BATCH, NHEADS, HEADDIM = 1, 8, 64
# Every byte beyond the inputs should be in proportion to the length.
LINEAR_BELOW = 1.05


def growth_exponent(seqlens: Sequence[int], sizes: Sequence[float]) -> float:
    """The power of the length that ``sizes`` grow with, by least squares on logarithms."""
    x, y = [math.log(n) for n in seqlens], [math.log(n) for n in sizes]
    x_mean, y_mean = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / math.fsum((a - x_mean) ** 2 for a in x)


def peak_beyond(call: Callable[[], object]) -> int:
    """Bytes at the peak of ``call`` over those held before it, what it returns included."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def measure(seqlen: int) -> dict[str, Any]:
    """One row of the result file."""
    cell = Cell(HEADDIM, True, seqlen, BATCH, NHEADS)
    row: dict[str, Any] = {"seqlen": seqlen, "scores_bytes": BATCH * NHEADS * seqlen**2 * 2}
    try:
        runner = make_ours(cell, make_inputs(cell, torch.bfloat16, "cuda"))
        backward_of(runner)()  # compiling allocates as well
        row["forward_bytes"] = peak_beyond(runner.call)
        row["backward_bytes"] = peak_beyond(backward_of(runner))
        row["gradient_bytes"] = sum(x.numel() * x.element_size() for x in runner.leaves)
    except Exception as error:  # out of memory, above all
        row["failure"] = describe(error)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all lengths; 0 if none failed and growth is linear."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seqlens", default=",".join(map(str, SEQLENS)))
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--commit", help="recorded instead of asking git")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU is visible", file=sys.stderr)
        return 2
    rows = []
    for seqlen in map(int, args.seqlens.split(",")):
        rows.append(measure(seqlen))
        print(rows[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    data = summarise(rows, environment(args.commit))
    print("backward grows as length to the power of", data["growth_exponent"])
    if args.out is not None:
        write_json(args.out, data)
    exponent = data["growth_exponent"]
    failed = any("failure" in row for row in rows)
    return int(failed or exponent is None or exponent > LINEAR_BELOW)


def summarise(rows: list[dict[str, Any]], facts: dict[str, str]) -> dict[str, Any]:
    """The result file: rows, and the exponent if two or more lengths could be measured."""
    good = [row for row in rows if "failure" not in row]
    exponent = None
    if len(good) > 1:
        fitted = growth_exponent([r["seqlen"] for r in good], [r["backward_bytes"] for r in good])
        exponent = round(fitted, 4)
    shape = {"batch": BATCH, "nheads": NHEADS, "headdim": HEADDIM, "causal": True}
    return {
        "schema": SCHEMA,
        "benchmark": "memory",
        "environment": facts,
        "settings": {**shape, "dtype": "bfloat16"},
        "growth_exponent": exponent,
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
