"""Launching the Hopper kernels: from a problem and a plan to TMA descriptors and arguments."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...core import rng
from ...core.device import guard, multiprocessors_of
from ...core.outputs import empty_lse, empty_out, new_s_dmask
from ...core.plan import report
from ...core.problem import AttentionProblem, AttentionResult
from ...kernels import sm90_forward
from .._launcher import Launcher, counter_for
from .plans import (
    DYNAMIC,
    MAX_HEADDIM,
    ROWS,
    ForwardKey,
    ForwardPlan,
    Grid,
    forward_plan,
    heads_at_a_time,
    heads_in_sections,
    lengths_plan,
    masks_first_block_alone,
    packed_heads,
    padded_headdim,
    piece_columns,
    with_two_rings,
)

# Far beyond any length, yet far enough from 2**31 for sums of positions.
_NO_WINDOW = 2**29
# Where the sequences' lengths come from, as in kernels.sm90_forward.
SHAPES, USED, PACKED = range(3)
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# By the bytes of a row; made once, because every descriptor of a first call takes one.
_LAYOUTS = {width: gl.NVMMASharedLayout(width, 16, 4) for width in (64, 128)}

attention_forward_sm90 = Launcher(sm90_forward.attention_forward_sm90)


def is_describable(x: Tensor) -> bool:
    """Whether TMA can describe ``x``: 16-byte steps between rows, heads and sequences."""
    steps = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    aligned = all(0 < step < 2**39 and step % 8 == 0 for step in steps)
    return aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def describe(x: Tensor, rows: int, columns: int, heads: int = 1) -> TensorDescriptor:
    """The descriptor of (batch, seqlen, nheads, headdim) by blocks of (heads, rows, columns)."""
    # Packed: one long sequence.
    one = (1,) * (4 - x.dim())
    batch, seqlen, nheads, headdim = shape = (*one, *x.shape)
    # A dimension of extent 1 is never stepped over, but its step has to be a valid one.
    step_b, step_s, step_h = (
        step if size > 1 else 8
        for step, size in zip((*one, *x.stride())[:3], shape[:3], strict=True)
    )
    return TensorDescriptor(
        x,
        [batch, nheads, seqlen, headdim],
        [step_b, step_h, step_s, 1],
        [1, heads, rows, columns],
        _LAYOUTS[min(2 * columns, 128)],
    )


def columns_of(problem: AttentionProblem) -> tuple[int, int]:
    """Columns of the tiles of q and k, and of those of v.

    The compiler of Triton 3.9 runs out of registers for tiles in pieces, with windows and with
    packed sequences: there they are padded to a power of two, which costs less than spilling.
    """
    block_d, block_dv = padded_headdim(problem.headdim), padded_headdim(problem.headdim_v)
    if _TRITON > (3, 6):
        return triton.next_power_of_2(block_d), triton.next_power_of_2(block_dv)
    return block_d, block_dv


def binding_window(problem: AttentionProblem) -> tuple[int | None, int | None]:
    """The problem's window without the bounds that hide nothing; chunks are bounds too."""
    left, right, chunk = problem.visibility
    seqlen_q, seqlen_k = problem.q.shape[-3], problem.k.shape[-3]
    if left is not None and left >= seqlen_k - 1:
        left = None
    if right is not None and right >= seqlen_q - 1:
        right = None
    widest = max(columns_of(problem))
    # At the largest head dim the compiler of Triton 3.9 runs out of registers for packed sequences
    # unless both bounds are there.
    if chunk or (problem.is_varlen_q and widest == MAX_HEADDIM):
        left = _NO_WINDOW if left is None else left
        right = _NO_WINDOW if right is None else right
    return left, right


def lengths_of(problem: AttentionProblem) -> int:
    """Where the kernel finds the sequences' lengths."""
    layout = problem.layout
    if layout.cu_seqlens_q is not None:
        return PACKED
    used = layout.seqused_q is not None or layout.seqused_k is not None
    return USED if used else SHAPES


def register_reasons(problem: AttentionProblem) -> list[str]:
    """What is not served because the compiler runs out of registers."""
    widest = max(problem.headdim, problem.headdim_v)
    has_alibi = problem.transform.alibi_slopes is not None
    has_softcap = problem.transform.softcap > 0.0
    reasons = []
    if has_alibi and has_softcap and widest > 64:
        reasons.append(f"serves ALiBi with softcap at head dims up to 64, found {widest}")
    has_left = problem.visibility.window_left is not None or problem.visibility.attention_chunk > 0
    if has_left and has_softcap and widest > 192:
        reasons.append(f"serves softcap with a left bound at head dims up to 192, found {widest}")
    if lengths_of(problem) != SHAPES:
        where = "with cu_seqlens or seqused"
    elif _TRITON > (3, 6):
        where = f"with Triton {triton.__version__}"
    else:
        return reasons
    features = {
        "attention_chunk": problem.visibility.attention_chunk > 0,
        "softcap": has_softcap,
        "ALiBi": has_alibi,
    }
    return reasons + [
        f"serves {name} {where} at head dims up to 128, found {widest}"
        for name, used in features.items()
        if used and widest > 128
    ]


def plan_for(problem: AttentionProblem) -> ForwardPlan:
    """The plan of a problem's forward pass."""
    left, right = binding_window(problem)
    block_d, block_dv = columns_of(problem)
    width = max(block_d, block_dv)
    has_softcap = problem.transform.softcap > 0.0
    if problem.transform.alibi_slopes is not None or (has_softcap and left is not None):
        return lengths_plan(width, sparing=True)
    if lengths_of(problem) != SHAPES:
        plan = lengths_plan(width)
        has_left = left is not None and (left < _NO_WINDOW or problem.visibility.attention_chunk)
        spills = plan.consumers == 4 and _TRITON > (3, 6)
        spills |= plan.consumers > 2 and pack_of(problem, plan) > 1
        return lengths_plan(width, sparing=bool(has_left or has_softcap or spills))
    masked = left is not None or right is not None
    grid = Grid(
        problem.q.shape[-3], problem.batch_size * problem.nheads, multiprocessors_for(problem)
    )
    plan = forward_plan(ForwardKey(width, masked, problem.max_seqlen_k, left is not None, grid))
    plan = with_two_rings(plan) if block_d != block_dv else plan
    return within_registers(plan, left is not None, has_softcap)


def within_registers(plan: ForwardPlan, has_left: bool, has_softcap: bool) -> ForwardPlan:
    """``plan``, or one that the compiler has registers for.

    There are none for ``overlap`` and ``joint`` with softcap. For four consumers that of Triton 3.9
    has none for ``overlap`` either, nor for a left bound.
    """
    is_tight = plan.consumers == 4 and _TRITON > (3, 6)
    if is_tight and has_left:
        return lengths_plan(64, sparing=True)
    plan = replace(plan, overlap=False) if is_tight or has_softcap else plan
    return with_two_rings(plan) if has_softcap else plan


def multiprocessors_for(problem: AttentionProblem) -> int:
    """How many multiprocessors may work on the problem."""
    return max(multiprocessors_of(problem.q.device.index or 0) - problem.sm_margin, 1)


def fill_empty(problem: AttentionProblem, out: Tensor, lse: Tensor) -> None:
    """The results of rows that see no key."""
    out.zero_()
    sinks = problem.transform.sinks
    if sinks is None:
        lse.fill_(problem.empty_lse)
    else:
        lse.copy_(sinks[:, None].expand_as(lse))


def forward(
    problem: AttentionProblem, out: Tensor | None = None, plan: ForwardPlan | None = None
) -> AttentionResult:
    """Solve ``problem``, which the backend supports, into ``out`` if it is given."""
    device = problem.q.device
    out = empty_out(problem) if out is None else out
    lse = empty_lse(problem)
    with guard(problem.q):
        if problem.q.numel() == 0 or problem.k.numel() == 0 or problem.v.numel() == 0:
            fill_empty(problem, out, lse)
        else:
            plan = plan or plan_for(problem)
            report(("sm90 forward", *problem.q.shape, *problem.k.shape, problem.visibility), plan)
            if is_describable(out):
                launch_forward(problem, plan, out, lse)
            else:
                target = out.new_empty(out.shape)
                launch_forward(problem, plan, target, lse)
                out.copy_(target)
    return AttentionResult(out, lse, new_s_dmask(problem), rng.placeholder_state(device))


def launch_forward(
    problem: AttentionProblem,
    plan: ForwardPlan,
    out: Tensor,
    lse: Tensor,
    trace: Tensor | None = None,
) -> None:
    """The kernel alone: ``out`` describable, ``lse`` contiguous, neither queries nor keys empty."""
    q, k, v, layout, transform = problem.q, problem.k, problem.v, problem.layout, problem.transform
    pack = pack_of(problem, plan)
    group = problem.nheads // problem.nheads_k // pack
    block_d, block_dv = columns_of(problem)
    left, right = binding_window(problem)
    lengths = lengths_of(problem)
    row_tiles, sequences = tiles_of(problem, plan, pack)
    width = (problem.headdim + problem.headdim_v) // 2
    section = min(heads_at_a_time(plan, problem.max_seqlen_k, width, group), sequences)
    tiles = row_tiles * sequences
    peel = (
        plan.peel
        and lengths == SHAPES
        and masks_first_block_alone(plan, q.shape[-3], k.shape[-3], left, right, pack)
    )
    programs = min(tiles, multiprocessors_for(problem))
    # Elsewhere it is not read, and neither are lengths that are absent.
    counter = counter_for(q) if plan.scheduler == DYNAMIC else lse
    scale, softcap, slopes = transform.softmax_scale, transform.softcap, transform.alibi_slopes
    attention_forward_sm90[(programs,)](
        describe(q, ROWS // pack, piece_columns(block_d), pack),
        describe(k, plan.block_n, piece_columns(block_d)),
        describe(v, plan.block_n, piece_columns(block_dv)),
        describe(out, ROWS // pack, plan.out_columns(block_dv), pack),
        lse,
        counter,
        lse if trace is None else trace,
        lse if transform.sinks is None else transform.sinks,
        (softcap or scale) * math.log2(math.e),
        scale / softcap if softcap else 0.0,
        problem.empty_lse,
        problem.nheads // pack,
        group,
        q.shape[-3],
        k.shape[-3],
        _NO_WINDOW if left is None else min(left, _NO_WINDOW),
        _NO_WINDOW if right is None else min(right, _NO_WINDOW),
        min(problem.visibility.attention_chunk or 1, _NO_WINDOW),
        row_tiles,
        sequences,
        section,
        heads_in_sections(plan, problem.max_seqlen_k, width, group, sequences),
        tiles,
        problem.batch_size,
        counter if layout.cu_seqlens_q is None else layout.cu_seqlens_q,
        counter if layout.cu_seqlens_k is None else layout.cu_seqlens_k,
        counter if layout.seqused_q is None else layout.seqused_q,
        counter if layout.seqused_k is None else layout.seqused_k,
        out,
        out.stride(-3),
        out.stride(-2),
        problem.headdim_v,
        lse if slopes is None else slopes,
        0 if slopes is None or slopes.dim() == 1 else slopes.stride(0),
        HAS_LEFT=left is not None,
        HAS_RIGHT=right is not None,
        HAS_CHUNK=problem.visibility.attention_chunk > 0,
        HAS_SOFTCAP=softcap > 0.0,
        HAS_SINKS=transform.sinks is not None,
        HAS_ALIBI=slopes is not None,
        LENGTHS=lengths,
        HAS_USED_Q=layout.seqused_q is not None,
        HAS_USED_K=layout.seqused_k is not None,
        TRACE=trace is not None,
        PACK=pack,
        PEEL=peel,
        **constants(plan, block_d, block_dv),
    )


def pack_of(problem: AttentionProblem, plan: ForwardPlan) -> int:
    """How many query heads lie in a tile.

    At the largest head dim the compiler of Triton 3.9 has no registers left to pack them.
    """
    widest = max(columns_of(problem))
    if widest == MAX_HEADDIM and _TRITON > (3, 6):
        return 1
    return packed_heads(
        plan.block_m,
        problem.nheads // problem.nheads_k,
        problem.q.shape[-3],
        problem.batch_size,
        problem.is_varlen_q,
        problem.pack_gqa,
    )


def tiles_of(problem: AttentionProblem, plan: ForwardPlan, pack: int) -> tuple[int, int]:
    """(row tiles of a sequence, sequences), as the kernel counts them."""
    rows, positions, heads = problem.q.shape[-3], plan.block_m // pack, problem.nheads // pack
    if problem.is_varlen_q:
        return rows // positions + problem.batch_size + 2, heads
    return -(-rows // positions), problem.batch_size * heads


def constants(plan: ForwardPlan, block_d: int, block_dv: int) -> dict[str, Any]:
    """What the plan says at compile time."""
    return {
        "BLOCK_N": plan.block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "CONSUMERS": plan.consumers,
        "STAGES": plan.stages,
        "Q_SLOTS": plan.q_slots,
        "OUT_COLUMNS": plan.out_columns(block_dv),
        "SCHEDULER": plan.scheduler,
        "PING_PONG": plan.ping_pong,
        "SKIP": plan.skip,
        "REGISTERS": plan.registers,
        "SLIM": plan.slim,
        "LATE": plan.late,
        "OVERLAP": plan.overlap,
        "JOINT": plan.joint,
        "P_SHARED": plan.p_shared,
        "num_warps": 4,
    }
