"""Launch plans of the Hopper kernels: which configuration computes which problem.

Choices follow measurements on an H100 with 16k tokens and a hidden size of 2048 in bfloat16, see
docs/lab/hopper-forward.md. Figures beside plans are TFLOP/s at the lengths that they serve, of 512,
1024, 2048, 4096, 8192 and 16384 keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

ROWS = 64  # of a consumer, as in kernels.sm90_forward
ROUND_ROBIN, DYNAMIC = range(2)
SHARED_LIMIT = 232448
BLOCK_DS = (64, 96, 128, 192, 256)
MAX_HEADDIM = BLOCK_DS[-1]


@dataclass(frozen=True)
class ForwardPlan:
    """How the forward kernel is compiled and launched; see kernels.sm90_forward.

    Attributes:
        consumers: warpgroups that compute, of 64 queries each: 1 to 4; with ``ping_pong`` or
            ``slim`` 2 or more.
        block_n: keys in a block.
        stages: blocks of keys, and of values, that shared memory holds; with ``joint`` of both.
        scheduler: ROUND_ROBIN or DYNAMIC.
        q_slots: tiles of queries that shared memory holds.
        out_halves: 1: results leave through a buffer of their width, 2: through one of half the
            width, in two steps.
        ping_pong: consumers take turns in starting products.
        skip: consumers leave out the last blocks of keys that none of their rows sees.
        section_bytes: keys and values of the heads that are worked on at a time; 0: one head.
        last_bytes: keys and values of the last heads, all worked on at a time; 0: as the others.
        slim: the producer is one warp, and the counter has a warp of its own.
        late: with DYNAMIC, fetch a tile under the end of the tile before, not under its start.
        overlap: compute a block's weights while the products with the values before run.
        peel: where :func:`masks_first_block_alone`, the loop over the other blocks has no mask.
        joint: keys and values share one ring of slots, 3 or more; not with both ``ping_pong`` and
            ``skip``, nor for values of another head dim.
        p_shared: of so many last keys of a block weights are multiplied from shared memory, not
            from registers: 0 or half of them.
    """

    consumers: int
    block_n: int
    stages: int
    scheduler: int
    q_slots: int
    out_halves: int
    ping_pong: bool = False
    skip: bool = False
    section_bytes: int = 0
    last_bytes: int = 0
    slim: bool = False
    late: bool = False
    overlap: bool = False
    peel: bool = False
    joint: bool = False
    p_shared: int = 0

    @property
    def block_m(self) -> int:
        """Rows in a tile: queries of one head, or of several that are packed."""
        return ROWS * self.consumers

    @property
    def registers(self) -> int:
        """Registers of a consumer's thread: what the 24 or more of a producer's thread leave."""
        warpgroups = self.consumers + 1
        for_all = 65536 // (128 * warpgroups) // 8 * 8 * warpgroups
        return min(240, (for_all - 24) // self.consumers // 8 * 8)

    def out_columns(self, block_d: int) -> int:
        """Width of the buffer that results leave through.

        Not less than the 64 columns that lie together in shared memory; a piece where tiles are in
        pieces.
        """
        if block_d > piece_columns(block_d):
            return piece_columns(block_d)
        return max(block_d // self.out_halves, 64)

    def shared_bytes(self, block_d: int) -> int:
        """Bytes of shared memory for tiles of 16-bit elements, without barriers."""
        blocks = self.stages if self.joint else 2 * self.stages
        rows = self.q_slots * self.block_m + blocks * self.block_n
        out_columns = self.out_columns(block_d)
        if self.p_shared and out_columns < block_d:
            out_columns = block_d  # pieces, with a buffer for each
        return 2 * (rows * block_d + self.block_m * (out_columns + self.p_shared))


class Grid(NamedTuple):
    """How much there is to share out: ``rows`` queries of each of ``sequences`` heads of all
    sequences, and the multiprocessors that do it."""

    rows: int
    sequences: int
    multiprocessors: int

    def tiles(self, block_m: int) -> int:
        """Tiles of ``block_m`` rows, with one head in a tile."""
        return self.sequences * -(-self.rows // block_m)

    def busy(self, block_m: int) -> float:
        """Which part of the multiprocessors has work, in the mean, where tiles are equal."""
        tiles = self.tiles(block_m)
        return tiles / (-(-tiles // self.multiprocessors) * self.multiprocessors)


class ForwardKey(NamedTuple):
    """What a plan may depend on.

    Attributes:
        block_d: see :func:`padded_headdim`.
        masked: whether tiles differ in work: a causal mask or a window.
        seqlen: keys in a sequence.
        has_left: whether rows stop seeing keys on their left.
        grid: how much there is to share out; None: much.
    """

    block_d: int
    masked: bool
    seqlen: int
    has_left: bool = False
    grid: Grid | None = None


def padded_headdim(headdim: int) -> int:
    """Columns of the kernel's tiles; those past the head dim are read as 0."""
    return next(columns for columns in BLOCK_DS if headdim <= columns)


def piece_columns(block_d: int) -> int:
    """Columns of the pieces that a tile is loaded, multiplied and stored in: powers of two."""
    return block_d // 3 if block_d % 3 == 0 else block_d


_L2 = 32 << 20
# By (block_d, masked): plans from the given number of keys on.
_Rows = tuple[tuple[int, ForwardPlan], ...]
_64_LONG = ForwardPlan(3, 128, 2, ROUND_ROBIN, 2, 1, ping_pong=True)
_64 = ForwardPlan(4, 64, 3, ROUND_ROBIN, 2, 1, slim=True)
_64_CAUSAL = replace(_64, scheduler=DYNAMIC, skip=True, section_bytes=16 << 20, last_bytes=_L2)
_128 = ForwardPlan(2, 128, 2, DYNAMIC, 1, 1, peel=True, section_bytes=8 << 20, last_bytes=_L2)
_256 = ForwardPlan(2, 64, 2, ROUND_ROBIN, 1, 2, overlap=True)
_96 = replace(_128, stages=3)
_192_CAUSAL = ForwardPlan(2, 128, 3, DYNAMIC, 1, 1, joint=True, late=True, peel=True,
                          section_bytes=16 << 20, last_bytes=_L2)  # fmt: skip
_FORWARD: dict[tuple[int, bool], _Rows] = {
    (64, False): (
        (0, replace(_64, overlap=True)),  # 400 466
        (2048, replace(_64_LONG, slim=True)),  # 534 558 578 567
    ),
    (64, True): (
        (0, _64_CAUSAL),  # 243 332 420
        (4096, replace(_64_CAUSAL, overlap=True)),  # 493
        (8192, replace(_64_LONG, scheduler=DYNAMIC, skip=True, section_bytes=_L2)),  # 529 538
    ),
    (96, False): (
        (0, ForwardPlan(2, 128, 3, ROUND_ROBIN, 1, 1, ping_pong=True)),  # 425 501
        (1024, ForwardPlan(3, 128, 2, ROUND_ROBIN, 1, 1, ping_pong=True, slim=True,
                           p_shared=64)),  # 502 618 641 637 626
    ),
    (96, True): ((0, _96),),  # 253 371 473 539 571 563
    (128, False): (
        (0, ForwardPlan(2, 128, 2, ROUND_ROBIN, 2, 1, ping_pong=True, slim=True)),  # 517 618
        (2048, ForwardPlan(3, 64, 3, ROUND_ROBIN, 1, 1, ping_pong=True, slim=True)),
        # 695 717 710 696
    ),
    (128, True): (
        (0, replace(_128, ping_pong=True)),  # 310 469 581
        (4096, replace(_128, late=True, overlap=True)),  # 662 701 704
    ),
    (192, False): (
        (0, ForwardPlan(2, 64, 6, ROUND_ROBIN, 1, 1, ping_pong=True, slim=True, overlap=True,
                        joint=True)),  # 524 633 703 730 728 720
    ),
    (192, True): (
        (0, _192_CAUSAL),  # 290 455 595 697 744 777
        (1024, replace(_192_CAUSAL, ping_pong=True)),  # 288 458 603 714 765 787
    ),
    (256, False): (
        (0, replace(_256, ping_pong=True, slim=True)),  # 528 670 763 804 788 770
    ),
    (256, True): (
        (0, replace(_256, scheduler=DYNAMIC, skip=True, late=True, section_bytes=16 << 20,
                    last_bytes=_L2)),  # 308 481 622 721 776 797
    ),
}  # fmt: skip


# By (block_d, masked): plans with smaller tiles, largest first, for problems of few tiles.
_SMALLER: dict[tuple[int, bool], tuple[ForwardPlan, ...]] = {
    (64, False): (
        ForwardPlan(2, 128, 3, ROUND_ROBIN, 2, 1, overlap=True),
        ForwardPlan(1, 128, 3, ROUND_ROBIN, 1, 1),
    ),
    (64, True): (
        ForwardPlan(2, 128, 3, DYNAMIC, 2, 1, late=True, overlap=True, peel=True,
                    section_bytes=_L2),
        ForwardPlan(1, 128, 3, ROUND_ROBIN, 1, 1),
    ),
    (96, False): (_FORWARD[96, False][0][1],),
    (128, False): (_FORWARD[128, False][0][1],),
}  # fmt: skip


@lru_cache(maxsize=1024)
def forward_plan(key: ForwardKey) -> ForwardPlan:
    """The plan for ``key``, a pure function."""
    rows = _FORWARD[key.block_d, key.masked]
    plan = next(plan for start, plan in reversed(rows) if key.seqlen >= start)
    if key.has_left:
        return windowed(plan, key.block_d)
    return plan if key.grid is None else spread(plan, key, key.grid)


def spread(plan: ForwardPlan, key: ForwardKey, grid: Grid) -> ForwardPlan:
    """``plan``, or one with smaller tiles where there are too few for the multiprocessors.

    Measured with 16 heads of one sequence in float16, head dim 64, causal, at 512, 1024, 2048 and
    4096 keys: 32 93 218 364 with three consumers, 31 81 191 296 with four, 39 113 277 394 with two,
    and 48 91 166 with one. From 8192 on, with 5 tiles for each multiprocessor, three are ahead.
    """
    for smaller in _SMALLER.get((key.block_d, key.masked), ()):
        if smaller.consumers == 1:
            few = 2 * grid.tiles(plan.block_m) <= grid.multiprocessors
        elif key.masked:  # tiles differ: they even out where there are many
            few = grid.tiles(plan.block_m) < 4 * grid.multiprocessors
        else:
            few = grid.busy(smaller.block_m) > 1.15 * grid.busy(plan.block_m)
        plan = smaller if few else plan
    return plan


def windowed(plan: ForwardPlan, block_d: int) -> ForwardPlan:
    """``plan`` for tiles whose rows also have a first key: more numbers to keep."""
    # With a window of 1024 at 16384 keys: 360, two consumers 352; 520, with 8M+32M 513.
    if block_d == 64:
        return _64_CAUSAL
    return replace(_SPARING[128], late=True) if block_d == 128 else with_two_rings(plan)


def with_two_rings(plan: ForwardPlan) -> ForwardPlan:
    """``plan`` for values of another head dim than the keys', which cannot share slots."""
    if not plan.joint:
        return plan
    turns = plan.ping_pong and not plan.late
    return replace(plan, joint=False, block_n=64, stages=3, ping_pong=turns)


# By block_d: plans for lengths that only the device knows, where more numbers describe a tile.
_LENGTHS: dict[int, ForwardPlan] = {
    64: ForwardPlan(4, 64, 3, DYNAMIC, 2, 1, skip=True, section_bytes=_L2),
    96: ForwardPlan(2, 128, 2, DYNAMIC, 1, 1, overlap=True, section_bytes=8 << 20, last_bytes=_L2),
    128: ForwardPlan(3, 64, 3, DYNAMIC, 1, 1, skip=True, late=True, section_bytes=_L2),
    192: ForwardPlan(2, 64, 3, DYNAMIC, 1, 1, late=True, overlap=True, section_bytes=_L2),
    256: ForwardPlan(2, 64, 2, DYNAMIC, 1, 2, skip=True, late=True, overlap=True,
                     section_bytes=_L2),
}  # fmt: skip
# The same with a left bound, softcap, ALiBi or packed heads, where more numbers describe a row:
# with the plans above the compiler runs out of registers.
_SPARING: dict[int, ForwardPlan] = {
    64: ForwardPlan(2, 128, 3, DYNAMIC, 2, 1, section_bytes=_L2),
    96: ForwardPlan(2, 128, 2, DYNAMIC, 1, 1, section_bytes=_L2),
    128: ForwardPlan(2, 128, 2, DYNAMIC, 1, 1, section_bytes=_L2),
    192: ForwardPlan(2, 64, 3, DYNAMIC, 1, 1, section_bytes=_L2),
    256: ForwardPlan(2, 64, 2, DYNAMIC, 1, 2, section_bytes=_L2),
}


def lengths_plan(block_d: int, sparing: bool = False) -> ForwardPlan:
    """The plan for packed sequences, for used lengths and, ``sparing`` registers, for ALiBi and for
    softcap with a left bound.

    Of 16 packed sequences with 32768 tokens, causal, in order of head dims: 452 493 620 619 664,
    sparing 421 486 579 556 594.
    """
    return _SPARING[block_d] if sparing else _LENGTHS[block_d]


def forward_plans() -> list[tuple[int, bool, ForwardPlan]]:
    """Every (block_d, masked, plan) there is, without those of windows and of lengths."""
    found = [(*key, plan) for key, rows in _FORWARD.items() for _, plan in rows]
    found += [(*key, plan) for key, plans in _SMALLER.items() for plan in plans]
    return list(dict.fromkeys(found))


def heads_at_a_time(plan: ForwardPlan, seqlen_k: int, headdim: int, group: int) -> int:
    """How many query heads of all sequences are worked on at a time, so that their keys and values
    (16 bits an element) stay in the L2 cache; whole groups."""
    return heads_in(plan.section_bytes, seqlen_k, headdim, group)


def heads_in_sections(
    plan: ForwardPlan, seqlen_k: int, headdim: int, group: int, sequences: int
) -> int:
    """How many of ``sequences`` query heads come in sections; the others are one section."""
    if not plan.last_bytes:
        return sequences
    section = heads_at_a_time(plan, seqlen_k, headdim, group)
    last = min(sequences, heads_in(plan.last_bytes, seqlen_k, headdim, group))
    return (sequences - last) // section * section


def heads_in(size: int, seqlen_k: int, headdim: int, group: int) -> int:
    """Query heads whose keys and values take ``size`` bytes; whole groups, at least one."""
    return group * max(1, size // max(4 * seqlen_k * headdim, 1))


def masks_first_block_alone(
    plan: ForwardPlan, seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, pack: int
) -> bool:
    """Whether the first block that a tile computes, of the last keys that any row sees, is the only
    one with keys that some row does not see, and each row of a tile with keys sees one of it.

    With tiles of as many rows as blocks have keys, that is so where the first row's last key is the
    first of a block. The lengths are those of all sequences.
    """
    if left is not None or right is None or pack > 1 or plan.block_m != plan.block_n:
        return False
    return (seqlen_k - seqlen_q + right) % plan.block_n == 0


# Heads are packed where that leaves less than this share of the tiles.
_WORTH_PACKING = 0.9


def packed_heads(
    block_m: int, group: int, rows: int, sequences: int, is_varlen: bool, wanted: bool | None
) -> int:
    """How many query heads that share keys lie in a tile: all ``group`` of them, or 1.

    All of them only if they divide a consumer's rows, so that its rows are a block for TMA. A tile
    costs the same whether its rows are one head's or several heads', so heads are packed, unless
    ``wanted`` says otherwise, where the ends of sequences waste enough rows of tiles. Of packed
    sequences the mean length alone is known: each wastes half a tile in the mean.

    Args:
        block_m: rows of a tile.
        group: query heads for each head of keys.
        rows: queries, of a sequence or with ``is_varlen`` of all ``sequences``.
    """
    if group == 1 or ROWS % group or wanted is False:
        return 1
    if wanted:
        return group
    if is_varlen:
        whole = group * rows / block_m
        apart, together = whole + sequences * group / 2, whole + sequences / 2
    else:
        apart, together = group * -(-rows // block_m), -(-rows * group // block_m)
    return group if together < _WORTH_PACKING * apart else 1
