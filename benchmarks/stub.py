"""Runs our kernels for GPUs without a GPU: they are compiled, and launches end in a stub."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from unittest import mock

from recording import REPOSITORY


def install_stub(stack: ExitStack) -> None:
    """Let our kernels for GPUs take CPU tensors, as a Hopper GPU's, and launch nothing."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from stub_driver import stub_driver

    from flash_attn.backends import sm90
    from flash_attn.backends.triton import BACKEND as PORTABLE
    from flash_attn.core import registry

    stack.enter_context(stub_driver(silent=True))
    for owner, name, value in (
        (registry, "own_families", lambda device: ("sm90", "triton")),
        (sm90, "_place_reasons", lambda q: []),
        (sm90.launch, "multiprocessors_of", lambda index: 132),
        (PORTABLE, "unsupported", lambda problem, backward: []),
    ):
        stack.enter_context(mock.patch.object(owner, name, value))
