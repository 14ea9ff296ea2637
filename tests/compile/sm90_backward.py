"""Compiles the Hopper backward for sm_90a and prints what each kernel takes, one JSON a line.

    PYTHONPATH=src python tests/compile/sm90_backward.py 64 128
    PYTHONPATH=src python tests/compile/sm90_backward.py --split 64 128

With ``--split`` query heads are grouped, and the groups divided among two programs: the kernels
that this changes.

A program of its own, because a compiler that does not know its way aborts the process. The
assembler's log goes to the same output.
"""
# ruff: noqa: T201

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import aot
import torch
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flash_attn.backends.sm90 import launch_backward
from flash_attn.backends.sm90.plans_backward import (
    MAX_HEADDIM_CHUNK,
    BackwardPlan,
    plan_backward,
    plan_ordered,
)
from flash_attn.core.problem import (
    DENSE,
    AttentionProblem,
    BackwardInputs,
    SequenceLayout,
    Visibility,
    make_transform,
)

VISIBILITIES = {
    "full": Visibility(),
    "causal": Visibility(None, 0),
    "window": Visibility(64, 20),
    "chunk": Visibility(None, None, 100),
}


# (batch, seqlen, nheads): Triton compiles integers anew that are 1 or multiples of 16, and for a 1
# puts a constant in the argument's place.
SHAPES = {"usual": (2, 2048, 4), "ones": (1, 1, 1), "odd": (3, 77, 3)}


def launches(case: Case, headdim: int, splits: int = 1) -> Iterator[tuple[str, aot.Launch]]:
    """The kernel calls of one backward, with the plans of other lengths and with sums in order.

    With ``splits``, if the shape has enough heads, of as many in each group.
    """
    batch, seqlen, nheads = SHAPES[case.shape]
    dtype = torch.float16 if case.mask == "window" else torch.bfloat16
    places = (batch * seqlen,) if "packed" in case.features else (batch, seqlen)
    x = torch.empty(*places, nheads, headdim, dtype=dtype, device="meta")
    dout = x if case.headdim_v is None else x.new_empty(*places, nheads, case.headdim_v)
    k, v = (t[..., : nheads // splits, :] for t in (x, dout))
    transform = make_transform(headdim, softcap=20.0 if "softcap" in case.features else 0.0)
    if "alibi" in case.features:
        transform = transform._replace(alibi_slopes=torch.empty(batch, nheads, device="meta"))
    bounds = torch.empty(batch + 1, dtype=torch.int32, device="meta")
    used = torch.empty(batch, dtype=torch.int32, device="meta")
    layout = DENSE
    if "packed" in case.features:
        layout = SequenceLayout(bounds, bounds, max_seqlen_q=seqlen, max_seqlen_k=seqlen)
    if "used" in case.features:
        layout = layout._replace(seqused_q=used, seqused_k=used)
    problem = AttentionProblem(x, k, v, transform, VISIBILITIES[case.mask], layout)
    if launch_backward.unsupported_backward(problem) or splits > nheads:
        return
    lse = torch.empty(problem.lse_shape, device="meta")
    state = torch.empty(2, dtype=torch.int64, device="meta")
    inputs = BackwardInputs(dout, dout, lse, x, k, v, state)
    one: aot.Launch
    widest = max(headdim, case.headdim_v or 0)
    plan = None
    if splits > 1:
        plan = plan_backward(widest, case.mask != "full", seqlen)._replace(splits=splits)
    for one in aot.record(lambda: launch_backward.backward(problem, inputs, plan), "sm90"):
        yield "in use", one
    if case.shape != "usual" or case.headdim_v:
        return  # other plans differ from others as the plan in use does
    plans = [("other lengths", x) for x in of_other_lengths(widest, case.mask != "full", seqlen)]
    if not ("alibi" in case.features and widest > MAX_HEADDIM_CHUNK):  # refused in order
        plans.append(("ordered", plan_ordered(widest, case.mask != "full", seqlen)))
    for name, plan in plans:
        plan = plan._replace(splits=splits)
        for one in aot.record(lambda p=plan: launch_backward.backward(problem, inputs, p), "sm90"):
            yield name, one


class Case(NamedTuple):
    """One backward pass that is compiled."""

    mask: str = "full"
    shape: str = "usual"
    features: str = ""
    headdim_v: int | None = None


def of_other_lengths(headdim: int, is_masked: bool, seqlen: int) -> list[BackwardPlan]:
    """The plans of lengths where dq is stored first, or is not, unlike at ``seqlen``, or where
    another number of additions is in flight."""
    used = plan_backward(headdim, is_masked, seqlen)
    others = (plan_backward(headdim, is_masked, 512), plan_backward(headdim, is_masked, 64, 4096))
    known = {(used.first_stores, used.in_flight)}
    found = []
    for x in others:
        if (x.first_stores, x.in_flight) not in known:
            known.add((x.first_stores, x.in_flight))
            found.append(x)
    return found


CASES = [
    *map(Case, VISIBILITIES),
    Case("causal", "ones"),
    Case("causal", "odd"),
    *(Case(mask, features="packed") for mask in VISIBILITIES),
    Case("causal", "ones", "packed"),
    Case("causal", "odd", "packed used", 61),
    Case("window", features="packed used softcap"),
    Case("window", features="used"),
    Case("window", features="softcap"),
    Case("causal", features="packed", headdim_v=40),
    Case("causal", headdim_v=128),
    Case("causal", features="alibi"),
    Case("window", features="packed alibi"),
    Case("chunk", features="used alibi"),
    Case("chunk", features="packed used softcap"),
]


# Of head dim 96.
FULLEST = [
    case
    for case in CASES
    if case.shape == "usual" and case.features in ("packed used softcap", "used", "alibi")
] + [Case("causal", features="packed")]


def specialised(x: Any) -> Any:
    """What a compiled kernel knows of an argument."""
    if isinstance(x, torch.Tensor):
        return x.dtype
    if isinstance(x, int) and not isinstance(x, bool):
        return x == 1, x % 16 == 0, abs(x) >> 31 > 0
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, tuple(x.block_shape), repr(x.layout)
    return type(x) if isinstance(x, float) else repr(x)


def kernel_of(one: aot.Launch) -> tuple[Any, ...]:
    """What tells compiled kernels apart: launches with the same are of one kernel."""
    keywords = tuple((name, repr(x)) for name, x in sorted(one.keywords.items()))
    return (one.name, *map(specialised, one.arguments), keywords)


def report(one: aot.Launch, **facts: Any) -> None:
    """Compile a kernel and print what it takes."""
    found = aot.compile_launch(one, "sm90")
    failures = found.failures("sm90")
    print(json.dumps({**facts, **found.as_dict(), "failures": failures}), flush=True)


def main() -> None:
    """Compile for the head dims named on the command line."""
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True
    splits = 2 if "--split" in sys.argv else 1
    for headdim in (int(x) for x in sys.argv[1:] if x != "--split"):
        # Other head dims differ in the number of columns alone, and divided groups in where k and v
        # come from and dk and dv go.
        cases = CASES if headdim in (64, 128) else CASES[:5]
        if headdim == 96:  # in pieces, and a dq group with other registers: what takes the most
            cases = [*CASES[:5], *FULLEST]
        known = set()
        if splits > 1:
            known = {kernel_of(one) for case in cases for _, one in launches(case, headdim)}
            cases = [Case("full"), Case("causal"), Case("causal", features="packed")]
        for case in cases:
            for plan, one in launches(case, headdim, splits):
                kernel = kernel_of(one)
                if kernel in known:
                    continue
                known.add(kernel)
                report(one, kernel=one.name, plan=plan, headdim=headdim, **case._asdict())


if __name__ == "__main__":
    main()
