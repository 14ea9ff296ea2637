"""Times fences of the adder in the ordered Hopper backward, in one call of 50 seconds on a GPU.

    PYTHONPATH=src python scripts/sm90_backward_fences_lab.py --deadline 50 --json fences.json

Each plan with its own sections; checks, times and the table are those of the lab around the main
kernel. Names in brackets are no candidates: they say what something costs.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import sm90_backward_around_lab as around_lab
import sm90_backward_order_lab as order_lab
from sm90_backward_lab import options_of_parent


def plans(headdim: int, is_causal: bool, seqlen: int) -> dict[str, Any]:
    """What is compared, by name."""
    from flash_attn.backends.sm90.plans_backward import plan_backward, plan_ordered

    used = plan_backward(headdim, is_causal, seqlen)
    ordered = plan_ordered(headdim, is_causal, seqlen)
    once = ordered._replace(deterministic=3)
    found = {
        around_lab.IN_USE: used,
        "ordered": ordered,
        "global fences": ordered._replace(deterministic=2),
        "one fence": once,
        "one fence, 2 in flight": once._replace(in_flight=2),
    }
    if headdim > 64:
        stores = used._replace(first_stores=2) if used.first_stores else used
        return found | {"in use, global fences": stores}
    return found | {
        "one fence, 3 in flight": once._replace(in_flight=3),
        "one fence, zeros": once._replace(first_stores=False),
        "one fence, closely": ordered._replace(deterministic=4),
        "one fence, buffer first": ordered._replace(deterministic=5),
        "[first run's fences]": ordered._replace(deterministic=6),
        "[no fences]": ordered._replace(deterministic=7),
    }


class Parent(around_lab.Parent):
    """Runs the phases and keeps what they found."""

    script = Path(__file__)
    choose = staticmethod(plans)


def main() -> None:
    """See the module's docstring."""
    around_lab.plans = plans
    around_lab.SECTIONS = (0,)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deadline", type=float, default=50.0, help="seconds for everything")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seqlens", default="4096,2048,16384,1024", help="in this order")
    parser.add_argument("--headdims", default="64,128", help="in this order")
    options = options_of_parent(
        parser, lambda: order_lab.compile_worker(plans), around_lab.gpu_worker
    )
    if options is None:
        return
    parent = Parent(options)
    parent.compile_all()
    if not options.compile_only:
        parent.time_all()
    parent.table()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
