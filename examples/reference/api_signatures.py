"""The API reference's signatures as Python, beside those of the package.

Below are the printed blocks; ``def`` and an empty body make them code (differs: in all blocks).
``main`` returns each one with the signature found in the package, which may have more
parameters, keyword-only ones. The return annotation of the package differs: with
``return_attn_probs=True`` a tuple of three comes back, see return_attn_probs.py.
"""

import inspect
from typing import Optional, Tuple  # noqa: UP035

import torch
import torch.nn as nn

import flash_attn

# ruff: noqa: UP006, UP045


class printed:
    """The reference's text."""

    def flash_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: Optional[float] = None,
        causal: bool = False,
        window_size: Tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Optional[torch.Tensor] = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> torch.Tensor: ...

    def flash_attn_qkvpacked_func(
        qkv: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: Optional[float] = None,
        causal: bool = False,
        window_size: Tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Optional[torch.Tensor] = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> torch.Tensor: ...

    def flash_attn_kvpacked_func(
        q: torch.Tensor,
        kv: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: Optional[float] = None,
        causal: bool = False,
        window_size: Tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Optional[torch.Tensor] = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> torch.Tensor: ...

    class FlashAttention(nn.Module):
        def __init__(
            self,
            num_heads: int,
            head_dim: int,
            dropout: float = 0.0,
            causal: bool = False,
            window_size: Tuple[int, int] = (-1, -1),
            alibi_slopes: Optional[torch.Tensor] = None,
        ): ...

    class FlashMHA(nn.Module):
        def __init__(
            self,
            embed_dim: int,
            num_heads: int,
            dropout: float = 0.0,
            causal: bool = False,
            layer_idx: Optional[int] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
        ): ...


NAMES = (
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_kvpacked_func",
    "FlashAttention",
    "FlashMHA",
)


def main() -> dict[str, tuple[inspect.Signature, inspect.Signature]]:
    """Return name -> (printed signature, signature in the package)."""
    pairs = {}
    for name in NAMES:
        actual = inspect.signature(getattr(flash_attn, name))
        pairs[name] = (inspect.signature(getattr(printed, name)), actual)
        print(f"{name}{actual}")
    return pairs


if __name__ == "__main__":
    main()
