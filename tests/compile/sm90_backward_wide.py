"""Compiles the Hopper backward for head dims above 128, like ``sm90_backward``.

PYTHONPATH=src python tests/compile/sm90_backward_wide.py [--split] [--apart] 192 256

Each kernel once: head dims that are padded to the same columns share their main kernel. --split
also compiles kernels that divide groups of query heads, --apart those where dq has one of its own.
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
from flash_attn.backends.sm90.plans_backward import plan_apart, plan_backward
from flash_attn.core.problem import AttentionProblem, BackwardInputs, make_transform


class Case(NamedTuple):
    """What is compiled; ``shape`` is (batch, seqlen, nheads): a 1 could become a constant."""

    mask: str
    softcap: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, int, int] = (2, 2048, 4)


CASES = [
    Case("full"),
    Case("causal"),
    Case("window", dtype=torch.float16),
    Case("window", softcap=20.0),
    Case("causal", shape=(1, 1, 1)),
    Case("full", shape=(3, 77, 3)),
]


# Where dq has a kernel of its own: what takes the most.
APART = {192: Case("window", softcap=20.0), 256: Case("window", dtype=torch.float16)}


def launches(headdim: int, case: Case, splits: int = 1, is_apart: bool = False) -> list[aot.Launch]:
    """The kernel calls of one backward; none if the package refuses it, or if there are not enough
    heads for ``splits``."""
    batch, seqlen, nheads = case.shape
    x = torch.empty(batch, seqlen, nheads, headdim, dtype=case.dtype, device="meta")
    transform = make_transform(headdim, softcap=case.softcap)
    k = x[:, :, : nheads // splits]
    problem = AttentionProblem(x, k, k, transform, VISIBILITIES[case.mask])
    if launch_backward.unsupported_backward(problem) or splits > nheads:
        return []
    lse = torch.empty(batch, nheads, seqlen, device="meta")
    state = torch.empty(2, dtype=torch.int64, device="meta")
    inputs = BackwardInputs(x, x, lse, x, k, k, state)
    plan = None
    if splits > 1 or is_apart:
        choose = plan_apart if is_apart else plan_backward
        plan = choose(headdim, case.mask != "full", seqlen)._replace(splits=splits)
    return aot.record(lambda: launch_backward.backward(problem, inputs, plan), "sm90")


def main() -> None:
    """Compile for the head dims named on the command line."""
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True
    headdims = [int(x) for x in sys.argv[1:] if not x.startswith("--")]
    jobs = [(d, case, 1, False) for d in headdims for case in CASES]
    if "--split" in sys.argv:
        jobs += [(d, case, 2, False) for d in headdims for case in CASES]
    if "--apart" in sys.argv:
        jobs += [(d, case, 1, True) for d, case in APART.items() if d in headdims]
    known = set()
    for headdim, case, splits, is_apart in jobs:
        for one in launches(headdim, case, splits, is_apart):
            kernel = kernel_of(one)
            if kernel not in known:
                known.add(kernel)
                report(one, kernel=one.name, headdim=headdim, splits=splits, is_apart=is_apart,
                       case=str(case))  # fmt: skip


if __name__ == "__main__":
    main()
