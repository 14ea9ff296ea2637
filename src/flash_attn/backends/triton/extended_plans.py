"""Tile plans for mask tensors, float8, head dims of v beyond 256 and second products.

None of these figures is measured: the largest tiles that compile without spilling vector registers
and fit the shared memory of the family (the compile tests check this).
"""

from __future__ import annotations

from ...core.plan import PlanKey, TilePlan

# By kernel: plans plain, with a causal mask or a window, and with heavy features; the last repeats.
_Plans = dict[str, tuple[TilePlan, ...]]
_Table = dict[int, _Plans]


def _plans(**rows: tuple[int, ...] | list[tuple[int, ...]]) -> _Plans:
    listed = {
        kernel: given if isinstance(given, list) else [given] for kernel, given in rows.items()
    }
    return {kernel: tuple(TilePlan(*row) for row in given) for kernel, given in listed.items()}


# Up to 256: with mask tensors, whose addresses and values take registers. 512: head dims of v of
# 512. 1024: those beside a head dim of q beyond 64, or with a second product.
_SM90 = {
    16: _plans(forward=(64, 64, 4, 2), dkdv=(64, 64, 4, 2), dq=(64, 64, 4, 2)),
    32: _plans(forward=(64, 64, 4, 2), dkdv=(64, 64, 4, 2), dq=(128, 64, 8, 2)),
    64: _plans(forward=(128, 64, 8, 2), dkdv=(32, 128, 8, 2), dq=(128, 64, 8, 2)),
    128: _plans(forward=(64, 64, 8, 2), dkdv=(32, 64, 8, 2), dq=(128, 32, 8, 2)),
    256: _plans(forward=(64, 32, 8, 2), dkdv=(16, 32, 8, 1), dq=(32, 32, 8, 1)),
    512: _plans(
        forward=[(64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)],
        dkdv=(32, 32, 8, 2),
        dq=(32, 32, 8, 1),
    ),
    1024: _plans(forward=(32, 32, 8, 1), dkdv=(32, 32, 8, 1), dq=(32, 32, 8, 1)),
}
_SM80 = {
    16: _plans(forward=(64, 64, 4, 2), dkdv=(64, 64, 4, 2), dq=(64, 64, 4, 2)),
    32: _plans(forward=(64, 64, 4, 2), dkdv=(64, 64, 4, 2), dq=(64, 32, 4, 2)),
    64: _plans(forward=(128, 64, 8, 2), dkdv=(32, 128, 8, 2), dq=(64, 32, 4, 1)),
    128: _plans(forward=(64, 64, 8, 2), dkdv=(32, 32, 8, 2), dq=(64, 32, 8, 1)),
    256: _plans(forward=(32, 32, 4, 1), dkdv=(16, 32, 8, 1), dq=(32, 32, 8, 1)),
    512: _plans(forward=(32, 64, 8, 2), dkdv=(32, 32, 8, 2), dq=(32, 32, 8, 1)),
    1024: _plans(forward=(32, 32, 8, 1), dkdv=(32, 32, 8, 1), dq=(32, 32, 8, 1)),
}
_SM86 = {
    16: _plans(forward=(64, 64, 4, 2), dkdv=(64, 64, 4, 2), dq=(64, 64, 4, 2)),
    32: _plans(forward=(64, 64, 4, 2), dkdv=(32, 64, 4, 2), dq=(64, 32, 4, 2)),
    64: _plans(forward=(128, 64, 8, 2), dkdv=(32, 32, 4, 1), dq=(32, 32, 4, 1)),
    128: _plans(forward=(64, 32, 8, 2), dkdv=(32, 32, 8, 2), dq=(64, 32, 8, 1)),
    256: _plans(forward=(32, 32, 4, 2), dkdv=(32, 32, 8, 1), dq=(16, 32, 8, 1)),
    512: _plans(forward=(32, 64, 8, 2), dkdv=(32, 32, 8, 2), dq=(32, 32, 8, 1)),
    1024: _plans(forward=(16, 32, 4, 1), dkdv=(16, 32, 8, 1), dq=(16, 32, 8, 1)),
}
_SM100 = {
    16: _plans(forward=(64, 32, 4, 2), dkdv=(32, 64, 4, 2), dq=(64, 64, 4, 2)),
    32: _plans(forward=(64, 32, 4, 2), dkdv=(64, 64, 4, 2), dq=(64, 64, 4, 2)),
    64: _plans(forward=(128, 64, 8, 2), dkdv=(32, 128, 8, 2), dq=(128, 64, 8, 2)),
    128: _plans(forward=(64, 64, 8, 2), dkdv=(32, 64, 8, 2), dq=(128, 32, 8, 2)),
    256: _plans(forward=(64, 32, 8, 2), dkdv=(16, 32, 8, 1), dq=(32, 32, 8, 1)),
    512: _plans(forward=(64, 32, 8, 1), dkdv=(32, 32, 8, 2), dq=(32, 32, 8, 1)),
    1024: _plans(forward=(32, 32, 8, 1), dkdv=(32, 32, 8, 1), dq=(32, 32, 8, 1)),
}
_GFX942 = {
    16: _plans(forward=(128, 64, 4, 1), dkdv=(64, 64, 4, 1), dq=(128, 64, 4, 1)),
    32: _plans(forward=(128, 64, 4, 1), dkdv=(32, 64, 4, 1), dq=(64, 64, 4, 1)),
    64: _plans(forward=(128, 64, 8, 1), dkdv=(32, 64, 4, 1), dq=(64, 32, 4, 1)),
    128: _plans(forward=(64, 32, 8, 1), dkdv=(16, 64, 8, 1), dq=(64, 32, 8, 1)),
    256: _plans(forward=(32, 32, 4, 1), dkdv=(16, 32, 8, 1), dq=(32, 32, 4, 1)),
    512: _plans(forward=(32, 32, 8, 1), dkdv=(16, 16, 4, 1), dq=(16, 16, 4, 1)),
    1024: _plans(forward=(16, 32, 4, 1), dkdv=(16, 16, 4, 1), dq=(16, 16, 4, 1)),
}
# Products with 512 columns in full float32 spill in dkdv and with a second product.
_FLOAT32 = {
    16: _plans(forward=(32, 32, 4, 1), dkdv=(32, 32, 4, 1), dq=(32, 32, 4, 1)),
    32: _plans(forward=(32, 32, 4, 1), dkdv=(32, 32, 4, 1), dq=(32, 32, 4, 1)),
    64: _plans(forward=(32, 32, 4, 1), dkdv=(32, 32, 8, 1), dq=(32, 32, 8, 1)),
    128: _plans(forward=(32, 32, 8, 1), dkdv=(16, 16, 8, 1), dq=(16, 32, 8, 1)),
    256: _plans(forward=(32, 16, 8, 1), dkdv=(16, 16, 8, 1), dq=(16, 16, 8, 1)),
    512: _plans(forward=(16, 16, 8, 1), dkdv=(16, 16, 8, 1), dq=(16, 16, 4, 1)),
    1024: _plans(forward=(16, 16, 8, 1), dkdv=(16, 16, 8, 1), dq=(16, 16, 4, 1)),
}
_TABLES: dict[str, _Table] = {
    "sm80": _SM80,
    "sm86": _SM86,
    "sm90": _SM90,
    "sm100": _SM100,
    "gfx942": _GFX942,
    "float32": _FLOAT32,
}


def _family(key: PlanKey) -> str:
    """The table for ``key``'s GPU, or for its closest relative."""
    if key.itemsize == 4:
        return "float32"
    if key.arch in ("sm80", "sm90"):
        return key.arch
    if key.arch.startswith("sm10"):
        return "sm100"
    return "gfx942" if key.arch.startswith("gfx") else "sm86"


def size_of(key: PlanKey) -> int:
    """The row of a table: the larger head dim, and twice that where there is more beside it."""
    size = max(key.block_d, key.block_dv)
    return 2 * size if key.second or (size == 512 and key.block_d > 64) else size


def extended_plan(key: PlanKey) -> TilePlan | None:
    """The plan for what this module is about, None for all else."""
    size, family = size_of(key), _family(key)
    if key.kernel == "dmask":
        return _dmask_plan(family, size)
    if size <= 256 and not key.mask_tensor:
        return _float8_plan(key, size)
    if (family, size, key.kernel, key.padded) == ("sm80", 64, "dkdv", True):
        return TilePlan(32, 64, 8, 2)  # masks of columns besides: 16 bytes spill with 32x128
    plans = _TABLES[family][size][key.kernel]
    variant = 2 if key.heavy or key.mask_tensor else int(key.masked)
    return plans[min(variant, len(plans) - 1)]


def _float8_plan(key: PlanKey, size: int) -> TilePlan | None:
    """float8 takes the plans of 16-bit inputs but for some at head dim 64."""
    if (key.itemsize, size, key.kernel, key.heavy) != (1, 64, "forward", False):
        return None
    newer = key.triton >= (3, 7)
    if key.arch == "sm90" and not (key.windowed or key.padded or newer):
        # Left alone, the compiler takes up to 161: three programs to a multiprocessor, not four.
        return TilePlan(64, 64, 4, 3, max_registers=128)
    spills = key.arch == "sm89" or key.arch.startswith("sm10")
    if key.masked and spills and newer:
        return TilePlan(128, 64, 8, 2)
    return None


def _dmask_plan(family: str, size: int) -> TilePlan:
    """Small tiles: writing the gradient takes longer than the products."""
    if family == "float32" or size > 256:
        return TilePlan(16, 16, 4, 1)
    if family == "gfx942":
        return TilePlan(32, 32, 4, 1)
    return TilePlan(16, 32, 4, 1) if size == 256 else TilePlan(32, 32, 8, 1)


def float8_product(key: PlanKey) -> bool:
    """Whether the tensor cores multiply float8 (e4m3, as NVIDIA writes it) as it is."""
    return key.arch in ("sm89", "sm90") or key.arch.startswith(("sm10", "sm12"))


def converts_float8_ahead(key: PlanKey, rows: int) -> bool:
    """Whether float8 is converted before the kernel, once, where each key meets ``rows`` rows.

    Where float8 is multiplied as it is, that is the values alone, and reading them twice as wide
    costs more than it saves up to some thousand rows. At wide heads it always does, and at head dim
    64 under a mask, which leaves half of the rows to a key (measured on an H100).
    """
    if float8_product(key):
        narrow = size_of(key) == 64 and key.masked
        return rows >= 8192 and key.block_d <= 128 and not narrow
    return rows >= 1024


def float8_weights(key: PlanKey) -> bool:
    """Whether weights are rounded to float8 for float8 values, instead of both to float16.

    They never are: that product would take half the time, but its errors are 3e-2, ten times those
    of the other roundings, and Hopper needs the values transposed for it.
    """
    return False
