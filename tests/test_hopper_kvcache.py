"""FlashAttention-3's ``flash_attn_with_kvcache``.

Where new rows land, how rows are rotated and what stays untouched is spelled out here once more,
sequence by sequence. Attention over the caches as they should then be is the reference's.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from support import INTERPRETED, cumulative, some
from test_extensions import FLOAT8, check
from test_extensions import Call as Solvable
from test_hostile_indices import INT32_MAX, INT32_MIN, Guarded, int32
from test_kvcache import (
    BF16,
    HALF,
    SINGLE,
    TOLERANCE,
    Call,
    assert_rounded_equal,
    on_device,
    rotated,
    run_child,
)
from test_kvcache import bits as wide_bits
from torch import Tensor

import flash_attn_interface as fa3
from flash_attn.core import reference
from flash_attn.core.problem import AttentionProblem, ScoreTransform, SequenceLayout, Visibility
from flash_attn.errors import ConstraintError

INF = float("inf")


def bits(x: Tensor) -> Tensor:
    """The bit patterns, of numbers of one byte too."""
    return x.detach().cpu().contiguous().view(torch.uint8) if x.itemsize == 1 else wide_bits(x)


@pytest.fixture
def guarded() -> Any:
    guards = Guarded()
    yield guards
    guards.check()


# A call ------------------------------------------------------------------------------------------


def make_call(
    dtype: torch.dtype = HALF,
    lengths: list[int] | None = None,
    new: int | list[int] | None = None,
    queries: int | list[int] = 2,
    capacity: int = 41,
    heads: tuple[int, int] = (4, 2),
    headdim: int = 32,
    headdim_v: int | None = None,
    page_size: int | None = None,
    rows: list[int] | None = None,
    rotary_dim: int = 0,
    **more: Any,
) -> Call:
    """Arguments on the CPU for three sequences.

    Lists of ``new`` or ``queries`` are packed. ``rows`` are of the cache or of the page table,
    which then hold two more that nobody uses; pages are shuffled and some belong to nobody.
    """
    lengths = [0, 7, 22] if lengths is None else lengths
    headdim_v = headdim if headdim_v is None else headdim_v
    batch = len(lengths)
    stored = batch if rows is None else max(rows) + 3
    call: Call = {"cache_seqlens": int32(*lengths)}
    shape = (stored, capacity)
    if page_size is not None:
        pages = -(-capacity // page_size)
        shape, capacity = (stored * pages + 3, page_size), pages * page_size
        order = torch.randperm(shape[0])[: stored * pages]
        call["page_table"] = order.view(stored, pages).int()
    if rows is not None:
        call["cache_batch_idx"] = int32(*rows)
    call["k_cache"] = torch.randn(*shape, heads[1], headdim).to(dtype)
    call["v_cache"] = torch.randn(*shape, heads[1], headdim_v).to(dtype)
    q_shape: tuple[int, ...] = (batch, queries) if isinstance(queries, int) else (sum(queries),)
    call["q"] = torch.randn(*q_shape, heads[0], headdim).to(dtype)
    if isinstance(queries, list):
        call |= {"cu_seqlens_q": cumulative(queries, "cpu"), "max_seqlen_q": max(queries)}
    if new is not None:
        new_shape: tuple[int, ...] = (batch, new) if isinstance(new, int) else (sum(new),)
        call["k"] = torch.randn(*new_shape, heads[1], headdim).to(dtype)
        call["v"] = torch.randn(*new_shape, heads[1], headdim_v).to(dtype)
        if isinstance(new, list):
            call["cu_seqlens_k_new"] = cumulative(new, "cpu")
    if rotary_dim:
        angle = torch.rand(capacity + 5, rotary_dim // 2) * 6.3
        tables = torch.float32 if dtype == FLOAT8 else dtype
        call["rotary_cos"], call["rotary_sin"] = angle.cos().to(tables), angle.sin().to(tables)
    return call | more


def segments(x: Tensor, bounds: Tensor | None) -> list[Tensor]:
    """The rows of each sequence, packed or not."""
    if bounds is None:
        return list(x)
    places = bounds.tolist()
    return [x[a:b] for a, b in itertools.pairwise(places)]


def is_masked(call: Call) -> bool:
    return bool(
        call.get("causal")
        or tuple(call.get("window_size", (-1, -1))) != (-1, -1)
        or call.get("attention_chunk")
    )


def place(call: Call, b: int, index: int) -> tuple[int, int] | None:
    """Where key ``index`` of sequence ``b`` lies in the cache; None if there is no such place."""
    table, k_cache = call.get("page_table"), call["k_cache"]
    row = int(call["cache_batch_idx"][b]) if "cache_batch_idx" in call else b
    if table is None:
        inside = 0 <= row < len(k_cache) and 0 <= index < k_cache.shape[1]
        return (row, index) if inside else None
    page_size = k_cache.shape[1]
    if not (0 <= row < len(table) and 0 <= index < table.shape[1] * page_size):
        return None
    page = int(table[row, index // page_size])
    return (page, index % page_size) if 0 <= page < len(k_cache) else None


def turned(call: Call, x: Tensor, positions: Tensor) -> Tensor:
    if "rotary_cos" not in call:
        return x
    interleaved = call.get("rotary_interleaved", True)
    wide = x.float() if x.dtype == FLOAT8 else x
    y = rotated(wide, call["rotary_cos"], call["rotary_sin"], positions, interleaved)
    return y.to(x.dtype)


def starts_of(call: Call) -> list[int]:
    """Each sequence's first position for rotation."""
    return call.get("rotary_seqlens", call["cache_seqlens"]).tolist()


def expected_caches(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The caches with the new rows, and which rows were written; others have no place."""
    k_cache, v_cache = (call[name].clone() for name in ("k_cache", "v_cache"))
    written = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
    if "k" not in call:
        return k_cache, v_cache, written
    ks, vs = (segments(call[name], call.get("cu_seqlens_k_new")) for name in ("k", "v"))
    for b, (length, start) in enumerate(
        zip(call["cache_seqlens"].tolist(), starts_of(call), strict=True)
    ):
        rows = turned(call, ks[b], start + torch.arange(len(ks[b])))
        for t in range(len(rows)):
            where = place(call, b, length + t)
            if where is not None:
                k_cache.view(torch.uint8)[where] = rows[t].contiguous().view(torch.uint8)
                v_cache.view(torch.uint8)[where] = vs[b][t].contiguous().view(torch.uint8)
                written[where] = True
    return k_cache, v_cache, written


def expected_queries(call: Call) -> Tensor:
    """All of a sequence at its start, unless a mask tells them apart."""
    parts = []
    for start, rows in zip(
        starts_of(call), segments(call["q"], call.get("cu_seqlens_q")), strict=True
    ):
        steps = torch.arange(len(rows)) * int(is_masked(call))
        parts.append(turned(call, rows, start + steps))
    join = torch.stack if "cu_seqlens_q" not in call else torch.cat
    if call["q"].dtype == FLOAT8:
        return join([x.view(torch.uint8) for x in parts]).view(FLOAT8)
    return join(parts)


def problem_after(call: Call, k_cache: Tensor, v_cache: Tensor) -> AttentionProblem:
    """What is attended to once everything is appended."""
    left, right = call.get("window_size", (-1, -1))
    scale = call.get("softmax_scale")
    width = call["q"].shape[-1] + (v_cache.shape[-1] if "qv" in call else 0)
    new = [len(x) for x in segments(call["k"], call.get("cu_seqlens_k_new"))] if "k" in call else 0
    transform = ScoreTransform(
        width**-0.5 if scale is None else scale,
        call.get("softcap", 0.0),
        attn_mask=call.get("attn_mask"),
        sinks=call.get("s_aux"),
        q_descale=call.get("q_descale"),
        k_descale=call.get("k_descale"),
        v_descale=call.get("v_descale"),
    )
    layout = SequenceLayout(
        cu_seqlens_q=call.get("cu_seqlens_q"),
        seqused_k=(call["cache_seqlens"] + torch.tensor(new)).int(),
        leftpad_k=call.get("cache_leftpad"),
        page_table=call.get("page_table"),
        cache_batch_idx=call.get("cache_batch_idx"),
        max_seqlen_q=call.get("max_seqlen_q", 0),
    )
    visibility = Visibility.from_window(
        left, right, call.get("causal", False), call.get("attention_chunk", 0)
    )
    return AttentionProblem(
        expected_queries(call), k_cache, v_cache, transform, visibility, layout,
        empty_lse=-INF, qv=call.get("qv"),
    )  # fmt: skip


def check_caches(call: Call, moved: Call) -> None:
    """V and unrotated K bit by bit, rotated K up to one rounding, and nothing else written."""
    k_cache, v_cache, written = expected_caches(call)
    assert torch.equal(bits(moved["v_cache"]), bits(v_cache))
    if "rotary_cos" not in call:
        assert torch.equal(bits(moved["k_cache"]), bits(k_cache))
        return
    got, rotary_dim = moved["k_cache"].cpu(), 2 * call["rotary_cos"].shape[1]
    view = torch.uint8 if got.dtype == FLOAT8 else got.dtype
    assert torch.equal(bits(got.view(view)[~written]), bits(call["k_cache"].view(view)[~written]))
    close = max(torch.finfo(got.dtype).eps, 1e-6)
    torch.testing.assert_close(
        got.float()[written], k_cache.float()[written], atol=close, rtol=close
    )
    assert torch.equal(
        bits(got.view(view)[..., rotary_dim:]), bits(k_cache.view(view)[..., rotary_dim:])
    )


def run_and_check(call: Call, device: str, guarded: Guarded | None = None) -> tuple[Tensor, Tensor]:
    """Run the call and hold everything it yields, and all that it wrote, against the reference."""
    moved = on_device(call, device) if guarded is None else guarded.call(call, device)
    before = {key: x.clone() for key, x in moved.items() if isinstance(x, Tensor)}
    out, lse, *partial = fa3.flash_attn_with_kvcache(**moved, return_softmax_lse=True)
    assert [x.numel() for x in partial] == [0, 0]
    check_caches(call, moved)
    for key, x in before.items():
        if key not in ("k_cache", "v_cache"):
            assert torch.equal(bits(moved[key]), bits(x)), f"{key} was changed"
    check_results(call, device, out, lse)
    return out, lse


def check_results(call: Call, device: str, out: Tensor, lse: Tensor) -> None:
    k_cache, v_cache, _ = expected_caches(call)
    problem = problem_after(call, k_cache, v_cache)
    dtype = call["q"].dtype
    if "rotary_cos" in call:
        # Rotation rounds q and k to their dtype, where a last bit may differ.
        true = reference.attention(problem)
        tolerance = 8e-2 if dtype == FLOAT8 else TOLERANCE[dtype]
        assert out.dtype == problem.result_dtype
        assert_rounded_equal(out, true.out, tolerance)
        assert_rounded_equal(lse, true.softmax_lse, tolerance)
        return
    tensors = {name: getattr(problem, name).to(device) for name in ("q", "k", "v")}
    if problem.qv is not None:
        tensors["qv"] = problem.qv.to(device)
    groups = {
        name: type(group)(*(x.to(device) if isinstance(x, Tensor) else x for x in group))
        for name, group in (("transform", problem.transform), ("layout", problem.layout))
    }
    state = torch.zeros(2, dtype=torch.int64, device=device)
    solvable = Solvable(problem._replace(**tensors, **groups), torch.zeros_like(out))
    check(solvable, {"out": out, "lse": lse, "rng_state": state})


# Lengths and appending ---------------------------------------------------------------------------

MASKS: dict[str, Call] = {
    "full": {},
    "causal": {"causal": True},
    "local": {"window_size": (6, 3)},
    "chunk": {"attention_chunk": 8},
    "causal-chunk": {"causal": True, "attention_chunk": 13},
}
ALL_DTYPES = [SINGLE, HALF] if INTERPRETED else [SINGLE, HALF, BF16]


@pytest.mark.parametrize("given", ["none", "int", "tensor"])
@pytest.mark.parametrize("queries", [1, [3, 0, 2]], ids=str)
def test_cache_seqlens(device: str, queries: int | list[int], given: str) -> None:
    call = make_call(lengths=[17, 17, 17] if given == "int" else [41, 41, 41], queries=queries)
    moved = on_device(call, device)
    if given == "none":
        moved["cache_seqlens"] = None
    elif given == "int":
        moved["cache_seqlens"] = 17
    out, lse, *_ = fa3.flash_attn_with_kvcache(**moved, return_softmax_lse=True)
    check_results(call, device, out, lse)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("mask", some(list(MASKS), ["causal-chunk"]))
@pytest.mark.parametrize("new", [1, 4, [5, 0, 19]], ids=str)
def test_append(device: str, new: int | list[int], mask: str, dtype: torch.dtype) -> None:
    run_and_check(make_call(dtype, new=new, **MASKS[mask]), device)


@pytest.mark.parametrize("page_size", [None, 1, 4, 128])
@pytest.mark.parametrize("new", [None, 3, [5, 0, 19]], ids=str)
@pytest.mark.parametrize("queries", [3, [9, 0, 2]], ids=str)
def test_pages(
    device: str, queries: int | list[int], new: int | list[int] | None, page_size: int | None
) -> None:
    """Packed or padded, on both sides, with rows of the cache or of the page table."""
    call = make_call(
        queries=queries, new=new, page_size=page_size, rows=[4, 0, 2], causal=True, num_splits=1
    )
    run_and_check(call, device)


@pytest.mark.parametrize("mask", some(list(MASKS), ["local"]))
@pytest.mark.parametrize("page_size", [None, 4])
def test_left_padding(device: str, page_size: int | None, mask: str) -> None:
    """Also on pages, with rows of the table, and where it leaves no key."""
    call = make_call(
        SINGLE, lengths=[4, 30, 33], new=3, page_size=page_size, rows=[1, 3, 0],
        cache_leftpad=int32(7, 0, 17), **MASKS[mask],
    )  # fmt: skip
    run_and_check(call, device)


def test_everything_left_of_the_padding(device: str) -> None:
    call = make_call(SINGLE, lengths=[4, 30, 33], cache_leftpad=int32(4, 30, 2))
    out, lse = run_and_check(call, device)
    assert bool((lse[:2] == -INF).all())
    assert not out[:2].any()


@pytest.mark.parametrize("rows", [3, 1, 9])
def test_page_tables_of_any_number_of_rows(device: str, rows: int) -> None:
    """Sequences share rows of the table, hence keys."""
    call = make_call(page_size=4, lengths=[40, 3, 17], rows=[rows - 1, 0, rows - 1])
    call["page_table"] = call["page_table"][:rows]
    run_and_check(call, device)


@pytest.mark.parametrize("queries", [70, [70, 0, 50]], ids=str)
def test_more_queries_than_the_cache_holds(device: str, queries: int | list[int]) -> None:
    """Upstream's second generation refuses it."""
    out, lse = run_and_check(make_call(queries=queries, causal=True), device)
    assert bool((lse == -INF).any())
    assert not out.isnan().any()


# Rotation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("mask", some(list(MASKS), ["full", "chunk"]))
@pytest.mark.parametrize("packed", [False, True])
def test_rotation(device: str, packed: bool, mask: str, dtype: torch.dtype) -> None:
    """Packed queries without a mask stand at their own sequence's start."""
    sizes: Call = {"queries": [2, 0, 4], "new": [5, 2, 0]} if packed else {"queries": 3, "new": 4}
    for interleaved in (True, False):
        call = make_call(dtype, rotary_dim=16, rotary_interleaved=interleaved, **sizes,
                         **MASKS[mask])  # fmt: skip
        run_and_check(call, device)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rotary_seqlens(device: str, causal: bool, packed: bool) -> None:
    """Positions of their own, for queries and keys alike; the rows land where they would."""
    sizes: Call = {"queries": [2, 0, 4], "new": [5, 2, 0]} if packed else {"queries": 3, "new": 4}
    starts = int32(40, 0, 11)
    call = make_call(SINGLE, rotary_dim=32, causal=causal, rotary_seqlens=starts, page_size=4,
                     **sizes)  # fmt: skip
    run_and_check(call, device)


def test_rotation_includes_the_left_padding(device: str) -> None:
    call = make_call(SINGLE, lengths=[4, 30, 33], new=3, rotary_dim=16, causal=True,
                     cache_leftpad=int32(4, 0, 17))  # fmt: skip
    run_and_check(call, device)


# Everything together -----------------------------------------------------------------------------


def _combinations(count: int) -> list[Call]:
    """A sample of the product of all options, the same every time."""
    choose = random.Random(5)
    calls = []
    for _ in range(count):
        option: Call = {
            "queries": choose.choice([1, 3, [4, 0, 2], [1, 1, 1]]),
            "new": choose.choice([None, 1, 5, [5, 0, 9], [0, 0, 1]]),
            "page_size": choose.choice([None, 1, 4, 128]),
            "rows": choose.choice([None, [4, 0, 2]]),
            "heads": choose.choice([(4, 2), (6, 1), (2, 2)]),
            "headdim_v": choose.choice([None, 48]),
            "num_splits": choose.choice([0, 1, 3]),
            "softcap": choose.choice([0.0, 4.0]),
            "pack_gqa": choose.choice([None, True, False]),
        }
        option |= MASKS[choose.choice(list(MASKS))]
        if choose.random() < 0.4:
            option["cache_leftpad"] = int32(0, 5, 22)
        if option["new"] is not None and choose.random() < 0.5:
            option |= {"rotary_dim": 16, "rotary_interleaved": choose.random() < 0.5}
            if choose.random() < 0.5:
                option["rotary_seqlens"] = int32(3, 0, 30)
        calls.append(option)
    return calls


@pytest.mark.parametrize("number", range(8 if INTERPRETED else 48))
def test_combinations(device: str, number: int) -> None:
    options = dict(_combinations(48)[number])
    dtype = ALL_DTYPES[number % len(ALL_DTYPES)]
    run_and_check(make_call(dtype, [2, 7, 27], **options), device)


# Head dims, float8, second product ---------------------------------------------------------------


@pytest.mark.parametrize("headdims", some([(64, 512), (192, 128), (59, 24)], [(59, 24)]), ids=str)
@pytest.mark.parametrize("page_size", [None, 4])
def test_head_dims_of_v(device: str, page_size: int | None, headdims: tuple[int, int]) -> None:
    headdim, headdim_v = headdims
    call = make_call(headdim=headdim, headdim_v=headdim_v, new=3, page_size=page_size, causal=True)
    out, _ = run_and_check(call, device)
    assert out.shape == (3, 2, 4, headdim_v)


@pytest.mark.parametrize("headdim", some([64, 128, 256], [64]))
@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("new", [None, [5, 0, 9]], ids=str)
def test_float8(device: str, new: list[int] | None, page_size: int | None, headdim: int) -> None:
    """Bytes are appended as they are; every number of a cache has its sequence's factor."""
    factors = 0.5 + torch.rand(3, 2)
    call = make_call(
        FLOAT8, headdim=headdim, new=new, page_size=page_size, causal=True, q_descale=factors,
        k_descale=factors * 1.5, v_descale=factors.flip(0),
    )  # fmt: skip
    out, _ = run_and_check(call, device)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("queries", [3, [2, 0, 4]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_float8_rotation(device: str, causal: bool, queries: int | list[int]) -> None:
    run_and_check(
        make_call(FLOAT8, new=[5, 0, 9], queries=queries, rotary_dim=16, causal=causal), device
    )


def test_float8_rotation_saturates(device: str) -> None:
    """Two entries at the largest number turn into one beyond it."""
    call = make_call(FLOAT8, lengths=[0, 0, 0], new=1, rotary_dim=16)
    call["k"] = torch.full((3, 1, 2, 32), 448.0).to(FLOAT8)
    angle = torch.full((46, 8), 3.14159 / 4)
    call |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
    moved = on_device(call, device)
    fa3.flash_attn_with_kvcache(**moved)
    row = moved["k_cache"][0, 0, 0].float()
    assert bool((row[1:16:2] == 448.0).all())
    assert bool((row[:16:2].abs() < 1.0).all())


@pytest.mark.parametrize("queries", [2, [2, 0, 4]], ids=str)
@pytest.mark.parametrize("page_size", [None, 4])
def test_qv(device: str, page_size: int | None, queries: int | list[int]) -> None:
    """Latent attention: one key head, a wide v that is part of the scores."""
    headdim_v = 48 if INTERPRETED else 512
    call = make_call(heads=(4, 1), headdim=64, headdim_v=headdim_v, new=2, page_size=page_size,
                     queries=queries, causal=True)  # fmt: skip
    call["qv"] = torch.randn(*call["q"].shape[:-1], headdim_v).half()
    run_and_check(call, device)


def test_sinks_and_masks(device: str) -> None:
    """Mask columns count keys from the first one in use."""
    bias = torch.randn(1, 4, 2, 41)
    call = make_call(
        SINGLE, lengths=[4, 30, 0], new=2, cache_leftpad=int32(2, 9, 0), s_aux=torch.randn(4)
    )
    run_and_check(call, device)
    run_and_check(call | {"attn_mask": bias}, device)
    run_and_check(call | {"attn_mask": bias > 0.0}, device)


# Hints and returns -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_splits", some([0, 1, 3, 256], [3]))
@pytest.mark.parametrize("page_size", [None, 16])
def test_splits(device: str, page_size: int | None, num_splits: int) -> None:
    call = make_call(capacity=300, lengths=[290, 40, 0], new=5, page_size=page_size, causal=True,
                     queries=3, num_splits=num_splits)  # fmt: skip
    run_and_check(call, device)


def test_hints_change_nothing_else(device: str) -> None:
    call = on_device(make_call(new=None, lengths=[30, 40, 0], heads=(8, 2)), device)
    want = fa3.flash_attn_with_kvcache(**call, num_splits=1)
    for hints in ({"pack_gqa": True}, {"pack_gqa": False}, {"sm_margin": 5}, {"num_splits": 7}):
        got = fa3.flash_attn_with_kvcache(**call, **({"num_splits": 1} | hints))
        assert_rounded_equal(got, want, TOLERANCE[HALF])
    assert isinstance(want, Tensor)


def test_scheduler_metadata(device: str) -> None:
    """Accepted by any call on its device, and without effect."""
    call = on_device(make_call(new=2), device)
    metadata = fa3.get_scheduler_metadata(
        3, 2, 41, 4, 2, 32, call["cache_seqlens"], torch.float16, max_seqlen_k_new=2, causal=True
    )
    assert (metadata.dtype, metadata.dim(), metadata.device.type) == (torch.int32, 1, device)
    want = fa3.flash_attn_with_kvcache(**call)
    for _ in range(2):
        got = fa3.flash_attn_with_kvcache(**call, scheduler_metadata=metadata)
        assert torch.equal(got, want)


def test_no_gradient_is_recorded(device: str) -> None:
    call = on_device(make_call(SINGLE, new=2), device)
    call["q"].requires_grad_()
    assert not fa3.flash_attn_with_kvcache(**call).requires_grad


def test_the_cache_counts_as_changed_only_if_it_is(device: str) -> None:
    """Autograd's version counter, which programs rely on."""
    call = on_device(make_call(SINGLE, lengths=[3, 4, 5]), device)
    version = call["k_cache"]._version
    fa3.flash_attn_with_kvcache(**call)
    assert call["k_cache"]._version == version
    call |= {
        "k": torch.zeros(3, 1, 2, 32, device=device),
        "v": torch.zeros(3, 1, 2, 32, device=device),
    }
    fa3.flash_attn_with_kvcache(**call)
    assert call["k_cache"]._version > version


# Empty and strided -------------------------------------------------------------------------------


def test_empty_cache(device: str) -> None:
    """+inf where there is no key at all, by the shapes."""
    for changes in ({"capacity": 0}, {"capacity": 0, "page_size": 4}):
        call = on_device(make_call(lengths=[0, 0, 0], **changes), device)
        out, lse, *_ = fa3.flash_attn_with_kvcache(**call, return_softmax_lse=True)
        assert not out.any()
        assert bool((lse == INF).all())
    out, lse, *_ = fa3.flash_attn_with_kvcache(
        **on_device(make_call(lengths=[0, 0, 0]), device), return_softmax_lse=True
    )
    assert bool((lse == -INF).all())


def test_packed_rows_for_a_cache_without_room(device: str) -> None:
    call = on_device(make_call(capacity=0, lengths=[0, 0, 0], new=[2, 0, 1]), device)
    assert not fa3.flash_attn_with_kvcache(**call).any()


def test_empty_batch_and_no_queries(device: str) -> None:
    call = on_device(make_call(new=2, rotary_dim=16), device)
    for name in ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens"):
        call[name] = call[name][:0]
    assert fa3.flash_attn_with_kvcache(**call).shape == (0, 2, 4, 32)
    call = make_call(new=[2, 0, 1], queries=[0, 0, 0], rotary_dim=16)
    moved = on_device(call, device)
    assert fa3.flash_attn_with_kvcache(**moved).shape == (0, 4, 32)
    check_caches(call, moved)


def test_rows_between_packed_sequences(device: str) -> None:
    """New rows and queries that belong to no sequence are neither written nor answered."""
    call = make_call(SINGLE, new=[5, 0, 9], queries=[4, 0, 2], rotary_dim=16)
    moved = on_device(call, device)
    for name in ("q", "k", "v"):
        rows = torch.full_like(moved[name][:4], float("nan"))
        moved[name] = torch.cat([moved[name], rows])
    out, lse, *_ = fa3.flash_attn_with_kvcache(**moved, return_softmax_lse=True)
    check_caches(call, moved)
    check_results(call, device, out[:6], lse[:, :6])
    assert not out[6:].any()


def test_strides(device: str) -> None:
    """Heads first, slices of wider tensors, and inputs whose last stride is not 1."""
    call = make_call(new=3, queries=3, page_size=4, rotary_dim=16, headdim_v=48)
    want = on_device(call, device)
    out = fa3.flash_attn_with_kvcache(**want)
    moved = on_device(call, device)
    for name in ("k_cache", "v_cache"):
        x = moved[name]
        wide = torch.full((*x.shape[:2], 5, x.shape[3] + 7), 7.0, device=device).half()
        view = wide.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 1:3, 3 : 3 + x.shape[3]]
        moved[name] = view.copy_(x)
    for name in ("q", "k", "v"):
        moved[name] = moved[name].mT.contiguous().mT
    table = torch.full((3, 40), 2**31 - 1, dtype=torch.int32, device=device)
    table[:, 2:24:2] = moved["page_table"]
    moved["page_table"] = table[:, 2:24:2]
    moved["cache_seqlens"] = torch.stack([moved["cache_seqlens"]] * 2, 1)[:, 0]
    assert torch.equal(fa3.flash_attn_with_kvcache(**moved), out)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(moved[name], want[name])


# Hostile values ----------------------------------------------------------------------------------

BOUNDS = {
    "decreasing": [0, 9, 4, 14],
    "negative": [-5, -1, 12, 14],
    "beyond": [0, 10, 26, 4000],
    "highest": [INT32_MAX, INT32_MIN, INT32_MAX, INT32_MAX],
    "lowest": [INT32_MIN, INT32_MIN, 3, INT32_MAX],
}


def finite(call: Call, device: str, guarded: Guarded) -> Call:
    moved = guarded.call(call, device)
    out = fa3.flash_attn_with_kvcache(**moved)
    guarded.check()
    assert bool(out.isfinite().all())
    return moved


@pytest.mark.parametrize("bounds", list(BOUNDS))
@pytest.mark.parametrize("page_size", [None, 4])
def test_hostile_bounds_of_new_rows(
    device: str, guarded: Guarded, page_size: int | None, bounds: str
) -> None:
    call = make_call(new=[5, 0, 9], page_size=page_size, rotary_dim=16, causal=True)
    finite(call | {"cu_seqlens_k_new": int32(*BOUNDS[bounds])}, device, guarded)


@pytest.mark.parametrize("bounds", list(BOUNDS))
@pytest.mark.parametrize("causal", [False, True])
def test_hostile_bounds_of_queries(
    device: str, guarded: Guarded, causal: bool, bounds: str
) -> None:
    call = make_call(new=2, queries=[5, 0, 9], rotary_dim=16, causal=causal)
    finite(call | {"cu_seqlens_q": int32(*BOUNDS[bounds])}, device, guarded)


@pytest.mark.parametrize("values", [(-1, INT32_MIN, 5), (INT32_MAX, 100, 46)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_hostile_positions(
    device: str, guarded: Guarded, causal: bool, values: tuple[int, ...]
) -> None:
    """Rotation takes the nearest row of its tables."""
    call = make_call(new=3, queries=3, rotary_dim=16, causal=causal, rotary_seqlens=int32(*values))
    run_and_check(call, device, guarded)


@pytest.mark.parametrize("rows", [(-1, 2, INT32_MIN), (3, 4, INT32_MAX)], ids=str)
@pytest.mark.parametrize("page_size", [None, 4])
def test_hostile_rows(
    device: str, guarded: Guarded, page_size: int | None, rows: tuple[int, ...]
) -> None:
    """Rows that the cache or the page table has not are not written."""
    call = make_call(new=[5, 0, 9], page_size=page_size)
    call["cache_batch_idx"] = int32(*rows)
    moved = finite(call, device, guarded)
    check_caches(call, moved)


@pytest.mark.parametrize("new", [5, [5, 0, 9]], ids=str)
@pytest.mark.parametrize("lengths", [[39, 41, 36], [INT32_MAX, -3, INT32_MIN]], ids=str)
def test_rows_that_do_not_fit_are_dropped(
    device: str, guarded: Guarded, lengths: list[int], new: int | list[int]
) -> None:
    call = make_call(lengths=lengths, new=new)
    moved = finite(call, device, guarded)
    check_caches(call, moved)


_CHECKED = """
import json, sys
import flash_attn_interface as fa3
from test_hopper_kvcache import on_device, wrong_contents
wrong = {}
for name, (call, text) in wrong_contents().items():
    try:
        fa3.flash_attn_with_kvcache(**on_device(call, DEVICE))
        wrong[name] = "did not raise"
    except RuntimeError as error:
        if text not in str(error):
            wrong[name] = repr(error)
print(json.dumps(wrong))
"""


def wrong_contents() -> dict[str, tuple[Call, str]]:
    """Name -> (call, what the message of checked mode must contain)."""
    packed = make_call(new=[5, 0, 9])
    paged = make_call(new=2, page_size=4, rows=[4, 0, 2])
    turning = make_call(new=2, rotary_dim=16)
    return {
        "no room": (make_call(new=2, lengths=[1, 40, 3]), "`k_cache` has room for 41"),
        "no room for packed rows": (packed | {"cache_seqlens": int32(37, 0, 0)}, "`k_cache`"),
        "no room on pages": (paged | {"cache_seqlens": int32(43, 0, 0)}, "`block_table`"),
        "decreasing": (packed | {"cu_seqlens_k_new": int32(0, 9, 4, 14)}, "`cu_seqlens_k_new`"),
        "beyond": (packed | {"cu_seqlens_k_new": int32(0, 9, 9, 15)}, "`cu_seqlens_k_new`"),
        "first bound": (packed | {"cu_seqlens_k_new": int32(1, 9, 9, 14)}, "`cu_seqlens_k_new`"),
        "rows": (paged | {"cache_batch_idx": int32(7, 0, 2)}, "`cache_batch_idx`"),
        "negative position": (turning | {"rotary_seqlens": int32(-1, 0, 2)}, "`rotary_seqlens"),
        "position": (turning | {"rotary_seqlens": int32(45, 0, 2)}, "`rotary_seqlens"),
        "padding": (make_call(cache_leftpad=int32(1, 0, 0)), "`cache_leftpad`"),
    }


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's tests run in a child already")
def test_checked_mode(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_CHECK", "1")
    assert run_child(_CHECKED.replace("DEVICE", repr(device))) == {}


# Errors ------------------------------------------------------------------------------------------


def wrong_calls() -> dict[str, tuple[Call, str]]:
    """Name -> (call, what the message must contain)."""
    good, packed = make_call(new=3), make_call(new=[5, 0, 9], queries=[3, 0, 2])
    paged, turning = make_call(new=3, page_size=4), make_call(new=3, rotary_dim=16)
    without = {key: x for key, x in good.items() if key not in ("k", "v")}
    tables = {name: turning[name] for name in ("rotary_cos", "rotary_sin")}
    return {
        "splits": (good | {"num_splits": 257}, "num_splits > 256 not supported"),
        "k without v": (good | {"v": None}, "value must also be passed in: `v` is None"),
        "v without k": (good | {"k": None}, "`v` is given without `k`"),
        "bounds without k": (
            without | {"cu_seqlens_k_new": packed["cu_seqlens_k_new"]},
            "`cu_seqlens_k_new` is given without `k`",
        ),
        "no lengths": (good | {"cache_seqlens": None}, "`cache_seqlens` is None"),
        "lengths": (good | {"cache_seqlens": 1.5}, "`cache_seqlens` must be an int"),
        "dtype of lengths": (
            good | {"cache_seqlens": torch.zeros(3)}, "`cache_seqlens` must have dtype int32"
        ),
        "shape of k": (good | {"k": good["k"][:2]}, "`k` must have shape (3, seqlen_new, 2, 32)"),
        "shape of v": (good | {"v": good["v"][..., :8]}, "`v` must have shape"),
        "seqlen of v": (good | {"v": good["v"][:, :2]}, "`v` must have seqlen 3"),
        "dtype of k": (good | {"k": good["k"].float()}, "`q` and `k` must have the same dtype"),
        "type of k": (good | {"k": 3}, "`k` must be a torch.Tensor or None"),
        "packed k with a batch": (
            packed | {"k": good["k"], "v": good["v"]}, "`k` must have shape (total_new, 2, 32)"
        ),
        "bounds of new rows": (
            packed | {"cu_seqlens_k_new": int32(0, 14)}, "`cu_seqlens_k_new` must have shape (4,)"
        ),
        "too many new rows": (
            make_call(new=42, lengths=[0, 0, 0]), "`k` must have seqlen <= the seqlen of the KV"
        ),
        "bound of queries": (
            packed | {"max_seqlen_q": None}, "max_seqlen_q must be provided if cu_seqlens_q is"
        ),
        "queries with a batch": (packed | {"q": good["q"]}, "`q` must have shape (total_q"),
        "rows of the table": (
            paged | {"page_table": paged["page_table"][:2]}, "`page_table` must have shape (3"
        ),
        "dtype of the table": (
            paged | {"page_table": paged["page_table"].long()}, "`page_table` must have dtype int32"
        ),
        "shape of the padding": (good | {"cache_leftpad": int32(1, 2)}, "`cache_leftpad`"),
        "shape of the rows": (good | {"cache_batch_idx": int32(1, 2)}, "`cache_batch_idx`"),
        "rotation without k": (without | tables, "If rotary cos/sin are provided"),
        "one table": (turning | {"rotary_sin": None}, "`rotary_sin` is None"),
        "positions without tables": (
            good | {"rotary_seqlens": int32(1, 2, 3)}, "`rotary_seqlens` is given without"
        ),
        "shape of positions": (
            turning | {"rotary_seqlens": int32(1, 2)}, "`rotary_seqlens` must have shape (3,)"
        ),
        "short tables": (
            turning | {name: x[:40] for name, x in tables.items()}, "`rotary_cos` has 40 rows"
        ),
        "dtype of tables": (
            turning | {name: x.float() for name, x in tables.items()},
            "rotary_cos must have the same dtype as query",
        ),
        "odd tables": (
            turning | {name: x[:, :5].contiguous() for name, x in tables.items()},
            "Only rotary dimensions divisible by 16",
        ),
        "wide tables": (
            turning | {name: x.repeat(1, 4) for name, x in tables.items()},
            "rotary_dim must be <= headdim",
        ),
        "metadata": (good | {"scheduler_metadata": torch.zeros(1)}, "`scheduler_metadata`"),
        "cache strides": (
            good | {"k_cache": good["k_cache"].mT.contiguous().mT},
            "`k_cache` must have a contiguous last dimension",
        ),
        "qv": (good | {"qv": good["q"][..., :8]}, "`qv` must have shape"),
        "descale": (good | {"k_descale": torch.ones(3, 2)}, "`k_descale` is for float8"),
        "head dim of the cache": (good | {"k_cache": good["k_cache"][..., :16]}, "head dim 32"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(wrong_calls()))
def test_errors(device: str, name: str) -> None:
    call, text = wrong_calls()[name]
    moved = on_device(call, device)
    caches = [moved[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(ConstraintError) as caught:
        fa3.flash_attn_with_kvcache(**moved)
    assert text in str(caught.value)
    for name, cache in zip(("k_cache", "v_cache"), caches, strict=True):
        assert torch.equal(moved[name], cache)


# The private function ----------------------------------------------------------------------------


def test_private_forward_appends(device: str) -> None:
    """Over a cache it takes everything at once, a used length of the queries besides."""
    call = make_call(
        SINGLE, new=[5, 0, 9], queries=[3, 0, 2], page_size=4, rotary_dim=16, causal=True
    )
    moved = on_device(call, device)
    out, lse, *rest = fa3._flash_attn_forward(
        moved["q"], moved["k_cache"], moved["v_cache"], moved["k"], moved["v"],
        cu_seqlens_q=moved["cu_seqlens_q"], cu_seqlens_k_new=moved["cu_seqlens_k_new"],
        seqused_k=moved["cache_seqlens"], max_seqlen_q=3, page_table=moved["page_table"],
        rotary_cos=moved["rotary_cos"], rotary_sin=moved["rotary_sin"], causal=True, num_splits=0,
    )  # fmt: skip
    assert [x.numel() for x in rest] == [0, 0]
    check_caches(call, moved)
    check_results(call, device, out, lse)


def test_private_forward_refuses_to_append_to_packed_keys(device: str) -> None:
    x, bounds = torch.zeros(8, 2, 16, device=device), int32(0, 3, 8).to(device)
    with pytest.raises(ConstraintError):
        fa3._flash_attn_forward(
            x, x, x, x, x, cu_seqlens_q=bounds, cu_seqlens_k=bounds, cu_seqlens_k_new=bounds,
            max_seqlen_q=5, max_seqlen_k=5, seqused_k=int32(1, 1).to(device),
        )  # fmt: skip
