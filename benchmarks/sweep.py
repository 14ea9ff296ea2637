"""Times candidate tile plans of our Triton kernels and ranks them.

The candidates come from a JSON file, by kernel; a field may hold one number or several, and
several stand for every combination:

    {"forward": [{"block_m": 128, "block_n": [64, 128], "num_warps": [4, 8], "num_stages": [2, 3]}],
     "dkdv": [...], "dq": [...]}

Head dims may differ: {"64": {"forward": ...}, "128": {...}}. A candidate for one of the backward
kernels is timed as the whole backward pass with the other kernel's plan left as it is. Candidates
that do not compile or that compute something else are named and not ranked.

    python benchmarks/sweep.py --plans FILE.json --cells d64-causal-s4096 --jobs 8
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from attention import errors_of, is_wrong, reference_slice
from cells import Cell, parse_cells
from peers import Runner, make_inputs, make_ours
from recording import SCHEMA, describe, environment, write_json
from report import geometric_mean
from timing import Clock, CudaClock, DeviceLostError, rotations

KERNELS = ("forward", "dkdv", "dq")
FIELDS = ("block_m", "block_n", "num_warps", "num_stages")
DEFAULT = "default"
Fields = dict[str, int]


def with_plan(kernel: str, fields: Fields | None) -> AbstractContextManager[None]:
    """Launch ``kernel`` with these plan fields inside a ``with`` block; None: its own."""
    from flash_attn.core.plan import TilePlan, override

    return override(**({} if fields is None else {kernel: TilePlan(**fields)}))


def expand(candidates: Sequence[dict[str, Any]]) -> list[Fields]:
    """Every combination of the fields that hold several numbers, without repetitions."""
    plans: list[Fields] = []
    for candidate in candidates:
        if set(candidate) != set(FIELDS):
            raise ValueError(f"a plan must have {', '.join(FIELDS)}, found {sorted(candidate)}")
        choices = [x if isinstance(x, list) else [x] for x in (candidate[f] for f in FIELDS)]
        for values in itertools.product(*choices):
            plan = dict(zip(FIELDS, values, strict=True))
            if plan not in plans:
                plans.append(plan)
    return plans


def plans_for(plans: dict[str, Any], headdim: int) -> dict[str, list[Fields]]:
    """The candidates for one head dim, by kernel."""
    by_kernel = plans if set(plans) <= set(KERNELS) else plans.get(str(headdim), {})
    if not set(by_kernel) <= set(KERNELS):
        raise ValueError(f"kernels are {', '.join(KERNELS)}, found {sorted(by_kernel)}")
    return {kernel: expand(candidates) for kernel, candidates in by_kernel.items()}


def label(fields: Fields) -> str:
    """``128x64w4s3``: tile, warps, stages."""
    m, n, warps, stages = (fields[name] for name in FIELDS)
    return f"{m}x{n}w{warps}s{stages}"


def calls_under_plan(
    runner: Runner, kernel: str, fields: Fields | None
) -> tuple[Runner, Callable[[], object]]:
    """The runner with the plan in force in its calls, and the call to time."""

    def call() -> torch.Tensor:
        with with_plan(kernel, fields):
            return runner.call()

    if kernel == "forward":
        return runner._replace(call=call), call
    out = runner.call()

    def backward() -> tuple[torch.Tensor, ...]:
        with with_plan(kernel, fields):
            return torch.autograd.grad(out, runner.leaves, runner.dout, retain_graph=True)

    return runner, backward


def check(
    cell: Cell, runner: Runner, kernel: str, fields: Fields | None, want: dict[str, torch.Tensor]
) -> dict[str, float]:
    """The errors of the results under the plan; the gradients' only for a backward kernel."""
    with with_plan(kernel, fields):
        return errors_of(cell, runner, want, backward=kernel != "forward")


def time_kernel(
    cell: Cell, kernel: str, plans: Sequence[Fields], clock: Clock, rounds: int
) -> dict[str, Any]:
    """Median milliseconds by label, fastest first, and what was left out for which reason."""
    inputs = make_inputs(cell, torch.bfloat16, "cuda") if isinstance(clock, CudaClock) else None
    inputs = inputs or make_inputs(cell, torch.float32, "cpu")
    runner, want = make_ours(cell, inputs), reference_slice(cell, inputs)
    named: dict[str, Fields | None] = {DEFAULT: None, **{label(p): p for p in plans}}
    calls: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            failures[name] = describe(error)
            calls.pop(name, None)
            try:
                clock.synchronize()
            except Exception as lost:
                raise DeviceLostError(f"{name}: {describe(lost)}") from error
            return None

    for name, fields in named.items():
        errors = attempt(name, lambda fields=fields: check(cell, runner, kernel, fields, want))
        if errors is not None and is_wrong(errors):
            failures[name] = f"wrong: relative errors {errors}"
        elif errors is not None:
            calls[name] = calls_under_plan(runner, kernel, fields)[1]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for order in rotations(list(calls), rounds):
        for name in filter(calls.__contains__, order):
            value = attempt(name, lambda name=name: clock.measure(calls[name]))
            if value is not None:
                times[name].append(value)
    medians = {name: statistics.median(times[name]) for name in calls}
    ranked = dict(sorted(medians.items(), key=lambda item: item[1]))
    return {"cell": cell.name, "kernel": kernel, "median_ms": ranked, "failures": failures}


def overall(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each kernel, head dim and mask: the speed over the default plan by label, best first.

    Only plans that were timed in every such cell are compared.
    """
    groups: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        times = row["median_ms"]
        if DEFAULT in times:
            key = f"{row['kernel']} {row['cell'].rsplit('-', 1)[0]}"
            groups.setdefault(key, []).append({n: times[DEFAULT] / t for n, t in times.items()})
    result = {}
    for key, speeds in groups.items():
        shared = set.intersection(*(set(x) for x in speeds))
        means = {name: geometric_mean(x[name] for x in speeds) for name in shared}
        result[key] = dict(sorted(means.items(), key=lambda item: -item[1]))
    return result


def work(cells: Sequence[Cell], plans: dict[str, Any]) -> Iterator[tuple[Cell, str, list[Fields]]]:
    """Everything to time, as (cell, kernel, candidates)."""
    for cell in cells:
        for kernel, candidates in plans_for(plans, cell.headdim).items():
            yield cell, kernel, candidates


def compile_one(cell: Cell, kernel: str, plan: Fields) -> None:
    """Run a candidate once, so that its compiled kernel lies in Triton's cache."""
    try:
        runner = make_ours(cell, make_inputs(cell, torch.bfloat16, "cuda"))
        calls_under_plan(runner, kernel, plan)[1]()
        torch.cuda.synchronize()
    except Exception as error:  # the sweep itself meets it again and records it
        print(f"{cell.name} {kernel} {label(plan)}: {describe(error)[:120]}", flush=True)


def compile_share(cells: Sequence[Cell], plans: dict[str, Any], share: str) -> None:
    """Compile every n-th candidate from the i-th on, for a share of ``i/n``."""
    index, count = map(int, share.split("/"))
    # The length is no part of what Triton specialises on: one cell of a kind stands for all.
    kinds = list({(cell.headdim, cell.causal): cell for cell in cells}.values())
    every = [(cell, kernel, plan) for cell, kernel, ps in work(kinds, plans) for plan in ps]
    for cell, kernel, plan in every[index::count]:
        compile_one(cell, kernel, plan)


def compile_in_parallel(jobs: int) -> None:
    """Start ``jobs`` processes with a share of the compilations each, and wait for them."""
    base = [sys.executable, __file__, *sys.argv[1:]]
    children = [subprocess.Popen([*base, "--share", f"{i}/{jobs}"]) for i in range(jobs)]
    for child in children:
        child.wait()


def show(row: dict[str, Any], cell: Cell, best: int) -> None:
    """Print the fastest candidates of one row."""
    which = "fwd" if row["kernel"] == "forward" else "bwd"
    for name, ms in itertools.islice(row["median_ms"].items(), best):
        print(f"  {name:<16}{ms:9.4f} ms {cell.flops(which) / ms / 1e9:7.0f} TFLOP/s")
    for name, text in row["failures"].items():
        print(f"  !! {name}: {text[:140]}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plans", type=Path, required=True, help="JSON file of candidates")
    parser.add_argument("--cells", default="portable", type=parse_cells, help="portable, or a list")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of one measurement")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile beforehand")
    parser.add_argument("--best", type=int, default=5, help="how many to print of each ranking")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="no new cell after it")
    parser.add_argument("--out", type=Path, help="JSON file, written after every ranking")
    parser.add_argument("--commit", help="recorded instead of asking git")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Sweep; 0 if everything was timed."""
    from flash_attn import use_backend

    args = parse_arguments()
    with use_backend("triton"):  # whose plans these are
        return run(args)


def run(args: argparse.Namespace) -> int:
    plans = json.loads(args.plans.read_text())
    todo = list(work(args.cells, plans))
    if not torch.cuda.is_available():
        print("no GPU is visible", file=sys.stderr)
        return 2
    if args.share:
        compile_share(args.cells, plans, args.share)
        return 0
    began, rows = time.monotonic(), []
    if args.jobs:
        compile_in_parallel(args.jobs)
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference is float32
    clock = CudaClock(args.budget)
    data: dict[str, Any] = {"schema": SCHEMA, "benchmark": "sweep", "rows": rows, "overall": {}}
    data["environment"] = environment(args.commit)
    for cell, kernel, candidates in todo:
        if time.monotonic() - began > args.max_seconds:
            print("out of time", flush=True)
            break
        print(f"[{time.monotonic() - began:4.0f}s] {cell.name} {kernel}", flush=True)
        rows.append(time_kernel(cell, kernel, candidates, clock, args.rounds))
        show(rows[-1], cell, args.best)
        data["overall"] = overall(rows)
        if args.out is not None:
            write_json(args.out, data)
        torch.cuda.empty_cache()
    for key, speeds in data["overall"].items():
        best = itertools.islice(speeds.items(), args.best)
        print(f"{key}: " + ", ".join(f"{name} {speed:.3f}" for name, speed in best))
    return int(len(rows) < len(todo))


if __name__ == "__main__":
    sys.exit(main())
