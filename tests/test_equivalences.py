"""Calls that mean the same give the same, on problems that Hypothesis chooses."""

from __future__ import annotations

import os
from typing import Any

import pytest
import rounding
import support
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flash_attn

DTYPE = torch.float32
# 2000 examples a test are the acceptance run.
_EXAMPLES = int(os.environ.get("FLASH_ATTN_TEST_EXAMPLES", "25"))
_settings = settings(
    max_examples=_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

pytestmark = pytest.mark.timeout(300 + 2 * _EXAMPLES)

LENGTHS = st.integers(0, 70)
WINDOWS = st.tuples(st.integers(-1, 75), st.integers(-1, 75))
HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)])
# Few head dims: on a GPU each is a compilation.
HEADDIMS = st.sampled_from([16, 24])
SEEDS = st.integers(0, 2**31)


@st.composite
def options(draw: Any) -> dict[str, Any]:
    """Masks and scores of a call."""
    chosen: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        chosen["window_size"] = draw(WINDOWS)
    if draw(st.booleans()):
        chosen["softcap"] = draw(st.sampled_from([0.7, 5.0]))
    if draw(st.booleans()):
        chosen["softmax_scale"] = draw(st.sampled_from([0.0, -0.3, 1.1]))
    return chosen


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """Arguments of :func:`support.dense` but for the device and the dtype."""
    torch.manual_seed(draw(SEEDS))
    return {
        "batch": draw(st.integers(1, 3)),
        "seqlens": (draw(LENGTHS), draw(LENGTHS)),
        "heads": draw(HEADS),
        "headdim": draw(HEADDIMS),
    }


@_settings
@given(call=calls(), chosen=options())
def test_any_call(device: str, call: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Any combination is within the error budget."""
    for dtype in (torch.float32, torch.float16):
        support.run_and_check(support.dense(device, dtype, **call, **chosen))


@_settings
@given(call=calls(), left=st.integers(-1, 75))
def test_causal_is_a_window(device: str, call: dict[str, Any], left: int) -> None:
    inputs = support.dense(device, DTYPE, **call)
    causal = support.run(inputs.but(causal=True, window_size=(left, 9)))
    window = support.run(inputs.but(window_size=(left, 0)))
    support.assert_same_bits(causal, window)


@_settings
@given(call=calls(), beyond=st.integers(0, 1000))
def test_wide_window_is_none(device: str, call: dict[str, Any], beyond: int) -> None:
    """A window that reaches every key (queries no more than keys) is no window."""
    call["seqlens"] = tuple(sorted(call["seqlens"]))
    inputs = support.dense(device, DTYPE, **call)
    reach = call["seqlens"][1] + beyond
    for causal in (False, True):
        full = inputs.but(causal=causal)
        wide = full.but(window_size=(reach, reach))
        rounding.assert_same(support.run(wide), support.run(full), rounding.deviations(full))


@_settings
@given(call=calls(), chosen=options())
def test_packed_is_separate(device: str, call: dict[str, Any], chosen: dict[str, Any]) -> None:
    call["seqlens"] = (call["seqlens"][1], call["seqlens"][1])
    call["heads"] = (call["heads"][1], call["heads"][1])
    inputs = support.dense(device, DTYPE, **call, **chosen)
    want = support.run(inputs)
    qkv = torch.stack([inputs.q, inputs.k, inputs.v], dim=2).requires_grad_()
    out = flash_attn.flash_attn_qkvpacked_func(qkv, **chosen)
    (dqkv,) = torch.autograd.grad(out, qkv, inputs.dout)
    assert torch.equal(out, want.out)
    for index, grad in enumerate((want.dq, want.dk, want.dv)):
        assert torch.equal(dqkv[:, :, index], grad)


@_settings
@given(
    lengths=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=4),
    heads=HEADS,
    headdim=HEADDIMS,
    chosen=options(),
    seed=SEEDS,
)
def test_varlen_is_dense_by_sequence(
    device: str,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    headdim: int,
    chosen: dict[str, Any],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    lengths_q, lengths_k = (list(side) for side in zip(*lengths, strict=True))
    inputs = support.varlen(device, DTYPE, lengths_q, lengths_k, heads, headdim, **chosen)
    whole = support.run(inputs)
    start_q = start_k = 0
    for length_q, length_k in lengths:
        rows_q = slice(start_q, start_q + length_q)
        rows_k = slice(start_k, start_k + length_k)
        start_q, start_k = rows_q.stop, rows_k.stop
        own = [x[rows][None] for x, rows in zip(
            inputs.tensors, (rows_q, rows_k, rows_k, rows_q), strict=True
        )]  # fmt: skip
        alone = support.Inputs(*own, chosen)
        part = support.Solution(
            whole.out[None, rows_q], whole.lse[None, :, rows_q], whole.dq[None, rows_q],
            whole.dk[None, rows_k], whole.dv[None, rows_k],
        )  # fmt: skip
        rounding.assert_same(part, support.run(alone), rounding.deviations(alone))


@_settings
@given(call=calls(), chosen=options())
def test_shared_heads_are_repeated(
    device: str, call: dict[str, Any], chosen: dict[str, Any]
) -> None:
    inputs = support.dense(device, DTYPE, **call, **chosen)
    group = call["heads"][0] // call["heads"][1]
    repeated = inputs.but(
        k=inputs.k.repeat_interleave(group, dim=2), v=inputs.v.repeat_interleave(group, dim=2)
    )
    got, want = support.run(inputs), support.run(repeated)
    dk, dv = (x.unflatten(2, (-1, group)).sum(3) for x in (want.dk, want.dv))
    rounding.assert_same(got, want._replace(dk=dk, dv=dv), rounding.deviations(inputs))


@_settings
@given(call=calls(), chosen=options(), share=st.floats(0.0, 1.0))
def test_split_keys_merge(
    device: str, call: dict[str, Any], chosen: dict[str, Any], share: float
) -> None:
    """Attention over two halves of the keys, weighted by their LSE, is attention over all."""
    for name in ("causal", "window_size"):
        chosen.pop(name, None)
    inputs = support.dense(device, DTYPE, **call, **chosen)
    want = support.run_forward(inputs)
    cut = round(share * call["seqlens"][1])
    parts = [
        support.run_forward(inputs.but(k=inputs.k[:, keys], v=inputs.v[:, keys]))
        for keys in (slice(0, cut), slice(cut, None))
    ]
    # Rows without keys weigh nothing: their +inf stands for -inf here.
    lses = torch.stack(
        [lse.double().masked_fill(lse == float("inf"), float("-inf")) for _, lse, *_ in parts]
    )
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - lse.nan_to_num(neginf=0.0)).transpose(-1, -2)[..., None]
    out = weights[0] * parts[0][0] + weights[1] * parts[1][0]
    # The merge itself is in float64: a part errs as its share of the whole does.
    deviation = rounding.deviations(inputs)
    rounding.assert_within(out, want[0], 2**0.5 * deviation.out, "out")
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    rounding.assert_within(lse, want[1], 2**0.5 * deviation.lse, "lse")


@_settings
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    seqlen_q=st.integers(1, 20),
    page_size=st.sampled_from([1, 7, 16, 64]),
    heads=HEADS,
    headdim=HEADDIMS,
    chosen=options(),
    seed=SEEDS,
)
def test_pages_are_a_dense_cache(
    device: str,
    lengths: list[int],
    seqlen_q: int,
    page_size: int,
    heads: tuple[int, int],
    headdim: int,
    chosen: dict[str, Any],
    seed: int,
) -> None:
    """Keys in shuffled pages, among pages of nobody, and the same keys one after another."""
    torch.manual_seed(seed)
    batch, blocks = len(lengths), -(-70 // page_size)
    table = torch.randperm(batch * blocks + 2)[: batch * blocks].view(batch, blocks)
    q = torch.randn(batch, seqlen_q, heads[0], headdim)
    pages = torch.randn(2, batch * blocks + 2, page_size, heads[1], headdim)
    k, v = pages[:, table].flatten(2, 3).to(device)
    own = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=device), **chosen}
    dense = flash_attn.flash_attn_with_kvcache(
        q.to(device), k, v, num_splits=1, return_softmax_lse=True, **own
    )
    paged = flash_attn.flash_attn_with_kvcache(
        q.to(device), *pages.to(device), block_table=table.int().to(device), num_splits=1,
        return_softmax_lse=True, **own,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        keys = (x[row : row + 1, :length] for x in (k, v))
        alone = q[row : row + 1].to(device)
        deviation = rounding.deviations(support.Inputs(alone, *keys, alone, chosen))
        for x, y, name in zip(paged, dense, ("out", "lse"), strict=True):
            both = 2**0.5 * getattr(deviation, name)
            rounding.assert_within(x[row : row + 1], y[row : row + 1], both, name)


@_settings
@given(call=calls(), chosen=options(), order=st.permutations([0, 1, 2]))
def test_batch_permutation(
    device: str, call: dict[str, Any], chosen: dict[str, Any], order: list[int]
) -> None:
    """A sequence's bits do not depend on its place in the batch."""
    call["batch"] = 3
    inputs = support.dense(device, DTYPE, **call, **chosen)
    want = support.run(inputs)
    names = ("q", "k", "v", "dout")
    moved = inputs.but(**{name: getattr(inputs, name)[order] for name in names})
    support.assert_same_bits(support.run(moved), support.Solution(*(x[order] for x in want)))


@_settings
@given(call=calls(), chosen=options(), constant=st.floats(-4.0, 4.0))
def test_constant_added_to_v(
    device: str, call: dict[str, Any], chosen: dict[str, Any], constant: float
) -> None:
    """Weights sum to one: the output moves by the constant where a key is seen."""
    inputs = support.dense(device, DTYPE, **call, **chosen)
    moved = inputs.but(v=inputs.v + constant)
    want, got = support.run(inputs), support.run(moved)
    # That v + constant was rounded counts as one more rounding of each product.
    alive = torch.isfinite(want.lse).transpose(1, 2)[..., None]
    expected = want._replace(out=want.out.double() + constant * alive)
    deviations = [rounding.deviations(x) for x in (inputs, moved)]
    both = support.Solution(*((x**2 + y**2).sqrt() for x, y in zip(*deviations, strict=True)))
    for name in support.Solution._fields:
        rounding.assert_within(
            getattr(got, name), getattr(expected, name), getattr(both, name), name
        )


@pytest.mark.parametrize("dtype", support.DTYPES)
def test_scale_moves_into_q(device: str, dtype: torch.dtype) -> None:
    """A power of two times q is exact in every dtype: the same scores, the same bits of the LSE."""
    inputs = support.dense(device, dtype, seqlens=(40, 50), headdim=16, softmax_scale=0.25)
    moved = inputs.but(q=inputs.q * 2, softmax_scale=0.125)
    assert torch.equal(support.run_forward(inputs)[1], support.run_forward(moved)[1])
