"""Launching the Hopper kernels: from a problem and a plan to TMA descriptors and arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...core import rng
from ...core.device import guard, multiprocessors_of
from ...core.outputs import empty_lse, empty_out, new_s_dmask
from ...core.problem import AttentionProblem, AttentionResult
from ...kernels.sm90_forward import attention_forward_sm90
from .plans import (
    ONE_TILE,
    ROWS,
    ForwardKey,
    ForwardPlan,
    forward_plan,
    heads_at_a_time,
    heads_in_sections,
    padded_headdim,
)

# Far beyond any length, yet far enough from 2**31 for sums of positions.
_NO_WINDOW = 2**29
_counters: dict[tuple[int, int], Tensor] = {}


def is_describable(x: Tensor) -> bool:
    """Whether TMA can describe ``x``: 16-byte steps between rows, heads and sequences."""
    steps = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    aligned = all(0 < step < 2**39 and step % 8 == 0 for step in steps)
    return aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The descriptor of (batch, seqlen, nheads, headdim) by blocks of (rows, columns) of a head."""
    batch, seqlen, nheads, headdim = x.shape
    # A dimension of extent 1 is never stepped over, but its step has to be a valid one.
    step_b, step_s, step_h = (
        step if size > 1 else 8 for step, size in zip(x.stride()[:3], x.shape[:3], strict=True)
    )
    return TensorDescriptor(
        x,
        [batch, nheads, seqlen, headdim],
        [step_b, step_h, step_s, 1],
        [1, 1, rows, columns],
        gl.NVMMASharedLayout(128, 16, 4),
    )


def counter_for(x: Tensor) -> Tensor:
    """One int32 that is 0 whenever a kernel of the current stream starts.

    Kernels set it back themselves, so the streams of a device need one each. A graph that is being
    captured may be replayed on any stream: it gets one of its own, set to 0 by the graph.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=x.device)
    key = (x.device.index, torch.cuda.current_stream(x.device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=x.device)
    return _counters[key]


def binding_window(problem: AttentionProblem) -> tuple[int | None, int | None]:
    """The problem's window without the bounds that hide nothing."""
    left, right = problem.visibility
    seqlen_q, seqlen_k = problem.q.shape[1], problem.k.shape[1]
    if left is not None and left >= seqlen_k - 1:
        left = None
    if right is not None and right >= seqlen_q - 1:
        right = None
    return left, right


def plan_for(problem: AttentionProblem) -> ForwardPlan:
    """The plan of a problem's forward pass."""
    left, right = binding_window(problem)
    masked = left is not None or right is not None
    block_d = padded_headdim(problem.headdim)
    return forward_plan(ForwardKey(block_d, masked, problem.k.shape[1], left is not None))


def forward(
    problem: AttentionProblem, out: Tensor | None = None, plan: ForwardPlan | None = None
) -> AttentionResult:
    """Solve ``problem``, which the backend supports, into ``out`` if it is given."""
    device = problem.q.device
    out = empty_out(problem) if out is None else out
    lse = empty_lse(problem)
    with guard(problem.q):
        if problem.q.numel() == 0 or problem.k.numel() == 0:
            out.zero_()
            lse.fill_(problem.empty_lse)
        elif is_describable(out):
            launch_forward(problem, plan or plan_for(problem), out, lse)
        else:
            rounded = -(-problem.headdim // 8) * 8
            target = out.new_empty((*out.shape[:-1], rounded))[..., : problem.headdim]
            launch_forward(problem, plan or plan_for(problem), target, lse)
            out.copy_(target)
    return AttentionResult(out, lse, new_s_dmask(problem), rng.unused_state(device))


def launch_forward(
    problem: AttentionProblem,
    plan: ForwardPlan,
    out: Tensor,
    lse: Tensor,
    trace: Tensor | None = None,
) -> None:
    """The kernel alone: ``out`` describable, ``lse`` contiguous, neither queries nor keys empty."""
    q, k, v = problem.q, problem.k, problem.v
    batch, seqlen_q, nheads, headdim = q.shape
    seqlen_k = k.shape[1]
    group = nheads // problem.nheads_k
    block_d = padded_headdim(headdim)
    out_columns = plan.out_columns(block_d)
    left, right = binding_window(problem)
    row_tiles = -(-seqlen_q // plan.block_m)
    sequences = batch * nheads
    section = min(heads_at_a_time(plan, seqlen_k, headdim, group), sequences)
    tiles = row_tiles * sequences
    programs = tiles
    if plan.paired:
        programs = (row_tiles + 1) // 2 * sequences
        tiles = 2 * programs
        programs = min(programs, multiprocessors_of(q.device.index or 0))
    elif plan.scheduler != ONE_TILE:
        programs = min(tiles, multiprocessors_of(q.device.index or 0))
    attention_forward_sm90[(programs,)](
        describe(q, ROWS, block_d),
        describe(k, plan.block_n, block_d),
        describe(v, plan.block_n, block_d),
        describe(out, ROWS, out_columns or block_d),
        lse,
        counter_for(q),
        lse if trace is None else trace,
        problem.transform.softmax_scale * math.log2(math.e),
        problem.empty_lse,
        nheads,
        group,
        seqlen_q,
        seqlen_k,
        _NO_WINDOW if left is None else min(left, _NO_WINDOW),
        _NO_WINDOW if right is None else min(right, _NO_WINDOW),
        row_tiles,
        sequences,
        section,
        heads_in_sections(plan, seqlen_k, headdim, group, sequences),
        tiles,
        TRACE=trace is not None,
        **constants(plan, block_d, left is not None, right is not None),
    )


def constants(plan: ForwardPlan, block_d: int, has_left: bool, has_right: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments and options."""
    return {
        "BLOCK_N": plan.block_n,
        "BLOCK_D": block_d,
        "CONSUMERS": plan.consumers,
        "STAGES": plan.stages,
        "Q_SLOTS": plan.q_slots,
        "OUT_COLUMNS": plan.out_columns(block_d),
        "SCHEDULER": plan.scheduler,
        "EARLY": plan.early,
        "PING_PONG": plan.ping_pong,
        "SKIP": plan.skip,
        "REGISTERS": plan.registers,
        "PAIRED": plan.paired,
        "SLIM": plan.slim,
        "LATE": plan.late,
        "TREE": plan.tree,
        "HAS_LEFT": has_left,
        "HAS_RIGHT": has_right,
        "num_warps": 4,
    }
