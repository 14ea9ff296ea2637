"""How the Hopper backward is run: a pure function of the problem's shape."""

from __future__ import annotations

from typing import NamedTuple

import triton


class RowsPlan(NamedTuple):
    """How ``attention_backward_rows_sm90`` is compiled; see its docstring.

    Attributes:
        section_bytes: heads are worked on together as long as their keys and values fit into so
            many bytes of L2 cache.
    """

    k_slots: int
    v_slots: int
    dq_first: bool = True
    registers: int = 240
    section_bytes: int = 32 << 20


class BackwardPlan(NamedTuple):
    """How ``attention_backward_sm90`` is compiled; see its docstring.

    With ``piece`` it is ``attention_backward_wide_sm90``, whose blocks have 64 queries. It alone
    has ``p_slots``, ``held``, ``turns`` and ``rows``, and has nothing for dq, and neither eager_dv,
    early_lse, delta_first nor keeps_keys.

    Attributes:
        registers: of the second consumer; the first one gets what is left.
        section_bytes: heads are worked on together as long as q, do and the sums of dq of their
            query heads fit into so many bytes of L2 cache.
        least_programs: but where key heads have several query heads, at least as many as have so
            many programs; else long programs of one head would begin while few short ones are left
            to run beside them.
        dq_slots, adder, in_flight: see DQ_SLOTS, ADDER and IN_FLIGHT; ``deterministic`` needs an
            adder, as plans without a dq group do.
        first_stores: whoever comes first to a block of dq stores it, so that the sums need no
            zeros; needs an adder, whose ``in_flight`` it uses.
        rotates: see ROTATE; without a mask and in any order only.
        eager_dv, early_lse, delta_first: see EAGER_DV, EARLY_LSE and DELTA_FIRST.
        keeps_keys: see KEEPS_KEYS; for head dims up to 64, and neither chunks nor ALiBi, for which
            the registers do not suffice.
        multiplied: columns that are multiplied, 96 of ``block_d``; 0 for all of them.
        splits: programs that the query heads of a key head are divided among, see SPLIT.
        held, turns: see HELD and TURNS.
        rows: of the kernel that computes dq by itself, so that there are no sums of it.
    """

    block_m: int
    block_d: int
    q_slots: int = 2
    do_slots: int = 2
    ds_slots: int = 2
    eager_dv: bool = False
    early_lse: bool = False
    delta_first: bool = False
    dq_group: bool = False
    registers: int = 240
    dq_registers: int = 0
    section_bytes: int = 32 << 20
    least_programs: int = 0
    deterministic: bool = False
    is_reversed: bool = False
    other_registers: int = 24
    dq_slots: int = 2
    adder: bool = False
    in_flight: int = 0
    first_stores: bool = False
    rotates: bool = False
    splits: int = 1
    multiplied: int = 0
    keeps_keys: bool = False
    # Of head dims above 128; ``piece`` is columns of a buffer.
    piece: int = 0
    p_slots: int = 0
    held: int = 0
    turns: bool = False
    rows: RowsPlan | None = None

    def statistics_rows(self, is_ragged: bool) -> int:
        """Rows of a program of ``row_statistics_sm90``. Of packed sequences 16 rows of 136 columns
        of float16 spill 16 to 24 bytes."""
        if not self.piece:
            return 32
        return 8 if is_ragged else 16

    @property
    def block_n(self) -> int:
        """Keys of a program."""
        return 64 if self.piece else 128

    @property
    def width(self) -> int:
        """Columns of the sums of dq, dk and dv."""
        return self.multiplied or self.block_d

    @property
    def columns(self) -> int:
        """Columns of a tensor of the sums of dk and dv."""
        return self.piece or (self.multiplied - 64 if self.multiplied else self.block_d)


TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
MAX_HEADDIM = 256
# Of attention_backward_sm90, which serves more features.
MAX_HEADDIM_NARROW = 128
# Of an H100.
MULTIPROCESSORS = 132
# Above these the registers do not suffice: for chunks, and ALiBi with lengths on the device or with
# sums of dq in order; for softcap.
MAX_HEADDIM_CHUNK = 64
MAX_HEADDIM_SOFTCAP = 192


# Newer compilers spill 24 to 96 bytes for it. The main kernel alone, full, 512 1024 2048 4096 8192
# 16384: 387 441 465 493 509 521 become 404 475 500 518 525 519 TFLOP/s.
_KEEPS_KEYS = TRITON <= (3, 6)
# Four slots in place of three spare divisions by three: at 4096 and 16384 without a mask 518 and
# 549 become 545 and 579, with delta first too 564 and 595.
_D64 = BackwardPlan(
    64, 64, q_slots=4, do_slots=4, ds_slots=4 if _KEEPS_KEYS else 3, early_lse=_KEEPS_KEYS,
    delta_first=_KEEPS_KEYS, dq_group=True, registers=208 if _KEEPS_KEYS else 200,
    dq_registers=64, keeps_keys=_KEEPS_KEYS,
)  # fmt: skip
# Causal, 1024 4096 16384: 333 501 561 with neither of delta first and eager_dv, 341 523 596 with
# both.
_D128 = BackwardPlan(64, 128, adder=True)
# 64 and 32 columns. A group for dq, for which newer compilers spill 32 to 40 bytes: full, 1024 4096
# 16384, 374 471 491 become 405 503 537 TFLOP/s; all 128 columns multiplied 355 448 474. Early and
# with pairs of q and do 389 496 530 become 408 533 566.
_D96 = _D128._replace(multiplied=96)
if TRITON <= (3, 6):
    _D96 = _D96._replace(
        q_slots=3, do_slots=3, early_lse=True, delta_first=True, dq_group=True, registers=208,
        dq_registers=64,
    )  # fmt: skip
# Full and causal, 1024 4096 16384: without turns and with nothing held, which leaves room for two
# slots less, 353 421 438 and 266 403 438; with both 384 469 498 and 282 451 501. Newer compilers
# let products wait for each other for more than one piece held, and with dq last spill 8 bytes for
# softcap in a window.
_D192 = BackwardPlan(
    64, 192, q_slots=4, do_slots=4, piece=64, p_slots=2, held=3, turns=True,
    rows=RowsPlan(3, 2, dq_first=TRITON > (3, 6)),
)  # fmt: skip
# Likewise 371 439 457 and 303 412 458, and 404 493 528 and 319 449 514. Newer compilers have no
# registers for it, and turns with two slots of q take 15 % longer than none.
_D256 = BackwardPlan(
    64, 256, q_slots=3, piece=128, p_slots=2, held=1, turns=True,
    rows=RowsPlan(2, 1),
)  # fmt: skip
if TRITON > (3, 6):
    _D192 = _D192._replace(q_slots=3, do_slots=3, held=1)
    _D256 = _D256._replace(q_slots=2, held=0, turns=False)


def plan_backward(
    headdim: int, is_masked: bool, seqlen_q: int, seqlen_k: int | None = None
) -> BackwardPlan:
    """The plan for a head dim; ``is_masked`` is whether there is a window or causality.

    ``seqlen_k`` is given if it is not ``seqlen_q``.
    """
    is_long = is_masked and seqlen_q >= 2048
    section = 32 << 20 if is_long else 4 << 20
    if headdim > MAX_HEADDIM_NARROW:
        return (_D192 if headdim <= 192 else _D256)._replace(section_bytes=section)
    base = _D64 if headdim <= 64 else _D96 if headdim <= 96 else _D128
    plan = base._replace(section_bytes=section, least_programs=MULTIPROCESSORS if is_masked else 0)
    if headdim <= 64:
        is_short = is_masked and seqlen_q < 1024
        if not base.keeps_keys:
            plan = plan._replace(eager_dv=is_masked)
        elif is_short:
            plan = plan._replace(eager_dv=True, early_lse=False, delta_first=False)
    elif not base.dq_group:
        plan = plan._replace(delta_first=is_masked, eager_dv=True)
    # First stores pay where the programs of a head come to different blocks of queries, which with
    # more keys than queries they do not.
    if seqlen_k is not None and seqlen_k > seqlen_q:
        return plan
    if headdim <= 64:
        # Full, 512 1024 2048 4096 8192 16384: 305 414 488 545 556 574 without first stores, 303 403
        # 473 525 523 539 with them; causal 179 283 397 471 545 587 and 184 279 390 451 515 543.
        stores = is_short if base.keeps_keys else not is_masked or seqlen_q <= 2048
        if not stores:
            return plan
        return plan._replace(
            adder=True, dq_slots=4, first_stores=True, rotates=not is_masked, section_bytes=4 << 20
        )
    if base.dq_group:
        # Full 321 401 480 524 543 556 with first stores, 314 414 491 554 571 584 without; causal
        # 199 305 381 465 510 539 and 183 297 392 476 527 566.
        if seqlen_q >= (2048 if is_masked else 1024):
            return plan
        return plan._replace(first_stores=True, rotates=not is_masked)
    # Full 354 459 490 565 583 592 with first stores, 326 442 486 572 591 599 without; causal
    # 223 335 429 517 552 583 and 187 308 414 502 549 576.
    if seqlen_q >= 4096 and not is_masked:
        return plan
    # Causal, 2048 4096 8192 16384, with the additions of no step in flight 449 544 590 606, of one
    # 463 557 608 627, of two 425 503 529 551; at 1024, 342 333 316.
    return plan._replace(
        first_stores=True, dq_slots=4 if is_masked else 2, in_flight=1 if is_long else 0
    )


def plan_ordered(
    headdim: int, is_masked: bool, seqlen_q: int, seqlen_k: int | None = None
) -> BackwardPlan:
    """The plan for gradients that have the same bits every time, dq too.

    Programs of one head can only follow each other at some distance in time, which they have if
    many heads are worked on together.
    """
    plan = plan_backward(headdim, is_masked, seqlen_q, seqlen_k)
    if plan.rows is not None:  # nobody adds to anything
        return plan
    # Full and causal, 1024 2048 4096 8192 16384, of what the default reaches: D64 with 32 MB 82 87
    # 91 92 92 % and 94 96 93 93 91, with 16 MB 98 97 97 96 94 and 100 100 97 94 93; D128 93 98 98
    # 97 97 and 94 91 94 91 93, with 16 MB 102 99 96 94 94 and 101 96 96 94 93.
    is_wide = not is_masked and headdim > 64 and seqlen_q >= 2048
    plan = plan._replace(
        deterministic=True, is_reversed=is_masked, section_bytes=(32 if is_wide else 16) << 20,
        least_programs=0 if is_masked else MULTIPROCESSORS,
    )  # fmt: skip
    if plan.do_slots > 2 and headdim > 64:  # four buffers of dq need the room
        plan = plan._replace(q_slots=2, do_slots=2)
    if plan.early_lse:
        plan = plan._replace(early_lse=False, delta_first=False, eager_dv=headdim <= 64)
    # Measured with 0 to 4 in flight and with 2 and 4 buffers, at 1k to 16k keys.
    return plan._replace(adder=True, dq_slots=4, in_flight=1, first_stores=True, rotates=False)


# How far the number of parts that is taken may be from the one that is wanted.
_NEAR = 1.6
# Programs for each multiprocessor that even out whichever comes last. Nothing was measured with
# more than these, and sums of dk and dv grow with them.
_MANY = 8


def splits_of_group(
    programs: int, group: int, is_masked: bool, multiprocessors: int, is_reversed: bool = False
) -> int:
    """How many programs the ``group`` query heads of a key head are divided among, where there are
    ``programs`` with all of them in one: as few as keep the multiprocessors busy.

    A program has a multiprocessor for itself. With a mask programs are of many lengths, the longest
    first, and two for each multiprocessor even out if all parts have as many heads; if they are
    ``is_reversed``, the longest last, they have to be shorter. Without, all take as long, and one
    more than fits is one more turn for all. Where heads are divided there are at most six programs
    for each multiprocessor, 26 if reversed, and each leaves 64 KB of sums (head dims up to 64) to
    128 KB.
    """
    if is_masked:
        wanted = next((n for n in range(1, group) if programs * n >= 2 * multiprocessors), group)
        if is_reversed and programs * wanted < _MANY * multiprocessors:
            # 16/2 heads, S 8192, and 32/8, 4 of S 4096 and 2048: 75 84 75 % of the default's speed
            # without, 89 90 85 with it.
            wanted = min(group, 2 * wanted)
        return _near_divisor(group, wanted)
    few = [n for n in range(1, group + 1) if n == 1 or programs * n <= 4 * multiprocessors]
    # Turns, times the heads of the largest part.
    times = {n: -(-programs * n // multiprocessors) * -(-group // n) for n in few}
    return next(n for n in few if times[n] <= 1.05 * min(times.values()))


def _near_divisor(group: int, wanted: int) -> int:
    """The divisor of ``group`` nearest to ``wanted``, which stays where none is near."""
    distance = {n: max(n / wanted, wanted / n) for n in range(1, group + 1) if group % n == 0}
    nearest = min(distance, key=distance.__getitem__)
    return nearest if distance[nearest] <= _NEAR else wanted
