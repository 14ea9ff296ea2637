"""Compiles the Hopper backward for sm_90a and prints what each kernel takes, one JSON a line.

    PYTHONPATH=src python tests/compile/sm90_backward.py 64 128

A program of its own, because a compiler that does not know its way aborts the process. The
assembler's log goes to the same output.
"""
# ruff: noqa: T201

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import aot
import torch
from triton import knobs

from flash_attn.backends.sm90 import launch_backward
from flash_attn.core.problem import (
    AttentionProblem,
    BackwardInputs,
    Visibility,
    make_transform,
)

VISIBILITIES = {
    "full": Visibility(),
    "causal": Visibility(None, 0),
    "window": Visibility(64, 20),
}


# (batch, seqlen, nheads): Triton compiles integers anew that are 1 or multiples of 16, and for a 1
# puts a constant in the argument's place.
SHAPES = {"usual": (2, 2048, 4), "ones": (1, 1, 1), "odd": (3, 77, 3)}


def launches(
    headdim: int, dtype: torch.dtype, visibility: Visibility, shape: tuple[int, int, int]
) -> list[aot.Launch]:
    """The kernel calls of one backward."""
    batch, seqlen, nheads = shape
    x = torch.empty(batch, seqlen, nheads, headdim, dtype=dtype, device="meta")
    problem = AttentionProblem(x, x, x, make_transform(headdim), visibility)
    lse = torch.empty(batch, nheads, seqlen, device="meta")
    state = torch.empty(2, dtype=torch.int64, device="meta")
    inputs = BackwardInputs(x, x, lse, x, x, x, state)
    return aot.record(lambda: launch_backward.backward(problem, inputs), "sm90")


class Case(NamedTuple):
    """One backward pass that is compiled."""

    mask: str = "full"
    shape: str = "usual"


CASES = [*map(Case, VISIBILITIES), Case("causal", "ones"), Case("causal", "odd")]


def main() -> None:
    """Compile for the head dims named on the command line."""
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True
    for headdim in map(int, sys.argv[1:]):
        for case in CASES:
            dtype = torch.float16 if case.mask == "window" else torch.bfloat16
            for one in launches(headdim, dtype, VISIBILITIES[case.mask], SHAPES[case.shape]):
                found = aot.compile_launch(one, "sm90")
                facts = {"kernel": one.name, "headdim": headdim, **case._asdict()}
                failures = found.failures("sm90")
                print(json.dumps({**facts, **found.as_dict(), "failures": failures}), flush=True)


if __name__ == "__main__":
    main()
