"""The Hopper forward's source, run in a model of Gluon: results, barriers and memory hazards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton exists on Linux only")

import gluon_model
import support

from flash_attn.backends.sm90 import launch
from flash_attn.backends.sm90.plans import (
    DYNAMIC,
    ROUND_ROBIN,
    ForwardPlan,
    masks_first_block_alone,
)
from flash_attn.core import reference
from flash_attn.core.problem import (
    DENSE,
    AttentionProblem,
    AttentionResult,
    SequenceLayout,
    Visibility,
    make_transform,
)

FULL, CAUSAL, WINDOW = Visibility(), Visibility(None, 0), Visibility(70, 20)
PROGRAMS = 3


@pytest.fixture(scope="module")
def kernels() -> Any:
    return gluon_model.load_kernels("sm90_forward")


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Programs walk over several tiles."""
    with mock.patch.object(launch, "multiprocessors_of", return_value=PROGRAMS):
        yield


def around(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Normal numbers with NaN after rows and columns, in rows of a multiple of 16 bytes."""
    columns = -(-shape[-1] // 8) * 8 + 8
    whole = torch.full((*shape[:-3], shape[-3] + 20, shape[-2], columns), torch.nan, dtype=dtype)
    x = whole[..., : shape[-3], :, : shape[-1]]
    return x.copy_(torch.randn(shape))


def dense(
    seqlens: tuple[int, int],
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float16,
    **rest: Any,
) -> AttentionProblem:
    """Two sequences."""
    q = around(2, seqlens[0], heads[0], dims[0], dtype=dtype)
    k = around(2, seqlens[1], heads[1], dims[0], dtype=dtype)
    v = around(2, seqlens[1], heads[1], dims[1], dtype=dtype)
    return AttentionProblem(q, k, v, make_transform(dims[0]), **rest)


def packed(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (64, 64),
    **rest: Any,
) -> AttentionProblem:
    """Packed sequences after five rows of none, and before three, which are NaN."""
    cu = [
        torch.tensor([5, *(pair[i] for pair in lengths)]).cumsum(0).to(torch.int32) for i in (0, 1)
    ]
    q, k, v = (
        around(int(bounds[-1]) + 3, number, dim)
        for bounds, number, dim in zip(
            (cu[0], cu[1], cu[1]), (*heads, heads[1]), (dims[0], *dims), strict=True
        )
    )
    for x, bounds in ((q, cu[0]), (k, cu[1]), (v, cu[1])):
        x[:5] = torch.nan
        x[int(bounds[-1]) :] = torch.nan
    most = [max(pair[i] for pair in lengths) for i in (0, 1)]
    layout = SequenceLayout(*cu, max_seqlen_q=most[0], max_seqlen_k=most[1])
    return AttentionProblem(q, k, v, make_transform(dims[0]), layout=layout, **rest)


def solve(
    kernels: Any, problem: AttentionProblem, plan: ForwardPlan | None = None, seed: int = 0
) -> AttentionResult:
    """By the model, into memory that was NaN, with NaN around it that stays."""
    shape = problem.out_shape
    columns = -(-shape[-1] // 8) * 8 + 8
    whole = torch.full((*shape[:-1], columns), torch.nan, dtype=problem.q.dtype)
    counter = torch.zeros(1, dtype=torch.int32)
    results: list[AttentionResult] = []
    with mock.patch.object(launch, "counter_for", return_value=counter):
        (call,) = gluon_model.record(
            lambda: results.append(launch.forward(problem, whole[..., : shape[-1]], plan))
        )
    gluon_model.run_launch(kernels, call, seed=seed, resident=PROGRAMS)
    assert int(counter) == 0, "the counter is not back at 0"
    assert whole[..., shape[-1] :].isnan().all(), "written outside of the result"
    return results[0]


def check(kernels: Any, problem: AttentionProblem, plan: ForwardPlan | None = None) -> None:
    """Out and lse are within the budget."""
    got = solve(kernels, problem, plan)
    clean = problem._replace(
        q=problem.q.nan_to_num(0.0), k=problem.k.nan_to_num(0.0), v=problem.v.nan_to_num(0.0)
    )
    true = reference.attention(clean, torch.float64)
    same, _ = support._plain_forward(clean, None)
    support.check_lse(got.softmax_lse, true.softmax_lse)
    support.check_error(
        "out", got.out, true.out, same, 2.0, support._floors(clean, true.out)["out"]
    )


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW], ids=str)
@pytest.mark.parametrize("dim", [64, 88, 96, 128, 192, 256])
def test_dense_and_packed_sequences(kernels: Any, dim: int, mask: Visibility) -> None:
    check(kernels, dense((150, 210), dims=(dim, dim), visibility=mask))
    check(kernels, packed([(100, 130), (1, 5), (70, 0)], dims=(dim, dim), visibility=mask))


@pytest.mark.parametrize("group", [2, 8, 64])
def test_packed_heads_give_the_same(kernels: Any, group: int) -> None:
    """Masks and sinks follow the rows, wherever they are in a tile."""
    heads = (64, 1) if group == 64 else (2 * group, 2)
    sinks = torch.randn(heads[0])
    for mask in (FULL, CAUSAL, WINDOW):
        for problem in (
            dense((50, 140), heads, visibility=mask),
            packed([(20, 50), (0, 7), (31, 130)], heads, visibility=mask),
        ):
            transform = problem.transform._replace(sinks=sinks)
            problem = problem._replace(transform=transform, pack_gqa=True)
            plan = launch.plan_for(problem)
            assert launch.pack_of(problem, plan) == group
            got = solve(kernels, problem, seed=group)
            want = solve(kernels, problem._replace(pack_gqa=False))
            torch.testing.assert_close(got.out, want.out, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(got.softmax_lse, want.softmax_lse, atol=1e-5, rtol=1e-6)
    check(kernels, dense((50, 140), heads, visibility=CAUSAL, pack_gqa=True))


@pytest.mark.parametrize("seed", range(1, 5))
def test_every_interleaving_gives_the_same(kernels: Any, seed: int) -> None:
    used = torch.tensor([61, 0], dtype=torch.int32)
    problem = dense((90, 200), (8, 2), visibility=CAUSAL, pack_gqa=True)
    for layout in (DENSE, DENSE._replace(seqused_q=used, seqused_k=2 * used)):
        problem = problem._replace(layout=layout)
        first, again = solve(kernels, problem), solve(kernels, problem, seed=seed)
        assert torch.equal(first.out, again.out)
        assert torch.equal(first.softmax_lse, again.softmax_lse)


@pytest.mark.parametrize("pack", [False, True])
def test_alibi(kernels: Any, pack: bool) -> None:
    for mask in (FULL, CAUSAL, WINDOW):
        for problem in (
            dense((90, 140), (4, 2), visibility=mask, pack_gqa=pack),
            dense((150, 60), (4, 2), visibility=mask, pack_gqa=pack),
            packed([(80, 50), (0, 7), (31, 130)], (4, 2), visibility=mask, pack_gqa=pack),
        ):
            for shape in ((4,), (problem.batch_size, 4)):
                transform = problem.transform._replace(alibi_slopes=torch.rand(shape) * 0.3)
                check(kernels, problem._replace(transform=transform))
    capped = dense((90, 140), (4, 2), visibility=CAUSAL, pack_gqa=pack)
    transform = make_transform(64, softcap=2.0, alibi_slopes=torch.rand(4))
    check(kernels, capped._replace(transform=transform))


@pytest.mark.parametrize("dims", [(64, 88), (96, 64), (96, 192), (64, 184), (192, 64), (192, 128)])
def test_values_of_another_head_dim(kernels: Any, dims: tuple[int, int]) -> None:
    for mask in (FULL, CAUSAL, WINDOW):
        check(kernels, dense((150, 210), dims=dims, visibility=mask))
    check(kernels, packed([(100, 130), (1, 5), (70, 0)], dims=dims, visibility=CAUSAL))


@pytest.mark.parametrize("dim", [64, 192])
def test_keys_and_values_in_one_ring(kernels: Any, dim: int) -> None:
    for mask in (FULL, CAUSAL, WINDOW):
        for problem in (
            dense((150, 410), dims=(dim, dim), visibility=mask),
            packed([(100, 330), (1, 5), (70, 0)], dims=(dim, dim), visibility=mask),
        ):
            plan = launch.plan_for(problem)
            plan = replace(plan, ping_pong=False, joint=True, stages=3)
            check(kernels, problem, replace(plan, block_n=64, skip=mask != FULL))
            check(kernels, problem, replace(plan, block_n=128, stages=4, skip=mask != FULL))
            check(kernels, problem, replace(plan, skip=False, overlap=True))


def test_one_ring_and_loops_without_masks(kernels: Any) -> None:
    problem = dense((150, 406), dims=(192, 192), visibility=CAUSAL, pack_gqa=False)
    plan = launch.plan_for(problem)
    assert plan.joint
    assert masks_first_block_alone(plan, 150, 406, None, 0, 1)
    check(kernels, problem, replace(plan, overlap=True, peel=True))


@pytest.mark.parametrize("change", [("PIECES_V + FIRST)", "PIECES_V + 0)"),
                                    ("FIRST * PIECE, out", "PIECE, out")])  # fmt: skip
def test_the_model_notices_wrong_pieces(change: tuple[str, str]) -> None:
    kernels = gluon_model.load_kernels("sm90_forward", change)
    problem = dense((90, 140), dims=(96, 96))
    with pytest.raises(AssertionError):
        check(kernels, problem)


def test_the_model_notices_wrong_slots() -> None:
    change = ("gl.minimum(2 * i + 2,", "gl.minimum(2 * i + 1,")
    kernels = gluon_model.load_kernels("sm90_forward", change)
    problem = dense((90, 400))
    plan = replace(launch.plan_for(problem), block_n=64, joint=True, stages=3)
    with pytest.raises(AssertionError):
        check(kernels, problem, plan)


def test_the_model_notices_wrong_heads() -> None:
    change = ("i = i & (work.config.POSITIONS - 1)", "i = i % 5")
    kernels = gluon_model.load_kernels("sm90_forward", change)
    with pytest.raises(AssertionError):
        check(kernels, dense((50, 140), (8, 2), visibility=CAUSAL, pack_gqa=True))


def test_plans_with_turns(kernels: Any) -> None:
    plan = ForwardPlan(3, 128, 2, ROUND_ROBIN, 2, 1, ping_pong=True)
    check(kernels, dense((300, 300)), plan)
    check(kernels, dense((300, 300)), replace(plan, overlap=True))


# By queries, keys and keys on the right: of the first ones a tile's first block is all that is
# masked, also where it is cut off, where a tile sees nothing, and with a window on the right.
PEELED = [(256, 256, 0), (150, 150, 0), (129, 257, 0), (300, 172, 0), (150, 342, 64)]
NOT_PEELED = [(150, 210, 0), (256, 256, 1), (256, 255, 0)]


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "right"), PEELED + NOT_PEELED)
def test_loops_without_masks(kernels: Any, seqlen_q: int, seqlen_k: int, right: int) -> None:
    mask = Visibility(None, right)
    problem = dense((seqlen_q, seqlen_k), dims=(128, 128), visibility=mask, pack_gqa=False)
    plan = replace(launch.plan_for(problem), peel=True)
    with mock.patch.object(launch, "counter_for"):
        (call,) = gluon_model.record(lambda: launch.forward(problem, None, plan))
    assert call.keywords["PEEL"] == ((seqlen_q, seqlen_k, right) in PEELED)
    check(kernels, problem, plan)
    check(kernels, problem, replace(plan, overlap=True, q_slots=2))


def growing(problem: AttentionProblem) -> AttentionProblem:
    """Scores grow, so that references move."""
    keys = problem.k.shape[-3]
    problem.k.mul_(torch.linspace(8.0, 0.1, keys, dtype=problem.k.dtype)[:, None, None])
    return problem


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("turns", [False, True])
def test_weights_under_products(kernels: Any, dim: int, turns: bool) -> None:
    for mask in (FULL, CAUSAL, WINDOW):
        problem = growing(dense((150, 410), dims=(dim, dim), visibility=mask))
        plan = replace(launch.plan_for(problem), overlap=True, ping_pong=turns)
        check(kernels, problem, plan)


SHARED = ForwardPlan(3, 128, 2, ROUND_ROBIN, 1, 1, p_shared=64, slim=True)


@pytest.mark.parametrize("dim", [64, 88, 192])
def test_weights_in_shared_memory(kernels: Any, dim: int) -> None:
    dynamic = replace(SHARED, scheduler=DYNAMIC, slim=False, skip=True, late=True)
    for mask in (FULL, CAUSAL, WINDOW):
        problem = growing(dense((250, 410), dims=(dim, dim), visibility=mask, pack_gqa=False))
        check(kernels, problem, replace(SHARED, ping_pong=True, overlap=True))
        check(kernels, problem, replace(SHARED, joint=True, stages=4, ping_pong=True))
        check(kernels, problem, replace(dynamic, skip=mask != FULL))
        check(kernels, problem, replace(SHARED, block_n=64, p_shared=32))
        lengths = [(200, 330), (1, 5), (70, 0), (130, 140)]
        problem = packed(lengths, dims=(dim, dim), visibility=mask)
        check(kernels, problem, replace(dynamic, skip=mask != FULL))


STORED_EARLY = (
    "sums = partial_sums(p, BLOCK_N)",
    "sums = partial_sums(p, BLOCK_N); put_weights(work, shared, p.to(DTYPE), WEIGHTS, LANE)",
)
NOT_FENCED = ("assert_trivial=True))\n        fence_async_shared()", "assert_trivial=True))")
WRONG_KEYS = ("last = v.slice(IN_REGISTERS,", "last = v.slice(0,")
WRONG_PIECE = ("piece * COLUMNS, buffer)", "(piece + 1) % 3 * COLUMNS, buffer)")


@pytest.mark.parametrize("change", [STORED_EARLY, NOT_FENCED, WRONG_KEYS, WRONG_PIECE])
def test_the_model_notices_wrong_weights(change: tuple[str, str]) -> None:
    """Stored under the product that reads the ones before, not handed over, of other keys; and
    pieces of results in the wrong place."""
    kernels = gluon_model.load_kernels("sm90_forward", change)
    problem = dense((250, 410), dims=(96, 96), pack_gqa=False)
    with pytest.raises(AssertionError):
        check(kernels, problem, SHARED)
