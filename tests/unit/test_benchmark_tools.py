"""Benchmarks of memory, steps, host costs and first calls: what they measure, and their tables.

All figures here are invented or of a CPU; they test the tools.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from triton import knobs

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
cells, first_call, host_cost, memory, peers, report, steps = (
    importlib.import_module(name)
    for name in ("cells", "first_call", "host_cost", "memory", "peers", "report", "steps")
)

needs_the_stub = pytest.mark.skipif(
    torch.cuda.is_available() or knobs.runtime.interpret, reason="is for machines without a GPU"
)
FACTS = dict.fromkeys(("driver", "torch", "triton", "cuda", "python", "source"), "x")
FACTS |= {"gpu": "Test GPU", "date": "2026-01-02 03:04 UTC", "commit": "0123456789abcdef"}


def invented(benchmark: str, settings: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A result file."""
    head = {"schema": 1, "benchmark": benchmark, "environment": FACTS, "settings": settings}
    return {**head, "left_out": [], **parts}


# ---------------------------------------------------------------------------------------- memory
def test_growth_exponent() -> None:
    assert memory.growth_exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1.0)
    assert memory.growth_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)


def test_ways_are_of_as_many_tokens() -> None:
    names = [way.name for way in memory.WAYS]
    assert len(set(names)) == len(names)
    for way in memory.WAYS:
        cell = way.cell(4096)
        assert sum(cell.lengths) == 4096 if way.packed else cell.seqlen == 4096
        assert cell.causal


def test_the_bound_of_the_workspace() -> None:
    dense = memory.allowed_bytes(cells.Cell(64, True, 4096, 1, 8, 8)) - memory.SMALL
    assert dense == 4 * 8 * (4096 + 256) * (64 + 2)
    grouped = memory.allowed_bytes(cells.Cell(80, True, 4096, 1, 8, 2)) - memory.SMALL
    assert grouped == 4 * 4352 * (8 * (128 + 2) + 2 * 2 * 128)
    in_order = memory.allowed_bytes(cells.Cell(80, True, 4096, 1, 8, 2), True) - memory.SMALL
    assert in_order == 4 * 4352 * (8 * (128 + 2) + 2 * 8 * 128)


def measured_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str) -> Any:
    """(exit code, result file) of a run on the CPU whose peaks are the lengths."""

    def make_inputs(cell: Any, dtype: torch.dtype, device: str) -> Any:
        rows.append(sum(cell.lengths) or cell.seqlen)
        return peers.make_inputs(cell, dtype, "cpu")

    rows: list[int] = []
    ways = (memory.Way(2, 2, 16), memory.Way(2, 1, 16, packed=True, deterministic=True))
    monkeypatch.setattr(memory, "WAYS", ways)
    monkeypatch.setattr(memory, "make_inputs", make_inputs)
    monkeypatch.setattr(memory, "peak_beyond", lambda call: rows[-1] << 10)
    monkeypatch.setattr(memory, "new_result", lambda *x: invented("memory", x[2]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    out = tmp_path / "m.json"
    code = memory.main(["--seqlens", "256,512", "--out", str(out), *more])
    return code, json.loads(out.read_text())


def test_memory_run_and_section(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, data = measured_memory(monkeypatch, tmp_path)
    assert code == 0
    assert [row["seqlen"] for row in data["rows"]] == [256, 256, 512, 512]
    assert list(data["growth"].values()) == [1.0, 1.0]
    text = report.block([data])
    assert "| dense, 2 heads, head dim 16 | 512 | 0.5 | 0.5 | 0.4 |" in text
    assert "packed, 2/1 heads, head dim 16, deterministic" in text
    assert "to the power of 1.00.\n" in text
    assert "packed" in capsys.readouterr().out
    code, data = measured_memory(monkeypatch, tmp_path, "--max-seconds", "-1")
    assert code == 1
    assert "- not run: dense, 2 heads, head dim 16, 256" in report.block([data])


def test_memory_complaints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "SMALL", -(1 << 22))
    monkeypatch.setattr(memory, "LINEAR_BELOW", 0.5)
    code, data = measured_memory(monkeypatch, tmp_path)
    assert code == 1
    found = memory.complaints(data | {"rows": [*data["rows"], {
        "way": "w", "seqlen": 8, "failure": "no room"}]})  # fmt: skip
    assert found[0] == "w, 8: no room"
    assert sum("workspace of" in x for x in found) == 4
    assert sum("to the power of 1.0" in x for x in found) == 2


def test_wrong_gradients_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "errors_of", lambda *x, **y: {"dq": 0.5})
    row = memory.measure(memory.Way(2, 2, 16), 64, "cpu")
    assert row["failure"].startswith("wrong")
    assert "forward_bytes" not in row


# ----------------------------------------------------------------------------------------- steps
def step_arguments(*more: str) -> list[str]:
    return ["--device", "cpu", "--rounds", "1", "--seconds", "0", *more]


def test_steps_run_and_section(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    given = step_arguments("--providers", "math,ours,ordered", "--out", str(out))
    assert steps.main(given) == 0
    data = json.loads(out.read_text())
    assert [row["job"] for row in data["rows"]] == list(steps.JOBS)
    for row in data["rows"]:
        assert list(row["median_ms"]) == ["math", "ours", "ordered"]
        assert max(row["errors"]["ours"].values()) < 1e-4
        assert row["errors"]["ours"] != {}
    text = report.block([data])
    assert "| attention of a Llama-8B layer" in text
    assert "flash_attn, deterministic" in text
    assert steps.main([*given, "--max-seconds", "-1"]) == 1
    assert "- not run: demo" in report.block([json.loads(out.read_text())])


def test_a_wrong_attention_is_found_in_every_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = steps.attend_by

    def attend_by(name: str, device: torch.device) -> Any:
        attend = right("math", device)
        return (lambda q, k, v: attend(q, k, v) * 1.2) if name == "fa3" else attend

    monkeypatch.setattr(steps, "attend_by", attend_by)
    # Attention is little beside the residual stream of an untrained model.
    monkeypatch.setattr(steps, "WRONG_ABOVE", dict.fromkeys(steps.JOBS, 1e-3))
    out = tmp_path / "s.json"
    assert steps.main(step_arguments("--providers", "math,fa3", "--out", str(out))) == 1
    for row in json.loads(out.read_text())["rows"]:
        assert row["failures"]["fa3"].startswith("wrong beside math"), row["job"]
        assert list(row["median_ms"]) == ["math"]


def test_the_demos_own_module_computes_ours() -> None:
    device, counts = torch.device("cpu"), {}
    real = steps.PluggedAttention.forward
    for name in ("ours", "ordered", "math"):
        step = steps.demo_step(steps.CPU_SIZES, steps.attend_by(name, device), device)
        with mock.patch.object(
            steps.PluggedAttention, "forward", autospec=True, side_effect=real
        ) as plugged:
            step()
        counts[name] = plugged.call_count
    assert counts == {"ours": 0, "ordered": 2, "math": 2}  # layers


def test_steps_without_fa3_say_so(tmp_path: Path) -> None:
    peers.fa3_operators.cache_clear()
    out = tmp_path / "s.json"
    given = step_arguments("--jobs", "attention", "--providers", "math,fa3", "--out", str(out))
    assert steps.main(given) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert row["failures"]["fa3"].startswith("PeerMissingError")
    for wrong in (["--peers", str(tmp_path / "none")], ["--jobs", "none"]):
        with pytest.raises(SystemExit, match="2"):
            steps.main(wrong)


def test_steps_section_compares_with_fa3() -> None:
    row = {"job": "layer", "median_ms": {"ours": 2.0, "fa3": 3.0}, "failures": {"fa4": "gone"}}
    text = report.block([invented("steps", {"dtype": "bfloat16", "rounds": 5}, rows=[row])])
    assert "| 2.00 | 3.00 | 1.50 |" in text
    assert "- layer, FA4: gone" in text


# ------------------------------------------------------------------------------------- host cost
@needs_the_stub
def test_host_cost_runs_on_the_stub(tmp_path: Path) -> None:
    out = tmp_path / "h.json"
    given = ["--calls", "2", "--backends", "auto", "--out", str(out)]
    assert host_cost.main(given) == 0
    data = json.loads(out.read_text())
    assert list(data["microseconds"]) == ["side by side", "auto"]
    names = ["flash_attn_func", "flash_attn_func, recorded", "flash_attn_func and backward"]
    assert list(data["microseconds"]["side by side"]) == names
    assert data["settings"]["stub"]
    text = report.block([data])
    assert "| flash_attn_func, recorded |" in text
    assert "| By backend | auto (forward sm90, backward sm90) |" in text
    assert host_cost.main([*given, "--max-seconds", "-1"]) == 1
    assert "- not run: auto" in report.block([json.loads(out.read_text())])
    with pytest.raises(SystemExit, match="2"):
        host_cost.main([*given, "--peers", str(tmp_path / "none")])


def test_calls_side_by_side_must_agree() -> None:
    x = torch.randn(2, 3, 4, 5)
    host_cost.agree({"a": lambda: x, "turned": lambda: x.transpose(1, 2), "two": lambda: (x, x)})
    with pytest.raises(SystemExit, match="b is wrong"):
        host_cost.agree({"a": lambda: x, "b": lambda: x * 1.1})
    with pytest.raises(SystemExit, match="b is wrong"):
        host_cost.agree({"a": lambda: x, "b": lambda: x * math.nan})


def test_the_same_numbers_in_every_source() -> None:
    args = argparse.Namespace(batch=1, seqlen=3, nheads=2, headdim=4)
    first, second = host_cost.same_numbers(args), host_cost.same_numbers(args)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    theirs, with_gradients = host_cost.of_pytorch(args)
    ours, _ = host_cost.of_ours(args)
    host_cost.agree({**{f"ours {n}": call for n, call in ours.items()}, **theirs})
    assert len(with_gradients["SDPA and backward"]()) == 3


# ------------------------------------------------------------------------------------ first call
def a_run(**more: Any) -> dict[str, Any]:
    kernels = [
        {"name": "a", "seconds": 2.0, "hit": False},
        {"name": "b", "seconds": 9.0, "hit": True},
    ]
    run = {"torch, triton, context": 3.0, "import flash_attn": 0.25, "forward": 0.125,
           "second forward": 0.0625, "backward": 0.5, "kernels": kernels,
           "hashed": False}  # fmt: skip
    return run | more


def test_medians_of_first_calls() -> None:
    runs = [a_run(), a_run(forward=0.25), a_run(forward=9.0), {"failure": "exit code 1"}]
    row = first_call.summarise("cold", "d64-full", runs)
    assert row["medians"]["forward"] == 0.25
    assert row["beyond"] == 0.5
    assert row["kernels"] == {"a": 2.0}
    assert row["processes"] == 3
    assert first_call.complaints([row]) == ["cold d64-full: exit code 1"]
    text = report.block([invented("first_call", {}, rows=[row])])
    assert (
        "| d64-full, cold cache, 3 processes | 3.00 | 0.25 | 0.25 | 0.06 | 0.50 | 0.50 | 2.00 |"
        in text
    )
    assert "- d64-full, cold: exit code 1" in text


def test_goals_of_first_calls() -> None:
    slow = a_run(forward=0.5, kernels=[{"name": "a", "seconds": 6.0, "hit": False}])
    (found,) = first_call.complaints([first_call.summarise("cold", "c", [slow])])
    assert found == "cold c: a compiles for 6.0 s"
    found = first_call.complaints([first_call.summarise("warm", "c", [slow])])
    assert [x.split(": ")[1][:9] for x in found] == ["0.75 s be", "the cache"]
    (found,) = first_call.complaints(
        [first_call.summarise("warm", "c", [a_run(hashed=True, kernels=[]), a_run(kernels=[])])]
    )
    assert found == "warm c: Triton hashed its files in 1 processes"
    assert first_call.complaints([first_call.summarise("warm", "c", [])]) == ["warm c: not run"]
    assert first_call.summarise("warm", "c", [{"failure": "x"}])["medians"] == {}


@needs_the_stub
@pytest.mark.slow
def test_first_calls_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "f.json"
    given = ["--cases", "d64-full", "--processes", "1", "--out", str(out)]
    assert first_call.main([*given, "--patience", "0.01"]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [row["failures"] for row in rows] == [["no end after 0 s"]] * 2
    monkeypatch.setattr(first_call, "GOALS", {"warm": 60.0, "cold": 60.0})
    assert first_call.main(given) == 0
    cold, warm = json.loads(out.read_text())["rows"]
    assert {"attention_forward_sm90", "attention_backward_sm90"} <= cold["kernels"].keys()
    assert (cold["hashed"], warm["hashed"], warm["kernels"]) == (1, 0, {})
    assert 0 < warm["beyond"] < cold["beyond"]
    assert first_call.main([*given, "--max-seconds", "0"]) == 1
    assert json.loads(out.read_text())["left_out"] == ["d64-full"]


# ------------------------------------------------------------------------------------ extensions
def test_float8_beside_bfloat16_section() -> None:
    rows = [
        {"cell": "float8 d64 s1024 full", "median_ms": {"bfloat16": 2.0, "float8": 1.0},
         "failures": {"float8 ahead": "no room"}},
        {"cell": "decode h32/8", "median_ms": {"bfloat16, packed": 1.0}, "failures": {}},
    ]  # fmt: skip
    text = report.block([invented("extensions", {}, rows=rows)])
    assert "| d64 s1024 full | 2.000 | 1.000 | 2.000 |" in text
    assert "decode" not in text
    assert "- float8 d64 s1024 full, float8 ahead: no room" in text
