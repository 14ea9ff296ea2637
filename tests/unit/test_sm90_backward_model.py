"""The Hopper backward's source, run in a model of Gluon: results, barriers and memory hazards."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

import gluon_model
from support import (
    Inputs,
    Solution,
    alibi_slopes,
    assert_same_bits,
    check,
    check_error,
    dense,
    exact_answer,
    extended,
    plain_answer,
    poisoned_like,
    thinned,
    varlen,
)

from flash_attn.backends.sm90 import launch_backward
from flash_attn.backends.sm90.plans_backward import BackwardPlan, plan_backward, plan_ordered
from flash_attn.core import reference
from flash_attn.core.problem import AttentionProblem, BackwardInputs, Visibility, make_transform
from flash_attn.core.sequences import sequences

D64_GROUP = BackwardPlan(64, 64, 3, 3, 3, dq_group=True, registers=208, dq_registers=72)
D64 = BackwardPlan(128, 64, adder=True)
D128 = BackwardPlan(64, 128, eager_dv=True, adder=True)
D96 = D128._replace(multiplied=96)
EARLY = {"early_lse": True, "delta_first": True}
PLANS = {
    "d96": D96,
    "d96 early, one do": D96._replace(eager_dv=False, do_slots=1, **EARLY),
    "d96 group": D96._replace(dq_group=True, registers=208, dq_registers=64),
    "d64 group": D64_GROUP,
    "d64 group eager": D64_GROUP._replace(eager_dv=True, q_slots=2, do_slots=2, ds_slots=1),
    "d64 group early": D64_GROUP._replace(**EARLY),
    "d64 group, keys kept": D64_GROUP._replace(keeps_keys=True, early_lse=True),
    "d64": D64,
    "d64 early": D64._replace(**EARLY),
    "d128 eager": D128,
    "d128, one do": D128._replace(eager_dv=False, do_slots=1),
    "d128 delta first": D128._replace(delta_first=True, do_slots=1),
}
ADDER = {"adder": True, "dq_slots": 4}
ORDERED = {**ADDER, "deterministic": True, "in_flight": 1}
IN_USE = {
    "d64": plan_backward(64, True, 512),
    "d64 long": plan_backward(64, True, 4096),
    "d64 full": plan_backward(64, False, 512),
    "d128": plan_backward(128, False, 512),
    "d128 causal": plan_backward(128, True, 512),
    "d128 causal long": plan_backward(128, True, 2048),
    "d96": plan_backward(96, False, 512),
    "d96 causal": plan_backward(96, True, 512),
    "d96 ordered causal": plan_ordered(96, True, 512),
    "d64 ordered": plan_ordered(64, True, 512),
    "d128 ordered": plan_ordered(128, False, 512),
    "d128 ordered causal": plan_ordered(128, True, 512),
}
PLANS |= {f"in use, {name}": plan for name, plan in IN_USE.items()}
PLANS |= {
    "d64 group ordered": D64_GROUP._replace(**ORDERED),
    "d64 group ordered, nothing in flight": D64_GROUP._replace(
        adder=True, dq_slots=3, deterministic=True
    ),
    "d64 ordered": D64._replace(**ORDERED),
    "d128 ordered": D128._replace(**ORDERED),
    "d128 ordered, two buffers": D128._replace(adder=True, deterministic=True, in_flight=3),
    "d128 reversed": D128._replace(**ORDERED, is_reversed=True),
    "d64 group reversed": D64_GROUP._replace(
        section_bytes=1, adder=True, deterministic=True, in_flight=2, is_reversed=True
    ),
    "d64 group adder": D64_GROUP._replace(**ADDER),
    "d128 adder": D128._replace(**ADDER),
}
STORED = {**ADDER, "first_stores": True, "in_flight": 1}
PLANS |= {
    "d64 group, first stores": D64_GROUP._replace(**STORED),
    "d64 group, first stores, three in flight": D64_GROUP._replace(
        **{**STORED, "in_flight": 3, "dq_slots": 3}
    ),
    "d64, first stores": D64._replace(**STORED),
    "d128, first stores": D128._replace(**STORED),
    "d128, first stores, nothing in flight": D128._replace(
        adder=True, first_stores=True, is_reversed=True
    ),
    "d64 group, first stores in order": D64_GROUP._replace(**ORDERED, first_stores=True),
    "d64, first stores in order": D64._replace(**ORDERED, first_stores=True),
    "d128, first stores reversed": D128._replace(**ORDERED, first_stores=True, is_reversed=True),
}
ROTATED = {
    "d64 group, rotated": D64_GROUP._replace(**ADDER, rotates=True),
    "d64, rotated": D64._replace(rotates=True),
    "d128, rotated": D128._replace(rotates=True),
    "d64 group, rotated first stores": D64_GROUP._replace(**STORED, rotates=True),
    "d64, rotated first stores": D64._replace(**STORED, rotates=True),
    "d128, rotated first stores": D128._replace(**STORED, rotates=True),
    "d128, rotated first stores, nothing in flight": D128._replace(
        adder=True, first_stores=True, rotates=True
    ),
}
PLANS |= ROTATED
FP16 = torch.float16
SUMS = gluon_model.argument("sm90_backward_around", "row_statistics_sm90", "dq_sums")
KERNELS = ["row_statistics_sm90", "attention_backward_sm90", "finish_dq_sm90"]
SPLIT_KERNELS = [*KERNELS[:2], "finish_keys_sm90", KERNELS[2]]


@pytest.fixture(scope="module")
def kernels() -> Any:
    return gluon_model.load_kernels("sm90_backward")


def solve(
    kernels: Any,
    inputs: Inputs,
    plan: BackwardPlan,
    seed: int = 0,
    results: Any = None,
    empty_lse: float = float("-inf"),
    known: Solution | None = None,
    resident: int = 3,
) -> Solution:
    """Gradients by the model; output and log-sum-exp by the reference, or ``known`` ones.

    ``empty_lse`` is what the kernels are told of a row that sees no key; ``resident`` programs run
    at a time.
    """
    problem = inputs.problem()
    if known is None:
        forward = reference.attention(problem, torch.float64)
        out, lse = forward.out.to(inputs.q.dtype), forward.softmax_lse.float()
    else:
        out, lse = known.out, known.lse
    grads = results or tuple(poisoned_like(x) for x in (inputs.q, inputs.k, inputs.v))
    state = torch.zeros(2, dtype=torch.int64)
    told = lse.masked_fill(lse == float("inf"), empty_lse)
    arguments = BackwardInputs(inputs.dout, out, told, *grads, state)
    launches = gluon_model.record(lambda: launch_backward.backward(problem, arguments, plan))
    # For head dims above 128 the main kernel is another one, and dq may have one of its own.
    expected = KERNELS if plan.splits == 1 else SPLIT_KERNELS
    if plan.rows is not None:
        expected = [*KERNELS[:2], "attention_backward_rows_sm90", *expected[2:-1]]
    assert [one.name.replace("_wide", "") for one in launches][-len(expected) :] == expected
    for one in launches:  # anything may lie in a workspace
        if one.name == "row_statistics_sm90":
            one.arguments[SUMS].fill_(float("nan"))
        if one.name == "finish_keys_sm90":
            one.arguments[0].fill_(float("nan"))
            one.arguments[1].fill_(float("nan"))
    for one in launches:
        gluon_model.run_launch(kernels, one, seed=seed, resident=resident)
    return Solution(out, lse, *grads)


def _for_mask(plan: BackwardPlan, options: dict[str, Any]) -> BackwardPlan:
    """The plan, which only without a mask can rotate."""
    return plan._replace(rotates=plan.rotates and not {"causal", "window_size"} & set(options))


@pytest.mark.parametrize(
    ("name", "shape"),
    thinned(PLANS, [
        ((128, 128), (1, 1), 0, {}),
        ((130, 200), (4, 2), 0, {"causal": True}),
        ((333, 100), (2, 1), 24, {"causal": True}),  # the first rows see no key
        ((100, 500), (1, 1), 0, {"window_size": (64, 0)}),  # most keys are seen by no query
        ((190, 260), (2, 2), 8, {"window_size": (30, 20)}),
        ((1, 1), (1, 1), 0, {"causal": True}),
        ((200, 130), (2, 1), 0, {"softcap": 2.0, "causal": True}),
        ((333, 300), (4, 2), 8, {}),
    ], keep_each=8, always=lambda name: name.startswith("in use")),
)  # fmt: skip
def test_gradients(kernels: Any, name: str, shape: tuple[Any, ...]) -> None:
    seqlens, heads, less, options = shape
    plan = _for_mask(PLANS[name], options)
    dtype = torch.bfloat16 if seqlens == (130, 200) else FP16
    inputs = dense("cpu", dtype, 1, seqlens, heads, plan.width - less, **options)
    check(inputs, solve(kernels, inputs, plan))


def test_both_infinities_stand_for_rows_without_keys(kernels: Any) -> None:
    inputs = dense("cpu", FP16, 1, (333, 100), (2, 1), 64, causal=True)
    for infinity in (float("inf"), float("-inf")):
        check(inputs, solve(kernels, inputs, D64, empty_lse=infinity))


@pytest.mark.parametrize(
    "name",
    [name for (name,) in thinned(PLANS, keep_each=2, always=lambda x: x.startswith("in use"))],
)
def test_every_interleaving_gives_the_same(kernels: Any, name: str) -> None:
    mask = {} if PLANS[name].rotates else {"causal": True}
    inputs = dense("cpu", FP16, 1, (200, 300), (2, 1), PLANS[name].width, **mask)
    first = solve(kernels, inputs, PLANS[name])
    for seed in range(1, 12):
        again = solve(kernels, inputs, PLANS[name], seed)
        # dq is summed in the order in which programs arrive.
        same = again if PLANS[name].deterministic else again._replace(dq=first.dq)
        assert_same_bits(same, first, f"seed {seed}")
        torch.testing.assert_close(again.dq, first.dq, atol=2e-3, rtol=2e-3)


def _inside_nan(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the midst of NaN: more rows, heads and columns follow."""
    batch, rows, heads, columns = x.shape
    buffer = x.new_full((batch, rows + 70, heads + 1, columns + 8), float("nan"))
    view = buffer[:, :rows, :heads, :columns]
    view.copy_(x)
    return view


@pytest.mark.parametrize(
    "name",
    ["d64 group early", "d128 eager", "in use, d128 causal", "in use, d64 ordered",
     "in use, d128 ordered causal"],
)  # fmt: skip
def test_nothing_outside_is_read_or_written(kernels: Any, name: str) -> None:
    plan = PLANS[name]
    inputs = dense("cpu", FP16, 2, (70, 150), (2, 1), plan.width, causal=True)
    inputs = inputs.but(**{n: _inside_nan(getattr(inputs, n)) for n in ("q", "k", "v", "dout")})
    results = tuple(_inside_nan(x) for x in (inputs.q, inputs.k, inputs.v))
    check(inputs, solve(kernels, inputs, plan, results=results))
    for view in results:
        buffer = view._base
        assert buffer is not None
        assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


def test_unseen_keys_may_be_nan(kernels: Any) -> None:
    inputs = dense("cpu", FP16, 1, (100, 400), (2, 1), 64, window_size=(64, 0))
    want = solve(kernels, inputs, D64)
    problem = inputs.problem()
    for x in (inputs.k, inputs.v):
        x[:, :236] = float("nan")
    grads = tuple(poisoned_like(x) for x in (inputs.q, inputs.k, inputs.v))
    state = torch.zeros(2, dtype=torch.int64)
    arguments = BackwardInputs(inputs.dout, want.out, want.lse, *grads, state)
    for one in gluon_model.record(lambda: launch_backward.backward(problem, arguments, D64)):
        gluon_model.run_launch(kernels, one)
    assert_same_bits(Solution(want.out, want.lse, *grads), want, "NaN in unseen keys")


def test_a_key_block_without_queries(kernels: Any) -> None:
    """Steps: none. Barriers must not be left waiting, and the gradients are zeros."""
    for plan in (D64_GROUP, D128):
        inputs = dense("cpu", FP16, 1, (10, 400), (1, 1), plan.width, window_size=(5, 0))
        got = solve(kernels, inputs, plan)
        assert not got.dk[:, :256].any()
        assert not got.dv[:, :256].any()


def test_inputs_that_tma_cannot_address_are_copied(kernels: Any) -> None:
    inputs = dense("cpu", FP16, 1, (40, 50), (2, 2), 64)
    dout = inputs.dout[:, :, :1].expand(1, 40, 2, 64)
    odd = torch.empty(1, 50, 2, 67, dtype=FP16)[..., :64]
    odd.copy_(inputs.k)
    inputs = inputs.but(dout=dout, k=odd)
    check(inputs, solve(kernels, inputs, D64))


IN_ORDER = ["d64 group reversed", "d64 ordered", "d128 ordered", "d128 reversed",
            "in use, d96 ordered causal"]  # fmt: skip
FIRST_STORES = ["d64 group, first stores", "d64, first stores", "d128, first stores reversed",
                "d64 group, first stores in order", "in use, d128 causal",
                "in use, d96 causal"]  # fmt: skip
RAGGED = [*IN_ORDER, *FIRST_STORES]
WITHOUT_MASKS = [*RAGGED, "d128, rotated first stores", "d64 group, rotated"]
BATCHES = {
    "several": ([130, 40, 1], [100, 300, 1]),
    "empty": ([0, 70, 0, 0, 65, 0], [0, 200, 0, 30, 0, 0]),
    "of one block": ([128, 128], [128, 128]),
    "tiny": ([1, 2, 3, 1, 1], [3, 2, 1, 1, 1]),
}
BATCH_MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "left": {"window_size": (20, 0)},
    "window": {"window_size": (30, 20), "softcap": 2.0},
}


@pytest.mark.parametrize(
    ("seqlens", "heads", "causal", "heads_in_section", "heads_in_order"),
    [
        ((4096, 4096), (16, 16), True, 8, 4),  # what 32 MB hold, and 16 MB
        ((4096, 4096), (32, 8), True, 4, 1),  # what makes 128 programs; 32 MB hold 2
        ((4096, 4096), (32, 8), False, 1, 4),
        ((8192, 8192), (16, 2), True, 2, 1),
        ((1024, 1024), (32, 8), True, 16, 4),
        ((1024, 1024), (16, 16), True, 4, 16),  # 4 MB
        ((1024, 100), (16, 8), True, 16, 8),  # there are no more than 16
    ],
)
def test_sections(
    seqlens: Any, heads: Any, causal: bool, heads_in_section: int, heads_in_order: int
) -> None:
    q = torch.empty(2, seqlens[0], heads[0], 128, dtype=FP16, device="meta")
    k = torch.empty(2, seqlens[1], heads[1], 128, dtype=FP16, device="meta")
    visibility = Visibility(None, 0 if causal else None)
    problem = AttentionProblem(q, k, k, make_transform(128), visibility)
    plan = plan_backward(128, causal, *seqlens)
    section = launch_backward._section(problem, plan)
    assert section == heads_in_section
    ordered = plan_ordered(128, causal, *seqlens)
    assert launch_backward._section(problem, ordered) == heads_in_order


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("seqlens", [(64, 700), (130, 640), (320, 384), (700, 100), (400, 1)])
def test_rotation(kernels: Any, name: str, seqlens: tuple[int, int]) -> None:
    """More, as many and fewer blocks of queries than of keys, all programs of a head at a time."""
    plan = PLANS[name]
    inputs = dense("cpu", FP16, 1, seqlens, (3, 1), plan.width)
    known = None
    for seed in range(3):
        got = solve(kernels, inputs, plan, seed, known=known, resident=8)
        check(inputs, got)
        if known is not None:
            assert_same_bits(got._replace(dq=known.dq), known, f"seed {seed}")
        known = got


def test_programs_that_begin_at_every_block_could_wait_in_a_circle() -> None:
    """As claiming_adder says; every other block is tested above."""
    changed = gluon_model.load_kernels("sm90_backward", ("PAIR: gl.constexpr = 2 * ",
                                                         "PAIR: gl.constexpr = "))  # fmt: skip
    plan = ROTATED["d64 group, rotated first stores"]
    inputs = dense("cpu", FP16, 1, (128, 384), (1, 1), plan.width)

    def run_all() -> None:
        for seed in range(20):
            solve(changed, inputs, plan, seed, resident=8)

    with pytest.raises(gluon_model.ModelError, match="deadlock"):
        run_all()


def test_where_programs_begin(kernels: Any) -> None:
    """In range, at every other block at most, spread evenly; also where 32 bits do not suffice."""
    for block_m, seqlen_q, seqlen_k in [(64, 512, 512), (64, 500, 2048), (128, 1024, 300),
                                        (64, 64, 640), (64, 2**23, 2**23)]:  # fmt: skip
        config = mock.Mock(BLOCK_M=block_m, BLOCK_N=128)
        end = -(-seqlen_q // block_m) * block_m
        keys = range(0, seqlen_k, max(128, seqlen_k // 64))
        found = [
            int(kernels.first_of_rotation(
                gluon_model.Int(key), gluon_model.Int(seqlen_k), gluon_model.Int(end), config
            ))
            for key in keys
        ]  # fmt: skip
        assert found == sorted(found)
        assert all(0 <= row < end and row % (2 * block_m) == 0 for row in found)
        if seqlen_q >= seqlen_k >= 128 * len(found):
            assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("name", "batch", "mask"), thinned(WITHOUT_MASKS, BATCHES, BATCH_MASKS, keep_each=3)
)
def test_packed_sequences(kernels: Any, name: str, batch: str, mask: str) -> None:
    check_packed_sequences(kernels, _for_mask(PLANS[name], BATCH_MASKS[mask]), batch, mask)


def check_packed_sequences(
    kernels: Any, plan: BackwardPlan, batch: str, mask: str, heads: tuple[int, int] = (2, 1)
) -> None:
    """Rows of no sequence lie behind the last one: they hold NaN and get zeros."""
    inputs = varlen("cpu", FP16, *BATCHES[batch], heads, plan.width, 9, **BATCH_MASKS[mask])
    for tensor, rows in zip(inputs.tensors, (0, 1, 1, 0), strict=True):
        tensor[int(inputs.lengths[rows][-1]) :] = float("nan")
    got = solve(kernels, inputs, plan)
    for grad, bounds in ((got.dq, 0), (got.dk, 1), (got.dv, 1)):
        assert not grad[int(inputs.lengths[bounds][-1]) :].any()
    zeros = inputs.but(**{
        n: x.nan_to_num(0.0) for n, x in zip(("q", "k", "v", "dout"), inputs.tensors, strict=True)
    })  # fmt: skip
    check(zeros, got._replace(out=got.out.nan_to_num(0.0)))


@pytest.mark.parametrize("name", IN_ORDER)
@pytest.mark.parametrize("chunk", [0, 90])
def test_packed_sequences_give_the_same_in_every_interleaving(
    kernels: Any, name: str, chunk: int
) -> None:
    """With chunks more than one program adds to a row only if they cross blocks of keys."""
    plan = PLANS[name]
    lengths = ([70, 133], [190, 600])
    inputs = varlen("cpu", FP16, *lengths, (2, 1), plan.width, window_size=(-1, 30))
    inputs = extended(
        inputs, seqused_q=int32(60, 130), seqused_k=int32(150, 370), attention_chunk=chunk
    )
    first = solve(kernels, inputs, plan)
    for seed in range(1, 12):
        assert_same_bits(solve(kernels, inputs, plan, seed), first, f"seed {seed}")


@pytest.mark.parametrize("name", RAGGED)
def test_nan_stays_in_its_sequence(kernels: Any, name: str) -> None:
    check_nan_stays_in_its_sequence(kernels, PLANS[name])


def check_nan_stays_in_its_sequence(kernels: Any, plan: BackwardPlan) -> None:
    lengths = ([70, 33, 90], [150, 61, 40])
    inputs = varlen("cpu", FP16, *lengths, (2, 1), plan.width, causal=True)
    want = solve(kernels, inputs, plan)
    for tensor, rows in zip(inputs.tensors, (0, 1, 1, 0), strict=True):
        begin, end = inputs.lengths[rows][1:3].tolist()
        tensor[begin:end] = float("nan")
    got = solve(kernels, inputs, plan)
    for one, other, rows in ((got.dq, want.dq, 0), (got.dk, want.dk, 1), (got.dv, want.dv, 1)):
        begin, end = inputs.lengths[rows][1:3].tolist()
        assert torch.equal(one[:begin], other[:begin])
        assert torch.equal(one[end:], other[end:])
        assert one[begin:end].isnan().any()


HOSTILE = {
    "decreasing": [0, 150, 70, 250],
    "negative": [-5, -1, 120, 250],
    "beyond": [0, 100, 260, 4000],
    "all beyond": [1000, 1100, 1200, 1300],
    "highest": [2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1],
    "lowest": [-(2**31), -(2**31), 3, 2**31 - 1],
    "backwards": [250, 200, 100, 0],
}


@pytest.mark.parametrize("bounds", HOSTILE)
@pytest.mark.parametrize("name", ["d64 group reversed", "d128 ordered", "d64, first stores"])
def test_bounds_that_lie(kernels: Any, name: str, bounds: str) -> None:
    check_bounds_that_lie(kernels, PLANS[name], bounds)


def check_bounds_that_lie(kernels: Any, plan: BackwardPlan, bounds: str) -> None:
    """Nothing outside is touched, nobody waits for ever, and gradients are numbers."""
    lies = torch.tensor(HOSTILE[bounds], dtype=torch.int32)
    honest = torch.tensor([0, 40, 41, 250], dtype=torch.int32)
    for cu_q, cu_k in ((lies, honest), (honest, lies), (lies, lies)):
        inputs = dense("cpu", FP16, 1, (250, 250), (2, 1), plan.width, window_size=(100, 0))
        inputs = inputs.but(
            **{n: _packed_inside_nan(getattr(inputs, n)) for n in ("q", "k", "v", "dout")},
            lengths=(cu_q, cu_k, 250, 250),
        )
        results = tuple(_packed_inside_nan(x) for x in (inputs.q, inputs.k, inputs.v))
        solve(kernels, inputs, plan, results=results)
        for view in results:
            assert view.isfinite().all()
            assert view._base is not None
            assert int(view._base.isnan().sum()) == view._base.numel() - view.numel()


def _packed_inside_nan(x: torch.Tensor) -> torch.Tensor:
    """Packed rows, or the one sequence of dense ones, in the midst of NaN."""
    rows, heads, columns = x.shape[-3:]
    buffer = x.new_full((rows + 140, heads + 1, columns + 8), float("nan"))
    view = buffer[70 : 70 + rows, :heads, :columns]
    view.copy_(x.view(rows, heads, columns))
    return view


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask", ["full", "left"])
def test_rows_in_use(kernels: Any, name: str, packed: bool, mask: str) -> None:
    check_rows_in_use(kernels, PLANS[name], packed, mask)


def check_rows_in_use(kernels: Any, plan: BackwardPlan, packed: bool, mask: str) -> None:
    """Rows that are not in use hold NaN and get zeros."""
    used_q, used_k = int32(70, 0, 33, 200), int32(0, 20, 150, -3)
    options = BATCH_MASKS[mask]
    if packed:
        inputs = varlen("cpu", FP16, [80, 20, 40, 5], [9, 140, 150, 30], (2, 1), plan.width,
                        **options)  # fmt: skip
    else:
        inputs = dense("cpu", FP16, 4, (90, 150), (2, 1), plan.width, **options)
    inputs = extended(inputs, seqused_q=used_q, seqused_k=used_k)
    got = solve(kernels, inputs, plan)
    check(inputs, got)
    problem = inputs.problem()
    hidden_q, hidden_k = (torch.ones(x.shape[:-2], dtype=torch.bool) for x in (inputs.q, inputs.k))
    for one in sequences(problem):
        hidden_q[one.q_rows] = False
        hidden_k[one.k_rows] = False
    assert hidden_q.any()
    assert hidden_k.any()
    for tensor, hidden in zip(inputs.tensors, (hidden_q, hidden_k, hidden_k, hidden_q),
                              strict=True):  # fmt: skip
        tensor[hidden] = float("nan")
    again = solve(kernels, inputs, plan)
    assert_same_bits(again, got, "NaN in rows that are not in use")
    assert not got.dq[hidden_q].any()
    assert not got.dk[hidden_k].any()
    assert not got.dv[hidden_k].any()


def test_packed_on_one_side(kernels: Any) -> None:
    check_packed_on_one_side(kernels, PLANS["d128 ordered"])


def check_packed_on_one_side(kernels: Any, plan: BackwardPlan) -> None:
    inputs = dense("cpu", FP16, 2, (70, 150), (2, 1), plan.width)
    bounds = int32(0, 90, 140)
    one = extended(inputs.but(q=inputs.q.flatten(0, 1), dout=inputs.dout.flatten(0, 1)),
                   cu_seqlens_q=bounds, max_seqlen_q=90)  # fmt: skip
    check(one, solve(kernels, one, plan))
    one = extended(inputs.but(k=inputs.k.flatten(0, 1), v=inputs.v.flatten(0, 1)),
                   cu_seqlens_k=bounds, max_seqlen_k=90)  # fmt: skip
    check(one, solve(kernels, one, plan))


@pytest.mark.parametrize("headdims", [(64, 40), (40, 128), (128, 64), (96, 128)])
@pytest.mark.parametrize("packed", [False, True])
def test_head_dims_of_v(kernels: Any, headdims: tuple[int, int], packed: bool) -> None:
    plan = PLANS["d64 group reversed" if max(headdims) <= 64 else "d128 reversed"]
    make = varlen if packed else dense
    lengths = ([70, 80], [90, 130]) if packed else (2, (70, 130))
    inputs = make("cpu", FP16, *lengths, (2, 1), headdims[0], causal=True)
    other = make("cpu", FP16, *lengths, (2, 1), headdims[1], causal=True)
    inputs = extended(inputs.but(v=other.v, dout=other.dout))
    check(inputs, solve(kernels, inputs, plan))


@pytest.mark.parametrize(
    ("name", "chunk", "options"),
    thinned(
        RAGGED,
        [1, 50, 128, 10000],
        [{}, {"causal": True}, {"window_size": (70, 10)}],
        keep_each=3,
    ),
)
def test_chunks(kernels: Any, name: str, chunk: int, options: dict[str, Any]) -> None:
    plan = PLANS[name]
    inputs = dense("cpu", FP16, 1, (150, 400), (2, 1), plan.width, **options)
    inputs = extended(inputs, attention_chunk=chunk)
    check(inputs, solve(kernels, inputs, plan))
    inputs = varlen("cpu", FP16, [90, 130], [300, 70], (2, 1), plan.width, **options)
    inputs = extended(inputs, attention_chunk=chunk, seqused_k=int32(290, 66))
    got = solve(kernels, inputs, plan)
    check(inputs, got)
    unseen = (290 - 90) // chunk * chunk
    for x in (inputs.k, inputs.v):
        x[:unseen] = float("nan")
    again = solve(kernels, inputs, plan, known=got)
    assert_same_bits(again, got, "NaN in keys before the first chunk")
    assert not got.dk[:unseen].any()


@pytest.mark.parametrize(
    ("name", "mask", "chunk"),
    thinned(WITHOUT_MASKS, ["full", "causal", "left"], [0, 50], keep_each=2),
)
def test_alibi(kernels: Any, name: str, mask: str, chunk: int) -> None:
    options = BATCH_MASKS[mask]
    plan = _for_mask(PLANS[name], options)
    plan = plan._replace(rotates=plan.rotates and not chunk)
    inputs = dense("cpu", FP16, 2, (150, 200), (4, 2), plan.width, **options)
    inputs = extended(inputs.but(alibi_slopes=alibi_slopes("cpu", 4)), attention_chunk=chunk)
    if chunk and plan.block_d > 64:
        assert launch_backward.unsupported_backward(inputs.problem()) != []
    check(inputs, solve(kernels, inputs, plan))
    inputs = varlen("cpu", FP16, [90, 0, 130], [70, 10, 200], (4, 2), plan.width, 20, **options)
    slopes = alibi_slopes("cpu", 4, 3)
    inputs = extended(inputs.but(alibi_slopes=slopes), attention_chunk=chunk)
    check(inputs, solve(kernels, inputs, plan))


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_of_the_log_sum_exp(kernels: Any, packed: bool) -> None:
    make: Any = varlen if packed else dense
    lengths = ([70, 80], [90, 30]) if packed else (2, (70, 130))
    inputs = make("cpu", FP16, *lengths, (4, 2), 64, causal=True)
    problem = inputs.problem()
    forward = reference.attention(problem, torch.float64)
    grads = tuple(poisoned_like(x) for x in (inputs.q, inputs.k, inputs.v))
    dlse = torch.randn_like(forward.softmax_lse.float())
    arguments = BackwardInputs(inputs.dout, forward.out.half(), forward.softmax_lse.float(), *grads,
                               torch.zeros(2, dtype=torch.int64), dlse)  # fmt: skip
    with mock.patch.object(launch_backward, "multiprocessors_of", return_value=132):
        launches = gluon_model.record(lambda: launch_backward.backward(problem, arguments))
    for one in launches:
        gluon_model.run_launch(kernels, one)
    true, owed = exact_answer(problem, inputs.dout, None, arguments.out, dlse)
    same = plain_answer(problem, inputs.dout, None, dlse)
    for name, got in zip(("dq", "dk", "dv"), grads, strict=True):
        check_error(name, got, true[name], same[name], 3.0, 1e-6, owed.get(name))


@pytest.mark.parametrize("headdim", [1, 13, 60, 127])
@pytest.mark.parametrize("packed", [False, True])
def test_head_dims_that_tma_cannot_address(kernels: Any, headdim: int, packed: bool) -> None:
    plan = PLANS["d64 group reversed" if headdim <= 64 else "d128 reversed"]
    make: Any = varlen if packed else dense
    lengths = ([70, 80], [90, 30]) if packed else (2, (70, 130))
    inputs = make("cpu", FP16, *lengths, (2, 1), headdim, causal=True)
    pitch = headdim + 8 - headdim % 8
    wide = [x.new_full((*x.shape[:-1], pitch), float("nan")) for x in inputs.tensors[:3]]
    check(inputs, solve(kernels, inputs, plan, results=tuple(x[..., :headdim] for x in wide)))
    for x in wide:
        assert x[..., headdim:].isnan().all()


class Fault(NamedTuple):
    """A change of the kernels' source that must be noticed."""

    what: str
    plan: BackwardPlan
    old: str
    new: str


FAULTS = [
    Fault(
        "a program waits for a later one",
        PLANS["d128 ordered"],
        "    turn = work.first_key // BLOCK_N\n",
        "    turn = 1 + work.first_key // BLOCK_N\n",
    ),
    Fault(
        "a program does not wait for its turn",
        PLANS["d128 ordered"],
        "            if seen < turn:",
        "            if turn < 0:",
    ),
    Fault(
        "the last turns do not pass",
        PLANS["d64 group ordered"],
        "            if config.IN_FLIGHT - 1 - j < work.steps:",
        "            if work.steps < 0:",
    ),
    *(
        Fault(
            f"a turn passes before the addition is in memory, {name}: {new}",
            PLANS[name],
            "                tma_complete(config.IN_FLIGHT * BOXES)\n",
            f"                {new}\n",
        )
        for name in ("d64 group ordered", "d128 ordered")
        for new in (
            "tma_complete(config.IN_FLIGHT * BOXES + 1)",
            "tma.store_wait(config.IN_FLIGHT * BOXES)",
            "pass",
        )
    ),
    Fault(
        "the last turns pass before the additions are in memory",
        PLANS["d128 ordered"],
        "        tma_complete(0)\n        for j",
        "        for j",
    ),
    Fault(
        "a turn passes for the wrong step",
        PLANS["d64 group ordered"],
        "                pass_turn(turns, earlier[config.IN_FLIGHT])\n",
        "                pass_turn(turns, earlier[0])\n",
    ),
    Fault(
        "a turn is peeked at behind the fence that makes it seen",
        PLANS["d64 group ordered"],
        "                pass_turn(turns, earlier[config.IN_FLIGHT])\n",
        "                pass_turn(turns, earlier[config.IN_FLIGHT])\n"
        "                seen = peek(turns + next_sum // ROWS)\n",
    ),
    Fault(
        "TMA is not behind the turn",
        PLANS["d128 ordered"],
        "            fence_async()  # also behind what was only peeked at\n",
        "",
    ),
    *(
        Fault(f"{what}, {name}", PLANS[name], old, new)
        for name in ("d64 group, first stores", "d128, first stores")
        for what, old, new in (
            (
                "nobody waits for the first one's tiles",
                "            wait_until(counter, 2)\n",
                "            pass\n",
            ),
            (
                "TMA is not behind the claim",
                "        fence_async()\n        for tile",
                "        for tile",
            ),
            (
                "all store",
                "shared.dq.slot(use), state == 0, tile)",
                "shared.dq.slot(use), state >= 0, tile)",
            ),
            (
                "nobody stores",
                "shared.dq.slot(use), state == 0, tile)",
                "shared.dq.slot(use), state < 0, tile)",
            ),
            (
                "the first one's tiles count before they are in memory",
                "            tma_complete(config.IN_FLIGHT * BOXES)\n            pass_turn",
                "            pass_turn",
            ),
            (
                "the first one's last tiles count before they are in memory",
                "    tma_complete(0)\n    for j in gl.static_range(config.IN_FLIGHT):\n"
                "        if owed",
                "    for j in gl.static_range(config.IN_FLIGHT):\n        if owed",
            ),
            (
                "the first one's last tiles do not count",
                "        if owed[j] >= 0:",
                "        if owed[j] < -1:",
            ),
            (
                "rows without keys are not zeroed",
                "        has_any = peek(turns + turn) > 0\n",
                "        has_any = peek(turns + turn) > -1\n",
            ),
        )
    ),
    Fault(
        "the last columns of a tile of dq are not added",
        PLANS["in use, d96 causal"],
        "    for j in gl.static_range(BOXES):\n        source",
        "    for j in gl.static_range(1):\n        source",
    ),
    Fault(
        "the last columns are left out of a product",
        PLANS["in use, d96"],
        "for j in gl.static_range(pieces_of(config.WIDTH)):\n            left = piece_of(keys",
        "for j in gl.static_range(1):\n            left = piece_of(keys",
    ),
    Fault(
        "the first in order adds",
        PLANS["d128, first stores reversed"],
        "shared.dq.slot(use), turn == 0, tile)",
        "shared.dq.slot(use), turn < 0, tile)",
    ),
    Fault(
        "the second in order stores too",
        PLANS["d64 group, first stores in order"],
        "shared.dq.slot(use), turn == 0, tile)",
        "shared.dq.slot(use), turn <= 1, tile)",
    ),
    Fault(
        "the adder gives a buffer back while TMA reads it",
        PLANS["d128 adder"],
        "        earlier = earlier[: config.IN_FLIGHT]\n        tma.store_wait(0)\n",
        "        earlier = earlier[: config.IN_FLIGHT]\n",
    ),
    Fault(
        "dq is left where there is no room",
        PLANS["d64 group adder"],
        "    shared.dq.wait_empty(use)\n",
        "",
    ),
    Fault(
        "dq is added before it is there",
        PLANS["d64 group adder"],
        "            fence_async()  # also behind what was only peeked at\n"
        "        for tile in gl.static_range(TILES):\n"
        "            use = i * TILES + tile\n"
        "            shared.dq.wait_full(use)\n",
        "            fence_async()  # also behind what was only peeked at\n"
        "        for tile in gl.static_range(TILES):\n"
        "            use = i * TILES + tile\n",
    ),
    Fault(
        "dq without a fence",
        PLANS["d128 adder"],
        "            fence_async_shared()\n            shared.dq.announce(i",
        "            shared.dq.announce(i",
    ),
    Fault(
        "dq of the group without a fence",
        PLANS["d64 group adder"],
        "                fence_async_shared()\n                shared.dq.announce(use)",
        "                shared.dq.announce(use)",
    ),
    Fault(
        "dS is read before the other consumer wrote it",
        D128,
        "            meet(CONSUMERS_MEET, 256)\n            ds_turned",
        "            ds_turned",
    ),
    Fault(
        "k is overwritten while the other consumer reads it",
        D64,
        "        meet(CONSUMERS_MEET, 256)\n        store_keys(dv",
        "        store_keys(dv",
    ),
    Fault(
        "k is overwritten while the dq group reads it",
        D64_GROUP,
        "            shared.ds.wait_empty(work.steps - 1 + shared.ds.SLOTS)",
        "            pass",
    ),
    Fault("two buffers for three", D64_GROUP, "tma.store_wait(1)", "tma.store_wait(2)"),
    Fault(
        "dS without a fence",
        D128,
        "            fence_async_shared()\n            meet",
        "            meet",
    ),
    Fault(
        "dS for the group without a fence",
        D64_GROUP,
        "            fence_async_shared()\n            shared.ds.announce",
        "            shared.ds.announce",
    ),
    Fault(
        "the next step's q and log-sum-exp are read before they are there",
        PLANS["d64 group early"],
        "            shared.q.wait_full(following)  # and do\n",
        "",
    ),
    Fault(
        "the next step's delta is read before it is there",
        PLANS["d128 delta first"],
        "            wait_for_do(shared, following, config)\n",
        "",
    ),
    Fault(
        "half of q and do is waited for",
        PLANS["d64 group"],
        "TOGETHER: gl.constexpr = 2 if",
        "TOGETHER: gl.constexpr = 1 if",
    ),
    Fault(
        "dP starts from the delta of the step before",
        PLANS["d64 group early"],
        "            start = zeros - gl.expand_dims(delta, 0)\n",
        "            pass\n",
    ),
    Fault(
        "dS is overwritten while the dq group reads it",
        D64_GROUP,
        "            shared.ds.wait_empty(i)\n",
        "            pass\n",
    ),
    Fault(
        "dv may still be summed",
        D128,
        "dv = wait_for_sums(dv, 1 + ONE",
        "dv = wait_for_sums(dv, 2 + ONE",
    ),
    Fault("q is overwritten", D128, "        shared.q.wait_empty(i)\n", ""),
    Fault(
        "do is released too early",
        D128,
        "        ds = p * dp\n",
        "        shared.do.release(i)\n        ds = p * dp\n",
    ),
    Fault(
        "a release is missing",
        D128,
        "            shared.do.release(i)\n            dq =",
        "            dq =",
    ),
    Fault(
        "a program leaves while TMA reads its memory",
        D64,
        "shared.k, dk, work.scale, LANE)\n        tma.store_wait(0)\n",
        "shared.k, dk, work.scale, LANE)\n",
    ),
    Fault(
        "a mask is off by one",
        D64,
        "first = key - work.reach_right\n",
        "first = key - work.reach_right + 1\n",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_faults_are_noticed(fault: Fault) -> None:
    changed = gluon_model.load_kernels("sm90_backward", (fault.old, fault.new))
    inputs = dense("cpu", FP16, 1, (400, 300), (1, 1), fault.plan.block_d, causal=True)

    def is_noticed(seed: int) -> bool:
        try:
            check(inputs, solve(changed, inputs, fault.plan, seed))
        except (AssertionError, RuntimeWarning):  # the latter: arithmetic on garbage
            return True
        return False

    assert any(is_noticed(seed) for seed in range(60))


RAGGED_FAULTS = [
    Fault(
        "queries of the next sequence are read",
        PLANS["d128 ordered"],
        "queries = rows_from(start_q, count_q)",
        "queries = rows_from(start_q, count_q + 64)",
    ),
    Fault(
        "keys of the next sequence are read",
        PLANS["d128 ordered"],
        "keys = rows_from(start_k, count_k)",
        "keys = rows_from(start_k, count_k + 64)",
    ),
    Fault(
        "dk of the next sequence is overwritten",
        PLANS["d128 ordered"],
        "span = rows_from(start, count)",
        "span = rows_from(start, count + 64)",
    ),
    Fault(
        "dq of the next sequence is overwritten",
        PLANS["d128 ordered"],
        "    mask = gl.expand_dims(rows < count, 1)\n    if HEAD_DIM is not None:\n",
        "    mask = gl.expand_dims(rows < count + 64, 1)\n    if HEAD_DIM is not None:\n",
    ),
]


@pytest.mark.parametrize("fault", RAGGED_FAULTS, ids=lambda fault: fault.what)
def test_faults_with_packed_sequences_are_noticed(fault: Fault) -> None:
    changed = gluon_model.load_kernels("sm90_backward", (fault.old, fault.new))
    inputs = varlen("cpu", FP16, [70, 33, 90], [190, 600, 140], (1, 1), 128)
    inputs = extended(inputs, seqused_q=int32(60, 30, 90), seqused_k=int32(150, 370, 100))
    poisoned = inputs.but(**{
        n: x.clone() for n, x in zip(("q", "k", "v", "dout"), inputs.tensors, strict=True)
    })  # fmt: skip
    for tensor, begin, end in zip(poisoned.tensors, (60, 150, 150, 60), (70, 190, 190, 70),
                                  strict=True):  # fmt: skip
        tensor[begin:end] = float("nan")

    want = solve(gluon_model.load_kernels("sm90_backward"), poisoned, fault.plan)
    check(inputs, want)

    def is_noticed(seed: int) -> bool:
        try:
            assert_same_bits(solve(changed, poisoned, fault.plan, seed), want)
        except AssertionError:
            return True
        return False

    assert any(is_noticed(seed) for seed in range(20))
