"""The packed functions: sequences of different lengths one after another, and rows beyond them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import support
import torch
from support import DTYPES, HALF_DTYPES
from test_dense import FEATURES

import flash_attn

pytestmark = pytest.mark.families

# Lengths of queries and keys; the first ones are equal, as for self-attention.
BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "equal": ([17, 40, 3], [17, 40, 3]),
    "fewer_keys": ([41, 30], [5, 17]),
    "more_keys": ([1, 20, 7], [33, 61, 7]),
    "empty_first": ([0, 13, 5], [0, 13, 9]),
    "empty_middle": ([13, 0, 0, 5], [13, 0, 0, 9]),
    "empty_last": ([13, 5, 0], [13, 9, 0]),
    "no_queries": ([13, 0, 5], [13, 8, 9]),
    "no_keys": ([13, 6, 5], [13, 0, 9]),
    "one_row_each": ([1] * 9, [1] * 9),
    "one_sequence": ([37], [29]),
}


def _scaled(device: str, batch: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """Several tiles a sequence on the GPU."""
    factor = support.pick(device, 1, 7)
    return tuple([factor * length for length in lengths] for lengths in batch)


@pytest.mark.parametrize("causal", support.some([False, True], [True]))
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_batch(device: str, dtype: torch.dtype, batch: str, causal: bool) -> None:
    lengths_q, lengths_k = _scaled(device, BATCHES[batch])
    inputs = support.varlen(
        device, dtype, lengths_q, lengths_k, heads=(2, 1), headdim=16, causal=causal
    )
    support.run_and_check(inputs)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_varlen(device: str, dtype: torch.dtype, feature: str) -> None:
    lengths_q, lengths_k = _scaled(device, ([29, 0, 41], [44, 3, 23]))
    inputs = support.varlen(
        device, dtype, lengths_q, lengths_k, heads=(1, 1), headdim=24, **FEATURES[feature]
    )
    support.run_and_check(inputs)


@pytest.mark.parametrize("per_batch", support.some([False, True], [True]))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_varlen_alibi(
    device: str, dtype: torch.dtype, causal: bool, per_batch: bool
) -> None:
    lengths_q, lengths_k = _scaled(device, ([29, 0, 11], [44, 3, 23]))
    slopes = support.alibi_slopes(device, 2, 3 if per_batch else None)
    inputs = support.varlen(device, dtype, lengths_q, lengths_k, headdim=32, causal=causal)
    support.run_and_check(inputs.but(alibi_slopes=slopes))


@pytest.mark.parametrize("headdim", [40, 64, 128, 192, 256])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_headdim(device: str, dtype: torch.dtype, headdim: int) -> None:
    lengths_q, lengths_k = _scaled(device, ([29, 1, 33], [44, 3, 33]))
    inputs = support.varlen(
        device, dtype, lengths_q, lengths_k, heads=(4, 2), headdim=headdim, causal=True
    )
    support.run_and_check(inputs)


@pytest.mark.parametrize("family", support.FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_family(device: str, dtype: torch.dtype, family: str) -> None:
    lengths, _ = _scaled(device, ([29, 1, 33], []))
    inputs = support.varlen(device, dtype, lengths, headdim=64, family=family, causal=True)
    support.run_and_check(inputs)


@pytest.mark.parametrize(
    "options", support.some([{}, {"causal": True}, {"window_size": (6, 2)}], [{"causal": True}])
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_padding(device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Rows beyond cu_seqlens[-1] may hold NaN: results are the clean ones, and 0 there."""
    inputs = support.varlen(device, dtype, [13, 0, 21], [13, 5, 30], padding=70, **options)
    beyond_q, beyond_k = slice(34, None), slice(48, None)
    clean, dirty = inputs, inputs
    for name in ("q", "k", "v", "dout"):
        x = getattr(inputs, name)
        rows = beyond_k if name in "kv" else beyond_q
        zeroed = x.clone()
        zeroed[rows] = 0
        clean = clean.but(**{name: zeroed})
        dirty = dirty.but(**{name: support.poison(x, rows, 0)})
    want, got = support.run(clean), support.run(dirty)
    support.assert_same_bits(got, want)
    support.check(clean, got)
    private, _ = support.run_private(dirty)
    support.assert_same_bits(private, want, "through buffers full of NaN")
    for x, rows in ((got.out, beyond_q), (got.dq, beyond_q), (got.dk, beyond_k)):
        assert not x[rows].any()
    assert not got.dv[beyond_k].any()
    assert (got.lse[:, beyond_q] == float("inf")).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_do_not_mix(device: str, dtype: torch.dtype) -> None:
    """NaN in one sequence stays in it."""
    lengths_q, lengths_k = [13, 7, 21], [13, 11, 30]
    inputs = support.varlen(device, dtype, lengths_q, lengths_k, causal=True)
    want = support.run(inputs)
    own_q, own_k = slice(13, 20), slice(13, 24)
    dirty = inputs.but(
        **{name: support.poison(getattr(inputs, name), own_q, 0) for name in ("q", "dout")},
        **{name: support.poison(getattr(inputs, name), own_k, 0) for name in ("k", "v")},
    )
    got = support.run(dirty)
    for name, own in (("out", own_q), ("dq", own_q), ("dk", own_k), ("dv", own_k)):
        for rows in (slice(0, own.start), slice(own.stop, None)):
            assert torch.equal(getattr(got, name)[rows], getattr(want, name)[rows]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_length_bounds_do_not_matter(device: str, dtype: torch.dtype) -> None:
    """Any max_seqlen, on the host or on the device, gives the same bits."""
    inputs = support.varlen(device, dtype, [13, 2, 21], [13, 5, 30], causal=True)
    want = support.run(inputs)
    bounds = inputs.lengths[:2]
    for maxima in ((36, 48), (1000, 4096), (torch.tensor(21, device=device), 30)):
        support.assert_same_bits(support.run(inputs.but(lengths=(*bounds, *maxima))), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sequence_alone_or_in_a_batch(device: str, dtype: torch.dtype) -> None:
    """A sequence's bits do not depend on its neighbours."""
    lengths = [31, 5, 64, 1, 77]
    inputs = support.varlen(device, dtype, lengths, heads=(2, 1), headdim=40, causal=True)
    whole = support.run(inputs)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        alone = support.Inputs(
            *(x[rows] for x in inputs.tensors),
            inputs.options,
            (*(support.cumulative([length], device),) * 2, length, length),
        )
        part = support.Solution(
            whole.out[rows], whole.lse[:, rows], whole.dq[rows], whole.dk[rows], whole.dv[rows]
        )
        support.assert_same_bits(support.run(alone), part, f"for length {length}")


def test_bitwise_repeatable(device: str) -> None:
    lengths, _ = _scaled(device, ([50, 7, 33], []))
    for dtype in HALF_DTYPES:
        inputs = support.varlen(
            device, dtype, lengths, heads=(4, 2), headdim=64, causal=True, deterministic=True
        )
        first = support.run(inputs)
        for repeat in range(support.pick(device, 5, 200)):
            support.assert_same_bits(support.run(inputs), first, f"in repeat {repeat}")


def test_large_batch(device: str) -> None:
    """More sequences than a grid's second and third dimensions can count, some of them empty."""
    for batch in support.pick(device, [301], [65536, 131073]):
        lengths = torch.arange(batch) % 3
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        bounds = bounds.to(torch.int32).to(device)
        q, k, v, dout = torch.randn(4, int(bounds[-1]), 1, 16, device=device).half()
        inputs = support.Inputs(q, k, v, dout, {}, (bounds, bounds, 2, 2))
        got = support.run(inputs)
        # The ends and the middle, re-based, are small problems of their own.
        for first in (0, batch // 2, batch - 40):
            own = bounds[first : first + 41]
            rows = slice(int(own[0]), int(own[-1]))
            part = support.Inputs(
                *(x[rows] for x in inputs.tensors), {}, (own - own[0], own - own[0], 2, 2)
            )
            picked = support.Solution(
                got.out[rows], got.lse[:, rows], got.dq[rows], got.dk[rows], got.dv[rows]
            )
            support.check(part, picked)


# Returns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_returns(device: str, dtype: torch.dtype) -> None:
    inputs = support.varlen(device, dtype, [5, 9], [7, 2], heads=(4, 2), padding=3)
    arguments = (inputs.q, inputs.k, inputs.v, *inputs.lengths)
    alone = flash_attn.flash_attn_varlen_func(*arguments)
    out, lse, s_dmask = flash_attn.flash_attn_varlen_func(*arguments, return_attn_probs=True)
    assert torch.equal(alone, out)
    assert (out.shape, out.dtype, out.device) == (inputs.q.shape, dtype, inputs.q.device)
    assert (lse.shape, lse.dtype) == ((4, 17), torch.float32)
    assert (s_dmask.shape, s_dmask.dtype) == ((0,), dtype)
    assert len(support.run_forward(inputs)) == 4


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """What nothing writes shows: torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (9, 3)}])
@pytest.mark.parametrize("packed", [False, True])
def test_feature_softmax_d(device: str, packed: bool, options: dict[str, Any]) -> None:
    """rowsum(out * dout), each sequence where 128 rows of it would begin, and 0 elsewhere."""
    lengths = [0, 130, 1, 128, 0, 40]
    if packed:
        inputs = support.varlen(device, torch.float32, lengths, padding=3, **options)
        bounds = inputs.lengths[0].tolist()
    else:
        inputs = support.dense(device, torch.float32, seqlens=(130, 150), **options)
        bounds = []
    out, lse, _, rng_state = support.run_forward(inputs)
    # Rows of no sequence may hold anything.
    dout = support.poison(inputs.dout, slice(-3, None), 0) if packed else inputs.dout
    tensors = (dout, inputs.q, inputs.k, inputs.v, out, lse)
    grads = [support.poisoned_like(x) for x in tensors[1:4]]
    function = flash_attn.flash_attn_interface._flash_attn_backward
    if packed:
        function = flash_attn.flash_attn_interface._flash_attn_varlen_backward
    got = function(*tensors, *grads, *inputs.lengths, *inputs.flat_options(), False, rng_state)
    rows = (out.double() * inputs.dout.double()).sum(-1).transpose(-1, -2)
    want = rows.new_zeros((2, 299 + 3 + 6 * 128) if packed else (2, 2, 256))
    for number, start in enumerate(bounds[:-1]):
        first = (start + 128 * number) // 128 * 128
        want[:, first : first + lengths[number]] = rows[:, start : bounds[number + 1]]
    if not packed:
        want[..., :130] = rows
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert not got[want == 0].any()


@pytest.mark.parametrize("causal", support.some([False, True], [True]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_varlen_packed(device: str, dtype: torch.dtype, causal: bool) -> None:
    """qkv and kv in one tensor: the same numbers, and one contiguous gradient, padding included."""
    inputs = support.varlen(device, dtype, [35, 0, 4], padding=6, causal=causal)
    want = support.run(inputs)
    bounds, _, longest, _ = inputs.lengths
    qkv = torch.stack([inputs.q, inputs.k, inputs.v], dim=1).requires_grad_()
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, bounds, longest, causal=causal)
    (dqkv,) = torch.autograd.grad(out, qkv, inputs.dout)
    assert torch.equal(out, want.out)
    assert dqkv.is_contiguous()
    assert torch.equal(dqkv, torch.stack([want.dq, want.dk, want.dv], dim=1))

    q, kv = inputs.q.requires_grad_(), torch.stack([inputs.k, inputs.v], dim=1).requires_grad_()
    out = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *inputs.lengths, causal=causal)
    dq, dkv = torch.autograd.grad(out, (q, kv), inputs.dout)
    assert torch.equal(out, want.out)
    assert dkv.is_contiguous()
    assert torch.equal(dq, want.dq)
    assert torch.equal(dkv, torch.stack([want.dk, want.dv], dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_all_empty(device: str, dtype: torch.dtype) -> None:
    for padding in (0, 3):
        inputs = support.varlen(device, dtype, [0, 0], [0, 0], padding=padding)
        got, _ = support.run_private(inputs)
        support.assert_same_bits(got, support.run(inputs))
        for x in (got.out, got.dq, got.dk, got.dv):
            assert not x.any()
        assert (got.lse == float("inf")).all()
