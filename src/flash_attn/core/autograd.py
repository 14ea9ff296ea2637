"""Differentiation of the public functions: autograd functions around the registered operators.

Packed inputs keep their packing through backward: the gradient of qkv or kv is one tensor whose
slices the kernel writes, so nothing is concatenated afterwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConstraintError
from . import eager, ops, problem_ops, repeated
from .arguments import is_autocast_enabled
from .derivatives import first_order
from .outputs import last_dim_contiguous
from .problem import AttentionProblem


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
    def is_plain(self) -> bool:
        """Whether all numbers are Python's own."""
        dropout_p, scale, causal, left, right, softcap, *_ = self
        integers = {type(left), type(right), type(self.max_seqlen_q), type(self.max_seqlen_k)}
        return (
            type(causal) is bool
            and integers == {int}
            and {type(dropout_p), type(scale), type(softcap)} <= {int, float}
        )


# No properties: PyTorch 2.10 cannot trace those of named tuples.


def shared(options: Options) -> tuple[Any, ...]:
    """What all four operators take after their tensors, from dropout_p to alibi_slopes."""
    return options[:7]


def lengths(options: Options) -> tuple[Any, ...]:
    """What the packed operators take before that."""
    return options[8:12]


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, options: Options, return_softmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the dense or the packed forward operator: (out, softmax_lse, s_dmask, rng_state)."""
    return_softmax = return_softmax and options.dropout_p > 0.0
    direct = _may_bypass(q, k, v, options)
    if options.cu_seqlens_q is None:
        forward = ops.solve_forward if direct else ops.forward
        return forward(q, k, v, *shared(options), return_softmax)
    forward = ops.solve_varlen_forward if direct else ops.varlen_forward
    tail = (*shared(options), return_softmax, options.block_table)
    return forward(q, k, v, *lengths(options), *tail)


def _may_bypass(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    """Whether the operators' implementation may be called directly: nobody would notice, nothing
    that it does would be recorded for autograd, and no number needs an operator's conversion."""
    others = [getattr(options, name) for name in _TENSOR_OPTIONS]
    if not eager.is_unobserved(q, k, v, *others) or not options.is_plain:
        return False
    return not torch.is_grad_enabled() or not any(
        x is not None and x.requires_grad for x in (q, k, v, *others)
    )


def _run_backward(
    dout: Tensor, saved: tuple[Any, ...], grads: tuple[Tensor, ...], options: Options
) -> None:
    if options.block_table is not None:
        raise ConstraintError(
            "`block_table` is for forward passes only: paged keys have no gradient"
        )
    q, k, v, out, softmax_lse, rng_state = saved
    inputs: Any = (last_dim_contiguous(dout), q, k, v, out, softmax_lse, *grads)
    tail = (*shared(options), options.deterministic, rng_state)
    # Gradients are never recorded here: double differentiation is refused.
    direct = _may_bypass(q, k, v, options) and eager.is_unobserved(inputs[0], *inputs[4:])
    if options.cu_seqlens_q is None:
        (ops.solve_backward if direct else ops.backward)(*inputs, *tail)
    else:
        backward = ops.solve_varlen_backward if direct else ops.varlen_backward
        backward(*inputs, *lengths(options), *tail)


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
    """(q, k, v) -> (out, softmax_lse, s_dmask, rng_state); only ``out`` is differentiable."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, options: Options, return_softmax: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return run_forward(q, k, v, options, return_softmax)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, options, _ = inputs
        out, lse, s_dmask, rng_state = output
        _save(ctx, (q, k, v, out, lse, rng_state), options)
        ctx.mark_non_differentiable(lse, s_dmask, rng_state)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved, options = _restore(ctx)
        grads = tuple(torch.empty_like(x) for x in saved[:3])
        _run_backward(dout, saved, grads, options)
        return (*grads, None, None)


class PackedAttention(torch.autograd.Function):
    """(q or None, packed) -> (out, softmax_lse, s_dmask, rng_state) for qkv or kv in one tensor.

    The packed dimension is the third from last: 3 for qkv, 2 for kv.
    """

    @staticmethod
    def forward(
        q: Tensor | None, packed: Tensor, options: Options, return_softmax: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return run_forward(*_unpacked(q, packed), options, return_softmax)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, packed, options, _ = inputs
        out, lse, s_dmask, rng_state = output
        ctx.q_is_packed = q is None
        own = () if q is None else (q,)
        _save(ctx, (*own, packed, out, lse, rng_state), options)
        ctx.mark_non_differentiable(lse, s_dmask, rng_state)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (*own, packed, out, lse, rng_state), options = _restore(ctx)
        q = None if ctx.q_is_packed else own[0]
        dpacked = packed.new_empty(packed.shape)
        dq = None if q is None else torch.empty_like(q)
        saved = (*_unpacked(q, packed), out, lse, rng_state)
        _run_backward(dout, saved, _unpacked(dq, dpacked), options)
        return (dq, dpacked, None, None)


def _unpacked(q: Tensor | None, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views: all of ``packed``, or ``q`` and the two of ``packed``."""
    parts = packed.unbind(-3)
    q_part, k, v = parts if q is None else (q, *parts)
    return q_part, k, v


class RepeatedAttention(torch.autograd.Function):
    """(q, k, v) -> out for a call that was solved before, on them and the tensors of its lengths;
    without dropout or other tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        others: tuple[Tensor, ...],
        found: repeated.Found,
        call: _KnownCall,
    ) -> Tensor:
        solve, addresses = found
        out, lse = solve((q, k, v, *others), 2, addresses)
        ctx.save_for_backward(q, k, v, out, lse, *others)
        ctx.call = call
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, softmax_lse, *others = ctx.saved_tensors
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        tensors = (q, k, v, *others, dout, out, softmax_lse, *grads)
        found = ctx.call.find_backward(tensors) if eager.nobody_watches() else None
        if found is not None:
            solve, addresses = found
            solve(tensors, 1, addresses)
        else:
            options = ctx.call.options
            assert options is not None
            if others:
                options = options._replace(cu_seqlens_q=others[0], cu_seqlens_k=others[1])
            _run_backward(dout, (q, k, v, out, softmax_lse, None), grads, options)
        return (*grads, None, None, None)


# Function.apply without what it does for function transforms, of which there are none here: 2 us.
_record = super(torch.autograd.Function, RepeatedAttention).apply


class _KnownCall(NamedTuple):
    """What arguments of a public function amount to: ``values`` are those of its problem after q, k
    and v, without tensors, and ``ordered`` those of a deterministic one, whose gradients are
    another call; and how its calls are found again. ``options`` are those of FlashAttention-2."""

    options: Options | None
    values: tuple[Any, ...]
    ordered: tuple[Any, ...]
    lookout: repeated.Lookout
    gradients: repeated.Lookout
    ordered_gradients: repeated.Lookout

    def find_backward(self, tensors: tuple[Tensor, ...]) -> repeated.Found | None:
        """How the gradients that are asked for now are found again, as in attend_backward."""
        options = self.options
        if (options and options.deterministic) or torch.are_deterministic_algorithms_enabled():
            return self.ordered_gradients.find(self.ordered, tensors)
        return self.gradients.find(self.values, tensors)


_known: dict[tuple[Any, ...], _KnownCall] = {}


def repeat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    asked: int,
) -> tuple[Tensor, ...] | None:
    """The first ``asked`` of (out, softmax_lse) if the same call, on tensors like these, was solved
    before and nothing stands in the way of repeating it, else None. It is recorded for autograd if
    a gradient can be asked for; that of FlashAttention-2's ``out`` alone, others are not repeated.

    Args:
        lengths: cu_seqlens_q and cu_seqlens_k, or neither.
        arguments: how the public function was called besides, and of lengths whether they are one
            tensor, to be passed to :func:`remember` where this is None.
    """
    if not eager.nobody_watches() or type(q) is not Tensor:
        return None
    try:
        known = _known.get((q.shape, arguments))
    except TypeError:  # not hashable
        return None
    if known is None or (q.dtype is torch.float32 and is_autocast_enabled(q.device.type)):
        return None
    tensors = (q, k, v, *lengths)
    found = known.lookout.find(known.values, tensors)
    if found is None:
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        is_recorded = known.options is not None and asked == 1
        return (_record(q, k, v, lengths, found, known),) if is_recorded else None
    solve, addresses = found
    return solve(tensors, asked, addresses)


def remember(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    options: Options,
) -> None:
    """Note what the arguments of a call that went well amount to; ``tensors`` are the lengths."""
    if torch.compiler.is_compiling() or not options.is_plain or options.dropout_p > 0.0:
        return
    if not _may_know(arguments) or (q.shape, arguments) in _known:
        return
    if tensors:
        problem = ops.varlen_problem(q, k, v, *lengths(options), *shared(options))
    else:
        problem = ops.dense_problem(q, k, v, *shared(options))
    remember_problem(problem, tensors, arguments, options)


def remember_problem(
    problem: AttentionProblem,
    tensors: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    options: Options | None = None,
) -> None:
    """The same for a call of this problem; without options where no gradient is asked for."""
    key = (problem.q.shape, arguments)
    if not _may_know(arguments) or key in _known:
        return
    plain, others = repeated.without_tensors(problem[3:])
    ordered, _ = repeated.without_tensors(problem._replace(deterministic=True)[3:])
    if len(others) != len(tensors) or any(x is not y for x, y in zip(others, tensors, strict=True)):
        return
    if len(_known) >= 1024:
        _known.clear()
    if options is not None:
        options = options._replace(cu_seqlens_q=None, cu_seqlens_k=None)
    # Of a backward pass they lie behind q, k and v, too.
    twice = 4 if len(tensors) == 2 and tensors[0] is tensors[1] else None
    lookouts = [repeated.Lookout(twice) for _ in range(3)]
    _known[key] = _KnownCall(options, plain, ordered, *lookouts)


def _may_know(arguments: tuple[Any, ...]) -> bool:
    """Whether the arguments can be looked up and mean the same next time: a tensor's value may
    change."""
    try:
        hash(arguments)
    except TypeError:
        return False
    parts = (y for x in arguments for y in (x if isinstance(x, tuple) else (x,)))
    return not any(isinstance(x, Tensor) for x in parts)


def attention(
    q: Tensor, k: Tensor, v: Tensor, options: Options, return_softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask), recorded for autograd only if a gradient can be asked for."""
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if torch.compiler.is_compiling():
            # One tensor in two places: refused by PyTorch 2.13, a wrong gradient in 2.11.
            k, v = k.view_as(k), v.view_as(v)
        return Attention.apply(q, k, v, options, return_softmax)[:3]
    return run_forward(q, k, v, options, return_softmax)[:3]


def extended_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    return_softmax: bool,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a mask or sinks, for which FlashAttention-2's operators have no arguments."""
    options = options._replace(dropout_p=float(options.dropout_p))
    return_softmax = return_softmax and options.dropout_p > 0.0
    tail: tuple[Any, ...] = (*shared(options), return_softmax)
    if options.cu_seqlens_q is None:
        problem = ops.dense_problem(q, k, v, *tail)
    else:
        tail = (*lengths(options), *tail, options.block_table)
        problem = ops.varlen_problem(q, k, v, *tail)
    transform = problem.transform._replace(attn_mask=attn_mask, sinks=sinks)
    problem = problem._replace(transform=transform, deterministic=options.deterministic)
    return problem_ops.solve(problem)


def packed_attention(
    q: Tensor | None, packed: Tensor, options: Options, return_softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for qkv (q is None) or kv packed in one tensor."""
    packed = last_dim_contiguous(packed)
    q = None if q is None else last_dim_contiguous(q)
    needs_grad = packed.requires_grad or (q is not None and q.requires_grad)
    if torch.is_grad_enabled() and needs_grad:
        return PackedAttention.apply(q, packed, options, return_softmax)[:3]
    return run_forward(*_unpacked(q, packed), options, return_softmax)[:3]
