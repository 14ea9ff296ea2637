"""Times what surrounds the main kernel of the Hopper backward, in one call of 110 seconds on a GPU.

    PYTHONPATH=src python scripts/sm90_backward_around_lab.py --deadline 110 --json around.json
    PYTHONPATH=src python scripts/sm90_backward_around_lab.py --headdims 256,192 --deadline 200
    PYTHONPATH=src python scripts/sm90_backward_around_lab.py --compile-only      # no GPU needed

The whole backward and its main kernel alone at 16k tokens and hidden size 2048, with sections of 4
and 32 MB: the plans in use; an adder with 2 buffers; first stores in place of zeros with 2 or 4
buffers; without a mask, programs that begin at different queries; sums in order. Above head dim
128: the plan in use, without turns, and with nothing held either. Before any of it is timed, every
plan must give the gradients of the one in use but for rounding, and ordered ones the same bits
again. Every turn has another order, drawn at random, and its first run does not count. A plan that
does not end is left out from there on.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sm90_backward_order_lab as order_lab
from sm90_backward_lab import Cell, emit, options_of_parent

SECTIONS = (4, 32)
IN_USE = "in use"


def plans(headdim: int, is_causal: bool, seqlen: int) -> dict[str, Any]:
    """What is compared, by name."""
    from flash_attn.backends.sm90.plans_backward import plan_backward, plan_ordered

    if headdim > 128:
        return wide_plans(headdim, is_causal, seqlen)
    used = plan_backward(headdim, is_causal, seqlen)
    ordered = plan_ordered(headdim, is_causal, seqlen)
    adder = used._replace(
        adder=True, first_stores=False, rotates=False, registers=ordered.registers
    )
    stores = adder._replace(first_stores=True)
    found = {
        IN_USE: used,
        "adder": adder,
        "stores": stores,
        "stores, 4 buffers": stores._replace(dq_slots=4),
        "stores, 4, 1 in flight": stores._replace(dq_slots=4, in_flight=1),
    }
    if not is_causal:
        found |= {
            f"rotated {name}": x._replace(rotates=True) for name, x in list(found.items())[1:]
        }
    return found | {
        "ordered": ordered,
        "ordered, zeros": ordered._replace(first_stores=False),
    }


def wide_plans(headdim: int, is_causal: bool, seqlen: int) -> dict[str, Any]:
    """What is compared above head dim 128."""
    from flash_attn.backends.sm90.plans_backward import plan_backward

    used = plan_backward(headdim, is_causal, seqlen)
    assert used.rows is not None
    found = {
        IN_USE: used,
        "no turns": used._replace(turns=False),
        "plain": used._replace(held=0, turns=False, q_slots=2, do_slots=2),
    }
    if headdim <= 192:
        first = not used.rows.dq_first
        found["dq first or last"] = used._replace(rows=used.rows._replace(dq_first=first))
    return found


# ----------------------------------------------------------------------------------------- workers
def gpu_worker() -> None:
    """Check and time the cells on stdin."""
    import torch

    job = json.loads(sys.stdin.readline())
    try:
        torch.manual_seed(0)
        flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
        for number, (seqlen, headdim, is_causal) in enumerate(job["cells"]):
            emit(event="stage", at=f"prepare {seqlen} D{headdim}")
            cell = Cell(headdim, seqlen, is_causal, with_torch=False)
            key = f"D{headdim} {'causal' if is_causal else 'full'}"
            found = plans(headdim, is_causal, seqlen)
            found = {n: x for n, x in found.items() if f"{key} {n}" not in job["left_out"]}
            if seqlen == job["first"]:
                found = check(cell, found, key)
            time_cell(cell, found, {"key": key, "seqlen": seqlen}, flush, job["rounds"])
            emit(event="cell", number=number)
        emit(event="done")
    except BaseException:
        emit(event="error", text=traceback.format_exc()[-1200:])
    sys.stdout.flush()
    os._exit(0)


def check(cell: Cell, found: dict[str, Any], key: str) -> dict[str, Any]:
    """The plans that give the gradients of the one in use, and in order the same bits twice."""
    import torch

    from flash_attn.backends.sm90 import launch_backward

    def gradients(name: str) -> list[Any]:
        emit(event="stage", at=f"{key} {name}")
        for grad in cell.inputs[3:6]:
            grad.fill_(float("nan"))
        launch_backward.backward(cell.problem, cell.inputs, found[name])
        torch.cuda.synchronize()
        return [grad.clone() for grad in cell.inputs[3:6]]

    want = [x.float() for x in gradients(IN_USE)]
    right = {}
    for name, plan in found.items():
        got = gradients(name)
        error = max(
            float((x.float() - y).norm() / y.norm()) for x, y in zip(got, want, strict=True)
        )
        repeatable = got if plan.deterministic else got[1:]
        again = [gradients(name)[-len(repeatable) :] for _ in range(3)]
        same = all(all(map(torch.equal, repeatable, other)) for other in again)
        if error < 2e-2 and same:
            right[name] = plan
        else:
            emit(event="wrong", name=f"{key} {name}", error=error, same=same)
    return right


def time_cell(
    cell: Cell, found: dict[str, Any], facts: dict[str, Any], flush: Any, rounds: int
) -> None:
    """Medians of the whole, of the main kernels alone and, of two, of the first one alone, for
    every plan and section."""
    import torch

    runs: dict[tuple[str, int, str], tuple[Callable[[], object], Callable[[], object]]] = {}
    for name, plan in found.items():
        for megabytes in SECTIONS:
            one = plan._replace(section_bytes=megabytes << 20)
            runs[name, megabytes, "whole"] = (lambda: None, order_lab.whole_backward(cell, one))
            runs[name, megabytes, "main"] = main_kernel(cell, one)
            if plan.rows is not None:
                runs[name, megabytes, "first"] = main_kernel(cell, one, is_first=True)
    times: dict[tuple[str, int, str], list[float]] = {label: [] for label in runs}
    generator = random.Random(len(runs))
    marks = []
    for turn in range(rounds + 1):
        # Who follows a run that takes little power finds a higher clock: neighbours change.
        order = generator.sample(list(runs), len(runs))
        # The first run of a turn, after the host was waited for, is not like the others.
        for place, label in enumerate([order[-1], *order]):
            prepare, run = runs[label]
            if turn == 0:
                emit(event="stage", at=f"{facts['key']} {label[0]}")
            prepare()
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            if turn == 0:  # also compiles
                torch.cuda.synchronize()
            elif place > 0:
                marks.append((label, start, end))
        torch.cuda.synchronize()
    for label, start, end in marks:
        times[label].append(start.elapsed_time(end))
    for (name, megabytes, part), values in times.items():
        ms = statistics.median(values)
        emit(event="time", name=name, megabytes=megabytes, part=part, ms=ms, least=min(values),
             speed=cell.flops / ms / 1e9, **facts)  # fmt: skip


def main_kernel(
    cell: Cell, plan: Any, is_first: bool = False
) -> tuple[Callable[[], object], Callable[[], object]]:
    """What prepares for the main kernels, and these alone; of the two above head dim 128 the one
    for dk and dv if ``is_first``."""
    from flash_attn.backends.sm90 import launch_backward, launch_backward_wide

    packing = launch_backward.locate(cell.problem)
    workspace = launch_backward.allocate(cell.problem, packing, plan)
    arguments = (cell.problem, cell.inputs, packing, workspace, plan)
    launch_backward.launch_statistics(*arguments)
    if is_first:
        return workspace.turns.zero_, lambda: launch_backward_wide.launch_main_wide(*arguments)
    return workspace.turns.zero_, lambda: launch_backward.launch_main(*arguments)


# ------------------------------------------------------------------------------------------ parent
class Parent(order_lab.Parent):
    """Runs the phases and keeps what they found."""

    script = Path(__file__)
    choose = staticmethod(plans)

    def table(self) -> None:
        """For each length the better section: TFLOP/s of the whole and of the main kernels, how
        many microseconds lie between them, the section's MB, and how many percent of the time of
        two main kernels the first one takes."""
        seqlens = sorted(self.options.seqlens)
        print("TFLOP/s whole / main kernel alone, us between them, MB of the better section")
        found: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = {}
        for x in self.times:
            row = found.setdefault((x["key"], x["name"], x["seqlen"]), {})
            row.setdefault(x["megabytes"], {})[x["part"]] = x
        for key in dict.fromkeys(x["key"] for x in self.times):
            print(f"-- {key}: {seqlens}")
            for name in dict.fromkeys(x["name"] for x in self.times if x["key"] == key):
                cells = [_cell(found.get((key, name, s), {})) for s in seqlens]
                print(f"  {name:26s}" + "".join(f"{x:>20s}" for x in cells))
        for note in self.notes[:8]:
            print("note:", note[:300])
        print(f"wall {time.monotonic() - order_lab.STARTED:.0f}s, json {self.options.json}")
        if self.options.json:
            facts = {"times": self.times, "notes": self.notes}
            Path(self.options.json).write_text(json.dumps(facts, indent=1) + "\n")


def _cell(sections: dict[int, dict[str, Any]]) -> str:
    """Of the section with the faster whole."""
    timed = {size: parts for size, parts in sections.items() if {"whole", "main"} <= set(parts)}
    if not timed:
        return "-"
    megabytes = min(timed, key=lambda size: timed[size]["whole"]["ms"])
    whole, main = timed[megabytes]["whole"], timed[megabytes]["main"]
    between = 1000.0 * (whole["ms"] - main["ms"])
    text = f"{whole['speed']:.0f}/{main['speed']:.0f} {between:.0f} {megabytes}M"
    first = timed[megabytes].get("first")
    return text if first is None else f"{text} {100.0 * first['ms'] / main['ms']:.0f}%"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deadline", type=float, default=110.0, help="seconds for everything")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seqlens", default="512,1024,2048,4096,8192,16384", help="in this order")
    parser.add_argument("--headdims", default="128,64", help="in this order")
    options = options_of_parent(parser, lambda: order_lab.compile_worker(plans), gpu_worker)
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
