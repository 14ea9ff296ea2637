"""The top-level module ``flash_attn_interface`` within its package."""

from flash_attn_interface import *  # noqa: F403
