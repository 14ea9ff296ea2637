"""FlashAttention-2's functions: names, order of arguments, defaults and returns are upstream's.

Common to all of them:

* Dtypes: float16, bfloat16 or float32 (float64 on CPUs), the same for q, k and v. Scores and sums
  are float32; float32 inputs are multiplied in full float32, without TF32.
* Heads: ``nheads`` must be a multiple of ``nheads_k``; query head h uses key head
  ``h // (nheads / nheads_k)``. Head dims 1 to 256.
* Masks are aligned at the ends of the sequences: query i stands at key ``i + seqlen_k - seqlen_q``.
  ``causal`` hides later keys; ``window_size = (left, right)`` hides keys more than ``left`` before
  or ``right`` after; a negative number is no limit. Rows that see no key give 0 and an LSE of +inf.
* ``softcap > 0``: scores are ``softcap * tanh(scale * qk / softcap)``. ``alibi_slopes``: float32,
  (nheads,) or (batch_size, nheads), adds ``-slope * |i + seqlen_k - seqlen_q - j|``; they get no
  gradient (a floating ``attn_mask`` does).
* ``dropout_p`` in [0, 1) acts on the attention weights, kept ones are scaled by 1 / (1 - p).
* ``deterministic`` makes all gradients bitwise repeatable, as torch.use_deterministic_algorithms
  does; those of k and v always are.
* ``attn_mask`` and ``s_aux``, by keyword only, are beyond FlashAttention-2. ``attn_mask``:
  (1 or batch_size, 1 or nheads, 1 or seqlen_q, 1 or seqlen_k), bool (True where a key may be seen)
  or floating, added to the scores after softcap (-inf hides, like False); it joins the other masks.
  In packed and cached calls it is indexed by the position within the sequence, keys from the first
  one in use. ``s_aux``: (nheads,) floating, attention sinks: ``exp(s_aux)`` joins the sum of every
  row, in softmax_lse too, and a row that sees no key has its sink as LSE. Both may require
  gradients, and both keep their dtype under autocast.
* ``return_attn_probs=True`` returns ``(out, softmax_lse, S_dmask)``. softmax_lse is float32
  (batch_size, nheads, seqlen_q), packed (nheads, total_q). S_dmask is empty without dropout; with
  it, ``exp(score - row maximum)``, negative where dropped, in q's dtype, lengths rounded up to 128.
  For plain probabilities see :func:`attention_probs`.

Errors: :class:`~flash_attn.errors.ConstraintError` (a RuntimeError and AssertionError) names the
argument at fault; :class:`~flash_attn.errors.UnsupportedProblemError` lists all backends' reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import raw_ops as flash_attn_gpu
from .core import autograd, ops, reference
from .core.arguments import (
    autocast,
    autocast_like_cache,
    check_optional,
    check_tensors,
    length_bound,
    window_pair,
)
from .core.autograd import Options
from .core.kvcache import CacheUpdate, check_host_lengths, kvcache_problem, lengths_tensor
from .core.outputs import last_dim_contiguous, round_multiple
from .core.problem import Visibility, make_transform
from .core.problem_ops import solve_with_kvcache
from .core.validate import check_integer, check_number, check_problem, check_switch, check_tensor
from .errors import ConstraintError

# Whether upstream's AMD Triton path serves; our S_dmask is laid out as its CUDA path's everywhere.
USE_TRITON_ROCM = False

maybe_contiguous = last_dim_contiguous

_wrapped_flash_attn_forward = ops.forward
_wrapped_flash_attn_varlen_forward = ops.varlen_forward
_wrapped_flash_attn_backward = ops.backward
_wrapped_flash_attn_varlen_backward = ops.varlen_backward

__all__ = [
    "USE_TRITON_ROCM",
    "attention_probs",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]


def _get_block_size_n(
    device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool
) -> int:
    """Key block by which S_dmask is scaled: all keys at once, since it holds final row maxima."""
    return 2**30


def _options(
    headdim: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    **lengths: Any,
) -> Options:
    scale = headdim**-0.5 if softmax_scale is None else softmax_scale
    left, right = window_pair(window_size)
    check_optional(alibi_slopes=alibi_slopes)
    return Options(
        check_number(dropout_p, "dropout_p"),
        check_number(scale, "softmax_scale"),
        check_switch(causal, "causal"),
        left,
        right,
        check_number(softcap, "softcap"),
        None if alibi_slopes is None else alibi_slopes.detach(),
        check_switch(deterministic, "deterministic"),
        **lengths,
    )


def _format(result: tuple[Tensor, Tensor, Tensor], return_attn_probs: bool) -> Any:
    return result if return_attn_probs else result[0]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    return_attn_probs: bool,
    s_aux: Tensor | None,
    attn_mask: Tensor | None,
) -> Any:
    check_optional(s_aux=s_aux, attn_mask=attn_mask)
    if s_aux is None and attn_mask is None:
        result = autograd.attention(q, k, v, options, return_attn_probs)
    else:
        result = autograd.extended_attention(
            q, k, v, options, return_attn_probs, attn_mask=attn_mask, sinks=s_aux
        )
    return _format(result, return_attn_probs)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Any:
    """Softmax attention ``softmax(scale * q k^T) v``.

    Differentiable in q, k, v, ``s_aux`` and a floating ``attn_mask``.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim).
        k: (batch_size, seqlen_k, nheads_k, headdim).
        v: (batch_size, seqlen_k, nheads_k, headdim).
        dropout_p: probability of dropping an attention weight.
        softmax_scale: default ``headdim ** -0.5``.
        causal: hide the keys after each query.
        window_size: (left, right) keys that are seen besides; (-1, -1) is no window.
        softcap: bound of the scores; 0 is none.
        alibi_slopes: (nheads,) or (batch_size, nheads) float32.
        deterministic: whether all gradients are the same bits every time. Those of k and v always
            are, and the portable kernels' all are; without it the Hopper kernels sum dq in any
            order.
        return_attn_probs: return ``(out, softmax_lse, S_dmask)``.
        s_aux: (nheads,) floating attention sinks, logits of a key without value.
        attn_mask: (1 or batch_size, 1 or nheads, 1 or seqlen_q, 1 or seqlen_k), bool (True: may be
            seen) or floating (added to the scores).

    Returns:
        ``out`` like q, or the tuple. Details and errors: the module's docstring.
    """
    arguments = (
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
    )  # fmt: skip
    extended = s_aux is not None or attn_mask is not None
    if not extended:
        known = autograd.repeat(q, k, v, (), arguments, 1 + bool(return_attn_probs))
        if known is not None:
            return (*known, q.new_zeros(0)) if return_attn_probs else known[0]
    check_tensors(q=q, k=k, v=v)
    q, k, v = autocast(q, k, v)
    options = _options(q.shape[-1], *arguments)
    result = _attend(q, k, v, options, return_attn_probs, s_aux, attn_mask)
    if not extended:
        autograd.remember(q, k, v, (), arguments, options)
    return result


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` on qkv (batch_size, seqlen, 3, nheads, headdim).

    The gradient is one tensor like qkv: nothing is concatenated in backward.
    """
    check_tensor(qkv, "qkv", 5, "(batch_size, seqlen, 3, nheads, headdim)")
    _check_packed(qkv, "qkv", 3)
    (qkv,) = autocast(qkv)
    options = _options(
        qkv.shape[-1], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic,
    )  # fmt: skip
    result = autograd.packed_attention(None, qkv, options, return_attn_probs)
    return _format(result, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` on q and kv (batch_size, seqlen_k, 2, nheads_k, headdim)."""
    check_tensors(q=q)
    check_tensor(kv, "kv", 5, "(batch_size, seqlen_k, 2, nheads_k, headdim)")
    _check_packed(kv, "kv", 2)
    q, kv = autocast(q, kv)
    options = _options(
        q.shape[-1], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic,
    )  # fmt: skip
    result = autograd.packed_attention(q, kv, options, return_attn_probs)
    return _format(result, return_attn_probs)


def _check_packed(x: Tensor, name: str, count: int) -> None:
    if x.shape[-3] != count:
        raise ConstraintError(
            f"`{name}` must have {count} in its third dimension from the end, found shape "
            f"{tuple(x.shape)}"
        )
    check_tensors(**{name: x})


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    s_aux: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Any:
    """Attention over sequences of different lengths packed one after another.

    Args:
        q: (total_q, nheads, headdim).
        k: (total_k, nheads_k, headdim), or with ``block_table``
            (num_blocks, page_block_size, nheads_k, headdim), any page size.
        v: like k.
        cu_seqlens_q: (batch_size + 1,) int32: sequence b has rows cu[b] to cu[b + 1].
        cu_seqlens_k: the same for keys; with ``block_table`` only the lengths count.
        max_seqlen_q: a bound on the lengths; results do not depend on it.
        max_seqlen_k: likewise.
        block_table: (batch_size, max_blocks) int32 page numbers; forward only.
        attn_mask: as there, by position within each sequence: its last two sizes are 1 or at least
            ``max_seqlen_q`` and ``max_seqlen_k`` (with ``block_table``, all that the pages hold).

    The other arguments are those of :func:`flash_attn_func`.

    Returns:
        ``out`` like q (rows that belong to no sequence are 0), or
        ``(out, softmax_lse (nheads, total_q), S_dmask)``.
    """
    arguments = (
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
    )  # fmt: skip
    bounds = (cu_seqlens_q, cu_seqlens_k)
    is_plain = s_aux is None and attn_mask is None and block_table is None
    how = (max_seqlen_q, max_seqlen_k, cu_seqlens_q is cu_seqlens_k, *arguments)
    if is_plain:
        known = autograd.repeat(q, k, v, bounds, how, 1 + bool(return_attn_probs))
        if known is not None:
            return (*known, q.new_zeros(0)) if return_attn_probs else known[0]
    check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_optional(block_table=block_table)
    q, k, v = autocast(q, k, v)
    rows_k = k.shape[0] if block_table is None else k.shape[0] * k.shape[1]
    options = _options(
        q.shape[-1],
        *arguments,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=length_bound(max_seqlen_q, q.shape[0], "max_seqlen_q"),
        max_seqlen_k=length_bound(max_seqlen_k, rows_k, "max_seqlen_k"),
        block_table=block_table,
    )  # fmt: skip
    result = _attend(q, k, v, options, return_attn_probs, s_aux, attn_mask)
    if is_plain:
        autograd.remember(q, k, v, bounds, how, options)
    return result


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` on qkv (total, 3, nheads, headdim)."""
    check_tensor(qkv, "qkv", 4, "(total, 3, nheads, headdim)")
    _check_packed(qkv, "qkv", 3)
    check_tensors(cu_seqlens=cu_seqlens)
    (qkv,) = autocast(qkv)
    bound = length_bound(max_seqlen, qkv.shape[0], "max_seqlen")
    options = _options(
        qkv.shape[-1], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=bound,
        max_seqlen_k=bound,
    )  # fmt: skip
    result = autograd.packed_attention(None, qkv, options, return_attn_probs)
    return _format(result, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` on q and kv (total_k, 2, nheads_k, headdim)."""
    check_tensors(q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_tensor(kv, "kv", 4, "(total_k, 2, nheads_k, headdim)")
    _check_packed(kv, "kv", 2)
    q, kv = autocast(q, kv)
    options = _options(
        q.shape[-1], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=length_bound(max_seqlen_q, q.shape[0], "max_seqlen_q"),
        max_seqlen_k=length_bound(max_seqlen_k, kv.shape[0], "max_seqlen_k"),
    )  # fmt: skip
    result = autograd.packed_attention(q, kv, options, return_attn_probs)
    return _format(result, return_attn_probs)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Any:
    """Attention over a KV cache, into which new keys and values are first written in place.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim).
        k_cache: (batch_size_cache, seqlen_cache, nheads_k, headdim), or with ``block_table``
            (num_blocks, page_block_size, nheads_k, headdim), any page size. Last stride 1.
        v_cache: like k_cache.
        k: (batch_size, seqlen_new, nheads_k, headdim), written to the cache from row
            ``cache_seqlens[b]`` on and attended to. Rows that do not fit are dropped, or raise
            with FLASH_ATTN_CHECK=1.
        v: like k.
        rotary_cos: (seqlen_rotary, rotary_dim / 2) in q's dtype, seqlen_rotary at least the
            cache's length: rotates k at ``cache_seqlens + t``; rotates q at ``cache_seqlens + i``
            if causal or windowed, else all queries at ``cache_seqlens``. Needs k.
        rotary_sin: like rotary_cos.
        cache_seqlens: int or (batch_size,) int32: the end of the keys in the cache before
            appending, left padding included. None: the whole cache. It is not updated.
        cache_batch_idx: (batch_size,) int32 rows of the cache; not with ``block_table``.
        cache_leftpad: (batch_size,) int32 first key in use; not with ``block_table``.
        block_table: (batch_size, max_blocks) int32 page numbers.
        rotary_interleaved: pairs of neighbours (True) or of the two halves (False).
        num_splits: parts into which the keys are divided to fill the GPU; 0 chooses, at most 128.
        return_softmax_lse: return ``(out, softmax_lse)``.
        attn_mask: as there, by position within each sequence, keys from ``cache_leftpad`` on and
            appended ones included: its last size is 1 or all that the cache or the pages hold.

    The other arguments are those of :func:`flash_attn_func`. Forward only.

    Returns:
        ``out`` like q, or ``(out, softmax_lse (batch_size, nheads, seqlen_q))``.
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    check_optional(k=k, v=v, alibi_slopes=alibi_slopes, s_aux=s_aux, attn_mask=attn_mask)
    if softmax_scale is not None:
        softmax_scale = check_number(softmax_scale, "softmax_scale")
    softcap = check_number(softcap, "softcap")
    left, right = window_pair(window_size)
    q, k, v, _ = autocast_like_cache(k_cache, q, k, v)
    q = last_dim_contiguous(q)
    problem = kvcache_problem(
        q,
        k_cache,
        v_cache,
        lengths_tensor(cache_seqlens, q),
        cache_batch_idx,
        cache_leftpad,
        block_table,
        make_transform(q.shape[-1], softmax_scale, softcap, alibi_slopes)._replace(
            attn_mask=attn_mask, sinks=s_aux
        ),
        Visibility.from_window(left, right, check_switch(causal, "causal")),
        check_integer(num_splits, "num_splits"),
    )
    for name, x in (("k", k), ("v", v)):
        if x is not None:
            check_tensor(x, name, 4, "(batch_size, seqlen_new, nheads_k, headdim)")
    update = CacheUpdate(
        None if k is None else last_dim_contiguous(k),
        None if v is None else last_dim_contiguous(v),
        rotary_cos,
        rotary_sin,
        check_switch(rotary_interleaved, "rotary_interleaved"),
    )
    check_host_lengths(cache_seqlens, problem, update)
    out, lse = solve_with_kvcache(problem, update)
    return (out, lse) if return_softmax_lse else out


@torch.no_grad()
def attention_probs(
    q: Tensor,
    k: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The normalised attention matrix, for looking at small problems.

    ``return_attn_probs`` gives what FlashAttention-2 gives, which are no probabilities; this
    gives them, computed densely in float32 without dropout: memory grows with seqlen_q * seqlen_k.

    Args:
        q: (batch_size, seqlen_q, nheads, headdim).
        k: (batch_size, seqlen_k, nheads_k, headdim).

    The other arguments are those of :func:`flash_attn_func`.

    Returns:
        (batch_size, nheads, seqlen_q, seqlen_k) float32; rows sum to 1, or are 0 where no key is
        seen.
    """
    check_tensors(q=q, k=k)
    options = _options(
        q.shape[-1], 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False
    )
    problem = ops.dense_problem(q, k, k, *autograd.shared(options))
    check_problem(problem)
    return reference.attention_probabilities(problem)


# The private layer, public in practice: context-parallel libraries and others call these by keyword
# and read their signatures. They pass through the dispatcher and are not differentiable.


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense forward: (out, softmax_lse, S_dmask, rng_state), which require no gradient."""
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    with torch.no_grad():
        return ops.forward(
            q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
            alibi_slopes, return_softmax,
        )  # fmt: skip


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed forward: (out, softmax_lse, S_dmask, rng_state), which require no gradient."""
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    with torch.no_grad():
        return ops.varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
            softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
            return_softmax, block_table, leftpad_k, seqused_k, zero_tensors, num_splits,
        )  # fmt: skip


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Dense backward: writes dq, dk, dv in place, returns softmax_d."""
    dout, q, k, v, out = (last_dim_contiguous(x) for x in (dout, q, k, v, out))
    return ops.backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state,
    )  # fmt: skip


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Packed backward: writes dq, dk, dv in place, returns softmax_d."""
    dout, q, k, v, out = (last_dim_contiguous(x) for x in (dout, q, k, v, out))
    return ops.varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state, zero_tensors,
    )  # fmt: skip


class _Applicable:
    """Stands for one of upstream's autograd classes: ``apply`` takes their arguments in order.

    Differentiation itself is in :mod:`flash_attn.core.autograd`.
    """

    _function: Any
    _arguments: int

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """Call the public function. A last argument, ``is_grad_enabled``, may follow."""
        *given, is_grad_enabled = (*arguments, True)[: cls._arguments + 1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(is_grad_enabled)):
            return cls._function(*given)


class FlashAttnFunc(_Applicable):
    """:func:`flash_attn_func` by upstream's class name."""

    _function = staticmethod(flash_attn_func)
    _arguments = 11


class FlashAttnQKVPackedFunc(_Applicable):
    """:func:`flash_attn_qkvpacked_func` by upstream's class name."""

    _function = staticmethod(flash_attn_qkvpacked_func)
    _arguments = 9


class FlashAttnKVPackedFunc(_Applicable):
    """:func:`flash_attn_kvpacked_func` by upstream's class name."""

    _function = staticmethod(flash_attn_kvpacked_func)
    _arguments = 10


class FlashAttnVarlenFunc(_Applicable):
    """:func:`flash_attn_varlen_func` by upstream's class name."""

    _function = staticmethod(flash_attn_varlen_func)
    _arguments = 16


class FlashAttnVarlenQKVPackedFunc(_Applicable):
    """:func:`flash_attn_varlen_qkvpacked_func` by upstream's class name."""

    _function = staticmethod(flash_attn_varlen_qkvpacked_func)
    _arguments = 11


class FlashAttnVarlenKVPackedFunc(_Applicable):
    """:func:`flash_attn_varlen_kvpacked_func` by upstream's class name."""

    _function = staticmethod(flash_attn_varlen_kvpacked_func)
    _arguments = 14
