"""The benchmark of extensions: its verdict on float8, and that a way is what is timed."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from flash_attn.core import repeated
from flash_attn.core.problem import AttentionProblem, ScoreTransform

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
extensions = importlib.import_module("extensions")


def row(name: str, failures: dict[str, str] | None = None, **median_ms: float) -> dict[str, Any]:
    return {"cell": name, "median_ms": median_ms, "errors": {}, "failures": failures or {}}


def test_verdict() -> None:
    fast, equal = row("a", bfloat16=1.2, float8=1.0), row("b", bfloat16=1.0, float8=1.0)
    slow = row("c", bfloat16=0.999, float8=1.0)
    other = row("decode", **{"bfloat16, packed": 1.0, "float8, packed": 2.0})
    lines, passed = extensions.verdict([fast, equal, other], [])
    assert passed
    assert [line.split()[0] for line in lines] == ["a", "b", "PASS:"]
    assert "1.200 ok" in lines[0]
    assert "1.000 at worst in 2 cells" in lines[-1]
    lines, passed = extensions.verdict([fast, slow], [])
    assert not passed
    assert lines[1].endswith("0.999 SLOWER")
    assert lines[-1].startswith("FAIL")
    assert extensions.verdict([other], []) == ([], True)


def test_verdict_on_what_is_missing() -> None:
    fast = row("a", bfloat16=1.2, float8=1.0)
    broken = row("b", {"float8": "out of memory"}, bfloat16=1.0)
    for rows, left_out in (([fast, broken], []), ([broken], []), ([fast], ["z"])):
        lines, passed = extensions.verdict(rows, left_out)
        assert not passed
        assert lines[-2].startswith("FAIL")
        assert lines[-1].endswith("z" if left_out else "b")


class StandInClock:
    """Calls, and takes as long as it is told."""

    def __init__(self, budget: float) -> None:
        pass

    def measure(self, call: Any) -> float:
        call()
        return 1.0


def small_problem(dtype: torch.dtype) -> AttentionProblem:
    q, k, v = (torch.randn(1, 260, 2, 16).to(dtype) for _ in range(3))
    return AttentionProblem(q, k, v, ScoreTransform(0.25))


def test_main(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = {
        "bfloat16": extensions.Way(small_problem(torch.bfloat16), {}),
        "float8": extensions.Way(small_problem(torch.float8_e4m3fn), {}),
        "float8 weights": extensions.Way(small_problem(torch.float8_e4m3fn), {}),
    }
    monkeypatch.setattr(extensions, "cells", lambda *_: iter([("float8 x", cell), ("y", cell)]))
    monkeypatch.setattr(extensions, "CudaClock", StandInClock)
    monkeypatch.setattr(extensions, "use_backend", lambda name: extensions.ExitStack())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    path = tmp_path / "result.json"
    given = ["--match", "float8", "--ways", "bfloat16,float8", "--rounds", "1", "--out", str(path)]
    assert extensions.main(given) == 0
    data = json.loads(path.read_text())
    assert [list(found["median_ms"]) for found in data["rows"]] == [["bfloat16", "float8"]]
    assert data["passed"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("PASS")
    assert extensions.main([*given, "--max-seconds", "-1"]) == 1
    assert json.loads(path.read_text())["left_out"] == ["float8 x"]


def test_a_patched_way_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of the same signature would otherwise repeat the launches of another way."""
    problem = small_problem(torch.float32)
    seen: list[tuple[bool, bool]] = []

    def attend(problem: AttentionProblem) -> None:
        ahead = extensions.launch.converts_float8_ahead(None, 0)
        seen.append((repeated.identify(problem) is None, ahead))

    monkeypatch.setattr(extensions, "attend", attend)
    extensions.caller(extensions.Way(problem, {"converts_float8_ahead": lambda *key: True}))()
    assert seen == [(True, True)]
    assert repeated.identify(problem) is not None


def test_plans_are_read() -> None:
    plan = extensions.parse_plan
    assert plan("64x128w4s3") == extensions.TilePlan(64, 128, 4, 3)
    assert plan("64x128w4s3r168") == extensions.TilePlan(64, 128, 4, 3, 168)
    for text in ("64x128", "64x128w4s3r", "64x128w4s3 ", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="no plan"):
            plan(text)


def test_ways_of_a_plan_launch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [small_problem(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)]
    ways = extensions.plan_ways(["64x32w4s1", "16x32w2s2r99"], *problems)
    seen: dict[str, tuple[Any, ...]] = {}
    name = ""

    def attend(problem: AttentionProblem) -> None:
        launch = extensions.launch
        key = launch.plan_key("forward", problem, launch.facts_of(problem))
        plan = launch._plan_forward(problem, launch.facts_of(problem)).tile
        seen[name] = (problem.q.dtype, plan, launch.converts_float8_ahead(key, 100))

    monkeypatch.setattr(extensions, "attend", attend)
    for name, way in ways.items():  # noqa: B007  attend reads it
        extensions.caller(way)()
    bfloat16, float8, plan = torch.bfloat16, torch.float8_e4m3fn, extensions.TilePlan
    for text, expected in (
        ("64x32w4s1", plan(64, 32, 4, 1)),
        ("16x32w2s2r99", plan(16, 32, 2, 2, 99)),
    ):
        assert seen.pop("bfloat16 " + text)[:2] == (bfloat16, expected)
        assert seen.pop(text + " ahead") == (float8, expected, True)
        assert seen.pop(text + " in the loop") == (float8, expected, False)
    assert not seen


def test_ranking() -> None:
    good, bad, lost = "64x64w4s3r128", "128x64w8s2", "64x64w4s2"
    first = row("a", {f"{lost} in the loop": "spilled"}, bfloat16=1.2)
    first["median_ms"] |= {
        f"{good} ahead": 1.0,
        f"{good} in the loop": 0.8,
        f"{bad} ahead": 1.0,
        f"{lost} ahead": 0.6,
        f"bfloat16 {bad}": 1.5,
    }
    second = row("b", {f"{lost} ahead": "no memory"}, bfloat16=1.0)
    second["median_ms"] |= {
        f"{good} ahead": 0.5,
        f"{good} in the loop": 0.8,
        f"{bad} ahead": 1.1,
        f"bfloat16 {good}": 0.8,
    }
    lines = extensions.ranking([first, second], [bad, lost, good])
    assert [line.split() for line in lines] == [
        [good, "1.500l", "2.000a", "all", ">=", "1"],
        [bad, "1.200a", "0.909a", "not", "all", ">=", "1"],
        [lost, "2.000a", "not", "all", ">=", "1", "spilled", "no", "memory"],
        ["bfloat16", good, "1.250", "not", "all", ">=", "1"],
        ["bfloat16", bad, "0.800", "not", "all", ">=", "1"],
        ["bfloat16", lost, "not", "all", ">=", "1"],
    ]
