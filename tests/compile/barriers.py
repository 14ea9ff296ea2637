"""Whether barriers have their shared memory to themselves, told from Triton's GPU dialect.

Memory of a barrier that nobody waits for or arrives at is free for the compiler's allocation once
the barrier is initialised, and other data takes its place. The hardware knows such a place as a
barrier until it is invalidated, and may write the barrier's state over the data later: on an H100
it did. :func:`unused` names such barriers, :func:`overlaid` those whose memory is shared, whatever
the reason.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from triton._C.libtriton import ir, nvidia, passes

_BARRIERS = re.compile(r"%([\w#]+) = ttg\.local_alloc\b.*: \(\) -> !ttg\.memdesc<(?:\d+x)+i64,")
_VIEW = re.compile(r"%([\w#]+) = ttg\.memdesc_\w+ ")
_HARMLESS = re.compile(r"ttng\.(init_barrier|inval_barrier)\b|ttg\.local_dealloc\b")
_PLACED = re.compile(
    r"%([\w#]+) = ttg\.local_alloc\b.*?\ballocation\.offset = (\d+)"
    r".*-> !ttg\.memdesc<((?:\d+x)+)[a-z]+(\d+)"
)
_INVALIDATED = re.compile(r"ttng\.inval_barrier\b")
_TARGET = 90, 80  # compute capability, PTX version


def unused(ttgir: str) -> list[str]:
    """The names of barriers that are initialised and not used, nor handed to other warps."""
    lines = ttgir.splitlines()
    return [
        found[1]
        for line in lines
        if (found := _BARRIERS.search(line)) and not _is_used(found[1], lines)
    ]


def _mentions(name: str, lines: list[str]) -> Iterator[str]:
    """The operations on a barrier or on a view of it."""
    mention = re.compile(rf"%{re.escape(name)}(?![\w#])")
    for line in lines:
        if f"%{name}" not in line:
            continue
        operands = line.partition(" = ")[2] if line.lstrip().startswith("%") else line
        if mention.search(operands):
            view = _VIEW.search(line)
            yield from (line,) if view is None else _mentions(view[1], lines)


def _is_used(name: str, lines: list[str]) -> bool:
    return any(not _HARMLESS.search(line) for line in _mentions(name, lines))


class Buffer(NamedTuple):
    """A named piece of shared memory: bytes [start, stop)."""

    name: str
    start: int
    stop: int
    is_barrier: bool


def allocated(ttgir: str) -> str:
    """The dialect after the compiler has given every buffer its place in shared memory."""
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttgir"
        path.write_text(ttgir, encoding="utf-8")
        module = ir.parse_mlir_module(str(path), context)
    manager = ir.pass_manager(context)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, *_TARGET)
    manager.run(module, "allocated")
    return str(module)


def buffers(placed: str) -> list[Buffer]:
    """What :func:`allocated` allocated."""
    found = []
    for line in placed.splitlines():
        if match := _PLACED.search(line):
            name, start, shape, bits = match.groups()
            size = math.prod(map(int, shape.split("x")[:-1])) * int(bits) // 8
            barrier = _BARRIERS.search(line) is not None
            found.append(Buffer(name, int(start), int(start) + size, barrier))
    return found


def overlaid(placed: str) -> list[str]:
    """Barriers in memory that another buffer has too, of what :func:`allocated` returned.

    A barrier that the kernel invalidates may leave its memory to others.
    """
    every, lines = buffers(placed), placed.splitlines()
    return [
        f"{barrier.name} at {barrier.start} in {other.name}"
        for barrier in every
        if barrier.is_barrier and not any(map(_INVALIDATED.search, _mentions(barrier.name, lines)))
        for other in every
        if other is not barrier and barrier.start < other.stop and other.start < barrier.stop
    ]
