"""Launching the rotary kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.device import guard
from ...core.outputs import mark_written
from ...core.rotary import check_rotary
from ...core.toolchain import explains_toolchain
from ...kernels import rotary
from .._compiled import look_up_first
from .launch import strides_are_eights

rotary_kernel = look_up_first(rotary.rotary_kernel)

# Heads that share one reading of the tables. A constant: the head count must not choose a kernel.
_BLOCK_H = 2
_TILE_ENTRIES = 2048


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate on the GPU; arguments and result are those of ``flash_attn.ops.triton.rotary``.

    Raises:
        ConstraintError: an argument has a wrong shape, dtype, device, layout or value.
    """
    check_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, inplace)
    out = x if inplace else torch.empty_like(x)
    if x.numel() == 0:
        return out
    if cos.shape[1] == 0:
        return out if inplace else out.copy_(x)
    _launch(out, x, cos, sin, seqlen_offsets, cu_seqlens, interleaved, conjugate)
    if inplace:
        mark_written(x)
    return out


@explains_toolchain
def _launch(
    out: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> None:
    cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
    if cu_seqlens is None:
        batch_size, seqlen = x.shape[:2]
        total, strides = batch_size * seqlen, (*out.stride(), *x.stride())
    else:
        cu_seqlens = cu_seqlens.contiguous()
        batch_size, seqlen, total = cu_seqlens.shape[0] - 1, 1, x.shape[0]
        strides = (0, *out.stride(), 0, *x.stride())
    offset, offsets = 0, None
    if isinstance(seqlen_offsets, Tensor):
        offsets = seqlen_offsets.expand(batch_size).contiguous()
    else:
        offset = int(seqlen_offsets)
    nheads, headdim = x.shape[-2:]
    half = cos.shape[1]
    block_k = _power_of_2(half)
    block_m = max(1, min(64, _TILE_ENTRIES // (2 * block_k * _BLOCK_H)))
    num_tiles = -(-total // block_m)
    copies_rest = out is not x and headdim > 2 * half
    with guard(x):
        rotary_kernel[(num_tiles * -(-nheads // _BLOCK_H),)](
            out, x, cos, sin, offsets, cu_seqlens, *strides, cos.stride(0), sin.stride(0),
            total, seqlen, nheads, cos.shape[0], batch_size, _power_of_2(batch_size), offset,
            num_tiles,
            HEADDIM=headdim, ROTARY_HALF=half, INTERLEAVED=interleaved, CONJUGATE=conjugate,
            COPY_REST=copies_rest, EIGHTS=strides_are_eights(out, x),
            BLOCK_M=block_m, BLOCK_H=_BLOCK_H, BLOCK_K=block_k,
            BLOCK_REST=_power_of_2(headdim - 2 * half) if copies_rest else 1,
            num_warps=4,
        )  # fmt: skip


def _power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()
