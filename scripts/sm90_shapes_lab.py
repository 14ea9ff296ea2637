"""Times the Hopper forward beside FlashAttention-3 at shapes that its plans' tables lack.

    python scripts/sm90_shapes_lab.py --fa3 FOLDER --deadline 200 --out shapes.json
    python scripts/sm90_shapes_lab.py --match 'd(96|192).*(4096|16384)' --deadline 80 --fa3 FOLDER
    python scripts/sm90_shapes_lab.py --list
    python scripts/sm90_shapes_lab.py --compile-only      # no GPU needed

On one GPU: grouped heads with and without packing, packed sequences, windows, ALiBi, head dims
between the powers of two, and a series of small problems in float16. Every cell is compiled and
compared with the portable kernels in a process of its own, all at once; what is right is then timed
in turns, one cell after another, without variants that are wrong. The last thing printed is the
table: TFLOP/s, percent of FlashAttention-3's.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sm90_forward_lab as lab  # noqa: E402

from flash_attn.backends.sm90.plans import DYNAMIC, ROUND_ROBIN, ForwardPlan  # noqa: E402

L2 = 32 << 20
_64 = ForwardPlan(2, 128, 3, DYNAMIC, 2, 1, section_bytes=L2)
_64_FOUR = ForwardPlan(4, 64, 3, DYNAMIC, 2, 1, section_bytes=L2, skip=True)
_64_THREE = ForwardPlan(3, 128, 2, DYNAMIC, 2, 1, section_bytes=L2, skip=True, ping_pong=True)
_64_ONE = ForwardPlan(1, 128, 3, ROUND_ROBIN, 1, 1)
_128 = ForwardPlan(2, 128, 2, DYNAMIC, 1, 1, section_bytes=L2)
_96 = ForwardPlan(2, 128, 3, DYNAMIC, 1, 1, section_bytes=8 << 20, last_bytes=L2)
_192 = ForwardPlan(2, 128, 3, DYNAMIC, 1, 1, section_bytes=16 << 20, last_bytes=L2, joint=True)
_STAY: dict[str, Any] = {"scheduler": ROUND_ROBIN, "section_bytes": 0, "skip": False}


def changed(plan: ForwardPlan, *options: str) -> tuple[ForwardPlan, ...]:
    """``plan`` with each of ``options``, which are names of its flags."""
    return tuple(replace(plan, **dict.fromkeys(names.split(), True)) for names in options)


# By head dim: what is tried beside the plan with a causal mask, with packed sequences, with a left
# bound, and, by whether there is a mask, where tiles are few.
CAUSAL = {
    96: changed(_96, "overlap peel", "ping_pong peel"),
    192: changed(_192, "skip late peel", "late overlap peel"),
}
PACKED = {
    64: (_64, *changed(_64_FOUR, "late"), _64_THREE),
    128: changed(_128, "overlap", "late overlap"),
    96: changed(replace(_96, stages=2), "peel", "late overlap"),
    192: (),
    256: (),
}
WINDOW = {64: changed(_64, "late"), 128: changed(_128, "overlap", "late overlap")}
FEW = {
    True: (*changed(_64, "late overlap peel", "late peel"), _64_THREE, _64_FOUR, _64_ONE),
    False: (
        *(replace(plan, **_STAY) for plan in changed(_64, "overlap", "ping_pong")),
        replace(_64_THREE, **_STAY, slim=True),
        replace(_64_FOUR, **_STAY, slim=True),
        _64_ONE,
    ),
}
PORTABLE = "portable kernels"  # what results are compared with
# Lengths of 16 packed sequences, 32768 tokens in all.
LENGTHS = (
    4096,
    128,
    3000,
    1024,
    2048,
    512,
    6144,
    777,
    1500,
    2300,
    256,
    3072,
    1811,
    900,
    1200,
    4000,
)
# Also checked: rows and keys that end within tiles; keys past a window's left bound.
RAGGED = (413, 517)


class Cell(NamedTuple):
    """A problem to time, with the plans that are tried beside the one that is chosen."""

    name: str
    batch: int
    seqlens: tuple[int, int]
    heads: tuple[int, int]
    headdim: int
    window: tuple[int, int] = (-1, 0)
    dtype: str = "bfloat16"
    varlen: bool = False
    alibi: bool = False
    plans: tuple[ForwardPlan, ...] = ()

    def variants(self) -> dict[str, tuple[ForwardPlan | None, bool | None]]:
        """(plan or None for the chosen one, whether heads are packed) by name."""
        found: dict[str, tuple[ForwardPlan | None, bool | None]] = {"chosen": (None, None)}
        if self.heads[0] > self.heads[1]:
            found |= {"packed heads": (None, True), "one head a tile": (None, False)}
        for plan in self.plans:
            masked = self.window != (-1, -1)
            found[lab.Variant(self.headdim, masked, plan).name] = (plan, None)
        return found

    def flops(self) -> float:
        """Of both products, with the keys that are seen."""
        pairs = 0
        left = self.window[0] + 1 if self.window[0] >= 0 else 1 << 40
        for q, k in [(n, n) for n in LENGTHS] if self.varlen else [self.seqlens] * self.batch:
            if self.window[1] < 0:
                pairs += q * k
            else:
                pairs += sum(min(max(i + k - q + 1, 0), left) for i in range(q))
        return 4.0 * pairs * self.heads[0] * self.headdim


def cells() -> list[Cell]:
    """In order of importance."""
    found = [
        Cell("gqa 32/8 b4 s4096", 4, (4096, 4096), (32, 8), 128),
        Cell("gqa 16/2 b2 s8192", 2, (8192, 8192), (16, 2), 128),
    ]
    for headdim, nheads, heads in ((128, 16, (32, 8)), (64, 32, (64, 16)), (256, 8, None),
                                   (96, 21, None), (192, 11, None)):  # fmt: skip
        for pair in filter(None, ((nheads, nheads), heads)):
            shared = f" gqa {pair[0]}/{pair[1]}" if pair[0] > pair[1] else ""
            found.append(
                Cell(f"varlen 32k d{headdim}{shared}", 16, (0, 0), pair, headdim, varlen=True,
                     plans=PACKED[headdim])
            )  # fmt: skip
    for headdim, nheads in ((64, 32), (128, 16)):
        found.append(
            Cell(f"window 1024 16k d{headdim}", 1, (16384, 16384), (nheads, nheads), headdim,
                 (1024, 0), plans=WINDOW[headdim])
        )  # fmt: skip
    for headdim, nheads in ((96, 21), (192, 11)):
        for window in ((-1, 0), (-1, -1)):
            for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
                kind = "causal" if window[1] == 0 else "full"
                plans = CAUSAL[headdim] if kind == "causal" else ()
                found.append(
                    Cell(f"d{headdim} {kind} s{seqlen}", 16384 // seqlen, (seqlen, seqlen),
                         (nheads, nheads), headdim, window, plans=plans)
                )  # fmt: skip
    for seqlen in (512, 1024, 2048, 4096, 8192):
        for masked, plans in FEW.items():
            window = (-1, 0) if masked else (-1, -1)
            kind = "causal" if masked else "full"
            found.append(
                Cell(f"fp16 b1 h16 d64 {kind} s{seqlen}", 1, (seqlen, seqlen), (16, 16), 64, window,
                     "float16", plans=plans)
            )  # fmt: skip
    found += [
        Cell("gqa 32/8 b16 q80 k4096", 16, (80, 4096), (32, 8), 128),
        Cell("gqa 64/8 b8 q192 k8192", 8, (192, 8192), (64, 8), 128),
        Cell("gqa 16/4 b16 q100 k2048 d64", 16, (100, 2048), (16, 4), 64),
        Cell("alibi s4096 d128", 4, (4096, 4096), (16, 16), 128, alibi=True),
        Cell("alibi s4096 d64", 4, (4096, 4096), (32, 32), 64, alibi=True),
    ]
    return found


def problem_of(cell: Cell, device: str = "cuda") -> Any:
    """The cell's problem."""
    import torch

    from flash_attn.core.problem import (
        DENSE,
        AttentionProblem,
        SequenceLayout,
        Visibility,
        make_transform,
    )

    torch.manual_seed(3)
    dtype = getattr(torch, cell.dtype)
    layout, slopes = DENSE, None
    places = [(cell.batch, length) for length in cell.seqlens]
    if cell.varlen:
        bounds = torch.tensor((0, *LENGTHS)).cumsum(0).to(device, torch.int32)
        layout = SequenceLayout(
            bounds, bounds, max_seqlen_q=max(LENGTHS), max_seqlen_k=max(LENGTHS)
        )
        places = [(sum(LENGTHS),)] * 2
    if cell.alibi:
        slopes = torch.rand(cell.heads[0], device=device) * 0.1
    q, k, v = (
        torch.randn(*place, heads, cell.headdim, device=device).to(dtype)
        for place, heads in zip((*places, places[1]), (*cell.heads, cell.heads[1]), strict=True)
    )
    transform = make_transform(cell.headdim, alibi_slopes=slopes)
    visibility = Visibility.from_window(*cell.window, causal=False)
    return AttentionProblem(q, k, v, transform, visibility, layout)


def ours(cell: Cell, problem: Any) -> dict[str, Callable[[], Any]]:
    """What computes the problem, by the variants' names."""
    from flash_attn.backends.sm90 import launch

    def bind(plan: ForwardPlan | None, pack: bool | None) -> Callable[[], Any]:
        chosen = problem._replace(pack_gqa=pack, num_splits=1)
        return lambda: launch.forward(chosen, None, plan).out

    return {name: bind(*variant) for name, variant in cell.variants().items()}


def fa3(folder: Path, cell: Cell, problem: Any) -> Callable[[], Any]:
    """FlashAttention-3, which chooses itself whether heads are packed."""
    import torch

    lab.fa3(folder, problem, False)  # loads the library
    layout = problem.layout
    options: dict[str, Any] = {
        "is_causal": cell.window == (-1, 0),
        "window_size_left": cell.window[0],
        "window_size_right": cell.window[1],
        "num_splits": 1,
    }
    if cell.varlen:
        options |= {
            "cu_seqlens_q": layout.cu_seqlens_q,
            "cu_seqlens_k": layout.cu_seqlens_k,
            "max_seqlen_q": layout.max_seqlen_q,
            "max_seqlen_k": layout.max_seqlen_k,
        }
    return lambda: torch.ops.flash_attn_3.fwd(problem.q, problem.k, problem.v, **options)[0]


def checked(cell: Cell) -> list[Cell]:
    """The cell, and as it is also checked."""
    if cell.varlen:
        return [cell]
    left = max(cell.window[0], 0)
    return [cell, cell._replace(seqlens=(RAGGED[0] + left, RAGGED[1] + left))]


def kernel_of(cell: Cell, name: str) -> tuple[Any, ...]:
    """What tells the kernels of a cell's variant, or of the portable one, from others."""
    from flash_attn.backends.sm90 import launch

    problem = problem_of(cell, "meta")
    window = tuple(launch.binding_window(problem)[i] is None for i in (0, 1))
    kind = (cell.headdim, window, cell.dtype, cell.varlen, cell.alibi)
    if name == PORTABLE:
        return (*kind, cell.heads[0] > cell.heads[1])
    plan, pack = cell.variants()[name]
    if plan is None:
        with mock.patch.object(launch, "multiprocessors_of", return_value=132):
            plan = launch.plan_for(problem)
    plan = lab.kernel_of(lab.Variant(cell.headdim, True, plan)).plan
    return (*kind, plan, launch.pack_of(problem._replace(pack_gqa=pack), plan))


def compilations(chosen: list[Cell]) -> list[tuple[str, str]]:
    """(cell, variant) of every kernel that checks and timings launch."""
    found: dict[Any, tuple[str, str]] = {}
    for cell in chosen:
        for name in (PORTABLE, *cell.variants()):
            found.setdefault(kernel_of(cell, name), (cell.name, name))
    return list(found.values())


def compile_variant(cell: Cell, name: str) -> list[str]:
    """Compile what checks and timings launch, without a GPU; what it takes, a kernel a text."""
    import aot
    import torch

    from flash_attn.backends.sm90 import launch
    from flash_attn.core import registry

    calls = []
    counter = torch.empty(1, dtype=torch.int32, device="meta")
    for one in checked(cell):
        problem = problem_of(one, "meta")._replace(num_splits=1)
        run = ours(one, problem).get(name) or partial(registry.load("triton").forward, problem)
        with (
            mock.patch.object(launch, "counter_for", return_value=counter),
            mock.patch.object(launch, "multiprocessors_of", return_value=132),
        ):
            calls += aot.record(run, "sm90")
    found = {}
    for call in calls:
        _, compiled = aot.compile_kernel(call, "sm90")
        registers, spills = aot.usage_of(compiled, "sm90")
        found[compiled.hash] = f"{registers} registers" + f", {spills} spilled" * (spills > 0)
    return list(found.values())


def check(cell: Cell) -> tuple[list[str], list[str]]:
    """(what is wrong with the results, beside the portable kernels'; which variants are)."""
    from flash_attn.backends.sm90 import BACKEND
    from flash_attn.core import registry

    bad, out = [], set()
    for one in checked(cell):
        problem = problem_of(one)._replace(num_splits=1)
        reasons = BACKEND.unsupported(problem, backward=False)
        if reasons:
            return reasons, ["chosen"]
        want = registry.load("triton").forward(problem).out.float()
        for name, run in ours(one, problem).items():
            try:
                first = run()
                error = lab.relative_error(first, want)
                wrong = [] if error < 1e-2 else [f"differs from the portable by {error:.1e}"]
                wrong += ["runs differ" for _ in range(3) if (run() != first).any()][:1]
            except Exception as failure:
                wrong = [f"{type(failure).__name__}: {failure}"[-200:]]
            bad += [f"{name}, {one.seqlens}: {text}" for text in wrong]
            out |= {name} if wrong else set()
    return bad, sorted(out)


def time_cell(
    cell: Cell, folder: Path | None, seconds: float, left_out: list[str]
) -> dict[str, float]:
    """TFLOP/s by name."""
    problem = problem_of(cell)
    runs = {name: run for name, run in ours(cell, problem).items() if name not in left_out}
    if folder is not None and not cell.alibi:
        runs["fa3"] = fa3(folder, cell, problem)
        error = lab.relative_error(runs["fa3"](), runs["chosen"]().float())
        if not error < 1e-2:
            lab.say(event="note", text=f"{cell.name}: fa3 differs by {error:.1e}")
    milliseconds = lab.time_in_turns(runs, seconds)
    return {name: cell.flops() / ms / 1e9 for name, ms in milliseconds.items()}


def work(
    tasks: list[tuple[str, Any]], folder: Path | None, seconds: float, compile_only: bool
) -> None:
    """What a worker does: compile variants, check a cell, or, with seconds, time them all.

    Tasks are (cell, variant to compile), (cell, nothing) or (cell, variants to leave out).
    """
    chosen = {cell.name: cell for cell in cells()}
    end = time.monotonic() + seconds
    for position, (name, what) in enumerate(tasks):
        try:
            if compile_only:
                took = compile_variant(chosen[name], what)
                lab.say(event="compiled", name=name, variant=what, kernels=took)
                continue
            if not seconds:
                bad, wrong = check(chosen[name])
                lab.say(event="checked", name=name, bad=bad, wrong=wrong)
                continue
            left = end - time.monotonic()
            if left < 0.5:
                break
            share = min(4.0, left / (len(tasks) - position))
            rates = time_cell(chosen[name], folder, share, what)
            lab.say(event="times", name=name, rates=rates)
        except Exception as error:
            traceback.print_exc()
            text = f"{'' if compile_only is False else what} {type(error).__name__}: {error}"
            lab.say(event="checked", name=name, bad=[text[:300]], wrong=["chosen"])


def call(
    tasks: list[tuple[str, Any]],
    folder: Path | None,
    seconds: float,
    limit: float,
    compile_only: bool = False,
) -> list[Any]:
    """What a worker said, within ``limit`` seconds; an error for what it did not come to."""
    command = [sys.executable, str(Path(__file__).resolve()), "--work", json.dumps(tasks)]
    command += ["--seconds", str(seconds), *(["--fa3", str(folder)] if folder else [])]
    command += ["--compile-only"] * compile_only
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        output, why = done.stdout, done.stderr[-300:]
    except subprocess.TimeoutExpired as stopped:
        output, why = (stopped.stdout or b"").decode(), f"no end after {limit:.0f} s"
    found = [json.loads(line[2:]) for line in output.splitlines() if line.startswith("@@")]
    missing = {name for name, _ in tasks} - {message.get("name") for message in found}
    return found + [
        {"event": "checked", "name": name, "bad": [why], "wrong": ["chosen"]} for name in missing
    ]


def compile_all(chosen: list[Cell], jobs: int, limit: float) -> list[Any]:
    """What workers said that compiled everything, each its share, within ``limit`` seconds."""
    tasks = compilations(chosen)
    shares = [tasks[start::jobs] for start in range(min(jobs, len(tasks)))]
    with ThreadPoolExecutor(jobs) as pool:
        said = pool.map(lambda share: call(share, None, 0.0, limit, True), shares)
        return [message for messages in said for message in messages]


def print_table(rates: dict[str, dict[str, float]]) -> None:
    """TFLOP/s and percent of FlashAttention-3's."""
    for name, row in rates.items():
        peer = row.get("fa3")
        print(f"-- {name}")
        for variant, rate in row.items():
            share = f"{100 * rate / peer:5.1f}" if peer else ""
            print(f"   {variant:48s} {rate:6.1f} {share}")


def main() -> int:
    """Check and time; the exit status says whether everything was right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--deadline", type=float, default=240.0, help="seconds for everything")
    parser.add_argument(
        "--match", default="", help="only cells whose name has this regular expression"
    )
    parser.add_argument("--list", action="store_true", help="print the cells' names and end")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    parser.add_argument("--fa3", type=Path, help="folder of FlashAttention-3's library")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache and end")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work), args.fa3, args.seconds, args.compile_only)
        return 0
    if args.fa3 and lab.library_in(args.fa3, *lab.FA3_LIBRARIES) is None:
        parser.error(f"--fa3 {args.fa3}: there is none of {', '.join(lab.FA3_LIBRARIES)}")
    started = time.monotonic()
    names = [cell.name for cell in cells() if re.search(args.match, cell.name)]
    if args.list or not names:
        print("\n".join(names) or f"nothing matches {args.match!r}")
        return 0 if names else 2
    chosen = [cell for cell in cells() if cell.name in names]
    compiled = compile_all(chosen, args.jobs, args.deadline * (1.0 if args.compile_only else 0.5))
    for message in compiled:
        kernels = message.get("kernels", message.get("bad"))
        if args.compile_only or message["event"] != "compiled" or "spilled" in str(kernels):
            print(message["name"], "|", message.get("variant"), "|", kernels, flush=True)
    if args.compile_only:
        return 0 if all(message["event"] == "compiled" for message in compiled) else 1
    print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        limit = max(20.0, args.deadline * 0.4)
        checks = pool.map(lambda name: call([(name, None)], None, 0.0, limit), names)
        found = [one for said in checks for one in said]
    verdicts = {one["name"]: one["bad"] for one in found}
    for name, bad in verdicts.items():
        print(f"{name:32s}", "right" if not bad else "; ".join(bad)[:400], flush=True)
    left_out = {one["name"]: one["wrong"] for one in found}
    tasks = [(name, left_out[name]) for name in names if "chosen" not in left_out[name]]
    good = [name for name in names if not verdicts[name]]
    left = args.deadline - (time.monotonic() - started)
    said = call(tasks, args.fa3, max(left - 15, 5.0), max(left, 10.0)) if tasks else []
    rates = {one["name"]: one["rates"] for one in said if one["event"] == "times"}
    for one in said:
        if one["event"] != "times":
            print("note:", str(one)[:300])
    print_table(rates)
    if args.out:
        args.out.write_text(json.dumps({"checks": verdicts, "rates": rates}, indent=1), "utf-8")
    print(f"{len(good)} of {len(names)} right, {time.monotonic() - started:.0f} s")
    return 0 if len(good) == len(names) == len(rates) else 1


if __name__ == "__main__":
    sys.exit(main())
