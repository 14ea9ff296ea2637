"""The problems that benchmarks time, by name. It needs no PyTorch.

A name says head dim, mask and length, and whatever differs from 16k tokens and hidden size 2048:
``d64-causal-s4096``, ``d128-causal-s4096-b4-h32-k8`` (8 heads of keys), ``-w1024`` (a query sees
that many keys before its own), ``-fp16``; ``d128-causal-packed`` are sequences of
:data:`PACKED_LENGTHS`.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

TOKENS = 16384
HIDDEN = 2048
# 32k tokens in sequences of all kinds of lengths.
PACKED_LENGTHS = (4096, 128, 3000, 1024, 2048, 512, 6144, 777)
PACKED_LENGTHS += (1500, 2300, 256, 3072, 1811, 900, 1200, 4000)
_PART = re.compile(r"([dsbhkw])(\d+)")
_WORDS = ("causal", "full", "packed", "fp16")


@dataclass(frozen=True)
class Cell:
    """One attention problem: self-attention of ``batch`` sequences of ``seqlen`` tokens.

    Attributes:
        nheads_k: heads of keys and values; None: as many as of queries.
        left: keys before its own that a query sees; None: all.
        dtype: of PyTorch.
        lengths: of packed sequences; batch and seqlen are their number and the largest.
    """

    headdim: int
    causal: bool
    seqlen: int
    batch: int
    nheads: int
    nheads_k: int | None = None
    left: int | None = None
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        length = "packed" if self.lengths else f"s{self.seqlen}"
        kept = {"h": self.nheads, "k": self.nheads_k, "w": self.left}
        if not self.lengths:
            kept = {"b": self.batch, **kept}
        usual = {"b": max(1, TOKENS // self.seqlen), "h": max(1, HIDDEN // self.headdim)}
        parts = [f"{key}{n}" for key, n in kept.items() if n is not None and n != usual.get(key)]
        parts += ["fp16"] if self.dtype == "float16" else []
        return "-".join([f"d{self.headdim}", "causal" if self.causal else "full", length, *parts])

    @property
    def kv_heads(self) -> int:
        return self.nheads if self.nheads_k is None else self.nheads_k

    def pairs(self) -> float:
        """Pairs of a query and a key that it sees, in one head; half of all for causal."""
        lengths = self.lengths or (self.seqlen,) * self.batch
        if self.left is None:
            return sum(n * n for n in lengths) * (0.5 if self.causal else 1.0)
        steps = [(n, min(n, self.left + 1)) for n in lengths]
        return sum(short * (short + 1) / 2 + (n - short) * short for n, short in steps)

    def flops(self, which: str) -> float:
        """Floating-point operations of one pass ("fwd" or "bwd"), two for a multiply-add."""
        return 4.0 * self.pairs() * self.nheads * self.headdim * (2.5 if which == "bwd" else 1.0)


def fields_of(cell: Cell) -> dict[str, Any]:
    """A cell in a result file: what every cell has, and what is not as usual."""
    shape: dict[str, Any] = {
        name: getattr(cell, name) for name in ("headdim", "causal", "seqlen", "batch", "nheads")
    }
    for name in ("nheads_k", "left"):
        if getattr(cell, name) is not None:
            shape[name] = getattr(cell, name)
    if cell.dtype != "bfloat16":
        shape["dtype"] = cell.dtype
    if cell.lengths:
        shape["lengths"] = list(cell.lengths)
    return shape


def label(record: dict[str, Any]) -> str:
    """A record's shape for a table: head dim, mask, length, and what is not as usual."""
    lengths, headdim = record.get("lengths"), record["headdim"]
    parts = [str(headdim), "causal" if record["causal"] else "full"]
    parts.append(f"{len(lengths)} packed" if lengths else str(record["seqlen"]))
    batch = None if lengths else record.get("batch")
    if batch not in (None, max(1, TOKENS // record["seqlen"])):
        parts.append(f"batch {batch}")
    nheads, nheads_k = record.get("nheads"), record.get("nheads_k")
    if nheads_k is not None:
        parts.append(f"heads {nheads}/{nheads_k}")
    elif nheads not in (None, max(1, HIDDEN // headdim)):
        parts.append(f"{nheads} heads")
    if "left" in record:
        parts.append(f"window {record['left']}")
    if "dtype" in record:
        parts.append(record["dtype"])
    return ", ".join(parts)


# -------------------------------------------------------------------------------------- by name
def parse_cell(text: str) -> Cell:
    """A cell of a name; see the module."""
    parts = text.split("-")
    words = [part for part in parts if part in _WORDS]
    found = [_PART.fullmatch(part) for part in parts if part not in _WORDS]
    numbers = {match[1]: int(match[2]) for match in found if match is not None}
    masks = [word for word in words if word in ("causal", "full")]
    packed = "packed" in words
    good = (
        None not in found
        and len(numbers) == len(found)
        and len(set(words)) == len(words)
        and len(masks) == 1
        and "d" in numbers
        and packed != ("s" in numbers)
        and not (packed and "b" in numbers)
        and all(n > 0 for n in numbers.values())
        and not ("w" in numbers and masks != ["causal"])
    )
    if not good:
        raise ValueError(
            "a cell looks like d64-causal-s4096 or d64-full-packed, then [-b4][-h8][-k2][-w1024]"
            f"[-fp16] (-b: not packed, -w: causal), found {text!r}"
        )
    d, lengths = numbers["d"], PACKED_LENGTHS if packed else ()
    s = max(lengths) if packed else numbers["s"]
    batch = len(lengths) if packed else numbers.get("b", max(1, TOKENS // s))
    nheads = numbers.get("h", max(1, HIDDEN // d))
    nheads_k = numbers.get("k")
    if nheads_k is not None and nheads % nheads_k:
        raise ValueError(f"heads must be a multiple of those of keys, found {text!r}")
    dtype = "float16" if "fp16" in words else "bfloat16"
    shape = (d, masks[0] == "causal", s, batch, nheads, nheads_k)
    return Cell(*shape, numbers.get("w"), dtype, lengths)


def portable_cells() -> list[Cell]:
    """Head dims 64 and 128, full and causal, three lengths, 16k tokens and hidden size 2048."""
    grid = itertools.product((64, 128), (False, True), (1024, 4096, 16384))
    return [Cell(d, causal, s, TOKENS // s, HIDDEN // d) for d, causal, s in grid]


def _grid(headdims: tuple[int, ...], seqlens: tuple[int, ...]) -> list[Cell]:
    """Lengths first, in the order given: a run that is cut has whole lengths."""
    grid = itertools.product(seqlens, headdims, (True, False))
    return [Cell(d, causal, s, TOKENS // s, max(1, HIDDEN // d)) for s, d, causal in grid]


def _named(*names: str) -> list[Cell]:
    return [parse_cell(name) for name in names]


# Shapes that no table of plans has, each with one that it should be about as fast as.
_ODD = {
    "d128-causal-s4096-b3": "d128-causal-s4096",
    "d128-causal-s4001": "d128-causal-s4096",
    "d64-full-s1023": "d64-full-s1024",
    "d128-full-s4096-h3": "d128-full-s4096",
    "d64-causal-s4096-h5": "d64-causal-s4096",
    "d64-full-s1024-b13": "d64-full-s1024",
    "d256-causal-s2001-h5": "d256-causal-s2048",
    "d128-causal-s1000-b1-h3": "d128-causal-s1024-b1-h3",
    "d64-full-s999-b1-h5": "d64-full-s1024-b1-h5",
}
_SPOTS = ("d128-causal-s4096", "d64-full-s4096", "d256-causal-s4096", "d128-full-s1024")
BESIDE = _ODD | {f"{name}-fp16": name for name in _SPOTS}

GROUPS: dict[str, list[Cell]] = {
    "portable": portable_cells(),
    "grid": _grid((128, 64, 256), (4096, 1024, 16384, 2048, 8192, 512)),
    "shapes": _named(
        "d128-causal-s4096-b4-h32-k8", "d128-causal-s8192-b2-h16-k2", "d128-causal-packed",
        "d64-causal-packed", "d128-causal-s16384-w1024", "d64-causal-s16384-w1024",
    ) + _grid((96, 192), (4096, 1024, 16384)),
    "ordered": _grid((128, 64), (4096, 2048, 16384, 8192)),
    "odd": _named(*dict.fromkeys(itertools.chain.from_iterable(_ODD.items()))),
    "float16": _named(*(x for name in _SPOTS for x in (name, f"{name}-fp16"))),
    "seed": [Cell(64, True, s, 1, 16, dtype="float16") for s in (512, 1024, 2048, 4096, 8192)],
}  # fmt: skip


def parse_cells(text: str) -> list[Cell]:
    """Names of :data:`GROUPS` and of cells, separated by commas; each cell once."""
    found = [GROUPS[x] if x in GROUPS else [parse_cell(x)] for x in text.split(",")]
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))
