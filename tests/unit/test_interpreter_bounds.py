"""The bounds that the interpreter's tests run in do hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only")

_KERNEL = """
import torch
import triton
import triton.language as tl

import interpreter_bounds

interpreter_bounds.install()


@triton.jit
def copy(x, y, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < count), mask=at < count)


x, y = torch.rand(12), torch.empty(16)
copy[(1,)](x, y, 12, BLOCK=16)
assert torch.equal(x, y[:12])
copy[(1,)](x, y, COUNT, BLOCK=16)
"""


@pytest.mark.parametrize(("count", "fits"), [(12, True), (13, False)])
def test_a_load_past_the_end_raises(tmp_path: Path, count: int, fits: bool) -> None:
    script = tmp_path / "kernel.py"
    script.write_text(_KERNEL.replace("COUNT", str(count)))
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == fits, done.stderr
    assert fits or "load of 4 bytes" in done.stderr
