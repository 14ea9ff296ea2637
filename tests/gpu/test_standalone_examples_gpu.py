"""The samples of the standalone API on a GPU; strict where it is a Hopper GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

_PATH = Path(__file__).resolve().parents[1] / "unit" / "test_standalone_examples.py"
_SPEC = importlib.util.spec_from_file_location("standalone_examples_on_cpu", _PATH)
on_cpu: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(on_cpu)


@pytest.mark.parametrize("name", on_cpu.FILES)
def test_numbers(name: str) -> None:
    result = on_cpu.load(name).main()
    tensors = [value for value in result.values() if isinstance(value, torch.Tensor)]
    assert all(tensor.is_cuda for tensor in tensors), "the sample must use the GPU"
    on_cpu.CHECKS[name](result)


def test_the_module_passes_in_a_fresh_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flash_attn.standalone"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") == 3
    strict = torch.cuda.get_device_capability() == (9, 0)
    assert f"strict={strict}" in done.stdout
