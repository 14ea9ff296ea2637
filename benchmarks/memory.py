"""Measures the peak memory that forward and backward take beyond their inputs.

Attention that keeps its scores needs memory that grows with the square of the length; these
kernels need only what grows with the length. The exponent of the growth is fitted and recorded.
What backward takes beyond the gradients that it returns is its workspace, and has a bound: one
accumulator of dq in float32, two numbers for each row, small counters, and, where several heads of
queries share one of keys, accumulators of dk and dv: of each head of keys, in order of queries.

    python benchmarks/memory.py --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attention import backward_of, errors_of, is_wrong, reference_slice
from cells import Cell
from peers import make_inputs, make_ours
from recording import describe, new_result, write_json

# Not in their order: a run that is cut has the longest.
SEQLENS = (65536, 131072, 16384, 32768)
# Every byte beyond the inputs should be in proportion to the length.
LINEAR_BELOW = 1.05
# Counters, and what the allocator rounds up.
SMALL = 1 << 20


class Way(NamedTuple):
    """Causal self-attention whose memory is measured."""

    nheads: int
    nheads_k: int
    headdim: int
    packed: bool = False
    deterministic: bool = False

    @property
    def name(self) -> str:
        heads = f"{self.nheads} heads" if self.nheads == self.nheads_k else (
            f"{self.nheads}/{self.nheads_k} heads"
        )  # fmt: skip
        words = ["packed" if self.packed else "dense", heads, f"head dim {self.headdim}"]
        return ", ".join(words + ["deterministic"] * self.deterministic)

    def cell(self, tokens: int) -> Cell:
        """One sequence of ``tokens``, or three of half, a quarter and a quarter of them."""
        lengths = (tokens // 2, tokens // 4, tokens // 4) if self.packed else ()
        batch, longest = len(lengths) or 1, max(lengths, default=tokens)
        heads = (self.nheads, self.nheads_k)
        return Cell(self.headdim, True, longest, batch, *heads, lengths=lengths)


WAYS = (
    Way(8, 8, 64),
    Way(8, 8, 64, packed=True),
    Way(8, 8, 64, deterministic=True),
    Way(8, 8, 64, packed=True, deterministic=True),
    Way(8, 4, 128),
    Way(8, 4, 128, deterministic=True),
)


def allowed_bytes(cell: Cell, deterministic: bool = False) -> int:
    """What the workspace of backward may be; rows are counted in blocks of 128 a sequence.

    In order, query heads that share one of keys may be divided until each has sums of its own.

    Of packed sequences the operator's result softmax_d has a layout of its own, without those
    blocks, and is counted beside delta.
    """
    sequences = cell.lengths or (cell.seqlen,) * cell.batch
    rows = sum(sequences) + 128 * (len(sequences) + 1)
    columns = -(-cell.headdim // 64) * 64
    bound = 4 * cell.nheads * rows * (columns + 2)
    if cell.lengths:
        bound += 4 * cell.nheads * sum(sequences)
    if cell.kv_heads < cell.nheads:
        bound += 2 * 4 * (cell.nheads if deterministic else cell.kv_heads) * rows * columns
    return bound + SMALL


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


def measure(way: Way, tokens: int, device: str = "cuda") -> dict[str, Any]:
    """One row of the result file; what is wrong is not measured."""
    cell = way.cell(tokens)
    scores = 2 * cell.nheads * sum(n * n for n in cell.lengths or (cell.seqlen,))
    row: dict[str, Any] = {"way": way.name, "seqlen": tokens, "scores_bytes": scores}
    try:
        inputs = make_inputs(cell, torch.bfloat16, device)
        runner = make_ours(cell, inputs, way.deterministic)
        errors = errors_of(cell, runner, reference_slice(cell, inputs), backward=True)
        row["errors"] = {name: float(f"{value:.3e}") for name, value in errors.items()}
        if is_wrong(errors):
            return row | {"failure": f"wrong: relative errors {row['errors']}"}
        row["forward_bytes"] = peak_beyond(runner.call)
        row["backward_bytes"] = peak_beyond(backward_of(runner))
        gradients = sum(x.numel() * x.element_size() for x in runner.leaves)
        row["workspace_bytes"] = row["backward_bytes"] - gradients
        row["allowed_bytes"] = allowed_bytes(cell, way.deterministic)
    except Exception as error:  # out of memory, above all
        row["failure"] = describe(error)
    return row


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The exponent of backward's growth by way, where two or more lengths could be measured."""
    found: dict[str, float] = {}
    good = [row for row in rows if "failure" not in row]
    for way in dict.fromkeys(row["way"] for row in good):
        sizes = {row["seqlen"]: row["backward_bytes"] for row in good if row["way"] == way}
        if len(sizes) > 1:
            found[way] = round(growth_exponent(list(sizes), list(sizes.values())), 4)
    return found


def complaints(data: dict[str, Any]) -> list[str]:
    """What failed, what grows faster than the length, and what takes more than its bound."""
    found = [f"{row['way']}, {row['seqlen']}: {row['failure']}"
             for row in data["rows"] if "failure" in row]  # fmt: skip
    good = [row for row in data["rows"] if "failure" not in row]
    found += [f"{row['way']}, {row['seqlen']}: workspace of {row['workspace_bytes']} bytes, "
              f"allowed are {row['allowed_bytes']}"
              for row in good if row["workspace_bytes"] > row["allowed_bytes"]]  # fmt: skip
    found += [f"{way}: grows as length to the power of {power}"
              for way, power in data["growth"].items() if power > LINEAR_BELOW]  # fmt: skip
    return found + [f"not run: {name}" for name in data["left_out"]]


def line_of(row: dict[str, Any]) -> str:
    """A row for the terminal, in MiB."""
    if "failure" in row:
        return f"{row['way']:<44}{row['seqlen']:>8}  {row['failure'][:120]}"
    names = ("forward_bytes", "backward_bytes", "workspace_bytes", "allowed_bytes")
    figures = "".join(f"{row[name] / 2**20:>10.1f}" for name in names)
    return f"{row['way']:<44}{row['seqlen']:>8}{figures}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all ways and lengths; 0 if nothing is to complain about."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seqlens", default=",".join(map(str, SEQLENS)))
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="no new row after it")
    parser.add_argument("--out", type=Path, help="JSON file, written after every row")
    parser.add_argument("--commit", help="recorded instead of asking git")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU is visible", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference is float32
    data = new_result("memory", args.commit, {"causal": True, "dtype": "bfloat16"})
    data |= {"growth": {}, "left_out": [], "rows": []}
    until = time.monotonic() + args.max_seconds
    print(
        f"{'MiB':<44}{'tokens':>8}{'forward':>10}{'backward':>10}{'workspace':>10}{'allowed':>10}"
    )
    for seqlen in map(int, args.seqlens.split(",")):
        for way in WAYS:
            if time.monotonic() > until:
                data["left_out"].append(f"{way.name}, {seqlen}")
                continue
            data["rows"].append(measure(way, seqlen))
            data["growth"] = growth(data["rows"])
            print(line_of(data["rows"][-1]), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            if args.out is not None:
                write_json(args.out, data)
    if args.out is not None:
        write_json(args.out, data)
    found = complaints(data)
    print("\n".join([f"power of the length: {data['growth']}", *found]))
    return int(bool(found) or not data["growth"])


if __name__ == "__main__":
    sys.exit(main())
