"""Masks: the statement of them against their definition, and every backend against the mask."""

from __future__ import annotations

from itertools import product

import pytest
import support
import torch
from support import DTYPES

import flash_attn
from flash_attn.core.masking import (
    count_visible,
    visible_keys,
    visible_matrix,
    visible_queries,
)
from flash_attn.core.problem import Visibility

pytestmark = pytest.mark.families

LIMITS = [None, 0, 1, 2, 5, 9]


CHUNKS = [0, 1, 3, 4]


def _defined(
    seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, chunk: int = 0
) -> list[list[bool]]:
    """The definition, pair by pair."""

    def sees(row: int, key: int) -> bool:
        position = row + seqlen_k - seqlen_q
        ahead = key - position
        near = (left is None or -ahead <= left) and (right is None or ahead <= right)
        return near and (chunk == 0 or position // chunk == key // chunk)

    return [[sees(row, key) for key in range(seqlen_k)] for row in range(seqlen_q)]


@pytest.mark.parametrize("seqlen_k", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("seqlen_q", [0, 1, 3, 5, 8])
def test_statements_agree(seqlen_q: int, seqlen_k: int) -> None:
    for left, right, chunk in product(LIMITS, LIMITS, CHUNKS):
        visibility = Visibility(left, right, chunk)
        want = torch.tensor(_defined(seqlen_q, seqlen_k, left, right, chunk), dtype=torch.bool)
        want = want.view(seqlen_q, seqlen_k)
        assert torch.equal(visible_matrix(seqlen_q, seqlen_k, visibility), want)
        assert count_visible(seqlen_q, seqlen_k, visibility) == int(want.sum())
        for row in range(seqlen_q):
            first, end = visible_keys(row, seqlen_q, seqlen_k, visibility)
            assert list(range(first, end)) == want[row].nonzero().flatten().tolist()
        for key in range(seqlen_k):
            first, end = visible_queries(key, seqlen_q, seqlen_k, visibility)
            assert list(range(first, end)) == want[:, key].nonzero().flatten().tolist()


def test_known_patterns() -> None:
    """Masks are aligned at the ends of the sequences."""
    causal = Visibility.from_window(-1, -1, causal=True)
    assert visible_matrix(2, 5, causal).tolist() == [[True] * 4 + [False], [True] * 5]
    rows = visible_matrix(5, 2, causal).tolist()
    assert rows == [[False, False]] * 3 + [[True, False], [True, True]]


def test_from_window() -> None:
    assert Visibility.from_window(-1, -1, False) == (None, None, 0)
    assert Visibility.from_window(-7, 3, False) == (None, 3, 0)
    assert Visibility.from_window(4, 9, True, 5) == (4, 0, 5)
    assert Visibility.from_window(-1, 9, True) == Visibility.from_window(-1, 0, False)


def _uniform(
    device: str, seqlens: tuple[int, int], headdim: int, dtype: torch.dtype
) -> support.Inputs:
    """Equal scores, one-hot values and output gradients: results show the mask cell by cell."""
    seqlen_q, seqlen_k = seqlens
    inputs = support.dense(device, dtype, 1, seqlens, (1, 1), headdim)
    values = torch.eye(seqlen_k, headdim, device=device, dtype=dtype)[None, :, None]
    dout = torch.eye(seqlen_q, headdim, device=device, dtype=dtype)[None, :, None]
    return inputs.but(k=torch.zeros_like(inputs.k), v=values, dout=dout)


def _check_pattern(inputs: support.Inputs, window: tuple[int, int], backward: bool) -> None:
    seqlen_q, seqlen_k = inputs.q.shape[1], inputs.k.shape[1]
    left, right = (None if size < 0 else size for size in window)
    seen = torch.tensor(_defined(seqlen_q, seqlen_k, left, right)).to(inputs.q.device)
    count = seen.sum(-1)
    inputs = inputs.but(window_size=window)
    got = support.run(inputs) if backward else None
    out, lse = support.run_forward(inputs)[:2] if got is None else (got.out, got.lse)
    assert torch.equal(out[0, :, 0, :seqlen_k] > 0, seen), window
    support.check_lse(lse[0, 0], torch.where(count > 0, count.double().log(), torch.inf))
    if got is not None:
        assert torch.equal(got.dv[0, :, 0, :seqlen_q] > 0, seen.T), window


@pytest.mark.parametrize("seqlens", [(19, 33), (33, 19), (40, 40)])
def test_every_window(device: str, seqlens: tuple[int, int]) -> None:
    """All one- and two-sided windows of up to 40 keys, forward."""
    inputs = _uniform(device, seqlens, 40, torch.float32)
    step = support.pick(device, 3, 1)
    for left in range(-1, 41):
        # All of them on the GPU; on the CPU each left one with every third right one in turn.
        for right in (-1, *range(left % step, 41, step)):
            _check_pattern(inputs, (left, right), backward=False)


@pytest.mark.parametrize("seqlens", [(19, 33), (33, 19), (40, 40)])
def test_windows_backward(device: str, seqlens: tuple[int, int]) -> None:
    inputs = _uniform(device, seqlens, 40, torch.float16)
    for left, right in product((-1, 0, 1, 7, 16, 31, 40), (-1, 0, 2, 15, 32, 39)):
        _check_pattern(inputs, (left, right), backward=True)


@pytest.mark.parametrize("seqlens", [(40, 64), (64, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_windows(device: str, dtype: torch.dtype, seqlens: tuple[int, int]) -> None:
    """Windows whose edges fall at, before and behind the edges of tiles."""
    inputs = _uniform(device, seqlens, 64, dtype)
    windows = [(31, -1), (-1, 31), (32, 0), (0, 33), (15, 16), (63, 63), (3, 40)]
    for window in support.some(windows, [(31, -1), (0, 33)]):
        _check_pattern(inputs, window, backward=True)


@pytest.mark.parametrize("window", [(64, -1), (65, 1), (127, 0), (0, 128), (200, 63), (511, 511)])
@pytest.mark.parametrize("seqlens", [(300, 511), (511, 300), (512, 512)])
def test_windows_of_tiles(device: str, seqlens: tuple[int, int], window: tuple[int, int]) -> None:
    if device == "cpu":
        seqlens = (seqlens[0] // 4, seqlens[1] // 4)
        window = tuple(-1 if size < 0 else size // 4 for size in window)
    inputs = support.dense(device, torch.float16, 1, seqlens, (2, 1), 64, window_size=window)
    support.run_and_check(inputs)


def test_windows_as_tensors_and_beyond_the_sequence(device: str) -> None:
    inputs = support.dense(device, torch.float16, seqlens=(20, 30))
    want = support.run(inputs.but(window_size=(6, 3)))
    given = inputs.but(window_size=torch.tensor([6, 3]))
    out = flash_attn.flash_attn_func(given.q, given.k, given.v, **given.options)
    assert torch.equal(out, want.out)
    full = support.run(inputs)
    for window in ((30, 30), (2**31 - 1, 2**31 - 1), (2**20, -1), (-5, -9)):
        got = support.run(inputs.but(window_size=window))
        for name in support.Solution._fields:
            a, b = getattr(got, name), getattr(full, name)
            support.assert_close(a, b, torch.float16, f"{name}, {window}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_unseen_keys_may_be_nan(device: str, dtype: torch.dtype) -> None:
    """Keys outside of every window: results equal those with zeros there, bit for bit."""
    for seqlens, options in (
        ((8, 64), {"window_size": (5, 0)}),
        ((33, 80), {"window_size": (3, 3)}),
        ((40, 75), {"causal": True, "window_size": (1, -1), "softcap": 3.0}),
    ):
        inputs = support.dense(device, dtype, 2, seqlens, (2, 1), 16, **options)
        unseen = slice(0, seqlens[1] - seqlens[0] - options["window_size"][0])
        clean, dirty = inputs, inputs
        for name in ("k", "v"):
            zeroed = getattr(inputs, name).clone()
            zeroed[:, unseen] = 0
            clean = clean.but(**{name: zeroed})
            dirty = dirty.but(**{name: support.poison(zeroed, unseen, 1)})
        want, got = support.run(clean), support.run(dirty)
        support.assert_same_bits(got, want, str(options))
        assert not got.dk[:, unseen].any()
        assert not got.dv[:, unseen].any()
