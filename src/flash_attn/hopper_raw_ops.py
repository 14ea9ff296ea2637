"""FlashAttention-3's extension by its operators: ``torch.ops.flash_attn_3.fwd``, ``bwd``,
``fwd_combine`` and ``get_scheduler_metadata``.

Importing this module registers them; PyTorch's ``activate_flash_attention_impl("FA3")``, xFormers
and others call them by position. Results are written into ``out``, ``dq``, ``dk`` and ``dv`` where
these are given, whatever their strides. An operator that another library has registered under one
of the names stays, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .core.combine import combine
from .core.hopper import (
    BackwardArguments,
    ForwardArguments,
    fake_result,
    no_partial_results,
    solve,
    solve_backward,
)
from .core.hopper_ops import NAMESPACE
from .core.outputs import softmax_d_shape
from .hopper_interface import get_scheduler_metadata as public_scheduler_metadata

_SCHEMAS = {
    "fwd": (
        "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
        "Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, "
        "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
        "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
        "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
        "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
        "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
        "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
        "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, "
        "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
        "bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
    ),
    "bwd": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, "
        "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
        "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
        "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
        "int window_size_right=-1, float softcap=0.0, bool deterministic=False, "
        "int sm_margin=0) -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, "
        "Tensor, Tensor)"
    ),
    "fwd_combine": (
        "(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, "
        "ScalarType? out_dtype=None) -> (Tensor(out!), Tensor)"
    ),
    "get_scheduler_metadata": (
        "(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, "
        "int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, "
        "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
        "Tensor? seqused_q=None, Tensor? leftpad_k=None, int? page_size=None, "
        "int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, "
        "int window_size_right=-1, int attention_chunk=0, bool has_softcap=False, "
        "int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> Tensor"
    ),
}
# Where the operator and the private function differ in their defaults.
_FORWARD_DEFAULTS: dict[str, Any] = {"rotary_interleaved": False, "num_splits": 0}
# The private function takes its gradients after the lengths, the operator before them.
_BACKWARD_ORDER = (*range(6), *range(12, 15), *range(6, 12), *range(15, 22))


def _forward_arguments(given: tuple[Any, ...]) -> ForwardArguments:
    """The operator's arguments, which come in the private function's order."""
    rest = {
        name: value
        for name, value in _FORWARD_DEFAULTS.items()
        if ForwardArguments._fields.index(name) >= len(given)
    }
    return ForwardArguments(*given, **rest)


def _forward(*given: Any) -> tuple[Tensor, ...]:
    return solve(_forward_arguments(given))


def _forward_fake(*given: Any) -> tuple[Tensor, ...]:
    return fake_result(_forward_arguments(given))


def _backward_arguments(given: tuple[Any, ...]) -> BackwardArguments:
    names = (BackwardArguments._fields[at] for at in _BACKWARD_ORDER)
    return BackwardArguments(**dict(zip(names, given, strict=False)))


def _backward(*given: Any) -> tuple[Tensor, ...]:
    arguments = _backward_arguments(given)
    grads = (arguments.dq, arguments.dk, arguments.dv)
    dq, dk, dv, softmax_d = solve_backward(
        arguments.problem(), arguments.dout, arguments.out, arguments.softmax_lse, grads
    )
    return (dq, dk, dv, softmax_d, *_accumulators(dq))


def _backward_fake(*given: Any) -> tuple[Tensor, ...]:
    arguments = _backward_arguments(given)
    problem = arguments.problem()
    dq, dk, dv = (
        torch.empty_like(like) if grad is None else grad
        for grad, like in (
            (arguments.dq, problem.q),
            (arguments.dk, problem.k),
            (arguments.dv, problem.v),
        )
    )
    softmax_d = problem.q.new_empty(softmax_d_shape(problem), dtype=torch.float32)
    return (dq, dk, dv, softmax_d, *_accumulators(dq))


def _accumulators(dq: Tensor) -> tuple[Tensor, ...]:
    """Upstream's workspaces (LSE in base 2, float32 dq, dk, dv), which we have not: empty."""
    return (*no_partial_results(dq), *no_partial_results(dq))


def _scheduler_metadata(*given: Any) -> Tensor:
    return public_scheduler_metadata(**_scheduler_arguments(given))


def _scheduler_arguments(given: tuple[Any, ...]) -> dict[str, Any]:
    """The operator's arguments by the public function's names."""
    named = dict(zip(_SCHEDULER_NAMES, given, strict=False))
    left, right = named.pop("window_size_left", -1), named.pop("window_size_right", -1)
    for name in ("cu_seqlens_k", "seqused_q"):
        named.pop(name, None)
    return named | {"window_size": (left, right)}


_SCHEDULER_NAMES = (
    "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim",
    "headdim_v", "qkv_dtype", "cache_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new",
    "seqused_q", "cache_leftpad", "page_size", "max_seqlen_k_new", "causal", "window_size_left",
    "window_size_right", "attention_chunk", "has_softcap", "num_splits", "pack_gqa", "sm_margin",
)  # fmt: skip

_Implementation = Callable[..., Any]
_IMPLEMENTATIONS: dict[str, tuple[_Implementation, _Implementation]] = {
    "fwd": (_forward, _forward_fake),
    "bwd": (_backward, _backward_fake),
    "fwd_combine": (combine, combine),
    "get_scheduler_metadata": (_scheduler_metadata, _scheduler_metadata),
}


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, (implementation, fake) in _IMPLEMENTATIONS.items():
        if hasattr(torch.ops.flash_attn_3, name):
            warnings.warn(
                f"torch.ops.{NAMESPACE}.{name} is registered by another library and stays as it "
                "is; the functions of flash_attn_interface do not use it",
                RuntimeWarning,
                stacklevel=3,
            )
            continue
        library.define(name + _SCHEMAS[name])
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


# Kept alive for the life of the process: the operators vanish with the library object.
_library = _register()
