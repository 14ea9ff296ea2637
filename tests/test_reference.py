"""The reference itself: against loops, against PyTorch, against finite differences."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import support
import torch
from torch import Tensor

import flash_attn
from flash_attn.core import problem_ops, reference, rng
from flash_attn.core.problem import AttentionProblem, Visibility


def _sees(problem: AttentionProblem, row: int, key: int) -> bool:
    left, right, chunk = problem.visibility
    position = row + problem.max_seqlen_k - problem.max_seqlen_q
    ahead = key - position
    near = (left is None or -ahead <= left) and (right is None or ahead <= right)
    return near and (not chunk or key // chunk == position // chunk)


def _factor(descale: Tensor | None, b: int, h: int, nheads: int) -> float:
    """What float8 numbers of query head ``h`` are multiplied by."""
    return 1.0 if descale is None else float(descale[b, h // (nheads // descale.shape[1])])


def _score(problem: AttentionProblem, b: int, h: int, i: int, j: int) -> float:
    """The score of one query and one key, -inf where it does not see it."""
    if not _sees(problem, i, j):
        return -math.inf
    transform, nheads = problem.transform, problem.nheads
    head_k = h // (nheads // problem.nheads_k)
    q, k, v = (x.double() for x in problem[:3])
    q_factor, k_factor, v_factor = (
        _factor(x, b, h, nheads)
        for x in (transform.q_descale, transform.k_descale, transform.v_descale)
    )
    dot = float(q[b, i, h] @ k[b, j, head_k]) * q_factor * k_factor
    if problem.qv is not None:
        dot += float(problem.qv[b, i, h].double() @ v[b, j, head_k]) * v_factor
    s = transform.softmax_scale * dot
    if transform.softcap:
        s = transform.softcap * math.tanh(s / transform.softcap)
    if transform.alibi_slopes is not None:
        slopes = transform.alibi_slopes.expand(q.shape[0], -1)
        s -= float(slopes[b, h]) * abs(j - (i + k.shape[1] - q.shape[1]))
    if transform.attn_mask is not None:
        shape = (q.shape[0], nheads, q.shape[1], k.shape[1])
        cell = transform.attn_mask.expand(shape)[b, h, i, j]
        hides = cell.dtype == torch.bool
        s += (0.0 if bool(cell) else -math.inf) if hides else float(cell)
    return s


def _loops(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """The definition, number by number: out and log-sum-exp of a dense problem without dropout."""
    transform, nheads = problem.transform, problem.nheads
    v = problem.v.double()
    out = torch.zeros(problem.out_shape, dtype=torch.float64)
    lse = torch.full(problem.lse_shape, problem.empty_lse, dtype=torch.float64)
    for b, h, i in product(*(range(size) for size in problem.lse_shape)):
        scores = [_score(problem, b, h, i, j) for j in range(v.shape[1])]
        total = sum(math.exp(s) for s in scores)
        total += 0.0 if transform.sinks is None else math.exp(float(transform.sinks[h]))
        if total == 0.0:
            continue
        lse[b, h, i] = math.log(total)
        factor = _factor(transform.v_descale, b, h, nheads) / total
        for j, s in enumerate(scores):
            out[b, i, h] += factor * math.exp(s) * v[b, j, h // (nheads // problem.nheads_k)]
    return out, lse


def _check_against_loops(problem: AttentionProblem) -> None:
    got = reference.attention(problem)
    out, lse = _loops(problem)
    torch.testing.assert_close(got.out, out)
    torch.testing.assert_close(got.softmax_lse, lse)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"window_size": (0, -1), "softcap": 1.5},
    {"softmax_scale": -0.7, "causal": True},
]
SEQLENS = [(3, 6), (6, 3), (4, 4)]


@pytest.mark.parametrize("alibi", [None, "heads", "batch"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seqlens", SEQLENS)
def test_against_loops(
    seqlens: tuple[int, int], options: dict[str, Any], alibi: str | None
) -> None:
    inputs = support.dense("cpu", torch.float64, 2, seqlens, (2, 1), 5, **options)
    if alibi is not None:
        slopes = support.alibi_slopes("cpu", 2, 2 if alibi == "batch" else None)
        inputs = inputs.but(alibi_slopes=slopes)
    _check_against_loops(inputs.problem())


def _additive(*shape: int) -> Tensor:
    """An additive mask; a fifth of it hides."""
    return torch.randn(shape).double().masked_fill(torch.rand(shape) < 0.2, -math.inf)


def _extended(seqlens: tuple[int, int]) -> dict[str, AttentionProblem]:
    """Problems of features that FlashAttention-2 has not, 2 query heads to 1 of keys."""
    seqlen_q, seqlen_k = seqlens
    plain = support.dense("cpu", torch.float64, 2, seqlens, (2, 1), 5).problem()
    capped = plain.transform._replace(softcap=1.5, alibi_slopes=support.alibi_slopes("cpu", 2))

    def scores(**changes: Any) -> AttentionProblem:
        return plain._replace(transform=capped._replace(**changes))

    sinks = torch.tensor([0.5, -1.0]).double()
    whole = (2, 2, seqlen_q, seqlen_k)
    hidden_rows = torch.rand(whole) < 0.7
    hidden_rows[:, 1, 0] = False
    chunk = Visibility(None, 0, 2)
    float8 = AttentionProblem(
        *(x.to(torch.float8_e4m3fn) for x in plain[:3]),
        plain.transform._replace(
            q_descale=torch.rand(2, 2) + 0.5,
            k_descale=torch.rand(2, 1) + 0.5,
            v_descale=torch.rand(2, 1) + 0.5,
        ),
    )
    wide = plain._replace(v=torch.randn(2, seqlen_k, 1, 7).double())
    return {
        "additive": scores(attn_mask=_additive(*whole)),
        "additive_heads": scores(attn_mask=_additive(1, 2, seqlen_q, 1)),
        "additive_batch": scores(attn_mask=_additive(2, 1, 1, seqlen_k)),
        "bool": scores(attn_mask=hidden_rows),
        "bool_and_sinks": scores(attn_mask=hidden_rows, sinks=sinks),
        "sinks": scores(sinks=sinks),
        "no_sink": scores(sinks=torch.tensor([-math.inf, 2.0]).double()),
        "chunk": plain._replace(visibility=Visibility(None, None, 2)),
        "chunk_and_window": plain._replace(visibility=chunk, empty_lse=-math.inf),
        "chunk_and_sinks": scores(sinks=sinks)._replace(visibility=chunk),
        "dim_of_v": wide,
        "second_product": wide._replace(qv=torch.randn(2, seqlen_q, 2, 7).double()),
        "float8": float8,
        "float8_heads": float8._replace(
            transform=float8.transform._replace(q_descale=torch.rand(2, 1) + 0.5, v_descale=None)
        ),
        "float8_second_product": float8._replace(qv=float8.q.clone()),
    }


@pytest.mark.parametrize("name", list(_extended((3, 3))))
@pytest.mark.parametrize("seqlens", SEQLENS)
def test_extensions_against_loops(seqlens: tuple[int, int], name: str) -> None:
    _check_against_loops(_extended(seqlens)[name])


def test_used_queries() -> None:
    """Rows past the used ones are rows of no sequence, and the others stand at the end."""
    problem = support.dense("cpu", torch.float64, 2, (4, 6), (2, 1), 5, causal=True).problem()
    layout = problem.layout._replace(seqused_q=torch.tensor([3, 0], dtype=torch.int32))
    got = reference.attention(problem._replace(layout=layout))
    out, lse = _loops(problem._replace(q=problem.q[:1, :3], k=problem.k[:1], v=problem.v[:1]))
    torch.testing.assert_close(got.out[:1, :3], out)
    torch.testing.assert_close(got.softmax_lse[:1, :, :3], lse)
    for x in (got.out[0, 3:], got.out[1]):
        assert not x.any()
    for x in (got.softmax_lse[0, :, 3:], got.softmax_lse[1]):
        assert (x == math.inf).all()


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
    return {name: inputs.problem() for name, inputs in calls.items()} | _extended_problems()


def _extended_problems() -> dict[str, AttentionProblem]:
    """Those of :func:`_extended` that have gradients, and their combinations."""
    problems = {
        name: problem
        for name, problem in _extended((4, 3)).items()
        if problem.qv is None and problem.q.dtype == torch.float64
    }
    del problems["no_sink"]  # -inf has no neighbours
    mask, dropped = problems["additive_batch"], problems["additive_heads"]
    problems["mask_and_dropout"] = dropped._replace(
        transform=dropped.transform._replace(softcap=0.0), dropout_p=0.4
    )
    used = torch.tensor([3, 1], dtype=torch.int32)
    problems["used_queries"] = mask._replace(layout=mask.layout._replace(seqused_q=used))
    packed = support.varlen("cpu", torch.float64, [2, 0, 3], [1, 2, 4], (2, 1), 3, padding=1)
    varlen = packed.problem()
    transform = varlen.transform._replace(
        attn_mask=_additive(3, 1, 4, 6), sinks=torch.randn(2).double()
    )
    problems["varlen_mask_and_sinks"] = varlen._replace(transform=transform)
    return problems


def _leaves(problem: AttentionProblem) -> list[Tensor]:
    """The differentiable tensors, ready for gradients."""
    transform = problem.transform
    given = [*problem[:3], transform.attn_mask, transform.sinks]
    return [
        x.detach().clone().requires_grad_()
        for x in given
        if x is not None and x.dtype != torch.bool
    ]


def _with(problem: AttentionProblem, leaves: tuple[Tensor, ...]) -> AttentionProblem:
    """``problem`` on other differentiable tensors, in the order of :func:`_leaves`."""
    q, k, v, *rest = leaves
    transform = problem.transform
    if transform.attn_mask is not None and transform.attn_mask.dtype != torch.bool:
        transform = transform._replace(attn_mask=rest.pop(0))
    if transform.sinks is not None:
        transform = transform._replace(sinks=rest.pop(0))
    return problem._replace(q=q, k=k, v=v, transform=transform)


@pytest.mark.parametrize("name", list(_problems()))
def test_gradients_by_finite_differences(name: str) -> None:
    """Of the output and of the log-sum-exp, in all differentiable inputs."""
    problem = _problems()[name]
    state = torch.tensor([11, 5])

    def results(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        got = reference.attention(_with(problem, leaves), rng_state=state)
        return got.out, got.softmax_lse.masked_fill(got.softmax_lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(results, _leaves(problem))


@pytest.mark.parametrize("name", list(_problems()))
def test_gradients_function(name: str) -> None:
    """:func:`reference.gradients` is what autograd gives."""
    problem, state = _problems()[name], torch.tensor([11, 5])
    leaves = _leaves(problem)
    result = reference.attention(_with(problem, tuple(leaves)), rng_state=state)
    lse = result.softmax_lse.masked_fill(result.softmax_lse.isinf(), 0.0)
    dout, dlse = torch.randn_like(result.out), torch.randn_like(lse)
    want = torch.autograd.grad([result.out, lse], leaves, [dout, dlse])
    got = reference.gradients(problem, dout, rng_state=state, dlse=dlse)
    found = [grad for grad in got if grad is not None]
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", OPTIONS)
def test_public_gradients_by_finite_differences(options: dict[str, Any]) -> None:
    """The CPU computes float64 too, backward by its own formulas."""
    inputs = support.dense("cpu", torch.float64, 2, (4, 5), (2, 1), 3, **options)
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    with flash_attn.use_backend("cpu"):
        assert torch.autograd.gradcheck(
            lambda q, k, v: flash_attn.flash_attn_func(q, k, v, **inputs.options), leaves
        )


@pytest.mark.parametrize("name", list(_extended_problems()))
def test_operator_gradients_by_finite_differences(name: str) -> None:
    """Of the CPU's own formulas. (The log-sum-exp is float32: too coarse to be differenced.)"""
    problem = _extended_problems()[name]

    def out(*leaves: Tensor) -> Tensor:
        torch.manual_seed(3)
        return problem_ops.solve(_with(problem, leaves))[0]

    with flash_attn.use_backend("cpu"):
        assert torch.autograd.gradcheck(out, _leaves(problem))


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
