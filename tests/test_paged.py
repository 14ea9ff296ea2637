"""Paged caches: ``block_table`` with cache calls and with packed queries, and ``seqused_k``.

Held against the dense float64 reference of ``test_kvcache``; pages are shuffled, pages of nobody
lie among them, and page sizes are what they like.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from test_kvcache import (
    BF16,
    HALF,
    LSE_TOLERANCE,
    MASKS,
    SINGLE,
    TOLERANCE,
    Call,
    assert_rounded_equal,
    bits,
    check,
    make_call,
    on_device,
    reference_attention,
    run_child,
)
from torch import Tensor

from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward, flash_attn_gpu

PAGE_SIZES = [1, 4, 16, 19, 128, 256]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed_call(
    lengths_q: list[int],
    lengths_k: list[int],
    page_size: int | None,
    dtype: torch.dtype = HALF,
    nheads: int = 4,
    nheads_k: int = 2,
    headdim: int = 32,
    **more: Any,
) -> Call:
    """Arguments of ``flash_attn_varlen_func`` on the CPU; without ``page_size`` keys are packed."""
    call: Call = {"q": torch.randn(sum(lengths_q), nheads, headdim).to(dtype)}
    shape: tuple[int, ...] = (sum(lengths_k),)
    if page_size is not None:
        blocks = -(-max(lengths_k) // page_size) + 1
        shape = (len(lengths_k) * blocks + 3, page_size)
        order = torch.randperm(shape[0])[: len(lengths_k) * blocks]
        call["block_table"] = order.view(len(lengths_k), blocks).int()
    for name in ("k", "v"):
        call[name] = torch.randn(*shape, nheads_k, headdim).to(dtype)
    call["cu_seqlens_q"], call["cu_seqlens_k"] = cumulative(lengths_q), cumulative(lengths_k)
    call["max_seqlen_q"], call["max_seqlen_k"] = max(lengths_q), max(lengths_k)
    return call | more


def keys_of(call: Call, name: str, b: int, first: int, end: int) -> Tensor:
    """Keys or values [first, end) of sequence ``b``, one after another."""
    x, table = call[name], call.get("block_table")
    if table is None:
        start = int(call["cu_seqlens_k"][b])
        return x[start + first : start + end]
    size = x.shape[1]
    rows = [x[int(table[b, t // size]), t % size] for t in range(first, end)]
    return torch.stack(rows) if rows else x[0, :0]


def expected_packed(
    call: Call, seqused_k: list[int] | None = None, leftpad_k: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """(total_q, nheads, headdim) and (nheads, total_q), in float64."""
    outs, lses = [], []
    bounds, ends = call["cu_seqlens_q"].tolist(), call["cu_seqlens_k"].diff().tolist()
    for b, end in enumerate(ends if seqused_k is None else seqused_k):
        first = 0 if leftpad_k is None else leftpad_k[b]
        slopes = call.get("alibi_slopes")
        out, lse = reference_attention(
            call["q"][bounds[b] : bounds[b + 1]],
            keys_of(call, "k", b, first, end),
            keys_of(call, "v", b, first, end),
            call.get("causal", False),
            call.get("window_size", (-1, -1)),
            call.get("softcap", 0.0),
            slopes if slopes is None or slopes.dim() == 1 else slopes[b],
            call.get("softmax_scale"),
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def check_packed(call: Call, device: str) -> tuple[Tensor, Tensor]:
    want_out, want_lse = expected_packed(call)
    moved = on_device(call, device)
    out, lse, s_dmask = flash_attn_varlen_func(**moved, return_attn_probs=True)
    assert out.shape == call["q"].shape
    assert out.dtype == call["q"].dtype
    assert lse.dtype == torch.float32
    assert s_dmask.numel() == 0
    assert_rounded_equal(out, want_out, TOLERANCE[out.dtype])
    assert_rounded_equal(lse, want_lse, LSE_TOLERANCE)
    for name in ("k", "v"):
        assert torch.equal(bits(moved[name]), bits(call[name]))
    return out, lse


def private(call: Call, **more: Any) -> tuple[Tensor, Tensor]:
    """``_flash_attn_varlen_forward`` with the same call."""
    arguments = {key: x for key, x in call.items() if key not in ("window_size", "causal")}
    left, right = call.get("window_size", (-1, -1))
    result = _flash_attn_varlen_forward(
        **arguments,
        dropout_p=0.0,
        softmax_scale=call["q"].shape[-1] ** -0.5,
        causal=call.get("causal", False),
        window_size_left=left,
        window_size_right=right,
        **more,
    )
    assert len(result) == 4
    return result[0], result[1]


# Cache calls.


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("seqlen_new", [None, 1, 21])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
def test_cache_pages(
    device: str, dtype: torch.dtype, seqlen_new: int | None, page_size: int
) -> None:
    """New rows cross the bounds of pages; other pages keep every bit."""
    call = make_call(
        dtype, seqlen_q=2, capacity=150, lengths=[0, 128, 37], page_size=page_size,
        seqlen_new=seqlen_new, causal=True,
    )  # fmt: skip
    check(call, device)


@pytest.mark.parametrize("page_size", [1, 19, 256])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_rotary_in_pages(device: str, causal: bool, interleaved: bool, page_size: int) -> None:
    call = make_call(
        seqlen_q=3, capacity=60, lengths=[0, 18, 37], page_size=page_size, seqlen_new=3,
        rotary_dim=16, rotary_interleaved=interleaved, causal=causal,
    )  # fmt: skip
    check(call, device)


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("page_size", [4, 19])
def test_masks_over_pages(device: str, page_size: int, mask: str) -> None:
    call = make_call(
        SINGLE, seqlen_q=5, capacity=90, lengths=[0, 4, 77], page_size=page_size, softcap=6.0,
        alibi_slopes=torch.rand(3, 4), **MASKS[mask],
    )  # fmt: skip
    check(call, device)


@pytest.mark.parametrize("headdim", [32, 59, 64, 80, 128, 256])
def test_head_dims_in_pages(device: str, headdim: int) -> None:
    call = make_call(capacity=60, lengths=[0, 18, 37], page_size=19, headdim=headdim, seqlen_new=4)
    check(call, device)


@pytest.mark.parametrize("given", [None, 33])
def test_lengths_of_pages(device: str, given: int | None) -> None:
    """None is all that the table can hold."""
    check(make_call(SINGLE, capacity=48, page_size=16, cache_seqlens=given), device)


def test_full_pages_are_filled_to_the_last_row(device: str) -> None:
    call = make_call(capacity=64, lengths=[63, 0, 48], page_size=16, seqlen_new=1)
    check(call, device)


@pytest.mark.parametrize("num_splits", [0, 1, 3, 128])
def test_shared_pages(device: str, num_splits: int) -> None:
    """Sequences with a common beginning may name the same pages."""
    call = make_call(SINGLE, capacity=64, lengths=[50, 33, 64], page_size=16, num_splits=num_splits)
    call["block_table"][1, :2] = call["block_table"][0, :2]
    call["block_table"][2] = call["block_table"][0]
    check(call, device)


def test_a_table_within_a_larger_one(device: str) -> None:
    """The rows of the table have a stride of their own."""
    call = make_call(SINGLE, capacity=64, lengths=[50, 33, 7], page_size=16, seqlen_new=4)
    wide = torch.full((3, 9), 2**31 - 1, dtype=torch.int32)
    wide[:, 2:6] = call["block_table"]
    call["block_table"] = wide[:, 2:6]
    moved = on_device(call, device) | {"block_table": wide.to(device)[:, 2:6]}
    want = on_device(call, device) | {"block_table": call["block_table"].contiguous().to(device)}
    outs = [flash_attn_with_kvcache(**x) for x in (moved, want)]
    assert torch.equal(bits(outs[0]), bits(outs[1]))
    assert torch.equal(bits(moved["k_cache"]), bits(want["k_cache"]))


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("page_size", [1, 19, 128])
@pytest.mark.parametrize("seqlen_new", [None, 2])
def test_poisoned_pages(
    device: str, seqlen_new: int | None, page_size: int, num_splits: int
) -> None:
    """NaN in unused pages, page 0 among them, and behind the ends, changes no bit."""
    lengths = [0, 128, 37]
    call = make_call(
        seqlen_q=2, capacity=150, lengths=lengths, page_size=page_size, num_splits=num_splits,
        headdim=64, seqlen_new=seqlen_new,
    )  # fmt: skip
    table = call["block_table"]
    spare = set(range(len(call["k_cache"]))) - set(table.flatten().tolist()) - {0}
    table[table == 0] = min(spare)
    used = torch.zeros(call["k_cache"].shape[:2], dtype=torch.bool)
    for b, length in enumerate(lengths):
        for t in range(length):
            used[table[b, t // page_size], t % page_size] = True
    assert not used[0].any()
    clean, dirty = on_device(call, device), on_device(call, device)
    for name, poison in (("k_cache", float("nan")), ("v_cache", float("inf"))):
        dirty[name] = clean[name].clone()
        dirty[name][~used.to(device)] = poison
    results = [flash_attn_with_kvcache(**x, return_softmax_lse=True) for x in (clean, dirty)]
    assert not results[0][0].isnan().any()
    for want, got in zip(*results, strict=True):
        assert torch.equal(bits(got), bits(want))


def test_a_paged_cache_equals_a_dense_one(device: str) -> None:
    dense = on_device(make_call(capacity=96, lengths=[3, 96, 50], num_splits=1), device)
    order = torch.randperm(18, device=device)
    paged = dense | {"block_table": order.argsort().view(3, 6).int()}
    for name in ("k_cache", "v_cache"):
        paged[name] = dense[name].reshape(18, 16, 2, 32)[order]
    want = flash_attn_with_kvcache(**dense, return_softmax_lse=True)
    got = flash_attn_with_kvcache(**paged, return_softmax_lse=True)
    assert_rounded_equal(got[0], want[0], TOLERANCE[HALF])
    assert_rounded_equal(got[1], want[1], LSE_TOLERANCE)


# Packed queries over pages.


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
def test_packed_queries(device: str, dtype: torch.dtype, mask: str, page_size: int) -> None:
    """Empty sequences on either side, more queries than keys, one query."""
    call = packed_call([3, 0, 17, 1, 6, 2], [140, 5, 17, 31, 2, 0], page_size, dtype, **MASKS[mask])
    check_packed(call, device)


@pytest.mark.parametrize("page_size", [16, 19])
@pytest.mark.parametrize("slopes", ["heads", "batch"])
def test_packed_features(device: str, slopes: str, page_size: int) -> None:
    call = packed_call(
        [3, 17, 1], [40, 17, 31], page_size, SINGLE, softcap=5.0, softmax_scale=0.4, causal=True,
        alibi_slopes=torch.rand(4) if slopes == "heads" else torch.rand(3, 4),
    )  # fmt: skip
    check_packed(call, device)


@pytest.mark.parametrize("headdim", [32, 59, 64, 80, 128, 256])
def test_packed_head_dims(device: str, headdim: int) -> None:
    check_packed(packed_call([3, 17], [40, 17], 19, headdim=headdim, causal=True), device)


@pytest.mark.parametrize(("nheads", "nheads_k"), [(1, 1), (6, 6), (6, 2), (5, 1)])
def test_packed_heads(device: str, nheads: int, nheads_k: int) -> None:
    check_packed(packed_call([3, 9], [40, 17], 16, nheads=nheads, nheads_k=nheads_k), device)


def test_only_the_lengths_in_cu_seqlens_k_count(device: str) -> None:
    """Pages say where the keys are: bounds moved by a constant change nothing."""
    call = on_device(packed_call([3, 9], [40, 17], 16, SINGLE), device)
    want = flash_attn_varlen_func(**call)
    call["cu_seqlens_k"] = call["cu_seqlens_k"] + 1_000_000
    assert torch.equal(bits(flash_attn_varlen_func(**call)), bits(want))


@pytest.mark.parametrize("bound", [1, 1000])
def test_results_do_not_depend_on_the_length_bounds(device: str, bound: int) -> None:
    call = on_device(packed_call([3, 9], [40, 17], 16, SINGLE), device)
    want = flash_attn_varlen_func(**call)
    call |= {"max_seqlen_q": bound, "max_seqlen_k": bound}
    assert torch.equal(bits(flash_attn_varlen_func(**call)), bits(want))


def test_rows_of_no_sequence_are_zero(device: str) -> None:
    call = on_device(packed_call([3, 9], [40, 17], 16, SINGLE), device)
    want = flash_attn_varlen_func(**call)
    call["q"] = torch.cat([call["q"], torch.full_like(call["q"][:5], float("nan"))])
    got = flash_attn_varlen_func(**call)
    assert torch.equal(bits(got[:12]), bits(want))
    assert not got[12:].any()


def test_poisoned_pages_under_packed_queries(device: str) -> None:
    call = packed_call([3, 9, 4], [40, 17, 0], 16, causal=True)
    clean, dirty = on_device(call, device), on_device(call, device)
    used = torch.zeros(call["k"].shape[:2], dtype=torch.bool)
    for b, length in enumerate([40, 17, 0]):
        for t in range(length):
            used[call["block_table"][b, t // 16], t % 16] = True
    for name in ("k", "v"):
        dirty[name] = clean[name].clone()
        dirty[name][~used.to(device)] = float("nan")
    results = [flash_attn_varlen_func(**x, return_attn_probs=True) for x in (clean, dirty)]
    for want, got in zip(*results, strict=True):
        assert torch.equal(bits(got), bits(want))


# The private function, which takes lengths of its own.


@pytest.mark.parametrize("page_size", [None, 16, 19])
@pytest.mark.parametrize("mask", list(MASKS))
def test_seqused_k(device: str, mask: str, page_size: int | None) -> None:
    """Fewer keys than ``cu_seqlens_k`` says; masks align at the end of those in use."""
    call = packed_call([3, 9, 1, 2], [40, 17, 8, 30], page_size, SINGLE, **MASKS[mask])
    used = [21, 17, 0, 1]
    want = expected_packed(call, seqused_k=used)
    out, lse = private(on_device(call, device), seqused_k=torch.tensor(used).int().to(device))
    assert_rounded_equal(out, want[0], TOLERANCE[SINGLE])
    assert_rounded_equal(lse, want[1], LSE_TOLERANCE)


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("with_seqused", [False, True])
def test_leftpad_k(device: str, with_seqused: bool, mask: str) -> None:
    call = packed_call([3, 9, 1, 2], [40, 17, 8, 30], None, SINGLE, **MASKS[mask])
    used, pads = [21, 17, 8, 5] if with_seqused else None, [4, 0, 8, 3]
    want = expected_packed(call, used, pads)
    more = {"leftpad_k": torch.tensor(pads).int().to(device)}
    if used is not None:
        more["seqused_k"] = torch.tensor(used).int().to(device)
    out, lse = private(on_device(call, device), **more)
    assert_rounded_equal(out, want[0], TOLERANCE[SINGLE])
    assert_rounded_equal(lse, want[1], LSE_TOLERANCE)


def test_raw_function(device: str) -> None:
    call = packed_call([3, 9], [40, 17], 16, SINGLE, causal=True)
    want, moved = expected_packed(call), on_device(call, device)
    out = torch.full_like(moved["q"], float("nan"))
    result = flash_attn_gpu.varlen_fwd(
        moved["q"], moved["k"], moved["v"], out, moved["cu_seqlens_q"], moved["cu_seqlens_k"],
        None, None, moved["block_table"], None, 9, 40, 0.0, 32**-0.5, False, True, -1, -1, 0.0,
        False,
    )  # fmt: skip
    assert len(result) == 4
    assert result[0].data_ptr() == out.data_ptr()
    assert_rounded_equal(out, want[0], TOLERANCE[SINGLE])
    assert_rounded_equal(result[1], want[1], LSE_TOLERANCE)


def test_raw_function_and_splits(device: str) -> None:
    call = on_device(packed_call([3, 9], [40, 17], 16), device)
    for num_splits, fails in ((0, False), (1, False), (2, True), (128, True)):
        arguments = (
            call["q"], call["k"], call["v"], None, call["cu_seqlens_q"], call["cu_seqlens_k"],
            None, None, call["block_table"], None, 9, 40, 0.0, 1.0, False, False, -1, -1, 0.0,
            False, None, num_splits,
        )  # fmt: skip
        if fails:
            with pytest.raises(RuntimeError, match="num_splits > 1 is not supported"):
                flash_attn_gpu.varlen_fwd(*arguments)
        else:
            flash_attn_gpu.varlen_fwd(*arguments)


def wrong_packed_calls() -> dict[str, tuple[Call, Call, str]]:
    """Name -> (call, what only the private function takes, what the message must contain)."""
    good = packed_call([3, 9], [40, 17], 16)
    dense = packed_call([3, 9], [40, 17], None)
    table = good["block_table"]
    zeros = torch.zeros(2, dtype=torch.int32)
    return {
        "num_splits": (good, {"num_splits": 2}, "num_splits > 1 is not supported"),
        "leftpad": (
            good, {"leftpad_k": zeros},
            "We don't support Paged KV and leftpad_k running at the same time yet",
        ),
        "int64 table": (good | {"block_table": table.long()}, {}, "`block_table` must have dtype"),
        "one-dimensional table": (good | {"block_table": table[0]}, {}, "`block_table`"),
        "rows of the table": (good | {"block_table": table[:1]}, {}, "`block_table` must have"),
        "strided table": (
            good | {"block_table": table.T.contiguous().T}, {}, "`block_table` must be contiguous"
        ),
        "int64 cu_seqlens_q": (
            good | {"cu_seqlens_q": good["cu_seqlens_q"].long()}, {}, "`cu_seqlens_q` must have dty"
        ),
        "int64 cu_seqlens_k": (
            good | {"cu_seqlens_k": good["cu_seqlens_k"].long()}, {}, "`cu_seqlens_k` must have dty"
        ),
        "length of cu_seqlens_k": (
            good | {"cu_seqlens_k": good["cu_seqlens_k"][:2]}, {}, "`cu_seqlens_k` must have shape"
        ),
        "packed keys with a table": (good | {"k": dense["k"], "v": dense["v"]}, {}, "`k`"),
        "pages without a table": (
            {key: x for key, x in good.items() if key != "block_table"}, {}, "`k`"
        ),
        "value pages": (good | {"v": good["v"][:-1]}, {}, "`v` must have shape"),
        "seqused_k dtype": (good, {"seqused_k": zeros.long()}, "`seqused_k` must have dtype"),
        "seqused_k shape": (dense, {"seqused_k": zeros[:1]}, "`seqused_k` must have shape"),
        "leftpad_k shape": (dense, {"leftpad_k": zeros[:1]}, "`leftpad_k` must have shape"),
        "heads": (
            packed_call([3, 9], [40, 17], 16, nheads=5), {},
            "Number of heads in key/value must divide number of heads in query",
        ),
        "softcap with dropout": (
            good | {"softcap": 1.0, "dropout_p": 0.1}, {},
            "Softcapping does not support dropout for now",
        ),
        "dropout_p": (good | {"dropout_p": 1.0}, {}, "`dropout_p` must be in [0, 1)"),
        "alibi": (good | {"alibi_slopes": torch.ones(4).double()}, {}, "ALiBi slopes must have"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(wrong_packed_calls()))
def test_errors(device: str, name: str) -> None:
    call, only_private, text = wrong_packed_calls()[name]
    moved, more = on_device(call, device), on_device(only_private, device)
    for kind in (RuntimeError, AssertionError):
        with pytest.raises(kind) as caught:
            private(moved, **more) if more else flash_attn_varlen_func(**moved)
        assert text in str(caught.value)


_OPTIMISED = """
import json, sys
from test_paged import flash_attn_varlen_func, on_device, private, wrong_packed_calls
wrong = {} if sys.flags.optimize else {"-O": "not set"}
for name, (call, only_private, text) in wrong_packed_calls().items():
    moved, more = on_device(call, DEVICE), on_device(only_private, DEVICE)
    try:
        private(moved, **more) if more else flash_attn_varlen_func(**moved)
        wrong[name] = "did not raise"
    except Exception as error:
        kinds = isinstance(error, RuntimeError) and isinstance(error, AssertionError)
        if not kinds or text not in str(error):
            wrong[name] = repr(error)
print(json.dumps(wrong))
"""


def test_errors_under_python_o(device: str) -> None:
    assert run_child(_OPTIMISED.replace("DEVICE", repr(device)), "-O") == {}


def test_backward_through_pages_is_refused(device: str) -> None:
    call = on_device(packed_call([3, 9], [40, 17], 16, SINGLE), device)
    call["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="`block_table`"):
        flash_attn_varlen_func(**call).sum().backward()


def test_empty_batch_of_pages(device: str) -> None:
    call = on_device(packed_call([3, 9], [40, 17], 16, SINGLE), device)
    call |= {"q": call["q"][:0], "block_table": call["block_table"][:0]}
    call |= {"cu_seqlens_q": call["cu_seqlens_q"][:1], "cu_seqlens_k": call["cu_seqlens_k"][:1]}
    out, lse, _ = flash_attn_varlen_func(**call, return_attn_probs=True)
    assert out.shape == (0, 4, 32)
    assert lse.shape == (4, 0)


def test_no_pages_at_all(device: str) -> None:
    """A pool without pages, or a table without columns, holds no key."""
    call = on_device(packed_call([3, 9], [40, 17], 16, SINGLE), device)
    for change in ({"k": call["k"][:0], "v": call["v"][:0]},
                   {"block_table": call["block_table"][:, :0]}):  # fmt: skip
        out, lse, _ = flash_attn_varlen_func(**(call | change), return_attn_probs=True)
        assert not out.any()
        assert bool((lse == float("inf")).all())
