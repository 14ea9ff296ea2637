"""FlashAttention-3's operators: schemas, implementations and fakes.

``flash_attn_3::_flash_attn_forward`` and ``_flash_attn_backward`` have upstream's schemas. The
forward operator is differentiable in q, k and v, except over caches. It also appends to a cache,
which its schema does not say: traced programs take
:func:`~flash_attn.hopper_interface.flash_attn_with_kvcache`, whose operator says it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConstraintError
from . import problem_ops
from .derivatives import first_order
from .hopper import (
    BackwardArguments,
    ForwardArguments,
    fake_result,
    has_cache,
    solve,
    solve_backward,
)
from .outputs import last_dim_contiguous, softmax_d_shape

NAMESPACE = "flash_attn_3"

_FORWARD_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, "
    "Tensor? out_=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, "
    "bool causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, float softcap=0., bool rotary_interleaved=True, "
    "Tensor? scheduler_metadata=None, SymInt num_splits=1, bool? pack_gqa=None, "
    "SymInt sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? sequed_q=None, "
    "Tensor? sequed_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
    "Tensor(a12!)? dq=None, Tensor(a13!)? dk=None, Tensor(a14!)? dv=None, "
    "float? softmax_scale=None, bool is_causal=False, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, float softcap=0., bool deterministic=False, "
    "SymInt sm_margin=0) -> Tensor"
)


def _forward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    given = ForwardArguments(*arguments, **named)
    out, *rest = solve(given)
    # An operator may not return one of its arguments.
    return (out if given.out_ is None else out.clone(), *rest)


def _forward_fake(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    given = ForwardArguments(*arguments, **named)
    for name in ("out_", "k_new"):
        if getattr(given, name) is not None:
            raise TypeError(
                "Tracing (torch.compile/torch.export) with pre-allocated output tensor or appended "
                f"keys is not supported: `{name}` is given. Its writing is not in the schema; "
                "flash_attn_with_kvcache can be traced"
            )
    return fake_result(given)


def _backward(*arguments: Any, **named: Any) -> Tensor:
    given = BackwardArguments(*arguments, **named)
    problem, grads = given.problem(), (given.dq, given.dk, given.dv)
    return solve_backward(problem, given.dout, given.out, given.softmax_lse, grads)[3]


def _backward_fake(*arguments: Any, **named: Any) -> Tensor:
    problem = BackwardArguments(*arguments, **named).problem()
    return problem.q.new_empty(softmax_d_shape(problem), dtype=torch.float32)


# Kept alive for the life of the process: the operators vanish with the library object.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, _schema, _implementation, _fake in (
    ("_flash_attn_forward", _FORWARD_SCHEMA, _forward, _forward_fake),
    ("_flash_attn_backward", _BACKWARD_SCHEMA, _backward, _backward_fake),
):
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

forward = torch.ops.flash_attn_3._flash_attn_forward
backward = torch.ops.flash_attn_3._flash_attn_backward


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = ForwardArguments(*inputs)._replace(out_=None)
    named = given._asdict()
    ctx.has_cache = has_cache(given)
    ctx.names = [name for name, x in named.items() if isinstance(x, Tensor)]
    ctx.numbers = {name: x for name, x in named.items() if not isinstance(x, Tensor)}
    ctx.save_for_backward(*output[:2], *(named[name] for name in ctx.names))
    ctx.mark_non_differentiable(*output[1:])


@first_order
def _differentiate(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.has_cache:
        raise ConstraintError(
            "the backward pass does not support appended keys: `k_new` and rotation are for "
            "forward passes only"
        )
    out, lse, *tensors = ctx.saved_tensors
    given = ForwardArguments(**dict(zip(ctx.names, tensors, strict=True)), **ctx.numbers)
    problem = given.problem()
    grads = [torch.empty_like(x) for x in (problem.q, problem.k, problem.v)]
    rng_state = dout.new_zeros(2, dtype=torch.int64)
    problem_ops.backward(
        last_dim_contiguous(dout), out, lse, *grads, rng_state, None, None, None,
        *problem_ops.flatten(problem),
    )  # fmt: skip
    # The dispatcher leaves trailing defaults out: as many gradients as it has passed arguments.
    return (*grads, *[None] * (len(ctx.needs_input_grad) - 3))


torch.library.register_autograd(
    f"{NAMESPACE}::_flash_attn_forward", _differentiate, setup_context=_setup_context, lib=_library
)
