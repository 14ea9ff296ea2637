"""FlashAttention-2's extension module by name: the same functions on this package's kernels."""

from flash_attn.raw_ops import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
