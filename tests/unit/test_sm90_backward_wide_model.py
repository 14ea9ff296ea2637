"""The Hopper backward for head dims above 128, run in a model of Gluon; see the test for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

import gluon_model
from support import Inputs, assert_same_bits, check, dense, extended, poisoned_like
from test_sm90_backward_model import Fault, _inside_nan, solve

from flash_attn.backends.sm90 import launch_backward
from flash_attn.backends.sm90.plans_backward import BackwardPlan, plan_backward
from flash_attn.core import reference
from flash_attn.core.problem import BackwardInputs

# With sums in order, where more can go wrong; the plans in use are those "in any order".
D256 = plan_backward(256, False, 512)._replace(deterministic=True)
D192 = plan_backward(192, False, 512)._replace(deterministic=True)
REVERSED = {"is_reversed": True}
PLANS = {
    "d256": D256,
    "d256 ahead reversed": D256._replace(ahead=1, **REVERSED),
    "d256 two buffers": D256._replace(do_slots=1, p_slots=2, ds_slots=2, dq_slots=2),
    "d256 in any order": D256._replace(deterministic=False),
    "d192": D192,
    "d192 reversed": D192._replace(ahead=0, **REVERSED),
    "d192 in any order": D192._replace(deterministic=False),
    "d192 in any order, three slots of q": D192._replace(deterministic=False, q_slots=3),
}
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
    return gluon_model.load_kernels("sm90_backward_wide")


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("seqlens", "heads", "less", "options"), SHAPES)
def test_gradients(
    kernels: Any, name: str, seqlens: Any, heads: Any, less: int, options: dict[str, Any]
) -> None:
    plan = PLANS[name]
    dtype = torch.bfloat16 if seqlens == (130, 200) else FP16
    inputs = dense("cpu", dtype, 1, seqlens, heads, plan.block_d - less, **options)
    check(inputs, solve(kernels, inputs, plan))


@pytest.mark.parametrize("family", ["large_logits", "outlier_channels", "offset", "activations"])
@pytest.mark.parametrize("name", ["d256", "d192"])
def test_input_families(kernels: Any, family: str, name: str) -> None:
    """P is rounded before dS is made of it, which must not show."""
    plan = PLANS[name]
    for dtype in (torch.bfloat16, FP16):
        inputs = dense("cpu", dtype, 1, (130, 130), (1, 1), plan.block_d, family=family)
        check(inputs, solve(kernels, inputs, plan))


@pytest.mark.parametrize("name", PLANS)
def test_every_interleaving_gives_the_same(kernels: Any, name: str) -> None:
    inputs = dense("cpu", FP16, 1, (200, 300), (2, 1), PLANS[name].block_d, causal=True)
    first = solve(kernels, inputs, PLANS[name])
    for seed in range(1, 8):
        again = solve(kernels, inputs, PLANS[name], seed)
        # dq is summed in the order in which programs arrive.
        same = again if PLANS[name].deterministic else again._replace(dq=first.dq)
        assert_same_bits(same, first, f"seed {seed}")
        torch.testing.assert_close(again.dq, first.dq, atol=2e-3, rtol=2e-3)


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
    plan = plan_backward(headdim, True, 150)
    inputs = dense("cpu", FP16, 2, (70, 150), (2, 1), headdim, causal=True)
    inputs = inputs.but(**{n: _inside_nan(getattr(inputs, n)) for n in ("q", "k", "v", "dout")})
    results = tuple(_inside_nan(x) for x in (inputs.q, inputs.k, inputs.v))
    check(inputs, solve(kernels, inputs, plan, results=results))
    for view in results:
        buffer = view._base
        assert buffer is not None
        assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


def test_a_key_block_without_queries(kernels: Any) -> None:
    """Steps: none. Barriers must not be left waiting, and the gradients are zeros."""
    for plan in (D192, D256):
        inputs = dense("cpu", FP16, 1, (10, 400), (1, 1), plan.block_d, window_size=(5, 0))
        got = solve(kernels, inputs, plan)
        assert not got.dk[:, :320].any()
        assert not got.dv[:, :320].any()


FAULTS = [
    Fault(
        "a turn passes before the addition is in memory",
        D256,
        "                    tma_complete(2)\n",
        "                    tma_complete(3)\n",
    ),
    Fault(
        "the last turns pass before the additions are in memory",
        D256,
        "            tma_complete(0)\n",
        "",
    ),
    Fault("P is overwritten", D256, "        shared.p.wait_empty(i)\n", ""),
    Fault("P is read before it is written", D256, "        shared.p.wait_full(i)\n", ""),
    Fault("dS is overwritten", D256, "            shared.ds.wait_empty(i)\n", ""),
    Fault("dS is read before it is written", D256, "        shared.ds.wait_full(i)\n", ""),
    Fault("dS without a fence", D256, "            fence_async_shared()\n            shared.ds.ann",
          "            shared.ds.ann"),
    Fault("q is overwritten", D256, "        shared.q.wait_empty(i)\n", ""),
    Fault("do is overwritten", D256, "        shared.do.wait_empty(i)\n", ""),
    Fault("q is released before dk is summed", D192,
          "dk = wait_for_sums(shared, dk, shared.PIECES)\n            shared.q.release(i)",
          "shared.q.release(i)\n            dk = wait_for_sums(shared, dk, shared.PIECES)"),
    Fault("dv may still be summed", D192, "dv = wait_for_sums(shared, dv, shared.PIECES)",
          "dv = wait_for_sums(shared, dv, shared.PIECES + 1)"),
    Fault("v is overwritten while the key consumer reads it", D256,
          "        meet(CONSUMERS_MEET, 256)  # v is read no more, and k only by the dq group\n",
          ""),
    Fault("k is overwritten while the dq group reads it", D256,
          "        shared.ds.wait_empty(work.steps - 1 + shared.ds.SLOTS)", "        pass"),
    Fault("the buffer of dq is overwritten while TMA reads it", D256,
          "tma.store_wait(shared.DQ_SLOTS - 1)", "tma.store_wait(shared.DQ_SLOTS)"),
    Fault("TMA is not behind the turn", D192, "                fence_peeked()\n", ""),
    Fault("nobody passes its turn", D256, "            count_up(turns + before // ROWS)\n\n",
          "\n"),
    Fault("a program waits for a later one", D256, "turn = 4 * turn_of(work, row)",
          "turn = 4 * turn_of(work, row) + 4"),
    Fault("a program leaves while TMA reads its memory", D256,
          "        tma_store(desc, at, ring.data.index(j))\n    tma.store_wait(0)",
          "        tma_store(desc, at, ring.data.index(j))"),
    Fault("the slope of softcap is forgotten", D256, "(p * (4.0 * (u - 1.0) * (2.0 - u)))", "p"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_faults_are_noticed(fault: Fault) -> None:
    changed = gluon_model.load_kernels("sm90_backward_wide", (fault.old, fault.new))
    softcap = {"softcap": 1.0} if "softcap" in fault.what else {}
    inputs = dense("cpu", FP16, 1, (400, 200), (1, 1), fault.plan.block_d, causal=True, **softcap)

    def is_noticed(seed: int) -> bool:
        try:
            check(inputs, solve(changed, inputs, fault.plan, seed))
        except (AssertionError, RuntimeWarning):  # the latter: arithmetic on garbage
            return True
        return False

    assert any(is_noticed(seed) for seed in range(60))


def sums_of_dq(kernels: Any, inputs: Inputs, plan: BackwardPlan, seed: int) -> torch.Tensor:
    """The sums of dq in float32, where other bits show that programs added in another order."""
    problem = inputs.problem()
    forward = reference.attention(problem, torch.float64)
    grads = tuple(poisoned_like(x) for x in (inputs.q, inputs.k, inputs.v))
    out, lse = forward.out.to(inputs.q.dtype), forward.softmax_lse.float()
    arguments = BackwardInputs(inputs.dout, out, lse, *grads, torch.zeros(2, dtype=torch.int64))
    launches = gluon_model.record(lambda: launch_backward.backward(problem, arguments, plan))
    for one in launches[:2]:
        gluon_model.run_launch(kernels, one, seed=seed, resident=4)
    sums: torch.Tensor = launches[2].arguments[0]
    return sums


def test_programs_add_to_dq_in_a_fixed_order(kernels: Any) -> None:
    inputs = dense("cpu", FP16, 1, (200, 250), (1, 1), 192)
    first = sums_of_dq(kernels, inputs, D192, 0)
    for seed in range(1, 20):
        assert torch.equal(first, sums_of_dq(kernels, inputs, D192, seed))
