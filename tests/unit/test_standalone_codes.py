"""Every code of the standalone API: alone, before later ones, with a message that names the field.

Integer addresses make calls whose numbers alone are right or wrong; nothing is ever read from them.
There is no GPU in these tests, whatever the machine has.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

from flash_attn import settings, standalone
from flash_attn.standalone import (
    AttentionMode,
    DataType,
    FlashAttentionParams,
    flash_attention_forward,
    get_error_string,
    get_last_error_message,
    get_workspace_size,
    validate_params,
)
from flash_attn.standalone.params import ERROR_STRINGS

ADDRESS = 4096
CODES = [0, *range(-1, -25, -1), -100]
Change = Callable[[FlashAttentionParams], None]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def at_addresses(**changes: Any) -> FlashAttentionParams:
    """A call that is right in every respect, on addresses."""
    params = FlashAttentionParams(
        q=ADDRESS,
        k=2 * ADDRESS,
        v=2 * ADDRESS,
        out=3 * ADDRESS,
        batch_size=2,
        seqlen_q=8,
        seqlen_k=16,
        num_heads=4,
        num_heads_k=2,
        head_dim=64,
    )
    return change(params, **changes)


def on_tensors(element: torch.dtype = torch.float16, /, **changes: Any) -> FlashAttentionParams:
    """The same on CPU tensors; sizes are left to them."""
    q, k, v = (torch.randn(2, n, h, 64).to(element) for n, h in ((8, 4), (16, 2), (16, 2)))
    out = torch.empty(q.shape, dtype=torch.bfloat16 if element.itemsize == 1 else element)
    return change(FlashAttentionParams(q=q, k=k, v=v, out=out), **changes)


def change(params: FlashAttentionParams, **changes: Any) -> FlashAttentionParams:
    for name, value in changes.items():
        assert hasattr(params, name), name
        setattr(params, name, value)
    return params


def wrong_type(params: FlashAttentionParams) -> None:
    """softmax_lse in float64, of the right shape if there is one."""
    shape = (params.batch_size, params.num_heads, params.seqlen_q)
    packed = params.cu_seqlens_q is not None
    sizes = (params.num_heads, params.total_q) if packed else shape
    params.softmax_lse = torch.zeros([max(n, 0) for n in sizes], dtype=torch.float64)


def setting(**changes: Any) -> Change:
    return lambda params: change(params, **changes) and None


# Code -> what breaks that rule alone, and the field that the message must name.
STRICT: dict[int, tuple[Change, str]] = {
    -1: (setting(k=None), "k"),
    -2: (setting(head_dim=80), "head_dim"),
    -3: (setting(dtype=DataType.FP8_E4M3, head_dim=192), "head_dim"),
    -4: (setting(num_heads_k=8), "num_heads_k"),
    -5: (setting(num_heads=6, num_heads_k=4), "num_heads"),
    -6: (setting(cu_seqlens_q=ADDRESS, total_q=9, total_k=9, cu_seqlens_k=None), "cu_seqlens_q"),
    -7: (setting(cu_seqlens_q=ADDRESS, cu_seqlens_k=ADDRESS, total_q=9, total_k=0), "total_k"),
    -8: (setting(batch_size=-2), "batch_size"),
    -9: (setting(v_descale_ptr=ADDRESS, v_descale_head_stride=-1), "v_descale_ptr"),
    -10: (setting(pack_gqa=True), "pack_gqa"),
    -11: (setting(softcap=30.0), "softcap"),
    -12: (setting(p_dropout=0.1), "p_dropout"),
    -13: (setting(num_splits=4), "num_splits"),
    -14: (setting(page_table=ADDRESS, page_size=64), "page_table"),
    -15: (setting(rotary_cos=ADDRESS, rotary_sin=ADDRESS, rotary_dim=64), "rotary_cos"),
    -16: (setting(is_causal=True, window_size_left=256), "window_size_left"),
    -17: (setting(attn_mask=ADDRESS), "attn_mask"),
    -18: (setting(leftpad_k=ADDRESS), "leftpad_k"),
    -19: (setting(k_new=ADDRESS, v_new=ADDRESS, seqlen_knew=128), "k_new"),
    -20: (setting(dtype=DataType.BF16), "dtype"),
    -21: (setting(dtype=DataType.FP8_E5M2), "dtype"),
    -22: (setting(dtype=7), "dtype"),
    -24: (wrong_type, "softmax_lse"),
}
# These set the same field: a call can break only one of them.
EXCLUSIVE = ({-20, -21, -22}, {-3, -20}, {-3, -21}, {-3, -22})


def test_a_right_call_has_no_code() -> None:
    assert validate_params(at_addresses()) == 0
    assert get_last_error_message() == ""
    for head_dim in (64, 96, 128, 192, 256):
        assert validate_params(at_addresses(head_dim=head_dim)) == 0
        float8 = at_addresses(head_dim=head_dim, dtype=DataType.FP8_E4M3)
        assert validate_params(float8) == (0 if head_dim <= 128 else -3)
    packed = {"cu_seqlens_q": ADDRESS, "cu_seqlens_k": ADDRESS, "total_q": 9, "total_k": 9}
    assert validate_params(at_addresses(**packed, seqlen_q=0, seqlen_k=0)) == 0
    assert validate_params(at_addresses(window_size_left=256)) == 0
    assert validate_params(at_addresses(mode="whatever")) == 0


@pytest.mark.parametrize("code", STRICT)
def test_one_broken_rule_gives_its_code(code: int) -> None:
    breaks, field = STRICT[code]
    params = at_addresses()
    breaks(params)
    assert validate_params(params) == code
    assert f"`{field}`" in get_last_error_message()


@pytest.mark.parametrize("first", STRICT)
def test_of_several_broken_rules_the_first_in_order_wins(first: int) -> None:
    for second in STRICT:
        if second >= first or any({first, second} <= both for both in EXCLUSIVE):
            continue
        params = at_addresses()
        for code in (second, first):
            STRICT[code][0](params)
        assert validate_params(params) == first, (second, get_last_error_message())
        assert flash_attention_forward(params) == first


def test_every_rule_broken_at_once_gives_the_first() -> None:
    params = at_addresses()
    for code in reversed(STRICT):
        STRICT[code][0](params)
    assert validate_params(params) == -1


def test_a_gpu_of_another_kind_is_refused_by_the_call_alone_and_only_when_strict() -> None:
    for params in (at_addresses(), on_tensors()):
        assert validate_params(params) == 0
        assert flash_attention_forward(params) == -23
        assert "Hopper" in get_last_error_message()
    assert flash_attention_forward(on_tensors(), strict=False) == 0


def test_architecture_comes_after_the_type_and_before_agreement() -> None:
    wrong = on_tensors(out=torch.empty(2, 8, 4, 64))
    assert validate_params(wrong) == -24
    assert flash_attention_forward(wrong) == -23
    assert flash_attention_forward(wrong, strict=False) == -24
    assert flash_attention_forward(change(wrong, dtype=7)) == -22


def test_failures_of_the_launch_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash_attention_forward(at_addresses(), strict=False) == -100
    assert "no GPU" in get_last_error_message()

    def fail(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("flash_attn.standalone.launch.attend", fail)
    assert flash_attention_forward(on_tensors(), strict=False) == -100
    assert "illegal memory access" in get_last_error_message()
    assert flash_attention_forward(on_tensors(softcap=-1.0), strict=False) == -11


# Sizes, shapes, strides, types ------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


SHARED = zeros(2, 8, 4, 64)
TENSOR_FAULTS: list[tuple[int, dict[str, Any], str]] = [
    # contradictory sizes
    (-8, {"batch_size": 3}, "`q`.*batch_size = 3.*`batch_size` differs"),
    (-8, {"seqlen_q": 9}, "`q`.*`seqlen_q` differs"),
    (-8, {"seqlen_k": 15}, "`k`.*`seqlen_k` differs"),
    (-8, {"num_heads": 8}, "`q`.*`num_heads` differs"),
    (-8, {"num_heads_k": 4}, "`k`.*`num_heads_k` differs"),
    (-8, {"head_dim": 128}, "`q`.*`head_dim` differs"),
    (-8, {"v": zeros(2, 15, 2, 64)}, "`v`.*`seqlen_k` differs"),
    (-8, {"v": zeros(2, 16, 2, 96)}, "`v`.*`head_dim` differs"),
    (-8, {"out": zeros(2, 8, 2, 64)}, "`out`.*`num_heads` differs"),
    (-8, {"out": zeros(16, 4, 64)}, "`out`.*4 dimensions"),
    (-8, {"softmax_lse": zeros(2, 8, 4)}, "`softmax_lse`.*num_heads"),
    (-8, {"seqused_k": ints(1, 2, 3)}, "`seqused_k`.*batch_size"),
    (-8, {"seqused_q": zeros(2, 1, dtype=torch.int32)}, "`seqused_q`.*1 dimensions"),
    # strides
    (-8, {"q": zeros(2, 8, 4, 128)[..., ::2]}, "`q`.*contiguous"),
    (-8, {"k": zeros(2, 16, 64, 2).transpose(2, 3)}, "`k`.*contiguous"),
    (-8, {"out": zeros(2, 8, 64, 4).transpose(2, 3)}, "`out`.*contiguous"),
    (-8, {"out": zeros(2, 8, 1, 64).expand(2, 8, 4, 64)}, "`out`.*overlap"),
    (-8, {"softmax_lse": torch.zeros(2, 1, 8).expand(2, 4, 8)}, "`softmax_lse`.*overlap"),
    (-8, {"seqused_k": ints(1, 2, 3, 4)[::2]}, "`seqused_k`.*contiguous"),
    # the same memory
    (-8, {"q": SHARED, "out": SHARED}, "`out`.*`q`"),
    # numbers that are none
    (-8, {"seqlen_q": "8"}, "`seqlen_q`.*integer"),
    (-8, {"max_seqlen_k": 1.5}, "`max_seqlen_k`.*integer"),
    (-8, {"max_seqlen_q": -1}, "`max_seqlen_q`.*negative"),
    (-8, {"window_size_left": None}, "`window_size_left`"),
    (-8, {"q_descale_batch_stride": 2**63}, "`q_descale_batch_stride`"),
    (-8, {"softmax_scale": float("nan")}, "`softmax_scale`"),
    (-8, {"is_causal": zeros(2)}, "`is_causal`"),
    # descales
    (-9, {"q_descale_ptr": torch.ones(1)}, "`q_descale_ptr`.*FP8"),
    # types and devices
    (-24, {"q": zeros(2, 8, 4, 64, dtype=torch.float32)}, "`q`.*float16.*float32"),
    (-24, {"v": zeros(2, 16, 2, 64, dtype=torch.bfloat16)}, "`v`.*float16.*bfloat16"),
    (-24, {"out": zeros(2, 8, 4, 64, dtype=torch.bfloat16)}, "`out`.*float16"),
    (-24, {"softmax_lse": zeros(2, 4, 8)}, "`softmax_lse`.*float32"),
    (-24, {"seqused_k": torch.tensor([1, 2])}, "`seqused_k`.*int32.*int64"),
    (-24, {"k": torch.zeros(2, 16, 2, 64, device="meta", dtype=torch.float16)}, "`k`.*meta"),
    (-24, {"seqused_q": "lengths"}, "`seqused_q`.*str"),
    (-24, {"softmax_lse": True}, "`softmax_lse`.*bool"),
    (-24, {"softmax_lse": -8}, "`softmax_lse`.*-8"),
    (-24, {"out": zeros(2, 8, 4, 64).to_sparse()}, "`out`.*strided"),
]


@pytest.mark.parametrize(("code", "changes", "message"), TENSOR_FAULTS)
@pytest.mark.parametrize("strict", [True, False])
def test_faults_of_tensors(code: int, changes: dict[str, Any], message: str, strict: bool) -> None:
    params = on_tensors(**changes)
    assert validate_params(params, strict=strict) == code
    text = get_last_error_message()
    assert re.search(message, text), text
    if code != -24 or not strict:
        assert flash_attention_forward(params, strict=strict) == code


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"seqlen_q": 0}, "seqlen_q"),
        ({"seqlen_k": 0}, "seqlen_k"),
        ({"num_heads": 0, "num_heads_k": 0}, "num_heads"),
        ({"num_heads_k": 0}, "num_heads_k"),
        ({"seqlen_k": -16}, "seqlen_k"),
    ],
)
def test_sizes_of_addresses_must_be_given(changes: dict[str, Any], field: str) -> None:
    assert validate_params(at_addresses(**changes)) == -8
    assert f"`{field}`" in get_last_error_message()


def test_head_dim_of_addresses_must_be_given() -> None:
    assert validate_params(at_addresses(head_dim=0)) == -2
    assert validate_params(at_addresses(head_dim=0), strict=False) == -2
    assert validate_params(at_addresses(head_dim=257), strict=False) == -2


def test_one_tensor_gives_the_sizes_to_addresses() -> None:
    sizes = dict.fromkeys(("batch_size", "seqlen_q", "num_heads", "head_dim"), 0)
    params = at_addresses(**sizes, q=torch.zeros(2, 8, 4, 64, dtype=torch.float16))
    assert validate_params(params) == 0


@pytest.mark.parametrize("total", ["total_q", "total_k"])
@pytest.mark.parametrize("size", [0, -3])
def test_packed_addresses_need_both_totals(total: str, size: int) -> None:
    packed = {"cu_seqlens_q": ADDRESS, "cu_seqlens_k": ADDRESS, "total_q": 9, "total_k": 9}
    assert validate_params(at_addresses(**{**packed, total: size})) == -7
    assert f"`{total}`" in get_last_error_message()


def on_packed_tensors(**changes: Any) -> FlashAttentionParams:
    q, k = (zeros(n, h, 64) for n, h in ((12, 4), (20, 2)))
    bounds = {"cu_seqlens_q": ints(0, 5, 12), "cu_seqlens_k": ints(0, 7, 20)}
    return change(FlashAttentionParams(q=q, k=k, v=k, out=zeros(12, 4, 64), **bounds), **changes)


@pytest.mark.parametrize(
    ("code", "changes", "message"),
    [
        (0, {}, ""),
        (0, {"seqlen_q": 999, "seqlen_k": -5}, ""),  # ignored, as documented
        (-6, {"cu_seqlens_q": None}, "cu_seqlens_k"),
        (-8, {"total_q": 13}, "`q`.*total_q"),
        (-8, {"total_k": 19}, "`k`.*total_k"),
        (-8, {"batch_size": 3}, "cu_seqlens_q.*batch_size"),
        (-8, {"cu_seqlens_k": ints(0, 20)}, "cu_seqlens_k.*batch_size"),
        (-8, {"softmax_lse": torch.zeros(2, 4, 12)}, "softmax_lse"),
        (-24, {"cu_seqlens_q": torch.tensor([0, 5, 12])}, "cu_seqlens_q.*int32"),
        # padded tensors instead of packed ones
        (-8, {"k": zeros(2, 13, 2, 64)}, "`k`.*3 dimensions"),
        (-8, {"q": zeros(2, 7, 4, 64), "num_heads": 4, "num_heads_k": 2}, "`q`"),
    ],
)
def test_faults_of_packed_tensors(code: int, changes: dict[str, Any], message: str) -> None:
    assert validate_params(on_packed_tensors(**changes)) == code
    assert re.search(message, get_last_error_message())


FLOAT8 = {"dtype": DataType.FP8_E4M3}


@pytest.mark.parametrize(
    ("code", "name", "value", "strides"),
    [
        (0, "q_descale_ptr", torch.ones(1), (0, 0)),
        (0, "q_descale_ptr", torch.ones(()), (0, 0)),
        (0, "q_descale_ptr", torch.ones(2, 2), (2, 1)),
        (0, "q_descale_ptr", torch.ones(2, 4), (4, 1)),  # by query head
        (0, "k_descale_ptr", torch.ones(2, 2), (2, 1)),
        (0, "k_descale_ptr", torch.ones(4), (2, 1)),
        (0, "k_descale_ptr", torch.ones(2, 8), (8, 1)),  # gaps between rows
        (0, "k_descale_ptr", torch.ones(2, 2).t(), (1, 2)),
        (0, "k_descale_ptr", torch.ones(2), (1, 0)),
        (0, "k_descale_ptr", torch.ones(2), (0, 1)),
        (0, "k_descale_ptr", torch.ones(1, 2).expand(2, 2), (0, 1)),
        (-9, "q_descale_ptr", torch.ones(2, 4), (0, 0)),
        (-9, "q_descale_ptr", torch.ones(2, 2), (4, 1)),
        (-9, "q_descale_ptr", torch.ones(2, 4), (2, 1)),
        (-9, "q_descale_ptr", torch.ones(2, 3), (3, 1)),
        (-9, "k_descale_ptr", torch.ones(2, 4), (2, 1)),
        (-9, "k_descale_ptr", torch.ones(3), (2, 1)),
        (-9, "k_descale_ptr", torch.ones(2, 2).t(), (2, 1)),
        (-9, "v_descale_ptr", torch.ones(2, 2), (-2, 1)),
        (-9, "v_descale_ptr", torch.ones(0), (0, 0)),
        (-24, "v_descale_ptr", torch.ones(1, dtype=torch.float16), (0, 0)),
    ],
)
def test_descales(code: int, name: str, value: torch.Tensor, strides: tuple[int, int]) -> None:
    stem = name.removesuffix("_ptr")
    given = {name: value, f"{stem}_batch_stride": strides[0], f"{stem}_head_stride": strides[1]}
    params = on_tensors(torch.float8_e4m3fn, **FLOAT8, **given)
    if name == "q_descale_ptr" and strides == (3, 1):
        code = 0  # two KV heads in rows of three
    for strict in (True, False):
        assert validate_params(params, strict=strict) == code
        assert (f"`{name}`" in get_last_error_message()) == (code != 0)


def test_out_of_float8_is_bfloat16_or_float16() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(2, 8, 4, 64, dtype=dtype)
        assert validate_params(on_tensors(torch.float8_e4m3fn, **FLOAT8, out=out)) == 0
    for dtype in (torch.float32, torch.float8_e4m3fn):
        out = torch.empty(2, 8, 4, 64, dtype=dtype)
        assert validate_params(on_tensors(torch.float8_e4m3fn, **FLOAT8, out=out)) == -24


# What strict=False refuses ----------------------------------------------------------------------

_CACHE = {"k_new": zeros(2, 3, 2, 64), "v_new": zeros(2, 3, 2, 64), "seqused_k": ints(4, 9)}
_TABLES = {"rotary_cos": zeros(16, 16), "rotary_sin": zeros(16, 16)}
_PAGES = {"k": zeros(6, 4, 2, 64), "v": zeros(6, 4, 2, 64), "page_table": zeros(2, 3).int()}

LOOSE: list[tuple[int, dict[str, Any], str]] = [
    (0, {}, ""),
    (0, {"pack_gqa": True}, ""),
    (0, {"softcap": 30.0}, ""),
    (0, {"p_dropout": 0.1}, ""),
    (0, {"num_splits": 4}, ""),
    (0, {"num_splits": 0}, ""),
    (0, {"num_splits": -1}, ""),
    (0, _PAGES, ""),
    (0, {**_PAGES, "page_size": 4, "seqlen_k": 11}, ""),
    (0, {**_CACHE, **_TABLES}, ""),
    (0, {"is_causal": True, "window_size_left": 4}, ""),
    (0, {"attn_mask": zeros(1, 4, 8, 16).bool()}, ""),
    (0, {"leftpad_k": ints(1, 2)}, ""),
    (-11, {"softcap": -1.0}, "softcap"),
    (-11, {"softcap": float("inf")}, "softcap"),
    (-11, {"softcap": "30"}, "softcap"),
    (-11, {"softcap": 30.0, "p_dropout": 0.1}, "softcap.*p_dropout"),
    (-12, {"p_dropout": 1.0}, "p_dropout"),
    (-12, {"p_dropout": -0.1}, "p_dropout"),
    (-12, {"p_dropout": None}, "p_dropout"),
    (-13, {"num_splits": 257}, "num_splits"),
    (-13, {"num_splits": 1.5}, "num_splits"),
    (-14, {"page_size": 4}, "page_table"),
    (-8, {**_PAGES, "page_size": 8}, "page_size"),
    (-8, {**_PAGES, "seqlen_k": 13}, "seqlen_k.*page_table"),
    (-8, {**_PAGES, "page_table": zeros(3, 3).int()}, "page_table.*batch_size"),
    (0, {**_PAGES, "page_table": zeros(3, 3).int(), "kv_batch_idx": ints(2, 0)}, ""),
    (-24, {**_PAGES, "page_table": zeros(2, 3).long()}, "page_table.*int32"),
    (-8, {"kv_batch_idx": ints(1)}, "kv_batch_idx"),
    (-8, {"rng_state": torch.zeros(3, dtype=torch.int64), "p_dropout": 0.1}, "rng_state"),
    (-24, {"rng_state": ints(0, 0), "p_dropout": 0.1}, "rng_state"),
    (-15, {**_TABLES}, "rotary_cos.*k_new"),
    (-15, {**_CACHE, "rotary_cos": zeros(16, 16)}, "rotary_sin"),
    (-15, {**_CACHE, "rotary_sin": zeros(16, 16)}, "rotary_cos"),
    (-15, {**_CACHE, "rotary_dim": 32}, "rotary_dim"),
    (-15, {**_CACHE, "rotary_cos": zeros(16, 4), "rotary_sin": zeros(16, 4)}, "rotary_dim"),
    (-15, {**_CACHE, "rotary_cos": zeros(16, 40), "rotary_sin": zeros(16, 40)}, "rotary_dim"),
    (-8, {**_CACHE, **_TABLES, "rotary_dim": 64}, "rotary_cos.*rotary_dim"),
    (-8, {**_CACHE, **_TABLES, "rotary_sin": zeros(15, 16)}, "rotary_sin.*16 keys"),
    (-24, {**_CACHE, **_TABLES, "rotary_cos": zeros(16, 16).float()}, "rotary_cos"),
    (-17, {"attn_mask": ADDRESS}, "attn_mask.*address"),
    (-8, {"attn_mask": zeros(8, 16)}, "attn_mask.*shape"),
    (-8, {"attn_mask": zeros(2, 3, 8, 16)}, "attn_mask"),
    (-8, {"attn_mask": zeros(2, 4, 8, 17)}, "attn_mask"),
    (-24, {"attn_mask": zeros(1, 1, 8, 16).int()}, "attn_mask"),
    (-8, {"leftpad_k": ints(1, 2, 3)}, "leftpad_k"),
    (-19, {**_CACHE, "v_new": None}, "v_new"),
    (-19, {"v_new": zeros(2, 3, 2, 64), "seqlen_knew": 3}, "k_new"),
    (-19, {"seqlen_knew": 3}, "k_new"),
    (-8, {**_CACHE, "seqlen_knew": 4}, "k_new.*seqlen_knew"),
    (-8, {**_CACHE, "k_new": zeros(2, 3, 4, 64)}, "k_new.*num_heads_k"),
    (-9, {**_CACHE, "seqused_k": None}, "seqused_k.*k_new"),
    (-8, {**_CACHE, "k": zeros(2, 1, 2, 64).expand(2, 16, 2, 64)}, "`k`.*written"),
    (-21, {"dtype": DataType.FP8_E5M2}, "FP8_E4M3"),
    (-22, {"dtype": "FP16"}, "dtype"),
    (-22, {"dtype": torch.float16}, "dtype"),
    (-24, {"dtype": DataType.BF16}, "`q`.*bfloat16"),
]


@pytest.mark.parametrize(("code", "changes", "message"), LOOSE)
def test_codes_of_strict_false(code: int, changes: dict[str, Any], message: str) -> None:
    params = on_tensors(**changes)
    assert validate_params(params, strict=False) == code
    assert re.search(message, get_last_error_message()), get_last_error_message()
    if code:
        assert flash_attention_forward(params, strict=False) == code


def test_packed_keys_have_no_room_for_new_ones_and_no_cache_rows() -> None:
    packed = on_packed_tensors(**_CACHE)
    assert validate_params(packed, strict=False) == -19
    packed = on_packed_tensors(kv_batch_idx=ints(1, 0))
    assert validate_params(packed, strict=False) == -14


def test_dropout_of_float8_is_refused() -> None:
    params = on_tensors(torch.float8_e4m3fn, **FLOAT8, p_dropout=0.1)
    assert validate_params(params, strict=False) == -12


def test_addresses_of_caches_need_their_number_of_rows() -> None:
    paged = {"page_table": ADDRESS, "page_size": 4}
    assert validate_params(at_addresses(**paged), strict=False) == -8
    assert "`total_k`" in get_last_error_message()
    assert validate_params(at_addresses(**paged, total_k=64), strict=False) == 0
    rows = {"kv_batch_idx": ADDRESS}
    assert validate_params(at_addresses(**rows), strict=False) == -8
    assert validate_params(at_addresses(**rows, total_k=64), strict=False) == 0
    assert validate_params(at_addresses(**paged, **rows, total_k=64), strict=False) == -8
    assert "`page_table`" in get_last_error_message()
    packed = {"cu_seqlens_q": ADDRESS, "cu_seqlens_k": ADDRESS, "total_q": 9, "total_k": 64}
    assert validate_params(at_addresses(**paged, **packed), strict=False) == -8
    assert "`max_seqlen_k`" in get_last_error_message()
    assert validate_params(at_addresses(**paged, **packed, max_seqlen_k=9), strict=False) == 0


# Contents, streams, garbage ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cu_seqlens_q": ints(0, 9, 5)}, "cu_seqlens_q"),
        ({"cu_seqlens_k": ints(1, 7, 20)}, "cu_seqlens_k"),
        ({"cu_seqlens_k": ints(0, 7, 21)}, "cu_seqlens_k"),
        ({"seqused_q": ints(6, 1)}, "seqused_q"),
        ({"seqused_k": ints(1, 14)}, "seqused_k"),
    ],
)
def test_contents_are_checked_on_request(
    changes: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = on_packed_tensors(**changes)
    assert flash_attention_forward(params, strict=False) == 0, "clamped"
    monkeypatch.setattr(settings, "CHECK_INDICES", True)
    assert validate_params(params) == 0, "the parameters alone are right"
    for strict, pack_gqa in ((False, False), (True, True)):
        params.pack_gqa = pack_gqa
        assert flash_attention_forward(params, strict=strict) == -9
        assert f"`{field}`" in get_last_error_message()
    right = on_packed_tensors()
    assert flash_attention_forward(right, strict=False) == 0
    assert flash_attention_forward(change(right, pack_gqa=True)) == -10


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seqused_k": ints(4, 17)}, "seqused_k"),
        ({**_CACHE, "seqused_k": ints(4, 14)}, "seqused_k"),
        ({"leftpad_k": ints(-1, 2)}, "leftpad_k"),
        ({**_PAGES, "page_table": torch.full((2, 3), 6, dtype=torch.int32)}, "page_table"),
    ],
)
def test_contents_of_caches_are_checked_on_request(
    changes: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "CHECK_INDICES", True)
    assert flash_attention_forward(on_tensors(**changes), strict=False) == -9
    assert f"`{field}`" in get_last_error_message()


def test_hints_reach_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """They change no result, so only here would it show that one was dropped."""
    from flash_attn.core.attend import attend

    solved = []

    def spy(problem: Any, out: torch.Tensor) -> Any:
        solved.append(problem)
        return attend(problem, out)

    monkeypatch.setattr("flash_attn.standalone.launch.attend", spy)
    hints = {"num_splits": 4, "pack_gqa": True, "max_seqlen_q": 7, "max_seqlen_k": 13}
    for changes in ({}, hints, {"num_splits": 0}, {"num_splits": -3}):
        assert flash_attention_forward(on_packed_tensors(**changes), strict=False) == 0
    bare, hinted, chosen, negative = solved
    assert (bare.num_splits, bare.pack_gqa) == (1, None)
    assert (hinted.num_splits, hinted.pack_gqa) == (4, True)
    assert chosen.num_splits == negative.num_splits == 0
    lengths = [(x.layout.max_seqlen_q, x.layout.max_seqlen_k) for x in (bare, hinted)]
    assert lengths == [(12, 20), (7, 13)]


def test_streams_belong_to_gpus() -> None:
    for stream in (None, 0):
        assert flash_attention_forward(on_tensors(), stream, strict=False) == 0
    for stream in (7, "stream"):
        assert flash_attention_forward(on_tensors(), stream, strict=False) == -24
        assert "`stream`" in get_last_error_message()


class Hostile:
    """Raises whatever is asked of it."""

    def _fail(self, *_: Any) -> Any:
        raise RuntimeError("hostile")

    __bool__ = __index__ = __int__ = __float__ = __eq__ = __repr__ = __len__ = __iter__ = _fail
    __hash__ = None  # type: ignore[assignment]

    @property
    def __cuda_array_interface__(self) -> Any:
        raise RuntimeError("hostile")


class Interface:
    """An array interface with what is given."""

    def __init__(self, **interface: Any) -> None:
        self.__cuda_array_interface__ = interface


GARBAGE = [
    None, "x", object(), float("nan"), float("inf"), [], {}, -1, 0, True, 2**70, -(2**70), 1.5,
    torch.ones(3), torch.ones(2, 2, 2, 2, 2, 2), torch.tensor(1), Hostile(), Hostile, Interface(),
    Interface(shape=(2,), typestr="<c8", data=(8, False)),
    Interface(shape=3, typestr="<f2", data=None),
]  # fmt: skip
NAMES = [field.name for field in fields(FlashAttentionParams)]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda x: type(x).__name__)
def test_garbage_has_a_code_and_never_raises(garbage: Any) -> None:
    everywhere = FlashAttentionParams(**dict.fromkeys(NAMES, garbage))
    for strict in (True, False):
        assert validate_params(everywhere, strict=strict) in CODES[1:]
        assert flash_attention_forward(everywhere, strict=strict) in CODES[1:]
    for base in (at_addresses, on_tensors, on_packed_tensors):
        for name in NAMES:
            params = base(**{name: garbage})
            for strict in (True, False):
                code = validate_params(params, strict=strict)
                assert code in CODES, name
                assert (get_last_error_message() != "") == (code != 0)
                assert flash_attention_forward(params, strict=strict) in CODES, name


@pytest.mark.parametrize("garbage", [None, "params", 3, Hostile(), FlashAttentionParams])
def test_parameters_that_are_none_have_a_code(garbage: Any) -> None:
    assert validate_params(garbage) == -1
    assert flash_attention_forward(garbage) == -1
    assert "`params`" in get_last_error_message()


# The rest of the surface ------------------------------------------------------------------------


def test_error_strings() -> None:
    texts = [get_error_string(code) for code in CODES]
    assert sorted(ERROR_STRINGS, reverse=True) == CODES
    assert len(set(texts)) == len(texts)
    assert "Unknown error" not in texts
    expected = {
        0: "Success", -1: "Null pointer", -2: "Unsupported head_dim", -3: "FP8 head_dim constraint",
        -4: "num_heads_k exceeds num_heads", -5: "divisible", -6: "Varlen cu_seqlens mismatch",
        -7: "total_q", -8: "Invalid dimension", -9: "Invalid sequence lengths or descale",
        -10: "PackGQA not supported", -11: "Softcap not supported", -12: "Dropout not supported",
        -13: "Split-KV not supported", -14: "Paged KV cache not supported",
        -15: "Rotary embeddings not supported", -16: "Causal and local are mutually exclusive",
        -17: "Custom mask not supported", -18: "Left padding not supported",
        -19: "Appending KV not supported", -20: "BF16 not supported",
        -21: "FP8 E5M2 not supported", -22: "Unsupported data type", -23: "Requires SM90",
        -24: "mismatch", -100: "CUDA runtime error",
    }  # fmt: skip
    assert [code for code in CODES if expected[code] not in get_error_string(code)] == []
    for unknown in (1, -25, -99, -101, 2**80, "x", None, 1.5, Hostile()):
        assert get_error_string(unknown) == "Unknown error"


def test_messages_are_of_the_latest_call_of_their_thread() -> None:
    assert validate_params(at_addresses(q=None)) == -1
    assert "`q`" in get_last_error_message()
    found = []

    def elsewhere() -> None:
        found.append(get_last_error_message())
        validate_params(at_addresses(v=None))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [""]
    assert "`q`" in get_last_error_message()
    assert validate_params(at_addresses()) == 0
    assert get_last_error_message() == ""


def test_fields_and_defaults() -> None:
    text = """
        q k v out softmax_lse cu_seqlens_q cu_seqlens_k seqused_q seqused_k leftpad_k
        q_descale_ptr k_descale_ptr v_descale_ptr attn_mask page_table kv_batch_idx k_new v_new
        rotary_cos rotary_sin rng_state out_accum softmax_lse_accum

        batch_size seqlen_q seqlen_k num_heads num_heads_k head_dim total_q total_k max_seqlen_q
        max_seqlen_k q_descale_batch_stride q_descale_head_stride k_descale_batch_stride
        k_descale_head_stride v_descale_batch_stride v_descale_head_stride softmax_scale softcap
        page_size seqlen_knew rotary_dim p_dropout
    """
    memory, numbers = (part.split() for part in text.split("\n\n"))
    expected = dict.fromkeys(memory) | dict.fromkeys(numbers, 0)
    expected |= dict.fromkeys(("is_causal", "pack_gqa", "is_rotary_interleaved"), False)
    expected |= dict.fromkeys(("window_size_left", "window_size_right"), -1)
    expected |= {"dtype": DataType.FP16, "num_splits": 1, "mode": AttentionMode.PREFILL}
    assert vars(FlashAttentionParams()) == expected
    order = """
        q k v out softmax_lse batch_size seqlen_q seqlen_k num_heads num_heads_k head_dim
        cu_seqlens_q cu_seqlens_k total_q total_k max_seqlen_q max_seqlen_k seqused_q seqused_k
        leftpad_k q_descale_ptr k_descale_ptr v_descale_ptr q_descale_batch_stride
        q_descale_head_stride k_descale_batch_stride k_descale_head_stride v_descale_batch_stride
        v_descale_head_stride is_causal window_size_left window_size_right attn_mask softmax_scale
        softcap dtype pack_gqa page_table page_size kv_batch_idx k_new v_new seqlen_knew rotary_cos
        rotary_sin rotary_dim is_rotary_interleaved p_dropout rng_state num_splits out_accum
        softmax_lse_accum mode
    """
    assert order.split() == NAMES
    assert [int(x) for x in DataType] == [0, 1, 2, 3]
    assert [x.name for x in DataType] == ["FP16", "BF16", "FP8_E4M3", "FP8_E5M2"]
    names = ["PREFILL", "DECODE", "VARLEN_PREFILL", "VARLEN_DECODE"]
    assert [x.name for x in AttentionMode] == names
    assert [int(x) for x in AttentionMode] == [0, 1, 2, 3]
    assert get_workspace_size(at_addresses()) == 0
    assert set(standalone.__all__) == {
        "AttentionMode", "DataType", "FlashAttentionParams", "flash_attention_forward",
        "get_error_string", "get_last_error_message", "get_workspace_size", "validate_params",
    }  # fmt: skip


def test_interfaces_say_their_shape_and_type() -> None:
    def interface(shape: tuple[int, ...], typestr: str, **more: Any) -> Interface:
        return Interface(shape=shape, typestr=typestr, **{"data": (16, False), **more}, version=3)

    q, k = interface((2, 8, 4, 64), "<f2", data=(64, False)), interface((2, 16, 2, 64), "<f2")
    out = interface((2, 8, 4, 64), "<f2", data=(32, False))
    assert validate_params(FlashAttentionParams(q=q, k=k, v=k, out=out)) == 0
    assert validate_params(FlashAttentionParams(q=q, k=k, v=k, out=q)) == -8
    raw = interface(
        (2, 8, 4, 64), "<i2", data=(32, False)
    )  # integers may stand for what has no name
    assert validate_params(FlashAttentionParams(q=q, k=k, v=k, out=raw)) == 0
    cases = [
        (-24, interface((2, 8, 4, 64), "<f4", data=(32, False)), "`out`.*float32"),
        (-24, interface((2, 8, 4, 64), "<i4", data=(32, False)), "`out`.*int32"),
        (-24, interface((2, 8, 4, 64), "<f2", data=(32, True)), "`out`.*read-only"),
        (-24, interface((2, 8, 4, 64), "<c8"), "`out`.*<c8"),
        (-8, interface((2, 9, 4, 64), "<f2"), "`out`.*seqlen_q"),
        (-8, interface((2, 8, 4, 64), "<f2", strides=(4096, 512, 2, 8)), "`out`.*contiguous"),
        (-8, interface((2, 8, 4, 64), "<f2", strides=(4096, -512, 128, 2)), "`out`.*negative"),
        (-1, interface((2, 8, 4, 64), "<f2", data=(0, False)), "`out`"),
    ]
    for code, out, message in cases:
        assert validate_params(FlashAttentionParams(q=q, k=k, v=k, out=out)) == code
        assert re.search(message, get_last_error_message())
