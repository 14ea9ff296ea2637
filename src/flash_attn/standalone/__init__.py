"""The standalone Hopper API: one record of parameters, one call, an integer for an answer.

Its names, fields and codes are those of the "Flash Attention V2" standalone build, a C++ wrapper
around FlashAttention-3; "V2" counts revisions of that API. With ``strict=True`` (the default) a
call is answered as that build answers: what it does not support is refused with its code, and only
Hopper GPUs (sm90) compute. With ``strict=False`` everything is computed: bfloat16, softcap,
PackGQA, split-KV, pages, rotary embedding with appended keys, dropout, masks, left padding, every
head dim up to 256, causal windows, other GPUs, and tensors on the CPU.

Nothing here raises for bad parameters: rules are checked in the order of their codes, -1 to -9, -10
to -19, -20 to -24, then -100 for what goes wrong in the launch. There is no backward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ..errors import ConstraintError
from .call import Call, integer
from .checks import check, check_agreement
from .launch import compute
from .params import (
    ERROR_STRINGS,
    AttentionMode,
    DataType,
    FlashAttentionParams,
    Refused,
)

__all__ = [
    "AttentionMode",
    "DataType",
    "FlashAttentionParams",
    "flash_attention_forward",
    "get_error_string",
    "get_last_error_message",
    "get_workspace_size",
    "validate_params",
]


class _LastError(threading.local):
    message = ""


_last_error = _LastError()


def _code_of(action: Callable[[], None]) -> int:
    """Run ``action``; its failure becomes a code and this thread's message."""
    _last_error.message = ""
    try:
        action()
    except Refused as refusal:
        _last_error.message = str(refusal)
        return refusal.code
    except ConstraintError as error:
        _last_error.message = str(error)
        return -8
    except Exception as error:
        _last_error.message = f"{type(error).__name__}: {error}"
        return -100
    return 0


def _check_type(params: object) -> None:
    if not isinstance(params, FlashAttentionParams):
        raise Refused(-1, f"`params` must be FlashAttentionParams, found {type(params).__name__}")


def flash_attention_forward(
    params: FlashAttentionParams, stream: Any = None, *, strict: bool = True
) -> int:
    """Write attention into ``params.out``, and ``params.softmax_lse`` if it is given.

    The call returns before the GPU has finished. Memory given as a tensor may be freed then.

    Args:
        params: the call; neither it nor its inputs change, except that ``k_new`` and ``v_new`` are
            written into ``k`` and ``v``, and ``rng_state`` is filled.
        stream: a ``torch.cuda.Stream`` or the handle of a CUDA stream as an integer; None is
            PyTorch's current stream of q's GPU.
        strict: whether to refuse what the original build does not support.

    Returns:
        0, or the code of the first broken rule: :func:`get_error_string` names it and
        :func:`get_last_error_message` says what was found.
    """

    def action() -> None:
        _check_type(params)
        compute(params, stream, strict)

    return _code_of(action)


def validate_params(params: FlashAttentionParams, *, strict: bool = True) -> int:
    """The code that the parameters alone decide, without touching memory or a GPU.

    Unlike :func:`flash_attention_forward` it does not ask for a Hopper GPU (-23), does not look
    into index tensors and cannot see where addresses lie.
    """

    def action() -> None:
        _check_type(params)
        call = Call(params, strict)
        check(call)
        check_agreement(call)

    return _code_of(action)


def get_error_string(code: int) -> str:
    """What a code means; "Unknown error" for other numbers."""
    number = integer(code)
    return ERROR_STRINGS.get(1 if number is None else number, "Unknown error")


def get_last_error_message() -> str:
    """Why this thread's latest call failed, naming the parameter; "" if it did not."""
    return _last_error.message


def get_workspace_size(params: FlashAttentionParams) -> int:
    """Bytes of scratch memory that the caller must provide: always 0."""
    return 0
