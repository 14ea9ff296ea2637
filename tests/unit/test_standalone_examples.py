"""The samples of the standalone API run, and their numbers are the reference's in float64."""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn.core import reference
from flash_attn.core.problem import AttentionProblem, ScoreTransform, SequenceLayout, Visibility
from flash_attn.core.rotary import rotate
from flash_attn.standalone import get_error_string

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = REPOSITORY / "examples" / "standalone"
FILES = sorted(path.name for path in SAMPLES.glob("*.py"))
Result = dict[str, Any]


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples choose the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(0)


def load(name: str) -> Any:
    """Import a sample by its path."""
    spec = importlib.util.spec_from_file_location(f"standalone_{Path(name).stem}", SAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected(
    q: Tensor, k: Tensor, v: Tensor, rng_state: Tensor | None = None, **fields: Any
) -> Tensor:
    """Attention in float64; ``fields`` of the problem or of its groups."""
    groups = {"transform": ScoreTransform(q.shape[-1] ** -0.5), "visibility": Visibility(),
              "layout": SequenceLayout()}  # fmt: skip
    for group, given in groups.items():
        own = {name: fields.pop(name) for name in given._fields if name in fields}
        groups[group] = given._replace(**own)
    problem = AttentionProblem(q, k, v, **groups, **fields)
    return reference.attention(problem, torch.float64, rng_state).out


def close(r: Result, true: Tensor, out: str = "out", code: str = "code") -> None:
    """The call succeeded; half precision in out and in the weights on their way to v."""
    assert r[code] == 0
    tolerance = 1.6e-2 if r[out].dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(r[out].double(), true, rtol=tolerance, atol=tolerance)


def close_to_original(out: Tensor, original: Tensor, allowed: float) -> None:
    """What FP8 has left of the numbers that were quantised, relative."""
    error = torch.linalg.vector_norm(out.double() - original) / torch.linalg.vector_norm(original)
    assert error < allowed


def refused(r: Result, code: int) -> None:
    assert r["refused"] == code
    assert get_error_string(code).endswith(("not supported", "exclusive"))


def differs(r: Result, other: Tensor, out: str = "out") -> None:
    """The comparison has teeth: without the feature the result is far away."""
    assert (r[out].double() - other).abs().max() > 0.05


def qkv(r: Result) -> tuple[Tensor, Tensor, Tensor]:
    return r["q"], r["k"], r["v"]


def check_prefill(r: Result) -> None:
    close(r, expected(*qkv(r), window_right=0))
    differs(r, expected(*qkv(r)))


def check_decode(r: Result) -> None:
    assert r["q"].shape[1:] == (1, 16, 128)
    assert r["k"].shape[2] == 2
    close(r, expected(*qkv(r)))


def check_fp16_varlen(r: Result) -> None:
    close(r, expected(*qkv(r), cu_seqlens_q=r["cu_seqlens"], cu_seqlens_k=r["cu_seqlens"]))


def check_fp8_varlen(r: Result) -> None:
    bounds = {"cu_seqlens_q": r["cu_seqlens"], "cu_seqlens_k": r["cu_seqlens"]}
    original = expected(*r["exact"], **bounds)
    for name, out, code in (("global", "out", "code"), ("by_head", "heads_out", "heads_code")):
        q, k, v, *factors = r[name]
        names = ("q_descale", "k_descale", "v_descale")
        descales = {
            key: x.reshape(1, -1).expand(3, 16) for key, x in zip(names, factors, strict=True)
        }
        true = expected(q, k, v, **bounds, **descales)
        assert r[code] == 0
        close_to_original(r[out], true, 6e-2)  # weights may be FP8 on their way to v
        close_to_original(r[out], original, 0.1)


def check_bf16(r: Result) -> None:
    refused(r, -20)
    assert r["out"].dtype == torch.bfloat16
    close(r, expected(*qkv(r)))


def check_softcap(r: Result) -> None:
    refused(r, -11)
    close(r, expected(*qkv(r), softcap=30.0))
    differs(r, expected(*qkv(r)))


def check_pack_gqa(r: Result) -> None:
    refused(r, -10)
    close(r, expected(*qkv(r)))
    assert r["packed_out"].shape == (2, 64, 2, 8, 128)
    close(r, expected(*qkv(r)).view(2, 64, 2, 8, 128), "packed_out", "packed_code")


def check_split_kv(r: Result) -> None:
    refused(r, -13)
    close(r, expected(*qkv(r)))


def check_paged_kv(r: Result) -> None:
    refused(r, -14)
    close(r, expected(*qkv(r), page_table=r["page_table"], seqused_k=r["seqused_k"]))


def check_rotary(r: Result) -> None:
    refused(r, -15)
    q, k = (rotate(r[name], r["cos"], r["sin"]) for name in ("q", "k_new"))
    close(r, expected(q, k, r["v_new"], window_right=0))
    differs(r, expected(r["q"], r["k_new"], r["v_new"], window_right=0))
    torch.testing.assert_close(r["k"][:, :48], k, rtol=2e-3, atol=2e-3)
    assert torch.equal(r["v"][:, :48], r["v_new"])
    assert not r["k"][:, 48:].any()


def check_dropout(r: Result) -> None:
    refused(r, -12)
    assert r["rng_state"].any()
    close(r, expected(*qkv(r), rng_state=r["rng_state"], dropout_p=0.1))
    differs(r, expected(*qkv(r)))


def check_attention_mask(r: Result) -> None:
    refused(r, -17)
    close(r, expected(*qkv(r), attn_mask=r["mask"]))
    differs(r, expected(*qkv(r)))


def check_left_padding(r: Result) -> None:
    refused(r, -18)
    close(r, expected(*qkv(r), leftpad_k=r["leftpad_k"]))
    assert r["k"][0, :20].isnan().all()


def check_append_kv(r: Result) -> None:
    refused(r, -19)
    assert r["seqused_k"].tolist() == [228, 300]
    for b, end in enumerate(r["seqused_k"].tolist()):
        assert torch.equal(r["k"][b, end - 128 : end], r["k_new"][b])
        assert torch.equal(r["v"][b, end - 128 : end], r["v_new"][b])
    close(r, expected(*qkv(r), seqused_k=r["seqused_k"], window_right=0))


def check_errors(r: Result) -> None:
    assert list(r["found"]) == [-1, -2, -3, -6, -11]
    names = ("`out`", "`head_dim`", "`head_dim`", "`cu_seqlens_q`", "`softcap`")
    for (code, (result, message)), name in zip(r["found"].items(), names, strict=True):
        assert result == code
        assert name in message


def check_causal_or_local(r: Result) -> None:
    refused(r, -16)
    codes = {"both": 0, "causal": 0, "local": 0, "too_many": -4, "no_multiple": -5}
    assert r["codes"] == codes
    masks = {"causal": {"window_right": 0}, "local": {"window_left": r["window"]}}
    masks["both"] = masks["causal"] | masks["local"]
    for name, mask in masks.items():
        close({"out": r["outs"][name], "code": 0}, expected(*qkv(r), **mask))


def check_kernel_list(r: Result) -> None:
    strict = [("FP16", d) for d in (64, 96, 128, 192, 256)]
    strict += [("FP8_E4M3", d) for d in (64, 96, 128)]
    assert r["accepted"][True] == strict
    assert {name for name, _ in r["accepted"][False]} == {"FP16", "BF16", "FP8_E4M3"}
    assert len(r["accepted"][False]) == 30


def check_hints(r: Result) -> None:
    names = [f"headdim_{d}" for d in (64, 96, 128, 192, 256)]
    assert list(r) == ["decode", "decode_split", "varlen", "fp8", *names]
    for name in ("decode", "decode_split", *names):
        close(r[name], expected(*qkv(r[name])))
    bounds = {name: r["varlen"][name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    close(r["varlen"], expected(*qkv(r["varlen"]), **bounds))
    assert r["fp8"]["code"] == 0
    close_to_original(r["fp8"]["out"], expected(*r["fp8"]["exact"]), 0.2)


CHECKS: dict[str, Callable[[Result], None]] = {
    "append_kv.py": check_append_kv,
    "attention_mask.py": check_attention_mask,
    "bf16.py": check_bf16,
    "causal_or_local.py": check_causal_or_local,
    "decode.py": check_decode,
    "dropout.py": check_dropout,
    "error_handling.py": check_errors,
    "fp16_varlen.py": check_fp16_varlen,
    "fp8_varlen.py": check_fp8_varlen,
    "kernel_list.py": check_kernel_list,
    "left_padding.py": check_left_padding,
    "minimal.py": check_prefill,
    "pack_gqa.py": check_pack_gqa,
    "paged_kv.py": check_paged_kv,
    "performance_hints.py": check_hints,
    "prefill.py": check_prefill,
    "rotary.py": check_rotary,
    "softcap.py": check_softcap,
    "split_kv.py": check_split_kv,
}


def test_every_sample_is_checked_and_listed() -> None:
    assert sorted(CHECKS) == FILES
    index = (REPOSITORY / "examples" / "README.md").read_text(encoding="utf-8")
    assert [name for name in FILES if f"`{name}`" not in index] == []


@pytest.mark.parametrize("name", FILES)
def test_numbers(name: str) -> None:
    CHECKS[name](load(name).main())


@pytest.mark.parametrize("name", FILES)
def test_runs_as_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_module_runs_its_three_cases(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flash_attn.standalone import __main__ as cases

    assert cases.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "CPU" in lines[0]
    assert "strict=False" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["PASS"] * 3
    assert all("out error" in line and "lse error" in line for line in lines[1:])

    monkeypatch.setattr(cases, "flash_attention_forward", lambda params, strict: 0)
    assert cases.main() == 1, "nothing was written"
    monkeypatch.setattr(cases, "flash_attention_forward", lambda params, strict: -100)
    assert cases.main() == 1
    assert "FAIL" in capsys.readouterr().out
