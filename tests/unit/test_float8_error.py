"""The tool that measures float8 errors: what it computes, how it calls cuDNN, and its verdict.

cuDNN and its frontend are replaced by a stand-in, which computes as the FP8 forward is documented.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn.quantize import quantize_fp8

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
cudnn_float8 = importlib.import_module("cudnn_float8")
float8_error = importlib.import_module("float8_error")

FLOAT8 = torch.float8_e4m3fn
SMALL = ["--device", "cpu", "--no-cudnn", "--headdims", "32", "--seqlens", "96"]


# A stand-in for the frontend ---------------------------------------------------------------------


class NotSupportedError(Exception):
    """The frontend's own error of a graph without a kernel."""


class Node:
    """A tensor of a graph; setters return it, as the frontend's do."""

    def __init__(self, name: str, **facts: Any) -> None:
        self.name, self.facts = name, facts

    def __getattr__(self, setter: str) -> Any:
        def keep(value: Any) -> Node:
            self.facts[setter.removeprefix("set_")] = value
            return self

        if not setter.startswith("set_"):
            raise AttributeError(setter)
        return keep


class Graph:
    """Computes when it is executed; ``error`` is raised by the step it names."""

    log: list[dict[str, float]]

    def __init__(self, error: tuple[str, Exception] | None, log: list[Any], **facts: Any) -> None:
        assert facts["io_data_type"] == "e4m3"
        assert facts["compute_data_type"] == facts["intermediate_data_type"] == "float32"
        self.error, self.log, self.steps = error, log, []

    def __getattr__(self, step: str) -> Any:
        def run(*_: Any) -> None:
            if self.error is not None and self.error[0] == step:
                raise self.error[1]
            self.steps.append(step)

        if step not in cudnn_steps:
            raise AttributeError(step)
        return run

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: str) -> Node:
        return Node(name, dim=dim, stride=stride, data_type=data_type)

    def sdpa_fp8(
        self, *, q: Node, k: Node, v: Node, descale_q: Node, descale_k: Node, descale_v: Node,
        descale_s: Node, scale_s: Node, scale_o: Node, attn_scale: float, generate_stats: bool,
        diagonal_alignment: str, right_bound: int | None, name: str,
    ) -> tuple[Node, None, Node, Node]:  # fmt: skip
        assert not generate_stats
        assert diagonal_alignment == "top left"
        self.given = {x.name: x for x in (q, k, v, descale_q, descale_k, descale_v)}
        self.given |= {x.name: x for x in (descale_s, scale_s, scale_o)}
        self.scale, self.causal = attn_scale, right_bound == 0
        self.results = Node("o"), Node("amax_s"), Node("amax_o")
        return self.results[0], None, *self.results[1:]

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pack: dict[Node, Tensor], workspace: Tensor, *, handle: str) -> None:
        assert handle == "handle"
        assert workspace.numel() > 0
        assert self.steps == cudnn_steps
        for node in (*self.given.values(), *self.results):
            self._check(node, pack[node])
        factors = {x.name: float(pack[x]) for x in self.given.values() if x.name not in "qkv"}
        q, k, v = (pack[self.given[name]].transpose(1, 2).double() for name in "qkv")
        s = q @ k.mT * factors["descale_q"] * factors["descale_k"] * self.scale
        if self.causal:
            s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -math.inf)
        weights = (s - s.amax(-1, keepdim=True)).exp()
        eight = (weights.float() * factors["scale_s"]).to(FLOAT8).double() * factors["descale_s"]
        out = eight @ v * factors["descale_v"] / weights.sum(-1, keepdim=True)
        pack[self.results[0]].copy_((out.float() * factors["scale_o"]).to(FLOAT8).transpose(1, 2))
        self.log.append(factors)

    @staticmethod
    def _check(node: Node, x: Tensor) -> None:
        """The graph was told where ``x`` really lies, and every result is asked for."""
        assert x.is_contiguous()
        if x.dtype == FLOAT8:
            x = x.transpose(1, 2)
            assert node.facts["data_type"] == "e4m3"
        else:
            assert node.facts["data_type"] == "float32"
        assert list(x.shape) == node.facts["dim"]
        kept = [(n, m) for n, m in zip(x.stride(), node.facts["stride"], strict=True)]
        assert all(n == m for (n, m), size in zip(kept, x.shape, strict=True) if size > 1)
        assert node.name not in ("o", "amax_s", "amax_o") or node.facts["output"]


cudnn_steps = [
    "validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans",
]  # fmt: skip


def stand_in(error: tuple[str, Exception] | None = None) -> tuple[Any, list[dict[str, float]]]:
    """What ``load_cudnn`` returns, and the factors of each execution."""
    log: list[dict[str, float]] = []
    module = SimpleNamespace(
        __version__="1.2",
        backend_version_string=lambda: "9.1",
        data_type=SimpleNamespace(FP8_E4M3="e4m3", FLOAT="float32"),
        diagonal_alignment=SimpleNamespace(TOP_LEFT="top left"),
        heur_mode=SimpleNamespace(A="a", FALLBACK="fallback"),
        cudnnGraphNotSupportedError=NotSupportedError,
        pygraph=lambda **facts: Graph(error, log, **facts),
    )
    return cudnn_float8.Cudnn(module, "handle"), log


# How cuDNN is called -----------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_gets_the_same_numbers_and_factors(causal: bool) -> None:
    shape = float8_error.Shape(32, causal, 70)
    given = float8_error.make_inputs(shape, "gaussian", "cpu")
    eight = quantize_fp8(*given, per_head=False)
    want = float8_error.exact(eight[:3], causal, eight[3:])
    cudnn, log = stand_in()
    out = cudnn_float8.CudnnForward(cudnn, shape.size, causal)(eight)
    error = float8_error.errors_of(out, {"float8": want})["float8"]["frobenius"]
    assert 1e-2 < error < 5e-2  # float8 weights and a float8 output, and nothing else
    assert len(log) == 2
    for factors in log:
        for name in "qkv":
            assert factors[f"descale_{name}"] == float(getattr(eight, f"{name}_descale")[0, 0])
        assert factors["descale_s"] * factors["scale_s"] == 1.0
        assert factors["scale_s"] <= 448.0
    # The second run uses the type's range: the largest output is in its two highest powers of two.
    largest = float(want.abs().max()) * log[1]["scale_o"]
    assert 448.0 / 2.5 < largest <= 448.0
    assert float(want.abs().max()) * log[0]["scale_o"] <= 448.0


def test_cudnn_output_that_is_not_finite_or_zero() -> None:
    """Such an output chooses no factor."""
    shape = float8_error.Shape(16, False, 8)
    q, k, v = float8_error.make_inputs(shape, "gaussian", "cpu")
    forward = cudnn_float8.CudnnForward(stand_in()[0], shape.size, False)
    assert not forward(quantize_fp8(q, k, torch.zeros_like(v), per_head=False)).any()
    bad = forward(quantize_fp8(q, k, v.fill_(math.nan), per_head=False))
    assert float8_error.errors_of(bad, {"x": torch.ones(1)})["x"] == {
        "frobenius": math.inf, "maximum": math.inf,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("validate", NotSupportedError("head dim")),
        ("check_support", NotSupportedError("head dim")),
        ("build_plans", RuntimeError("head dim")),
    ],
)
def test_cudnn_refuses(step: str, error: Exception) -> None:
    with pytest.raises(cudnn_float8.CudnnRefusedError, match="head dim"):
        cudnn_float8.CudnnForward(stand_in((step, error))[0], (2, 8, 4, 32), True)


def test_a_wrong_graph_is_no_refusal() -> None:
    cudnn, _ = stand_in(("validate", RuntimeError("a dimension is missing")))
    with pytest.raises(RuntimeError, match="a dimension is missing"):
        cudnn_float8.CudnnForward(cudnn, (2, 8, 4, 32), True)


def test_the_frontend_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)  # an import of it fails
    with pytest.raises(cudnn_float8.CudnnMissingError, match="install nvidia-cudnn-frontend"):
        cudnn_float8.load_cudnn()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert float8_error.main([]) == 2
    assert "--no-cudnn" in capsys.readouterr().err
    broken = ModuleType("cudnn")
    monkeypatch.setitem(sys.modules, "cudnn", broken)
    with pytest.raises(cudnn_float8.CudnnMissingError, match="create_handle"):
        cudnn_float8.load_cudnn()


# What is measured --------------------------------------------------------------------------------


def test_exact_is_attention() -> None:
    """Against PyTorch's, of plain numbers and of float8 ones with their factors."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    given = float8_error.make_inputs(float8_error.Shape(16, True, 33), "gaussian", "cpu")
    eight = quantize_fp8(*given)
    restored = [
        x.double() * factor[:, None, :, None].double()
        for x, factor in zip(eight[:3], eight[3:], strict=True)
    ]
    for causal in (False, True):
        for got, numbers in (
            (float8_error.exact(given, causal), [x.double() for x in given]),
            (float8_error.exact(eight[:3], causal, eight[3:]), restored),
        ):
            want = sdpa(*(x.transpose(1, 2) for x in numbers), is_causal=causal).transpose(1, 2)
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_inputs() -> None:
    shape = float8_error.Shape(64, False, 512)
    for kind, spread in (("gaussian", 1.0), ("outliers", 2.0)):
        q, k, v = (x.double() for x in float8_error.make_inputs(shape, kind, "cpu"))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8.0
        assert float(scores.std()) == pytest.approx(spread, rel=0.05)
        assert float(v.std()) == pytest.approx(1.0, rel=0.02)
        sizes = q.std((0, 1, 2)).sort().values
        assert float(sizes[-2] / sizes[-3]) > 15.0 if kind == "outliers" else sizes[-1] < 1.1


def test_errors() -> None:
    want = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    found = float8_error.errors_of(torch.tensor([3.0, -4.0, 0.5]), {"x": want, "y": want * 2.0})
    assert found["x"] == pytest.approx({"frobenius": 0.1, "maximum": 0.125})
    assert found["y"]["maximum"] == 0.5
    mine = {"x": {"frobenius": 0.1, "maximum": 0.3}}
    theirs = {"x": {"frobenius": 0.2, "maximum": 0.2}}
    assert float8_error.worst_ratio(mine, theirs) == pytest.approx(1.5)


def test_rows_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours alone: every combination, within what rounding explains, and rotation helps."""
    path = tmp_path / "result.json"
    assert float8_error.main([*SMALL, "--out", str(path), "--commit", "c"]) == 0
    data = json.loads(path.read_text())
    assert data["passed"] is True
    assert data["environment"]["commit"] == "c"
    assert data["environment"]["cudnn"] == "none"
    rows = {row["cell"]: row for row in data["rows"]}
    assert len(rows) == len(data["rows"]) == 2 * 2 * 4
    for row in rows.values():
        assert row["cudnn"] is row["ratio"] is None
        assert row["ours"]["float8"]["frobenius"] < 3e-3  # the bfloat16 output's rounding
        assert 1e-2 < row["ours"]["inputs"]["frobenius"] < 0.2
    for mask in ("causal", "full"):
        plain, rotated = (
            rows[f"d32 {mask} s96 outliers {how} tensor"]["ours"]["inputs"]["frobenius"]
            for how in ("plain", "rotated")
        )
        assert rotated < 0.6 * plain
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("PASS: 16 rows of ours, none compared")
    assert max(map(len, printed[2:])) < 140


def run_with(
    cudnn: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str
) -> tuple[int, dict[str, Any]]:
    """``main`` with a stand-in for cuDNN, on the CPU."""
    arguments = float8_error.parse_arguments([*SMALL, "--out", str(tmp_path / "r.json"), *more])
    arguments.no_cudnn = False
    monkeypatch.setattr(float8_error, "parse_arguments", lambda _: arguments)
    monkeypatch.setattr(float8_error, "load_cudnn", lambda: cudnn)
    code = float8_error.main()
    return code, json.loads((tmp_path / "r.json").read_text())


def test_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, data = run_with(stand_in()[0], monkeypatch, tmp_path)
    assert code == 0
    assert data["environment"]["cudnn_frontend"] == "1.2"
    for row in data["rows"]:
        assert (row["cudnn"] is None) == row["per_head"]
        if not row["per_head"]:
            assert row["ratio"] <= 1.1
            assert row["cudnn"]["float8"]["frobenius"] > 5.0 * row["ours"]["float8"]["frobenius"]


def test_ours_is_worse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    true = float8_error.ours
    monkeypatch.setattr(float8_error, "ours", lambda *given: true(*given) * 1.06)
    code, data = run_with(stand_in()[0], monkeypatch, tmp_path)
    assert code == 1
    assert data["passed"] is False
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL: worst")
    assert not any(row["failures"] for row in data["rows"])


def test_ours_is_wrong_or_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true = float8_error.ours
    for wrong in (lambda *given: true(*given) * 1.2, lambda *given: 1 // 0):
        monkeypatch.setattr(float8_error, "ours", wrong)
        code, data = run_with(stand_in()[0], monkeypatch, tmp_path)
        assert code == 1
        assert all(set(row["failures"]) == {"ours"} for row in data["rows"])
        assert all(row["ratio"] is None for row in data["rows"])


@pytest.mark.parametrize(
    ("error", "field"),
    [(NotSupportedError("no kernel"), "cudnn_refused"), (RuntimeError("bug"), "failures")],
)
def test_nothing_compared(
    error: Exception, field: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code, data = run_with(stand_in(("validate", error))[0], monkeypatch, tmp_path)
    assert code == 1
    assert all(str(error) in str(row[field]) for row in data["rows"])
    printed = capsys.readouterr().out
    assert ("cuDNN refuses d32 causal s96" in printed) == (field == "cudnn_refused")


def test_out_of_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert float8_error.main([*SMALL, "--max-seconds", "-1"]) == 1
    rows = list(float8_error.rows_of([float8_error.Shape(16, True, 8)], None, "cpu", -1.0))
    assert rows == ["d16 causal s8 gaussian", "d16 causal s8 outliers"]


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--headdims", "0"], ["--device", "cpu"], ["--seqlens", "x"]):
        with pytest.raises(SystemExit):
            float8_error.main(given)
    assert "needs --no-cudnn" in capsys.readouterr().err
