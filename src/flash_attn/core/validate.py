"""Checks that turn bad arguments into errors before anything is launched.

Every message names the argument, what it must be and what was found.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from .. import settings
from ..errors import ConstraintError
from .problem import AttentionProblem, SequenceLayout, is_float8

MAX_HEADDIM = 256
MAX_HEADDIM_V = 512
MAX_SPLITS = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConstraintError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConstraintError(message)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(x: object, name: str, ndim: int, shape: str) -> None:
    """``x`` is a tensor of ``ndim`` dimensions, described by ``shape``."""
    if not isinstance(x, Tensor):
        raise ConstraintError(f"`{name}` must be a torch.Tensor, found {type(x).__name__}")
    if x.dim() != ndim:
        raise ConstraintError(f"`{name}` must have shape {shape}, found {tuple(x.shape)}")


def check_like(x: Tensor, name: str, q: Tensor) -> None:
    """``x`` has q's dtype and device."""
    if x.dtype != q.dtype:
        raise ConstraintError(
            f"`q` and `{name}` must have the same dtype, found {_name(q.dtype)} and "
            f"{_name(x.dtype)}; cast them, or run under torch.autocast"
        )
    check_device(x, name, q)


def check_device(x: Tensor, name: str, q: Tensor, like: str = "q") -> None:
    """``x`` is where q, or the argument called ``like``, is."""
    if x.device != q.device:
        raise ConstraintError(f"`{name}` must be on {q.device} like `{like}`, found {x.device}")


def check_index(x: Tensor | None, name: str, q: Tensor, shape: tuple[int | None, ...]) -> None:
    """``x`` is None or an int32 tensor of ``shape`` (None: any size) on q's device."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise ConstraintError(f"`{name}` must be a torch.Tensor, found {type(x).__name__}")
    if x.dtype != torch.int32:
        raise ConstraintError(f"`{name}` must have dtype int32, found {_name(x.dtype)}")
    check_device(x, name, q)
    fits = x.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, x.shape, strict=True)
    )
    if not fits:
        wanted = tuple("any" if size is None else size for size in shape)
        raise ConstraintError(f"`{name}` must have shape {wanted}, found {tuple(x.shape)}")
    if x.numel() > 1 and x.stride(-1) != 1:
        raise ConstraintError(
            f"`{name}` must be contiguous in its last dimension, found stride {x.stride(-1)}"
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Dtypes, devices, head counts and head dims of the three tensors fit together."""
    if q.dtype not in _DTYPES and not is_float8(q.dtype):
        raise ConstraintError(
            "FlashAttention only support fp16 and bf16 data type (and fp32, fp8_e4m3): `q` has "
            f"dtype {_name(q.dtype)}; cast it with .to(torch.bfloat16)"
        )
    for x, name in ((k, "k"), (v, "v")):
        check_like(x, name, q)
    if k.shape[-1] != q.shape[-1]:
        raise ConstraintError(f"`k` must have head dim {q.shape[-1]} like `q`, found {k.shape[-1]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ConstraintError(
            f"`v` must have shape {(*k.shape[:-1], v.shape[-1])} like `k`, found {tuple(v.shape)}"
        )
    nheads, nheads_k = q.shape[-2], k.shape[-2]
    for name, x, limit in (("q", q, MAX_HEADDIM), ("v", v, MAX_HEADDIM_V)):
        if not 1 <= x.shape[-1] <= limit:
            raise ConstraintError(
                f"FlashAttention only supports head dimension at most {limit}: `{name}` has head "
                f"dim {x.shape[-1]}"
            )
    if nheads_k == 0 or nheads % nheads_k:
        raise ConstraintError(
            "Number of heads in key/value must divide number of heads in query: `q` has "
            f"{nheads}, `k` has {nheads_k}"
        )
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        check_last_stride(x, name)


def check_number(x: Any, name: str) -> Any:
    """``x`` as the operators take it: a number, or a tensor of one."""
    if isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        return x
    if isinstance(x, Tensor):
        require(x.numel() == 1, f"`{name}` must be a number, found shape {tuple(x.shape)}")
        return x
    # Of other libraries, like NumPy's. Not text, which float() would read.
    if not hasattr(type(x), "__float__"):
        raise ConstraintError(f"`{name}` must be a number, found {type(x).__name__}")
    return float(x)


def check_switch(x: Any, name: str) -> Any:
    """``x`` is a bool, or what stands for one: None, an integer, a tensor, NumPy's."""
    if x is None or isinstance(x, (bool, int, Tensor)) or type(x).__name__ in ("bool", "bool_"):
        return x
    raise ConstraintError(f"`{name}` must be True or False, found {x!r}")


def check_integer(x: Any, name: str) -> Any:
    """``x`` as the operators take it: an integer of 64 bits."""
    # While a program is traced, an integer may stand for one that only the device knows.
    if isinstance(x, torch.SymInt) or (isinstance(x, int) and torch.compiler.is_compiling()):
        return x
    try:
        x = operator.index(x)
    except TypeError:
        raise ConstraintError(f"`{name}` must be an integer, found {x!r}") from None
    require(-(2**63) <= x < 2**63, f"`{name}` must fit in 64 bits, found {x}")
    return x


def check_last_stride(x: Tensor, name: str) -> None:
    """The last dimension lies together in memory, if there is anything in it."""
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
        raise ConstraintError(
            f"`{name}` must have a contiguous last dimension, found stride {x.stride(-1)}; "
            "call .contiguous()"
        )


def check_problem(problem: AttentionProblem) -> None:
    """Everything about a problem that can be checked without looking into device memory."""
    q, k, v, layout = problem.q, problem.k, problem.v, problem.layout
    varlen, paged = problem.is_varlen_q, problem.is_paged
    packed_k = layout.cu_seqlens_k is not None and not paged
    check_tensor(q, "q", 3 if varlen else 4, _shape(varlen, "q"))
    shape_k = "(num_pages, page_size, nheads_k, headdim)" if paged else _shape(packed_k, "k")
    check_tensor(k, "k", 3 if packed_k else 4, shape_k)
    check_tensor(v, "v", 3 if packed_k else 4, shape_k)
    check_qkv(q, k, v)
    _check_layout(problem)
    _check_scores(problem)
    _check_mask(problem)
    _check_extensions(problem)
    if settings.CHECK_INDICES:
        check_contents(problem)


def _shape(packed: bool, name: str) -> str:
    suffix, heads = ("q", "nheads") if name == "q" else ("k", "nheads_k")
    if packed:
        return f"(total_{suffix}, {heads}, headdim)"
    return f"(batch_size, seqlen_{suffix}, {heads}, headdim)"


def _check_layout(problem: AttentionProblem) -> None:
    q, k, layout = problem.q, problem.k, problem.layout
    check_index(layout.cu_seqlens_q, "cu_seqlens_q", q, (None,))
    batch_size = problem.batch_size
    require(batch_size >= 0, "`cu_seqlens_q` must have batch_size + 1 elements, found none")
    check_index(layout.cu_seqlens_k, "cu_seqlens_k", q, (batch_size + 1,))
    check_index(layout.seqused_q, "seqused_q", q, (batch_size,))
    check_index(layout.seqused_k, "seqused_k", q, (batch_size,))
    check_index(layout.leftpad_k, "leftpad_k", q, (batch_size,))
    rows = batch_size if layout.cache_batch_idx is None else None
    check_index(layout.page_table, "block_table", q, (rows, None))
    check_index(layout.cache_batch_idx, "cache_batch_idx", q, (batch_size,))
    if layout.page_table is not None and batch_size > 0 == layout.page_table.shape[0]:
        raise ConstraintError(
            f"`block_table` must have at least one row, found {tuple(layout.page_table.shape)}"
        )
    if layout.page_table is not None:
        if k.shape[1] == 0 and k.shape[0] > 0:
            raise ConstraintError("`k` must have pages of at least one row, found page size 0")
    elif layout.cu_seqlens_k is None and layout.cache_batch_idx is None:
        require(
            k.shape[0] == batch_size,
            f"`k` must have batch size {batch_size} like `q`, found {k.shape[0]}",
        )
    for name, value in (
        ("max_seqlen_q", layout.max_seqlen_q),
        ("max_seqlen_k", layout.max_seqlen_k),
    ):
        require(value >= 0, f"`{name}` must not be negative, found {value}")


def _check_scores(problem: AttentionProblem) -> None:
    transform, dropout_p, q = problem.transform, problem.dropout_p, problem.q
    for name, x in (("softmax_scale", transform.softmax_scale), ("softcap", transform.softcap)):
        require(math.isfinite(x), f"`{name}` must be finite, found {x}")
    require(0.0 <= dropout_p < 1.0, f"`dropout_p` must be in [0, 1), found {dropout_p}")
    if transform.softcap > 0.0 and dropout_p > 0.0:
        raise ConstraintError(
            "Softcapping does not support dropout for now: `softcap` is "
            f"{transform.softcap} and `dropout_p` is {dropout_p}; set one of them to 0"
        )
    slopes = transform.alibi_slopes
    if slopes is not None:
        if not isinstance(slopes, Tensor) or slopes.dtype != torch.float32:
            found = _name(slopes.dtype) if isinstance(slopes, Tensor) else type(slopes).__name__
            raise ConstraintError(f"ALiBi slopes must have dtype fp32: `alibi_slopes` is {found}")
        check_device(slopes, "alibi_slopes", q)
        shapes = ((problem.nheads,), (problem.batch_size, problem.nheads))
        if tuple(slopes.shape) not in shapes:
            raise ConstraintError(
                f"`alibi_slopes` must have shape {shapes[0]} or {shapes[1]}, found "
                f"{tuple(slopes.shape)}"
            )
        check_last_stride(slopes, "alibi_slopes")
    splits = problem.num_splits
    if splits > MAX_SPLITS:
        raise ConstraintError(f"num_splits > {MAX_SPLITS} not supported: `num_splits` is {splits}")
    require(splits >= 0, f"`num_splits` must be 0 (chosen for you) or positive, found {splits}")


def _check_mask(problem: AttentionProblem) -> None:
    """``attn_mask`` is a bool or floating tensor that broadcasts over the scores."""
    mask, q = problem.transform.attn_mask, problem.q
    if mask is None:
        return
    shape = "(1 or batch_size, 1 or nheads, 1 or seqlen_q, 1 or seqlen_k)"
    check_tensor(mask, "attn_mask", 4, shape)
    check_device(mask, "attn_mask", q)
    if mask.dtype not in (torch.bool, *_DTYPES):
        raise ConstraintError(
            f"`attn_mask` must be bool or floating, found {_name(mask.dtype)}; use "
            "attn_mask.bool() where it marks the keys to see"
        )
    wanted = (
        (1, problem.batch_size),
        (1, problem.nheads),
        (1, problem.max_seqlen_q),
        (1, problem.max_seqlen_k),
    )
    # Lengths of packed sequences are known on the device only: the mask may be larger.
    packed_k = problem.layout.cu_seqlens_k is not None or problem.is_paged
    exact = (True, True, not problem.is_varlen_q, not packed_k)
    for dim, (sizes, is_exact) in enumerate(zip(wanted, exact, strict=True)):
        size = mask.shape[dim]
        if size not in sizes and (is_exact or size < sizes[1]):
            raise ConstraintError(
                f"`attn_mask` must have shape {shape}, here {tuple(most for _, most in wanted)}, "
                f"found {tuple(mask.shape)}"
            )


def _check_extensions(problem: AttentionProblem) -> None:
    """Sinks, a second product, descales, output dtype and hints."""
    transform, q, qv = problem.transform, problem.q, problem.qv
    sinks = transform.sinks
    if sinks is not None:
        check_tensor(sinks, "s_aux", 1, "(nheads,)")
        check_device(sinks, "s_aux", q)
        if sinks.shape[0] != problem.nheads or sinks.dtype not in _DTYPES:
            raise ConstraintError(
                f"`s_aux` must be floating of shape {(problem.nheads,)}, found "
                f"{_name(sinks.dtype)} of shape {tuple(sinks.shape)}"
            )
    if qv is not None:
        check_tensor(qv, "qv", q.dim(), "like `q` with the head dim of `v`")
        check_like(qv, "qv", q)
        check_last_stride(qv, "qv")
        if tuple(qv.shape) != problem.out_shape:
            raise ConstraintError(
                f"`qv` must have shape {problem.out_shape}, found {tuple(qv.shape)}"
            )
    for name in ("q_descale", "k_descale", "v_descale"):
        _check_descale(problem, getattr(transform, name), name)
    if problem.result_dtype not in _DTYPES:
        raise ConstraintError(
            f"`out_dtype` must be a floating dtype of 16 bits or more, found "
            f"{_name(problem.result_dtype)}"
        )
    require(
        isinstance(problem.sm_margin, int) and problem.sm_margin >= 0,
        f"`sm_margin` must not be negative, found {problem.sm_margin!r}",
    )
    chunk = problem.visibility.attention_chunk
    require(chunk < 2**29, f"`attention_chunk` must be below 2**29, found {chunk}")
    if is_float8(q.dtype) and problem.dropout_p > 0.0:
        raise ConstraintError(
            f"float8 inputs do not support dropout: `dropout_p` is {problem.dropout_p}; set it to 0"
        )


def _check_descale(problem: AttentionProblem, descale: Tensor | None, name: str) -> None:
    if descale is None:
        return
    check_tensor(descale, name, 2, "(batch_size, nheads_k)")
    check_device(descale, name, problem.q)
    heads = {problem.nheads_k, problem.nheads if name == "q_descale" else problem.nheads_k}
    fits = descale.shape[0] == problem.batch_size and descale.shape[1] in heads
    if not fits or descale.dtype != torch.float32:
        raise ConstraintError(
            f"`{name}` must be float32 of shape {(problem.batch_size, problem.nheads_k)}, found "
            f"{_name(descale.dtype)} of shape {tuple(descale.shape)}"
        )
    if not is_float8(problem.q.dtype):
        raise ConstraintError(
            f"`{name}` is for float8 inputs: `q` has dtype {_name(problem.q.dtype)}; leave it out"
        )


def check_backward(problem: AttentionProblem, dout: Tensor, out: Tensor, lse: Tensor) -> None:
    """What a backward call adds to a valid problem."""
    layout = problem.layout
    if layout.page_table is not None or layout.cache_batch_idx is not None:
        raise ConstraintError(
            "the backward pass needs plain `k` and `v`: it does not support `block_table` or "
            "`cache_batch_idx`"
        )
    if layout.leftpad_k is not None:
        raise ConstraintError("the backward pass does not support `leftpad_k`")
    if problem.qv is not None:
        raise ConstraintError("the backward pass does not support `qv`: it has no gradient")
    if is_float8(problem.q.dtype):
        raise ConstraintError(
            f"the backward pass does not support float8: `q` has dtype {_name(problem.q.dtype)}"
        )
    if problem.result_dtype != problem.q.dtype:
        raise ConstraintError(
            f"the backward pass needs an output like `q`: `out_dtype` is "
            f"{_name(problem.result_dtype)}, `q` has dtype {_name(problem.q.dtype)}; leave it out"
        )
    for x, name in ((dout, "dout"), (out, "out")):
        if tuple(x.shape) != problem.out_shape:
            raise ConstraintError(
                f"`{name}` must have shape {problem.out_shape}, found {tuple(x.shape)}"
            )
        check_like(x, name, problem.q)
        check_last_stride(x, name)
    if tuple(lse.shape) != problem.lse_shape or lse.dtype != torch.float32:
        raise ConstraintError(
            f"`softmax_lse` must be float32 of shape {problem.lse_shape}, found "
            f"{_name(lse.dtype)} of shape {tuple(lse.shape)}"
        )
    check_device(lse, "softmax_lse", problem.q)


def check_state(rng_state: Tensor, q: Tensor) -> None:
    """What replays a dropout mask."""
    if rng_state.dtype != torch.int64 or tuple(rng_state.shape) != (2,):
        raise ConstraintError(
            "`rng_state` must be int64 of shape (2,), as the forward pass returned it, found "
            f"{_name(rng_state.dtype)} of shape {tuple(rng_state.shape)}"
        )
    check_device(rng_state, "rng_state", q)


def check_not_expanded(x: Tensor, name: str) -> None:
    """Every element of ``x``, which is written to, has a place of its own; without elements strides
    do not matter."""
    steps = zip(x.shape, x.stride(), strict=True)
    if any(size > 1 and step == 0 for size, step in steps) and x.numel() > 0:
        raise ConstraintError(
            f"`{name}` is written to and must not be expanded, found strides {x.stride()}"
        )


def check_out(x: Tensor, problem: AttentionProblem) -> None:
    """A caller's output buffer fits the problem."""
    if tuple(x.shape) != problem.out_shape or x.dtype != problem.result_dtype:
        raise ConstraintError(
            f"`out` must be {_name(problem.result_dtype)} of shape {problem.out_shape}, found "
            f"{_name(x.dtype)} of shape {tuple(x.shape)}"
        )
    check_device(x, "out", problem.q)
    check_last_stride(x, "out")
    check_not_expanded(x, "out")


def check_gradient(x: Tensor, name: str, like: Tensor, any_strides: bool = False) -> None:
    """A caller's gradient buffer fits the tensor whose gradient it takes."""
    if x.shape != like.shape:
        raise ConstraintError(
            f"`{name}` must have shape {tuple(like.shape)}, found {tuple(x.shape)}"
        )
    check_like(x, name, like)
    check_not_expanded(x, name)
    if not any_strides:
        check_last_stride(x, name)


def check_contents(problem: AttentionProblem) -> None:
    """Look into the length and index tensors (FLASH_ATTN_CHECK=1); synchronises."""
    layout = problem.layout
    for cu, name, total in (
        (layout.cu_seqlens_q, "cu_seqlens_q", problem.q.shape[0]),
        (layout.cu_seqlens_k, "cu_seqlens_k", None if problem.is_paged else problem.k.shape[0]),
    ):
        if cu is not None:
            check_cu_seqlens(cu.tolist(), name, total)
    capacity = problem.max_seqlen_k
    if layout.cu_seqlens_q is None:
        check_range(layout.seqused_q, "seqused_q", 0, problem.max_seqlen_q)
    elif layout.seqused_q is not None:
        _check_at_most(layout.seqused_q, "seqused_q", layout.cu_seqlens_q.diff(), "cu_seqlens_q")
    if layout.cu_seqlens_k is None:
        check_range(layout.seqused_k, "cache_seqlens", 0, capacity)
    elif layout.seqused_k is not None:
        _check_at_most(layout.seqused_k, "seqused_k", layout.cu_seqlens_k.diff(), "cu_seqlens_k")
    check_range(layout.leftpad_k, "cache_leftpad", 0, capacity)
    if layout.leftpad_k is not None and layout.seqused_k is not None:
        _check_at_most(layout.leftpad_k, "cache_leftpad", layout.seqused_k, "cache_seqlens")
    rows = (problem.k if layout.page_table is None else layout.page_table).shape[0]
    check_range(layout.cache_batch_idx, "cache_batch_idx", 0, rows - 1)
    _check_pages(problem)


def check_cu_seqlens(bounds: list[int], name: str, total: int | None) -> None:
    require(bounds[0] == 0, f"`{name}` must start with 0, found {bounds[0]}")
    for before, after in zip(bounds, bounds[1:], strict=False):
        require(after >= before, f"`{name}` must not decrease, found {before} before {after}")
    if total is not None:
        require(
            bounds[-1] <= total, f"`{name}` must end at most at {total} rows, found {bounds[-1]}"
        )


def check_range(x: Tensor | None, name: str, low: int, high: int) -> None:
    if x is None or x.numel() == 0:
        return
    smallest, largest = int(x.min()), int(x.max())
    require(
        low <= smallest and largest <= high,
        f"`{name}` must be between {low} and {high}, found {smallest} to {largest}",
    )


def _check_at_most(x: Tensor, name: str, bound: Tensor, bound_name: str) -> None:
    bad = (x < 0) | (x > bound)
    if bool(bad.any()):
        raise ConstraintError(
            f"`{name}` must be between 0 and the lengths of `{bound_name}`, "
            f"{bound[bad][:3].tolist()}, found {x[bad][:3].tolist()}"
        )


def _check_pages(problem: AttentionProblem) -> None:
    """Only the pages that lie within a sequence's length must be valid."""
    table, layout = problem.layout.page_table, problem.layout
    if table is None:
        return
    lengths = layout.seqused_k
    if lengths is None and layout.cu_seqlens_k is not None:
        lengths = layout.cu_seqlens_k.diff()
    if layout.cache_batch_idx is not None:
        table = table[layout.cache_batch_idx.long()]
    pages, page_size = problem.k.shape[:2]
    used = torch.ones_like(table, dtype=torch.bool)
    if lengths is not None:
        first_key = torch.arange(table.shape[1], device=table.device) * page_size
        used = first_key[None, :] < lengths[:, None]
    bad = table[used & ((table < 0) | (table >= pages))]
    require(
        bad.numel() == 0,
        f"`block_table` must hold page numbers from 0 to {pages - 1}, found "
        f"{bad[:3].tolist() if bad.numel() else ''}",
    )


def check_flash_2(layout: SequenceLayout, num_splits: int) -> None:
    """FlashAttention-2's own limits, which later interfaces do not have."""
    if num_splits > 128:
        raise ConstraintError(f"num_splits > 128 not supported: `num_splits` is {num_splits}")
    if layout.page_table is None:
        return
    if layout.cu_seqlens_q is not None and num_splits > 1:
        raise ConstraintError(
            f"num_splits > 1 is not supported for varlen paged KV: `num_splits` is {num_splits}"
        )
    if layout.leftpad_k is not None:
        raise ConstraintError(
            "We don't support Paged KV and leftpad_k running at the same time yet: pass either "
            "`block_table` or `cache_leftpad`"
        )
    if layout.cache_batch_idx is not None:
        raise ConstraintError(
            "Paged KVcache does not support cache_batch_idx: pass either `block_table` or "
            "`cache_batch_idx`"
        )


def check_same_headdim(q: Tensor, k: Tensor, v: Tensor) -> None:
    """FlashAttention-2's interface has one head dim for all tensors."""
    # A wrong `k` is reported with all else that is checked of it.
    if v.shape[-1:] != q.shape[-1:] and k.shape[-1:] == q.shape[-1:]:
        raise ConstraintError(
            f"`v` must have head dim {q.shape[-1]} like `q`, found {v.shape[-1]}; "
            "flash_attn_interface.flash_attn_func takes a head dim of v of its own"
        )
