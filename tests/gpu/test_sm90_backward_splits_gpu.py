"""The Hopper backward with the query heads of a key head divided among programs, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from support import Inputs, alibi_slopes, assert_same_bits, check, dense, extended, varlen
from test_sm90_backward_gpu import BATCHES, MASKS, arguments_of, hopper, solve

import flash_attn
from flash_attn.backends.sm90 import launch_backward
from flash_attn.backends.sm90.plans_backward import BackwardPlan, plan_backward, plan_ordered
from flash_attn.core import registry

__all__ = ["hopper"]  # a fixture of these tests too
pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
# (query heads, key heads, splits): groups of 2, 4, 8 and 7 heads; parts of 1, 2, and 3 or 4 heads.
HEADS = [(2, 1, 2), (8, 2, 2), (8, 1, 8), (28, 4, 2), (7, 1, 7)]


def plans(headdim: int, is_masked: bool, splits: int) -> list[BackwardPlan]:
    """The plans in use that serve a head dim, in any order and, unless it is the same, in order."""
    kinds = [plan_backward] if headdim > 128 else [plan_backward, plan_ordered]
    return [choose(headdim, is_masked, 512)._replace(splits=splits) for choose in kinds]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("headdim", [40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("mask", ["full", "causal", "left", "both"])
@pytest.mark.parametrize("seqlens", [(1, 1), (113, 203), (400, 250)])
def test_gradients(
    heads: tuple[int, int, int], headdim: int, mask: str, seqlens: tuple[int, int]
) -> None:
    inputs = dense("cuda", BF16, 2, seqlens, heads[:2], headdim, **MASKS[mask])
    for plan in plans(headdim, mask != "full", heads[2]):
        check(inputs, solve(inputs, plan))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("headdim", [61, 64, 80, 128, 136, 192])
def test_softcap_and_odd_head_dims(dtype: torch.dtype, headdim: int) -> None:
    inputs = dense("cuda", dtype, 2, (230, 190), (6, 2), headdim, **MASKS["softcap"])
    for plan in plans(headdim, True, 2):
        check(inputs, solve(inputs, plan))


@pytest.mark.parametrize("headdim", [64, 96, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_alibi(headdim: int, packed: bool) -> None:
    if packed and headdim > 64:
        pytest.skip("refused by reason, see tests/unit/test_sm90_backward_reasons.py")
    make: Any = varlen if packed else dense
    lengths = ([190, 0, 430], [600, 60, 370]) if packed else (3, (350, 300))
    inputs = make("cuda", BF16, *lengths, (6, 2), headdim, causal=True)
    inputs = inputs.but(alibi_slopes=alibi_slopes("cuda", 6, 3))
    check(inputs, solve(inputs, plans(headdim, True, 2)[0]))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("headdim", [64, 96, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "left"])
@pytest.mark.parametrize("batch", BATCHES)
def test_packed_sequences(heads: tuple[int, int, int], headdim: int, mask: str, batch: str) -> None:
    """Rows of no sequence lie behind the last one: they hold NaN and get zeros."""
    inputs = varlen("cuda", BF16, *BATCHES[batch], heads[:2], headdim, 70, **MASKS[mask])
    changes = {}
    for name, rows in (("q", 0), ("k", 1), ("v", 1), ("dout", 0)):
        x, end = getattr(inputs, name).clone(), int(inputs.lengths[rows][-1])
        x[end:] = 0.0
        changes[name] = x
    clean = inputs.but(**changes)
    for plan in plans(headdim, mask != "full", heads[2]):
        problem, arguments = arguments_of(clean)
        dirty = {}
        for name, rows in (("q", 0), ("k", 1), ("v", 1), ("dout", 0)):
            dirty[name] = changes[name].clone()
            dirty[name][int(inputs.lengths[rows][-1]) :] = float("nan")
        dout = dirty.pop("dout")
        launch_backward.backward(problem._replace(**dirty), arguments._replace(dout=dout), plan)
        for grad, rows in zip(arguments[3:6], (0, 1, 1), strict=True):
            assert not grad[int(inputs.lengths[rows][-1]) :].any()
        got = solve(clean, plan)
        check(clean, got)
        for one, other in zip(arguments[4:6], (got.dk, got.dv), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("headdim", [64, 96, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_in_use_and_chunks(headdim: int, packed: bool) -> None:
    used = {
        "seqused_q": torch.tensor([270, 0, 133, 9000], dtype=torch.int32, device="cuda"),
        "seqused_k": torch.tensor([0, 120, 350, -3], dtype=torch.int32, device="cuda"),
    }
    if packed:
        lengths = ([280, 120, 140, 50], [90, 340, 350, 130])
        inputs = varlen("cuda", BF16, *lengths, (8, 2), headdim, window_size=(70, 10))
    else:
        inputs = dense("cuda", BF16, 4, (290, 350), (8, 2), headdim, window_size=(70, 10))
    for more in ({}, {"attention_chunk": 100})[: 2 if headdim <= 64 else 1]:
        one = extended(inputs, **used, **more)
        for plan in plans(headdim, True, 2):
            check(one, solve(one, plan))


@pytest.mark.parametrize("columns", [8, 3])
@pytest.mark.parametrize("headdim", [64, 96, 128, 192])
def test_nothing_outside_is_written(headdim: int, columns: int) -> None:
    """Results of the caller's, in the midst of NaN, also where TMA cannot address them."""
    inputs = dense("cuda", FP16, 2, (170, 250), (8, 2), headdim, causal=True)

    def inside(x: torch.Tensor) -> torch.Tensor:
        batch, rows, heads, headdim = x.shape
        buffer = x.new_full((batch, rows + 70, heads + 1, headdim + columns), float("nan"))
        return buffer[:, 3 : rows + 3, 1:, columns:]

    for plan in plans(headdim, True, 2):
        results = tuple(inside(x) for x in (inputs.q, inputs.k, inputs.v))
        check(inputs, solve(inputs, plan, results))
        for view in results:
            buffer = view._base
            assert buffer is not None
            assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


def test_columns_apart() -> None:
    inputs = dense("cuda", BF16, 2, (150, 150), (8, 2), 64, causal=True)
    plan = plan_ordered(64, True, 512)._replace(splits=4)
    results = tuple(torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device)[..., 0]
                    for x in (inputs.q, inputs.k, inputs.v))  # fmt: skip
    assert_same_bits(solve(inputs, plan, results), solve(inputs, plan), "columns apart")


def _repeats(inputs: Inputs, plan: BackwardPlan | None, is_ordered: bool) -> None:
    problem, arguments = arguments_of(inputs)
    launch_backward.backward(problem, arguments, plan)
    first = [x.clone() for x in arguments[3:6]]
    for _ in range(50):
        for x in arguments[3:6]:
            x.fill_(float("nan"))
        launch_backward.backward(problem, arguments, plan)
        for x, y in list(zip(arguments[3:6], first, strict=True))[not is_ordered :]:
            assert torch.equal(x, y)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("headdim", [64, 96, 128, 192])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_fifty_repeats_have_the_same_bits(
    heads: tuple[int, int, int], headdim: int, mask: str
) -> None:
    inputs = dense("cuda", BF16, 2, (700, 700), heads[:2], headdim, **MASKS[mask])
    for plan in plans(headdim, mask != "full", heads[2]):
        _repeats(inputs, plan, plan.deterministic)
    if headdim <= 128:
        lengths = [700, 1, 300, 0, 1500, 64]
        inputs = varlen("cuda", BF16, lengths, lengths, heads[:2], headdim, **MASKS[mask])
        for plan in plans(headdim, mask != "full", heads[2]):
            _repeats(inputs, plan, plan.deterministic)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("headdim", [64, 96, 128, 256])
def test_the_public_functions_split(packed: bool, headdim: int) -> None:
    """Few programs: the rule splits, and the call repeated gives the same dk and dv."""
    make: Any = varlen if packed else dense
    lengths = ([170, 0, 280], [190, 5, 330]) if packed else (2, (270, 330))
    inputs = make("cuda", BF16, *lengths, (8, 1), headdim, causal=True)
    problem = inputs.problem()
    plan = plan_backward(headdim, True, 330)
    assert launch_backward._splits(problem, plan) == 8
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    with flash_attn.use_backend("sm90"):
        assert registry.select(problem, backward=True).name == "sm90"
        grads = []
        for _ in range(4):  # the later ones by repeating launches
            if packed:
                bounds = inputs.lengths
                out = flash_attn.flash_attn_varlen_func(*leaves, *bounds, causal=True)
            else:
                out = flash_attn.flash_attn_func(*leaves, causal=True)
            grads.append(torch.autograd.grad(out, leaves, inputs.dout))
    want = solve(inputs)
    for dq, dk, dv in grads:
        torch.testing.assert_close(dq, want.dq, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(dk, want.dk, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(dv, want.dv, atol=2e-2, rtol=2e-2)
        assert torch.equal(dk, grads[0][1])
        assert torch.equal(dv, grads[0][2])
