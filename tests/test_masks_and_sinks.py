"""``attn_mask`` and ``s_aux`` of the public functions: results, gradients, combinations, errors."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import support
import torch
from support import DTYPES, cumulative
from test_extensions import Call, additive, check
from torch import Tensor

import flash_attn
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.core import rng
from flash_attn.errors import BackendUnavailableError, ConstraintError, UnsupportedProblemError

HEADS = (4, 2)
SEED = 11


def dense(device: str, dtype: torch.dtype, **options: Any) -> support.Inputs:
    return support.dense(device, dtype, 2, (40, 72), HEADS, 32, **options)


def packed(device: str, dtype: torch.dtype, **options: Any) -> support.Inputs:
    return support.varlen(
        device, dtype, [40, 7, 0, 21], [33, 70, 9, 0], HEADS, padding=3, **options
    )


def both(device: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A mask of ``shape``, of which a fifth hides, and sinks."""
    mask = additive(device, torch.float32, shape)
    return {"attn_mask": mask, "s_aux": torch.randn(HEADS[0]).to(device)}


def run(inputs: support.Inputs, **more: Tensor) -> dict[str, Tensor]:
    """Results and all gradients by name, and the state of dropout."""
    tensors = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
    tensors |= {{"attn_mask": "dmask", "s_aux": "dsinks"}[name]: x for name, x in more.items()}
    leaves = {
        name: x.detach().requires_grad_() for name, x in tensors.items() if x.dtype != torch.bool
    }
    given = {name: leaves.get(name, x) for name, x in tensors.items()}
    q, k, v, *_ = given.values()
    function = flash_attn.flash_attn_varlen_func if inputs.lengths else flash_attn.flash_attn_func
    torch.manual_seed(SEED)
    out, lse, _ = function(
        q, k, v, *inputs.lengths, **inputs.options, return_attn_probs=True,
        s_aux=given.get("dsinks"), attn_mask=given.get("dmask"),
    )  # fmt: skip
    assert out.requires_grad
    assert not lse.requires_grad
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.dout)
    torch.manual_seed(SEED)
    state = rng.new_state(q.device)
    results = {"out": out.detach(), "lse": lse, "rng_state": state}
    return results | dict(zip(leaves, grads, strict=True))


def run_and_check(inputs: support.Inputs, **more: Tensor) -> dict[str, Tensor]:
    """What the public function gives is within the error budget."""
    problem = inputs.problem()
    transform = problem.transform._replace(attn_mask=more.get("attn_mask"), sinks=more.get("s_aux"))
    got = run(inputs, **more)
    check(Call(problem._replace(transform=transform), inputs.dout), got)
    return got


# Results and gradients ---------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (9, 3), "softcap": 2.5},
    {"softmax_scale": -0.2, "causal": True},
    {"dropout_p": 0.3},
    {"dropout_p": 0.2, "causal": True},
]


@pytest.mark.parametrize("make", [dense, packed])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combinations(device: str, dtype: torch.dtype, options: dict[str, Any], make: Any) -> None:
    """Masks and sinks, each alone and together, with FlashAttention-2's own features."""
    inputs = make(device, dtype, **options)
    batch = 2 if make is dense else 4
    more = both(device, (batch, HEADS[0], 40, 72))
    run_and_check(inputs, **more)
    run_and_check(inputs, s_aux=more["s_aux"])
    run_and_check(inputs, attn_mask=more["attn_mask"])
    slopes = support.alibi_slopes(device, HEADS[0], batch)
    run_and_check(inputs.but(alibi_slopes=slopes), **more)


SHAPES = [(2, 4, 40, 72), (1, 4, 40, 72), (2, 1, 1, 72), (1, 1, 40, 1), (1, 4, 1, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_broadcast_masks(device: str, shape: tuple[int, ...]) -> None:
    """The gradient has the mask's shape; a mask given in full gives the same results."""
    inputs = dense(device, torch.float32, causal=True)
    mask = additive(device, torch.float32, shape)
    got = run_and_check(inputs, attn_mask=mask)
    assert got["dmask"].shape == shape
    full = run(inputs, attn_mask=mask.expand(2, 4, 40, 72))
    for name in ("out", "lse", "dq", "dk", "dv"):
        support.assert_close(got[name], full[name], torch.float32, name)
    # Hidden cells have no gradient.
    assert not got["dmask"][mask == -math.inf].any()


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("make", [dense, packed])
def test_bool_masks(device: str, make: Any, shape: tuple[int, ...]) -> None:
    """True is seen: the same as 0 and -inf, with sinks and without."""
    inputs = make(device, torch.float16)
    shape = (1 if shape[0] == 1 or make is packed else shape[0], *shape[1:])
    seen = (torch.rand(shape) < 0.7).to(device)
    floats = torch.zeros(shape, device=device).masked_fill(~seen, -math.inf)
    for more in ({}, {"s_aux": torch.randn(HEADS[0], device=device)}):
        got = run_and_check(inputs, attn_mask=seen, **more)
        want = run(inputs, attn_mask=floats, **more)
        for name in ("out", "lse", "dq", "dk", "dv"):
            support.assert_close(got[name], want[name], torch.float16, name)


@pytest.mark.families
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_are_hidden(device: str, sinks: bool) -> None:
    """Rows of -inf alone: nothing comes out and nothing flows back, whatever the dtype."""
    for dtype in (torch.float16, torch.float32):
        inputs = dense(device, dtype)
        mask = torch.randn(2, 1, 40, 72, device=device, dtype=dtype)
        mask[0, :, 5:9] = -math.inf
        mask[1] = -math.inf
        more = {"s_aux": torch.randn(HEADS[0], device=device)} if sinks else {}
        got = run_and_check(inputs, attn_mask=mask, **more)
        for rows in ((0, slice(5, 9)), (1, slice(None))):
            for name in ("out", "dq"):
                assert not got[name][rows].any()
            lse = got["lse"][rows[0], :, rows[1]]
            if sinks:
                # Scores are in base 2, there and back again.
                torch.testing.assert_close(lse, more["s_aux"][:, None].expand_as(lse))
            else:
                assert torch.equal(lse, torch.full_like(lse, math.inf))
        for name in ("dk", "dv", "dmask"):
            assert not got[name][1].any()
            assert got[name][0].any()


def test_lowest_finite_numbers_hide_too(device: str) -> None:
    """Masks often hold the dtype's lowest number instead of -inf."""
    inputs = dense(device, torch.float16)
    hidden = torch.rand(2, 1, 40, 72, device=device) < 0.3
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        low = torch.zeros(2, 1, 40, 72, device=device, dtype=dtype)
        low = low.masked_fill(hidden, torch.finfo(dtype).min)
        got, want = run(inputs, attn_mask=low), run(inputs, attn_mask=~hidden)
        for name in ("out", "lse", "dq", "dk", "dv"):
            support.assert_close(got[name], want[name], torch.float16, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_lowest_finite_numbers(device: str, dtype: torch.dtype) -> None:
    """They are seen, as any finite number: such a row is the mean of all values."""
    inputs = dense(device, torch.float32)
    mask = torch.zeros(1, 1, 40, 1, device=device, dtype=torch.float32)
    mask[:, :, 7] = torch.finfo(dtype).min
    got = run(inputs.but(softmax_scale=0.0), attn_mask=mask)
    want = inputs.v.repeat_interleave(2, dim=2).mean(dim=1)
    torch.testing.assert_close(got["out"][:, 7], want, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(got["lse"]).all()


def test_against_pytorch(device: str) -> None:
    """An independent answer: scaled_dot_product_attention with the same mask, in float32."""
    inputs = dense(device, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    mask = torch.randn(2, 4, 40, 72, device=device, requires_grad=True)
    q, k, v = (x.transpose(1, 2) for x in leaves)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    grads = torch.autograd.grad(out, [*leaves, mask], inputs.dout)
    got = run(inputs, attn_mask=mask.detach())
    wanted = dict(zip(("out", "dq", "dk", "dv", "dmask"), (out, *grads), strict=True))
    for name, want in wanted.items():
        torch.testing.assert_close(got[name], want, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.families
def test_sinks_are_a_column_without_value(device: str) -> None:
    """As models write it: softmax over the scores and one more column, which is then dropped."""
    inputs = dense(device, torch.float32, causal=True)
    sinks = torch.randn(HEADS[0], device=device, requires_grad=True)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = leaves
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    s = s.masked_fill(torch.ones(40, 72, device=device).triu(33).bool(), -math.inf)
    column = sinks[None, :, None, None].expand(2, -1, 40, 1)
    p = torch.cat((s, column), dim=-1).softmax(-1)[..., :-1]
    out = torch.einsum("bhqk,bkhd->bqhd", p, v)
    grads = torch.autograd.grad(out, [*leaves, sinks], inputs.dout)
    got = run(inputs, s_aux=sinks.detach())
    wanted = dict(zip(("out", "dq", "dk", "dv", "dsinks"), (out, *grads), strict=True))
    for name, want in wanted.items():
        torch.testing.assert_close(got[name], want, atol=2e-5, rtol=1e-4, msg=name)
    lse = torch.cat((s, column), dim=-1).logsumexp(-1).detach()
    torch.testing.assert_close(got["lse"], lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["q", "s_aux", "attn_mask"])
def test_one_gradient_alone(device: str, name: str) -> None:
    inputs = dense(device, torch.float32)
    more = both(device, (1, 4, 40, 72))
    want = run(inputs, **more)
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **more}
    leaf = tensors[name] = tensors[name].detach().requires_grad_()
    flash_attn.flash_attn_func(**tensors).backward(inputs.dout)
    key = {"q": "dq", "s_aux": "dsinks", "attn_mask": "dmask"}[name]
    support.assert_close(leaf.grad, want[key], torch.float32)
    with torch.no_grad():
        assert not flash_attn.flash_attn_func(**tensors).requires_grad


def test_gradient_of_a_bias_of_another_layout(device: str) -> None:
    """(seqlen_q, seqlen_k, nheads) parameters, as of relative positions, seen as a mask."""
    inputs = dense(device, torch.float16)
    table = torch.randn(40, 72, 4, device=device, requires_grad=True)
    mask = table.permute(2, 0, 1)[None]
    want = run(inputs, attn_mask=mask.detach().contiguous())
    out = flash_attn.flash_attn_func(inputs.q, inputs.k, inputs.v, attn_mask=mask)
    out.backward(inputs.dout)
    support.assert_close(table.grad, want["dmask"][0].permute(1, 2, 0), torch.float16)


@pytest.mark.families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_independent(device: str, dtype: torch.dtype) -> None:
    """Of mask and sinks, from q's and from each other's."""
    inputs = dense(device, torch.float16)
    more = both(device, (2, 1, 40, 72))
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    got = run_and_check(
        inputs, attn_mask=more["attn_mask"].to(dtype), s_aux=more["s_aux"].to(other)
    )
    assert (got["dmask"].dtype, got["dsinks"].dtype) == (dtype, other)


def test_without_them_nothing_changes(device: str) -> None:
    inputs = dense(device, torch.float16, causal=True)
    want = support.run(inputs)
    got = run(inputs)
    for name in support.Solution._fields:
        assert torch.equal(got[name], getattr(want, name))


def test_dropout_probabilities(device: str) -> None:
    """S_dmask: signed exponentials below the row's maximum, to which the sink does not count."""
    inputs = dense(device, torch.float32)
    more = both(device, (2, 4, 40, 72))
    more["s_aux"] = torch.full_like(more["s_aux"], 20.0)
    _, _, s_dmask = flash_attn.flash_attn_func(
        inputs.q, inputs.k, inputs.v, dropout_p=0.3, return_attn_probs=True, **more
    )
    assert s_dmask.shape == (2, 4, 128, 128)
    s_dmask = s_dmask[:, :, :40, :72]
    hidden = more["attn_mask"] == -math.inf
    assert not s_dmask[hidden].any()
    alive = ~hidden.all(-1)
    largest = s_dmask.abs().amax(-1)[alive]
    torch.testing.assert_close(largest, torch.ones_like(largest))
    dropped = (s_dmask < 0).sum() / (~hidden).sum()
    assert abs(float(dropped) - 0.3) < 0.02


@pytest.mark.families
def test_empty_sequences(device: str) -> None:
    q, k = torch.randn(2, 3, 4, 8, device=device), torch.randn(2, 0, 4, 8, device=device)
    sinks = torch.randn(4, device=device, requires_grad=True)
    mask = torch.randn(1, 1, 1, 0, device=device, requires_grad=True)
    out, lse, _ = flash_attn.flash_attn_func(
        q, k, k, s_aux=sinks, attn_mask=mask, return_attn_probs=True
    )
    assert not out.any()
    assert torch.equal(lse, sinks.detach()[None, :, None].expand(2, 4, 3))
    out.sum().backward()
    assert torch.equal(sinks.grad, torch.zeros_like(sinks))
    assert mask.grad.shape == mask.shape


# Caches and pages --------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [None, 16])
def test_caches(device: str, page_size: int | None, causal: bool) -> None:
    """After appending: each sequence as ``flash_attn_func`` on its own keys and its own part of the
    mask, which starts at its first key in use."""
    lengths, new, capacity = [20, 50], 3, 64
    pad = [0, 0] if page_size else [4, 0]
    q = torch.randn(2, 3, 4, 32, device=device, dtype=torch.float16)
    k_new, v_new = (torch.randn(2, new, 2, 32, device=device).half() for _ in range(2))
    caches = [torch.randn(2, capacity, 2, 32, device=device).half() for _ in range(2)]
    more = {
        "attn_mask": torch.randn(2, 4, 3, capacity, device=device),
        "s_aux": torch.randn(4, device=device),
    }
    options: dict[str, Any] = {"causal": causal}
    stored = [x.clone() for x in caches]
    if page_size:
        stored = [x.view(-1, page_size, 2, 32).flip(0) for x in stored]
        pages = torch.arange(2 * capacity // page_size, dtype=torch.int32).flip(0)
        options["block_table"] = pages.view(2, -1).to(device)
    else:
        options["cache_leftpad"] = torch.tensor(pad, dtype=torch.int32, device=device)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, *stored, k_new, v_new, cache_seqlens=torch.tensor(lengths).int().to(device),
        return_softmax_lse=True, **options, **more,
    )  # fmt: skip
    for b, length in enumerate(lengths):
        count = length + new - pad[b]
        k, v = (
            torch.cat((x[b, pad[b] : length], added[b]))[None]
            for x, added in zip(caches, (k_new, v_new), strict=True)
        )
        want, want_lse, _ = flash_attn.flash_attn_func(
            q[b : b + 1], k, v, causal=causal, return_attn_probs=True, s_aux=more["s_aux"],
            attn_mask=more["attn_mask"][b : b + 1, :, :, :count],
        )  # fmt: skip
        support.assert_close(out[b], want[0], torch.float16)
        torch.testing.assert_close(lse[b], want_lse[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("num_splits", [1, 5])
def test_decoding_with_sinks(device: str, num_splits: int) -> None:
    """The sink joins once, into however many parts the keys are divided."""
    q = torch.randn(2, 1, 4, 32, device=device)
    k, v = (torch.randn(2, 300, 2, 32, device=device) for _ in range(2))
    sinks = torch.tensor([1.0, -4.0, 9.0, -math.inf], device=device)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, k, v, num_splits=num_splits, s_aux=sinks, return_softmax_lse=True
    )
    plain, plain_lse = flash_attn.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    want_lse = torch.logaddexp(plain_lse, sinks[None, :, None])
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
    want = plain * torch.exp(plain_lse - want_lse).transpose(1, 2)[..., None]
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_pages_of_packed_sequences(device: str) -> None:
    """As without pages; there is no gradient, and asking for one says why."""
    inputs = packed(device, torch.float16, causal=True)
    more = both(device, (1, 4, 40, 80))
    lengths = [33, 70, 9, 0]
    rows = [inputs.k[: sum(lengths)].split(lengths), inputs.v[: sum(lengths)].split(lengths)]
    paged = [torch.zeros(4, 80, 2, 32, dtype=torch.float16, device=device) for _ in range(2)]
    for to, parts in zip(paged, rows, strict=True):
        for b, part in enumerate(parts):
            to[b, : len(part)] = part
    paged = [x.view(20, 16, 2, 32) for x in paged]
    table = torch.arange(20, dtype=torch.int32, device=device).view(4, 5)
    call = dict(**inputs.options, **more, block_table=table)
    out = flash_attn.flash_attn_varlen_func(inputs.q, *paged, *inputs.lengths, **call)
    support.assert_close(out, run(inputs, **more)["out"], torch.float16)
    q = inputs.q.detach().requires_grad_()
    out = flash_attn.flash_attn_varlen_func(q, *paged, *inputs.lengths, **call)
    with pytest.raises(ConstraintError, match="`block_table`"):
        out.sum().backward()


# How other programs call -------------------------------------------------------------------------


def test_names_that_others_look_for() -> None:
    """Hugging Face sends sinks where it sees their name in the varlen and the cache function, and
    then to the dense one as well."""
    for function in (
        flash_attn.flash_attn_func,
        flash_attn.flash_attn_varlen_func,
        flash_attn.flash_attn_with_kvcache,
    ):
        found = inspect.signature(function).parameters
        assert found["s_aux"].default is None
        assert found["s_aux"].kind is inspect.Parameter.KEYWORD_ONLY
        assert "learnable_sink" not in found
    for function in (flash_attn.flash_attn_qkvpacked_func, flash_attn.flash_attn_kvpacked_func):
        assert "s_aux" not in inspect.signature(function).parameters


@pytest.mark.families
def test_call_of_a_model_with_sinks(device: str) -> None:
    """A padded batch as Hugging Face runs it: unpadded, with the arguments that it sends."""
    lengths = torch.tensor([9, 16])
    shown = (torch.arange(16) < lengths[:, None]).to(device)
    q, k, v = (
        torch.randn(2, 16, heads, 32, device=device).bfloat16().requires_grad_()
        for heads in (4, 2, 2)
    )
    sinks = torch.randn(4, device=device).bfloat16().requires_grad_()
    sent = {
        "causal": True, "softmax_scale": 0.2, "dropout_p": 0.0, "window_size": (7, 7),
        "deterministic": False, "s_aux": sinks,
    }  # fmt: skip
    rows, indices, cu_seqlens, longest, *_ = unpad_input(q, shown)
    keys, values = (unpad_input(x, shown)[0] for x in (k, v))
    out = flash_attn.flash_attn_varlen_func(
        rows, keys, values, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest, max_seqlen_k=longest, **sent,
    )  # fmt: skip
    out = pad_input(out, indices, 2, 16)
    want = torch.zeros_like(out)
    parts = []
    for b, n in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        parts.append(flash_attn.flash_attn_func(q[one, :n], k[one, :n], v[one, :n], **sent))
        want[b, :n] = parts[-1][0]
    support.assert_close(out.detach(), want.detach(), torch.bfloat16)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, [q, k, v, sinks], dout, retain_graph=True)
    wanted = torch.autograd.grad(want, [q, k, v, sinks], dout)
    for a, b in zip(got, wanted, strict=True):
        support.assert_close(a, b, torch.bfloat16)
    assert got[3].abs().sum() > 0


def test_autocast(device: str) -> None:
    """q, k and v take autocast's dtype, mask and sinks keep theirs."""
    inputs = dense(device, torch.float32)
    more = both(device, (2, 1, 40, 72))
    leaves = {name: x.detach().requires_grad_() for name, x in more.items()}
    q = inputs.q.detach().requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = flash_attn.flash_attn_func(q, inputs.k, inputs.v, **leaves)
    assert out.dtype == torch.bfloat16
    dout = inputs.dout.bfloat16()
    grads = torch.autograd.grad(out, [q, *leaves.values()], dout)
    assert all(grad.dtype == torch.float32 for grad in grads)
    rounded = inputs.but(q=inputs.q.bfloat16(), k=inputs.k.bfloat16(), v=inputs.v.bfloat16())
    want = run(rounded.but(dout=dout), **more)
    assert torch.equal(out, want["out"])
    assert torch.equal(grads[1], want["dmask"])
    assert torch.equal(grads[2], want["dsinks"])


def test_mutated_masks_are_noticed(device: str) -> None:
    """What backward needs is saved so that PyTorch sees changes in place."""
    inputs = dense(device, torch.float32)
    mask = both(device, (2, 1, 40, 72))["attn_mask"]
    q = inputs.q.detach().requires_grad_()
    out = flash_attn.flash_attn_func(q, inputs.k, inputs.v, attn_mask=mask)
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# Bad input ---------------------------------------------------------------------------------------


def _bad_masks() -> dict[str, tuple[Any, str]]:
    wanted = r"here \(2, 4, 40, 72\), found"
    return {
        "a list": ([[True]], "`attn_mask` must be a torch.Tensor or None, found list"),
        "two dimensions": (torch.zeros(40, 72), r"`attn_mask` must have shape .*found \(40, 72\)"),
        "integers": (torch.ones(1, 1, 40, 72).int(), r"bool or floating, found int32.*\.bool\(\)"),
        "batch": (torch.zeros(3, 1, 40, 72), wanted),
        "key heads": (torch.zeros(1, 2, 40, 72), wanted),
        "rows": (torch.zeros(1, 1, 41, 72), wanted),
        "keys": (torch.zeros(1, 1, 40, 71), wanted),
        "transposed": (torch.zeros(1, 1, 72, 40), wanted),
    }


@pytest.mark.parametrize("name", list(_bad_masks()))
def test_bad_masks(device: str, name: str) -> None:
    mask, message = _bad_masks()[name]
    mask = mask.to(device) if isinstance(mask, Tensor) else mask
    inputs = dense(device, torch.float32)
    with pytest.raises(ConstraintError, match=message):
        flash_attn.flash_attn_func(inputs.q, inputs.k, inputs.v, attn_mask=mask)


def _bad_sinks() -> dict[str, tuple[Any, str]]:
    return {
        "a list": ([0.0] * 4, "`s_aux` must be a torch.Tensor or None, found list"),
        "a number": (torch.zeros(()), r"`s_aux` must have shape \(nheads,\), found \(\)"),
        "key heads": (torch.zeros(2), r"`s_aux` must be floating of shape \(4,\).*\(2,\)"),
        "two dimensions": (torch.zeros(1, 4), r"`s_aux` must have shape \(nheads,\)"),
        "integers": (torch.zeros(4).int(), "`s_aux` must be floating .*found int32"),
    }


@pytest.mark.parametrize("name", list(_bad_sinks()))
def test_bad_sinks(device: str, name: str) -> None:
    sinks, message = _bad_sinks()[name]
    sinks = sinks.to(device) if isinstance(sinks, Tensor) else sinks
    for inputs in (dense(device, torch.float32), packed(device, torch.float32)):
        function = (
            flash_attn.flash_attn_varlen_func if inputs.lengths else flash_attn.flash_attn_func
        )
        with pytest.raises(ConstraintError, match=message):
            function(inputs.q, inputs.k, inputs.v, *inputs.lengths, s_aux=sinks)
    with pytest.raises(ConstraintError, match=message):
        flash_attn.flash_attn_with_kvcache(*dense(device, torch.float32).tensors[:3], s_aux=sinks)


def test_bad_masks_of_other_functions(device: str) -> None:
    """Packed lengths are known on the device only: a mask may be larger than their bounds."""
    inputs = packed(device, torch.float32)
    large = torch.zeros(1, 1, 50, 90, device=device)
    run_and_check(inputs, attn_mask=large)
    for mask in (large[:, :, :39], large[..., :69], large.expand(3, -1, -1, -1)):
        with pytest.raises(ConstraintError, match=r"`attn_mask` must .*here \(4, 4, 40, 70\)"):
            flash_attn.flash_attn_varlen_func(
                inputs.q, inputs.k, inputs.v, *inputs.lengths, attn_mask=mask
            )
    q, k, v, _ = dense(device, torch.float32).tensors
    for mask in ([1], large):
        with pytest.raises(ConstraintError, match="`attn_mask` must "):
            flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=9, attn_mask=mask)


def test_caches_are_unchanged_after_errors(device: str) -> None:
    """A bad mask is found before anything is appended."""
    q, k, v, _ = dense(device, torch.float32).tensors
    before = k.clone()
    new = torch.ones(2, 2, 2, 32, device=device)
    with pytest.raises(ConstraintError, match="`attn_mask`"):
        flash_attn.flash_attn_with_kvcache(
            q, k, v, new, new, cache_seqlens=9, attn_mask=torch.zeros(1, 1, 3, 3, device=device)
        )
    assert torch.equal(k, before)


def test_by_keyword_only(device: str) -> None:
    q, k, v, _ = dense(device, torch.float32).tensors
    arguments = (0.0, None, False, (-1, -1), 0.0, None, False, False)
    flash_attn.flash_attn_func(q, k, v, *arguments)
    with pytest.raises(TypeError, match="positional"):
        flash_attn.flash_attn_func(q, k, v, *arguments, torch.zeros(4, device=device))


@pytest.mark.gpu
def test_other_devices() -> None:
    inputs = dense("cuda", torch.float16)
    for name, x in both("cpu", (1, 1, 40, 72)).items():
        with pytest.raises(ConstraintError, match=f"`{name}` must be on cuda:0 .*found cpu"):
            flash_attn.flash_attn_func(inputs.q, inputs.k, inputs.v, **{name: x})


@pytest.mark.parametrize("backend", ["cuda", "flag_gems"])
def test_adapters_say_why_not(device: str, backend: str) -> None:
    """The libraries behind them have no such arguments: nothing is dropped."""
    inputs = dense(device, torch.float16)
    try:
        with flash_attn.use_backend(backend):
            for name, x in both(device, (1, 1, 40, 72)).items():
                with pytest.raises(UnsupportedProblemError, match=f"does not know {name}"):
                    flash_attn.flash_attn_func(inputs.q, inputs.k, inputs.v, **{name: x})
    except BackendUnavailableError as error:
        pytest.skip(str(error))


def test_positions_within_packed_sequences(device: str) -> None:
    """Each sequence uses the first rows and keys of its mask."""
    inputs = packed(device, torch.float32)
    more = both(device, (4, 4, 40, 70))
    got = run(inputs, **more)
    cu_q, cu_k = (cumulative(lengths, "cpu") for lengths in ([40, 7, 0, 21], [33, 70, 9, 0]))
    for b in range(4):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        q, k, v = (
            x[part][None] for x, part in zip(inputs.tensors[:3], (rows, keys, keys), strict=True)
        )
        mask = more["attn_mask"][b : b + 1, :, : q.shape[1], : k.shape[1]]
        want = flash_attn.flash_attn_func(q, k, v, attn_mask=mask, s_aux=more["s_aux"])
        support.assert_close(got["out"][rows], want[0], torch.float32)
        beyond = got["dmask"][b].clone()
        beyond[:, : q.shape[1], : k.shape[1]] = 0.0
        assert not beyond.any()
