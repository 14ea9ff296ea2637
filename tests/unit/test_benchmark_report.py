"""The benchmark tools: figures are computed right, failures are kept, the README follows."""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
for folder in ("benchmarks", "scripts"):
    sys.path.append(str(REPOSITORY / folder))
attention, cells, peers, recording, report, sweep, timing, gpu_tests = (
    importlib.import_module(name)
    for name in (
        *("attention", "cells", "peers", "recording", "report", "sweep", "timing"),
        "gpu_tests",
    )
)

ENVIRONMENT = {
    "gpu": "Test GPU",
    "driver": "1.2",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cuda": "13.0",
    "python": "3.12.3",
    "date": "2026-01-02 03:04 UTC",
    "commit": "0123456789abcdef",
    "source": "feed",
}
README = f"# Title\n\nbefore\n{report.BEGIN}\nold\n{report.END}\nafter\n"


def timed(ms: float, cell: Any, which: str) -> dict[str, Any]:
    return {"median_ms": ms, "rounds_ms": [ms], "tflops": round(cell.flops(which) / ms / 1e9, 2)}


def make_results(times: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """A result file from milliseconds by cell, pass and provider."""
    records = []
    for name, passes in times.items():
        cell = cells.parse_cell(name)
        record = attention.new_record(cell)
        for which, rows in passes.items():
            record["passes"][which] = {n: timed(ms, cell, which) for n, ms in rows.items()}
        records.append(record)
    return {
        "schema": 1,
        "benchmark": "attention",
        "environment": ENVIRONMENT,
        "settings": {"rounds": 5, "dtype": "bfloat16"},
        "complete": True,
        "left_out": [],
        "cells": records,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return make_results(
        {
            "d64-causal-s4096": {
                "fwd": {"ours": 1.0, "flex": 2.0},
                "bwd": {"ours": 4.0, "flex": 3.0},
            },
            "d128-full-s4096": {"fwd": {"ours": 2.0, "flex": 1.0, "cudnn": 0.5}},
        }
    )


# ------------------------------------------------------------------------------------ report
def test_without_flex_the_tables_compare_with_cudnn(results: dict[str, Any]) -> None:
    for cell in results["cells"]:
        for timed in cell["passes"].values():
            timed.pop("flex", None)
    assert report.ratios(results, "fwd") == {"d128-full-s4096": 0.25}
    assert "flash_attn / SDPA cuDNN" in "\n".join(report.pass_table(results, "fwd"))
    assert "SDPA cuDNN" in report.rival_sentence(results, "fwd")


@pytest.mark.parametrize(
    ("backend", "title"),
    [("auto", ", automatic choice"), ("triton", ", portable kernels"), ("cuda", ", backend cuda")],
)
def test_the_title_names_the_kernels(results: dict[str, Any], backend: str, title: str) -> None:
    gpu = results["environment"]["gpu"]
    assert report.attention_block(results)[0] == f"#### {gpu}"
    results["settings"]["backend"] = backend
    assert report.attention_block(results)[0] == f"#### {gpu}{title}"


def test_ratio_is_the_speed_of_ours(results: dict[str, Any]) -> None:
    assert report.ratios(results, "fwd") == {"d64-causal-s4096": 2.0, "d128-full-s4096": 0.5}
    assert report.ratios(results, "bwd") == {"d64-causal-s4096": 0.75}
    assert report.ratios(results, "fwd", "cudnn") == {"d128-full-s4096": 0.25}


def test_sentence_names_mean_and_worst_cell(results: dict[str, Any]) -> None:
    sentence = report.rival_sentence(results, "fwd")
    assert "1.00 times" in sentence
    assert "worst 0.50, d128-full-s4096" in sentence
    assert "1 cell" in report.rival_sentence(results, "bwd")
    assert "no cell has both" in report.rival_sentence(results, "bwd", "cudnn")


def test_geometric_mean() -> None:
    assert report.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    assert math.isnan(report.geometric_mean([]))


def test_table_has_every_cell_and_gaps_are_marked(results: dict[str, Any]) -> None:
    table = report.pass_table(results, "fwd")
    assert len(table) == 4
    assert table[0].endswith(
        "| flash_attn | FlexAttention | SDPA cuDNN | flash_attn / FlexAttention |"
    )
    flops = 4 * 4 * 32 * 4096**2 * 64 / 2  # batch 4 and 32 heads by default
    assert table[2] == f"| 64, causal, 4096 | {flops / 1e9:.0f} | {flops / 2e9:.0f} | – | 2.00 |"
    assert table[3].startswith("| 128, full, 4096 |")


def test_failures_are_shown(results: dict[str, Any]) -> None:
    results["cells"][0]["failures"]["cudnn"] = "wrong: relative errors"
    results["left_out"] = ["d64-full-s1024"]
    text = report.block([results])
    assert "- d64-causal-s4096, SDPA cuDNN: wrong: relative errors" in text
    assert "- not run: d64-full-s1024" in text


def test_only_the_block_changes() -> None:
    written = report.with_block(README, "new\n")
    assert written == README.replace("\nold\n", "\nnew\n")
    assert report.with_block(written, "new\n") == written


@pytest.mark.parametrize(
    "readme",
    ["", report.BEGIN, report.END + report.BEGIN, README + report.END, README + README],
)
def test_missing_or_repeated_markers_are_refused(readme: str) -> None:
    with pytest.raises(report.ReportError, match="once each"):
        report.with_block(readme, "new\n")


def write_inputs(folder: Path, *files: dict[str, Any]) -> list[str]:
    (folder / "results").mkdir()
    (folder / "README.md").write_text(README, encoding="utf-8")
    for index, data in enumerate(files):
        (folder / "results" / f"{index}.json").write_text(json.dumps(data))
    return ["--readme", str(folder / "README.md"), "--results", str(folder / "results")]


def test_check_notices_one_digit(tmp_path: Path, results: dict[str, Any]) -> None:
    arguments = write_inputs(tmp_path, results)
    assert report.main([*arguments, "--check"]) == 1
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(text.replace("| 2.00 |", "| 2.01 |"), encoding="utf-8")
    assert report.main([*arguments, "--check"]) == 1


def test_unknown_schema_is_refused(tmp_path: Path, results: dict[str, Any]) -> None:
    results["schema"] = 99
    assert report.main(write_inputs(tmp_path, results)) == 2


def test_no_results_yet(tmp_path: Path) -> None:
    assert report.main(write_inputs(tmp_path)) == 0
    assert "No results are recorded yet." in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_readme_of_this_repository_is_current() -> None:
    assert report.main(["--check"]) == 0


# --------------------------------------------------------------------------------- attention
def test_portable_cells() -> None:
    found = cells.parse_cells("portable")
    assert len(set(found)) == 12
    assert {cell.batch * cell.seqlen for cell in found} == {16384}
    assert {cell.nheads * cell.headdim for cell in found} == {2048}
    assert [cells.parse_cell(cell.name) for cell in found] == found


@pytest.mark.parametrize(
    "text", ["", "d64", "d64-half-s8", "d64-full", "d64-full-sx", "d64-full-s0"]
)
def test_bad_cells_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a cell looks like"):
        cells.parse_cell(text)


def test_flops() -> None:
    cell = cells.parse_cell("d64-full-s10-b2-h3")
    assert cell.flops("fwd") == 4 * 2 * 3 * 100 * 64
    assert cell.flops("bwd") == 2.5 * cell.flops("fwd")
    assert cells.parse_cell("d64-causal-s10-b2-h3").flops("fwd") == cell.flops("fwd") / 2


def test_every_provider_is_first_in_turn() -> None:
    orders = list(timing.rotations(["a", "b", "c"], 4))
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert list(timing.rotations([], 2)) == [[], []]


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_what_autograd_computes(causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 2100, 8, dtype=torch.float64)  # two blocks of rows
    leaves = [x.clone().requires_grad_(True) for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].mT * 8**-0.5
    if causal:
        scores = scores + torch.full((2100, 2100), -math.inf, dtype=torch.float64).triu(1)
    out = scores.softmax(-1) @ leaves[2]
    want = (out, *torch.autograd.grad(out, leaves, dout))
    got = attention.reference(q, k, v, dout, causal)
    for found, expected in zip(got.values(), want, strict=True):
        torch.testing.assert_close(found, expected)


class CountingClock:
    """Runs a call once and gives each an invented time."""

    def __init__(self) -> None:
        self.measured = 0

    def synchronize(self) -> None:
        pass

    def measure(self, call: Callable[[], object]) -> float:
        call()
        self.measured += 1
        return float(self.measured)


def scaled(factor: float) -> Callable[[Any, Any], Any]:
    """A provider whose output is off by a factor."""

    def make(cell: Any, inputs: Any) -> Any:
        runner = peers.make_ours(cell, inputs)
        return runner._replace(call=lambda: runner.call() * factor)

    return make


def explode(cell: Any, inputs: Any) -> Any:
    raise torch.OutOfMemoryError("no\nroom")


def run_small(makers: dict[str, Any], clock: Any, rounds: int = 3) -> dict[str, Any]:
    session = attention.Session(
        clock, list(makers), ("fwd", "bwd"), rounds, torch.float32, "cpu", makers
    )
    cell = cells.parse_cell("d16-causal-s33-b2-h2")
    record = attention.new_record(cell)
    session.run_cell(cell, record)
    return record


def test_wrong_and_failing_providers_are_recorded_and_not_timed() -> None:
    makers = {"ours": peers.make_ours, "off": scaled(1.05), "nan": scaled(math.nan)}
    clock = CountingClock()
    record = run_small({**makers, "big": explode, "flash": peers.PROVIDERS["flash"]}, clock)
    for which in ("fwd", "bwd"):
        assert list(record["passes"][which]) == ["ours", "flash"]
    assert clock.measured == 2 * 2 * 3
    assert record["errors"]["off"]["out"] == pytest.approx(0.05, rel=1e-2)
    assert record["errors"]["nan"]["out"] == math.inf
    assert max(record["errors"]["ours"].values()) < 1e-5
    assert record["failures"]["off"].startswith("wrong")
    assert record["failures"]["nan"].startswith("wrong")
    assert record["failures"]["big"] == "OutOfMemoryError: no room"


def test_medians_and_tflops() -> None:
    record = run_small({"ours": peers.make_ours}, CountingClock())
    forward, backward = record["passes"]["fwd"]["ours"], record["passes"]["bwd"]["ours"]
    assert forward["rounds_ms"] == [1.0, 2.0, 3.0]
    assert forward["median_ms"] == 2.0
    assert backward["median_ms"] == 5.0


def test_a_call_that_fails_later_ends_only_its_own_timing() -> None:
    class Failing(CountingClock):
        def measure(self, call: Callable[[], object]) -> float:
            if self.measured == 2:
                self.measured += 1
                raise RuntimeError("launch failed")
            return super().measure(call)

    record = run_small({"ours": peers.make_ours, "same": peers.make_ours}, Failing())
    assert list(record["passes"]["fwd"]) == ["ours"]  # second round, where "same" comes first
    assert record["failures"] == {"same/fwd": "RuntimeError: launch failed"}
    assert list(record["passes"]["bwd"]) == ["ours", "same"]


def test_a_lost_device_ends_the_run() -> None:
    class Lost(CountingClock):
        def synchronize(self) -> None:
            raise RuntimeError("illegal address")

    with pytest.raises(timing.DeviceLostError, match="illegal address"):
        run_small({"big": explode}, Lost())


def test_backward_call_accumulates_nothing() -> None:
    cell = cells.parse_cell("d16-full-s20-b1-h2")
    runner = peers.make_ours(cell, peers.make_inputs(cell, torch.float32, "cpu"))
    backward = attention.backward_of(runner)
    for first, second in zip(backward(), backward(), strict=True):
        assert torch.equal(first, second)
    assert all(leaf.grad is None for leaf in runner.leaves)


def test_results_are_written_after_every_cell(tmp_path: Path) -> None:
    out = tmp_path / "made" / "r.json"
    arguments = ["--device", "cpu", "--cells", "d16-full-s20-b1-h2,d16-causal-s24-b1-h2"]
    arguments += ["--rounds", "2", "--providers", "ours", "--out", str(out), "--commit", "abc"]
    assert attention.main(arguments) == 0
    data = json.loads(out.read_text())
    assert data["complete"]
    assert data["environment"]["commit"] == "abc"
    names = ["d16-full-s20-b1-h2", "d16-causal-s24-b1-h2"]
    assert [cell["name"] for cell in data["cells"]] == names
    assert attention.main([*arguments, "--max-seconds", "-1"]) == 1
    data = json.loads(out.read_text())
    assert data["left_out"] == names
    assert not data["complete"]


def test_source_hash_follows_the_sources(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / "a.py"
    file.write_text("a = 1\n")
    first = recording.source_hash(tmp_path)
    assert recording.source_hash(tmp_path) == first
    file.write_text("a = 2\n")
    assert recording.source_hash(tmp_path) != first
    assert recording.git_commit(tmp_path) == "unknown"


def float8_row(shape: tuple[int, bool, int], inputs: str, **more: Any) -> dict[str, Any]:
    headdim, causal, seqlen = shape
    row = {
        "cell": f"d{headdim} {inputs}", "headdim": headdim, "causal": causal, "seqlen": seqlen,
        "inputs": inputs, "hadamard": False, "per_head": False, "ratio": None, "failures": {},
        "ours": {"inputs": {"frobenius": 0.04}, "float8": {"frobenius": 0.002}}, "cudnn": None,
    }  # fmt: skip
    return row | more


def test_float8_section() -> None:
    theirs = {"inputs": {"frobenius": 0.05}, "float8": {"frobenius": 0.03}}
    first, second = (64, True, 1024), (256, False, 4096)
    rows = [
        float8_row(first, "gaussian", cudnn=theirs, ratio=0.8),
        float8_row(first, "gaussian", per_head=True, ours=theirs),
        float8_row(first, "outliers", hadamard=True, cudnn=theirs, ratio=0.9),
        float8_row(second, "gaussian", cudnn_refused="head dim"),
        float8_row(second, "outliers", cudnn_refused="head dim", failures={"ours": "broken"}),
    ]
    facts = ENVIRONMENT | {"cudnn": "9.1", "cudnn_frontend": "1.2"}
    data = {"environment": facts, "rows": rows, "left_out": ["d64 full s1024 outliers"]}
    text = "\n".join(report.float8_block(data))
    assert "| 64, causal, 1024 | 4.00 | 5.00 | – | – | 4.00 | 5.00 | 0.90 |" in text
    assert "| 256, full, 4096 | 4.00 | – | 4.00 | – | – | – | – |" in text
    assert "flash_attn is off by at most 0.20 % from" in text
    assert "cuDNN is off by at most 3.00 % from" in text
    assert text.count("- 256, full, 4096, cuDNN: head dim") == 1
    assert "- d256 outliers, flash_attn: broken" in text
    assert "- not run: d64 full s1024 outliers" in text
    alone = float8_row(first, "gaussian")
    text = "\n".join(report.float8_block(data | {"rows": [alone], "left_out": []}))
    assert "cuDNN is off" not in text
    assert "Without a figure" not in text


def test_attention_comes_before_memory(tmp_path: Path, results: dict[str, Any]) -> None:
    data = {
        "schema": 1, "benchmark": "memory", "environment": ENVIRONMENT, "left_out": [], "rows": [],
        "settings": {"dtype": "bfloat16"}, "growth": {},
    }  # fmt: skip
    write_inputs(tmp_path, data, copy.deepcopy(results))
    loaded = report.load_results(tmp_path / "results")
    assert [x["benchmark"] for x in loaded] == ["attention", "memory"]


# ------------------------------------------------------------------------------------- sweep
PLAN = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}


def test_lists_stand_for_combinations() -> None:
    plans = sweep.expand([{**PLAN, "block_m": [64, 128], "num_stages": [2, 3]}, PLAN])
    assert [sweep.label(p) for p in plans] == ["64x32w4s2", "64x32w4s3", "128x32w4s2", "128x32w4s3"]
    with pytest.raises(ValueError, match="a plan must have"):
        sweep.expand([{"block_m": 64}])


def test_plans_by_head_dim() -> None:
    assert sweep.plans_for({"dq": [PLAN]}, 64) == {"dq": [PLAN]}
    assert sweep.plans_for({"64": {"dkdv": [PLAN]}}, 64) == {"dkdv": [PLAN]}
    assert sweep.plans_for({"64": {"dkdv": [PLAN]}}, 128) == {}
    with pytest.raises(ValueError, match="kernels are"):
        sweep.plans_for({"64": {"other": [PLAN]}}, 64)


def test_with_plan_overrides_that_kernel_alone() -> None:
    from flash_attn.core import plan

    def key(kernel: str) -> plan.PlanKey:
        return plan.PlanKey(kernel, "sm90", (3, 6), 2, 64, True, False)

    with sweep.with_plan("dq", PLAN):
        assert plan.overridden(key("dq")) == plan.TilePlan(**PLAN)
        assert plan.overridden(key("dkdv")) is None
    with sweep.with_plan("dq", None):
        assert plan.overridden(key("dq")) is None


@pytest.mark.parametrize("kernel", sweep.KERNELS)
def test_wrong_plans_are_not_ranked(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {**PLAN, "num_warps": 8}
    true_errors = sweep.errors_of

    def with_plan(_: str, fields: dict[str, int] | None) -> Any:
        active.append(fields)
        return nullcontext()

    def errors_of(*args: Any, **kwargs: Any) -> dict[str, float]:
        return {"out": 1.0} if active[-1] == bad else true_errors(*args, **kwargs)

    active: list[dict[str, int] | None] = []
    monkeypatch.setattr(sweep, "with_plan", with_plan)
    monkeypatch.setattr(sweep, "errors_of", errors_of)
    cell = cells.parse_cell("d16-causal-s33-b1-h2")
    row = sweep.time_kernel(cell, kernel, [PLAN, bad], CountingClock(), 2)
    assert set(row["median_ms"]) == {"default", "64x32w4s2"}
    assert row["failures"] == {"64x32w8s2": "wrong: relative errors {'out': 1.0}"}
    assert list(row["median_ms"].values()) == sorted(row["median_ms"].values())


def test_overall_ranking_compares_plans_timed_everywhere() -> None:
    rows = [
        {
            "cell": "d64-full-s1024",
            "kernel": "dq",
            "median_ms": {"default": 2.0, "a": 1.0, "b": 1.0},
        },
        {"cell": "d64-full-s4096", "kernel": "dq", "median_ms": {"default": 2.0, "a": 4.0}},
        {"cell": "d64-causal-s4096", "kernel": "dq", "median_ms": {"b": 4.0}},
    ]
    ranking = sweep.overall(rows)
    assert list(ranking) == ["dq d64-full"]
    assert ranking["dq d64-full"] == pytest.approx({"default": 1.0, "a": 1.0})


# --------------------------------------------------------------------------------- gpu tests
SUITE = """
import pytest

def test_right():
    pass

class TestGroup:
    @pytest.mark.parametrize("n", [1, 2])
    def test_wrong(self, n):
        assert n == 1, "two"

@pytest.fixture
def broken():
    yield
    raise OSError("teardown")

def test_teardown(broken):
    assert False, "call"

def test_skipped():
    pytest.skip("no such GPU")

@pytest.mark.xfail(strict=True)
def test_known():
    assert False

@pytest.mark.xfail
def test_no_longer():
    pass

def test_only_teardown(broken):
    pass
"""


@pytest.mark.parametrize("workers", [["-p", "no:xdist"], ["-n", "1"]])
def test_outcomes_of_a_real_session(
    tmp_path: Path, workers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "test_import.py").write_text("import no_such_module\n")
    arguments = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *workers]
    arguments += ["-c", str(tmp_path / "none.ini"), str(tmp_path)]
    (tmp_path / "none.ini").touch()
    outcome = gpu_tests.record(arguments, 120)
    assert outcome["exit_status"] == 1
    assert outcome["complete"]
    counts = {"passed": 2, "failed": 2, "error": 2, "skipped": 1, "xfailed": 1, "xpassed": 1}
    assert outcome["counts"] == counts
    failing = {"TestGroup::test_wrong[2]", "test_teardown", "test_only_teardown", "test_import.py"}
    assert {name.rpartition("test_suite.py::")[2] for name in outcome["failing"]} == failing
    assert "two" in outcome["failing"]["test_suite.py::TestGroup::test_wrong[2]"]
    assert outcome["skip_reasons"] == {"no such GPU": 1}


def test_an_interrupted_session_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    text = "import time\n\ndef test_quick():\n    pass\n\ndef test_slow():\n    time.sleep(60)\n"
    (tmp_path / "test_slow.py").write_text(text)
    arguments = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path)]
    outcome = gpu_tests.record(arguments, 8)
    assert not outcome["complete"]
    assert outcome["counts"]["passed"] == 1


def test_slug() -> None:
    assert gpu_tests.slug("NVIDIA H200") == "nvidia-h200"


def test_what_fails_alike_everywhere_is_said_once() -> None:
    cells = [{"name": name, "failures": {"fa4": "not there"}} for name in ("a", "b")]
    data = {"cells": cells, "left_out": []}
    assert report.failure_lines(data) == ["all 2 cells, FA4: not there"]
    cells[0]["failures"] = {"fa4": "wrong"}
    assert report.failure_lines(data) == ["a, FA4: wrong", "b, FA4: not there"]
