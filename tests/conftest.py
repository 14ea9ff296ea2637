"""Fixtures shared by all tests.

A test that takes ``device`` runs on the CPU, and once more, marked ``gpu``, on the GPU: the same
semantic tests hold for every backend. ``FLASH_ATTN_TEST_BACKEND`` runs the CPU half on a backend of
choice; with ``TRITON_INTERPRET=1`` and ``triton`` that is the portable kernels in the interpreter.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flash_attn

# The modules of the second distribution, as if it were installed.
sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "flash-attn-3" / "src"))


FATAL_GPU_ERROR = re.compile(
    r"illegal memory access|misaligned address|unspecified launch failure|illegal instruction"
    r"|device-side assert|CUDA_ERROR_ASSERT",
    re.IGNORECASE,
)

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_bounds

    interpreter_bounds.install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Ends a process whose GPU refuses every further call, so that one test is to blame.

    Under pytest-xdist another worker takes over, and the test is reported as having crashed.
    """
    report = yield
    if call.excinfo is not None and FATAL_GPU_ERROR.search(str(call.excinfo.value)):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the GPU is lost to this process since {item.nodeid}: {call.excinfo.value}", 1)
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        devices = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("device", devices, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def chosen_backend() -> Iterator[None]:
    """Run under the backend that the environment names."""
    name = os.environ.get("FLASH_ATTN_TEST_BACKEND")
    if name is None:
        yield
        return
    with flash_attn.use_backend(name):
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)
