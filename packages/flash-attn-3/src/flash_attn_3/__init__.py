"""FlashAttention-3's package by name; ``flash_attn_3._C`` registers its operators."""

from importlib import metadata as _metadata

try:
    __version__ = _metadata.version("flash-attn-3")
except _metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "3.0.0"
