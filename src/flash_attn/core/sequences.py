"""Cutting a problem into its sequences, for code that may look at lengths on the host.

The reference and the CPU backend share this; GPU kernels do the same arithmetic on the device.
Lengths and indices from tensors are clamped to what the tensors hold, exactly as the kernels do, so
that hostile values never reach outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import AttentionProblem


class Sequence(NamedTuple):
    """One sequence of a problem.

    Attributes:
        number: which of the batch.
        q_rows: what selects its queries: an index into q's first dimensions.
        seqlen_q: number of queries.
        k_rows: the same for its keys; a slice where they lie together, index tensors if paged.
        seqlen_k: number of keys.
    """

    number: int
    q_rows: tuple[int | slice, ...]
    seqlen_q: int
    k_rows: tuple[int | slice | Tensor, ...]
    seqlen_k: int

    def lse_index(self, varlen: bool) -> tuple[int | slice, ...]:
        """Where this sequence's (nheads, seqlen_q) block of softmax_lse lies."""
        rows = self.q_rows[-1]
        return (slice(None), rows) if varlen else (self.number, slice(None), rows)


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(int(value), high))


def _bounds(cu_seqlens: list[int], index: int, total: int) -> tuple[int, int]:
    start = _clamp(cu_seqlens[index], 0, total)
    return start, _clamp(cu_seqlens[index + 1], start, total)


def _as_list(values: Tensor | None) -> list[int] | None:
    return None if values is None else values.tolist()


def sequences(problem: AttentionProblem) -> Iterator[Sequence]:
    """Yield the sequences of ``problem`` in batch order; synchronises with the device."""
    layout, q, k = problem.layout, problem.q, problem.k
    cu_q, cu_k = _as_list(layout.cu_seqlens_q), _as_list(layout.cu_seqlens_k)
    used, pad = _as_list(layout.seqused_k), _as_list(layout.leftpad_k)
    used_q = _as_list(layout.seqused_q)
    cache_row = _as_list(layout.cache_batch_idx)
    for index in range(problem.batch_size):
        start, end = (0, q.shape[1]) if cu_q is None else _bounds(cu_q, index, q.shape[0])
        if used_q is not None:
            end = start + _clamp(used_q[index], 0, end - start)
        seqlen_q = end - start
        q_rows: tuple[int | slice, ...] = (slice(start, end),)
        if cu_q is None:
            q_rows = (index, slice(None) if used_q is None else slice(0, end))
        first, end = 0, problem.max_seqlen_k
        if cu_k is not None:
            first, end = _bounds(cu_k, index, 2**31 if problem.is_paged else k.shape[0])
        if problem.is_paged:
            first, end = 0, min(end - first, problem.max_seqlen_k)
        if used is not None:
            end = first + _clamp(used[index], 0, end - first)
        if pad is not None:
            first += _clamp(pad[index], 0, end - first)
        k_rows: tuple[int | slice | Tensor, ...] = (slice(first, end),)
        table = layout.page_table
        rows = (k if table is None else table).shape[0]
        row = index if cache_row is None else _clamp(cache_row[index], 0, rows - 1)
        if table is not None:
            k_rows = _paged_rows(problem, table[row], first, end)
        elif cu_k is None:
            k_rows = (row, slice(first, end))
        yield Sequence(index, q_rows, seqlen_q, k_rows, end - first)


def _paged_rows(
    problem: AttentionProblem, pages: Tensor, first: int, end: int
) -> tuple[Tensor, ...]:
    """Page and row within the page of keys ``first`` to ``end`` of a sequence on ``pages``."""
    num_pages, page_size = problem.k.shape[:2]
    keys = torch.arange(first, end, device=problem.k.device)
    return pages[keys // page_size].long().clamp(0, max(num_pages - 1, 0)), keys % page_size
