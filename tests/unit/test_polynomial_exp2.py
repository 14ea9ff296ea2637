"""The exponential without the unit for special functions, as PTX text, on numpy's numbers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from flash_attn.kernels import sm90_forward_softmax

F = np.float32


def run(text: str, given: dict[str, Any]) -> dict[str, Any]:
    """The registers after the instructions of ``text``; fused products are rounded once."""
    registers = dict(given)

    def value(name: str) -> Any:
        if name.startswith("0f"):
            return np.uint32(int(name[2:], 16)).view(F)
        return int(name) if name.isdigit() else registers[name]

    for line in text.strip("{} \n").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        to, *operands = [x.strip() for x in rest.split(",")]
        a, b, c = [*map(value, operands), None, None][:3]
        match name.split("."):
            case ["max", "NaN", "f32"]:
                registers[to] = np.maximum(a, b)
            case ["add", "f32"]:
                registers[to] = (a + b).astype(F)
            case ["sub", "f32"]:
                registers[to] = (a - b).astype(F)
            case ["fma", "rn", "f32"]:
                registers[to] = (np.float64(a) * np.float64(b) + np.float64(c)).astype(F)
            case ["mul", "ftz", "f32"]:
                product = (a * b).astype(F)
                registers[to] = np.where(np.abs(product) < np.finfo(F).tiny, F(0), product)
            case ["mov", "b32"]:
                registers[to] = a.view(F if a.dtype == np.uint32 else np.uint32)
            case ["mov", "f32"]:
                registers[to] = a
            case ["shl", "b32"]:
                registers[to] = a << np.uint32(b)
            case _:
                raise AssertionError(line)
    return registers


def exp2(x: Any) -> Any:
    with np.errstate(all="ignore"):
        return run(sm90_forward_softmax.polynomial_text.fn(0, 1), {"$1": x})["$0"]


def test_error() -> None:
    """Of the hardware's 2^x 2^-22 are known; weights are rounded to 2^-12 or 2^-9 afterwards."""
    x = np.linspace(-125.5, 12, 3_000_001).astype(F)
    error = exp2(x) / 2.0 ** x.astype(np.float64) - 1
    assert np.abs(error).max() < 3e-6
    assert abs(error.mean()) < 1e-7


@pytest.mark.parametrize("x", [-126.6, -127.0, -200.0, -3e38, float("-inf")])
def test_small_ones_are_zero(x: float) -> None:
    """So that a row that sees no key has a sum of 0."""
    assert exp2(np.array([x], F)) == 0.0


def test_nan_stays() -> None:
    assert np.isnan(exp2(np.array([np.nan], F)))


def test_one_of_each_group() -> None:
    text = sm90_forward_softmax.exp2_text.fn(8)
    assert len(re.findall(r"ex2\.approx\.ftz\.f32 \$(\d), \$(\d+);", text)) == 7
    assert "max.NaN.f32 y, $8," in text
    assert "mul.ftz.f32 $0, p, t;" in text
    assert sm90_forward_softmax.floats.fn(2) == "=f,=f,f,f"
