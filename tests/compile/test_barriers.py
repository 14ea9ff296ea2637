"""The reader of Triton's GPU dialect finds barriers that nobody uses."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

import barriers

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
