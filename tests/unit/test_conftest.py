"""By which kernels a test runs, see tests/conftest.py."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from flash_attn import flash_attn_func
from flash_attn.core import ops, registry, repeated

conftest: Any = sys.modules["conftest"]


def names_of(parameter: Any) -> tuple[Any, ...]:
    """The backends that a value of ``device`` prefers."""
    return next((mark.args for mark in parameter.marks if mark.name == "prefers"), ())


@pytest.mark.parametrize("two", [False, True])
def test_marked_tests_run_by_each_family_where_there_are_two(monkeypatch, two):
    monkeypatch.setattr(conftest, "has_two_families", lambda: two)
    monkeypatch.setattr(conftest, "CHOSEN", [])
    marked = conftest.gpu_devices({"families", "parametrize"})
    assert [names_of(x)[:1] for x in marked] == ([("triton",), ("sm90",)] if two else [()])
    assert all(x.values == ("cuda",) for x in marked)
    assert all(any(mark.name == "gpu" for mark in x.marks) for x in marked)
    assert [names_of(x) for x in conftest.gpu_devices({"parametrize"})] == [()]
    monkeypatch.setattr(conftest, "CHOSEN", ["triton"])
    assert [names_of(x) for x in conftest.gpu_devices({"families"})] == [()]


def problem() -> Any:
    q = torch.zeros(1, 4, 2, 16, dtype=torch.float16)
    return ops.dense_problem(q, q, q, 0.0, None, False, -1, -1, 0.0, None)


@pytest.mark.skipif(bool(conftest.CHOSEN), reason="the environment chooses")
@pytest.mark.prefers("cuda", "reference", "cpu")
def test_the_first_of_the_preferred_that_serves_computes():
    assert registry.own_families(torch.device("cpu")) == ("cuda", "reference", "cpu")
    assert registry.select(problem()).name == "reference"


def test_an_order_of_preference_forgets_repeated_calls(monkeypatch):
    monkeypatch.setattr(repeated, "_calls", {("a signature",): "seen before"})
    with conftest.served_by(["triton", "cpu"]):
        assert not repeated._calls
        repeated._calls[("a signature",)] = "seen inside"
    assert not repeated._calls


def test_a_refused_kernel_fails_the_test(monkeypatch):
    monkeypatch.setattr(registry, "_given_up", {})
    with conftest.served_by([]):
        flash_attn_func(*problem()[:3])
    with pytest.raises(AssertionError, match="refused by Triton"), conftest.served_by([]):
        registry._given_up[("sm90", False)] = "is broken"
