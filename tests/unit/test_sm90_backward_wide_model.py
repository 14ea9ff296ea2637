"""The Hopper backward for head dims above 128, run in a model of Gluon; see the test for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

import gluon_model
from support import assert_same_bits, check, dense, extended, thinned
from test_sm90_backward_model import (
    BATCH_MASKS,
    BATCHES,
    HOSTILE,
    Fault,
    _inside_nan,
    check_bounds_that_lie,
    check_nan_stays_in_its_sequence,
    check_packed_on_one_side,
    check_packed_sequences,
    check_rows_in_use,
    solve,
)

from flash_attn.backends.sm90.plans_backward import RowsPlan, plan_backward

# Those of Triton 3.6, and others: newer compilers' too.
D256 = plan_backward(256, False, 512)._replace(q_slots=3, held=1, turns=True)
D192 = plan_backward(192, False, 512)._replace(q_slots=4, do_slots=4, held=3, turns=True)
PLANS = {
    "d256": D256,
    "d256 without turns": D256._replace(
        q_slots=2, held=0, turns=False, p_slots=1,
        rows=RowsPlan(2, 1, dq_first=False),
    ),
    "d192": D192,
    "d192 with one held": D192._replace(q_slots=3, do_slots=2, held=1, rows=RowsPlan(2, 2)),
}  # fmt: skip
FP16 = torch.float16
# Lengths, heads, columns less than the plan's, and what else is asked for.
SHAPES: list[tuple[Any, Any, int, dict[str, Any]]] = [
    ((64, 64), (1, 1), 0, {}),
    ((130, 200), (4, 2), 0, {"causal": True}),
    ((333, 100), (2, 1), 24, {"causal": True}),  # the first rows see no key
    ((100, 300), (1, 1), 56, {"window_size": (64, 0)}),  # most keys are seen by no query
    ((190, 260), (2, 2), 8, {"window_size": (30, 20)}),
    ((1, 1), (1, 1), 0, {"causal": True}),
    ((200, 130), (2, 1), 0, {"softcap": 2.0, "causal": True}),
    ((130, 70), (1, 1), 0, {"softcap": 0.05, "window_size": (50, 3)}),
]


@pytest.fixture(scope="module")
def kernels() -> Any:
    return gluon_model.load_kernels("sm90_backward_rows")


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("seqlens", "heads", "less", "options"), SHAPES)
def test_gradients(
    kernels: Any, name: str, seqlens: Any, heads: Any, less: int, options: dict[str, Any]
) -> None:
    plan = PLANS[name]
    dtype = torch.bfloat16 if seqlens == (130, 200) else FP16
    inputs = dense("cpu", dtype, 2, seqlens, heads, plan.block_d - less, **options)
    check(inputs, solve(kernels, inputs, plan))


@pytest.mark.parametrize("family", ["large_logits", "outlier_channels", "offset", "activations"])
def test_input_families(kernels: Any, family: str) -> None:
    """P is rounded before dS is made of it, which must not show."""
    for dtype in (torch.bfloat16, FP16):
        inputs = dense("cpu", dtype, 1, (130, 130), (1, 1), 256, family=family)
        check(inputs, solve(kernels, inputs, D256))


@pytest.mark.parametrize("name", PLANS)
def test_every_interleaving_gives_the_same(kernels: Any, name: str) -> None:
    """dq too."""
    inputs = dense("cpu", FP16, 1, (200, 300), (2, 1), PLANS[name].block_d, causal=True)
    first = solve(kernels, inputs, PLANS[name])
    for seed in range(1, 8):
        again = solve(kernels, inputs, PLANS[name], seed, known=first)
        assert_same_bits(again, first, f"seed {seed}")


@pytest.mark.parametrize(("group", "splits"), [(4, 2), (3, 3)])
def test_divided_groups(kernels: Any, group: int, splits: int) -> None:
    for plan in (D192, D256):
        inputs = dense("cpu", FP16, 1, (130, 200), (group, 1), plan.block_d, causal=True)
        check(inputs, solve(kernels, inputs, plan._replace(splits=splits)))


@pytest.mark.parametrize(("headdim", "headdim_v"), [(192, 128), (72, 200), (130, 130)])
def test_head_dims_of_their_own(kernels: Any, headdim: int, headdim_v: int) -> None:
    inputs = dense("cpu", FP16, 1, (100, 130), (2, 1), headdim, causal=True)
    of_v = dense("cpu", FP16, 1, (100, 130), (2, 1), headdim_v)
    inputs = extended(inputs.but(v=of_v.v, dout=of_v.dout))
    # Results that TMA can address: the model runs after the launcher has copied others.
    wide = [x.new_full((*x.shape[:-1], 256), float("nan")) for x in inputs.tensors[:3]]
    results = tuple(x[..., :n] for x, n in zip(wide, (headdim, headdim, headdim_v), strict=True))
    plan = plan_backward(max(headdim, headdim_v), True, 100)
    check(inputs, solve(kernels, inputs, plan, results=results))


@pytest.mark.parametrize("headdim", [136, 200])
def test_nothing_outside_is_read_or_written(kernels: Any, headdim: int) -> None:
    inputs = dense("cpu", FP16, 2, (70, 150), (2, 1), headdim, causal=True)
    inputs = inputs.but(**{n: _inside_nan(getattr(inputs, n)) for n in ("q", "k", "v", "dout")})
    results = tuple(_inside_nan(x) for x in (inputs.q, inputs.k, inputs.v))
    check(inputs, solve(kernels, inputs, plan_backward(headdim, True, 150), results=results))
    for view in results:
        buffer = view._base
        assert buffer is not None
        assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


def test_rows_without_keys_and_keys_without_rows(kernels: Any) -> None:
    for plan in (D192, D256):
        inputs = dense("cpu", FP16, 1, (400, 10), (1, 1), plan.block_d, window_size=(0, 5))
        got = solve(kernels, inputs, plan)
        assert not got.dq[:, :380].any()
        inputs = dense("cpu", FP16, 1, (10, 400), (1, 1), plan.block_d, window_size=(5, 0))
        got = solve(kernels, inputs, plan)
        assert not got.dk[:, :320].any()


@pytest.mark.parametrize(
    ("name", "batch", "mask"), thinned(PLANS, BATCHES, BATCH_MASKS, keep_each=3)
)
def test_packed_sequences(kernels: Any, name: str, batch: str, mask: str) -> None:
    for splits in (1, 2):
        check_packed_sequences(kernels, PLANS[name]._replace(splits=splits), batch, mask)


@pytest.mark.parametrize("name", ["d192", "d256"])
def test_nan_stays_in_its_sequence(kernels: Any, name: str) -> None:
    """Bit for bit, dq too."""
    check_nan_stays_in_its_sequence(kernels, PLANS[name])


@pytest.mark.parametrize("bounds", HOSTILE)
def test_bounds_that_lie(kernels: Any, bounds: str) -> None:
    check_bounds_that_lie(kernels, D192, bounds)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask", ["full", "left"])
@pytest.mark.parametrize("splits", [1, 2])
def test_rows_in_use(kernels: Any, packed: bool, mask: str, splits: int) -> None:
    check_rows_in_use(kernels, D256._replace(splits=splits), packed, mask)


def test_packed_on_one_side(kernels: Any) -> None:
    check_packed_on_one_side(kernels, D192)


DQ_LAST = PLANS["d256 without turns"]
FAULTS = [
    # In the kernel for dq.
    Fault("k is overwritten", D256, "        shared.k.wait_empty(i)\n", ""),
    Fault("v is overwritten", D256, "        shared.v.wait_empty(i)\n", ""),
    Fault("k is read before it is there", D256, "        shared.k.wait_full(i)\n        s =",
          "        s ="),
    Fault("v is read before it is there", D256, "        shared.v.wait_full(i)\n        dp =",
          "        dp ="),
    Fault("do is read before it is there", D256, "        shared.do.wait_full(LANE)\n", ""),
    Fault("k is released before dq is summed", D256,
          "dq = wait_for_sums(shared, dq, PIECES)\n            shared.k.release(i - 1)",
          "shared.k.release(i - 1)\n            dq = wait_for_sums(shared, dq, PIECES)"),
    Fault("k is released before dq is summed, last", DQ_LAST,
          "dq = wait_for_sums(shared, dq, 0)\n            shared.k.release(i - 1)",
          "shared.k.release(i - 1)\n            dq = wait_for_sums(shared, dq, 0)"),
    Fault("v is released before dP is there", D256,
          "dp = warpgroup_mma_wait(0 if work.DQ_FIRST else PIECES, deps=[dp])\n        "
          "shared.v.release(i)",
          "shared.v.release(i)\n        "
          "dp = warpgroup_mma_wait(0 if work.DQ_FIRST else PIECES, deps=[dp])"),
    Fault("S may still be multiplied", D256, "PIECES if work.DQ_FIRST else 2 * PIECES",
          "2 * PIECES if work.DQ_FIRST else 2 * PIECES"),
    Fault("S may still be multiplied, dq last", DQ_LAST, "PIECES if work.DQ_FIRST else 2 * PIECES",
          "PIECES if work.DQ_FIRST else 3 * PIECES"),
    Fault("nobody releases what one consumer does not see", D256,
          "    pass_over(shared, stop, work.blocks)\n", ""),
    Fault("rows see one key too many", D256, "last = gl.minimum(last, row + work.reach_right)",
          "last = gl.minimum(last, row + work.reach_right + 1)"),
    Fault("results without a fence", D256,
          "    fence_async_shared()\n    grid = again", "    grid = again"),
    Fault("a program leaves while TMA reads its memory", D256,
          "shared.q.data.index(LANE * PIECES + j))\n    tma.store_wait(0)",
          "shared.q.data.index(LANE * PIECES + j))"),
    Fault("the slope of softcap is forgotten", D256, "p = p * (4.0 * (u - 1.0) * (2.0 - u))",
          "p = p * 1.0"),
    # In that for dk and dv.
    Fault("P is overwritten", DQ_LAST, "        shared.p.wait_empty(i)\n", ""),
    Fault("P is read before it is written", D256, "        shared.p.wait_full(i)\n", ""),
    Fault("q is overwritten", D256, "        shared.q.wait_empty(use)\n", ""),
    Fault("do is overwritten", D256, "        shared.do.wait_empty(use)\n", ""),
    Fault("rows are released before they are added", D192,
          "sums = wait_for_sums(shared, sums, 1)\n    added.release(use)",
          "added.release(use)\n    sums = wait_for_sums(shared, sums, 1)"),
    Fault("dk and dv may still be summed", D192, "sums = wait_for_sums(shared, sums, 1)",
          "sums = wait_for_sums(shared, sums, 2)"),
    Fault("TMA may write before threads have read", D192,
          "    fence_async_shared()\n    ring.release(use)", "    ring.release(use)"),
    Fault("k and v are read before they are there", D192, "        place.wait_full(0)\n", ""),
    Fault("a slot's second use is waited for in the first one", D256._replace(turns=False),
          "        other.wait_full(0)", "        pass"),
    Fault("the rest of k and v is read before it is there", D256, "        rest.wait_full(0)",
          "        pass"),
    Fault("nobody gives the second turn", D256, "                come_by(VALUE_TURN, 256)",
          "                pass"),
    Fault("results are written over what is read", D256,
          "        meet(CONSUMERS_MEET, 256)  # nobody reads q or do any more\n", ""),
    Fault("a program leaves while TMA reads its memory", D256,
          "        tma_store(desc, at, ring.data.index(j))\n    tma.store_wait(0)",
          "        tma_store(desc, at, ring.data.index(j))"),
    Fault("the slope of softcap is forgotten", D256, "(p * (4.0 * (u - 1.0) * (2.0 - u)))", "p"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_faults_are_noticed(fault: Fault) -> None:
    changed = gluon_model.load_kernels("sm90_backward_rows", (fault.old, fault.new))
    softcap = {"softcap": 1.0} if "softcap" in fault.what else {}
    inputs = dense("cpu", FP16, 1, (400, 400), (1, 1), fault.plan.block_d, causal=True, **softcap)

    def is_noticed(seed: int) -> bool:
        try:
            check(inputs, solve(changed, inputs, fault.plan, seed))
        except (AssertionError, RuntimeWarning):  # the latter: arithmetic on garbage
            return True
        return False

    assert any(is_noticed(seed) for seed in range(60))


def test_plans_of_other_kernels_are_refused(kernels: Any) -> None:
    inputs = dense("cpu", FP16, 1, (64, 64), (1, 1), 256)
    for plan in (D256._replace(dq_group=True), D256._replace(rows=None),
                 D256._replace(deterministic=True)):  # fmt: skip
        with pytest.raises(ValueError, match="no plan for head dims above 128"):
            solve(kernels, inputs, plan)
