"""Whether anybody would notice if a call went past PyTorch's dispatcher.

The registered operators cost several microseconds. An eager call on plain tensors may go to their
implementation directly, unless something is there to see operators.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .derivatives import takes_tangents

logger = logging.getLogger("flash_attn")

_is_compiling = torch.compiler.is_compiling
# PyTorch has no public names for these.
try:
    _dispatch_modes = torch._C._len_torch_dispatch_stack
    _function_modes = torch._C._len_torch_function_stack
    _transforms = torch._C._functorch.peek_interpreter_stack
    _tracing = torch._C._get_tracing_state
    _profiling = torch._C._autograd._profiler_enabled
    CAN_TELL = True
except AttributeError as error:
    logger.info("every call goes through the dispatcher: in torch %s, %s", torch.__version__, error)
    CAN_TELL = False


def nobody_watches() -> bool:
    """Whether no compiler, mode, function transform, tangent, tracer or profiler is at work."""
    return CAN_TELL and not (
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms() is not None
        or _tracing() is not None
        or _profiling()
        or takes_tangents()
    )


def is_unobserved(*tensors: Tensor | None) -> bool:
    """Whether nobody watches, and all of ``tensors`` are of PyTorch's own class and lie in memory
    as they are meant."""
    if not nobody_watches():
        return False
    for x in tensors:  # noqa: SIM110  (a generator costs more)
        if x is not None and (
            type(x) is not Tensor or x.is_meta or x.is_neg() or x._is_zerotensor()
        ):
            return False
    return True
