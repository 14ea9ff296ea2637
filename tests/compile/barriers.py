"""Whether every barrier of a kernel's shared memory is used, told from Triton's GPU dialect.

Memory of a barrier that nobody waits for or arrives at is free for the compiler's allocation once
the barrier is initialised, and other data takes its place. The hardware knows such a place as a
barrier until it is invalidated, and may write the barrier's state over the data later: on an H100
it did.
"""

from __future__ import annotations

import re

_BARRIERS = re.compile(r"%([\w#]+) = ttg\.local_alloc\b.*: \(\) -> !ttg\.memdesc<(?:\d+x)+i64,")
_VIEW = re.compile(r"%([\w#]+) = ttg\.memdesc_\w+ ")
_HARMLESS = re.compile(r"ttng\.(init_barrier|inval_barrier)\b|ttg\.local_dealloc\b")


def unused(ttgir: str) -> list[str]:
    """The names of barriers that are initialised and not used, nor handed to other warps."""
    lines = ttgir.splitlines()
    return [
        found[1]
        for line in lines
        if (found := _BARRIERS.search(line)) and not _is_used(found[1], lines)
    ]


def _is_used(name: str, lines: list[str]) -> bool:
    mention = re.compile(rf"%{re.escape(name)}(?![\w#])")
    for line in lines:
        operands = line.partition(" = ")[2] if line.lstrip().startswith("%") else line
        if not mention.search(operands) or _HARMLESS.search(line):
            continue
        view = _VIEW.search(line)
        if view is None or _is_used(view[1], lines):
            return True
    return False
