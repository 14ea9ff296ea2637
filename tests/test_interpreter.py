"""The portable kernels without a GPU: the tests called ``test_feature_*`` in Triton's interpreter.

The interpreter is chosen when Triton is imported, hence a process of its own. Those tests cover
every feature of the forward and backward kernels, a few tiles each, in float32 and float16.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import support

pytest.importorskip("triton", reason="the kernels need Triton")

_HERE = Path(__file__).parent
_FILES = [
    "test_dense.py",
    "test_varlen.py",
    "test_masking.py",
    "test_dropout.py",
    "test_layouts.py",
    "test_extensions.py",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(support.INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.parametrize("name", _FILES)
def test_features_in_the_interpreter(name: str) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "FLASH_ATTN_TEST_BACKEND": "triton",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
        "-W", "ignore::RuntimeWarning",  # NumPy speaks up where masked cells hold NaN
        "-k", "test_feature_ and cpu", str(_HERE / name),
    ]  # fmt: skip
    result = subprocess.run(
        command, env=environment, cwd=_HERE.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
