"""The operators that take a whole problem: every field of it, flattened, as an argument.

``flash_attn::_attention_forward`` and ``_attention_backward`` carry what FlashAttention-2's schemas
have no room for. Like those they are opaque to torch.compile and have no autograd formula;
:func:`solve` differentiates around them. ``flash_attn::_attention`` is the forward operator with a
formula, for traced programs: an exported graph holds operators alone.
``flash_attn::_attention_with_kvcache`` also writes new keys and values into k and v, the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attend import attend_backward, operator_outputs
from .derivatives import first_order
from .kvcache import CacheUpdate, attend_with_kvcache, check_update
from .outputs import last_dim_contiguous, s_dmask_shape, softmax_d_shape
from .problem import (
    AttentionProblem,
    AttentionResult,
    BackwardInputs,
    ScoreTransform,
    SequenceLayout,
    Visibility,
)
from .validate import check_device

# Arguments of both operators in the order of :func:`flatten`.
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, "
    # ScoreTransform
    "float softmax_scale, float softcap, Tensor? alibi_slopes, Tensor? attn_mask, Tensor? sinks, "
    "Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
    # Visibility
    "SymInt? window_left, SymInt? window_right, SymInt attention_chunk, "
    # SequenceLayout
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k, "
    "Tensor? page_table, Tensor? cache_batch_idx, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? seqused_q, "
    # the rest of AttentionProblem
    "float dropout_p, SymInt num_splits, float empty_lse, bool return_softmax, Tensor? qv, "
    "ScalarType? out_dtype, bool? pack_gqa, SymInt sm_margin, bool deterministic"
)
_FORWARD_SCHEMA = f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
_SCHEMAS = {
    "_attention_forward": _FORWARD_SCHEMA,
    "_attention": _FORWARD_SCHEMA,
    "_attention_backward": (
        "(Tensor dout, Tensor out, Tensor softmax_lse, Tensor(a!) dq, Tensor(b!) dk, "
        "Tensor(c!) dv, Tensor rng_state, Tensor? dlse, Tensor(d!)? dmask, Tensor(e!)? dsinks, "
        f"{_ARGUMENTS}) -> Tensor"
    ),
    "_attention_with_kvcache": (
        "(Tensor k_new, Tensor v_new, Tensor? rotary_cos, Tensor? rotary_sin, "
        "bool rotary_interleaved, Tensor? cu_seqlens_k_new, Tensor? rotary_seqlens, "
        f"{_ARGUMENTS.replace('Tensor k, Tensor v', 'Tensor(a!) k, Tensor(b!) v', 1)}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
}
_TRANSFORM_END = 3 + len(ScoreTransform._fields)
_VISIBILITY_END = _TRANSFORM_END + len(Visibility._fields)
_LAYOUT_END = _VISIBILITY_END + len(SequenceLayout._fields)


def flatten(problem: AttentionProblem) -> tuple[Any, ...]:
    """All fields of ``problem`` and of its groups, in order."""
    transform, visibility, layout = problem[3:6]
    return (*problem[:3], *transform, *visibility, *layout, *problem[6:])


def unflatten(flat: Sequence[Any]) -> AttentionProblem:
    """The inverse of :func:`flatten`."""
    groups = (
        ScoreTransform(*flat[3:_TRANSFORM_END]),
        Visibility(*flat[_TRANSFORM_END:_VISIBILITY_END]),
        SequenceLayout(*flat[_VISIBILITY_END:_LAYOUT_END]),
    )
    return AttentionProblem(*flat[:3], *groups, *flat[_LAYOUT_END:])  # type: ignore[call-arg]


def _forward(*flat: Any) -> tuple[Tensor, ...]:
    return operator_outputs(unflatten(flat))


def _forward_fake(*flat: Any) -> tuple[Tensor, ...]:
    problem = unflatten(flat)
    q = problem.q
    check_device(problem.k, "k", q)
    check_device(problem.v, "v", q)
    if problem.out_shape == tuple(q.shape):
        out = torch.empty_like(q, dtype=problem.result_dtype)
    else:
        out = q.new_empty(problem.out_shape, dtype=problem.result_dtype)
    return (
        out,
        q.new_empty(problem.lse_shape, dtype=torch.float32),
        q.new_empty(s_dmask_shape(problem)),
        q.new_empty((2,), dtype=torch.int64),
    )


def _backward(*arguments: Any) -> Tensor:
    inputs = BackwardInputs(*arguments[: len(BackwardInputs._fields)])
    return attend_backward(unflatten(arguments[len(BackwardInputs._fields) :]), inputs)


def _backward_fake(*arguments: Any) -> Tensor:
    problem = unflatten(arguments[len(BackwardInputs._fields) :])
    return problem.q.new_empty(softmax_d_shape(problem), dtype=torch.float32)


def _with_kvcache(*arguments: Any) -> tuple[Tensor, ...]:
    update = CacheUpdate(*arguments[: len(CacheUpdate._fields)])
    return tuple(_append_and_attend(unflatten(arguments[len(CacheUpdate._fields) :]), update))


def _append_and_attend(problem: AttentionProblem, update: CacheUpdate) -> AttentionResult:
    return attend_with_kvcache(
        problem,
        *update[:5],
        cu_seqlens_k_new=update.cu_seqlens,
        rotary_seqlens=update.rotary_seqlens,
    )


def _with_kvcache_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward_fake(*arguments[len(CacheUpdate._fields) :])


# Kept alive for the life of the process: the operators vanish with the library object.
_library = torch.library.Library("flash_attn", "FRAGMENT")
for _name, _implementation, _fake in (
    ("_attention_forward", _forward, _forward_fake),
    ("_attention", _forward, _forward_fake),
    ("_attention_backward", _backward, _backward_fake),
    ("_attention_with_kvcache", _with_kvcache, _with_kvcache_fake),
):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn::{_name}", _fake, lib=_library)

forward = torch.ops.flash_attn._attention_forward
backward = torch.ops.flash_attn._attention_backward
with_kvcache = torch.ops.flash_attn._attention_with_kvcache


class _Differentiable(NamedTuple):
    """Where the differentiable tensors stand in :func:`flatten`'s order."""

    q: int = 0
    k: int = 1
    v: int = 2
    attn_mask: int = 3 + ScoreTransform._fields.index("attn_mask")
    sinks: int = 3 + ScoreTransform._fields.index("sinks")


_AT = _Differentiable()


class Attention(torch.autograd.Function):
    """Flattened problem -> (out, softmax_lse, s_dmask, rng_state).

    The tensors that have gradients come first, all others and the numbers follow.
    """

    @staticmethod
    def forward(differentiable_lse: bool, *flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, lse, s_dmask, rng_state = forward(*flat)
        return out, lse, s_dmask, rng_state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        differentiable_lse, *flat = inputs
        out, lse, s_dmask, rng_state = output
        _save(ctx, flat, out, lse, rng_state)
        constant = [s_dmask, rng_state] if differentiable_lse else [lse, s_dmask, rng_state]
        ctx.mark_non_differentiable(*constant)

    @staticmethod
    @first_order
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        return (None, *_differentiate(_restore(ctx), needed, dout, dlse))


class _Saved(NamedTuple):
    """What a forward pass leaves for backward."""

    out: Tensor
    lse: Tensor
    rng_state: Tensor
    flat: list[Any]


def _save(ctx: Any, flat: Sequence[Any], out: Tensor, lse: Tensor, rng_state: Tensor) -> None:
    """Tensors go through save_for_backward, which notices in-place changes; the rest beside it."""
    ctx.places = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
    ctx.numbers = tuple(None if isinstance(x, Tensor) else x for x in flat)
    ctx.save_for_backward(out, lse, rng_state, *(flat[i] for i in ctx.places))
    ctx.set_materialize_grads(False)


def _restore(ctx: Any) -> _Saved:
    out, lse, rng_state, *tensors = ctx.saved_tensors
    flat = list(ctx.numbers)
    for place, tensor in zip(ctx.places, tensors, strict=True):
        flat[place] = tensor
    return _Saved(out, lse, rng_state, flat)


def _differentiate(
    saved: _Saved, needed: Sequence[bool], dout: Tensor | None, dlse: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the flattened problem's entries; ``needed`` says which are asked for."""
    out, lse, rng_state, flat = saved
    wanted = [torch.empty_like(flat[at]) if needed[at] else None for at in _AT]
    dq, dk, dv = (
        torch.empty_like(flat[at]) if grad is None else grad
        for at, grad in zip(_AT[:3], wanted, strict=False)
    )
    dout = torch.zeros_like(out) if dout is None else last_dim_contiguous(dout)
    backward(dout, out, lse, dq, dk, dv, rng_state, dlse, wanted[3], wanted[4], *flat)
    grads: list[Tensor | None] = [None] * len(needed)
    for at, grad in zip(_AT, wanted, strict=True):
        grads[at] = grad
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, lse, s_dmask, rng_state = output
    _save(ctx, inputs, out, lse, rng_state)
    ctx.mark_non_differentiable(s_dmask, rng_state)


@first_order
def _formula(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return tuple(_differentiate(_restore(ctx), ctx.needs_input_grad, dout, dlse))


torch.library.register_autograd(
    "flash_attn::_attention", _formula, setup_context=_setup_context, lib=_library
)
traced_forward = torch.ops.flash_attn._attention


def solve(
    problem: AttentionProblem, differentiable_lse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask) of ``problem``, differentiable in q, k, v, a float ``attn_mask``
    and the sinks.

    Args:
        problem: what to solve; last dimensions are copied where they do not lie together.
        differentiable_lse: whether the log-sum-exp has a gradient too.

    Raises:
        ConstraintError: an argument is wrong.
        UnsupportedProblemError: no permitted backend computes it.
    """
    q, k, v = (last_dim_contiguous(x) for x in problem[:3])
    qv = None if problem.qv is None else last_dim_contiguous(problem.qv)
    flat = flatten(problem._replace(q=q, k=k, v=v, qv=qv))
    if torch.compiler.is_compiling():
        out, lse, s_dmask, _ = traced_forward(*flat)
        return out, lse if differentiable_lse else lse.detach(), s_dmask
    if torch.is_grad_enabled() and any(
        isinstance(flat[at], Tensor) and flat[at].requires_grad for at in _AT
    ):
        out, lse, s_dmask, _ = Attention.apply(differentiable_lse, *flat)
        return out, lse, s_dmask
    out, lse, s_dmask, _ = forward(*flat)
    return out, lse, s_dmask


def solve_with_kvcache(problem: AttentionProblem, update: CacheUpdate) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of ``problem`` after ``update`` was written into k and v, its caches.

    Not differentiable: to be called without gradients. Operators, of which only one declares to
    write, are for those who look at them: a decoding step is short, and calling one takes a fifth
    of its time on the host.

    Raises:
        ConstraintError: an argument is wrong.
        UnsupportedProblemError: no permitted backend computes it.
    """
    if not _is_traced(problem.q):
        result = _append_and_attend(problem, update)
        return result.out, result.softmax_lse
    check_update(problem, update)
    flat = flatten(problem)
    results = forward(*flat) if update.k is None else with_kvcache(*update, *flat)
    return results[0], results[1]


def _is_traced(q: Tensor) -> bool:
    """Whether anything looks at operators: compilation, export, fake or meta tensors, counters."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or q.is_meta
