"""What a compiled kernel's file says of its parameters."""

from __future__ import annotations

import struct
from collections.abc import Iterator

# An attribute of .nv.info with its length beside it, and the one that describes a parameter.
_SIZED, _PARAMETER = 4, 0x17


def _sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    names = headers[of_names][4]
    for name, *_, begin, length in headers:
        end = cubin.index(b"\0", names + name)
        yield cubin[names + name : end].decode(), cubin[begin : begin + length]


def parameter_sizes(cubin: bytes, kernel: str) -> list[int]:
    """The bytes of each parameter, in order."""
    info, at, found = dict(_sections(cubin))[f".nv.info.{kernel}"], 0, {}
    while at < len(info):
        form, attribute, length = struct.unpack_from("<BBH", info, at)
        if form == _SIZED:
            if attribute == _PARAMETER:
                _, ordinal, _, word = struct.unpack_from("<IHHI", info, at + 4)
                found[ordinal] = word >> 18
            at += length
        at += 4
    return [found[i] for i in range(len(found))]
