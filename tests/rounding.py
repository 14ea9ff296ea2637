"""How far rounding to float32 moves a result: two orders of the same sums differ no more.

The statistical error analysis of N. J. Higham and T. Mary (A New Approach to Probabilistic Rounding
Error Analysis, 2019): roundings act as independent errors with mean zero, so their variances add. A
rounding to a relative precision u has the variance u^2 / 3 times the square of what is rounded. A
sum of n terms t rounds n products and n partial sums. In a random order the square of the k-th
partial sum is (k / n)^2 sum(t)^2 where terms agree in sign and k / n sum(t^2) where they do not, on
average; summed over k and added up, n / 3 sum(t)^2 + n / 2 sum(t^2).

Put through the formulas of forward and backward this gives every element a standard deviation that
depends on its own terms: those that cancel count with their sizes, which a tolerance relative to
the result's largest element does not see.
"""

from __future__ import annotations

import torch
from support import Inputs, Solution
from torch import Tensor

from flash_attn.core.masking import visible_matrix
from flash_attn.core.problem import AttentionProblem
from flash_attn.core.sequences import Sequence, sequences

# Variance of one rounding, relative.
_ROUNDING = (torch.finfo(torch.float32).eps / 2) ** 2 / 3
# Roundings of an element besides those of its sum: a scale, a change of base, a difference, a
# normalisation, and an exponential whose error, up to 2^-22.5 on GPUs, counts as eight.
_STEPS = 12
# Standard deviations that nothing may exceed: a chance of 2e-9 for each element.
_SIGMAS = 6.0


def deviations(inputs: Inputs) -> Solution:
    """The standard deviation of each element of a float32 solution of ``inputs``, in float64.

    Without dropout and ALiBi.
    """
    problem = inputs.problem()
    q, k, v, dout = (x.detach().double() for x in inputs.tensors)
    found = Solution(
        torch.zeros_like(q),
        torch.zeros(problem.lse_shape, dtype=torch.float64, device=q.device),
        *(torch.zeros_like(x) for x in (q, k, v)),
    )
    for sequence in sequences(problem):
        if sequence.seqlen_q and sequence.seqlen_k:
            _fill_sequence(problem, sequence, (q, k, v, dout), found)
    return Solution(*(variance.sqrt() for variance in found))


def _of_product(a: Tensor, b: Tensor, terms: int) -> Tensor:
    """Variance of ``a @ b`` with sums of so many terms."""
    whole, squares = (a @ b) ** 2, a**2 @ b**2
    return _ROUNDING * ((terms / 3 + _STEPS) * whole + (terms / 2 + 1) * squares)


def _fill_sequence(
    problem: AttentionProblem, sequence: Sequence, tensors: tuple[Tensor, ...], found: Solution
) -> None:
    """Variances of one sequence; tensors here have their heads first."""
    group = problem.nheads // problem.nheads_k
    n_q, n_k, n_d = sequence.seqlen_q * group, sequence.seqlen_k, problem.headdim
    q, dout = (tensors[i][sequence.q_rows].transpose(0, 1) for i in (0, 3))
    k, v = (
        tensors[i][sequence.k_rows].transpose(0, 1).repeat_interleave(group, dim=0) for i in (1, 2)
    )
    scale, softcap = problem.transform.softmax_scale, problem.transform.softcap
    seen = visible_matrix(sequence.seqlen_q, n_k, problem.visibility, q.device)

    # Scores.
    s = scale * (q @ k.mT)
    var_s = scale**2 * _of_product(q, k.mT, n_d)
    slope, var_slope = torch.ones_like(s), torch.zeros_like(s)
    if softcap > 0.0:
        tanh = torch.tanh(s / softcap)
        s, slope = softcap * tanh, 1.0 - tanh**2
        var_slope = 4.0 * tanh**2 * (var_s / softcap**2 + _STEPS * _ROUNDING)
        var_s = slope**2 * var_s + _STEPS * _ROUNDING * softcap**2

    # Weights, relative: what the keys of a row have each, and what they share.
    hidden = s.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(hidden, -1, keepdim=True)
    p = torch.exp(hidden - lse.nan_to_num(neginf=0.0))
    largest = 1.0 + s.masked_fill(~seen, 0.0).abs().amax(-1, keepdim=True)
    var_own = var_s + _STEPS * _ROUNDING * largest**2
    var_row = (p**2 * var_own).sum(-1, keepdim=True) + _ROUNDING * (n_k / 3 + _STEPS * largest**2)
    var_lse = var_row * torch.isfinite(lse)

    # Output, and its sum with dout.
    out, dp = p @ v, dout @ v.mT
    delta = (out * dout).sum(-1, keepdim=True)
    var_sum = _of_product(p, v, n_k)
    var_out = (p**2 * var_own) @ v**2 + out**2 * var_row + var_sum
    var_delta = (p**2 * var_own * dp**2).sum(-1, keepdim=True) + delta**2 * var_row
    var_delta += (var_sum * dout**2).sum(-1, keepdim=True)
    var_delta += _of_product(out[..., None, :], dout[..., :, None], n_d)[..., 0]

    # Gradients of the scores. Those of a row share the errors of its delta and its lse.
    ds = p * (dp - delta)
    var_dp = _of_product(dout, v.mT, n_d)
    var_ds = ds**2 * (var_own + _STEPS * _ROUNDING) + p**2 * (var_dp + _STEPS * _ROUNDING * dp**2)
    var_ds = slope**2 * var_ds + ds**2 * var_slope
    ds, shared = slope * ds, slope * p
    own = var_ds @ k**2 + (ds @ k) ** 2 * var_row + (shared @ k) ** 2 * var_delta
    total = var_ds + ds**2 * var_row + shared**2 * var_delta
    variances = (
        scale**2 * (own + _of_product(ds, k, n_k)),
        scale**2 * (total.mT @ q**2 + _of_product(ds.mT, q, n_q)),
        (p**2 * (var_own + var_row)).mT @ dout**2 + _of_product(p.mT, dout, n_q),
    )

    found.out[sequence.q_rows] = var_out.transpose(0, 1)
    found.lse[sequence.lse_index(problem.is_varlen_q)] = var_lse[..., 0]
    found.dq[sequence.q_rows] = variances[0].transpose(0, 1)
    for target, variance in zip((found.dk, found.dv), variances[1:], strict=True):
        heads = variance.unflatten(0, (problem.nheads_k, group)).sum(1)
        target[sequence.k_rows] = heads.transpose(0, 1)


def assert_within(a: Tensor, b: Tensor, deviation: Tensor, what: str = "") -> None:
    """``a - b``, whose elements have these standard deviations, is rounding; infinities agree."""
    assert a.shape == b.shape == deviation.shape, what
    infinite = torch.isinf(b)
    assert torch.equal(a[infinite], b[infinite]), what
    difference = (a.double() - b.double()).masked_fill(infinite, 0.0).abs()
    allowed = _SIGMAS * deviation
    excess = (difference - allowed).nan_to_num(nan=float("inf")).flatten()
    if excess.numel() and float(excess.max()) > 0.0:
        at = int(excess.argmax())
        found, bound = float(difference.flatten()[at]), float(allowed.flatten()[at])
        raise AssertionError(f"{what}: off by {found:.2e}, allowed {bound:.2e}")


def assert_same(a: Solution, b: Solution, deviation: Solution, what: str = "") -> None:
    """Two solutions of a problem that have these standard deviations each."""
    for name in Solution._fields:
        both = 2.0**0.5 * getattr(deviation, name)
        assert_within(getattr(a, name), getattr(b, name), both, f"{name}, {what}")
