"""Tile plans of the portable kernels, by architecture.

Tables are indexed by (kernel, block_d). Figures in comments: measured where a GPU is named, else
the largest tiles that compile without spilling vector registers and fit the shared memory (the
compile tests check this for every entry).
"""

from __future__ import annotations

from functools import lru_cache

from ...core.plan import PlanKey, TilePlan, overridden, report

_Table = dict[tuple[str, int], TilePlan]


def _table(forward: tuple[int, ...], dkdv: tuple[int, ...], dq: tuple[int, ...]) -> dict[str, TilePlan]:
    return {"forward": TilePlan(*forward), "dkdv": TilePlan(*dkdv), "dq": TilePlan(*dq)}


# Hopper.
_SM90 = {
    16: _table((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    32: _table((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    64: _table((128, 64, 4, 3), (64, 128, 8, 3), (128, 64, 8, 3)),
    128: _table((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 3)),
    256: _table((128, 32, 8, 2), (32, 64, 8, 1), (64, 32, 8, 2)),
}
# Whatever else: small tiles that fit 99 KB of shared memory.
_GENERIC = {
    16: _table((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    32: _table((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    64: _table((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    128: _table((64, 32, 4, 2), (32, 64, 4, 1), (64, 32, 4, 1)),
    256: _table((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
}
# Full float32 products have no tensor cores to feed: tiles are small.
_FLOAT32 = {
    16: _table((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    32: _table((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    64: _table((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    128: _table((32, 32, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1)),
    256: _table((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}


@lru_cache(maxsize=1024)
def _lookup(key: PlanKey) -> TilePlan:
    if key.itemsize == 4:
        plan = _FLOAT32[key.block_d][key.kernel]
    elif key.arch == "sm90":
        plan = _SM90[key.block_d][key.kernel]
    else:
        plan = _GENERIC[key.block_d][key.kernel]
    if key.few_rows and key.kernel == "forward":
        plan = TilePlan(16, min(plan.block_n, 64), 4, plan.num_stages)
    return plan


def plan_for(key: PlanKey) -> TilePlan:
    """The tile plan for ``key``; a pure function but for :func:`flash_attn.core.plan.override`."""
    plan = overridden(key) or _lookup(key)
    report(key, plan)
    return plan
