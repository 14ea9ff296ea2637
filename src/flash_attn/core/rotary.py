"""What rotary position embedding means, in plain PyTorch.

A row at position p has its first ``rotary_dim`` entries taken in pairs, and pair i is turned by the
angle whose cosine and sine are ``cos[p, i]`` and ``sin[p, i]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConstraintError
from .validate import check_integer, require

MAX_HEADDIM = 256


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Turn the first ``rotary_dim`` entries of every head by its row's position.

    The arithmetic is in float32 (float64 for a float64 ``x``); the other entries keep their bits.
    Positions outside the table use its nearest row. With ``cu_seqlens``, rows that belong to no
    sequence are copied as they are.

    Args:
        x: (batch_size, seqlen, nheads, headdim), or (total, nheads, headdim) with ``cu_seqlens``.
        cos: (seqlen_rotary, rotary_dim / 2), any floating dtype.
        sin: like ``cos``.
        seqlen_offsets: position of the first row of every sequence, one number or (batch_size,).
        cu_seqlens: (batch_size + 1,) row offsets of packed sequences.
        interleaved: pairs are neighbours (0, 1), (2, 3), ... instead of (i, i + rotary_dim / 2).
        conjugate: turn backwards, which is the gradient and the inverse of turning forwards.

    Returns:
        A new tensor with the shape and dtype of ``x``.
    """
    rotary_dim = 2 * cos.shape[-1]
    if x.numel() == 0:
        return torch.empty_like(x)
    positions, inside = _positions(x, seqlen_offsets, cu_seqlens)
    positions = positions.clamp(0, cos.shape[0] - 1)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cosine = cos.to(dtype)[positions].unsqueeze(-2)
    sine = sin.to(dtype)[positions].unsqueeze(-2)
    if conjugate:
        sine = -sine
    head = x[..., :rotary_dim]
    x0, x1 = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    x0, x1 = x0.to(dtype), x1.to(dtype)
    y0, y1 = x0 * cosine - x1 * sine, x0 * sine + x1 * cosine
    turned = torch.stack((y0, y1), -1).flatten(-2) if interleaved else torch.cat((y0, y1), -1)
    turned = turned.to(x.dtype)
    if inside is not None:
        turned = torch.where(inside[:, None, None], turned, head)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def _positions(
    x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Position of every row, and which rows of a packed tensor belong to a sequence (None: all)."""
    rows = torch.arange(x.shape[0 if cu_seqlens is not None else 1], device=x.device)
    if isinstance(seqlen_offsets, Tensor):
        seqlen_offsets = seqlen_offsets.to(torch.int64)
    if cu_seqlens is None:
        if isinstance(seqlen_offsets, Tensor):
            return rows + seqlen_offsets.reshape(-1, 1), None
        return rows + seqlen_offsets, None
    if cu_seqlens.shape[0] < 2:
        return rows, torch.zeros_like(rows, dtype=torch.bool)
    starts = cu_seqlens.to(torch.int64)
    sequence = torch.searchsorted(starts, rows, right=True) - 1
    sequence = sequence.clamp(0, cu_seqlens.shape[0] - 2)
    inside = (starts[sequence] <= rows) & (rows < starts[sequence + 1])
    if isinstance(seqlen_offsets, Tensor):
        seqlen_offsets = seqlen_offsets.expand(cu_seqlens.shape[0] - 1)[sequence]
    return rows - starts[sequence] + seqlen_offsets, inside


def check_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | Tensor | None,
    inplace: bool,
) -> None:
    """The arguments of a rotation fit together, as far as the host can see without waiting.

    Raises:
        ConstraintError: an argument has a wrong shape, dtype, device, layout or value.
    """
    _check_tensors(x, cos, sin, cu_seqlens)
    if isinstance(seqlen_offsets, Tensor):
        batch_size = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_offsets(seqlen_offsets, x, batch_size)
    _check_length(x, cos, seqlen_offsets, cu_seqlens, max_seqlen)
    overlaps = any(
        stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)
    )
    require(
        not (inplace and overlaps),
        f"`x` cannot be rotated in place: it is expanded, found strides {x.stride()}",
    )


def _check_tensors(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> None:
    shape = "(batch_size, seqlen, nheads, headdim)"
    for given, name in ((x, "x"), (cos, "cos"), (sin, "sin"), (cu_seqlens, "cu_seqlens")):
        if not isinstance(given, Tensor) and (name != "cu_seqlens" or given is not None):
            raise ConstraintError(f"`{name}` must be a torch.Tensor, found {type(given).__name__}")
    if cu_seqlens is not None:
        shape = "(total, nheads, headdim) with `cu_seqlens`"
    require(
        x.dim() == (4 if cu_seqlens is None else 3),
        f"`x` must have shape {shape}, found {tuple(x.shape)}",
    )
    require(
        cos.dim() == 2 and cos.shape == sin.shape,
        "`cos` and `sin` must have the same shape (seqlen_rotary, rotary_dim / 2), found "
        f"{tuple(cos.shape)} and {tuple(sin.shape)}",
    )
    for tensor, name in ((x, "x"), (cos, "cos"), (sin, "sin")):
        require(
            tensor.is_floating_point(), f"`{name}` must be floating point, found {tensor.dtype}"
        )
    for table, name in ((cos, "cos"), (sin, "sin"), (cu_seqlens, "cu_seqlens")):
        if table is not None and table.device != x.device:
            raise ConstraintError(f"`{name}` must be on {x.device} like `x`, found {table.device}")
    headdim, rotary_dim = x.shape[-1], 2 * cos.shape[1]
    require(
        rotary_dim <= headdim,
        f"rotary_dim must be <= headdim: `cos` has {rotary_dim // 2} columns for pairs, `x` head "
        f"dim {headdim}",
    )
    require(
        headdim <= MAX_HEADDIM, f"`x` must have head dim at most {MAX_HEADDIM}, found {headdim}"
    )
    if cu_seqlens is not None:
        require(
            cu_seqlens.dim() == 1
            and cu_seqlens.shape[0] > 0
            and cu_seqlens.dtype in (torch.int32, torch.int64),
            "`cu_seqlens` must have shape (batch_size + 1,) and dtype int32, found "
            f"{tuple(cu_seqlens.shape)} and {cu_seqlens.dtype}",
        )


def _check_offsets(seqlen_offsets: Tensor, x: Tensor, batch_size: int) -> None:
    require(
        seqlen_offsets.dtype in (torch.int32, torch.int64),
        f"`seqlen_offsets` must have dtype int32 or int64, found {seqlen_offsets.dtype}",
    )
    require(
        seqlen_offsets.dim() == 0 or seqlen_offsets.shape == (batch_size,),
        f"`seqlen_offsets` must have shape ({batch_size},), found {tuple(seqlen_offsets.shape)}",
    )
    require(
        seqlen_offsets.device == x.device,
        f"`seqlen_offsets` must be on {x.device} like `x`, found {seqlen_offsets.device}",
    )


def _check_length(
    x: Tensor,
    cos: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | Tensor | None,
) -> None:
    """The tables reach the last position, where the host knows it."""
    offset = 0
    if not isinstance(seqlen_offsets, Tensor):
        offset = check_integer(seqlen_offsets, "seqlen_offsets")
    require(offset >= 0, f"`seqlen_offsets` must not be negative, found {offset}")
    if cu_seqlens is None:
        seqlen = x.shape[1]
    elif max_seqlen is None or isinstance(max_seqlen, Tensor):
        # Reading a length off the device would stall it; positions are clamped anyway.
        seqlen = 1 if x.shape[0] else 0
    else:
        seqlen = check_integer(max_seqlen, "max_seqlen")
    require(
        cos.shape[0] >= seqlen + offset,
        f"`cos` and `sin` must have at least {seqlen + offset} rows (seqlen {seqlen} and offset "
        f"{offset}), found {cos.shape[0]}",
    )
