"""Calls of the portable kernels that are solved again by repeating their launches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...core.problem import AttentionProblem, AttentionResult, BackwardInputs
from ...core.repeated import Solve
from .._launcher import recording
from .._recorded import solve_again
from . import launch, launch_backward


def forward(
    problem: AttentionProblem, tensors: Sequence[Tensor]
) -> tuple[AttentionResult, Solve | None]:
    """Solve ``problem`` without dropout; repeated, its ``tensors`` give (out, softmax_lse)."""
    with recording() as tape:
        result = launch.forward(problem, None)
    made = (result.out, result.softmax_lse)
    # Without dropout nothing reads the state of random numbers.
    return result, solve_again(tape, tensors, made, (result.rng_state,))


def backward(
    problem: AttentionProblem, inputs: BackwardInputs, tensors: Sequence[Tensor]
) -> tuple[Tensor, Solve | None]:
    """Write the gradients; repeated, ``tensors`` give (softmax_d,) and theirs are written."""
    with recording() as tape:
        softmax_d = launch_backward.backward(problem, inputs)
    # What lies between packed sequences is written by no kernel.
    solve = solve_again(tape, tensors, (softmax_d,), (inputs.rng_state,), problem.is_varlen_q)
    return softmax_d, solve
