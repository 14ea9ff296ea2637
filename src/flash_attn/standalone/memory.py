"""What stands behind a memory argument: a tensor, an array interface or an address."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The types that an array interface can name; it has no word for bfloat16 and float8.
_TYPESTRS = {
    "|b1": torch.bool,
    "|i1": torch.int8,
    "|u1": torch.uint8,
    "<i2": torch.int16,
    "<u2": torch.uint16,
    "<i4": torch.int32,
    "<u4": torch.uint32,
    "<i8": torch.int64,
    "<u8": torch.uint64,
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
}
_INTEGERS = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8"}


class Described(NamedTuple):
    """What can be said about memory without touching its device.

    Attributes:
        shape: None where it is not known, as of an address.
        strides: in elements.
        dtype: None where it is not known.
        device: None where it is not known: addresses and array interfaces name none.
        address: where the first element lies; 0 where there is none.
        is_address: whether the argument is an integer.
        is_raw: whether integers may stand for other types of the same size (array interfaces).
        read_only: whether the owner forbids writing.
        fault: why the argument cannot be used, or "".
    """

    shape: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    address: int = 0
    is_address: bool = False
    is_raw: bool = False
    read_only: bool = False
    fault: str = ""

    def stands_for(self, dtype: torch.dtype) -> bool:
        """Whether the elements are integers that hold the bits of ``dtype``."""
        if not self.is_raw or self.dtype is None or self.dtype == torch.bool:
            return False
        return not self.dtype.is_floating_point and self.dtype.itemsize == dtype.itemsize

    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        if self.shape is None or self.strides is None or 0 in self.shape:
            return True
        packed = zip(self.shape, self.strides, row_major(self.shape), strict=True)
        return all(size == 1 or step == wanted for size, step, wanted in packed)


def describe(x: Any) -> Described | None:
    """What is known of ``x``; None for null pointers. Never raises."""
    if x is None:
        return None
    try:
        if isinstance(x, Tensor):
            if x.layout != torch.strided:
                return Described(fault=f"must be a strided tensor, found {x.layout}")
            return Described(tuple(x.shape), x.stride(), x.dtype, x.device, x.data_ptr())
        interface = getattr(x, "__cuda_array_interface__", None)
        if interface is not None:
            return _describe_interface(interface)
        if isinstance(x, bool):
            raise TypeError
        address = operator.index(x)
    except TypeError:
        fault = (
            "must be a tensor, an object with __cuda_array_interface__ or an integer address, "
            f"found {type(x).__name__}"
        )
        return Described(fault=fault)
    except Exception as error:  # objects of strangers raise what they like
        return Described(fault=f"cannot be read ({type(error).__name__}: {error})")
    if address == 0:
        return None
    if not 0 < address < 2**64:
        return Described(fault=f"must be an address below 2**64, found {address}")
    return Described(address=address, is_address=True)


def _describe_interface(interface: dict[str, Any]) -> Described | None:
    shape, typestr = tuple(int(n) for n in interface["shape"]), interface["typestr"]
    address, read_only = interface["data"]
    dtype = _TYPESTRS.get(typestr)
    if not address and 0 not in shape:
        return None
    if dtype is None:
        return Described(fault=f"has elements of the unknown type {typestr!r}")
    byte_strides = interface.get("strides")
    if byte_strides is None:
        strides = row_major(shape)
    else:
        strides = tuple(step // dtype.itemsize for step in byte_strides)
    return Described(
        shape, strides, dtype, None, int(address), is_raw=True, read_only=bool(read_only)
    )


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of packed memory of ``shape``."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class _Interface:
    """Lets PyTorch take memory at an address, as integers of some size."""

    def __init__(self, address: int, shape: tuple[int, ...], itemsize: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": _INTEGERS[itemsize],
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def tensor_of(x: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor on the memory of ``x``, without a copy.

    Args:
        x: what :func:`describe` found usable.
        dtype: of the elements, where ``x`` does not say it itself.
        shape: of an address, row-major.

    Raises:
        RuntimeError: an address or array interface is not of GPU memory.
    """
    if isinstance(x, Tensor):
        return x.detach()
    if not hasattr(x, "__cuda_array_interface__"):
        x = _Interface(operator.index(x), shape, dtype.itemsize)
    found = torch.as_tensor(x)
    is_raw = not found.dtype.is_floating_point and found.dtype.itemsize == dtype.itemsize
    return found.view(dtype) if is_raw else found


def wait_for_producer(x: Any, device: torch.device) -> None:
    """Order the current stream of ``device`` after the one that an array interface names."""
    if isinstance(x, Tensor):
        return
    handle = getattr(x, "__cuda_array_interface__", {}).get("stream")
    if handle is not None:
        torch.cuda.current_stream(device).wait_stream(stream_of(handle, device))


def stream_of(handle: int, device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream with ``handle`` on ``device``; 0 and 1 are the default stream."""
    if handle in (0, 1):
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(handle, device=device)
