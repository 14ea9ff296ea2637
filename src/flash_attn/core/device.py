"""Facts about the device of a tensor, asked for once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def arch_of(index: int) -> str:
    """ "sm90", "gfx942", ...: the architecture of GPU ``index``."""
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{major}{minor}"


@lru_cache(maxsize=64)
def multiprocessors_of(index: int) -> int:
    """How many multiprocessors GPU ``index`` has."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@lru_cache(maxsize=64)
def side_stream(index: int) -> torch.cuda.Stream:
    """A second stream on GPU ``index``, for kernels that may overlap."""
    return torch.cuda.Stream(device=index)


def guard(x: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches on the current device."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
