"""Multi-head attention over several ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.validate import require
from ..ops.fused_dense import ColumnParallelLinear, RowParallelLinear
from ._attention import get_alibi_slopes
from ._heads import AttentionHeads, HeadOptions, Packing, check_heads


class ParallelMHA(AttentionHeads):
    """Multi-head attention whose heads are split over the ranks of a process group.

    Heads are dealt out in groups that share a key head; the first ranks get what does not divide.

    Args:
        embed_dim: size of the input and the output, divisible by ``num_heads``.
        num_heads: number of query heads over all ranks.
        process_group: the ranks.
        num_heads_kv: number of key and value heads over all ranks, ``num_heads`` by default.
        sequence_parallel: input and output are split along their first dimension.

    The other arguments are those of :class:`flash_attn.modules.mha.MHA`.

    Raises:
        ConstraintError: an argument is out of range, or there are more ranks than key heads.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group: Any,
        num_heads_kv: int | None = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        use_flash_attn: bool = False,
        checkpointing: bool = False,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        nheads_k = check_heads(embed_dim, num_heads, num_heads_kv)
        self.embed_dim, self.process_group = embed_dim, process_group
        first, last = _share(nheads_k, process_group)
        group_size, head_dim = num_heads // nheads_k, embed_dim // num_heads
        options = HeadOptions(
            dropout, softmax_scale, causal, layer_idx, rotary_emb_dim, rotary_emb_base,
            rotary_emb_scale_base, rotary_emb_interleaved, use_alibi, window_size, use_flash_attn,
            checkpointing,
        )  # fmt: skip
        slopes = None
        if use_alibi:
            slopes = get_alibi_slopes(num_heads)[first * group_size : last * group_size]
        heads = ((last - first) * group_size, last - first, head_dim)
        self._set_up_heads(*heads, options, slopes, device)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.Wqkv = ColumnParallelLinear(
            embed_dim, embed_dim + 2 * head_dim * nheads_k, process_group, qkv_proj_bias,
            sequence_parallel, multiple_of=head_dim * (group_size + 2), **where,
        )  # fmt: skip
        self.out_proj = RowParallelLinear(
            embed_dim, embed_dim, process_group, out_proj_bias, sequence_parallel,
            multiple_of=head_dim * group_size, **where,
        )  # fmt: skip

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return an empty cache (batch_size, max_seqlen, 2, nheads_k, headdim) of this rank."""
        return self.out_proj.weight.new_zeros(
            self._cache_shape(batch_size, max_seqlen), dtype=dtype, requires_grad=False
        )

    def forward(
        self,
        x: Tensor,
        seqlen: int | None = None,
        inference_params: Any = None,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        causal: bool | None = None,
    ) -> Tensor:
        """Attend with this rank's heads and sum over the ranks.

        Args:
            x: (batch_size, seqlen, embed_dim), or (batch_size * seqlen, embed_dim) with
                ``seqlen``, or (total, embed_dim) with ``cu_seqlens``.
            seqlen: length of the sequences in a flat ``x``, so that sequence parallelism splits
                tokens instead of sequences.
            inference_params: state of the generation, whose KV cache is continued and extended.
            key_padding_mask: (batch_size, seqlen), true where a token is to be kept.
            cu_seqlens: (batch_size + 1,) int32 row offsets of packed sequences.
            max_seqlen: length of the longest packed sequence.
            causal: overrides the module's setting.

        Returns:
            A tensor like ``x``.

        Raises:
            ConstraintError: an argument is wrong or does not go with another.
        """
        packing = Packing(cu_seqlens, max_seqlen)
        self._check_packing(packing, key_padding_mask, inference_params)
        qkv = self.Wqkv(x).unflatten(-1, (-1, self.head_dim))
        if seqlen is not None:
            qkv = qkv.unflatten(0, (-1, seqlen))
        if inference_params is None:
            context = self._attend_self(qkv, key_padding_mask, packing, causal)
        else:
            context = self._attend_cached(qkv, inference_params, causal)
        context = context.flatten(-2)
        out: Tensor = self.out_proj(context if seqlen is None else context.flatten(0, 1))
        return out


def _share(nheads_k: int, process_group: Any) -> tuple[int, int]:
    """The range of key heads that this rank holds."""
    ranks, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    require(
        nheads_k >= ranks, f"`num_heads_kv` must be at least the {ranks} ranks, found {nheads_k}"
    )
    size, extra = divmod(nheads_k, ranks)
    first = rank * size + min(rank, extra)
    return first, first + size + int(rank < extra)
