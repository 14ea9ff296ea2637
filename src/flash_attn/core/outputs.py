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
    # Not .contiguous(): an empty tensor counts as contiguous whatever its strides.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


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

    (batch, nheads, seqlen_q), or packed (nheads, total_q + 128 * batch), where sequence b begins at
    element ``(cu_seqlens_q[b] + 128 * b) // 128 * 128``. Elements of no row are 0.
    """
    if problem.is_varlen_q:
        return (problem.nheads, problem.q.shape[0] + 128 * problem.batch_size)
    return (problem.q.shape[0], problem.nheads, round_multiple(problem.q.shape[1], 128))


def softmax_d(
    problem: AttentionProblem, out: Tensor, dout: Tensor, dlse: Tensor | None = None
) -> Tensor:
    """rowsum(out * dout) - dlse in float32, in the layout of :func:`softmax_d_shape`.

    For backends whose kernels do not leave it behind; it does not synchronise with the device.
    """
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    rows = (out.to(dtype) * dout.to(dtype)).sum(-1).float().transpose(-1, -2)
    if dlse is not None:
        rows = rows - dlse
    result = rows.new_zeros(softmax_d_shape(problem))
    cu_seqlens = problem.layout.cu_seqlens_q
    if cu_seqlens is None:
        result[..., : rows.shape[-1]] = rows
    elif problem.batch_size and rows.shape[-1]:
        _scatter_packed(result, rows, cu_seqlens.long().clamp(0, rows.shape[-1]))
    return result


def _scatter_packed(result: Tensor, rows: Tensor, bounds: Tensor) -> None:
    """Write (nheads, total_q) ``rows`` where their sequences begin in ``result``."""
    batch_size, spare = bounds.numel() - 1, result.shape[-1] - 1
    row = torch.arange(rows.shape[-1], device=rows.device)
    sequence = torch.searchsorted(bounds, row, right=True) - 1
    owned = (sequence >= 0) & (sequence < batch_size)
    sequence = sequence.clamp(0, batch_size - 1)
    begin = (bounds[sequence] + 128 * sequence) // 128 * 128
    # Rows of no sequence write 0 to the last element, which no sequence reaches.
    target = torch.where(owned, begin + row - bounds[sequence], spare).clamp(0, spare)
    result[:, target] = torch.where(owned, rows, 0.0)
