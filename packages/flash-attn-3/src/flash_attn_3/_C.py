"""Stands for upstream's extension: importing it registers ``torch.ops.flash_attn_3.*``."""

from flash_attn import hopper_raw_ops as hopper_raw_ops
