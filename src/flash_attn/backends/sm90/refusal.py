"""Where Triton does not compile a kernel: said as an error of its own, so that others take over.

Gluon changes between releases of Triton. Whatever goes wrong in the compiler must not keep a
program from computing attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch
import triton

from ...core.toolchain import explanation
from ...errors import FlashAttentionError, KernelCompilationError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def reports_refusal(launch: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function that launches kernels: errors of the compiler become
    :class:`~flash_attn.errors.KernelCompilationError`."""

    @wraps(launch)
    def launched(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return launch(*args, **kwargs)
        except Exception as error:
            if not is_refusal(error):
                raise
            lines = [line for line in str(error).splitlines() if line.strip()]
            said = f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
            text = f"has a kernel that Triton {triton.__version__} does not compile ({said})"
            raise KernelCompilationError(text) from error

    return launched


def is_refusal(error: Exception) -> bool:
    """Whether ``error`` comes from Triton's compiler and not from the GPU, a lack of memory, or
    what every kernel needs."""
    if isinstance(error, (FlashAttentionError, MemoryError, OSError)):
        return False
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return False
    if str(error).startswith(("Triton Error", "CUDA error")) or explanation(error) is not None:
        return False
    return _passed_through_triton(error.__traceback__)


def _passed_through_triton(traceback: TracebackType | None) -> bool:
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        if name == "triton" or name.startswith("triton."):
            return True
        traceback = traceback.tb_next
    return False
