"""The bounds of rounding hold, and are not so wide that anything passes."""

from __future__ import annotations

from typing import Any

import pytest
import rounding
import support
import torch

CALLS: dict[str, dict[str, Any]] = {
    "full": {"seqlens": (60, 60)},
    "causal": {"seqlens": (33, 70), "heads": (4, 2), "causal": True},
    "softcap": {"seqlens": (70, 40), "softcap": 0.7, "softmax_scale": 1.1},
    "window": {"seqlens": (70, 70), "heads": (3, 1), "window_size": (9, 4)},
}


def ratios(got: support.Solution, want: support.Solution, inputs: support.Inputs) -> list[float]:
    """The largest error of each tensor, in standard deviations."""
    found = []
    for a, b, deviation in zip(got, want, rounding.deviations(inputs), strict=True):
        alive = deviation > 0.0
        found.append(float(((a.double() - b.double()).abs()[alive] / deviation[alive]).max()))
    return found


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_errors_are_a_few_deviations(backend: str, options: dict[str, Any]) -> None:
    with support.flash_attn.use_backend(backend):
        inputs = support.dense("cpu", torch.float32, headdim=24, **options)
        got = support.run(inputs)
    exact, _ = support.exact(inputs.problem(), inputs.dout)
    assert all(0.2 < ratio < 4.0 for ratio in ratios(got, exact, inputs))


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_shorter_mantissas_are_noticed(options: dict[str, Any]) -> None:
    """Inputs rounded to 17 bits of mantissa, where float32 has 24."""
    inputs = support.dense("cpu", torch.float32, headdim=24, **options)

    def shortened(x: torch.Tensor) -> torch.Tensor:
        return ((x.view(torch.int32) + 64) & -128).view(torch.float32)

    coarse = inputs.but(q=shortened(inputs.q), k=shortened(inputs.k), v=shortened(inputs.v))
    with pytest.raises(AssertionError, match="off by"):
        rounding.assert_same(support.run(coarse), support.run(inputs), rounding.deviations(inputs))


def test_infinities_must_agree() -> None:
    inputs = support.dense("cpu", torch.float32, seqlens=(9, 4), causal=True)
    got, deviation = support.run(inputs), rounding.deviations(inputs)
    rounding.assert_same(got, got, deviation)
    lse = got.lse.masked_fill(torch.isinf(got.lse), 0.0)
    with pytest.raises(AssertionError, match="lse"):
        rounding.assert_same(got._replace(lse=lse), got, deviation)
    with pytest.raises(AssertionError, match="dq"):
        rounding.assert_same(got._replace(dq=got.dq * float("nan")), got, deviation)
