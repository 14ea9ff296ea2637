"""The Hopper kernels compile without spilling, and their plans are what their tables say."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

import sm90

from flash_attn.backends.sm90 import launch, plans
from flash_attn.core.problem import (
    DENSE,
    AttentionProblem,
    SequenceLayout,
    Visibility,
    make_transform,
)

_SCRIPT = Path(__file__).with_name("sm90.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("headdims", [(64, 96), (128, 192, 256)], ids=str)
def test_plans_compile_without_spilling(headdims: tuple[int, ...]) -> None:
    """In processes of their own: the compiler aborts where it does not know its way. The script
    without --selection compiles everything."""
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), "--selection", "--headdims", *map(str, headdims)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for block_d in headdims:
        assert f"d{block_d} causal" in done.stdout


def test_every_head_dim_is_compiled() -> None:
    assert {case.headdim for case in sm90.selection()} == set(plans.BLOCK_DS)
    assert set(plans.BLOCK_DS) == {64, 96, 128, 192, 256}  # those of the test above


def test_no_integer_becomes_a_constant() -> None:
    """Where one is 1, Triton would put a constant in its place, which no aggregate can hold."""
    kernel, arguments, _ = sm90.arguments_of(sm90.planned(64, "chunk", "packed"))
    numbers = [p for p, x in zip(kernel.params, arguments, strict=False) if type(x) is int]
    assert len(numbers) > 10
    assert [p.name for p in numbers if not p.do_not_specialize] == []


@pytest.mark.parametrize("block_d", plans.BLOCK_DS)
@pytest.mark.parametrize("halves", [1, 2])
def test_results_leave_in_rows_of_128_bytes(block_d: int, halves: int) -> None:
    """In narrower buffers the compiler aborts; those of pieces of 32 columns have 64 bytes."""
    plan = plans.ForwardPlan(2, 64, 2, plans.DYNAMIC, 1, halves)
    columns = plan.out_columns(block_d)
    assert columns >= min(64, plans.piece_columns(block_d))
    assert columns & (columns - 1) == 0
    assert block_d % columns == 0


@pytest.mark.parametrize("headdim", [1, 8, 64, 65, 96, 128, 192, 256])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seqlen", [1, 512, 1024, 2048, 4096, 8192, 2**20])
def test_every_shape_has_a_plan_that_fits(headdim: int, masked: bool, seqlen: int) -> None:
    block_d = plans.padded_headdim(headdim)
    assert block_d >= headdim
    grids = [None, *(plans.Grid(seqlen, heads, 132) for heads in (1, 16, 512))]
    for grid in grids:
        plan = plans.forward_plan(plans.ForwardKey(block_d, masked, seqlen, grid=grid))
        assert (block_d, masked, plan) in plans.forward_plans()
        check_fits(plan, block_d)
    plan = plans.forward_plan(plans.ForwardKey(block_d, masked, seqlen, has_left=True))
    check_fits(plan, block_d)
    assert not plan.joint  # spills
    for sparing in (False, True):
        plan = plans.lengths_plan(block_d, sparing)
        check_fits(plan, block_d)
        assert plan.scheduler == plans.DYNAMIC
        assert not plan.slim


def check_fits(plan: plans.ForwardPlan, block_d: int) -> None:
    """Shared memory, registers, and what the kernel asks of a plan."""
    assert plan.shared_bytes(block_d) <= plans.SHARED_LIMIT - 1024  # barriers, the compiler's own
    threads = 128 * (plan.consumers + 1)
    given = plan.registers * plan.consumers + 24
    assert plan.registers <= 240
    assert given * 128 <= 65536 // threads // 8 * 8 * threads
    assert plan.consumers > 1 or not (plan.slim or plan.ping_pong)
    assert not plan.late or (plan.scheduler == plans.DYNAMIC and not plan.slim)
    assert not plan.joint or (plan.stages >= 3 and not (plan.ping_pong and plan.skip))
    unjoined = plans.with_two_rings(plan)
    assert not unjoined.joint
    assert unjoined.shared_bytes(block_d) <= plans.SHARED_LIMIT - 1024


def test_tiles_are_smaller_where_there_are_few() -> None:
    def consumers(block_d: int, masked: bool, rows: int, heads: int) -> int:
        key = plans.ForwardKey(block_d, masked, rows, grid=plans.Grid(rows, heads, 132))
        return plans.forward_plan(key).consumers

    # Causal, 16 heads: as measured.
    assert [consumers(64, True, n, 16) for n in (512, 1024, 2048, 4096)] == [1, 2, 2, 2]
    assert [consumers(64, True, n, 16) for n in (8192, 16384)] == [3, 3]
    assert [consumers(64, True, n, 1024) for n in (512, 1024, 2048, 4096)] == [4, 4, 4, 4]
    # 128 tiles of 256 rows occupy the GPU as well as 256 of 128; 64 do not.
    assert [consumers(64, False, n, 16) for n in (512, 1024, 1999)] == [1, 2, 4]
    # 176 tiles of 192 rows are done in two rounds, and so are 256 of 128.
    assert consumers(64, False, 2048, 16) == consumers(128, False, 2048, 16) == 2
    assert consumers(64, False, 2048, 256) == consumers(128, False, 2048, 256) == 3
    assert consumers(256, True, 512, 1) == consumers(192, False, 512, 1) == 2


def test_plans_spare_registers_where_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "multiprocessors_of", lambda _index: 1)
    for triton, headdim, softcap, overlap in (
        ((3, 6), 256, 0.0, True), ((3, 6), 256, 20.0, False), ((3, 9), 256, 0.0, True),
        ((3, 6), 64, 0.0, True), ((3, 9), 64, 0.0, False), ((3, 6), 192, 0.0, True),
        ((3, 6), 192, 20.0, False),
    ):  # fmt: skip
        monkeypatch.setattr(launch, "_TRITON", triton)
        q = torch.empty(1, 300, 2, headdim, dtype=torch.bfloat16, device="meta")
        transform = make_transform(headdim, softcap=softcap)
        plan = launch.plan_for(AttentionProblem(q, q, q, transform))
        assert plan.overlap == overlap
        assert plan.joint == (headdim == 192 and not softcap)
    monkeypatch.setattr(launch, "_TRITON", (3, 6))
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    q = torch.empty(300, 2, 64, dtype=torch.bfloat16, device="meta")
    layout = SequenceLayout(bounds, bounds, max_seqlen_q=300, max_seqlen_k=300)
    for mask, softcap, sparing in (
        (Visibility(None, 0), 0.0, False), (Visibility(), 0.0, False),
        (Visibility(40, 0), 0.0, True), (Visibility(None, 0, 128), 0.0, True),
        (Visibility(None, 0), 20.0, True),
    ):  # fmt: skip
        transform = make_transform(64, softcap=softcap)
        problem = AttentionProblem(q, q, q, transform, mask, layout)
        assert launch.plan_for(problem) == plans.lengths_plan(64, sparing)
    monkeypatch.setattr(launch, "_TRITON", (3, 9))
    problem = problem._replace(visibility=Visibility(), transform=make_transform(64))
    assert launch.plan_for(problem) == plans.lengths_plan(64, sparing=True)
    q = q[None]
    problem = AttentionProblem(q, q, q, make_transform(64), Visibility(40, 0))
    assert launch.plan_for(problem) == plans.lengths_plan(64, sparing=True)
    monkeypatch.setattr(launch, "_TRITON", (3, 6))
    assert launch.plan_for(problem) == plans.forward_plan(plans.ForwardKey(64, True, 300, True))
    problem = problem._replace(transform=make_transform(64, softcap=20.0))
    assert launch.plan_for(problem) == plans.lengths_plan(64, sparing=True)


@pytest.mark.parametrize("headdim", [128, 256])
def test_features_that_would_spill_are_refused(
    headdim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.empty(300, 2, headdim, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 300], dtype=torch.int32)
    transform = make_transform(headdim, softcap=20.0)
    packed = AttentionProblem(q, q, q, transform, layout=SequenceLayout(bounds, bounds))
    chunked = packed._replace(
        visibility=Visibility(None, 0, 128), transform=make_transform(headdim)
    )
    for triton in ((3, 6), (3, 9)):
        monkeypatch.setattr(launch, "_TRITON", triton)
        for problem in (packed, chunked):
            assert len(launch.register_reasons(problem)) == (headdim > 128)
            dense = problem._replace(q=q[None], k=q[None], v=q[None], layout=DENSE)
            refused = headdim > 128 and triton > (3, 6)
            assert len(launch.register_reasons(dense)) == refused


@pytest.mark.parametrize(("headdim", "count"), [(192, 0), (200, 1), (256, 1)])
def test_softcap_with_a_left_bound_is_refused_where_it_spills(
    headdim: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_TRITON", (3, 6))
    q = torch.empty(1, 300, 2, headdim, dtype=torch.bfloat16)
    problem = AttentionProblem(q, q, q, make_transform(headdim, softcap=20.0))
    for visibility in (Visibility(40, 0), Visibility(None, 0, 128)):
        reasons = launch.register_reasons(problem._replace(visibility=visibility))
        assert len(reasons) == count
        assert all("softcap with a left bound at head dims up to 192" in x for x in reasons)
    assert not launch.register_reasons(problem._replace(visibility=Visibility(None, 0)))


def test_sections_hold_whole_groups() -> None:
    plan = plans.forward_plan(plans.ForwardKey(128, True, 1024))
    assert plans.heads_at_a_time(plan, 1024, 128, 4) == 4 * (plan.section_bytes // (4 * 1024 * 128))
    assert plans.heads_at_a_time(plan, 2**20, 128, 4) == 4


def test_the_last_heads_may_be_one_section() -> None:
    plan = plans.ForwardPlan(2, 128, 2, plans.DYNAMIC, 1, 1, section_bytes=8 << 20)
    assert plans.heads_in_sections(plan, 1024, 128, 1, 250) == 250
    plan = replace(plan, last_bytes=32 << 20)  # 16 heads a section, 64 in the last
    assert plans.heads_in_sections(plan, 1024, 128, 1, 250) == (250 - 64) // 16 * 16
    assert plans.heads_in_sections(plan, 1024, 128, 1, 60) == 0
    assert plans.heads_in_sections(plan, 1024, 128, 4, 1000) == (1000 - 256) // 64 * 64


def test_heads_are_packed_where_tiles_are_saved() -> None:
    def packed(block_m: int, group: int, rows: int, *rest: bool | None) -> int:
        return plans.packed_heads(block_m, group, rows, 1, *(rest or (False, None)))

    assert packed(128, 4, 4096) == 1  # 32 tiles for each head, or 128 for four
    assert packed(128, 4, 100) == 1  # 4 tiles or 4
    assert packed(128, 4, 90) == 4  # 4 tiles or 3
    assert packed(128, 8, 17) == 8
    assert packed(192, 4, 193) == 4
    assert packed(128, 1, 17) == 1
    for group in (3, 5, 6, 12, 128):  # no blocks of rows for TMA
        assert packed(128, group, 17, False, True) == 1
    assert packed(128, 4, 4096, False, True) == 4
    assert packed(128, 4, 17, False, False) == 1


def test_heads_of_packed_sequences_are_packed_by_their_mean_length() -> None:
    assert plans.packed_heads(128, 4, 16 * 2048, 16, True, None) == 1
    assert plans.packed_heads(128, 4, 16 * 400, 16, True, None) == 4
    assert plans.packed_heads(128, 4, 0, 16, True, None) == 4


def test_alibi_with_softcap_is_refused_where_it_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_TRITON", (3, 6))
    for headdim, softcap, count in ((64, 20.0, 0), (128, 0.0, 0), (128, 20.0, 1), (256, 0.0, 0)):
        q = torch.empty(1, 300, 2, headdim, dtype=torch.bfloat16)
        transform = make_transform(headdim, softcap=softcap, alibi_slopes=torch.ones(2))
        reasons = launch.register_reasons(AttentionProblem(q, q, q, transform))
        assert len(reasons) == count
        assert all("ALiBi with softcap at head dims up to 64" in reason for reason in reasons)


def test_tiles_are_in_pieces_or_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    for triton, columns in (((3, 6), [64, 96, 192, 256]), ((3, 9), [64, 128, 256, 256])):
        monkeypatch.setattr(launch, "_TRITON", triton)
        for headdim, expected in zip((8, 72, 160, 200), columns, strict=True):
            q = torch.empty(1, 300, 2, headdim, dtype=torch.bfloat16)
            v = torch.empty(1, 300, 2, 128, dtype=torch.bfloat16)
            problem = AttentionProblem(q, q, v, make_transform(headdim))
            assert launch.columns_of(problem) == (expected, 128)


def test_maxima_and_weights_under_products_are_counted() -> None:
    early, late = "FMNMX R1, R2, R3 ;\n" * 2 + "MUFU.EX2 R1, R2 ;\n" * 3, "MUFU.EX2 R3, R4 ;\n"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x{} ;\n"
    code = late + wait.format(1) + early + wait.format(0) + late + wait.format(0) + late
    assert sm90.softmax_under_products(code) == [(2, 3)]
    assert sm90.softmax_under_products(code + wait.format(3) + late) == [(2, 3), (0, 1)]
    assert sm90.softmax_under_products(late + wait.format(0) + early) == []
