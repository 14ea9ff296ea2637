"""CPU tensors: online softmax in blocks, so memory grows linearly with the sequence length.

Two ways, both in float32 (float64 for float64 inputs): PyTorch's own CPU flash kernel for dense or
packed problems with no extra feature, and blocks of plain PyTorch operations for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import rng
from ..core.masking import visible_keys
from ..core.outputs import empty_lse, empty_out, new_s_dmask, softmax_d
from ..core.problem import AttentionProblem, AttentionResult, BackwardInputs
from ..core.rotary import rotate
from ..core.sequences import Sequence, sequences
from . import cpu_flash

_BLOCK_Q = 256
_BLOCK_K = 512


class _Slice(NamedTuple):
    """One sequence's tensors with heads first: (nheads or nheads_k, seqlen, headdim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    sequence: Sequence
    slopes: Tensor | None


class _Block(NamedTuple):
    """One tile of scores (nheads, rows, keys) with what backward needs of it."""

    rows: slice
    keys: slice
    s: Tensor  # masked with -inf
    raw: Tensor  # after softcap, before ALiBi and masking
    keep: Tensor | None


def _compute_dtype(problem: AttentionProblem) -> torch.dtype:
    return torch.float64 if problem.q.dtype == torch.float64 else torch.float32


def _slices(problem: AttentionProblem) -> Iterator[_Slice]:
    dtype = _compute_dtype(problem)
    slopes = problem.transform.alibi_slopes
    for sequence in sequences(problem):
        q = problem.q[sequence.q_rows].to(dtype).transpose(0, 1)
        k = problem.k[sequence.k_rows].to(dtype).transpose(0, 1)
        v = problem.v[sequence.k_rows].to(dtype).transpose(0, 1)
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[sequence.number]
        yield _Slice(q, k, v, sequence, own)


def _heads_like(problem: AttentionProblem, x: Tensor) -> Tensor:
    """Repeat (nheads_k, keys, headdim) for the query heads that share them."""
    group = problem.nheads // problem.nheads_k
    return x if group == 1 else x.repeat_interleave(group, dim=0)


def _blocks(problem: AttentionProblem, part: _Slice, rng_state: Tensor) -> Iterator[_Block]:
    """Tiles of the score matrix that hold a visible key, row blocks outermost."""
    seqlen_q, seqlen_k = part.sequence.seqlen_q, part.sequence.seqlen_k
    visibility = problem.visibility
    for m in range(0, seqlen_q, _BLOCK_Q):
        rows = slice(m, min(m + _BLOCK_Q, seqlen_q))
        first, _ = visible_keys(rows.start, seqlen_q, seqlen_k, visibility)
        _, end = visible_keys(rows.stop - 1, seqlen_q, seqlen_k, visibility)
        # No key outside [first, end) is touched: what lies there may be NaN, and 0 * NaN is too.
        for n in range(first, end, _BLOCK_K):
            keys = slice(n, min(n + _BLOCK_K, end))
            yield _score_block(problem, part, rng_state, rows, keys)


def _score_block(
    problem: AttentionProblem, part: _Slice, rng_state: Tensor, rows: slice, keys: slice
) -> _Block:
    transform, (left, right) = problem.transform, problem.visibility
    k = _heads_like(problem, part.k[:, keys])
    s = torch.matmul(part.q[:, rows], k.transpose(1, 2)) * transform.softmax_scale
    if transform.softcap > 0.0:
        s = transform.softcap * torch.tanh(s / transform.softcap)
    raw = s
    row = torch.arange(rows.start, rows.stop)
    key = torch.arange(keys.start, keys.stop)
    distance = row[:, None] + (part.sequence.seqlen_k - part.sequence.seqlen_q) - key[None, :]
    if part.slopes is not None:
        s = s - part.slopes.to(s.dtype)[:, None, None] * distance.abs()
    if left is not None:
        s = s.masked_fill(distance > left, float("-inf"))
    if right is not None:
        s = s.masked_fill(distance < -right, float("-inf"))
    keep = None
    if problem.dropout_p > 0.0:
        keep = rng.keep_mask(
            rng_state, problem.dropout_p, part.sequence.number, problem.nheads, row, key
        )
    return _Block(rows, keys, s, raw, keep)


def _forward_slice(
    problem: AttentionProblem, part: _Slice, rng_state: Tensor, s_dmask: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (nheads, seqlen_q, headdim) and log-sum-exp (nheads, seqlen_q) of one sequence."""
    nheads, seqlen_q, _ = part.q.shape
    acc = torch.zeros_like(part.q)
    row_max = part.q.new_full((nheads, seqlen_q), float("-inf"))
    row_sum = part.q.new_zeros(nheads, seqlen_q)
    for block in _blocks(problem, part, rng_state):
        rows = block.rows
        new_max = torch.maximum(row_max[:, rows], block.s.amax(-1))
        # A row that has seen no key yet keeps -inf; 0 stands in for it so that exp(-inf) is 0.
        shift = new_max.masked_fill(new_max == float("-inf"), 0.0)
        p = torch.exp(block.s - shift[..., None])
        alpha = torch.exp(row_max[:, rows] - shift)
        row_sum[:, rows] = row_sum[:, rows] * alpha + p.sum(-1)
        row_max[:, rows] = new_max
        if block.keep is not None:
            p = p.masked_fill(~block.keep, 0.0)
        value = _heads_like(problem, part.v[:, block.keys])
        acc[:, rows] = acc[:, rows] * alpha[..., None] + torch.matmul(p, value)
    dead = row_sum == 0.0
    acc /= (row_sum.masked_fill(dead, 1.0) * (1.0 - problem.dropout_p))[..., None]
    lse = (row_max + torch.log(row_sum)).masked_fill(dead, problem.empty_lse)
    if s_dmask.numel():
        _write_s_dmask(problem, part, rng_state, row_max, s_dmask[part.sequence.number])
    return acc, lse


def _write_s_dmask(
    problem: AttentionProblem, part: _Slice, rng_state: Tensor, row_max: Tensor, target: Tensor
) -> None:
    for block in _blocks(problem, part, rng_state):
        if block.keep is None:
            return
        shift = row_max[:, block.rows, None].nan_to_num(neginf=0.0)
        sign = torch.where(block.keep, 1.0, -1.0)
        target[:, block.rows, block.keys] = (sign * torch.exp(block.s - shift)).to(target.dtype)


def _backward_slice(
    problem: AttentionProblem,
    part: _Slice,
    inputs: BackwardInputs,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill dq, dk, dv (heads first, compute dtype)."""
    dq, dk, dv = grads
    rows_of_q = part.sequence.q_rows
    dout = inputs.dout[rows_of_q].to(part.q.dtype).transpose(0, 1)
    out = inputs.out[rows_of_q].to(part.q.dtype).transpose(0, 1)
    lse = inputs.softmax_lse[part.sequence.lse_index(problem.is_varlen_q)].to(part.q.dtype)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    delta = (out * dout).sum(-1)
    transform = problem.transform
    for block in _blocks(problem, part, inputs.rng_state):
        rows, keys = block.rows, block.keys
        p = torch.exp(block.s - lse[:, rows, None])
        dropped, dp = p, torch.matmul(dout[:, rows], _heads_like(problem, part.v[:, keys]).mT)
        if block.keep is not None:
            factor = block.keep / (1.0 - problem.dropout_p)
            dropped, dp = p * factor, dp * factor
        ds = p * (dp - delta[:, rows, None])
        if transform.softcap > 0.0:
            ds = ds * (1.0 - (block.raw / transform.softcap) ** 2)
        ds = ds * transform.softmax_scale
        dq[:, rows] += torch.matmul(ds, _heads_like(problem, part.k[:, keys]))
        dk[:, keys] += _sum_group(problem, torch.matmul(ds.mT, part.q[:, rows]))
        dv[:, keys] += _sum_group(problem, torch.matmul(dropped.mT, dout[:, rows]))


def _sum_group(problem: AttentionProblem, x: Tensor) -> Tensor:
    return (
        x if problem.nheads == problem.nheads_k else x.unflatten(0, (problem.nheads_k, -1)).sum(1)
    )


class CpuBackend:
    """CPU tensors of any supported dtype, forward and backward, with every feature."""

    name = "cpu"

    def unsupported(self, problem: AttentionProblem, backward: bool) -> list[str]:
        if problem.q.device.type != "cpu":
            return [f"needs CPU tensors, `q` is on {problem.q.device}"]
        return []

    @torch.no_grad()
    def forward(self, problem: AttentionProblem, out: Tensor | None = None) -> AttentionResult:
        dropout = problem.dropout_p > 0.0
        device = problem.q.device
        rng_state = rng.new_state(device) if dropout else rng.unused_state(device)
        out = empty_out(problem) if out is None else out
        lse, s_dmask = empty_lse(problem), new_s_dmask(problem)
        out.zero_()
        lse.fill_(problem.empty_lse)
        with torch.autocast("cpu", enabled=False):
            if cpu_flash.serves(problem):
                cpu_flash.forward(problem, out, lse)
            else:
                for part in _slices(problem):
                    rows, row_lse = _forward_slice(problem, part, rng_state, s_dmask)
                    out[part.sequence.q_rows] = rows.transpose(0, 1).to(out.dtype)
                    lse[part.sequence.lse_index(problem.is_varlen_q)] = row_lse.float()
        return AttentionResult(out, lse, s_dmask, rng_state)

    @torch.no_grad()
    def backward(self, problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
        for grad in (inputs.dq, inputs.dk, inputs.dv):
            grad.zero_()
        with torch.autocast("cpu", enabled=False):
            if cpu_flash.serves(problem):
                cpu_flash.backward(problem, inputs)
                return softmax_d(problem, inputs.out, inputs.dout)
            for part in _slices(problem):
                grads = (
                    torch.zeros_like(part.q),
                    torch.zeros_like(part.k),
                    torch.zeros_like(part.v),
                )
                _backward_slice(problem, part, inputs, grads)
                rows = (part.sequence.q_rows, part.sequence.k_rows, part.sequence.k_rows)
                targets = (inputs.dq, inputs.dk, inputs.dv)
                for target, row, grad in zip(targets, rows, grads, strict=True):
                    target[row] = grad.transpose(0, 1).to(target.dtype)
            return softmax_d(problem, inputs.out, inputs.dout)

    def rotate(
        self, x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, interleaved: bool
    ) -> Tensor:
        """Rotary embedding of (batch, seqlen, nheads, headdim), into a new tensor."""
        return rotate(x, cos, sin, seqlen_offsets=seqlen_offsets, interleaved=interleaved)

    @torch.no_grad()
    def append_kv(
        self, problem: AttentionProblem, k_new: Tensor, v_new: Tensor, at: Tensor
    ) -> None:
        """Write (batch, seqlen_new, nheads_k, headdim) into the caches from row ``at[b]`` on.

        Rows that fall outside the cache are not written.
        """
        table, cache_row = problem.layout.page_table, problem.layout.cache_batch_idx
        capacity = problem.max_seqlen_k
        for index in range(k_new.shape[0]):
            rows = int(at[index]) + torch.arange(k_new.shape[1])
            fits = (rows >= 0) & (rows < capacity)
            rows = rows[fits]
            if table is not None:
                pages = table[index, rows // problem.k.shape[1]].long()
                valid = (pages >= 0) & (pages < problem.k.shape[0])
                fits = fits.nonzero()[:, 0][valid]
                where = (pages[valid], rows[valid] % problem.k.shape[1])
            else:
                row = index if cache_row is None else int(cache_row[index])
                if not 0 <= row < problem.k.shape[0]:
                    continue
                where = (torch.full_like(rows, row), rows)
            problem.k[where] = k_new[index][fits]
            problem.v[where] = v_new[index][fits]


BACKEND = CpuBackend()
