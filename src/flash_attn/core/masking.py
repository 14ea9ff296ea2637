"""Which keys a query sees: the only statement of it.

Queries and keys are aligned at their ends: query ``i`` of a sequence with ``seqlen_q`` queries and
``seqlen_k`` keys stands at key position ``i + seqlen_k - seqlen_q``. It sees the keys of a
half-open interval whose two ends grow with the row, so a tile of rows is described by its first
and last row alone. Chunks divide positions, that of a query and those of keys alike. Backends and
kernels restate these functions and are tested against them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Visibility


def visible_keys(row: int, seqlen_q: int, seqlen_k: int, visibility: Visibility) -> tuple[int, int]:
    """The interval ``[first, end)`` of keys that query ``row`` sees; empty if ``end <= first``."""
    position = row + seqlen_k - seqlen_q
    left, right, chunk = visibility
    first = 0 if left is None else max(0, position - left)
    end = seqlen_k if right is None else min(seqlen_k, position + right + 1)
    if chunk:
        first = max(first, position // chunk * chunk)
        end = min(end, (position // chunk + 1) * chunk)
    return first, max(end, first)


def visible_queries(
    key: int, seqlen_q: int, seqlen_k: int, visibility: Visibility
) -> tuple[int, int]:
    """The interval ``[first, end)`` of queries that see ``key``: the transpose of visible_keys."""
    shift = seqlen_q - seqlen_k
    left, right, chunk = visibility
    first = 0 if right is None else max(0, key + shift - right)
    end = seqlen_q if left is None else min(seqlen_q, key + shift + left + 1)
    if chunk:
        first = max(first, key // chunk * chunk + shift)
        end = min(end, (key // chunk + 1) * chunk + shift)
    return first, max(end, first)


def visible_matrix(
    seqlen_q: int,
    seqlen_k: int,
    visibility: Visibility,
    device: torch.device | None = None,
) -> Tensor:
    """The whole pattern as a (seqlen_q, seqlen_k) bool tensor, by the same two bounds."""
    row = torch.arange(seqlen_q, device=device)[:, None]
    key = torch.arange(seqlen_k, device=device)[None, :]
    position = row + (seqlen_k - seqlen_q)
    left, right, chunk = visibility
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left is not None:
        seen &= key >= position - left
    if right is not None:
        seen &= key <= position + right
    if chunk:
        seen &= key // chunk == torch.div(position, chunk, rounding_mode="floor")
    return seen


def count_visible(seqlen_q: int, seqlen_k: int, visibility: Visibility) -> int:
    """How many (query, key) pairs are computed; used for operation counts."""
    bounds = (visible_keys(row, seqlen_q, seqlen_k, visibility) for row in range(seqlen_q))
    return sum(end - first for first, end in bounds)
