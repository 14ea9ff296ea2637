"""The reference itself: against loops, against PyTorch, against finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import support
import torch
from torch import Tensor

import flash_attn
from flash_attn.core import reference, rng
from flash_attn.core.problem import AttentionProblem


def _loops(inputs: support.Inputs) -> tuple[Tensor, Tensor]:
    """The definition, number by number: out and log-sum-exp of a dense call without dropout."""
    q, k, v = (x.double() for x in (inputs.q, inputs.k, inputs.v))
    batch, seqlen_q, nheads, _ = q.shape
    seqlen_k, group = k.shape[1], nheads // k.shape[2]
    _, scale, causal, left, right, softcap, slopes = inputs.flat_options()
    right = 0 if causal else right
    out, lse = torch.zeros_like(q), torch.full((batch, nheads, seqlen_q), math.inf).double()
    for b in range(batch):
        for h in range(nheads):
            for i in range(seqlen_q):
                scores: dict[int, float] = {}
                for j in range(seqlen_k):
                    ahead = j - (i + seqlen_k - seqlen_q)
                    if (left >= 0 and -ahead > left) or (right >= 0 and ahead > right):
                        continue
                    s = scale * float(q[b, i, h] @ k[b, j, h // group])
                    s = softcap * math.tanh(s / softcap) if softcap else s
                    if slopes is not None:
                        s -= float(slopes[h] if slopes.dim() == 1 else slopes[b, h]) * abs(ahead)
                    scores[j] = s
                if not scores:
                    continue
                lse[b, h, i] = math.log(sum(math.exp(s) for s in scores.values()))
                for j, s in scores.items():
                    out[b, i, h] += math.exp(s - float(lse[b, h, i])) * v[b, j, h // group]
    return out, lse


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"window_size": (0, -1), "softcap": 1.5},
    {"softmax_scale": -0.7, "causal": True},
]


@pytest.mark.parametrize("alibi", [None, "heads", "batch"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seqlens", [(3, 6), (6, 3), (4, 4)])
def test_against_loops(
    seqlens: tuple[int, int], options: dict[str, Any], alibi: str | None
) -> None:
    inputs = support.dense("cpu", torch.float64, 2, seqlens, (2, 1), 5, **options)
    if alibi is not None:
        slopes = support.alibi_slopes("cpu", 2, 2 if alibi == "batch" else None)
        inputs = inputs.but(alibi_slopes=slopes)
    got = reference.attention(inputs.problem())
    out, lse = _loops(inputs)
    torch.testing.assert_close(got.out, out)
    torch.testing.assert_close(got.softmax_lse, lse)


@pytest.mark.parametrize("causal", [False, True])
def test_against_pytorch(causal: bool) -> None:
    inputs = support.dense("cpu", torch.float64, 2, (31, 31), (3, 3), 16, causal=causal)
    problem = inputs.problem()
    grads = reference.gradients(problem, inputs.dout)[:3]
    got = support.exact(problem, inputs.dout)[0]
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    out = out.transpose(1, 2)
    out.backward(inputs.dout)
    torch.testing.assert_close(got.out, out.detach())
    for name, leaf, grad in zip(support.GRADIENT_NAMES, leaves, grads, strict=True):
        torch.testing.assert_close(getattr(got, name), leaf.grad)
        torch.testing.assert_close(grad, leaf.grad)


def _problems() -> dict[str, AttentionProblem]:
    dense = support.dense("cpu", torch.float64, 1, (4, 5), (2, 1), 3)
    slopes = support.alibi_slopes("cpu", 2)
    packed = support.varlen("cpu", torch.float64, [2, 0, 3], [1, 2, 4], (2, 1), 3, padding=1)
    calls = {
        "plain": dense,
        "causal": dense.but(causal=True),
        "window": dense.but(window_size=(1, 1)),
        "softcap": dense.but(softcap=0.8),
        "alibi": dense.but(alibi_slopes=slopes),
        "dropout": dense.but(dropout_p=0.4),
        "dead_rows": support.dense("cpu", torch.float64, 1, (5, 2), headdim=3, causal=True),
        "varlen": packed.but(causal=True),
    }
    return {name: inputs.problem() for name, inputs in calls.items()}


@pytest.mark.parametrize("name", list(_problems()))
def test_gradients_by_finite_differences(name: str) -> None:
    problem = _problems()[name]
    state = torch.tensor([11, 5])

    def out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(problem._replace(q=q, k=k, v=v), rng_state=state).out

    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    assert torch.autograd.gradcheck(out, leaves)


@pytest.mark.parametrize("options", OPTIONS)
def test_public_gradients_by_finite_differences(options: dict[str, Any]) -> None:
    """The CPU computes float64 too, backward by its own formulas."""
    inputs = support.dense("cpu", torch.float64, 2, (4, 5), (2, 1), 3, **options)
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    with flash_attn.use_backend("cpu"):
        assert torch.autograd.gradcheck(
            lambda q, k, v: flash_attn.flash_attn_func(q, k, v, **inputs.options), leaves
        )


def test_rows_without_keys() -> None:
    inputs = support.dense("cpu", torch.float64, 1, (5, 2), headdim=4, causal=True)
    got = support.exact(inputs.problem(), inputs.dout)[0]
    assert not got.out[:, :3].any()
    assert not got.dq[:, :3].any()
    assert torch.isinf(got.lse[:, :, :3]).all()
    minus = reference.attention(inputs.problem()._replace(empty_lse=-math.inf))
    assert (minus.softmax_lse[:, :, :3] == -math.inf).all()


def test_probabilities() -> None:
    inputs = support.dense("cpu", torch.float64, 2, (5, 3), (2, 1), causal=True)
    p = reference.attention_probabilities(inputs.problem(), torch.float64)
    torch.testing.assert_close(p.sum(-1)[:, :, 2:], torch.ones(2, 2, 3).double())
    assert not p[:, :, :2].any()
    v = inputs.v.repeat_interleave(2, dim=2)
    out = torch.einsum("bhqk,bkhd->bqhd", p, v)
    torch.testing.assert_close(out, reference.attention(inputs.problem()).out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_as_a_backend(dtype: torch.dtype) -> None:
    inputs = support.dense("cpu", dtype, seqlens=(9, 12), heads=(4, 2), causal=True)
    with flash_attn.use_backend("reference"):
        support.run_and_check(inputs)


# Random bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    """The published answers of Philox-4x32 with 7 rounds."""
    seed = key[0] | key[1] << 32
    seed = seed - 2**64 if seed >= 2**63 else seed
    given = [torch.tensor([x]) for x in counter]
    assert [int(x) for x in rng.philox(torch.tensor(seed), *given)] == words


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.83])
def test_keep_mask_rate(dropout_p: float) -> None:
    size = torch.arange(300)
    keep = rng.keep_mask(torch.tensor([3, 9]), dropout_p, 0, 2, size, size)
    count = keep.numel()
    sigma = (count * dropout_p * (1.0 - dropout_p)) ** 0.5
    assert abs(int(keep.sum()) - count * (1.0 - dropout_p)) <= 4.0 * sigma


def test_keep_mask_depends_on_coordinates_alone() -> None:
    state = torch.tensor([2**40 + 3, 17])
    rows, keys = torch.arange(9), torch.arange(14)
    whole = rng.keep_mask(state, 0.5, 2, 3, rows, keys)
    part = rng.keep_mask(state, 0.5, 2, 3, rows[4:], keys[5:11])
    assert torch.equal(whole[:, 4:, 5:11], part)
    # Head numbering continues over the batch.
    other = rng.keep_mask(state, 0.5, 0, 9, rows, keys)
    assert torch.equal(other[6:], whole)
