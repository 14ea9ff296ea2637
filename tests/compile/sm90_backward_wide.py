"""Compiles the Hopper backward for head dims above 128, like ``sm90_backward``.

PYTHONPATH=src python tests/compile/sm90_backward_wide.py [--split] 192 256

Each kernel once: head dims that are padded to the same columns share their main kernels. --split
also compiles kernels that divide groups of query heads.
"""
# ruff: noqa: T201

from __future__ import annotations

import sys
from typing import NamedTuple

import aot
import torch
from sm90_backward import VISIBILITIES, kernel_of, report
from triton import knobs

from flash_attn.backends.sm90 import launch_backward
from flash_attn.backends.sm90.plans_backward import plan_backward
from flash_attn.core.problem import (
    DENSE,
    AttentionProblem,
    BackwardInputs,
    SequenceLayout,
    make_transform,
)


class Case(NamedTuple):
    """What is compiled; ``shape`` is (batch, seqlen, nheads): a 1 could become a constant."""

    mask: str
    softcap: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, int, int] = (2, 2048, 4)
    layout: str = "dense"


CASES = [
    Case("full"),
    Case("causal"),
    Case("window", dtype=torch.float16),
    Case("window", softcap=20.0),
    Case("causal", shape=(1, 1, 1)),
    Case("full", shape=(3, 77, 3)),
    Case("window", layout="packed used", dtype=torch.float16),
    Case("window", layout="packed used", softcap=20.0),
]
# Of divided groups: what takes the least and the most.
DIVIDED = [CASES[0], *CASES[-2:]]


def launches(headdim: int, case: Case, splits: int = 1) -> list[aot.Launch]:
    """The kernel calls of one backward; none if the package refuses it, or if there are not enough
    heads for ``splits``."""
    batch, seqlen, nheads = case.shape
    places = (batch * seqlen,) if "packed" in case.layout else (batch, seqlen)
    x = torch.empty(*places, nheads, headdim, dtype=case.dtype, device="meta")
    transform = make_transform(headdim, softcap=case.softcap)
    k = x[..., : nheads // splits, :]
    layout = DENSE
    if "packed" in case.layout:
        bounds = torch.empty(batch + 1, dtype=torch.int32, device="meta")
        layout = SequenceLayout(bounds, bounds, max_seqlen_q=seqlen, max_seqlen_k=seqlen)
    if "used" in case.layout:
        used = torch.empty(batch, dtype=torch.int32, device="meta")
        layout = layout._replace(seqused_q=used, seqused_k=used)
    problem = AttentionProblem(x, k, k, transform, VISIBILITIES[case.mask], layout)
    if launch_backward.unsupported_backward(problem) or splits > nheads:
        return []
    lse = torch.empty(problem.lse_shape, device="meta")
    state = torch.empty(2, dtype=torch.int64, device="meta")
    inputs = BackwardInputs(x, x, lse, x, k, k, state)
    plan = None
    if splits > 1:
        plan = plan_backward(headdim, case.mask != "full", seqlen)._replace(splits=splits)
    return aot.record(lambda: launch_backward.backward(problem, inputs, plan), "sm90")


def main() -> None:
    """Compile for the head dims named on the command line."""
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True
    headdims = [int(x) for x in sys.argv[1:] if not x.startswith("--")]
    jobs = [(d, case, 1) for d in headdims for case in CASES]
    if "--split" in sys.argv:
        jobs += [(d, case, 2) for d in headdims for case in DIVIDED]
    known = set()
    for headdim, case, splits in jobs:
        for one in launches(headdim, case, splits):
            kernel = kernel_of(one)
            if kernel not in known:
                known.add(kernel)
                report(one, kernel=one.name, headdim=headdim, splits=splits, case=str(case))


if __name__ == "__main__":
    main()
