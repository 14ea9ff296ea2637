"""Runs the Hopper kernels under compute-sanitizer: memcheck, synccheck, racecheck.

    python scripts/sanitizer.py --max-seconds 240 --out benchmarks/results/NAME.json
    python scripts/sanitizer.py --tools memcheck --cases 'packed d64 causal'

A child computes small problems forward and backward and compares them with the CPU's results, first
plainly, which also compiles, then under each tool that the machine has. The result file has each
tool's version, time, summary and reports by kind; a tool that is cut off has the cases that it came
to. Only kernels of the Hopper backend are instrumented, where the tool can select; synccheck leaves
out the backward's main kernels, see NOT_SYNCCHECKED. A run is clean if there is no report but those
of EXPLAINED, which the result file has with their reasons.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from endurance import MASKS, Shape, solver, tensors_of, wrong
from watching import Watched

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from options import names_among  # noqa: E402
from recording import new_result, write_json  # noqa: E402

import flash_attn  # noqa: E402

TOOLS = ("memcheck", "synccheck", "racecheck")
# Part of the names of all kernels of the backend.
KERNELS = "_sm90"
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/bin")
_SUMMARY = re.compile(r"=+ ((?:ERROR|RACECHECK|LEAK) SUMMARY: .*)")
_REPORT = re.compile(r"=+ ((?:Error|Warning|Invalid|Barrier|Potential|Race|Divergent|Missing).*)")
_PLACE = re.compile(r"=+ {4,}at (?:.*::)?(\w+)\S* in (\S+)")
# "Error: Race reported between Read access at KERNEL+0x1a0 in FILE:LINE", and further lines "and
# Write access at KERNEL+0xfb60 in FILE:LINE [10 hazards]".
_RACE = re.compile(r"=+ .*Race reported between (\w+) access at (?:.*::)?(\w+)\S* in (\S+)")
_OTHER = re.compile(r"=+ {4,}and (\w+) access at (?:.*::)?(\w+)\S* in (\S+)")
SOURCES = Path(flash_attn.__file__).parent / "kernels"
# Their consumers, which are partitions with code of their own, meet at a hardware barrier by its
# number and count of threads. The barrier counts threads, wherever they come from; synccheck calls
# threads that come from two places divergent, and ends the kernel.
NOT_SYNCCHECKED = "attention_backward"
_THROUGH_ONE_ARRIVAL = (
    "written, then bar.sync, then one thread arrives at an mbarrier, for which the reader waited: "
    "racecheck follows an arrival for the arriving thread's own writes alone"
)


def _race(*names: str) -> str:
    """The pattern of a race within or between functions of a file, of one of ``names`` each."""
    one = rf"(?:read|write) in sm90_\w+\.py (?:{'|'.join(names)})"
    return rf"race in \w+: {one} and {one}"


# By a pattern: why a report is no fault.
EXPLAINED = {
    _race(r"attention_\w+_sm90"): (
        "the compiler's own: what starts and ends partitions, on the line of the kernel"
    ),
    _race("get", "put"): f"the next tile in its mailbox: {_THROUGH_ONE_ARRIVAL}",
    _race("key_consumer", "value_consumer"): (
        f"weights on their way from one consumer to the other: {_THROUGH_ONE_ARRIVAL}"
    ),
    _race(
        "clear_values"
    ): "each consumer sets the same values to 0 and the others to what they are",
}


def cases() -> dict[str, Shape]:
    """Small problems with partial tiles, one for each kernel and way through it."""
    one, other = (200,), (300,)
    several = ((130, 1, 0, 200), (70, 300, 5, 200))
    found = {}
    for name, headdim, mask, heads, deterministic in (
        ("dense d128 causal", 128, "causal", (2, 1), False),
        ("dense d64 full", 64, "full", (2, 2), False),
        ("dense d256 causal", 256, "causal", (2, 2), False),
        ("ordered d128 causal", 128, "causal", (2, 2), True),
        ("dense d64 window", 64, "window", (2, 1), False),
        ("dense d96 causal", 96, "causal", (2, 2), False),
        ("dense d192 full", 192, "full", (2, 2), False),
    ):
        found[name] = Shape(headdim, mask, *heads, 1, one, other, deterministic)
    for name, headdim, mask, deterministic in (
        ("packed d64 causal", 64, "causal", False),
        ("packed d128 full", 128, "full", False),
        ("packed ordered d64 causal", 64, "causal", True),
        ("packed d256 causal", 256, "causal", False),
    ):
        found[name] = Shape(headdim, mask, 2, 1, 0, *several, deterministic)
    assert {shape.mask for shape in found.values()} <= set(MASKS)
    return found


# ------------------------------------------------------------------------------------- the child
def compute(names: Sequence[str], backend: str, device: str) -> int:
    """Compute and compare the cases; 1 if any is wrong."""
    bad = False
    for name in names:
        shape = cases()[name]
        tensors = tensors_of(shape, "cpu")
        with flash_attn.use_backend("reference"):
            want = solver(shape, tensors)()
        with flash_attn.use_backend(backend):
            got = solver(shape, [x.to(device) for x in tensors])()
        found = wrong([x.cpu() for x in got], want)
        bad |= bool(found)
        print(f"@@{name}: {'; '.join(found) or 'right'}", flush=True)
    return int(bad)


# ------------------------------------------------------------------------------------ the parent
def find_sanitizer(given: str | None) -> str | None:
    """The program's path, or None."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    return shutil.which(given or "compute-sanitizer", path=path)


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return done.stdout + done.stderr


def known_tools(program: str) -> dict[str, str]:
    """The program's version, and whether it can select kernels by name."""
    text = output_of(program, "--help")
    version = re.search(r"\b\d{4}\.\d+\.\d+\b", output_of(program, "--version"))
    selects = "--kernel-name" in text
    return {
        "version": version[0] if version else "unknown",
        "selects": "yes" if selects else "",
        "tools": " ".join(tool for tool in TOOLS if tool in text),
    }


def command_for(program: str, tool: str, kernels: str, selects: bool) -> list[str]:
    """The sanitizer's part of the command line."""
    options = ["--tool", tool, "--print-limit", "1000"]
    if selects and tool == "synccheck":
        options += ["--kernel-name-exclude", f"kns={NOT_SYNCCHECKED}"]
    elif selects:
        options += ["--kernel-name", f"kns={kernels}"]
    return [program, *options]


def run(prefix: Sequence[str], args: argparse.Namespace, until: float) -> tuple[list[str], str]:
    """The lines that the child printed, and how it ended."""
    command = [*prefix, sys.executable, str(Path(__file__).resolve())]
    command += ["--child", "--backend", args.backend, "--device", args.device]
    command += ["--cases", ",".join(args.cases)]
    paths = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # Every tensor is an allocation of its own, so what lies behind it is nobody's.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    child = Watched(command, args.patience, until, variables)
    lines = list(child.lines())
    return lines, child.end


@lru_cache
def _functions(path: Path) -> list[tuple[int, int, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    return [(x.lineno, x.end_lineno or x.lineno, x.name) for x in found]


def function_at(place: str) -> str:
    """The function around a "file:line", which means the same after edits elsewhere; what the
    compiler adds by itself has the line of the kernel's own definition."""
    name, _, number = place.rpartition(":")
    path = SOURCES / Path(name).name
    if not number.isdigit() or not path.is_file():
        return place
    around = [x for x in _functions(path) if x[0] <= int(number) <= x[1]]
    return f"{path.name} {max(around)[2]}" if around else place


def sum_up(lines: Sequence[str], end: str) -> dict[str, Any]:
    """Cases that were computed, the tool's summaries, and its reports with the kernel they name."""
    done = {}
    reports: Counter[str] = Counter()
    last = race = None
    for line in lines:
        if line.startswith("@@"):
            name, _, text = line[2:].partition(": ")
            done[name] = text
        place, report = _PLACE.match(line), _REPORT.match(line)
        first, other = _RACE.match(line), _OTHER.match(line)
        if first is not None:
            race, last = first, None
        elif other is not None and race is not None:
            both = [f"{x[1].lower()} in {function_at(x[3])}" for x in (race, other)]
            reports[f"race in {race[2]}: {' and '.join(both)}"] += 1
        elif report is not None:
            race, last = None, re.sub(r"0x[0-9a-f]+|\d{4,}", "N", report[1])[:160]
            reports[last] += 1
        elif place is not None and last is not None:
            reports[last] -= 1
            reports[f"{last} in {place[1]}: {function_at(place[2])}"] += 1
            last = None
    summaries = [match[1] for match in map(_SUMMARY.match, lines) if match is not None]
    tail = [] if end == "exit code 0" else [line[:200] for line in lines[-5:]]
    return {
        "cases": done,
        "summaries": list(dict.fromkeys(summaries)),
        "reports": {text: count for text, count in reports.most_common(20) if count},
        "end": end,
        "tail": tail,
    }


def explanation(report: str) -> str | None:
    """Why the report is no fault, if that is known."""
    found = [reason for pattern, reason in EXPLAINED.items() if re.fullmatch(pattern, report)]
    return found[0] if found else None


def is_clean(row: dict[str, Any], wanted: int) -> bool:
    """Whether all cases were right and the tool had nothing to report that is not explained."""
    unexplained = [text for text in row["reports"] if explanation(text) is None]
    quiet = all(re.match(r".*SUMMARY: 0 ", text) for text in row["summaries"]) or row["reports"]
    right = len(row["cases"]) == wanted and set(row["cases"].values()) == {"right"}
    spoke = bool(row["summaries"]) or row["tool"] == "none"
    return bool(right and quiet and spoke and row["end"] == "exit code 0" and not unexplained)


def measure(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Run plainly, then under each tool, and write after each."""
    until = time.monotonic() + args.max_seconds
    program = find_sanitizer(args.sanitizer)
    known = {} if program is None else known_tools(program)
    data["sanitizer"] = {"path": program or "none", **known}
    selects = bool(known.get("selects"))
    print(f"compute-sanitizer: {data['sanitizer']}", flush=True)
    tools = ["none", *(args.tools if program is not None else [])]
    for position, tool in enumerate(tools):
        began = time.monotonic()
        share = (until - began) / (len(tools) - position)
        prefix = [] if tool == "none" else command_for(str(program), tool, args.kernels, selects)
        lines, end = run(prefix, args, began + max(share, 1.0))
        if tool != "none" and selects and not any(line.startswith("@@") for line in lines):
            selects, known["selects"] = False, "refused: " + " | ".join(lines[:3])[:200]
            data["sanitizer"] |= known
            prefix = command_for(str(program), tool, args.kernels, selects)
            lines, end = run(prefix, args, began + max(share, 1.0))
        if args.raw is not None:
            args.raw.mkdir(parents=True, exist_ok=True)
            (args.raw / f"{tool}.txt").write_text("\n".join(lines), encoding="utf-8")
        row = {"tool": tool, **sum_up(lines, end), "seconds": round(time.monotonic() - began, 1)}
        row["clean"] = is_clean(row, len(args.cases))
        row["explained"] = {text: why for text in row["reports"] if (why := explanation(text))}
        data["rows"].append(row)
        print(f"{tool}: {len(row['cases'])} of {len(args.cases)} cases, {end}, {row['seconds']} s, "
              f"{'; '.join(row['summaries'])[:200]}", flush=True)  # fmt: skip
        for text, count in row["reports"].items():
            print(f"  {count} times: {text} ({row['explained'].get(text, 'not explained')})")
        for line in row["tail"]:
            print("  |", line)
        if args.out is not None:
            write_json(args.out, data)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every tool is there and all is clean, 1 if not, 2 if it cannot run here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS), type=names_among(TOOLS))
    parser.add_argument("--cases", default=",".join(cases()), type=names_among(cases()))
    parser.add_argument("--sanitizer", help="path of compute-sanitizer")
    parser.add_argument("--backend", default="sm90", help="whose kernels")
    parser.add_argument("--kernels", default=KERNELS, help="a part of the names of those looked at")
    parser.add_argument("--raw", type=Path, help="folder for all that the tools say")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds of silence: a hang")
    parser.add_argument("--max-seconds", type=float, default=540.0, help="shared by the tools")
    parser.add_argument("--out", type=Path, help="JSON file, written after every tool")
    parser.add_argument("--commit", help="recorded instead of asking git")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try out")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        return compute(args.cases, args.backend, args.device)
    if args.device == "cuda" and (
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)
    ):
        print("needs a GPU of compute capability 9.0", file=sys.stderr)
        return 2
    data = new_result("sanitizer", args.commit, {"cases": args.cases, "kernels": args.kernels})
    data["rows"] = []
    measure(args, data)
    tools = {row["tool"] for row in data["rows"]}
    return 0 if set(args.tools) <= tools and all(row["clean"] for row in data["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
