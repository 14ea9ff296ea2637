"""What happens between the projections of a multi-head attention layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..bert_padding import pad_input, unpad_input
from ..core.validate import require
from ..flash_attn_interface import flash_attn_with_kvcache
from ..layers.rotary import RotaryEmbedding, apply_rotary_emb
from ._attention import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    require_max_seqlen,
)
from ._kv_cache import CacheView, open_cache


class Packing(NamedTuple):
    """The bounds of packed sequences; all None for a dense batch."""

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None


class HeadOptions(NamedTuple):
    """The settings of :class:`AttentionHeads`, under the names that ``MHA`` gives them."""

    dropout: float
    softmax_scale: float | None
    causal: bool
    layer_idx: int | None
    rotary_emb_dim: int
    rotary_emb_base: float
    rotary_emb_scale_base: float | None
    rotary_emb_interleaved: bool
    use_alibi: bool
    window_size: tuple[int, int]
    use_flash_attn: bool
    checkpointing: bool


def check_heads(embed_dim: int, num_heads: int, num_heads_kv: int | None) -> int:
    """Return the number of key heads after checking that the numbers divide each other."""
    require(num_heads >= 1, f"`num_heads` must be at least 1, found {num_heads}")
    require(
        embed_dim >= 1 and embed_dim % num_heads == 0,
        f"`embed_dim` must be divisible by `num_heads`, found {embed_dim} and {num_heads}",
    )
    nheads_k = num_heads if num_heads_kv is None else num_heads_kv
    require(
        nheads_k >= 1 and num_heads % nheads_k == 0,
        f"`num_heads_kv` must divide `num_heads`, found {nheads_k} and {num_heads}",
    )
    return nheads_k


def _check_options(options: HeadOptions, head_dim: int) -> None:
    dim = options.rotary_emb_dim
    require(0.0 <= options.dropout < 1.0, f"`dropout` must be in [0, 1), found {options.dropout}")
    require(
        0 <= dim <= head_dim and dim % 2 == 0,
        f"`rotary_emb_dim` must be even and from 0 to {head_dim} (head dim), found {dim}",
    )
    require(
        options.use_flash_attn or not options.use_alibi,
        "`use_alibi` must be False without `use_flash_attn`, found True",
    )
    require(
        options.use_flash_attn or tuple(options.window_size) == (-1, -1),
        "`window_size` must be (-1, -1) without `use_flash_attn`, found "
        f"{tuple(options.window_size)}",
    )


class AttentionHeads(nn.Module):
    """Rotary embedding, attention and KV cache on projected heads; the base of the MHA modules."""

    inner_attn: nn.Module
    inner_cross_attn: nn.Module

    def _set_up_heads(
        self,
        num_heads: int,
        num_heads_kv: int,
        head_dim: int,
        options: HeadOptions,
        alibi_slopes: list[float] | None,
        device: Any,
    ) -> None:
        """Store the settings and make the parts; the constructors call it once."""
        _check_options(options, head_dim)
        self.num_heads, self.num_heads_kv, self.head_dim = num_heads, num_heads_kv, head_dim
        self.softmax_scale, self.causal = options.softmax_scale, options.causal
        self.layer_idx = options.layer_idx
        self.rotary_emb_dim = options.rotary_emb_dim
        self.use_alibi, self.window_size = options.use_alibi, tuple(options.window_size)
        self.use_flash_attn, self.checkpointing = options.use_flash_attn, options.checkpointing
        if self.rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                self.rotary_emb_dim,
                base=options.rotary_emb_base,
                interleaved=options.rotary_emb_interleaved,
                scale_base=options.rotary_emb_scale_base,
                device=device,
            )
        common: dict[str, Any] = {
            "causal": options.causal,
            "softmax_scale": options.softmax_scale,
            "attention_dropout": options.dropout,
        }
        if not options.use_flash_attn:
            self.inner_attn, self.inner_cross_attn = (
                SelfAttention(**common),
                CrossAttention(**common),
            )
            return
        slopes = None
        if alibi_slopes is not None:
            slopes = torch.tensor(alibi_slopes, dtype=torch.float32, device=device)
        common |= {"window_size": self.window_size, "alibi_slopes": slopes}
        self.inner_attn = FlashSelfAttention(**common)
        self.inner_cross_attn = FlashCrossAttention(**common)

    def _run(self, attention: Callable[..., Tensor], *args: Any) -> Tensor:
        """Call an inner module, with recomputation in the backward pass if asked for."""
        if self.checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(attention, *args, use_reentrant=False)
            return out
        return attention(*args)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(..., nheads + 2 * nheads_k, headdim) to q and kv (..., 2, nheads_k, headdim)."""
        kv = qkv[..., self.num_heads :, :].unflatten(-2, (2, self.num_heads_kv))
        return qkv[..., : self.num_heads, :], kv

    def _attend_self(
        self,
        qkv: Tensor,
        key_padding_mask: Tensor | None,
        packing: Packing,
        causal: bool | None,
    ) -> Tensor:
        """Self-attention on (batch_size, seqlen, nheads + 2 * nheads_k, headdim), or packed."""
        if self.rotary_emb_dim > 0:
            qkv = self._rotate(qkv, packing)
        if not self.use_flash_attn:
            return self._run(self.inner_attn, self._equal_heads(qkv), causal, key_padding_mask)
        if key_padding_mask is None:
            return self._flash_self(qkv, packing, causal)
        batch_size, seqlen = qkv.shape[:2]
        rows, indices, cu_seqlens, max_seqlen, _ = unpad_input(qkv, key_padding_mask.bool())
        out = self._flash_self(rows, Packing(cu_seqlens, max_seqlen), causal)
        return pad_input(out, indices, batch_size, seqlen)

    def _flash_self(self, qkv: Tensor, packing: Packing, causal: bool | None) -> Tensor:
        cu_seqlens, max_seqlen = packing.cu_seqlens, packing.max_seqlen
        if self.num_heads == self.num_heads_kv:
            qkv = qkv.unflatten(-2, (3, self.num_heads))
            return self._run(self.inner_attn, qkv, causal, cu_seqlens, max_seqlen)
        q, kv = self._split(qkv)
        bounds = (cu_seqlens, max_seqlen, cu_seqlens, max_seqlen)
        return self._run(self.inner_cross_attn, q, kv, causal, *bounds)

    def _equal_heads(self, qkv: Tensor) -> Tensor:
        """Repeat the key heads: (batch_size, seqlen, 3, nheads, headdim)."""
        if self.num_heads == self.num_heads_kv:
            return qkv.unflatten(-2, (3, self.num_heads))
        q, kv = self._split(qkv)
        kv = kv.repeat_interleave(self.num_heads // self.num_heads_kv, dim=-2)
        return torch.cat((q.unsqueeze(-3), kv), dim=-3)

    def _attend_cross(
        self,
        q: Tensor,
        kv: Tensor,
        key_padding_mask: Tensor | None,
        packing: Packing,
        causal: bool | None,
    ) -> Tensor:
        """Attention of q over kv (batch_size, seqlen_k, 2, nheads_k, headdim), or packed."""
        if self.rotary_emb_dim > 0:
            q, kv = self._rotate_cross(q, kv, packing)
        if not self.use_flash_attn:
            return self._run(self.inner_cross_attn, q, kv, causal, key_padding_mask)
        if key_padding_mask is None:
            return self._run(self.inner_cross_attn, q, kv, causal, *packing)
        batch_size, seqlen_q = q.shape[:2]
        kv, _, cu_seqlens_k, max_seqlen_k, _ = unpad_input(kv, key_padding_mask.bool())
        ends = torch.arange(batch_size + 1, dtype=torch.int32, device=q.device) * seqlen_q
        bounds = (ends, seqlen_q, cu_seqlens_k, max_seqlen_k)
        out = self._run(self.inner_cross_attn, q.flatten(0, 1), kv, causal, *bounds)
        return out.unflatten(0, (batch_size, seqlen_q))

    def _tables(self, seqlen: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cos and sin of the queries and of the keys."""
        rotary = self.rotary_emb
        rotary._update_cos_sin_cache(seqlen, x.device, x.dtype)
        cos, sin = rotary._cos_cached, rotary._sin_cached
        cos_k, sin_k = rotary._cos_k_cached, rotary._sin_k_cached
        if cos is None or sin is None:  # the update has just made them
            raise RuntimeError("the rotary tables are missing")
        if cos_k is None or sin_k is None:
            return cos, sin, cos, sin
        return cos, sin, cos_k, sin_k

    def _rotate(self, qkv: Tensor, packing: Packing) -> Tensor:
        if packing.cu_seqlens is None:
            heads = self.num_heads
            out: Tensor = self.rotary_emb(qkv, num_heads_q=heads)
            return out
        q, kv = self._split(qkv)
        q, kv = self._rotate_packed(q, kv, packing, packing)
        return torch.cat((q, kv.flatten(-3, -2)), dim=-2)

    def _rotate_cross(self, q: Tensor, kv: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        if packing.cu_seqlens is None:
            longest = max(q.shape[1], kv.shape[1])
            out: tuple[Tensor, Tensor] = self.rotary_emb(q, kv, max_seqlen=longest)
            return out
        keys = Packing(packing.cu_seqlens_k, packing.max_seqlen_k)
        return self._rotate_packed(q, kv, packing, keys)

    def _rotate_packed(
        self, q: Tensor, kv: Tensor, bounds_q: Packing, bounds_k: Packing
    ) -> tuple[Tensor, Tensor]:
        """Rotate q (total_q, nheads, headdim) and kv (total_k, 2, nheads_k, headdim)."""
        longest = max(bounds_q.max_seqlen or 0, bounds_k.max_seqlen or 0)
        cos, sin, cos_k, sin_k = self._tables(longest, q)
        style = self.rotary_emb.interleaved
        cu_seqlens, max_seqlen = bounds_q.cu_seqlens, bounds_q.max_seqlen
        q = apply_rotary_emb(q, cos, sin, style, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        cu_seqlens, max_seqlen = bounds_k.cu_seqlens, bounds_k.max_seqlen
        k, v = kv.unbind(1)
        k = apply_rotary_emb(k, cos_k, sin_k, style, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return q, torch.stack((k, v), dim=1)

    def _attend_cached(self, qkv: Tensor, inference_params: Any, causal: bool | None) -> Tensor:
        """Self-attention that continues what is in the cache, and extends it."""
        causal = self.causal if causal is None else causal
        cache = open_cache(self._split(qkv)[1], inference_params, self.layer_idx)
        if self.use_flash_attn and not cache.is_empty:
            return self._decode(qkv, cache, causal)
        if self.rotary_emb_dim > 0:
            qkv = self._rotate_at(qkv, cache)
        q, kv = self._split(qkv)
        filled = cache.write(kv)
        if self.use_flash_attn:
            return self._flash_self(qkv, Packing(), causal)
        if filled is None:
            end = int(cache.offset) + kv.shape[1]
            return self._run(self.inner_cross_attn, q, cache.kv[:, :end].to(q.dtype), causal)
        return self._run(self.inner_cross_attn, q, cache.kv.to(q.dtype), causal, filled)

    def _rotate_at(self, qkv: Tensor, cache: CacheView) -> Tensor:
        """Rotate at the positions behind the cache."""
        require(
            self.rotary_emb.scale_base is None,
            "`rotary_emb_scale_base` must be None with `inference_params`, found "
            f"{self.rotary_emb.scale_base}",
        )
        longest, heads = cache.kv.shape[1], self.num_heads
        out: Tensor = self.rotary_emb(qkv, None, cache.offset, longest, heads)
        return out

    def _decode(self, qkv: Tensor, cache: CacheView, causal: bool) -> Tensor:
        """Append to the cache, rotate and attend in one call; without gradients."""
        tables: dict[str, Any] = {}
        if self.rotary_emb_dim > 0:
            # The call puts all queries at one position unless there is a mask.
            masked = causal or self.window_size != (-1, -1)
            plain = self.rotary_emb.scale_base is None and self.rotary_emb_dim % 16 == 0
            if plain and (masked or qkv.shape[1] == 1):
                dtype = cache.kv.dtype
                cos, sin, _, _ = self._tables(cache.kv.shape[1], qkv.to(dtype))
                tables = {"rotary_cos": cos, "rotary_sin": sin}
                tables["rotary_interleaved"] = self.rotary_emb.interleaved
            else:
                qkv = self._rotate_at(qkv, cache)
        q, kv = self._split(qkv.to(cache.kv.dtype))
        slopes: Any = self.inner_cross_attn.alibi_slopes
        out: Tensor = flash_attn_with_kvcache(
            q,
            cache.kv[:, :, 0],
            cache.kv[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=cache.offset,
            softmax_scale=self.softmax_scale,
            causal=causal,
            window_size=self.window_size,
            alibi_slopes=slopes,
            **tables,
        )
        return out.to(qkv.dtype)

    def _check_packing(
        self, packing: Packing, key_padding_mask: Tensor | None, inference_params: Any
    ) -> None:
        """What cannot be combined."""
        if inference_params is not None:
            for name, value in (("key_padding_mask", key_padding_mask), ("cu_seqlens", packing[0])):
                require(value is None, f"`{name}` must be None with `inference_params`")
        if packing.cu_seqlens is None:
            return
        require_max_seqlen("max_seqlen", packing.max_seqlen)
        require(key_padding_mask is None, "`key_padding_mask` must be None with `cu_seqlens`")
        require(self.use_flash_attn, "`cu_seqlens` must be None without `use_flash_attn`")

    def _cache_shape(self, batch_size: int, max_seqlen: int) -> tuple[int, ...]:
        return (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
