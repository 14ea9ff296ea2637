#!/usr/bin/env python
"""Find tiles that fit where those of the tables do not: run it after the compile matrix complains.

    python scripts/find_plans.py --arch sm80                    # every cell with a failing kernel
    python scripts/find_plans.py --arch sm90 --cell dkdv --all  # also cells that are fine

A cell is one plan of backends/triton/heuristics.py. Each is compiled with every call of the wide
matrix that takes it; where one spills or needs too much shared memory, other plans are tried,
largest tiles first, and those that fit all calls are printed. Which of them is fastest, only a GPU
can say.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "compile"), str(ROOT / "src")]
os.environ.pop("TRITON_INTERPRET", None)

_SIZES = {2: (16, 32, 64, 128), 4: (16, 32)}


def cells_of(arch: str) -> dict[str, list[Any]]:
    """The launches of the wide matrix by the plan that they take."""
    import aot
    import cases

    from flash_attn.backends.triton.heuristics import changes_of, family_of, variant_of

    cells: dict[str, list[Any]] = {}
    for case in cases.wide_cases(arch):
        if case.kind not in ("forward", "backward"):
            continue
        for one in aot.record(lambda case=case: cases.run_case(case), arch):
            if one.key is None:
                continue
            key = one.key
            variant = ("full", "masked", "heavy", "windowed")[variant_of(key)]
            padded = ["padded"] if key.padded else []
            facts = dict.fromkeys([*padded, *(name for name, _ in changes_of(key))])
            size = " ".join([str(key.block_d), *facts])
            name = f"{family_of(key)} {size} {key.kernel} {variant}"
            cells.setdefault(name, []).append((f"{case.label}", one))
    return cells


def complaint(arch: str, launches: list[Any], plan: Any = None) -> str:
    """What the first call that does not fit says, or nothing."""
    import aot

    for label, one in launches:
        if plan is not None:
            rows = 16 if one.key.few_rows and one.key.kernel == "forward" else plan.block_m
            one = one.under(replace(plan, block_m=rows))
        try:
            failures = aot.compile_launch(one, arch).failures(arch)
        except Exception as error:  # whatever the compiler raises
            return f"{label}: {str(error)[-80:]}"
        if failures:
            return f"{label}: {', '.join(failures)}"
    return ""


def candidates(current: list[int], itemsize: int, stages: list[int]) -> Iterator[Any]:
    """Other plans, no larger than twice the current one, largest tiles first."""
    from flash_attn.core.plan import TilePlan

    sizes = _SIZES[itemsize]
    most = 2 * current[0] * current[1]
    found = [
        TilePlan(m, n, warps, count)
        for m, n, warps, count in itertools.product(sizes, sizes, (4, 8), stages)
        if most // 16 <= m * n <= most
    ]
    before = TilePlan(*current)

    def distance(plan: TilePlan) -> tuple[int, ...]:
        pairs = zip(vars(before).values(), vars(plan).values(), strict=True)
        changed = [a != b for a, b in pairs]
        return (-plan.block_m * plan.block_n, sum(changed), -plan.num_stages, -plan.block_n)

    yield from sorted((plan for plan in found if plan != before), key=distance)


def search(arch: str, options: argparse.Namespace) -> int:
    """Print each failing cell with plans that fit; returns how many failed."""
    failed = 0
    for name, launches in cells_of(arch).items():
        if options.cell not in name:
            continue
        text = complaint(arch, launches)
        if not text and not options.all:
            continue
        failed += bool(text)
        whole = [one for _, one in launches if not one.key.few_rows] or [launches[0][1]]
        print(f"{name} {whole[0].plan}, {len(launches)} calls: {text or 'fits'}", flush=True)
        # Small and hopeless calls first: most plans fail soon.
        fitting = 0
        stages = options.stages or [1, 2, 3]
        for plan in candidates(whole[0].plan, whole[0].key.itemsize, stages):
            if not complaint(arch, launches, plan):
                print(f"    fits: {tuple(vars(plan).values())}", flush=True)
                fitting += 1
                if fitting == options.enough:
                    break
    return failed


def main() -> int:
    """Parse the command line and search."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", required=True)
    parser.add_argument("--cell", default="", help="only cells whose name contains this")
    parser.add_argument("--all", action="store_true", help="also cells that fit")
    parser.add_argument("--enough", type=int, default=2, help="plans to find for each cell")
    parser.add_argument("--stages", type=int, action="append", help="default 1, 2 and 3")
    return 1 if search(parser.parse_args().arch, parser.parse_args()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
