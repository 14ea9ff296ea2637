"""FlashAttention-3's functions: names, order of arguments, defaults and returns are upstream's.

Imported as the top-level module ``flash_attn_interface`` of the distribution ``flash-attn-3``.
Common to all of them:

* Dtypes: float16, bfloat16, float32 (float64 on CPUs), or float8_e4m3fn, forward only, with a
  bfloat16 output; the same for q, k and v. float8 tensors stand for themselves times
  ``q_descale``, ``k_descale`` and ``v_descale``: (batch_size, nheads_k) float32 with any strides,
  None for 1. Query head h uses the factor of its key head.
* Heads: ``nheads`` must be a multiple of ``nheads_k``; query head h uses key head
  ``h // (nheads / nheads_k)``. Head dims 1 to 256; that of v may be another, up to 512.
* ``qv``, like q with v's head dim: scores are ``scale * (q.k + qv.v)``. It has no gradient.
* ``softmax_scale``: default ``(headdim + headdim of qv) ** -0.5``.
* Masks are aligned at the ends of the sequences: query i stands at key ``i + seqlen_k - seqlen_q``.
  ``causal`` hides later keys; ``window_size = (left, right)`` hides keys more than ``left`` before
  or ``right`` after, a negative number is no limit; ``attention_chunk = c > 0`` hides keys outside
  the query's own chunk of c positions.
* ``softcap > 0``: scores are ``softcap * tanh(scale * qk / softcap)``.
* ``s_aux``, our addition: (nheads,) logits of a key without value, the attention sinks.
  ``attn_mask``, ours too: bool (True: may be seen) or floating (added to the scores),
  (1 or batch_size, 1 or nheads, 1 or seqlen_q, 1 or seqlen_k). Both have gradients.
* ``num_splits`` (0 chooses, at most 256), ``pack_gqa`` and ``sm_margin`` are hints: they change no
  result beyond rounding.
* ``deterministic`` makes all gradients bitwise repeatable, as torch.use_deterministic_algorithms
  does; those of k and v always are.
* Rows that see no key give 0 and an LSE of -inf, or their sink. Where there is no key at all (k
  has no elements), the LSE is +inf.

Errors: :class:`~flash_attn.errors.ConstraintError` (a RuntimeError, AssertionError and ValueError)
names the argument at fault; :class:`~flash_attn.errors.UnsupportedProblemError` lists all backends'
reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .core import autograd, hopper_ops, problem_ops
from .core.arguments import (
    autocast,
    autocast_like_cache,
    check_optional,
    check_tensors,
    length_bound,
    window_pair,
)
from .core.combine import combine
from .core.hopper import (
    ForwardArguments,
    check_metadata,
    has_cache,
    hopper_layout,
    hopper_problem,
    no_partial_results,
    solve,
    with_empty_lse,
)
from .core.kvcache import CacheUpdate, check_host_lengths, lengths_tensor
from .core.outputs import round_multiple
from .core.problem import AttentionProblem, SequenceLayout, is_float8
from .core.validate import (
    MAX_HEADDIM,
    MAX_HEADDIM_V,
    MAX_SPLITS,
    check_index,
    check_integer,
    check_number,
    check_switch,
    check_tensor,
    require,
)
from .errors import ConstraintError

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "maybe_contiguous",
    "round_multiple",
    "round_up_headdim",
]

_Window = Sequence[int] | Tensor
_Descales = tuple[Tensor | None, Tensor | None, Tensor | None]


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """Copy ``x`` only if its last dimension does not lie together; None stays None."""
    return x.contiguous() if x is not None and x.dim() and x.stride(-1) != 1 else x


def round_up_headdim(head_size: int) -> int:
    """The size class of a head dim in upstream's kernels: 64, 96, 128, 192 or 256."""
    return next((size for size in (64, 96, 128, 192) if head_size <= size), 256)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    softmax_scale: float | None,
    causal: bool,
    qv: Tensor | None,
    descales: _Descales,
    window_size: _Window,
    attention_chunk: int,
    softcap: float,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    s_aux: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> AttentionProblem:
    """The problem of a public call; numbers may be 0-dim tensors."""
    check_optional(s_aux=s_aux, attn_mask=attn_mask)
    check_optional(**dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True)))
    if softmax_scale is not None:
        softmax_scale = check_number(softmax_scale, "softmax_scale")
    return hopper_problem(
        q,
        k,
        v,
        layout,
        softmax_scale=softmax_scale,
        causal=check_switch(causal, "causal"),
        qv=qv,
        descales=descales,
        window=window_pair(window_size),
        attention_chunk=check_integer(attention_chunk, "attention_chunk"),
        softcap=check_number(softcap, "softcap"),
        num_splits=check_integer(num_splits, "num_splits"),
        pack_gqa=pack_gqa,
        sm_margin=check_integer(sm_margin, "sm_margin"),
        s_aux=s_aux,
        attn_mask=attn_mask,
    )


def _solve(problem: AttentionProblem, return_attn_probs: bool) -> Any:
    out, lse, _ = problem_ops.solve(with_empty_lse(problem), return_attn_probs)
    return (out, lse) if return_attn_probs else out


def _remember(
    problem: AttentionProblem, lengths: tuple[Tensor, ...], arguments: tuple[Any, ...]
) -> None:
    """Note what a call that went well amounts to."""
    if not torch.compiler.is_compiling():
        autograd.remember_problem(with_empty_lse(problem), lengths, arguments)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: _Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Any:
    """Softmax attention ``softmax(scale * q k^T) v``, differentiable in q, k, v, ``s_aux`` and a
    floating ``attn_mask``.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim).
        k: (batch_size, seqlen_k, nheads_k, headdim).
        v: (batch_size, seqlen_k, nheads_k, headdim_v).
        qv: (batch_size, seqlen_q, nheads, headdim_v).
        return_attn_probs: return ``(out, softmax_lse)``; the LSE is differentiable.

    The other arguments, errors: the module's docstring.

    Returns:
        ``out`` (batch_size, seqlen_q, nheads, headdim_v), and if asked for the log-sum-exp
        (batch_size, nheads, seqlen_q) float32.
    """
    arguments = (
        "dense", softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, pack_gqa,
        deterministic, sm_margin,
    )  # fmt: skip
    others = (qv, q_descale, k_descale, v_descale, s_aux, attn_mask)
    is_plain = all(x is None for x in others)
    if is_plain:
        known = autograd.repeat(q, k, v, (), arguments, 1 + bool(return_attn_probs))
        if known is not None:
            return known if return_attn_probs else known[0]
    check_tensors(q=q, k=k, v=v)
    if qv is not None:
        check_tensors(qv=qv)
    q, k, v, *more = autocast(*(x for x in (q, k, v, qv) if x is not None))
    qv = more[0] if more else None
    problem = _problem(
        q, k, v, SequenceLayout(), softmax_scale, causal, qv, (q_descale, k_descale, v_descale),
        window_size, attention_chunk, softcap, num_splits, pack_gqa, sm_margin, s_aux, attn_mask,
    )  # fmt: skip
    problem = problem._replace(deterministic=bool(deterministic))
    result = _solve(problem, return_attn_probs)
    if is_plain:
        _remember(problem, (), arguments)
    return result


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: _Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Any:
    """Attention over sequences of different lengths, packed one after another or padded.

    Args:
        q: (total_q, nheads, headdim); without ``cu_seqlens_q``
            (batch_size, seqlen_q, nheads, headdim).
        k: (total_k, nheads_k, headdim); without ``cu_seqlens_k``
            (batch_size, seqlen_k, nheads_k, headdim).
        v: like k, with headdim_v.
        cu_seqlens_q: (batch_size + 1,) int32: sequence b has rows cu[b] to cu[b + 1].
        cu_seqlens_k: the same for keys.
        max_seqlen_q: a bound on the lengths, required beside ``cu_seqlens_q``; results do not
            depend on it.
        max_seqlen_k: likewise.
        seqused_q: (batch_size,) int32: only so many first queries of each sequence are used; the
            output of the others is 0.
        seqused_k: the same for keys.
        qv: like q, with headdim_v.

    The other arguments are those of :func:`flash_attn_func`.

    Returns:
        ``out`` like q with headdim_v, and if asked for the log-sum-exp (nheads, total_q), without
        ``cu_seqlens_q`` (batch_size, nheads, seqlen_q).
    """
    arguments = (
        "packed", max_seqlen_q, max_seqlen_k, cu_seqlens_q is cu_seqlens_k, softmax_scale, causal,
        window_size, attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin,
    )  # fmt: skip
    others = (seqused_q, seqused_k, qv, q_descale, k_descale, v_descale, s_aux, attn_mask)
    bounds = () if cu_seqlens_q is None or cu_seqlens_k is None else (cu_seqlens_q, cu_seqlens_k)
    is_plain = bool(bounds) and all(x is None for x in others)
    if is_plain:
        known = autograd.repeat(q, k, v, bounds, arguments, 1 + bool(return_attn_probs))
        if known is not None:
            return known if return_attn_probs else known[0]
    check_tensors(q=q, k=k, v=v)
    if qv is not None:
        check_tensors(qv=qv)
    q, k, v, *more = autocast(*(x for x in (q, k, v, qv) if x is not None))
    qv = more[0] if more else None
    check_optional(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q,
        seqused_k=seqused_k,
    )  # fmt: skip
    layout = hopper_layout(
        q,
        maybe_contiguous(cu_seqlens_q),
        maybe_contiguous(cu_seqlens_k),
        maybe_contiguous(seqused_q),
        maybe_contiguous(seqused_k),
        _bound(max_seqlen_q, cu_seqlens_q, q, "max_seqlen_q"),
        _bound(max_seqlen_k, cu_seqlens_k, k, "max_seqlen_k"),
    )
    problem = _problem(
        q, k, v, layout, softmax_scale, causal, qv, (q_descale, k_descale, v_descale), window_size,
        attention_chunk, softcap, num_splits, pack_gqa, sm_margin, s_aux, attn_mask,
    )  # fmt: skip
    problem = problem._replace(deterministic=bool(deterministic))
    result = _solve(problem, return_attn_probs)
    if is_plain:
        _remember(problem, bounds, arguments)
    return result


def _bound(
    max_seqlen: int | Tensor | None, cu_seqlens: Tensor | None, x: Tensor, name: str
) -> int | None:
    """A length bound on the host, where packed rows need one."""
    if max_seqlen is None or cu_seqlens is None:
        return None
    return length_bound(max_seqlen, x.shape[0], name)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: _Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` on one tensor.

    Args:
        qkv: (batch_size, seqlen, 3, nheads, headdim), or with ``num_heads_q``
            (batch_size, seqlen, num_heads_q + 2 * nheads_k, headdim).
        num_heads_q: the number of query heads in a qkv of four dimensions.

    The other arguments and the returns are those of :func:`flash_attn_func`.
    """
    check_tensors(qkv=qkv)
    (qkv,) = autocast(qkv)
    q, k, v = _unpack(qkv, num_heads_q)
    problem = _problem(
        q, k, v, SequenceLayout(), softmax_scale, causal, None, (q_descale, k_descale, v_descale),
        window_size, attention_chunk, softcap, sm_margin=sm_margin,
    )  # fmt: skip
    problem = problem._replace(deterministic=bool(deterministic))
    return _solve(problem, return_attn_probs)


def _unpack(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.dim() == 5:
        require(
            qkv.shape[2] == 3,
            "`qkv` must have shape (batch_size, seqlen, 3, nheads, headdim), found "
            f"{tuple(qkv.shape)}",
        )
        require(
            num_heads_q is None or num_heads_q == qkv.shape[3],
            f"`num_heads_q` must be {qkv.shape[3]} like the heads of a `qkv` of five dimensions, "
            f"or left out, found {num_heads_q!r}",
        )
        q, k, v = qkv.unbind(2)
        return q, k, v
    check_tensor(qkv, "qkv", 4, "(batch_size, seqlen, num_heads_q + 2 * nheads_k, headdim)")
    if num_heads_q is None:
        raise ConstraintError(
            f"`num_heads_q` is needed for a `qkv` of four dimensions, {tuple(qkv.shape)}: found "
            "None"
        )
    rest = qkv.shape[2] - check_integer(num_heads_q, "num_heads_q")
    require(
        num_heads_q > 0 and rest > 0 and rest % 2 == 0,
        f"`num_heads_q` must leave an even number of the {qkv.shape[2]} heads of `qkv` for keys "
        f"and values, found {num_heads_q}",
    )
    q, k, v = qkv.split([num_heads_q, rest // 2, rest // 2], dim=2)
    return q, k, v


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Any:
    """Attention over a KV cache, into which new keys and values are first written in place.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim), or with ``cu_seqlens_q``
            (total_q, nheads, headdim).
        k_cache: (batch_size_cache, seqlen_cache, nheads_k, headdim), or with ``page_table``
            (num_pages, page_size, nheads_k, headdim), any page size. Last stride 1.
        v_cache: like k_cache, with headdim_v.
        k: (batch_size, seqlen_new, nheads_k, headdim), or with ``cu_seqlens_k_new``
            (total_new, nheads_k, headdim): written to the cache from row ``cache_seqlens[b]`` on,
            and attended to. Rows that do not fit are dropped, or raise with FLASH_ATTN_CHECK=1.
        v: like k, with headdim_v.
        qv: like q, with headdim_v.
        rotary_cos: (seqlen_rotary, rotary_dim / 2) in q's dtype (beside float8, any floating
            dtype), at least the cache's length: rotates k at ``start + t``, where ``start`` is
            ``rotary_seqlens`` or else ``cache_seqlens``; q at ``start + i`` if the mask is causal,
            a window or chunks, else all queries at ``start``. Needs k.
        rotary_sin: like rotary_cos.
        cache_seqlens: int or (batch_size,) int32: the end of the keys in the cache before
            appending, left padding included. None: the whole cache. It is not updated.
        cache_batch_idx: (batch_size,) int32 rows of the cache, or of ``page_table``.
        cache_leftpad: (batch_size,) int32 first key in use.
        page_table: (batch_size, max_pages) int32 page numbers; with ``cache_batch_idx`` it may
            have any number of rows.
        cu_seqlens_q: (batch_size + 1,) int32 row bounds of packed queries.
        cu_seqlens_k_new: (batch_size + 1,) int32 row bounds of packed new keys.
        max_seqlen_q: a bound on the packed queries' lengths, required beside ``cu_seqlens_q``.
        rotary_seqlens: (batch_size,) int32 position of each sequence's first query and new key.
        rotary_interleaved: pairs of neighbours (True) or of the two halves (False).
        scheduler_metadata: what :func:`get_scheduler_metadata` gave; it tells our kernels nothing.
        return_softmax_lse: return ``(out, softmax_lse, out_accum, softmax_lse_accum)``.

    The other arguments are those of :func:`flash_attn_func`. Forward only.

    Returns:
        ``out`` like q with headdim_v, or the four: softmax_lse is (batch_size, nheads, seqlen_q),
        packed (nheads, total_q). The last two, upstream's partial results of split keys, are
        empty: they are not kept.
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    if qv is not None:
        check_tensors(qv=qv)
    check_optional(
        k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad, page_table=page_table, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens,
        scheduler_metadata=scheduler_metadata,
    )  # fmt: skip
    q, k, v, qv = autocast_like_cache(k_cache, q, k, v, qv)
    check_metadata(maybe_contiguous(scheduler_metadata), q)
    cu_seqlens_q = maybe_contiguous(cu_seqlens_q)
    check_index(cu_seqlens_q, "cu_seqlens_q", q, (None,))
    batch_size = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    lengths = lengths_tensor(cache_seqlens, q, batch_size)
    leftpad = maybe_contiguous(cache_leftpad)
    check_index(leftpad, "cache_leftpad", q, (batch_size,))
    layout = hopper_layout(
        q,
        cu_seqlens_q,
        None,
        None,
        maybe_contiguous(lengths),
        _bound(max_seqlen_q, cu_seqlens_q, q, "max_seqlen_q"),
        None,
        maybe_contiguous(page_table),
        maybe_contiguous(cache_batch_idx),
        leftpad,
    )
    update = CacheUpdate(
        maybe_contiguous(k),
        maybe_contiguous(v),
        rotary_cos,
        rotary_sin,
        check_switch(rotary_interleaved, "rotary_interleaved"),
        maybe_contiguous(cu_seqlens_k_new),
        maybe_contiguous(rotary_seqlens),
    )
    problem = _problem(
        q.contiguous() if q.stride(-1) != 1 else q, k_cache, v_cache, layout, softmax_scale,
        causal, maybe_contiguous(qv), (q_descale, k_descale, v_descale), window_size,
        attention_chunk, softcap, num_splits, pack_gqa, sm_margin, s_aux, attn_mask,
    )  # fmt: skip
    check_host_lengths(cache_seqlens, problem, update)
    result = problem_ops.solve_with_kvcache(with_empty_lse(problem, k), update)
    return (*result, *no_partial_results(q)) if return_softmax_lse else result[0]


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the results of attention over disjoint sets of keys.

    Args:
        out_partial: (num_splits, batch_size, seqlen, nheads, headdim) float32, any strides, at
            most 256 splits.
        lse_partial: (num_splits, batch_size, seqlen, nheads) float32; -inf where a part saw no
            key, whose output is then not looked at.
        out: (batch_size, seqlen, nheads, headdim) to write into, last stride 1.
        out_dtype: float32, float16 or bfloat16; default ``out``'s, else float32.

    Returns:
        ``out`` and the log-sum-exp (batch_size, seqlen, nheads), a transposed view of
        (batch_size, nheads, seqlen). Not differentiable.
    """
    return combine(out_partial, lse_partial, out, out_dtype)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: _Window = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """What upstream computes ahead of :func:`flash_attn_with_kvcache`, for programs that ask.

    Our kernels find their work on the device and need no such plan, so the tensor says nothing: it
    may be passed to any call on the same device, and leaving it out changes nothing. The arguments
    are checked like those of a call.

    Args:
        cache_seqlens: (batch_size,) int32, on whose device the tensor is made.
        qkv_dtype: dtype of q, k and v.
        max_seqlen_k_new: a bound on the new keys of a sequence.
        has_softcap: whether a softcap is on.

    The other arguments are named like the call's or like the sizes of its tensors.

    Returns:
        (1,) int32.

    Raises:
        ConstraintError: an argument is wrong.
    """
    check_tensor(cache_seqlens, "cache_seqlens", 1, "(batch_size,)")
    bounds = (check_integer(batch_size, "batch_size") + 1,)
    for name, x, shape in (
        ("cache_seqlens", cache_seqlens, (batch_size,)),
        ("cu_seqlens_q", cu_seqlens_q, bounds),
        ("cu_seqlens_k_new", cu_seqlens_k_new, bounds),
        ("cache_leftpad", cache_leftpad, (batch_size,)),
    ):
        check_index(maybe_contiguous(x), name, cache_seqlens, shape)
    for name, value, low, high in (
        ("max_seqlen_q", max_seqlen_q, 0, None),
        ("max_seqlen_k", max_seqlen_k, 0, None),
        ("num_heads_kv", num_heads_kv, 1, None),
        ("num_heads_q", num_heads_q, 1, None),
        ("headdim", headdim, 1, MAX_HEADDIM),
        ("headdim_v", headdim if headdim_v is None else headdim_v, 1, MAX_HEADDIM_V),
        ("page_size", 1 if page_size is None else page_size, 1, None),
        ("max_seqlen_k_new", max_seqlen_k_new, 0, None),
        ("attention_chunk", attention_chunk, 0, None),
        ("num_splits", num_splits, 0, MAX_SPLITS),
        ("sm_margin", sm_margin, 0, None),
    ):
        _check_size(value, name, low, high)
    require(
        num_heads_q % num_heads_kv == 0,
        "Number of heads in key/value must divide number of heads in query: `num_heads_q` is "
        f"{num_heads_q}, `num_heads_kv` is {num_heads_kv}",
    )
    window_pair(window_size)
    require(
        isinstance(qkv_dtype, torch.dtype)
        and (is_float8(qkv_dtype) or qkv_dtype.is_floating_point and qkv_dtype.itemsize > 1),
        "FlashAttention only supports fp16, bf16, and fp8_e4m3 data type: `qkv_dtype` is "
        f"{qkv_dtype}",
    )
    return torch.zeros(1, dtype=torch.int32, device=cache_seqlens.device)


def _check_size(value: int, name: str, low: int, high: int | None) -> None:
    value = check_integer(value, name)
    fits = value >= low and (high is None or value <= high)
    limits = f"at least {low}" if high is None else f"{low} to {high}"
    require(fits, f"`{name}` must be {limits}, found {value}")


# The private layer, public in practice: libraries call these by keyword and read their signatures.


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every forward call in one: (out, softmax_lse, out_accum, softmax_lse_accum).

    With ``k_new`` and ``v_new``, k and v are caches. ``out_`` is written and returned. Without
    these, ``out`` is differentiable in q, k and v. The last two results are empty.
    """
    given = ForwardArguments(
        q, k, v, k_new, v_new, qv, out_, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
        seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos,
        rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal,
        window_size_left, window_size_right, attention_chunk, softcap, rotary_interleaved,
        scheduler_metadata, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip
    given = _contiguous(given)
    if (given.out_ is None and not has_cache(given)) or torch.compiler.is_compiling():
        return hopper_ops.forward(*given)
    with torch.no_grad():
        return solve(given)


_MAY_BE_COPIED = (
    "k_new", "v_new", "qv", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q",
    "seqused_k", "page_table", "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin",
    "seqlens_rotary", "scheduler_metadata",
)  # fmt: skip


def _contiguous(given: ForwardArguments) -> ForwardArguments:
    """Last dimensions together, except of what is written in place; bounds on the host."""
    inputs = ("q",) if has_cache(given) else ("q", "k", "v")
    changes = {name: maybe_contiguous(getattr(given, name)) for name in (*inputs, *_MAY_BE_COPIED)}
    return given._replace(
        **changes,  # type: ignore[arg-type]
        max_seqlen_q=_bound(given.max_seqlen_q, given.cu_seqlens_q, given.q, "max_seqlen_q"),
        max_seqlen_k=_bound(given.max_seqlen_k, given.cu_seqlens_k, given.k, "max_seqlen_k"),
    )


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """Backward, dense or packed: writes dq, dk, dv in place, returns softmax_d."""
    dout, q, k, v, out = (x.contiguous() if x.stride(-1) != 1 else x for x in (dout, q, k, v, out))
    return hopper_ops.backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k,
        max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, is_causal, window_size_left,
        window_size_right, softcap, deterministic, sm_margin,
    )  # fmt: skip


class _Applicable:
    """Stands for one of upstream's autograd classes: ``apply`` takes their arguments in order."""

    _function: Any
    # Where each of apply's first arguments goes.
    _order: tuple[int, ...] = ()

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """Call the public function."""
        moved = [arguments[at] for at in cls._order]
        return cls._function(*moved, *arguments[len(moved) :])


class FlashAttnFunc(_Applicable):
    """:func:`flash_attn_func` by upstream's class name."""

    _function = staticmethod(flash_attn_func)


class FlashAttnQKVPackedFunc(_Applicable):
    """:func:`flash_attn_qkvpacked_func` by upstream's class name."""

    _function = staticmethod(flash_attn_qkvpacked_func)


class FlashAttnVarlenFunc(_Applicable):
    """:func:`flash_attn_varlen_func` by upstream's class name, which takes seqused before max."""

    _function = staticmethod(flash_attn_varlen_func)
    _order = (0, 1, 2, 3, 4, 7, 8, 5, 6)
