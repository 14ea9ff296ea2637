"""Multi-head attention layers, and the attention modules inside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.validate import require
from ..flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from ..layers.rotary import RotaryEmbedding
from ..ops.fused_dense import ColumnParallelLinear, FusedDense, RowParallelLinear
from ._attention import (
    CrossAttention,
    FlashAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from ._heads import AttentionHeads, HeadOptions, Packing, check_heads
from ._kv_cache import _update_kv_cache
from ._parallel import ParallelMHA

__all__ = [
    "MHA",
    "ColumnParallelLinear",
    "CrossAttention",
    "FlashAttention",
    "FlashCrossAttention",
    "FlashMHA",
    "FlashSelfAttention",
    "FusedDense",
    "ParallelMHA",
    "RotaryEmbedding",
    "RowParallelLinear",
    "SelfAttention",
    "_update_kv_cache",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_alibi_slopes",
]


class MHA(AttentionHeads):
    """Multi-head attention with grouped heads, rotary embedding, windows, ALiBi and a KV cache.

    The state dict holds ``Wqkv`` (``Wq`` and ``Wkv`` with ``cross_attn``) and ``out_proj``, and
    with ``dwconv`` the convolutions. The output of ``Wqkv`` is ordered (nheads + 2 * nheads_k,
    headdim): queries, keys, values.

    Args:
        embed_dim: size of the input and the output, divisible by ``num_heads``.
        num_heads: number of query heads.
        num_heads_kv: number of key and value heads, a divisor of ``num_heads`` (the default).
        cross_attn: take keys and values from another input.
        qkv_proj_bias: bias of the input projections.
        out_proj_bias: bias of the output projection.
        dropout: probability with which an attention weight is dropped in training.
        softmax_scale: factor of the scores, headdim ** -0.5 by default.
        causal: hide the keys after the query.
        layer_idx: key of this layer in the KV cache.
        dwconv: depthwise causal convolution of width 3 behind the input projections.
        rotary_emb_dim: how many entries of a head to rotate, 0 for none.
        rotary_emb_base: wavelength of the slowest pair, over 2 pi.
        rotary_emb_scale_base: positions over which XPos scales once; None turns XPos off.
        rotary_emb_interleaved: pairs are neighbours instead of (i, i + rotary_emb_dim / 2).
        use_alibi: position bias; needs ``use_flash_attn``.
        window_size: (left, right) reach of a query, -1 for no limit; needs ``use_flash_attn``.
        fused_bias_fc: make the projections of :class:`FusedDense` (same parameters and results).
        use_flash_attn: use the flash functions instead of plain PyTorch operations.
        return_residual: return (output, input).
        checkpointing: recompute the attention in the backward pass.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ConstraintError: an argument is out of range or does not go with another.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        nheads_k = check_heads(embed_dim, num_heads, num_heads_kv)
        options = HeadOptions(
            dropout, softmax_scale, causal, layer_idx, rotary_emb_dim, rotary_emb_base,
            rotary_emb_scale_base, rotary_emb_interleaved, use_alibi, window_size, use_flash_attn,
            checkpointing,
        )  # fmt: skip
        slopes = get_alibi_slopes(num_heads) if use_alibi else None
        head_dim = embed_dim // num_heads
        self._set_up_heads(num_heads, nheads_k, head_dim, options, slopes, device)
        self.embed_dim, self.cross_attn = embed_dim, cross_attn
        self.dwconv, self.return_residual = dwconv, return_residual
        linear = FusedDense if fused_bias_fc else nn.Linear
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_dim = 2 * head_dim * nheads_k
        if cross_attn:
            self.Wq = linear(embed_dim, embed_dim, bias=qkv_proj_bias, **where)
            self.Wkv = linear(embed_dim, kv_dim, bias=qkv_proj_bias, **where)
        else:
            self.Wqkv = linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **where)
        if dwconv:
            self._make_convolutions(embed_dim, kv_dim, where)
        self.out_proj = linear(embed_dim, embed_dim, bias=out_proj_bias, **where)

    def _make_convolutions(self, q_dim: int, kv_dim: int, where: dict[str, Any]) -> None:
        def convolution(channels: int) -> nn.Conv1d:
            return nn.Conv1d(channels, channels, 3, padding=2, groups=channels, **where)

        if not self.cross_attn and self.num_heads == self.num_heads_kv:
            self.dwconv_qkv = convolution(q_dim + kv_dim)
        else:
            self.dwconv_q, self.dwconv_kv = convolution(q_dim), convolution(kv_dim)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return an empty cache (batch_size, max_seqlen, 2, nheads_k, headdim) for this layer.

        Args:
            batch_size: largest number of sequences.
            max_seqlen: largest number of tokens in a sequence.
            dtype: dtype of the cache, that of the parameters by default.
        """
        return self.out_proj.weight.new_zeros(
            self._cache_shape(batch_size, max_seqlen), dtype=dtype, requires_grad=False
        )

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        *,
        causal: bool | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Any:
        """Attend.

        Args:
            x: (batch_size, seqlen, embed_dim), or (total, embed_dim) with ``cu_seqlens``.
            x_kv: source of keys and values, ``x`` by default; with ``cross_attn`` only.
            key_padding_mask: (batch_size, seqlen_k), true where a token is to be kept.
            cu_seqlens: (batch_size + 1,) int32 row offsets of packed sequences.
            max_seqlen: length of the longest packed sequence.
            mixer_subset: index along the sequence of the queries; with ``cross_attn`` only.
            inference_params: state of the generation, whose KV cache is continued and extended.
            causal: overrides the module's setting.
            cu_seqlens_k: like ``cu_seqlens``, of ``x_kv``; the same by default.
            max_seqlen_k: like ``max_seqlen``, of ``x_kv``; the same by default.

        Returns:
            A tensor like ``x``, or (output, x) with ``return_residual``. In a self-attention on
            the flash path, tokens that ``key_padding_mask`` drops get the output bias alone.

        Raises:
            ConstraintError: an argument is wrong or does not go with another.
        """
        packing = Packing(cu_seqlens, max_seqlen)
        self._check_packing(packing, key_padding_mask, inference_params)
        self._check_dwconv(packing, inference_params)
        if self.cross_attn:
            require(inference_params is None, "`inference_params` must be None with `cross_attn`")
            if cu_seqlens is not None:
                packing = Packing(
                    cu_seqlens,
                    max_seqlen,
                    cu_seqlens if cu_seqlens_k is None else cu_seqlens_k,
                    max_seqlen if max_seqlen_k is None else max_seqlen_k,
                )
            q, kv = self._project_cross(x, x if x_kv is None else x_kv, mixer_subset)
            context = self._attend_cross(q, kv, key_padding_mask, packing, causal)
        else:
            require(x_kv is None, "`x_kv` must be None without `cross_attn`")
            require(mixer_subset is None, "`mixer_subset` must be None without `cross_attn`")
            qkv = self._project(x)
            if inference_params is None:
                context = self._attend_self(qkv, key_padding_mask, packing, causal)
            else:
                context = self._attend_cached(qkv, inference_params, causal)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _check_dwconv(self, packing: Packing, inference_params: Any) -> None:
        if self.dwconv:
            for name, value in (("cu_seqlens", packing[0]), ("inference_params", inference_params)):
                require(value is None, f"`{name}` must be None with `dwconv`")

    def _project(self, x: Tensor) -> Tensor:
        """Input to (..., nheads + 2 * nheads_k, headdim)."""
        qkv = self.Wqkv(x)
        if self.dwconv and self.num_heads == self.num_heads_kv:
            qkv = _convolve(self.dwconv_qkv, qkv)
        elif self.dwconv:
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
            q, kv = _convolve(self.dwconv_q, q), _convolve(self.dwconv_kv, kv)
            qkv = torch.cat((q, kv), dim=-1)
        out: Tensor = qkv.unflatten(-1, (-1, self.head_dim))
        return out

    def _project_cross(self, x: Tensor, x_kv: Tensor, subset: Any) -> tuple[Tensor, Tensor]:
        """Inputs to q (..., nheads, headdim) and kv (..., 2, nheads_k, headdim)."""
        q = self.Wq(x if subset is None else x[:, subset])
        kv = self.Wkv(x_kv)
        if self.dwconv:
            q, kv = _convolve(self.dwconv_q, q), _convolve(self.dwconv_kv, kv)
        heads = (2, self.num_heads_kv, self.head_dim)
        return q.unflatten(-1, (-1, self.head_dim)), kv.unflatten(-1, heads)


def _convolve(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """Convolve (batch_size, seqlen, channels) along the sequence, looking back only."""
    y: Tensor = convolution(x.transpose(1, 2))
    return y[..., : x.shape[1]].transpose(1, 2).contiguous()


class FlashMHA(MHA):
    """Multi-head attention on the flash functions: ``MHA`` with ``use_flash_attn=True``.

    The arguments after ``dtype`` are those of :class:`MHA`.

    Args:
        embed_dim: size of the input and the output, divisible by ``num_heads``.
        num_heads: number of query heads.
        dropout: probability with which an attention weight is dropped in training.
        causal: hide the keys after the query.
        layer_idx: key of this layer in the KV cache; needed with ``inference_params`` only.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ConstraintError: an argument is out of range or does not go with another.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        causal: bool = False,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, num_heads_kv, cross_attn, qkv_proj_bias, out_proj_bias, dropout,
            softmax_scale, causal, layer_idx, dwconv, rotary_emb_dim, rotary_emb_base,
            rotary_emb_scale_base, rotary_emb_interleaved, use_alibi, window_size, fused_bias_fc,
            use_flash_attn=True,
            return_residual=return_residual,
            checkpointing=checkpointing,
            device=device,
            dtype=dtype,
        )  # fmt: skip

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        inference_params: Any = None,
        *,
        x_kv: Tensor | None = None,
        mixer_subset: Any = None,
        causal: bool | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Any:
        """Attend; the arguments are those of :meth:`MHA.forward`.

        Args:
            x: (batch_size, seqlen, embed_dim), or (total, embed_dim) with ``cu_seqlens``.
            key_padding_mask: (batch_size, seqlen), true where a token is to be kept.
            cu_seqlens: (batch_size + 1,) int32 row offsets of packed sequences.
            max_seqlen: length of the longest packed sequence.
            inference_params: state of the generation, whose KV cache is continued and extended.

        Returns:
            A tensor like ``x``, or (output, x) with ``return_residual``.

        Raises:
            ConstraintError: an argument is wrong or does not go with another.
        """
        return super().forward(
            x,
            x_kv,
            key_padding_mask,
            cu_seqlens,
            max_seqlen,
            mixer_subset,
            inference_params,
            causal=causal,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_k=max_seqlen_k,
        )
