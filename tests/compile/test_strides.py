"""Rows whose strides are multiples of 8, not of 16, are read and written 16 bytes at a time."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

import aot
import cases
from triton import knobs

from flash_attn.backends.triton.launch import alignment_of, strides_are_eights

pytestmark = [
    pytest.mark.skipif(knobs.runtime.interpret, reason="nothing is compiled in the interpreter"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
]
# Their order of summation is that of addresses; see the kernel.
_EXCEPT = "attention_row_statistics"
_ACCESS = re.compile(r"\b(?:ld|st)\.global(?:\.\w+)*?((?:\.v\d)?\.[bf]\d+)\b")
_AHEAD = re.compile(r"cp\.async\.c[ag]\.shared\.global .*\], (0x[0-9a-f]+)")


def accesses(case: cases.Case, arch: str) -> dict[str, Counter[str]]:
    """By kernel, how often it reads or writes global memory, by the size of an access."""
    found = {}
    for one in aot.record(lambda: cases.run_case(case), arch):
        _, compiled = aot.compile_kernel(one, arch)
        ptx = compiled.asm["ptx"]
        found[one.name] = Counter(_ACCESS.findall(ptx)) + Counter(_AHEAD.findall(ptx))
    return found


@pytest.mark.parametrize("headdim", [40, 72, 88])
@pytest.mark.parametrize("kind", ["forward", "backward", "append_kv"])
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_rows_are_read_16_bytes_at_a_time(arch: str, kind: str, headdim: int) -> None:
    found = accesses(cases.Case(kind, headdim, mask="full"), arch)
    found.pop(_EXCEPT, None)
    assert found
    for name, sizes in found.items():
        assert sizes[".v4.b32"] > 0, (name, sizes)
        assert sizes[".b16"] == 0, (name, sizes)
        if kind != "append_kv":
            assert sizes["0x10"] > 0, (name, sizes)


def test_rows_elsewhere_are_read_one_number_at_a_time() -> None:
    """17 columns lie at odd addresses: the reader of the code above sees them."""
    sizes = accesses(cases.Case("forward", 17, mask="full"), "sm80")["attention_forward"]
    assert sizes[".b16"] > 0
    assert sizes["0x10"] == 0


@pytest.mark.parametrize(
    ("shape", "strides", "alignment"),
    [
        ((2, 7, 3, 40), (840, 120, 40, 1), 8),
        ((7, 3, 40), (120, 40, 1), 8),
        ((2, 7, 3, 64), (1344, 192, 64, 1), 16),  # Triton sees it by itself
        ((2, 7, 3, 40), (844, 120, 40, 1), 4),
        ((2, 7, 3, 40), (2**33 + 8, 120, 40, 1), 8),
        ((2, 7, 3, 40), (0, 120, 40, 1), 8),
    ],
)
def test_strides_that_are_eights(
    shape: tuple[int, ...], strides: tuple[int, ...], alignment: int
) -> None:
    x = torch.empty_strided(shape, strides, device="meta")
    expected = alignment == 8
    assert alignment_of(x) == alignment
    even = torch.empty(2, 7, 3, 64, device="meta")
    assert strides_are_eights(x) is expected
    assert strides_are_eights(even, x) is expected
    assert not strides_are_eights(x, even.new_empty(2, 7, 3, 61))
