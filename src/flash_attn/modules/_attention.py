"""Attention as modules without projections: the flash functions and their plain PyTorch twins."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import window_pair
from ..core.validate import require
from ..flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


def get_alibi_slopes(nheads: int) -> list[float]:
    """Return the slopes of ALiBi, one for every head.

    For a power of two they are the geometric sequence that ends at 1/256. Other numbers take the
    sequence of the next smaller power of two and fill up from the one twice as fine.

    Args:
        nheads: number of query heads.

    Raises:
        ConstraintError: ``nheads`` is not positive.
    """
    require(nheads >= 1, f"`nheads` must be at least 1, found {nheads}")
    base = 1 << (nheads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / base) for i in range(1, base + 1)]
    finer = [2.0 ** (-4.0 * i / base) for i in range(1, 2 * base + 1, 2)]
    return slopes + finer[: nheads - base]


def check_dropout(name: str, value: float) -> None:
    """Raise :class:`ConstraintError` unless ``value`` is a probability below one."""
    require(0.0 <= value < 1.0, f"`{name}` must be in [0, 1), found {value}")


class _FlashModule(nn.Module):
    """What the flash modules share: dropout and slopes that stay float32 when the model is cast."""

    alibi_slopes: Tensor | None

    def __init__(
        self, attention_dropout: float, alibi_slopes: Tensor | None, dropout_name: str
    ) -> None:
        super().__init__()
        check_dropout(dropout_name, attention_dropout)
        self.drop = nn.Dropout(attention_dropout)
        slopes = None if alibi_slopes is None else alibi_slopes.detach().to(torch.float32)
        self.register_buffer("alibi_slopes", slopes, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        exact = self.alibi_slopes
        super()._apply(fn, recurse)
        moved = self.alibi_slopes
        if exact is not None and moved is not None and moved.dtype != torch.float32:
            self.alibi_slopes = exact.to(moved.device)
        return self

    @property
    def _dropout_p(self) -> float:
        return self.drop.p if self.training else 0.0


class FlashSelfAttention(_FlashModule):
    """Self-attention on packed queries, keys and values.

    Args:
        causal: hide the keys after the query.
        softmax_scale: factor of the scores, headdim ** -0.5 by default.
        attention_dropout: probability with which a weight is dropped in training.
        window_size: (left, right) reach of a query, -1 for no limit.
        alibi_slopes: (nheads,) or (batch_size, nheads) slopes of the position bias.
        deterministic: bitwise repeatable gradients.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(attention_dropout, alibi_slopes, "attention_dropout")
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.window_size = window_size
        self.deterministic = deterministic

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            qkv: (batch_size, seqlen, 3, nheads, headdim), or (total, 3, nheads, headdim) with
                ``cu_seqlens``.
            causal: overrides the module's setting.
            cu_seqlens: (batch_size + 1,) int32 row offsets of packed sequences.
            max_seqlen: length of the longest packed sequence.

        Returns:
            ``qkv``'s shape without the third-last dimension.

        Raises:
            ConstraintError: an argument is wrong, or ``max_seqlen`` is missing.
        """
        options = (
            self._dropout_p,
            self.softmax_scale,
            self.causal if causal is None else causal,
            self.window_size,
            0.0,
            self.alibi_slopes,
            self.deterministic,
        )
        if cu_seqlens is None:
            out: Tensor = flash_attn_qkvpacked_func(qkv, *options)
        else:
            lengths: Any = (cu_seqlens, max_seqlen)
            require_max_seqlen("max_seqlen", max_seqlen)
            out = flash_attn_varlen_qkvpacked_func(qkv, *lengths, *options)  # type: ignore[call-arg]
        return out


class FlashCrossAttention(_FlashModule):
    """Attention of queries over packed keys and values, which may have fewer heads.

    Args:
        causal: hide the keys after the query; the last query sees the last key.
        softmax_scale: factor of the scores, headdim ** -0.5 by default.
        attention_dropout: probability with which a weight is dropped in training.
        alibi_slopes: (nheads,) or (batch_size, nheads) slopes of the position bias.
        window_size: (left, right) reach of a query, -1 for no limit.
        deterministic: bitwise repeatable gradients.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(attention_dropout, alibi_slopes, "attention_dropout")
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.window_size = window_size
        self.deterministic = deterministic

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: (batch_size, seqlen_q, nheads, headdim), or (total_q, nheads, headdim) with
                ``cu_seqlens``.
            kv: (batch_size, seqlen_k, 2, nheads_k, headdim), or (total_k, 2, nheads_k, headdim).
            causal: overrides the module's setting.
            cu_seqlens: (batch_size + 1,) int32 row offsets of the packed queries.
            max_seqlen: length of the longest packed query sequence.
            cu_seqlens_k: like ``cu_seqlens``, of the keys.
            max_seqlen_k: length of the longest packed key sequence.

        Returns:
            A tensor like ``q``.

        Raises:
            ConstraintError: an argument is wrong or missing.
        """
        options = (
            self._dropout_p,
            self.softmax_scale,
            self.causal if causal is None else causal,
            self.window_size,
            0.0,
            self.alibi_slopes,
            self.deterministic,
        )
        if cu_seqlens is None:
            out: Tensor = flash_attn_kvpacked_func(q, kv, *options)
        else:
            require(cu_seqlens_k is not None, "`cu_seqlens_k` must be given with `cu_seqlens`")
            require_max_seqlen("max_seqlen", max_seqlen)
            require_max_seqlen("max_seqlen_k", max_seqlen_k)
            lengths: Any = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
            out = flash_attn_varlen_kvpacked_func(q, kv, *lengths, *options)  # type: ignore[call-arg]
        return out


def require_max_seqlen(name: str, value: int | Tensor | None) -> None:
    """Raise :class:`ConstraintError` if the bound that packed sequences need is missing."""
    require(value is not None, f"`{name}` must be given with packed sequences, found None")


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    hidden: Tensor | None,
    drop: nn.Dropout,
) -> Tensor:
    """Attention over (batch_size, seqlen, nheads, headdim) where ``hidden`` marks what is masked.

    Rows in which everything is hidden give zeros, as the flash functions do.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    scores = torch.einsum("bthd,bshd->bhts", q, k * scale)
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    probs = torch.softmax(scores, dim=-1, dtype=v.dtype)
    if hidden is not None:
        probs = probs.masked_fill(hidden, 0.0)
    return torch.einsum("bhts,bshd->bthd", drop(probs), v)


def _check_mask(mask: Tensor | None, batch_size: int, seqlen_k: int) -> Tensor | None:
    if mask is None:
        return None
    require(
        tuple(mask.shape) == (batch_size, seqlen_k),
        f"`key_padding_mask` must have shape {(batch_size, seqlen_k)}, found {tuple(mask.shape)}",
    )
    return mask.bool()


class SelfAttention(nn.Module):
    """Self-attention in plain PyTorch operations, in any floating dtype.

    Args:
        causal: hide the keys after the query.
        softmax_scale: factor of the scores, headdim ** -0.5 by default.
        attention_dropout: probability with which a weight is dropped in training.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_dropout("attention_dropout", attention_dropout)
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            qkv: (batch_size, seqlen, 3, nheads, headdim).
            causal: overrides the module's setting.
            key_padding_mask: (batch_size, seqlen), true where a key is to be kept.

        Returns:
            (batch_size, seqlen, nheads, headdim).
        """
        q, k, v = qkv.unbind(2)
        seqlen = q.shape[1]
        mask = _check_mask(key_padding_mask, q.shape[0], seqlen)
        hidden = None
        if self.causal if causal is None else causal:
            place = torch.arange(seqlen, device=q.device)
            hidden = (place > place[:, None])[None, None]
        if mask is not None:
            padding = ~mask[:, None, None]
            hidden = padding if hidden is None else hidden | padding
        return _plain(q, k, v, self.softmax_scale, hidden, self.drop)


class CrossAttention(nn.Module):
    """Attention of queries over packed keys and values in plain PyTorch operations.

    Args:
        causal: hide the keys after the query; the last query sees the last key that is kept.
        softmax_scale: factor of the scores, headdim ** -0.5 by default.
        attention_dropout: probability with which a weight is dropped in training.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_dropout("attention_dropout", attention_dropout)
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: (batch_size, seqlen_q, nheads, headdim).
            kv: (batch_size, seqlen_k, 2, nheads_k, headdim), nheads_k divides nheads.
            causal: overrides the module's setting.
            key_padding_mask: (batch_size, seqlen_k), true where a key is to be kept.

        Returns:
            A tensor like ``q``.
        """
        k, v = kv.unbind(2)
        if k.shape[2] != q.shape[2]:
            require(
                q.shape[2] % k.shape[2] == 0,
                f"`kv` must have a number of heads that divides {q.shape[2]}, found {k.shape[2]}",
            )
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        mask = _check_mask(key_padding_mask, q.shape[0], k.shape[1])
        hidden = None
        if self.causal if causal is None else causal:
            hidden = self._later(q, k, mask)
        if mask is not None:
            padding = ~mask[:, None, None]
            hidden = padding if hidden is None else hidden | padding
        return _plain(q, k, v, self.softmax_scale, hidden, self.drop)

    @staticmethod
    def _later(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """The keys after each query, counting only the keys that are kept."""
        row = torch.arange(q.shape[1], device=q.device)[:, None] - q.shape[1]
        if mask is None:
            return (torch.arange(k.shape[1], device=q.device) > row + k.shape[1])[None, None]
        order = mask.cumsum(-1) - 1
        return (order[:, None] > row + mask.sum(-1)[:, None, None])[:, None]


class FlashAttention(_FlashModule):
    """Attention over separate queries, keys and values; has no parameters.

    Args:
        num_heads: number of query heads.
        head_dim: size of a head, at most 256.
        dropout: probability with which a weight is dropped in training.
        causal: hide the keys after the query; the last query sees the last key.
        window_size: (left, right) reach of a query, -1 for no limit.
        alibi_slopes: (num_heads,) or (batch_size, num_heads) slopes of the position bias.

    Raises:
        ConstraintError: an argument is out of range.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        dropout: float = 0.0,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
    ) -> None:
        require(num_heads >= 1, f"`num_heads` must be at least 1, found {num_heads}")
        require(1 <= head_dim <= 256, f"`head_dim` must be from 1 to 256, found {head_dim}")
        if alibi_slopes is not None:
            require(
                alibi_slopes.dim() in (1, 2) and alibi_slopes.shape[-1] == num_heads,
                f"`alibi_slopes` must have shape ({num_heads},) or (batch_size, {num_heads}), "
                f"found {tuple(alibi_slopes.shape)}",
            )
        window_pair(window_size)
        super().__init__(dropout, alibi_slopes, "dropout")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dropout = dropout
        self.causal = causal
        self.window_size = window_size

    def reset_parameters(self) -> None:
        """Do nothing: there are no parameters."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Args:
            q: (batch_size, seqlen_q, num_heads, head_dim) or (batch_size, seqlen_q,
                num_heads * head_dim).
            k: (batch_size, seqlen_k, num_heads_k, head_dim) or (batch_size, seqlen_k,
                num_heads_k * head_dim), where num_heads_k divides num_heads.
            v: like ``k``.

        Returns:
            A tensor like ``q``.

        Raises:
            ConstraintError: a shape, dtype or device is wrong.
        """
        q_heads, k_heads, v_heads = (
            self._split(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v"))
        )
        require(
            q_heads.shape[2] == self.num_heads,
            f"`q` must have {self.num_heads} heads, found {q_heads.shape[2]}",
        )
        out: Tensor = flash_attn_func(
            q_heads,
            k_heads,
            v_heads,
            dropout_p=self._dropout_p,
            causal=self.causal,
            window_size=self.window_size,
            alibi_slopes=self.alibi_slopes,
        )
        return out.flatten(2) if q.dim() == 3 else out

    def _split(self, x: Tensor, name: str) -> Tensor:
        """Separate the heads of a 3-dimensional tensor and check the head dim of any."""
        fits = x.dim() in (3, 4) and x.shape[-1] > 0
        if fits and x.dim() == 3:
            fits = x.shape[-1] % self.head_dim == 0
        elif fits:
            fits = x.shape[-1] == self.head_dim
        require(
            fits,
            f"`{name}` must have shape (batch_size, seqlen, heads, {self.head_dim}) or (batch_size,"
            f" seqlen, heads * {self.head_dim}), found {tuple(x.shape)}",
        )
        return x.unflatten(-1, (-1, self.head_dim)) if x.dim() == 3 else x

    def extra_repr(self) -> str:
        """Describe the settings."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}, "
            f"window_size={self.window_size}"
        )
