"""Tile plans of the portable kernels, by architecture.

Tables are indexed by (kernel, block_d). Figures in comments: measured where a GPU is named, else
the largest tiles that compile without spilling vector registers and fit the shared memory (the
compile tests check this for every entry).
"""

from __future__ import annotations

from functools import lru_cache

from ...core.plan import PlanKey, TilePlan, overridden, report
from .extended_plans import extended_plan, size_of

_Variants = tuple[TilePlan, TilePlan, TilePlan, TilePlan]
_Table = dict[int, dict[str, _Variants]]


def _variants(**rows: list[tuple[int, int, int, int]]) -> dict[str, _Variants]:
    """By kernel, the plans without a mask, with one, with heavy features, and with a left limit.

    Where rows are left out, the last one repeats; a left limit takes the plan of other masks.
    """
    found = {}
    for kernel, given in rows.items():
        plans = [TilePlan(*row) for row in given]
        full, masked, heavy = (plans + [plans[-1]] * 2)[:3]
        found[kernel] = (full, masked, heavy, plans[3] if len(plans) > 3 else masked)
    return found


def _changed(table: _Table, changes: _Table) -> _Table:
    """``table`` with the plans of single head dims and kernels replaced."""
    return {block_d: {**table[block_d], **changes.get(block_d, {})} for block_d in table}


# Hopper. Head dims 64 and 128 without heavy features were measured on an H200, 256 (but forward) on
# an H100 (docs/lab/portable-kernels.md).
_SM90 = {
    16: _variants(
        forward=[(128, 64, 4, 3)],
        dkdv=[(64, 64, 4, 3)],
        dq=[(64, 64, 4, 3)],
    ),
    32: _variants(
        forward=[(128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3)],
        dkdv=[(64, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 3)],
        dq=[(64, 64, 4, 3)],
    ),
    64: _variants(
        forward=[(64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2)],
        dkdv=[(64, 64, 4, 2), (64, 64, 4, 3), (32, 128, 8, 3)],
        dq=[(64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)],
    ),
    128: _variants(
        forward=[(128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2)],
        dkdv=[(64, 128, 8, 2), (32, 128, 8, 3), (32, 64, 8, 2)],
        dq=[(128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)],
    ),
    256: _variants(
        forward=[(128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)],
        dkdv=[(64, 32, 8, 2)],
        dk=[(32, 128, 8, 2)],
        dv=[(32, 128, 8, 2)],
        dq=[(128, 32, 8, 2), (128, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)],
    ),
}
# What newer compilers need instead: from Triton 3.7 on.
_SM90_NEWER = _changed(
    _SM90,
    {
        128: _variants(forward=[(128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)]),
        256: _variants(dkdv=[(64, 32, 8, 2), (64, 32, 8, 2), (16, 32, 8, 1), (64, 32, 8, 2)]),
    },
)
# Ampere data centre GPUs: 163 KB of shared memory.
_SM80 = {
    16: _variants(
        forward=[(128, 64, 4, 3)],
        dkdv=[(64, 128, 8, 2)],
        dq=[(128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    ),
    32: _variants(
        forward=[(128, 64, 4, 3)],
        dkdv=[(64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2)],
        dq=[(128, 128, 8, 3), (128, 64, 8, 3)],
    ),
    64: _variants(
        forward=[(128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3)],
        dkdv=[(32, 128, 8, 2)],
        dq=[(128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)],
    ),
    128: _variants(
        forward=[(128, 32, 8, 2), (64, 64, 8, 2)],
        dkdv=[(128, 64, 8, 2), (64, 64, 8, 1)],
        dq=[(128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 1)],
    ),
    256: _variants(
        forward=[(64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)],
        dkdv=[(32, 64, 8, 2), (16, 32, 8, 1)],
        dq=[(64, 64, 8, 2), (64, 64, 8, 2), (32, 128, 8, 1), (64, 32, 8, 1)],
    ),
}
# The other Ampere, Ada and GeForce Blackwell GPUs, and any unknown one: 99 KB of shared memory.
_SM86 = {
    16: _variants(
        forward=[(128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 2)],
        dkdv=[(64, 128, 8, 2)],
        dq=[(128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    ),
    32: _variants(
        forward=[(128, 64, 4, 3)],
        dkdv=[(64, 128, 8, 2)],
        dq=[(128, 128, 8, 3), (128, 64, 8, 3)],
    ),
    64: _variants(
        forward=[(128, 64, 4, 3), (128, 64, 8, 3)],
        dkdv=[(64, 128, 8, 2), (32, 128, 8, 2)],
        dq=[(128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)],
    ),
    128: _variants(
        forward=[(128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 2)],
        dkdv=[(64, 64, 8, 1)],
        dq=[(128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 1)],
    ),
    256: _variants(
        forward=[(64, 32, 8, 2)],
        dkdv=[(16, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)],
        dq=[(64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)],
    ),
}
# What newer compilers need instead: from Triton 3.7 on.
_SM86_NEWER = _changed(_SM86, {128: _variants(forward=[(128, 64, 8, 3), (64, 32, 4, 2)])})
# Blackwell data centre GPUs: products accumulate in tensor memory.
_SM100 = {
    16: _variants(
        forward=[(128, 64, 4, 3), (128, 64, 4, 3), (64, 64, 4, 2)],
        dkdv=[(64, 128, 8, 2)],
        dq=[(128, 64, 8, 3)],
    ),
    32: _variants(
        forward=[(128, 64, 4, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
        dkdv=[(64, 128, 8, 2)],
        dq=[(128, 64, 8, 3)],
    ),
    64: _variants(
        forward=[(128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2)],
        dkdv=[(64, 128, 8, 2)],
        dq=[(128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)],
    ),
    128: _variants(
        forward=[(128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)],
        dkdv=[(64, 128, 8, 2)],
        dq=[(128, 64, 8, 2)],
    ),
    256: _variants(
        forward=[(128, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2)],
        dkdv=[(32, 64, 8, 2), (16, 64, 8, 1), (16, 32, 8, 1)],
        dq=[(64, 64, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)],
    ),
}
# CDNA GPUs: 64 KB of shared memory, up to 512 registers with 4 warps of 64 threads.
_GFX942 = {
    16: _variants(forward=[(128, 64, 4, 1)], dkdv=[(64, 64, 4, 1)], dq=[(64, 64, 4, 1)]),
    32: _variants(forward=[(128, 64, 4, 1)], dkdv=[(64, 64, 4, 1)], dq=[(64, 64, 4, 1)]),
    64: _variants(forward=[(128, 64, 4, 1)], dkdv=[(64, 64, 4, 1)], dq=[(64, 64, 4, 1)]),
    128: _variants(
        forward=[(128, 64, 8, 1), (128, 64, 4, 1)],
        dkdv=[(32, 64, 4, 1)],
        dq=[(64, 32, 4, 1)],
    ),
    256: _variants(
        forward=[(64, 32, 4, 1)],
        dkdv=[(32, 32, 4, 1), (16, 32, 4, 1)],
        dq=[(32, 32, 4, 1)],
    ),
}
# The interpreter: small tiles, so that small problems have several.
_GENERIC = {
    16: _variants(forward=[(64, 64, 4, 2)], dkdv=[(64, 64, 4, 2)], dq=[(64, 64, 4, 2)]),
    32: _variants(forward=[(64, 64, 4, 2)], dkdv=[(64, 64, 4, 2)], dq=[(64, 64, 4, 2)]),
    64: _variants(forward=[(64, 64, 4, 2)], dkdv=[(64, 64, 4, 2)], dq=[(64, 64, 4, 2)]),
    128: _variants(forward=[(64, 32, 4, 2)], dkdv=[(32, 64, 4, 1)], dq=[(64, 32, 4, 1)]),
    256: _variants(forward=[(64, 32, 8, 1)], dkdv=[(32, 32, 8, 1)], dq=[(32, 32, 8, 1)]),
}
# Full float32 products have no tensor cores to feed: tiles are small.
_FLOAT32 = {
    16: _variants(
        forward=[(32, 32, 4, 1)],
        dkdv=[(32, 32, 4, 1)],
        dq=[(32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 2)],
    ),
    32: _variants(
        forward=[(32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 2)],
        dkdv=[(32, 32, 4, 1)],
        dq=[(32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 2)],
    ),
    64: _variants(forward=[(32, 32, 4, 1)], dkdv=[(32, 32, 8, 1)], dq=[(32, 32, 8, 1)]),
    128: _variants(
        forward=[(32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)],
        dkdv=[(16, 16, 8, 1)],
        dq=[(32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)],
    ),
    # With two stages the tiles of the next step wait in shared memory; with one, 320 bytes spill.
    256: _variants(
        forward=[(32, 16, 8, 1)],
        dkdv=[(16, 16, 8, 2)],
        dq=[(16, 16, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1)],
    ),
}
# CDNA: four warps have twice the registers of eight, and 64 KB hold no second stage.
_FLOAT32_AMD = _changed(
    _FLOAT32,
    {
        64: _variants(dkdv=[(32, 32, 4, 1)]),
        128: _variants(dq=[(32, 32, 4, 1)]),
        256: _variants(dkdv=[(16, 16, 4, 1)], dq=[(16, 16, 4, 1)]),
    },
)
_TABLES = {
    "sm80": _SM80,
    "sm86": _SM86,
    "sm86 newer": _SM86_NEWER,
    "sm90": _SM90,
    "sm90 newer": _SM90_NEWER,
    "sm100": _SM100,
    "gfx942": _GFX942,
    "generic": _GENERIC,
    "float32": _FLOAT32,
    "float32 amd": _FLOAT32_AMD,
}
# Head dims that are not powers of two: what differs, since masks of columns take registers too.
_PADDED_SM90 = {
    16: _variants(
        forward=[(128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3)],
    ),
    32: _variants(
        forward=[(128, 64, 4, 3), (128, 64, 8, 3)],
        dkdv=[(64, 64, 4, 3), (64, 128, 8, 3), (32, 64, 4, 3)],
    ),
    64: _variants(
        forward=[(128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 3), (128, 64, 8, 3)],
        dkdv=[(64, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 3), (32, 128, 8, 3)],
    ),
    128: _variants(
        forward=[(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)],
        dkdv=[(32, 128, 8, 2), (32, 128, 8, 3), (32, 64, 8, 2)],
    ),
}
_PADDED_SM86 = {
    16: _variants(
        forward=[(128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3)],
        dq=[(128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    ),
    32: _variants(
        forward=[(128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3)],
    ),
    64: _variants(forward=[(128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 3)]),
}
_PADDED: dict[str, _Table] = {
    "sm90": {
        **_PADDED_SM90,
        256: _variants(dq=[(128, 32, 8, 2), (128, 16, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)]),
    },
    "sm90 newer": _PADDED_SM90,
    "sm80": {
        16: _variants(
            forward=[(128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3)],
            dq=[(128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
        ),
        32: _variants(
            forward=[(128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3)],
        ),
        64: _variants(
            forward=[(128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2), (128, 64, 8, 3)],
            dkdv=[(32, 128, 8, 2), (32, 128, 8, 2), (64, 32, 8, 2)],
            dq=[(128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)],
        ),
        128: _variants(dkdv=[(128, 64, 8, 2), (64, 64, 8, 1)]),
    },
    "sm86": _PADDED_SM86,
    "sm86 newer": _PADDED_SM86,
    "sm100": {
        64: _variants(
            forward=[(128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 3)],
            dkdv=[(64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2)],
        ),
        128: _variants(dq=[(128, 64, 8, 2), (64, 64, 8, 2)]),
    },
    "float32": {
        64: _variants(
            forward=[(32, 32, 4, 1), (32, 32, 8, 2)],
            dq=[(32, 32, 8, 1), (32, 32, 8, 2)],
        ),
    },
}
# Packed sequences, whose bounds take registers: what differs.
_PACKED: dict[str, _Table] = {
    "sm90": {
        256: _variants(dq=[(128, 32, 8, 2), (128, 16, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)]),
    },
    "sm90 newer": {256: _variants(dv=[(16, 128, 8, 2)])},
}
# Strides that are multiples of 8 but not of 16 (head dims 136, 200): what differs.
_EIGHTS: dict[str, _Table] = {
    "sm90": {
        256: _variants(
            dv=[(32, 128, 8, 2), (16, 128, 8, 2)],
            dq=[(128, 16, 8, 2), (128, 16, 8, 2), (32, 64, 8, 1), (32, 32, 8, 2)],
        ),
    },
    "sm90 newer": {
        256: _variants(
            dk=[(32, 128, 8, 2), (16, 128, 8, 2)],
            dv=[(32, 128, 8, 2), (16, 128, 8, 2)],
        ),
    },
}
# Strides that are not even multiples of 8, so that rows are read in pieces: what differs.
_UNALIGNED_SM90 = {
    256: _variants(
        dkdv=[(32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)],
        dq=[(32, 32, 8, 2), (32, 32, 8, 1)],
    ),
}
_UNALIGNED: dict[str, _Table] = {"sm90": _UNALIGNED_SM90, "sm90 newer": _UNALIGNED_SM90}


def family_of(key: PlanKey) -> str:
    """The name of the table for ``key``: that of its GPU, or of the closest relative."""
    if key.itemsize == 4:
        return "float32 amd" if key.arch.startswith("gfx") else "float32"
    newer = " newer" if key.triton >= (3, 7) else ""
    if key.arch == "sm90":
        return "sm90" + newer
    if key.arch == "sm80":
        return "sm80"
    if key.arch.startswith("sm10"):
        return "sm100"
    if key.arch.startswith("gfx"):
        return "gfx942"
    return "sm86" + newer if key.arch.startswith("sm") else "generic"


def variant_of(key: PlanKey) -> int:
    """Which of a kernel's plans serves ``key``; see ``_variants``."""
    if key.heavy:
        return 2
    return 3 if key.windowed else int(key.masked)


def changes_of(key: PlanKey) -> list[tuple[str, dict[str, _Table]]]:
    """What gives ``key``'s kernel a plan of its own: names and tables, of which the last counts."""
    family, size = family_of(key), size_of(key)
    facts = (
        ("packed", key.packed, _PACKED),
        ("padded", key.padded, _PADDED),
        ("eights", key.alignment == 8, _EIGHTS),
        ("unaligned", key.alignment < 8, _UNALIGNED),
    )
    return [
        (name, tables)
        for name, holds, tables in facts
        if holds and key.kernel in tables.get(family, {}).get(size, {})
    ]


@lru_cache(maxsize=1024)
def _lookup(key: PlanKey) -> TilePlan:
    plan, family = extended_plan(key), family_of(key)
    if plan is None:
        _, tables = [("", _TABLES), *changes_of(key)][-1]
        plan = tables[family][size_of(key)][key.kernel][variant_of(key)]
    if key.few_rows and key.kernel == "forward":
        padded = (family, key.block_d, key.padded) == ("sm80", 64, True)
        most = 32 if padded or key.block_dv > 256 else 64
        tight = key.block_dv > 256 or (key.itemsize == 1 and key.arch == "sm89" and key.heavy)
        plan = TilePlan(16, min(plan.block_n, most), 4, 1 if tight else plan.num_stages)
    return plan


def dkdv_kernels(key: PlanKey) -> tuple[str, ...]:
    """What makes dk and dv: one launch for both, or one for each where the tables, or an override,
    have plans for that.

    Both computes each tile of scores once, but keeps two tiles of gradients in registers: at head
    dim 256 tiles of 128 keys fit with one of them only. With heavy features, a left limit or rows
    that are read in pieces not even then.
    """
    if overridden(key):
        return ("dkdv",)
    apart = overridden(key._replace(kernel="dk")) is not None
    light = variant_of(key) < 2 and key.alignment >= 8
    if not apart and light and extended_plan(key) is None:
        apart = "dk" in _TABLES[family_of(key)][size_of(key)]
    return ("dk", "dv") if apart else ("dkdv",)


def overlaps_backward(key: PlanKey, seqlen: int) -> bool:
    """Whether the two gradient kernels run on two streams, so that one fills the other's last wave.

    Measured on an H200 at head dim 128: 1 to 4 % faster without a mask at any length and with one
    up to 4k tokens; 5 % slower causal at 16k, where each fills the L2 with other heads; no
    difference at head dim 64.
    """
    large = key.arch == "sm90" and key.itemsize == 2 and key.block_d == 128
    return large and (not key.masked or seqlen <= 4096)


def plan_for(key: PlanKey) -> TilePlan:
    """The tile plan for ``key``; a pure function but for :func:`flash_attn.core.plan.override`."""
    plan = overridden(key) or _lookup(key)
    report(key, plan)
    return plan
