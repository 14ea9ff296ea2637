"""Whether the Hopper forward is right with four consumers, and what barriers without memory of
their own do, in one call of about 40 seconds on a GPU.

    PYTHONPATH=src python scripts/sm90_four_lab.py --deadline 60 --json four.json
    PYTHONPATH=src python scripts/sm90_four_lab.py --compile-only      # no GPU needed

Kernels with a fixed schedule once had barriers that nobody used, and the compiler put the first
rows of consumer 0's results in their memory (docs/lab/hopper-forward.md, "Four consumers"). Here
run four consumers as they are, which must be right, and as they were ("unused"): expected is NaN
in row 0 of consumer 0, columns 0 to 15, with the bits of a barrier's first state. "invalidated" is
the same with `mbarrier.inval` before the memory goes to results, expected right. Fewer consumers
with the same overlap were never seen wrong; those here have as many barriers as four consumers.

Where compute-sanitizer is installed, its racecheck looks at one launch of "4 rr" and "4 rr unused".

Each variant has a process and a time limit. What is wrong is told apart: never written, NaN, off,
outside of the result, log-sum-exp, bits that differ between runs; where, and the bits that lie
there. The exit status says whether all but "unused" were right.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY / "tests")]

from flash_attn.backends.sm90.plans import (  # noqa: E402
    DYNAMIC,
    ROUND_ROBIN,
    ForwardPlan,
)

STARTED = time.monotonic()
REPEATS = 40
SECONDS = 25  # of a variant
DEVICE = "cuda"
# What results are filled with before a launch: a NaN that no kernel writes.
UNWRITTEN = 0x7FC1
# (batch, heads, heads of keys, queries, keys, programs, head dim)
SHAPES = (
    (1, 6, 2, 700, 7, 3, 64),
    (2, 4, 2, 1000, 1000, 5, 64),
    (8, 16, 4, 300, 300, 132, 64),
    (2, 8, 8, 200, 64, 5, 64),
    (1, 6, 2, 700, 7, 3, 40),
    (1, 6, 2, 700, 7, 3, 56),
)
NO_MAILBOX = "        mailbox = q_ring  # never asked\n"
MAILBOX = """\
        NOBODYS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        mailbox = new_ring(gl.allocate_shared_memory(gl.int32, [2, 1], NOBODYS), 2, 1, CONSUMERS)
"""
INVALIDATION = """\
        for i in gl.static_range(2):
            mbarrier.invalidate(mailbox.full.index(i))
            mbarrier.invalidate(mailbox.empty.index(i))
"""
EDITS = {"": NO_MAILBOX, "unused": MAILBOX, "invalidated": MAILBOX + INVALIDATION}


class Variant(NamedTuple):
    """A plan, a mask and an edit of the kernel's source."""

    plan: ForwardPlan
    causal: bool = False
    edit: str = ""
    registers: int = 0


def variants() -> dict[str, Variant]:
    """All that is run, by name."""
    four = ForwardPlan(4, 64, 3, ROUND_ROBIN, 2, 1)
    slim, skip = replace(four, slim=True), replace(four, skip=True)
    dynamic = replace(skip, scheduler=DYNAMIC, section_bytes=16 << 20, last_bytes=32 << 20)
    found = {
        "4 rr": Variant(four),
        "4 rr slim": Variant(slim),
        "4 rr causal": Variant(skip, True),
        "4 rr causal slim": Variant(replace(skip, slim=True), True),
        "4 dyn causal": Variant(dynamic, True),
        "4 dyn causal slim": Variant(replace(dynamic, slim=True), True),
        "4 dyn causal late": Variant(replace(dynamic, late=True), True),
        "4 rr turns": Variant(replace(four, ping_pong=True)),
        "4 rr 104 registers": Variant(four, registers=104),
    }
    found |= {
        f"{name} unused": found[name]._replace(edit="unused")
        for name in ("4 rr", "4 rr slim", "4 rr causal", "4 rr causal slim")
    }
    found["4 rr invalidated"] = Variant(four, edit="invalidated")
    for consumers, slots in ((3, 2), (3, 4), (2, 6)):
        plan = replace(four, consumers=consumers, q_slots=slots)
        found[f"{consumers} rr q{slots} unused"] = Variant(plan, edit="unused")
    return found


# ----------------------------------------------------------------------------------------- workers
def say(**message: Any) -> None:
    """Tell the parent process something."""
    print("@@" + json.dumps(message), flush=True)


def install(variant: Variant, stack: ExitStack) -> Any:
    """The module that launches the variant's kernel, until ``stack`` is left."""
    from flash_attn.backends._launcher import Launcher
    from flash_attn.backends.sm90 import launch
    from flash_attn.kernels import sm90_forward

    kernel = sm90_forward
    if variant.edit:
        text = Path(str(sm90_forward.__file__)).read_text(encoding="utf-8")
        if text.count(NO_MAILBOX) != 1:
            raise RuntimeError(f"the kernel's source has not one line {NO_MAILBOX.strip()!r}")
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder) / f"sm90_forward_{variant.edit}.py"
        path.write_text(text.replace(NO_MAILBOX, EDITS[variant.edit]), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"flash_attn.kernels.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        kernel = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = kernel
        spec.loader.exec_module(kernel)
    patch = mock.patch.object
    launcher = Launcher(kernel.attention_forward_sm90)
    stack.enter_context(patch(launch, "attention_forward_sm90", launcher))
    if variant.registers:
        given = mock.PropertyMock(return_value=variant.registers)
        stack.enter_context(patch(ForwardPlan, "registers", given))
    return launch


def padded(*shape: int) -> Any:
    """(its storage as 16-bit numbers, a tensor of the shape) with other memory around each row."""
    import torch

    batch, seqlen, nheads, headdim = shape
    whole = torch.zeros(
        batch, seqlen + 40, nheads, headdim + 8, dtype=torch.bfloat16, device=DEVICE
    )
    return whole.view(torch.int16), whole[:, :seqlen, :, :headdim]


def problem_of(shape: tuple[int, ...], causal: bool) -> Any:
    """The problem of a shape."""
    from flash_attn.core.problem import AttentionProblem, Visibility, make_transform

    batch, nheads, nheads_k, seqlen_q, seqlen_k, _, headdim = shape
    q, k, v = (
        padded(batch, rows, heads, headdim)[1].normal_()
        for rows, heads in ((seqlen_q, nheads), (seqlen_k, nheads_k), (seqlen_k, nheads_k))
    )
    visibility = Visibility(None, 0) if causal else Visibility()
    return AttentionProblem(q, k, v, make_transform(headdim), visibility, pack_gqa=False)


def check(variant: Variant, shape: tuple[int, ...], launch: Any) -> list[str]:
    """What is wrong in REPEATS launches, in words."""
    import torch

    from flash_attn.backends.reference import BACKEND as reference

    problem = problem_of(shape, variant.causal)
    want, want_lse, *_ = reference.forward(problem)
    around, out = padded(*problem.q.shape)
    bits = out.view(torch.int16)
    lse = torch.empty(problem.lse_shape, device=DEVICE)
    wrong = {
        kind: torch.zeros(out.shape, dtype=torch.int32, device=DEVICE)
        for kind in ("unwritten", "NaN", "off")
    }
    runs = {kind: torch.zeros((), dtype=torch.int64, device=DEVICE)
            for kind in (*wrong, "outside", "lse", "differing")}  # fmt: skip
    first = saved = has_saved = None
    with mock.patch.object(launch, "multiprocessors_of", return_value=shape[5]):
        for _ in range(REPEATS):
            around.fill_(UNWRITTEN)
            lse.fill_(float("nan"))
            launch.launch_forward(problem, variant.plan, out, lse)
            unwritten = bits == UNWRITTEN
            nan = out.isnan() & ~unwritten
            off = ~nan & ~unwritten & ~((out.float() - want.float()).abs() < 0.05)
            for kind, found in zip(wrong, (unwritten, nan, off), strict=True):
                wrong[kind] += found
                runs[kind] += found.any()
            runs["outside"] += (around != UNWRITTEN).sum() != (~unwritten).sum()
            runs["lse"] += ~((lse - want_lse).abs() < 1e-3).logical_or(lse == want_lse).all()
            any_wrong = (unwritten | nan | off).any()
            if first is None or saved is None or has_saved is None:
                first, saved, has_saved = bits.clone(), bits.clone(), any_wrong
            runs["differing"] += (bits != first).any()
            saved = torch.where(any_wrong & ~has_saved, bits, saved)
            has_saved = has_saved | any_wrong
    bad = [f"{kind} in {int(n)} of {REPEATS} runs" for kind, n in runs.items() if int(n)]
    for kind, counts in wrong.items():
        if int(runs[kind]):
            bad.append(f"{kind}: {places(counts.cpu(), saved.cpu(), variant, shape)}")
    return bad


def places(counts: Any, saved: Any, variant: Variant, shape: tuple[int, ...]) -> str:
    """Where elements are wrong: consumers, rows of a consumer, columns, tiles, and some bits."""
    consumers, block_m = variant.plan.consumers, variant.plan.block_m
    at = counts.nonzero().tolist()
    rows = list(dict.fromkeys((b, r, h) for b, r, h, _ in at))
    of_consumer = Counter(r // 64 % consumers for _, r, _ in rows)
    of_row = Counter(r % 64 for _, r, _ in rows)
    columns = sorted({column for *_, column in at})
    tiles = sorted({(b, h, r // block_m) for b, r, h in rows})
    b, r, h = rows[0]
    words = " ".join(f"{x & 0xFFFF:04x}" for x in saved[b, r, h, :16].tolist())
    return (
        f"{len(at)} elements of {len(rows)} rows; consumers {dict(of_consumer.most_common(4))}, "
        f"their rows {dict(of_row.most_common(5))}, columns {columns[:17]}; (batch, head, tile) "
        f"{tiles[:6]} of {len(tiles)}; first run's {b, r, h}: {words}"
    )


def work(name: str, compile_only: bool, once: bool) -> None:
    """What a worker process does; with ``once`` one launch of the first shape."""
    global REPEATS
    import torch

    variant = variants()[name]
    torch.manual_seed(5)
    with ExitStack() as stack:
        launch = install(variant, stack)
        if compile_only:
            compile_one(variant, launch, stack)
            return
        REPEATS = 1 if once else REPEATS
        for shape in SHAPES[:1] if once else SHAPES:
            say(stage=shape)
            for text in check(variant, shape, launch):
                say(bad=f"{shape}: {text}")
    say(done=True)


def compile_one(variant: Variant, launch: Any, stack: ExitStack) -> None:
    """Fill the compiler's cache, on CPU tensors and a driver that launches nothing."""
    from stub_driver import stub_driver

    stack.enter_context(stub_driver())
    stack.enter_context(mock.patch(f"{__name__}.DEVICE", "cpu"))
    stack.enter_context(mock.patch.object(launch, "multiprocessors_of", return_value=3))
    problem = problem_of(SHAPES[0], variant.causal)
    _, out = padded(*problem.q.shape)
    launch.launch_forward(problem, variant.plan, out, out.new_empty(problem.lse_shape).float())
    say(done=True)


# ------------------------------------------------------------------------------------- parent side
def command(name: str, compile_only: bool) -> list[str]:
    """The command line of a variant's process."""
    task = [sys.executable, str(Path(__file__).resolve()), "--work", name]
    return task + ["--compile-only"] * compile_only


def output_of(arguments: list[str], seconds: float) -> tuple[str, str]:
    """(what a process printed, how it ended: "" if well)."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], f"no end after {seconds:.0f} s"
    return text, f"exit {process.returncode}" if process.returncode else ""


def run(name: str, compile_only: bool, deadline: float) -> dict[str, Any]:
    """A variant's process: what it found, and how it ended."""
    left = deadline - (time.monotonic() - STARTED)
    if left < 5:
        return {"end": "no time left", "bad": []}
    text, end = output_of(command(name, compile_only), left if compile_only else min(SECONDS, left))
    lines = text.splitlines()
    messages = [json.loads(line[2:]) for line in lines if line.startswith("@@")]
    if not end and not any("done" in message for message in messages):
        end = "no end"
    if end:
        stages = [message["stage"] for message in messages if "stage" in message]
        rest = [line for line in lines if line.strip() and not line.startswith("@@")]
        end = f"{end} at {stages[-1] if stages else 'start'}; {' | '.join(rest[-3:])[:300]}"
    return {"end": end, "bad": [message["bad"] for message in messages if "bad" in message]}


def sanitize(deadline: float) -> None:
    """What racecheck says of a variant as it is and of one as it was, where it is installed."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    tool = next((place for place in places if place and Path(place).exists()), None)
    if tool is None:
        print("no compute-sanitizer here")
        return
    for name in ("4 rr", "4 rr unused"):
        left = deadline - (time.monotonic() - STARTED)
        if left > 10:
            once = [*command(name, False), "--once"]
            text, end = output_of([tool, "--tool", "racecheck", *once], min(left, 25))
            found = [line for line in text.splitlines() if line.startswith("=====")]
            print("racecheck", name, end, *found[:4], *found[-2:], sep="\n    ")


def main() -> int:
    """Run the lab."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds for everything")
    parser.add_argument("--match", default="", help="only variants whose name contains it")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--compile-only", action="store_true", help="compile, without a GPU")
    parser.add_argument("--json", type=Path, help="write all that was found")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        try:
            work(args.work, args.compile_only, args.once)
        except Exception:
            traceback.print_exc()
            return 1
        return 0
    names = [name for name in variants() if args.match in name]
    if not names:
        parser.error(f"nothing matches {args.match!r}: {', '.join(variants())}")
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(
            zip(
                names,
                pool.map(lambda name: run(name, args.compile_only, args.deadline), names),
                strict=True,
            )
        )
    failed, well = 0, "compiled" if args.compile_only else "right"
    for name, result in found.items():
        is_bad = bool(result["end"] or result["bad"])
        failed += is_bad and (args.compile_only or "unused" not in name)
        print(f"{name:26s}", result["end"] or ("WRONG" if is_bad else well), flush=True)
        for text in result["bad"]:
            print("    ", text)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if not args.compile_only:
        sanitize(args.deadline)
    print(f"{len(names)} variants, {failed} that should be right are not, "
          f"{time.monotonic() - STARTED:.0f} s")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
