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
_ALL = "test_feature_"
_MASKS, _TILES = "(masks or sinks)", "(packed_heads or splits or pages)"
# Files, and which of their tests: parts of a long one are run side by side.
_PARTS = [
    ("test_extensions.py", _MASKS),
    ("test_extensions.py", f"not {_MASKS} and {_TILES}"),
    ("test_extensions.py", f"not {_MASKS} and not {_TILES}"),
    ("test_dense.py", _ALL),
    ("test_varlen.py", _ALL),
    ("test_masking.py", _ALL),
    ("test_dropout.py", _ALL),
    ("test_layouts.py", _ALL),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(support.INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.parametrize(("name", "part"), _PARTS)
def test_features_in_the_interpreter(name: str, part: str) -> None:
    tests = f"test_feature_ and cpu and {part}"
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
        "-k", tests, str(_HERE / name),
    ]  # fmt: skip
    result = subprocess.run(
        command, env=environment, cwd=_HERE.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
