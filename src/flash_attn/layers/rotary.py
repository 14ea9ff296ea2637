"""Rotary position embedding: differentiable functions and the module that keeps the tables.

The functions whose names end in an underscore, and ``apply_rotary_emb`` with ``inplace=True``,
overwrite their input. Gradients flow through the returned tensor, so go on with that one. Incoming
gradients are never overwritten: autograd may have handed the same tensor to another branch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.validate import require
from ..errors import ConstraintError
from ..ops.triton.rotary import apply_rotary

__all__ = [
    "ApplyRotaryEmb",
    "ApplyRotaryEmbKV_",
    "ApplyRotaryEmbQKV_",
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Turn every pair (a, b) of the last dimension into (-b, a).

    Args:
        x: (..., dim) with an even dim.
        interleaved: pairs are neighbours instead of (i, i + dim / 2).
    """
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """Rotate with PyTorch operations alone, in the dtypes of the arguments.

    Args:
        x: (batch_size, seqlen, nheads, headdim).
        cos: (seqlen, rotary_dim / 2) or (batch_size, seqlen, rotary_dim / 2).
        sin: like ``cos``.
        interleaved: pairs are neighbours instead of (i, i + rotary_dim / 2).

    Raises:
        ConstraintError: rotary_dim is larger than headdim.
    """
    rotary_dim = 2 * cos.shape[-1]
    require(
        rotary_dim <= x.shape[-1],
        f"rotary_dim must be <= headdim, found {rotary_dim} and {x.shape[-1]}",
    )
    cos, sin = (_spread(table, interleaved) for table in (cos, sin))
    head, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    return torch.cat((head * cos + rotate_half(head, interleaved) * sin, rest), dim=-1)


def _spread(table: Tensor, interleaved: bool) -> Tensor:
    """(..., seqlen, dim / 2) to (..., seqlen, 1, dim): an entry for both partners of a pair."""
    if interleaved:
        return table.repeat_interleave(2, dim=-1).unsqueeze(-2)
    return torch.cat((table, table), dim=-1).unsqueeze(-2)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out


class ApplyRotaryEmb(torch.autograd.Function):
    """Autograd of :func:`apply_rotary_emb`; the gradient turns backwards."""

    @staticmethod
    def forward(
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        inplace: bool = False,
        seqlen_offsets: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | Tensor | None = None,
        conjugate: bool = False,
    ) -> Tensor:
        return apply_rotary(
            x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        # What callers leave out at the end has its default.
        given = (*inputs, *(False, False, 0, None, None, False)[len(inputs) - 3 :])
        _, cos, sin, interleaved, _, seqlen_offsets, cu_seqlens, max_seqlen, conjugate = given
        offsets = _save(ctx, seqlen_offsets, cos, sin, cu_seqlens)
        ctx.options = (interleaved, offsets, max_seqlen, conjugate)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, cu_seqlens, varying = ctx.saved_tensors
        interleaved, offset, max_seqlen, conjugate = ctx.options
        offsets = offset if varying is None else varying
        dx = _apply(
            ApplyRotaryEmb,
            dout,
            cos,
            sin,
            interleaved,
            False,
            offsets,
            cu_seqlens,
            max_seqlen,
            not conjugate,
        )
        return dx, None, None, None, None, None, None, None, None


def _save(ctx: Any, seqlen_offsets: int | Tensor, *tensors: Tensor | None) -> int:
    """Save the tables, then the offsets if they are a tensor; return them if they are a number."""
    if isinstance(seqlen_offsets, Tensor):
        ctx.save_for_backward(*tensors, seqlen_offsets)
        return 0
    ctx.save_for_backward(*tensors, None)
    return seqlen_offsets


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """Rotate the first ``rotary_dim`` entries of every head by the position of its row.

    Args:
        x: (batch_size, seqlen, nheads, headdim), or (total, nheads, headdim) with ``cu_seqlens``.
        cos: (seqlen_rotary, rotary_dim / 2) with rotary_dim <= headdim.
        sin: like ``cos``.
        interleaved: pairs are neighbours (0, 1), (2, 3), ... instead of (i, i + rotary_dim / 2).
        inplace: overwrite ``x``.
        seqlen_offsets: position of the first row of every sequence, one number or (batch_size,).
        cu_seqlens: (batch_size + 1,) int32 row offsets of packed sequences.
        max_seqlen: length of the longest packed sequence.

    Returns:
        A tensor of x's shape, which shares its memory if ``inplace``. Gradients reach ``x`` only.

    Raises:
        ConstraintError: an argument has a wrong shape, dtype, device, layout or value.
    """
    return _apply(
        ApplyRotaryEmb, x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen
    )


apply_rotary_emb_func = apply_rotary_emb


class _Tables(NamedTuple):
    """The tables of the queries, and those of the keys where they differ."""

    cos: Tensor
    sin: Tensor
    cos_k: Tensor | None
    sin_k: Tensor | None


def _queries_and_keys(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Views of a packed tensor: its queries, its keys, and both as one run of heads if possible."""
    if qkv.dim() == 5:
        require(
            qkv.shape[2] == 3,
            "`qkv` must have shape (batch_size, seqlen, 3, nheads, headdim), found "
            f"{tuple(qkv.shape)}",
        )
        q, k = qkv[:, :, 0], qkv[:, :, 1]
        joint = qkv[:, :, :2].flatten(2, 3) if qkv.stride(2) == q.shape[2] * q.stride(2) else None
        return q, k, joint
    if num_heads_q is None or qkv.dim() != 4:
        raise ConstraintError(
            "`qkv` must have shape (batch_size, seqlen, 3, nheads, headdim), or (batch_size, "
            "seqlen, num_heads_q + 2 * num_heads_k, headdim) with `num_heads_q`, found "
            f"{tuple(qkv.shape)} and {num_heads_q}"
        )
    nheads_k = (qkv.shape[2] - num_heads_q) // 2
    require(
        num_heads_q >= 0 and nheads_k >= 0 and qkv.shape[2] == num_heads_q + 2 * nheads_k,
        f"`qkv` must have num_heads_q + 2 * num_heads_k heads, found {qkv.shape[2]} heads and "
        f"`num_heads_q` {num_heads_q}",
    )
    last = num_heads_q + nheads_k
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:last], qkv[:, :, :last]


def _rotate_packed(
    qkv: Tensor,
    tables: _Tables,
    interleaved: bool,
    seqlen_offsets: int | Tensor,
    num_heads_q: int | None,
    conjugate: bool,
) -> None:
    """Rotate queries and keys in place, by one launch if they use the same tables."""
    q, k, joint = _queries_and_keys(qkv, num_heads_q)
    cos, sin, cos_k, sin_k = tables
    parts = [(q, cos, sin), (k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)]
    if joint is not None and cos_k is None and sin_k is None:
        parts = [(joint, cos, sin)]
    for x, part_cos, part_sin in parts:
        apply_rotary(
            x,
            part_cos,
            part_sin,
            seqlen_offsets,
            interleaved=interleaved,
            inplace=True,
            conjugate=conjugate,
        )


class ApplyRotaryEmbQKV_(torch.autograd.Function):  # noqa: N801 - the name is public
    """Autograd of :func:`apply_rotary_emb_qkv_`."""

    @staticmethod
    def forward(
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cos_k: Tensor | None = None,
        sin_k: Tensor | None = None,
        interleaved: bool = False,
        seqlen_offsets: int | Tensor = 0,
        num_heads_q: int | None = None,
        conjugate: bool = False,
    ) -> Tensor:
        tables = _Tables(cos, sin, cos_k, sin_k)
        _rotate_packed(qkv, tables, interleaved, seqlen_offsets, num_heads_q, conjugate)
        return qkv

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        given = (*inputs, *(None, None, False, 0, None, False)[len(inputs) - 3 :])
        _, *tables, interleaved, seqlen_offsets, num_heads_q, conjugate = given
        offset = _save(ctx, seqlen_offsets, *tables)
        ctx.options = (interleaved, offset, num_heads_q, conjugate)

    @staticmethod
    def backward(ctx: Any, dqkv: Tensor) -> tuple[Tensor | None, ...]:
        *tables, varying = ctx.saved_tensors
        interleaved, offset, num_heads_q, conjugate = ctx.options
        offsets = offset if varying is None else varying
        dqkv = _apply(
            ApplyRotaryEmbQKV_,
            dqkv.clone(),
            *tables,
            interleaved,
            offsets,
            num_heads_q,
            not conjugate,
        )
        return dqkv, None, None, None, None, None, None, None, None


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate the queries and keys of a packed tensor in place.

    Args:
        qkv: (batch_size, seqlen, 3, nheads, headdim), or (batch_size, seqlen,
            num_heads_q + 2 * num_heads_k, headdim) with ``num_heads_q``.
        cos: (seqlen_rotary, rotary_dim / 2) with rotary_dim <= headdim.
        sin: like ``cos``.
        cos_k: the keys' table, ``cos`` if None.
        sin_k: the keys' table, ``sin`` if None.
        interleaved: pairs are neighbours (0, 1), (2, 3), ... instead of (i, i + rotary_dim / 2).
        seqlen_offsets: position of the first row of every sequence, one number or (batch_size,).
        num_heads_q: number of query heads of a 4-dimensional ``qkv``.

    Returns:
        ``qkv``, which carries the gradients.

    Raises:
        ConstraintError: an argument has a wrong shape, dtype, device, layout or value.
    """
    return _apply(
        ApplyRotaryEmbQKV_, qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q
    )


class ApplyRotaryEmbKV_(torch.autograd.Function):  # noqa: N801 - the name is public
    """Autograd of :func:`apply_rotary_emb_kv_`."""

    @staticmethod
    def forward(
        kv: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        seqlen_offsets: int | Tensor = 0,
        conjugate: bool = False,
    ) -> Tensor:
        require(
            kv.dim() == 5 and kv.shape[2] == 2,
            "`kv` must have shape (batch_size, seqlen, 2, nheads, headdim), found "
            f"{tuple(kv.shape)}",
        )
        apply_rotary(
            kv[:, :, 0],
            cos,
            sin,
            seqlen_offsets,
            interleaved=interleaved,
            inplace=True,
            conjugate=conjugate,
        )
        return kv

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        given = (*inputs, *(False, 0, False)[len(inputs) - 3 :])
        _, cos, sin, interleaved, seqlen_offsets, conjugate = given
        ctx.options = (interleaved, _save(ctx, seqlen_offsets, cos, sin), conjugate)

    @staticmethod
    def backward(ctx: Any, dkv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, varying = ctx.saved_tensors
        interleaved, offset, conjugate = ctx.options
        offsets = offset if varying is None else varying
        dkv = _apply(ApplyRotaryEmbKV_, dkv.clone(), cos, sin, interleaved, offsets, not conjugate)
        return dkv, None, None, None, None, None


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotate the keys of a packed tensor in place.

    Args:
        kv: (batch_size, seqlen, 2, nheads, headdim).
        cos: (seqlen_rotary, rotary_dim / 2) with rotary_dim <= headdim.
        sin: like ``cos``.
        interleaved: pairs are neighbours (0, 1), (2, 3), ... instead of (i, i + rotary_dim / 2).
        seqlen_offsets: position of the first row of every sequence, one number or (batch_size,).

    Returns:
        ``kv``, which carries the gradients.

    Raises:
        ConstraintError: an argument has a wrong shape, dtype, device, layout or value.
    """
    return _apply(ApplyRotaryEmbKV_, kv, cos, sin, interleaved, seqlen_offsets)


class RotaryEmbedding(torch.nn.Module):
    """Rotary position embedding (RoFormer) with cached tables, or XPos with ``scale_base``.

    XPos scales queries up and keys down with their position, so that attention decays with the
    distance. The module has no parameters and adds nothing to a state dict.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Prepare the frequencies; the tables are computed when a length is known.

        Args:
            dim: how many entries of a head to rotate (rotary_dim).
            base: wavelength of the slowest pair, over 2 pi.
            interleaved: pairs are neighbours instead of (i, i + dim / 2).
            scale_base: positions over which XPos scales once; None turns XPos off.
            device: where the frequencies live.
        """
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = self._compute_scale(device) if scale_base is not None else None
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return 1.0 / self.base**exponents

    def _compute_scale(self, device: torch.device | str | None = None) -> Tensor:
        entries = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (entries + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the tables reach ``seqlen`` positions on ``device`` in ``dtype``."""
        device = self.inv_freq.device if device is None else torch.device(device)
        dtype = torch.float32 if dtype is None else dtype
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
            # Autograd cannot save tensors of inference mode. (A compiler cannot ask.)
            and not (self.training and not torch.compiler.is_compiling() and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        # Angles are large numbers: they need float32 even when the model was cast to 16 bits.
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        inv_freq = self.inv_freq.to(device)
        if inv_freq.dtype != torch.float32:
            inv_freq = self._compute_inv_freq(device)
        # Not a matrix product, which autocast would run in 16 bits.
        angles = positions[:, None] * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        scale = self.scale.to(device)
        if scale.dtype != torch.float32:
            scale = self._compute_scale(device)
        power = (positions - seqlen // 2) / self.scale_base
        growth = scale ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * growth).to(dtype), (sin * growth).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / growth).to(dtype), (sin / growth).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate queries and keys in place.

        Args:
            qkv: (batch_size, seqlen, 3, nheads, headdim); or (batch_size, seqlen,
                num_heads_q + 2 * num_heads_k, headdim) with ``num_heads_q``; or, with ``kv``, the
                queries (batch_size, seqlen, nheads, headdim).
            kv: (batch_size, seqlen, 2, nheads_k, headdim).
            seqlen_offset: position of the first row, one number or (batch_size,).
            max_seqlen: how far the tables must reach at least; needed on the first call if
                ``seqlen_offset`` is a tensor.
            num_heads_q: number of query heads of a 4-dimensional packed ``qkv``.

        Returns:
            ``qkv``, or ``(q, kv)`` if ``kv`` is given.

        Raises:
            ConstraintError: an argument is wrong, or the tables' length is unknown.
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(int(max_seqlen), qkv.device, qkv.dtype)
        elif not isinstance(seqlen_offset, Tensor):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, qkv.device, qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ConstraintError(
                "`max_seqlen` must be given on the first call with `seqlen_offset` a tensor, "
                "found None"
            )
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        cos_k, sin_k = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
