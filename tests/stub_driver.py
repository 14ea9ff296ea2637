"""A driver that compiles kernels for Hopper and, instead of launching them, notes their arguments.

It stands in for Triton's CUDA driver where there is no GPU. Triton's own launcher class runs on
it, with the C functions below it replaced, so that what is noted is what C code would receive.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

STREAM = 7
# Kernels remember what they compiled for a device number: none is used twice, nor a real one.
_DEVICES = itertools.count(1000, 10)


class Launched(NamedTuple):
    """What the C function got; ``hooks`` are (metadata, enter, exit)."""

    grid: tuple[int, int, int]
    stream: int
    function: int
    flags: tuple[Any, ...]
    metadata: tuple[int, ...]
    hooks: tuple[Any, ...]
    arguments: tuple[Any, ...]


class TensorMap(NamedTuple):
    """What encoding a descriptor was called with."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


class StubDriver:
    """The parts of a driver that Triton and the package ask for.

    Attributes:
        launches: every launch so far.
        encoded: every tensor map so far.
        names: of the loaded kernels, by function.
        device: the current one; tests may change it.
        stream: the current one of device 0; that of others comes as many later. Likewise.
        silent: note nothing (benchmarks).
    """

    def __init__(self, silent: bool = False) -> None:
        self.launches: list[Launched] = []
        self.encoded: list[TensorMap] = []
        self.names: dict[int, str] = {}
        self.device, self.stream, self.silent = next(_DEVICES), STREAM, silent
        self.module = importlib.import_module("triton.backends.nvidia.driver")
        self.launcher_cls = self.module.CudaLauncher
        self.utils = SimpleNamespace(
            load_binary=self._load,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            fill_tma_descriptor=self._encode,
            fill_tma_descriptor_tiled=self._encode,
            build_signature_metadata=lambda signature: tuple(signature),
            launch=self._launch_from_37,
            unload_module=lambda *_: None,
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def _load(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        function = 1000 + len(self.names)
        self.names[function] = name
        return (1, function, 32, 0, 1024)

    def _encode(self, address: int, *rest: Any) -> TensorMap:
        _, _, _, block, shape, strides, _ = rest
        made = TensorMap(address, tuple(shape), tuple(strides), tuple(block))
        self.encoded.append(made)
        return made

    def _launch_from_37(self, x, y, z, stream, function, cooperative, pdl, *rest: Any) -> None:
        if self.silent:
            return
        metadata, launch_metadata, enter, leave, _, _, annotations, signature, arguments = rest
        assert len(annotations) == len(arguments)
        kept = [x for x, kind in zip(arguments, annotations, strict=True) if kind.type == "kernel"]
        assert len(kept) == len(signature)
        hooks = (launch_metadata, enter, leave)
        self._note((x, y, z), stream, function, (cooperative, pdl), metadata, hooks, arguments)

    def _launch_36(self, x, y, z, stream, function, cooperative, pdl, *rest: Any) -> None:
        if self.silent:
            return
        _, _, metadata, launch_metadata, enter, leave, *arguments = rest
        hooks = (launch_metadata, enter, leave)
        self._note((x, y, z), stream, function, (cooperative, pdl), metadata, hooks, arguments)

    def _note(self, grid, stream, function, flags, metadata, hooks, arguments) -> None:
        launch_metadata, enter, leave = hooks
        if enter is not None:
            enter(launch_metadata)
        values = tuple(x.data_ptr() if hasattr(x, "data_ptr") else x for x in arguments)
        noted = Launched(grid, stream, function, flags, metadata, hooks, values)
        self.launches.append(noted)
        if leave is not None:
            leave(launch_metadata)

    def install(self, stack: ExitStack) -> None:
        """Make this the active driver until ``stack`` is left."""
        if hasattr(self.module, "compile_module_from_src"):
            made = SimpleNamespace(launch=self._launch_36)
            _answer(stack, self.module, "compile_module_from_src", made)
            _answer(stack, self.module, "libcuda_dirs", [])
        if hasattr(self.module, "PyKernelArg"):
            kinds = {"ARG_CONSTEXPR": "constexpr", "ARG_KERNEL": "kernel", "ARG_TUPLE": "tuple"}
            for name, kind in kinds.items():
                stack.enter_context(mock.patch.object(self.module, name, kind))
            stack.enter_context(mock.patch.object(self.module, "PyKernelArg", SimpleNamespace))
        before = driver._active
        stack.callback(lambda: setattr(driver, "_active", before))
        driver.set_active(self)
        compiler = importlib.import_module("triton.compiler.compiler")
        _answer(stack, compiler, "max_shared_mem", 232448)


def _answer(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Let a function return ``value`` until ``stack`` is left."""
    stack.enter_context(mock.patch.object(owner, name, return_value=value))


@contextmanager
def stub_driver(silent: bool = False) -> Iterator[StubDriver]:
    """Run a block on a :class:`StubDriver`."""
    made = StubDriver(silent)
    with ExitStack() as stack:
        made.install(stack)
        yield made


TRITON = tuple(int(x) for x in triton.__version__.split(".")[:2])
