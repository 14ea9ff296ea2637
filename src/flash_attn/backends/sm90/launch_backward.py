"""Launching the Hopper backward kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...core.device import guard
from ...core.outputs import round_multiple, softmax_d_shape
from ...core.problem import AttentionProblem, BackwardInputs, is_half
from ...kernels.sm90_backward import (
    attention_backward_sm90,
    finish_dq_sm90,
    row_statistics_sm90,
)
from .plans_backward import MAX_HEADDIM, MAX_HEADDIM_SOFTCAP, BackwardPlan, plan_backward

# What the kernels call PIECE and STRIP.
_BLOCK_N, _PIECE, _STRIP = 128, 128, 8
_LOG2E = 1.4426950408889634


class Workspace(NamedTuple):
    """What the kernels hand to each other.

    Attributes:
        lse_log2: (batch, nheads, padded rows) float32; ``delta`` likewise.
        dq_sums: (batch * nheads * padded rows * headdim / 64, 64) float32, the head dim padded.
        counters: (batch * (nheads + nheads_k),), deterministic: and dq_sums.shape[0] / 64; int32.
    """

    lse_log2: Tensor
    delta: Tensor
    dq_sums: Tensor
    counters: Tensor


def unsupported_backward(problem: AttentionProblem) -> list[str]:
    """Why :func:`backward` cannot serve the problem; empty if it can. The GPU is not looked at."""
    layout, transform, q = problem.layout, problem.transform, problem.q
    features = {
        "packed sequences": layout.cu_seqlens_q is not None or layout.cu_seqlens_k is not None,
        "seqused_k": layout.seqused_k is not None,
        "leftpad_k": layout.leftpad_k is not None,
        "pages": layout.page_table is not None,
        "cache_batch_idx": layout.cache_batch_idx is not None,
        "ALiBi": transform.alibi_slopes is not None,
        "dropout": problem.dropout_p > 0.0,
    }
    features.update(dict.fromkeys((n for n in problem.extensions() if n != "s_aux"), True))
    reasons = [
        f"computes no gradients with {name}" for name, is_used in features.items() if is_used
    ]
    if not is_half(q.dtype):
        reasons.append(f"computes gradients of float16 and bfloat16, `q` is {q.dtype}")
    if q.shape[-1] > MAX_HEADDIM or q.shape[-1] % 8:
        reasons.append(
            f"computes gradients for head dims up to {MAX_HEADDIM} that are multiples of 8, found "
            f"{q.shape[-1]}"
        )
    if transform.softcap > 0.0 and q.shape[-1] > MAX_HEADDIM_SOFTCAP:
        reasons.append(
            f"computes gradients with softcap for head dims up to {MAX_HEADDIM_SOFTCAP}, where "
            f"registers suffice, found {q.shape[-1]}"
        )
    if not transform.softmax_scale > 0.0:
        reasons.append(f"needs softmax_scale > 0, found {transform.softmax_scale}")
    return reasons


def backward(
    problem: AttentionProblem, inputs: BackwardInputs, plan: BackwardPlan | None = None
) -> Tensor:
    """Write dq, dk, dv in place, honouring their strides; returns softmax_d.

    Without a plan all three are bitwise repeatable.
    """
    if 0 in problem.q.shape or 0 in problem.k.shape:
        for grad in (inputs.dq, inputs.dk, inputs.dv):
            grad.zero_()
        shape = softmax_d_shape(problem)
        return torch.zeros(shape, dtype=torch.float32, device=problem.q.device)
    problem, inputs = _without_unseen_keys(problem, inputs)
    visibility = problem.visibility
    if plan is None:
        is_masked = visibility.window_left is not None or visibility.window_right is not None
        plan = plan_backward(problem.headdim, is_masked, problem.max_seqlen_q)
    if inputs.dlse is not None:
        plan = plan._replace(housekeeping=False)
    dk, dv = (x if is_for_tma(x) else torch.empty_like(x, memory_format=torch.contiguous_format)
              for x in (inputs.dk, inputs.dv))  # fmt: skip
    lse = inputs.softmax_lse
    direct = inputs._replace(
        dout=for_tma(inputs.dout),
        out=for_tma(inputs.out),
        softmax_lse=lse if lse.stride(-1) == 1 or lse.shape[-1] == 1 else lse.contiguous(),
        dq=inputs.dq if inputs.dq.stride(-1) == 1 else torch.empty_like(problem.q),
        dk=dk,
        dv=dv,
    )
    problem = problem._replace(q=for_tma(problem.q), k=for_tma(problem.k), v=for_tma(problem.v))
    workspace = allocate(problem, plan)
    with guard(problem.q):
        launch_statistics(problem, direct, workspace, plan)
        launch_main(problem, direct, workspace, plan)
        launch_finish(problem, direct, workspace, plan)
    for wanted, written in zip(inputs[3:6], direct[3:6], strict=True):
        if wanted is not written:
            wanted.copy_(written)
    return workspace.delta


def _without_unseen_keys(
    problem: AttentionProblem, inputs: BackwardInputs
) -> tuple[AttentionProblem, BackwardInputs]:
    """The same problem without the keys before every query's window, whose gradients are 0.

    They may be anything, also NaN, and the kernels multiply whole tiles.
    """
    left = problem.visibility.window_left
    unseen = problem.max_seqlen_k - problem.max_seqlen_q - left if left is not None else 0
    if unseen <= 0:
        return problem, inputs
    inputs.dk[:, :unseen].zero_()
    inputs.dv[:, :unseen].zero_()
    return (
        problem._replace(k=problem.k[:, unseen:], v=problem.v[:, unseen:]),
        inputs._replace(dk=inputs.dk[:, unseen:], dv=inputs.dv[:, unseen:]),
    )


def allocate(problem: AttentionProblem, plan: BackwardPlan) -> Workspace:
    """Uninitialised workspace on the device of q."""
    batch, seqlen_q, nheads, _ = problem.q.shape
    rows = round_multiple(seqlen_q, 128)
    device = problem.q.device
    lse_log2, delta = torch.empty((2, batch, nheads, rows), dtype=torch.float32, device=device)
    sums = (batch * nheads * rows * (plan.block_d // 64), 64)
    counters = batch * (nheads + problem.nheads_k)
    if plan.deterministic:
        counters += sums[0] // 64
    return Workspace(
        lse_log2,
        delta,
        torch.empty(sums, dtype=torch.float32, device=device),
        torch.empty(counters, dtype=torch.int32, device=device),
    )


class _Sharing(NamedTuple):
    """How the work is divided; see ``Duties`` of the kernels.

    Attributes:
        pieces: of all query heads.
        lag: pieces that the launch before prepares and the launch after finishes: all of them
            without housekeeping.
        section: key heads that are worked on at a time.
    """

    pieces: int
    lag: int
    section: int


def _sharing(problem: AttentionProblem, plan: BackwardPlan) -> _Sharing:
    batch, seqlen_q, nheads, headdim = problem.q.shape
    nheads_k, group = problem.nheads_k, nheads // problem.nheads_k
    bytes_of_head = group * seqlen_q * headdim * 8
    section = max(1, min(batch * nheads_k, plan.section_bytes // bytes_of_head))
    in_head = round_multiple(seqlen_q, 128) // 128
    pieces = batch * nheads * in_head
    if not plan.housekeeping:
        return _Sharing(pieces, pieces, section)
    key_blocks = -(-problem.k.shape[1] // _BLOCK_N)
    programs = section * key_blocks + plan.distance + 1
    return _Sharing(pieces, min(-(-programs * group * in_head // key_blocks), pieces), section)


def launch_statistics(
    problem: AttentionProblem, inputs: BackwardInputs, workspace: Workspace, plan: BackwardPlan
) -> None:
    """Row statistics, and zeros for the sums of dq, of the first pieces."""
    out, dout, lse, dlse = inputs.out, inputs.dout, inputs.softmax_lse, inputs.dlse
    _, seqlen_q, nheads, headdim = problem.q.shape
    rows = workspace.delta.shape[-1]
    tiles_in_piece = _PIECE // plan.statistics_rows
    row_statistics_sm90[(_sharing(problem, plan).lag * tiles_in_piece,)](
        out, dout, lse, lse if dlse is None else dlse.contiguous(),
        workspace.lse_log2, workspace.delta, workspace.dq_sums,
        workspace.counters, workspace.counters.numel(),
        *out.stride()[:3], *dout.stride()[:3], *lse.stride()[:2],
        nheads, seqlen_q, rows, rows // plan.statistics_rows,
        HEAD_DIM=headdim, BLOCK_D=plan.block_d, BLOCK_M=plan.statistics_rows,
        HAS_DLSE=dlse is not None,
        num_warps=4,
    )  # fmt: skip


def launch_main(
    problem: AttentionProblem, inputs: BackwardInputs, workspace: Workspace, plan: BackwardPlan
) -> None:
    """dk, dv, the sums of dq, and with housekeeping most of what comes before and after."""
    if plan.piece:
        from .launch_backward_wide import launch_main_wide  # which imports this module

        launch_main_wide(problem, inputs, workspace, plan)
        return
    q, k, v = problem.q, problem.k, problem.v
    batch, seqlen_q, nheads, headdim = q.shape
    seqlen_k, nheads_k = k.shape[1:3]
    group = nheads // nheads_k
    block_m, block_d = plan.block_m, plan.block_d
    left, right = problem.visibility.window_left, problem.visibility.window_right
    longest = seqlen_q + seqlen_k
    key_blocks = -(-seqlen_k // _BLOCK_N)
    sharing = _sharing(problem, plan)
    lse, dq = inputs.softmax_lse, inputs.dq
    strip = _STRIP if plan.housekeeping else block_m
    scale, softcap = problem.transform.softmax_scale, problem.transform.softcap
    factor = scale if softcap == 0.0 else 2.0 * scale / softcap
    attention_backward_sm90[(key_blocks * batch * nheads_k,)](
        rows_descriptor(q, block_m, block_d),
        rows_descriptor(k, _BLOCK_N, block_d),
        rows_descriptor(v, _BLOCK_N, block_d),
        rows_descriptor(inputs.dout, block_m, block_d),
        _numbers_descriptor(workspace.lse_log2, block_m),
        _numbers_descriptor(workspace.delta, block_m),
        _sums_descriptor(workspace.dq_sums, 64),
        rows_descriptor(inputs.dk, 64, block_d),
        rows_descriptor(inputs.dv, 64, block_d),
        scale, factor * _LOG2E,
        softcap * _LOG2E, nheads_k, group, seqlen_q, seqlen_k,
        workspace.delta.shape[-1],
        min(left, longest) if left is not None else 0,
        min(right, longest) if right is not None else 0,
        key_blocks, batch * nheads_k, sharing.section,
        rows_descriptor(inputs.out if plan.housekeeping else q, strip, block_d),
        rows_descriptor(inputs.dout, strip, block_d),
        _sums_descriptor(workspace.dq_sums, 16),
        workspace.counters, lse, workspace.lse_log2, workspace.delta, workspace.dq_sums, dq,
        *lse.stride()[:2], *dq.stride()[:3], sharing.lag,
        BLOCK_M=block_m, BLOCK_D=block_d, Q_SLOTS=plan.q_slots, DO_SLOTS=plan.do_slots,
        DS_SLOTS=plan.ds_slots, EAGER_DV=plan.eager_dv, AHEAD=plan.ahead, DQ_GROUP=plan.dq_group,
        REGISTERS=plan.registers, DQ_REGISTERS=plan.dq_registers,
        OTHER_REGISTERS=plan.other_registers, HOUSEKEEPING=plan.housekeeping,
        DETERMINISTIC=plan.deterministic, REVERSED=plan.is_reversed, SOFTCAP=softcap > 0.0,
        HEAD_DIM=headdim, HAS_LEFT=left is not None, HAS_RIGHT=right is not None,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


def launch_finish(
    problem: AttentionProblem, inputs: BackwardInputs, workspace: Workspace, plan: BackwardPlan
) -> None:
    """dq from its sums, of the last pieces."""
    dq = inputs.dq
    _, seqlen_q, nheads, headdim = dq.shape
    rows = workspace.delta.shape[-1]
    sharing = _sharing(problem, plan)
    finish_dq_sm90[(sharing.lag * (_PIECE // 64),)](
        workspace.dq_sums, dq, *dq.stride()[:3], problem.transform.softmax_scale,
        nheads, seqlen_q, rows, rows // 64, (sharing.pieces - sharing.lag) * (_PIECE // 64),
        HEAD_DIM=headdim, BLOCK_D=plan.block_d,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


def rows_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """(batch, seqlen, heads, headdim) as (batch, heads, seqlen, headdim) for TMA."""
    batch, seqlen, heads, headdim = x.shape
    sizes = (batch, heads, seqlen)
    given = (x.stride(0), x.stride(2), x.stride(1))
    # The stride of a dimension of size 1 means nothing, but TMA wants multiples of 16 bytes.
    strides = [s if n > 1 else 8 * headdim for s, n in zip(given, sizes, strict=True)]
    layout = gl.NVMMASharedLayout(128, 16, 4)
    return TensorDescriptor(x, [*sizes, headdim], [*strides, 1], [1, 1, rows, columns], layout)


def _numbers_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, [x.numel()], [1], [rows], gl.NVMMASharedLayout(0, 32, 1))


def _sums_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [64, 1], [rows, 64], gl.NVMMASharedLayout(0, 32, 2))


def is_for_tma(x: Tensor) -> bool:
    """Whether TMA can address ``x``: columns next to each other, all else at 16 bytes."""
    strides = [s for n, s in zip(x.shape[:-1], x.stride(), strict=False) if n > 1]
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)
    )


def for_tma(x: Tensor) -> Tensor:
    """``x``, copied if TMA cannot address it."""
    return x if is_for_tma(x) else x.contiguous()
