"""Cells of every kind: their names, their work, how each provider is asked, and their tables."""

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

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
attention, cells, peers, report = (
    importlib.import_module(name) for name in ("attention", "cells", "peers", "report")
)

SMALL = ("d16-causal-s40-b2-h4-k2", "d16-causal-s40-b1-h2-w7", "d16-full-s24-b1-h3-fp16")


# ----------------------------------------------------------------------------------------- names
@pytest.mark.parametrize("group", cells.GROUPS)
def test_every_cell_is_its_name(group: str) -> None:
    found = cells.parse_cells(group)
    assert len({cell.name for cell in found}) == len(found)
    assert [cells.parse_cell(cell.name) for cell in found] == found


def test_groups_have_what_they_are_for() -> None:
    groups = cells.GROUPS
    assert len(groups["grid"]) == 36
    assert {cell.seqlen for cell in groups["grid"]} == {512, 1024, 2048, 4096, 8192, 16384}
    assert {cell.batch * cell.seqlen for cell in groups["grid"]} == {16384}
    assert [(c.batch, c.nheads, c.dtype) for c in groups["seed"]] == [(1, 16, "float16")] * 5
    assert {(c.nheads, c.kv_heads) for c in groups["shapes"]} >= {(32, 8), (16, 2)}
    assert sum(cells.PACKED_LENGTHS) == 32768
    assert len(cells.PACKED_LENGTHS) == 16
    assert min(cell.seqlen for cell in groups["ordered"]) == 2048
    for group in ("odd", "float16"):
        names = [cell.name for cell in groups[group]]
        assert any(cells.BESIDE.get(name) in names for name in names)
    known = {cell.name for group in groups.values() for cell in group}
    assert set(cells.BESIDE) | set(cells.BESIDE.values()) <= known


def test_groups_and_cells_together_name_each_cell_once() -> None:
    found = cells.parse_cells("seed,d64-causal-s512-b1-h16-fp16,d64-full-s8")
    assert [cell.name for cell in found[-2:]] == ["d64-causal-s8192-b1-h16-fp16", "d64-full-s8"]
    assert len(found) == 6


@pytest.mark.parametrize(
    "text",
    ["d64-full-s8-w4", "d64-full", "d64-full-packed-s8", "d64-full-packed-b2", "d64-s8",
     "d64-full-causal-s8", "d64-d32-full-s8", "d64-full-s8-x", "d64-full-s8-fp16-fp16"],
)  # fmt: skip
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="a cell looks like"):
        cells.parse_cell(text)


def test_heads_of_keys_divide_those_of_queries() -> None:
    with pytest.raises(ValueError, match="multiple"):
        cells.parse_cell("d64-full-s8-h6-k4")


def test_work_is_what_queries_see() -> None:
    windowed = cells.parse_cell("d64-causal-s9-b2-h3-w3")
    assert windowed.pairs() == 2 * sum(min(i + 1, 4) for i in range(9))
    assert windowed.flops("fwd") == 4 * windowed.pairs() * 3 * 64
    packed = cells.parse_cell("d64-causal-packed")
    assert packed.pairs() == sum(n * n for n in cells.PACKED_LENGTHS) / 2
    short = cells.parse_cell("d64-causal-s9-b2-h3-w100")
    assert short.pairs() == 2 * 45


def test_labels() -> None:
    def label(name: str) -> str:
        return cells.label(cells.fields_of(cells.parse_cell(name)))

    assert label("d64-causal-s4096") == "64, causal, 4096"
    assert label("d128-causal-s4096-h32-k8") == "128, causal, 4096, heads 32/8"
    assert label("d128-full-packed") == "128, full, 16 packed"
    assert label("d64-causal-s512-b1-h16-fp16") == "64, causal, 512, batch 1, 16 heads, float16"
    assert label("d64-causal-s16384-w1024") == "64, causal, 16384, window 1024"


# ----------------------------------------------------------------------------------- correctness
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("provider", ["ours", "ordered"])
def test_ours_serves_every_kind(name: str, provider: str) -> None:
    cell = cells.parse_cell(name)
    dtype = torch.float16 if cell.dtype == "float16" else torch.float32
    inputs = peers.make_inputs(cell, dtype, "cpu")
    runner = peers.PROVIDERS[provider](cell, inputs)
    want = attention.reference_slice(cell, inputs)
    errors = attention.errors_of(cell, runner, want, backward=True)
    assert max(errors.values()) < (2e-3 if dtype == torch.float16 else 1e-5)


@pytest.fixture
def packed() -> Any:
    return cells.Cell(16, True, 40, 3, 4, 2, lengths=(17, 40, 25))


def test_ours_serves_packed_sequences(packed: Any) -> None:
    inputs = peers.make_inputs(packed, torch.float32, "cpu")
    want = attention.reference_slice(packed, inputs)
    assert want["dq"].shape == (4, 25, 16)
    assert want["dk"].shape == (2, 25, 16)
    errors = attention.errors_of(packed, peers.make_ours(packed, inputs), want, backward=True)
    assert max(errors.values()) < 1e-5


def test_a_mistake_in_the_slice_is_seen(packed: Any) -> None:
    inputs = peers.make_inputs(packed, torch.float32, "cpu")
    narrow = cells.Cell(16, True, 40, 3, 4, 2, 5, lengths=(17, 40, 25))
    want = attention.reference_slice(narrow, inputs)
    errors = attention.errors_of(packed, peers.make_ours(packed, inputs), want, backward=True)
    assert attention.is_wrong(errors)
    assert min(errors.values()) > attention.WRONG_ABOVE


@pytest.mark.parametrize("maker", ["flash", "flex"])
def test_special_cells_are_not_asked_of_pytorch(maker: str, packed: Any) -> None:
    for cell in (packed, cells.parse_cell(SMALL[1])):
        inputs = peers.make_inputs(cell, torch.float32, "cpu")
        with pytest.raises(peers.PeerMissingError, match="packed sequences and windows"):
            peers.PROVIDERS[maker](cell, inputs)


# -------------------------------------------------------------------------- FlashAttention-3, -4
class Operators:
    """Stands in for FlashAttention-3: notes its options and computes by ours, exactly."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def _solve(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        import flash_attn

        window = (options.get("window_size_left", -1), options.get("window_size_right", -1))
        more = {"causal": options["is_causal"], "window_size": window}
        if "cu_seqlens_q" in options:
            bounds = [options[name] for name in peers._BOUNDS]
            return flash_attn.flash_attn_varlen_func(q, k, v, *bounds, **more)
        return flash_attn.flash_attn_func(q, k, v, **more)

    def fwd(self, q: Tensor, k: Tensor, v: Tensor, num_splits: int, **options: Any) -> Any:
        assert num_splits == 1
        self.options.append(options)
        return self._solve(q, k, v, options), torch.zeros(1), None, None

    def bwd(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
            dq: Tensor, dk: Tensor, dv: Tensor, **options: Any) -> None:  # fmt: skip
        self.options.append(options)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            grads = torch.autograd.grad(self._solve(*leaves, options), leaves, dout)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)


@pytest.mark.parametrize("name", [*SMALL, "packed"])
@pytest.mark.parametrize("provider", ["fa3", "fa3_ordered"])
def test_fa3_is_asked_for_the_cell(
    name: str, provider: str, packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = Operators()
    monkeypatch.setattr(peers, "fa3_operators", lambda: operators)
    cell = packed if name == "packed" else cells.parse_cell(name)
    inputs = peers.make_inputs(cell, torch.float32, "cpu")
    runner = peers.PROVIDERS[provider](cell, inputs)
    want = attention.reference_slice(cell, inputs)
    errors = attention.errors_of(cell, runner, want, backward=True)
    assert max(errors.values()) < 1e-5
    backward = attention.backward_of(runner)
    assert all(torch.equal(x, y) for x, y in zip(backward(), backward(), strict=True))
    assert operators.options[1]["deterministic"] is (provider == "fa3_ordered")


def test_fa4_is_asked_for_the_cell(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    operators, asked = Operators(), []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, return_lse: bool, causal: bool, **more: Any
    ) -> Any:
        assert return_lse
        asked.append(more)
        return operators.fwd(q, k, v, 1, is_causal=causal, **more)

    def backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor,
                 causal: bool, **more: Any) -> Any:  # fmt: skip
        grads = {f"d{name}": torch.empty_like(x) for name, x in zip("qkv", (q, k, v), strict=True)}
        operators.bwd(dout, q, k, v, out, lse, **grads, is_causal=causal, **more)
        return (*grads.values(), None)

    interface = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    package, module = ModuleType("fa4_peer"), ModuleType("fa4_peer.cute")
    module.interface = interface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fa4_peer", package)
    monkeypatch.setitem(sys.modules, "fa4_peer.cute", module)
    inputs = peers.make_inputs(packed, torch.float32, "cpu")
    runner = peers.PROVIDERS["fa4"](packed, inputs)
    want = attention.reference_slice(packed, inputs)
    assert max(attention.errors_of(packed, runner, want, backward=True).values()) < 1e-5
    assert set(asked[0]) == set(peers._BOUNDS)


def test_peers_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    peers.fa3_operators.cache_clear()
    with pytest.raises(SystemExit):
        attention.parse_arguments(["--peers", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        attention.parse_arguments(["--providers", "ours,none"])
    peers.add_peers(tmp_path)
    assert sys.path.index(str(tmp_path)) > sys.path.index(str(REPOSITORY / "src"))
    with pytest.raises(peers.PeerMissingError, match="see --peers"):
        peers.fa3_operators()
    with pytest.raises(peers.PeerMissingError, match="fa4_peer"):
        peers.fa4_kernels(cells.parse_cell("d64-full-s8"), torch.device("cpu"))


def test_operators_of_ours_are_not_taken_for_theirs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flash_attn import hopper_raw_ops

    assert hopper_raw_ops is not None
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "fa3_C.so").touch()
    peers.add_peers(tmp_path)
    peers.fa3_operators.cache_clear()
    with pytest.raises(peers.PeerMissingError, match="another library's"):
        peers.fa3_operators()


def test_a_missing_peer_ends_its_own_timing_only(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--cells", "d16-full-s20-b1-h2", "--rounds", "1"]
    arguments += ["--out", str(tmp_path / "r.json"), "--providers", "fa4,ours"]
    with pytest.raises(SystemExit, match="2"):
        attention.main([*arguments, "--peers", str(tmp_path / "none")])
    assert attention.main(arguments) == 1
    (cell,) = json.loads((tmp_path / "r.json").read_text())["cells"]
    assert list(cell["passes"]["bwd"]) == ["ours"]
    assert cell["failures"]["fa4"].startswith("PeerMissingError")


def test_a_peer_without_a_backward_pass_is_timed_forward(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    operators = Operators()

    def refuse(*tensors: Tensor, **options: Any) -> None:
        raise RuntimeError("no such head dim")

    monkeypatch.setattr(operators, "bwd", refuse)
    monkeypatch.setattr(peers, "fa3_operators", lambda: operators)
    arguments = ["--device", "cpu", "--cells", "d16-full-s20-b1-h2", "--rounds", "1"]
    arguments += ["--out", str(tmp_path / "r.json"), "--providers", "fa3,ours"]
    assert attention.main(arguments) == 1
    (cell,) = json.loads((tmp_path / "r.json").read_text())["cells"]
    assert list(cell["passes"]["fwd"]) == ["fa3", "ours"]
    assert list(cell["passes"]["bwd"]) == ["ours"]
    assert cell["failures"] == {"fa3/bwd": "RuntimeError: no such head dim"}


# ---------------------------------------------------------------------------------------- tables
def result_of(times: dict[str, dict[str, float]], **settings: Any) -> dict[str, Any]:
    """A result file of backward milliseconds by cell and provider."""
    records = []
    for name, by_provider in times.items():
        cell = cells.parse_cell(name)
        record = attention.new_record(cell)
        record["passes"]["bwd"] = {
            who: {"median_ms": ms, "tflops": cell.flops("bwd") / ms / 1e9}
            for who, ms in by_provider.items()
        }
        records.append(record)
    facts = dict.fromkeys(("gpu", "driver", "torch", "triton", "python", "source"), "x")
    facts |= {"date": "2026-01-02 03:04 UTC", "commit": "0123456789abcdef"}
    settings = {"rounds": 1, "dtype": "bfloat16", "backend": "auto", **settings}
    return {"schema": 1, "benchmark": "attention", "environment": facts, "settings": settings,
            "complete": True, "left_out": [], "cells": records}  # fmt: skip


def test_with_several_peers_the_best_of_each_cell_counts() -> None:
    data = result_of({
        "d64-causal-s4096": {"ours": 1.0, "cudnn": 2.0, "fa3": 1.5, "fa4": 1.25},
        "d64-full-s4096": {"ours": 1.0, "cudnn": 0.5, "fa3": 1.5},
    })  # fmt: skip
    assert report.rival_of(data, "bwd") == report.BEST
    assert report.ratios(data, "bwd") == {"d64-causal-s4096": 1.25, "d64-full-s4096": 0.5}
    text = report.block([data])
    assert "| flash_attn / the best peer |" in text
    assert "0.79 times the speed of the best peer (geometric mean of 2 cells; worst 0.50" in text
    assert "1.25 times the speed of FA4 (geometric mean of 1 cell" in text
    assert any("the best peer" in line for line in report.summary_lines(data))


def test_fa3_alone_is_the_rival() -> None:
    data = result_of({"d64-causal-s4096": {"ours": 1.0, "fa3": 1.5}}, title="shapes")
    assert report.rival_of(data, "bwd") == "fa3"
    text = report.block([data])
    assert text.startswith("#### x, automatic choice: shapes\n")
    assert "1.50 times the speed of FA3" in text


def test_deterministic_beside_default() -> None:
    data = result_of({
        "d64-causal-s4096": {"ours": 1.0, "ordered": 1.1, "fa3": 1.0, "fa3_ordered": 0.1},
        "d64-full-s4096": {"ours": 1.0, "ordered": 1.21, "fa3": 1.0},
    })  # fmt: skip
    assert report.ratios(data, "bwd") == {"d64-causal-s4096": 1.0, "d64-full-s4096": 1.0}
    text = report.block([data])
    assert "takes 15 % longer than the default (geometric mean of 2 cells; at most 21 %" in text
    assert "FA3, deterministic" in text


def test_odd_shapes_beside_their_neighbours() -> None:
    odd, usual = "d64-causal-s4096-h5", "d64-causal-s4096"
    cell = cells.parse_cell(odd)
    scale = cell.flops("bwd") / cells.parse_cell(usual).flops("bwd")
    data = result_of({odd: {"ours": 2.0 * scale}, usual: {"ours": 1.0}})
    assert "| 64, causal, 4096, 5 heads | 64, causal, 4096 | 0.50 |" in report.block([data])
    data["cells"].pop()
    assert report.beside_table(data) == []
    assert math.isnan(report.geometric_mean(report.ratios(data, "bwd").values()))
