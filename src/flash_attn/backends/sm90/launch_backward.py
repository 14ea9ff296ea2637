"""Launching the Hopper backward kernels for head dims up to 128."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...core.device import guard, multiprocessors_of
from ...core.outputs import round_multiple, softmax_d_shape
from ...core.plan import report
from ...core.problem import FULL, AttentionProblem, BackwardInputs, is_half
from ...kernels import sm90_backward, sm90_backward_around
from .._launcher import Launcher, scratch
from .plans_backward import (
    MAX_HEADDIM,
    MAX_HEADDIM_CHUNK,
    MAX_HEADDIM_NARROW,
    MAX_HEADDIM_SOFTCAP,
    BackwardPlan,
    plan_backward,
    plan_ordered,
    splits_of_group,
)

attention_backward_sm90 = Launcher(sm90_backward.attention_backward_sm90)
finish_dq_sm90 = Launcher(sm90_backward_around.finish_dq_sm90)
finish_keys_sm90 = Launcher(sm90_backward_around.finish_keys_sm90)
row_statistics_sm90 = Launcher(sm90_backward_around.row_statistics_sm90)
tiles_sm90 = Launcher(sm90_backward_around.tiles_sm90)

# Keys of a program, and rows in which packed sequences are divided and padded.
_BLOCK_N, _TILE = 128, 128
_LOG2E = 1.4426950408889634
# See Span of the kernels: rows that a ragged descriptor claims to have, and steps in its other two
# dimensions of rows. 2**30 * 2**34 is 0 for 64-bit addresses.
_FAR, _BEYOND, _AROUND = 2**30, 2**31 - 2**16, 2**34


class Tiles(NamedTuple):
    """Where packed sequences lie, on the device.

    Attributes:
        bounds: (batch + 1,) int32, cu_seqlens made to never decrease.
        table: (4, tiles) int32, see tiles_sm90.
    """

    bounds: Tensor
    table: Tensor

    @property
    def number(self) -> int:
        return self.table.shape[1]


class Packing(NamedTuple):
    """The tiles of packed queries and keys; None where they are dense."""

    q: Tiles | None = None
    k: Tiles | None = None


class Workspace(NamedTuple):
    """What the kernels hand to each other.

    Attributes:
        lse_log2: (batch, nheads, padded rows) float32; ``delta`` likewise. Packed sequences are
            one, in which each begins where softmax_d_shape says.
        dq_sums: (batch * nheads * padded rows * width / 64, 64) float32, see BackwardPlan.width;
            none of them where dq has a kernel of its own.
        turns: one for each 64 padded rows, of which deterministic and first_stores alone make use;
            int32.
        dk_sums, dv_sums: float32 for each key, padded, and column, padded, of each of ``splits``
            parts of a key head; None for one.
    """

    lse_log2: Tensor
    delta: Tensor
    dq_sums: Tensor
    turns: Tensor
    dk_sums: Tensor | None
    dv_sums: Tensor | None


def unsupported_backward(problem: AttentionProblem) -> list[str]:
    """Why :func:`backward` cannot serve the problem; empty if it can. The GPU is not looked at."""
    layout, transform, q = problem.layout, problem.transform, problem.q
    served = ("s_aux", "seqused_q", "a head dim of v of its own", "attention_chunk")
    features = {
        "leftpad_k": layout.leftpad_k is not None,
        "pages": layout.page_table is not None,
        "cache_batch_idx": layout.cache_batch_idx is not None,
        "ALiBi and softcap": transform.alibi_slopes is not None and transform.softcap > 0.0,
        "dropout": problem.dropout_p > 0.0,
    }
    features.update(dict.fromkeys((n for n in problem.extensions() if n not in served), True))
    reasons = [
        f"computes no gradients with {name}" for name, is_used in features.items() if is_used
    ]
    if not is_half(q.dtype):
        reasons.append(f"computes gradients of float16 and bfloat16, `q` is {q.dtype}")
    widest = max(problem.headdim, problem.headdim_v)
    if widest > MAX_HEADDIM:
        reasons.append(f"computes gradients for head dims up to {MAX_HEADDIM}, found {widest}")
    reasons += _width_reasons(problem, widest)
    if not transform.softmax_scale > 0.0:
        reasons.append(f"needs softmax_scale > 0, found {transform.softmax_scale}")
    rows = max(x.shape[-3] * (x.shape[0] if x.dim() == 4 else 1) for x in (q, problem.k))
    if is_ragged(problem) and rows >= _FAR // 2:
        reasons.append(f"serves packed tensors of fewer than {_FAR // 2} rows, found {rows}")
    return reasons


def _width_reasons(problem: AttentionProblem, widest: int) -> list[str]:
    """What is served for some head dims alone."""
    transform = problem.transform
    limits = {
        # With wider heads the compiler of Triton 3.9 runs out of registers.
        "attention_chunk": (bool(problem.visibility.attention_chunk), MAX_HEADDIM_CHUNK),
        "ALiBi and lengths on the device": (
            transform.alibi_slopes is not None and is_ragged(problem),
            MAX_HEADDIM_CHUNK,
        ),
        "ALiBi and deterministic=True": (
            transform.alibi_slopes is not None and problem.deterministic,
            MAX_HEADDIM_CHUNK,
        ),
        "ALiBi": (transform.alibi_slopes is not None, MAX_HEADDIM_NARROW),
        "softcap": (transform.softcap > 0.0, MAX_HEADDIM_SOFTCAP),
    }
    return [
        f"computes gradients with {name} for head dims up to {limit}, found {widest}"
        for name, (is_used, limit) in limits.items()
        if is_used and widest > limit
    ]


def is_ragged(problem: AttentionProblem) -> bool:
    """Whether the lengths of sequences are on the device."""
    layout = problem.layout
    tensors = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.seqused_q, layout.seqused_k)
    return any(x is not None for x in tensors)


def _can_keep_keys(problem: AttentionProblem) -> bool:
    """Whether a consumer has registers for k and v: chunks and ALiBi need them themselves."""
    return not problem.visibility.attention_chunk and problem.transform.alibi_slopes is None


def _can_be_early(problem: AttentionProblem) -> bool:
    """Whether a consumer has registers for the next step's log-sum-exp and delta."""
    has_left = problem.visibility.window_left is not None
    return _can_keep_keys(problem) and not has_left and not is_ragged(problem)


def backward(
    problem: AttentionProblem, inputs: BackwardInputs, plan: BackwardPlan | None = None
) -> Tensor:
    """Write dq, dk, dv in place, honouring their strides; returns softmax_d.

    dk and dv have the same bits every time, and dq if the problem is ``deterministic``.
    """
    if 0 in problem.q.shape or 0 in problem.k.shape:
        for grad in (inputs.dq, inputs.dk, inputs.dv):
            grad.zero_()
        shape = softmax_d_shape(problem)
        return torch.zeros(shape, dtype=torch.float32, device=problem.q.device)
    ragged, unseen = is_ragged(problem), 0
    if not ragged:
        problem, inputs, unseen = _without_unseen_keys(problem, inputs)
    visibility = problem.visibility
    if plan is None:
        is_masked = visibility != FULL
        widest = max(problem.headdim, problem.headdim_v)
        choose = plan_ordered if problem.deterministic else plan_backward
        plan = choose(widest, is_masked, problem.max_seqlen_q, problem.max_seqlen_k)
        plan = plan._replace(splits=_splits(problem, plan))
    group = problem.nheads // problem.nheads_k
    if not 1 <= plan.splits <= group:
        raise ValueError(f"no plan for {group} query heads to a key head: {plan}")
    plan = plan._replace(keeps_keys=plan.keeps_keys and _can_keep_keys(problem))
    if plan.early_lse and not _can_be_early(problem):
        plan = plan._replace(early_lse=False, delta_first=False, eager_dv=plan.width == 64)
    if plan.early_lse and plan.splits > 1:  # 8 bytes spilled otherwise
        plan = plan._replace(rotates=False)
    report(("sm90 backward", *problem.q.shape, *problem.k.shape, visibility), plan)
    fits, fit = (is_for_ragged_tma, for_ragged_tma) if ragged else (is_for_tma, for_tma)
    fits_dq = _has_columns_together if plan.rows is None else fits
    if plan.splits > 1:
        fits = _has_columns_together
    dk, dv = (x if fits(x) else _new_for_tma(x) for x in (inputs.dk, inputs.dv))
    if ragged and (visibility.window_left is not None or visibility.attention_chunk):
        # The kernels leave out the keys before every query's window.
        dk.zero_()
        dv.zero_()
    lse = inputs.softmax_lse
    direct = inputs._replace(
        dout=fit(inputs.dout),
        out=for_tma(inputs.out),
        softmax_lse=lse if lse.stride(-1) == 1 or lse.shape[-1] == 1 else lse.contiguous(),
        dq=inputs.dq if fits_dq(inputs.dq) else _new_for_tma(inputs.dq),
        dk=dk,
        dv=dv,
    )
    problem = problem._replace(q=fit(problem.q), k=fit(problem.k), v=fit(problem.v))
    with guard(problem.q):
        packing = locate(problem)
        workspace = allocate(problem, packing, plan)
        launch_statistics(problem, direct, packing, workspace, plan)
        launch_main(problem, direct, packing, workspace, plan, unseen)
        launch_finish_keys(problem, direct, packing, workspace, plan)
        if plan.rows is None:
            launch_finish(problem, direct, packing, workspace, plan)
    for wanted, written in zip(inputs[3:6], direct[3:6], strict=True):
        if wanted is not written:
            wanted.copy_(written)
    if packing.q is None:
        return workspace.delta
    return workspace.delta[0, :, : softmax_d_shape(problem)[1]].contiguous()


def _splits(problem: AttentionProblem, plan: BackwardPlan) -> int:
    """How many programs share the query heads of a key head: a function of shapes and the GPU."""
    group = problem.nheads // problem.nheads_k
    if group == 1:
        return 1
    programs = _key_blocks(problem, plan) * _key_heads(problem)
    multiprocessors = multiprocessors_of(problem.q.device.index or 0)
    is_masked = problem.visibility != FULL
    return splits_of_group(programs, group, is_masked, multiprocessors, plan.is_reversed)


def _key_blocks(problem: AttentionProblem, plan: BackwardPlan) -> int:
    """Blocks of keys of a sequence, or of the tiles of all packed ones."""
    rows, cu_seqlens = problem.k.shape[-3], problem.layout.cu_seqlens_k
    if cu_seqlens is None:
        return -(-rows // plan.block_n)
    return _number_of_tiles(rows, cu_seqlens.shape[0] - 1) * (_TILE // plan.block_n)


def _without_unseen_keys(
    problem: AttentionProblem, inputs: BackwardInputs
) -> tuple[AttentionProblem, BackwardInputs, int]:
    """The same problem without the keys before every query's window, whose gradients are 0, and
    their number.

    They may be anything, also NaN, and the kernels multiply whole tiles.
    """
    left, _, chunk = problem.visibility
    first = problem.max_seqlen_k - problem.max_seqlen_q  # where the first query stands
    unseen = max(first // chunk * chunk if chunk else 0, 0 if left is None else first - left)
    if unseen <= 0:
        return problem, inputs, 0
    inputs.dk[:, :unseen].zero_()
    inputs.dv[:, :unseen].zero_()
    return (
        problem._replace(k=problem.k[:, unseen:], v=problem.v[:, unseen:]),
        inputs._replace(dk=inputs.dk[:, unseen:], dv=inputs.dv[:, unseen:]),
        unseen,
    )


def locate(problem: AttentionProblem) -> Packing:
    """Find the tiles of packed rows; nothing to do for dense ones."""
    layout = problem.layout
    cu_q, cu_k = layout.cu_seqlens_q, layout.cu_seqlens_k
    q = None if cu_q is None else _tiles_of(cu_q, problem.q.shape[0])
    if q is not None and cu_k is cu_q and problem.k.shape[0] == problem.q.shape[0]:
        return Packing(q, q)
    return Packing(q, None if cu_k is None else _tiles_of(cu_k, problem.k.shape[0]))


def _tiles_of(cu_seqlens: Tensor, total: int) -> Tiles:
    # Programs wait for each other by number. With bounds that decrease some would not exist.
    bounds = cu_seqlens.cummax(0).values
    batch = bounds.shape[0] - 1
    tiles = _number_of_tiles(total, batch)
    table = bounds.new_empty(4, tiles)
    tiles_sm90[(-(-tiles // 128),)](
        bounds, table, batch, total, tiles, (batch + 1).bit_length(), num_warps=4
    )
    return Tiles(bounds, table)


def _number_of_tiles(total: int, batch: int) -> int:
    """See tiles_sm90."""
    return total // _TILE + batch + 2


def allocate(problem: AttentionProblem, packing: Packing, plan: BackwardPlan) -> Workspace:
    """Workspace on the device of q; of packed queries zeros where no sequence's delta will be."""
    nheads, device = problem.nheads, problem.q.device
    if packing.q is None:
        batch, rows = problem.batch_size, round_multiple(problem.q.shape[1], 128)
    else:
        batch, rows = 1, round_multiple(softmax_d_shape(problem)[1], 128)
    statistics = (batch, nheads, rows)
    if packing.q is None:
        lse_log2 = scratch(statistics, torch.float32, device)
        delta = torch.empty(statistics, dtype=torch.float32, device=device)  # a result, softmax_d
    else:
        lse_log2, delta = torch.zeros((2, *statistics), dtype=torch.float32, device=device)
    sums = (0 if plan.rows else batch * nheads * rows * plan.width // 64, 64)
    dk_sums = dv_sums = None
    if plan.splits > 1:
        blocks = _key_blocks(problem, plan) * _key_heads(problem) * plan.splits
        size = (blocks * plan.block_n * plan.width,)
        dk_sums, dv_sums = (scratch(size, torch.float32, device) for _ in range(2))
    return Workspace(
        lse_log2,
        delta,
        scratch(sums, torch.float32, device),
        scratch((batch * nheads * rows // 64,), torch.int32, device),
        dk_sums,
        dv_sums,
    )


def _key_heads(problem: AttentionProblem) -> int:
    """Key heads of all sequences; packed ones count as one."""
    return problem.nheads_k * (problem.k.shape[0] if problem.k.dim() == 4 else 1)


def _query_heads(problem: AttentionProblem, packing: Packing) -> int:
    """Query heads of all sequences; packed ones count as one."""
    return problem.nheads * (problem.batch_size if packing.q is None else 1)


def _section(problem: AttentionProblem, plan: BackwardPlan) -> int:
    """Key heads, or parts of key heads, that are worked on at a time."""
    group, total = problem.nheads // problem.nheads_k, _key_heads(problem) * plan.splits
    bytes_of_part = -(-group // plan.splits) * problem.max_seqlen_q * problem.headdim * 8
    fitting = plan.section_bytes // max(1, bytes_of_part)
    if group == 1:
        return max(1, min(total, fitting))
    least = plan.least_programs // max(1, -(-problem.max_seqlen_k // plan.block_n))
    # Of equal size: a small last section would leave multiprocessors without work.
    sections = -(-total // max(1, fitting, least))
    if sections > 1 and total // sections < least:
        sections -= 1
    return -(-total // sections)


def _window(problem: AttentionProblem) -> tuple[int | None, int | None]:
    """The window's sides, which the kernels add up without overflow; chunks have both."""
    left, right, chunk = problem.visibility
    longest = problem.q.shape[-3] + problem.k.shape[-3]
    if chunk:  # is between two bounds anyway
        left, right = (longest if x is None else x for x in (left, right))
    left, right = (None if x is None else min(x, longest) for x in (left, right))
    return left, right


def _tiles_of_head(packing: Packing, workspace: Workspace) -> int:
    """Tiles of 128 rows of a query head of a sequence; all packed ones count as one."""
    return workspace.delta.shape[-1] // _TILE if packing.q is None else packing.q.number


def launch_statistics(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    packing: Packing,
    workspace: Workspace,
    plan: BackwardPlan,
) -> None:
    """Row statistics, and zeros for the sums of dq if the plan needs them."""
    out, dout, lse, dlse = inputs.out, inputs.dout, inputs.softmax_lse, inputs.dlse
    rows, used = workspace.delta.shape[-1], problem.layout.seqused_q
    statistics_rows = plan.statistics_rows(is_ragged(problem))
    parts = _tiles_of_head(packing, workspace) * (_TILE // statistics_rows)
    row_statistics_sm90[(parts * _query_heads(problem, packing),)](
        out, dout, lse, lse if dlse is None else dlse.float().contiguous(),
        workspace.lse_log2, workspace.delta, workspace.dq_sums,
        workspace.turns, workspace.turns.numel(),
        *_strides(out), *_strides(dout), *_lse_strides(lse),
        problem.nheads, problem.q.shape[-3], rows, parts,
        *_table(packing.q, workspace), workspace.turns if used is None else used,
        problem.batch_size,
        HEAD_DIM=problem.headdim_v, BLOCK_D=plan.width, BLOCK_M=statistics_rows,
        HAS_DLSE=dlse is not None, CU_Q=packing.q is not None, USED_Q=used is not None,
        ZEROES=not plan.first_stores and plan.rows is None,
        num_warps=4,
    )  # fmt: skip


def _table(tiles: Tiles | None, workspace: Workspace) -> tuple[Tensor, int]:
    """A table of tiles and how many; without one, something that is not read."""
    return (workspace.turns, 0) if tiles is None else (tiles.table, tiles.number)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of (batch, seqlen, nheads, headdim); a packed tensor is one long sequence."""
    batch, row, head = (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]
    return batch, row, head


def _lse_strides(lse: Tensor) -> tuple[int, int]:
    """Of (batch, nheads, seqlen)."""
    return (0, lse.stride(0)) if lse.dim() == 2 else (lse.stride(0), lse.stride(1))


def launch_main(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    packing: Packing,
    workspace: Workspace,
    plan: BackwardPlan,
    unseen: int = 0,
) -> None:
    """dk, dv and the sums of dq, or dq.

    ``unseen`` keys are left out before the first one of dense sequences.
    """
    if plan.piece:
        from .launch_backward_wide import launch_main_wide, launch_rows  # which import this module

        launch_main_wide(problem, inputs, packing, workspace, plan)
        launch_rows(problem, inputs, packing, workspace, plan)
        return
    q, k, v, layout = problem.q, problem.k, problem.v, problem.layout
    seqlen_q, seqlen_k, nheads_k = q.shape[-3], k.shape[-3], problem.nheads_k
    block_m, block_d = plan.block_m, plan.block_d
    (left, right), chunk = _window(problem), problem.visibility.attention_chunk
    key_blocks, parts = _key_blocks(problem, plan), _key_heads(problem) * plan.splits
    unread = workspace.turns
    scale, softcap = problem.transform.softmax_scale, problem.transform.softcap
    factor = scale if softcap == 0.0 else 2.0 * scale / softcap
    slopes = problem.transform.alibi_slopes
    describe = ragged_descriptor if is_ragged(problem) else rows_descriptor
    targets: list[TensorDescriptor | Tensor | None] = [workspace.dk_sums, workspace.dv_sums]
    if plan.splits == 1:
        targets = [describe(x, 64, block_d) for x in (inputs.dk, inputs.dv)]
    attention_backward_sm90[(key_blocks * parts,)](
        describe(q, block_m, block_d),
        describe(k, _BLOCK_N, block_d),
        describe(v, _BLOCK_N, block_d),
        describe(inputs.dout, block_m, block_d),
        _numbers_descriptor(workspace.lse_log2, block_m),
        _numbers_descriptor(workspace.delta, block_m),
        _sums_descriptor(workspace.dq_sums, 64 if plan.width % 64 == 0 else 32),
        *targets,
        scale, factor * _LOG2E, softcap * _LOG2E,
        nheads_k * plan.splits, problem.nheads // nheads_k, plan.splits, seqlen_q, seqlen_k,
        workspace.delta.shape[-1], left or 0, right or 0,
        key_blocks, parts, _section(problem, plan), workspace.turns,
        unread if packing.q is None else packing.q.bounds, _table(packing.k, workspace)[0],
        unread if layout.seqused_q is None else layout.seqused_q,
        unread if layout.seqused_k is None else layout.seqused_k, problem.batch_size,
        min(chunk, _FAR // 2), unseen % chunk if chunk else 0,
        unread if slopes is None else slopes,
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        BLOCK_M=block_m, BLOCK_D=block_d, Q_SLOTS=plan.q_slots, DO_SLOTS=plan.do_slots,
        DS_SLOTS=plan.ds_slots, DQ_SLOTS=plan.dq_slots, EAGER_DV=plan.eager_dv,
        EARLY_LSE=plan.early_lse, DELTA_FIRST=plan.delta_first,
        DQ_GROUP=plan.dq_group, ADDER=plan.adder, IN_FLIGHT=plan.in_flight,
        REGISTERS=plan.registers, DQ_REGISTERS=plan.dq_registers,
        OTHER_REGISTERS=plan.other_registers, DETERMINISTIC=plan.deterministic,
        REVERSED=plan.is_reversed, FIRST_STORES=plan.first_stores, ROTATE=plan.rotates,
        SOFTCAP=softcap > 0.0,
        HAS_LEFT=left is not None, HAS_RIGHT=right is not None,
        CU_Q=packing.q is not None, CU_K=packing.k is not None,
        USED_Q=layout.seqused_q is not None, USED_K=layout.seqused_k is not None,
        HAS_CHUNK=chunk > 0, HAS_ALIBI=slopes is not None, SPLIT=plan.splits > 1,
        KEEPS_KEYS=plan.keeps_keys, WIDTH=plan.width,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


def launch_finish_keys(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    packing: Packing,
    workspace: Workspace,
    plan: BackwardPlan,
) -> None:
    """dk and dv from their sums, where several programs share the query heads of a key head."""
    if plan.splits == 1:
        return
    layout, unread = problem.layout, workspace.turns
    key_blocks, key_heads = _key_blocks(problem, plan), _key_heads(problem)
    strips = plan.block_n // 16 * (plan.width // plan.columns)
    left, chunk = _window(problem)[0], problem.visibility.attention_chunk
    finish_keys_sm90[(key_blocks * key_heads * strips,)](
        workspace.dk_sums, workspace.dv_sums, inputs.dk, inputs.dv,
        *_strides(inputs.dk), *_strides(inputs.dv), problem.transform.softmax_scale,
        plan.splits, problem.nheads_k, key_blocks, key_heads,
        problem.q.shape[-3], problem.k.shape[-3], left or 0, min(chunk, _FAR // 2),
        unread if packing.q is None else packing.q.bounds, _table(packing.k, workspace)[0],
        unread if layout.seqused_q is None else layout.seqused_q,
        unread if layout.seqused_k is None else layout.seqused_k, problem.batch_size,
        HEAD_DIM=problem.headdim, HEAD_DIM_V=problem.headdim_v, BLOCK_D=plan.width,
        PIECE=plan.columns, BLOCK_N=plan.block_n,
        CU_Q=packing.q is not None, CU_K=packing.k is not None,
        USED_Q=layout.seqused_q is not None, USED_K=layout.seqused_k is not None,
        HAS_LEFT=left is not None, HAS_CHUNK=chunk > 0,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


def launch_finish(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    packing: Packing,
    workspace: Workspace,
    plan: BackwardPlan,
) -> None:
    """dq from its sums."""
    dq = inputs.dq
    parts = _tiles_of_head(packing, workspace) * (_TILE // 64)
    finish_dq_sm90[(parts * _query_heads(problem, packing),)](
        workspace.dq_sums, dq, *_strides(dq), problem.transform.softmax_scale,
        problem.nheads, dq.shape[-3], workspace.delta.shape[-1], parts,
        *_table(packing.q, workspace), problem.batch_size, workspace.turns,
        HEAD_DIM=problem.headdim, BLOCK_D=plan.width, BLOCK_M=plan.block_m,
        CU_Q=packing.q is not None, FIRST_STORES=plan.first_stores,
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


def ragged_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Packed (total, heads, headdim), or dense where all rows are equally far apart, for TMA that
    ends where a sequence ends: see ``Span`` of the kernels."""
    headdim = x.shape[-1]
    row, head = _row_step(x), x.stride(-2) if x.shape[-2] > 1 else 8 * headdim
    return TensorDescriptor(
        x,
        [_BEYOND, _BEYOND, x.shape[-2], _FAR, headdim],
        [_AROUND - row, row, head, row, 1],
        [1, 1, 1, rows, columns],
        gl.NVMMASharedLayout(128, 16, 5),
    )


def _row_step(x: Tensor) -> int:
    """From one row of (total, heads, headdim), or (batch, seqlen, heads, headdim), to the next."""
    if x.shape[-3] > 1:
        return x.stride(-3)
    return x.stride(0) if x.dim() == 4 and x.shape[0] > 1 else 8 * x.shape[-1]


def _numbers_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, [x.numel()], [1], [rows], gl.NVMMASharedLayout(0, 32, 1))


def _sums_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [64, 1], [rows, 64], gl.NVMMASharedLayout(0, 32, 2))


def _has_columns_together(x: Tensor) -> bool:
    return x.stride(-1) == 1


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
    return x if is_for_tma(x) else _new_for_tma(x).copy_(x)


def _new_for_tma(x: Tensor) -> Tensor:
    """A tensor like ``x`` in memory that TMA can address: its rows start at 16 bytes."""
    headdim = x.shape[-1]
    return x.new_empty(*x.shape[:-1], round_multiple(headdim, 8))[..., :headdim]


def is_for_ragged_tma(x: Tensor) -> bool:
    """Whether, besides, the rows of all sequences are equally far apart."""
    evenly = x.dim() == 3 or 1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1)
    return evenly and is_for_tma(x)


def for_ragged_tma(x: Tensor) -> Tensor:
    """``x``, copied if TMA cannot address it as one packed tensor."""
    return x if is_for_ragged_tma(x) else _new_for_tma(x).copy_(x)
