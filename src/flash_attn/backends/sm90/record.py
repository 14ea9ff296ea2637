"""Calls of the Hopper kernels that are solved again by repeating their launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...core.problem import AttentionProblem, AttentionResult, BackwardInputs
from ...core.repeated import Solve
from .._launcher import recording
from .._recorded import solve_again
from . import launch


def forward(
    problem: AttentionProblem, tensors: Sequence[Tensor]
) -> tuple[AttentionResult, Solve | None]:
    """Solve ``problem``; repeated, its ``tensors`` give (out, softmax_lse)."""
    with recording() as tape:
        result = launch.forward(problem)
    return result, solve_again(tape, tensors, (result.out, result.softmax_lse))


def backward(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    tensors: Sequence[Tensor],
    compute: Callable[[AttentionProblem, BackwardInputs], Tensor],
) -> tuple[Tensor, Solve | None]:
    """Write the gradients by ``compute``; repeated, ``tensors`` give (softmax_d,) and theirs are
    written.

    What copies a tensor because TMA cannot address it, or leaves out keys that nobody sees, is not
    repeated: the launches then take tensors that the call does not have.
    """
    with recording() as tape:
        softmax_d = compute(problem, inputs)
    # What lies between packed sequences is written by no kernel.
    return softmax_d, solve_again(tape, tensors, (softmax_d,), zeroed=problem.is_varlen_q)
