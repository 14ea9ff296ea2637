"""Whether every wgmma reads shared memory where the kernel says, told from Hopper machine code.

A wgmma takes its shared operands by descriptor: an address, masked to its field's 14 or 15 bits,
to which tiles and layouts are added. The assembler keeps descriptors in uniform registers, and the
one of CUDA 12.8 can lose one on the way: the instruction then reads whatever the register held, at
times outside of shared memory. :func:`lost` follows what may be in each uniform register at each
instruction and names the wgmmas whose descriptor may not come from a masked address.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import triton

_NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_FIELD = re.compile(r"0x[37]f[0-9a-f]{2}")
_PREDICATE = re.compile(r"!?U?P(\d|T)")
_PRODUCTS = ("HGMMA", "QGMMA", "IGMMA")
_WRITES_UNIFORM = ("R2UR", "S2UR", "CS2UR", "LDCU", "VOTEU")

# What may be in a register: a descriptor, a constant, a value that came from the threads'
# registers (not followed), something else, or nothing that this code wrote.
_DESCRIPTOR, _CONSTANT, _THREAD, _OTHER, _NOTHING = [
    "descriptor",
    "constant",
    "thread",
    "other",
    "nothing",
]
_Kinds = frozenset[str]
_State = dict[int, _Kinds]


class Instruction(NamedTuple):
    """One line of machine code."""

    address: str
    predicate: str | None
    name: str
    modifiers: list[str]
    operands: list[str]


def disassemble(cubin: bytes) -> str:
    """The machine code of a compiled kernel, as text with labels, but without the targets of
    branches to addresses: looking for these takes a third of the time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [str(_NVDISASM), "-c", "-ndf", str(path)], capture_output=True, text=True, check=True
        )
    return done.stdout


def _parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := _LINE.search(line):
            name, *modifiers = found[3].split(".")
            operands = [part.strip() for part in found[4].split(",")]
            code.append(Instruction(found[1], found[2], name, modifiers, operands))
    return code, labels


def _successors(code: list[Instruction], labels: Mapping[str, int], index: int) -> Iterator[int]:
    one = code[index]
    falls_through = one.predicate is not None or _PREDICATE.match(one.operands[0]) is not None
    if one.name == "BRA":
        target = re.search(r"`\((\.L_\w+)\)", one.operands[-1])
        if target is not None:
            yield labels[target[1]]
        if not falls_through and "DIV" not in one.modifiers:
            return
    elif one.name in ("EXIT", "RET", "BRX") and one.predicate is None:
        return
    if index + 1 < len(code):
        yield index + 1


def _uniform(operand: str) -> int | None:
    found = re.match(r"[!~|-]*UR(\d+)", operand)
    return None if found is None else int(found[1])


def _kinds_of_sum(sources: list[_Kinds]) -> _Kinds:
    """What adds to a descriptor moves it: constants are offsets."""
    moved = [kinds for kinds in sources if kinds != {_CONSTANT}]
    return frozenset().union(*moved) if moved else frozenset({_CONSTANT})


def _after(state: _State, one: Instruction) -> _State:
    """The registers after one instruction."""
    target = _uniform(one.operands[0])
    if target is None or not (one.name.startswith("U") or one.name in _WRITES_UNIFORM):
        return state
    sources = [x for x in one.operands[1:] if not _PREDICATE.fullmatch(x)]

    def kinds(operand: str, offset: int = 0) -> _Kinds:
        register = _uniform(operand)
        if register is None:
            return frozenset({_CONSTANT})
        return state.get(register + offset, frozenset({_NOTHING}))

    all_kinds = [kinds(x) for x in sources]
    is_address = any(k & {_DESCRIPTOR, _THREAD} for k in all_kinds)
    if one.name == "USGXT" or (one.name == "ULOP3" and any(map(_FIELD.fullmatch, sources))):
        found = frozenset({_DESCRIPTOR})
    elif one.name == "R2UR":
        found = frozenset({_THREAD})
    elif one.name in ("UMOV", "USEL") or (one.name in ("UIADD3", "ULOP3") and is_address):
        found = _kinds_of_sum(all_kinds)
    elif one.name not in ("ULDC", "LDCU") and all(k == {_CONSTANT} for k in all_kinds):
        found = frozenset({_CONSTANT})
    else:
        found = frozenset({_OTHER})
    state = dict(state)
    for offset in range(2 if "64" in one.modifiers else 1):
        before = state.get(target + offset, frozenset({_NOTHING}))
        value = found if offset == 0 else kinds(sources[0], offset) if sources else found
        state[target + offset] = value | before if one.predicate else value
    return state


def _flow(code: list[Instruction], labels: Mapping[str, int]) -> list[_State | None]:
    """What may be in the registers before each instruction; None where nothing arrives."""
    before: list[_State | None] = [None] * len(code)
    before[0] = {}
    pending = [0]
    while pending:
        index = pending.pop()
        state = before[index]
        assert state is not None
        after = _after(state, code[index])
        for following in _successors(code, labels, index):
            known = before[following]
            if known is None:
                before[following] = after
                pending.append(following)
                continue
            nothing = frozenset({_NOTHING})
            merged = {
                register: known.get(register, nothing) | after.get(register, nothing)
                for register in known.keys() | after.keys()
            }
            if any(kinds != known.get(register, nothing) for register, kinds in merged.items()):
                before[following] = merged
                pending.append(following)
    return before


def lost(text: str) -> list[str]:
    """The wgmmas of a disassembly that may read through something that is no descriptor."""
    code, labels = _parse(text)
    if not any(one.name in _PRODUCTS for one in code):
        return []
    found = []
    for one, state in zip(code, _flow(code, labels), strict=True):
        if one.name not in _PRODUCTS or state is None:
            continue
        for position, operand in enumerate(one.operands):
            descriptors = re.match(r"gdesc\[UR(\d+)\]", operand)
            if descriptors is None:
                continue
            first = int(descriptors[1])
            # One operand in registers: then the second descriptor of the four registers alone.
            low_words = [first, first + 2] if position == 1 else [first + 2]
            for register in low_words:
                kinds = state.get(register, frozenset({_NOTHING}))
                if not kinds <= {_DESCRIPTOR, _THREAD}:
                    found.append(f"{one.address}: UR{register} holds {', '.join(sorted(kinds))}")
    return found
