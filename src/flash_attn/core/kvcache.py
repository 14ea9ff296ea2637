"""Attention over a KV cache: append new keys and values in place, rotate, attend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import settings
from ..errors import ConstraintError
from . import registry
from .attend import attend
from .problem import (
    AttentionProblem,
    AttentionResult,
    ScoreTransform,
    SequenceLayout,
    Visibility,
    is_float8,
)
from .validate import (
    check_cu_seqlens,
    check_device,
    check_flash_2,
    check_index,
    check_integer,
    check_last_stride,
    check_like,
    check_not_expanded,
    check_problem,
    check_range,
    check_same_headdim,
    check_tensor,
    require,
)


class CacheUpdate(NamedTuple):
    """What is written into the caches before attending, and how queries and keys are rotated.

    Attributes:
        k: (batch, seqlen_new, nheads_k, headdim), packed (total_new, nheads_k, headdim), or None.
        v: like k, with the values' head dim.
        rotary_cos: (seqlen_rotary, rotary_dim / 2), or None for no rotation.
        rotary_sin: like rotary_cos.
        rotary_interleaved: pairs are neighbours instead of (i, i + rotary_dim / 2).
        cu_seqlens: (batch + 1,) int32 row bounds of packed new keys.
        rotary_seqlens: (batch,) int32 position of each sequence's first query and new key; None
            is where the new keys are written.
    """

    k: Tensor | None = None
    v: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = True
    cu_seqlens: Tensor | None = None
    rotary_seqlens: Tensor | None = None


def attend_with_kvcache(
    problem: AttentionProblem,
    k_new: Tensor | None,
    v_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    out: Tensor | None = None,
    *,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
) -> AttentionResult:
    """Append ``k_new`` and ``v_new`` to the caches of ``problem``, then attend.

    ``problem.layout.seqused_k`` holds the lengths before appending, left padding included. New
    keys are rotated at positions ``start + t`` with ``start`` either ``rotary_seqlens`` or
    ``seqused_k``, queries at ``start + i`` if the mask is causal, a window or chunks, else all at
    ``start``. Arguments are those of :class:`CacheUpdate`.

    Raises:
        ConstraintError: an argument is wrong.
        UnsupportedProblemError: no permitted backend computes it; the caches may be updated.
    """
    update = CacheUpdate(
        k_new, v_new, rotary_cos, rotary_sin, rotary_interleaved, cu_seqlens_k_new, rotary_seqlens
    )
    check_update(problem, update)
    lengths = problem.layout.seqused_k
    if k_new is None or v_new is None or lengths is None:
        return attend(problem, out)
    check_problem(problem)
    if settings.CHECK_INDICES:
        _check_contents(problem, update, lengths)
    writer = registry.cache_writer(problem.q.device)
    if rotary_cos is not None:
        start = lengths if rotary_seqlens is None else rotary_seqlens
        rotary = _Rotary(writer, update, start)
        k_new = rotary.turn(k_new, cu_seqlens_k_new)
        problem = problem._replace(q=_rotate_queries(problem, rotary))
    if k_new.numel():
        writer.append_kv(problem, k_new, v_new, lengths, cu_seqlens_k_new)
    longer = problem.layout._replace(seqused_k=lengths + new_lengths(update))
    return attend(problem._replace(layout=longer), out)


def new_lengths(update: CacheUpdate) -> Tensor | int:
    """How many new keys each sequence has, by the same clamping as where they are written."""
    k_new = update.k
    if k_new is None:
        return 0
    if update.cu_seqlens is None:
        return k_new.shape[1]
    bounds = update.cu_seqlens.clamp(0, k_new.shape[0])
    return bounds.diff().clamp_min(0)


class _Rotary(NamedTuple):
    """A rotation whose first position of every sequence is ``start``, (batch,) int32."""

    writer: registry.CacheWriter
    update: CacheUpdate
    start: Tensor

    def turn(self, x: Tensor, cu_seqlens: Tensor | None, start: Tensor | None = None) -> Tensor:
        """``x`` rotated into a new tensor; float8 goes through float32 and saturates."""
        cos, sin = self.update.rotary_cos, self.update.rotary_sin
        if cos is None or sin is None:
            return x
        start = self.start if start is None else start
        rotate, interleaved = self.writer.rotate, self.update.rotary_interleaved
        if not is_float8(x.dtype):
            return rotate(x, cos, sin, start, interleaved, cu_seqlens)
        y = rotate(x.float(), cos.float(), sin.float(), start, interleaved, cu_seqlens)
        largest = torch.finfo(x.dtype).max
        return y.clamp(-largest, largest).to(x.dtype)


def _rotate_queries(problem: AttentionProblem, rotary: _Rotary) -> Tensor:
    q, cu_seqlens_q = problem.q, problem.layout.cu_seqlens_q
    if problem.visibility != Visibility():
        return rotary.turn(q, cu_seqlens_q)
    # Without a mask all queries of a sequence stand at the same position.
    if cu_seqlens_q is None:
        batch_size, seqlen_q, nheads, headdim = q.shape
        one_row = q.reshape(batch_size, 1, seqlen_q * nheads, headdim)
        return rotary.turn(one_row, None).view(q.shape)
    if problem.batch_size == 0:
        return q
    rows = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    owner = torch.searchsorted(cu_seqlens_q, rows, right=True) - 1
    start = rotary.start[owner.clamp(0, problem.batch_size - 1)]
    return rotary.turn(q[:, None], None, start)[:, 0]


def check_update(problem: AttentionProblem, update: CacheUpdate) -> None:
    """The caches of ``problem`` and the ``update`` fit together, as far as shapes say.

    Raises:
        ConstraintError: an argument is wrong.
    """
    _check_shapes(problem)
    _check_new(problem, update)
    _check_rotary(problem, update)


def _check_dims(problem: AttentionProblem) -> None:
    if problem.is_varlen_q:
        check_tensor(problem.q, "q", 3, "(total_q, nheads, headdim)")
    else:
        check_tensor(problem.q, "q", 4, "(batch_size, seqlen_q, nheads, headdim)")
    for x, name in ((problem.k, "k_cache"), (problem.v, "v_cache")):
        check_tensor(x, name, 4, "(batch_size_cache, seqlen_cache, nheads_k, headdim) or, with "
                     "`block_table`, (num_blocks, page_block_size, nheads_k, headdim)")  # fmt: skip


def _check_shapes(problem: AttentionProblem) -> None:
    _check_dims(problem)
    q, k, v, layout = problem.q, problem.k, problem.v, problem.layout
    for x, name in ((k, "k_cache"), (v, "v_cache")):
        check_like(x, name, q)
        check_last_stride(x, name)
    if k.shape[0] != problem.batch_size and layout.page_table is layout.cache_batch_idx is None:
        raise ConstraintError(
            f"`k_cache` must have batch size {problem.batch_size} like `q`, found {k.shape[0]}; "
            "`cache_batch_idx` chooses rows of a larger one"
        )
    rows = problem.batch_size if layout.cache_batch_idx is None else None
    check_index(layout.page_table, "block_table", q, (rows, None))
    check_index(layout.seqused_k, "cache_seqlens", q, (problem.batch_size,))


def _check_new(problem: AttentionProblem, update: CacheUpdate) -> None:
    k_new, v_new, cu_seqlens = update.k, update.v, update.cu_seqlens
    if k_new is None:
        require(v_new is None, "`v` is given without `k`: pass both or none")
        require(cu_seqlens is None, "`cu_seqlens_k_new` is given without `k`: pass both or none")
        return
    if v_new is None:
        raise ConstraintError("If key is supplied, value must also be passed in: `v` is None")
    if problem.layout.seqused_k is None:
        raise ConstraintError(
            "If key is supplied, seqlens_k must also be passed in: `cache_seqlens` is None"
        )
    if problem.layout.cu_seqlens_k is not None:
        raise ConstraintError(
            "`k` cannot be appended to packed keys: pass a cache, without `cu_seqlens_k`"
        )
    check_index(cu_seqlens, "cu_seqlens_k_new", problem.q, (problem.batch_size + 1,))
    leading = (problem.batch_size, "seqlen_new") if cu_seqlens is None else ("total_new",)
    for x, name, headdim in ((k_new, "k", problem.headdim), (v_new, "v", problem.headdim_v)):
        wanted = (*leading, problem.nheads_k, headdim)
        check_tensor(x, name, len(wanted), _text(wanted))
        check_like(x, name, problem.q)
        fits = all(
            isinstance(want, str) or want == have
            for want, have in zip(wanted, x.shape, strict=True)
        )
        require(fits, f"`{name}` must have shape {_text(wanted)}, found {tuple(x.shape)}")
        check_last_stride(x, name)
    for x, name in ((problem.k, "k_cache"), (problem.v, "v_cache")):
        check_not_expanded(x, name)
    seqlen_new = k_new.shape[-3]
    if seqlen_new != v_new.shape[-3]:
        raise ConstraintError(
            f"`v` must have seqlen {seqlen_new} like `k`, found {v_new.shape[-3]}"
        )
    if cu_seqlens is None and seqlen_new > problem.max_seqlen_k:
        raise ConstraintError(
            "`k` must have seqlen <= the seqlen of the KV cache, found "
            f"{seqlen_new} and {problem.max_seqlen_k}"
        )


def _text(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(str(size) for size in shape)})"


def _check_contents(problem: AttentionProblem, update: CacheUpdate, lengths: Tensor) -> None:
    """With FLASH_ATTN_CHECK=1: the new rows fit and the rotary tables reach them. Otherwise rows
    that do not fit are dropped and positions are clamped. Synchronises."""
    if lengths.numel() == 0 or update.k is None:
        return
    if update.cu_seqlens is not None:
        check_cu_seqlens(update.cu_seqlens.tolist(), "cu_seqlens_k_new", update.k.shape[0])
    new = new_lengths(update)
    check_room(problem, int((lengths + new).max()))
    if update.rotary_cos is not None and update.rotary_seqlens is not None:
        last = update.rotary_seqlens + new
        check_range(update.rotary_seqlens, "rotary_seqlens", 0, update.rotary_cos.shape[0])
        check_range(last, "rotary_seqlens plus the new keys", 0, update.rotary_cos.shape[0])


def check_room(problem: AttentionProblem, longest: int) -> None:
    """The cache holds ``longest`` keys of a sequence."""
    where = "block_table" if problem.is_paged else "k_cache"
    require(
        longest <= problem.max_seqlen_k,
        f"`{where}` has room for {problem.max_seqlen_k} keys a sequence, but `cache_seqlens` and "
        f"the new keys need {longest}",
    )


def _check_rotary(problem: AttentionProblem, update: CacheUpdate) -> None:
    cos, sin = update.rotary_cos, update.rotary_sin
    if cos is None and sin is None:
        require(
            update.rotary_seqlens is None,
            "`rotary_seqlens` is given without `rotary_cos` and `rotary_sin`: pass all or none",
        )
        return
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ConstraintError(f"`rotary_cos` and `rotary_sin` go together: `{missing}` is None")
    if update.k is None:
        raise ConstraintError(
            "If rotary cos/sin are provided, new key / value to be appended to KV cache must also "
            "be provided: `k` is None"
        )
    check_index(update.rotary_seqlens, "rotary_seqlens", problem.q, (problem.batch_size,))
    rows, what = problem.max_seqlen_k, "the cache"
    if not problem.is_varlen_q and problem.q.shape[1] > rows:
        rows, what = problem.q.shape[1], "`q`"
    for x, name in ((cos, "rotary_cos"), (sin, "rotary_sin")):
        check_tensor(x, name, 2, "(seqlen_rotary, rotary_dim / 2)")
        _check_table_dtype(x, name, problem.q.dtype)
        check_device(x, name, problem.q)
        require(x.is_contiguous(), f"`{name}` must be contiguous, found strides {x.stride()}")
        if x.shape[0] < rows:
            raise ConstraintError(
                f"cos/sin seqlen must be at least the seqlen of KV cache: `{name}` has "
                f"{x.shape[0]} rows, {what} {rows}"
            )
    require(
        cos.shape == sin.shape,
        f"`rotary_sin` must have shape {tuple(cos.shape)}, found {tuple(sin.shape)}",
    )
    rotary_dim = 2 * cos.shape[1]
    require(
        rotary_dim <= problem.headdim,
        f"rotary_dim must be <= headdim, found {rotary_dim} and {problem.headdim}",
    )
    require(
        rotary_dim % 16 == 0,
        f"Only rotary dimensions divisible by 16 are currently supported, found {rotary_dim}",
    )


def _check_table_dtype(x: Tensor, name: str, dtype: torch.dtype) -> None:
    """The queries' dtype; beside float8 queries, whose tables would be coarse, any floating one."""
    if x.dtype != dtype and not (is_float8(dtype) and x.is_floating_point()):
        raise ConstraintError(
            f"{name} must have the same dtype as query: `{name}` has {x.dtype}, `q` {dtype}"
        )


def kvcache_problem(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    transform: ScoreTransform,
    visibility: Visibility,
    num_splits: int,
) -> AttentionProblem:
    """The problem of a FlashAttention-2 cache call, before anything is appended."""
    layout = SequenceLayout(
        seqused_k=cache_seqlens,
        leftpad_k=cache_leftpad,
        page_table=block_table,
        cache_batch_idx=cache_batch_idx,
    )
    check_flash_2(layout, num_splits)
    check_same_headdim(q, k_cache, v_cache)
    problem = AttentionProblem(
        q, k_cache, v_cache, transform, visibility, layout, num_splits=num_splits
    )
    _check_dims(problem)
    check_index(block_table, "block_table", q, (None, None))
    if k_cache.shape[0] and q.shape[1] > problem.max_seqlen_k and k_cache.shape[1]:
        raise ConstraintError(
            f"`q` must have seqlen <= the seqlen of the KV cache, found {q.shape[1]} and "
            f"{problem.max_seqlen_k}"
        )
    return problem


def lengths_tensor(
    cache_seqlens: Tensor | int | None, q: Tensor, batch_size: int | None = None
) -> Tensor | None:
    """``cache_seqlens`` as a (batch,) int32 tensor: an integer holds for every sequence.

    ``batch_size`` is given where q is packed.
    """
    if cache_seqlens is None or isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    try:
        length = check_integer(cache_seqlens, "cache_seqlens")
    except ConstraintError:
        raise ConstraintError(
            "`cache_seqlens` must be an integer or an int32 tensor of shape (batch_size,), found "
            f"{type(cache_seqlens).__name__}"
        ) from None
    require(
        0 <= length < 2**31, f"`cache_seqlens` must be between 0 and {2**31 - 1}, found {length}"
    )
    rows = q.shape[0] if batch_size is None else batch_size
    return torch.full((rows,), length, dtype=torch.int32, device=q.device)


def check_host_lengths(
    cache_seqlens: Tensor | int | None, problem: AttentionProblem, update: CacheUpdate
) -> None:
    """A length on the host, unlike those on a device, can be compared with what the cache holds."""
    if cache_seqlens is None or isinstance(cache_seqlens, Tensor):
        return
    packed = update.k is None or update.cu_seqlens is not None
    new = 0 if update.k is None or packed else update.k.shape[1]
    check_room(problem, cache_seqlens + new)
