"""Launches by CUDA's driver library, with parameters that stay in memory.

Triton's C function takes one Python object for every argument of every launch: 94 for the Hopper
forward kernel, of which a dozen differ from the launch before. :func:`prepare` writes the others
down once, as the driver reads them; a launch writes those that differ beside them and calls the
driver through ctypes.

What is handed over is what Triton hands over, whose kernels have one parameter for each argument
that is no constexpr and two more for scratch memory. A compiled kernel's text tells how many
parameters it has and how large each one is: where that is not what was expected, Triton's function
stays in use. (The driver could be asked, but for their number only by asking for one too many, an
error that its tools report.)
"""

from __future__ import annotations

import ctypes
import re
import struct
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

Launch = Callable[[int, list[int]], object]
"""``launch(stream, addresses)``."""

MAP_BYTES = 128
# Triton's types of arguments as struct has them; others are left to Triton.
_FORMATS = {
    "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
_CONSTANT, _MAP = "constexpr", "nvTmaDesc"
# CUlaunchConfig by words of eight bytes: grid x y, grid z and block x, block y z, bytes of shared
# memory, stream, where attributes are, how many. One CUlaunchAttribute of nine words follows, then
# the values of parameters, then where those are.
_STREAM, _ATTRIBUTES, _FIRST_ATTRIBUTE, _FIRST_VALUE = 4, 5, 7, 16
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_SCRATCH = 2
# From here on newer Tritons set an attribute.
_MOST_SHARED = 228 << 10
# In PTX, the parameters of a kernel and what follows .param: a type, or an array of bytes.
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+([^,]*)")
_SCALAR = re.compile(r"\.[a-z]+(\d+)\b")
_BYTES = re.compile(r"\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]")


class Unprepared(Exception):
    """Why Triton's function stays in use."""


@cache
def library() -> Callable[..., int]:
    """The driver's cuLaunchKernelEx, which returns 0 if all went well.

    Raises:
        OSError, AttributeError: there is none.
    """
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx


def parameter_sizes(ptx: str, kernel: str) -> list[int]:
    """Bytes of each parameter of a kernel, of its text.

    Raises:
        Unprepared: the text does not tell.
    """
    entries = {entry[1]: entry[2] for entry in _ENTRY.finditer(ptx)}
    if kernel not in entries:
        raise Unprepared(f"{kernel} is not in its text")
    sizes = []
    for parameter in _PARAMETER.findall(entries[kernel]):
        if array_of := _BYTES.match(parameter):
            sizes.append(int(array_of[1]))
        elif scalar := _SCALAR.match(parameter):
            sizes.append(int(scalar[1]) // 8)
        else:
            raise Unprepared(f"a parameter {parameter!r}")
    return sizes


def kinds_of(signature: Sequence[Any], maps: Sequence[Any]) -> list[str]:
    """What stands for each argument in the driver's place, of a compiled kernel's signature: a
    descriptor, one for each of ``maps``, becomes a tensor map, its shape and its strides."""
    kinds = []
    for kind in signature:
        if not isinstance(kind, str):
            raise Unprepared(f"an argument of type {kind}")
        if kind.startswith("tensordesc"):
            dims = len(kind.partition("[")[2].partition("]")[0].split(","))
            kinds += [_MAP] + ["i32"] * dims + ["i64"] * dims
        else:
            kinds.append(kind)
    if kinds.count(_MAP) != len(maps):
        raise Unprepared("descriptors that are no tensor maps")
    return kinds


def map_offset(encoded: Any, described: int) -> int:
    """How far into Triton's object for a tensor map, of which it is the last member, it lies.

    Raises:
        Unprepared: there is none, since it would begin with the address that it describes.
    """
    offset = type(encoded).__basicsize__ - MAP_BYTES
    place = id(encoded) + offset
    if offset <= 0 or place % 64 or ctypes.c_uint64.from_address(place).value != described:
        raise Unprepared(f"{type(encoded).__name__} holds no tensor map where it was expected")
    return offset


class TensorMaps(NamedTuple):
    """The maps of one argument, by address.

    Attributes:
        find: from an address to (what keeps the map alive, where it lies), or None.
        make: the same for an address that is new.
    """

    find: Callable[[int], tuple[Any, int] | None]
    make: Callable[[int], tuple[Any, int]]


class Arguments(NamedTuple):
    """The arguments of a launch, tensor maps with their shapes and strides.

    Attributes:
        kinds: Triton's types.
        values: numbers; anything for what differs between launches and for constexprs.
        places: (position, index of the address) of pointers.
        maps: likewise of tensor maps.
    """

    kinds: Sequence[str]
    values: Sequence[Any]
    places: Sequence[tuple[int, int]]
    maps: Sequence[tuple[int, int, TensorMaps]]


def _word(kind: str, value: Any) -> int:
    """A value as the first bytes of a word."""
    if kind.startswith("*"):
        if value is not None:
            raise Unprepared(f"a pointer that is {value!r}")
        return 0
    if kind == _MAP:
        return 0
    if kind not in _FORMATS:
        raise Unprepared(f"an argument of type {kind}")
    try:
        packed = struct.pack(f"<{_FORMATS[kind]}", value)
    except (struct.error, OverflowError) as error:
        raise Unprepared(f"{value!r} as {kind}: {error}") from error
    return int.from_bytes(packed, "little")


def _bytes_of(kind: str) -> int:
    if kind == _MAP:
        return MAP_BYTES
    return 8 if kind.startswith("*") else struct.calcsize(f"<{_FORMATS[kind]}")


def prepare(
    function: int,
    grid: tuple[int, int, int],
    metadata: Any,
    sizes: Sequence[int],
    arguments: Arguments,
    early: bool,
    otherwise: Launch,
) -> Launch:
    """The launch of one loaded kernel with all that stays the same.

    Args:
        function: the driver's handle.
        metadata: Triton's: (warps, programs of a cluster, bytes of shared memory).
        sizes: bytes of each parameter that the kernel has.
        early: whether it may start before the kernel before it has ended (programmatic dependent
            launch).
        otherwise: asked where the driver refuses: it says why, or does first what is missing.

    Raises:
        Unprepared: it takes more than that.
    """
    try:
        call = library()
    except (OSError, AttributeError) as error:
        raise Unprepared(str(error)) from error
    if len(metadata) != 3:
        raise Unprepared(f"a launch described by {metadata}")
    warps, cluster, shared = metadata
    if cluster != 1 or shared > _MOST_SHARED or 0 in grid:
        raise Unprepared(f"grid {grid}, clusters of {cluster}, {shared} bytes of shared memory")
    kinds, values = arguments.kinds, arguments.values
    if len(kinds) != len(values):
        raise Unprepared(f"{len(values)} arguments for {len(kinds)}")
    kept = [i for i, kind in enumerate(kinds) if kind != _CONSTANT]
    words = [_word(kinds[i], values[i]) for i in kept] + [0] * _SCRATCH
    expected = [_bytes_of(kinds[i]) for i in kept] + [8] * _SCRATCH
    if list(sizes) != expected:
        raise Unprepared(f"parameters of {list(sizes)} bytes in place of {expected}")
    x, y, z = grid
    config = [x | y << 32, z | 32 * warps << 32, 1 | 1 << 32, shared, 0, 0, int(early)]
    attribute = [_PROGRAMMATIC_STREAM_SERIALIZATION, 1] + [0] * 7
    number = {position: i for i, position in enumerate(kept)}
    # A pointer to nothing is a constexpr and has no parameter.
    places = [(_FIRST_VALUE + number[at], i) for at, i in arguments.places if at in number]
    first_pointer = _FIRST_VALUE + len(words)
    maps = [(first_pointer + number[at], i, *of) for at, i, of in arguments.maps]

    def make_frame() -> tuple[Any, Any, Any]:
        """Memory for one launch at a time: (words, where the config is, where the pointers are)."""
        made = array("Q", config + attribute + words + [0] * len(words))
        start = made.buffer_info()[0]
        made[_ATTRIBUTES] = start + 8 * _FIRST_ATTRIBUTE
        for i in range(len(words)):
            made[first_pointer + i] = start + 8 * (_FIRST_VALUE + i)
        return made, ctypes.c_void_p(start), ctypes.c_void_p(start + 8 * first_pointer)

    frames = [make_frame()]  # threads that launch at the same time need one each
    handle = ctypes.c_void_p(function)

    def launch(stream: int, addresses: list[int]) -> None:
        try:
            frame = frames.pop()  # looking first would let another thread take it in between
        except IndexError:
            frame = make_frame()
        memory, config_at, pointers_at = frame
        memory[_STREAM] = stream
        for word, index in places:
            memory[word] = addresses[index]
        held = []  # another thread may forget maps
        for word, index, find, make in maps:
            entry = find(addresses[index]) or make(addresses[index])
            held.append(entry)
            memory[word] = entry[1]
        failed = call(config_at, handle, pointers_at, None)
        frames.append(frame)
        if failed:
            otherwise(stream, addresses)

    return launch
