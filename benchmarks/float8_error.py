"""Measures the error of float8 attention beside that of cuDNN's FP8 forward.

    python benchmarks/float8_error.py --out result.json
    python benchmarks/float8_error.py --no-cudnn

Inputs are bfloat16, quantised to e4m3; both get the same numbers and factors. Errors are relative,
in the Frobenius norm and in the maximum, against attention in float64: of the inputs before they
were quantised ("inputs"), and of the numbers that the float8 ones stand for ("float8"). The second
is what a kernel itself adds.

cuDNN takes one factor for each tensor, and on Hopper GPUs it writes e4m3: its output's factor is
chosen by a first run so that the range is used. Rows with factors of heads are ours alone. It needs
the package nvidia-cudnn-frontend.

Exit code 0: no error is above 1.1 times cuDNN's. 1: one is, or nothing could be compared, or
something failed. 2: it cannot run here.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cudnn_float8 import Cudnn, CudnnForward, CudnnMissingError, CudnnRefusedError, load_cudnn
from recording import SCHEMA, describe, environment, write_json
from torch import Tensor

from flash_attn import hopper_interface, use_backend
from flash_attn.core import reference
from flash_attn.core.problem import AttentionProblem, ScoreTransform, Visibility
from flash_attn.quantize import QuantizedQKV, quantize_fp8

BATCH, NHEADS = 2, 4
# Of our error over cuDNN's.
ALLOWED = 1.1
# Beside the float8 numbers' own attention. Float8 weights and outputs cost less than half of it:
# beyond, a kernel is wrong, or is used wrongly.
WRONG_ABOVE = 0.1
# Every 32nd channel of q and k, and the standard deviation of the scores that result.
OUTLIER_STEP, OUTLIER_SIZE, OUTLIER_SCORES = 32, 20.0, 2.0

Errors = dict[str, dict[str, float]]
Row = dict[str, Any]
Rival = CudnnForward | Exception | None


class Shape(NamedTuple):
    """Self-attention of :data:`BATCH` sequences in :data:`NHEADS` heads."""

    headdim: int
    causal: bool
    seqlen: int

    @property
    def name(self) -> str:
        return f"d{self.headdim} {'causal' if self.causal else 'full'} s{self.seqlen}"

    @property
    def size(self) -> tuple[int, int, int, int]:
        """(batch, seqlen, nheads, headdim)."""
        return BATCH, self.seqlen, NHEADS, self.headdim


class Quantisation(NamedTuple):
    """What our helper is asked for."""

    hadamard: bool
    per_head: bool

    @property
    def name(self) -> str:
        kind = "rotated" if self.hadamard else "plain"
        return f"{kind} {'head' if self.per_head else 'tensor'}"


INPUTS = ("gaussian", "outliers")
QUANTISATIONS = tuple(itertools.starmap(Quantisation, itertools.product((False, True), repeat=2)))


# ------------------------------------------------------------------------------------ inputs
def make_inputs(shape: Shape, kind: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (batch, seqlen, nheads, headdim) in bfloat16: standard normal, or with channels of
    q and k that are larger than the others."""
    generator = torch.Generator(device).manual_seed(shape.seqlen + shape.headdim)
    q, k, v = (torch.randn(shape.size, device=device, generator=generator) for _ in range(3))
    if kind == "outliers":
        channels = torch.ones(shape.headdim, device=device)
        channels[::OUTLIER_STEP] = OUTLIER_SIZE
        # The variance of a score is the mean over channels of size ** 4.
        channels *= math.sqrt(OUTLIER_SCORES) / channels.pow(4).mean() ** 0.25
        q, k = q * channels, k * channels
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def exact(given: Sequence[Tensor], causal: bool, descales: Sequence[Tensor] = ()) -> Tensor:
    """(batch, seqlen, nheads, headdim) attention in float64, head by head, of q, k and v
    ``given``; float8 ones with their (batch, nheads) ``descales``."""
    q, k, v = given
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    visibility = Visibility(None, 0 if causal else None)
    for batch, head in itertools.product(range(q.shape[0]), range(q.shape[2])):
        at = (slice(batch, batch + 1), slice(None), slice(head, head + 1))
        transform = ScoreTransform(q.shape[-1] ** -0.5)
        if descales:
            q_descale, k_descale, v_descale = (x[at[0], at[2]] for x in descales)
            transform = transform._replace(
                q_descale=q_descale, k_descale=k_descale, v_descale=v_descale
            )
        problem = AttentionProblem(q[at], k[at], v[at], transform, visibility)
        out[at] = reference.attention(problem, torch.float64).out
    return out


def errors_of(out: Tensor, wanted: dict[str, Tensor]) -> Errors:
    """Relative errors by what ``out`` is compared with; infinite if any element is not finite."""
    found = {}
    for name, want in wanted.items():
        error = out.double() - want
        frobenius = float(error.norm() / want.norm())
        maximum = float(error.abs().max() / want.abs().max())
        finite = math.isfinite(frobenius) and math.isfinite(maximum)
        found[name] = {
            "frobenius": frobenius if finite else math.inf,
            "maximum": maximum if finite else math.inf,
        }
    return found


# --------------------------------------------------------------------------------- measuring
def ours(given: QuantizedQKV, causal: bool) -> Tensor:
    """Our forward by the backend in use: (batch, seqlen, nheads, headdim) in bfloat16."""
    out: Tensor = hopper_interface.flash_attn_func(
        given.q, given.k, given.v, causal=causal,
        q_descale=given.q_descale, k_descale=given.k_descale, v_descale=given.v_descale,
    )  # fmt: skip
    return out


def worst_ratio(mine: Errors, theirs: Errors) -> float:
    """The largest of all ratios of our error over theirs; NaN counts as infinite.

    The largest error of one element against the inputs is left out: that is what quantisation does
    to it, the same for both, and what the kernel adds may by chance be of the other sign.
    """
    ratios = [
        mine[target][norm] / max(theirs[target][norm], 1e-30)
        for target, norms in mine.items()
        for norm in norms
        if (target, norm) != ("inputs", "maximum")
    ]
    return max(x if x == x else math.inf for x in ratios)


def measure(
    shape: Shape,
    kind: str,
    how: Quantisation,
    given: tuple[Tensor, Tensor, Tensor],
    want: Tensor,
    rival: Rival,
) -> Row:
    """One row: our errors, cuDNN's, and the worst ratio; or why one is missing.

    Args:
        shape: of ``given``.
        kind: of the inputs, for the record.
        how: they are quantised.
        given: q, k and v before that.
        want: their attention in float64.
        rival: from :func:`rival_of`.
    """
    row: Row = {"cell": f"{shape.name} {kind} {how.name}", **shape._asdict(), "inputs": kind}
    row |= {**how._asdict(), "ours": None, "cudnn": None, "ratio": None, "failures": {}}
    eight = quantize_fp8(*given, per_head=how.per_head, hadamard=how.hadamard)
    wanted = {"inputs": want, "float8": exact(eight[:3], shape.causal, eight[3:])}
    try:
        row["ours"] = errors_of(ours(eight, shape.causal), wanted)
    except Exception as error:
        row["failures"]["ours"] = describe(error)
    if isinstance(rival, CudnnRefusedError):
        row["cudnn_refused"] = str(rival)
    elif isinstance(rival, Exception):
        row["failures"]["cudnn"] = describe(rival)
    elif rival is not None and not how.per_head:
        try:
            row["cudnn"] = errors_of(rival(eight), wanted)
        except Exception as error:
            row["failures"]["cudnn"] = describe(error)
    for name in ("ours", "cudnn"):
        if row[name] is not None and not row[name]["float8"]["frobenius"] <= WRONG_ABOVE:
            row["failures"][name] = f"wrong: off by {row[name]['float8']['frobenius']:.2e}"
    if row["ours"] is not None and row["cudnn"] is not None and not row["failures"]:
        row["ratio"] = worst_ratio(row["ours"], row["cudnn"])
    return row


def rival_of(cudnn: Cudnn | None, shape: Shape) -> Rival:
    """cuDNN's forward for ``shape``, what it raised instead, or None to leave it out."""
    try:
        return None if cudnn is None else CudnnForward(cudnn, shape.size, shape.causal)
    except Exception as error:
        return error


def rows_of(
    shapes: Sequence[Shape], cudnn: Cudnn | None, device: str, until: float
) -> Iterator[Row | str]:
    """Rows, and after ``until`` (of time.monotonic) the names of the inputs that are left out."""
    for shape in shapes:
        rival = rival_of(cudnn, shape) if time.monotonic() <= until else None
        for kind in INPUTS:
            if time.monotonic() > until:
                yield f"{shape.name} {kind}"
                continue
            given = make_inputs(shape, kind, device)
            want = exact(given, shape.causal)
            for how in QUANTISATIONS:
                yield measure(shape, kind, how, given, want, rival)


# --------------------------------------------------------------------------------- reporting
_HEADS = ("ours: inputs", "float8", "cuDNN: inputs", "float8")
HEADER = " " * 42 + "".join(f"{head:>18}" for head in _HEADS) + f"{'ratio':>7}"


def line_of(row: Row) -> str:
    """Frobenius and maximum errors in one line, and the verdict on the row."""
    figures = ""
    for name, target in itertools.product(("ours", "cudnn"), ("inputs", "float8")):
        found = row[name]
        pair = "-" if found is None else "{frobenius:.2e} {maximum:.2e}".format(**found[target])
        figures += f"{pair:>18}"
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    word = "" if row["ratio"] is None else (" ok" if row["ratio"] <= ALLOWED else " WORSE")
    line = f"{row['cell']:<42}{figures}{ratio:>7}{word}"
    notes = [f" !! {name}: {text[:160]}" for name, text in row["failures"].items()]
    return line + "".join(notes)


def verdict(rows: Sequence[Row], left_out: Sequence[str], compares: bool) -> tuple[list[str], bool]:
    """The closing lines, and whether the measurement passed."""
    compared = [row for row in rows if row["ratio"] is not None]
    worse = [row["cell"] for row in compared if row["ratio"] > ALLOWED]
    failed = [row["cell"] for row in rows if row["failures"]]
    refused = {}
    for row in rows:
        if "cudnn_refused" in row:
            shape = Shape(row["headdim"], row["causal"], row["seqlen"]).name
            refused[shape] = row["cudnn_refused"]
    lines = [f"cuDNN refuses {shape}: {reason}" for shape, reason in refused.items()]
    for what, names in (("failed", failed), ("worse", worse), ("not run", left_out)):
        if names:
            lines.append(f"{what}: " + ", ".join(names))
    passed = not worse and not failed and not left_out and bool(rows)
    if not compares:
        lines.append(f"{'PASS' if passed else 'FAIL'}: {len(rows)} rows of ours, none compared")
        return lines, passed
    passed = passed and bool(compared)
    worst = max((row["ratio"] for row in compared), default=math.nan)
    lines.append(
        f"{'PASS' if passed else 'FAIL'}: worst of our errors over cuDNN's is {worst:.3f} in "
        f"{len(compared)} rows compared, {ALLOWED} is allowed"
    )
    return lines, passed


def numbers(text: str) -> list[int]:
    """Positive integers separated by commas."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--headdims", default="64,128,256", type=numbers)
    parser.add_argument("--seqlens", default="1024,4096", type=numbers)
    parser.add_argument("--no-cudnn", action="store_true", help="measure our error alone")
    parser.add_argument("--backend", default="auto", help="of ours, as flash_attn.set_backend")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="then stop")
    parser.add_argument("--out", type=Path, help="JSON file, written after every row")
    parser.add_argument("--commit", help="recorded instead of asking git")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try out")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.no_cudnn:
        parser.error("--device cpu needs --no-cudnn: cuDNN runs on GPUs alone")
    return args


def new_data(args: argparse.Namespace, cudnn: Cudnn | None) -> dict[str, Any]:
    """The result file before any row."""
    versions = {"cudnn": "none", "cudnn_frontend": "none"} if cudnn is None else cudnn.versions()
    return {
        "schema": SCHEMA,
        "benchmark": "float8_error",
        "environment": environment(args.commit) | versions,
        "settings": {
            "batch": BATCH,
            "nheads": NHEADS,
            "allowed": ALLOWED,
            "backend": args.backend,
            "outlier_step": OUTLIER_STEP,
            "outlier_size": OUTLIER_SIZE,
            "outlier_scores": OUTLIER_SCORES,
        },
        "rows": [],
        "left_out": [],
        "passed": None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything; exit codes as the module says."""
    args = parse_arguments(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible", file=sys.stderr)
        return 2
    try:
        cudnn = None if args.no_cudnn else load_cudnn()
    except CudnnMissingError as error:
        print(error, file=sys.stderr)
        return 2
    data = new_data(args, cudnn)
    print(" ".join(f"{key}={value}" for key, value in data["environment"].items()), flush=True)
    print(HEADER, flush=True)
    shapes = list(itertools.starmap(Shape, itertools.product(
        args.headdims, (False, True), args.seqlens
    )))  # fmt: skip
    until = time.monotonic() + args.max_seconds
    with torch.no_grad(), use_backend(args.backend):
        for found in rows_of(shapes, cudnn, args.device, until):
            if isinstance(found, str):
                data["left_out"].append(found)
                continue
            data["rows"].append(found)
            print(line_of(found), flush=True)
            if args.out is not None:
                write_json(args.out, data)
    lines, data["passed"] = verdict(data["rows"], data["left_out"], cudnn is not None)
    print("\n".join(lines), flush=True)
    if args.out is not None:
        write_json(args.out, data)
    return 0 if data["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
