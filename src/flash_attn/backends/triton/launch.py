"""Launching the forward kernels: from a problem and a plan to kernel arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...core import rng
from ...core.device import arch_of, guard, multiprocessors_of
from ...core.outputs import empty_lse, empty_out, new_s_dmask
from ...core.plan import PlanKey, TilePlan
from ...core.problem import AttentionProblem, AttentionResult
from ...kernels.combine import attention_combine
from ...kernels.forward import attention_forward
from ...kernels.kv_append import append_kv as append_kv_kernel
from ...kernels.softmax_debug import softmax_debug
from .heuristics import plan_for

_major, _minor = triton.__version__.split(".")[:2]
_TRITON = (int(_major), int(_minor))
_FEW_ROWS = 16


class Facts(NamedTuple):
    """What all kernels of a problem need besides tensors; constexprs by their kernel names."""

    block_d: int
    constexprs: dict[str, Any]
    window_left: int
    window_right: int
    stride_slope: int
    keep_threshold: int
    dropout_scale: float


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of (batch, row, head); packed tensors have no batch stride."""
    if x.dim() == 3:
        return (0, x.stride(0), x.stride(1))
    return (x.stride(0), x.stride(1), x.stride(2))


def lse_strides(x: Tensor) -> tuple[int, int]:
    """Strides of (batch, head) of softmax_lse or softmax_d; rows are contiguous."""
    return (0, x.stride(0)) if x.dim() == 2 else (x.stride(0), x.stride(1))


def needs_wide_offsets(*tensors: Tensor) -> bool:
    """Whether offsets of rows within a sequence, a page or a tile can exceed 31 bits."""
    return any(abs(row_strides(x)[1]) * max(x.shape[-3], 256) >= 2**31 for x in tensors)


def facts_of(problem: AttentionProblem) -> Facts:
    """Features and scalars shared by the forward and backward kernels."""
    (left, right), transform = problem.visibility, problem.transform
    slopes = transform.alibi_slopes
    dropout = problem.dropout_p > 0.0
    constexprs = {
        "HEAD_DIM": problem.headdim,
        "HAS_LEFT": left is not None,
        "HAS_RIGHT": right is not None,
        "HAS_SOFTCAP": transform.softcap > 0.0,
        "HAS_ALIBI": slopes is not None,
        "HAS_DROPOUT": dropout,
        "PRECISION": "ieee" if problem.q.dtype == torch.float32 else "tf32",
    }
    return Facts(
        max(16, triton.next_power_of_2(problem.headdim)),
        constexprs,
        # Far beyond any length, yet far enough from 2**31 for sums of positions.
        min(2**29 if left is None else left, 2**29),
        min(2**29 if right is None else right, 2**29),
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        rng.keep_threshold(problem.dropout_p) if dropout else 0,
        1.0 / (1.0 - problem.dropout_p),
    )


def plan_key(kernel: str, problem: AttentionProblem, facts: Facts) -> PlanKey:
    """The facts that the plan of ``kernel`` may depend on."""
    named = facts.constexprs
    return PlanKey(
        kernel,
        arch_of(problem.q.device.index or 0) if problem.q.is_cuda else "interpreter",
        _TRITON,
        problem.q.element_size(),
        facts.block_d,
        named["HAS_LEFT"] or named["HAS_RIGHT"],
        named["HAS_SOFTCAP"] or named["HAS_ALIBI"] or named["HAS_DROPOUT"] or problem.is_paged,
        not problem.is_varlen_q and problem.q.shape[1] <= _FEW_ROWS,
        named["HAS_LEFT"],
        problem.headdim < facts.block_d,
    )


def compile_options(plan: TilePlan) -> dict[str, int]:
    """Tile sizes and compiler options as launch keywords."""
    return {
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }


def tiles_of(rows: int, batch_size: int, packed: bool, block: int) -> int:
    """Tiles of rows to launch for each head (and, if not packed, sequence).

    Packed: enough for all segments, see kernels.common.locate_packed_tile.
    """
    return rows // block + batch_size + 2 if packed else triton.cdiv(rows, block)


def choose_splits(problem: AttentionProblem, tiles: int, plan: TilePlan) -> int:
    """How many parts the keys are divided into: so many that the tiles fill the GPU once.

    Only few queries (decoding) leave it idle otherwise; each part keeps at least four tiles.
    """
    if problem.num_splits:
        return problem.num_splits
    if problem.is_varlen_q or problem.q.shape[1] > 64 or not problem.q.is_cuda:
        return 1
    idle = multiprocessors_of(problem.q.device.index or 0) // max(tiles, 1)
    most = problem.max_seqlen_k // (4 * plan.block_n)
    return max(1, min(idle, most, 128))


def _table_arguments(problem: AttentionProblem) -> tuple[Tensor, ...]:
    """Index tensors, with q standing in for absent ones, whose pointer is never followed."""
    layout, absent = problem.layout, problem.q
    tensors = (
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.seqused_k,
        layout.leftpad_k,
        layout.page_table,
        layout.cache_batch_idx,
        problem.transform.alibi_slopes,
    )
    return tuple(absent if x is None else x for x in tensors)


def forward(problem: AttentionProblem, out: Tensor | None) -> AttentionResult:
    """Solve ``problem`` on its GPU, into ``out`` if it is given."""
    device = problem.q.device
    dropout = problem.dropout_p > 0.0
    out = empty_out(problem) if out is None else out
    lse = empty_lse(problem)
    with guard(problem.q):
        rng_state = rng.new_state(device) if dropout else rng.unused_state(device)
        facts = facts_of(problem)
        plan = plan_for(plan_key("forward", problem, facts))
        tiles = tiles_of(problem.q.shape[-3], problem.batch_size, problem.is_varlen_q, plan.block_m)
        programs = tiles * problem.nheads * (1 if problem.is_varlen_q else problem.batch_size)
        splits = choose_splits(problem, programs, plan)
        if splits == 1:
            _launch_forward(problem, facts, plan, rng_state, out, lse, tiles, programs, 1)
        else:
            _forward_split(problem, facts, plan, rng_state, out, lse, tiles, programs, splits)
        s_dmask = new_s_dmask(problem)
        if s_dmask.numel():
            _launch_softmax_debug(problem, facts, rng_state, s_dmask)
    return AttentionResult(out, lse, s_dmask, rng_state)


def _launch_forward(
    problem: AttentionProblem,
    facts: Facts,
    plan: TilePlan,
    rng_state: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: int,
    programs: int,
    splits: int,
) -> None:
    q, k, v, layout, transform = (
        problem.q, problem.k, problem.v, problem.layout, problem.transform,
    )  # fmt: skip
    table, packed_k = layout.page_table, layout.cu_seqlens_k is not None
    named = facts.constexprs
    split = splits > 1
    # Partial results carry a leading dimension of splits and say -inf where they saw nothing.
    stride_os, stride_ls = (out.stride(0), lse.stride(0)) if split else (0, 0)
    one_out, one_lse = (out[0], lse[0]) if split else (out, lse)
    plain = not (named["HAS_SOFTCAP"] or named["HAS_ALIBI"])
    attention_forward[(programs * splits,)](
        q, k, v, out, lse,
        *row_strides(q), *row_strides(k), *row_strides(v),
        stride_os, *row_strides(one_out),
        stride_ls, *lse_strides(one_lse),
        *_table_arguments(problem), rng_state,
        0 if table is None else table.stride(0), facts.stride_slope,
        problem.batch_size, problem.nheads, problem.nheads // problem.nheads_k,
        q.shape[-3],
        k.shape[0] if k.dim() == 3 else problem.max_seqlen_k,
        tiles, splits,
        k.shape[1] if table is not None else 1,
        k.shape[0],
        transform.softmax_scale, max(transform.softcap, 1e-20),
        facts.window_left, facts.window_right, facts.keep_threshold, facts.dropout_scale,
        float("-inf") if split else problem.empty_lse,
        BLOCK_D=facts.block_d,
        IS_VARLEN_Q=problem.is_varlen_q,
        IS_VARLEN_K=packed_k,
        IS_PAGED=table is not None,
        HAS_SEQUSED=layout.seqused_k is not None,
        HAS_LEFTPAD=layout.leftpad_k is not None,
        HAS_BATCH_IDX=layout.cache_batch_idx is not None,
        SPLIT=split,
        FOLD_SCALE=plain and transform.softmax_scale > 0.0,
        WIDE=needs_wide_offsets(q, k, v, one_out),
        **named,
        **compile_options(plan),
    )  # fmt: skip


def _forward_split(
    problem: AttentionProblem,
    facts: Facts,
    plan: TilePlan,
    rng_state: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: int,
    programs: int,
    splits: int,
) -> None:
    """Partial results in float32, then their merge."""
    partial_out = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    partial_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=lse.device)
    _launch_forward(
        problem, facts, plan, rng_state, partial_out, partial_lse, tiles, programs, splits
    )
    rows = problem.q.shape[-3]
    block_m = 16
    row_tiles = triton.cdiv(rows, block_m)
    batch_size = 1 if problem.is_varlen_q else problem.batch_size
    attention_combine[(row_tiles * problem.nheads * batch_size,)](
        partial_out, partial_lse, out, lse,
        partial_out.stride(0), *row_strides(partial_out[0]),
        partial_lse.stride(0), *lse_strides(partial_lse[0]),
        *row_strides(out), *lse_strides(lse),
        problem.nheads, rows, row_tiles, splits, problem.empty_lse,
        HEAD_DIM=problem.headdim, BLOCK_M=block_m, BLOCK_D=facts.block_d,
        num_warps=4,
    )  # fmt: skip


def _launch_softmax_debug(
    problem: AttentionProblem, facts: Facts, rng_state: Tensor, s_dmask: Tensor
) -> None:
    q, k, layout = problem.q, problem.k, problem.layout
    named = {key: value for key, value in facts.constexprs.items()
             if key not in ("HAS_SOFTCAP", "HAS_DROPOUT")}  # fmt: skip
    block = 32
    tiles = tiles_of(q.shape[-3], problem.batch_size, problem.is_varlen_q, block)
    programs = tiles * problem.nheads * (1 if problem.is_varlen_q else problem.batch_size)
    slopes = problem.transform.alibi_slopes
    softmax_debug[(programs,)](
        q, k, s_dmask,
        *row_strides(q), *row_strides(k),
        s_dmask.stride(0), s_dmask.stride(1), s_dmask.stride(2),
        s_dmask.shape[2], s_dmask.shape[3],
        q if layout.cu_seqlens_q is None else layout.cu_seqlens_q,
        q if layout.cu_seqlens_k is None else layout.cu_seqlens_k,
        q if slopes is None else slopes,
        rng_state, facts.stride_slope,
        problem.batch_size, problem.nheads, problem.nheads // problem.nheads_k,
        q.shape[-3], k.shape[-3], tiles,
        problem.transform.softmax_scale, 1.0,
        facts.window_left, facts.window_right, facts.keep_threshold,
        BLOCK_M=block, BLOCK_N=block, BLOCK_D=facts.block_d,
        IS_VARLEN=problem.is_varlen_q,
        num_warps=4,
        **named,
    )  # fmt: skip


def append_kv(problem: AttentionProblem, k_new: Tensor, v_new: Tensor, at: Tensor) -> None:
    """Write (batch, seqlen_new, nheads_k, headdim) into the caches from row ``at[b]`` on."""
    table, cache_row = problem.layout.page_table, problem.layout.cache_batch_idx
    block_m = 16
    tiles = triton.cdiv(k_new.shape[1], block_m)
    with guard(problem.q):
        append_kv_kernel[(tiles * problem.nheads_k * k_new.shape[0],)](
            k_new, v_new, problem.k, problem.v, at,
            at if table is None else table,
            at if cache_row is None else cache_row,
            *row_strides(k_new), *row_strides(v_new),
            *row_strides(problem.k), *row_strides(problem.v),
            0 if table is None else table.stride(0),
            problem.nheads_k, k_new.shape[1], problem.max_seqlen_k,
            1 if table is None else problem.k.shape[1],
            problem.k.shape[0], tiles,
            HEAD_DIM=problem.headdim, BLOCK_M=block_m,
            BLOCK_D=max(16, triton.next_power_of_2(problem.headdim)),
            IS_PAGED=table is not None,
            HAS_BATCH_IDX=cache_row is not None,
            num_warps=4,
        )  # fmt: skip
