"""Calls that are solved again by repeating their launches, see :mod:`flash_attn.core.repeated`.

A call is solved in the ordinary way while its launches are noted; results are allocated anew each
time, as they were the first time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.problem import AttentionProblem, AttentionResult, BackwardInputs
from ...core.repeated import Solve
from .._launcher import Tape, recording, repeat
from . import launch, launch_backward


def _allocator(device: str) -> Any:
    """``(shape, stride, dtype)`` -> an uninitialised tensor on the current device of a type.

    The functions that PyTorch's own compiled code allocates with cost half of the public one.
    """
    found = getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None)
    if found is not None:
        return found
    return lambda shape, stride, dtype: torch.empty_strided(
        shape, stride, dtype=dtype, device=device
    )


_ALLOCATE = {device: _allocator(device) for device in ("cpu", "cuda")}


def forward(
    problem: AttentionProblem, tensors: Sequence[Tensor]
) -> tuple[AttentionResult, Solve | None]:
    """Solve ``problem`` without dropout; repeated, its ``tensors`` give (out, softmax_lse)."""
    with recording() as tape:
        result = launch.forward(problem, None)
    made = (result.out, result.softmax_lse)
    return result, _solve(tape, tensors, made, result.rng_state)


def backward(
    problem: AttentionProblem, inputs: BackwardInputs, tensors: Sequence[Tensor]
) -> tuple[Tensor, Solve | None]:
    """Write the gradients; repeated, ``tensors`` give (softmax_d,) and theirs are written."""
    with recording() as tape:
        softmax_d = launch_backward.backward(problem, inputs)
    # What lies between packed sequences is written by no kernel.
    zeroed = problem.is_varlen_q
    return softmax_d, _solve(tape, tensors, (softmax_d,), inputs.rng_state, zeroed)


def _solve(
    tape: Tape,
    tensors: Sequence[Tensor],
    made: tuple[Tensor, ...],
    rng_state: Tensor,
    zeroed: bool = False,
) -> Solve | None:
    """How the launches of ``tape`` are repeated on tensors in the place of ``tensors``, with
    results like ``made``, zeros before if ``zeroed``; None if they cannot be."""
    repeated = repeat(tape, [*tensors, *made, rng_state])
    if repeated is None:
        return None
    launches = repeated
    allocate = _ALLOCATE[tensors[0].device.type]
    layouts = [(tuple(x.shape), x.stride(), x.dtype) for x in made]

    def solve(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if not launches.is_current():
            with torch.cuda.device(launches.device):
                return solve(tensors)
        results = tuple([allocate(*layout) for layout in layouts])
        if zeroed:
            for x in results:
                x.zero_()
        addresses = [x.data_ptr() for x in tensors]
        addresses += [x.data_ptr() for x in results]
        addresses.append(0)  # rng_state, which nothing reads without dropout
        launches(addresses)
        return results

    return solve
