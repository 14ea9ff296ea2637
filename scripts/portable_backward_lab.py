#!/usr/bin/env python
"""Checks and times tiles of the portable backward kernels on a GPU, in one call with a deadline.

    PYTHONPATH=src python scripts/portable_backward_lab.py --deadline 90
    PYTHONPATH=src python scripts/portable_backward_lab.py --headdims 256 --seqlens 4096
    PYTHONPATH=src python scripts/portable_backward_lab.py --compile-only     # no GPU needed

A candidate is one kernel with one plan: "dkdv" makes both gradients of the keys' side, "dk" and
"dv" one of them, "dq" that of the queries. 1. All are compiled in parallel, for sm_90 wherever this
runs; what spills, needs too much shared memory or fails is left out, but for present plans. 2. One
process checks each candidate against float64 on small awkward shapes and then times those that
passed, interleaved, beside PyTorch's FlashAttention-2; the L2 cache is flushed before each run. If
a kernel hangs or breaks the process, it is left out and another process goes on without it.
The table names the kernels' medians and the best sum.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "compile"), str(ROOT / "src"), str(ROOT / "scripts")]
TOKENS, HIDDEN, MARK = 16384, 2048, "@@"
# Awkward problems, by name: queries, keys, query heads, key heads, causal.
CHECKS = ((113, 203, 4, 2, False), (301, 203, 2, 2, True), (129, 129, 2, 1, True))


class Candidate(NamedTuple):
    """A plan (BLOCK_M, BLOCK_N, warps, stages) of one kernel at one padded head dim."""

    kernel: str
    block_d: int
    plan: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """As the table prints it."""
        return f"{self.kernel} {'x'.join(map(str, self.plan[:2]))} {self.plan[2]}w {self.plan[3]}s"


_WIDE = {
    "dkdv": [(32, 32, 8, 2), (64, 32, 8, 2)],
    "dk": [(32, 128, 8, 2), (16, 128, 8, 2), (32, 64, 8, 2)],
    "dv": [(32, 128, 8, 2), (64, 64, 8, 2)],
    "dq": [(64, 32, 8, 2), (128, 32, 8, 2), (128, 16, 8, 2)],
}
_CONTROL = {"dk": [(64, 128, 8, 2)], "dv": [(64, 128, 8, 2)]}


def present(headdim: int, is_causal: bool) -> dict[str, tuple[int, int, int, int]]:
    """The plans that the package takes on sm_90, by kernel."""
    import triton

    from flash_attn.backends.triton.heuristics import dkdv_kernels, plan_for
    from flash_attn.core.plan import PlanKey

    version = tuple(int(x) for x in triton.__version__.split(".")[:2])
    block_d = 256 if headdim > 128 else 128
    key = PlanKey(
        "dkdv", "sm90", version, 2, block_d, is_causal, False, block_dv=block_d,
        padded=headdim < block_d,
    )  # fmt: skip
    plans = {one: plan_for(key._replace(kernel=one)) for one in (*dkdv_kernels(key), "dq")}
    return {
        one: (plan.block_m, plan.block_n, plan.num_warps, plan.num_stages)
        for one, plan in plans.items()
    }


def candidates(headdims: list[int]) -> list[Candidate]:
    """What is compared: the present plans first."""
    found: dict[Candidate, None] = {}
    for d in headdims:
        block_d = 256 if d > 128 else 128
        for is_causal in (False, True):
            for kernel, plan in present(d, is_causal).items():
                found[Candidate(kernel, block_d, plan)] = None
        for kernel, plans in (_WIDE if block_d == 256 else _CONTROL).items():
            found.update(dict.fromkeys(Candidate(kernel, block_d, plan) for plan in plans))
    return list(found)


# ---------------------------------------------------------------------------------------- problems
class Cell:
    """A problem with all that its launches need; ``run(candidate)`` launches one kernel."""

    def __init__(self, shape: tuple[int, int, int, int, int], headdim: int, causal: bool,
                 device: str, batch: int) -> None:  # fmt: skip
        import torch

        from flash_attn.backends.triton import launch
        from flash_attn.core.problem import (
            AttentionProblem,
            BackwardInputs,
            Visibility,
            make_transform,
        )

        seqlen_q, seqlen_k, heads, heads_k, _ = shape
        self.torch, self.causal = torch, causal

        def draw(rows: int, count: int) -> Any:
            x = torch.empty(batch, rows, count, headdim, dtype=torch.bfloat16, device=device)
            return x if device == "meta" else x.normal_()

        self.q, self.dout = draw(seqlen_q, heads), draw(seqlen_q, heads)
        self.k, self.v = draw(seqlen_k, heads_k), draw(seqlen_k, heads_k)
        self.out = torch.empty_like(self.q)
        self.lse = torch.empty(batch, heads, seqlen_q, device=device)
        self.gradients = [torch.empty_like(x) for x in (self.q, self.k, self.v)]
        visibility = Visibility(None, 0 if causal else None)
        self.problem = AttentionProblem(self.q, self.k, self.v, make_transform(headdim), visibility)
        state = torch.zeros(2, dtype=torch.int64, device=device)
        self.inputs = BackwardInputs(self.dout, self.out, self.lse, *self.gradients, state)
        self.facts = launch.facts_of(self.problem)

    def prepare(self) -> None:
        """Row statistics, once out and lse are there."""
        from flash_attn.backends.triton import launch_backward
        from flash_attn.core.outputs import softmax_d_shape

        shape = softmax_d_shape(self.problem)
        self.statistics = [
            self.torch.empty(shape, device=self.q.device, dtype=self.torch.float32)
            for _ in range(2)
        ]
        delta, lse_log2 = self.statistics
        launch_backward._launch_row_statistics(
            self.problem, self.inputs, self.facts, delta, lse_log2
        )

    def run(self, one: Candidate) -> None:
        """Launch the kernel of ``one``."""
        from flash_attn.backends.triton import launch_backward
        from flash_attn.core.plan import TilePlan, override

        delta, lse_log2 = self.statistics
        common = launch_backward._common_arguments(self.problem, self.inputs, self.facts)
        arguments = (self.problem, self.inputs, self.facts, lse_log2, delta, common)
        with override(**{one.kernel: TilePlan(*one.plan)}):
            if one.kernel == "dq":
                launch_backward._launch_dq(*arguments)
            else:
                launch_backward._launch_dkdv(one.kernel, *arguments)

    def reference(self, dtype: Any) -> list[Any]:
        """[dq, dk, dv] by plain products in ``dtype``; fills out and lse."""
        torch, group = self.torch, self.q.shape[2] // self.k.shape[2]
        q, k, v, do = (x.to(dtype).transpose(1, 2) for x in (self.q, self.k, self.v, self.dout))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scale, (m, n) = q.shape[-1] ** -0.5, (q.shape[-2], k.shape[-2])
        s = (q @ k.transpose(-1, -2)).double() * scale
        if self.causal:
            seen = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
            s = s.masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(s, -1)
        p = torch.exp(s - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        out = p.to(dtype) @ v
        delta = (do.double() * out.double()).sum(-1, keepdim=True)
        ds = (p * ((do @ v.transpose(-1, -2)).double() - delta)).to(dtype)
        self.out.copy_(out.transpose(1, 2))
        self.lse.copy_(lse)
        dv, dk = p.to(dtype).transpose(-1, -2) @ do, (ds.transpose(-1, -2) @ q) * scale
        dk, dv = (x.double().unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
        return [x.transpose(1, 2) for x in ((ds @ k) * scale, dk, dv)]


_MADE = {"dq": (0,), "dk": (1,), "dv": (2,), "dkdv": (1, 2)}


class Check:
    """One awkward problem at one head dim, with its references."""

    def __init__(self, shape: tuple[int, int, int, int, int], headdim: int) -> None:
        import torch

        self.cell = Cell(shape, headdim, shape[4], "cuda", 2)
        self.same = self.cell.reference(torch.bfloat16)
        self.exact = self.cell.reference(torch.float64)
        self.cell.prepare()

    def complaint(self, one: Candidate) -> str:
        """What is wrong with ``one``: errors beyond three times those of plain bfloat16."""
        cell, torch = self.cell, self.cell.torch
        for _ in range(2):
            for x in cell.gradients:
                x.fill_(float("nan"))
            cell.run(one)
            torch.cuda.synchronize()
            for i in _MADE[one.kernel]:
                error = (cell.gradients[i].double() - self.exact[i]).flatten()
                other, exact = (self.same[i].double() - self.exact[i]).flatten(), self.exact[i]
                for order in (2, float("inf")):
                    size = torch.linalg.vector_norm(exact, order)
                    limit = 3.0 * torch.linalg.vector_norm(other, order) + 4e-3 * size
                    found = torch.linalg.vector_norm(error, order)
                    if not bool(found <= limit):
                        return f"{'qkv'[i]} norm {order}: {float(found):.2e} > {float(limit):.2e}"
        return ""


# ----------------------------------------------------------------------------------------- workers
def emit(**event: Any) -> None:
    """One line to the parent."""
    print(MARK + json.dumps(event), flush=True)


def compile_worker() -> None:
    """Compile the candidates named on stdin for all head dims and masks; nothing is launched."""
    import aot

    for headdim, is_causal, fields in json.loads(sys.stdin.readline()):
        one = Candidate(fields[0], fields[1], tuple(fields[2]))
        cell = Cell((256, 256, 8, 8, False), headdim, is_causal, "meta", 4)

        def launches(cell: Cell = cell, one: Candidate = one) -> None:
            cell.prepare()
            cell.run(one)

        try:
            _, compiled = aot.compile_kernel(aot.record(launches, "sm90")[-1], "sm90")
            # A cache may hold machine code and its description alone: no more is looked at.
            used = aot.Resources(*aot.usage_of(compiled, "sm90"), compiled.metadata.shared, 0.0)
            emit(event="compiled", headdim=headdim, causal=is_causal, candidate=fields,
                 failures=used.failures("sm90"), registers=used.registers, spilled=used.spilled,
                 shared=used.shared)  # fmt: skip
        except Exception as error:  # whatever the compiler raises
            emit(event="compiled", headdim=headdim, causal=is_causal, candidate=fields,
                 failures=[repr(error)[-120:]])  # fmt: skip


def gpu_worker() -> None:
    """Check and time what stdin names, emitting each result as soon as it is there."""
    import torch

    job = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    try:
        passed = {}
        for headdim in job["headdims"]:
            passed[headdim] = _check(job, headdim)
        for headdim in job["headdims"]:
            for seqlen in job["seqlens"]:
                for is_causal in (True, False):
                    _time(job, passed[headdim], headdim, seqlen, is_causal)
        emit(event="done")
    except BaseException:
        emit(event="error", text=traceback.format_exc()[-600:])
    sys.stdout.flush()
    os._exit(0)


def _check(job: dict[str, Any], headdim: int) -> list[tuple[Candidate, bool]]:
    """The (candidate, causal) that are right."""
    wanted = [
        (Candidate(kernel, block_d, tuple(plan)), is_causal)
        for d, is_causal, (kernel, block_d, plan) in job["candidates"]
        if d == headdim
    ]
    emit(event="stage", at=[headdim, None, None], limit=15)
    checks = [Check(shape, headdim) for shape in CHECKS]
    right = []
    for one, is_causal in wanted:
        emit(event="stage", at=[headdim, is_causal, one], limit=8)
        found = [c.complaint(one) for c in checks if c.cell.causal == is_causal]
        emit(event="checked", headdim=headdim, causal=is_causal, candidate=one, wrong=found)
        if not any(found):
            right.append((one, is_causal))
    return right


def _time(job: dict[str, Any], passed: list[tuple[Candidate, bool]], headdim: int, seqlen: int,
          is_causal: bool) -> None:  # fmt: skip
    """Medians of the candidates for one problem, interleaved, and of PyTorch's whole backward."""
    import torch

    batch, heads = TOKENS // seqlen, HIDDEN // headdim
    cell = Cell((seqlen, seqlen, heads, heads, is_causal), headdim, is_causal, "cuda", batch)
    turned = [x.transpose(1, 2) for x in (cell.q, cell.k, cell.v)]
    flash = torch.ops.aten._scaled_dot_product_flash_attention(*turned, 0.0, is_causal, False)
    cell.out.copy_(flash[0].transpose(1, 2))
    cell.lse.copy_(flash[1][..., :seqlen])
    cell.prepare()
    runs: dict[str, Callable[[], object]] = {"torch": _torch_backward(cell, turned, is_causal)}
    runs["statistics"] = cell.prepare
    for one, causal in passed:
        if causal == is_causal:
            runs[one.name] = lambda one=one: cell.run(one)
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        emit(event="stage", at=[headdim, is_causal, name], limit=8)
        run()
        torch.cuda.synchronize()
    emit(event="stage", at=[headdim, is_causal, None], limit=20)
    for _ in range(job["rounds"]):
        marks = {}
        for name, run in runs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            marks[name] = (start, end)
        torch.cuda.synchronize()
        for name, (start, end) in marks.items():
            times[name].append(start.elapsed_time(end))
    flops = 10.0 * batch * heads * seqlen * seqlen * headdim / (2 if is_causal else 1)
    medians = {name: statistics.median(values) for name, values in times.items()}
    emit(event="time", headdim=headdim, seqlen=seqlen, causal=is_causal, ms=medians, flops=flops)


def _torch_backward(cell: Cell, turned: list[Any], is_causal: bool) -> Callable[[], object]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    leaves = [x.detach().requires_grad_() for x in turned]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=is_causal)
    dout = cell.dout.transpose(1, 2)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


# ------------------------------------------------------------------------------------------ parent
class Process:
    """A child whose events arrive in a queue."""

    def __init__(self, role: str, job: Any) -> None:
        self.child = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--role", role],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(job) + "\n")
        self.child.stdin.close()
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.tail: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith(MARK):
                self.events.put(json.loads(line[len(MARK) :]))
            else:
                self.tail = [*self.tail, line.rstrip()[:200]][-5:]
        self.events.put({"event": "end"})

    def stop(self) -> None:
        """End it, whatever it does."""
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            return


class Parent:
    """Runs all and keeps what was found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.compiled: dict[str, dict[str, Any]] = {}
        self.out: dict[str, str] = {}  # candidates that are left out, and why
        self.times: dict[str, dict[str, Any]] = {}

    def left(self) -> float:
        """Seconds until the deadline."""
        return float(self.options.deadline) - (time.monotonic() - STARTED)

    def jobs(self) -> Iterator[tuple[int, bool, Candidate]]:
        """All (head dim, causal, candidate)."""
        for d in self.options.headdims:
            for one in candidates([d]):
                for is_causal in (False, True):
                    yield d, is_causal, one

    def compile_all(self) -> None:
        """Compile in parallel; what fails is left out."""
        jobs = list(self.jobs())
        count = self.options.processes or max(1, len(os.sched_getaffinity(0)) - 1)
        children = [Process("compile", jobs[i::count]) for i in range(min(count, len(jobs)))]
        until = time.monotonic() + 0.5 * self.left()
        for child in children:
            while True:
                try:
                    limit = 1e9 if self.options.compile_only else until - time.monotonic()
                    event = child.events.get(timeout=max(0.1, limit))
                except queue.Empty:
                    break
                if event["event"] == "end":
                    break
                key = _key(event["headdim"], event["causal"], event["candidate"])
                self.compiled[key] = event
            child.stop()
        for d, is_causal, one in jobs:
            found = self.compiled.get(_key(d, is_causal, one))
            is_present = one.plan == present(d, is_causal).get(one.kernel)
            if found is None:
                self.out[_key(d, is_causal, one)] = "not compiled in time"
            elif found["failures"] and not is_present:
                self.out[_key(d, is_causal, one)] = ", ".join(found["failures"])
        print(f"[{time.monotonic() - STARTED:.0f}s] {len(self.compiled)} of {len(jobs)} compiled, "
              f"{len(self.out)} left out", flush=True)  # fmt: skip

    def measure(self) -> None:
        """Check and time; after a hang or a crash once more without what caused it."""
        for _ in range(4):
            todo = [job for job in self.jobs() if _key(*job) not in self.out]
            job = {"candidates": todo, "headdims": self.options.headdims,
                   "seqlens": self.options.seqlens, "rounds": self.options.rounds}  # fmt: skip
            if self._measure_once(Process("gpu", job)) or self.left() < 15.0:
                return

    def _measure_once(self, process: Process) -> bool:
        """Whether all was measured, or time is over."""
        at, limit = [None, None, None], 40.0
        try:
            while True:
                try:
                    event = process.events.get(timeout=max(0.1, min(limit, self.left() - 2.0)))
                except queue.Empty:
                    return self._blame(at, "hung") if self.left() > 3.0 else True
                kind = event["event"]
                if kind == "stage":
                    at, limit = event["at"], event["limit"]
                elif kind == "checked" and any(event["wrong"]):
                    key = _key(event["headdim"], event["causal"], event["candidate"])
                    self.out[key] = "WRONG " + "; ".join(filter(None, event["wrong"]))
                elif kind == "time":
                    self.times[f"{event['headdim']} {event['seqlen']} {event['causal']}"] = event
                elif kind == "done":
                    return True
                elif kind in ("error", "end"):
                    print(kind, at, event.get("text", process.tail))
                    return self._blame(at, kind)
        finally:
            process.stop()

    def _blame(self, at: list[Any], what: str) -> bool:
        """Leave out what ran; True if nothing can be blamed."""
        headdim, is_causal, one = at
        for d, causal, candidate in self.jobs():
            if (d, causal) == (headdim, is_causal) and one in (candidate.name, [*candidate[:2],
               list(candidate.plan)]):  # fmt: skip
                self.out[_key(d, causal, candidate)] = what
                return False
        print("nothing to blame for", what, at)
        return True

    def table(self) -> None:
        """Times of each cell: kernels from fastest to slowest, and the best sum against torch."""
        for event in self.times.values():
            ms, flops = event["ms"], event["flops"] / 1e9
            mask = "causal" if event["causal"] else "full"
            groups = {
                kernel: sorted((ms[n], n) for n in ms if n.split()[0] == kernel)
                for kernel in ("dkdv", "dk", "dv", "dq")
            }
            best = {kernel: rows[0][0] for kernel, rows in groups.items() if rows}
            apart = best.get("dk", 1e9) + best.get("dv", 1e9)
            rest = ms["statistics"] + best.get("dq", 1e9)
            now = present(event["headdim"], event["causal"])
            before = sum(ms.get(Candidate(k, 0, plan).name, 1e9) for k, plan in now.items())
            speeds = {
                "torch": flops / ms["torch"],
                "present": flops / (before + ms["statistics"]),
                "best together": flops / (best.get("dkdv", 1e9) + rest),
                "best apart": flops / (apart + rest),
            }
            print(f"D{event['headdim']} {mask} S{event['seqlen']}, TFLOP/s: "
                  + ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
                  + f"; statistics {ms['statistics']:.3f} ms")  # fmt: skip
            for kernel, rows in groups.items():
                if rows:
                    print("   " + kernel + ": " + ", ".join(
                        f"{n.partition(' ')[2].replace(' ', '/')} {t:.3f}" for t, n in rows
                    ))  # fmt: skip
        reasons: dict[str, list[str]] = {}
        for key, why in self.out.items():
            reasons.setdefault(why[:60], []).append(key)
        for why, keys in reasons.items():
            print(f"left out ({why}): " + ", ".join(keys)[:160])
        print(f"wall {time.monotonic() - STARTED:.0f} s", flush=True)


def _key(headdim: int, is_causal: bool, one: Any) -> str:
    kernel, block_d, plan = one
    name = Candidate(kernel, block_d, tuple(plan)).name
    return f"D{headdim} {'causal' if is_causal else 'full'} {name}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--deadline", type=float, default=90.0, help="seconds for everything")
    parser.add_argument("--headdims", default="256,192,128", help="in this order")
    parser.add_argument("--seqlens", default="4096,1024")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default="", help="write all that was found there")
    parser.add_argument("--processes", type=int, default=0, help="default: one for each core")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--role", choices=("parent", "compile", "gpu"), default="parent")
    options = parser.parse_args()
    options.headdims = [int(x) for x in options.headdims.split(",")]
    options.seqlens = [int(x) for x in options.seqlens.split(",")]
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "backward_lab"))
    if options.role == "compile":
        compile_worker()
    elif options.role == "gpu":
        gpu_worker()
    else:
        parent = Parent(options)
        parent.compile_all()
        if not options.compile_only:
            parent.measure()
        if options.json:
            found = {"compiled": parent.compiled, "out": parent.out, "times": parent.times}
            Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
        parent.table()


if __name__ == "__main__":
    main()
