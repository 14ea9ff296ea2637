"""The demo's pieces: its data, its twin models, its verdict."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_gpt.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_gpt", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_gpt"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(demo: ModuleType) -> Any:
    return replace(
        demo.CPU_CONFIG,
        layers=2,
        width=32,
        heads=2,
        context=24,
        batch_size=2,
        steps=3,
        eval_batches=1,
        new_bytes=40,
    )


def test_library_files_are_sorted_and_leave_tests_out(demo: ModuleType, tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "json/c.py", "test/d.py", "json/tests/e.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [path.relative_to(tmp_path).as_posix() for path in demo.library_files(tmp_path)]
    assert found == ["a.py", "b.py", "json/c.py"]


def test_library_files_names_the_folder_without_source(demo: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        demo.library_files(tmp_path)


def test_this_python_has_enough_text(demo: ModuleType) -> None:
    train, held_out = demo.split_files(demo.library_files())
    assert len(held_out) >= 10
    assert not set(train) & set(held_out)
    text = demo.read_bytes(held_out)
    assert text.dtype == torch.uint8
    assert len(text) > demo.GPU_CONFIG.context


def test_batches_are_windows_of_the_text(demo: ModuleType, tiny: Any) -> None:
    text = torch.arange(tiny.context + 3, dtype=torch.uint8)
    batch = demo.random_batch(text, tiny, torch.Generator().manual_seed(0))
    assert batch.shape == (tiny.batch_size, tiny.context + 1)
    assert (batch.diff(dim=1) == 1).all()
    assert batch[:, 0].max() <= 2


def test_learning_rate_rises_then_falls_to_a_tenth(demo: ModuleType) -> None:
    config = replace(demo.CPU_CONFIG, steps=100)
    rates = [demo.learning_rate(step, config) for step in range(100)]
    top = max(rates)
    assert top == pytest.approx(config.learning_rate)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 * top, rel=0.01)


def test_twins_agree_in_loss_and_gradients(demo: ModuleType, tiny: Any) -> None:
    flash, twin = demo.make_twins(tiny, CPU)
    batch = torch.randint(256, (2, tiny.context + 1))
    losses = [demo.next_byte_loss(model, batch) for model in (flash, twin)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    for ours, theirs in zip(flash.named_parameters(), twin.named_parameters(), strict=True):
        assert ours[0] == theirs[0]
        torch.testing.assert_close(ours[1].grad, theirs[1].grad, rtol=1e-3, atol=1e-6)


def test_cached_decoding_fills_the_context_and_matches_one_pass(
    demo: ModuleType, tiny: Any
) -> None:
    model, _ = demo.make_twins(tiny, CPU)
    prompt = b"def "
    text, difference = demo.generate(model, prompt, tiny, CPU)
    assert text.startswith(prompt)
    assert len(text) == tiny.context
    assert difference < demo.CACHE_BOUND[torch.float32]


def test_verdict_counts_only_what_lies_beyond_its_bound(demo: ModuleType) -> None:
    names = ("first_loss", "same_weights", "max_loss", "cache_logit")
    fine = {f"{name}_difference": 0.0 for name in names}
    assert demo.disagreements(fine, torch.float32) == []
    for key in fine:
        for bad in (math.nan, math.inf, 1.0):
            found = demo.disagreements({**fine, key: bad}, torch.bfloat16)
            assert len(found) == 1


def _main(demo: ModuleType, folder: Path) -> int:
    return demo.main(["--quick", "--steps", "4", "--device", "cpu", "--out", str(folder)])


def test_quick_run_leaves_its_results(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    assert _main(demo, tmp_path / "out") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["backend"] == "cpu"
    assert len(result["losses"]) == len(result["losses_twin"]) == 4
    assert result["bits_per_byte_after"] < result["bits_per_byte_before"]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "the two models agree" in capsys.readouterr().out


def test_a_twin_without_causal_mask_is_found_out(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    attend = F.scaled_dot_product_attention

    def everything(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return attend(q, k, v)

    monkeypatch.setattr(demo.F, "scaled_dot_product_attention", everything)
    # The CPU backend under FlashMHA may call PyTorch's kernels, but not through this name.
    assert _main(demo, tmp_path) == 1


def test_steps_must_be_positive(demo: ModuleType) -> None:
    with pytest.raises(SystemExit):
        demo.parse(["--steps", "0"])
