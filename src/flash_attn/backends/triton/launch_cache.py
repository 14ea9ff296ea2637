"""Launching what surrounds attention: writing into KV caches, merging partial results."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...core.device import guard
from ...core.outputs import mark_written
from ...core.problem import AttentionProblem, is_float8
from ...kernels import kv_append
from ...kernels.combine import attention_combine
from .._compiled import look_up_first
from .launch import row_strides, strides_are_eights, tiles_of

append_kv_kernel = look_up_first(kv_append.append_kv)

_BLOCK_M = 16


def append_kv(
    problem: AttentionProblem,
    k_new: Tensor,
    v_new: Tensor,
    at: Tensor,
    cu_seqlens_new: Tensor | None = None,
) -> None:
    """Write new rows into the caches of ``problem``, sequence b's from row ``at[b]`` on.

    Args:
        problem: whose k and v are the caches.
        k_new: (batch, seqlen_new, nheads_k, headdim), or packed (total_new, nheads_k, headdim).
        v_new: like k_new, with the values' head dim.
        at: (batch,) int32.
        cu_seqlens_new: (batch + 1,) int32 row bounds of packed rows, or None.
    """
    k, v = problem.k, problem.v
    if is_float8(k.dtype):  # bytes are copied on GPUs without float8 units, too
        k, v, k_new, v_new = (x.view(torch.uint8) for x in (k, v, k_new, v_new))
    table, cache_row = problem.layout.page_table, problem.layout.cache_batch_idx
    batch_size, packed = at.shape[0], cu_seqlens_new is not None
    tiles = tiles_of(k_new.shape[-3], batch_size, packed, _BLOCK_M)
    with guard(k):
        append_kv_kernel[(tiles * problem.nheads_k * (1 if packed else batch_size),)](
            k_new, v_new, k, v, at,
            at if cu_seqlens_new is None else cu_seqlens_new,
            at if table is None else table,
            at if cache_row is None else cache_row,
            *row_strides(k_new), *row_strides(v_new), *row_strides(k), *row_strides(v),
            0 if table is None else table.stride(0),
            batch_size, problem.nheads_k, k_new.shape[-3], problem.max_seqlen_k,
            1 if table is None else max(k.shape[1], 1),
            k.shape[0], 0 if table is None else table.shape[0], tiles,
            HEAD_DIM=k.shape[-1], HEAD_DIM_V=v.shape[-1], BLOCK_M=_BLOCK_M,
            BLOCK_D=max(16, triton.next_power_of_2(k.shape[-1])),
            BLOCK_DV=max(16, triton.next_power_of_2(v.shape[-1])),
            IS_VARLEN=packed,
            IS_PAGED=table is not None,
            HAS_BATCH_IDX=cache_row is not None,
            EIGHTS=strides_are_eights(k_new, v_new, k, v),
            num_warps=4,
        )  # fmt: skip
    mark_written(problem.k, problem.v)


def combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge (splits, batch, seqlen, nheads, headdim) float32 partial results.

    Args:
        out_partial: last stride 1.
        lse_partial: (splits, batch, seqlen, nheads) float32, stride 1 along seqlen.
        out: (batch, seqlen, nheads, headdim), written; last stride 1.
        lse: (batch, nheads, seqlen) float32, written; last stride 1.
    """
    splits, batch_size, seqlen, nheads, headdim = out_partial.shape
    row_tiles = triton.cdiv(seqlen, _BLOCK_M)
    with guard(out):
        attention_combine[(row_tiles * nheads * batch_size,)](
            out_partial, lse_partial, out, lse,
            out_partial.stride(0), *row_strides(out_partial[0]),
            lse_partial.stride(0), lse_partial.stride(1), lse_partial.stride(3),
            *row_strides(out), lse.stride(0), lse.stride(1),
            nheads, seqlen, row_tiles, splits, float("-inf"), None,
            HEAD_DIM=headdim, BLOCK_M=_BLOCK_M,
            BLOCK_D=max(16, triton.next_power_of_2(headdim)),
            num_warps=4,
        )  # fmt: skip
    mark_written(out)
