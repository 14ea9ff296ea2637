"""Writing new keys and values into KV caches on CPUs, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.problem import AttentionProblem, is_float8


def append_kv(
    problem: AttentionProblem,
    k_new: Tensor,
    v_new: Tensor,
    at: Tensor,
    cu_seqlens_new: Tensor | None,
) -> None:
    """Write new rows into the caches of ``problem``, sequence b's from row ``at[b]`` on.

    Rows that fall outside the cache, its pages or its page table are not written.

    Args:
        problem: whose k and v are the caches.
        k_new: (batch, seqlen_new, nheads_k, headdim), or packed (total_new, nheads_k, headdim).
        v_new: like k_new, with the values' head dim.
        at: (batch,) int32.
        cu_seqlens_new: (batch + 1,) int32 row bounds of packed rows, or None.
    """
    for cache, new in ((problem.k, k_new), (problem.v, v_new)):
        if is_float8(cache.dtype):  # the bytes are copied: float8 has no indexed writes
            cache, new = cache.view(torch.uint8), new.view(torch.uint8)
        for index, rows in _sequences(new, at.shape[0], cu_seqlens_new):
            where, fits = _places(problem, index, int(at[index]), rows.shape[0])
            cache[where] = rows[fits]


def _sequences(
    new: Tensor, batch_size: int, cu_seqlens: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Each sequence's number and its new rows (rows, nheads_k, headdim)."""
    if cu_seqlens is None:
        yield from enumerate(new)
        return
    bounds = cu_seqlens.clamp(0, new.shape[0]).tolist()
    for index in range(batch_size):
        yield index, new[bounds[index] : max(bounds[index + 1], bounds[index])]


def _places(
    problem: AttentionProblem, index: int, first: int, count: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where rows ``first`` to ``first + count`` of sequence ``index`` lie in the caches, and which
    of them have a place there: ((first index, second index), (places,) positions among the rows).
    """
    table, cache_row = problem.layout.page_table, problem.layout.cache_batch_idx
    rows = first + torch.arange(count, device=problem.k.device)
    row = index if cache_row is None else int(cache_row[index])
    exists = 0 <= row < (problem.k if table is None else table).shape[0]
    fits = ((rows >= 0) & (rows < problem.max_seqlen_k) & exists).nonzero()[:, 0]
    rows = rows[fits]
    if table is None:
        return (torch.full_like(rows, row), rows), fits
    page_size = problem.k.shape[1]
    pages = table[row if exists else 0, rows // page_size].long() if rows.numel() else rows
    valid = (pages >= 0) & (pages < problem.k.shape[0])
    return (pages[valid], rows[valid] % page_size), fits[valid]
