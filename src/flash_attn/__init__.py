"""FlashAttention-Plus: the ``flash_attn`` API on kernels that are compiled on first use."""

import sys
from importlib import import_module
from pkgutil import extend_path

# Other distributions may add subpackages (flash_attn.cute).
__path__ = extend_path(__path__, __name__)

__version__ = "2.8.3"

from .core.registry import set_backend, use_backend
from .flash_attn_interface import (
    attention_probs,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "FlashAttention",
    "FlashMHA",
    "__version__",
    "attention_probs",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "set_backend",
    "use_backend",
]


# PyTorch's counter loads Triton: it is for programs that have it already.
if "torch.utils.flop_counter" in sys.modules:
    import_module(".flops", __name__)


def __getattr__(name: str) -> object:
    # The module classes load on first use: most programs need only the functions.
    if name in ("FlashAttention", "FlashMHA"):
        return getattr(import_module(".modules.mha", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
