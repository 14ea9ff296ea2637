"""The top-level module ``flash_attn_config`` within its package."""

from flash_attn_config import CONFIG as CONFIG
from flash_attn_config import show as show
