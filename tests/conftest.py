"""Fixtures shared by all tests.

A test that takes ``device`` runs on the CPU, and once more, marked ``gpu``, on the GPU: the same
semantic tests hold for every backend. On GPUs whose tensors two families of kernels take (compute
capability 9.0),

* tests marked ``families`` run on the GPU twice, once by the portable kernels and once preferring
  the others, also where the automatic choice would not;
* all others run by the automatic choice.

There, two calls that are compared bit for bit must be served by the same kernels, see
``support.families_of``.

``FLASH_ATTN_TEST_BACKEND=NAME`` runs every test on that backend alone (with ``TRITON_INTERPRET=1``
and ``triton`` that is the portable kernels in the interpreter), ``NAME,NAME,...`` on the first that
serves.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import flash_attn
from flash_attn.core import registry, repeated
from flash_attn.core.device import arch_of

# The modules of the second distribution, as if it were installed.
sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "flash-attn-3" / "src"))


FATAL_GPU_ERROR = re.compile(
    r"illegal memory access|misaligned address|unspecified launch failure|illegal instruction"
    r"|device-side assert|CUDA_ERROR_ASSERT",
    re.IGNORECASE,
)

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_bounds
    import interpreter_language

    interpreter_bounds.install()
    interpreter_language.install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Ends a process whose GPU refuses every further call, so that one test is to blame.

    Under pytest-xdist another worker takes over, and the test is reported as having crashed.
    """
    report = yield
    error = "" if call.excinfo is None else str(call.excinfo.value)
    if FATAL_GPU_ERROR.search(error) and gpu_is_lost():
        message = f"the GPU is lost to this process since {item.nodeid}: {error}"
        if "PYTEST_XDIST_WORKER" in os.environ:
            print(message, file=sys.__stderr__, flush=True)  # noqa: T201
            os._exit(1)
        pytest.exit(message, 1)
    return report


def gpu_is_lost() -> bool:
    """Whether this process's GPU refuses to be waited for; another's may be meant."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# What a process may hold of a GPU's memory between tests: many processes share it.
_HELD_BYTES = 1 << 30


@pytest.fixture(autouse=True)
def shared_gpu_memory() -> Iterator[None]:
    """What PyTorch keeps of a large test's memory is given back after it."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > _HELD_BYTES:
        torch.cuda.empty_cache()


CHOSEN = [name for name in os.environ.get("FLASH_ATTN_TEST_BACKEND", "").split(",") if name]
PORTABLE = pytest.mark.prefers("triton", "cpu")
HOPPER = pytest.mark.prefers("sm90", "triton", "cpu")


def has_two_families() -> bool:
    """Whether the GPU has kernels of its own besides the portable ones."""
    return torch.cuda.is_available() and arch_of(torch.cuda.current_device()) == "sm90"


def gpu_devices(marks: set[str]) -> list[Any]:
    """The GPU's values of ``device`` for a test with these marks."""
    gpu = pytest.mark.gpu
    if CHOSEN or not has_two_families() or "families" not in marks:
        return [pytest.param("cuda", marks=gpu)]
    return [
        pytest.param("cuda", marks=[gpu, PORTABLE]),
        pytest.param("cuda", marks=[gpu, HOPPER], id="cuda-sm90"),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        marks = {mark.name for mark in metafunc.definition.iter_markers()}
        metafunc.parametrize("device", ["cpu", *gpu_devices(marks)], scope="session")


def is_served_by_both(item: pytest.Item) -> bool:
    """Whether both families of kernels compute in the item's dtype, as far as it names one."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("dtype") not in (torch.float32, torch.float64)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        again = {x for x in items if HOPPER.mark in x.own_markers and not is_served_by_both(x)}
        config.hook.pytest_deselected(items=list(again))
        items[:] = [x for x in items if x not in again]
        return
    # Last of all, a long test would keep one worker busy while the others have nothing left to do.
    items.sort(key=lambda item: "slow" not in item.keywords)
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@contextmanager
def served_by(order: Sequence[str]) -> Iterator[None]:
    """Run a block by the one backend in ``order``, by the first of several that serves, or, where
    it is empty, by the choice in force. Fails if Triton refuses a kernel in the block."""
    before = dict(registry._given_up)
    with ExitStack() as stack:
        if len(order) == 1:
            stack.enter_context(flash_attn.use_backend(order[0]))
        elif order:
            # Calls are repeated by whoever served their like, and nothing tells these orders apart.
            repeated.clear()
            stack.callback(repeated.clear)
            for name, value in (
                ("own_families", lambda device: tuple(order)),
                ("_reasons_to_pass_over", registry._reasons),
            ):
                stack.enter_context(mock.patch.object(registry, name, value))
        yield
    # Another backend took over, and what ran may have been right without what it is about.
    assert registry._given_up == before, "kernels were refused by Triton"


@pytest.fixture(autouse=True)
def chosen_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run by the backends that a mark or the environment names."""
    mark = request.node.get_closest_marker("prefers")
    with served_by(CHOSEN if mark is None else mark.args):
        yield


@pytest.fixture(params=["auto", "triton"])
def each_choice(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run by the automatic choice and, where that is not the portable kernels, by these too."""
    name: str = request.param
    if name == "triton" and (CHOSEN or not has_two_families()):
        pytest.skip("there is one choice: the automatic one, or what the environment names")
    with nullcontext() if CHOSEN else flash_attn.use_backend(name):
        yield name


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)
