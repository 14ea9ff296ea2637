"""Removing and restoring padding."""

from __future__ import annotations

import einops
import pytest
import torch

from flash_attn import bert_padding
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from flash_attn.errors import ConstraintError


def mask_of(lengths, seqlen, device, dtype=torch.bool):
    places = torch.arange(seqlen, device=device)
    return (places < torch.tensor(lengths, device=device)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("lengths", [[3, 5, 1], [0, 5, 0], [0, 0, 0], [5, 5, 5]])
@pytest.mark.parametrize("rest", [(), (4,), (2, 3, 4)])
def test_round_trip(device, rest, lengths, dtype):
    x = torch.randn(3, 5, *rest, device=device)
    mask = mask_of(lengths, 5, device, dtype)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    parts = [x[b, :length] for b, length in enumerate(lengths)]
    assert torch.equal(packed, torch.cat(parts))
    assert indices.dtype == torch.int64
    assert (cu_seqlens.dtype, seqused.dtype) == (torch.int32, torch.int32)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    assert cu_seqlens.tolist() == [0, *ends]
    assert type(max_seqlen) is int
    assert max_seqlen == max(lengths)
    assert seqused.tolist() == lengths
    restored = pad_input(packed, indices, 3, 5)
    keep = mask.bool().reshape(3, 5, *[1] * len(rest))
    assert torch.equal(restored, torch.where(keep, x, 0.0))


def test_masks_with_holes_and_left_padding(device):
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1]], device=device)
    x = torch.arange(8.0, device=device).reshape(2, 4, 1)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    assert packed.flatten().tolist() == [2, 3, 4, 7]
    assert indices.tolist() == [2, 3, 4, 7]
    assert (cu_seqlens.tolist(), max_seqlen, seqused.tolist()) == ([0, 2, 4], 2, [2, 2])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
def test_unused_tokens_keep_their_place(device, dtype):
    used = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], device=device, dtype=dtype)
    unused = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1]], device=device, dtype=dtype)
    x = torch.arange(8.0, device=device).reshape(2, 4)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, used, unused)
    assert packed.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert (cu_seqlens.tolist(), max_seqlen, seqused.tolist()) == ([0, 3, 7], 4, [2, 1])


def test_several_sequences_in_a_row(device):
    lengths = torch.tensor(
        [[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [0] * 6], device=device
    )
    x = torch.randn(4, 6, 5, device=device)
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(packed, torch.cat((x[0, :5], x[1, :5], x[2])))
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert cu_seqlens.dtype == torch.int32
    assert type(max_seqlen) is int
    assert max_seqlen == 6
    restored = pad_input(packed, indices, 4, 6)
    assert torch.equal(restored[0, :5], x[0, :5])
    assert not restored[3].any()


def test_empty_batches(device):
    for shape in ((0, 5), (3, 0)):
        x = torch.randn(*shape, 4, device=device, requires_grad=True)
        mask = torch.ones(shape, device=device, dtype=torch.bool)
        packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
        assert packed.shape == (0, 4)
        assert cu_seqlens.tolist() == [0] * (shape[0] + 1)
        assert (max_seqlen, seqused.tolist()) == (0, [0] * shape[0])
        out = pad_input(packed, indices, *shape)
        assert out.shape == x.shape
        out.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rest", [(), (3,), (2, 2)])
def test_gradients(device, rest, dtype):
    x = torch.randn(6, *rest, device=device, dtype=torch.float64, requires_grad=True)
    taken = torch.tensor([4, 0, 4, 5], device=device, dtype=dtype)  # row 4 twice
    places = torch.tensor([4, 0, 7, 5, 1, 2], device=device, dtype=dtype)

    def put(x):
        return index_put_first_axis(x, places, 9)

    def take(x):
        return index_first_axis(x, taken)

    def take_and_pass(x):
        return index_first_axis_residual(x, taken)

    for function in (take, put, take_and_pass):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_gradients_through_a_round_trip(device):
    x = torch.randn(2, 4, 3, device=device, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]], device=device)

    def forward(x):
        packed, indices, *_ = unpad_input(x, mask)
        return pad_input(packed.square(), indices, 2, 4)

    assert torch.autograd.gradcheck(forward, x)
    forward(x).sum().backward()
    assert torch.equal(x.grad, 2 * x.detach() * mask[..., None])


def test_residual_leaves_incoming_gradients_alone(device):
    x = torch.randn(4, 2, device=device, requires_grad=True)
    other = torch.randn(4, 2, device=device, requires_grad=True)
    taken, passed = index_first_axis_residual(x * 1, torch.tensor([1, 3], device=device))
    assert torch.equal(passed, x)
    grad = torch.randn(4, 2, device=device)
    torch.autograd.backward([passed + other, taken], [grad, torch.ones_like(taken)])
    assert torch.equal(other.grad, grad)
    expected = grad.clone()
    expected[[1, 3]] += 1
    assert torch.equal(x.grad, expected)


def test_bad_masks(device):
    x = torch.zeros(2, 5, 3, device=device)
    with pytest.raises(ConstraintError, match="`attention_mask` must have shape"):
        unpad_input(x, torch.ones(2, 4, device=device))
    with pytest.raises(ConstraintError, match="`unused_mask` must have shape"):
        unpad_input(x, torch.ones(2, 5, device=device), torch.ones(5, device=device))
    with pytest.raises(ConstraintError, match="`attention_mask_in_length` must have shape"):
        unpad_input_for_concatenated_sequences(x, torch.ones(3, 5, device=device))


def test_public_names():
    for name in bert_padding.__all__:
        assert hasattr(bert_padding, name)
    assert bert_padding.rearrange is einops.rearrange
    assert bert_padding.repeat is einops.repeat
