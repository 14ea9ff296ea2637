"""Runs the GPU tests and records their outcome with what they ran on.

    python scripts/gpu_tests.py                      # writes tests/gpu/results/<gpu>.json
    python scripts/gpu_tests.py --commit HASH -- -n 8 -k backward

Arguments after ``--`` go to pytest and are recorded. The exit status is pytest's.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

SCHEMA = 1
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
# After an interrupt pytest still ends its session.
GRACE_SECONDS = 60
# Names the file that pytest, with this module as a plugin, appends its reports to.
REPORTS_VARIABLE = "FLASH_ATTN_TEST_REPORTS"


def slug(gpu: str) -> str:
    """A GPU's name as a file name: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "unknown"


# ------------------------------------------------------------------------------ inside pytest
def _reason(report: Any) -> str:
    """Why a test failed or was skipped, in one line."""
    text = getattr(report, "wasxfail", "") or report.longrepr
    crash = getattr(text, "reprcrash", None)
    if isinstance(text, tuple):  # (file, line, reason) of a skip
        text = str(text[2]).removeprefix("Skipped: ")
    return " ".join(str(text if crash is None else crash.message).split())[:300]


def _append(report: Any, outcome: str) -> None:
    path = os.environ.get(REPORTS_VARIABLE)
    if path is None or "PYTEST_XDIST_WORKER" in os.environ:  # the main process gets their reports
        return
    entry = {"id": report.nodeid, "outcome": outcome}
    if outcome != "passed":
        entry["reason"] = _reason(report)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def pytest_runtest_logreport(report: Any) -> None:
    """Append an outcome as it becomes known, so that a killed session leaves what it had."""
    if report.when == "call" or report.outcome == "skipped":
        marked = {"skipped": "xfailed", "passed": "xpassed"} if hasattr(report, "wasxfail") else {}
        _append(report, marked.get(report.outcome, report.outcome))
    elif report.outcome == "failed":
        _append(report, "error")


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be imported counts as an error."""
    if report.outcome == "failed":
        _append(report, "error")


# ------------------------------------------------------------------------------------- outside
def summarise(lines: Sequence[str]) -> dict[str, Any]:
    """Counts, failing tests and skip reasons of the appended reports."""
    cases: dict[str, dict[str, str]] = {}
    for entry in map(json.loads, lines):
        # A later error, of the teardown, hides that a call passed but not that it failed.
        if entry["id"] not in cases or cases[entry["id"]]["outcome"] != "failed":
            cases[entry["id"]] = entry
    counts = Counter(case["outcome"] for case in cases.values())
    skips = Counter(case["reason"] for case in cases.values() if case["outcome"] == "skipped")
    bad = {n: case["reason"] for n, case in cases.items() if case["outcome"] in ("failed", "error")}
    return {
        "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
        "failing": dict(sorted(bad.items())),
        "skip_reasons": dict(sorted(skips.items())),
    }


def run_pytest(
    arguments: Sequence[str], reports: Path, max_seconds: float | None
) -> tuple[int, bool]:
    """Run pytest in a process of its own; (exit status, whether it ran to its end)."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {REPORTS_VARIABLE: str(reports), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-p", "gpu_tests", *arguments]
    # A shell's background jobs ignore interrupts, and their children would too.
    child = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | variables,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        return child.wait(max_seconds), True
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
    try:
        return child.wait(GRACE_SECONDS), False
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait(), False


def record(arguments: Sequence[str], max_seconds: float | None) -> dict[str, Any]:
    """Run the tests and describe the outcome, whatever it is."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder) / "reports"
        reports.touch()
        status, finished = run_pytest(arguments, reports, max_seconds)
        summary = summarise(reports.read_text(encoding="utf-8").splitlines())
    return {
        "exit_status": status,
        # 0: all passed, 1: some failed; anything else is a session that did not run as it should
        "complete": finished and status in (0, 1),
        "seconds": round(time.monotonic() - began, 1),
        "pytest_arguments": list(arguments),
        # "": the automatic choice, see tests/conftest.py
        "backend": os.environ.get("FLASH_ATTN_TEST_BACKEND", ""),
        **summary,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, record, print a summary; pytest's exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="default tests/gpu/results/<gpu>.json")
    parser.add_argument("--commit", help="recorded instead of asking git")
    parser.add_argument("--max-seconds", type=float, help="interrupt pytest after it")
    parser.add_argument("pytest_arguments", nargs="*", help="after --")
    args = parser.parse_args(arguments)
    # Loads PyTorch: not before the command line is known to be right.
    from recording import environment, write_json

    facts = environment(args.commit)
    if facts["gpu"] == "none":
        print("no GPU is visible", file=sys.stderr)
        return 2
    out = args.out or REPOSITORY / "tests" / "gpu" / "results" / f"{slug(facts['gpu'])}.json"
    outcome = record(["-m", "gpu", "-q", *args.pytest_arguments], args.max_seconds)
    write_json(out, {"schema": SCHEMA, "environment": facts, **outcome})
    print(
        out,
        outcome["counts"],
        f"{outcome['seconds']} s",
        "" if outcome["complete"] else "INCOMPLETE",
    )
    for name, reason in outcome["failing"].items():
        print(f"  {name}: {reason[:160]}")
    return int(outcome["exit_status"])


if __name__ == "__main__":
    sys.exit(main())
