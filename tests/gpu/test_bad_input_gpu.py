"""Wrong calls on a GPU: our exceptions alone, and a device that still works afterwards."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_attn import flash_attn_func

pytestmark = pytest.mark.gpu

_PATH = Path(__file__).resolve().parents[1] / "unit" / "test_bad_input.py"
_SPEC = importlib.util.spec_from_file_location("bad_input_on_cpu", _PATH)
on_cpu: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(on_cpu)


def test_random_wrong_calls_raise_our_exceptions_and_leave_the_device_alone() -> None:
    with torch.device("cuda"):
        raised, foreign = on_cpu.fuzz(2000, seed=3)
    assert foreign == [], f"{len(foreign)} foreign errors:\n" + "\n".join(foreign[:20])
    assert raised > 1200
    torch.cuda.synchronize()
    q = torch.randn(1, 40, 2, 64, device="cuda", dtype=torch.float16)
    want = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3)
    torch.testing.assert_close(flash_attn_func(q, q, q), want.transpose(1, 2), atol=2e-3, rtol=0)
