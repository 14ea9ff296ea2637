"""Runs our kernels for GPUs without a GPU: they are compiled, and launches end in a stub."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

from recording import REPOSITORY


def install_stub(stack: ExitStack, portable: bool = True) -> None:
    """Let our kernels for GPUs take CPU tensors, as a Hopper GPU's, and launch nothing.

    ``portable=False`` leaves the portable kernels out, which a Hopper GPU's process need not load.
    """
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from stub_driver import stub_driver

    from flash_attn.backends import sm90
    from flash_attn.core import registry

    stack.enter_context(stub_driver(silent=True, library=True))
    families = ("sm90", "triton") if portable else ("sm90",)
    answers: list[tuple[object, str, Any]] = [
        (registry, "own_families", lambda device: families),
        (sm90, "_place_reasons", lambda q: []),
        (sm90.launch, "multiprocessors_of", lambda index: 132),
    ]
    if portable:
        from flash_attn.backends.triton import BACKEND

        answers.append((BACKEND, "unsupported", lambda problem, backward: []))
    for owner, name, value in answers:
        stack.enter_context(mock.patch.object(owner, name, value))
