"""The rotary kernel in Triton's interpreter, against its meaning in PyTorch.

The interpreter has to be chosen before Triton is imported, so a child process, which runs this file
as a script, computes all cases and prints what went wrong with each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INT32_MAX = 2**31 - 1


def tables(seqlen: int, half: int, dtype: torch.dtype = torch.float32):
    angle = torch.randn(seqlen, half)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def compare(x, cos, sin, seqlen_offsets=0, cu_seqlens=None, **flags):
    """Out of place, over poisoned memory, and in place: both must equal ``rotate``."""
    from flash_attn.backends.triton.launch_rotary import _launch, apply_rotary
    from flash_attn.core.rotary import rotate

    before = x.clone()
    want = rotate(x, cos, sin, seqlen_offsets=seqlen_offsets, cu_seqlens=cu_seqlens, **flags)
    tolerance = {torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-14}[x.dtype]
    close = {"atol": tolerance, "rtol": tolerance, "equal_nan": True}
    out = torch.full_like(x, float("nan"))
    options = {"interleaved": False, "conjugate": False} | flags
    _launch(out, x, cos, sin, seqlen_offsets, cu_seqlens, **options)
    torch.testing.assert_close(out, want, **close)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    rest = 2 * cos.shape[1]
    assert torch.equal(out[..., rest:], x[..., rest:])
    version = x._version
    same = apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, inplace=True, **options)
    assert same is x
    assert x._version > version
    torch.testing.assert_close(x, want, **close)


def dense(**flags):
    cos, sin = tables(30, 16)
    compare(torch.randn(2, 9, 3, 40), cos, sin, **flags)
    compare(torch.randn(2, 9, 3, 40), cos, sin, 21, **flags)


def packed(**flags):
    cos, sin = tables(60, 8)
    for bounds in ([0, 5, 5, 6, 40], [0, 0, 0], [2, 7, 30], [0], [0, 40]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        x = torch.randn(40, 3, 20)
        x[38:] = float("inf")
        compare(x, cos, sin, cu_seqlens=cu_seqlens, **flags)
        offsets = torch.arange(len(bounds) - 1, dtype=torch.int32) * 3
        compare(torch.randn(40, 3, 20), cos, sin, offsets, cu_seqlens, **flags)


def offsets_tensor(**flags):
    cos, sin = tables(70, 8)
    for dtype in (torch.int32, torch.int64):
        offsets = torch.tensor([0, 61, 7], dtype=dtype)
        compare(torch.randn(3, 9, 2, 16), cos, sin, offsets, **flags)


def odd_sizes(**flags):
    for half, headdim, nheads in ((1, 2, 1), (3, 7, 5), (11, 22, 2), (29, 59, 1), (5, 128, 3)):
        cos, sin = tables(4, half)
        compare(torch.randn(1, 4, nheads, headdim), cos, sin, **flags)


def many_tiles(**flags):
    cos, sin = tables(75, 32)
    compare(torch.randn(3, 75, 3, 64), cos, sin, **flags)
    compare(torch.randn(70, 1, 2, 64), cos, sin, torch.arange(70) % 5, **flags)


def dtypes(**flags):
    for dtype in (torch.float16, torch.float32, torch.float64):
        for table in (torch.float16, torch.float32):
            cos, sin = tables(9, 8, table)
            compare(torch.randn(2, 9, 2, 24).to(dtype), cos, sin, **flags)


def strided(**flags):
    cos, sin = tables(24, 8)
    base = torch.randn(2, 6, 12, 3, 41)
    for x in (
        base[:, :, :, 0, :20].permute(0, 2, 1, 3),
        base[:, :, ::2, 1, ::2],
        base[:, :, :, 2, 1:17],
    ):
        beside = base.clone()
        values = x.clone()
        compare(x, cos, sin, **flags)
        x.copy_(values)
        assert torch.equal(base, beside)
    wide = torch.stack((cos, cos), dim=-1)
    compare(torch.randn(1, 5, 2, 16), wide[:12, :, 0], sin[::2], **flags)


def hostile_offsets(**flags):
    """The tables lie between rows of NaN, which one step outside them would bring in."""
    cos, sin = (torch.full((40, 8), float("nan")) for _ in range(2))
    cos[15:25], sin[15:25] = tables(10, 8)
    inner = (cos[15:25], sin[15:25])
    extreme = torch.tensor([-1, 9, 10, INT32_MAX, -INT32_MAX - 1], dtype=torch.int32)
    compare(torch.randn(5, 4, 2, 16), *inner, extreme, **flags)
    extreme = torch.tensor([-(2**62), 2**62])
    compare(torch.randn(2, 4, 2, 16), *inner, extreme, **flags)
    x = torch.randn(20, 2, 16)
    cu_seqlens = torch.tensor([0, 15, INT32_MAX], dtype=torch.int32)
    compare(x, *inner, cu_seqlens=cu_seqlens, **flags)
    assert x.isfinite().all()


def hostile_bounds(**flags):
    from flash_attn.backends.triton.launch_rotary import apply_rotary

    cos, sin = tables(9, 8)
    for bounds in ([-5, 4, -7, 9], [INT32_MAX, -INT32_MAX - 1], [9, 5, 0]):
        out = apply_rotary(
            torch.randn(9, 2, 16), cos, sin, cu_seqlens=torch.tensor(bounds), **flags
        )
        assert out.isfinite().all()


def empty(**flags):
    from flash_attn.backends.triton.launch_rotary import apply_rotary

    cos, sin = tables(5, 4)
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)):
        assert apply_rotary(torch.empty(shape), cos, sin, **flags).shape == shape
    x = torch.randn(1, 5, 2, 8)
    assert torch.equal(apply_rotary(x, cos[:, :0], sin[:, :0], **flags), x)


CASES = (dense, packed, offsets_tensor, odd_sizes, many_tiles, dtypes, strided, hostile_offsets,
         hostile_bounds, empty)  # fmt: skip
FLAGS = tuple(
    {"interleaved": interleaved, "conjugate": conjugate}
    for interleaved in (False, True)
    for conjugate in (False, True)
)


def label(case, flags) -> str:
    return "-".join([case.__name__, *(name for name, on in flags.items() if on)])


ALL = [(case, flags) for case in CASES for flags in FLAGS]


def main() -> None:
    failures = {}
    for case, flags in ALL:
        torch.manual_seed(0)
        try:
            case(**flags)
            failures[label(case, flags)] = ""
        except Exception as error:
            failures[label(case, flags)] = f"{type(error).__name__}: {error}"
    sys.stdout.write("\n" + json.dumps(failures) + "\n")


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    pytest.importorskip("triton")
    source = str(Path(__file__).parents[2] / "src")
    paths = [source, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert child.returncode == 0, child.stderr
    result: dict[str, str] = json.loads(child.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", [label(case, flags) for case, flags in ALL])
def test_kernel_equals_meaning(failures, name):
    assert failures[name] == ""


if __name__ == "__main__":
    main()
