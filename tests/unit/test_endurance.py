"""The scripts that launch many times and under compute-sanitizer: what they notice and record.

Children compute on the CPU here, and a shell script stands in for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from flash_attn.backends.sm90 import launch_backward
from flash_attn.core.problem import AttentionProblem, make_transform

REPOSITORY = Path(__file__).resolve().parents[2]
for folder in ("benchmarks", "scripts"):
    sys.path.append(str(REPOSITORY / folder))
endurance, report, sanitizer, watching = (
    importlib.import_module(name) for name in ("endurance", "report", "sanitizer", "watching")
)


def watch(code: str, patience: float = 20.0, seconds: float = 30.0) -> Any:
    command = [sys.executable, "-c", code]
    return watching.Watched(command, patience, time.monotonic() + seconds, os.environ)


# -------------------------------------------------------------------------------------- watching
def test_lines_and_exit_code() -> None:
    child = watch("import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)")
    assert sorted(child.lines()) == ["a", "b"]
    assert child.end == "exit code 3"


def test_a_silent_child_is_ended() -> None:
    child = watch("import time; print('a', flush=True); time.sleep(60)", patience=1.0)
    assert list(child.lines()) == ["a"]
    assert child.end == "silent for 1 s"


def test_time_is_up_for_a_child_that_talks() -> None:
    code = "import time\nwhile True: print('a', flush=True); time.sleep(0.05)"
    child = watch(code, seconds=1.0)
    assert set(child.lines()) == {"a"}
    assert child.end == "out of time"


# ------------------------------------------------------------------------------------- endurance
def test_random_shapes_are_the_same_each_time_and_of_all_kinds() -> None:
    first, second = random.Random(3), random.Random(3)
    shapes = [endurance.draw(first) for _ in range(300)]
    assert shapes == [endurance.draw(second) for _ in range(300)]
    assert {shape.headdim for shape in shapes} == {64, 128, 192, 256}
    assert {bool(shape.batch) for shape in shapes} == {False, True}
    assert {shape.mask for shape in shapes} == set(endurance.MASKS)
    assert {(shape.headdim, shape.deterministic) for shape in shapes if not shape.batch} == {
        (headdim, order) for headdim in (64, 128, 192, 256) for order in (False, True)
    }
    assert all(sum(x) > 0 for shape in shapes for x in (shape.lengths_q, shape.lengths_k))
    assert not any(1 in shape.lengths_k for shape in shapes)
    assert len({shape.name for shape in shapes}) > 290


def test_repeated_shapes() -> None:
    shapes = endurance.repeated_shapes()
    assert len({shape.name for shape in shapes}) == len(shapes)
    assert any(not shape.batch and shape.deterministic for shape in shapes)


def test_errors_of_every_result_are_noticed() -> None:
    want = [torch.randn(3, 40) for _ in endurance.RESULTS]
    want[1][0, 0] = float("inf")
    assert endurance.wrong(want, want) == []
    for index, name in enumerate(endurance.RESULTS):
        for bad in (1.1, float("nan")):
            got = [x.clone() for x in want]
            got[index][1:] *= bad
            (found,) = endurance.wrong(got, want)
            assert found.startswith(f"{name}: ")
    got = [want[0], want[1].nan_to_num(posinf=0.0), *want[2:]]
    assert endurance.wrong(got, want) == ["lse: other rows are infinite"]


def test_bits_tell_zeros_apart_and_nan_the_same() -> None:
    x = torch.tensor([0.0, float("nan"), 1.0])
    for dtype in (torch.float32, torch.bfloat16):
        bits = endurance.bits(x.to(dtype))
        assert torch.equal(bits, endurance.bits(x.to(dtype).clone()))
        assert not torch.equal(bits, endurance.bits(-x.to(dtype)))


SMALL = ["--device", "cpu", "--backend", "cpu", "--launches", "4", "--shapes", "2"]
SMALL += ["--repeats", "2", "--workers", "2"]


@pytest.mark.slow
def test_endurance_run_and_section(tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    assert endurance.main([*SMALL, "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert (data["launches"]["launches"], data["launches"]["shapes"]) == (4, 2)
    assert [row["repeats"] for row in data["repeats"]["rows"]] == [2, 2]
    text = report.block([data])
    assert "4 launches forward and as many backward over 2 random shapes all ended" in text
    assert "| d128 causal dense 2 h8/4 q[700] k[700] | 2 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "Without a figure" not in text


def test_launches_are_divided() -> None:
    args = argparse.Namespace(launches=10, shapes=5, repeats=3, backend="b", device="cpu", seed=7)
    args.workers = 2
    first, second = endurance.shares("launches", args)
    assert (first["shapes"], first["launches"], first["seed"]) == (3, 6, 7)
    assert (second["shapes"], second["launches"], second["seed"]) == (2, 4, 8)
    (whole,) = endurance.shares("repeats", args)
    assert (whole["shapes"], whole["repeats"]) == (5, 3)
    args.workers = 9
    assert len(endurance.shares("launches", args)) == 5


def test_a_child_that_fails_is_a_complaint(tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    given = [*SMALL, "--jobs", "launches", "--out", str(out)]
    assert endurance.main([*given, "--backend", "no such"]) == 1
    data = json.loads(out.read_text())
    found = endurance.complaints(data)
    assert found[0].startswith("launches: exit code 1 at d")
    assert "no such" in found[0]
    assert found[1] == "repeats: not run"
    assert "until one did not end" in report.block([data])


def said(deterministic: bool, **differing: int) -> dict[str, Any]:
    counts = dict.fromkeys(endurance.RESULTS, 0) | differing
    return {"name": "n", "repeats": 5, "differing": counts, "wrong": [],
            "shape": {"deterministic": deterministic}}  # fmt: skip


def test_which_bits_may_differ() -> None:
    for ordered, differing, bad in (
        (False, {"dq": 3}, []),
        (True, {"dq": 3}, ["dq"]),
        (False, {"dk": 1, "out": 1}, ["out", "dk"]),
    ):
        part = endurance.of_repeats([said(ordered, **differing)], "exit code 0", 1.0)
        assert part["rows"][0]["bad"] == bad
        data = {"repeats": part, "launches": endurance.of_launches([], "exit code 0", 1.0)}
        assert endurance.complaints(data) == [f"n: {name} has other bits" for name in bad]
    late = {"launches": 10, "name": "s", "wrong": ["dq: 1.0e+00"]}
    part = endurance.of_launches([late], "silent for 60 s at s", 1.0)
    found = endurance.complaints({"launches": part})
    assert found == ["launches: silent for 60 s at s", "repeats: not run", "s: ['dq: 1.0e+00']"]


# ------------------------------------------------------------------------------------- sanitizer
STAND_IN = """#!/bin/sh
case "$1" in
--help) echo "--tool memcheck racecheck --kernel-name"; exit 0;;
--version) echo "Version 2026.1.0"; exit 0;;
esac
tool=$2
shift 4
[ "$1" = --kernel-name ] && { echo "Error: unknown key"; exit 1; }
echo "========= COMPUTE-SANITIZER"
if [ "$tool" = racecheck ]; then
  echo "========= Error: Race reported between Write access at k+0x120 in a.py:4"
  echo "=========     and Read access at k+0x220 in a.py:9 [4 hazards]"
  echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
  exec "$@"
fi
"$@"
code=$?
echo "========= ERROR SUMMARY: 0 errors"
exit $code
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    path = tmp_path / "compute-sanitizer"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


def test_cases_are_served_shapes() -> None:
    found = sanitizer.cases()
    assert {shape.headdim for shape in found.values()} >= {64, 128, 256}
    assert any(not shape.batch for shape in found.values())
    assert any(shape.deterministic for shape in found.values())
    for shape in found.values():
        x = torch.empty(shape.batch or 1, 10, shape.nheads, shape.headdim, dtype=torch.bfloat16)
        k = x[:, :, : shape.nheads_k]
        problem = AttentionProblem(x, k, k, make_transform(shape.headdim))
        assert not launch_backward.unsupported_backward(
            problem._replace(deterministic=shape.deterministic)
        )


def given(tmp_path: Path, *more: str) -> list[str]:
    out = str(tmp_path / "s.json")
    return ["--device", "cpu", "--backend", "cpu", "--cases", "dense d64 full", "--out", out, *more]


@pytest.mark.slow
def test_sanitizer_run_and_section(tmp_path: Path, stand_in: str) -> None:
    arguments = given(tmp_path, "--sanitizer", stand_in)
    assert sanitizer.main([*arguments, "--tools", "memcheck,racecheck"]) == 1
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["sanitizer"]["version"] == "2026.1.0"
    assert data["sanitizer"]["tools"] == "memcheck racecheck"
    assert data["sanitizer"]["selects"] == "refused: Error: unknown key"
    clean = {row["tool"]: row["clean"] for row in data["rows"]}
    assert clean == {"none": True, "memcheck": True, "racecheck": False}
    text = report.block([data])
    assert "| memcheck | 1 of 1 | ERROR SUMMARY: 0 errors |" in text
    assert "- racecheck, 1 times: race in k: write in a.py:4 and read in a.py:9" in text


def test_without_a_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "PLACES", ())
    monkeypatch.setenv("PATH", "")
    assert sanitizer.main(given(tmp_path)) == 1
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["sanitizer"] == {"path": "none"}
    assert "had no compute-sanitizer" in report.block([data])


def test_sanitizer_reports_are_counted_by_kind_and_place() -> None:
    lines = ["@@a: right", "@@b: dq: 1.0e+00"]
    lines += ["========= Invalid __shared__ read of size 1024 bytes",
              "=========     at attention_forward_sm90+0xc340 in standard.py:263",
              "=========     by thread (64,0,0) in block (2,0,0)"] * 2  # fmt: skip
    lines += ["========= ERROR SUMMARY: 2 errors"]
    row = {"tool": "memcheck", **sanitizer.sum_up(lines, "exit code 1")}
    assert row["cases"] == {"a": "right", "b": "dq: 1.0e+00"}
    assert row["summaries"] == ["ERROR SUMMARY: 2 errors"]
    place = "in attention_forward_sm90: standard.py:263"
    assert row["reports"] == {f"Invalid __shared__ read of size N bytes {place}": 2}
    assert not sanitizer.is_clean(row, 2)


def test_explained_races_are_clean_and_others_are_not() -> None:
    def row(read: str, write: str) -> dict[str, Any]:
        lines = ["@@a: right",
                 f"========= Error: Race reported between Read access at {read}",
                 f"=========     and Write access at {write} [4 hazards]",
                 "========= RACECHECK SUMMARY: 1 hazard displayed (1 error)"]  # fmt: skip
        return {"tool": "racecheck", **sanitizer.sum_up(lines, "exit code 0")}

    source = (sanitizer.SOURCES / "sm90_forward_producer.py").read_text().splitlines()
    lines = {name: source.index(f"def {name}(mailbox, slot{more}):") + 2
             for name, more in (("get", ""), ("put", ", number"))}  # fmt: skip
    places = {
        x: f"attention_forward_sm90+0x10 in sm90_forward_producer.py:{n}" for x, n in lines.items()
    }
    assert sanitizer.is_clean(row(places["get"], places["put"]), 1)
    assert not sanitizer.is_clean(row(places["get"], "attention_forward_sm90+0x1 in x.py:3"), 1)


def test_places_are_functions_of_the_kernels() -> None:
    path = sanitizer.SOURCES / "gluon_async.py"
    line = (
        path.read_text().splitlines().index('    _instruction(_barrier("sync", NUMBER, THREADS))')
        + 1
    )
    assert sanitizer.function_at(f"gluon_async.py:{line}") == "gluon_async.py meet"
    assert sanitizer.function_at("gluon_async.py:1") == "gluon_async.py:1"


@pytest.mark.parametrize(
    "change",
    [{"cases": {"a": "dq: 1"}}, {"summaries": []}, {"summaries": ["ERROR SUMMARY: 1 error"]},
     {"end": "out of time"}, {"cases": {}}, {"reports": {"x": 1}}],
)  # fmt: skip
def test_what_is_not_clean(change: dict[str, Any]) -> None:
    row = {"tool": "memcheck", "cases": {"a": "right"}, "end": "exit code 0", "reports": {},
           "summaries": ["ERROR SUMMARY: 0 errors"]}  # fmt: skip
    assert sanitizer.is_clean(row, 1)
    assert not sanitizer.is_clean(row | change, 1)


def test_names_that_are_none() -> None:
    for option in ("--tools", "--cases"):
        with pytest.raises(SystemExit):
            sanitizer.main(["--device", "cpu", option, "none"])
    with pytest.raises(SystemExit):
        endurance.main(["--device", "cpu", "--jobs", "repeats,none"])
