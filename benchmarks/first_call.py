"""Times the first calls of a new process, with an empty Triton cache and with a warm one.

Every figure is of a process of its own, in seconds: importing torch and triton and creating the
device's context (which other programs need, too), importing flash_attn, the first and the second
forward and the first backward call until the device is done, and each kernel's compilation as
Triton reports it. What counts is all that a first forward call takes beyond torch, triton and the
context. With a warm cache no kernel is compiled, and Triton's hash of its own files, which
``hashed`` tells of, is not computed.

    python benchmarks/first_call.py --out benchmarks/results/NAME.json

takes about a minute. Without a GPU launches end in a stub: compilation is the same, and nothing is
loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

import torch  # noqa: E402
import triton  # noqa: E402
from options import names_among  # noqa: E402
from recording import REPOSITORY, new_result, write_json  # noqa: E402

CASES = ("d128-causal", "d64-full")
# Seconds beyond torch, triton and the context, and of one kernel's compilation.
GOALS = {"warm": 0.5, "cold": 5.0}
# Phases of a first forward call.
BEYOND = ("import flash_attn", "forward")


# ------------------------------------------------------------------------------------- the child
def child(case: str) -> dict[str, Any]:
    """What one process measures, itself."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    headdim, is_causal = int(case.split("-")[0][1:]), case.endswith("causal")
    shape = (2, 1024, 8, headdim)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(q * 2, q, dout)  # PyTorch imports more at the first gradient of all
    kernels: list[dict[str, Any]] = []

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        kernels.append({"name": src.name, "seconds": times.total / 1e6, "hit": cache_hit})

    triton.knobs.compilation.listener = listen
    marks = [time.perf_counter()]

    def mark() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    with ExitStack() as stack:
        if on_gpu:
            torch.cuda.synchronize()
            marks[0] = time.perf_counter()
        else:
            from stub import install_stub

            marks[0] = time.perf_counter()
            install_stub(stack, portable=False)
        from flash_attn import flash_attn_func

        mark()
        flash_attn_func(*leaves, causal=is_causal)
        mark()
        out = flash_attn_func(*leaves, causal=is_causal)
        mark()
        grads = torch.autograd.grad(out, leaves, dout)
        mark()
        if on_gpu:
            check(leaves, dout, out, grads, is_causal)
    names = (*BEYOND, "second forward", "backward")
    phases = dict(zip(names, (b - a for a, b in zip(marks, marks[1:], strict=False)), strict=True))
    hashed = bool(triton.runtime.cache.triton_key.cache_info().currsize)
    return {
        "torch, triton, context": marks[0] - STARTED,
        **phases,
        "kernels": kernels,
        "hashed": hashed,
    }


def check(leaves: Any, dout: Any, out: Any, grads: Any, is_causal: bool) -> None:
    """End the process if the first call's results are not PyTorch's."""
    from torch.nn.functional import scaled_dot_product_attention

    turned = [x.detach().float().transpose(1, 2).requires_grad_() for x in leaves]
    want = scaled_dot_product_attention(*turned, is_causal=is_causal)
    wanted = torch.autograd.grad(want, turned, dout.float().transpose(1, 2))
    for got, right in zip((out, *grads), (want, *wanted), strict=True):
        error = (got.float() - right.transpose(1, 2)).norm() / right.norm()
        if not float(error) < 2e-2:
            raise SystemExit(f"wrong: a result of the first call differs by {float(error):.1e}")


# ------------------------------------------------------------------------------------ the parent
def start(case: str, cache: str, seconds: float) -> dict[str, Any]:
    """What a new process measured; ``failure`` if it did not."""
    paths = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_CACHE_DIR": cache}
    # As an installed package our sources are compiled once, by a process that is not timed.
    variables["PYTHONDONTWRITEBYTECODE"] = ""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", case]
    try:
        done = subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"no end after {seconds:.0f} s"}
    lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("@@")]
    if done.returncode or not lines:
        return {"failure": f"exit code {done.returncode}: {done.stderr[-300:]}"}
    return json.loads(lines[-1])


def beyond(run: dict[str, Any]) -> float:
    """Seconds of a first forward call beyond torch, triton and the context."""
    return sum(run[name] for name in BEYOND)


def summarise(kind: str, case: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of the result file: medians of phases, and each kernel's median compilation."""
    good = [run for run in runs if "failure" not in run]
    row: dict[str, Any] = {
        "kind": kind,
        "case": case,
        "processes": len(good),
        "hashed": sum(run["hashed"] for run in good),
        "failures": [run["failure"] for run in runs if "failure" in run],
        "medians": {},
        "kernels": {},
    }
    if not good:
        return row
    for name in good[0]:
        if name not in ("kernels", "hashed"):
            row["medians"][name] = round(statistics.median(run[name] for run in good), 4)
    row["beyond"] = round(statistics.median(map(beyond, good)), 4)
    seconds: dict[str, list[float]] = {}
    for run in good:
        for kernel in run["kernels"]:
            if not kernel["hit"]:
                seconds.setdefault(kernel["name"], []).append(kernel["seconds"])
    row["kernels"] = {name: round(statistics.median(x), 3) for name, x in seconds.items()}
    return row


def measure(case: str, args: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """The rows of a case: the cache that a process found empty serves those with a warm one."""
    cold: list[dict[str, Any]] = []
    warm: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for runs, number in ((cold, args.cold_processes), (warm, args.processes)):
            for index in range(number):
                if cold and time.monotonic() > until:
                    break
                cache = os.path.join(folder, str(index if runs is cold else 0))
                runs.append(start(case, cache, args.patience))
    return [summarise("cold", case, cold), summarise("warm", case, warm)]


def complaints(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What failed or is above its goal."""
    found = []
    for row in rows:
        name = f"{row['kind']} {row['case']}"
        found += [f"{name}: {text}" for text in row["failures"]]
        if row["kind"] == "warm" and row.get("beyond", 0.0) > GOALS["warm"]:
            found.append(f"{name}: {row['beyond']:.2f} s beyond torch, triton and the context")
        found += [f"{name}: {kernel} compiles for {seconds:.1f} s"
                  for kernel, seconds in row["kernels"].items()
                  if row["kind"] == "cold" and seconds > GOALS["cold"]]  # fmt: skip
        if row["kind"] == "warm" and row["kernels"]:
            found.append(f"{name}: the cache was not warm, compiled {', '.join(row['kernels'])}")
        if row["kind"] == "warm" and row["hashed"]:
            found.append(f"{name}: Triton hashed its files in {row['hashed']} processes")
        if not row["processes"] and not row["failures"]:
            found.append(f"{name}: not run")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 0 if all goals are reached."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), type=names_among(CASES))
    parser.add_argument("--processes", type=int, default=3, help="with a warm cache")
    parser.add_argument("--cold-processes", type=int, default=1, help="with an empty one, before")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for one process")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="no new process after")
    parser.add_argument("--out", type=Path, help="JSON file, written after every row")
    parser.add_argument("--commit", help="recorded instead of asking git")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print("@@" + json.dumps(child(args.child)), flush=True)
        return 0
    until = time.monotonic() + args.max_seconds
    data = new_result("first_call", args.commit, {"stub": not torch.cuda.is_available()})
    data |= {"left_out": [], "rows": []}
    for case in args.cases:
        if time.monotonic() > until:
            data["left_out"].append(case)
            continue
        for row in measure(case, args, until):
            data["rows"].append(row)
            figures = {**row["medians"], "beyond": row.get("beyond")}
            print(row["kind"], case, figures, row["kernels"], flush=True)
        if args.out is not None:
            write_json(args.out, data)
    if args.out is not None:
        write_json(args.out, data)
    found = complaints(data["rows"]) + [f"not run: {name}" for name in data["left_out"]]
    print("\n".join(found or ["all goals are reached"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
