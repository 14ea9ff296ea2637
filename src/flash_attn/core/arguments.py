"""From what callers pass to what the core takes: numbers, windows, bounds, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import ConstraintError
from .derivatives import refuse_tangents, takes_tangents
from .validate import check_integer


def window_pair(window_size: Sequence[int] | Tensor) -> tuple[int, int]:
    """``window_size`` as two integers.

    Raises:
        ConstraintError: it is no pair of integers.
    """
    try:
        left, right = window_size
        return check_integer(left, "window_size"), check_integer(right, "window_size")
    except (TypeError, ValueError):
        raise ConstraintError(
            "`window_size` must be (left, right), two integers of which -1 is no limit, found "
            f"{window_size!r}"
        ) from None


def length_bound(max_seqlen: int | Tensor, rows: int, name: str) -> int:
    """``max_seqlen``, the argument called ``name``, as a host number. One on a GPU is not read,
    which would synchronise: all rows are a bound as well, and no result depends on it."""
    if isinstance(max_seqlen, Tensor) and max_seqlen.is_cuda:
        return rows
    return check_integer(max_seqlen, name)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast, float32 tensors become the autocast dtype, like a matrix product's."""
    device_type = tensors[0].device.type
    if not is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)


def autocast_like_cache(
    cache: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, qv: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same for queries, new keys and values beside a cache, which stays what it is: they become
    the autocast dtype where the cache has it."""
    device_type = q.device.type
    if not is_autocast_enabled(device_type) or cache.dtype != torch.get_autocast_dtype(device_type):
        return q, k, v, qv
    more = (None if x is None else autocast(x)[0] for x in (k, v, qv))
    return (*autocast(q), *more)  # type: ignore[return-value]


def is_autocast_enabled(device_type: str) -> bool:
    """Whether a torch.autocast of that kind of device is open; meta tensors have none."""
    # (torch.amp.is_autocast_available is nothing that PyTorch 2.11 can trace.)
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """In here, products of tensors like ``x`` are computed in the dtypes that they have."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def check_tensors(**tensors: Tensor) -> None:
    """Only what must hold to reach the operators, which check everything else.

    Raises:
        ConstraintError: an argument, named by its keyword, is no tensor with a last dimension.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ConstraintError(f"`{name}` must be a torch.Tensor, found {type(x).__name__}")
        if x.layout is not torch.strided or x.is_nested:
            raise ConstraintError(
                f"`{name}` must be a plain, dense tensor, found a nested or sparse one; the rows "
                "of a nested tensor go, with its offsets, to the functions for packed sequences"
            )
        if x.dim() < 1 or x.shape[-1] == 0:
            raise ConstraintError(f"`{name}` must have a head dim, found shape {tuple(x.shape)}")
        if takes_tangents():
            refuse_tangents(name, x)


def check_optional(**tensors: Tensor | None) -> None:
    """What is given is a tensor: the operators' schemas take nothing else.

    Raises:
        ConstraintError: an argument, named by its keyword, is neither a tensor nor None.
    """
    for name, x in tensors.items():
        if not isinstance(x, (Tensor, type(None))):
            found = type(x).__name__
            raise ConstraintError(f"`{name}` must be a torch.Tensor or None, found {found}")
        if x is not None and takes_tangents():
            refuse_tangents(name, x)
