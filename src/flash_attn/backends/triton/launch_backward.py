"""Launching the backward kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...core.device import guard
from ...core.outputs import softmax_d_shape
from ...core.problem import AttentionProblem, BackwardInputs
from ...kernels.backward import attention_delta, attention_dkdv, attention_dq
from .heuristics import plan_for
from .launch import (
    Facts,
    compile_options,
    facts_of,
    lse_strides,
    needs_wide_offsets,
    plan_key,
    row_strides,
    tiles_of,
)


def backward(problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
    """Write dq, dk, dv in place, honouring their strides; returns softmax_d."""
    softmax_d = torch.empty(softmax_d_shape(problem), dtype=torch.float32, device=problem.q.device)
    lse = inputs.softmax_lse
    lse = lse if lse.stride(-1) == 1 or lse.shape[-1] == 1 else lse.contiguous()
    inputs = inputs._replace(softmax_lse=lse)
    with guard(problem.q):
        facts = facts_of(problem)
        _launch_delta(problem, inputs, facts, softmax_d)
        common = _common_arguments(problem, inputs, softmax_d, facts)
        _launch_dkdv(problem, inputs, facts, softmax_d, common)
        _launch_dq(problem, inputs, facts, softmax_d, common)
    return softmax_d


def _launch_delta(
    problem: AttentionProblem, inputs: BackwardInputs, facts: Facts, softmax_d: Tensor
) -> None:
    block_m = 64 if facts.block_d <= 128 else 32
    padded = softmax_d.shape[-1]
    tiles = triton.cdiv(padded, block_m)
    batch_size = 1 if problem.is_varlen_q else problem.batch_size
    attention_delta[(tiles * problem.nheads * batch_size,)](
        inputs.out, inputs.dout, softmax_d,
        *row_strides(inputs.out), *row_strides(inputs.dout), *lse_strides(softmax_d),
        problem.nheads, problem.q.shape[-3], padded, tiles,
        HEAD_DIM=problem.headdim, BLOCK_M=block_m, BLOCK_D=facts.block_d,
        num_warps=4,
    )  # fmt: skip


def _common_arguments(
    problem: AttentionProblem, inputs: BackwardInputs, softmax_d: Tensor, facts: Facts
) -> dict[str, Any]:
    """Arguments that both main kernels take, by name."""
    layout, transform, q = problem.layout, problem.transform, problem.q
    slopes = transform.alibi_slopes
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
        "BLOCK_D": facts.block_d,
        "IS_VARLEN": problem.is_varlen_q,
        "WIDE": needs_wide_offsets(*tensors),
        **facts.constexprs,
    }


def _launch_dkdv(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    facts: Facts,
    softmax_d: Tensor,
    common: dict[str, Any],
) -> None:
    plan = plan_for(plan_key("dkdv", problem, facts))
    tiles = tiles_of(problem.k.shape[-3], problem.batch_size, problem.is_varlen_q, plan.block_n)
    batch_size = 1 if problem.is_varlen_q else problem.batch_size
    attention_dkdv[(tiles * problem.nheads_k * batch_size,)](
        problem.q, problem.k, problem.v, inputs.dout, inputs.softmax_lse, softmax_d,
        inputs.dk, inputs.dv,
        *row_strides(problem.q), *row_strides(problem.k), *row_strides(problem.v),
        *row_strides(inputs.dout), *row_strides(inputs.dk), *row_strides(inputs.dv),
        *lse_strides(inputs.softmax_lse), *lse_strides(softmax_d),
        nheads_k=problem.nheads_k, num_tiles=tiles,
        **common, **compile_options(plan),
    )  # fmt: skip


def _launch_dq(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    facts: Facts,
    softmax_d: Tensor,
    common: dict[str, Any],
) -> None:
    plan = plan_for(plan_key("dq", problem, facts))
    tiles = tiles_of(problem.q.shape[-3], problem.batch_size, problem.is_varlen_q, plan.block_m)
    batch_size = 1 if problem.is_varlen_q else problem.batch_size
    attention_dq[(tiles * problem.nheads * batch_size,)](
        problem.q, problem.k, problem.v, inputs.dout, inputs.softmax_lse, softmax_d, inputs.dq,
        *row_strides(problem.q), *row_strides(problem.k), *row_strides(problem.v),
        *row_strides(inputs.dout), *row_strides(inputs.dq),
        *lse_strides(inputs.softmax_lse), *lse_strides(softmax_d),
        nheads=problem.nheads, num_tiles=tiles,
        **common, **compile_options(plan),
    )  # fmt: skip
