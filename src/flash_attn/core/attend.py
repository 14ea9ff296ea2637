"""Solving a problem: check it, choose a backend, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import registry, repeated
from .outputs import empty_lse, empty_out, new_s_dmask, softmax_d_shape
from .problem import AttentionProblem, AttentionResult, BackwardInputs
from .rng import placeholder_state
from .validate import check_backward, check_gradient, check_problem


def _has_no_pairs(problem: AttentionProblem) -> bool:
    """Whether no query can see any key, whatever the lengths say."""
    return problem.q.numel() == 0 or problem.k.numel() == 0


def attend(problem: AttentionProblem, out: Tensor | None = None) -> AttentionResult:
    """Solve ``problem``, into ``out`` if it is given.

    Raises:
        ConstraintError: an argument is wrong.
        UnsupportedProblemError: no permitted backend computes it.
    """
    call = repeated.identify(problem) if out is None else None
    if call is not None and (solve := repeated.find(call.signature)):
        out, lse = solve(call.tensors)
        return AttentionResult(out, lse, new_s_dmask(problem), placeholder_state(out.device))
    check_problem(problem)
    if _has_no_pairs(problem):
        return _empty_result(problem, out)
    backend = registry.select(problem)
    if call is not None:
        return repeated.forward(call, problem, backend)
    return backend.forward(problem, out)


def attend_backward(problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
    """Write the gradients of ``problem`` into ``inputs.dq``, ``dk``, ``dv``; returns softmax_d.

    Raises:
        ConstraintError: an argument is wrong.
        UnsupportedProblemError: no permitted backend computes it.
    """
    grads = (inputs.dq, inputs.dk, inputs.dv)
    call = repeated.identify(problem, inputs.dout, inputs.out, inputs.softmax_lse, *grads)
    if call is not None and (solve := repeated.find(call.signature)):
        return solve(call.tensors)[0]
    check_problem(problem)
    check_backward(problem, inputs.dout, inputs.out, inputs.softmax_lse)
    check_gradient(inputs.dq, "dq", problem.q)
    check_gradient(inputs.dk, "dk", problem.k)
    check_gradient(inputs.dv, "dv", problem.v)
    if _has_no_pairs(problem):
        for grad in grads:
            grad.zero_()
        return torch.zeros(softmax_d_shape(problem), device=problem.q.device)
    backend = registry.select(problem, backward=True)
    if call is not None:
        return repeated.backward(call, problem, inputs, backend)
    return backend.backward(problem, inputs)


def _empty_result(problem: AttentionProblem, out: Tensor | None) -> AttentionResult:
    out = (empty_out(problem) if out is None else out).zero_()
    lse = empty_lse(problem).fill_(problem.empty_lse)
    return AttentionResult(out, lse, new_s_dmask(problem), placeholder_state(problem.q.device))
