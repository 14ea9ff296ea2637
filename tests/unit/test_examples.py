"""The samples of the documentation run, and their numbers are those of a float64 computation."""

from __future__ import annotations

import importlib.util
import inspect
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn
from flash_attn import flash_attn_func

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE = REPOSITORY / "examples" / "reference"
FILES = sorted(path.name for path in REFERENCE.glob("*.py"))
HEADDIMS = (32, 40, 64, 80, 96, 128, 160, 192, 224, 256)
# Results are rounded to 16 bits and so are the probabilities on their way to v.
FP16 = {"rtol": 2e-3, "atol": 2e-3}
BF16 = {"rtol": 1.6e-2, "atol": 1.6e-2}
FP32 = {"rtol": 1e-5, "atol": 1e-5}
# PyTorch operations in float16 round the scores as well.
HALF_SCORES = {"rtol": 4e-3, "atol": 4e-3}


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples choose the CPU; what they set in the environment is undone."""
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "TRUE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(0)


def load(name: str) -> Any:
    """Import an example by its path."""
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", REFERENCE / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dense_probs(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """(batch, nheads, seqlen_q, seqlen_k) probabilities in float64."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    seqlen_q, seqlen_k = scores.shape[-2:]
    ahead = torch.arange(seqlen_k, device=q.device) - (
        torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
    )
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[:, None, None] * ahead.abs()
    left, right = window_size
    if causal:
        scores = scores.masked_fill(ahead > 0, float("-inf"))
    if left >= 0:
        scores = scores.masked_fill(ahead < -left, float("-inf"))
    if right >= 0:
        scores = scores.masked_fill(ahead > right, float("-inf"))
    return scores.softmax(dim=-1)


def dense(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, dropout_p: float = 0.0, **options
) -> Tensor:
    """Attention in float64, like q."""
    probs = dense_probs(q, k, **options)
    if keep is not None:
        probs = probs * keep / (1.0 - dropout_p)
    v = v.double().repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return (probs @ v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)


def close(actual: Tensor, expected: Tensor, tolerance: dict[str, float] = FP16) -> None:
    """Compare in float64: the dtype of the result is not the matter."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected.double(), **tolerance)


def differs(actual: Tensor, expected: Tensor) -> None:
    """The comparison has teeth: the same call without the sample's feature is far away."""
    assert (actual.double() - expected.double()).abs().max() > 0.05


def check_simple(r: dict[str, Any]) -> None:
    q, k, v, output = r["q"], r["k"], r["v"], r["output"]
    assert output.dtype == torch.float16
    assert q.shape == (2, 128 if q.device.type == "cpu" else 1024, 16, 64)
    close(output, dense(q, k, v, causal=True))
    differs(output, dense(q, k, v))


def check_packed(r: dict[str, Any]) -> None:
    close(r["qkv_output"], dense(*r["qkv"].unbind(2), causal=True))
    k, v = r["kv"].unbind(2)
    close(r["output"], dense(r["q"], k, v))
    assert r["short_q"].shape[1] != k.shape[1]
    close(r["cross_output"], dense(r["short_q"], k, v))


def _dense_linear(x: Tensor, linear: torch.nn.Linear) -> Tensor:
    y = x @ linear.weight.detach().double().T
    return y if linear.bias is None else y + linear.bias.detach().double()


def dense_mha(x: Tensor, mha: torch.nn.Module) -> Tensor:
    """Causal multi-head attention in float64 from the module's own weights."""
    qkv = _dense_linear(x.double(), mha.Wqkv).unflatten(-1, (3, mha.num_heads, -1))
    return _dense_linear(dense(*qkv.unbind(2), causal=True).flatten(2), mha.out_proj)


def dense_block(model: torch.nn.Module, x: Tensor) -> Tensor:
    def norm(y: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
        weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
        return torch.nn.functional.layer_norm(y, y.shape[-1:], weight, bias, layer.eps)

    x = x.double()
    x = x + dense_mha(norm(x, model.ln1), model.attn)
    hidden = torch.nn.functional.gelu(_dense_linear(norm(x, model.ln2), model.mlp[0]))
    return x + _dense_linear(hidden, model.mlp[2])


def check_transformer(r: dict[str, Any]) -> None:
    for prefix in ("", "autocast_"):
        model, output = r[f"{prefix}model"], r[f"{prefix}output"]
        assert output.shape == r["x"].shape
        assert output.isfinite().all()
        expected = dense_block(model, r["x"])
        # Values up to 8 are rounded to multiples of 2**-8 after every layer of the block.
        close(r[f"{prefix}eval_output"], expected, {"rtol": 2e-3, "atol": 6e-3})
        differs(output, expected)  # dropout
        output.float().square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert model.attn.Wqkv.weight.grad.abs().max() > 0
    assert r["output"].dtype == torch.float16
    assert r["model"].attn.Wqkv.weight.dtype == torch.float16
    assert r["autocast_model"].attn.Wqkv.weight.dtype == torch.float32


def check_grouped_query(r: dict[str, Any]) -> None:
    assert r["output"].shape[2:] == (32, 128)
    close(r["output"], dense(r["q"], r["k"], r["v"], causal=True))
    close(r["mqa_output"], dense(r["q"], r["k_mqa"], r["v_mqa"], causal=True))
    interleaved = [x.repeat(1, 1, 4, 1) for x in (r["k"], r["v"])]
    differs(r["output"], dense(r["q"], *interleaved, causal=True))


def check_window(r: dict[str, Any]) -> None:
    q, k, v = r["q"], r["k"], r["v"]
    close(r["output"], dense(q, k, v, causal=True, window_size=r["window_size"]))
    differs(r["output"], dense(q, k, v, causal=True))


def check_scale(r: dict[str, Any]) -> None:
    q, k, v = r["q"], r["k"], r["v"]
    assert r["custom_scale"] == pytest.approx(1.5 * 128**-0.5)
    close(r["output"], dense(q, k, v, causal=True, softmax_scale=r["custom_scale"]))
    differs(r["output"], dense(q, k, v, causal=True))


def _keep(s_dmask: Tensor, output: Tensor, k: Tensor) -> Tensor:
    return ~torch.signbit(s_dmask[:, :, : output.shape[1], : k.shape[1]])


def check_dropout(r: dict[str, Any]) -> None:
    q, k, v = r["q"], r["k"], r["v"]
    plain = dense(q, k, v, causal=True)
    close(r["output"], plain)
    close(r["module_eval_output"], plain)
    differs(r["train_output"], plain)
    differs(r["module_train_output"], plain)
    keep = _keep(r["s_dmask"], r["dropped"], k)
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    kept = keep[..., seen].double()
    assert kept.mean().item() == pytest.approx(0.9, abs=5 * (0.09 / kept.numel()) ** 0.5)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = dense(*leaves, keep=keep, dropout_p=0.1, causal=True)
    close(r["dropped"], expected.detach())
    grads = torch.autograd.grad(expected, leaves, r["dout"].double())
    for actual, grad in zip(r["grads"], grads, strict=True):
        close(actual, grad, {"rtol": 5e-3, "atol": 1e-2})


def check_benchmark(r: dict[str, Any]) -> None:
    on_cpu = r["q"].device.type == "cpu"
    assert list(r["times"]) == ([64, 128] if on_cpu else [512, 1024, 2048, 4096, 8192])
    assert all(time > 0 for time in r["times"].values())
    close(r["output"], dense(r["q"], r["k"], r["v"], causal=True))


def check_migration(r: dict[str, Any]) -> None:
    q, k, v = r["q"], r["k"], r["v"]
    expected = dense(q, k, v, causal=True)
    close(r["after"], expected)
    close(r["before"], expected, HALF_SCORES)
    close(r["after_full"], dense(q, k, v))
    differs(r["after_dropout"], expected)
    differs(r["before_dropout"], expected)


def check_fallback(r: dict[str, Any]) -> None:
    q, k, v, scale = r["q"], r["k"], r["v"], {"softmax_scale": r["softmax_scale"]}
    expected = dense(q, k, v, causal=True, **scale)
    close(r["fast"], expected)
    for name in ("fallback", "ignored", "complete_fallback"):
        assert r[name].shape[-1] == 512, "it must have fallen back"
        assert not r[name][..., 64:].any()
    close(r["fallback"][..., :64], expected, FP32)
    # As the file says: the printed fallback ignores the window.
    close(r["ignored"][..., :64], expected, FP32)
    differs(r["ignored"][..., :64], dense(q, k, v, causal=True, window_size=(16, 0), **scale))
    expected = dense(r["short_q"], r["k2"], r["v2"], **r["options"])
    close(r["complete_fallback"][..., :64], expected, FP32)
    close(r["complete_fast"], expected)


def check_errors(r: dict[str, Any]) -> None:
    assert isinstance(r["error"], RuntimeError)
    expected = dense(r["q"], r["k"], r["v"], causal=True)
    close(r["output"], expected, HALF_SCORES)
    assert isinstance(r["constraint_error"], RuntimeError)
    assert isinstance(r["constraint_error"], AssertionError)
    assert "`k`" in str(r["constraint_error"])


def check_environment(r: dict[str, Any]) -> None:
    expected = dense(r["q"], r["k"], r["v"], causal=True)
    close(r["output"], expected)
    close(r["original_output"], expected)


def check_attn_probs(r: dict[str, Any]) -> None:
    q, k, v = r["q"], r["k"], r["v"]
    probs = dense_probs(q, k, causal=True)
    assert r["s_dmask"].shape == (0,)
    assert r["probs"].dtype == torch.float32
    close(r["probs"], probs, {"rtol": 1e-4, "atol": 1e-6})
    close(r["out"], dense(q, k, v, causal=True))
    # exp(score - lse) is the probability, so the last row's largest one gives the lse away.
    scores = torch.einsum("bhd,bkhd->bhk", q[:, -1].double(), k.double().repeat_interleave(4, 2))
    lse = (scores * q.shape[-1] ** -0.5).logsumexp(dim=-1)
    close(r["softmax_lse"][:, :, -1], lse, {"rtol": 1e-4, "atol": 1e-4})
    keep = _keep(r["dropped_dmask"], r["dropped"], k)
    close(r["dropped"], dense(q, k, v, keep=keep, dropout_p=0.25, causal=True))
    close(r["option_probs"], dense_probs(q, k, **r["options"]), {"rtol": 1e-4, "atol": 1e-6})


def check_signatures(r: dict[str, tuple[inspect.Signature, inspect.Signature]]) -> None:
    assert len(r) == 5
    for name, (printed, actual) in r.items():
        expected = [p for p in printed.parameters.values() if p.name != "self"]
        found = [p for p in actual.parameters.values() if p.name != "self"]
        assert [(p.name, p.default) for p in found[: len(expected)]] == [
            (p.name, p.default) for p in expected
        ], name
        positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
        assert all(p.kind in positional for p in found[: len(expected)]), name
        extra = found[len(expected) :]
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in extra), name
        if name.startswith("flash_attn"):
            own = ["s_aux", "attn_mask"] if name == "flash_attn_func" else []
            assert [p.name for p in extra] == own, name


def check_calls(r: dict[str, Any]) -> None:
    q, k, v = r["qkv"].unbind(2)
    options = {name: r["arguments"][name] for name in ("softmax_scale", "causal", "window_size")}
    options |= {name: r["arguments"][name] for name in ("softcap", "alibi_slopes")}
    expected = dense(q, k, v, **options)
    for name in ("output", "qkvpacked_output", "kvpacked_output", "positional_output"):
        close(r[name], expected, BF16)
    slopes = r["arguments"]["alibi_slopes"]
    expected = dense(q, k, v, causal=True, window_size=(40, 0), alibi_slopes=slopes)
    close(r["module_output"], expected, BF16)
    assert not list(r["attention"].parameters())
    close(r["mha_output"].detach(), dense_mha(r["x"], r["mha"]))


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "api_calls.py": check_calls,
    "api_signatures.py": check_signatures,
    "benchmark.py": check_benchmark,
    "dropout_training.py": check_dropout,
    "environment_variable.py": check_environment,
    "error_handling.py": check_errors,
    "grouped_query.py": check_grouped_query,
    "migration.py": check_migration,
    "packed_formats.py": check_packed,
    "return_attn_probs.py": check_attn_probs,
    "safe_fallback.py": check_fallback,
    "simple_attention.py": check_simple,
    "sliding_window.py": check_window,
    "softmax_scale.py": check_scale,
    "transformer_block.py": check_transformer,
}


def test_every_example_is_checked_and_listed() -> None:
    assert sorted(CHECKS) == FILES
    index = (REPOSITORY / "examples" / "README.md").read_text(encoding="utf-8")
    assert [name for name in FILES if f"`{name}`" not in index] == []


@pytest.mark.parametrize("name", FILES)
def test_numbers(name: str) -> None:
    CHECKS[name](load(name).main())


@pytest.mark.parametrize("name", FILES)
def test_runs_as_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(REFERENCE / name), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_runs_in_a_fresh_process() -> None:
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(flash_attn.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", str(REFERENCE / "simple_attention.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Output shape: torch.Size([2, 128, 16, 64])\n"


def check_headdim(headdim: int, device: str) -> None:
    """Forward and backward of one head dim, grouped heads and two lengths, against float64."""
    q = torch.randn(2, 37, 4, headdim, device=device, dtype=torch.float16, requires_grad=True)
    k, v = (
        torch.randn(2, 45, 2, headdim, device=device, dtype=torch.float16, requires_grad=True)
        for _ in range(2)
    )
    output = flash_attn_func(q, k, v, causal=True)
    dout = torch.randn_like(output)
    grads = torch.autograd.grad(output, (q, k, v), dout)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = dense(*leaves, causal=True)
    close(output.detach(), expected.detach())
    expected_grads = torch.autograd.grad(expected, leaves, dout.double())
    for actual, grad in zip(grads, expected_grads, strict=True):
        close(actual, grad, {"rtol": 5e-3, "atol": 5e-3})


@pytest.mark.parametrize("headdim", HEADDIMS)
def test_documented_headdim_forward_and_backward(headdim: int) -> None:
    check_headdim(headdim, "cpu")


@pytest.mark.parametrize("dropout_p", [1.0, 1.5, -0.1, float("nan")])
def test_dropout_p_outside_zero_to_below_one_is_refused_by_name(dropout_p: float) -> None:
    q = torch.randn(1, 8, 2, 32, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="dropout_p"):
        flash_attn_func(q, q, q, dropout_p=dropout_p)


def test_except_runtime_error_catches_every_error_of_ours() -> None:
    from flash_attn import errors

    ours = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, BaseException)
    ]
    assert len(ours) >= 4
    assert all(issubclass(error, RuntimeError) for error in ours)
    assert issubclass(errors.ConstraintError, AssertionError)
    assert issubclass(errors.BackendUnavailableError, ImportError)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda q, k, v: (q[..., :16], k, v), "`k`.*16.*32"),
        (lambda q, k, v: (q, k[:, :, :3], v[:, :, :3]), "heads.*`k`.*3"),
        (lambda q, k, v: (q, k, v[:, :-1]), "`v`"),
        (lambda q, k, v: (q, k.bfloat16(), v), "`k`.*dtype"),
        (lambda q, k, v: (q[0], k, v), "`q`"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "`q`.*int32"),
        (lambda q, k, v: (q.repeat(1, 1, 1, 9), k.repeat(1, 1, 1, 9), v.repeat(1, 1, 1, 9)), "288"),
        (lambda q, k, v: (q, k[:1], v[:1]), "`k`.*batch"),
    ],
)
def test_except_runtime_error_catches_bad_arguments(
    change: Callable[..., tuple[Tensor, ...]], named: str
) -> None:
    q, k, v = torch.randn(3, 2, 8, 4, 32, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=named) as caught:
        flash_attn_func(*change(q, k, v))
    assert isinstance(caught.value, flash_attn.errors.FlashAttentionError)


def test_environment_set_after_import_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_attn.core import registry

    q = torch.randn(1, 8, 2, 32, dtype=torch.float16)
    before = flash_attn_func(q, q, q)
    monkeypatch.setattr(registry, "_warned_fallback", False)
    os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = "FALSE"
    with pytest.warns(RuntimeWarning, match="FLASH_ATTENTION_USE_FLAGGEMS"):
        after = flash_attn_func(q, q, q)
    assert torch.equal(before, after)
    os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = "maybe"
    with pytest.raises(RuntimeError, match="FLASH_ATTENTION_USE_FLAGGEMS"):
        flash_attn_func(q, q, q)
    os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = "true"
    assert torch.equal(before, flash_attn_func(q, q, q))
    del os.environ["FLASH_ATTENTION_USE_FLAGGEMS"]
    assert torch.equal(before, flash_attn_func(q, q, q))
