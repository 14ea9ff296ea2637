"""Merging partial results: the function, its kernel, and that it undoes a division of the keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import INTERPRETED
from torch import Tensor

import flash_attn_interface as fa3
from flash_attn.core.combine import merge
from flash_attn.errors import ConstraintError

INF = float("inf")


def parts(splits: int, seqlen: int, heads: int, headdim: int, batch: int = 2) -> tuple[Tensor, ...]:
    """Float32 partial results; some saw no key, and hold NaN."""
    out = torch.randn(splits, batch, seqlen, heads, headdim)
    lse = torch.randn(splits, batch, heads, seqlen).transpose(2, 3) * 5.0
    dead = torch.rand(lse.shape) < 0.3
    dead[:, :, : seqlen // 4] = True
    lse.masked_fill_(dead, -INF)
    return out.masked_fill_(dead[..., None], float("nan")), lse


def defined(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in float64, row by row of the splits alone."""
    lse = torch.logsumexp(lse_partial.double(), 0)
    weights = torch.exp(lse_partial.double() - lse).nan_to_num(0.0)
    out = (weights[..., None] * out_partial.double().nan_to_num(0.0)).sum(0)
    return out, lse


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    for x, true in zip(got, want, strict=True):
        torch.testing.assert_close(x.double().cpu(), true, atol=tolerance, rtol=tolerance)


SHAPES = [(1, 5, 2, 16), (3, 33, 4, 59), (7, 1, 2, 128), (256, 3, 1, 64), (4, 17, 2, 512)]


@pytest.mark.parametrize("shape", SHAPES[:3] if INTERPRETED else SHAPES, ids=str)
def test_against_the_definition(device: str, shape: tuple[int, ...]) -> None:
    out_partial, lse_partial = parts(*shape)
    out, lse = fa3.flash_attn_combine(out_partial.to(device), lse_partial.to(device))
    assert out.dtype == lse.dtype == torch.float32
    assert lse.stride(1) == 1
    check((out, lse), defined(out_partial, lse_partial))
    assert bool((lse[:, : shape[1] // 4] == -INF).all())
    assert not out[:, : shape[1] // 4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_and_buffers(device: str, dtype: torch.dtype) -> None:
    out_partial, lse_partial = parts(3, 9, 4, 32)
    moved = out_partial.to(device), lse_partial.to(device)
    want = defined(out_partial, lse_partial)
    tolerance = 1e-5 if dtype == torch.float32 else 4.0 * torch.finfo(dtype).eps
    out, lse = fa3.flash_attn_combine(*moved, out_dtype=dtype)
    assert out.dtype == dtype
    check((out, lse), want, tolerance)
    for given in ({}, {"out_dtype": dtype}):
        buffer = torch.full((2, 4, 9, 32), float("nan"), device=device).to(dtype).transpose(1, 2)
        result, _ = fa3.flash_attn_combine(*moved, buffer, **given)
        assert result.data_ptr() == buffer.data_ptr()
        assert torch.equal(buffer, out)


def test_strides(device: str) -> None:
    out_partial, lse_partial = parts(3, 9, 4, 32)
    want = defined(out_partial, lse_partial)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0), (1, 3, 2, 0)):
        inverse = [order.index(dim) for dim in range(4)]
        lse = lse_partial.permute(order).contiguous().permute(inverse)
        out = out_partial.permute(*order, 4).contiguous().permute(*inverse, 4)
        check(fa3.flash_attn_combine(out.to(device), lse.to(device)), want)
    columns = out_partial.mT.contiguous().mT.to(device)
    check(fa3.flash_attn_combine(columns, lse_partial.to(device)), want)
    wide = torch.stack([out_partial, out_partial], 4)[..., 0, :].to(device)
    check(fa3.flash_attn_combine(wide, lse_partial.to(device)), want)


def test_large_and_small_logits(device: str) -> None:
    """Weights far below the smallest number, and sums far above the largest, are no trouble."""
    out_partial = torch.randn(3, 1, 4, 1, 8)
    lse_partial = torch.tensor([1000.0, -1000.0, 999.0]).view(3, 1, 1, 1).expand(3, 1, 4, 1)
    got = fa3.flash_attn_combine(out_partial.to(device), lse_partial.to(device))
    check(got, defined(out_partial, lse_partial))


def test_parts_of_attention_make_the_whole(device: str) -> None:
    q = torch.randn(2, 7, 4, 32, device=device)
    k, v = torch.randn(2, 2, 40, 2, 32, device=device)
    want = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    pieces = [slice(0, 13), slice(13, 13), slice(13, 40)]
    found = [fa3.flash_attn_func(q, k[:, at], v[:, at], return_attn_probs=True) for at in pieces]
    outs = torch.stack([out for out, _ in found])
    # A call without any key says +inf; among parts it says that it saw nothing.
    lses = torch.stack([lse.masked_fill(lse == INF, -INF) for _, lse in found]).transpose(2, 3)
    out, lse = fa3.flash_attn_combine(outs, lses)
    torch.testing.assert_close(out, want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.transpose(1, 2), want[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 0, 2, 16), (2, 3, 0, 16)], ids=str)
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    out_partial, lse_partial = (x.to(device) for x in parts(*shape))
    out, lse = fa3.flash_attn_combine(out_partial, lse_partial)
    assert out.shape == out_partial.shape[1:]
    assert lse.shape == lse_partial.shape[1:]


def test_the_definition_in_use() -> None:
    out_partial, lse_partial = parts(5, 9, 2, 16)
    check(merge(out_partial, lse_partial), defined(out_partial, lse_partial))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"out_partial": torch.zeros(3, 2, 9, 4)}, "`out_partial` must have shape"),
    ({"out_partial": torch.zeros(3, 2, 9, 4, 8).half()}, "only support fp32.*`out_partial`"),
    ({"lse_partial": torch.zeros(3, 2, 9, 4).double()}, "only support fp32.*`lse_partial`"),
    ({"lse_partial": torch.zeros(3, 2, 4, 9)}, "`lse_partial` must have shape \\(3, 2, 9, 4\\)"),
    ({"lse_partial": None}, "`lse_partial` must be a torch.Tensor"),
    ({"out": torch.zeros(2, 9, 4, 7)}, "`out` must be"),
    ({"out": torch.zeros(2, 9, 4, 8), "out_dtype": torch.float16}, "`out` must be torch.float16"),
    ({"out": torch.zeros(2, 9, 4, 8).double()}, "`out_dtype`.*float64"),
    ({"out": torch.zeros(2, 9, 8, 4).mT}, "`out` must have a contiguous last dimension"),
    ({"out_dtype": torch.int32}, "`out_dtype`.*int32"),
    (
        {"out_partial": torch.zeros(257, 1, 1, 1, 8), "lse_partial": torch.zeros(257, 1, 1, 1)},
        "1 to 256 splits: `out_partial` has 257",
    ),
    (
        {"out_partial": torch.zeros(0, 1, 1, 1, 8), "lse_partial": torch.zeros(0, 1, 1, 1)},
        "1 to 256 splits",
    ),
]


@pytest.mark.parametrize(("changes", "text"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_arguments(changes: dict[str, Any], text: str) -> None:
    good = {"out_partial": torch.zeros(3, 2, 9, 4, 8), "lse_partial": torch.zeros(3, 2, 9, 4)}
    with pytest.raises(ConstraintError, match=text):
        fa3.flash_attn_combine(**(good | changes))


# CPU tensors are merged by PyTorch; in the child the kernel merges them, in the interpreter.
_CHILD = """
import sys
import pytest
import torch
from flash_attn.core import combine, registry
combine._merges_on_host = lambda x: False
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.skipif(INTERPRETED, reason="runs the interpreter itself")
def test_the_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    here = Path(__file__)
    names = "against or dtypes or strides or large or empty"
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=",
         "-k", f"({names}) and cpu", str(here)],
        env=env, cwd=here.parents[1], capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert " passed" in child.stdout
