"""Compares plans of the Hopper forward kernel: compiles, checks and times them on one GPU.

    python scripts/sm90_forward_lab.py --out lab.json --deadline 460
    python scripts/sm90_forward_lab.py --trial --trace --deadline 330 --fa3 FOLDER
    python scripts/sm90_forward_lab.py --trial --headdims 96 192 --jobs 16 --checks 16 --fa3 FOLDER
    python scripts/sm90_forward_lab.py --list
    python scripts/sm90_forward_lab.py --compile-only      # no GPU needed

Compared are the plans in use, and with --trial also those that differ from one of them in one part.
All kernels are compiled at once in many processes. Each plan is then checked in a process of its
own with a time limit, because a wrong barrier protocol hangs: against a float64 computation, with
odd and unequal lengths, windows, grouped heads, padded head dims, NaN around every tensor and few
programs walking over many tiles. What is right is timed in turns with PyTorch's cuDNN attention
and, if --fa3 names the folder of its library, FlashAttention-3, one process for each head dim and
mask. The last thing printed is the table.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY / "tests" / "compile")]

from flash_attn.backends.sm90.plans import (  # noqa: E402
    DYNAMIC,
    ROUND_ROBIN,
    ForwardPlan,
    forward_plans,
)

PEERS = ("cudnn", "fa3")
TOKENS, HIDDEN = 16384, 2048
BLOCK_DS = (64, 128, 256)  # those that divide the hidden size; cuDNN has no others
L2 = 32 << 20
FLUSH_BYTES = 256 << 20
# Cycles that the GPU idles before each timed launch, so that the host is never what is timed.
LEAD_CYCLES = 500_000
TRIAL, TRACE = (flag in sys.argv for flag in ("--trial", "--trace"))
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
REPEATS = 40
FA3_LIBRARIES = ("fa3_C.so", "_C.so", "flash_attn_3/_C.so", "xformers/flash_attn_3/_C.so")
CHECK_SECONDS, TIME_SECONDS, COMPILE_SECONDS = 40 if TRIAL else 60, 45, 150
# Seconds that must be left for another check to start.
LEFT_SECONDS = 65 if TRIAL else 90
FA3 = Path(sys.argv[sys.argv.index("--fa3") + 1]) if "--fa3" in sys.argv else None
SCHEDULERS = {ROUND_ROBIN: "rr", DYNAMIC: "dyn"}


class Variant(NamedTuple):
    """A plan in the lab."""

    headdim: int
    masked: bool
    plan: ForwardPlan

    @property
    def name(self) -> str:
        plan = self.plan
        parts = [
            f"{self.headdim}{'c' if self.masked else 'f'}",
            SCHEDULERS[plan.scheduler],
            f"{plan.consumers}x{plan.block_n}",
            f"st{plan.stages}",
            f"q{plan.q_slots}",
            f"o{plan.out_halves}",
        ]
        parts += [
            short
            for short, used in (
                ("pp", plan.ping_pong),
                ("skip", plan.skip),
                ("slim", plan.slim),
                ("late", plan.late),
                ("ov", plan.overlap),
                ("peel", plan.peel),
                ("joint", plan.joint),
                (f"p{plan.p_shared}", plan.p_shared),
            )
            if used
        ]
        last = f"+{plan.last_bytes >> 20}M" if plan.last_bytes else ""
        if last or plan.section_bytes != (L2 if self.masked else 0):
            parts.append(f"L2:{plan.section_bytes >> 20}M{last}")
        return " ".join(parts)


def neighbours(plan: ForwardPlan, masked: bool) -> list[ForwardPlan]:
    """Plans that differ from ``plan`` in one part, of those that the kernel has."""
    parts = ["ping_pong", "overlap", *(["skip"] if masked else [])]
    parts += ["peel"] if masked and plan.block_m == plan.block_n else []
    parts += ["slim"] if not plan.late else []
    parts += ["late"] if plan.scheduler == DYNAMIC and not plan.slim else []
    found = [replace(plan, **{part: not getattr(plan, part)}) for part in parts]
    if plan.consumers == 3 and plan.block_n == 128:
        found.append(replace(plan, p_shared=64 - plan.p_shared))
    return [x for x in found if not (x.joint and x.ping_pong and x.skip)]


def all_variants() -> list[Variant]:
    """What this run is about, without repetitions."""
    found = [Variant(*row) for row in forward_plans()]
    if TRIAL:
        found += [x._replace(plan=plan) for x in found for plan in neighbours(x.plan, x.masked)]
    return list(dict.fromkeys(found))


def kernel_of(variant: Variant) -> Variant:
    """The variant that stands for all with the same kernel."""
    return variant._replace(plan=replace(variant.plan, section_bytes=0, last_bytes=0))


def traced() -> list[tuple[Variant, tuple[int, ...]]]:
    """What is traced, at which lengths."""
    plans = [variant for variant in all_variants() if variant[:2] == (128, True)]
    return [(variant, (1024, 4096, 16384)) for variant in plans]


# ------------------------------------------------------------------------------------- worker side
def say(**message: Any) -> None:
    """Tell the parent process something."""
    print("@@" + json.dumps(message), flush=True)


class Shape(NamedTuple):
    """A problem for the check; ``programs`` caps the grid of persistent plans."""

    batch: int
    nheads: int
    nheads_k: int
    seqlen_q: int
    seqlen_k: int
    programs: int = 132
    headdim: int | None = None
    window: tuple[int | None, int | None] = (None, 0)


SHAPES = (
    Shape(1, 2, 2, 128, 128),
    Shape(1, 1, 1, 1, 1),
    Shape(2, 3, 3, 256, 256, 5),
    Shape(2, 2, 1, 113, 113, 1),
    Shape(1, 3, 3, 191, 191, 2),
    Shape(1, 2, 2, 401, 401, 3),
    Shape(2, 4, 2, 1000, 1000, 5),
    Shape(1, 2, 2, 100, 333, 2),
    Shape(1, 2, 2, 333, 100, 2),
    Shape(1, 6, 2, 700, 7, 3),
    Shape(4, 8, 2, 1157, 1157),
    Shape(8, 16, 4, 300, 300),
    Shape(3, 5, 5, 640, 700, 7),
    Shape(2, 3, 1, 517, 389, 4, headdim=-24),
    Shape(1, 2, 2, 300, 300, 132, headdim=-8),
    Shape(1, 2, 2, 2048, 2048),
)
# Tiles with little work in which consumers have no rows.
STRESSED = (Shape(1, 6, 2, 700, 7, 3), Shape(8, 16, 4, 300, 300), Shape(2, 8, 8, 200, 64, 5))
STRESS_RUNS = 300
WINDOWS = ((100, 0), (64, 40), (300, None), (0, 0), (None, 5), (None, 700), (7, 1000))


def shapes_of(variant: Variant) -> list[Shape]:
    """What a variant is checked with."""
    shapes = list(SHAPES)
    if variant.masked and not TRIAL:
        shapes += [Shape(2, 4, 2, 517, 700, 5, window=window) for window in WINDOWS]
        shapes += [Shape(1, 2, 2, 700, 300, 3, window=window) for window in WINDOWS[:4]]
    return shapes


def visibility_of(variant: Variant, shape: Shape) -> Any:
    """The mask of a variant's shape."""
    from flash_attn.core.problem import Visibility

    return Visibility(*shape.window) if variant.masked else Visibility()


def padded(shape: tuple[int, ...]) -> Any:
    """A tensor surrounded by NaN: 40 rows and 8 columns lie past its end in memory."""
    import torch

    batch, seqlen, nheads, headdim = shape
    whole = torch.full(
        (batch, seqlen + 40, nheads, headdim + 8), float("nan"), dtype=torch.bfloat16, device="cuda"
    )
    return whole[:, :seqlen, :, :headdim]


def random(*shape: int) -> Any:
    """Normal numbers surrounded by NaN."""
    import torch

    x = padded(shape)
    x.copy_(torch.randn(shape, device="cuda"))
    return x


def worst_error(got: Any, want: Any, coarse: Any) -> tuple[float, float]:
    """(relative error in the Frobenius norm, largest error less what bfloat16 explains)."""
    error = got.double() - want
    allowed = 2.0 * (coarse.double() - want).abs().max().item() + 2e-3
    relative = (error.norm() / want.norm().clamp_min(1e-20)).item()
    return relative, error.abs().max().item() - allowed


def check_shape(variant: Variant, shape: Shape) -> list[str]:
    """What is wrong with the results for ``shape``."""
    import torch

    from flash_attn.backends.reference import BACKEND as reference
    from flash_attn.backends.sm90 import launch
    from flash_attn.core.problem import AttentionProblem, make_transform

    headdim = variant.headdim + (shape.headdim or 0)
    q = random(shape.batch, shape.seqlen_q, shape.nheads, headdim)
    k, v = (random(shape.batch, shape.seqlen_k, shape.nheads_k, headdim) for _ in range(2))
    problem = AttentionProblem(q, k, v, make_transform(headdim), visibility_of(variant, shape))
    want, want_lse, *_ = reference.forward(
        problem._replace(q=q.double(), k=k.double(), v=v.double())
    )
    coarse = reference.forward(problem).out
    out, lse = padded(q.shape), torch.full(problem.lse_shape, float("nan"), device="cuda")
    around = torch.as_strided(out, (out.untyped_storage().nbytes() // 2,), (1,), 0)
    with mock.patch.object(launch, "multiprocessors_of", return_value=shape.programs):
        launch.launch_forward(problem, variant.plan, out, lse)
        torch.cuda.synchronize()
        first, first_lse = out.clone(), lse.clone()
        # Bit patterns are compared, on the GPU: nothing waits between launches.
        differing = torch.zeros((), dtype=torch.int64, device="cuda")
        bits, lse_bits = first.view(torch.int16), first_lse.view(torch.int32)
        for _ in range(REPEATS):
            out.fill_(float("nan"))
            lse.fill_(float("nan"))
            launch.launch_forward(problem, variant.plan, out, lse)
            same_lse = (lse.view(torch.int32) == lse_bits).all()
            differing += ~((out.view(torch.int16) == bits).all() & same_lse)
    count = int(differing)
    bad = [f"{count} of {REPEATS} runs differ from the first"] if count else []
    relative, excess = worst_error(first, want, coarse)
    if not (relative < 6e-3 and excess <= 0.0):
        wrong = ~((first.double() - want).abs() <= 0.03)
        where = wrong.nonzero()[0].tolist() if wrong.any() else None
        share = wrong.double().mean().item()
        bad.append(f"out: rel {relative:.1e} excess {excess:.1e} wrong {share:.3f} first {where}")
    finite = want_lse.isfinite()
    if not torch.equal(first_lse[~finite].double(), want_lse[~finite].double()):
        bad.append("lse of rows without keys")
    lse_error = (first_lse.double() - want_lse.double())[finite].abs().max() if finite.any() else 0
    if not float(lse_error) < 5e-5:
        bad.append(f"lse off by {float(lse_error):.1e}")
    if int((~around.isnan()).sum()) != int((~out.isnan()).sum()):
        bad.append("wrote outside the result")
    if int(launch.counter_for(q)) != 0:
        bad.append("counter not back at 0")
    say(event="error", relative=relative, lse=float(lse_error))
    return bad


def check_neighbours(variant: Variant) -> list[str]:
    """NaN in another sequence or head, right behind the end in memory, changes nothing."""
    import torch

    from flash_attn.backends.sm90 import launch
    from flash_attn.core.problem import AttentionProblem, Visibility, make_transform

    q, k, v = (torch.randn(3, 333, 2, variant.headdim, device="cuda").bfloat16() for _ in range(3))
    visibility = Visibility(None, 0) if variant.masked else Visibility()
    results = []
    for poison in (0.0, float("nan")):
        k[1] = poison
        v[1] = poison
        problem = AttentionProblem(q, k, v, make_transform(variant.headdim), visibility)
        results.append(launch.forward(problem, None, variant.plan).out[::2])
    same = torch.equal(results[0], results[1]) and bool(results[1].isfinite().all())
    return [] if same else ["NaN of a neighbouring sequence got in"]


def stress(variant: Variant) -> None:
    """Run short sequences many times, and say where results differ from those of the reference."""
    import torch

    from flash_attn.backends.reference import BACKEND as reference
    from flash_attn.backends.sm90 import launch
    from flash_attn.core.problem import AttentionProblem, make_transform

    bad = []
    for shape in STRESSED:
        say(event="stage", at=f"stress {tuple(shape)}")
        q = random(shape.batch, shape.seqlen_q, shape.nheads, variant.headdim)
        k, v = (random(shape.batch, shape.seqlen_k, shape.nheads_k, variant.headdim) for _ in "kv")
        visible = visibility_of(variant, shape)
        problem = AttentionProblem(q, k, v, make_transform(variant.headdim), visible)
        want = reference.forward(problem).out.float()
        out, lse = padded(q.shape), torch.empty(problem.lse_shape, device="cuda")
        wrong = torch.zeros(3, *q.shape[:3], dtype=torch.int64, device="cuda")
        with mock.patch.object(launch, "multiprocessors_of", return_value=shape.programs):
            for _ in range(STRESS_RUNS):
                out.fill_(float("nan"))
                launch.launch_forward(problem, variant.plan, out, lse)
                nan = out.isnan()
                off = (out.float() - want).abs() > 0.05
                wrong += torch.stack([nan.all(-1), nan.any(-1) & ~nan.all(-1), off.any(-1)])
        for name, counts in zip(("unwritten", "partly NaN", "off"), wrong.cpu(), strict=True):
            rows = counts.nonzero()
            if len(rows):
                tiles = sorted({(b, h, r // 64) for b, r, h in rows.tolist()})
                bad.append(
                    f"{tuple(shape)[:6]}: {len(rows)} rows {name}, at most {int(counts.max())} of "
                    f"{STRESS_RUNS} times; (batch, head, 64 rows): {tiles[:8]} of {len(tiles)}"
                )
    say(event="checked", bad=bad)


def check(variant: Variant) -> None:
    """Check one variant and report."""
    import torch

    torch.manual_seed(11)
    torch.backends.cuda.matmul.allow_tf32 = False
    bad = []
    for shape in shapes_of(variant):
        say(event="stage", at=str(tuple(shape)))
        bad += [f"{tuple(shape)}: {text}" for text in check_shape(variant, shape)]
    say(event="stage", at="neighbours")
    bad += check_neighbours(variant)
    for seqlen in SEQLENS:  # a hang at a timed size shows here
        say(event="stage", at=f"size {seqlen}")
        launch_once = bound(variant, seqlen)[1]
        for _ in range(5):
            launch_once()
        torch.cuda.synchronize()
    say(event="checked", bad=bad)


def bound(variant: Variant, seqlen: int) -> tuple[Any, Callable[[], None]]:
    """(result, function that computes it) at a timed size, with tensors of its own."""
    import torch

    from flash_attn.backends.sm90 import launch
    from flash_attn.core.problem import AttentionProblem, Visibility, make_transform

    shape = (TOKENS // seqlen, seqlen, HIDDEN // variant.headdim, variant.headdim)
    generator = torch.Generator("cuda").manual_seed(5)
    q, k, v = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(3))
    visibility = Visibility(None, 0) if variant.masked else Visibility()
    problem = AttentionProblem(q, k, v, make_transform(variant.headdim), visibility)
    out, lse = torch.empty_like(q), torch.empty(problem.lse_shape, device="cuda")
    return (problem, out), lambda: launch.launch_forward(problem, variant.plan, out, lse)


def compile_all(chosen: list[Variant]) -> None:
    """Compile without a GPU; what is compiled here is found in the cache later."""
    import aot

    for variant in chosen:
        for one in launches_of(variant):
            _, compiled = aot.compile_kernel(one, "sm90")
            registers, spills = aot.usage_of(compiled, "sm90")
            say(event="compiled", registers=registers, spills=spills)


def launches_of(variant: Variant) -> list[Any]:
    """The kernel calls of a variant's checks, timings and traces, one of each kernel."""
    import aot
    import torch

    from flash_attn.backends.sm90 import launch
    from flash_attn.core.problem import AttentionProblem, make_transform

    timed = Shape(1, 16, 16, 512, 512)
    shapes = [(shape, False) for shape in (*shapes_of(variant), timed)]
    if TRACE and variant in [one for one, _ in traced()]:
        shapes.append((timed, True))
    counter = torch.empty(1, dtype=torch.int32, device="meta")
    found = {}
    for shape, is_traced in shapes:
        headdim = variant.headdim + (shape.headdim or 0)
        q, k, v = (
            torch.empty(shape.batch, *rows, headdim, dtype=torch.bfloat16, device="meta")
            for rows in ((shape.seqlen_q, shape.nheads), *[(shape.seqlen_k, shape.nheads_k)] * 2)
        )
        problem = AttentionProblem(q, k, v, make_transform(headdim), visibility_of(variant, shape))
        lse = torch.empty(problem.lse_shape, device="meta")
        arguments = (
            problem,
            variant.plan,
            torch.empty_like(q),
            lse,
            counter if is_traced else None,
        )
        with (
            mock.patch.object(launch, "counter_for", return_value=counter),
            mock.patch.object(launch, "multiprocessors_of", return_value=shape.programs),
        ):
            (one,) = aot.record(lambda a=arguments: launch.launch_forward(*a), "sm90")
        found[str(sorted(one.keywords.items()))] = one
    return list(found.values())


def launch_traced(variant: Variant, seqlen: int, times: int = 1) -> Any:
    """What the traced kernel wrote at its last launch: (programs, consumers, 66, 16) int32."""
    import torch

    from flash_attn.backends.sm90 import launch

    (problem, out), run = bound(variant, seqlen)
    lse = torch.empty(problem.lse_shape, device="cuda")
    tiles = -(-seqlen // variant.plan.block_m) * problem.q.shape[0] * problem.q.shape[2]
    programs = min(tiles, 132)
    trace = torch.zeros(programs, variant.plan.consumers, 66, 16, dtype=torch.int32, device="cuda")
    for _ in range(times - 1):
        run()
    launch.launch_forward(problem, variant.plan, out, lse, trace)
    return trace


# What a traced kernel writes of a tile, after its number of blocks.
PHASES = ("scores", "softmax", "loop", "wait_k", "wait_v", "wait_s", "last", "mail", "pv", "out")


def trace() -> None:
    """Say where the time of traced kernels goes."""
    import torch

    for variant, lengths in traced():
        for seqlen in lengths:
            data = launch_traced(variant, seqlen, 20).cpu()
            torch.cuda.synchronize()
            head = data[:, :, 0].double()
            begin, end = head[..., 0].min(), head[..., 2].max()
            spread = (head[..., 0] - begin).mean().item(), (end - head[..., 2]).mean().item()
            life = head[..., 2] - head[..., 0]
            rate = ((head[..., 3] - head[..., 1]) % 2**32 / life.clamp_min(1)).median().item()
            tiles = data[:, :, 1:].flatten(0, 2).double()
            tiles = tiles[tiles[:, 0] > 0]
            blocks = tiles[:, 0].mean().item()
            mean = tiles.mean(0)
            steps = max(blocks - 1, 1e-9)
            text = [f"{name} {mean[i + 1].item() / (steps if 1 < i < 6 else 1):.0f}"
                    for i, name in enumerate(PHASES)]  # fmt: skip
            say(
                event="trace",
                text=f"{variant.name} S={seqlen}: {(end - begin).item() / 1e3:.1f} us, begins "
                f"+{spread[0]:.0f} ends -{spread[1]:.0f} ns, {rate:.2f} GHz, tiles/program "
                f"{head[..., 4].mean().item():.1f} blocks {blocks:.1f}; cycles a tile (loop, "
                f"wait_*: a block): {' '.join(text)}",
            )


def timed_cells(chosen: list[Variant], seconds: float) -> None:
    """Time ``chosen``, all of one head dim and mask, in turns with PyTorch's kernels."""
    end = time.monotonic() + seconds
    for position, seqlen in enumerate(sorted(SEQLENS, key=lambda x: x == 8192)):
        left = end - time.monotonic()
        if left < 0.3:
            return
        say(event="stage", at=f"time {seqlen}")
        time_cell(chosen, seqlen, left / (len(SEQLENS) - position))


def cudnn(problem: Any, masked: bool) -> Callable[[], Any]:
    """PyTorch's attention by cuDNN."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))

    def run() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=masked)

    return run


def relative_error(got: Any, want: Any) -> float:
    """In the Frobenius norm."""
    return float((got.float() - want).norm() / want.norm())


def library_in(folder: Path, *names: str) -> Path | None:
    """The first of ``names`` that is in ``folder``."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def fa3(folder: Path, problem: Any, masked: bool) -> Callable[[], Any]:
    """FlashAttention-3 by the operator in the library that lies in ``folder``."""
    import torch

    library = library_in(folder, *FA3_LIBRARIES)
    runtime = library_in(folder, "libcudart.so.12", "nvidia/cuda_runtime/lib/libcudart.so.12")
    if runtime is not None:
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(library))
    forward = torch.ops.flash_attn_3.fwd
    q, k, v = problem.q, problem.k, problem.v
    return lambda: forward(q, k, v, is_causal=masked, num_splits=1)[0]


def time_cell(chosen: list[Variant], seqlen: int, seconds: float) -> None:
    """Time one length; a variant that differs from cuDNN is reported instead."""
    import torch

    runs: dict[str, Callable[[], Any]] = {}
    width = HIDDEN // chosen[0].headdim * chosen[0].headdim
    flops = 4.0 * TOKENS * seqlen * width / (2 if chosen[0].masked else 1)
    (problem, _), _ = bound(chosen[0], seqlen)
    want = None
    with torch.no_grad():
        try:
            runs["cudnn"] = cudnn(problem, chosen[0].masked)
            want = runs["cudnn"]().transpose(1, 2).float()
        except RuntimeError as error:
            del runs["cudnn"]
            say(event="note", text=f"cudnn {seqlen}: {error}"[:200])
        if FA3 is not None:
            try:
                runs["fa3"] = fa3(FA3, problem, chosen[0].masked)
                want = runs["fa3"]().float() if want is None else want
                error = relative_error(runs["fa3"](), want)
                if not error < 1e-2:
                    del runs["fa3"]
                    say(event="note", text=f"fa3 {seqlen}: differs from cuDNN by {error:.1e}")
            except (RuntimeError, OSError, AttributeError) as problem_met:
                runs.pop("fa3", None)
                say(event="note", text=f"fa3 {seqlen}: {problem_met}"[:200])
        for variant in chosen:
            (_, out), run = bound(variant, seqlen)
            out.fill_(float("nan"))
            run()
            if want is not None:
                error = relative_error(out, want)
                if not error < 1e-2:
                    say(event="note", text=f"WRONG {variant.name} {seqlen}: rel {error:.1e}")
                    continue
            runs[variant.name] = run
        milliseconds = time_in_turns(runs, seconds)
    rates = {name: flops / ms / 1e9 for name, ms in milliseconds.items()}
    say(event="times", seqlen=seqlen, rates=rates)


def time_in_turns(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each; the order rotates, the L2 cache is flushed before every run."""
    import torch

    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    order = list(runs)
    end = time.monotonic() + seconds
    for turn in range(42):
        if turn > 6 and time.monotonic() > end:
            break
        order = order[1:] + order[:1]
        for name in order:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(LEAD_CYCLES)
            before.record()
            runs[name]()
            after.record()
            if turn >= 2:
                events[name].append((before, after))
        torch.cuda.synchronize()
    return {
        name: statistics.median(before.elapsed_time(after) for before, after in pairs)
        for name, pairs in events.items()
    }


def work(task: str, names: list[str], seconds: float) -> None:
    """What a worker process does."""
    by_name = {variant.name: variant for variant in all_variants()}
    chosen = [by_name[name] for name in names]
    if task == "compile":
        compile_all(chosen)
    elif task == "trace":
        trace()
    elif task == "check":
        check(chosen[0])
    elif task == "stress":
        stress(chosen[0])
    else:
        timed_cells(chosen, seconds)
    say(event="done")


# ------------------------------------------------------------------------------------- parent side
@dataclass
class Finding:
    """What a worker process said, and how it ended: "ok" or why not."""

    state: str
    messages: list[dict[str, Any]] = field(default_factory=list)

    def all(self, event: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["event"] == event]


def call(task: str, chosen: list[Variant], limit: float, budget: float = 0.0) -> Finding:
    """Run a worker for at most ``limit`` seconds."""
    names = json.dumps([variant.name for variant in chosen])
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--work", task, names, str(budget)]
        + ["--trial"] * TRIAL
        + ["--trace"] * TRACE
        + (["--fa3", str(FA3)] if FA3 else []),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    state = ""
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        state = f"no end after {limit:.0f} s"
    lines = output.splitlines()
    found = Finding("ok", [json.loads(line[2:]) for line in lines if line.startswith("@@")])
    if not found.all("done"):
        stages = found.all("stage")
        rest = [line for line in lines if line.strip() and not line.startswith("@@")]
        found.state = (
            f"{state or f'exit {process.returncode}'} at {stages[-1]['at'] if stages else 'start'}"
            f"; {' | '.join(rest[-3:])[:400]}"
        )
    return found


class Lab:
    """One session: variants, findings and the clock."""

    def __init__(self, chosen: list[Variant], deadline: float, out: Path | None, task: str):
        self.chosen = chosen
        self.task = task  # what shows that a variant is right: "check" or "stress"
        self.started = time.monotonic()
        self.deadline = deadline
        self.out = out
        self.record: dict[str, Any] = {"checks": {}, "times": [], "notes": []}

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - (time.monotonic() - self.started)

    def log(self, *text: object) -> None:
        """Print with the time since the start."""
        print(f"[{time.monotonic() - self.started:5.1f}]", *text, flush=True)

    def save(self) -> None:
        """Write what is known so far."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.record, indent=1), encoding="utf-8")

    def compile(self, jobs: int, seconds: float = COMPILE_SECONDS) -> bool:
        """Fill the compiler's cache; whether everything was compiled."""
        chosen = list({kernel_of(x): x for x in reversed(self.chosen)}.values())
        shares = [chosen[i::jobs] for i in range(min(jobs, len(chosen)))]
        limit = min(seconds, self.left())
        with ThreadPoolExecutor(len(shares)) as pool:
            findings = list(pool.map(lambda share: call("compile", share, limit), shares))
        kernels = [message for found in findings for message in found.all("compiled")]
        spilling = sum(message["spills"] > 0 for message in kernels)
        self.log(f"compiled {len(kernels)} kernels, {spilling} spill")
        for found in findings:
            if found.state != "ok":
                self.log("compiling:", found.state)
        return all(found.state == "ok" for found in findings)

    def check(self, jobs: int) -> list[Variant]:
        """The variants that are right."""

        def one(variant: Variant) -> tuple[Variant, Finding]:
            if self.left() < LEFT_SECONDS:
                return variant, Finding("not checked: no time left")
            return variant, call(self.task, [variant], CHECK_SECONDS)

        good: list[Variant] = []
        failed: list[Variant] = []
        distinct = self.chosen
        if TRIAL:
            distinct = list({kernel_of(x): x for x in reversed(self.chosen)}.values())
        with ThreadPoolExecutor(jobs) as pool:
            for variant, found in pool.map(one, distinct):
                bad = [text for message in found.all("checked") for text in message["bad"]]
                errors = found.all("error")
                worst = max((message["relative"] for message in errors), default=math.nan)
                if found.state == "ok" and not bad:
                    good.append(variant)
                else:
                    failed.append(variant)
                verdict = found.state if found.state != "ok" else f"{len(bad)} wrong"
                self.log(f"{variant.name:44s}", "right" if variant in good else verdict,
                         f"rel {worst:.1e}")  # fmt: skip
                for text in bad[:3]:
                    self.log("    ", text)
                self.record["checks"][variant.name] = {"state": found.state, "bad": bad}
        # Whether others on the same GPU have a part in it.
        for variant in failed[:3]:
            _, found = one(variant)
            bad = [text for message in found.all("checked") for text in message["bad"]]
            self.log("again, alone:", variant.name, found.state, f"{len(bad)} wrong", *bad[:3])
        right = {kernel_of(x) for x in good}
        return [x for x in self.chosen if kernel_of(x) in right]

    def trace(self) -> None:
        """Print where traced kernels spend their time."""
        found = call("trace", [], 40)
        self.log("traced:", found.state)
        self.record["trace"] = [message["text"] for message in found.all("trace")]
        for text in self.record["trace"]:
            print(text, flush=True)

    def time(self, good: list[Variant]) -> dict[tuple[int, bool], dict[str, dict[int, float]]]:
        """TFLOP/s by (head dim, masked), name and length."""
        groups = list(dict.fromkeys((x.headdim, x.masked) for x in good))
        groups.sort(key=lambda group: not group[1])
        table: dict[tuple[int, bool], dict[str, dict[int, float]]] = {}
        for position, group in enumerate(groups):
            seconds = min(TIME_SECONDS, (self.left() - 10) / (len(groups) - position) - 6)
            if seconds < 5:
                self.record["notes"].append(f"no time left for {group}")
                continue
            members = [x for x in good if (x.headdim, x.masked) == group]
            found = call("time", members, seconds + 15, seconds)
            rows = table.setdefault(group, {})
            for message in found.all("times"):
                for name, rate in message["rates"].items():
                    rows.setdefault(name, {})[message["seqlen"]] = rate
                self.record["times"].append({"group": group, **message})
            self.record["notes"] += [message["text"] for message in found.all("note")]
            self.log(f"timed {group}: {found.state}")
            self.save()
        return table


def print_table(table: dict[tuple[int, bool], dict[str, dict[int, float]]]) -> None:
    """TFLOP/s, and percent of the best peer's in the same turns; * marks the best of a length."""
    print(f"TFLOP/s and % of the best peer at seqlen {SEQLENS}; {TOKENS} tokens, hidden {HIDDEN}")
    ratios: dict[str, float] = {}
    for (headdim, masked), rows in table.items():
        label = f"{headdim} {'causal' if masked else 'full'}"
        print(f"-- head dim {label}")
        ours = {name: row for name, row in rows.items() if name not in PEERS}
        peers = {name: row for name, row in rows.items() if name in PEERS}
        best, rival = (
            {s: max((row.get(s, 0.0) for row in part.values()), default=0.0) for s in SEQLENS}
            for part in (ours, peers)
        )
        for s in SEQLENS:
            if best[s] and rival[s]:
                ratios[f"{label} {s}"] = best[s] / rival[s]
        for name, row in rows.items():
            cells = []
            for s in SEQLENS:
                rate = row.get(s, 0.0)
                percent = f"{100 * rate / rival[s]:4.0f}" if rival[s] else "    "
                mark = "*" if rate == best[s] else " "
                cells.append(f"{rate:4.0f}{percent}{mark}" if rate else "   -     ")
            print(f"{name:50s}", *cells)
    if ratios:
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        lowest = sorted(ratios, key=lambda cell: ratios[cell])[:8]
        print(f"best plan over best peer, {len(ratios)} cells: mean {mean:.3f}; lowest:",
              ", ".join(f"{cell} {ratios[cell]:.2f}" for cell in lowest))  # fmt: skip


def main() -> int:
    """Run the lab; the exit status says whether every variant was right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--deadline", type=float, default=460.0, help="seconds for everything")
    parser.add_argument("--match", default="", help="only variants whose name contains it")
    parser.add_argument("--headdims", type=int, nargs="+", default=BLOCK_DS, help="of these")
    parser.add_argument("--list", action="store_true", help="print the variants' names and end")
    parser.add_argument("--no-times", action="store_true", help="compile and check alone")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache and end")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    parser.add_argument("--stress", action="store_true", help="check by many runs of short tiles")
    parser.add_argument("--checks", type=int, default=0, help="checks at a time; 0: up to 6")
    parser.add_argument("--trial", action="store_true", help="also plans that differ in one part")
    parser.add_argument("--trace", action="store_true", help="where the time goes at 128 causal")
    parser.add_argument("--fa3", type=Path, help="folder of FlashAttention-3's library, a peer")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fa3 and library_in(args.fa3, *FA3_LIBRARIES) is None:
        parser.error(f"--fa3 {args.fa3}: there is none of {', '.join(FA3_LIBRARIES)}")
    if args.work:
        try:
            work(args.work[0], json.loads(args.work[1]), float(args.work[2]))
        except Exception:
            traceback.print_exc()
            return 1
        return 0
    chosen = [x for x in all_variants() if args.match in x.name and x.headdim in args.headdims]
    if args.list or not chosen:
        print("\n".join(variant.name for variant in chosen) or f"nothing matches {args.match!r}")
        return 0 if chosen else 2
    lab = Lab(chosen, args.deadline, args.out, "stress" if args.stress else "check")
    if args.compile_only:
        return 0 if lab.compile(args.jobs, args.deadline) else 1
    lab.compile(args.jobs)
    good = lab.check(args.checks or min(13 if TRIAL else 6, args.jobs))
    lab.save()
    if TRACE:
        lab.trace()
    table = {} if args.no_times else lab.time(good)
    lab.save()
    print_table(table)
    for note in lab.record["notes"][:6]:
        print("note:", note[:160])
    print(f"{len(good)} of {len(chosen)} right, {time.monotonic() - lab.started:.0f} s")
    return 0 if len(good) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
