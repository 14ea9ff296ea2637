"""Attention over a KV cache: append new keys and values in place, rotate, attend."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import settings
from ..errors import ConstraintError
from . import registry
from .attend import attend
from .problem import (
    AttentionProblem,
    AttentionResult,
    ScoreTransform,
    SequenceLayout,
    Visibility,
)
from .validate import (
    check_device,
    check_flash_2,
    check_index,
    check_last_stride,
    check_like,
    check_problem,
    check_same_headdim,
    check_tensor,
    require,
)


def attend_with_kvcache(
    problem: AttentionProblem,
    k_new: Tensor | None,
    v_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    out: Tensor | None = None,
) -> AttentionResult:
    """Append ``k_new`` and ``v_new`` to the caches of ``problem``, then attend.

    ``problem.layout.seqused_k`` holds the lengths before appending, left padding included. New
    keys are rotated at positions ``seqused_k + t``, queries at ``seqused_k + i`` if the mask is
    causal or a window, else all at ``seqused_k``.

    Raises:
        ConstraintError: an argument is wrong.
    """
    _check_shapes(problem)
    layout = problem.layout
    lengths = layout.seqused_k
    _check_new(problem, k_new, v_new)
    _check_rotary(problem, k_new, rotary_cos, rotary_sin)
    if k_new is None or v_new is None or lengths is None:
        return attend(problem, out)
    check_problem(problem)
    _check_capacity(problem, lengths, k_new.shape[1])
    writer = registry.cache_writer(problem.q.device)
    if rotary_cos is not None and rotary_sin is not None:
        k_new = writer.rotate(k_new, rotary_cos, rotary_sin, lengths, rotary_interleaved)
        q = _rotate_queries(problem, writer, rotary_cos, rotary_sin, lengths, rotary_interleaved)
        problem = problem._replace(q=q)
    if k_new.numel():
        writer.append_kv(problem, k_new, v_new, lengths)
    longer = layout._replace(seqused_k=lengths + k_new.shape[1])
    return attend(problem._replace(layout=longer), out)


def _rotate_queries(
    problem: AttentionProblem,
    writer: registry.CacheWriter,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> Tensor:
    q = problem.q
    if problem.visibility != Visibility():
        return writer.rotate(q, cos, sin, lengths, interleaved)
    # Without a mask every query stands at the same position: one row of seqlen_q * nheads heads.
    batch_size, seqlen_q, nheads, headdim = q.shape
    one_row = q.reshape(batch_size, 1, seqlen_q * nheads, headdim)
    return writer.rotate(one_row, cos, sin, lengths, interleaved).view(q.shape)


def _check_shapes(problem: AttentionProblem) -> None:
    q, k, v = problem.q, problem.k, problem.v
    check_tensor(q, "q", 4, "(batch_size, seqlen_q, nheads, headdim)")
    for x, name in ((k, "k_cache"), (v, "v_cache")):
        check_tensor(x, name, 4, "(batch_size_cache, seqlen_cache, nheads_k, headdim) or, with "
                     "`block_table`, (num_blocks, page_block_size, nheads_k, headdim)")  # fmt: skip
        check_last_stride(x, name)
    table = problem.layout.page_table
    check_index(table, "block_table", q, (q.shape[0], None))
    check_index(problem.layout.seqused_k, "cache_seqlens", q, (q.shape[0],))
    if k.shape[0] and q.shape[1] > problem.max_seqlen_k and k.shape[1]:
        raise ConstraintError(
            f"`q` must have seqlen <= the seqlen of the KV cache, found {q.shape[1]} and "
            f"{problem.max_seqlen_k}"
        )


def _check_new(problem: AttentionProblem, k_new: Tensor | None, v_new: Tensor | None) -> None:
    if k_new is None:
        require(v_new is None, "`v` is given without `k`: pass both or none")
        return
    if v_new is None:
        raise ConstraintError("If key is supplied, value must also be passed in: `v` is None")
    if problem.layout.seqused_k is None:
        raise ConstraintError(
            "If key is supplied, seqlens_k must also be passed in: `cache_seqlens` is None"
        )
    heads = (problem.nheads_k, problem.headdim)
    for x, name in ((k_new, "k"), (v_new, "v")):
        check_tensor(x, name, 4, "(batch_size, seqlen_new, nheads_k, headdim)")
        check_like(x, name, problem.q)
        if (x.shape[0], *x.shape[2:]) != (problem.batch_size, *heads):
            wanted = (problem.batch_size, "seqlen_new", *heads)
            raise ConstraintError(f"`{name}` must have shape {wanted}, found {tuple(x.shape)}")
    if k_new.shape[1] != v_new.shape[1]:
        raise ConstraintError(
            f"`v` must have seqlen {k_new.shape[1]} like `k`, found {v_new.shape[1]}"
        )
    if k_new.shape[1] > problem.max_seqlen_k:
        raise ConstraintError(
            "`k` must have seqlen <= the seqlen of the KV cache, found "
            f"{k_new.shape[1]} and {problem.max_seqlen_k}"
        )


def _check_capacity(problem: AttentionProblem, lengths: Tensor, seqlen_new: int) -> None:
    """With FLASH_ATTN_CHECK=1: the new rows fit. Otherwise rows that do not fit are dropped."""
    if not settings.CHECK_INDICES or lengths.numel() == 0:
        return
    longest = int(lengths.max()) + seqlen_new
    where = "block_table" if problem.is_paged else "k_cache"
    require(
        longest <= problem.max_seqlen_k,
        f"`{where}` has room for {problem.max_seqlen_k} keys a sequence, but `cache_seqlens` and "
        f"the new keys need {longest}",
    )


def _check_rotary(
    problem: AttentionProblem, k_new: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ConstraintError(f"`rotary_cos` and `rotary_sin` go together: `{missing}` is None")
    if k_new is None:
        raise ConstraintError(
            "If rotary cos/sin are provided, new key / value to be appended to KV cache must also "
            "be provided: `k` is None"
        )
    for x, name in ((cos, "rotary_cos"), (sin, "rotary_sin")):
        check_tensor(x, name, 2, "(seqlen_rotary, rotary_dim / 2)")
        if x.dtype != problem.q.dtype:
            raise ConstraintError(
                f"{name} must have the same dtype as query, found {x.dtype} and {problem.q.dtype}"
            )
        check_device(x, name, problem.q)
        require(x.is_contiguous(), f"`{name}` must be contiguous, found strides {x.stride()}")
        if x.shape[0] < problem.max_seqlen_k:
            raise ConstraintError(
                f"cos/sin seqlen must be at least the seqlen of KV cache: `{name}` has "
                f"{x.shape[0]} rows, the cache {problem.max_seqlen_k}"
            )
    require(
        cos.shape == sin.shape,
        f"`rotary_sin` must have shape {tuple(cos.shape)}, found {tuple(sin.shape)}",
    )
    rotary_dim = 2 * cos.shape[1]
    require(
        rotary_dim <= problem.headdim,
        f"rotary_dim must be <= headdim, found {rotary_dim} and {problem.headdim}",
    )
    require(
        rotary_dim % 16 == 0,
        f"Only rotary dimensions divisible by 16 are currently supported, found {rotary_dim}",
    )


def kvcache_problem(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    transform: ScoreTransform,
    visibility: Visibility,
    num_splits: int,
) -> AttentionProblem:
    """The problem of a FlashAttention-2 cache call, before anything is appended."""
    layout = SequenceLayout(
        seqused_k=cache_seqlens,
        leftpad_k=cache_leftpad,
        page_table=block_table,
        cache_batch_idx=cache_batch_idx,
    )
    check_flash_2(layout, num_splits)
    check_same_headdim(q, v_cache)
    return AttentionProblem(
        q, k_cache, v_cache, transform, visibility, layout, num_splits=num_splits
    )


def lengths_tensor(cache_seqlens: Tensor | int | None, q: Tensor) -> Tensor | None:
    """``cache_seqlens`` as a (batch,) int32 tensor: an integer holds for every sequence."""
    if isinstance(cache_seqlens, int):
        return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    return cache_seqlens
