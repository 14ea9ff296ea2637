"""Calls that are solved again by repeating their launches, see :mod:`flash_attn.core.repeated`.

A call is solved in the ordinary way while its launches are noted; results are allocated anew each
time, as they were the first time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.repeated import Solve
from ._launcher import Tape, allocator, repeat, sink_for

# How results become zeros; nothing else is: launches take tensors of the call, results and scratch.
_ZEROING = frozenset({"zeros", "new_zeros"})


def solve_again(
    tape: Tape,
    tensors: Sequence[Tensor],
    made: tuple[Tensor, ...],
    unread: Sequence[Tensor] = (),
    zeroed: bool = False,
) -> Solve | None:
    """How the launches of ``tape`` are repeated on tensors in the place of ``tensors``.

    Args:
        made: the results, all on the device of the first tensor; repeated, they are allocated like
            these, with zeros if ``zeroed``.
        unread: other arguments of the launches, that no kernel reads.

    Returns:
        None, with the reason logged, if the launches cannot be repeated.
    """
    ignored = _ZEROING if zeroed else frozenset()
    launches = repeat(tape, [*tensors, *made, *unread], ignored)
    if launches is None:
        return None
    known, device, current_device = launches, launches.device, launches.current_device
    only, current_stream = launches.only, launches.current_stream
    allocate = allocator(tensors[0].device.type)
    layouts = [(tuple(x.shape), x.stride(), x.dtype) for x in made]
    # Where results but the first go that nobody asks for, if they fit.
    sinks = [sink_for(x) for x in made[1:]]
    shared = [x for x in sinks if x is not None]
    first = layouts if None in sinks else layouts[:1]
    nowhere = [0] * len(unread)

    def solve(
        tensors: Sequence[Tensor], asked: int = len(made), addresses: list[int] | None = None
    ) -> tuple[Tensor, ...]:
        if current_device() != device:
            with torch.cuda.device(device):
                return solve(tensors, asked, addresses)
        if addresses is None:
            addresses = [x.data_ptr() for x in tensors]
        results = []
        for layout in first if asked == 1 else layouts:
            results.append(x := allocate(*layout))
            if zeroed:
                x.zero_()
            addresses.append(x.data_ptr())
        if len(results) < len(layouts):
            addresses += shared
        addresses += nowhere
        if only is None:
            known(addresses)
        else:
            only(current_stream(device), addresses)
        return tuple(results)

    return solve
