"""The Hopper kernel's barriers, schedulers and tiles, on a model of the GPU: see sm90_model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from sm90_model import Array, Int, Machine, descriptor, load_kernel
from triton.runtime.jit import JITFunction

from flash_attn.backends.sm90 import launch
from flash_attn.backends.sm90.plans import (
    DYNAMIC,
    ROUND_ROBIN,
    ForwardPlan,
    forward_plans,
    lengths_plan,
    masks_first_block_alone,
)
from flash_attn.core.masking import visible_keys
from flash_attn.core.problem import (
    DENSE,
    AttentionProblem,
    SequenceLayout,
    Visibility,
    make_transform,
)
from flash_attn.core.sequences import sequences

MASKS = [
    Visibility(),
    Visibility(None, 0),
    Visibility(100, 30),
    Visibility(70, None),
    Visibility(None, 0, 128),
]


def simulate(problem: AttentionProblem, plan: ForwardPlan, programs: int, seed: int) -> Machine:
    """Launch the kernel for ``problem`` as the package does, on the model."""
    calls: list[tuple[Any, ...]] = []

    def record(
        self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **keywords: Any
    ) -> None:
        calls.append((self, grid, args, keywords))

    counter = torch.zeros(1, dtype=torch.int32)
    out = torch.empty(problem.out_shape, dtype=problem.q.dtype)
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(launch, "counter_for", return_value=counter),
        mock.patch.object(launch, "multiprocessors_of", return_value=programs),
    ):
        launch.launch_forward(problem, plan, out, torch.empty(problem.lse_shape))
    ((kernel, grid, args, keywords),) = calls
    arguments = dict(zip(kernel.arg_names, args, strict=False)) | keywords
    del arguments["num_warps"]
    for name, x in arguments.items():
        if name.endswith("_desc"):
            arguments[name] = descriptor(name[0], x.block_shape)
        elif isinstance(x, torch.Tensor):
            arguments[name] = Array(x.reshape(-1).numpy() if x.dtype == torch.int32 else x)
        elif isinstance(x, int) and not isinstance(x, bool) and name.islower():
            arguments[name] = Int(x)
    for name in ("out", "lse", "sinks", "trace"):
        arguments[name] = _NUMBERS
    machine = Machine(seed, grid[0], arguments["BLOCK_DV"])
    machine.run(arguments)
    assert int(counter) == 0, "the counter is not back at 0"
    return machine


class _Numbers:
    """A pointer to numbers that the model does not have."""

    def __add__(self, _step: Any) -> _Numbers:
        return self


_NUMBERS = _Numbers()


def check(problem: AttentionProblem, plan: ForwardPlan, machine: Machine) -> None:
    """All rows are stored once, and every consumer multiplied what its rows see."""
    check_stores(problem, machine)
    pack = launch.pack_of(problem, plan)
    entries: dict[tuple[int, ...], list[list[int]]] = {}
    for task in machine.tasks:
        rows_of_keys = [k[3] for _, k in task.products]
        # Values are multiplied in as many parts as there are places of weights.
        parts = 2 if plan.p_shared else 1
        assert [v[3] for v in task.values] == [row for row in rows_of_keys for _ in range(parts)]
        last: tuple[tuple[int, ...], list[int]] | None = None
        for q, k in task.products:
            assert k[1:3] == (q[1], q[2] // (problem.nheads // problem.nheads_k))
            if last is None or last[0] != q or k[3] >= last[1][-1]:
                last = (q, [])
                entries.setdefault(q[1:4], []).append(last[1])
            last[1].append(k[3])
    for sequence in sequences(problem):
        k_start = sequence.k_rows[-1].start or 0
        start = sequence.q_rows[-1].start or 0
        batch = 0 if problem.is_varlen_q else sequence.number
        for row in range(0, sequence.seqlen_q, 64 // pack):
            needed = needed_blocks(problem, plan, sequence, range(row, row + 64 // pack))
            want = [k_start + block * plan.block_n for block in reversed(needed)]
            for head in range(0, problem.nheads, pack):
                found = entries.get((batch, head, start + row), [])
                assert any(set(want) <= set(rows) for rows in found), (sequence, head, row, found)
                if want:
                    tight = [rows for rows in found if set(want) <= set(rows)]
                    assert any(rows == sorted(rows, reverse=True) for rows in tight)


def needed_blocks(
    problem: AttentionProblem, plan: ForwardPlan, sequence: Any, rows: range
) -> range:
    """Blocks of keys that some of ``rows`` sees."""
    seen = [
        visible_keys(r, sequence.seqlen_q, sequence.seqlen_k, problem.visibility)
        for r in range(rows.start, min(rows.stop, sequence.seqlen_q))
    ]
    seen = [(first, end) for first, end in seen if first < end]
    if not seen:
        return range(0)
    return range(
        min(x for x, _ in seen) // plan.block_n, -(-max(x for _, x in seen) // plan.block_n)
    )


def check_stores(problem: AttentionProblem, machine: Machine) -> None:
    """Every row of every head is written once, and with packed rows no other is."""
    packed = problem.is_varlen_q
    rows = problem.q.shape[-3]
    batch = 1 if packed else problem.batch_size
    written = np.zeros((batch, problem.nheads, rows), dtype=int)
    for (b, head, row, column), heads, count in machine.stored:
        if column == 0:
            assert row + count <= rows or not packed
            written[b, head : head + heads, row : row + count] += 1
    assert (written == 1).all(), np.argwhere(written != 1)[:3]


def dense(seqlens: tuple[int, int], heads: tuple[int, int], headdim: int, **rest: Any) -> Any:
    """A dense problem of two sequences without numbers."""
    q = torch.empty(2, seqlens[0], heads[0], headdim, dtype=torch.bfloat16)
    k = torch.empty(2, seqlens[1], heads[1], headdim, dtype=torch.bfloat16)
    return AttentionProblem(q, k, k, make_transform(headdim), **rest)


def packed(
    lengths: list[tuple[int, int]], extra: tuple[int, int], headdim: int, **rest: Any
) -> Any:
    """Packed sequences between ``extra`` rows of none."""
    bounds = torch.tensor(lengths).reshape(-1, 2)
    before, after = extra
    cu = [torch.tensor([before, *bounds[:, i]]).cumsum(0).to(torch.int32) for i in (0, 1)]
    total_q, total_k = (int(x[-1]) + after for x in cu)
    q = torch.empty(total_q, 2, headdim, dtype=torch.bfloat16)
    k = torch.empty(total_k, 1, headdim, dtype=torch.bfloat16)
    most = [int(x) for x in bounds.max(0).values]
    used = rest.pop("used", (None, None))
    layout = SequenceLayout(*cu, used[1], None, None, None, *most, used[0])
    return AttentionProblem(q, k, k, make_transform(headdim), layout=layout, **rest)


def variants() -> list[ForwardPlan]:
    """Every plan in use, and with each number of consumers every scheduler and option."""
    plans = [plan for _, _, plan in forward_plans()]
    for consumers in (2, 3, 4):
        base = ForwardPlan(consumers, 64, 2, ROUND_ROBIN, 2, 1)
        plans += [
            base,
            replace(base, stages=3, q_slots=1),
            replace(base, skip=True),
            replace(base, scheduler=DYNAMIC, skip=True, section_bytes=1 << 20),
            replace(base, scheduler=DYNAMIC, q_slots=1),
            replace(base, slim=True),
            replace(base, scheduler=DYNAMIC, slim=True, skip=True, section_bytes=1 << 15,
                    last_bytes=1 << 16),
            replace(base, scheduler=DYNAMIC, late=True, skip=True, section_bytes=1 << 15,
                    last_bytes=1 << 16),
            replace(base, scheduler=DYNAMIC, late=True, overlap=True, peel=True),
            replace(base, scheduler=DYNAMIC, slim=True, overlap=True, skip=True),
            replace(base, ping_pong=True),
            replace(base, ping_pong=True, overlap=True, scheduler=DYNAMIC, late=True),
            replace(base, ping_pong=True, skip=True, scheduler=DYNAMIC),
            replace(base, ping_pong=True, slim=True, overlap=True, p_shared=64),
            replace(base, scheduler=DYNAMIC, late=True, skip=True, p_shared=32),
        ]  # fmt: skip
        joint = replace(base, joint=True, stages=3, q_slots=1)
        plans += [
            joint,
            replace(joint, stages=4, slim=True),
            replace(joint, skip=True),
            replace(joint, scheduler=DYNAMIC, skip=True, late=True),
            replace(joint, scheduler=DYNAMIC, slim=True, skip=True),
            replace(joint, scheduler=DYNAMIC, late=True, overlap=True, peel=True),
            replace(joint, ping_pong=True),
            replace(joint, ping_pong=True, stages=4, p_shared=32),
        ]
    return list(dict.fromkeys(plans))


@pytest.mark.parametrize("plan", variants(), ids=str)
def test_schedules_of_dense_problems(plan: ForwardPlan) -> None:
    for seed, mask in enumerate(MASKS):
        seqlens = [(300, 300), (700, 7), (100, 333), (333, 100), (65, 450)][seed]
        if mask.window_right is None and plan.skip:
            continue
        problem = dense(seqlens, (2, 1), 64, visibility=mask, pack_gqa=False)
        check(problem, plan, simulate(problem, plan, 1 + seed % 3, seed))
        problem = dense(seqlens, (8, 2), 64, visibility=mask, pack_gqa=True)
        check(problem, plan, simulate(problem, plan, 1 + seed % 3, seed))


@pytest.mark.parametrize("block_d", [64, 128, 256])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_schedules_of_packed_problems(block_d: int, mask: Visibility) -> None:
    plan = lengths_plan(block_d)
    plans = [plan, lengths_plan(block_d, sparing=True), replace(plan, q_slots=1, late=True)]
    lengths = [
        [(300, 300), (1, 1), (0, 5), (129, 0), (64, 200)],
        [(1, 500)],
        [(0, 0), (0, 0)],
        [(128, 128), (128, 100), (257, 3)],
    ]
    for seed, sizes in enumerate(lengths):
        problem = packed(sizes, (seed * 50 % 130, 3 - seed), block_d, visibility=mask)
        if problem.q.numel() and problem.k.numel():
            chosen = plans[seed % 3]
            for pack in (False, True):
                problem = problem._replace(pack_gqa=pack)
                check(problem, chosen, simulate(problem, chosen, 1 + seed, seed))


def test_schedules_of_used_lengths() -> None:
    used_q = torch.tensor([130, 0], dtype=torch.int32)
    used_k = torch.tensor([90, 333], dtype=torch.int32)
    for mask in MASKS:
        for pair in ((used_q, used_k), (None, used_k), (used_q, None)):
            layout = DENSE._replace(seqused_q=pair[0], seqused_k=pair[1])
            problem = dense((200, 400), (2, 1), 64, visibility=mask, layout=layout)
            check(problem, lengths_plan(64), simulate(problem, lengths_plan(64), 2, 1))
            sizes = [(140, 100), (70, 400)]
            problem = packed(sizes, (0, 0), 64, visibility=mask, used=pair)
            check_used(problem, simulate(problem, lengths_plan(64), 2, 1))


def check_used(problem: AttentionProblem, machine: Machine) -> None:
    check(problem, lengths_plan(64), machine)


@pytest.mark.parametrize("seed", range(6))
def test_hostile_bounds_reach_nothing_outside(seed: int) -> None:
    """The model fails where something outside of a tensor of lengths is read, or stored."""
    generator = random.Random(seed)
    problem = packed([(100, 100), (70, 30), (200, 150)], (0, 0), 64, visibility=MASKS[seed % 5])
    numbers = [-(2**31), 2**31 - 1, -1, 0, 50, 170, 370, 10**6]

    def bad(count: int) -> torch.Tensor:
        return torch.tensor([generator.choice(numbers) for _ in range(count)], dtype=torch.int32)

    layout = problem.layout._replace(
        cu_seqlens_q=bad(4), cu_seqlens_k=bad(4), seqused_q=bad(3), seqused_k=bad(3)
    )
    problem = problem._replace(layout=layout, pack_gqa=bool(seed % 2))
    machine = simulate(problem, lengths_plan(64), 3, seed)
    for (batch, head, row, _), heads, rows in machine.stored:
        assert batch == 0
        assert 0 <= head < head + heads <= 2
        assert 0 <= row <= row + rows <= problem.q.shape[0]


@pytest.mark.parametrize("visibility", MASKS, ids=str)
def test_tiles_see_what_their_rows_see(visibility: Visibility) -> None:
    """The kernel's interval of keys is core.masking's, for every row."""
    names = load_kernel(Machine(0, 1, 64))
    generator = random.Random(3)
    for _ in range(300):
        seqlen_q, seqlen_k = generator.randint(1, 300), generator.randint(0, 300)
        problem = dense((seqlen_q, max(seqlen_k, 1)), (1, 1), 64, visibility=visibility)
        left, right = launch.binding_window(problem)
        bounds = [Int(2**29 if x is None else x) for x in (left, right)]
        config = mock.Mock(
            HAS_LEFT=left is not None,
            HAS_RIGHT=right is not None,
            HAS_CHUNK=visibility.attention_chunk > 0,
        )
        work = mock.Mock(
            config=config,
            window_left=bounds[0],
            window_right=bounds[1],
            chunk=Int(visibility.attention_chunk or 1),
        )
        span = mock.Mock(rows_q=Int(seqlen_q), rows_k=Int(seqlen_k))
        for row in range(0, seqlen_q, 7):
            end = names["key_end"](work, span, Int(row))
            first = names["first_key_of"](work, span, Int(row)) if config.HAS_LEFT else 0
            got = set(range(max(first, 0), max(end, 0)))
            assert got == set(range(*visible_keys(row, seqlen_q, seqlen_k, visibility)))


@pytest.mark.parametrize(("margin", "programs"), [(0, 5), (2, 3), (9, 1)])
def test_margins_leave_multiprocessors_to_others(margin: int, programs: int) -> None:
    problem = dense((500, 200), (2, 1), 64, visibility=MASKS[1])._replace(sm_margin=margin)
    plan = lengths_plan(64)
    machine = simulate(problem, plan, 5, margin)
    assert machine.programs == programs
    check(problem, plan, machine)


@pytest.mark.parametrize("block", [64, 128])
def test_where_the_first_block_alone_is_masked(block: int) -> None:
    """Told from every row of every tile, for lengths and windows around multiples of a block."""
    plan = ForwardPlan(block // 64, block, 2, DYNAMIC, 1, 1)
    found = set()
    for seqlen_q in (1, block - 1, block, block + 1, 2 * block + 5, 3 * block):
        for shift in range(-2 * block - 1, 2 * block + 2):
            for right in (0, 1, 40, block):
                seqlen_k = seqlen_q + shift
                if seqlen_k < 1:
                    continue
                alone = masks_first_block_alone(plan, seqlen_q, seqlen_k, None, right, 1)
                assert not alone or first_block_is_all(block, seqlen_q, seqlen_k, right)
                found.add(alone)
    assert found == {False, True}
    for n in (1, 100, 4096):
        assert masks_first_block_alone(plan, n, n, None, 0, 1)
    assert not masks_first_block_alone(plan, block, block, 5, 0, 1)
    assert not masks_first_block_alone(plan, block, block, None, None, 1)
    assert not masks_first_block_alone(plan, block, block, None, 0, 2)
    assert not masks_first_block_alone(replace(plan, block_n=192), block, block, None, 0, 1)


def first_block_is_all(block: int, seqlen_q: int, seqlen_k: int, right: int) -> bool:
    """Whether all rows of all tiles see a key of the tile's first block and all of the others."""
    for first_row in range(0, seqlen_q, block):
        rows = torch.arange(first_row, min(first_row + block, seqlen_q))
        ends = (rows + (seqlen_k - seqlen_q) + right + 1).clamp(max=seqlen_k)
        last = -(-int(ends.max()) // block) * block
        if last > 0 and not (last - block < ends.min()):
            return False
    return True
