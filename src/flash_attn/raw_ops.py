"""The positional functions of FlashAttention-2's compiled extension, for callers of that layer.

Reachable as ``flash_attn.flash_attn_interface.flash_attn_gpu`` and as the top-level module
``flash_attn_2_cuda``. The order of arguments and the returned lists are the extension's; results
are written into ``out``, ``dq``, ``dk`` and ``dv`` where these are given. ``gen`` must be None:
random numbers come from PyTorch's default generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .core import ops
from .core.arguments import check_optional, check_tensors
from .core.attend import attend, attend_backward
from .core.kvcache import attend_with_kvcache, kvcache_problem, lengths_tensor
from .core.problem import AttentionProblem, BackwardInputs, Visibility, make_transform
from .core.rng import new_state, placeholder_state
from .core.validate import check_gradient
from .errors import ConstraintError


def _no_generator(gen: object) -> None:
    if gen is not None:
        raise ConstraintError(
            "the `generator` argument is no longer supported: `gen` must be None, found "
            f"{type(gen).__name__}"
        )


def _solve(problem: AttentionProblem, out: Tensor | None) -> list[Tensor]:
    if problem.return_softmax and problem.dropout_p == 0.0:
        raise ConstraintError(
            "return_softmax is only supported when p_dropout > 0.0: `return_softmax` is True"
        )
    if out is not None:
        check_gradient(out, "out", problem.q)
    return list(attend(problem, out))


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: object = None,
) -> list[Tensor]:
    """Dense forward: [out, softmax_lse, S_dmask, rng_state]."""
    _no_generator(gen)
    check_tensors(q=q, k=k, v=v)
    problem = ops.dense_problem(
        q, k, v, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right,
        softcap, alibi_slopes, return_softmax,
    )  # fmt: skip
    return _solve(problem, out)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: object = None,
    num_splits: int = 0,
) -> list[Tensor]:
    """Packed forward: [out, softmax_lse, S_dmask, rng_state]."""
    _no_generator(gen)
    check_tensors(q=q, k=k, v=v)
    problem = ops.varlen_problem(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale,
        is_causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax,
        block_table, leftpad_k, seqused_k, zero_tensors, num_splits,
    )  # fmt: skip
    return _solve(problem, out)


def _solve_backward(
    problem: AttentionProblem,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    rng_state: Tensor | None,
) -> list[Tensor]:
    if rng_state is None:
        dropout = problem.dropout_p > 0.0
        rng_state = (new_state if dropout else placeholder_state)(problem.q.device)
    likes = (problem.q, problem.k, problem.v)
    dq, dk, dv = (
        torch.empty_like(like) if grad is None else grad
        for grad, like in zip(grads, likes, strict=True)
    )
    inputs = BackwardInputs(dout, out, softmax_lse, dq, dk, dv, rng_state)
    return [dq, dk, dv, attend_backward(problem, inputs)]


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: object = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """Dense backward: [dq, dk, dv, softmax_d]."""
    _no_generator(gen)
    check_tensors(q=q, k=k, v=v)
    problem = ops.dense_problem(
        q, k, v, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right,
        softcap, alibi_slopes,
    )  # fmt: skip
    problem = problem._replace(deterministic=deterministic)
    return _solve_backward(problem, dout, out, softmax_lse, (dq, dk, dv), rng_state)


def varlen_bwd(
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
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: object = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """Packed backward: [dq, dk, dv, softmax_d]."""
    _no_generator(gen)
    check_tensors(q=q, k=k, v=v)
    problem = ops.varlen_problem(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale,
        is_causal, window_size_left, window_size_right, softcap, alibi_slopes,
        zero_tensors=zero_tensors,
    )  # fmt: skip
    problem = problem._replace(deterministic=deterministic)
    return _solve_backward(problem, dout, out, softmax_lse, (dq, dk, dv), rng_state)


def fwd_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens_k: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """Attention over a KV cache, new keys appended in place: [out, softmax_lse]."""
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    check_optional(k=k, v=v, alibi_slopes=alibi_slopes, out=out)
    problem = kvcache_problem(
        q,
        k_cache,
        v_cache,
        lengths_tensor(seqlens_k, q),
        cache_batch_idx,
        leftpad_k,
        block_table,
        make_transform(q.shape[-1], softmax_scale, softcap, alibi_slopes),
        Visibility.from_window(window_size_left, window_size_right, is_causal),
        num_splits,
    )
    if out is not None:
        check_gradient(out, "out", q)
    result = attend_with_kvcache(problem, k, v, rotary_cos, rotary_sin, is_rotary_interleaved, out)
    return [result.out, result.softmax_lse]
