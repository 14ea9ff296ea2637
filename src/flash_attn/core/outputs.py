"""The one place that allocates results, shared by backends, operators and their fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import AttentionProblem


def round_multiple(x: int, m: int) -> int:
    """Round ``x`` up to a multiple of ``m``."""
    return (x + m - 1) // m * m


def last_dim_contiguous(x: Tensor) -> Tensor:
    """Copy ``x`` only if its last dimension does not lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def mark_written(*tensors: Tensor) -> None:
    """Let autograd see that a kernel changed these, as it sees any in-place operation."""
    for x in tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def empty_out(problem: AttentionProblem) -> Tensor:
    """An output like q, which keeps q's strides where they are dense."""
    q = problem.q
    if problem.headdim_v == problem.headdim:
        return torch.empty_like(q, dtype=problem.result_dtype)
    return q.new_empty(problem.out_shape, dtype=problem.result_dtype)


def empty_lse(problem: AttentionProblem) -> Tensor:
    """The float32 log-sum-exp buffer."""
    return torch.empty(problem.lse_shape, dtype=torch.float32, device=problem.q.device)


def lse_without_keys(problem: AttentionProblem) -> Tensor:
    """A log-sum-exp buffer filled with what rows that see no key have."""
    sinks = problem.transform.sinks
    if sinks is None:
        return empty_lse(problem).fill_(problem.empty_lse)
    return empty_lse(problem).copy_(sinks[:, None].expand(problem.lse_shape))


def s_dmask_shape(problem: AttentionProblem) -> tuple[int, ...]:
    """S_dmask's shape: lengths rounded up to 128, or (0,) where it is not asked for."""
    if not problem.return_softmax or problem.dropout_p == 0.0:
        return (0,)
    seqlen_q = round_multiple(problem.max_seqlen_q, 128)
    seqlen_k = round_multiple(problem.max_seqlen_k, 128)
    return (problem.batch_size, problem.nheads, seqlen_q, seqlen_k)


def new_s_dmask(problem: AttentionProblem) -> Tensor:
    """S_dmask filled with zeros: cells that no query sees stay 0."""
    return problem.q.new_zeros(s_dmask_shape(problem))


def softmax_d_shape(problem: AttentionProblem) -> tuple[int, ...]:
    """Shape of rowsum(out * dout), lengths rounded up to 128.

    (batch, nheads, seqlen_q), or packed (nheads, total_q + 128 * batch).
    """
    if problem.is_varlen_q:
        return (problem.nheads, problem.q.shape[0] + 128 * problem.batch_size)
    return (problem.q.shape[0], problem.nheads, round_multiple(problem.q.shape[1], 128))
