"""One call's arguments as they fit together: which sizes hold, which shape each memory has."""

from __future__ import annotations

import operator
from dataclasses import fields
from typing import Any

import torch

from ..core.problem import is_float8
from .memory import describe
from .params import DataType, FlashAttentionParams, Refused

# Memory arguments; the two accumulators are never looked at.
FLOATS = ("q", "k", "v", "out", "k_new", "v_new", "rotary_cos", "rotary_sin")
INDICES = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "page_table",
    "kv_batch_idx",
)  # fmt: skip
DESCALES = ("q_descale_ptr", "k_descale_ptr", "v_descale_ptr")
MEMORY = (*FLOATS, "softmax_lse", *INDICES, *DESCALES, "attn_mask", "rng_state")
# What ``strict`` refuses by its own code, whatever its shape.
NOT_STRICT = frozenset(
    ("k_new", "v_new", "rotary_cos", "rotary_sin", "leftpad_k", "page_table", "kv_batch_idx",
     "attn_mask", "rng_state")
)  # fmt: skip
INTEGERS = tuple(field.name for field in fields(FlashAttentionParams) if field.type == "int")
FLAGS = tuple(field.name for field in fields(FlashAttentionParams) if field.type == "bool")
SIZES = (
    "batch_size", "seqlen_q", "seqlen_k", "num_heads", "num_heads_k", "head_dim", "total_q",
    "total_k", "page_size", "seqlen_knew", "rotary_dim",
)  # fmt: skip

_OF_FEATURES = ("k_new", "v_new", "rotary_cos", "rotary_sin")
_ELEMENTS = {
    DataType.FP16: torch.float16,
    DataType.BF16: torch.bfloat16,
    DataType.FP8_E4M3: torch.float8_e4m3fn,
}

Dims = tuple[str, ...]


def integer(x: Any) -> int | None:
    """``x`` as an integer of 64 bits; None if it is none."""
    try:
        x = operator.index(x)
    except Exception:  # objects of strangers raise what they like
        return None
    return x if -(2**63) <= x < 2**63 else None


def number(x: Any) -> float | None:
    """``x`` as a finite number; None if it is none."""
    try:
        x = None if isinstance(x, (str, bytes)) else float(x)
    except Exception:
        return None
    return x if x is not None and abs(x) < float("inf") else None


def is_flag(x: Any) -> bool:
    """Whether ``x`` can be asked for its truth."""
    try:
        bool(x)
    except Exception:
        return False
    return True


class Call:
    """The parameters of a call, read once; nothing here raises or touches a device.

    Attributes:
        params: as they were given.
        strict: whether only what the original supports is allowed.
        varlen: whether sequences are packed.
        paged: whether keys lie in pages.
        memory: what is known of every memory argument that is not null.
        numbers: the integer parameters, 0 in place of what is no integer.
        sizes: every size by name, taken from the tensors where 0 is given.
        from_tensors: the sizes that some tensor has, even if 0.
    """

    def __init__(self, params: FlashAttentionParams, strict: bool) -> None:
        self.params, self.strict = params, strict
        described = {name: describe(getattr(params, name)) for name in MEMORY}
        self.memory = {name: x for name, x in described.items() if x is not None}
        self.varlen = "cu_seqlens_q" in self.memory or "cu_seqlens_k" in self.memory
        self.paged = "page_table" in self.memory
        self._dims: dict[str, Dims] = {}
        values = ((name, getattr(params, name)) for name in INTEGERS)
        self.numbers = {name: x if type(x) is int else integer(x) or 0 for name, x in values}
        self.from_tensors = self._sizes_of_tensors()
        self.sizes = {name: self.numbers[name] or self.from_tensors.get(name, 0) for name in SIZES}

    def has(self, name: str) -> bool:
        """Whether a memory argument is not null."""
        return name in self.memory

    @property
    def data_type(self) -> DataType | None:
        """``dtype`` as what it says, or None if it says nothing."""
        try:
            return DataType(self.params.dtype)
        except Exception:  # comparing with a stranger's object raises what it likes
            return None

    @property
    def element(self) -> torch.dtype:
        """PyTorch's type of q, k and v, once ``dtype`` is checked."""
        return _ELEMENTS[DataType(self.params.dtype)]

    def is_packed_view(self, name: str) -> bool:
        """Whether q or out comes in the PackGQA view, with two dimensions of heads."""
        found = self.memory.get(name)
        plain = 3 if self.varlen else 4
        return found is not None and found.shape is not None and len(found.shape) == plain + 1

    def dims(self, name: str) -> Dims:
        """Names of the dimensions of a memory argument; "any..." is free."""
        if name not in self._dims:
            self._dims[name] = self._find_dims(name)
        return self._dims[name]

    def _find_dims(self, name: str) -> Dims:
        rows_q: Dims = ("total_q",) if self.varlen else ("batch_size", "seqlen_q")
        if name in ("q", "out"):
            heads: Dims = ("num_heads",)
            if self.is_packed_view(name):
                heads = ("num_heads_k", "num_heads / num_heads_k")
            return (*rows_q, *heads, "head_dim")
        if name in ("k", "v"):
            return (*self._rows_k(), "num_heads_k", "head_dim")
        if name in ("k_new", "v_new"):
            return ("batch_size", "seqlen_knew", "num_heads_k", "head_dim")
        if name == "softmax_lse":
            return (
                ("num_heads", "total_q") if self.varlen else ("batch_size", "num_heads", rows_q[1])
            )
        if name in ("cu_seqlens_q", "cu_seqlens_k"):
            return ("batch_size + 1",)
        if name == "page_table":
            return ("any rows" if self.has("kv_batch_idx") else "batch_size", "any pages")
        if name in ("rotary_cos", "rotary_sin"):
            return ("any positions", "rotary_dim / 2")
        return ("2",) if name == "rng_state" else ("batch_size",)

    def _rows_k(self) -> Dims:
        if self.paged:
            return ("any number of pages", "page_size")
        if self.varlen:
            return ("total_k",)
        return ("any sequences" if self.has("kv_batch_idx") else "batch_size", "seqlen_k")

    def _sizes_of_tensors(self) -> dict[str, int]:
        """Sizes by the names of dimensions, the first tensor that has one decides."""
        found: dict[str, int] = {}
        for name in ("q", "k", "v", "out", "cu_seqlens_q", "cu_seqlens_k", *_OF_FEATURES):
            shape = self.memory[name].shape if name in self.memory else None
            if shape is None or len(shape) != len(self.dims(name)):
                continue
            for dim, size in zip(self.dims(name), shape, strict=True):
                found.setdefault(dim, size)
            if name == "q" and self.is_packed_view(name):
                found.setdefault("num_heads", shape[-3] * shape[-2])
        if "batch_size + 1" in found:
            found.setdefault("batch_size", max(found["batch_size + 1"] - 1, 0))
        if "rotary_dim / 2" in found:
            found["rotary_dim"] = 2 * found["rotary_dim / 2"]
        table = self.memory["page_table"].shape if self.paged else None
        if table is not None and len(table) == 2:
            page_size = self.numbers["page_size"] or found.get("page_size", 0)
            found["seqlen_k"] = table[1] * page_size
        return found

    @property
    def capacity(self) -> int:
        """Rows that a sequence's keys have room for, by the shapes."""
        table = self.memory["page_table"].shape if self.paged else None
        if table is not None and len(table) == 2:
            return table[1] * self.sizes["page_size"]
        if self.paged:  # a table at an address
            page_size = max(self.sizes["page_size"], 1)
            seqlen_k = self.numbers["max_seqlen_k"] if self.varlen else self.sizes["seqlen_k"]
            return -(-seqlen_k // page_size) * page_size
        return self.sizes["total_k" if self.varlen else "seqlen_k"]

    def extent(self, dim: str) -> int | None:
        """The size of a named dimension; None if it is free."""
        sizes = self.sizes
        if dim == "num_heads / num_heads_k":
            return sizes["num_heads"] // max(sizes["num_heads_k"], 1)
        if dim == "batch_size + 1":
            return sizes["batch_size"] + 1
        if dim == "rotary_dim / 2":
            return sizes["rotary_dim"] // 2
        return 2 if dim == "2" else sizes.get(dim)

    def shape_at_address(self, name: str) -> tuple[int, ...]:
        """The shape of what lies at an address, free dimensions from the other sizes.

        Raises:
            Refused: the parameters do not say how large it is.
        """
        return tuple(self._extent_at_address(name, dim) for dim in self.dims(name))

    def _extent_at_address(self, name: str, dim: str) -> int:
        sizes = self.sizes
        known = self.extent(dim)
        if known is not None:
            return known
        if dim in ("any pages", "any positions"):
            if self.capacity <= 0:
                length = "max_seqlen_k" if self.varlen else "seqlen_k"
                raise Refused(-8, f"`{length}` must be positive where `{name}` is an address")
            pages = max(sizes["page_size"], 1)
            return self.capacity // (pages if dim == "any pages" else 1)
        if dim == "any rows":
            raise Refused(
                -8, f"`{name}` must be a tensor with `kv_batch_idx`: an address has no row count"
            )
        rows = "page_size" if self.paged else "seqlen_k"
        if sizes["total_k"] <= 0:
            raise Refused(
                -8,
                f"`total_k` must be the number of all rows of the cache where `{name}` is an "
                f"address, found {sizes['total_k']}",
            )
        return sizes["total_k"] // max(sizes[rows], 1)

    def out_types(self) -> tuple[torch.dtype, ...]:
        """What out may hold; an address holds the first."""
        if is_float8(self.element):
            return (torch.bfloat16, torch.float16)
        return (self.element,)
