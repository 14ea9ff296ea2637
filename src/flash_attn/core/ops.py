"""The registered operators: schemas, implementations and fakes.

``flash_attn::_flash_attn_forward`` and its three relatives have FlashAttention-2's schemas and no
autograd formula of their own: the public functions differentiate through :mod:`.autograd` around
them. The operators are opaque to torch.compile; the backend is chosen when they run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attend import attend, attend_backward, operator_outputs
from .outputs import s_dmask_shape, softmax_d_shape
from .problem import (
    AttentionProblem,
    AttentionResult,
    BackwardInputs,
    SequenceLayout,
    Visibility,
    make_transform,
)
from .rng import new_state, placeholder_state
from .validate import check_device, check_flash_2, check_same_headdim

NAMESPACE = "flash_attn"

_SCHEMAS = {
    "_flash_attn_forward": (
        "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
        "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, "
        "bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "_flash_attn_varlen_forward": (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, "
        "bool causal, SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0., "
        "Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, "
        "Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False, "
        "SymInt num_splits=0) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "_flash_attn_backward": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, float dropout_p, float softmax_scale, "
        "bool causal, SymInt window_size_left, SymInt window_size_right, float softcap, "
        "Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None) -> Tensor"
    ),
    "_flash_attn_varlen_backward": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, Tensor cu_seqlens_q, "
        "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, "
        "float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right, "
        "float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None, "
        "bool zero_tensors=False) -> Tensor"
    ),
}


def dense_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool = False,
) -> AttentionProblem:
    """The problem that the dense operators' flat arguments describe."""
    check_same_headdim(q, k, v)
    return AttentionProblem(
        q,
        k,
        v,
        make_transform(q.shape[-1], softmax_scale, softcap, alibi_slopes),
        Visibility.from_window(window_size_left, window_size_right, causal),
        dropout_p=dropout_p,
        return_softmax=return_softmax,
    )


def solve_forward(*arguments: Any) -> AttentionResult:
    """What the dense forward operator computes, past the dispatcher."""
    return attend(dense_problem(*arguments))


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    return operator_outputs(dense_problem(*arguments))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_result(dense_problem(*arguments))


def _fake_result(problem: AttentionProblem) -> tuple[Tensor, ...]:
    q = problem.q
    # One tensor on the meta device brings a call on real ones here, where nothing is computed.
    check_device(problem.k, "k", q)
    check_device(problem.v, "v", q)
    return (
        torch.empty_like(q),
        q.new_empty(problem.lse_shape, dtype=torch.float32),
        q.new_empty(s_dmask_shape(problem)),
        q.new_empty((2,), dtype=torch.int64),
    )


def varlen_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> AttentionProblem:
    """The problem that the packed operators' flat arguments describe.

    Every output element is written in any case, which leaves ``zero_tensors`` nothing to do.
    """
    layout = SequenceLayout(
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        leftpad_k,
        block_table,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    check_flash_2(layout, num_splits)
    check_same_headdim(q, k, v)
    return AttentionProblem(
        q,
        k,
        v,
        make_transform(q.shape[-1], softmax_scale, softcap, alibi_slopes),
        Visibility.from_window(window_size_left, window_size_right, causal),
        layout,
        dropout_p,
        num_splits=num_splits,
        return_softmax=return_softmax,
    )


def solve_varlen_forward(*arguments: Any) -> AttentionResult:
    """What the packed forward operator computes, past the dispatcher."""
    return attend(varlen_problem(*arguments))


def _varlen_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return operator_outputs(varlen_problem(*arguments))


def _varlen_forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_result(varlen_problem(*arguments))


def _solve_backward(
    problem: AttentionProblem,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    rng_state: Tensor | None,
) -> Tensor:
    if rng_state is None:
        dropout = problem.dropout_p > 0.0
        rng_state = (new_state if dropout else placeholder_state)(problem.q.device)
    inputs = BackwardInputs(
        dout,
        out,
        softmax_lse,
        torch.empty_like(problem.q) if dq is None else dq,
        torch.empty_like(problem.k) if dk is None else dk,
        torch.empty_like(problem.v) if dv is None else dv,
        rng_state,
    )
    return attend_backward(problem, inputs)


def solve_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """What the dense backward operator computes, past the dispatcher."""
    problem = dense_problem(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes,
    )  # fmt: skip
    problem = problem._replace(deterministic=deterministic)
    return _solve_backward(problem, dout, out, softmax_lse, dq, dk, dv, rng_state)


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    *rest: Any,
) -> Tensor:
    problem = dense_problem(q, k, v, 0.0, None, False, -1, -1, 0.0, None)
    return q.new_empty(softmax_d_shape(problem), dtype=torch.float32)


def solve_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """What the packed backward operator computes, past the dispatcher."""
    problem = varlen_problem(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left, window_size_right, softcap, alibi_slopes,
    )  # fmt: skip
    problem = problem._replace(deterministic=deterministic)
    return _solve_backward(problem, dout, out, softmax_lse, dq, dk, dv, rng_state)


def _varlen_backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    *rest: Any,
) -> Tensor:
    batch_size = cu_seqlens_q.shape[0] - 1
    return q.new_empty((q.shape[1], q.shape[0] + 128 * batch_size), dtype=torch.float32)


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "_flash_attn_forward": (_forward, _forward_fake),
    "_flash_attn_varlen_forward": (_varlen_forward, _varlen_forward_fake),
    "_flash_attn_backward": (solve_backward, _backward_fake),
    "_flash_attn_varlen_backward": (solve_varlen_backward, _varlen_backward_fake),
}

# Kept alive for the life of the process: the operators vanish with the library object.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

forward = torch.ops.flash_attn._flash_attn_forward
varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
backward = torch.ops.flash_attn._flash_attn_backward
varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward
