"""The Hopper backward's source, run in a model of Gluon: results, barriers and memory hazards."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

import gluon_model
from support import (
    Inputs,
    Solution,
    assert_same_bits,
    check,
    dense,
    poisoned_like,
)

from flash_attn.backends.sm90 import launch_backward
from flash_attn.backends.sm90.plans_backward import BackwardPlan
from flash_attn.core import reference
from flash_attn.core.problem import BackwardInputs

D64_GROUP = BackwardPlan(64, 64, 3, 3, 3, ahead=1, dq_group=True, registers=208, dq_registers=72)
D64 = BackwardPlan(128, 64, ahead=2)
D128 = BackwardPlan(64, 128, eager_dv=True, ahead=2)
PLANS = {
    "d64 group ahead": D64_GROUP,
    "d64 group eager": D64_GROUP._replace(eager_dv=True, ahead=0, q_slots=2, ds_slots=1),
    "d64 ahead 2": D64,
    "d64": D64._replace(ahead=0),
    "d128 eager ahead 2": D128,
    "d128 ahead 1": D128._replace(eager_dv=False, ahead=1, do_slots=1),
    "d128": D128._replace(ahead=0),
}
HOUSEKEEPING = {"housekeeping": True, "distance": 0, "section_bytes": 1}
PLANS |= {
    "d64 group housekeeping": D64_GROUP._replace(**HOUSEKEEPING),
    "d128 housekeeping": D128._replace(**HOUSEKEEPING),
    "d64 group ordered": D64_GROUP._replace(deterministic=True),
    "d64 ordered housekeeping": D64._replace(**HOUSEKEEPING, deterministic=True),
    "d128 ordered": D128._replace(deterministic=True),
    "d128 reversed": D128._replace(deterministic=True, is_reversed=True),
    "d64 group reversed": D64_GROUP._replace(deterministic=True, is_reversed=True, **HOUSEKEEPING),
}
FP16 = torch.float16


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
) -> Solution:
    """Gradients by the model; output and log-sum-exp by the reference.

    ``empty_lse`` is what the kernels are told of a row that sees no key.
    """
    problem = inputs.problem()
    forward = reference.attention(problem, torch.float64)
    out, lse = forward.out.to(inputs.q.dtype), forward.softmax_lse.float()
    grads = results or tuple(poisoned_like(x) for x in (inputs.q, inputs.k, inputs.v))
    state = torch.zeros(2, dtype=torch.int64)
    told = lse.masked_fill(lse == float("inf"), empty_lse)
    arguments = BackwardInputs(inputs.dout, out, told, *grads, state)
    launches = gluon_model.record(lambda: launch_backward.backward(problem, arguments, plan))
    assert len(launches) == 3
    for one in launches:
        gluon_model.run_launch(kernels, one, seed=seed, resident=8 if plan.housekeeping else 3)
    return Solution(out, lse, *grads)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    ("seqlens", "heads", "less", "options"),
    [
        ((128, 128), (1, 1), 0, {}),
        ((130, 200), (4, 2), 0, {"causal": True}),
        ((333, 100), (2, 1), 24, {"causal": True}),  # the first rows see no key
        ((100, 500), (1, 1), 0, {"window_size": (64, 0)}),  # most keys are seen by no query
        ((190, 260), (2, 2), 8, {"window_size": (30, 20)}),
        ((1, 1), (1, 1), 0, {"causal": True}),
        ((200, 130), (2, 1), 0, {"softcap": 2.0, "causal": True}),
    ],
)
def test_gradients(
    kernels: Any, name: str, seqlens: Any, heads: Any, less: int, options: dict[str, Any]
) -> None:
    plan = PLANS[name]
    dtype = torch.bfloat16 if seqlens == (130, 200) else FP16
    inputs = dense("cpu", dtype, 1, seqlens, heads, plan.block_d - less, **options)
    check(inputs, solve(kernels, inputs, plan))


def test_both_infinities_stand_for_rows_without_keys(kernels: Any) -> None:
    inputs = dense("cpu", FP16, 1, (333, 100), (2, 1), 64, causal=True)
    for infinity in (float("inf"), float("-inf")):
        check(inputs, solve(kernels, inputs, D64, empty_lse=infinity))


@pytest.mark.parametrize("name", PLANS)
def test_every_interleaving_gives_the_same(kernels: Any, name: str) -> None:
    inputs = dense("cpu", FP16, 1, (200, 300), (2, 1), PLANS[name].block_d, causal=True)
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


@pytest.mark.parametrize("name", ["d64 group ahead", "d128 eager ahead 2"])
def test_nothing_outside_is_read_or_written(kernels: Any, name: str) -> None:
    plan = PLANS[name]
    inputs = dense("cpu", FP16, 2, (70, 150), (2, 1), plan.block_d, causal=True)
    inputs = inputs.but(**{n: _inside_nan(getattr(inputs, n)) for n in ("q", "k", "v", "dout")})
    results = tuple(_inside_nan(x) for x in (inputs.q, inputs.k, inputs.v))
    check(inputs, solve(kernels, inputs, plan, results=results))
    for view in results:
        buffer = view._base
        assert buffer is not None
        assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


@pytest.mark.parametrize("name", ["d64 group housekeeping", "d128 housekeeping"])
@pytest.mark.parametrize(
    ("seqlens", "heads", "options"),
    [
        ((256, 256), (4, 4), {}),
        ((60, 700), (6, 6), {}),  # fewer pieces than programs
        ((700, 60), (6, 2), {"window_size": (0, 300)}),  # more; some see no key
        ((200, 500), (6, 6), {"window_size": (64, 0)}),  # some programs have nothing to do
    ],
)
def test_housekeeping(
    kernels: Any, name: str, seqlens: Any, heads: Any, options: dict[str, Any]
) -> None:
    plan = PLANS[name]
    for seed in range(2):
        inputs = dense("cpu", FP16, 2, seqlens, heads, plan.block_d - 8, **options)
        check(inputs, solve(kernels, inputs, plan, seed))


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
        inputs = dense("cpu", FP16, 1, (10, 400), (1, 1), plan.block_d, window_size=(5, 0))
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


class Fault(NamedTuple):
    """A change of the kernels' source that must be noticed."""

    what: str
    plan: BackwardPlan
    old: str
    new: str


FAULTS = [
    Fault(
        "dq is finished before it is summed",
        PLANS["d64 group housekeeping"],
        "        wait_until(duties.summed",
        "        (duties.summed",
    ),
    Fault(
        "rows are used before they are prepared",
        PLANS["d128 housekeeping"],
        "    wait_until(duties.prepared + number, (in_head - before) * HOUSEKEEPERS)",
        "    pass",
    ),
    Fault(
        "a program waits for a later one",
        PLANS["d128 ordered"],
        "    turn = work.first_key // BLOCK_N\n",
        "    turn = 1 + work.first_key // BLOCK_N\n",
    ),
    Fault(
        "nobody passes its turn",
        PLANS["d64 group ordered"],
        "            pass_turn(work, duties.turns, before, TILES - 1)\n    if config.HOUSE",
        "            pass\n    if config.HOUSE",
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
        "    meet(CONSUMERS_MEET, 256)\n    store_keys(dv",
        "    store_keys(dv",
    ),
    Fault(
        "k is overwritten while the dq group reads it",
        D64_GROUP,
        "            shared.ds.wait_empty(work.steps - 1 + shared.ds.SLOTS)",
        "            pass",
    ),
    Fault(
        "the buffer of dq is overwritten while TMA reads it",
        D128,
        "            tma.store_wait(0)\n            add_to_dq",
        "            add_to_dq",
    ),
    Fault("two buffers for three", D64_GROUP, "tma.store_wait(1)", "tma.store_wait(2)"),
    Fault(
        "dS without a fence",
        D128,
        "        fence_async_shared()\n        ds =",
        "        ds =",
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
        "warpgroup_mma_wait(2 + EARLY",
        "warpgroup_mma_wait(3 + EARLY",
    ),
    Fault("q is overwritten", D128, "        shared.q.wait_empty(i)\n", ""),
    Fault(
        "do is released too early",
        D128,
        "        delta = shared.delta",
        "        shared.do.release(i)\n        delta = shared.delta",
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
        "    tma.store_wait(0)\n    if config.HOUSEKEEPING and not",
        "    if config.HOUSEKEEPING and not",
    ),
    Fault(
        "a mask is off by one",
        D64,
        "key - work.reach_right, NO_ROW",
        "key - work.reach_right + 1, NO_ROW",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_faults_are_noticed(fault: Fault) -> None:
    changed = gluon_model.load_kernels("sm90_backward", (fault.old, fault.new))
    heads = (4, 4) if fault.plan.housekeeping else (1, 1)
    inputs = dense("cpu", FP16, 1, (400, 300), heads, fault.plan.block_d, causal=True)

    def is_noticed(seed: int) -> bool:
        try:
            check(inputs, solve(changed, inputs, fault.plan, seed))
        except (AssertionError, RuntimeWarning):  # the latter: arithmetic on garbage
            return True
        return False

    assert any(is_noticed(seed) for seed in range(60))
