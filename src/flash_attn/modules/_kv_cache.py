"""Where the attention modules keep keys and values while a model generates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.validate import require


class CacheView(NamedTuple):
    """One layer's cache for the sequences at hand.

    Attributes:
        kv: (batch_size, max_seqlen, 2, nheads_k, headdim), a view of the cache.
        offset: number of tokens that are in it: one number, or (batch_size,) int32.
    """

    kv: Tensor
    offset: int | Tensor

    @property
    def is_empty(self) -> bool:
        """Whether the next tokens are known to be the first."""
        return isinstance(self.offset, int) and self.offset == 0

    def write(self, kv: Tensor) -> Tensor | None:
        """Store (batch_size, seqlen, 2, nheads_k, headdim) behind what is there.

        Returns:
            None if all sequences have the same length, else (batch_size, max_seqlen), true where
            the cache is filled.
        """
        kv = kv.detach().to(self.kv.dtype)
        if isinstance(self.offset, int):
            self.kv[:, self.offset : self.offset + kv.shape[1]] = kv
            return None
        steps = torch.arange(kv.shape[1], device=kv.device)
        rows = torch.arange(kv.shape[0], device=kv.device)[:, None]
        self.kv[rows, self.offset[:, None] + steps] = kv
        filled = self.offset[:, None] + kv.shape[1]
        return torch.arange(self.kv.shape[1], device=kv.device) < filled


def open_cache(kv: Tensor, inference_params: Any, layer_idx: int | None) -> CacheView:
    """Find or allocate the cache of a layer.

    Args:
        kv: (batch_size, seqlen, 2, nheads_k, headdim), the tokens that will be written.
        inference_params: the state of the generation
            (:class:`flash_attn.utils.generation.InferenceParams`).
        layer_idx: key of the layer in its ``key_value_memory_dict``.

    Raises:
        ConstraintError: the layer has no index, or the cache has no room.
    """
    if layer_idx is None:
        require(False, "`layer_idx` must be set in the constructor to use `inference_params`")
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        rows, length = inference_params.max_batch_size, inference_params.max_seqlen
        caches[layer_idx] = kv.new_zeros((rows, length, *kv.shape[2:]), requires_grad=False)
    cache: Tensor = caches[layer_idx]
    require(
        cache.dim() == 5 and cache.shape[2:] == kv.shape[2:],
        f"`key_value_memory_dict` must hold a tensor of shape (batch_size, seqlen, "
        f"{', '.join(map(str, kv.shape[2:]))}) for layer {layer_idx}, found {tuple(cache.shape)}",
    )
    first, seqlen = inference_params.batch_size_offset, kv.shape[1]
    last = first + kv.shape[0]
    require(
        last <= cache.shape[0],
        f"`max_batch_size` must be at least {last} for this input, found {cache.shape[0]}",
    )
    start: int = inference_params.seqlen_offset
    lengths: Tensor | None = inference_params.lengths_per_sample
    # With lengths of their own the sequences are bounded by the kernels, not by a wait for them.
    needed = seqlen if lengths is not None else start + seqlen
    require(
        needed <= cache.shape[1],
        f"`max_seqlen` must be at least {needed} for this input, found {cache.shape[1]}",
    )
    if lengths is None:
        return CacheView(cache[first:last], start)
    return CacheView(cache[first:last], lengths[first:last].to(torch.int32))


def _update_kv_cache(kv: Tensor, inference_params: Any, layer_idx: int) -> Tensor:
    """Append to a layer's cache.

    Args:
        kv: (batch_size, seqlen, 2, nheads_k, headdim).
        inference_params: the state of the generation.
        layer_idx: key of the layer in its ``key_value_memory_dict``.

    Returns:
        (batch_size, seqlen_offset + seqlen, 2, nheads_k, headdim), a view of the cache; of full
        length if the sequences have lengths of their own.
    """
    cache = open_cache(kv, inference_params, layer_idx)
    cache.write(kv)
    if isinstance(cache.offset, int):
        return cache.kv[:, : cache.offset + kv.shape[1]]
    return cache.kv
