#!/usr/bin/env python
"""Compile the kernels for many GPUs, none of which need be present, and report what they take.

    python scripts/compile_matrix.py                     # the wide matrix -> docs/lab/compile/
    python scripts/compile_matrix.py --quick --arch sm80 # the selection that the tests compile
    python scripts/compile_matrix.py --arch sm90 --match "forward d128" --plan forward=128,64,8,3

Each architecture is compiled in a process of its own: the compiler may abort the process. Kernels
fail that spill vector registers or take more shared memory than a block can have. The Triton in
use is that of the interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


_Entry = dict[str, Any]


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[-300:]}"


def _known_spill(arch: str, kernel: str, label: str) -> int:
    """Bytes that are known to spill under this Triton, for want of a tile that does not."""
    import cases
    import triton

    if not triton.__version__.startswith("3.6."):
        return 0
    return cases.KNOWN_SPILLS.get((arch, kernel, label), 0)


def _compile_case(case: Any, arch: str, plans: dict[str, tuple[int, ...]]) -> Iterator[_Entry]:
    """One entry for each kernel that ``case`` launches."""
    import aot
    import cases

    from flash_attn.core.plan import TilePlan, override

    with override(**{kernel: TilePlan(*plan) for kernel, plan in plans.items()}):
        launches = aot.record(lambda: cases.run_case(case), arch)
    for one in launches:
        entry: _Entry = {"kernel": one.name, "case": case.label, "plan": one.plan}
        try:
            found = aot.compile_launch(one, arch)
            failures = found.failures(arch)
            known = 0 if plans else _known_spill(arch, one.name, case.label)
            if known:
                entry["known"] = f"{known} spilled"
                failures = (
                    [] if found.spilled == known else [f"{found.spilled} spilled, not {known}"]
                )
            entry |= found.as_dict()
        except Exception as error:  # whatever the compiler raises
            failures = [_root_cause(error)]
        if failures:
            entry["failures"] = failures
        yield entry


def compile_arch(options: argparse.Namespace) -> None:
    """Compile for one architecture in this process, with a JSON line for each kernel."""
    sys.path[:0] = [str(ROOT / "tests" / "compile"), str(ROOT / "src")]
    import cases

    arch, seen = options.arch[0], set()
    for case in (cases.quick_cases if options.quick else cases.wide_cases)(arch):
        if options.match not in f"{case.kind} {case.label}":
            continue
        for entry in _compile_case(case, arch, dict(options.plan)):
            line = json.dumps(entry)
            identity = line.partition('"seconds"')[0]
            if identity not in seen:
                print(line, flush=True)
            seen.add(identity)


def run_arch(arch: str, options: argparse.Namespace) -> list[_Entry]:
    """Compile for one architecture in a subprocess; an abort becomes an entry that failed."""
    command = [sys.executable, __file__, "--worker", "--arch", arch, "--match", options.match]
    for kernel, plan in options.plan:
        command += ["--plan", f"{kernel}={','.join(map(str, plan))}"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command + ["--quick"] * options.quick, capture_output=True, text=True, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    entries: list[_Entry] = [json.loads(line) for line in lines]
    if done.returncode:
        failure = f"exit status {done.returncode}: {done.stderr[-2000:]}"
        entries.append({"kernel": "process", "case": arch, "failures": [failure]})
    return entries


def _plan(text: str) -> tuple[str, tuple[int, ...]]:
    """Parse "forward=128,64,8,3"."""
    kernel, _, numbers = text.partition("=")
    return kernel, tuple(int(part) for part in numbers.split(","))


def _write(path: Path, entries: dict[str, list[_Entry]]) -> None:
    """One line an entry, without times, so that runs can be compared."""
    blocks = []
    for arch, rows in entries.items():
        kept = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in kept)
        blocks.append(f"{json.dumps(arch)}: [\n{lines}\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", action="append", help="repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help="the selection that the tests run")
    parser.add_argument("--match", default="", help="only cases whose label contains this")
    parser.add_argument(
        "--plan", action="append", type=_plan, default=[], metavar="KERNEL=M,N,WARPS,STAGES"
    )
    parser.add_argument("--output", type=Path, help="default: docs/lab/compile/<triton>.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        compile_arch(options)
        return 0
    import triton

    archs = options.arch or ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942"]
    entries: dict[str, list[_Entry]] = {}
    failed = 0
    for arch in archs:
        entries[arch] = run_arch(arch, options)
        bad = [row for row in entries[arch] if "failures" in row]
        failed += len(bad)
        seconds = sum(row.get("seconds", 0) for row in entries[arch])
        print(f"{arch}: {len(entries[arch])} kernels, {len(bad)} failed, {seconds:.0f} s")
        for row in entries[arch]:
            if "failures" in row or "known" in row:
                text = row.get("failures") or f"known: {row['known']}"
                print(f"  {row['kernel']} {row['case']} {row.get('plan')}: {text}")
    complete = not (options.arch or options.quick or options.match or options.plan)
    path = options.output or (ROOT / "docs/lab/compile" / f"{triton.__version__}.json")
    if options.output or complete:
        _write(path, entries)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
