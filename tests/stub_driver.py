"""A driver that compiles kernels for Hopper and, instead of launching them, notes their arguments.

It stands in for Triton's CUDA driver where there is no GPU. Triton's own launcher class runs on
it, with the C functions below it replaced, so that what is noted is what C code would receive.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from cubin import parameter_sizes
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from flash_attn.backends import _driver

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


class Handed(NamedTuple):
    """What the driver's library got: the words of CUlaunchConfig's dimensions and shared memory,
    those of attributes, and each parameter's bytes, a map for those of one."""

    config: tuple[int, ...]
    attributes: tuple[int, ...]
    stream: int
    function: int
    parameters: tuple[bytes | TensorMap, ...]


_CONFIG = ctypes.c_uint32 * 14
_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)


class StubDriver:
    """The parts of a driver that Triton and the package ask for.

    Attributes:
        launches: every launch so far.
        encoded: every tensor map so far.
        names: of the loaded kernels, by function.
        device: the current one; tests may change it.
        stream: the current one of device 0; that of others comes as many later. Likewise.
        silent: note nothing (benchmarks).
        handed: every launch by the driver's library so far.
        refusals: what its next launches return.
    """

    def __init__(self, silent: bool = False, library: bool = False) -> None:
        self.sizes: dict[int, list[int]] = {}
        self.handed: list[Handed] = []
        self.refusals: list[int] = []
        self.has_library, self.placed = library, {}
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

    def _load(self, name: str, binary: bytes, *_: Any) -> tuple[int, int, int, int, int]:
        function = 1000 + len(self.names)
        self.names[function] = name
        if self.has_library:
            self.sizes[function] = parameter_sizes(binary, name)
        return (1, function, 32, 0, 1024)

    def _encode(self, address: int, *rest: Any) -> TensorMap:
        _, _, _, block, shape, strides, _ = rest
        made = TensorMap(address, tuple(shape), tuple(strides), tuple(block))
        self.encoded.append(made)
        self.placed[id(made) + _driver.MAP_BYTES] = made
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

    def _library(self) -> Any:
        if not self.has_library:
            raise OSError("there is no driver")
        if self.silent:  # a function that does nothing and returns 0
            return ctypes.CDLL(None).pthread_equal
        return _LAUNCH(self._take)

    def _map_offset(self, encoded: Any, described: int) -> int:
        assert encoded.address == described
        return _driver.MAP_BYTES

    def _take(self, config: int, function: int, pointers: int, extra: int | None) -> int:
        if self.refusals:
            return self.refusals.pop(0)
        words = tuple(_CONFIG.from_address(config))
        sizes = self.sizes[function]
        places = (ctypes.c_uint64 * len(sizes)).from_address(pointers)
        found = [
            self.placed[place] if size == _driver.MAP_BYTES else ctypes.string_at(place, size)
            for place, size in zip(places, sizes, strict=True)
        ]
        stream = words[8] | words[9] << 32
        assert extra is None
        attributes = (ctypes.c_uint32 * (18 * words[12])).from_address(words[10] | words[11] << 32)
        handed = Handed(words[:7], tuple(attributes), stream, function, tuple(found))
        self.handed.append(handed)
        return 0

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
        stack.enter_context(mock.patch.object(_driver, "library", self._library))
        stack.enter_context(mock.patch.object(_driver, "map_offset", self._map_offset))
        before = driver._active
        stack.callback(lambda: setattr(driver, "_active", before))
        driver.set_active(self)
        compiler = importlib.import_module("triton.compiler.compiler")
        _answer(stack, compiler, "max_shared_mem", 232448)


def _answer(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Let a function return ``value`` until ``stack`` is left."""
    stack.enter_context(mock.patch.object(owner, name, return_value=value))


@contextmanager
def stub_driver(silent: bool = False, library: bool = False) -> Iterator[StubDriver]:
    """Run a block on a :class:`StubDriver`."""
    made = StubDriver(silent, library)
    with ExitStack() as stack:
        made.install(stack)
        yield made


TRITON = tuple(int(x) for x in triton.__version__.split(".")[:2])
