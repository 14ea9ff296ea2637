"""Differentiation of the public functions: autograd functions around the registered operators.

Packed inputs keep their packing through backward: the gradient of qkv or kv is one tensor whose
slices the kernel writes, so nothing is concatenated afterwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConstraintError
from . import ops


class Options(NamedTuple):
    """The arguments of a call that are not differentiated."""

    dropout_p: float
    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    block_table: Tensor | None = None

    @property
    def shared(self) -> tuple[Any, ...]:
        """What all four operators take after their tensors, from dropout_p to alibi_slopes."""
        return self[:7]

    @property
    def lengths(self) -> tuple[Any, ...]:
        return (self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k)


def last_dim_contiguous(x: Tensor) -> Tensor:
    """Copy ``x`` only if its last dimension does not lie together."""
    # Not .contiguous(): an empty tensor counts as contiguous whatever its strides.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, options: Options, return_softmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the dense or the packed forward operator: (out, softmax_lse, s_dmask, rng_state)."""
    return_softmax = return_softmax and options.dropout_p > 0.0
    if options.cu_seqlens_q is None:
        return ops.forward(q, k, v, *options.shared, return_softmax)
    return ops.varlen_forward(
        q, k, v, *options.lengths, *options.shared, return_softmax, options.block_table
    )


def _run_backward(
    dout: Tensor, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], options: Options
) -> None:
    if options.block_table is not None:
        raise ConstraintError(
            "`block_table` is for forward passes only: paged keys have no gradient"
        )
    q, k, v, out, softmax_lse, rng_state = saved
    inputs = (last_dim_contiguous(dout), q, k, v, out, softmax_lse, *grads)
    tail = (*options.shared, options.deterministic, rng_state)
    if options.cu_seqlens_q is None:
        ops.backward(*inputs, *tail)
    else:
        ops.varlen_backward(*inputs, *options.lengths, *tail)


_TENSOR_OPTIONS = ("alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "block_table")


def _save(ctx: Any, tensors: tuple[Tensor, ...], options: Options) -> None:
    """Tensors go through save_for_backward, which notices in-place changes; the rest beside it."""
    extra = [getattr(options, name) for name in _TENSOR_OPTIONS]
    ctx.save_for_backward(*tensors, *extra)
    blanks: dict[str, Any] = dict.fromkeys(_TENSOR_OPTIONS)
    ctx.options = options._replace(**blanks)


def _restore(ctx: Any) -> tuple[tuple[Tensor, ...], Options]:
    saved = ctx.saved_tensors
    count = len(saved) - len(_TENSOR_OPTIONS)
    extra = dict(zip(_TENSOR_OPTIONS, saved[count:], strict=True))
    return saved[:count], ctx.options._replace(**extra)


class Attention(torch.autograd.Function):
    """(q, k, v) -> (out, softmax_lse, s_dmask); only ``out`` is differentiable."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options, return_softmax: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, s_dmask, rng_state = run_forward(q, k, v, options, return_softmax)
        _save(ctx, (q, k, v, out, lse, rng_state), options)
        ctx.mark_non_differentiable(lse, s_dmask)
        return out, lse, s_dmask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved, options = _restore(ctx)
        grads = tuple(torch.empty_like(x) for x in saved[:3])
        _run_backward(dout, saved, grads, options)
        return (*grads, None, None)


class PackedAttention(torch.autograd.Function):
    """(q or None, packed) -> (out, softmax_lse, s_dmask) for qkv or kv packed in one tensor.

    The packed dimension is the third from last: 3 for qkv, 2 for kv.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor | None, packed: Tensor, options: Options, return_softmax: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = packed.unbind(-3)
        q_part, k, v = parts if q is None else (q, *parts)
        out, lse, s_dmask, rng_state = run_forward(q_part, k, v, options, return_softmax)
        _save(ctx, (q_part, k, v, out, lse, rng_state), options)
        ctx.q_is_packed, ctx.packed_shape = q is None, packed.shape
        ctx.mark_non_differentiable(lse, s_dmask)
        return out, lse, s_dmask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved, options = _restore(ctx)
        dpacked = saved[0].new_empty(ctx.packed_shape)
        parts = dpacked.unbind(-3)
        if ctx.q_is_packed:
            dq, grads = None, parts
        else:
            dq = torch.empty_like(saved[0])
            grads = (dq, *parts)
        _run_backward(dout, saved, grads, options)
        return (dq, dpacked, None, None)


def attention(
    q: Tensor, k: Tensor, v: Tensor, options: Options, return_softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask), recorded for autograd only if a gradient can be asked for."""
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return Attention.apply(q, k, v, options, return_softmax)
    return run_forward(q, k, v, options, return_softmax)[:3]


def packed_attention(
    q: Tensor | None, packed: Tensor, options: Options, return_softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for qkv (q is None) or kv packed in one tensor."""
    packed = last_dim_contiguous(packed)
    q = None if q is None else last_dim_contiguous(q)
    needs_grad = packed.requires_grad or (q is not None and q.requires_grad)
    if torch.is_grad_enabled() and needs_grad:
        return PackedAttention.apply(q, packed, options, return_softmax)
    parts = packed.unbind(-3)
    q_part, k, v = parts if q is None else (q, *parts)
    return run_forward(q_part, k, v, options, return_softmax)[:3]
