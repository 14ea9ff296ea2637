"""Times this package beside other attention kernels: PyTorch's, FlashAttention-3 and -4.

Every cell first compares each provider with a float32 computation of a slice; a provider that is
wrong is reported and not timed. The others are timed in turns in one process, in an order that
rotates from round to round, with device events and with the L2 cache flushed before every run.
Forward is the forward call of a training step (gradients enabled, log-sum-exp kept); backward is
one ``torch.autograd.grad`` call on a retained graph, which accumulates into nothing.

    python benchmarks/attention.py --out benchmarks/results/NAME.json
    python benchmarks/attention.py --cells d64-causal-s4096,d128-full-s1024-b2-h8 --pass fwd
    python benchmarks/attention.py --cells grid --providers ours,cudnn,fa3,fa4 --peers FOLDER

Groups of cells, and cells by name: ``cells.py``. Where the peers lie: ``peers.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cells import BESIDE, Cell, fields_of, parse_cells
from options import existing_folder, names_among
from peers import PROVIDERS, Inputs, Maker, Runner, add_peers, make_inputs
from recording import describe, new_result, write_json
from timing import Clock, CudaClock, DeviceLostError, HostClock, rotations
from torch import Tensor

PASSES = ("fwd", "bwd")
# Correct bf16 kernels are at 2e-3 to 4e-3 in the Frobenius norm.
WRONG_ABOVE = 1e-2


def backward_of(runner: Runner) -> Callable[[], tuple[Tensor, ...]]:
    """The backward call alone, on a graph that is built once and kept."""
    out = runner.call()
    return lambda: torch.autograd.grad(out, runner.leaves, runner.dout, retain_graph=True)


@contextlib.contextmanager
def recorded_plans() -> Iterator[dict[str, dict[str, Any]]]:
    """Collects, by kernel, the plans that our kernels for GPUs launch with inside the block."""
    from flash_attn.backends.triton import heuristics

    modules: list[Any] = [heuristics]
    with contextlib.suppress(ImportError):  # this Triton may not know Gluon
        from flash_attn.backends.sm90 import launch, launch_backward

        modules += [launch, launch_backward]
    plans: dict[str, dict[str, Any]] = {}

    def record(key: Any, plan: Any) -> None:
        plans[str(key[0])] = plan._asdict() if hasattr(plan, "_asdict") else dict(vars(plan))

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "report", record))
        yield plans


# ------------------------------------------------------------------------------- correctness
def reference(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, left: int | None = None
) -> dict[str, Tensor]:
    """Output and gradients by definition, in blocks of rows, in the dtype of the inputs.

    Args:
        q, dout: (nheads, seqlen, headdim), float32 or float64.
        k, v: (nheads_k, seqlen, headdim).
        left: keys before its own that a query sees.
    """
    group = q.shape[0] // k.shape[0]
    keys, values = (x.repeat_interleave(group, 0) for x in (k, v))
    scale, seqlen, block = q.shape[-1] ** -0.5, q.shape[-2], 2048
    out, dq, dk, dv = (torch.zeros_like(q) for _ in range(4))
    columns = torch.arange(seqlen, device=q.device)
    for start in range(0, seqlen, block):
        rows = slice(start, min(start + block, seqlen))
        scores = q[:, rows] @ keys.mT * scale
        if causal:
            scores = scores.masked_fill(columns > columns[rows, None], -math.inf)
        if left is not None:
            scores = scores.masked_fill(columns < columns[rows, None] - left, -math.inf)
        p = scores.softmax(-1)
        out[:, rows] = p @ values
        delta = (out[:, rows] * dout[:, rows]).sum(-1, keepdim=True)
        ds = p * (dout[:, rows] @ values.mT - delta) * scale
        dq[:, rows] = ds @ keys
        dk += ds.mT @ q[:, rows]
        dv += p.mT @ dout[:, rows]
    dk, dv = (x.unflatten(0, (-1, group)).sum(1) for x in (dk, dv))
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def _slice(x: Tensor, cell: Cell, name: str, heads_first: bool = False) -> Tensor:
    """The last sequence of a tensor as (some heads, seqlen, headdim) in float32.

    The heads are the first and the last of keys, and the queries' that belong to them.
    """
    x = x.detach()
    x = x[-cell.lengths[-1] :] if cell.lengths else x[-1]
    heads = x if heads_first else x.transpose(0, 1)
    count = 1 if name in ("k", "v", "dk", "dv") else cell.nheads // cell.kv_heads
    return torch.cat([heads[:count], heads[-count:]]).float()


def reference_slice(cell: Cell, inputs: Inputs) -> dict[str, Tensor]:
    """What :func:`errors_of` compares with."""
    parts = [_slice(x, cell, name) for name, x in inputs._asdict().items()]
    return reference(*parts, causal=cell.causal, left=cell.left)


def errors_of(
    cell: Cell, runner: Runner, want: dict[str, Tensor], backward: bool
) -> dict[str, float]:
    """Relative Frobenius errors of the slice; not finite if any element of a result is not."""
    out = runner.call()
    results = {"out": out}
    if backward:
        grads = torch.autograd.grad(out, runner.leaves, runner.dout)
        results.update(zip(("dq", "dk", "dv"), grads, strict=True))
    errors = {}
    for name, value in results.items():
        difference = _slice(value, cell, name, runner.heads_first) - want[name]
        error = (difference.norm() / want[name].norm()).item()
        errors[name] = error if bool(torch.isfinite(value).all()) else math.inf
    return errors


def is_wrong(errors: dict[str, float]) -> bool:
    """Whether any result is off by more than rounding explains; NaN is."""
    return not all(error <= WRONG_ABOVE for error in errors.values())


# ----------------------------------------------------------------------------------- running
def _survive(clock: Clock, failures: dict[str, str], key: str, error: Exception) -> None:
    """Record a failure and go on, unless the device no longer answers."""
    failures[key] = describe(error)
    try:
        clock.synchronize()
    except Exception as lost:
        raise DeviceLostError(describe(lost)) from error


@dataclass
class Session:
    """What all cells of one run share."""

    clock: Clock
    providers: Sequence[str]
    passes: Sequence[str]
    rounds: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    makers: dict[str, Maker] = field(default_factory=lambda: PROVIDERS)

    def run_cell(self, cell: Cell, record: dict[str, Any]) -> None:
        """Check and time every provider; ``record`` is filled as results come in."""
        dtype = torch.float16 if cell.dtype == "float16" else self.dtype
        inputs = make_inputs(cell, dtype, self.device)
        want = reference_slice(cell, inputs)
        runners: dict[str, dict[str, Runner]] = {which: {} for which in PASSES}
        for name in self.providers:
            try:
                runner, served = self._checked(name, cell, inputs, want, record)
            except Exception as error:
                _survive(self.clock, record["failures"], name, error)
                continue
            for which in served:
                runners[which][name] = runner
        for which in self.passes:
            self._time_pass(cell, which, runners[which], record)

    def _checked(
        self, name: str, cell: Cell, inputs: Inputs, want: dict[str, Tensor], record: dict[str, Any]
    ) -> tuple[Runner, Sequence[str]]:
        """The provider on this cell, and the passes to time: none if it is wrong."""
        runner = self.makers[name](cell, inputs)
        mine = name in ("ours", "ordered") and inputs.q.is_cuda
        plans = recorded_plans() if mine else None
        with plans or contextlib.nullcontext() as used:
            errors = errors_of(cell, runner, want, backward=False)
            served = self.passes
            if "bwd" in self.passes:
                try:
                    errors = errors_of(cell, runner, want, backward=True)
                except Exception as error:  # forward may be served nevertheless
                    _survive(self.clock, record["failures"], f"{name}/bwd", error)
                    served = [which for which in self.passes if which != "bwd"]
        if used:
            record["plans"] = used | record["plans"]
        record["errors"][name] = {key: float(f"{value:.3e}") for key, value in errors.items()}
        if not is_wrong(errors):
            return runner, served
        record["failures"][name] = f"wrong: relative errors {record['errors'][name]}"
        return runner, ()

    def _prepare(
        self, which: str, name: str, runner: Runner, failures: dict[str, str]
    ) -> Callable[[], object] | None:
        """The call to time, or None if its graph cannot be built."""
        try:
            return runner.call if which == "fwd" else backward_of(runner)
        except Exception as error:
            _survive(self.clock, failures, f"{name}/{which}", error)
            return None

    def _time_pass(
        self, cell: Cell, which: str, runners: dict[str, Runner], record: dict[str, Any]
    ) -> None:
        prepared = {
            name: self._prepare(which, name, runner, record["failures"])
            for name, runner in runners.items()
        }
        calls = {name: call for name, call in prepared.items() if call is not None}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for order in rotations(list(calls), self.rounds):
            for name in order:
                if name not in calls:
                    continue
                try:
                    times[name].append(self.clock.measure(calls[name]))
                except Exception as error:
                    del calls[name]
                    _survive(self.clock, record["failures"], f"{name}/{which}", error)
        for name in calls:
            median = statistics.median(times[name])
            record["passes"].setdefault(which, {})[name] = {
                "median_ms": round(median, 5),
                "rounds_ms": [round(value, 5) for value in times[name]],
                "tflops": round(cell.flops(which) / median / 1e9, 2),
            }


def new_record(cell: Cell) -> dict[str, Any]:
    """A cell of the result file, before anything was run."""
    beside = {"beside": BESIDE[cell.name]} if cell.name in BESIDE else {}
    parts: dict[str, Any] = {"passes": {}, "errors": {}, "failures": {}, "plans": {}}
    return {"name": cell.name, **fields_of(cell), **beside, **parts}


def progress(record: dict[str, Any], elapsed: float) -> str:
    """One line on a cell that is done."""
    parts = [f"[{elapsed:4.0f}s] {record['name']:<20}"]
    for which, rows in record["passes"].items():
        parts.append(which + " " + " ".join(f"{n} {row['tflops']:.0f}" for n, row in rows.items()))
    parts += [f"!! {name}: {text[:120]}" for name, text in record["failures"].items()]
    return "  ".join(parts)


def run(session: Session, cells: Sequence[Cell], data: dict[str, Any], args: Any) -> None:
    """Run all cells, writing ``data`` after each, until done or out of time."""
    began = time.monotonic()
    for index, cell in enumerate(cells):
        if time.monotonic() - began > args.max_seconds:
            data["left_out"] = [left.name for left in cells[index:]]
            print("out of time; left out:", ", ".join(data["left_out"]), flush=True)
            break
        record = new_record(cell)
        data["cells"].append(record)
        try:
            session.run_cell(cell, record)
        except DeviceLostError as error:
            record["failures"]["device"] = str(error)
            data["left_out"] = [left.name for left in cells[index + 1 :]]
            break
        except Exception as error:  # the inputs or the reference; the next cell may fit
            record["failures"]["cell"] = describe(error)
        finally:
            gc.collect()
            if args.out is not None:
                write_json(args.out, data)
            print(progress(record, time.monotonic() - began), flush=True)
        if session.device == "cuda":
            torch.cuda.empty_cache()
    data["complete"] = not data["left_out"]
    data["seconds"] = round(time.monotonic() - began, 1)
    if args.out is not None:
        write_json(args.out, data)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; names that do not exist end the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", default="portable", type=parse_cells, help="groups and names")
    parser.add_argument("--pass", dest="passes", default="fwd,bwd", type=names_among(PASSES))
    parser.add_argument("--providers", default="ours,flex,flash,cudnn", type=names_among(PROVIDERS))
    parser.add_argument("--peers", type=existing_folder, help="of FlashAttention-3 and -4")
    parser.add_argument("--title", default="", help="of the README's section")
    parser.add_argument("--backend", default="auto", help="of ours, as flash_attn.set_backend")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of a cell")
    parser.add_argument("--budget", type=float, default=0.05, help="seconds of one measurement")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="no new cell after it")
    parser.add_argument("--out", type=Path, help="JSON file, written after every cell")
    parser.add_argument("--commit", help="recorded instead of asking git")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try out")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, found {args.rounds}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if every cell was timed without a failure."""
    args = parse_arguments(arguments)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("no GPU is visible", file=sys.stderr)
        return 2
    if args.peers is not None:
        add_peers(args.peers)
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference is float32
    clock = CudaClock(args.budget) if on_gpu else HostClock()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    session = Session(clock, args.providers, args.passes, args.rounds, dtype, args.device)
    settings = {
        "rounds": args.rounds,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": args.backend,
        "title": args.title,
    }
    data = new_result("attention", args.commit, settings)
    data |= {"complete": False, "left_out": [], "cells": []}
    print(" ".join(f"{key}={value}" for key, value in data["environment"].items()), flush=True)
    from flash_attn import use_backend

    with use_backend(args.backend):
        run(session, args.cells, data, args)
    from report import summary_lines

    print("\n".join(summary_lines(data)), flush=True)
    return 0 if data["complete"] and not any(c["failures"] for c in data["cells"]) else 1


if __name__ == "__main__":
    sys.exit(main())
