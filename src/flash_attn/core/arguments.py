"""From what callers pass to what the core takes: numbers, windows, bounds, autocast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConstraintError
from .validate import check_integer


def window_pair(window_size: Sequence[int] | Tensor) -> tuple[int, int]:
    """``window_size`` as two integers.

    Raises:
        ConstraintError: it is no pair of integers.
    """
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ConstraintError(
            f"`window_size` must be (left, right), found {window_size!r}"
        ) from None
    return check_integer(left, "window_size"), check_integer(right, "window_size")


def length_bound(max_seqlen: int | Tensor, rows: int) -> int:
    """``max_seqlen`` as a host number. One on a GPU is not read, which would synchronise: all
    rows are a bound as well, and no result depends on it."""
    if isinstance(max_seqlen, Tensor):
        return rows if max_seqlen.is_cuda else check_integer(max_seqlen, "max_seqlen")
    return check_integer(max_seqlen, "max_seqlen")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast, float32 tensors become the autocast dtype, like a matrix product's."""
    device_type = tensors[0].device.type
    # Meta tensors have no autocast. (torch.amp.is_autocast_available is nothing that PyTorch 2.11
    # can trace.)
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)


def check_tensors(**tensors: Tensor) -> None:
    """Only what must hold to reach the operators, which check everything else.

    Raises:
        ConstraintError: an argument, named by its keyword, is no tensor with a last dimension.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ConstraintError(f"`{name}` must be a torch.Tensor, found {type(x).__name__}")
        if x.dim() < 1 or x.shape[-1] == 0:
            raise ConstraintError(f"`{name}` must have a head dim, found shape {tuple(x.shape)}")


def check_optional(**tensors: Tensor | None) -> None:
    """What is given is a tensor: the operators' schemas take nothing else.

    Raises:
        ConstraintError: an argument, named by its keyword, is neither a tensor nor None.
    """
    for name, x in tensors.items():
        if not isinstance(x, (Tensor, type(None))):
            found = type(x).__name__
            raise ConstraintError(f"`{name}` must be a torch.Tensor or None, found {found}")
