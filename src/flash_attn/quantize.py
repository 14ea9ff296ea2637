"""float8 inputs for attention: q, k and v in e4m3 with the factors that undo it.

A float8 number has 3 bits of mantissa and a narrow range, so few large channels cost all others
their precision. A Hadamard rotation of q and k along the head dim spreads them over all channels;
it is orthonormal, so the scores stay what they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .core import rng
from .core.arguments import check_tensors
from .core.outputs import last_dim_contiguous
from .core.problem import is_float8
from .core.validate import check_index, check_integer, check_qkv, check_tensor, require
from .errors import ConstraintError

__all__ = ["QuantizedQKV", "quantize_fp8"]

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max  # 448
# A descale is a normal float32 number: dividing by it is exact to a rounding step.
_SMALLEST_DESCALE = torch.finfo(torch.float32).tiny


class QuantizedQKV(NamedTuple):
    """float8 tensors and their factors: ``q`` stands for ``q.float() * q_descale``.

    Attributes:
        q: float8_e4m3fn, shape as given; with ``hadamard`` rotated.
        k: likewise.
        v: likewise, never rotated.
        q_descale: (batch, nheads_k) float32, shared by the query heads of a key head.
        k_descale: (batch, nheads_k) float32.
        v_descale: (batch, nheads_k) float32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_descale: Tensor
    k_descale: Tensor
    v_descale: Tensor


@torch.no_grad()
def quantize_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    per_head: bool = True,
    hadamard: bool = False,
    seed: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> QuantizedQKV:
    """q, k and v in float8 (e4m3), with the descales that attention takes beside them.

    The largest finite magnitude becomes 448, the type's largest; where all are 0 the factor is 1.
    NaN and infinities become NaN and leave the other numbers alone. Not differentiable. The host
    never waits for the device.

    Args:
        q: (batch, seqlen_q, nheads, headdim), or packed (total_q, nheads, headdim); float16,
            bfloat16, float32 or float64.
        k: (batch, seqlen_k, nheads_k, headdim), or packed (total_k, nheads_k, headdim).
        v: like k; its head dim may differ.
        per_head: one factor for each sequence and key head; False: one for each tensor.
        hadamard: rotate q and k along the head dim; apply it after rotary embedding. Head dims
            that are no power of two are rotated in blocks of the largest one that divides them,
            odd ones not at all.
        seed: with ``hadamard``, flip channels' signs at random first, the same ones for the same
            seed (0 to 2**63 - 1). None: no flips.
        cu_seqlens_q: (batch + 1,) int32 row bounds of packed queries; packing needs both.
        cu_seqlens_k: (batch + 1,) int32 row bounds of packed keys. Rows of no sequence become 0.

    Raises:
        ConstraintError: an argument is wrong.
    """
    check_tensors(q=q, k=k, v=v)
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if hadamard:
        q, k = _rotated(q, seed), _rotated(k, seed)
    elif seed is not None:
        raise ConstraintError(f"`seed` is for `hadamard=True`, found {seed!r}; leave it out")
    q8, q_descale = _quantized(q, k.shape[-2], per_head, cu_seqlens_q)
    k8, k_descale = _quantized(k, k.shape[-2], per_head, cu_seqlens_k)
    v8, v_descale = _quantized(v, k.shape[-2], per_head, cu_seqlens_k)
    return QuantizedQKV(q8, k8, v8, q_descale, k_descale, v_descale)


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        missing = "cu_seqlens_k" if packed else "cu_seqlens_q"
        raise ConstraintError(f"`cu_seqlens_q` and `cu_seqlens_k` go together: `{missing}` is None")
    rows = "total" if packed else "batch, seqlen"
    for name, x, heads in (("q", q, "nheads"), ("k", k, "nheads_k"), ("v", v, "nheads_k")):
        check_tensor(x, name, 3 if packed else 4, f"({rows}, {heads}, headdim)")
        if is_float8(x.dtype):
            raise ConstraintError(f"`{name}` is float8 already; pass what it was made from")
    check_qkv(q, k, v)
    check_index(cu_seqlens_q, "cu_seqlens_q", q, (None,))
    if cu_seqlens_q is not None:
        require(cu_seqlens_q.shape[0] > 0, "`cu_seqlens_q` must have batch + 1 elements, found 0")
        check_index(cu_seqlens_k, "cu_seqlens_k", q, (cu_seqlens_q.shape[0],))
    else:
        require(
            q.shape[0] == k.shape[0],
            f"`k` must have batch size {q.shape[0]} like `q`, found {k.shape[0]}",
        )


def _rotated(x: Tensor, seed: int | None) -> Tensor:
    """(..., headdim) times an orthonormal matrix of Hadamard blocks, in float32."""
    headdim, width = x.shape[-1], 1
    while headdim % (2 * width) == 0:
        width *= 2
    x = x.float()
    if seed is not None:
        x = x * _signs(headdim, seed, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return torch.matmul(x.unflatten(-1, (-1, width)), _hadamard(width, x.device)).flatten(-2)


def _hadamard(width: int, device: torch.device) -> Tensor:
    """(width, width) orthonormal Hadamard matrix of Sylvester's construction."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < width:
        upper = torch.cat((matrix, matrix), dim=1)
        lower = torch.cat((matrix, -matrix), dim=1)
        matrix = torch.cat((upper, lower))
    return matrix * width**-0.5


def _signs(headdim: int, seed: int, device: torch.device) -> Tensor:
    """(headdim,) random +1 and -1, made on the device."""
    seed = check_integer(seed, "seed")
    require(seed >= 0, f"`seed` must not be negative, found {seed}")
    channel = torch.arange(headdim, device=device)
    zero = torch.zeros_like(channel)
    words = rng.philox(zero + seed, channel, zero, zero, zero)
    return 1.0 - 2.0 * (words[0] & 1).float()


def _quantized(
    x: Tensor, nheads_k: int, per_head: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x`` in float8 and its (batch, nheads_k) descales."""
    x, group = x.float(), x.shape[-2] // nheads_k
    # Rows and their sequence: packed rows are (total,) with an index, dense ones (batch, seqlen).
    number = None if cu_seqlens is None else _sequence_of_rows(cu_seqlens, x.shape[0])
    batch_size = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    largest = _largest(x, nheads_k, batch_size, number)
    if not per_head and largest.numel():
        largest = largest.amax().expand(largest.shape)
    descale = (largest / _LARGEST).clamp_min(_SMALLEST_DESCALE)
    descale = torch.where(largest > 0.0, descale, 1.0)
    if number is None:
        factor = descale[:, None]
    else:
        factor = F.pad(descale, (0, 0, 0, 1), value=1.0)[number]
        x = x.masked_fill((number == batch_size)[:, None, None], 0.0)
    scaled = x / factor.repeat_interleave(group, dim=-1)[..., None]
    # Conversions of infinities differ: some saturate, some give NaN.
    return torch.where(scaled.isfinite(), scaled, torch.nan).to(_FLOAT8), descale


def _sequence_of_rows(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) int64: which sequence each packed row belongs to, their number for none."""
    rows = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    number = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    return torch.where(number < 0, cu_seqlens.shape[0] - 1, number)


def _largest(x: Tensor, nheads_k: int, batch_size: int, number: Tensor | None) -> Tensor:
    """(batch, nheads_k): the largest finite magnitude of each sequence and key head, or 0."""
    if x.numel() == 0:
        return x.new_zeros(batch_size, nheads_k)
    size = x.abs().nan_to_num(nan=0.0, posinf=0.0)
    size = size.unflatten(-2, (nheads_k, -1)).amax(dim=(-2, -1))
    if number is None:
        return size.amax(dim=1)
    table = x.new_zeros(batch_size + 1, nheads_k)
    table.scatter_reduce_(0, number[:, None].expand_as(size), size, "amax")
    return table[:batch_size]
