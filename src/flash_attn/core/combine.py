"""Merging partial results over disjoint sets of keys.

With the parts' outputs ``out_s`` and log-sum-exps ``lse_s``::

    lse = log sum_s exp(lse_s),   out = sum_s exp(lse_s - lse) out_s

A part that saw no key has ``lse_s = -inf`` and weight 0, whatever its output holds. Where no part
saw a key, out is 0 and lse is -inf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConstraintError
from . import registry
from .arguments import without_autocast
from .outputs import last_dim_contiguous
from .validate import MAX_SPLITS, check_device, check_last_stride, check_tensor, require

_SCHEMA = "(Tensor out_partial, Tensor lse_partial, Tensor(a!) out) -> Tensor"
_OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def merge(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """The definition above in PyTorch.

    Args:
        out_partial: (splits, ..., headdim) float32.
        lse_partial: (splits, ...) float32.

    Returns:
        (..., headdim) and (...), float32.
    """
    largest = lse_partial.amax(0)
    shift = largest.masked_fill(largest == float("-inf"), 0.0)
    weights = torch.exp(lse_partial - shift)
    total = weights.sum(0)
    dead = total == 0.0
    weights = weights / total.masked_fill(dead, 1.0)
    parts = out_partial.masked_fill((weights == 0.0)[..., None], 0.0)
    out = torch.einsum("s...,s...d->...d", weights, parts)
    return out, (shift + torch.log(total)).masked_fill(dead, float("-inf"))


def combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge partial results; not differentiable.

    Args:
        out_partial: (splits, batch, seqlen, nheads, headdim) float32, any strides, at most 256
            splits.
        lse_partial: (splits, batch, seqlen, nheads) float32 natural log-sum-exps, any strides.
        out: (batch, seqlen, nheads, headdim) to write into, last stride 1.
        out_dtype: float32, float16 or bfloat16, ``out``'s if that is given; default float32.

    Returns:
        ``out`` and the log-sum-exp (batch, seqlen, nheads), float32, stride 1 along seqlen.

    Raises:
        ConstraintError: an argument is wrong.
    """
    _check(out_partial, lse_partial)
    dtype = torch.float32 if out_dtype is None else out_dtype
    if out is not None and out_dtype is None and isinstance(out, Tensor):
        dtype = out.dtype
    require(
        dtype in _OUT_DTYPES, f"`out_dtype` must be float32, float16 or bfloat16, found {dtype}"
    )
    if out is None:
        out = out_partial.new_empty(out_partial.shape[1:], dtype=dtype)
    else:
        _check_out(out, out_partial, dtype)
    with torch.no_grad():
        lse = torch.ops.flash_attn._attention_combine(out_partial, lse_partial, out)
    return out, lse.transpose(1, 2)


def _check(out_partial: Tensor, lse_partial: Tensor) -> None:
    shape = "(splits, batch_size, seqlen, nheads, headdim)"
    check_tensor(out_partial, "out_partial", 5, shape)
    check_tensor(lse_partial, "lse_partial", 4, shape.replace(", headdim", ""))
    for x, name in ((out_partial, "out_partial"), (lse_partial, "lse_partial")):
        if x.dtype != torch.float32:
            raise ConstraintError(
                f"Attention combine function only support fp32 data type: `{name}` has {x.dtype}"
            )
    check_device(lse_partial, "lse_partial", out_partial, "out_partial")
    require(
        lse_partial.shape == out_partial.shape[:-1],
        f"`lse_partial` must have shape {tuple(out_partial.shape[:-1])}, found "
        f"{tuple(lse_partial.shape)}",
    )
    splits = out_partial.shape[0]
    require(
        1 <= splits <= MAX_SPLITS,
        f"combine takes 1 to {MAX_SPLITS} splits: `out_partial` has {splits}",
    )


def _check_out(out: Tensor, out_partial: Tensor, dtype: torch.dtype) -> None:
    check_tensor(out, "out", 4, "(batch_size, seqlen, nheads, headdim)")
    check_device(out, "out", out_partial, "out_partial")
    if out.shape != out_partial.shape[1:] or out.dtype != dtype:
        raise ConstraintError(
            f"`out` must be {dtype} of shape {tuple(out_partial.shape[1:])}, found {out.dtype} of "
            f"shape {tuple(out.shape)}"
        )
    check_last_stride(out, "out")


def _combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor) -> Tensor:
    lse = _new_lse(out_partial)
    if lse.numel() == 0:
        return lse
    if _merges_on_host(out_partial):
        with without_autocast(out_partial):
            merged, merged_lse = merge(out_partial, lse_partial)
        out.copy_(merged)
        return lse.copy_(merged_lse.transpose(1, 2))
    if lse_partial.stride(2) != 1:
        lse_partial = lse_partial.transpose(2, 3).contiguous().transpose(2, 3)
    triton: Any = registry.load("triton")
    triton.combine(last_dim_contiguous(out_partial), lse_partial, out, lse)
    return lse


def _merges_on_host(x: Tensor) -> bool:
    return not x.is_cuda


def _new_lse(out_partial: Tensor) -> Tensor:
    _, batch_size, seqlen, nheads, _ = out_partial.shape
    return out_partial.new_empty(batch_size, nheads, seqlen)


def _combine_fake(out_partial: Tensor, lse_partial: Tensor, out: Tensor) -> Tensor:
    return _new_lse(out_partial)


# Kept alive for the life of the process: the operators vanish with the library object.
_library = torch.library.Library("flash_attn", "FRAGMENT")
_library.define("_attention_combine" + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("_attention_combine", _combine, "CompositeExplicitAutograd")
torch.library.register_fake("flash_attn::_attention_combine", _combine_fake, lib=_library)
