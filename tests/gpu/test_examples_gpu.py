"""The samples of the documentation on a GPU, with the printed shapes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_attn import flash_attn_func

pytestmark = pytest.mark.gpu

_PATH = Path(__file__).resolve().parents[1] / "unit" / "test_examples.py"
_SPEC = importlib.util.spec_from_file_location("examples_on_cpu", _PATH)
on_cpu: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(on_cpu)


@pytest.fixture(autouse=True)
def restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """What examples set in the environment is undone."""
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "TRUE")
    torch.manual_seed(0)


@pytest.mark.parametrize("name", on_cpu.FILES)
def test_numbers(name: str) -> None:
    result = on_cpu.load(name).main()
    tensors = [value for value in result.values() if isinstance(value, torch.Tensor)]
    assert all(tensor.is_cuda for tensor in tensors), "the example must use the GPU"
    on_cpu.CHECKS[name](result)


@pytest.mark.parametrize("headdim", on_cpu.HEADDIMS)
def test_documented_headdim_forward_and_backward(headdim: int) -> None:
    on_cpu.check_headdim(headdim, "cuda")


@pytest.mark.parametrize("dropout_p", [1.0, 1.5, -0.1, float("nan")])
def test_dropout_p_outside_zero_to_below_one_is_refused_by_name(dropout_p: float) -> None:
    q = torch.randn(1, 8, 2, 32, device="cuda", dtype=torch.float16)
    with pytest.raises(RuntimeError, match="dropout_p"):
        flash_attn_func(q, q, q, dropout_p=dropout_p)


def test_except_runtime_error_catches_a_head_dim_mismatch() -> None:
    q = torch.randn(1, 8, 2, 32, device="cuda", dtype=torch.float16)
    with pytest.raises(RuntimeError, match="`k`"):
        flash_attn_func(q, q[..., :16], q)


def test_environment_set_after_import_takes_effect() -> None:
    q = torch.randn(1, 8, 2, 32, device="cuda", dtype=torch.float16)
    flash_attn_func(q, q, q)
    os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = "maybe"
    with pytest.raises(RuntimeError, match="FLASH_ATTENTION_USE_FLAGGEMS"):
        flash_attn_func(q, q, q)
