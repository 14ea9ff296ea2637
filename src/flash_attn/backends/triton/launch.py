"""Launching the forward kernels: from a problem and a plan to kernel arguments."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...core import rng
from ...core.device import arch_of, guard, multiprocessors_of
from ...core.outputs import empty_lse, empty_out, new_s_dmask
from ...core.plan import PlanKey, TilePlan
from ...core.problem import AttentionProblem, AttentionResult, is_float8
from ...kernels import backward as backward_kernels
from ...kernels import combine as combine_kernels
from ...kernels import common, kv_append, rotary
from ...kernels import forward as forward_kernels
from ...kernels import softmax_debug as debug_kernels
from .._compiled import look_up_first
from .._launcher import Launcher, scratch, settle_keys
from .extended_plans import converts_float8_ahead, float8_product, float8_weights
from .heuristics import plan_for

# Of all kernels that attend: whoever launches one imports this module.
settle_keys(
    common, forward_kernels, backward_kernels, combine_kernels, debug_kernels, kv_append, rotary
)
attention_forward = Launcher(forward_kernels.attention_forward)
attention_combine = Launcher(combine_kernels.attention_combine)
softmax_debug = look_up_first(debug_kernels.softmax_debug)

_major, _minor = triton.__version__.split(".")[:2]
_TRITON = (int(_major), int(_minor))
_FEW_ROWS = 16
# Far beyond any length, yet far enough from 2**31 for sums of positions.
_NO_LIMIT = 2**29


class Facts(NamedTuple):
    """What all kernels of a problem need besides tensors; constexprs by their kernel names."""

    block_d: int
    block_dv: int
    constexprs: dict[str, Any]
    window_left: int
    window_right: int
    chunk: int | None
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


def alignment_of(*tensors: Tensor) -> int:
    """The largest power of two, up to 16, that divides all strides, last ones aside."""
    return math.gcd(16, *(x for tensor in tensors for x in tensor.stride()[:-1]))


def strides_are_eights(*tensors: Tensor) -> bool:
    """Whether all strides, last ones aside, are multiples of 8 and some are not of 16.

    Of multiples of 16 Triton knows by itself; those of 8 make a difference (16 bytes at a time) and
    are announced for a whole launch, so that there are at most twice as many kernels.
    """
    return alignment_of(*tensors) == 8


def needs_wide_offsets(*tensors: Tensor) -> bool:
    """Whether offsets of rows within a sequence, a page or a tile can exceed 31 bits."""
    return any(abs(row_strides(x)[1]) * max(x.shape[-3], 256) >= 2**31 for x in tensors)


def facts_of(problem: AttentionProblem) -> Facts:
    """Features and scalars shared by the forward and backward kernels."""
    (left, right, chunk), transform = problem.visibility, problem.transform
    slopes = transform.alibi_slopes
    dropout = problem.dropout_p > 0.0
    constexprs = {
        "HEAD_DIM": problem.headdim,
        "HEAD_DIM_V": problem.headdim_v,
        # A chunk ends on both sides.
        "HAS_LEFT": left is not None or chunk > 0,
        "HAS_RIGHT": right is not None or chunk > 0,
        "HAS_SOFTCAP": transform.softcap > 0.0,
        "HAS_ALIBI": slopes is not None,
        "HAS_DROPOUT": dropout,
        "PRECISION": "ieee" if problem.q.dtype == torch.float32 else "tf32",
    }
    # Products of float8 are at least 32 long.
    least = 32 if problem.q.element_size() == 1 else 16
    block_d = max(least, triton.next_power_of_2(problem.headdim))
    block_dv = max(least, triton.next_power_of_2(problem.headdim_v))
    # Narrower tiles of v would have another swizzle than those of k, up to 64 columns. Where both
    # take turns in the same shared memory, the assembler of CUDA 12.8 (Triton 3.6, Hopper) loses
    # the address of v's second product: it reads an undefined register.
    block_dv = max(block_dv, min(block_d, 64))
    return Facts(
        block_d,
        block_dv,
        constexprs,
        min(_NO_LIMIT if left is None else left, _NO_LIMIT),
        min(_NO_LIMIT if right is None else right, _NO_LIMIT),
        chunk or None,
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        rng.keep_threshold(problem.dropout_p) if dropout else 0,
        1.0 / (1.0 - problem.dropout_p),
    )


def plan_key(kernel: str, problem: AttentionProblem, facts: Facts, rows: int = 0) -> PlanKey:
    """The facts that the plan of ``kernel`` may depend on; ``rows``: of a sequence, where heads
    are packed into them."""
    named = facts.constexprs
    rows = rows or (0 if problem.is_varlen_q else problem.q.shape[1])
    return PlanKey(
        kernel,
        arch_of(problem.q.device.index or 0) if problem.q.is_cuda else "interpreter",
        _TRITON,
        problem.q.element_size(),
        facts.block_d,
        named["HAS_LEFT"] or named["HAS_RIGHT"],
        named["HAS_SOFTCAP"] or named["HAS_ALIBI"] or named["HAS_DROPOUT"] or problem.is_paged,
        0 < rows <= _FEW_ROWS,
        facts.block_dv,
        problem.qv is not None,
        named["HAS_LEFT"],
        problem.headdim < facts.block_d,
        problem.transform.attn_mask is not None,
        problem.is_varlen_q or problem.layout.cu_seqlens_k is not None,
        alignment_of(problem.q, problem.k, problem.v),
    )


def packs_heads(problem: AttentionProblem, plan: TilePlan) -> bool:
    """Whether the heads that share keys lie in one tile: if all rows of a sequence then fit in it.

    Dropout's bits and descales by query head are laid out for one head a tile.
    """
    group = problem.nheads // problem.nheads_k
    q_descale = problem.transform.q_descale
    by_head = q_descale is not None and q_descale.shape[1] != problem.nheads_k
    if group == 1 or group > plan.block_m or problem.dropout_p > 0.0 or by_head:
        return False
    if problem.pack_gqa is not None:
        return problem.pack_gqa
    return 0 < problem.max_seqlen_q * group <= plan.block_m


def compile_options(plan: TilePlan) -> dict[str, int]:
    """Tile sizes and compiler options as launch keywords."""
    options = {
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
    if plan.max_registers is not None:
        options["maxnreg"] = plan.max_registers
    return options


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


def mask_arguments(problem: AttentionProblem) -> tuple[Any, ...]:
    """The mask, its four strides and its sizes in rows and keys, as all kernels take them.

    Where rows or keys are broadcast, their stride and size are None.
    """
    mask = problem.transform.attn_mask
    if mask is None:
        return (None,) * 7
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    sizes, strides = mask.shape, mask.stride()
    outer = (0 if sizes[dim] == 1 else strides[dim] for dim in (0, 1))
    inner = (None if sizes[dim] == 1 else strides[dim] for dim in (2, 3))
    return (mask, *outer, *inner, *(None if size == 1 else size for size in sizes[2:]))


def mask_is_wide(problem: AttentionProblem) -> bool:
    """Whether offsets within one head of the mask can exceed 31 bits."""
    mask = problem.transform.attn_mask
    if mask is None:
        return False
    return sum(abs(mask.stride(dim)) * mask.shape[dim] for dim in (2, 3)) >= 2**31


def _descale_arguments(problem: AttentionProblem) -> tuple[Any, ...]:
    """The descales with their strides; q's also with the number of query heads that share one."""
    transform = problem.transform
    found: list[Any] = []
    for x in (transform.q_descale, transform.k_descale, transform.v_descale):
        found += [None] * 3 if x is None else [x, x.stride(0), x.stride(1)]
    q_descale = transform.q_descale
    found.insert(3, None if q_descale is None else problem.nheads // q_descale.shape[1])
    return tuple(found)


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


def float8_operands(problem: AttentionProblem) -> AttentionProblem:
    """The same problem on the tensors that the kernels take for float8 ones.

    Where there are many rows for each key, float8 that the kernels would convert in every tile is
    converted beforehand, exactly, to float16: the values always, since their product needs them
    transposed; queries and keys where the tensor cores do not multiply float8. Else bytes stand for
    float8 on the latter.
    """
    if not is_float8(problem.q.dtype):
        return problem
    key = plan_key("forward", problem, facts_of(problem))
    native = float8_product(key)
    q, k, v, qv = problem.q, problem.k, problem.v, problem.qv
    group = problem.nheads // problem.nheads_k
    rows = problem.q.shape[0] // max(1, problem.batch_size)
    rows = group * (rows if problem.is_varlen_q else problem.q.shape[1])
    if converts_float8_ahead(key, rows) and not problem.is_paged and not float8_weights(key):
        v, qv = v.to(torch.float16), None if qv is None else qv.to(torch.float16)
        if not native:
            q, k = q.to(torch.float16), k.to(torch.float16)
    elif not native:
        q, k, v = (x.view(torch.uint8) for x in (q, k, v))
        qv = None if qv is None else qv.view(torch.uint8)
    return problem._replace(q=q, k=k, v=v, qv=qv)


class ForwardPlan(NamedTuple):
    """How a forward pass is cut: its tile, whether heads are packed, tiles a head, programs."""

    tile: TilePlan
    pack_gqa: bool
    tiles: int
    programs: int


def _plan_forward(problem: AttentionProblem, facts: Facts) -> ForwardPlan:
    group = problem.nheads // problem.nheads_k
    tile, pack_gqa = plan_for(plan_key("forward", problem, facts)), False
    rows, heads = tile.block_m, problem.nheads
    if group > 1:
        largest = plan_for(plan_key("forward", problem, facts, _FEW_ROWS + 1))
        pack_gqa = packs_heads(problem, largest)
    if pack_gqa:
        # A tile for few rows is chosen by the number of rows with the heads in them.
        tile = plan_for(plan_key("forward", problem, facts, problem.max_seqlen_q * group))
        rows, heads = tile.block_m // group, problem.nheads_k
    tiles = tiles_of(problem.q.shape[-3], problem.batch_size, problem.is_varlen_q, rows)
    programs = tiles * heads * (1 if problem.is_varlen_q else problem.batch_size)
    return ForwardPlan(tile, pack_gqa, tiles, programs)


def forward(problem: AttentionProblem, out: Tensor | None) -> AttentionResult:
    """Solve ``problem`` on its GPU, into ``out`` if it is given."""
    device = problem.q.device
    dropout = problem.dropout_p > 0.0
    out = empty_out(problem) if out is None else out
    lse = empty_lse(problem)
    with guard(problem.q):
        rng_state = rng.new_state(device) if dropout else rng.placeholder_state(device)
        problem = float8_operands(problem)
        facts = facts_of(problem)
        plan = _plan_forward(problem, facts)
        splits = choose_splits(problem, plan.programs, plan.tile)
        if splits == 1:
            _launch_forward(problem, facts, plan, rng_state, out, lse, 1)
        else:
            _forward_split(problem, facts, plan, rng_state, out, lse, splits)
        s_dmask = new_s_dmask(problem)
        if s_dmask.numel():
            _launch_softmax_debug(problem, facts, rng_state, s_dmask)
    return AttentionResult(out, lse, s_dmask, rng_state)


def _launch_forward(
    problem: AttentionProblem,
    facts: Facts,
    plan: ForwardPlan,
    rng_state: Tensor,
    out: Tensor,
    lse: Tensor,
    splits: int,
) -> None:
    q, k, v, layout, transform = (
        problem.q, problem.k, problem.v, problem.layout, problem.transform,
    )  # fmt: skip
    qv, sinks = problem.qv, transform.sinks
    table, packed_k = layout.page_table, layout.cu_seqlens_k is not None
    named = facts.constexprs
    split = splits > 1
    # Partial results carry a leading dimension of splits and say -inf where they saw nothing.
    stride_os, stride_ls = (out.stride(0), lse.stride(0)) if split else (0, 0)
    one_out, one_lse = (out[0], lse[0]) if split else (out, lse)
    simple = not (named["HAS_SOFTCAP"] or named["HAS_ALIBI"])
    # With descales, the queries take the sign of the scale, which may be next to 0.
    descales = _descale_arguments(problem)
    signed = qv is None and any(x is not None for x in descales)
    if signed or q.element_size() == 1 or transform.softmax_scale < 1e-6:
        # No sums that start from the mask: float8 ones have too few bits, the others overflow.
        simple = simple and transform.attn_mask is None
    inputs = (q, k, v) if qv is None else (q, k, v, qv)
    float8_p = is_float8(v.dtype) and float8_weights(plan_key("forward", problem, facts))
    attention_forward[(plan.programs * splits,)](
        q, k, v, out, lse,
        *row_strides(q), *row_strides(k), *row_strides(v),
        stride_os, *row_strides(one_out),
        stride_ls, *lse_strides(one_lse),
        *_table_arguments(problem), rng_state,
        0 if table is None else table.stride(0), facts.stride_slope,
        problem.batch_size, problem.nheads, problem.nheads // problem.nheads_k,
        q.shape[-3],
        k.shape[0] if k.dim() == 3 else problem.max_seqlen_k,
        plan.tiles, splits,
        k.shape[1] if table is not None else 1,
        k.shape[0],
        transform.softmax_scale, max(transform.softcap, 1e-20),
        facts.window_left, facts.window_right, facts.keep_threshold, facts.dropout_scale,
        float("-inf") if split else empty_row_lse(problem),
        facts.chunk, layout.seqused_q, None if split else sinks,
        None if layout.cache_batch_idx is None else (k if table is None else table).shape[0],
        qv, *((None,) * 3 if qv is None else row_strides(qv)),
        *mask_arguments(problem), *descales,
        BLOCK_D=facts.block_d,
        BLOCK_DV=facts.block_dv,
        IS_VARLEN_Q=problem.is_varlen_q,
        IS_VARLEN_K=packed_k,
        IS_PAGED=table is not None,
        HAS_SEQUSED=layout.seqused_k is not None,
        HAS_LEFTPAD=layout.leftpad_k is not None,
        HAS_BATCH_IDX=layout.cache_batch_idx is not None,
        SPLIT=split,
        FOLD_SCALE=simple and (signed or transform.softmax_scale > 0.0),
        PACK_GQA=plan.pack_gqa,
        FLOAT8_P=float8_p,
        WIDE=needs_wide_offsets(*inputs, one_out) or mask_is_wide(problem),
        EIGHTS=strides_are_eights(*inputs, out),
        **named,
        **compile_options(plan.tile),
    )  # fmt: skip


def empty_row_lse(problem: AttentionProblem) -> float:
    """The log-sum-exp of a row without keys, and of one whose sink is -inf."""
    return problem.empty_lse if problem.transform.sinks is None else float("-inf")


def _forward_split(
    problem: AttentionProblem,
    facts: Facts,
    plan: ForwardPlan,
    rng_state: Tensor,
    out: Tensor,
    lse: Tensor,
    splits: int,
) -> None:
    """Partial results in float32, then their merge."""
    partial_out = scratch((splits, *out.shape), torch.float32, out.device)
    partial_lse = scratch((splits, *lse.shape), torch.float32, lse.device)
    _launch_forward(problem, facts, plan, rng_state, partial_out, partial_lse, splits)
    rows = problem.q.shape[-3]
    block_m = 16 if facts.block_dv <= 256 else 8
    row_tiles = triton.cdiv(rows, block_m)
    batch_size = 1 if problem.is_varlen_q else problem.batch_size
    attention_combine[(row_tiles * problem.nheads * batch_size,)](
        partial_out, partial_lse, out, lse,
        partial_out.stride(0), *row_strides(partial_out[0]),
        partial_lse.stride(0), *lse_strides(partial_lse[0]),
        *row_strides(out), *lse_strides(lse),
        problem.nheads, rows, row_tiles, splits, empty_row_lse(problem), problem.transform.sinks,
        HEAD_DIM=problem.headdim_v, BLOCK_M=block_m, BLOCK_D=facts.block_dv,
        num_warps=4,
    )  # fmt: skip


def _launch_softmax_debug(
    problem: AttentionProblem, facts: Facts, rng_state: Tensor, s_dmask: Tensor
) -> None:
    q, k, v, qv, layout = problem.q, problem.k, problem.v, problem.qv, problem.layout
    named = {key: value for key, value in facts.constexprs.items()
             if key not in ("HAS_SOFTCAP", "HAS_DROPOUT")}  # fmt: skip
    block = 32
    tiles = tiles_of(q.shape[-3], problem.batch_size, problem.is_varlen_q, block)
    programs = tiles * problem.nheads * (1 if problem.is_varlen_q else problem.batch_size)
    slopes = problem.transform.alibi_slopes
    second = (None,) * 8 if qv is None else (v, *row_strides(v), qv, *row_strides(qv))
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
        facts.chunk, layout.seqused_q, layout.seqused_k,
        *second, *mask_arguments(problem),
        BLOCK_M=block, BLOCK_N=block, BLOCK_D=facts.block_d, BLOCK_DV=facts.block_dv,
        IS_VARLEN_Q=problem.is_varlen_q,
        IS_VARLEN_K=layout.cu_seqlens_k is not None,
        num_warps=4,
        **named,
    )  # fmt: skip
