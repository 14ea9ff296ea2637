"""Checks and times variants of the Hopper backward on a GPU, in one call with a deadline.

    PYTHONPATH=src python scripts/sm90_backward_lab.py --deadline 460 --json lab.json
    PYTHONPATH=src python scripts/sm90_backward_lab.py --match d128 --seqlens 1024,4096
    PYTHONPATH=src python scripts/sm90_backward_lab.py --headdims 192,256
    PYTHONPATH=src python scripts/sm90_backward_lab.py --compile-only      # no GPU needed

1. All kernels are compiled in parallel. 2. Every variant is checked in a process of its own, so
that a kernel that never ends costs its time limit and nothing else: against float64 on awkward
shapes, then in thousands of launches. 3. The variants that passed are timed in one process,
interleaved with each other and with PyTorch's cuDNN backward; the L2 cache is flushed before each
run and medians are reported. Only one process at a time uses the GPU.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import math
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
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "compile"))
TOKENS = 16384
HIDDEN = 2048
MARK = "@@"


# --------------------------------------------------------------------------------------- variants
class Variant(NamedTuple):
    """A plan for one head dim, by keyword arguments of BackwardPlan."""

    name: str
    headdim: int
    plan: dict[str, Any]

    def make(self, **changes: Any) -> Any:
        """The BackwardPlan."""
        from flash_attn.backends.sm90.plans_backward import BackwardPlan

        return BackwardPlan(**{**self.plan, **changes})


def variants() -> list[Variant]:
    """What is compared."""
    d64 = {
        "block_m": 64, "block_d": 64, "q_slots": 3, "do_slots": 3, "ds_slots": 3,
        "dq_group": True, "registers": 208, "dq_registers": 64,
    }  # fmt: skip
    kept = {**d64, "keeps_keys": True}
    stores = {"adder": True, "dq_slots": 4, "first_stores": True, "rotates": True}
    d128 = {"block_m": 64, "block_d": 128, "eager_dv": True, "adder": True}
    ordered = {"deterministic": True, "adder": True, "dq_slots": 4, "in_flight": 1}
    last_first = {"is_reversed": True}
    return [
        Variant("d128 ordered", 128, {**d128, **ordered}),
        Variant("d64 ordered", 64, {**kept, **ordered}),
        Variant("d128 reversed", 128, {**d128, **ordered, **last_first}),
        Variant("d64 reversed", 64, {**kept, **ordered, **last_first}),
        Variant("d128", 128, d128),
        Variant("d128 stores", 128, {**d128, **stores}),
        Variant("d64", 64, d64),
        Variant("d64 eager", 64, {**d64, "eager_dv": True}),
        Variant("d64 kept", 64, kept),
        Variant("d64 kept eager", 64, {**kept, "eager_dv": True}),
        Variant("d64 kept early", 64, {**kept, "early_lse": True, "delta_first": True}),
        Variant("d64 stores", 64, {**d64, **stores, "registers": 200}),
        Variant("d64 kept stores", 64, {**kept, **stores}),
        Variant("d64 kept stores 1", 64, {**kept, **stores, "in_flight": 1}),
        *wide_variants(),
    ]


def wide_variants() -> list[Variant]:
    """Head dims above 128: in use, and with nothing held and without turns."""
    from flash_attn.backends.sm90.plans_backward import plan_backward

    plain = {"held": 0, "turns": False, "q_slots": 2, "do_slots": 2}
    found = []
    for headdim in (256, 192):
        used = plan_backward(headdim, False, 1024)._asdict()
        found.append(Variant(f"d{headdim}", headdim, used))
        found.append(Variant(f"d{headdim} plain", headdim, {**used, **plain}))
    return found


class Shape(NamedTuple):
    """A problem to check."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    headdim: int
    left: int | None = None
    right: int | None = None
    dtype: str = "bfloat16"
    dlse: bool = False


def check_shapes(headdim: int) -> list[Shape]:
    """Awkward problems: partial tiles, unequal lengths, groups, windows, rows without keys."""
    d = headdim
    return [
        Shape(1, 128, 128, 2, 2, d),
        Shape(2, 256, 256, 3, 3, d, None, 0),
        Shape(1, 1, 1, 1, 1, d, None, 0),
        Shape(2, 113, 113, 2, 2, d),
        Shape(1, 191, 191, 3, 3, d, None, 0, "float16"),
        Shape(1, 401, 333, 4, 2, d, None, 0),  # the first rows see no key
        Shape(2, 100, 333, 4, 1, d, None, 0),
        Shape(1, 333, 100, 2, 2, d - 24),
        Shape(2, 500, 777, 2, 2, d, 100, 0),
        Shape(1, 700, 300, 2, 1, d, 50, 20),
        Shape(1, 64, 2000, 2, 2, d, 64, 0),  # most keys are seen by no query
        Shape(1, 1000, 1000, 6, 2, d - 8, None, 0, "float16", True),
        Shape(1, 2048, 2048, 4, 4, d, None, 0),
        Shape(3, 1157, 1157, 8, 8, d),
        Shape(8, 1000, 1000, 16, 16, d),  # several times what a GPU runs at a time
        Shape(8, 1024, 1100, 16, 4, d, None, 0),
        Shape(16, 512, 512, 32, 32, d, None, 0),
    ]


# ---------------------------------------------------------------------------------------- problems
def padded(torch: Any, shape: tuple[int, ...], dtype: Any, device: str) -> tuple[Any, Any]:
    """(buffer full of NaN, a view of that shape inside): rows follow each sequence, heads each row,
    and 8 columns each head."""
    batch, seqlen, heads, headdim = shape
    outer = (batch, seqlen + 70, heads + 1, headdim + 8)
    buffer = torch.full(outer, math.nan, dtype=dtype, device=device)
    return buffer, buffer[:, :seqlen, :heads, :headdim]


class Case:
    """One problem with its inputs, results and a float64 reference."""

    def __init__(self, shape: Shape, device: str) -> None:
        import torch

        from flash_attn.core.masking import visible_matrix
        from flash_attn.core.problem import (
            AttentionProblem,
            BackwardInputs,
            Visibility,
            make_transform,
        )

        self.torch, self.shape = torch, shape
        dtype = getattr(torch, shape.dtype)
        b, sq, sk, h, hk, d = shape[:6]

        def draw(*size: int) -> Any:
            _, view = padded(torch, size, dtype, device)
            view.copy_(torch.randn(size, device=device))
            return view

        q, k, v, dout = draw(b, sq, h, d), draw(b, sk, hk, d), draw(b, sk, hk, d), draw(b, sq, h, d)
        visibility = Visibility(shape.left, shape.right)
        self.seen = visible_matrix(sq, sk, visibility, q.device)
        self.tensors = (q, k, v, dout)
        self.dlse = torch.randn(b, h, sq, device=device) if shape.dlse else None
        self.scale = d**-0.5
        self.reference, out, lse = self._gradients(torch.float64)
        self.same, _, _ = self._gradients(dtype)
        _, o = padded(torch, (b, sq, h, d), dtype, device)
        o.copy_(out)
        self.results = [padded(torch, tuple(x.shape), dtype, device) for x in (q, k, v)]
        self.problem = AttentionProblem(q, k, v, make_transform(d), visibility)
        self.inputs = BackwardInputs(
            dout, o, lse.float().contiguous(), *(view for _, view in self.results),
            torch.zeros(2, dtype=torch.int64, device=device), self.dlse,
        )  # fmt: skip

    def _gradients(self, dtype: Any) -> tuple[list[Any], Any, Any]:
        """([dq, dk, dv], out, lse) by plain products in ``dtype``; sums over a group in float64."""
        torch, group = self.torch, self.shape.nheads // self.shape.nheads_k
        q, k, v, do = (x.to(dtype).transpose(1, 2) for x in self.tensors)
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        s = (q @ k.transpose(-1, -2)).double() * self.scale
        s = s.masked_fill(~self.seen, -math.inf)
        lse = torch.logsumexp(s, -1)
        p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
        out = p.to(dtype) @ v
        dv = p.to(dtype).transpose(-1, -2) @ do
        delta = (do.double() * out.double()).sum(-1)
        if self.dlse is not None:
            delta = delta - self.dlse.double()
        ds = (p * ((do @ v.transpose(-1, -2)).double() - delta[..., None])).to(dtype)
        dq, dk = (ds @ k) * self.scale, (ds.transpose(-1, -2) @ q) * self.scale
        dk, dv = (x.double().unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
        return [x.transpose(1, 2) for x in (dq, dk, dv)], out.transpose(1, 2), lse

    def complaints(
        self, run: Callable[[Any, Any], object], deterministic: bool
    ) -> tuple[list[str], float]:
        """(what is wrong, the largest error as a multiple of same-precision PyTorch's)."""
        torch = self.torch
        run(self.problem, self.inputs)
        found, worst = [], 0.0
        first = [view.clone() for _, view in self.results]
        for name, result, want, same in zip(
            ("dq", "dk", "dv"), first, self.reference, self.same, strict=True
        ):
            error, other = (result - want).abs(), (same.to(result.dtype) - want).abs()
            step = torch.finfo(result.dtype).eps
            for kind, mine, theirs, size in (
                ("norm", error.norm(), other.norm(), want.norm()),
                ("max", error.max(), other.max(), want.abs().max()),
            ):
                limit = 3.0 * float(theirs) + step * float(size) + 1e-6
                worst = max(worst, float(mine) / max(float(theirs), 1e-6 + step * float(size)))
                if not float(mine) <= limit:
                    found.append(f"{name} {kind} {float(mine):.2e} > {limit:.2e} {_where(error)}")
        for (buffer, view), name in zip(self.results, ("dq", "dk", "dv"), strict=True):
            outside = int(buffer.isnan().sum()) - int(view.isnan().sum())
            if outside != buffer.numel() - view.numel():
                found.append(f"{name} written outside")
        for _ in range(2):
            for _, view in self.results:
                view.fill_(math.nan)
            run(self.problem, self.inputs)
            again = [view for _, view in self.results]
            if deterministic and not torch.equal(again[0], first[0]):
                found.append("dq not repeatable")
            if not torch.allclose(again[0].float(), first[0].float(), rtol=2e-2, atol=2e-2):
                found.append("dq differs between runs")
            found += [
                f"{name} not repeatable"
                for i, name in ((1, "dk"), (2, "dv"))
                if not torch.equal(again[i], first[i])
            ]
        return found, worst


def _where(error: Any) -> str:
    """Where the large or undefined elements are: share, 64-row blocks, heads, 32-column groups."""
    wrong = ~(error <= 0.05)
    if not bool(wrong.any()):
        return ""
    rows = sorted({int(x) // 64 for x in wrong.any(3).any(2).any(0).nonzero()[:, 0]})
    heads = [int(x) for x in wrong.any(3).any(1).any(0).nonzero()[:, 0]]
    columns = sorted({int(x) // 32 for x in wrong.any(2).any(1).any(0).nonzero()[:, 0]})
    return f"({float(wrong.float().mean()):.2f} at {rows[:8]} {heads[:6]} {columns})"


# ----------------------------------------------------------------------------------------- workers
def emit(**event: Any) -> None:
    """One line to the parent."""
    print(MARK + json.dumps(event), flush=True)


def compile_worker() -> None:
    """Compile the kernels of the variants named on stdin, without touching a GPU."""
    import aot
    import torch

    from flash_attn.backends.sm90 import launch_backward
    from flash_attn.core.problem import (
        AttentionProblem,
        BackwardInputs,
        Visibility,
        make_transform,
    )

    job = json.loads(sys.stdin.read())
    for name, right, left, dtype_name in job:
        variant = next(v for v in variants() if v.name == name)
        dtype = getattr(torch, dtype_name)
        d = variant.headdim
        x = torch.empty(2, 256, 4, d, dtype=dtype, device="meta")
        problem = AttentionProblem(x, x, x, make_transform(d), Visibility(left, right))
        lse = torch.empty(2, 4, 256, device="meta")
        state = torch.empty(2, dtype=torch.int64, device="meta")
        inputs = BackwardInputs(x, x, lse, x, x, x, state)
        plan = fitting(variant.make(), problem)
        launches = aot.record(
            lambda p=problem, i=inputs, plan=plan: launch_backward.backward(p, i, plan), "sm90"
        )
        for one in launches:
            began = time.monotonic()
            try:
                source, compiled = aot.compile_kernel(one, "sm90")
                seconds = round(time.monotonic() - began, 1)
                used = aot.resources_of(compiled, "sm90", seconds)
                build_launcher(source, compiled)
            except Exception as problem_found:
                emit(event="failed", variant=name, kernel=one.name, error=repr(problem_found)[:400])
                continue
            emit(event="compiled", variant=name, kernel=one.name, right=right, left=left,
                 dtype=dtype_name, **used.as_dict())  # fmt: skip


def build_launcher(source: Any, compiled: Any) -> None:
    """Compile Triton's host code for a kernel, where there is a driver to link with."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(source, compiled.metadata)
    except Exception as missing:
        emit(event="note", text=f"no launcher ahead of time: {missing!r}"[:200])


def gpu_worker() -> None:
    """Import everything, wait for a job on stdin, then use the GPU for the first time."""
    import torch

    import flash_attn.backends.sm90.launch_backward  # noqa: F401

    emit(event="ready")
    line = sys.stdin.readline()
    if not line.strip():
        return
    job = json.loads(line)
    try:
        torch.manual_seed(0)
        torch.zeros(1, device="cuda")
        globals()["run_" + job["kind"]](job)
        emit(event="done")
    except BaseException:
        emit(event="error", text=traceback.format_exc()[-1500:])
    sys.stdout.flush()
    os._exit(0)


def run_check(job: dict[str, Any]) -> None:
    """Check one variant, then launch it often."""
    import torch

    from flash_attn.backends.sm90 import launch_backward

    variant = next(v for v in variants() if v.name == job["variant"])
    plan, worst, wrong = variant.make(), 0.0, []
    shapes = check_shapes(variant.headdim)
    for shape in shapes:
        emit(event="stage", at=f"check {tuple(shape)}")

        def run(problem: Any, inputs: Any) -> None:
            launch_backward.backward(problem, inputs, fitting(plan, problem))
            torch.cuda.synchronize()

        found, ratio = Case(shape, "cuda").complaints(run, plan.deterministic)
        worst = max(worst, ratio) if ratio == ratio else ratio
        if found:
            wrong.append({"shape": list(shape), "found": found})
            emit(event="wrong", shape=list(shape), found=found)
    emit(event="checked", shapes=len(shapes), wrong=len(wrong), worst=worst)
    if wrong:
        return
    for seqlen in (512, 2048, 4096):
        for is_causal in (True, False):
            cell = Cell(variant.headdim, seqlen, is_causal, with_torch=False)
            count = max(20, int(job["launches"] * 512 / seqlen))
            began = time.monotonic()
            for i in range(0, count, 20):
                emit(event="stage", at=f"stress {seqlen} causal {is_causal} launch {i} of {count}")
                for _ in range(20):
                    launch_backward.backward(cell.problem, cell.inputs, fitting(plan, cell.problem))
                torch.cuda.synchronize()
            emit(event="stress", seqlen=seqlen, causal=is_causal, launches=count,
                 seconds=round(time.monotonic() - began, 2))  # fmt: skip


class Cell:
    """One timed problem: 16k tokens, hidden size 2048, as in the published tables."""

    def __init__(self, headdim: int, seqlen: int, is_causal: bool, with_torch: bool) -> None:
        import torch

        from flash_attn.core.problem import (
            AttentionProblem,
            BackwardInputs,
            Visibility,
            make_transform,
        )

        batch, heads = TOKENS // seqlen, HIDDEN // headdim
        shape = (batch, seqlen, heads, headdim)
        q, k, v, dout = (torch.randn(shape, device="cuda").bfloat16() for _ in range(4))
        self.flops = 10.0 * batch * heads * seqlen * seqlen * headdim / (2 if is_causal else 1)
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(*turned, 0.0, is_causal, False)[:2]
        visibility = Visibility(None, 0 if is_causal else None)
        self.problem = AttentionProblem(q, k, v, make_transform(headdim), visibility)
        self.inputs = BackwardInputs(
            dout, out.transpose(1, 2), lse, *(torch.empty_like(q) for _ in range(3)),
            torch.zeros(2, dtype=torch.int64, device="cuda"),
        )  # fmt: skip
        self.torch_backward: Callable[[], object] | None = None
        if with_torch:
            self._prepare_torch(turned, dout.transpose(1, 2), is_causal)

    def _prepare_torch(self, turned: list[Any], dout: Any, is_causal: bool) -> None:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        leaves = [x.detach().requires_grad_() for x in turned]
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=is_causal)
            torch.autograd.grad(out, leaves, dout, retain_graph=True)
        except RuntimeError as refusal:  # not every release serves every head dim
            emit(event="note", text=f"no cuDNN backward: {refusal}"[:200])
            return
        self.torch_backward = lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def run_time(job: dict[str, Any]) -> None:
    """Time the variants of one head dim, interleaved."""
    import torch

    from flash_attn.backends.sm90 import launch_backward

    chosen = [v for v in variants() if v.name in job["variants"]]
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for seqlen in job["seqlens"]:
        for is_causal in (False, True):
            emit(event="stage", at=f"prepare {seqlen} causal {is_causal}")
            cell = Cell(job["headdim"], seqlen, is_causal, with_torch=True)
            runs: dict[str, Callable[[], object]] = {}
            if cell.torch_backward is not None:
                runs["cudnn"] = cell.torch_backward
            for variant in chosen:
                for megabytes in job["sections"]:
                    plan = variant.make(section_bytes=megabytes << 20)
                    runs.update(parts_of(launch_backward, cell, plan, variant.name, megabytes))
            times: dict[str, list[float]] = {name: [] for name in runs}
            for name, run in runs.items():
                emit(event="stage", at=f"warm {name} {seqlen} causal {is_causal}")
                run()
                run()
                torch.cuda.synchronize()
            for turn in range(job["rounds"]):
                emit(event="stage", at=f"round {turn} {seqlen} causal {is_causal}")
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
            for name, values in times.items():
                emit(event="time", headdim=job["headdim"], seqlen=seqlen, causal=is_causal,
                     name=name, ms=statistics.median(values), least=min(values),
                     flops=cell.flops)  # fmt: skip


def fitting(plan: Any, problem: Any) -> Any:
    """The plan, rotated only where it may be."""
    from flash_attn.core.problem import Visibility

    return plan._replace(rotates=plan.rotates and problem.visibility == Visibility())


def parts_of(
    launch_backward: Any, cell: Cell, plan: Any, name: str, megabytes: int
) -> dict[str, Callable[[], object]]:
    """The whole backward, its main kernel alone, and what comes before and after."""
    problem, inputs = cell.problem, cell.inputs
    plan = fitting(plan, problem)
    packing = launch_backward.locate(problem)
    workspace = launch_backward.allocate(problem, packing, plan)
    arguments = (problem, inputs, packing, workspace, plan)
    launch_backward.launch_statistics(*arguments)
    whole = f"{name}|{megabytes}"

    def main() -> None:
        if plan.first_stores or plan.deterministic:
            workspace.turns.zero_()
        launch_backward.launch_main(*arguments)

    packed = {}
    if not plan.piece:
        flat = as_packed(problem, inputs)
        packed[whole + "|packed"] = lambda: launch_backward.backward(*flat, plan)
    around = f"{whole}|" if plan.first_stores else f"d{problem.headdim}||"
    return {
        whole + "|whole": lambda: launch_backward.backward(problem, inputs, plan),
        whole + "|main": main,
        around + "before": lambda: launch_backward.launch_statistics(*arguments),
        around + "after": lambda: launch_backward.launch_finish(*arguments),
        **packed,
    }


def as_packed(problem: Any, inputs: Any) -> tuple[Any, Any]:
    """The same sequences one after another, with their lengths on the device."""
    import torch

    from flash_attn.core.problem import SequenceLayout

    batch, seqlen = problem.q.shape[:2]
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=problem.q.device) * seqlen
    layout = SequenceLayout(bounds, bounds, max_seqlen_q=seqlen, max_seqlen_k=seqlen)
    flat = {name: getattr(problem, name).flatten(0, 1) for name in ("q", "k", "v")}
    mine = {name: getattr(inputs, name).flatten(0, 1) for name in ("dout", "out", "dq", "dk", "dv")}
    lse = inputs.softmax_lse.transpose(0, 1).flatten(1)
    return (
        problem._replace(**flat, layout=layout),
        inputs._replace(**mine, softmax_lse=lse),
    )


# ------------------------------------------------------------------------------------------ parent
class Process:
    """A child, of this script or another one, whose events arrive in a queue."""

    def __init__(self, role: str, script: Path = Path(__file__)) -> None:
        self.child = subprocess.Popen(
            [sys.executable, str(script.resolve()), "--role", role],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.tail: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith(MARK):
                self.events.put(json.loads(line[len(MARK) :]))
            else:
                self.tail = [*self.tail, line.rstrip()[:300]][-10:]
        self.events.put({"event": "end"})

    def send(self, job: Any) -> None:
        """Hand over the one job."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(job) + "\n")
        self.child.stdin.close()

    def stop(self) -> None:
        """End it, whatever it does."""
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            return


class Parent:
    """Runs the three phases and keeps what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.found: dict[str, Any] = {
            "argv": sys.argv[1:], "compiled": [], "checks": {}, "times": [], "notes": [],
        }  # fmt: skip
        wanted = options.headdims
        self.chosen = [
            v for v in variants()
            if options.match in v.name and (not wanted or v.headdim in wanted)
        ]  # fmt: skip
        self.spare: Process | None = None

    def left(self) -> float:
        """Seconds until the deadline."""
        return float(self.options.deadline) - (time.monotonic() - STARTED)

    def say(self, text: str) -> None:
        """Print with the time."""
        print(f"[{time.monotonic() - STARTED:5.0f}s] {text}", flush=True)

    def save(self) -> None:
        """Write the JSON."""
        if self.options.json:
            Path(self.options.json).write_text(json.dumps(self.found, indent=1) + "\n")

    def compile_all(self) -> None:
        """Compile every variant for full, causal and windowed problems and for float16."""
        jobs = []
        for kind in ((None, None, "bfloat16"), (0, None, "bfloat16"), (0, 100, "bfloat16"),
                     (20, 50, "bfloat16"), (0, None, "float16")):  # fmt: skip
            jobs += [(v.name, *kind) for v in self.chosen]
        count = self.options.processes or max(1, min(len(os.sched_getaffinity(0)) - 1, len(jobs)))
        children = [Process("compile") for _ in range(count)]
        for i, child in enumerate(children):
            child.send(jobs[i::count])
        for child in children:
            while True:
                try:
                    event = child.events.get(timeout=max(1.0, self.left() - 60.0))
                except queue.Empty:
                    self.found["notes"].append("compilation cut short")
                    break
                kind = event.pop("event")
                if kind == "end":
                    if child.child.wait() != 0:
                        self.say("a compiler died: " + " | ".join(child.tail[-4:]))
                    break
                where = self.found["compiled" if kind == "compiled" else "notes"]
                if event not in where:
                    where.append(event)
                if kind == "failed":
                    self.say(f"not compiled: {event}")
        for child in children:
            child.stop()
        self.say(f"{len(self.found['compiled'])} kernels compiled")
        for one in self.found["compiled"]:
            if one["spilled"]:
                self.say(f"spills {one['spilled']}: {one['variant']} {one['right']} {one['left']}")

    def gpu_job(self, job: dict[str, Any], limit: float) -> Iterator[dict[str, Any]]:
        """Events of a job; the last one says how it ended."""
        process = self.spare or Process("gpu")
        self.spare = Process("gpu")  # imports meanwhile, without touching the GPU
        stage, deadline, sent = "start", time.monotonic() + 90.0, False
        try:
            while True:
                try:
                    event = process.events.get(timeout=max(0.05, deadline - time.monotonic()))
                except queue.Empty:
                    yield {"event": "hung", "at": stage}
                    return
                if event["event"] == "ready" and not sent:
                    process.send(job)
                    sent, deadline = True, time.monotonic() + min(limit, max(self.left(), 5.0))
                elif event["event"] == "stage":
                    stage = event["at"]
                elif event["event"] == "end":
                    yield {"event": "died", "at": stage, "tail": process.tail[-5:]}
                    return
                else:
                    yield {"at": stage, **event} if event["event"] == "error" else event
                    if event["event"] in ("done", "error"):
                        return
        finally:
            process.stop()

    def check_all(self) -> None:
        """Check each variant in a process of its own."""
        for variant in self.chosen:
            if self.left() < 45.0 + self.options.timing:
                self.found["notes"].append(f"not checked for want of time: {variant.name}")
                continue
            began, record = time.monotonic(), {"state": "?", "events": []}
            job = {"kind": "check", "variant": variant.name, "launches": self.options.launches}
            for event in self.gpu_job(job, self.options.limit):
                record["events"].append(event)
                record["state"] = event["event"]
            checked = [e for e in record["events"] if e["event"] == "checked"]
            right = record["state"] == "done" and checked and checked[0]["wrong"] == 0
            record["passed"] = bool(right)
            self.found["checks"][variant.name] = record
            worst = f"error x{checked[0]['worst']:.2f}" if checked else ""
            self.say(f"{variant.name:26s} {'passed' if right else 'FAILED'} {record['state']} "
                     f"{worst} {time.monotonic() - began:.0f}s")  # fmt: skip
            if not right:
                for event in record["events"]:
                    if event["event"] in ("wrong", "hung", "died", "error"):
                        self.say("    " + json.dumps(event)[:700])
            self.save()

    def time_all(self) -> None:
        """Time what passed, one head dim at a time; a variant that hangs here is left out."""
        names = {n for n, record in self.found["checks"].items() if record["passed"]}
        for headdim in sorted({v.headdim for v in self.chosen}, reverse=True):
            mine = [v.name for v in self.chosen if v.name in names and v.headdim == headdim]
            if not mine or self.left() < 15.0:
                self.found["notes"].append(f"head dim {headdim} not timed")
                continue
            job = {"kind": "time", "headdim": headdim, "variants": mine,
                   "seqlens": self.options.seqlens, "sections": self.options.sections,
                   "rounds": self.options.rounds}  # fmt: skip
            last = {"event": "none"}
            for last in self.gpu_job(job, self.left() - 5.0):
                if last["event"] == "time":
                    self.found["times"].append(last)
            self.say(f"head dim {headdim}: timing {last['event']} {last.get('at', '')}")
            if last["event"] != "done":
                self.say("    " + json.dumps(last)[:900])
                self.found["notes"].append(last)
            self.save()

    def table(self) -> None:
        """TFLOP/s of the backward; main kernel alone in brackets; the best section of each."""
        cells: dict[tuple[int, bool], dict[str, dict[int, str]]] = {}
        for one in self.found["times"]:
            rows = cells.setdefault((one["headdim"], one["causal"]), {})
            name, _, part = (one["name"] + "||").split("|")[:3]
            speed = one["flops"] / one["ms"] / 1e9
            key = f"{name} {part}".strip()
            if part in ("before", "after"):
                spent = min(one["ms"] * 1000, float(rows.get(key, {}).get(one["seqlen"], "inf")))
                rows.setdefault(key, {})[one["seqlen"]] = f"{spent:.0f}"
            else:
                before = float(rows.setdefault(key, {}).get(one["seqlen"], "0"))
                rows[key][one["seqlen"]] = f"{max(speed, before):.0f}"
        seqlens = self.options.seqlens
        print("TFLOP/s, before and after in us; best of L2 sections", self.options.sections, "MB")
        for (headdim, is_causal), rows in sorted(cells.items()):
            print(f"-- D{headdim} {'causal' if is_causal else 'full'}: {seqlens}")
            for name, row in rows.items():
                print(f"  {name:34s}" + "".join(f"{row.get(s, '-'):>7s}" for s in seqlens))
        for note in self.found["notes"]:
            print("note:", json.dumps(note)[:300])
        print(f"wall {time.monotonic() - STARTED:.0f}s, json {self.options.json}", flush=True)


def options_of_parent(
    parser: argparse.ArgumentParser,
    compile_worker: Callable[[], None],
    gpu_worker: Callable[[], None],
) -> argparse.Namespace | None:
    """The options of a lab, of which ``parser`` has those of its own; None in a worker's process,
    whose work is done by then."""
    parser.add_argument("--json", default="")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--role", choices=("parent", "compile", "gpu"), default="parent")
    options = parser.parse_args()
    options.seqlens = [int(x) for x in options.seqlens.split(",")]
    options.headdims = [int(x) for x in options.headdims.split(",") if x]
    folder = os.path.join(tempfile.gettempdir(), "sm90_backward_lab")
    os.environ.setdefault("TRITON_CACHE_DIR", folder)
    if options.role == "parent":
        return options
    (compile_worker if options.role == "compile" else gpu_worker)()
    return None


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deadline", type=float, default=460.0, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for checking a variant")
    parser.add_argument("--timing", type=float, default=90.0, help="seconds kept for timing")
    parser.add_argument("--launches", type=int, default=4000, help="stress launches at 512")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seqlens", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--sections", default="4,32,128", help="megabytes of L2 for heads together")
    parser.add_argument("--match", default="", help="only variants whose name contains this")
    parser.add_argument("--headdims", default="", help="only these; all if empty")
    parser.add_argument("--processes", type=int, default=0)
    options = options_of_parent(parser, compile_worker, gpu_worker)
    if options is None:
        return
    options.sections = [int(x) for x in options.sections.split(",")]
    parent = Parent(options)
    parent.compile_all()
    if not options.compile_only:
        parent.check_all()
        parent.time_all()
        if parent.spare is not None:
            parent.spare.stop()
    parent.save()
    parent.table()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
