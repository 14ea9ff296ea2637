"""Every environment variable of this package.

All but ``FLASH_ATTENTION_USE_FLAGGEMS`` are read once, at import; that one is looked at on every
call, because programs set it after importing.
"""

from __future__ import annotations

import os

from .errors import ConstraintError

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off", ""})


def _parse_switch(name: str, text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ConstraintError(
        f"environment variable {name} must be TRUE or FALSE (1/0, yes/no, on/off), found {text!r}"
    )


# FLASH_ATTN_CHECK=1: look at the contents of length and index tensors and raise on bad ones. It
# synchronises with the device; without it, such values are clamped inside the kernels.
CHECK_INDICES = _parse_switch("FLASH_ATTN_CHECK", os.environ.get("FLASH_ATTN_CHECK", "0"))

# FLASH_ATTN_PRINT_PLAN=1: log every new launch plan once.
PRINT_PLAN = _parse_switch("FLASH_ATTN_PRINT_PLAN", os.environ.get("FLASH_ATTN_PRINT_PLAN", "0"))

_last_text: str | bytes | None = None
_last_value = True


_NAME = "FLASH_ATTENTION_USE_FLAGGEMS"
_STORED_NAME: str | bytes = os.environ.encodekey(_NAME)


def use_flaggems() -> bool:
    """``FLASH_ATTENTION_USE_FLAGGEMS``: True (the default) is the Triton family of kernels, False
    asks for the original CUDA kernels."""
    global _last_text, _last_value
    try:
        # As it is stored: undecoded on POSIX systems, which costs a tenth of `get`.
        text = os.environ._data.get(_STORED_NAME)  # type: ignore[attr-defined]
    except AttributeError:  # a plain dictionary in its place
        text = os.environ.get(_NAME)
    if text != _last_text:
        _last_value = not text or _parse_switch(_NAME, os.fsdecode(text))
        _last_text = text
    return _last_value
