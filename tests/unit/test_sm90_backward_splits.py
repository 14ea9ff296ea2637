"""The Hopper backward with the query heads of a key head divided among programs, in the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

import gluon_model
from support import (
    alibi_slopes,
    assert_same_bits,
    check,
    dense,
    extended,
    poisoned_like,
    thinned,
    varlen,
)
from test_sm90_backward_model import (
    BATCH_MASKS,
    BATCHES,
    Fault,
    _for_mask,
    _inside_nan,
    check_packed_sequences,
    int32,
    solve,
)
from test_sm90_backward_model import PLANS as NARROW_PLANS
from test_sm90_backward_wide_model import PLANS as WIDE_PLANS

from flash_attn.backends.sm90 import launch_backward
from flash_attn.backends.sm90.plans_backward import BackwardPlan, plan_backward, splits_of_group
from flash_attn.core import reference
from flash_attn.core.problem import AttentionProblem, BackwardInputs, Visibility, make_transform

FP16 = torch.float16
NARROW = [
    "in use, d64",
    "in use, d128",
    "in use, d128 causal",
    "in use, d96",
    "in use, d96 ordered causal",
    "in use, d128 ordered causal",
    "d64 group reversed",
    "in use, d64 long",
    "d64",
    "d64, first stores",
    "d128, rotated first stores",
]
WIDE = ["d256", "d192", "d192 with one held"]
SPLIT_KERNELS = {
    64: ["row_statistics_sm90", "attention_backward_sm90", "finish_keys_sm90", "finish_dq_sm90"],
    192: ["row_statistics_sm90", "attention_backward_wide_sm90", "attention_backward_rows_sm90",
          "finish_keys_sm90"],
}  # fmt: skip
PLANS = {n: NARROW_PLANS[n] for n in NARROW} | {n: WIDE_PLANS[n] for n in WIDE}


def load(change: tuple[str, str] | None = None) -> Any:
    """The modelled kernels; ``change``, as in the model, is of those for head dims up to 128."""
    narrow = gluon_model.load_kernels("sm90_backward", change)
    wide = gluon_model.load_kernels("sm90_backward_rows")
    names = ("attention_backward_wide_sm90", "attention_backward_rows_sm90")
    return SimpleNamespace(**vars(narrow), **{name: getattr(wide, name) for name in names})


@pytest.fixture(scope="module")
def kernels() -> Any:
    return load()


@pytest.mark.parametrize(
    ("name", "shape"),
    thinned(PLANS, [
        ((70, 150), (2, 1), 2, 0, {"causal": True}),
        ((130, 200), (8, 2), 4, 0, {}),
        ((100, 300), (7, 1), 2, 8, {"window_size": (64, 0)}),  # parts of 3 and of 4 heads
        ((150, 90), (5, 1), 5, 0, {"window_size": (30, 20)}),
        ((1, 1), (6, 2), 3, 0, {}),
        ((90, 130), (6, 2), 2, 0, {"softcap": 2.0, "causal": True}),
    ], keep_each=3),
)  # fmt: skip
def test_gradients(kernels: Any, name: str, shape: tuple[Any, ...]) -> None:
    seqlens, heads, splits, less, options = shape
    plan = _for_mask(PLANS[name], options)._replace(splits=splits)
    dtype = torch.bfloat16 if seqlens == (130, 200) else FP16
    inputs = dense("cpu", dtype, 2, seqlens, heads, plan.width - less, **options)
    check(inputs, solve(kernels, inputs, plan))


@pytest.mark.parametrize("name", PLANS)
def test_every_interleaving_gives_the_same(kernels: Any, name: str) -> None:
    options = {} if PLANS[name].rotates else {"causal": True}
    inputs = dense("cpu", FP16, 1, (100, 200), (3, 1), PLANS[name].width, **options)
    for splits in (2, 3):
        plan = PLANS[name]._replace(splits=splits)
        first = solve(kernels, inputs, plan)
        for seed in range(1, 6):
            again = solve(kernels, inputs, plan, seed, known=first, resident=5)
            # dq is summed in the order in which programs arrive.
            same = again if plan.deterministic else again._replace(dq=first.dq)
            assert_same_bits(same, first, f"seed {seed}")


def test_dq_does_not_depend_on_splits(kernels: Any) -> None:
    """In order, each query head is added to as if no other one were."""
    plan = PLANS["in use, d128 ordered causal"]
    inputs = dense("cpu", FP16, 1, (200, 300), (4, 1), 128, causal=True)
    whole = solve(kernels, inputs, plan)
    for splits in (2, 3, 4):
        got = solve(kernels, inputs, plan._replace(splits=splits), known=whole)
        assert torch.equal(got.dq, whole.dq)


RAGGED = [
    "in use, d64",
    "in use, d96 ordered causal",
    "in use, d128 ordered causal",
    "d64, first stores",
]


@pytest.mark.parametrize(
    ("name", "batch", "mask"), thinned(RAGGED, BATCHES, BATCH_MASKS, keep_each=3)
)
def test_packed_sequences(kernels: Any, name: str, batch: str, mask: str) -> None:
    plan = _for_mask(PLANS[name], BATCH_MASKS[mask])._replace(splits=2)
    check_packed_sequences(kernels, plan, batch, mask, heads=(3, 1))


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [0, 50])
def test_rows_in_use_and_chunks(kernels: Any, name: str, packed: bool, chunk: int) -> None:
    plan = PLANS[name]._replace(splits=3)
    if packed:
        inputs = varlen("cpu", FP16, [80, 20, 40, 5], [9, 140, 150, 30], (6, 2), plan.width,
                        window_size=(20, 10))  # fmt: skip
    else:
        inputs = dense("cpu", FP16, 4, (90, 150), (6, 2), plan.width, window_size=(20, 10))
    inputs = extended(inputs, seqused_q=int32(70, 0, 33, 200), seqused_k=int32(0, 20, 150, -3),
                      attention_chunk=chunk)  # fmt: skip
    check(inputs, solve(kernels, inputs, plan))


def test_dense_rows_in_use_of_results_with_any_strides(kernels: Any) -> None:
    """Sequences, rows and heads anywhere; neither TMA nor equal distances of rows are needed."""
    inputs = dense("cpu", FP16, 2, (90, 150), (4, 2), 64, causal=True)
    inputs = extended(inputs, seqused_k=int32(140, 66))
    buffers = [torch.full((2, 200, 3, 67), float("nan"), dtype=FP16) for _ in range(2)]
    dk, dv = (x[:, 11:161, 1:, 3:] for x in buffers)
    plan = PLANS["in use, d64"]._replace(splits=2)
    check(inputs, solve(kernels, inputs, plan, results=(poisoned_like(inputs.q), dk, dv)))
    for buffer, view in zip(buffers, (dk, dv), strict=True):
        assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


@pytest.mark.parametrize("name", ["in use, d64", "in use, d96", "in use, d128", "d256", "d192"])
def test_nothing_outside_is_read_or_written(kernels: Any, name: str) -> None:
    plan = _for_mask(PLANS[name], {"causal": True})._replace(splits=2)
    inputs = dense("cpu", FP16, 2, (70, 150), (4, 2), plan.width - 8, causal=True)
    inputs = inputs.but(**{n: _inside_nan(getattr(inputs, n)) for n in ("q", "k", "v", "dout")})
    results = tuple(_inside_nan(x) for x in (inputs.q, inputs.k, inputs.v))
    check(inputs, solve(kernels, inputs, plan, results=results))
    for view in results:
        buffer = view._base
        assert buffer is not None
        assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


@pytest.mark.parametrize("packed", [False, True])
def test_alibi(kernels: Any, packed: bool) -> None:
    plan = PLANS["in use, d64"]._replace(splits=2)
    if packed:
        inputs = varlen("cpu", FP16, [90, 0, 130], [70, 10, 200], (6, 2), 64, 20, causal=True)
    else:
        inputs = dense("cpu", FP16, 2, (150, 200), (6, 2), 64, causal=True)
    inputs = inputs.but(alibi_slopes=alibi_slopes("cpu", 6))
    check(inputs, solve(kernels, inputs, plan))


@pytest.mark.parametrize("headdims", [(64, 40), (40, 128), (96, 192)])
def test_head_dims_of_v(kernels: Any, headdims: tuple[int, int]) -> None:
    inputs = dense("cpu", FP16, 2, (70, 130), (4, 2), headdims[0], causal=True)
    other = dense("cpu", FP16, 2, (70, 130), (4, 2), headdims[1], causal=True)
    inputs = extended(inputs.but(v=other.v, dout=other.dout))
    plan = plan_backward(max(headdims), True, 70, 130)._replace(splits=2)
    check(inputs, solve(kernels, inputs, plan))


FAULTS = [
    Fault("parts are added to the wrong key head", PLANS["in use, d64"],
          "    block = (batch * nheads_k + head).to(gl.int64) * splits",
          "    block = (batch * nheads_k + 0 * head).to(gl.int64) * splits"),
    Fault("a part is forgotten", PLANS["in use, d64"],
          "gl.int32, LAYOUT) < splits", "gl.int32, LAYOUT) < splits - 1"),
    Fault("the parts of a head begin at the same query head", PLANS["in use, d128"],
          "    return key_head, key_head * group + first, end - first",
          "    return key_head, key_head * group, end - first"),
    Fault("a query head belongs to no part", PLANS["in use, d128"],
          "    end = (number + 1) * group // splits", "    end = first + group // splits"),
    Fault("keys of the part's number", PLANS["in use, d64"],
          "        key_head, first_head, group = share_of(",
          "        _, first_head, group = share_of("),
    Fault("both consumers leave their sums in one place", PLANS["in use, d64"],
          "number = LANE * TILES", "number = 0 * TILES"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_faults_are_noticed(fault: Fault) -> None:
    changed = load((fault.old, fault.new))
    plan = fault.plan._replace(splits=2, rotates=False)
    inputs = dense("cpu", FP16, 1, (130, 130), (6, 2), plan.width)
    with pytest.raises((AssertionError, RuntimeWarning)):
        check(inputs, solve(changed, inputs, plan))


# How many


@pytest.mark.parametrize(
    ("programs", "group", "is_masked", "splits"),
    [
        (16, 8, True, 8),  # 8 heads to 1 key head, 2048 keys
        (256, 8, True, 2),  # 2 sequences of 8192 keys, 16 to 2
        (256, 7, True, 2),  # 2 sequences of 4096 keys, 28 to 4
        (512, 4, True, 1),
        (264, 8, True, 1),
        (263, 8, True, 2),
        (64, 8, True, 4),  # of 5 some parts would have one head and others two
        (100, 8, True, 4),  # not 3
        (41, 8, True, 8),  # not 7
        (60, 7, True, 7),  # not 5
        (100, 7, True, 3),  # nothing is near
        (140, 3, True, 3),  # not 2
        (16, 1, True, 1),
        (16, 8, False, 8),
        (64, 8, False, 2),  # one turn of halves, or four of eighths
        (128, 8, False, 1),  # one turn
        (132, 8, False, 1),
        (140, 8, False, 2),  # three turns of halves, not two of all
        (256, 8, False, 1),
    ],
)
def test_how_many(programs: int, group: int, is_masked: bool, splits: int) -> None:
    assert splits_of_group(programs, group, is_masked, 132) == splits


@pytest.mark.parametrize(
    ("programs", "group", "splits"),
    [
        (16, 8, 8),
        (256, 8, 4),  # 2 sequences of 8192 keys, 16 to 2
        (1024, 4, 2),  # 4 of 4096, 32 to 8
        (1055, 4, 2),
        (1056, 4, 1),  # enough programs for each multiprocessor
        (400, 7, 2),
        (256, 7, 4),
        (300, 3, 3),  # not 2
        (300, 1, 1),
    ],
)
def test_how_many_where_the_longest_come_last(programs: int, group: int, splits: int) -> None:
    assert splits_of_group(programs, group, True, 132, is_reversed=True) == splits


@pytest.mark.parametrize(
    ("is_masked", "is_reversed"), [(False, False), (True, False), (True, True)]
)
def test_workspaces_are_bounded(is_masked: bool, is_reversed: bool) -> None:
    """Some programs for each multiprocessor, and never more parts than query heads."""
    for multiprocessors in (78, 114, 132):
        for group in (1, 2, 3, 7, 8, 71):
            for programs in range(1, 3000):
                splits = splits_of_group(programs, group, is_masked, multiprocessors, is_reversed)
                assert 1 <= splits <= group
                most = (26 if is_reversed else 6 if is_masked else 4) * multiprocessors
                assert splits == 1 or programs * splits <= most


@pytest.mark.parametrize(
    ("batch", "seqlen", "heads", "splits", "section"),
    [
        (1, 8192, (8, 1), 4, 2),
        (1, 8192, (8, 1), 5, 3),  # 3 and 2 parts, not 2, 2 and 1
        (2, 4096, (28, 4), 2, 4),  # what makes 128 programs
        (3, 4096, (12, 3), 1, 5),  # 5 and 4 heads: 3 would not make a GPU's worth of programs
        (3, 1024, (8, 4), 1, 12),
        (5, 2048, (4, 2), 1, 10),  # not 8 and 2
    ],
)
def test_sections_are_of_equal_size(
    batch: int, seqlen: int, heads: tuple[int, int], splits: int, section: int
) -> None:
    q = torch.empty(batch, seqlen, heads[0], 128, dtype=FP16, device="meta")
    k = q[:, :, : heads[1]]
    problem = AttentionProblem(q, k, k, make_transform(128), Visibility(None, 0))
    plan = plan_backward(128, True, seqlen)._replace(splits=splits)
    assert launch_backward._section(problem, plan) == section


def recorded(inputs: Any, plan: BackwardPlan | None = None) -> list[gluon_model.Launch]:
    """What a backward pass launches on a GPU with 132 multiprocessors."""
    problem = inputs.problem()
    forward = reference.attention(problem, torch.float32)
    grads = tuple(poisoned_like(x) for x in (inputs.q, inputs.k, inputs.v))
    arguments = BackwardInputs(inputs.dout, forward.out.to(inputs.q.dtype), forward.softmax_lse,
                               *grads, torch.zeros(2, dtype=torch.int64))  # fmt: skip
    with mock.patch.object(launch_backward, "multiprocessors_of", return_value=132):
        return gluon_model.record(lambda: launch_backward.backward(problem, arguments, plan))


@pytest.mark.parametrize("headdim", [64, 192])
def test_few_programs_are_split(headdim: int) -> None:
    """The launches agree on the workspace: one part for each query head."""
    inputs = dense("cpu", FP16, 2, (200, 300), (4, 2), headdim, causal=True)
    launches = recorded(inputs)
    assert [one.name for one in launches] == SPLIT_KERNELS[headdim]
    keys = 128 if headdim == 64 else 64
    blocks = -(-300 // keys) * 2 * 4
    assert launches[1].grid == (blocks,)
    (finish,) = (one for one in launches if one.name == "finish_keys_sm90")
    for sums in finish.arguments[:2]:
        assert sums.shape == (blocks * keys * headdim,)
        assert any(sums is x for x in launches[1].arguments)


def test_packed_sequences_are_counted_in_tiles() -> None:
    inputs = varlen("cpu", FP16, [70, 133], [190, 600], (4, 1), 64, causal=True)
    assert recorded(inputs)[-3].grid == ((790 // 128 + 2 + 2) * 4,)


def test_one_head_to_a_key_head_is_not_split() -> None:
    launches = recorded(dense("cpu", FP16, 1, (70, 70), (2, 2), 64, causal=True))
    assert "finish_keys_sm90" not in [one.name for one in launches]


@pytest.mark.parametrize("splits", [0, 3])
def test_plans_that_do_not_fit_the_heads_are_refused(splits: int) -> None:
    inputs = dense("cpu", FP16, 1, (70, 70), (4, 2), 64)
    with pytest.raises(ValueError, match="2 query heads to a key head"):
        recorded(inputs, PLANS["in use, d64"]._replace(splits=splits))
