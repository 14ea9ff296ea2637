"""How the Hopper backward is run: a pure function of the problem's shape."""

from __future__ import annotations

from typing import NamedTuple


class BackwardPlan(NamedTuple):
    """How ``attention_backward_sm90`` is compiled; see its docstring.

    Attributes:
        section_bytes: heads are worked on together as long as q, do and the sums of dq of their
            query heads fit into so many bytes of L2 cache.
        distance: how many programs lie between one that prepares for or finishes after a section
            and that section's; a few more than a GPU runs at a time, so that nobody waits.
    """

    block_m: int
    block_d: int
    q_slots: int = 2
    do_slots: int = 2
    ds_slots: int = 2
    eager_dv: bool = False
    ahead: int = 0
    dq_group: bool = False
    registers: int = 240
    dq_registers: int = 0
    section_bytes: int = 32 << 20
    housekeeping: bool = False
    other_registers: int = 24
    distance: int = 168

    @property
    def statistics_rows(self) -> int:
        """Rows of a program of ``row_statistics_sm90``."""
        return 32


def padded_headdim(headdim: int) -> int:
    """The head dim that the kernels compute with."""
    return 64 if headdim <= 64 else 128


def plan_backward(headdim: int, is_masked: bool, seqlen_q: int) -> BackwardPlan:
    """The plan for head dims up to 128; ``is_masked`` is whether there is a window or causality."""
    if headdim <= 64:
        return BackwardPlan(
            64, 64, q_slots=3, do_slots=3, ds_slots=3, ahead=1, dq_group=True,
            registers=208, dq_registers=72,
        )  # fmt: skip
    return BackwardPlan(64, 128, eager_dv=not is_masked or seqlen_q > 1024, ahead=2)
