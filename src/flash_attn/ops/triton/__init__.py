"""Fused operations whose GPU kernels are written in Triton."""
