"""The implementations of attention; :mod:`flash_attn.core.registry` loads them by name."""
