"""Launch plans: frozen values that pure functions derive from a key of plain facts.

A plan depends on the GPU, the Triton version, the dtype and coarse facts of the shape alone: never
on timing, so every process and every rank runs the same kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from .. import settings

logger = logging.getLogger("flash_attn")


class PlanKey(NamedTuple):
    """What a tile plan may depend on.

    Attributes:
        kernel: "forward", "dkdv", "dk" or "dv" (those of "dkdv" apart), "dq" or "dmask".
        arch: "sm90", "gfx942", ...
        triton: (major, minor) of the Triton in use.
        itemsize: bytes of an element of q.
        block_d: head dim, rounded up to a power of two, at least 16.
        masked: whether a causal mask or a window is on.
        heavy: whether dropout, ALiBi, softcap or pages need further registers.
        few_rows: whether there are at most 16 queries a sequence (decoding).
        block_dv: head dim of v, rounded up likewise; 0 is that of q.
        second: whether there is a second product, of queries with values.
        windowed: whether the mask has a left limit, for which more is kept in registers.
        padded: whether the head dim is less than block_d, so that columns are masked.
        mask_tensor: whether the scores have a mask tensor.
        packed: whether sequences of queries or keys are packed.
        alignment: of rows and heads: the largest power of two, up to 16, that divides the strides
            of q, k and v, in elements.
    """

    kernel: str
    arch: str
    triton: tuple[int, int]
    itemsize: int
    block_d: int
    masked: bool
    heavy: bool
    few_rows: bool = False
    block_dv: int = 0
    second: bool = False
    windowed: bool = False
    padded: bool = False
    mask_tensor: bool = False
    packed: bool = False
    alignment: int = 16


@dataclass(frozen=True)
class TilePlan:
    """Tile of queries by keys that one program works on, and how it is compiled.

    Attributes:
        max_registers: of a thread (NVIDIA), where the compiler takes so many more than it needs
            that fewer programs share a multiprocessor; None leaves it to the compiler.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


_overrides: dict[str, TilePlan] = {}
_reported: set[Hashable] = set()


@contextmanager
def override(**plans: TilePlan) -> Iterator[None]:
    """Use other plans inside a ``with`` block, by kernel name; for tuning and tests."""
    before = dict(_overrides)
    _overrides.update(plans)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def is_overridden() -> bool:
    """Whether an :func:`override` is in force."""
    return bool(_overrides)


def overridden(key: PlanKey) -> TilePlan | None:
    """The plan that an :func:`override` in force names for ``key``'s kernel."""
    return _overrides.get(key.kernel) if _overrides else None


def report(key: Hashable, plan: object) -> None:
    """With FLASH_ATTN_PRINT_PLAN=1, log each new plan once; ``key`` is what it was made for."""
    if settings.PRINT_PLAN and key not in _reported:
        _reported.add(key)
        logger.warning("plan %s -> %s", key, plan)
