"""Times orders of dq in the Hopper backward, in one call of about 100 seconds on a GPU.

    PYTHONPATH=src python scripts/sm90_backward_order_lab.py --deadline 100 --json order.json
    PYTHONPATH=src python scripts/sm90_backward_order_lab.py --compile-only      # no GPU needed

The main kernel alone at 16k tokens and hidden size 2048, with 0 to 4 steps' additions in flight, in
both orders and with sections of several sizes, beside the unordered plan; then the whole backward
of the plans in use. At its first length every ordered plan must give the unordered one's dq but for
rounding, and the same bits again. What says most comes first; a plan that does not end is left
out from there on.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sm90_backward_lab import Cell, Process, build_launcher, emit, options_of_parent

STARTED = time.monotonic()
SECTIONS = (4, 32, 128)
IN_USE, ORDERED = "unordered", "plan_ordered"


def plans(headdim: int, is_causal: bool, seqlen: int) -> dict[str, Any]:
    """What is compared, by name. "turned" is the other order than the planned one."""
    from flash_attn.backends.sm90.plans_backward import plan_backward, plan_ordered

    ordered = plan_ordered(headdim, is_causal, seqlen)
    turned = ordered._replace(is_reversed=not ordered.is_reversed)
    used = plan_backward(headdim, is_causal, seqlen)
    found = {IN_USE: used._replace(first_stores=False, rotates=False)}
    found["unordered adder"] = ordered._replace(
        deterministic=False, in_flight=0, is_reversed=False, first_stores=False
    )
    if is_causal:
        found["unordered reversed"] = found[IN_USE]._replace(is_reversed=True)
    found |= {f"ordered {n} in flight": ordered._replace(in_flight=n) for n in range(5)}
    found["ordered 2 buffers"] = ordered._replace(dq_slots=2)
    found |= {f"turned {n} in flight": turned._replace(in_flight=n) for n in (1, 2)}
    return found


# ----------------------------------------------------------------------------------------- workers
def compile_worker(choose: Callable[[int, bool, int], dict[str, Any]] = plans) -> None:
    """Compile the kernels of the (headdim, causal, name) on stdin, without touching a GPU."""
    import aot
    import torch

    from flash_attn.backends.sm90 import launch_backward
    from flash_attn.core.problem import (
        AttentionProblem,
        BackwardInputs,
        Visibility,
        make_transform,
    )

    for headdim, is_causal, name in json.loads(sys.stdin.read()):
        x = torch.empty(2, 256, 4, headdim, dtype=torch.bfloat16, device="meta")
        visibility = Visibility(None, 0 if is_causal else None)
        problem = AttentionProblem(x, x, x, make_transform(headdim), visibility)
        lse = torch.empty(2, 4, 256, device="meta")
        state = torch.empty(2, dtype=torch.int64, device="meta")
        inputs = BackwardInputs(x, x, lse, x, x, x, state)
        plan = choose(headdim, is_causal, 256)[name]
        for one in aot.record(
            lambda p=problem, i=inputs, plan=plan: launch_backward.backward(p, i, plan), "sm90"
        ):
            source, compiled = aot.compile_kernel(one, "sm90")
            _, spilled = aot.usage_of(compiled, "sm90")
            build_launcher(source, compiled)
            emit(event="compiled", name=f"D{headdim} {is_causal} {name}", spilled=spilled)


def gpu_worker() -> None:
    """Time the cells on stdin."""
    import torch

    from flash_attn.backends.sm90.plans_backward import plan_ordered

    job = json.loads(sys.stdin.readline())
    try:
        torch.manual_seed(0)
        flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
        for number, (seqlen, headdim, is_causal) in enumerate(job["cells"]):
            emit(event="stage", at=f"prepare {seqlen} D{headdim}")
            cell = Cell(headdim, seqlen, is_causal, with_torch=False)
            found = plans(headdim, is_causal, seqlen)
            key = f"D{headdim} {'causal' if is_causal else 'full'}"
            found[ORDERED] = plan_ordered(headdim, is_causal, seqlen)
            found = {n: x for n, x in found.items() if f"{key} {n}" not in job["left_out"]}
            if seqlen == job["first"]:
                check(cell, found, key)
            time_cell(cell, found, {"key": key, "seqlen": seqlen}, flush, job["rounds"])
            emit(event="cell", number=number)
        emit(event="done")
    except BaseException:
        emit(event="error", text=traceback.format_exc()[-1200:])
    sys.stdout.flush()
    os._exit(0)


def check(cell: Cell, found: dict[str, Any], key: str) -> None:
    """Say which plans give another dq than the one in use, or not the same bits twice."""
    import torch

    from flash_attn.backends.sm90 import launch_backward

    def dq_of(name: str) -> Any:
        emit(event="stage", at=f"{key} {name}")
        cell.inputs.dq.fill_(float("nan"))
        launch_backward.backward(cell.problem, cell.inputs, found[name])
        torch.cuda.synchronize()
        return cell.inputs.dq.clone()

    want = dq_of(IN_USE).float()
    for name, plan in found.items():
        dq = dq_of(name)
        error = float((dq.float() - want).norm() / want.norm())
        if not error < 2e-2:
            emit(event="wrong", name=f"{key} {name}", error=error)
        if plan.deterministic and not all(torch.equal(dq, dq_of(name)) for _ in range(3)):
            emit(event="wrong", name=f"{key} {name}", error="other bits")


def time_cell(
    cell: Cell, found: dict[str, Any], facts: dict[str, Any], flush: Any, rounds: int
) -> None:
    """Medians of the main kernel for every plan and section, and of the whole for two plans."""
    import torch

    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, plan in found.items():
        for megabytes in SECTIONS if name != ORDERED else ():
            runs[name, str(megabytes)] = main_kernel(
                cell, plan._replace(section_bytes=megabytes << 20)
            )
        if name in (IN_USE, ORDERED):
            runs[name, "whole"] = whole_backward(cell, plan)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        marks = {}
        for name, run in runs.items():
            if turn == 0:
                emit(event="stage", at=f"{facts['key']} {name[0]}")
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            if turn == 0:  # also compiles
                torch.cuda.synchronize()
            else:
                marks[name] = (start, end)
        torch.cuda.synchronize()
        for name, (start, end) in marks.items():
            times[name].append(start.elapsed_time(end))
    for (name, part), values in times.items():
        emit(event="time", name=name, part=part, ms=statistics.median(values),
             speed=cell.flops / statistics.median(values) / 1e9, **facts)  # fmt: skip


def main_kernel(cell: Cell, plan: Any) -> Callable[[], object]:
    """The main kernel alone."""
    from flash_attn.backends.sm90 import launch_backward

    packing = launch_backward.locate(cell.problem)
    workspace = launch_backward.allocate(cell.problem, packing, plan)
    arguments = (cell.problem, cell.inputs, packing, workspace, plan)
    launch_backward.launch_statistics(*arguments)

    def run() -> None:
        if plan.first_stores or plan.deterministic:
            workspace.turns.zero_()
        launch_backward.launch_main(*arguments)

    return run


def whole_backward(cell: Cell, plan: Any) -> Callable[[], object]:
    """All kernels."""
    from flash_attn.backends.sm90 import launch_backward

    return lambda: launch_backward.backward(cell.problem, cell.inputs, plan)


# ------------------------------------------------------------------------------------------ parent
class Parent:
    """Runs the phases and keeps what they found."""

    script = Path(__file__)
    choose = staticmethod(plans)

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        kinds = [(d, c) for c in (False, True) for d in options.headdims]
        self.kernels = [(d, c, name) for d, c in kinds for name in self.choose(d, c, 4096)]
        self.cells = [(s, d, c) for s in options.seqlens for d, c in kinds]
        self.left_out: list[str] = []
        self.times: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def left(self) -> float:
        """Seconds until the deadline."""
        return float(self.options.deadline) - (time.monotonic() - STARTED)

    def compile_all(self) -> None:
        """Compile all kernels in parallel."""
        count = max(1, min(len(os.sched_getaffinity(0)), len(self.kernels)))
        children = [Process("compile", self.script) for _ in range(count)]
        for i, child in enumerate(children):
            child.send(self.kernels[i::count])
        compiled = 0
        for child in children:
            while True:
                event = child.events.get()
                if event["event"] == "end":
                    if child.child.wait() != 0:
                        self.notes.append("a compiler died: " + " | ".join(child.tail[-3:]))
                    break
                compiled += event["event"] == "compiled"
                if event.get("spilled"):
                    self.notes.append(f"spills: {event}")
        print(f"[{time.monotonic() - STARTED:4.0f}s] {compiled} kernels compiled", flush=True)

    def time_all(self) -> None:
        """Time the cells, in a new process after each plan that does not end."""
        while self.cells and self.left() > 8.0:
            process, stage = Process("gpu", self.script), "start"
            process.send({"cells": self.cells, "left_out": self.left_out,
                          "rounds": self.options.rounds,
                          "first": self.options.seqlens[0]})  # fmt: skip
            done = 0
            while True:
                try:
                    patience = 30.0 if stage == "start" else 12.0
                    event = process.events.get(timeout=max(0.1, min(patience, self.left() - 2.0)))
                except queue.Empty:
                    event = {"event": "hung"}
                if event["event"] == "stage":
                    stage = event["at"]
                elif event["event"] == "cell":
                    done = event["number"] + 1
                elif event["event"] == "time":
                    self.times.append(event)
                elif event["event"] == "wrong":
                    self.notes.append(f"WRONG: {event}")
                elif event["event"] in ("done", "hung", "error", "end"):
                    break
            process.stop()
            self.cells = self.cells[done:]
            if event["event"] != "done":
                late = self.left() <= 2.5
                self.notes.append(f"{'out of time' if late else event} at {stage}; "
                                  f"not timed: {self.cells}")  # fmt: skip
                if stage in self.left_out or stage.startswith(("start", "prepare")):
                    return
                self.left_out.append(stage)

    def table(self) -> None:
        """TFLOP/s at each length, for each section."""
        seqlens = sorted(self.options.seqlens)
        print(f"TFLOP/s of the main kernel alone; sections of {SECTIONS} MB")
        print(" " * 26 + "".join(f"{s:>14d}" for s in seqlens))
        found = {(x["key"], x["name"], x["seqlen"], x["part"]): x["speed"] for x in self.times}
        for key in dict.fromkeys(x["key"] for x in self.times):
            print(f"-- {key}")
            for name in dict.fromkeys(x["name"] for x in self.times if x["key"] == key):
                if name == ORDERED:
                    continue
                row = ["/".join(_number(found.get((key, name, s, str(m)))) for m in SECTIONS)
                       for s in seqlens]  # fmt: skip
                print(f"  {name:24s}" + "".join(f"{x:>14s}" for x in row))
            row = ["/".join(_number(found.get((key, n, s, "whole"))) for n in (IN_USE, ORDERED))
                   for s in seqlens]  # fmt: skip
            print(f"  {'whole: in use/ordered':24s}" + "".join(f"{x:>14s}" for x in row))
        for note in self.notes[:5]:
            print("note:", note[:300])
        print(f"wall {time.monotonic() - STARTED:.0f}s, json {self.options.json}", flush=True)
        if self.options.json:
            facts = {"times": self.times, "notes": self.notes}
            Path(self.options.json).write_text(json.dumps(facts, indent=1) + "\n")


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.0f}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deadline", type=float, default=100.0, help="seconds for everything")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seqlens", default="4096,16384,2048,1024", help="in this order")
    parser.add_argument("--headdims", default="128,64", help="in this order")
    options = options_of_parent(parser, compile_worker, gpu_worker)
    if options is None:
        return
    parent = Parent(options)
    parent.compile_all()
    if not options.compile_only:
        parent.time_all()
    parent.table()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
