"""Launching the Hopper backward's main kernels for head dims above 128."""

from __future__ import annotations

from torch import Tensor

from ...core.problem import AttentionProblem, BackwardInputs
from ...kernels import sm90_backward_rows, sm90_backward_wide
from .._launcher import Launcher
from .launch_backward import (
    Packing,
    Workspace,
    _key_blocks,
    _key_heads,
    _numbers_descriptor,
    _query_heads,
    _section,
    _table,
    _tiles_of_head,
    _window,
    is_ragged,
    ragged_descriptor,
    rows_descriptor,
)
from .plans_backward import BackwardPlan

attention_backward_rows_sm90 = Launcher(sm90_backward_rows.attention_backward_rows_sm90)
attention_backward_wide_sm90 = Launcher(sm90_backward_wide.attention_backward_wide_sm90)

_BLOCK = 64  # keys of a program, and queries of a step
_LOG2E = 1.4426950408889634


def launch_main_wide(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    packing: Packing,
    workspace: Workspace,
    plan: BackwardPlan,
) -> None:
    """dk and dv.

    Raises:
        ValueError: the plan asks for what this kernel does not have.
    """
    is_narrow = any((plan.eager_dv, plan.early_lse, plan.delta_first, plan.dq_group, plan.adder,
                     plan.keeps_keys, plan.first_stores, plan.rotates, plan.deterministic,
                     plan.is_reversed))  # fmt: skip
    if is_narrow or plan.block_m != _BLOCK:
        raise ValueError(f"no plan for head dims above 128: {plan}")
    if problem.visibility.attention_chunk:
        raise ValueError("plans with pieces serve no chunks")
    nheads_k, layout = problem.nheads_k, problem.layout
    left, right = _window(problem)
    key_blocks, parts = _key_blocks(problem, plan), _key_heads(problem) * plan.splits
    scale, softcap = problem.transform.softmax_scale, problem.transform.softcap
    factor = scale if softcap == 0.0 else 2.0 * scale / softcap
    describe = ragged_descriptor if is_ragged(problem) else rows_descriptor
    unread = workspace.turns

    def rows(x: Tensor) -> object:
        return describe(x, _BLOCK, plan.piece)

    targets: list[object] = [workspace.dk_sums, workspace.dv_sums]
    if plan.splits == 1:
        targets = [rows(inputs.dk), rows(inputs.dv)]
    attention_backward_wide_sm90[(key_blocks * parts,)](
        rows(problem.q), rows(problem.k), rows(problem.v), rows(inputs.dout),
        _numbers_descriptor(workspace.lse_log2, _BLOCK),
        _numbers_descriptor(workspace.delta, _BLOCK),
        *targets,
        scale, factor * _LOG2E, softcap * _LOG2E,
        nheads_k * plan.splits, problem.nheads // nheads_k, plan.splits,
        problem.q.shape[-3], problem.k.shape[-3],
        workspace.delta.shape[-1], left or 0, right or 0,
        key_blocks, parts, _section(problem, plan),
        unread if packing.q is None else packing.q.bounds, _table(packing.k, workspace)[0],
        unread if layout.seqused_q is None else layout.seqused_q,
        unread if layout.seqused_k is None else layout.seqused_k, problem.batch_size,
        BLOCK_D=plan.block_d, PIECE=plan.piece, Q_SLOTS=plan.q_slots, DO_SLOTS=plan.do_slots,
        P_SLOTS=plan.p_slots, HELD=plan.held, TURNS=plan.turns,
        REGISTERS=plan.registers, OTHER_REGISTERS=plan.other_registers, SOFTCAP=softcap > 0.0,
        HAS_LEFT=left is not None, HAS_RIGHT=right is not None, SPLIT=plan.splits > 1,
        CU_Q=packing.q is not None, CU_K=packing.k is not None,
        USED_Q=layout.seqused_q is not None, USED_K=layout.seqused_k is not None,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


def launch_rows(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    packing: Packing,
    workspace: Workspace,
    plan: BackwardPlan,
) -> None:
    """dq; directly behind :func:`launch_main_wide`, which it need not wait for.

    Raises:
        ValueError: there is no plan for it.
    """
    rows_plan = plan.rows
    if rows_plan is None:
        raise ValueError(f"no plan for head dims above 128: {plan}")
    nheads, layout = problem.nheads, problem.layout
    left, right = _window(problem)
    group = nheads // problem.nheads_k
    row_tiles, heads = _tiles_of_head(packing, workspace), _query_heads(problem, packing)
    scale, softcap = problem.transform.softmax_scale, problem.transform.softcap
    factor = scale if softcap == 0.0 else 2.0 * scale / softcap
    fitting = rows_plan.section_bytes // max(1, 4 * problem.k.shape[-3] * problem.headdim)
    describe = ragged_descriptor if is_ragged(problem) else rows_descriptor
    unread = workspace.turns

    def rows(x: Tensor) -> object:
        return describe(x, _BLOCK, plan.piece)

    attention_backward_rows_sm90[(row_tiles * heads,)](
        rows(problem.q), rows(problem.k), rows(problem.v), rows(inputs.dout), rows(inputs.dq),
        workspace.lse_log2, workspace.delta,
        scale, factor * _LOG2E, softcap * _LOG2E,
        nheads, group, problem.q.shape[-3], problem.k.shape[-3], workspace.delta.shape[-1],
        left or 0, right or 0, row_tiles, heads, min(heads, max(1, fitting) * group),
        unread if packing.k is None else packing.k.bounds, _table(packing.q, workspace)[0],
        unread if layout.seqused_q is None else layout.seqused_q,
        unread if layout.seqused_k is None else layout.seqused_k, problem.batch_size,
        BLOCK_D=plan.block_d, PIECE=plan.piece, K_SLOTS=rows_plan.k_slots,
        V_SLOTS=rows_plan.v_slots, DQ_FIRST=rows_plan.dq_first, REGISTERS=rows_plan.registers,
        OTHER_REGISTERS=plan.other_registers, SOFTCAP=softcap > 0.0,
        HAS_LEFT=left is not None, HAS_RIGHT=right is not None,
        CU_Q=packing.q is not None, CU_K=packing.k is not None,
        USED_Q=layout.seqused_q is not None, USED_K=layout.seqused_k is not None,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
