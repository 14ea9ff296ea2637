"""Removing the padding of a batch, and putting it back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .core.validate import check_integer, require
from .errors import ConstraintError

__all__ = [
    "IndexFirstAxis",
    "IndexFirstAxisResidual",
    "IndexPutFirstAxis",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "rearrange",
    "repeat",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def _scatter_add(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Sum rows into (first_axis_dim, ...): rows that are taken twice get both gradients."""
    out = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return out.index_add(0, indices, values)


class IndexFirstAxis(torch.autograd.Function):
    """Autograd of :func:`index_first_axis`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.first_axis_dim = input.shape[0]
        return input.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return _scatter_add(grad_output, indices, ctx.first_axis_dim), None


class IndexPutFirstAxis(torch.autograd.Function):
    """Autograd of :func:`index_put_first_axis`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        ctx.save_for_backward(indices)
        out = values.new_zeros((first_axis_dim, *values.shape[1:]))
        out[indices] = values
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """Autograd of :func:`index_first_axis_residual`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_residual: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        # Into a new tensor: autograd may have handed the residual's gradient to others too.
        return grad_residual.index_add(0, indices, grad_output), None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Take rows: ``input[indices]``.

    Args:
        input: (rows, ...).
        indices: (n,) int32 or int64.

    Returns:
        (n, ...).
    """
    out: Tensor = _apply(IndexFirstAxis, input, indices)
    return out


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Put rows into zeros: ``out[indices] = values``.

    Args:
        values: (n, ...).
        indices: (n,) int32 or int64, no index twice.
        first_axis_dim: number of rows of the result.

    Returns:
        (first_axis_dim, ...).
    """
    out: Tensor = _apply(IndexPutFirstAxis, values, indices, first_axis_dim)
    return out


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Take rows and hand the input on, so that its two gradients are summed in one step.

    Args:
        input: (rows, ...).
        indices: (n,) int32 or int64.

    Returns:
        ``input[indices]``, (n, ...), and the input.
    """
    out: tuple[Tensor, Tensor] = _apply(IndexFirstAxisResidual, input, indices)
    return out


def _check_tensor(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise ConstraintError(f"`{name}` must be a torch.Tensor, found {type(x).__name__}")


def _check_mask(hidden_states: Tensor, mask: Tensor, name: str) -> None:
    _check_tensor(hidden_states, "hidden_states")
    _check_tensor(mask, name)
    if mask.dim() != 2 or hidden_states.shape[:2] != mask.shape:
        raise ConstraintError(
            f"`{name}` must have shape {tuple(hidden_states.shape[:2])} like the first dimensions "
            f"of `hidden_states`, found {tuple(mask.shape)}"
        )


def _take(hidden_states: Tensor, indices: Tensor) -> Tensor:
    return index_first_axis(hidden_states.flatten(0, 1), indices)


def _bounds(lengths: Tensor) -> tuple[Tensor, int]:
    """Prefix sums of the lengths, (n + 1,) int32, and the largest length."""
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(lengths.max()) if lengths.numel() else 0


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drop the tokens that neither mask keeps and pack the rest.

    Args:
        hidden_states: (batch_size, seqlen, ...).
        attention_mask: (batch_size, seqlen), bool or numbers; nonzero means a valid token.
        unused_mask: like ``attention_mask``; nonzero means a token that keeps its place without
            counting as used.

    Returns:
        The packed rows (total, ...); their indices in the flattened batch (total,) int64;
        cu_seqlens (batch_size + 1,) int32; the longest length as a Python int; and the number of
        valid tokens of every sequence (batch_size,) int32.

    Raises:
        ConstraintError: a mask does not have the shape (batch_size, seqlen).
    """
    _check_mask(hidden_states, attention_mask, "attention_mask")
    used = attention_mask != 0
    kept = used
    if unused_mask is not None:
        _check_mask(hidden_states, unused_mask, "unused_mask")
        kept = used | (unused_mask != 0)
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens, max_seqlen = _bounds(lengths)
    seqused = used.sum(dim=-1, dtype=torch.int32)
    return _take(hidden_states, indices), indices, cu_seqlens, max_seqlen, seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack a batch whose rows hold several sequences, one after the other, and then padding.

    Args:
        hidden_states: (batch_size, seqlen, ...).
        attention_mask_in_length: (batch_size, seqlen) integers. The nonzero entries of a row are
            the lengths of its sequences: [2, 3, 0, 0, 0, 0] is a row of six tokens that holds two
            sequences, of two and three tokens, and one token of padding.

    Returns:
        The packed rows (total, ...); their indices in the flattened batch (total,) int64;
        cu_seqlens (number of sequences + 1,) int32; and the longest length as a Python int.

    Raises:
        ConstraintError: the lengths do not have the shape (batch_size, seqlen).
    """
    _check_mask(hidden_states, attention_mask_in_length, "attention_mask_in_length")
    row_lengths = attention_mask_in_length.sum(dim=-1, keepdim=True)
    places = torch.arange(attention_mask_in_length.shape[1], device=row_lengths.device)
    indices = (places < row_lengths).flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    cu_seqlens, max_seqlen = _bounds(lengths)
    return _take(hidden_states, indices), indices, cu_seqlens, max_seqlen


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put packed rows back into a batch whose other entries are zero.

    Args:
        hidden_states: (total, ...).
        indices: (total,) places of the rows in the flattened batch.
        batch: batch size of the result.
        seqlen: padded length of the result.

    Returns:
        (batch, seqlen, ...).

    Raises:
        ConstraintError: an argument has a wrong type, shape or value.
    """
    _check_tensor(hidden_states, "hidden_states")
    _check_tensor(indices, "indices")
    for name, size in (("batch", batch), ("seqlen", seqlen)):
        require(check_integer(size, name) >= 0, f"`{name}` must not be negative, found {size}")
    wanted = tuple(hidden_states.shape[:1])
    require(
        tuple(indices.shape) == wanted and indices.dtype in (torch.int32, torch.int64),
        f"`indices` must hold integers of shape {wanted} like the rows of `hidden_states`, found "
        f"{indices.dtype} of shape {tuple(indices.shape)}",
    )
    flat = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return flat.view(batch, seqlen, *hidden_states.shape[1:])
