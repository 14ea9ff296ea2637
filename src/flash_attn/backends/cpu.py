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
from ..core.outputs import empty_out, lse_without_keys, new_s_dmask, softmax_d
from ..core.problem import (
    AttentionProblem,
    AttentionResult,
    BackwardInputs,
    Visibility,
    is_float8,
)
from ..core.rotary import rotate
from ..core.sequences import Sequence, sequences
from . import cpu_cache, cpu_flash

_BLOCK_Q = 256
_BLOCK_K = 512


class _Slice(NamedTuple):
    """One sequence's tensors with heads first: (nheads or nheads_k, seqlen, headdim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    qv: Tensor | None
    sequence: Sequence
    slopes: Tensor | None
    mask: Tensor | None  # (1 or nheads, 1 or rows, 1 or keys), bool or float, a view


class _Block(NamedTuple):
    """One tile of scores (nheads, rows, keys) with what backward needs of it."""

    rows: slice
    keys: slice
    s: Tensor  # masked with -inf
    raw: Tensor  # after softcap, before ALiBi and masking
    keep: Tensor | None


class _Gradients(NamedTuple):
    """One sequence's gradients, heads first, in the dtype of the computation; dmask is a view."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dmask: Tensor | None


def _compute_dtype(problem: AttentionProblem) -> torch.dtype:
    return torch.float64 if problem.q.dtype == torch.float64 else torch.float32


def _gather(x: Tensor, rows: tuple[int | slice | Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Rows of a sequence, heads first. Index tensors do not take float8: its bytes are moved."""
    if is_float8(x.dtype):
        return x.view(torch.uint8)[rows].view(x.dtype).to(dtype).transpose(0, 1)
    return x[rows].to(dtype).transpose(0, 1)


def _descaled(x: Tensor, descale: Tensor | None, number: int) -> Tensor:
    """(heads, rows, headdim) times the factors of sequence ``number``, (heads or nheads_k,)."""
    if descale is None:
        return x
    factors = descale[number]
    return x * factors.repeat_interleave(x.shape[0] // factors.shape[0])[:, None, None]


def _of_sequence(x: Tensor | None, number: int) -> Tensor | None:
    """The part of a mask, or of its gradient, that belongs to one sequence."""
    return None if x is None else x[number if x.shape[0] > 1 else 0]


def _slices(problem: AttentionProblem) -> Iterator[_Slice]:
    dtype, transform = _compute_dtype(problem), problem.transform
    slopes = transform.alibi_slopes
    for sequence in sequences(problem):
        number = sequence.number
        q = _gather(problem.q, sequence.q_rows, dtype)
        k = _gather(problem.k, sequence.k_rows, dtype)
        v = _gather(problem.v, sequence.k_rows, dtype)
        yield _Slice(
            _descaled(q, transform.q_descale, number),
            _descaled(k, transform.k_descale, number),
            _descaled(v, transform.v_descale, number),
            None if problem.qv is None else _gather(problem.qv, sequence.q_rows, dtype),
            sequence,
            slopes if slopes is None or slopes.dim() == 1 else slopes[number],
            _of_sequence(transform.attn_mask, number),
        )


def _heads_like(problem: AttentionProblem, x: Tensor) -> Tensor:
    """Repeat (nheads_k, keys, headdim) for the query heads that share them."""
    group = problem.nheads // problem.nheads_k
    return x if group == 1 else x.repeat_interleave(group, dim=0)


def _blocks(problem: AttentionProblem, part: _Slice, rng_state: Tensor) -> Iterator[_Block]:
    """Tiles of the score matrix that hold a visible key, row blocks outermost."""
    seqlen_q, seqlen_k = part.sequence.seqlen_q, part.sequence.seqlen_k
    # A mask that is not broadcast ends what is seen, whatever the lengths.
    rows_end, keys_end = (
        length if size in (None, 1) else min(length, size)
        for length, size in zip(
            (seqlen_q, seqlen_k),
            (None, None) if part.mask is None else part.mask.shape[1:],
            strict=True,
        )
    )
    for m in range(0, rows_end, _BLOCK_Q):
        rows = slice(m, min(m + _BLOCK_Q, rows_end))
        first, _ = visible_keys(rows.start, seqlen_q, seqlen_k, problem.visibility)
        _, end = visible_keys(rows.stop - 1, seqlen_q, seqlen_k, problem.visibility)
        # No key outside [first, end) is touched: what lies there may be NaN, and 0 * NaN is too.
        end = min(end, keys_end)
        for n in range(first, end, _BLOCK_K):
            keys = slice(n, min(n + _BLOCK_K, end))
            yield _score_block(problem, part, rng_state, rows, keys)


def _score_block(
    problem: AttentionProblem, part: _Slice, rng_state: Tensor, rows: slice, keys: slice
) -> _Block:
    transform = problem.transform
    dot = torch.matmul(part.q[:, rows], _heads_like(problem, part.k[:, keys]).mT)
    if part.qv is not None:
        dot += torch.matmul(part.qv[:, rows], _heads_like(problem, part.v[:, keys]).mT)
    s = dot * transform.softmax_scale
    if transform.softcap > 0.0:
        s = transform.softcap * torch.tanh(s / transform.softcap)
    raw = s
    row = torch.arange(rows.start, rows.stop, device=part.q.device)
    key = torch.arange(keys.start, keys.stop, device=part.q.device)
    position = row[:, None] + (part.sequence.seqlen_k - part.sequence.seqlen_q)
    if part.slopes is not None:
        s = s - part.slopes.to(s.dtype)[:, None, None] * (position - key).abs()
    for hidden in _hidden(problem.visibility, position, key):
        s = s.masked_fill(hidden, float("-inf"))
    if part.mask is not None:
        s = _masked(s, _mask_block(part.mask, rows, keys))
    keep = None
    if problem.dropout_p > 0.0:
        keep = rng.keep_mask(
            rng_state, problem.dropout_p, part.sequence.number, problem.nheads, row, key
        )
    return _Block(rows, keys, s, raw, keep)


def _hidden(visibility: Visibility, position: Tensor, key: Tensor) -> Iterator[Tensor]:
    """What each limit hides: (rows, keys) bool, from (rows, 1) positions and (keys,) keys."""
    left, right, chunk = visibility
    if left is not None:
        yield key < position - left
    if right is not None:
        yield key > position + right
    if chunk:
        yield key // chunk != torch.div(position, chunk, rounding_mode="floor")


def _mask_block(mask: Tensor, rows: slice, keys: slice) -> Tensor:
    """A tile's part of a (heads, 1 or rows, 1 or keys) mask, or of its gradient: a view."""
    whole = slice(None)
    return mask[:, whole if mask.shape[1] == 1 else rows, whole if mask.shape[2] == 1 else keys]


def _masked(s: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return s.masked_fill(~mask, float("-inf"))
    # Not by the sum alone: an infinite or NaN score of a hidden key would win.
    mask = mask.to(s.dtype)
    return (s + mask).masked_fill(mask == float("-inf"), float("-inf"))


def _forward_slice(
    problem: AttentionProblem, part: _Slice, rng_state: Tensor, s_dmask: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (nheads, seqlen_q, headdim_v) and log-sum-exp (nheads, seqlen_q) of one sequence."""
    nheads, seqlen_q, _ = part.q.shape
    acc = part.q.new_zeros(nheads, seqlen_q, problem.headdim_v)
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
    if s_dmask.numel():
        _write_s_dmask(problem, part, rng_state, row_max, s_dmask[part.sequence.number])
    empty_lse = problem.empty_lse
    if problem.transform.sinks is not None:
        row_max, row_sum, alpha = _join_sinks(problem.transform.sinks, row_max, row_sum)
        acc *= alpha[..., None]
        empty_lse = float("-inf")
    dead = row_sum == 0.0
    acc /= (row_sum.masked_fill(dead, 1.0) * (1.0 - problem.dropout_p))[..., None]
    return acc, (row_max + torch.log(row_sum)).masked_fill(dead, empty_lse)


def _join_sinks(sinks: Tensor, row_max: Tensor, row_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum and sum with ``exp(sink)``, and the factor that this brings to what was summed."""
    sink = sinks.to(row_max.dtype)[:, None]
    shift = torch.maximum(row_max, sink)
    shift = shift.masked_fill(shift == float("-inf"), 0.0)
    alpha = torch.exp(row_max - shift)
    return shift, row_sum * alpha + torch.exp(sink - shift), alpha


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
    problem: AttentionProblem, part: _Slice, inputs: BackwardInputs, grads: _Gradients
) -> None:
    """Fill ``grads``."""
    rows_of_q = part.sequence.q_rows
    dout = inputs.dout[rows_of_q].to(part.q.dtype).transpose(0, 1)
    out = inputs.out[rows_of_q].to(part.q.dtype).transpose(0, 1)
    lse_index = part.sequence.lse_index(problem.is_varlen_q)
    lse = inputs.softmax_lse[lse_index].to(part.q.dtype)
    delta = (out * dout).sum(-1)
    if inputs.dlse is not None:  # a row without keys or sink has none
        delta -= inputs.dlse[lse_index].masked_fill(torch.isinf(lse), 0.0)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    transform = problem.transform
    for block in _blocks(problem, part, inputs.rng_state):
        rows, keys = block.rows, block.keys
        p = torch.exp(block.s - lse[:, rows, None])
        dropped, dp = p, torch.matmul(dout[:, rows], _heads_like(problem, part.v[:, keys]).mT)
        if block.keep is not None:
            factor = block.keep / (1.0 - problem.dropout_p)
            dropped, dp = p * factor, dp * factor
        ds = p * (dp - delta[:, rows, None])
        if grads.dmask is not None:
            target = _mask_block(grads.dmask, rows, keys)
            target += ds.sum_to_size(target.shape)
        if transform.softcap > 0.0:
            ds = ds * (1.0 - (block.raw / transform.softcap) ** 2)
        ds = ds * transform.softmax_scale
        grads.dq[:, rows] += torch.matmul(ds, _heads_like(problem, part.k[:, keys]))
        grads.dk[:, keys] += _sum_group(problem, torch.matmul(ds.mT, part.q[:, rows]))
        grads.dv[:, keys] += _sum_group(problem, torch.matmul(dropped.mT, dout[:, rows]))


def _sum_group(problem: AttentionProblem, x: Tensor) -> Tensor:
    return (
        x if problem.nheads == problem.nheads_k else x.unflatten(0, (problem.nheads_k, -1)).sum(1)
    )


def _backward_blocks(problem: AttentionProblem, inputs: BackwardInputs) -> None:
    """Write all gradients but the sinks', by blocks."""
    targets = (inputs.dq, inputs.dk, inputs.dv)
    for grad in targets:
        grad.zero_()
    # Sums over heads, rows or sequences are taken in the dtype of the computation.
    dtype = _compute_dtype(problem)
    dmask = None if inputs.dmask is None else inputs.dmask.to(dtype).zero_()
    for part in _slices(problem):
        dq, dk, dv = (torch.zeros_like(x) for x in (part.q, part.k, part.v))
        grads = _Gradients(dq, dk, dv, _of_sequence(dmask, part.sequence.number))
        _backward_slice(problem, part, inputs, grads)
        rows = (part.sequence.q_rows, part.sequence.k_rows, part.sequence.k_rows)
        for target, row, grad in zip(targets, rows, grads[:3], strict=True):
            target[row] = grad.transpose(0, 1).to(target.dtype)
    if inputs.dmask is not None and dmask is not None:
        inputs.dmask.copy_(dmask)


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
        lse, s_dmask = lse_without_keys(problem), new_s_dmask(problem)
        out.zero_()
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
        with torch.autocast("cpu", enabled=False):
            # PyTorch's kernel knows no gradient of the log-sum-exp.
            if inputs.dlse is None and cpu_flash.serves(problem):
                for grad in (inputs.dq, inputs.dk, inputs.dv):
                    grad.zero_()
                cpu_flash.backward(problem, inputs)
            else:
                _backward_blocks(problem, inputs)
            return softmax_d(problem, inputs.out, inputs.dout, inputs.dlse)

    def rotate(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        seqlen_offsets: int | Tensor,
        interleaved: bool,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Rotary embedding of dense or packed rows, into a new tensor."""
        return rotate(
            x,
            cos,
            sin,
            seqlen_offsets=seqlen_offsets,
            cu_seqlens=cu_seqlens,
            interleaved=interleaved,
        )

    @torch.no_grad()
    def append_kv(
        self,
        problem: AttentionProblem,
        k_new: Tensor,
        v_new: Tensor,
        at: Tensor,
        cu_seqlens_new: Tensor | None = None,
    ) -> None:
        """Write new rows into the caches of ``problem``, sequence b's from row ``at[b]`` on."""
        cpu_cache.append_kv(problem, k_new, v_new, at, cu_seqlens_new)


BACKEND = CpuBackend()
