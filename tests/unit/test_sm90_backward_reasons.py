"""What the Hopper backward says of problems that it does not compute; no GPU is looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from flash_attn.backends import sm90
from flash_attn.backends.sm90 import launch_backward
from flash_attn.backends.sm90.plans_backward import TRITON, plan_backward, plan_ordered
from flash_attn.core.problem import (
    AttentionProblem,
    BackwardInputs,
    make_transform,
)

INTEGERS = torch.zeros(3, dtype=torch.int32)


def problem_of(headdim: int = 64, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A dense problem; names of its parts' fields change those."""
    x = torch.zeros(2, 10, 4, headdim, dtype=dtype)
    problem = AttentionProblem(x, x, x, make_transform(headdim))
    for part in ("transform", "layout", "visibility"):
        group = getattr(problem, part)
        mine = {name: changes.pop(name) for name in list(changes) if name in group._fields}
        problem = problem._replace(**{part: group._replace(**mine)})
    return problem._replace(**changes)


SERVED = {
    "plain": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 3, "window_right": 2},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.zeros(4)},
    "few columns": {"headdim": 1},
    "no multiple of 8": {"headdim": 60},
    "128 columns": {"headdim": 128},
    "256 columns": {"headdim": 256, "v": torch.zeros(2, 10, 4, 130)},
    "softcap of 192 columns": {"headdim": 192, "softcap": 3.0},
    "float16": {"dtype": torch.float16},
    "seqused_q": {"seqused_q": INTEGERS},
    "deterministic=True": {"deterministic": True, "headdim": 128},
    "deterministic=True of 256 columns": {"deterministic": True, "headdim": 256},
    "seqused_k of 256 columns": {"headdim": 256, "seqused_k": INTEGERS},
    "attention_chunk": {"attention_chunk": 5, "headdim": 64},
    "attention_chunk with softcap": {"attention_chunk": 5, "softcap": 3.0},
    "ALiBi": {"alibi_slopes": torch.zeros(4)},
    "seqused_k": {"seqused_k": INTEGERS},
    "a head dim of v of its own": {"v": torch.zeros(2, 10, 4, 128)},
}


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str) -> None:
    assert launch_backward.unsupported_backward(problem_of(**SERVED[name])) == []


def test_packed_sequences_are_served() -> None:
    x = torch.zeros(20, 4, 64, dtype=torch.bfloat16)
    problem = problem_of(q=x, k=x, v=x, cu_seqlens_q=INTEGERS, cu_seqlens_k=INTEGERS)
    assert launch_backward.unsupported_backward(problem) == []
    long = x[:1].expand(2**29, 4, 64)
    (reason,) = launch_backward.unsupported_backward(problem._replace(k=long))
    assert "536870912" in reason


REFUSED = {
    "leftpad_k": {"leftpad_k": INTEGERS},
    "pages": {"page_table": INTEGERS},
    "cache_batch_idx": {"cache_batch_idx": INTEGERS},
    "dropout": {"dropout_p": 0.1},
    "ALiBi and softcap": {"alibi_slopes": torch.zeros(4), "softcap": 3.0},
    "ALiBi and lengths on the device for head dims up to 64, found 72": {
        "alibi_slopes": torch.zeros(4),
        "headdim": 72,
        "seqused_k": INTEGERS,
    },
    "attention_chunk for head dims up to 64, found 72": {"attention_chunk": 5, "headdim": 72},
    "attn_mask": {"attn_mask": torch.zeros(1, 1, 10, 10)},
    "qv": {"qv": torch.zeros(2, 10, 4, 64)},
    "out_dtype": {"out_dtype": torch.float32},
    "softmax_scale > 0": {"softmax_scale": 0.0},
    "found 264": {"headdim": 264, "v": torch.zeros(2, 10, 4, 128)},
    "found 260": {"v": torch.zeros(2, 10, 4, 260)},
    "ALiBi for head dims up to 128, found 130": {
        "alibi_slopes": torch.zeros(4),
        "v": torch.zeros(2, 10, 4, 130),
    },
    "softcap for head dims up to 192, found 200": {"softcap": 3.0, "headdim": 200},
    "torch.float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_a_reason_that_names_it(name: str) -> None:
    (reason,) = launch_backward.unsupported_backward(problem_of(**REFUSED[name]))
    assert name in reason


def test_alibi_in_order_needs_narrow_heads() -> None:
    options = {"alibi_slopes": torch.zeros(4), "deterministic": True}
    for headdim, is_refused in ((64, False), (72, True)):
        reasons = launch_backward.unsupported_backward(problem_of(**options, headdim=headdim))
        found = [x for x in reasons if "ALiBi and deterministic=True for head dims up to 64" in x]
        assert bool(found) == is_refused


def test_the_backend_asks_for_the_gpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(dropout_p=0.1)
    (reason,) = sm90.BACKEND.unsupported(problem, backward=True)
    assert "is on cpu" in reason
    on_gpu = problem._replace(q=_OnGpu(problem.q))
    monkeypatch.setattr(sm90, "arch_of", lambda index: "sm100")
    (reason,) = sm90.BACKEND.unsupported(on_gpu, backward=True)
    assert "this one is sm100" in reason
    monkeypatch.setattr(sm90, "arch_of", lambda index: "sm90")
    (reason,) = sm90.BACKEND.unsupported(on_gpu, backward=True)
    assert "dropout" in reason


class _OnGpu:
    """A tensor that says it is on a GPU."""

    is_cuda = True

    def __init__(self, x: torch.Tensor) -> None:
        self._x = x

    def __getattr__(self, name: str) -> Any:
        return getattr(self._x, name)


def test_the_backend_hands_the_gradients_on(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of()
    x = problem.q
    state = torch.zeros(2, dtype=torch.int64)
    inputs = BackwardInputs(x, x, torch.zeros(2, 4, 10), x, x, x, state)
    called = []
    monkeypatch.setattr(launch_backward, "backward", lambda *given: called.append(given))
    sm90.BACKEND.backward(problem, inputs)
    assert called == [(problem, inputs)]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("plain", True),
        ("causal", True),
        ("softcap", True),
        ("seqused_k", True),
        ("ALiBi", False),
        ("attention_chunk", False),
    ],
)
def test_where_the_registers_suffice_for_k_and_v(name: str, kept: bool) -> None:
    assert launch_backward._can_keep_keys(problem_of(**SERVED[name])) is kept


@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize("is_masked", [False, True])
def test_plans_that_keep_k_and_v_leave_registers_for_it(headdim: int, is_masked: bool) -> None:
    """With 200 the assembler makes all products wait for each other."""
    for seqlen in (64, 512, 2048, 4096, 16384):
        for choose in (plan_backward, plan_ordered):
            plan = choose(headdim, is_masked, seqlen)
            assert plan.keeps_keys == (headdim == 64 and TRITON <= (3, 6))
            assert not plan.keeps_keys or plan.registers >= 208
