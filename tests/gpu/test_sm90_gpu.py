"""The Hopper kernels against the reference in float64, within the error budget of support.py."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import support
import torch
from torch import Tensor

import flash_attn
from flash_attn import use_backend
from flash_attn.core import reference, registry, repeated
from flash_attn.core.device import arch_of
from flash_attn.core.problem import (
    DENSE,
    AttentionProblem,
    AttentionResult,
    SequenceLayout,
    Visibility,
    make_transform,
)

pytest.importorskip("triton", reason="Triton exists on Linux only")

from flash_attn.backends.sm90 import plans

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]
HEADDIMS = [8, 24, 40, 64, 72, 96, 128, 160, 192, 256]
FULL, CAUSAL = Visibility(), Visibility(None, 0)
MASKS = [
    FULL,
    CAUSAL,
    Visibility(100, 0),
    Visibility(64, 40),
    Visibility(300, None),
    Visibility(None, 5),
    Visibility(0, 0),
    Visibility(None, None, 128),
    Visibility(None, 0, 100),
    Visibility(50, 0, 190),
]
LENGTHS: list[list[tuple[int, int]]] = [
    [(300, 300), (1, 1), (0, 5), (129, 0), (64, 200), (700, 7)],
    [(128, 128), (256, 256)],
    [(33, 1000), (500, 333)],
    [(0, 10), (0, 0)],
    [(1, 70)] * 150,
]


@pytest.fixture(autouse=True)
def hopper():
    if torch.version.hip is not None or arch_of(torch.cuda.current_device()) != "sm90":
        pytest.skip("needs a GPU of compute capability 9.0")


def backend():
    return registry.load("sm90")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers in rows of a multiple of 16 bytes, with NaN around them."""
    columns = -(-shape[-1] // 8) * 8 + 8
    rows = (*shape[:-3], shape[-3] + 30, shape[-2])
    whole = torch.full((*rows, columns), float("nan"), dtype=dtype, device="cuda")
    x = whole[..., : shape[-3], :, : shape[-1]]
    return x.copy_(torch.randn(shape, device="cuda"))


def dense(
    seqlens: tuple[int, int],
    heads: tuple[int, int] = (2, 1),
    headdim: int = 64,
    headdim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 2,
    **rest: Any,
) -> AttentionProblem:
    q = random(batch, seqlens[0], heads[0], headdim, dtype=dtype)
    k = random(batch, seqlens[1], heads[1], headdim, dtype=dtype)
    v = random(batch, seqlens[1], heads[1], headdim_v or headdim, dtype=dtype)
    return AttentionProblem(q, k, v, make_transform(headdim), **rest)


def packed(
    lengths: list[tuple[int, int]],
    extra: tuple[int, int] = (0, 0),
    heads: tuple[int, int] = (4, 2),
    headdim: int = 64,
    headdim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **rest: Any,
) -> AttentionProblem:
    """Packed sequences between ``extra`` rows of none, which are NaN."""
    before, after = extra
    cu, tensors = [], []
    for i in (0, 1):
        bounds = torch.tensor([before, *(pair[i] for pair in lengths)]).cumsum(0)
        cu.append(bounds.to("cuda", torch.int32))
        for width in (headdim, headdim_v or headdim)[: 1 + i]:
            x = random(int(bounds[-1]) + after, heads[i], width, dtype=dtype)
            x[:before] = float("nan")
            x[int(bounds[-1]) :] = float("nan")
            tensors.append(x)
    layout = SequenceLayout(
        *cu,
        max_seqlen_q=max(pair[0] for pair in lengths),
        max_seqlen_k=max(pair[1] for pair in lengths),
    )
    return AttentionProblem(*tensors, make_transform(headdim), layout=layout, **rest)


def solve(problem: AttentionProblem) -> AttentionResult:
    """Into memory that was NaN, with NaN around it that stays."""
    with use_backend("sm90"):
        chosen = registry.select(problem)
    shape = problem.out_shape
    columns = -(-shape[-1] // 8) * 8 + 8
    whole = torch.full((*shape[:-1], columns), float("nan"), dtype=problem.q.dtype, device="cuda")
    result = chosen.forward(problem, whole[..., : shape[-1]])
    assert whole[..., shape[-1] :].isnan().all()
    return result


def check(problem: AttentionProblem) -> AttentionResult:
    """Out and lse are within the budget, and the same in a second run."""
    got = solve(problem)
    clean = problem._replace(q=problem.q.nan_to_num(0.0), k=problem.k.nan_to_num(0.0),
                             v=problem.v.nan_to_num(0.0))  # fmt: skip
    true = reference.attention(clean)
    same, _ = support._plain_forward(clean, None)
    support.check_lse(got.softmax_lse, true.softmax_lse)
    floor = support._floors(clean, true.out)["out"]
    support.check_error("out", got.out, true.out, same, 2.0, floor)
    again = solve(problem)
    assert torch.equal(again.out, got.out)
    assert torch.equal(again.softmax_lse, got.softmax_lse)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("headdim", HEADDIMS)
def test_head_dims(headdim: int, dtype: torch.dtype) -> None:
    for mask, lengths in itertools.product((FULL, CAUSAL), ((333, 257), (130, 517))):
        check(dense(lengths, (4, 2), headdim, dtype=dtype, visibility=mask))
    check(packed(LENGTHS[0], (3, 5), headdim=headdim, dtype=dtype, visibility=CAUSAL))


@pytest.mark.parametrize("headdim", [80, 96, 176, 192])
def test_tiles_in_pieces(headdim: int) -> None:
    """Head dims whose tiles are three pieces: windows, rows in use, softcap and packed heads."""
    from flash_attn.backends.sm90.launch import register_reasons

    used = torch.tensor([90, 200], dtype=torch.int32, device="cuda")
    window = Visibility(90, 40)
    for lengths in ((257, 511), (700, 65), (90, 1000)):
        check(dense(lengths, (4, 2), headdim, visibility=window))
        check(dense(lengths, (8, 2), headdim, visibility=window, pack_gqa=True))
    problem = dense((200, 300), (4, 2), headdim, visibility=CAUSAL)
    capped = problem._replace(transform=make_transform(headdim, softcap=3.0))
    if not register_reasons(capped):
        check(capped)
    check(problem._replace(layout=DENSE._replace(seqused_q=used, seqused_k=used)))
    check(packed(LENGTHS[0], (3, 5), (8, 2), headdim, visibility=window, pack_gqa=True))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("headdim", [64, 128, 256])
def test_masks(headdim: int, mask: Visibility) -> None:
    from flash_attn.backends.sm90.launch import register_reasons

    problems = [
        dense(lengths, headdim=headdim, visibility=mask)
        for lengths in ((700, 700), (65, 900), (900, 65), (257, 511))
    ]
    problems += [packed(lengths, (7, 130), headdim=headdim, visibility=mask) for lengths in LENGTHS]
    for problem in problems:
        if not register_reasons(problem):
            check(problem)


@pytest.mark.parametrize("seqlens", [(1, 1), (65, 1), (127, 4100), (2049, 2049), (700, 7)])
@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (5, 1), (8, 2)])
def test_lengths_and_heads(seqlens, headdim: int, heads) -> None:
    for mask in (FULL, CAUSAL):
        problem = dense(seqlens, heads, headdim, batch=3, visibility=mask)
        check(problem)


@pytest.mark.parametrize("headdim", [64, 128, 256])
def test_softcap_and_sinks(headdim: int) -> None:
    from flash_attn.backends.sm90.launch import register_reasons

    sinks = torch.tensor([-3.0, 0.0, 8.0, -float("inf")], device="cuda")
    for softcap, given, mask in itertools.product(
        (0.0, 3.0, 50.0), (None, sinks, sinks.bfloat16()), (FULL, Visibility(90, 0))
    ):
        for problem in (
            dense((600, 300), (4, 2), headdim, visibility=mask),
            packed(LENGTHS[0], (3, 5), headdim=headdim, visibility=mask),
        ):
            transform = problem.transform._replace(softcap=softcap, sinks=given)
            capped = problem._replace(transform=transform)
            if not register_reasons(capped):
                check(capped)


@pytest.mark.parametrize(
    "dims", [(64, 128), (64, 256), (40, 80), (128, 64), (192, 128), (256, 8), (96, 64), (128, 96)]
)
def test_head_dims_of_values(dims: tuple[int, int]) -> None:
    for mask in (FULL, CAUSAL, Visibility(90, 40)):
        check(dense((600, 300), (4, 2), *dims, visibility=mask))
        check(packed(LENGTHS[0], (3, 5), (4, 2), *dims, visibility=mask))


@pytest.mark.parametrize(("group", "headdim"), [(8, 128), (4, 64), (2, 256)])
def test_packed_heads_give_the_same_bits(group: int, headdim: int) -> None:
    """As one head a tile by the same plan: rows are computed alike wherever they are in a tile.

    Packed sequences whose heads are packed have another plan by themselves, and other last bits.
    """
    from flash_attn.backends.sm90 import launch

    sinks = torch.randn(2 * group, device="cuda")
    heads = (2 * group, 2)
    for mask in (FULL, CAUSAL, Visibility(90, 0)):
        problems = [
            dense(seqlens, heads, headdim, visibility=mask)
            for seqlens in ((65, 900), (90, 70), (1, 333), (333, 333))
        ]
        problems += [
            packed(lengths, (3, 5), heads, headdim, visibility=mask) for lengths in LENGTHS[:4]
        ]
        for problem in problems:
            transform = problem.transform._replace(sinks=sinks)
            problem = problem._replace(transform=transform, num_splits=1, pack_gqa=True)
            got = check(problem)
            plan = launch.plan_for(problem)
            if launch.pack_of(problem, plan) == 1:
                assert headdim == 256  # left alone under newer compilers
            want = launch.forward(problem._replace(pack_gqa=False), plan=plan)
            assert torch.equal(got.out, want.out)
            assert torch.equal(got.softmax_lse, want.softmax_lse)


@pytest.mark.parametrize("headdim", [64, 128])
def test_alibi(headdim: int) -> None:
    """Slopes of all sequences and of each, with rows before the first key too."""
    for mask, pack in itertools.product((FULL, CAUSAL, Visibility(90, 40)), (False, True)):
        for problem in (
            dense((300, 300), (4, 2), headdim, visibility=mask, pack_gqa=pack),
            dense((600, 200), (4, 2), headdim, visibility=mask, pack_gqa=pack),
            dense((70, 1500), (4, 2), headdim, visibility=mask, pack_gqa=pack),
            packed(LENGTHS[0], (3, 5), headdim=headdim, visibility=mask, pack_gqa=pack),
        ):
            for shape in ((4,), (problem.batch_size, 4)):
                slopes = torch.rand(shape, device="cuda") * 0.3
                check(problem._replace(transform=make_transform(headdim, alibi_slopes=slopes)))


def test_alibi_with_softcap() -> None:
    slopes = torch.rand(2, 4, device="cuda") * 0.3
    transform = make_transform(64, softcap=3.0, alibi_slopes=slopes)
    check(dense((300, 333), (4, 2), visibility=CAUSAL)._replace(transform=transform))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_used_lengths(mask: Visibility) -> None:
    """Rows that are not in use are NaN, in queries, keys and values."""
    used = [
        torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([130, 0, 200], [90, 333, 0])
    ]
    for pair in ((used[0], used[1]), (None, used[1]), (used[0], None)):
        problem = dense((200, 400), (4, 2), 64, batch=3, visibility=mask)
        _poison_unused(problem, pair)
        layout = DENSE._replace(seqused_q=pair[0], seqused_k=pair[1])
        check(problem._replace(layout=layout))
        problem = packed([(140, 100), (70, 400), (300, 20)], headdim=128, visibility=mask)
        layout = problem.layout._replace(seqused_q=pair[0], seqused_k=pair[1])
        check(problem._replace(layout=layout))


def _poison_unused(problem: AttentionProblem, pair: tuple[Tensor | None, Tensor | None]) -> None:
    for used, tensors in zip(pair, ((problem.q,), (problem.k, problem.v)), strict=True):
        for x in tensors if used is not None else ():
            for index, count in enumerate(used.tolist()):
                x[index, count:] = float("nan")


@pytest.mark.parametrize("headdim", [64, 96, 128, 192, 256])
def test_nan_of_a_neighbour_stays_there(headdim: int) -> None:
    """Also right behind the end in memory, and also where tiles reach into it."""
    for mask in (FULL, CAUSAL, Visibility(70, 30)):
        problem = packed([(100, 130), (90, 75), (200, 190)], headdim=headdim, visibility=mask)
        want = solve(problem)
        problem.q[100:190] = float("nan")
        problem.k[130:205] = float("inf")
        problem.v[130:205] = float("nan")
        got = solve(problem)
        for rows in (slice(0, 100), slice(190, 390)):
            assert torch.equal(got.out[rows], want.out[rows])
            assert torch.equal(got.softmax_lse[:, rows], want.softmax_lse[:, rows])


@pytest.mark.parametrize("headdim", [64, 128, 256])
def test_keys_that_no_row_sees_may_be_nan(headdim: int) -> None:
    for mask in (Visibility(33, 0), Visibility(3, 3), Visibility(1, None)):
        problem = dense((140, 375), headdim=headdim, visibility=mask)
        unseen = slice(0, 375 - 140 - mask.window_left)
        problem.k[:, unseen], problem.v[:, unseen] = 0, 0
        want = solve(problem)
        problem.k[:, unseen], problem.v[:, unseen] = float("nan"), float("inf")
        got = solve(problem)
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.softmax_lse, want.softmax_lse)


@pytest.mark.parametrize("seed", range(10))
def test_hostile_bounds_write_nothing_outside(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    problem = packed([(100, 100), (70, 30), (200, 150)], visibility=MASKS[seed % len(MASKS)])
    numbers = torch.tensor([-(2**31), 2**31 - 1, -1, 0, 50, 170, 370, 10**6], dtype=torch.int32)
    bad = [numbers[torch.randint(8, (n,), generator=generator)].cuda() for n in (4, 4, 3, 3)]
    layout = problem.layout._replace(
        cu_seqlens_q=bad[0], cu_seqlens_k=bad[1], seqused_q=bad[2], seqused_k=bad[3]
    )
    solve(problem._replace(layout=layout))
    torch.cuda.synchronize()


@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize("headdim", [64, 96, 128, 192, 256])
def test_a_thousand_runs_are_equal(headdim: int, programs: int) -> None:
    """Bit for bit; short sequences, where tiles follow each other fast, and few programs."""
    from flash_attn.backends.sm90 import launch

    problems = [
        dense((700, 7), (6, 2), headdim, batch=1),
        dense((300, 300), (16, 4), headdim, batch=8),
        dense((300, 300), (16, 4), headdim, batch=8, visibility=CAUSAL),
        packed(LENGTHS[0], (3, 5), headdim=headdim, visibility=CAUSAL),
        dense((150, 211), (4, 2), headdim, visibility=Visibility(30, 0)),
    ]
    with mock.patch.object(launch, "multiprocessors_of", return_value=programs):
        for problem in problems:
            want = solve(problem)
            out, differs = torch.empty_like(want.out), torch.zeros((), device="cuda")
            for _ in range(1000 // len(problems)):
                out.fill_(float("nan"))
                got = backend().forward(problem, out)
                differs += (got.out != want.out).any() | (got.softmax_lse != want.softmax_lse).any()
            assert differs.item() == 0


@pytest.mark.parametrize(("block_d", "masked", "plan"), plans.forward_plans(), ids=str)
def test_every_plan_in_use(block_d: int, masked: bool, plan: plans.ForwardPlan) -> None:
    """By name: which one is chosen depends on how many tiles there are."""
    from flash_attn.backends.sm90 import launch

    if block_d % 3 == 0 and launch._TRITON > (3, 6):
        pytest.skip("there tiles are padded")
    plan = launch.within_registers(plan, False, False)
    mask = CAUSAL if masked else Visibility()
    for seqlens, heads, batch in (((700, 7), (6, 2), 1), ((300, 300), (16, 4), 8),
                                  ((1100, 1100), (4, 2), 2)):  # fmt: skip
        problem = dense(seqlens, heads, block_d, batch=batch, visibility=mask, pack_gqa=False)
        with (
            mock.patch.object(launch, "plan_for", return_value=plan),
            mock.patch.object(launch, "multiprocessors_of", return_value=5),
        ):
            check(problem)


_FOUR = plans.ForwardPlan(4, 64, 3, plans.ROUND_ROBIN, 2, 1)
_FOUR_MASKED = replace(_FOUR, skip=True, section_bytes=1 << 24)


@pytest.mark.parametrize(
    "plan",
    [
        _FOUR,
        replace(_FOUR, slim=True),
        _FOUR_MASKED,
        replace(_FOUR_MASKED, scheduler=plans.DYNAMIC, slim=True),
        replace(_FOUR_MASKED, scheduler=plans.DYNAMIC, late=True, last_bytes=1 << 25),
    ],
    ids=str,
)
def test_four_consumers(plan: plans.ForwardPlan) -> None:
    """Also with schedules of no plan in use, by name; docs/lab/hopper-forward.md."""
    from flash_attn.backends.sm90 import launch

    mask = CAUSAL if plan.skip else Visibility()
    for seqlens, heads, batch in (((700, 7), (6, 2), 1), ((300, 300), (16, 4), 8),
                                  ((1000, 1000), (4, 2), 2)):  # fmt: skip
        problem = dense(seqlens, heads, 64, batch=batch, visibility=mask, pack_gqa=False)
        with (
            mock.patch.object(launch, "plan_for", return_value=plan),
            mock.patch.object(launch, "multiprocessors_of", return_value=5),
        ):
            want = check(problem)
            out, differs = torch.empty_like(want.out), torch.zeros((), device="cuda")
            for _ in range(100):
                out.fill_(float("nan"))
                got = backend().forward(problem, out)
                differs += (got.out != want.out).any() | (got.softmax_lse != want.softmax_lse).any()
        assert differs.item() == 0


@pytest.mark.parametrize("varlen", [False, True])
def test_graphs(varlen: bool) -> None:
    """A captured call follows its inputs, also lengths, and may be replayed on another stream."""

    def make() -> AttentionProblem:
        if varlen:
            return packed([(100, 100), (70, 30), (200, 150)], headdim=128, visibility=CAUSAL)
        return dense((300, 400), headdim=128, visibility=CAUSAL)

    problem, other = make(), make()
    out = torch.empty(problem.out_shape, dtype=problem.q.dtype, device="cuda")
    backend().forward(problem, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = backend().forward(problem, out)
    if varlen:
        bounds = torch.tensor([0, 50, 50, 370], dtype=torch.int32, device="cuda")
        other = other._replace(layout=other.layout._replace(cu_seqlens_q=bounds))
        problem.layout.cu_seqlens_q.copy_(bounds)
    for mine, theirs in zip(problem[:3], other[:3], strict=True):
        mine.copy_(theirs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            graph.replay()
    stream.synchronize()
    want = solve(other)
    assert torch.equal(result.out, want.out)
    assert torch.equal(result.softmax_lse, want.softmax_lse)


@pytest.mark.parametrize("seqlen", [64, 65, 300])
def test_the_automatic_choice_comes_here_with_more_than_a_few_queries(seqlen: int) -> None:
    q = random(2, seqlen, 4, 64)
    forward = backend().forward
    with use_backend("auto"), mock.patch.object(backend(), "forward", wraps=forward) as served:
        repeated.clear()
        got = flash_attn.flash_attn_func(q, q, q, causal=True)
    assert served.call_count == (seqlen > 64)
    problem = AttentionProblem(q, q, q, make_transform(64), CAUSAL)
    if seqlen > 64:
        assert torch.equal(got, solve(problem).out)


@pytest.mark.parametrize("seqlens", [(300, 400), (400, 300)])
@pytest.mark.parametrize("forward_by", ["sm90", "triton"])
@pytest.mark.parametrize("backward_by", ["sm90", "triton"])
def test_each_pass_takes_the_results_of_the_other(
    monkeypatch, forward_by, backward_by, seqlens
) -> None:
    """Also of rows that see no key, of which the second shape has some."""
    inputs = support.dense("cuda", torch.bfloat16, 2, seqlens, (4, 2), 64, causal=True)
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    with use_backend(forward_by):
        out, lse, _ = flash_attn.flash_attn_func(*leaves, causal=True, return_attn_probs=True)
    with use_backend(backward_by):
        grads = torch.autograd.grad(out, leaves, inputs.dout)
    support.check(inputs, support.Solution(out.detach(), lse, *grads))


@pytest.mark.parametrize(("headdim", "headdim_v"), [(1, 1), (60, 64), (64, 33), (264, 256)])
def test_other_head_dims_are_refused(headdim: int, headdim_v: int) -> None:
    problem = dense((300, 300), (2, 1), headdim, headdim_v)
    reasons = backend().unsupported(problem, backward=False)
    assert len(reasons) == sum(x % 8 > 0 or x > 256 for x in (headdim, headdim_v))
    assert all("of a multiple of 8 up to 256" in reason for reason in reasons)


def test_chunks_of_packed_sequences_are_refused_at_head_dim_256() -> None:
    problem = packed(LENGTHS[1], headdim=256, visibility=Visibility(None, 0, 128))
    (found,) = backend().unsupported(problem, backward=False)
    assert "attention_chunk with cu_seqlens or seqused at head dims up to 128, found 256" in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout_p": 0.1}, "does not serve dropout"),
        ({"num_splits": 3}, "does not serve num_splits > 1"),
        ({"layout": DENSE._replace(leftpad_k=torch.zeros(2))}, "does not serve leftpad_k"),
        ({"transform": make_transform(64, softmax_scale=-1.0)}, "needs softmax_scale > 0"),
    ],
)
def test_what_is_left_to_others_has_a_reason(change: dict[str, Any], reason: str) -> None:
    problem = dense((300, 300))._replace(**change)
    (found,) = backend().unsupported(problem, backward=False)
    assert reason in found
