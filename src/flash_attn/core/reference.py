"""The meaning of attention in this package, written to be read.

For every query row i of a sequence, with the keys j that :mod:`.masking` lets it see::

    score[i, j] = softcap * tanh(scale * q[i].k[j] / softcap)      (scale * q.k if softcap is 0)
                  - alibi_slope * |i + seqlen_k - seqlen_q - j|
    lse[i]      = log(sum_j exp(score[i, j]))
    out[i]      = sum_j keep[i, j] / (1 - dropout_p) * exp(score[i, j] - lse[i]) * v[j]

A row that sees no key has ``out`` 0, no gradient, and the log-sum-exp that the problem names.
Everything is dense, differentiable by PyTorch and as precise as ``dtype``; memory grows with
seqlen_q * seqlen_k. Every backend is held against these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rng
from .masking import visible_matrix
from .outputs import new_s_dmask
from .problem import AttentionProblem, AttentionResult, ScoreTransform
from .sequences import Sequence, sequences


def scores(q: Tensor, k: Tensor, transform: ScoreTransform, slopes: Tensor | None) -> Tensor:
    """Scores before masking.

    Args:
        q: (seqlen_q, nheads, headdim).
        k: (seqlen_k, nheads, headdim).
        transform: scale and softcap.
        slopes: (nheads,) ALiBi slopes of this sequence, or None.

    Returns:
        (nheads, seqlen_q, seqlen_k).
    """
    s = torch.einsum("qhd,khd->hqk", q, k) * transform.softmax_scale
    if transform.softcap > 0.0:
        s = transform.softcap * torch.tanh(s / transform.softcap)
    if slopes is not None:
        seqlen_q, seqlen_k = s.shape[-2:]
        row = torch.arange(seqlen_q, device=s.device)[:, None] + (seqlen_k - seqlen_q)
        key = torch.arange(seqlen_k, device=s.device)[None, :]
        s = s - slopes.to(s.dtype)[:, None, None] * (row - key).abs()
    return s


def _slopes(problem: AttentionProblem, index: int) -> Tensor | None:
    slopes = problem.transform.alibi_slopes
    return slopes if slopes is None or slopes.dim() == 1 else slopes[index]


def _gather(problem: AttentionProblem, tensor: Tensor, sequence: Sequence) -> Tensor:
    """Keys or values of one sequence, repeated for the query heads: (seqlen_k, nheads, headdim)."""
    rows = tensor[sequence.k_rows]
    return rows.repeat_interleave(problem.nheads // problem.nheads_k, dim=1)


def masked_scores(
    problem: AttentionProblem, q: Tensor, k: Tensor, sequence: Sequence
) -> tuple[Tensor, Tensor]:
    """Scores of one sequence with unseen keys at -inf, and the (seqlen_q, seqlen_k) pattern."""
    s = scores(
        q[sequence.q_rows],
        _gather(problem, k, sequence),
        problem.transform,
        _slopes(problem, sequence.number),
    )
    seen = visible_matrix(sequence.seqlen_q, sequence.seqlen_k, problem.visibility, s.device)
    return s.masked_fill(~seen, float("-inf")), seen


def _probabilities(s: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over keys and its log-sum-exp; rows without keys get 0 and -inf, and no gradient."""
    alive = seen.any(dim=-1)
    safe = s.masked_fill(~alive[:, None], 0.0)
    lse = torch.logsumexp(safe, dim=-1) if s.shape[-1] else safe.sum(-1)
    p = torch.exp(safe - lse[..., None]).masked_fill(~seen, 0.0)
    return p, lse.masked_fill(~alive, float("-inf"))


def attention(
    problem: AttentionProblem,
    dtype: torch.dtype = torch.float64,
    rng_state: Tensor | None = None,
) -> AttentionResult:
    """Solve ``problem`` densely in ``dtype``.

    Args:
        problem: inputs of any floating dtype; they are cast to ``dtype`` first.
        dtype: torch.float64 for checks, torch.float32 for use.
        rng_state: replay this (2,) int64 dropout state instead of drawing a new one.

    Returns:
        The result with ``out``, ``softmax_lse`` and ``s_dmask`` in ``dtype``, differentiable.
    """
    q, k, v = (x.to(dtype) for x in (problem.q, problem.k, problem.v))
    if rng_state is None:
        dropout = problem.dropout_p > 0.0
        rng_state = rng.new_state(q.device) if dropout else rng.unused_state(q.device)
    out = torch.zeros_like(q)
    lse = torch.full(problem.lse_shape, problem.empty_lse, dtype=dtype, device=q.device)
    s_dmask = new_s_dmask(problem).to(dtype)
    for sequence in sequences(problem):
        s, seen = masked_scores(problem, q, k, sequence)
        p, row_lse = _probabilities(s, seen)
        keep = _keep(problem, rng_state, sequence)
        dropped = p if keep is None else p.masked_fill(~keep, 0.0) / (1.0 - problem.dropout_p)
        value = _gather(problem, v, sequence)
        out[sequence.q_rows] = torch.einsum("hqk,khd->qhd", dropped, value)
        alive = seen.any(dim=-1)
        index = sequence.lse_index(problem.is_varlen_q)
        lse[index] = torch.where(alive, row_lse, torch.full_like(row_lse, problem.empty_lse))
        if s_dmask.numel() and keep is not None and sequence.seqlen_k:
            exponent = s - s.amax(dim=-1, keepdim=True).masked_fill(~alive[:, None], 0.0)
            signed = torch.where(keep, 1.0, -1.0).to(dtype) * torch.exp(exponent)
            s_dmask[sequence.number, :, : sequence.seqlen_q, : sequence.seqlen_k] = signed.detach()
    return AttentionResult(out, lse, s_dmask, rng_state)


def _keep(problem: AttentionProblem, rng_state: Tensor, sequence: Sequence) -> Tensor | None:
    if problem.dropout_p == 0.0:
        return None
    rows = torch.arange(sequence.seqlen_q, device=problem.q.device)
    keys = torch.arange(sequence.seqlen_k, device=problem.q.device)
    return rng.keep_mask(rng_state, problem.dropout_p, sequence.number, problem.nheads, rows, keys)


def attention_probabilities(
    problem: AttentionProblem, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The normalised attention matrix of a dense problem: (batch, nheads, seqlen_q, seqlen_k)."""
    q, k = problem.q.to(dtype), problem.k.to(dtype)
    matrices = [
        _probabilities(*masked_scores(problem, q, k, sequence))[0]
        for sequence in sequences(problem)
    ]
    return torch.stack(matrices)


def gradients(
    problem: AttentionProblem,
    dout: Tensor,
    dtype: torch.dtype = torch.float64,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) in ``dtype``, by PyTorch's autograd through :func:`attention`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v)]
    with torch.enable_grad():
        copy = problem._replace(q=leaves[0], k=leaves[1], v=leaves[2], return_softmax=False)
        out = attention(copy, dtype, rng_state).out
        grads = torch.autograd.grad(out, leaves, dout.to(dtype), allow_unused=True)
    return tuple(  # type: ignore[return-value]
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, grads, strict=True)
    )
