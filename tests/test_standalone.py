"""The standalone API against the reference in float64, within the error budget.

Every test states its problem by hand, beside the parameters; nothing is translated by the code
under test. Outputs start as NaN. On a Hopper GPU what the original supports is asked for strictly.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import support
import torch
from support import cumulative, pick
from torch import Tensor

from flash_attn.core.problem import (
    AttentionProblem,
    ScoreTransform,
    SequenceLayout,
    Visibility,
)
from flash_attn.core.rotary import rotate
from flash_attn.standalone import (
    AttentionMode,
    DataType,
    FlashAttentionParams,
    flash_attention_forward,
    get_last_error_message,
    validate_params,
)

HALF, BF16, FLOAT8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn
DTYPES = {HALF: DataType.FP16, BF16: DataType.BF16, FLOAT8: DataType.FP8_E4M3}
NAN, INFINITE = float("nan"), float("inf")
_GROUPS = {"transform": ScoreTransform, "visibility": Visibility, "layout": SequenceLayout}


def hopper(device: str) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def but(problem: AttentionProblem, **changes: Any) -> AttentionProblem:
    """A copy with other fields of the problem or of its groups."""
    for group, kind in _GROUPS.items():
        inner = {name: changes.pop(name) for name in kind._fields if name in changes}
        problem = problem._replace(**{group: getattr(problem, group)._replace(**inner)})
    return problem._replace(**changes)


def dense(
    device: str,
    dtype: torch.dtype = HALF,
    seqlens: tuple[int, int] = (33, 70),
    heads: tuple[int, int] = (4, 2),
    headdim: int = 64,
    batch: int = 2,
    **more: Any,
) -> AttentionProblem:
    """A problem on (batch, seqlen, heads, headdim) tensors of random numbers."""
    shapes = [(seqlens[0], heads[0]), (seqlens[1], heads[1]), (seqlens[1], heads[1])]
    q, k, v = (torch.randn(batch, n, h, headdim).to(dtype).to(device) for n, h in shapes)
    problem = AttentionProblem(q, k, v, ScoreTransform(headdim**-0.5), empty_lse=-INFINITE)
    return but(problem, **more)


def packed(
    device: str,
    lengths_q: list[int],
    lengths_k: list[int],
    dtype: torch.dtype = HALF,
    padding: int = 0,
    **more: Any,
) -> AttentionProblem:
    """The same on packed tensors; ``padding`` rows at the end belong to no sequence."""
    rows = (sum(lengths_q) + padding, sum(lengths_k) + padding)
    heads = more.pop("heads", (4, 2))
    problem = dense(device, dtype, rows, heads, more.pop("headdim", 64), batch=1)
    q, k, v = (x[0] for x in problem[:3])
    bounds = {"cu_seqlens_q": cumulative(lengths_q, device),
              "cu_seqlens_k": cumulative(lengths_k, device)}  # fmt: skip
    lengths = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    return but(problem, q=q, k=k, v=v, **bounds, **lengths, **more)


def ints(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def params_of(problem: AttentionProblem, **fields: Any) -> FlashAttentionParams:
    """q, k, v, bounds and type of ``problem``, poisoned outputs, and ``fields``."""
    shape, device = problem.out_shape, problem.q.device
    params = FlashAttentionParams(
        q=problem.q,
        k=problem.k,
        v=problem.v,
        out=torch.full(shape, NAN, dtype=problem.result_dtype, device=device),
        softmax_lse=torch.full(problem.lse_shape, NAN, device=device),
        cu_seqlens_q=problem.layout.cu_seqlens_q,
        cu_seqlens_k=problem.layout.cu_seqlens_k,
        dtype=DTYPES[problem.q.dtype],
    )
    for name, value in fields.items():
        assert hasattr(params, name), name
        setattr(params, name, value)
    return params


def run(params: FlashAttentionParams, strict: bool = False, stream: Any = None) -> None:
    """Make the call; it succeeds, and it was valid."""
    assert validate_params(params, strict=strict) == 0, get_last_error_message()
    code = flash_attention_forward(params, stream, strict=strict)
    assert code == 0, (code, get_last_error_message())
    assert get_last_error_message() == ""


def check(
    problem: AttentionProblem, params: FlashAttentionParams, rng_state: Tensor | None = None
) -> None:
    """``params.out`` and ``params.softmax_lse`` solve ``problem`` within the error budget."""
    out = params.out.reshape(problem.out_shape)
    with torch.no_grad():
        true, _ = support.exact_answer(problem, out, rng_state)
        same = support.plain_answer(problem, out, rng_state)["out"]
    norm = torch.linalg.vector_norm(problem.v.float().nan_to_num(0.0, 0.0, 0.0))
    floor = 0.5 * torch.finfo(torch.float32).eps * float(norm) / max(problem.v.numel(), 1) ** 0.5
    support.check_error("out", out, true["out"], same, 2.0, floor)
    if params.softmax_lse is not None:
        slack = support.float8_score_error(problem)
        support.check_lse(params.softmax_lse, true["lse"], slack)


def run_and_check(
    problem: AttentionProblem, supported: bool = False, **fields: Any
) -> FlashAttentionParams:
    """Both; ``supported`` by the original, so that a Hopper GPU runs it strictly."""
    params = params_of(problem, **fields)
    run(params, strict=supported and hopper(problem.q.device.type))
    assert validate_params(params) == 0 or not supported
    check(problem, params)
    return params


# The supported configurations -------------------------------------------------------------------


@pytest.mark.parametrize("headdim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_causal_prefill(device: str, headdim: int, heads: tuple[int, int]) -> None:
    length = pick(device, 65, 513)
    problem = dense(device, HALF, (length, length), heads, headdim, window_right=0)
    run_and_check(problem, supported=True, is_causal=True)


@pytest.mark.parametrize("heads", [(16, 2), (16, 16), (16, 1)])
def test_decode(device: str, heads: tuple[int, int]) -> None:
    problem = dense(device, HALF, (1, pick(device, 300, 2048)), heads, 128, batch=4)
    run_and_check(problem, supported=True, mode=AttentionMode.DECODE)


def test_decode_of_a_long_context(device: str) -> None:
    keys = pick(device, 4096, 32768)
    run_and_check(dense(device, HALF, (1, keys), (16, 2), 128), supported=True)
    problem = dense(device, HALF, (1, keys), (16, 2), 128, num_splits=0)
    run_and_check(problem, num_splits=0)


@pytest.mark.parametrize("dtype", [HALF, FLOAT8])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(device: str, dtype: torch.dtype, causal: bool) -> None:
    """Lengths of 0 and rows that belong to no sequence: those become 0 with a -inf log-sum-exp."""
    lengths_q, lengths_k = [5, 0, 40, 1, 7], [30, 4, 40, 17, 0]
    more = {"window_right": 0} if causal else {}
    problem = packed(device, lengths_q, lengths_k, dtype, padding=3, **more)
    fields = {"is_causal": causal, "total_q": 56, "total_k": 94, "batch_size": 5}
    params = run_and_check(problem, supported=True, **fields)
    assert params.softmax_lse.shape == (4, 56)
    assert not params.out[-10:].any()
    assert (params.softmax_lse[:, -10:] == -INFINITE).all()


def test_packed_sequences_need_no_lengths_beside_their_bounds(device: str) -> None:
    problem = packed(device, [5, 40], [30, 40], window_right=0)
    given = {"seqlen_q": 0, "seqlen_k": 0, "is_causal": True}
    bare = run_and_check(problem, supported=True, **given)
    hinted = run_and_check(problem, supported=True, **given, max_seqlen_q=40, max_seqlen_k=40)
    ignored = run_and_check(problem, supported=True, is_causal=True, seqlen_q=1, seqlen_k=2)
    for other in (hinted, ignored):
        assert torch.equal(bare.out, other.out)
        assert torch.equal(bare.softmax_lse, other.softmax_lse)


@pytest.mark.parametrize("window", [(-1, -1), (9, 4), (9, -1), (-1, 4), (0, 0), (9, 0), (0, -1)])
@pytest.mark.parametrize("seqlens", [(33, 70), (70, 33)])
def test_windows_where_minus_1_is_without_limit(
    device: str, window: tuple[int, int], seqlens: tuple[int, int]
) -> None:
    left, right = (None if x < 0 else x for x in window)
    problem = dense(device, HALF, seqlens, window_left=left, window_right=right)
    run_and_check(problem, supported=True, window_size_left=window[0], window_size_right=window[1])


def test_used_lengths(device: str) -> None:
    used_q, used_k = ints(device, 20, 33, 0), ints(device, 70, 0, 12)
    problem = dense(device, batch=3, seqused_q=used_q, seqused_k=used_k)
    for b, (rows, keys) in enumerate(zip(used_q.tolist(), used_k.tolist(), strict=True)):
        problem.q[b, rows:] = NAN
        problem.k[b, keys:] = INFINITE
        problem.v[b, keys:] = NAN
    params = run_and_check(problem, supported=True, seqused_q=used_q, seqused_k=used_k)
    assert not params.out[0, 20:].any()
    packed_problem = packed(device, [5, 9], [8, 11], seqused_q=used_q[:2], seqused_k=used_k[::2])
    clamped = but(packed_problem, seqused_q=ints(device, 5, 9), seqused_k=ints(device, 8, 11))
    run_and_check(
        clamped, supported=True, seqused_q=ints(device, 20, 9), seqused_k=ints(device, 70, 12)
    )


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.2])
def test_softmax_scale_of_0_is_the_default(device: str, scale: float) -> None:
    problem = dense(device, softmax_scale=scale or 64**-0.5)
    run_and_check(problem, supported=True, softmax_scale=scale)


def test_no_log_sum_exp_is_asked_for(device: str) -> None:
    run_and_check(dense(device), supported=True, softmax_lse=None)


# FP8 --------------------------------------------------------------------------------------------


def descales(device: str, batch: int, heads: int) -> Tensor:
    return (0.25 + torch.rand(batch, heads)).to(device)


@pytest.mark.parametrize("headdim", [64, 96, 128])
@pytest.mark.parametrize("out_dtype", [BF16, HALF])
def test_float8_with_one_descale(device: str, headdim: int, out_dtype: torch.dtype) -> None:
    factors = torch.tensor([0.5, 1.5, 0.7], device=device)
    q, k, v = (x.expand(2, 2) for x in factors)
    problem = dense(
        device, FLOAT8, headdim=headdim, out_dtype=out_dtype, q_descale=q, k_descale=k, v_descale=v
    )
    q, k, v = factors[0:1], factors[1:2], factors[2]  # one element, whatever its shape
    run_and_check(problem, supported=True, q_descale_ptr=q, k_descale_ptr=k, v_descale_ptr=v)


def test_float8_without_descales_is_itself(device: str) -> None:
    run_and_check(dense(device, FLOAT8), supported=True)


def test_float8_descales_by_kv_head(device: str) -> None:
    q, k, v = (descales(device, 3, 2) for _ in range(3))
    more = {"batch": 3, "q_descale": q, "k_descale": k, "v_descale": v}
    problem = dense(device, FLOAT8, (20, 40), (16, 2), 128, **more)
    fields: dict[str, Any] = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        fields |= {f"{name}_descale_ptr": x, f"{name}_descale_batch_stride": 2}
        fields |= {f"{name}_descale_head_stride": 1}
    run_and_check(problem, supported=True, **fields)
    transposed = q.t().contiguous()  # stored heads first: other strides, same factors
    fields |= {"q_descale_ptr": transposed}
    fields |= {"q_descale_batch_stride": 1, "q_descale_head_stride": 3}
    run_and_check(problem, supported=True, **fields)


@pytest.mark.parametrize("is_packed", [False, True])
def test_float8_query_descales_by_query_head(device: str, is_packed: bool) -> None:
    """(batch, num_heads) with strides (num_heads, 1), at 16 query heads on 2 KV heads."""
    q, k, v = descales(device, 3, 16), descales(device, 3, 2), descales(device, 3, 2)
    more = {"heads": (16, 2), "headdim": 128, "q_descale": q, "k_descale": k, "v_descale": v}
    if is_packed:
        problem = packed(device, [5, 0, 20], [30, 4, 20], FLOAT8, **more)
    else:
        problem = dense(device, FLOAT8, (20, 40), batch=3, **more)
    fields = {
        "q_descale_ptr": q, "q_descale_batch_stride": 16, "q_descale_head_stride": 1,
        "k_descale_ptr": k, "k_descale_batch_stride": 2, "k_descale_head_stride": 1,
        "v_descale_ptr": v, "v_descale_batch_stride": 2, "v_descale_head_stride": 1,
    }  # fmt: skip
    params = run_and_check(problem, supported=True, **fields)
    by_kv_head = but(problem, q_descale=q[:, :2])
    with pytest.raises(AssertionError):
        check(by_kv_head, params)


def test_float8_descales_of_a_sequence_or_of_a_head(device: str) -> None:
    by_sequence, by_head = descales(device, 3, 1), descales(device, 1, 2)
    problem = dense(
        device, FLOAT8, batch=3, k_descale=by_sequence.expand(3, 2), v_descale=by_head.expand(3, 2)
    )
    run_and_check(
        problem, supported=True,
        k_descale_ptr=by_sequence, k_descale_batch_stride=1, k_descale_head_stride=0,
        v_descale_ptr=by_head, v_descale_batch_stride=0, v_descale_head_stride=1,
    )  # fmt: skip


@pytest.mark.parametrize("pages", [False, True])
def test_float8_descales_of_a_cache(device: str, pages: bool) -> None:
    """Few queries on keys in use, contiguous or on pages; q's factors by query head."""
    q, k, v = descales(device, 2, 8), descales(device, 2, 2), descales(device, 2, 2)
    used = ints(device, 64, 37)
    problem = dense(device, FLOAT8, (2, 64), (8, 2), 128, seqused_k=used, window_right=0)
    if pages:
        problem = paged(problem, 32, None)
    problem = but(problem, q_descale=q, k_descale=k, v_descale=v)
    fields: dict[str, Any] = {"page_table": problem.layout.page_table}
    for name, x in (("q", q), ("k", k), ("v", v)):
        fields |= {f"{name}_descale_ptr": x, f"{name}_descale_head_stride": 1}
        fields |= {f"{name}_descale_batch_stride": x.shape[1]}
    run_and_check(problem, is_causal=True, seqused_k=used, **fields)


@pytest.mark.parametrize("headdim", [16, 48, 192, 256])
def test_float8_of_other_head_dims(device: str, headdim: int) -> None:
    run_and_check(dense(device, FLOAT8, headdim=headdim, window_right=0), is_causal=True)


# What strict refuses and strict=False computes --------------------------------------------------


@pytest.mark.parametrize("headdim", [1, 8, 32, 40, 80, 111, 160, 224])
def test_other_head_dims(device: str, headdim: int) -> None:
    run_and_check(dense(device, HALF, headdim=headdim, window_right=0), is_causal=True)


def test_bfloat16(device: str) -> None:
    run_and_check(dense(device, BF16, window_right=0), is_causal=True)


@pytest.mark.parametrize("softcap", [5.0, 30.0])
def test_softcap(device: str, softcap: float) -> None:
    problem = dense(device, softcap=softcap)
    problem = problem._replace(q=problem.q * 8)
    params = run_and_check(problem, softcap=softcap)
    with pytest.raises(AssertionError):
        check(but(problem, softcap=0.0), params)


@pytest.mark.parametrize("window", [(5, -1), (5, 0), (5, 9), (-1, 9)])
def test_causal_together_with_a_window(device: str, window: tuple[int, int]) -> None:
    left = None if window[0] < 0 else window[0]
    problem = dense(device, window_left=left, window_right=0)
    run_and_check(problem, is_causal=True, window_size_left=window[0], window_size_right=window[1])


def _wide(x: Tensor) -> Tensor:
    """The same numbers inside rows that are longer than their own."""
    return torch.cat([x, torch.full_like(x, NAN)], dim=-1)[..., : x.shape[-1]]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("view", ["neither", "q", "out", "both", "strided"])
def test_pack_gqa_in_both_views(device: str, view: str, is_packed: bool) -> None:
    """(..., KV heads, group, head dim): head h of the plain view is [h // group, h % group]."""
    heads = (6, 2)
    problem = (
        packed(device, [5, 20], [30, 20], heads=heads) if is_packed else dense(device, heads=heads)
    )
    params = params_of(problem, pack_gqa=True)
    plain = torch.full_like(problem.q, NAN)
    if view in ("q", "both", "strided"):
        params.q = problem.q.unflatten(-2, (2, 3))
    if view in ("out", "both"):
        params.out = plain.unflatten(-2, (2, 3))
    if view == "strided":
        params.q = _wide(params.q).transpose(-3, -2).contiguous().transpose(-3, -2)
        params.out = _wide(plain).unflatten(-2, (2, 3))
    run(params)
    check(problem, params)
    if view == "both":
        without_hint = params_of(problem, q=params.q, out=torch.full_like(params.out, NAN))
        run(without_hint)
        check(problem, without_hint)


def test_an_output_whose_heads_lie_apart_is_refused(device: str) -> None:
    problem = dense(device, heads=(6, 2))
    out = torch.empty(2, 33, 3, 2, 64, dtype=HALF, device=device).transpose(-3, -2)
    params = params_of(problem, out=out)
    assert flash_attention_forward(params, strict=False) == -8
    assert "`out`" in get_last_error_message()


@pytest.mark.parametrize("splits", [-1, 0, 2, 4, 7, 256])
def test_split_kv(device: str, splits: int) -> None:
    for seqlens in ((1, 300), (33, 70)):
        problem = dense(device, HALF, seqlens, num_splits=max(splits, 0))
        run_and_check(problem, num_splits=splits)
    run_and_check(packed(device, [5, 0, 9], [70, 4, 9]), num_splits=splits)


def test_split_kv_of_a_long_sequence(device: str) -> None:
    keys = pick(device, 4099, 65537 + 99)
    problem = dense(device, HALF, (3, keys), (4, 2), 128, window_right=0, num_splits=4)
    params = run_and_check(problem, num_splits=4, is_causal=True)
    unsplit = run_and_check(problem, supported=True, is_causal=True)
    support.assert_close(params.out, unsplit.out, HALF)


def paged(problem: AttentionProblem, page_size: int, rows: list[int] | None) -> AttentionProblem:
    """The same dense problem with its keys on shuffled pages; other pages are NaN."""
    device = str(problem.q.device)
    batch, capacity = problem.k.shape[:2]
    pages = capacity // page_size
    order = torch.randperm(batch * pages + 2)[: batch * pages]
    used = list(range(batch)) if rows is None else rows
    table = torch.full((max(used) + 1, pages), 2**31 - 1, dtype=torch.int32)
    table[used] = order.view(batch, pages).int()
    stored = []
    for x in (problem.k, problem.v):
        pool = torch.full((batch * pages + 2, page_size, *x.shape[2:]), NAN, device=device)
        pool[order.to(device)] = x.float().reshape(batch * pages, page_size, *x.shape[2:])
        stored.append(pool.to(x.dtype))
    index = None if rows is None else ints(device, *rows)
    return but(
        problem, k=stored[0], v=stored[1], page_table=table.to(device), cache_batch_idx=index
    )


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
@pytest.mark.parametrize("rows", [None, [3, 1]])
def test_pages(device: str, page_size: int, rows: list[int] | None) -> None:
    used = ints(device, 64, 23)
    problem = paged(dense(device, HALF, (5, 64), window_right=0, seqused_k=used), page_size, rows)
    layout = problem.layout
    fields = {"page_table": layout.page_table, "kv_batch_idx": layout.cache_batch_idx}
    run_and_check(problem, is_causal=True, seqused_k=used, **fields)
    run_and_check(problem, is_causal=True, seqused_k=used, page_size=page_size, seqlen_k=64,
                  **fields)  # fmt: skip


def test_pages_of_which_the_last_is_not_full(device: str) -> None:
    problem = paged(dense(device, HALF, (5, 64), window_right=0), 16, None)
    shorter = but(problem, seqused_k=ints(device, 50, 50))
    run_and_check(
        shorter, is_causal=True, page_table=problem.layout.page_table, page_size=16, seqlen_k=50
    )


def test_pages_with_packed_queries(device: str) -> None:
    base = paged(dense(device, HALF, (5, 64)), 16, None)
    q = packed(device, [3, 9], [64, 23]).q
    bounds = {"cu_seqlens_q": cumulative([3, 9], device)}
    bounds["cu_seqlens_k"] = cumulative([64, 23], device)
    problem = but(base, q=q, window_right=0, max_seqlen_q=9, **bounds)
    run_and_check(problem, is_causal=True, page_table=base.layout.page_table)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
@pytest.mark.parametrize("state_dtype", [torch.int64, torch.uint64])
def test_dropout_fills_the_state(device: str, dropout_p: float, state_dtype: torch.dtype) -> None:
    problem = dense(device, dropout_p=dropout_p, window_right=0)
    state = torch.zeros(2, dtype=torch.int64, device=device).view(state_dtype)
    params = params_of(problem, p_dropout=dropout_p, rng_state=state, is_causal=True)
    run(params)
    state = state.view(torch.int64)
    assert state.any()
    check(problem, params, state.clone())
    with pytest.raises(AssertionError):
        check(but(problem, dropout_p=0.0), params)
    before = params.out.clone()
    run(params)
    assert not torch.equal(before, params.out), "every call draws anew"
    run(params_of(problem, p_dropout=dropout_p))  # nobody asks for the state


def test_the_state_is_left_alone_without_dropout(device: str) -> None:
    state = torch.full((2,), 7, device=device)
    run_and_check(dense(device), supported=True, rng_state=state)
    assert state.tolist() == [7, 7]


@pytest.mark.parametrize("shape", [(2, 4, 33, 70), (1, 1, 33, 70), (2, 1, 1, 70), (1, 4, 33, 1)])
@pytest.mark.parametrize("kind", [torch.bool, HALF, torch.float32])
def test_attention_mask(device: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
    mask = torch.randn(shape).to(device)
    mask = mask > -0.7 if kind == torch.bool else mask.masked_fill(mask < -1.0, -INFINITE).to(kind)
    problem = dense(device, attn_mask=mask)
    params = run_and_check(problem, attn_mask=mask)
    with pytest.raises(AssertionError):
        check(but(problem, attn_mask=None), params)


@pytest.mark.parametrize("size", [(40, 50), (64, 64)])
def test_attention_mask_of_packed_sequences(device: str, size: tuple[int, int]) -> None:
    mask = torch.randn(3, 1, *size).to(device) > -0.7
    problem = packed(device, [5, 0, 40], [30, 4, 50], attn_mask=mask)
    run_and_check(problem, attn_mask=mask)
    run_and_check(problem, attn_mask=mask, max_seqlen_q=40, max_seqlen_k=50)


def test_left_padding(device: str) -> None:
    pads, used = ints(device, 9, 0, 70), ints(device, 40, 70, 70)
    problem = dense(device, batch=3, leftpad_k=pads, seqused_k=used, window_right=0)
    problem.k[0, :9], problem.v[0, :9], problem.v[0, 40:] = NAN, INFINITE, NAN
    run_and_check(problem, is_causal=True, leftpad_k=pads, seqused_k=used)
    whole = but(problem, seqused_k=None)
    whole.v[0, 40:], whole.v[0, :9] = 1.0, NAN
    run_and_check(whole, is_causal=True, leftpad_k=pads)


# Appending --------------------------------------------------------------------------------------


def appended(
    problem: AttentionProblem,
    k_new: Tensor,
    v_new: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    interleaved: bool,
) -> AttentionProblem:
    """The dense problem after appending and turning: what the reference then solves."""
    used, q, k, v = problem.layout.seqused_k, problem.q, problem.k.clone(), problem.v.clone()
    assert used is not None
    if tables is not None:
        cos, sin = tables
        k_new = rotate(k_new, cos, sin, seqlen_offsets=used, interleaved=interleaved)
        turned = [
            rotate(q[:, i : i + 1], cos, sin, interleaved=interleaved,
                   seqlen_offsets=used + (i if problem.visibility != Visibility() else 0))
            for i in range(q.shape[1])
        ]  # fmt: skip
        q = torch.cat(turned, dim=1)
    for b, start in enumerate(used.tolist()):
        k[b, start : start + k_new.shape[1]] = k_new[b]
        v[b, start : start + k_new.shape[1]] = v_new[b]
    return but(problem, q=q, k=k, v=v, seqused_k=used + k_new.shape[1])


def _tables(device: str, rows: int, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, rotary_dim // 2) * 6.28
    return angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    kind = torch.uint8 if a.element_size() == 1 else torch.int16
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT8])
@pytest.mark.parametrize("causal", [False, True])
def test_appending(device: str, dtype: torch.dtype, causal: bool) -> None:
    used = ints(device, 12, 66)
    more = {"window_right": 0} if causal else {}
    problem = dense(device, dtype, (3, 70), seqused_k=used, **more)
    k_new, v_new = (torch.randn(2, 4, 2, 64).to(dtype).to(device) for _ in range(2))
    expected = appended(problem, k_new, v_new, None, False)
    params = params_of(problem, is_causal=causal, seqused_k=used, k_new=k_new, v_new=v_new)
    run(params)
    check(expected, params)
    assert _same_bits(params.k, expected.k)
    assert _same_bits(params.v, expected.v)
    assert used.tolist() == [12, 66]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 64])
def test_rotary_embedding_of_appended_keys_and_queries(
    device: str, interleaved: bool, causal: bool, rotary_dim: int
) -> None:
    used = ints(device, 0, 60)
    more = {"window_right": 0} if causal else {}
    problem = dense(device, HALF, (5, 70), seqused_k=used, **more)
    k_new, v_new = (torch.randn(2, 5, 2, 64).to(HALF).to(device) for _ in range(2))
    cos, sin = _tables(device, 70, rotary_dim, HALF)
    expected = appended(problem, k_new, v_new, (cos, sin), interleaved)
    params = params_of(
        problem, is_causal=causal, seqused_k=used, k_new=k_new, v_new=v_new, seqlen_knew=5,
        rotary_cos=cos, rotary_sin=sin, rotary_dim=rotary_dim, is_rotary_interleaved=interleaved,
    )  # fmt: skip
    run(params)
    check(expected, params)
    torch.testing.assert_close(params.k, expected.k, rtol=2e-3, atol=2e-3)
    assert torch.equal(params.v, expected.v)


@pytest.mark.parametrize("table_dtype", [BF16, torch.float32])
def test_rotary_tables_beside_float8(device: str, table_dtype: torch.dtype) -> None:
    used = ints(device, 0, 60)
    problem = dense(device, FLOAT8, (5, 70), seqused_k=used, window_right=0)
    k_new, v_new = (torch.randn(2, 5, 2, 64).to(FLOAT8).to(device) for _ in range(2))
    cos, sin = _tables(device, 70, 32, table_dtype)
    turned = appended(but(problem, q=problem.q.float(), k=problem.k.float(), v=problem.v.float()),
                      k_new.float(), v_new.float(), (cos.float(), sin.float()), False)  # fmt: skip
    expected = but(turned, q=turned.q.to(FLOAT8), k=turned.k.to(FLOAT8), v=turned.v.to(FLOAT8))
    params = params_of(
        problem, is_causal=True, seqused_k=used, k_new=k_new, v_new=v_new,
        rotary_cos=cos, rotary_sin=sin,
    )  # fmt: skip
    run(params)
    # One value in many may fall on the other side of a rounding step.
    assert (params.k.float() == expected.k.float()).float().mean() > 0.999
    check(but(expected, k=params.k), params)


@pytest.mark.parametrize("rows", [None, [3, 1]])
def test_appending_to_pages(device: str, rows: list[int] | None) -> None:
    used = ints(device, 12, 58)
    flat = dense(device, HALF, (3, 64), seqused_k=used, window_right=0)
    k_new, v_new = (torch.randn(2, 4, 2, 64).to(HALF).to(device) for _ in range(2))
    problem = paged(flat, 16, rows)
    layout = problem.layout
    fields = {"page_table": layout.page_table, "kv_batch_idx": layout.cache_batch_idx}
    params = params_of(problem, is_causal=True, seqused_k=used, k_new=k_new, v_new=v_new, **fields)
    run(params)
    check(appended(flat, k_new, v_new, None, False), params)


def test_appending_to_pages_with_packed_queries(device: str) -> None:
    used = ints(device, 12, 58)
    flat = dense(device, HALF, (3, 64), seqused_k=used, window_right=0)
    k_new, v_new = (torch.randn(2, 4, 2, 64).to(HALF).to(device) for _ in range(2))
    after = appended(flat, k_new, v_new, None, False)
    q = flat.q.flatten(0, 1)
    problem = but(flat, q=q, cu_seqlens_q=cumulative([3, 3], device))
    pages = paged(problem, 16, None)
    for by_bounds in (False, True):
        params = params_of(
            pages, is_causal=True, k_new=k_new, v_new=v_new,
            page_table=pages.layout.page_table, cu_seqlens_k=cumulative([12, 58], device),
            seqused_k=None if by_bounds else used, k=pages.k.clone(), v=pages.v.clone(),
        )  # fmt: skip
        run(params)
        check(but(after, q=q, cu_seqlens_q=problem.layout.cu_seqlens_q, max_seqlen_q=3), params)


def test_cache_rows_by_index(device: str) -> None:
    rows, used = ints(device, 3, 0), ints(device, 12, 60)
    problem = dense(device, HALF, (3, 70), batch=4, window_right=0)
    problem = but(problem, q=problem.q[:2], cache_batch_idx=rows, seqused_k=used)
    run_and_check(problem, is_causal=True, kv_batch_idx=rows, seqused_k=used)


# Sizes, layouts, state --------------------------------------------------------------------------


def test_sizes_may_be_given_or_left_to_the_tensors(device: str) -> None:
    problem = dense(device)
    sizes = {"batch_size": 2, "seqlen_q": 33, "seqlen_k": 70}
    sizes |= {"num_heads": 4, "num_heads_k": 2, "head_dim": 64}
    given, inferred = params_of(problem, **sizes), params_of(problem)
    for params in (given, inferred):
        run(params, strict=hopper(device))
    assert torch.equal(given.out, inferred.out)
    assert inferred.batch_size == 0, "parameters are not changed"


@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd", "packed_slice", "storage_offset_1"])
def test_strided_tensors(device: str, layout: str) -> None:
    place = support.WRITABLE_LAYOUTS[layout]
    problem = dense(device)
    placed = problem._replace(q=place(problem.q), k=place(problem.k), v=place(problem.v))
    params = params_of(placed, out=place(torch.full_like(problem.q, NAN)))
    params.softmax_lse = torch.full((2, 33, 4), NAN, device=device).transpose(1, 2)
    run(params, strict=hopper(device))
    check(problem, params)


@pytest.mark.parametrize(
    "sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["batch", "queries", "keys"]
)
def test_empty_tensors(device: str, sizes: tuple[int, int, int]) -> None:
    batch, *seqlens = sizes
    problem = dense(device, HALF, (seqlens[0], seqlens[1]), batch=batch)
    params = run_and_check(problem, supported=True)
    assert not params.out.any()
    assert (params.softmax_lse == -INFINITE).all()


def test_inputs_stay_as_they_are_and_need_no_gradient(device: str) -> None:
    problem = dense(device)
    copies = [x.clone() for x in problem[:3]]
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    params = params_of(problem)
    params.q, params.k, params.v = leaves
    run(params, strict=hopper(device))
    check(problem, params)
    assert not params.out.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(copies, leaves, strict=True))


def test_a_refused_call_writes_nothing(device: str) -> None:
    params = params_of(dense(device), pack_gqa=True)
    assert flash_attention_forward(params) == -10
    assert params.out.isnan().all()
    assert params.softmax_lse.isnan().all()


# Addresses and array interfaces ------------------------------------------------------------------


class Interface:
    """Another library's array on a tensor's memory."""

    def __init__(self, x: Tensor, typestr: str, stream: int | None = None) -> None:
        self.x = x
        self.__cuda_array_interface__ = {
            "shape": tuple(x.shape),
            "strides": tuple(step * x.element_size() for step in x.stride()),
            "typestr": typestr,
            "data": (x.data_ptr(), False),
            "version": 3,
            "stream": stream,
        }


_RAW = {"|u1": torch.uint8, "<i2": torch.int16, "<u2": torch.uint16, "<f2": HALF}
_RAW |= {"<i4": torch.int32, "<i8": torch.int64}


@pytest.fixture
def reads_addresses(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, stand in for what PyTorch does with GPU memory: views of addresses."""
    if device == "cuda":
        return
    as_tensor = torch.as_tensor

    def view(x: Any, *arguments: Any, **options: Any) -> Tensor:
        interface = getattr(x, "__cuda_array_interface__", None)
        if isinstance(x, Tensor) or interface is None:
            return as_tensor(x, *arguments, **options)
        dtype, shape = _RAW[interface["typestr"]], interface["shape"]
        size = math.prod(shape) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(interface["data"][0])
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    monkeypatch.setattr(torch, "as_tensor", view)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


SIZES = {
    "batch_size": 2, "seqlen_q": 33, "seqlen_k": 70, "num_heads": 4, "num_heads_k": 2,
    "head_dim": 64,
}  # fmt: skip


def addresses(params: FlashAttentionParams) -> dict[str, Tensor]:
    """Replace every tensor in ``params`` by its address; returns the tensors."""
    found = {name: x for name, x in vars(params).items() if isinstance(x, Tensor)}
    for name, x in found.items():
        setattr(params, name, x.data_ptr())
    return found


@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT8])
def test_addresses(device: str, reads_addresses: None, dtype: torch.dtype) -> None:
    factors = descales(device, 2, 4) if dtype == FLOAT8 else None
    problem = dense(device, dtype, q_descale=factors, seqused_k=ints(device, 70, 20))
    params = params_of(problem, **SIZES, seqused_k=problem.layout.seqused_k, q_descale_ptr=factors)
    if factors is not None:
        params.q_descale_batch_stride, params.q_descale_head_stride = 4, 1
    tensors = addresses(params)
    run(params, strict=hopper(device) and dtype != BF16)
    params.out, params.softmax_lse = tensors["out"], tensors["softmax_lse"]
    check(problem, params)


def test_addresses_of_packed_sequences(device: str, reads_addresses: None) -> None:
    problem = packed(device, [5, 0, 40], [30, 4, 50], window_right=0)
    params = params_of(
        problem, num_heads=4, num_heads_k=2, head_dim=64, batch_size=3, total_q=45, total_k=84,
        is_causal=True,
    )  # fmt: skip
    tensors = addresses(params)
    run(params, strict=hopper(device))
    params.out, params.softmax_lse = tensors["out"], tensors["softmax_lse"]
    check(problem, params)


def test_addresses_of_pages_new_keys_tables_and_state(device: str, reads_addresses: None) -> None:
    used = ints(device, 12, 58)
    flat = dense(device, HALF, (3, 64), seqused_k=used, window_right=0)
    k_new, v_new = (torch.randn(2, 4, 2, 64, device=device).to(HALF) for _ in range(2))
    cos, sin = _tables(device, 64, 32, HALF)
    problem = paged(flat, 16, None)
    sizes = {**SIZES, "seqlen_q": 3, "seqlen_k": 64, "total_k": 16 * problem.k.shape[0]}
    params = params_of(
        problem, **sizes, is_causal=True, seqused_k=used, k_new=k_new, v_new=v_new, seqlen_knew=4,
        page_table=problem.layout.page_table, page_size=16, rotary_cos=cos, rotary_sin=sin,
        rotary_dim=32, p_dropout=0.25, rng_state=torch.zeros(2, dtype=torch.int64, device=device),
    )  # fmt: skip
    tensors = addresses(params)
    run(params)
    params.out, params.softmax_lse = tensors["out"], tensors["softmax_lse"]
    expected = but(appended(flat, k_new, v_new, (cos, sin), False), dropout_p=0.25)
    check(expected, params, tensors["rng_state"])


@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT8])
def test_array_interfaces(device: str, reads_addresses: None, dtype: torch.dtype) -> None:
    problem = dense(device, dtype)
    params = params_of(problem)
    out = params.out
    typestr = {HALF: "<f2", BF16: "<u2", FLOAT8: "|u1"}[dtype]
    raw = {HALF: torch.float16, BF16: torch.uint16, FLOAT8: torch.uint8}[dtype]
    for name in ("q", "k", "v"):
        setattr(params, name, Interface(getattr(params, name).view(raw), typestr))
    params.out = Interface(out.view(torch.float16), "<f2" if dtype == HALF else "<i2")
    run(params)
    params.out = out
    check(problem, params)


# On the GPU alone -------------------------------------------------------------------------------

gpu = pytest.mark.gpu


@gpu
def test_addresses_of_other_memory_have_a_code() -> None:
    params = params_of(dense("cuda"), **SIZES)
    host = torch.zeros(2 * 33 * 4 * 64, dtype=HALF)
    params.q = host.data_ptr()
    assert flash_attention_forward(params, strict=False) == -100
    assert get_last_error_message()


@gpu
@pytest.mark.parametrize("kind", ["stream", "handle", "none", "default"])
def test_streams(kind: str) -> None:
    """The call is ordered on its own stream: after the writing there, before the reading."""
    problem = dense("cuda", HALF, (512, 512), (16, 16), 128)
    side = torch.cuda.Stream()
    stream = {"stream": side, "handle": side.cuda_stream, "none": None, "default": 0}[kind]
    running = torch.cuda.default_stream() if kind == "default" else side
    params = params_of(problem)
    run(params, strict=hopper("cuda"))  # compiles
    exact_q, params.q = problem.q, torch.zeros_like(problem.q)
    params.out.fill_(NAN)
    torch.cuda.synchronize()
    with torch.cuda.stream(running):
        torch.cuda._sleep(50_000_000)  # a call on another stream would see the zeros
        params.q.copy_(exact_q)
    with torch.cuda.stream(side if kind == "none" else torch.cuda.Stream()):
        run(params, strict=hopper("cuda"), stream=stream)
    running.synchronize()
    check(problem, params)


@gpu
def test_array_interfaces_name_the_stream_of_their_producer() -> None:
    problem = dense("cuda", HALF, (512, 512), (16, 16), 128)
    producer = torch.cuda.Stream()
    params = params_of(problem)
    run(params)  # compiles
    exact_q, q = problem.q, torch.zeros_like(problem.q)
    params.out.fill_(NAN)
    torch.cuda.synchronize()
    with torch.cuda.stream(producer):
        torch.cuda._sleep(50_000_000)
        q.copy_(exact_q)
    params.q = Interface(q, "<f2", producer.cuda_stream)
    run(params, stream=torch.cuda.Stream())
    torch.cuda.synchronize()
    check(problem, params)


@gpu
def test_bad_streams_have_a_code() -> None:
    params = params_of(dense("cuda"))
    for stream in ("stream", 1.5, True, -1):
        assert flash_attention_forward(params, stream, strict=False) == -8
        assert "`stream`" in get_last_error_message()


@gpu
def test_calls_do_not_wait_for_the_gpu() -> None:
    dense_params = params_of(dense("cuda"))
    packed_params = params_of(packed("cuda", [5, 40], [30, 40]), p_dropout=0.1)
    packed_params.rng_state = torch.zeros(2, dtype=torch.int64, device="cuda")
    page_params = params_of(paged(dense("cuda", HALF, (5, 64)), 16, None), seqlen_k=50)
    page_params.page_table = ints("cuda", 0, 1, 2, 3, 4, 5, 6, 7).view(2, 4)
    page_params.k_new = page_params.v_new = torch.zeros(2, 1, 2, 64, dtype=HALF, device="cuda")
    page_params.seqused_k = ints("cuda", 3, 9)
    calls = (dense_params, packed_params, page_params)
    for params in calls:
        run(params)  # compiles
    with support.no_synchronisation():
        for params in calls:
            run(params)


@gpu
def test_calls_can_be_captured_in_a_graph() -> None:
    problem = packed("cuda", [5, 40], [30, 40], window_right=0)
    params = params_of(problem, is_causal=True)
    run(params)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(params)
    params.out.fill_(NAN)
    params.softmax_lse.fill_(NAN)
    graph.replay()
    check(problem, params)


@gpu
def test_tensors_may_be_freed_after_the_call() -> None:
    problem = dense("cuda", HALF, (512, 512), (16, 16), 128)
    side = torch.cuda.Stream()
    run(params_of(problem))  # compiles
    params = params_of(problem, q=problem.q.clone(), k=problem.k.clone(), v=problem.v.clone())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
    run(params, stream=side)
    params.q = params.k = params.v = None
    scribbled = [torch.full_like(problem.k, NAN) for _ in range(6)]
    side.synchronize()
    check(problem, params)
    assert scribbled


@gpu
def test_tensors_on_two_devices_have_a_code() -> None:
    params = params_of(dense("cuda"))
    params.v = params.v.cpu()
    assert validate_params(params) == -24
    assert flash_attention_forward(params, strict=False) == -24
    assert "`v`" in get_last_error_message()


@gpu
def test_strict_runs_on_hopper_alone() -> None:
    params = params_of(dense("cuda"))
    assert flash_attention_forward(params) == (0 if hopper("cuda") else -23)
    on_cpu = params_of(dense("cpu"))
    assert flash_attention_forward(on_cpu) == -23
