"""``flash_attn_with_kvcache`` against a dense float64 reference that is written here.

The reference shares no code with the package: lengths, positions, masks, rotation and the rows that
appending writes are spelled out once more, sequence by sequence.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn import flash_attn_with_kvcache
from flash_attn.errors import ConstraintError
from flash_attn.flash_attn_interface import flash_attn_gpu

Call = dict[str, Any]
HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {HALF: 2e-3, BF16: 1.6e-2, SINGLE: 1e-5, torch.float64: 1e-12}
LSE_TOLERANCE = 1e-5
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bit patterns, so that NaN equals itself and -0.0 differs from 0.0."""
    return x.detach().cpu().contiguous().view(_INTEGER[x.element_size()])


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence in float64: q (seqlen_q, nheads, d), k and v (seqlen_k, nheads_k, d).

    Returns (seqlen_q, nheads, d) and the log-sum-exp (nheads, seqlen_q).
    """
    (seqlen_q, nheads, headdim), seqlen_k = q.shape, k.shape[0]
    owner = torch.arange(nheads) // (nheads // k.shape[1])
    q, k, v = q.double(), k.double()[:, owner], v.double()[:, owner]
    s = torch.einsum("ihd,jhd->hij", q, k) * (softmax_scale or headdim**-0.5)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    gap = torch.arange(seqlen_k) - (torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q)
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * gap.abs()
    left, right = window_size[0], 0 if causal else window_size[1]
    seen = torch.ones_like(gap, dtype=torch.bool)
    if left >= 0:
        seen &= gap >= -left
    if right >= 0:
        seen &= gap <= right
    out = torch.zeros_like(q)
    lse = torch.full((nheads, seqlen_q), float("inf"), dtype=torch.float64)
    for i in range(seqlen_q):
        if seen[i].any():
            row = s[:, i, seen[i]]
            lse[:, i] = torch.logsumexp(row, -1)
            out[i] = torch.einsum("hj,jhd->hd", torch.softmax(row, -1), v[seen[i]])
    return out, lse


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (rows, heads, d) turned at ``positions`` (rows,), in float64, then rounded to x's dtype."""
    half = cos.shape[1]
    first = torch.arange(half) * 2 if interleaved else torch.arange(half)
    second = first + (1 if interleaved else half)
    y = x.double().clone()
    c, s = (table.double()[positions.clamp(0, len(table) - 1)][:, None] for table in (cos, sin))
    a, b = y[..., first].clone(), y[..., second].clone()
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y.to(x.dtype)


def lengths_of(call: Call) -> list[int]:
    """The ends of the sequences before appending."""
    given, table, k_cache = call.get("cache_seqlens"), call.get("block_table"), call["k_cache"]
    if given is None:
        blocks = 1 if table is None else table.shape[1]
        return [k_cache.shape[1] * blocks] * len(call["q"])
    return [given] * len(call["q"]) if isinstance(given, int) else given.tolist()


def place(call: Call, b: int, index: int) -> tuple[int, int] | None:
    """Where key ``index`` of sequence ``b`` lies in the cache; None if there is no such place."""
    table, k_cache = call.get("block_table"), call["k_cache"]
    if table is not None:
        page_size = k_cache.shape[1]
        if not 0 <= index < table.shape[1] * page_size:
            return None
        page = int(table[b, index // page_size])
        return (page, index % page_size) if 0 <= page < len(k_cache) else None
    rows = call.get("cache_batch_idx")
    row = b if rows is None else int(rows[b])
    return (row, index) if 0 <= row < len(k_cache) and 0 <= index < k_cache.shape[1] else None


def expected_caches(call: Call) -> tuple[Tensor, Tensor]:
    """Copies of the caches with the new rows written; rows that have no place are dropped."""
    k_cache, v_cache = call["k_cache"].clone(), call["v_cache"].clone()
    k, v, cos = call.get("k"), call.get("v"), call.get("rotary_cos")
    if k is None:
        return k_cache, v_cache
    for b, length in enumerate(lengths_of(call)):
        k_rows = k[b]
        if cos is not None:
            positions = length + torch.arange(k.shape[1])
            interleaved = call.get("rotary_interleaved", True)
            k_rows = rotated(k[b], cos, call["rotary_sin"], positions, interleaved)
        for t in range(k.shape[1]):
            where = place(call, b, length + t)
            if where is not None:
                k_cache[where], v_cache[where] = k_rows[t], v[b, t]
    return k_cache, v_cache


def expected(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, k_cache, v_cache) after the call; ``call`` holds valid CPU tensors."""
    q, k, cos, pads = call["q"], call.get("k"), call.get("rotary_cos"), call.get("cache_leftpad")
    causal, window = call.get("causal", False), call.get("window_size", (-1, -1))
    k_cache, v_cache = expected_caches(call)
    slopes = call.get("alibi_slopes")
    outs, lses = [], []
    for b, length in enumerate(lengths_of(call)):
        rows = q[b]
        if cos is not None:
            steps = torch.arange(q.shape[1]) * int(causal or tuple(window) != (-1, -1))
            rows = rotated(
                rows, cos, call["rotary_sin"], length + steps, call.get("rotary_interleaved", True)
            )
        first = 0 if pads is None else int(pads[b])
        end = length + (0 if k is None else k.shape[1])
        places = [place(call, b, index) for index in range(first, end)]
        keys, values = (
            torch.stack([cache[where] for where in places]) if places else cache[0, :0]
            for cache in (k_cache, v_cache)
        )
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        softcap, scale = call.get("softcap", 0.0), call.get("softmax_scale")
        out, lse = reference_attention(rows, keys, values, causal, window, softcap, own, scale)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses), k_cache, v_cache


def make_call(
    dtype: torch.dtype = HALF,
    batch_size: int = 3,
    seqlen_q: int = 2,
    capacity: int = 41,
    nheads: int = 4,
    nheads_k: int = 2,
    headdim: int = 32,
    seqlen_new: int | None = None,
    lengths: list[int] | None = None,
    page_size: int | None = None,
    cache_rows: int | None = None,
    rotary_dim: int = 0,
    **more: Any,
) -> Call:
    """Arguments on the CPU; pages are shuffled and some belong to nobody."""
    shape: tuple[int, ...] = (cache_rows or batch_size, capacity)
    call: Call = {}
    if page_size is not None:
        blocks = -(-capacity // page_size)
        shape = (batch_size * blocks + 3, page_size)
        order = torch.randperm(shape[0])[: batch_size * blocks]
        call["block_table"] = order.view(batch_size, blocks).int()
        capacity = blocks * page_size
    call["q"] = torch.randn(batch_size, seqlen_q, nheads, headdim).to(dtype)
    for name in ("k_cache", "v_cache"):
        call[name] = torch.randn(*shape, nheads_k, headdim).to(dtype)
    if seqlen_new is not None:
        for name in ("k", "v"):
            call[name] = torch.randn(batch_size, seqlen_new, nheads_k, headdim).to(dtype)
    if rotary_dim:
        angle = torch.rand(capacity + 5, rotary_dim // 2) * 6.3
        call["rotary_cos"], call["rotary_sin"] = angle.cos().to(dtype), angle.sin().to(dtype)
    if lengths is not None:
        call["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    return call | more


def on_device(call: Call, device: str) -> Call:
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in call.items()}


def assert_rounded_equal(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Equal up to rounding; infinities must agree."""
    torch.testing.assert_close(
        got.double().cpu(), want.double().cpu(), atol=tolerance, rtol=tolerance
    )


def check_caches(call: Call, moved: Call, k_cache: Tensor, v_cache: Tensor) -> None:
    """V and unrotated K bit by bit, rotated K up to one rounding, and nothing else written."""
    assert torch.equal(bits(moved["v_cache"]), bits(v_cache))
    if "rotary_cos" not in call:
        assert torch.equal(bits(moved["k_cache"]), bits(k_cache))
        return
    touched = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
    for b, length in enumerate(lengths_of(call)):
        for t in range(call["k"].shape[1]):
            where = place(call, b, length + t)
            if where is not None:
                touched[where] = True
    got = moved["k_cache"].cpu()
    assert torch.equal(bits(got[~touched]), bits(call["k_cache"][~touched]))
    close = max(torch.finfo(got.dtype).eps, 1e-6)
    torch.testing.assert_close(got[touched], k_cache[touched], atol=close, rtol=close)
    rotary_dim = 2 * call["rotary_cos"].shape[1]
    assert torch.equal(bits(got[..., rotary_dim:]), bits(k_cache[..., rotary_dim:]))


def check(call: Call, device: str) -> tuple[Tensor, Tensor]:
    """Run the call and hold everything it yields, and all that it wrote, against the reference."""
    want_out, want_lse, k_cache, v_cache = expected(call)
    moved = on_device(call, device)
    before = {key: x.clone() for key, x in moved.items() if isinstance(x, Tensor)}
    out, lse = flash_attn_with_kvcache(**moved, return_softmax_lse=True)
    dtype = call["q"].dtype
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.shape == call["q"].shape
    batch_size, seqlen_q, nheads, _ = call["q"].shape
    assert lse.shape == (batch_size, nheads, seqlen_q)
    assert_rounded_equal(out, want_out, TOLERANCE[dtype])
    # Rotation rounds q and k to their dtype, where a last bit may differ.
    rounds = "rotary_cos" in call and dtype != torch.float64
    assert_rounded_equal(lse, want_lse, TOLERANCE[dtype] if rounds else LSE_TOLERANCE)
    check_caches(call, moved, k_cache, v_cache)
    for key, x in before.items():
        if key not in ("k_cache", "v_cache"):
            assert torch.equal(moved[key], x), f"{key} was changed"
    return out, lse


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("given", ["none", "int", "tensor"])
def test_cache_seqlens(device: str, dtype: torch.dtype, seqlen_q: int, given: str) -> None:
    cache_seqlens = {"none": None, "int": 17, "tensor": torch.tensor([41, 1, 16]).int()}[given]
    check(make_call(dtype, seqlen_q=seqlen_q, cache_seqlens=cache_seqlens), device)


def test_an_integer_length_holds_for_each_query_row(device: str) -> None:
    rows = torch.tensor([4, 1], dtype=torch.int32)
    check(make_call(batch_size=2, cache_rows=5, cache_batch_idx=rows, cache_seqlens=9), device)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_new"), [(1, 1), (3, 3), (1, 4), (4, 1), (2, 19)])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
def test_append(
    device: str, dtype: torch.dtype, seqlen_q: int, seqlen_new: int, causal: bool
) -> None:
    call = make_call(
        dtype, seqlen_q=seqlen_q, seqlen_new=seqlen_new, lengths=[0, 7, 22], causal=causal
    )
    check(call, device)


@pytest.mark.parametrize("cache_seqlens", [0, 40])
def test_append_with_an_integer_length(device: str, cache_seqlens: int) -> None:
    """The last case fills the cache to its last row."""
    check(make_call(seqlen_new=1, cache_seqlens=cache_seqlens, causal=True), device)


def test_append_nothing(device: str) -> None:
    check(make_call(SINGLE, seqlen_new=0, lengths=[5, 0, 41]), device)
    check(make_call(SINGLE, seqlen_new=0, lengths=[5, 0, 40], rotary_dim=16, causal=True), device)


def test_append_takes_strided_rows(device: str) -> None:
    """New rows from a packed projection, and with a last stride other than 1."""
    call = make_call(SINGLE, seqlen_new=3, lengths=[0, 7, 22])
    want = expected(call)
    packed = torch.stack([call["k"], call["v"]], dim=2).to(device)
    moved = on_device(call, device) | {"k": packed[:, :, 0], "v": packed[:, :, 1]}
    assert_rounded_equal(flash_attn_with_kvcache(**moved), want[0], TOLERANCE[SINGLE])
    check_caches(call, moved, *want[2:])
    moved = on_device(call, device)
    for name in ("q", "k", "v"):
        moved[name] = moved[name].mT.contiguous().mT
    assert_rounded_equal(flash_attn_with_kvcache(**moved), want[0], TOLERANCE[SINGLE])
    check_caches(call, moved, *want[2:])


MASKS: dict[str, Call] = {
    "full": {},
    "causal": {"causal": True},
    "local": {"window_size": (6, 3)},
    "left": {"window_size": (5, -1)},
    "right": {"window_size": (-1, 2)},
    "causal-left": {"window_size": (4, 7), "causal": True},
}


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
def test_rotary(device: str, dtype: torch.dtype, interleaved: bool, mask: str) -> None:
    call = make_call(
        dtype, seqlen_q=3, seqlen_new=4, lengths=[0, 7, 22], rotary_dim=32,
        rotary_interleaved=interleaved, **MASKS[mask],
    )  # fmt: skip
    check(call, device)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("headdim", "rotary_dim"), [(32, 16), (59, 48), (64, 64), (128, 32)])
def test_rotary_of_a_part(device: str, headdim: int, rotary_dim: int, interleaved: bool) -> None:
    call = make_call(
        headdim=headdim, seqlen_new=2, lengths=[3, 39, 0], rotary_dim=rotary_dim, causal=True,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    check(call, device)


@pytest.mark.parametrize("causal", [False, True])
def test_rotary_of_strided_queries(device: str, causal: bool) -> None:
    call = make_call(
        SINGLE, seqlen_q=3, seqlen_new=2, lengths=[3, 20, 0], rotary_dim=16, causal=causal
    )
    want = expected(call)
    layouts = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x], dim=3)[..., 1, :],
        lambda x: x.mT.contiguous().mT,
    )
    for layout in layouts:
        moved = on_device(call, device)
        moved["q"] = layout(moved["q"])
        assert_rounded_equal(flash_attn_with_kvcache(**moved), want[0], TOLERANCE[SINGLE])


def test_rotary_positions_include_the_left_padding(device: str) -> None:
    pads = torch.tensor([2, 0, 9], dtype=torch.int32)
    call = make_call(
        SINGLE, seqlen_q=3, seqlen_new=3, lengths=[2, 8, 30], rotary_dim=16, causal=True,
        cache_leftpad=pads,
    )  # fmt: skip
    check(call, device)


@pytest.mark.parametrize("seqlen_new", [None, 2])
def test_cache_batch_idx(device: str, seqlen_new: int | None) -> None:
    rows = torch.tensor([6, 0, 3], dtype=torch.int32)
    call = make_call(cache_rows=7, cache_batch_idx=rows, lengths=[5, 39, 0], seqlen_new=seqlen_new)
    check(call, device)


def test_cache_batch_idx_may_repeat_rows(device: str) -> None:
    rows = torch.tensor([1, 1, 0], dtype=torch.int32)
    check(make_call(cache_rows=2, cache_batch_idx=rows, lengths=[5, 41, 12]), device)


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("seqlen_new", [None, 3])
def test_cache_leftpad(device: str, seqlen_new: int | None, mask: str) -> None:
    """Masks and ALiBi count from the first key in use; one sequence has no key at all."""
    pads = torch.tensor([4, 0, 17], dtype=torch.int32)
    call = make_call(
        SINGLE, seqlen_q=3, lengths=[4, 30, 33], seqlen_new=seqlen_new, cache_leftpad=pads,
        alibi_slopes=torch.rand(4), **MASKS[mask],
    )  # fmt: skip
    check(call, device)


def test_cache_leftpad_without_lengths(device: str) -> None:
    check(make_call(cache_leftpad=torch.tensor([4, 0, 40], dtype=torch.int32)), device)


def test_leftpad_with_batch_idx(device: str) -> None:
    pads, rows = torch.tensor([4, 0, 17]).int(), torch.tensor([3, 1, 0]).int()
    call = make_call(
        cache_rows=4, cache_batch_idx=rows, cache_leftpad=pads, lengths=[9, 3, 38], seqlen_new=2
    )
    check(call, device)


@pytest.mark.parametrize("seqlen_q", [1, 7])
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_masks(device: str, dtype: torch.dtype, mask: str, seqlen_q: int) -> None:
    """Lengths below seqlen_q leave rows without keys: 0 and +inf."""
    call = make_call(
        dtype, seqlen_q=seqlen_q, capacity=80, lengths=[0, 4, 75], headdim=64, **MASKS[mask]
    )
    check(call, device)


def test_rows_without_keys(device: str) -> None:
    call = make_call(SINGLE, batch_size=2, seqlen_q=5, lengths=[2, 0], causal=True)
    out, lse = check(call, device)
    assert torch.equal(out[0, :3].cpu(), torch.zeros_like(call["q"][0, :3]))
    assert bool((lse[0, :, :3] == float("inf")).all())
    assert bool(lse[0, :, 3:].isfinite().all())
    assert bool((lse[1] == float("inf")).all())
    assert not out[1].any()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("slopes", ["none", "heads", "batch"])
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_softcap_and_alibi(device: str, softcap: float, slopes: str, seqlen_q: int) -> None:
    chosen = {"none": None, "heads": torch.rand(4), "batch": torch.rand(3, 4)}[slopes]
    call = make_call(
        SINGLE, seqlen_q=seqlen_q, lengths=[3, 40, 0], seqlen_new=1, causal=True, softcap=softcap,
        alibi_slopes=chosen, softmax_scale=0.7,
    )  # fmt: skip
    check(call, device)


@pytest.mark.parametrize(("nheads", "nheads_k"), [(1, 1), (6, 6), (6, 2), (5, 1), (16, 2)])
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_heads(device: str, nheads: int, nheads_k: int, seqlen_q: int) -> None:
    call = make_call(
        seqlen_q=seqlen_q, nheads=nheads, nheads_k=nheads_k, seqlen_new=1, lengths=[3, 40, 0]
    )
    check(call, device)


@pytest.mark.parametrize("headdim", [32, 59, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
def test_head_dims(device: str, dtype: torch.dtype, headdim: int) -> None:
    call = make_call(dtype, headdim=headdim, seqlen_new=3, lengths=[3, 38, 0], causal=True)
    check(call, device)


SPLITS = [0, 1, 3, 7, 128]


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("mask", ["full", "causal", "local"])
@pytest.mark.parametrize("seqlen_q", [1, 6])
def test_num_splits(device: str, seqlen_q: int, mask: str, page_size: int | None) -> None:
    """Long, short and empty sequences; each number of splits repeats bit by bit."""
    shared = make_call(
        seqlen_q=seqlen_q, capacity=700, lengths=[690, 3, 0], headdim=64, page_size=page_size,
        **MASKS[mask],
    )  # fmt: skip
    for num_splits in SPLITS:
        call = shared | {"num_splits": num_splits}
        first, again = check(call, device), check(call, device)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("num_splits", SPLITS)
def test_num_splits_with_everything(device: str, num_splits: int) -> None:
    call = make_call(
        SINGLE, seqlen_q=3, capacity=300, lengths=[290, 40, 9], seqlen_new=5, rotary_dim=16,
        num_splits=num_splits, causal=True, window_size=(100, 0), softcap=8.0,
        alibi_slopes=torch.rand(3, 4) / 10, cache_leftpad=torch.tensor([31, 0, 9]).int(),
    )  # fmt: skip
    check(call, device)


def test_return_softmax_lse_changes_only_what_is_returned(device: str) -> None:
    call = on_device(make_call(SINGLE, lengths=[3, 9, 20]), device)
    out = flash_attn_with_kvcache(**call)
    assert isinstance(out, Tensor)
    both = flash_attn_with_kvcache(**call, return_softmax_lse=True)
    assert isinstance(both, tuple)
    assert len(both) == 2
    assert torch.equal(bits(out), bits(both[0]))


LAYOUTS = {
    "bhsd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sbhd": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "longer": lambda x: torch.cat([x, torch.full_like(x, 7.0)], dim=1)[:, : x.shape[1]],
    "headdim-slice": lambda x: torch.cat([torch.full_like(x, 7.0), x], dim=3)[..., x.shape[3] :],
    "every-other-head": lambda x: torch.stack([x, torch.full_like(x, 7.0)], 3)[..., 0, :],
}


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_cache_strides(device: str, layout: str, page_size: int | None) -> None:
    """Caches are written through their strides; what lies between their rows stays."""
    call = make_call(seqlen_new=3, lengths=[3, 38, 0], page_size=page_size, rotary_dim=16)
    want = expected(call)
    moved = on_device(call, device)
    for name, other in (("k_cache", layout), ("v_cache", "bhsd")):
        moved[name] = LAYOUTS[other](moved[name])
    k_cache = moved["k_cache"]
    whole = torch.as_strided(k_cache, (k_cache.untyped_storage().nbytes() // 2,), (1,), 0)
    own = torch.zeros_like(whole, dtype=torch.bool)
    own.as_strided(k_cache.shape, k_cache.stride(), k_cache.storage_offset()).fill_(True)
    between = whole[~own].clone()
    out, lse = flash_attn_with_kvcache(**moved, return_softmax_lse=True)
    assert_rounded_equal(out, want[0], TOLERANCE[HALF])
    assert_rounded_equal(lse, want[1], TOLERANCE[HALF])
    check_caches(call, moved, *want[2:])
    assert torch.equal(bits(whole[~own]), bits(between))


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_last_stride_of_the_cache(device: str, name: str) -> None:
    """A copy would lose what is appended, so it is refused, as an AssertionError."""
    call = on_device(make_call(lengths=[1, 2, 3]), device)
    call[name] = call[name].mT.contiguous().mT
    with pytest.raises(AssertionError, match=f"`{name}` must have a contiguous last dimension"):
        flash_attn_with_kvcache(**call)


@pytest.mark.parametrize("given", [None, 0])
def test_empty_cache(device: str, given: int | None) -> None:
    out, lse = check(make_call(seqlen_q=3, capacity=0, cache_seqlens=given), device)
    assert not out.any()
    assert bool((lse == float("inf")).all())


def test_empty_batch(device: str) -> None:
    call = on_device(make_call(batch_size=1, seqlen_new=2, lengths=[3], rotary_dim=16), device)
    for name in ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens"):
        call[name] = call[name][:0]
    out, lse = flash_attn_with_kvcache(**call, return_softmax_lse=True)
    assert out.shape == (0, 2, 4, 32)
    assert lse.shape == (0, 4, 2)


def test_no_queries(device: str) -> None:
    """Without queries the new rows are written all the same."""
    call = make_call(seqlen_q=1, seqlen_new=2, lengths=[3, 9, 20], rotary_dim=16)
    k_cache, v_cache = expected_caches(call)
    moved = on_device(call, device)
    moved["q"] = moved["q"][:, :0]
    out, lse = flash_attn_with_kvcache(**moved, return_softmax_lse=True)
    assert out.shape == (3, 0, 4, 32)
    assert lse.shape == (3, 4, 0)
    check_caches(call, moved, k_cache, v_cache)


def test_no_gradient_is_recorded(device: str) -> None:
    call = on_device(make_call(SINGLE, seqlen_new=2, lengths=[3, 9, 20]), device)
    call["q"].requires_grad_()
    assert not flash_attn_with_kvcache(**call).requires_grad


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize("num_splits", [1, 5])
@pytest.mark.parametrize("seqlen_new", [None, 3])
def test_poison(device: str, dtype: torch.dtype, num_splits: int, seqlen_new: int | None) -> None:
    """NaN and infinity outside the keys in use reach no bit of a result."""
    pads = torch.tensor([0, 5, 17], dtype=torch.int32)
    call = make_call(
        dtype, seqlen_q=3, capacity=150, lengths=[4, 33, 130], cache_leftpad=pads, headdim=64,
        seqlen_new=seqlen_new, num_splits=num_splits, causal=True,
    )  # fmt: skip
    clean, dirty = on_device(call, device), on_device(call, device)
    for name, poison in (("k_cache", float("nan")), ("v_cache", float("inf"))):
        dirty[name] = clean[name].clone()
        for b, (pad, length) in enumerate(zip(pads.tolist(), [4, 33, 130], strict=True)):
            dirty[name][b, :pad] = poison
            dirty[name][b, length:] = poison
    results = [flash_attn_with_kvcache(**x, return_softmax_lse=True) for x in (clean, dirty)]
    assert not results[0][0].isnan().any()
    for want, got in zip(*results, strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("num_splits", [1, 5])
def test_poison_before_the_window(device: str, num_splits: int) -> None:
    """Keys that lie before the windows of all queries, as a rolling cache leaves them."""
    call = make_call(
        SINGLE, seqlen_q=2, capacity=150, lengths=[120, 20, 150], headdim=64,
        num_splits=num_splits, window_size=(9, 0),
    )  # fmt: skip
    clean, dirty = on_device(call, device), on_device(call, device)
    for name in ("k_cache", "v_cache"):
        dirty[name] = clean[name].clone()
        for b, length in enumerate([120, 20, 150]):
            dirty[name][b, : length - 11] = float("nan")
    results = [flash_attn_with_kvcache(**x, return_softmax_lse=True) for x in (clean, dirty)]
    for want, got in zip(*results, strict=True):
        assert torch.equal(bits(got), bits(want))


def test_batch_invariance(device: str) -> None:
    """A sequence alone gives the bits that it gives among others."""
    call = on_device(make_call(capacity=200, lengths=[190, 3, 77], num_splits=1), device)
    out, lse = flash_attn_with_kvcache(**call, return_softmax_lse=True)
    for b in range(3):
        own = {key: x[b : b + 1] if isinstance(x, Tensor) else x for key, x in call.items()}
        alone = flash_attn_with_kvcache(**own, return_softmax_lse=True)
        assert torch.equal(bits(alone[0]), bits(out[b : b + 1]))
        assert torch.equal(bits(alone[1]), bits(lse[b : b + 1]))


def test_decoding_step_by_step_equals_one_causal_pass(device: str) -> None:
    """Twelve steps of one token give what twelve tokens give at once."""
    whole = make_call(
        SINGLE, seqlen_q=12, capacity=20, seqlen_new=12, lengths=[0, 0, 0], rotary_dim=16,
        causal=True,
    )  # fmt: skip
    moved = on_device(whole, device)
    want = flash_attn_with_kvcache(**(moved | {"k_cache": moved["k_cache"].clone(),
                                               "v_cache": moved["v_cache"].clone()}))  # fmt: skip
    for t in range(12):
        step = moved | {name: moved[name][:, t : t + 1] for name in ("q", "k", "v")}
        step["cache_seqlens"] = moved["cache_seqlens"] + t
        got = flash_attn_with_kvcache(**step)
        assert_rounded_equal(got, want[:, t : t + 1], TOLERANCE[SINGLE])


def test_raw_function_writes_into_out(device: str) -> None:
    call = make_call(SINGLE, seqlen_q=3, seqlen_new=2, lengths=[3, 9, 20], causal=True)
    want = expected(call)
    moved = on_device(call, device)
    out = torch.full_like(moved["q"], float("nan"))
    result = flash_attn_gpu.fwd_kvcache(
        moved["q"], moved["k_cache"], moved["v_cache"], moved["k"], moved["v"],
        moved["cache_seqlens"], None, None, None, None, None, None, out, 32**-0.5, True, -1, -1,
        0.0, True, 0,
    )  # fmt: skip
    assert len(result) == 2
    assert result[0].data_ptr() == out.data_ptr()
    assert_rounded_equal(out, want[0], TOLERANCE[SINGLE])
    assert_rounded_equal(result[1], want[1], LSE_TOLERANCE)
    check_caches(call, moved, *want[2:])


def test_signature() -> None:
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    assert list(parameters) == [
        "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens",
        "cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale", "causal",
        "window_size", "softcap", "rotary_interleaved", "alibi_slopes", "num_splits",
        "return_softmax_lse", "s_aux", "attn_mask",
    ]  # fmt: skip


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _fresh(**options: Any) -> Call:
    return make_call(**({"lengths": [3, 9, 20]} | options))


def wrong_calls() -> dict[str, tuple[Call, str]]:
    """Name -> (a call that must fail, what its message must contain)."""
    good, new = _fresh(), _fresh(seqlen_new=2, rotary_dim=16)
    paged = _fresh(page_size=16)
    without_table = {key: x for key, x in new.items() if key != "rotary_sin"}
    no_append = {key: x for key, x in new.items() if key not in ("k", "v")}
    wide = torch.ones(50, 24, dtype=HALF)
    return {
        "int64 lengths": (good | {"cache_seqlens": torch.tensor([3, 9, 20])}, "`cache_seqlens`"),
        "two lengths": (good | {"cache_seqlens": _int32(3, 9)}, "`cache_seqlens` must have shape"),
        "float length": (good | {"cache_seqlens": 3.5}, "`cache_seqlens`"),
        "no q": (good | {"q": None}, "`q` must be a torch.Tensor"),
        "q of 3 dims": (good | {"q": good["q"][0]}, "`q` must have shape"),
        "k_cache of 3 dims": (good | {"k_cache": good["k_cache"][0]}, "`k_cache` must have shape"),
        "v_cache of 3 dims": (good | {"v_cache": good["v_cache"][0]}, "`v_cache` must have shape"),
        "integer dtype": (
            good | {x: good[x].int() for x in ("q", "k_cache", "v_cache")},
            "FlashAttention only support fp16 and bf16 data type",
        ),
        "mixed dtypes": (good | {"q": good["q"].float()}, "must have the same dtype"),
        "head dim 264": (_fresh(headdim=264), "only supports head dimension at most 256"),
        "heads": (
            _fresh(nheads=5),
            "Number of heads in key/value must divide number of heads in query",
        ),
        "long q": (_fresh(seqlen_q=42), "must have seqlen <= the seqlen of the KV cache"),
        "long k": (
            _fresh(seqlen_new=42, seqlen_q=1), "must have seqlen <= the seqlen of the KV cache"
        ),
        "batch size": (good | {"q": good["q"][:2], "cache_seqlens": _int32(3, 9)}, "batch size"),
        "k without v": (
            {key: x for key, x in new.items() if key != "v"},
            "If key is supplied, value must also be passed in",
        ),
        "v without k": (
            {key: x for key, x in _fresh(seqlen_new=2).items() if key != "k"}, "`v`"
        ),
        "k without lengths": (
            {key: x for key, x in new.items() if key != "cache_seqlens"},
            "seqlens_k must also be passed in",
        ),
        "k and v lengths": (new | {"v": new["v"][:, :1]}, "`v` must have seqlen 2"),
        "k heads": (new | {"k": new["k"][:, :, :1]}, "`k` must have shape"),
        "k dtype": (new | {"k": new["k"].float()}, "must have the same dtype"),
        "v of 3 dims": (new | {"v": new["v"][0]}, "`v` must have shape"),
        "rotary without k": (
            no_append, "If rotary cos/sin are provided, new key / value to be appended"
        ),
        "cos without sin": (without_table, "`rotary_sin` is None"),
        "sin shape": (new | {"rotary_sin": new["rotary_sin"][:-1]}, "`rotary_sin`"),
        "rotary dtype": (
            new | {"rotary_cos": new["rotary_cos"].float()},
            "rotary_cos must have the same dtype as query",
        ),
        "short tables": (
            new | {x: new[x][:40] for x in ("rotary_cos", "rotary_sin")},
            "cos/sin seqlen must be at least the seqlen of KV cache",
        ),
        "rotary_dim 48 of 32": (
            new | {"rotary_cos": wide, "rotary_sin": wide}, "rotary_dim must be <= headdim"
        ),
        "rotary_dim 24": (
            new | dict.fromkeys(("rotary_cos", "rotary_sin"), wide[:, :12].contiguous()),
            "Only rotary dimensions divisible by 16 are currently supported",
        ),
        "strided tables": (
            new | {x: new[x].t().contiguous().t() for x in ("rotary_cos", "rotary_sin")},
            "`rotary_cos` must be contiguous",
        ),
        "alibi dtype": (
            good | {"alibi_slopes": torch.ones(4, dtype=HALF)}, "ALiBi slopes must have dtype fp32"
        ),
        "alibi shape": (good | {"alibi_slopes": torch.ones(3)}, "`alibi_slopes` must have shape"),
        "129 splits": (good | {"num_splits": 129}, "num_splits > 128 not supported"),
        "negative splits": (good | {"num_splits": -1}, "`num_splits`"),
        "window": (good | {"window_size": (1, 2, 3)}, "`window_size`"),
        "int64 block_table": (
            paged | {"block_table": paged["block_table"].long()},
            "`block_table` must have dtype int32",
        ),
        "block_table shape": (paged | {"block_table": paged["block_table"][:2]}, "`block_table`"),
        "paged and leftpad": (
            paged | {"cache_leftpad": _int32(0, 0, 0)},
            "We don't support Paged KV and leftpad_k running at the same time yet",
        ),
        "paged and batch idx": (
            paged | {"cache_batch_idx": _int32(0, 1, 2)},
            "Paged KVcache does not support cache_batch_idx",
        ),
        "int64 batch idx": (good | {"cache_batch_idx": torch.arange(3)}, "`cache_batch_idx`"),
        "leftpad shape": (good | {"cache_leftpad": _int32(1, 2)}, "`leftpad"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(wrong_calls()))
def test_errors(device: str, name: str) -> None:
    call, text = wrong_calls()[name]
    moved = on_device(call, device)
    caches = [moved[x].clone() for x in ("k_cache", "v_cache")]
    for kind in (RuntimeError, AssertionError, ConstraintError):
        with pytest.raises(kind) as caught:
            flash_attn_with_kvcache(**moved)
        assert text in str(caught.value)
    assert torch.equal(bits(moved["k_cache"]), bits(caches[0]))
    assert torch.equal(bits(moved["v_cache"]), bits(caches[1]))


def test_raw_function_has_no_generator() -> None:
    call = _fresh()
    q, k, v = call["q"], call["k_cache"], call["v_cache"]
    with pytest.raises(RuntimeError, match="generator` argument is no longer supported"):
        flash_attn_gpu.fwd(q, k, v, None, None, 0.0, 1.0, False, -1, -1, 0.0, False, object())


def run_child(code: str, *flags: str, **environment: str) -> dict[str, str]:
    """Run ``code`` in a new interpreter; it prints a dict of what went wrong."""
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    command = [sys.executable, *flags, "-c", code]
    child = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


_OPTIMISED = """
import json, sys
from test_kvcache import flash_attn_with_kvcache, on_device, wrong_calls
wrong = {} if sys.flags.optimize else {"-O": "not set"}
for name, (call, text) in wrong_calls().items():
    try:
        flash_attn_with_kvcache(**on_device(call, DEVICE))
        wrong[name] = "did not raise"
    except Exception as error:
        kinds = isinstance(error, RuntimeError) and isinstance(error, AssertionError)
        if not kinds or text not in str(error):
            wrong[name] = repr(error)
print(json.dumps(wrong))
"""


def test_errors_under_python_o(device: str) -> None:
    assert run_child(_OPTIMISED.replace("DEVICE", repr(device)), "-O") == {}
