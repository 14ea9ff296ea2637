"""The CPU backend's blocks: random problems of every feature, in tiles of a few rows and keys,
against the reference; and the memory that they take."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn
from flash_attn.backends import cpu
from flash_attn.core import problem_ops, reference, rng
from flash_attn.core.attend import attend
from flash_attn.core.problem import (
    AttentionProblem,
    BackwardInputs,
    ScoreTransform,
    SequenceLayout,
    Visibility,
)

INF = float("inf")


@pytest.fixture(autouse=True)
def on_cpu():
    with flash_attn.use_backend("cpu"):
        yield


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def bounds(lengths: list[int]) -> Tensor:
    return ints([0, *lengths]).cumsum(0).int()


class Draw:
    """A random problem in float64, or in float8 with descales."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.batch = self.random.randint(1, 3)
        self.nheads_k = self.random.choice([1, 2])
        self.nheads = self.nheads_k * self.random.choice([1, 3])
        self.headdim = self.random.choice([3, 8])
        self.headdim_v = self.random.choice([self.headdim, 5, 16])
        self.seqlens_q = [self.random.randint(0, 19) for _ in range(self.batch)]
        self.seqlens_k = [self.random.randint(0, 23) for _ in range(self.batch)]
        self.seqlen_q, self.seqlen_k = max(self.seqlens_q), max(self.seqlens_k)
        self.layout: dict[str, Any] = {}

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def below(self, limits: list[int]) -> Tensor:
        return ints([self.random.randint(0, limit) for limit in limits])

    def queries(self) -> Tensor:
        if self.chance(0.4):
            self.layout["seqused_q"] = self.below(self.seqlens_q)
        if self.chance(0.4):
            self.layout |= {"cu_seqlens_q": bounds(self.seqlens_q), "max_seqlen_q": self.seqlen_q}
            return torch.randn(sum(self.seqlens_q) + 2, self.nheads, self.headdim)
        return torch.randn(self.batch, self.seqlen_q, self.nheads, self.headdim)

    def keys(self, kind: str) -> Tensor:
        heads = (self.nheads_k, self.headdim)
        if kind != "plain":
            if self.chance(0.7):
                self.layout["seqused_k"] = ints(self.seqlens_k)
            if self.chance(0.7):
                self.layout["leftpad_k"] = self.below(self.seqlens_k)
        elif self.chance(0.3):
            self.layout["seqused_k"] = self.below(self.seqlens_k)
        if kind == "cache":
            self.layout["cache_batch_idx"] = self.below([self.batch + 1] * self.batch)
            return torch.randn(self.batch + 2, self.seqlen_k, *heads)
        if kind == "paged":
            columns = -(-self.seqlen_k // 4)
            self.layout["page_table"] = torch.randint(0, 9, (self.batch + 1, columns)).int()
            self.layout["cache_batch_idx"] = self.below([self.batch] * self.batch)
            self.seqlen_k = 4 * columns
            return torch.randn(9, 4, *heads)
        if "cu_seqlens_q" in self.layout:
            self.layout |= {"cu_seqlens_k": bounds(self.seqlens_k), "max_seqlen_k": self.seqlen_k}
            return torch.randn(sum(self.seqlens_k) + 1, *heads)
        return torch.randn(self.batch, self.seqlen_k, *heads)

    def mask(self) -> Tensor:
        sizes = (self.batch, self.nheads, self.seqlen_q, self.seqlen_k)
        shape = [self.random.choice([1, size]) for size in sizes]
        hidden = torch.rand(shape) < 0.2
        return hidden if self.chance(0.3) else torch.randn(shape).double().masked_fill(hidden, -INF)

    def transform(self, float8: bool) -> ScoreTransform:
        changes: dict[str, Any] = {}
        if self.chance(0.6):
            changes["attn_mask"] = self.mask()
        if self.chance(0.5):
            changes["sinks"] = torch.randn(self.nheads).double()
        if self.chance(0.3):
            changes["alibi_slopes"] = torch.rand(self.nheads)
        if float8:
            q_heads = self.random.choice([self.nheads, self.nheads_k])
            for name, heads in (("q", q_heads), ("k", self.nheads_k), ("v", self.nheads_k)):
                if self.chance(0.7):
                    changes[f"{name}_descale"] = torch.rand(self.batch, heads) + 0.5
        return ScoreTransform(0.4, self.random.choice([0.0, 1.5]), **changes)

    def problem(self, kind: str, float8: bool = False) -> AttentionProblem:
        dtype = torch.float8_e4m3fn if float8 else torch.float64
        q, k = self.queries(), self.keys(kind)
        v = torch.randn(*k.shape[:-1], self.headdim_v)
        second = kind != "plain" and self.chance(0.3)
        transform = self.transform(float8)
        drops = transform.softcap == 0.0 and not float8 and self.chance(0.4)
        choose = self.random.choice
        return AttentionProblem(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            transform,
            Visibility(choose([None, None, 3]), choose([None, 0, 2]), choose([0, 0, 3, 6])),
            SequenceLayout(**self.layout),
            dropout_p=0.3 if drops else 0.0,
            empty_lse=choose([INF, -INF]),
            return_softmax=True,
            qv=torch.randn(*q.shape[:-1], self.headdim_v).to(dtype) if second else None,
            out_dtype=torch.float32 if float8 else None,
        )


def check(problem: AttentionProblem, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and, where there is a gradient, backward in tiles of 7 queries by 5 keys."""
    monkeypatch.setattr(cpu, "_BLOCK_Q", 7)
    monkeypatch.setattr(cpu, "_BLOCK_K", 5)
    transform = problem.transform
    given = [*problem[:3], transform.attn_mask, transform.sinks]
    differentiable = problem.q.dtype == torch.float64 and problem.layout.cache_batch_idx is None
    leaves = [
        x.clone().requires_grad_()
        if differentiable and x is not None and x.dtype != torch.bool
        else x
        for x in given
    ]
    q, k, v, mask, sinks = leaves
    transform = transform._replace(attn_mask=mask, sinks=sinks)
    torch.manual_seed(seed)
    out, lse, s_dmask = problem_ops.solve(
        problem._replace(q=q, k=k, v=v, transform=transform), differentiable_lse=True
    )
    torch.manual_seed(seed)
    state = rng.new_state(q.device)
    want = reference.attention(problem, rng_state=state)
    found = [out.detach().double(), lse.detach().double(), s_dmask.double()]
    wanted = [want.out, want.softmax_lse, want.s_dmask]
    if differentiable:
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        inputs = [x for x in leaves if x is not None and x.requires_grad]
        found += torch.autograd.grad([out, lse], inputs, [dout, dlse])
        grads = reference.gradients(problem, dout, rng_state=state, dlse=dlse)
        wanted += [grad for grad in grads if grad is not None]
    for have, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "cache", "paged"])
@pytest.mark.parametrize("first", range(0, 80, 10))
def test_random_problems(first: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(first, first + 10):
        check(Draw(seed).problem(kind), seed, monkeypatch)


@pytest.mark.parametrize("kind", ["plain", "cache", "paged"])
@pytest.mark.parametrize("first", range(100, 140, 10))
def test_random_float8_problems(first: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(first, first + 10):
        check(Draw(seed).problem(kind, float8=True), seed, monkeypatch)


class Largest(TorchDispatchMode):
    """Notes the most elements that any new tensor has."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("sizes", [(2048, 1), (1, 2048)])
def test_memory_does_not_grow_with_the_square(sizes: tuple[int, int]) -> None:
    """A mask that is broadcast along rows or keys is not expanded."""
    seqlen, headdim = 2048, 8
    q, k, v, dout = (torch.randn(1, seqlen, 1, headdim) for _ in range(4))
    mask = torch.randn(1, 1, *sizes)
    problem = AttentionProblem(q, k, v, ScoreTransform(1.0, attn_mask=mask, sinks=torch.zeros(1)))
    grads = [torch.empty_like(x) for x in (q, k, v)]
    with Largest() as seen:
        out, lse, _, state = cpu.BACKEND.forward(problem)
        inputs = BackwardInputs(
            dout, out, lse, *grads, state, torch.randn_like(lse), torch.empty_like(mask)
        )
        cpu.BACKEND.backward(problem, inputs)
    assert cpu._BLOCK_Q * cpu._BLOCK_K <= seen.most < seqlen * seqlen // 16


def test_a_fake_square_would_be_seen() -> None:
    with Largest() as seen:
        torch.zeros(64, 1) + torch.zeros(1, 64)
    assert seen.most == 64 * 64


def test_rows_that_a_mask_hides_have_nothing() -> None:
    """And their log-sum-exp is the one that the problem names, or the sink."""
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    mask = torch.ones(1, 1, 5, 1, dtype=torch.bool)
    mask[:, :, 2] = False
    for empty, sinks in ((INF, None), (-INF, None), (INF, torch.tensor([0.5, -INF]))):
        transform = ScoreTransform(1.0, attn_mask=mask, sinks=sinks)
        result = attend(AttentionProblem(q, k, v, transform, empty_lse=empty))
        assert not result.out[:, 2].any()
        want = [empty, empty] if sinks is None else sinks.tolist()
        assert result.softmax_lse[0, :, 2].tolist() == want
        assert result.out[:, [0, 1, 3, 4]].all()


CALLS = {
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25])},
    "window": {"window_size": (3, 1), "softcap": 2.0},
    "dropout": {"dropout_p": 0.3, "causal": True},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_the_default_device_changes_nothing(options):
    """Where a program has made another one the default, the blocks are on the CPU still."""
    q = torch.randn(2, 7, 2, 16)
    cache, lengths = torch.randn(2, 9, 2, 16), torch.tensor([3, 4], dtype=torch.int32)
    results = []
    for device in ("cpu", "meta"):
        x, copy = q.clone().requires_grad_(), cache.clone()
        torch.manual_seed(1)
        with torch.device(device):
            out = flash_attn.flash_attn_func(x, x, x, **options)
            out.sum().backward()
            flash_attn.flash_attn_with_kvcache(
                q[:, :1], copy, copy, q[:, 1:3], q[:, 1:3], cache_seqlens=lengths
            )
        results.append((out, x.grad, copy))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
