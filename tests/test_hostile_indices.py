"""Lengths and indices that lie: nothing outside the tensors is read or written, nothing raises.

Every tensor is carved out of a larger buffer whose other bytes hold a pattern: NaN around floating
point, so that a row read from outside shows in a result, and a huge number around integers. Caches
are compared bit by bit with what the valid part of the call may write. With ``FLASH_ATTN_CHECK=1``
the same calls raise an error that names the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_kvcache import Call, bits, check_caches, expected_caches, make_call, on_device, run_child
from test_paged import packed_call, private
from torch import Tensor

from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.errors import ConstraintError
from flash_attn.flash_attn_interface import flash_attn_gpu

INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31)
BAND = 4096
MASKS: list[Call] = [{}, {"causal": True}, {"window_size": (7, 2)}]


class Guarded:
    """Copies of tensors within larger buffers, whose bands must keep their bytes."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int, int]] = []

    def __call__(self, x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        pattern = 0xFF if x.is_floating_point() else 0x7F
        whole = torch.full((size + 2 * BAND,), pattern, dtype=torch.uint8, device=x.device)
        inside = whole[BAND : BAND + size].view(x.dtype).view(x.shape)
        inside.copy_(x)
        self.buffers.append((whole, size, pattern))
        return inside

    def call(self, call: Call, device: str) -> Call:
        moved = on_device(call, device)
        return {key: self(x) if isinstance(x, Tensor) else x for key, x in moved.items()}

    def check(self) -> None:
        for whole, size, pattern in self.buffers:
            bands = torch.cat([whole[:BAND], whole[BAND + size :]])
            assert bool((bands == pattern).all())


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    guards = Guarded()
    yield guards
    guards.check()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


LENGTHS = {
    "negative": [-1, -40, 7],
    "lowest": [INT32_MIN, 5, INT32_MIN],
    "beyond": [42, 7, 4100],
    "highest": [INT32_MAX, 7, INT32_MAX - 1],
    "last-row": [40, 39, 41],
}
PAGES = {
    "minus-one": [-1, -1, -1],
    "count": [0, 15, 16],
    "highest": [INT32_MAX, 1, INT32_MAX - 1],
    "lowest": [INT32_MIN, 2, -2],
}
ROWS = {
    "negative": [-1, 2, INT32_MIN],
    "count": [3, 4, 5],
    "highest": [INT32_MAX, INT32_MAX - 1, 1],
}
PADS = {
    "beyond-length": [30, 8, 25],
    "negative": [-1, -INT32_MAX, 3],
    "highest": [INT32_MAX, 41, 42],
    "lowest": [INT32_MIN, 0, -1],
}
BOUNDS = {
    "decreasing": [0, 15, 7, 25],
    "negative": [-5, -1, 12, 25],
    "beyond": [0, 10, 26, 4000],
    "all-beyond": [100, 110, 120, 130],
    "highest": [INT32_MAX, INT32_MIN, INT32_MAX, INT32_MAX],
    "lowest": [INT32_MIN, INT32_MIN, 3, INT32_MAX],
    "reversed": [25, 20, 10, 0],
    "equal-lengths-beyond": [5, 17, 29, 41],
}


def check_kvcache(call: Call, device: str, guarded: Guarded) -> tuple[Tensor, Tensor]:
    """Run the call within guards; results are finite and only valid places are written."""
    k_cache, v_cache = expected_caches(call)
    moved = guarded.call(call, device)
    given = {key: x.clone() for key, x in moved.items() if isinstance(x, Tensor)}
    out, lse = flash_attn_with_kvcache(**moved, return_softmax_lse=True)
    guarded.check()
    check_caches(call, moved, k_cache, v_cache)
    for key, x in given.items():
        if key not in ("k_cache", "v_cache"):
            assert torch.equal(moved[key], x), f"{key} was changed"
    assert bool(out.isfinite().all())
    assert not lse.isnan().any()
    return out, lse


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("seqlen_new", [None, 1, 5])
@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_cache_seqlens(
    device: str, guarded: Guarded, lengths: str, seqlen_new: int | None, num_splits: int
) -> None:
    call = make_call(lengths=LENGTHS[lengths], seqlen_new=seqlen_new, num_splits=num_splits)
    check_kvcache(call, device, guarded)


@pytest.mark.parametrize("given", [-1, 39, 42, INT32_MAX, INT32_MIN, 2**40])
def test_integer_cache_seqlens(device: str, given: int) -> None:
    """One on the host is known: where it does not fit it raises, before anything is written."""
    call = on_device(make_call(cache_seqlens=given, seqlen_new=3, causal=True), device)
    k_cache = call["k_cache"].clone()
    with pytest.raises(ConstraintError, match=r"`cache_seqlens`.*(between 0 and|need \d+)"):
        flash_attn_with_kvcache(**call)
    assert torch.equal(bits(call["k_cache"]), bits(k_cache))
    flash_attn_with_kvcache(**call | {"cache_seqlens": 38})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_rotary_positions(device: str, guarded: Guarded, lengths: str, causal: bool) -> None:
    """Rotation takes the nearest row of its tables."""
    call = make_call(
        lengths=LENGTHS[lengths], seqlen_new=3, seqlen_q=3, rotary_dim=16, causal=causal
    )
    check_kvcache(call, device, guarded)


@pytest.mark.parametrize("mask", MASKS, ids=["full", "causal", "local"])
@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_cache_seqlens_under_masks(
    device: str, guarded: Guarded, lengths: str, mask: dict[str, Any]
) -> None:
    slopes = torch.rand(4)
    check_kvcache(make_call(lengths=LENGTHS[lengths], alibi_slopes=slopes, **mask), device, guarded)


def test_valid_sequences_are_right_beside_hostile_ones(device: str, guarded: Guarded) -> None:
    good = make_call(lengths=[20, 7, 41])
    want = flash_attn_with_kvcache(**on_device(good, device))
    good["cache_seqlens"] = int32(INT32_MAX, 7, -5)
    out, _ = check_kvcache(good, device, guarded)
    assert torch.equal(bits(out[1]), bits(want[1]))


@pytest.mark.parametrize("page_size", [1, 16, 19])
@pytest.mark.parametrize("seqlen_new", [None, 5])
@pytest.mark.parametrize("pages", list(PAGES))
def test_block_table(
    device: str, guarded: Guarded, pages: str, seqlen_new: int | None, page_size: int
) -> None:
    """Every entry of three sequences is replaced, before and behind their ends."""
    call = make_call(lengths=[2, 37, 17], page_size=page_size, seqlen_new=seqlen_new)
    table = call["block_table"]
    for column, page in enumerate(PAGES[pages]):
        # Existing pages stay as they are: on one that several rows are appended to, whoever writes
        # last wins.
        if not 0 <= page < call["k_cache"].shape[0]:
            table[:, column::3] = page
    check_kvcache(call, device, guarded)


@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_lengths_beyond_the_table(device: str, guarded: Guarded, lengths: str) -> None:
    """The table behind the last column holds huge numbers, as do its neighbours."""
    call = make_call(lengths=LENGTHS[lengths], page_size=7, seqlen_new=9, num_splits=2)
    check_kvcache(call, device, guarded)


@pytest.mark.parametrize("seqlen_new", [None, 2])
@pytest.mark.parametrize("rows", list(ROWS))
def test_cache_batch_idx(device: str, guarded: Guarded, rows: str, seqlen_new: int | None) -> None:
    call = make_call(lengths=[3, 20, 9], seqlen_new=seqlen_new, cache_batch_idx=int32(*ROWS[rows]))
    check_kvcache(call, device, guarded)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("pads", list(PADS))
def test_cache_leftpad(device: str, guarded: Guarded, pads: str, num_splits: int) -> None:
    call = make_call(
        lengths=[10, 3, 24], cache_leftpad=int32(*PADS[pads]), seqlen_new=2, num_splits=num_splits
    )
    check_kvcache(call, device, guarded)


def test_padding_beyond_the_length_leaves_no_key(device: str, guarded: Guarded) -> None:
    call = make_call(lengths=[10, 3, 24], cache_leftpad=int32(11, 41, 24))
    out, lse = check_kvcache(call, device, guarded)
    assert not out.any()
    assert bool((lse == float("inf")).all())


def test_append_past_the_end_drops_rows(device: str, guarded: Guarded) -> None:
    """Two of five rows fit in the first sequence, none in the second, all in the third."""
    call = make_call(lengths=[39, 41, 36], seqlen_new=5)
    moved = guarded.call(call, device)
    flash_attn_with_kvcache(**moved)
    for name, new in (("k_cache", "k"), ("v_cache", "v")):
        want = call[name].clone()
        want[0, 39:] = call[new][0, :2]
        want[2, 36:] = call[new][2]
        assert torch.equal(bits(moved[name]), bits(want))


def test_appended_rows_of_neighbours_stay(device: str, guarded: Guarded) -> None:
    """A cache that is a slice of a longer one: dropped rows do not land in the rest of it."""
    call = make_call(lengths=[39, 41, 36], seqlen_new=5, capacity=41)
    moved = guarded.call(call, device)
    longer = {}
    for name in ("k_cache", "v_cache"):
        longer[name] = guarded(torch.full((3, 60, 2, 32), 5.0, device=device).half())
        longer[name][:, :41] = moved[name]
        moved[name] = longer[name][:, :41]
    flash_attn_with_kvcache(**moved)
    for whole in longer.values():
        assert bool((whole[:, 41:] == 5.0).all())


def test_raw_out_is_written_within_its_bounds(device: str, guarded: Guarded) -> None:
    call = make_call(lengths=[INT32_MAX, -1, 42], seqlen_new=5)
    moved = guarded.call(call, device)
    out = guarded(torch.full_like(moved["q"], float("nan")))
    flash_attn_gpu.fwd_kvcache(
        moved["q"], moved["k_cache"], moved["v_cache"], moved["k"], moved["v"],
        moved["cache_seqlens"], None, None, None, None, None, None, out, 1.0, True, -1, -1, 0.0,
        True, 3,
    )  # fmt: skip
    assert bool(out.isfinite().all())


# Packed sequences.


def check_varlen(
    call: Call, device: str, guarded: Guarded, repeatable: bool = True, **more: Any
) -> tuple[Tensor, Tensor]:
    """Forward into a guarded output."""
    moved = guarded.call(call, device)
    more = {key: guarded(x.to(device)) for key, x in more.items()}
    out, lse = private(moved, **more)
    written = guarded(torch.full_like(out, float("nan")))
    left, right = call.get("window_size", (-1, -1))
    flash_attn_gpu.varlen_fwd(
        moved["q"], moved["k"], moved["v"], written, moved["cu_seqlens_q"], moved["cu_seqlens_k"],
        more.get("seqused_k"), more.get("leftpad_k"), moved.get("block_table"), None,
        moved["max_seqlen_q"], moved["max_seqlen_k"], 0.0, 32**-0.5, False,
        call.get("causal", False), left, right, 0.0, False,
    )  # fmt: skip
    guarded.check()
    assert bool(out.isfinite().all())
    assert not lse.isnan().any()
    assert bool(written.isfinite().all())
    if repeatable:
        assert torch.equal(bits(written), bits(out))
    return out, lse


@pytest.mark.parametrize("mask", MASKS, ids=["full", "causal", "local"])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("bounds", list(BOUNDS))
@pytest.mark.parametrize("which", ["q", "k", "both"])
def test_cu_seqlens(
    device: str,
    guarded: Guarded,
    which: str,
    bounds: str,
    page_size: int | None,
    mask: dict[str, Any],
) -> None:
    call = packed_call([10, 7, 8], [10, 7, 8], page_size, **mask)
    for name in ("q", "k") if which == "both" else which:
        call[f"cu_seqlens_{name}"] = int32(*BOUNDS[bounds])
    # Sequences that overlap, with each other or with the rows of none, write the same rows of the
    # output, in any order.
    overlap = which != "k" and bounds in ("decreasing", "highest")
    check_varlen(call, device, guarded, repeatable=not overlap)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_seqused_k(device: str, guarded: Guarded, lengths: str, page_size: int | None) -> None:
    call = packed_call([10, 7, 8], [30, 7, 41], page_size)
    check_varlen(call, device, guarded, seqused_k=int32(*LENGTHS[lengths]))


@pytest.mark.parametrize("pads", list(PADS))
def test_leftpad_k(device: str, guarded: Guarded, pads: str) -> None:
    call = packed_call([10, 7, 8], [30, 7, 41], None)
    check_varlen(call, device, guarded, leftpad_k=int32(*PADS[pads]))


@pytest.mark.parametrize("page_size", [1, 16, 19])
@pytest.mark.parametrize("pages", list(PAGES))
def test_block_table_of_packed_queries(
    device: str, guarded: Guarded, pages: str, page_size: int
) -> None:
    call = packed_call([10, 7, 8], [30, 7, 41], page_size)
    for column, page in enumerate(PAGES[pages]):
        call["block_table"][:, column::3] = page
    check_varlen(call, device, guarded)


@pytest.mark.parametrize("bounds", list(BOUNDS))
@pytest.mark.parametrize("causal", [False, True])
def test_cu_seqlens_in_backward(device: str, guarded: Guarded, causal: bool, bounds: str) -> None:
    call = guarded.call(packed_call([10, 7, 8], [10, 7, 8], None, causal=causal), device)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        call[name] = guarded(int32(*BOUNDS[bounds]).to(device))
    leaves = [call[name].requires_grad_() for name in ("q", "k", "v")]
    out = flash_attn_varlen_func(**call)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("bounds", list(BOUNDS))
def test_gradients_are_written_within_their_bounds(
    device: str, guarded: Guarded, bounds: str
) -> None:
    call = guarded.call(packed_call([10, 7, 8], [10, 7, 8], None), device)
    q, k, v = call["q"], call["k"], call["v"]
    cu = guarded(int32(*BOUNDS[bounds]).to(device))
    forward = (0.0, 32**-0.5, False, False, -1, -1, 0.0)
    out, lse, _, state = flash_attn_gpu.varlen_fwd(
        q, k, v, None, cu, cu, None, None, None, None, 10, 10, *forward, False
    )
    grads = [guarded(torch.full_like(x, float("nan"))) for x in (q, k, v)]
    flash_attn_gpu.varlen_bwd(
        torch.ones_like(out), q, k, v, out, lse, *grads, cu, cu, None, 10, 10, *forward, False,
        None, state,
    )  # fmt: skip
    assert all(bool(grad.isfinite().all()) for grad in grads)


# Checked mode. The setting is read when the package is imported, so a child process runs these.


def with_own_lengths(**call: Any) -> tuple[Tensor, Tensor]:
    return private(call)


def checked_calls() -> dict[str, tuple[Callable[..., Any], Call, str]]:
    """Name -> (function, call, the argument that must be named)."""
    calls: dict[str, tuple[Callable[..., Any], Call, str]] = {}
    cache, packed, used = flash_attn_with_kvcache, flash_attn_varlen_func, with_own_lengths

    def add(name: str, function: Callable[..., Any], call: Call, argument: str) -> None:
        calls[name] = (function, call, argument)

    for name, lengths in LENGTHS.items():
        if name != "last-row":
            add(f"cache_seqlens {name}", cache, make_call(lengths=lengths), "cache_seqlens")
            add(f"append at {name}", cache, make_call(lengths=lengths, seqlen_new=1),
                "cache_seqlens")  # fmt: skip
            add(f"paged cache_seqlens {name}", cache, make_call(
                lengths=[100 * x if x == 42 else x for x in lengths], page_size=16
            ), "cache_seqlens")  # fmt: skip
            call = packed_call([10, 7, 8], [30, 7, 41], None)
            add(f"seqused_k {name}", used, call | {"seqused_k": int32(*lengths)}, "seqused_k")
    add("append past the end", cache, make_call(lengths=[3, 40, 2], seqlen_new=2), "cache_seqlens")
    add("append past the pages", cache,
        make_call(lengths=[3, 40, 2], seqlen_new=9, page_size=16), "block_table")  # fmt: skip
    for name, pages in PAGES.items():
        call = make_call(lengths=[40, 40, 40], page_size=19)
        paged = packed_call([10, 7, 8], [41, 41, 41], 19)
        for column, page in enumerate(pages):
            call["block_table"][:, column::3] = page
            paged["block_table"][:, column::3] = page
        if name == "count":
            call["block_table"][:] = len(call["k_cache"])
            paged["block_table"][:] = len(paged["k"])
        add(f"block_table {name}", cache, call, "block_table")
        add(f"packed block_table {name}", packed, paged, "block_table")
    fresh = make_call(lengths=[16, 3, 40], seqlen_new=2, page_size=16)
    fresh["block_table"][0, 1] = -1
    add("append to a page that is missing", cache, fresh, "block_table")
    for name, rows in ROWS.items():
        add(f"cache_batch_idx {name}", cache, make_call(cache_batch_idx=int32(*rows)),
            "cache_batch_idx")  # fmt: skip
    for name, pads in PADS.items():
        call = make_call(lengths=[10, 3, 24], cache_leftpad=int32(*pads))
        add(f"cache_leftpad {name}", cache, call, "leftpad")
        call = packed_call([10, 7, 8], [10, 7, 8], None)
        add(f"leftpad_k {name}", used, call | {"leftpad_k": int32(*pads)}, "leftpad")
    for name, bounds in BOUNDS.items():
        for which in ("cu_seqlens_q", "cu_seqlens_k"):
            call = packed_call([10, 7, 8], [10, 7, 8], None) | {which: int32(*bounds)}
            add(f"{which} {name}", packed, call, which)
        if name in ("decreasing", "negative", "reversed", "highest"):
            call = packed_call([10, 7, 8], [10, 7, 8], 16) | {"cu_seqlens_q": int32(*bounds)}
            add(f"paged cu_seqlens_q {name}", packed, call, "cu_seqlens_q")
    return calls


def valid_calls() -> dict[str, tuple[Callable[..., Any], Call]]:
    """Unusual calls that checked mode must let pass."""
    unused = make_call(lengths=[16, 3, 32], page_size=16)
    unused["block_table"][:, 2:] = -1
    packed = packed_call([3, 0, 2], [16, 3, 0], 16)
    packed["block_table"][:, 1:] = INT32_MAX
    shorter = packed_call([3, 2], [16, 3], None)
    shorter["q"] = torch.cat([shorter["q"]] * 2)
    return {
        "unused entries": (flash_attn_with_kvcache, unused),
        "unused entries of packed queries": (flash_attn_varlen_func, packed),
        "rows of no sequence": (flash_attn_varlen_func, shorter),
        "full cache": (flash_attn_with_kvcache, make_call(lengths=[41, 0, 3])),
        "filled to the end": (
            flash_attn_with_kvcache, make_call(lengths=[38, 0, 3], seqlen_new=3, rotary_dim=16)
        ),
        "all padding": (
            flash_attn_with_kvcache,
            make_call(lengths=[41, 0, 3], cache_leftpad=int32(41, 0, 3)),
        ),
        "empty batch": (
            flash_attn_with_kvcache,
            {key: x[:0] if isinstance(x, Tensor) else x for key, x in make_call(lengths=[1, 2, 3])
             .items()},
        ),
    }  # fmt: skip


_CHECKED = """
import json
from test_hostile_indices import bits, checked_calls, on_device, valid_calls
wrong = {}
for name, (function, call, argument) in checked_calls().items():
    moved = on_device(call, DEVICE)
    try:
        function(**moved)
        wrong[name] = "did not raise"
    except Exception as error:
        if type(error).__name__ != "ConstraintError" or argument not in str(error):
            wrong[name] = repr(error)
for name, (function, call) in valid_calls().items():
    try:
        function(**on_device(call, DEVICE))
    except Exception as error:
        wrong[name] = repr(error)
print(json.dumps(wrong))
"""


def test_checked_mode(device: str) -> None:
    code = _CHECKED.replace("DEVICE", repr(device))
    assert run_child(code, FLASH_ATTN_CHECK="1") == {}


def test_checked_mode_is_off_by_default(device: str) -> None:
    """The same calls pass in this process, which did not ask for checks."""
    from flash_attn import settings

    if settings.CHECK_INDICES:
        pytest.skip("FLASH_ATTN_CHECK is set")
    for function, call, _ in checked_calls().values():
        function(**on_device(call, device))
