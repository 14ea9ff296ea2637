"""PyTorch's counter of operations sees what the operators compute."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

import flash_attn.flops  # noqa: F401
from flash_attn import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn import hopper_interface as fa3

FULL = 2 * (16 + 16) * 2 * 4 * 5 * 7  # two products of 16, batch 2, 4 heads, 5 x 7 pairs
CAUSAL = FULL // 35 * (3 + 4 + 5 + 6 + 7)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def tensors(requires_grad=False):
    shapes = ((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16))
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def count(function, *args, **kwargs):
    with FlopCounterMode(display=False) as counter:
        out = function(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops()


def test_dense():
    assert count(flash_attn_func, *tensors()) == FULL
    assert count(flash_attn_func, *tensors(), causal=True) == CAUSAL
    assert count(flash_attn_func, *tensors(), s_aux=torch.zeros(4)) == FULL
    assert count(flash_attn_func, *tensors(True)) == FULL * 7 // 2
    assert count(flash_attn_func, *tensors(True), s_aux=torch.zeros(4), causal=True) == (
        CAUSAL * 7 // 2
    )
    assert count(flash_attn_func, *tensors(), window_size=(0, 0)) == FULL // 7
    assert count(flash_attn_qkvpacked_func, torch.randn(1, 6, 3, 2, 8)) == 4 * 2 * 36 * 8


def test_packed_sequences_count_with_their_lengths():
    x = torch.randn(8, 4, 16)
    for requires_grad, factor in ((False, 2), (True, 7)):
        x.requires_grad_(requires_grad)
        found = count(flash_attn_varlen_func, x, x, x, ints(0, 3, 8), ints(0, 3, 8), 5, 5)
        assert found == factor * 2 * 16 * 4 * (9 + 25)


def test_caches_count_with_the_keys_in_use():
    q, cache, new = torch.randn(2, 1, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 1, 2, 16)
    lengths = ints(3, 5)
    # Appending and attending are one operator where somebody watches.
    assert count(flash_attn_with_kvcache, q, cache, cache.clone(), cache_seqlens=lengths) == (
        4 * 16 * 4 * 8
    )
    assert (
        count(flash_attn_with_kvcache, q, cache, cache.clone(), new, new, cache_seqlens=lengths)
        == 4 * 16 * 4 * 10
    )


def test_the_third_generations_functions():
    q, k, v = tensors()
    assert count(fa3.flash_attn_func, q, k, v, causal=True) == CAUSAL
    assert count(fa3._flash_attn_forward, q, k, v) == FULL
    assert count(fa3._flash_attn_forward, q, k, v, causal=True) == CAUSAL
    wide = torch.randn(2, 7, 2, 32)
    assert count(fa3.flash_attn_func, q, k, wide) == FULL // 2 * 3
    assert count(fa3.flash_attn_func, q, k, wide, qv=torch.randn(2, 5, 4, 32)) == FULL // 2 * 5


def test_fake_tensors_count_with_their_bounds():
    x, cu_seqlens = torch.empty(8, 4, 16, device="meta"), ints(0, 3, 8).to("meta")
    found = count(flash_attn_varlen_func, x, x, x, cu_seqlens, cu_seqlens, 5, 5)
    assert found == 4 * 16 * 4 * 2 * 25


def test_the_import_registers_where_the_counter_is_there():
    code = (
        "import torch.utils.flop_counter as counter, torch, flash_attn\n"
        "assert torch.ops.flash_attn._flash_attn_forward in counter.flop_registry"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=200)
