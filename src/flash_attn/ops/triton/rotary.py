"""Rotary position embedding without autograd; :mod:`flash_attn.layers.rotary` differentiates it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.rotary import check_rotary, rotate
from ...errors import ConstraintError

__all__ = ["apply_rotary"]


def __getattr__(name: str) -> Any:
    # The kernel's module imports Triton, which importing this one must not do.
    if name == "rotary_kernel":
        from ...kernels.rotary import rotary_kernel

        return rotary_kernel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    """Rotate the first ``rotary_dim`` entries of every head by the position of its row.

    Row s of sequence b stands at position ``seqlen_offsets[b] + s``; positions that the host cannot
    see (offsets in a tensor) are clamped to the tables. Autograd does not record this function.

    Args:
        x: (batch_size, seqlen, nheads, headdim), or (total, nheads, headdim) with ``cu_seqlens``;
            any strides, any floating dtype, headdim at most 256.
        cos: (seqlen_rotary, rotary_dim / 2) with seqlen_rotary >= seqlen + offset.
        sin: like ``cos``.
        seqlen_offsets: one number, or (batch_size,) int32 or int64 on x's device.
        cu_seqlens: (batch_size + 1,) int32. Rows in no sequence are copied as they are.
        max_seqlen: length of the longest packed sequence; only compared with seqlen_rotary.
        interleaved: pairs are neighbours (0, 1), (2, 3), ... instead of (i, i + rotary_dim / 2).
        inplace: write into ``x``.
        conjugate: turn backwards.

    Returns:
        ``x`` itself if ``inplace``, else a new tensor like it.

    Raises:
        ConstraintError: an argument has a wrong shape, dtype, device, layout or value.
    """
    if not isinstance(x, Tensor):
        raise ConstraintError(f"`x` must be a torch.Tensor, found {type(x).__name__}")
    if x.device.type in ("cpu", "meta"):
        return _apply_in_torch(
            x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate
        )
    if torch.compiler.is_compiling():
        return _apply_in_graph(
            x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate
        )
    from ...backends.triton import launch_rotary

    with torch.no_grad():
        return launch_rotary.apply_rotary(
            x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate
        )


@torch.no_grad()
def _apply_in_torch(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | Tensor | None,
    interleaved: bool,
    inplace: bool,
    conjugate: bool,
) -> Tensor:
    check_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, inplace)
    out = rotate(
        x,
        cos,
        sin,
        seqlen_offsets=seqlen_offsets,
        cu_seqlens=cu_seqlens,
        interleaved=interleaved,
        conjugate=conjugate,
    )
    return x.copy_(out) if inplace else out


@torch.library.custom_op("flash_attn::_rotary", mutates_args=(), device_types="cuda")
def _rotary_op(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offset: int,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    """What a compiled graph holds in place of the launch, which it cannot look into."""
    from ...backends.triton import launch_rotary

    offsets = offset if seqlen_offsets is None else seqlen_offsets
    return launch_rotary.apply_rotary(
        x, cos, sin, offsets, cu_seqlens, interleaved=interleaved, conjugate=conjugate
    )


@_rotary_op.register_fake
def _(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offset: int,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    return torch.empty_like(x)


@torch.no_grad()
def _apply_in_graph(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | Tensor | None,
    interleaved: bool,
    inplace: bool,
    conjugate: bool,
) -> Tensor:
    check_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, inplace)
    varying = seqlen_offsets if isinstance(seqlen_offsets, Tensor) else None
    offset = 0 if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    out = _rotary_op(x, cos, sin, offset, varying, cu_seqlens, interleaved, conjugate)
    return x.copy_(out) if inplace else out
