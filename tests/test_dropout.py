"""Dropout: one mask for forward, backward and S_dmask, replayed from the returned state."""

from __future__ import annotations

import pytest
import support
import torch
from support import DTYPES, HALF_DTYPES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flash_attn
from flash_attn import flash_attn_interface as interface
from flash_attn.core import reference, rng

OPTIONS = support.some([{}, {"causal": True}, {"window_size": (20, 6)}], [{"window_size": (20, 6)}])


def _keep(inputs: support.Inputs, rng_state: Tensor) -> Tensor:
    """(batch, nheads, seqlen_q, seqlen_k) mask of a dense call by its definition."""
    batch, seqlen_q, nheads, _ = inputs.q.shape
    device = inputs.q.device
    rows = torch.arange(seqlen_q, device=device)
    keys = torch.arange(inputs.k.shape[1], device=device)
    p = inputs.options["dropout_p"]
    return torch.stack([rng.keep_mask(rng_state, p, b, nheads, rows, keys) for b in range(batch)])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_dropout(device: str, dtype: torch.dtype, options: dict[str, object]) -> None:
    """The reference replays the state: output and gradients are within the usual budget."""
    seqlens = support.pick(device, (45, 70), (200, 333))
    inputs = support.dense(
        device, dtype, seqlens=seqlens, heads=(2, 1), headdim=32, dropout_p=0.17, **options
    )
    got, rng_state = support.run_private(inputs)
    support.check(inputs, got, rng_state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_dropout_varlen(device: str, dtype: torch.dtype) -> None:
    factor = support.pick(device, 1, 5)
    lengths_q, lengths_k = ([factor * n for n in lengths] for lengths in ([33, 0, 9], [41, 4, 9]))
    inputs = support.varlen(
        device, dtype, lengths_q, lengths_k, headdim=16, padding=3, causal=True, dropout_p=0.4
    )
    got, rng_state = support.run_private(inputs)
    support.check(inputs, got, rng_state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_dropout_with_alibi(device: str, dtype: torch.dtype) -> None:
    inputs = support.dense(device, dtype, seqlens=(35, 40), headdim=24, dropout_p=0.3)
    inputs = inputs.but(alibi_slopes=support.alibi_slopes(device, 2, 2))
    got, rng_state = support.run_private(inputs)
    support.check(inputs, got, rng_state)


@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_headdim(device: str, dtype: torch.dtype, headdim: int) -> None:
    seqlens = support.pick(device, (45, 70), (200, 333))
    inputs = support.dense(
        device, dtype, seqlens=seqlens, headdim=headdim, dropout_p=0.17, causal=True
    )
    got, rng_state = support.run_private(inputs)
    support.check(inputs, got, rng_state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_one_mask(device: str, dtype: torch.dtype) -> None:
    """Forward, backward and S_dmask drop the same weights, those that the state defines.

    Scores are equal; one-hot values show forward's mask, one-hot output gradients backward's.
    """
    seqlen = 64
    inputs = support.dense(device, dtype, seqlens=(seqlen, seqlen), headdim=seqlen, dropout_p=0.3)
    one_hot = torch.eye(seqlen, device=device, dtype=dtype)[None, :, None].expand_as(inputs.q)
    inputs = inputs.but(k=torch.zeros_like(inputs.k), v=one_hot.clone(), dout=one_hot.clone())
    out, _, s_dmask, rng_state = support.run_forward(inputs, return_softmax=True)
    keep = _keep(inputs, rng_state)
    assert 0.5 < float(keep.double().mean()) < 0.9
    assert torch.equal(out.permute(0, 2, 1, 3) > 0, keep)
    assert torch.equal(s_dmask[:, :, :seqlen, :seqlen] > 0, keep)

    torch.manual_seed(7)
    got, rng_state = support.run_private(inputs)
    keep = _keep(inputs, rng_state)
    assert torch.equal(got.dv.permute(0, 2, 3, 1) > 0, keep)
    kept = 1.0 / (seqlen * 0.7)
    support.assert_close(got.out.max(), torch.tensor(kept, device=device), dtype)
    torch.manual_seed(7)
    support.assert_same_bits(support.run(inputs), got, "through autograd")


@pytest.mark.parametrize("dropout_p", [0.05, 0.17, 0.5, 0.9])
def test_rate(device: str, dropout_p: float) -> None:
    """The share of dropped weights is within four standard deviations."""
    seqlen = support.pick(device, 96, 1000)
    inputs = support.dense(device, torch.float16, seqlens=(seqlen, seqlen), dropout_p=dropout_p)
    s_dmask = support.run_forward(inputs, return_softmax=True)[2][:, :, :seqlen, :seqlen]
    count = s_dmask.numel()
    dropped = int(torch.signbit(s_dmask).sum())
    sigma = (count * dropout_p * (1.0 - dropout_p)) ** 0.5
    assert abs(dropped - count * dropout_p) <= 4.0 * sigma


def test_masks_of_heads_and_sequences_differ(device: str) -> None:
    inputs = support.dense(device, torch.float16, 3, (40, 40), (3, 3), dropout_p=0.5)
    _, _, s_dmask, _ = support.run_forward(inputs, return_softmax=True)
    masks = torch.signbit(s_dmask[:, :, :40, :40]).flatten(0, 1)
    for first in range(9):
        for second in range(first):
            same = float((masks[first] == masks[second]).double().mean())
            assert abs(same - 0.5) < 0.06


@pytest.mark.parametrize("dtype", DTYPES)
def test_seeds(device: str, dtype: torch.dtype) -> None:
    """The same seed gives the same bits; calls that follow each other differ."""
    inputs = support.dense(device, dtype, seqlens=(30, 30), dropout_p=0.3)
    torch.manual_seed(5)
    first, second = support.run(inputs), support.run(inputs)
    torch.manual_seed(5)
    support.assert_same_bits(support.run(inputs), first)
    support.assert_same_bits(support.run(inputs), second)
    assert not torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)


def test_without_dropout_the_generator_is_left_alone(device: str) -> None:
    inputs = support.dense(device, torch.float16)
    torch.manual_seed(5)
    support.run(inputs)
    after = torch.rand(4, device=device)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4, device=device), after)
    assert not support.run_forward(inputs)[3].any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(device: str, use_reentrant: bool) -> None:
    """Recomputing the forward pass draws the same mask."""
    inputs = support.dense(device, torch.float16, seqlens=(30, 30), dropout_p=0.3)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn.flash_attn_func(q, k, v, **inputs.options)

    torch.manual_seed(5)
    want = support.run(inputs)
    torch.manual_seed(5)
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = checkpoint(attend, *leaves, use_reentrant=use_reentrant)
    out.backward(inputs.dout)
    support.assert_same_bits(
        support.Solution(out.detach(), want.lse, *(x.grad for x in leaves)), want
    )


def test_backward_without_a_state_draws_one(device: str) -> None:
    inputs = support.dense(device, torch.float16, seqlens=(30, 30), dropout_p=0.5)
    out, lse, _, _ = support.run_forward(inputs)
    grads = [support.poisoned_like(x) for x in (inputs.q, inputs.k, inputs.v)]
    interface._flash_attn_backward(
        inputs.dout, inputs.q, inputs.k, inputs.v, out, lse, *grads, *inputs.flat_options(), False
    )
    assert all(torch.isfinite(x).all() for x in grads)


# S_dmask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_s_dmask(device: str, dtype: torch.dtype, options: dict[str, object]) -> None:
    """It normalises to the softmax, block of keys by block, and its sign is the mask."""
    seqlen_q, seqlen_k = 35, 70
    inputs = support.dense(
        device, dtype, 1, (seqlen_q, seqlen_k), (2, 1), 32, dropout_p=0.2, **options
    )
    out, _, s_dmask = flash_attn.flash_attn_func(
        inputs.q, inputs.k, inputs.v, return_attn_probs=True, **inputs.options
    )
    assert (s_dmask.shape, s_dmask.dtype) == ((1, 2, 128, 128), dtype)
    problem = inputs.problem()
    true = reference.attention_probabilities(problem, torch.float64)
    lse = reference.attention(problem._replace(dropout_p=0.0)).softmax_lse[..., None]
    scores = torch.log(true) + lse
    block = interface._get_block_size_n(out.device, 32, True, bool(options.get("causal")))
    assert block >= seqlen_k
    row_max = scores.amax(-1, keepdim=True)
    weights = s_dmask[:, :, :seqlen_q, :seqlen_k].double().abs() * torch.exp(row_max - lse)
    error = (weights - true).abs()
    assert (error <= 4.0 * torch.finfo(dtype).eps * true + 1e-6).all()
    assert not s_dmask[:, :, seqlen_q:].any()
    assert not s_dmask[:, :, :, seqlen_k:].any()
    # Putting the pieces together gives the output of the same call.
    v = inputs.v.double().repeat_interleave(2, dim=2)
    kept = weights.masked_fill(torch.signbit(s_dmask[:, :, :seqlen_q, :seqlen_k]), 0.0) / 0.8
    again = torch.einsum("bhqk,bkhd->bqhd", kept, v)
    assert float((out.double() - again).abs().max()) <= 16.0 * torch.finfo(dtype).eps


def test_feature_s_dmask_varlen(device: str) -> None:
    """One block for each sequence, zero outside of it, and the reference's numbers."""
    inputs = support.varlen(
        device, torch.float32, [20, 0, 33], [31, 4, 12], headdim=16, dropout_p=0.4, causal=True
    )
    _, _, s_dmask, rng_state = support.run_forward(inputs, return_softmax=True)
    assert s_dmask.shape == (3, 2, 128, 128)
    problem = inputs.problem()._replace(return_softmax=True)
    true = reference.attention(problem, torch.float64, rng_state).s_dmask
    assert torch.equal(torch.signbit(s_dmask) & (s_dmask != 0), true < 0)
    support.assert_close(s_dmask, true, torch.float32)
