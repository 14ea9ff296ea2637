"""The Hopper backward for head dims above 128 on a GPU of compute capability 9.0."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from support import Solution, assert_same_bits, check, dense, extended
from test_sm90_backward_gpu import arguments_of, hopper, solve

from flash_attn.backends.sm90 import launch_backward
from flash_attn.backends.sm90.plans_backward import (
    MAX_HEADDIM_SOFTCAP,
    BackwardPlan,
    plan_backward,
)

__all__ = ["hopper"]  # a fixture of these tests too
pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
HEADDIMS = [136, 160, 192, 256]
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "left": {"window_size": (70, 0)},
    "both": {"window_size": (30, 20)},
    "right": {"window_size": (-1, 15)},
}


def plans(headdim: int, is_masked: bool) -> list[BackwardPlan]:
    """The plan in use, and one in which nothing is held and nobody takes turns."""
    plan = plan_backward(headdim, is_masked, 512)
    assert plan.rows is not None
    rows = plan.rows._replace(dq_first=not plan.rows.dq_first and headdim <= 192)
    other = plan._replace(q_slots=2, do_slots=2, held=0, turns=False, p_slots=1, rows=rows)
    return [plan, other]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("headdim", HEADDIMS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlens", [(1, 1), (128, 128), (113, 203), (400, 250), (129, 640)])
def test_gradients(dtype: torch.dtype, headdim: int, mask: str, seqlens: tuple[int, int]) -> None:
    inputs = dense("cuda", dtype, 2, seqlens, (4, 2), headdim, **MASKS[mask])
    for plan in plans(headdim, mask != "full"):
        check(inputs, solve(inputs, plan))


@pytest.mark.parametrize("headdim", [136, MAX_HEADDIM_SOFTCAP])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("softcap", [0.05, 1.5, 50.0])
def test_softcap(headdim: int, mask: str, softcap: float) -> None:
    inputs = dense("cuda", BF16, 2, (230, 190), (4, 2), headdim, softcap=softcap, **MASKS[mask])
    for plan in plans(headdim, mask != "full"):
        check(inputs, solve(inputs, plan))


@pytest.mark.parametrize("headdims", [(192, 128), (128, 192), (72, 256), (130, 130), (256, 251)])
@pytest.mark.parametrize("mask", ["full", "causal", "both"])
def test_head_dims_of_their_own(headdims: tuple[int, int], mask: str) -> None:
    """Of q and k, and of v; also such as TMA cannot address."""
    inputs = dense("cuda", BF16, 2, (230, 190), (4, 2), headdims[0], **MASKS[mask])
    of_v = dense("cuda", BF16, 2, (230, 190), (4, 2), headdims[1])
    inputs = extended(inputs.but(v=of_v.v, dout=of_v.dout))
    for plan in plans(max(headdims), mask != "full"):
        check(inputs, solve(inputs, plan))


def test_softcap_of_larger_head_dims_is_refused() -> None:
    problem = dense("cuda", BF16, 1, (64, 64), (1, 1), 200, softcap=2.0).problem()
    (reason,) = launch_backward.unsupported_backward(problem)
    assert "softcap" in reason
    assert "200" in reason


@pytest.mark.parametrize("family", ["large_logits", "outlier_channels", "offset", "activations"])
@pytest.mark.parametrize("headdim", [192, 256])
def test_input_families(family: str, headdim: int) -> None:
    for dtype in (BF16, FP16):
        inputs = dense("cuda", dtype, 2, (300, 300), (4, 4), headdim, family=family, causal=True)
        check(inputs, solve(inputs))


@pytest.mark.parametrize("heads", [(8, 1), (6, 2), (16, 16)])
@pytest.mark.parametrize("headdim", [192, 256])
def test_many_programs(heads: tuple[int, int], headdim: int) -> None:
    """Several times what a GPU runs at a time."""
    inputs = dense("cuda", BF16, 8, (1024, 1100), heads, headdim, causal=True)
    for plan in plans(headdim, is_masked=True):
        check(inputs, solve(inputs, plan))


@pytest.mark.parametrize("headdim", [192, 256])
def test_the_gradient_of_the_log_sum_exp(headdim: int) -> None:
    """It only changes delta, so dv stays as it is."""
    inputs = dense("cuda", FP16, 2, (150, 150), (2, 2), headdim, causal=True)
    problem, arguments = arguments_of(inputs)
    launch_backward.backward(problem, arguments)
    plain = [x.clone() for x in arguments[3:6]]
    zeros = torch.zeros_like(arguments.softmax_lse)
    launch_backward.backward(problem, arguments._replace(dlse=zeros))
    for got, want in zip(arguments[3:6], plain, strict=True):
        assert torch.equal(got, want)
    launch_backward.backward(problem, arguments._replace(dlse=zeros + 1.0))
    dq, dk, dv = arguments[3:6]
    assert torch.equal(dv, plain[2])
    assert not torch.equal(dq, plain[0])
    assert not torch.equal(dk, plain[1])


@pytest.mark.parametrize("headdim", [192, 256])
def test_unseen_keys_may_be_nan(headdim: int) -> None:
    inputs = dense("cuda", FP16, 2, (100, 400), (4, 2), headdim, window_size=(64, 0))
    want = solve(inputs)
    for x in (inputs.k, inputs.v):
        x[:, : 400 - 100 - 64] = float("nan")
    problem, arguments = arguments_of(inputs)
    arguments = arguments._replace(out=want.out, softmax_lse=want.lse)
    launch_backward.backward(problem, arguments)
    assert_same_bits(Solution(want.out, want.lse, *arguments[3:6]), want, "NaN in unseen keys")
    assert not want.dk[:, : 400 - 100 - 64].any()


def _inside_nan(x: torch.Tensor, columns: int) -> torch.Tensor:
    batch, rows, heads, headdim = x.shape
    buffer = x.new_full((batch, rows + 70, heads + 1, headdim + columns), float("nan"))
    view = buffer[:, :rows, :heads, :headdim]
    view.copy_(x)
    return view


@pytest.mark.parametrize("columns", [8, 3])  # the latter is nothing that TMA can address
@pytest.mark.parametrize("headdim", HEADDIMS)
def test_nothing_outside_is_read_or_written(headdim: int, columns: int) -> None:
    inputs = dense("cuda", FP16, 2, (170, 250), (2, 1), headdim, causal=True)
    names = ("q", "k", "v", "dout")
    inputs = inputs.but(**{name: _inside_nan(getattr(inputs, name), columns) for name in names})
    for plan in plans(headdim, is_masked=True):
        results = tuple(_inside_nan(x, columns) for x in (inputs.q, inputs.k, inputs.v))
        check(inputs, solve(inputs, plan, results))
        for view in results:
            buffer = view._base
            assert buffer is not None
            assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


@pytest.mark.parametrize("headdim", [192, 256])
@pytest.mark.parametrize("mask", ["full", "causal", "both"])
def test_a_thousand_repeats_have_the_same_bits(headdim: int, mask: str) -> None:
    inputs = dense("cuda", BF16, 2, (700, 700), (8, 4), headdim, **MASKS[mask])
    problem, arguments = arguments_of(inputs)
    for plan in plans(headdim, mask != "full"):
        launch_backward.backward(problem, arguments, plan)
        first = [x.clone() for x in arguments[3:6]]
        different = torch.zeros(3, dtype=torch.int64, device="cuda")
        for _ in range(1000):
            launch_backward.backward(problem, arguments, plan)
            pairs = zip(arguments[3:6], first, strict=True)
            different += torch.stack([(x != y).sum() for x, y in pairs])
        assert different.tolist() == [0, 0, 0]


def test_thousands_of_launches_over_random_shapes() -> None:
    """None hangs, and the last of each shape is right."""
    chosen = random.Random(0)
    for _ in range(60):
        headdim = chosen.choice(HEADDIMS)
        seqlens = (chosen.randint(1, 1500), chosen.randint(1, 1500))
        nheads_k = chosen.choice([1, 2, 4])
        heads = (nheads_k * chosen.choice([1, 2, 3]), nheads_k)
        mask = MASKS[chosen.choice(list(MASKS))]
        inputs = dense("cuda", BF16, chosen.choice([1, 2, 8]), seqlens, heads, headdim, **mask)
        plan = chosen.choice(plans(headdim, bool(mask)))
        problem, arguments = arguments_of(inputs)
        for _ in range(100):
            launch_backward.backward(problem, arguments, plan)
        check(inputs, Solution(arguments.out, arguments.softmax_lse, *arguments[3:6]))
