"""Programs written for FlashAttention, run from their own sources: `make test-clients`.

Their packages (requirements.txt) are in an environment of their own, so `make test` skips these
tests. Some programs look for the package only where there is a GPU. On a machine
without one that question alone is answered with yes, while they look; what they compute is on CPU
tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def as_if_there_were_a_gpu() -> Iterator[None]:
    """Answers programs that ask for a GPU before they look for the package."""
    if DEVICE == "cuda":
        yield
        return
    properties = SimpleNamespace(major=9, minor=0)
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
        mock.patch("torch.cuda.current_device", return_value=0),
    ):
        yield


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error in the Frobenius norm."""
    expected = expected.detach().double().cpu()
    return float((found.detach().double().cpu() - expected).norm() / expected.norm())
