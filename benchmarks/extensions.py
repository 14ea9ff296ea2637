"""Times what goes beyond FlashAttention-2's arguments: ways to compute the same thing, in turns.

    python benchmarks/extensions.py --out result.json
    python benchmarks/extensions.py --match float8 --rounds 3 --ways bfloat16,float8

Cells: float8 beside bfloat16, and its ways to multiply values; decoding with and without heads
packed into rows; masks, chunks, sinks; head dims of v and second products. All on the portable
kernels. Each way's error is that of one head against float32 arithmetic.

The run ends with a line for each cell of whole sequences, bfloat16's time over float8's, and PASS
if none is below 1: only then is the exit code 0, where there are such cells.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from recording import describe, new_result, write_json
from timing import CudaClock, rotations
from torch import Tensor

from flash_attn import use_backend
from flash_attn.backends.triton import launch
from flash_attn.core import reference, repeated
from flash_attn.core.attend import attend, attend_backward
from flash_attn.core.problem import (
    AttentionProblem,
    BackwardInputs,
    ScoreTransform,
    SequenceLayout,
    Visibility,
)

TOKENS, HIDDEN = 16384, 2048
FLOAT8 = torch.float8_e4m3fn


class Way(NamedTuple):
    """A problem, and functions of the package to replace while it is solved."""

    problem: AttentionProblem
    patches: dict[str, Any]
    backward: bool = False


Cell = dict[str, Way]


def _make(
    batch: int, seqlens: tuple[int, int], heads: tuple[int, int], headdims: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16, **more: Any,
) -> AttentionProblem:  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(seqlens[1] + headdims[0])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    q = draw(batch, seqlens[0], heads[0], headdims[0])
    k = draw(batch, seqlens[1], heads[1], headdims[0])
    v = draw(batch, seqlens[1], heads[1], headdims[1])
    return AttentionProblem(q, k, v, ScoreTransform(headdims[0] ** -0.5), **more)


def float8_cells() -> Iterator[tuple[str, Cell]]:
    """Whole sequences; "ahead": values converted by a kernel before."""
    ways = {
        "float8": {},
        "float8 ahead": {"converts_float8_ahead": lambda key, rows: True},
        "float8 in the loop": {"converts_float8_ahead": lambda key, rows: False},
        "float8 weights": {"float8_weights": lambda key: True},
    }
    for headdim in (64, 128, 256):
        for seqlen in (1024, 4096, 16384):
            for causal in (False, True):
                heads = (HIDDEN // headdim,) * 2
                more = {"visibility": Visibility(None, 0 if causal else None)}
                shape = (TOKENS // seqlen, (seqlen, seqlen), heads, (headdim, headdim))
                cell = {"bfloat16": Way(_make(*shape, **more), {})}
                eight = _make(*shape, dtype=FLOAT8, **more)
                cell |= {name: Way(eight, patches) for name, patches in ways.items()}
                yield f"float8 d{headdim} s{seqlen} {'causal' if causal else 'full'}", cell


def decode_cells() -> Iterator[tuple[str, Cell]]:
    """Few queries on long caches."""
    for heads in ((32, 8), (16, 1), (64, 8)):
        for batch, rows, keys in ((1, 1, 65536), (16, 1, 8192), (64, 1, 4096), (16, 4, 8192)):
            used = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
            more = {"layout": SequenceLayout(seqused_k=used), "visibility": Visibility(None, 0)}
            shape = (batch, (rows, keys), heads, (128, 128))
            sixteen, eight = _make(*shape, **more), _make(*shape, dtype=FLOAT8, **more)
            cell = {
                f"{name}, {how}": Way(problem._replace(pack_gqa=pack), {})
                for name, problem in (("bfloat16", sixteen), ("float8", eight))
                for how, pack in (("packed", True), ("not packed", False))
            }
            yield f"decode h{heads[0]}/{heads[1]} b{batch} q{rows} k{keys}", cell


def feature_cells() -> Iterator[tuple[str, Cell]]:
    """One feature at a time beside the plain problem, forward and backward."""
    for headdim in (64, 128):
        heads, seqlen = (HIDDEN // headdim,) * 2, 4096
        plain = _make(4, (seqlen, seqlen), heads, (headdim, headdim))
        bias = torch.randn(1, heads[0], seqlen, seqlen, device="cuda").bfloat16()
        keys = torch.rand(4, 1, 1, seqlen, device="cuda") < 0.9
        used = torch.full((4,), seqlen, dtype=torch.int32, device="cuda")
        transforms = {
            "bias": {"attn_mask": bias},
            "bool mask": {"attn_mask": bias > -1.0},
            "key mask": {"attn_mask": keys},
            "sinks": {"sinks": torch.zeros(heads[0], device="cuda")},
        }
        problems = {"plain": plain}
        for name, fields in transforms.items():
            problems[name] = plain._replace(transform=plain.transform._replace(**fields))
        problems["chunk 1024"] = plain._replace(visibility=Visibility(None, 0, 1024))
        problems["used"] = plain._replace(layout=SequenceLayout(seqused_q=used, seqused_k=used))
        for backward in (False, True):
            cell = {name: Way(problem, {}, backward) for name, problem in problems.items()}
            yield f"features d{headdim} {'backward' if backward else 'forward'}", cell


def headdim_cells() -> Iterator[tuple[str, Cell]]:
    """Head dims of v of their own, and a second product (as latent attention has)."""
    wide = _make(2, (2048, 2048), (16, 16), (192, 128), visibility=Visibility(None, 0))
    yield "d192-128 s2048 causal", {"forward": Way(wide, {}), "backward": Way(wide, {}, True)}
    latent = _make(2, (1024, 1024), (16, 1), (64, 512), visibility=Visibility(None, 0))
    qv = torch.randn(latent.out_shape, device="cuda").bfloat16()
    second = latent._replace(qv=qv)
    yield (
        "d64-512 s1024 causal",
        {
            "forward": Way(latent, {}),
            "backward": Way(latent, {}, True),
            "second product": Way(second, {}),
        },
    )
    used = torch.full((16,), 8192, dtype=torch.int32, device="cuda")
    few = _make(16, (1, 8192), (16, 1), (64, 512), layout=SequenceLayout(seqused_k=used))
    few = few._replace(qv=torch.randn(few.out_shape, device="cuda").bfloat16())
    yield (
        "latent decode b16 k8192",
        {
            "packed": Way(few._replace(pack_gqa=True), {}),
            "not packed": Way(few._replace(pack_gqa=False), {}),
        },
    )


def cells() -> Iterator[tuple[str, Cell]]:
    """All of them."""
    for group in (float8_cells, decode_cells, feature_cells, headdim_cells):
        yield from group()


def caller(way: Way) -> Callable[[], object]:
    """What is timed: the whole forward call, or the whole backward call."""
    problem = way.problem

    def forward() -> object:
        return attend(problem)

    def patched() -> object:
        with ExitStack() as stack:
            # Else calls of the same shapes would be repeated as they were without the patches.
            stack.enter_context(mock.patch.object(repeated, "identify", return_value=None))
            for name, replacement in way.patches.items():
                stack.enter_context(mock.patch.object(launch, name, replacement))
            return forward()

    if not way.backward:
        return patched if way.patches else forward
    result = attend(problem)
    mask = problem.transform.attn_mask
    dmask = None if mask is None or mask.dtype == torch.bool else torch.empty_like(mask)
    inputs = BackwardInputs(
        torch.randn_like(result.out), result.out, result.softmax_lse,
        *(torch.empty_like(x) for x in problem[:3]), result.rng_state, dmask=dmask,
    )  # fmt: skip
    return lambda: attend_backward(problem, inputs)


def error_of(way: Way) -> float | None:
    """Relative error of the first head's last 256 queries in the first sequence."""
    problem = way.problem
    if problem.transform.attn_mask is not None or problem.visibility.attention_chunk:
        return None
    out = caller(way._replace(backward=False))().out[:1, -256:, :1].float()  # type: ignore[attr-defined]
    small = problem._replace(
        q=problem.q[:1, -256:, :1], k=problem.k[:1, :, :1], v=problem.v[:1, :, :1],
        layout=SequenceLayout(), out_dtype=torch.float32,
        qv=None if problem.qv is None else problem.qv[:1, -256:, :1],
        transform=problem.transform._replace(sinks=None),
    )  # fmt: skip
    if problem.transform.sinks is not None:
        return None
    want = reference.attention(small, torch.float32).out
    return float((out - want).norm() / want.norm())


def measure(name: str, cell: Cell, clock: CudaClock, rounds: int) -> dict[str, Any]:
    """Median milliseconds and errors by way."""
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, float | None] = {}
    failures: dict[str, str] = {}

    def prepare(key: str, way: Way) -> None:
        try:
            call = caller(way)
            call()
            torch.cuda.synchronize()
            errors[key] = error_of(way)
            calls[key] = call
        except Exception as error:
            failures[key] = describe(error)

    for key, way in cell.items():
        prepare(key, way)
    times: dict[str, list[float]] = {key: [] for key in calls}
    for order in rotations(list(calls), rounds):
        for key in order:
            times[key].append(clock.measure(calls[key]))
    medians = {key: statistics.median(found) for key, found in times.items()}
    return {"cell": name, "median_ms": medians, "errors": errors, "failures": failures}


def verdict(rows: Sequence[dict[str, Any]], left_out: Sequence[str]) -> tuple[list[str], bool]:
    """The closing lines on float8 beside bfloat16, and whether it is slower or missing nowhere.

    Of no interest, and no failure, where no cell has both.
    """
    lines, ratios, missing = [], [], list(left_out)
    for row in rows:
        known = {*row["median_ms"], *row["failures"]}
        if not {"bfloat16", "float8"} <= known:
            continue
        times, name = row["median_ms"], row["cell"]
        if not {"bfloat16", "float8"} <= set(times):
            lines.append(f"{name:<32} no figure: {row['failures']}")
            missing.append(name)
            continue
        ratio = times["bfloat16"] / times["float8"]
        ratios.append(ratio)
        figures = f"{times['bfloat16']:.3f} / {times['float8']:.3f} ms = {ratio:.3f}"
        lines.append(f"{name:<32} {figures} {'ok' if ratio >= 1.0 else 'SLOWER'}")
    if not ratios and not missing:
        return [], True
    passed = bool(ratios) and min(ratios) >= 1.0 and not missing
    worst = f"{min(ratios):.3f} at worst in {len(ratios)} cells" if ratios else "no cell"
    lines.append(f"{'PASS' if passed else 'FAIL'}: bfloat16's time over float8's, {worst}")
    if missing:
        lines.append("without a figure: " + ", ".join(missing))
    return lines, passed


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--match", default="", help="only cells whose name contains this")
    parser.add_argument("--ways", default="", help="only these, separated by commas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="no new cell after it")
    parser.add_argument("--out", type=Path, help="JSON file, written after every cell")
    parser.add_argument("--commit", help="recorded instead of asking git")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 1 if float8 is slower than bfloat16 in a cell that has both, or a cell is left out."""
    options = parse_arguments(arguments)
    wanted = set(filter(None, options.ways.split(",")))
    until = time.monotonic() + options.max_seconds
    clock, rows, left_out = CudaClock(0.02), [], []
    settings = {"rounds": options.rounds, "backend": "triton"}
    data = new_result("extensions", options.commit, settings)
    data |= {"rows": rows, "left_out": left_out}
    for name, cell in cells():
        if options.match not in name:
            continue
        if time.monotonic() > until:
            left_out.append(name)
            continue
        chosen = {key: way for key, way in cell.items() if not wanted or key in wanted}
        if not chosen:
            continue
        with use_backend("triton"):
            rows.append(measure(name, chosen, clock, options.rounds))
        print(rows[-1], flush=True)
        if options.out:
            write_json(options.out, data)
    lines, passed = verdict(rows, left_out)
    print("\n".join(lines), flush=True)
    if options.out:
        write_json(options.out, data | {"verdict": lines, "passed": passed})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
