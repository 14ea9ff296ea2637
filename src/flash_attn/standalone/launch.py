"""From a checked call to an attention problem, and its solution on a stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import settings
from ..core import validate
from ..core.attend import attend
from ..core.device import arch_of
from ..core.kvcache import attend_with_kvcache
from ..core.problem import (
    AttentionProblem,
    ScoreTransform,
    SequenceLayout,
    Visibility,
    is_float8,
    make_transform,
)
from ..errors import ConstraintError
from .call import MEMORY, Call, integer
from .checks import (
    check,
    check_agreement,
    descale_extent,
    descale_shape,
    descale_strides,
    types_of,
)
from .memory import stream_of, tensor_of, wait_for_producer
from .params import FlashAttentionParams, Refused

Tensors = dict[str, Tensor]

# The core's names of our parameters, in its messages about contents.
_FIELDS = {"cache_seqlens": "seqused_k", "block_table": "page_table", "cache_leftpad": "leftpad_k"}


def compute(params: FlashAttentionParams, stream: Any, strict: bool) -> None:
    """Check the call and compute it on ``stream``.

    Raises:
        Refused: the parameters break a rule.
        Exception: whatever the launch raises.
    """
    call = Call(params, strict)
    look = partial(_check_contents, stream=stream) if settings.CHECK_INDICES else None
    check(call, look)
    tensors = _tensors(call)
    if strict:
        _check_architecture(tensors["q"].device)
    call.memory.update(
        (name, found._replace(device=tensors[name].device)) for name, found in call.memory.items()
    )
    check_agreement(call)
    with torch.no_grad(), _on_stream(stream, params, tensors):
        _run(call, tensors)


def _tensors(call: Call) -> Tensors:
    """Views of all memory that is not null."""
    found: Tensors = {}
    for name in MEMORY:
        if name not in call.memory:
            continue
        memory, types = call.memory[name], types_of(call, name)
        if memory.fault:
            raise Refused(-24, f"`{name}` {memory.fault}")
        is_tensor = isinstance(getattr(call.params, name), Tensor)
        if not is_tensor and not torch.cuda.is_available():
            if call.strict:
                _check_architecture(None)
            raise Refused(
                -100, f"`{name}` is GPU memory, but there is no GPU: pass tensors to run on the CPU"
            )
        dtype = next((x for x in types if x == memory.dtype), types[0])
        found[name] = tensor_of(getattr(call.params, name), dtype, _address_shape(call, name))
    return found


def _address_shape(call: Call, name: str) -> tuple[int, ...]:
    if not call.memory[name].is_address:
        return ()
    if name.endswith("_descale_ptr"):
        return (descale_extent(descale_shape(call, name), descale_strides(call, name)),)
    return call.shape_at_address(name)


def _check_architecture(device: torch.device | None) -> None:
    if device is None or device.type != "cuda":
        where = "there is no GPU" if device is None else f"`q` is on {device}"
        raise Refused(-23, f"strict=True runs on Hopper GPUs alone, but {where}")
    arch = arch_of(device.index or 0)
    if arch != "sm90":
        raise Refused(-23, f"strict=True runs on Hopper GPUs (sm90) alone, found {arch}")


def _check_contents(call: Call, stream: Any) -> None:
    """FLASH_ATTN_CHECK=1: what the index tensors hold; synchronises."""
    try:
        tensors = _tensors(call)
        with _on_stream(stream, call.params, tensors):
            problem, _ = _problem(call, tensors)
            validate.check_contents(problem)
            _check_room(call, problem)
    except ConstraintError as error:
        message = str(error)
        for name, field in _FIELDS.items():
            message = message.replace(name, field)
        raise Refused(-9, message) from error
    except Exception:  # what is wrong with the rest has a later place in the order
        return


def _check_room(call: Call, problem: AttentionProblem) -> None:
    """The appended rows lie within the cache."""
    used = problem.layout.seqused_k
    if not call.has("k_new") or used is None or used.numel() == 0:
        return
    most = int(used.max()) + call.sizes["seqlen_knew"]
    validate.require(
        most <= problem.max_seqlen_k,
        f"`seqused_k` and `seqlen_knew` need room for {most} keys, found {problem.max_seqlen_k}",
    )


def _on_stream(
    stream: Any, params: FlashAttentionParams, tensors: Tensors
) -> AbstractContextManager[object]:
    """Make ``stream`` the current one, ordered after what array interfaces ask for."""
    device = tensors["q"].device
    if device.type != "cuda":
        if stream in (None, 0):
            return nullcontext()
        raise Refused(-24, f"`stream` must be None for tensors on the CPU, found {stream!r}")
    if stream is None:
        chosen = torch.cuda.current_stream(device)
    elif isinstance(stream, torch.cuda.Stream):
        chosen = stream
    else:
        handle = None if isinstance(stream, bool) else integer(stream)
        if handle is None or handle < 0:
            raise Refused(-8, f"`stream` must be a CUDA stream or its handle, found {stream!r}")
        chosen = stream_of(handle, device)
    if chosen.device != device:
        raise Refused(-24, f"`stream` is on {chosen.device}, but `q` on {device}")
    is_other = chosen != torch.cuda.current_stream(device)
    with torch.cuda.stream(chosen):
        for name, x in tensors.items():
            wait_for_producer(getattr(params, name), device)
            if is_other:
                x.record_stream(chosen)  # freed early, its memory waits for the stream
    return torch.cuda.stream(chosen)


def _run(call: Call, tensors: Tensors) -> None:
    problem, out = _problem(call, tensors)
    if call.has("k_new"):
        result = attend_with_kvcache(
            problem,
            tensors["k_new"],
            tensors["v_new"],
            tensors.get("rotary_cos"),
            tensors.get("rotary_sin"),
            bool(call.params.is_rotary_interleaved),
            out,
        )
    else:
        result = attend(problem, out)
    if "softmax_lse" in tensors:
        tensors["softmax_lse"].copy_(result.softmax_lse)
    if "rng_state" in tensors and problem.dropout_p > 0.0:
        tensors["rng_state"].view(torch.int64).copy_(result.rng_state)


def _merge_heads(call: Call, name: str, x: Tensor) -> Tensor:
    """The PackGQA view as the plain one."""
    return x.flatten(-3, -2) if call.is_packed_view(name) else x


def _problem(call: Call, tensors: Tensors) -> tuple[AttentionProblem, Tensor]:
    """The problem of a call before appending, and where its output goes."""
    params, numbers = call.params, call.numbers
    q, out = (_merge_heads(call, name, tensors[name]) for name in ("q", "out"))
    visibility = Visibility.from_window(
        numbers["window_size_left"], numbers["window_size_right"], bool(params.is_causal)
    )
    problem = AttentionProblem(
        q,
        tensors["k"],
        tensors["v"],
        _transform(call, tensors),
        visibility,
        _layout(call, tensors),
        dropout_p=float(params.p_dropout),
        num_splits=max(integer(params.num_splits) or 0, 0),
        empty_lse=float("-inf"),
        out_dtype=out.dtype if is_float8(q.dtype) else None,
        pack_gqa=True if params.pack_gqa or call.is_packed_view("q") else None,
    )
    return problem, out


def _transform(call: Call, tensors: Tensors) -> ScoreTransform:
    scale = float(call.params.softmax_scale)
    plain = make_transform(call.sizes["head_dim"], scale or None, float(call.params.softcap))
    return plain._replace(
        attn_mask=tensors.get("attn_mask"),
        q_descale=_descale(call, tensors, "q_descale_ptr"),
        k_descale=_descale(call, tensors, "k_descale_ptr"),
        v_descale=_descale(call, tensors, "v_descale_ptr"),
    )


def _descale(call: Call, tensors: Tensors, name: str) -> Tensor | None:
    """(batch_size, heads) view of a descale with the strides of the parameters."""
    if name not in tensors:
        return None
    return tensors[name].as_strided(descale_shape(call, name), descale_strides(call, name))


def _layout(call: Call, tensors: Tensors) -> SequenceLayout:
    seqused_k = tensors.get("seqused_k")
    seqlen_k = call.sizes["seqlen_k"]
    if call.paged and not call.varlen and seqused_k is None and seqlen_k < call.capacity:
        batch_size, device = call.sizes["batch_size"], tensors["q"].device
        seqused_k = torch.full((batch_size,), seqlen_k, dtype=torch.int32, device=device)
    cu_seqlens_k = tensors.get("cu_seqlens_k")
    if call.has("k_new") and cu_seqlens_k is not None:
        # Keys grow: their bounds are lengths before appending.
        lengths = cu_seqlens_k.diff()
        seqused_k = lengths if seqused_k is None else torch.minimum(lengths, seqused_k)
        cu_seqlens_k = None
    return SequenceLayout(
        cu_seqlens_q=tensors.get("cu_seqlens_q"),
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=tensors.get("seqused_q"),
        seqused_k=seqused_k,
        leftpad_k=tensors.get("leftpad_k"),
        page_table=tensors.get("page_table"),
        cache_batch_idx=tensors.get("kv_batch_idx"),
        max_seqlen_q=_max_seqlen(call, tensors, "q"),
        max_seqlen_k=_max_seqlen(call, tensors, "k"),
    )


def _max_seqlen(call: Call, tensors: Tensors, side: str) -> int:
    """A bound on the packed lengths that needs no look at the device."""
    if not call.varlen:
        return 0
    given = call.numbers[f"max_seqlen_{side}"]
    if given:
        return given
    mask = tensors.get("attn_mask")
    size = 1 if mask is None else mask.shape[2 if side == "q" else 3]
    return size if size > 1 else call.sizes[f"total_{side}"]
