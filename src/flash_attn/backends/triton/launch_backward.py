"""Launching the backward kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.device import guard, side_stream
from ...core.outputs import softmax_d_shape
from ...core.problem import AttentionProblem, BackwardInputs
from ...kernels import backward as kernels
from .._launcher import Launcher, scratch
from .heuristics import dkdv_kernels, overlaps_backward, plan_for
from .launch import (
    Facts,
    compile_options,
    facts_of,
    lse_strides,
    mask_arguments,
    mask_is_wide,
    needs_wide_offsets,
    plan_key,
    row_strides,
    strides_are_eights,
    tiles_of,
)

attention_row_statistics = Launcher(kernels.attention_row_statistics)
attention_dkdv = Launcher(kernels.attention_dkdv)
attention_dq = Launcher(kernels.attention_dq)
attention_dmask = Launcher(kernels.attention_dmask)


def backward(problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
    """Write dq, dk, dv in place, honouring their strides; returns softmax_d."""
    shape, device = softmax_d_shape(problem), problem.q.device
    # Row statistics, each sequence padded to a multiple of 128 rows: delta and base-2 LSE.
    # Packed, nothing writes what lies between the sequences.
    allocate = torch.zeros if problem.is_varlen_q else torch.empty
    softmax_d = allocate(shape, dtype=torch.float32, device=device)
    lse_log2 = scratch(shape, torch.float32, device)
    lse = inputs.softmax_lse
    lse = lse if lse.stride(-1) == 1 or lse.shape[-1] == 1 else lse.contiguous()
    dlse = inputs.dlse
    if dlse is not None and (dlse.stride(-1) != 1 or dlse.dtype != torch.float32):
        dlse = dlse.to(torch.float32).contiguous()
    inputs = inputs._replace(softmax_lse=lse, dlse=dlse)
    with guard(problem.q):
        facts = facts_of(problem)
        _launch_row_statistics(problem, inputs, facts, softmax_d, lse_log2)
        common = _common_arguments(problem, inputs, facts)
        key = plan_key("dq", problem, facts)
        if problem.q.is_cuda and overlaps_backward(key, problem.max_seqlen_q):
            # Joined again before this returns, so the caller's stream orders everything.
            current, side = torch.cuda.current_stream(), side_stream(problem.q.device.index or 0)
            side.wait_stream(current)
            _launch_dk_and_dv(problem, inputs, facts, lse_log2, softmax_d, common)
            with torch.cuda.stream(side):
                _launch_dq(problem, inputs, facts, lse_log2, softmax_d, common)
            current.wait_stream(side)
        else:
            _launch_dk_and_dv(problem, inputs, facts, lse_log2, softmax_d, common)
            _launch_dq(problem, inputs, facts, lse_log2, softmax_d, common)
        if inputs.dmask is not None:
            _launch_dmask(problem, inputs, inputs.dmask, facts, lse_log2, softmax_d, common)
    return softmax_d


def _launch_row_statistics(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    facts: Facts,
    softmax_d: Tensor,
    lse_log2: Tensor,
) -> None:
    q, cu_seqlens_q = problem.q, problem.layout.cu_seqlens_q
    dlse = inputs.dlse
    tiles = tiles_of(q.shape[-3], problem.batch_size, problem.is_varlen_q, 128)
    batch_size = 1 if problem.is_varlen_q else problem.batch_size
    attention_row_statistics[(tiles * problem.nheads * batch_size,)](
        inputs.out, inputs.dout, inputs.softmax_lse, softmax_d, lse_log2,
        *row_strides(inputs.out), *row_strides(inputs.dout),
        *lse_strides(inputs.softmax_lse), *lse_strides(softmax_d),
        q if cu_seqlens_q is None else cu_seqlens_q,
        problem.batch_size, problem.nheads, q.shape[-3], tiles,
        problem.layout.seqused_q, dlse, *((None,) * 2 if dlse is None else lse_strides(dlse)),
        HEAD_DIM=problem.headdim_v,
        BLOCK_M=64 if facts.block_dv <= 32 else min(32, 8192 // facts.block_dv),
        BLOCK_D=facts.block_dv, IS_VARLEN=problem.is_varlen_q,
        num_warps=4,
    )  # fmt: skip


def _common_arguments(
    problem: AttentionProblem, inputs: BackwardInputs, facts: Facts
) -> dict[str, Any]:
    """Arguments that the main kernels share, by name."""
    layout, transform, q = problem.layout, problem.transform, problem.q
    slopes = transform.alibi_slopes
    mask, *mask_strides = mask_arguments(problem)
    named = ("stride_ab", "stride_ah", "stride_am", "stride_an", "mask_rows", "mask_keys")
    tensors = (q, problem.k, problem.v, inputs.dout, inputs.dq, inputs.dk, inputs.dv)
    return {
        "cu_seqlens_q": q if layout.cu_seqlens_q is None else layout.cu_seqlens_q,
        "cu_seqlens_k": q if layout.cu_seqlens_k is None else layout.cu_seqlens_k,
        "alibi_slopes": q if slopes is None else slopes,
        "rng_state": inputs.rng_state,
        "stride_slope": facts.stride_slope,
        "batch_size": problem.batch_size,
        "group": problem.nheads // problem.nheads_k,
        "seqlen_q": q.shape[-3],
        "seqlen_k": problem.k.shape[-3],
        "softmax_scale": transform.softmax_scale,
        "softcap": max(transform.softcap, 1e-20),
        "window_left": facts.window_left,
        "window_right": facts.window_right,
        "keep_threshold": facts.keep_threshold,
        "dropout_scale": facts.dropout_scale,
        "chunk": facts.chunk,
        "seqused_q": layout.seqused_q,
        "seqused_k": layout.seqused_k,
        "attn_mask": mask,
        **dict(zip(named, mask_strides, strict=True)),
        "BLOCK_D": facts.block_d,
        "BLOCK_DV": facts.block_dv,
        "IS_VARLEN_Q": problem.is_varlen_q,
        "IS_VARLEN_K": layout.cu_seqlens_k is not None,
        "WIDE": needs_wide_offsets(*tensors) or mask_is_wide(problem),
        "EIGHTS": strides_are_eights(*tensors),
        **facts.constexprs,
    }


def _launch_dk_and_dv(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    facts: Facts,
    lse_log2: Tensor,
    softmax_d: Tensor,
    common: dict[str, Any],
) -> None:
    for kernel in dkdv_kernels(plan_key("dkdv", problem, facts)):
        _launch_dkdv(kernel, problem, inputs, facts, lse_log2, softmax_d, common)


def _launch_dkdv(
    kernel: str,
    problem: AttentionProblem,
    inputs: BackwardInputs,
    facts: Facts,
    lse_log2: Tensor,
    softmax_d: Tensor,
    common: dict[str, Any],
) -> None:
    """``kernel``: "dkdv" for both, "dk" or "dv" for one of them."""
    plan = plan_for(plan_key(kernel, problem, facts))
    packed = problem.layout.cu_seqlens_k is not None
    tiles = tiles_of(problem.k.shape[-3], problem.batch_size, packed, plan.block_n)
    batch_size = 1 if packed else problem.batch_size
    attention_dkdv[(tiles * problem.nheads_k * batch_size,)](
        problem.q, problem.k, problem.v, inputs.dout, lse_log2, softmax_d,
        inputs.dk, inputs.dv,
        *row_strides(problem.q), *row_strides(problem.k), *row_strides(problem.v),
        *row_strides(inputs.dout), *row_strides(inputs.dk), *row_strides(inputs.dv),
        *lse_strides(softmax_d),
        nheads_k=problem.nheads_k, num_tiles=tiles,
        WITH_DK=kernel != "dv", WITH_DV=kernel != "dk",
        **common, **compile_options(plan),
    )  # fmt: skip


def _launch_dq(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    facts: Facts,
    lse_log2: Tensor,
    softmax_d: Tensor,
    common: dict[str, Any],
) -> None:
    plan = plan_for(plan_key("dq", problem, facts))
    tiles = tiles_of(problem.q.shape[-3], problem.batch_size, problem.is_varlen_q, plan.block_m)
    batch_size = 1 if problem.is_varlen_q else problem.batch_size
    attention_dq[(tiles * problem.nheads * batch_size,)](
        problem.q, problem.k, problem.v, inputs.dout, lse_log2, softmax_d, inputs.dq,
        *row_strides(problem.q), *row_strides(problem.k), *row_strides(problem.v),
        *row_strides(inputs.dout), *row_strides(inputs.dq),
        *lse_strides(softmax_d),
        nheads=problem.nheads, num_tiles=tiles,
        **common, **compile_options(plan),
    )  # fmt: skip


def _launch_dmask(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    dmask: Tensor,
    facts: Facts,
    lse_log2: Tensor,
    softmax_d: Tensor,
    common: dict[str, Any],
) -> None:
    """The gradient of the mask, one program for each tile of its own elements."""
    plan = plan_for(plan_key("dmask", problem, facts))
    batch_size, heads, rows, keys = dmask.shape
    tiles_m, tiles_n = -(-rows // plan.block_m), -(-keys // plan.block_n)
    attention_dmask[(batch_size * heads * tiles_m * tiles_n,)](
        problem.q, problem.k, problem.v, inputs.dout, lse_log2, softmax_d, dmask,
        *row_strides(problem.q), *row_strides(problem.k), *row_strides(problem.v),
        *row_strides(inputs.dout), *lse_strides(softmax_d), *dmask.stride(),
        nheads=problem.nheads, mask_batch=batch_size, mask_heads=heads,
        tiles_m=tiles_m, tiles_n=tiles_n, ONE_ROW=rows == 1, ONE_KEY=keys == 1,
        **common, **compile_options(plan),
    )  # fmt: skip
