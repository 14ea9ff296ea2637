"""The reader of Triton's GPU dialect finds barriers that nobody uses, or that share memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

import aot
import barriers
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

_TEXT = """
  tt.func public @kernel() {{
    %full = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, #smem, mutable> loc(#loc1)
    %full_1 = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, #smem, mutable> loc(#loc1)
    %data = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xf32, #shared1, #smem, mutable> loc(#loc1)
    %a = ttg.memdesc_index %full[%c0_i32] : !ttg.memdesc<2x1xi64, #shared> -> !ttg.memdesc<1xi64>
    ttng.init_barrier %a, 1 : !ttg.memdesc<1xi64, #shared, #smem, mutable> loc(#loc2)
    %b = ttg.memdesc_index %full_1[%c0_i32] : !ttg.memdesc<2x1xi64, #shared> -> !ttg.memdesc<1xi64>
    ttng.init_barrier %b, 1 : !ttg.memdesc<1xi64, #shared, #smem, mutable> loc(#loc2)
    {use}
    ttg.local_dealloc %full_1 : !ttg.memdesc<2x1xi64, #shared, #smem, mutable> loc(#loc2)
"""
_WAIT = "ttng.wait_barrier {}, %phase : !ttg.memdesc<1xi64, #shared, #smem, mutable> loc(#loc3)"


@pytest.mark.parametrize(
    ("use", "want"),
    [
        ("", ["full", "full_1"]),
        (_WAIT.format("%a"), ["full_1"]),
        (_WAIT.format("%b"), ["full"]),
        ("ttg.warp_specialize(%scale, %full_1, %data) attributes {}", ["full"]),
        ("ttg.warp_specialize(%full, %full_1) attributes {}", []),
        ("ttg.warp_specialize(%full_2, %data) attributes {}", ["full", "full_1"]),
    ],
)
def test_unused_barriers_are_found(use: str, want: list[str]) -> None:
    assert barriers.unused(_TEXT.format(use=use)) == want


_PLACED = """
    %data = ttg.local_alloc {{allocation.offset = 0 : i32}} : () -> !ttg.memdesc<2x64x64xbf16, #s, #smem, mutable>
    %full = ttg.local_alloc {{allocation.offset = {full} : i32}} : () -> !ttg.memdesc<2x1xi64, #s, #smem, mutable>
    %a = ttg.memdesc_index %full[%c0_i32] : !ttg.memdesc<2x1xi64, #s> -> !ttg.memdesc<1xi64>
    ttng.init_barrier %a, 1 : !ttg.memdesc<1xi64, #shared, #smem, mutable>
    {invalidation}
"""  # noqa: E501
_INVALIDATION = "ttng.inval_barrier %a : !ttg.memdesc<1xi64, #shared, #smem, mutable>"


@pytest.mark.parametrize(
    ("full", "invalidation", "want"),
    [
        (16384, "", []),
        (16376, "", ["full at 16376 in data"]),
        (0, "", ["full at 0 in data"]),
        (0, _INVALIDATION, []),
    ],
)
def test_overlaid_barriers_are_found(full: int, invalidation: str, want: list[str]) -> None:
    placed = _PLACED.format(full=full, invalidation=invalidation)
    assert barriers.overlaid(placed) == want


@gluon.jit
def _barrier_and_data(numbers, IS_USED: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    i = gl.arange(0, 256, LAYOUT)
    data = gl.allocate_shared_memory(gl.int32, [256], PLAIN)
    data.store(gl.load(numbers + i))
    gl.store(numbers + i, data.load(LAYOUT))
    if IS_USED:
        mbarrier.arrive(barrier, count=1)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.parametrize("is_used", [True, False])
def test_the_compiler_gives_away_what_nobody_uses(is_used: bool) -> None:
    numbers = torch.empty(256, dtype=torch.int32, device="meta")
    one = aot.Launch(_barrier_and_data, (numbers,), {"IS_USED": is_used, "num_warps": 4}, None)
    ttgir = aot.compile_kernel(one, "sm90")[1].asm["ttgir"]
    found = [barriers.unused(ttgir), barriers.overlaid(barriers.allocated(ttgir))]
    assert found == ([[], []] if is_used else [["barrier"], ["barrier at 0 in data"]])
