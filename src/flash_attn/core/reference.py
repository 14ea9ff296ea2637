"""The meaning of attention in this package, written to be read.

For every query row i of a sequence, with the keys j that :mod:`.masking` lets it see::

    dot[i, j]   = q[i].k[j] + qv[i].v[j]
    score[i, j] = softcap * tanh(scale * dot[i, j] / softcap)      (scale * dot if softcap is 0)
                  - alibi_slope * |i + seqlen_k - seqlen_q - j|
                  + attn_mask[i, j]
    lse[i]      = log(exp(sink) + sum_j exp(score[i, j]))
    out[i]      = sum_j keep[i, j] / (1 - dropout_p) * exp(score[i, j] - lse[i]) * v[j]

A boolean ``attn_mask`` hides the keys where it is False, a float one those where it is -inf. A row
that sees no key has ``out`` 0, no gradient, and the log-sum-exp that the problem names, or its
sink. float8 inputs stand for their products with the descales.
Everything is dense, differentiable by PyTorch and as precise as ``dtype``; memory grows with
seqlen_q * seqlen_k. Every backend is held against these functions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import rng
from .arguments import without_autocast
from .masking import visible_matrix
from .outputs import new_s_dmask
from .problem import AttentionProblem, AttentionResult, ScoreTransform
from .sequences import Sequence, sequences


def scores(dot: Tensor, transform: ScoreTransform, slopes: Tensor | None) -> Tensor:
    """Scores before masking.

    Args:
        dot: (nheads, seqlen_q, seqlen_k) products of queries and keys.
        transform: scale and softcap.
        slopes: (nheads,) ALiBi slopes of this sequence, or None.

    Returns:
        (nheads, seqlen_q, seqlen_k).
    """
    s = dot * transform.softmax_scale
    if transform.softcap > 0.0:
        s = transform.softcap * torch.tanh(s / transform.softcap)
    if slopes is not None:
        seqlen_q, seqlen_k = s.shape[-2:]
        row = torch.arange(seqlen_q, device=s.device)[:, None] + (seqlen_k - seqlen_q)
        key = torch.arange(seqlen_k, device=s.device)[None, :]
        s = s - slopes.to(s.dtype)[:, None, None] * (row - key).abs()
    return s


def mask_block(attn_mask: Tensor, index: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The part of ``attn_mask`` for one sequence as numbers to add, -inf where nothing is seen.

    Args:
        attn_mask: see :class:`~.problem.ScoreTransform`, bool or float.
        index: which sequence of the batch.
        seqlen_q: its number of queries.
        seqlen_k: its number of keys.

    Returns:
        (1 or nheads, seqlen_q, seqlen_k). Positions past the mask's own size are not seen.
    """
    own = attn_mask[index if attn_mask.shape[0] > 1 else 0]
    if own.dtype == torch.bool:
        own = torch.zeros_like(own, dtype=torch.float32).masked_fill(~own, float("-inf"))
    for dim, length in ((-2, seqlen_q), (-1, seqlen_k)):
        if own.shape[dim] == 1:
            size = list(own.shape)
            size[dim] = length
            own = own.expand(size)
        own = own.narrow(dim, 0, min(length, own.shape[dim]))
    missing = (0, seqlen_k - own.shape[-1], 0, seqlen_q - own.shape[-2])
    return torch.nn.functional.pad(own, missing, value=float("-inf"))


def _slopes(problem: AttentionProblem, index: int) -> Tensor | None:
    slopes = problem.transform.alibi_slopes
    return slopes if slopes is None or slopes.dim() == 1 else slopes[index]


def _repeat(problem: AttentionProblem, tensor: Tensor) -> Tensor:
    """(rows, nheads_k, dim) repeated for the query heads: (rows, nheads, dim)."""
    return tensor.repeat_interleave(problem.nheads // tensor.shape[1], dim=1)


def _descaled(x: Tensor, descale: Tensor | None, index: int) -> Tensor:
    """(rows, heads, dim) times its (batch, heads or nheads_k) factors."""
    if descale is None:
        return x
    factors = descale[index].to(x.dtype)
    return x * factors.repeat_interleave(x.shape[1] // factors.shape[0])[None, :, None]


class _Inputs(NamedTuple):
    """A problem's differentiable tensors in the dtype of the computation."""

    q: Tensor
    k: Tensor
    v: Tensor
    qv: Tensor | None
    attn_mask: Tensor | None
    sinks: Tensor | None


def _cast(problem: AttentionProblem, dtype: torch.dtype) -> _Inputs:
    transform = problem.transform
    mask, sinks = transform.attn_mask, transform.sinks
    return _Inputs(
        problem.q.to(dtype),
        problem.k.to(dtype),
        problem.v.to(dtype),
        None if problem.qv is None else problem.qv.to(dtype),
        mask if mask is None or mask.dtype == torch.bool else mask.to(dtype),
        None if sinks is None else sinks.to(dtype),
    )


def _masked_scores(
    problem: AttentionProblem, inputs: _Inputs, sequence: Sequence
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of one sequence with unseen keys at -inf, where they are seen (both
    (nheads, seqlen_q, seqlen_k)), and its values (seqlen_k, nheads, headdim_v)."""
    transform, index = problem.transform, sequence.number
    q = _descaled(inputs.q[sequence.q_rows], transform.q_descale, index)
    k = _descaled(inputs.k[sequence.k_rows], transform.k_descale, index)
    v = _descaled(inputs.v[sequence.k_rows], transform.v_descale, index)
    k, v = _repeat(problem, k), _repeat(problem, v)
    dot = torch.einsum("qhd,khd->hqk", q, k)
    if inputs.qv is not None:
        dot = dot + torch.einsum("qhd,khd->hqk", inputs.qv[sequence.q_rows], v)
    s = scores(dot, transform, _slopes(problem, index))
    seen = visible_matrix(sequence.seqlen_q, sequence.seqlen_k, problem.visibility, s.device)
    if inputs.attn_mask is not None:
        mask = mask_block(inputs.attn_mask, index, sequence.seqlen_q, sequence.seqlen_k)
        seen = seen & (mask != float("-inf"))
        s = s + mask.to(s.dtype)
    return s.masked_fill(~seen, float("-inf")), seen.expand(s.shape), v


def _probabilities(s: Tensor, seen: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over keys and its log-sum-exp; rows that see nothing get 0 and -inf (with sinks,
    the sink), and no gradient."""
    alive = seen.any(dim=-1)
    safe = s.masked_fill(~alive[..., None], 0.0)
    lse = torch.logsumexp(safe, dim=-1) if s.shape[-1] else safe.sum(-1)
    if sinks is not None:
        sink = sinks[:, None].expand_as(lse)
        lse = torch.where(alive, torch.logaddexp(lse, sink), sink)
    p = torch.exp(safe - lse[..., None]).masked_fill(~seen, 0.0)
    return p, lse if sinks is not None else lse.masked_fill(~alive, float("-inf"))


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
    with without_autocast(problem.q):
        return _attention(problem, dtype, rng_state)


def _attention(
    problem: AttentionProblem, dtype: torch.dtype, rng_state: Tensor | None
) -> AttentionResult:
    inputs, device = _cast(problem, dtype), problem.q.device
    if rng_state is None:
        dropout = problem.dropout_p > 0.0
        rng_state = rng.new_state(device) if dropout else rng.unused_state(device)
    out = torch.zeros(problem.out_shape, dtype=dtype, device=device)
    lse = torch.full(problem.lse_shape, problem.empty_lse, dtype=dtype, device=device)
    if inputs.sinks is not None:  # rows of no sequence see no key either
        lse = inputs.sinks[:, None].expand(problem.lse_shape).clone()
    s_dmask = new_s_dmask(problem).to(dtype)
    for sequence in sequences(problem):
        s, seen, value = _masked_scores(problem, inputs, sequence)
        p, row_lse = _probabilities(s, seen, inputs.sinks)
        keep = _keep(problem, rng_state, sequence)
        dropped = p if keep is None else p.masked_fill(~keep, 0.0) / (1.0 - problem.dropout_p)
        out[sequence.q_rows] = torch.einsum("hqk,khd->qhd", dropped, value)
        alive = seen.any(dim=-1)
        if inputs.sinks is None:
            row_lse = row_lse.masked_fill(~alive, problem.empty_lse)
        lse[sequence.lse_index(problem.is_varlen_q)] = row_lse
        if s_dmask.numel() and keep is not None and sequence.seqlen_k:
            exponent = s - s.amax(dim=-1, keepdim=True).masked_fill(~alive[..., None], 0.0)
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
    inputs = _cast(problem, dtype)
    shape = (problem.batch_size, problem.nheads, problem.max_seqlen_q, problem.max_seqlen_k)
    result = torch.empty(shape, dtype=dtype, device=problem.q.device)
    with without_autocast(problem.q):
        for sequence in sequences(problem):
            masked = _masked_scores(problem, inputs, sequence)[:2]
            result[sequence.number] = _probabilities(*masked, inputs.sinks)[0]
    return result


class Gradients(NamedTuple):
    """Gradients of a problem's differentiable tensors; None for those that it has not."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dmask: Tensor | None = None
    dsinks: Tensor | None = None


def gradients(
    problem: AttentionProblem,
    dout: Tensor,
    dtype: torch.dtype = torch.float64,
    rng_state: Tensor | None = None,
    dlse: Tensor | None = None,
) -> Gradients:
    """All gradients in ``dtype``, by PyTorch's autograd through :func:`attention`.

    Args:
        problem: what was solved.
        dout: gradient of the output.
        dtype: as for :func:`attention`.
        rng_state: dropout state of the forward pass.
        dlse: gradient of the log-sum-exp, or None.
    """
    mask, sinks = problem.transform.attn_mask, problem.transform.sinks
    given = [problem.q, problem.k, problem.v, mask, sinks]
    leaves = [
        None if x is None or x.dtype == torch.bool else x.detach().to(dtype).requires_grad_()
        for x in given
    ]
    wanted = [leaf for leaf in leaves if leaf is not None]
    with torch.enable_grad(), without_autocast(problem.q):
        transform = problem.transform._replace(
            attn_mask=mask if leaves[3] is None else leaves[3], sinks=leaves[4]
        )
        copy = AttentionProblem(*leaves[:3], *problem[3:])._replace(  # type: ignore[arg-type,call-arg]
            transform=transform, return_softmax=False
        )
        result = attention(copy, dtype, rng_state)
        outputs, douts = [result.out], [dout.to(dtype)]
        if dlse is not None and result.softmax_lse.requires_grad:
            finite = torch.isfinite(result.softmax_lse)
            outputs.append(result.softmax_lse.masked_fill(~finite, 0.0))
            douts.append(dlse.to(dtype).masked_fill(~finite, 0.0))
        found = torch.autograd.grad(outputs, wanted, douts, allow_unused=True)
    grads = iter(
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(wanted, found, strict=True)
    )
    return Gradients(*(None if leaf is None else next(grads) for leaf in leaves))  # type: ignore[arg-type]
