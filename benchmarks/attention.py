"""Times this package beside the attention kernels that PyTorch brings.

Every cell first compares each provider with a float32 computation of a slice; a provider that is
wrong is reported and not timed. The others are timed in turns in one process, in an order that
rotates from round to round, with device events and with the L2 cache flushed before every run.
Forward is the forward call of a training step (gradients enabled, log-sum-exp kept); backward is
one ``torch.autograd.grad`` call on a retained graph, which accumulates into nothing.

    python benchmarks/attention.py --out benchmarks/results/NAME.json
    python benchmarks/attention.py --cells d64-causal-s4096,d128-full-s1024-b2-h8 --pass fwd
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import hashlib
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

REPOSITORY = Path(__file__).resolve().parents[1]
# What is timed must be what the source hash names, not an installed distribution.
sys.path.insert(0, str(REPOSITORY / "src"))

SCHEMA = 1
TOKENS = 16384
HIDDEN = 2048
PASSES = ("fwd", "bwd")
# Correct bf16 kernels are at 2e-3 to 4e-3 in the Frobenius norm.
WRONG_ABOVE = 1e-2
FLUSH_BYTES = 256 << 20
CYCLES_PER_SECOND = 1.9e9


class DeviceLostError(RuntimeError):
    """The GPU context is gone: nothing further can run in this process."""


# ------------------------------------------------------------------------------------- cells
@dataclass(frozen=True)
class Cell:
    """One attention problem: self-attention of ``batch`` sequences of ``seqlen`` tokens."""

    headdim: int
    causal: bool
    seqlen: int
    batch: int
    nheads: int

    @property
    def name(self) -> str:
        return f"d{self.headdim}-{'causal' if self.causal else 'full'}-s{self.seqlen}"

    def flops(self, which: str) -> float:
        """Floating-point operations of one pass ("fwd" or "bwd"), two for a multiply-add."""
        full = 4.0 * self.batch * self.nheads * self.seqlen**2 * self.headdim
        return full * (0.5 if self.causal else 1.0) * (2.5 if which == "bwd" else 1.0)


def portable_cells() -> list[Cell]:
    """Head dims 64 and 128, full and causal, three lengths, 16k tokens and hidden size 2048."""
    grid = itertools.product((64, 128), (False, True), (1024, 4096, 16384))
    return [Cell(d, causal, s, TOKENS // s, HIDDEN // d) for d, causal, s in grid]


def parse_cell(text: str) -> Cell:
    """``d64-causal-s4096`` or ``d64-full-s4096-b2-h8`` as a :class:`Cell`."""
    parts = text.split("-")
    mask = next((part for part in parts if part in ("causal", "full")), None)
    numbers = {part[:1]: part[1:] for part in parts if part != mask}
    known = mask is not None and {"d", "s"} <= set(numbers) <= {"d", "s", "b", "h"}
    if not known or not all(value.isdecimal() and int(value) for value in numbers.values()):
        raise ValueError(f"a cell looks like d64-causal-s4096[-b4][-h8], found {text!r}")
    d, s = int(numbers["d"]), int(numbers["s"])
    batch = int(numbers.get("b", max(1, TOKENS // s)))
    return Cell(d, mask == "causal", s, batch, int(numbers.get("h", max(1, HIDDEN // d))))


def parse_cells(text: str) -> list[Cell]:
    """``portable``, or cells separated by commas."""
    return portable_cells() if text == "portable" else [parse_cell(x) for x in text.split(",")]


# ------------------------------------------------------------------------------- environment
def source_hash(root: Path = REPOSITORY) -> str:
    """The first 16 digits of a SHA-256 over names and contents of every Python file of src/."""
    digest = hashlib.sha256()
    for path in sorted((root / "src").rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def git_commit(root: Path = REPOSITORY) -> str:
    """The commit of the checkout, with ``-dirty`` if src/ differs from it; else ``unknown``."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown"
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--short", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return text.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def environment(commit: str | None = None) -> dict[str, str]:
    """What a figure depends on besides the code, and which code it was."""
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "none"
    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "driver": _driver() if has_gpu else "none",
        "torch": str(torch.__version__),
        "triton": triton_version,
        "cuda": str(torch.version.cuda or torch.version.hip or "none"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or git_commit(),
        "source": source_hash(),
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write ``data`` so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(data, indent=1) + "\n")
    draft.replace(path)


# ------------------------------------------------------------------------------------ timing
class CudaClock:
    """Times calls with device events, from a cold L2 cache and without launch costs."""

    def __init__(self, budget: float = 0.05) -> None:
        self.budget = budget
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def _events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _estimate(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds of one warm call on the device, and until it returns on the host."""
        call()
        self.synchronize()
        start, end = self._events()
        began = time.perf_counter()
        start.record()
        call()
        end.record()
        host = time.perf_counter() - began
        self.synchronize()
        return max(start.elapsed_time(end) * 1e-3, 5e-6), host

    def measure(self, call: Callable[[], object]) -> float:
        """Median milliseconds of ``call``."""
        device, host = self._estimate(call)
        # While the device sleeps the host queues the whole call: its cost stays out of the figure.
        sleep = min(0.01, 1.5 * host)
        count = int(min(50, max(5, self.budget / (device + sleep + 1e-4))))
        pairs = [self._events() for _ in range(count)]
        for start, end in pairs:
            self.scratch.zero_()
            torch.cuda._sleep(int(sleep * CYCLES_PER_SECOND))
            start.record()
            call()
            end.record()
        self.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)


class HostClock:
    """Times calls on the CPU: to try the tool out, not to compare providers."""

    def synchronize(self) -> None:
        pass

    def measure(self, call: Callable[[], object]) -> float:
        """Median milliseconds of three calls."""
        times = []
        for _ in range(3):
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)


Clock = CudaClock | HostClock


def rotations(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """``rounds`` orders of ``names``, each beginning one further on."""
    for start in range(rounds):
        shift = start % len(names) if names else 0
        yield [*names[shift:], *names[:shift]]


# --------------------------------------------------------------------------------- providers
class Inputs(NamedTuple):
    """(batch, seqlen, nheads, headdim) each."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Runner(NamedTuple):
    """A provider on a cell: its call, the leaves in its own layout, and where heads are there."""

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    dout: Tensor
    head_axis: int


def make_inputs(cell: Cell, dtype: torch.dtype, device: str) -> Inputs:
    """Standard normal inputs, the same for every run of a cell."""
    generator = torch.Generator(device).manual_seed(cell.seqlen + cell.headdim)
    shape = (cell.batch, cell.seqlen, cell.nheads, cell.headdim)
    draw = functools.partial(torch.randn, shape, device=device, generator=generator)
    return Inputs(*(draw().to(dtype) for _ in range(4)))


def _leaves(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_(True) for x in tensors)


def make_ours(cell: Cell, inputs: Inputs) -> Runner:
    """``flash_attn_func`` by the backend in use."""
    import flash_attn

    leaves = _leaves(inputs[:3])

    def call() -> Tensor:
        return flash_attn.flash_attn_func(*leaves, causal=cell.causal)

    return Runner(call, leaves, inputs.dout, 2)


def _causal_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@functools.lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import flex_attention

    functorch.donated_buffer = False  # it forbids retain_graph
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1024  # one graph for each cell
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def make_flex(cell: Cell, inputs: Inputs) -> Runner:
    """Compiled FlexAttention on its own (batch, nheads, seqlen, headdim) layout."""
    from torch.nn.attention.flex_attention import create_block_mask

    flex, s, device = _compiled_flex(), cell.seqlen, inputs.q.device
    mask = create_block_mask(_causal_mask, None, None, s, s, device=device) if cell.causal else None
    q, k, v, dout = (x.transpose(1, 2).contiguous() for x in inputs)
    leaves = _leaves((q, k, v))
    return Runner(lambda: flex(*leaves, block_mask=mask), leaves, dout, 1)


def make_sdpa(backend: SDPBackend, cell: Cell, inputs: Inputs) -> Runner:
    """``scaled_dot_product_attention`` on views of (batch, seqlen, nheads, headdim) memory."""
    q, k, v, dout = (x.transpose(1, 2) for x in inputs)
    leaves = _leaves((q, k, v))

    def call() -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(*leaves, is_causal=cell.causal)

    return Runner(call, leaves, dout, 1)


PROVIDERS: dict[str, Callable[[Cell, Inputs], Runner]] = {
    "ours": make_ours,
    "flex": make_flex,
    "flash": functools.partial(make_sdpa, SDPBackend.FLASH_ATTENTION),
    "cudnn": functools.partial(make_sdpa, SDPBackend.CUDNN_ATTENTION),
}


def backward_of(runner: Runner) -> Callable[[], tuple[Tensor, ...]]:
    """The backward call alone, on a graph that is built once and kept."""
    out = runner.call()
    return lambda: torch.autograd.grad(out, runner.leaves, runner.dout, retain_graph=True)


@contextlib.contextmanager
def recorded_plans() -> Iterator[dict[str, dict[str, Any]]]:
    """Collects, by kernel, the plans that our kernels for GPUs launch with inside the block."""
    from flash_attn.backends.triton import heuristics

    modules: list[Any] = [heuristics]
    with contextlib.suppress(ImportError):  # this Triton may not know Gluon
        from flash_attn.backends.sm90 import launch, launch_backward

        modules += [launch, launch_backward]
    plans: dict[str, dict[str, Any]] = {}

    def record(key: Any, plan: Any) -> None:
        plans[str(key[0])] = plan._asdict() if hasattr(plan, "_asdict") else dict(vars(plan))

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "report", record))
        yield plans


# ------------------------------------------------------------------------------- correctness
def reference(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> dict[str, Tensor]:
    """Output and gradients by definition, in blocks of rows, in the dtype of the inputs.

    Args:
        q, k, v, dout: (nheads, seqlen, headdim), float32 or float64.
    """
    scale, seqlen, block = q.shape[-1] ** -0.5, q.shape[-2], 2048
    out, dq, dk, dv = (torch.zeros_like(q) for _ in range(4))
    columns = torch.arange(seqlen, device=q.device)
    for start in range(0, seqlen, block):
        rows = slice(start, min(start + block, seqlen))
        scores = q[:, rows] @ k.mT * scale
        if causal:
            scores = scores.masked_fill(columns > columns[rows, None], -math.inf)
        p = scores.softmax(-1)
        out[:, rows] = p @ v
        delta = (out[:, rows] * dout[:, rows]).sum(-1, keepdim=True)
        ds = p * (dout[:, rows] @ v.mT - delta) * scale
        dq[:, rows] = ds @ k
        dk += ds.mT @ q[:, rows]
        dv += p.mT @ dout[:, rows]
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def _slice(x: Tensor, head_axis: int) -> Tensor:
    """The first and the last head of the last sequence as (2, seqlen, headdim) in float32."""
    x = x.detach()[-1]
    heads = x if head_axis == 1 else x.transpose(0, 1)
    return heads[[0, -1]].float()


def reference_slice(cell: Cell, inputs: Inputs) -> dict[str, Tensor]:
    """What :func:`errors_of` compares with."""
    return reference(*(_slice(x, 2) for x in inputs), causal=cell.causal)


def errors_of(runner: Runner, want: dict[str, Tensor], backward: bool) -> dict[str, float]:
    """Relative Frobenius errors of the slice; not finite if any element of a result is not."""
    out = runner.call()
    results = {"out": out}
    if backward:
        grads = torch.autograd.grad(out, runner.leaves, runner.dout)
        results.update(zip(("dq", "dk", "dv"), grads, strict=True))
    errors = {}
    for name, value in results.items():
        difference = _slice(value, runner.head_axis) - want[name]
        error = (difference.norm() / want[name].norm()).item()
        errors[name] = error if bool(torch.isfinite(value).all()) else math.inf
    return errors


def is_wrong(errors: dict[str, float]) -> bool:
    """Whether any result is off by more than rounding explains; NaN is."""
    return not all(error <= WRONG_ABOVE for error in errors.values())


# ----------------------------------------------------------------------------------- running
def describe(error: BaseException) -> str:
    """One line for a record: the type and the beginning of the message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _survive(clock: Clock, failures: dict[str, str], key: str, error: Exception) -> None:
    """Record a failure and go on, unless the device no longer answers."""
    failures[key] = describe(error)
    try:
        clock.synchronize()
    except Exception as lost:
        raise DeviceLostError(describe(lost)) from error


@dataclass
class Session:
    """What all cells of one run share."""

    clock: Clock
    providers: Sequence[str]
    passes: Sequence[str]
    rounds: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    makers: dict[str, Callable[[Cell, Inputs], Runner]] = field(default_factory=lambda: PROVIDERS)

    def run_cell(self, cell: Cell, record: dict[str, Any]) -> None:
        """Check and time every provider; ``record`` is filled as results come in."""
        inputs = make_inputs(cell, self.dtype, self.device)
        want = reference_slice(cell, inputs)
        runners = {}
        for name in self.providers:
            try:
                runner = self._checked(name, cell, inputs, want, record)
            except Exception as error:
                _survive(self.clock, record["failures"], name, error)
                continue
            if runner is not None:
                runners[name] = runner
        for which in self.passes:
            self._time_pass(cell, which, runners, record)

    def _checked(
        self, name: str, cell: Cell, inputs: Inputs, want: dict[str, Tensor], record: dict[str, Any]
    ) -> Runner | None:
        """The provider on this cell, or None if it is wrong."""
        runner = self.makers[name](cell, inputs)
        plans = recorded_plans() if name == "ours" and inputs.q.is_cuda else None
        with plans or contextlib.nullcontext() as used:
            errors = errors_of(runner, want, "bwd" in self.passes)
        if used:
            record["plans"] = used
        record["errors"][name] = {key: float(f"{value:.3e}") for key, value in errors.items()}
        if not is_wrong(errors):
            return runner
        record["failures"][name] = f"wrong: relative errors {record['errors'][name]}"
        return None

    def _prepare(
        self, which: str, name: str, runner: Runner, failures: dict[str, str]
    ) -> Callable[[], object] | None:
        """The call to time, or None if its graph cannot be built."""
        try:
            return runner.call if which == "fwd" else backward_of(runner)
        except Exception as error:
            _survive(self.clock, failures, f"{name}/{which}", error)
            return None

    def _time_pass(
        self, cell: Cell, which: str, runners: dict[str, Runner], record: dict[str, Any]
    ) -> None:
        prepared = {
            name: self._prepare(which, name, runner, record["failures"])
            for name, runner in runners.items()
        }
        calls = {name: call for name, call in prepared.items() if call is not None}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for order in rotations(list(calls), self.rounds):
            for name in order:
                if name not in calls:
                    continue
                try:
                    times[name].append(self.clock.measure(calls[name]))
                except Exception as error:
                    del calls[name]
                    _survive(self.clock, record["failures"], f"{name}/{which}", error)
        for name in calls:
            median = statistics.median(times[name])
            record["passes"].setdefault(which, {})[name] = {
                "median_ms": round(median, 5),
                "rounds_ms": [round(value, 5) for value in times[name]],
                "tflops": round(cell.flops(which) / median / 1e9, 2),
            }


def new_record(cell: Cell) -> dict[str, Any]:
    """A cell of the result file, before anything was run."""
    shape = {"headdim": cell.headdim, "causal": cell.causal, "seqlen": cell.seqlen}
    shape |= {"batch": cell.batch, "nheads": cell.nheads}
    return {"name": cell.name, **shape, "passes": {}, "errors": {}, "failures": {}, "plans": {}}


def progress(record: dict[str, Any], elapsed: float) -> str:
    """One line on a cell that is done."""
    parts = [f"[{elapsed:4.0f}s] {record['name']:<20}"]
    for which, rows in record["passes"].items():
        parts.append(which + " " + " ".join(f"{n} {row['tflops']:.0f}" for n, row in rows.items()))
    parts += [f"!! {name}: {text[:120]}" for name, text in record["failures"].items()]
    return "  ".join(parts)


def run(session: Session, cells: Sequence[Cell], data: dict[str, Any], args: Any) -> None:
    """Run all cells, writing ``data`` after each, until done or out of time."""
    began = time.monotonic()
    for index, cell in enumerate(cells):
        if time.monotonic() - began > args.max_seconds:
            data["left_out"] = [left.name for left in cells[index:]]
            print("out of time; left out:", ", ".join(data["left_out"]), flush=True)
            break
        record = new_record(cell)
        data["cells"].append(record)
        try:
            session.run_cell(cell, record)
        except DeviceLostError as error:
            record["failures"]["device"] = str(error)
            data["left_out"] = [left.name for left in cells[index + 1 :]]
            break
        except Exception as error:  # the inputs or the reference; the next cell may fit
            record["failures"]["cell"] = describe(error)
        finally:
            gc.collect()
            if args.out is not None:
                write_json(args.out, data)
            print(progress(record, time.monotonic() - began), flush=True)
        if session.device == "cuda":
            torch.cuda.empty_cache()
    data["complete"] = not data["left_out"]
    data["seconds"] = round(time.monotonic() - began, 1)
    if args.out is not None:
        write_json(args.out, data)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; names that do not exist end the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", default="portable", type=parse_cells, help="portable, or a list")
    parser.add_argument("--pass", dest="passes", default="fwd,bwd", help="fwd, bwd or both")
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="separated by commas")
    parser.add_argument("--backend", default="auto", help="of ours, as flash_attn.set_backend")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of a cell")
    parser.add_argument("--budget", type=float, default=0.05, help="seconds of one measurement")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="no new cell after it")
    parser.add_argument("--out", type=Path, help="JSON file, written after every cell")
    parser.add_argument("--commit", help="recorded instead of asking git")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try out")
    args = parser.parse_args(arguments)
    args.passes, args.providers = args.passes.split(","), args.providers.split(",")
    for name, values, known in (
        ("--pass", args.passes, PASSES),
        ("--providers", args.providers, PROVIDERS),
    ):
        if not set(values) <= set(known):
            parser.error(f"{name} takes {', '.join(known)}, found {','.join(values)}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, found {args.rounds}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if every cell was timed without a failure."""
    args = parse_arguments(arguments)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("no GPU is visible", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference is float32
    clock = CudaClock(args.budget) if on_gpu else HostClock()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    session = Session(clock, args.providers, args.passes, args.rounds, dtype, args.device)
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": "attention",
        "environment": environment(args.commit),
        "settings": {
            "rounds": args.rounds,
            "dtype": str(dtype).removeprefix("torch."),
            "backend": args.backend,
        },
        "complete": False,
        "left_out": [],
        "cells": [],
    }
    print(" ".join(f"{key}={value}" for key, value in data["environment"].items()), flush=True)
    from flash_attn import use_backend

    with use_backend(args.backend):
        run(session, args.cells, data, args)
    from report import summary_lines

    print("\n".join(summary_lines(data)), flush=True)
    return 0 if data["complete"] and not any(c["failures"] for c in data["cells"]) else 1


if __name__ == "__main__":
    sys.exit(main())
