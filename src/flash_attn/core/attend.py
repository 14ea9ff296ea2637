"""Solving a problem: check it, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import KernelCompilationError
from . import registry, repeated
from .outputs import empty_out, lse_without_keys, new_s_dmask, softmax_d_shape
from .problem import AttentionProblem, AttentionResult, BackwardInputs
from .rng import placeholder_state, unused_state
from .validate import check_backward, check_gradient, check_out, check_problem, check_state

_R = TypeVar("_R")


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
    if out is not None:
        check_out(out, problem)
    if _has_no_pairs(problem):
        return _empty_result(problem, out)

    def compute(backend: registry.Backend) -> AttentionResult:
        if call is not None:
            return repeated.forward(call, problem, backend)
        return backend.forward(problem, out)

    return _computed(problem, False, compute)


def _computed(
    problem: AttentionProblem, backward: bool, compute: Callable[[registry.Backend], _R]
) -> _R:
    """``compute`` by the backend for ``problem``.

    Where it turns out that Triton does not compile a backend's kernels, that backend is given up
    for the rest of the process, and the next one computes. One chosen by name has no next one: its
    reason is raised.
    """
    while True:
        backend = registry.select(problem, backward)
        try:
            return compute(backend)
        except KernelCompilationError as error:
            registry.give_up(backend.name, backward, error)
            repeated.clear()


def operator_outputs(problem: AttentionProblem) -> tuple[Tensor, ...]:
    """Solve; an operator's outputs must be defined, so that without dropout the state is zeros."""
    result = attend(problem)
    if problem.dropout_p > 0.0:
        return tuple(result)
    return (*result[:3], unused_state(problem.q.device))


def attend_backward(problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
    """Write the gradients of ``problem`` in place; returns softmax_d, rowsum(out * dout) - dlse.

    ``torch.use_deterministic_algorithms`` makes every problem a deterministic one.

    Raises:
        ConstraintError: an argument is wrong.
        UnsupportedProblemError: no permitted backend computes it.
    """
    if torch.are_deterministic_algorithms_enabled() and not problem.deterministic:
        problem = problem._replace(deterministic=True)
    grads = (inputs.dq, inputs.dk, inputs.dv)
    call = None
    if inputs.dlse is None and inputs.dmask is None and inputs.dsinks is None:
        call = repeated.identify(problem, inputs.dout, inputs.out, inputs.softmax_lse, *grads)
    if call is not None and (solve := repeated.find(call.signature)):
        return solve(call.tensors)[0]
    check_problem(problem)
    check_backward(problem, inputs.dout, inputs.out, inputs.softmax_lse)
    if problem.dropout_p > 0.0:
        check_state(inputs.rng_state, problem.q)
    check_gradient(inputs.dq, "dq", problem.q)
    check_gradient(inputs.dk, "dk", problem.k)
    check_gradient(inputs.dv, "dv", problem.v)
    mask, sinks = problem.transform.attn_mask, problem.transform.sinks
    for name, grad, given in (("dmask", inputs.dmask, mask), ("dsinks", inputs.dsinks, sinks)):
        if grad is not None and given is not None:
            check_gradient(grad, name, given, any_strides=True)
    if inputs.dsinks is not None:
        inputs.dsinks.copy_(_sink_gradient(problem, inputs))
    if _has_no_pairs(problem):
        for grad in (*grads, inputs.dmask):
            if grad is not None:
                grad.zero_()
        return torch.zeros(softmax_d_shape(problem), device=problem.q.device)

    def compute(backend: registry.Backend) -> Tensor:
        if call is not None:
            return repeated.backward(call, problem, inputs, backend)
        return backend.backward(problem, inputs)

    return _computed(problem, True, compute)


def _sink_gradient(problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
    """-sum_i exp(sink - lse[i]) (rowsum(out * dout)[i] - dlse[i]), over batch and rows."""
    sinks = problem.transform.sinks
    if sinks is None:
        raise TypeError("the problem has no sinks")
    # Rows that see no key, those of no sequence among them, have `out` 0, whatever is in `dout`.
    product = inputs.out.float() * inputs.dout.float()
    delta = product.masked_fill_(inputs.out == 0, 0.0).sum(-1).transpose(-1, -2)
    if inputs.dlse is not None:
        delta = delta - inputs.dlse
    lse = inputs.softmax_lse
    weight = torch.exp(sinks.float()[:, None] - lse).masked_fill_(lse == -torch.inf, 0.0)
    grad = -(weight * delta).sum(-1)
    return grad if problem.is_varlen_q else grad.sum(0)


def _empty_result(problem: AttentionProblem, out: Tensor | None) -> AttentionResult:
    out = (empty_out(problem) if out is None else out).zero_()
    lse = lse_without_keys(problem)
    return AttentionResult(out, lse, new_s_dmask(problem), placeholder_state(problem.q.device))
