"""Rules about features, -10 to -19, and about the type of the elements, -20 to -22."""

from __future__ import annotations

from .call import Call, integer, number
from .params import DataType, Refused


def refuse(call: Call) -> None:
    """strict: what the original does not support, each by its own code."""
    params, numbers = call.params, call.numbers
    packed = params.pack_gqa or call.is_packed_view("q") or call.is_packed_view("out")
    window = max(numbers["window_size_left"], numbers["window_size_right"])
    rules = (
        (-10, packed, "`pack_gqa` must be False and heads one dimension"),
        (-11, number(params.softcap) != 0.0, "`softcap` must be 0, found {softcap!r}"),
        (-12, number(params.p_dropout) != 0.0,
         "`p_dropout` must be 0, found {p_dropout!r}"),
        (-13, integer(params.num_splits) != 1,
         "`num_splits` must be 1, found {num_splits!r}"),
        (-14, (call.has("page_table") or call.has("kv_batch_idx")) or numbers["page_size"],
         "`page_table`, `page_size` and `kv_batch_idx` must be left out"),
        (-15, (call.has("rotary_cos") or call.has("rotary_sin")) or numbers["rotary_dim"],
         "`rotary_cos`, `rotary_sin` and `rotary_dim` must be left out"),
        (-16, params.is_causal and window >= 0,
         "`is_causal` must be False or both `window_size_left` and `window_size_right` -1"),
        (-17, call.has("attn_mask"), "`attn_mask` must be left out"),
        (-18, call.has("leftpad_k"), "`leftpad_k` must be left out"),
        (-19, (call.has("k_new") or call.has("v_new")) or numbers["seqlen_knew"],
         "`k_new`, `v_new` and `seqlen_knew` must be left out"),
    )  # fmt: skip
    for code, is_used, message in rules:
        if is_used:
            raise Refused(code, _filled(message, call) + "; strict=False supports it")


def check(call: Call) -> None:
    """Not strict: limits and combinations of the same features, by the same codes."""
    params, numbers = call.params, call.numbers
    softcap, dropout = number(params.softcap), number(params.p_dropout)
    splits = integer(params.num_splits)
    rotary = call.has("rotary_cos") or call.has("rotary_sin")
    rules = (
        (-11, softcap is None or softcap < 0.0,
         "`softcap` must be a number of 0 or more, found {softcap!r}"),
        (-11, softcap and dropout, "`softcap` and `p_dropout` do not go together: one must be 0"),
        (-12, dropout is None or not 0.0 <= dropout < 1.0,
         "`p_dropout` must be in [0, 1), found {p_dropout!r}"),
        (-12, dropout and call.data_type == DataType.FP8_E4M3,
         "`p_dropout` must be 0 for FP8 inputs"),
        (-13, splits is None or splits > 256,
         "`num_splits` must be an integer up to 256, found {num_splits!r}"),
        (-14, numbers["page_size"] and not call.paged,
         "`page_size` is given, but `page_table` is null"),
        (-14, call.has("kv_batch_idx") and call.varlen and not call.paged,
         "`kv_batch_idx` needs a cache: `k` must not be packed"),
        (-15, rotary and not call.has("rotary_cos"), "`rotary_cos` is null"),
        (-15, rotary and not call.has("rotary_sin"), "`rotary_sin` is null"),
        (-15, numbers["rotary_dim"] and not rotary,
         "`rotary_dim` is given, but `rotary_cos` is null"),
        (-15, rotary and not call.has("k_new"),
         "`rotary_cos` needs `k_new`: turn q and k yourself where nothing is appended"),
        (-15, call.sizes["rotary_dim"] % 16 or call.sizes["rotary_dim"] > call.sizes["head_dim"],
         "`rotary_dim` must be a multiple of 16 up to `head_dim`"),
        (-17, call.has("attn_mask") and call.memory["attn_mask"].is_address,
         "`attn_mask` must be a tensor: an address has no type"),
        (-19, call.has("k_new") != call.has("v_new"), "`k_new` and `v_new` go together"),
        (-19, numbers["seqlen_knew"] and not call.has("k_new"),
         "`seqlen_knew` is given, but `k_new` is null"),
        (-19, call.has("k_new") and call.varlen and not call.paged,
         "`k_new` needs a cache: packed sequences have no room"),
    )  # fmt: skip
    for code, is_broken, message in rules:
        if is_broken:
            raise Refused(code, _filled(message, call))


def _filled(message: str, call: Call) -> str:
    """The message with the values that were found."""
    return message.format_map(vars(call.params))


def check_dtype(call: Call) -> None:
    dtype = call.data_type
    if dtype == DataType.BF16 and call.strict:
        raise Refused(-20, "`dtype` must be FP16 or FP8_E4M3, found BF16; strict=False supports it")
    if dtype == DataType.FP8_E5M2:
        raise Refused(-21, "`dtype` must not be FP8_E5M2: convert to FP8_E4M3")
    if dtype is None:
        raise Refused(-22, f"`dtype` must be a DataType, found {call.params.dtype!r}")
