"""The rules of a call, in the order of their codes: the first that is broken ends it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..core.problem import is_float8
from . import features
from .call import (
    DESCALES,
    FLAGS,
    FLOATS,
    INDICES,
    INTEGERS,
    MEMORY,
    NOT_STRICT,
    Call,
    integer,
    is_flag,
    number,
)
from .memory import Described
from .params import DataType, Refused

_STRICT_HEAD_DIMS = (64, 96, 128, 192, 256)
_STRICT_FP8_HEAD_DIMS = (64, 96, 128)
_MAX_HEAD_DIM = 256
# Written by the call: no two elements may share memory, and the owner must allow it.
_WRITTEN = ("out", "softmax_lse", "rng_state")


def check(call: Call, check_contents: Callable[[Call], None] | None = None) -> None:
    """Every rule that the parameters alone can break, -1 to -22.

    Args:
        call: what to check.
        check_contents: looks into the index tensors, in its place among the rules.

    Raises:
        Refused: with the code of the first broken rule.
    """
    _check_null(call)
    _check_head_dim(call)
    _check_heads(call)
    _check_packing(call)
    _check_values(call)
    _check_sizes(call)
    _check_shapes(call)
    _check_descales(call)
    _check_lengths(call)
    if check_contents is not None:
        check_contents(call)
    (features.refuse if call.strict else features.check)(call)
    features.check_dtype(call)


def _check_null(call: Call) -> None:
    for name in ("q", "k", "v", "out"):
        if not call.has(name):
            raise Refused(-1, f"`{name}` is null")


def _check_head_dim(call: Call) -> None:
    head_dim = call.sizes["head_dim"]
    if not 1 <= head_dim <= _MAX_HEAD_DIM:
        raise Refused(-2, f"`head_dim` must be 1 to {_MAX_HEAD_DIM}, found {head_dim}")
    if not call.strict:
        return
    if head_dim not in _STRICT_HEAD_DIMS:
        raise Refused(
            -2,
            f"`head_dim` must be one of {_STRICT_HEAD_DIMS}, found {head_dim}; strict=False takes "
            "every other one",
        )
    is_float8 = call.data_type in (DataType.FP8_E4M3, DataType.FP8_E5M2)
    if is_float8 and head_dim not in _STRICT_FP8_HEAD_DIMS:
        raise Refused(
            -3,
            f"`head_dim` must be one of {_STRICT_FP8_HEAD_DIMS} for FP8, found {head_dim}; "
            "strict=False takes every other one",
        )


def _check_heads(call: Call) -> None:
    heads, heads_k = call.sizes["num_heads"], call.sizes["num_heads_k"]
    found = f"found `num_heads` {heads} and `num_heads_k` {heads_k}"
    if heads_k > heads:
        raise Refused(-4, f"`num_heads_k` must not exceed `num_heads`, {found}")
    if heads_k > 0 and heads % heads_k:
        raise Refused(-5, f"`num_heads` must be a multiple of `num_heads_k`, {found}")


def _check_packing(call: Call) -> None:
    given = [name for name in ("cu_seqlens_q", "cu_seqlens_k") if call.has(name)]
    if len(given) == 1:
        raise Refused(-6, f"`{given[0]}` is given alone: packed sequences need both bounds")
    if not given:
        return
    # Pages have no total of packed rows, but strict knows no pages.
    needs_k = not call.paged or (call.strict and call.memory["k"].is_address)
    for name in ("total_q", "total_k") if needs_k else ("total_q",):
        size = call.sizes[name]
        if size < 0 or (size == 0 and name not in call.from_tensors):
            raise Refused(-7, f"`{name}` must be the number of packed rows, found {size}")


def _check_values(call: Call) -> None:
    """The numbers are numbers, and the flags flags."""
    for name in INTEGERS:
        found = getattr(call.params, name)
        if name != "num_splits" and integer(found) is None:
            raise Refused(-8, f"`{name}` must be an integer, found {found!r}")
    for name in FLAGS:
        found = getattr(call.params, name)
        if not (found is True or found is False or is_flag(found)):
            raise Refused(-8, f"`{name}` must be True or False")
    if number(call.params.softmax_scale) is None:
        raise Refused(
            -8, f"`softmax_scale` must be a finite number, found {call.params.softmax_scale!r}"
        )


def _check_sizes(call: Call) -> None:
    """Sizes that the call uses are positive, or 0 because a tensor is empty."""
    for name in ("max_seqlen_q", "max_seqlen_k"):
        if call.numbers[name] < 0:
            raise Refused(-8, f"`{name}` must not be negative, found {call.numbers[name]}")
    refused = call.strict and (call.has("page_table") or call.has("kv_batch_idx"))
    used = ["batch_size", *call.dims("q"), *([] if refused else call.dims("k"))]
    if not call.strict:
        used += ["seqlen_k"] if call.paged and not call.varlen else []
        used += ["seqlen_knew"] if call.has("k_new") else []
        used += ["rotary_dim"] if call.has("rotary_cos") else []
    for name in (name for name in used if name in call.sizes):
        size = call.sizes[name]
        may_be_empty = name in call.from_tensors and "num_heads" not in name
        if size < 0 or (size == 0 and not may_be_empty):
            raise Refused(-8, f"`{name}` must be positive where no tensor tells it, found {size}")


def _check_shapes(call: Call) -> None:
    """Every memory has the shape that the sizes say, and strides that can be used."""
    strangers = call.strict and (call.has("page_table") or call.has("kv_batch_idx"))
    for name in MEMORY:
        if name not in call.memory or name in DESCALES:
            continue
        if call.strict and (name in NOT_STRICT or (strangers and name in ("k", "v"))):
            continue  # refused by its own code
        found = call.memory[name]
        if found.is_address and name != "attn_mask":
            call.shape_at_address(name)
        elif found.shape is not None and found.strides is not None:
            if name == "attn_mask":
                _check_mask(call, found.shape)
            else:
                _check_shape(call, name, found.shape)
                _check_strides(call, name, found.shape, found.strides)
    out = call.memory["out"].address
    for name in ("q", "k", "v"):
        if out and out == call.memory[name].address:
            raise Refused(-8, f"`out` must not be the memory of `{name}`: it is written")
    if not call.strict:
        _check_cache(call)


def _check_shape(call: Call, name: str, shape: tuple[int, ...]) -> None:
    dims = call.dims(name)
    wanted = tuple(call.extent(dim) for dim in dims)
    if len(shape) == len(dims):
        pairs = list(zip(dims, wanted, shape, strict=True))
        wrong = [dim for dim, want, have in pairs if want not in (None, have)]
        if not wrong:
            return
        reason = f"`{wrong[0]}` differs"
    else:
        reason = f"{len(dims)} dimensions are needed"
    sizes = ", ".join(str(dim) if want is None else f"{dim} = {want}"
                      for dim, want in zip(dims, wanted, strict=True))  # fmt: skip
    raise Refused(-8, f"`{name}` must have shape ({sizes}), found {shape}: {reason}")


def _check_strides(call: Call, name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    if 0 in shape:
        return
    steps = [(size, step) for size, step in zip(shape, strides, strict=True) if size > 1]
    if any(step < 0 for _, step in steps):
        raise Refused(-8, f"`{name}` must not have negative strides, found {strides}")
    if name in (*FLOATS, *INDICES) and shape[-1] > 1 and strides[-1] != 1:
        raise Refused(
            -8, f"`{name}` must be contiguous in its last dimension, found strides {strides}"
        )
    written = name in _WRITTEN or (name in ("k", "v") and call.has("k_new"))
    if written and any(step == 0 for _, step in steps):
        raise Refused(-8, f"`{name}` is written: its elements must not overlap, found {strides}")
    if name == "out" and call.is_packed_view(name):
        (_, outer), (group, inner) = list(zip(shape, strides, strict=True))[-3:-1]
        if 1 not in shape[-3:-1] and outer != group * inner:
            raise Refused(
                -8, f"`out` must have its two dimensions of heads together, found {strides}"
            )


def _check_mask(call: Call, shape: tuple[int, ...]) -> None:
    wanted = ("1 or batch_size", "1 or num_heads", "1 or seqlen_q", "1 or seqlen_k")
    sizes, numbers = call.sizes, call.numbers
    if len(shape) == 4:
        fits = shape[0] in (1, sizes["batch_size"]) and shape[1] in (1, sizes["num_heads"])
        # Lengths that only the device knows: the mask may be larger than any of them.
        if call.varlen:
            fits = fits and (shape[2] == 1 or shape[2] >= numbers["max_seqlen_q"])
        else:
            fits = fits and shape[2] in (1, sizes["seqlen_q"])
        if call.paged or call.varlen:
            least = call.capacity if call.paged else numbers["max_seqlen_k"]
            fits = fits and (shape[3] == 1 or shape[3] >= least)
        else:
            fits = fits and shape[3] in (1, sizes["seqlen_k"])
        if fits:
            return
    raise Refused(-8, f"`attn_mask` must have shape ({', '.join(wanted)}), found {shape}")


def _check_cache(call: Call) -> None:
    """What pages and rotary tables must have room for."""
    seqlen_k, capacity = call.sizes["seqlen_k"], call.capacity
    if call.paged and not call.varlen and seqlen_k > capacity:
        raise Refused(
            -8, f"`seqlen_k` is {seqlen_k}, but a row of `page_table` has room for {capacity} keys"
        )
    for name in ("rotary_cos", "rotary_sin"):
        shape = call.memory[name].shape if call.has(name) else None
        if shape is not None and shape[0] < capacity:
            raise Refused(
                -8, f"`{name}` must have a row for each of the {capacity} keys, found {shape[0]}"
            )


def _check_descales(call: Call) -> None:
    for name in DESCALES:
        if not call.has(name):
            continue
        if call.data_type in (DataType.FP16, DataType.BF16):
            raise Refused(-9, f"`{name}` is for FP8 inputs: leave it out")
        batch_stride, head_stride = descale_strides(call, name)
        if batch_stride < 0 or head_stride < 0:
            raise Refused(
                -9, f"`{name}` must have strides of 0 or more, found {batch_stride}, {head_stride}"
            )
        found = call.memory[name]
        rows, heads = descale_shape(call, name)
        if not _descale_fits(found, (rows, heads), (batch_stride, head_stride)):
            raise Refused(
                -9,
                f"`{name}` has shape {found.shape}, but strides of ({batch_stride}, {head_stride}) "
                f"and {rows} sequences of {heads} heads need "
                f"{descale_extent((rows, heads), (batch_stride, head_stride))} contiguous elements",
            )


def descale_strides(call: Call, name: str) -> tuple[int, int]:
    """(batch, head) strides of a descale, in elements."""
    stem = name.removesuffix("_ptr")
    return call.numbers[f"{stem}_batch_stride"], call.numbers[f"{stem}_head_stride"]


def descale_shape(call: Call, name: str) -> tuple[int, int]:
    """(batch_size, heads): by KV head; queries' also by query head if the strides say so."""
    heads, heads_k = call.sizes["num_heads"], call.sizes["num_heads_k"]
    by_query_head = name == "q_descale_ptr" and descale_strides(call, name) == (heads, 1)
    return call.sizes["batch_size"], heads if by_query_head else heads_k


def descale_extent(shape: tuple[int, int], strides: tuple[int, int]) -> int:
    """How many elements lie up to the last one that the strides reach."""
    return 1 + sum(max(size - 1, 0) * step for size, step in zip(shape, strides, strict=True))


def _descale_fits(found: Described, shape: tuple[int, int], strides: tuple[int, int]) -> bool:
    """Whether memory holds what the strides reach, and not so much more that they look wrong."""
    if found.shape is None or (found.shape, found.strides) == (shape, strides):
        return True
    if not found.is_contiguous():
        return False
    (rows, heads), (batch_stride, head_stride) = shape, strides
    most = max(rows * batch_stride, heads * head_stride, 1)
    size = math.prod(found.shape)
    return size == 0 if rows == 0 else descale_extent(shape, strides) <= size <= most


def _check_lengths(call: Call) -> None:
    if call.strict or not call.has("k_new") or call.has("seqused_k"):
        return
    if not call.varlen:  # the lengths of packed queries' keys are those of cu_seqlens_k
        raise Refused(-9, "`seqused_k` must say where `k_new` is appended, it is null")


def check_agreement(call: Call) -> None:
    """-24: types and devices of all memory, as far as they are known.

    Raises:
        Refused: with code -24.
    """
    devices: dict[torch.device, str] = {}
    for name, found in call.memory.items():
        if found.fault:
            raise Refused(-24, f"`{name}` {found.fault}")
        wanted = types_of(call, name)
        if found.dtype not in (None, *wanted) and not found.stands_for(wanted[0]):
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
            raise Refused(-24, f"`{name}` must hold {names}, found {found.dtype}")
        written = name in _WRITTEN or (name in ("k", "v") and call.has("k_new"))
        if written and found.read_only:
            raise Refused(-24, f"`{name}` is written, but its owner says read-only")
        if found.device is not None:
            devices.setdefault(found.device, name)
    if len(devices) > 1:
        (first, one), (second, other) = list(devices.items())[:2]
        raise Refused(-24, f"`{one}` is on {first}, but `{other}` on {second}")
    for device, name in devices.items():
        if device.type not in ("cuda", "cpu"):
            raise Refused(-24, f"`{name}` must be on a GPU or the CPU, found {device}")


def types_of(call: Call, name: str) -> tuple[torch.dtype, ...]:
    """What a memory argument may hold; an address holds the first."""
    if name == "out":
        return call.out_types()
    if name in ("rotary_cos", "rotary_sin") and is_float8(call.element):
        return (torch.bfloat16, torch.float16, torch.float32, call.element)
    if name in FLOATS:
        return (call.element,)
    if name in INDICES:
        return (torch.int32,)
    if name == "rng_state":
        return (torch.int64, torch.uint64)
    if name == "attn_mask":
        return (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return (torch.float32,)
