"""Repeating kernel launches without Triton's binder.

``kernel[grid](...)`` finds the compiled kernel anew on every launch: it classifies each argument,
builds a key and looks it up, which costs several times what the driver needs. Where the arguments
of a call follow from a key that the caller has, all of that can be done once:

* :class:`Launcher` wraps a kernel and launches as usual; inside :func:`recording` it also notes
  what it launched.
* :class:`Repeat` launches what was noted again, for other tensors of the same dtypes, layouts and
  alignments: nothing but addresses is filled in.
* :class:`Handle` is one compiled kernel of one GPU. The driver's library launches it where
  :mod:`flash_attn.backends._driver` can, else Triton's C function.

Everything that is not an address is constant in a :class:`Repeat`, so the caller's key must hold
every number that the launch code looks at. Tensor maps, which the driver encodes from an address
and a layout, are kept by address; the layout belongs to the argument.

Read against Triton 3.6 to 3.9. :func:`undisturbed` is asked before every direct launch: with
launch hooks, debugging or instrumentation the usual path is taken, which serves them.
"""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from . import _driver
from ._compiled import KNOWN_VERSION, look_up_first

logger = logging.getLogger("flash_attn")

_Grid = tuple[int, int, int]
_Run = Callable[[_Grid, int, Sequence[Any]], object]


def settle_keys(*modules: ModuleType) -> None:
    """Ask for the keys of all kernels and helpers of ``modules``, callees' modules first.

    Under its key a compiled kernel lies in Triton's cache. In Triton 3.6 (no longer 3.9) it holds
    the constants that a helper uses only if the helper's own key was asked for before, for another
    kernel: processes that launch in different orders would each compile what the other has.
    """
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                _ = value.cache_key


class Unrepeatable(Exception):
    """Why a launch cannot be repeated directly; the usual path serves it."""


def undisturbed() -> bool:
    """Whether nothing asks to see launches or changes how kernels are compiled."""
    runtime = knobs.runtime
    try:
        return not (
            runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or runtime.debug
            or runtime.add_stages_inspection_hook
            or knobs.compilation.instrumentation_mode
        )
    except AttributeError:  # a plain function in a hook's place
        return False


class Launch(NamedTuple):
    """A kernel launch as it was made."""

    kernel: Any
    grid: Sequence[int]
    compiled: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    device: int
    stream: int


class Tape:
    """What happened inside :func:`recording`, each in order.

    Attributes:
        launches: of kernels, through :class:`Launcher`.
        scratch: tensors from :func:`scratch`.
        counters: tensors from :func:`counter_for`.
        operators: names of PyTorch's own operators that computed something: neither views nor
            uninitialised memory. A :class:`Repeat` does not run them.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.scratch: list[Tensor] = []
        self.counters: list[Tensor] = []
        self.operators: list[str] = []


@cache
def _operators(dynamo_is_loaded: bool) -> type[Any]:
    """A mode that notes the operators that compute on the tape it is made with.

    PyTorch keeps its compiler from looking into modes, and to do so loads it, which takes longer
    than all the rest of a process's first calls. One that is not loaded looks into nothing.
    """

    class Operators(TorchDispatchMode):
        def __init__(self, tape: Tape) -> None:
            super().__init__()
            self.tape = tape

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return dynamo_is_loaded

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func._schema.name.split("::")[-1]
            allocates = name.startswith(("empty", "new_empty"))
            is_nothing = isinstance(result, Tensor) and result.numel() == 0
            if not (func.is_view or allocates or is_nothing):
                self.tape.operators.append(name)
            return result

    return Operators


class _Recording(threading.local):
    tape: Tape | None = None


_recording = _Recording()


@contextmanager
def recording() -> Iterator[Tape]:
    """Note the launches that this thread makes through :class:`Launcher` inside the block, and what
    else it has the device do."""
    before, _recording.tape = _recording.tape, Tape()
    try:
        with _operators("torch._dynamo" in sys.modules)(_recording.tape):
            yield _recording.tape
    finally:
        _recording.tape = before


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that lives for one call; a :class:`Repeat` allocates its own."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if _recording.tape is not None:
        _recording.tape.scratch.append(made)
    return made


# (GPU, stream) -> its counter.
_counters: dict[tuple[int, int], Tensor] = {}


def counter_for(x: Tensor) -> Tensor:
    """One int32 on the GPU of ``x``, the current one, that is 0 whenever a kernel of the current
    stream starts; a :class:`Repeat` takes that of the stream it runs on.

    Kernels set it back themselves, so the streams of a device need one each. A graph that is being
    captured may be replayed on any stream: it gets one of its own, set to 0 by the graph.
    """
    index, tape = driver.active.get_current_device(), _recording.tape
    operators = [] if tape is None else tape.operators.copy()
    made = _counter(x.device, index, driver.active.get_current_stream(index))
    if tape is not None:
        tape.counters.append(made)
        tape.operators = operators  # a Repeat sets its own to 0
    return made


def _counter(device: torch.device, index: int, stream: int) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (index, stream)
    made = _counters.get(key)
    if made is None:
        # Another thread may be making one, too: the first to be stored is used.
        made = _counters.setdefault(key, _lasting_zeros(1, device))
    return made


def _lasting_zeros(number: int, device: torch.device) -> Tensor:
    """int32 that are 0 for the current stream and may be kept for good.

    The current thread may be allocating from a pool that ends with a graph, as where torch.compile
    warms its graphs up: another thread, on the default stream, is not.
    """
    if device.type != "cuda":
        return torch.zeros(number, dtype=torch.int32, device=device)

    def make() -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(torch.cuda.default_stream(device)):
            made = torch.zeros(number, dtype=torch.int32, device=device)
            return made, torch.cuda.current_stream().record_event()

    with ThreadPoolExecutor(1) as other_thread:
        made, is_zero = other_thread.submit(make).result()
    torch.cuda.current_stream(device).wait_event(is_zero)
    return made


# GPU -> memory that is written and never read, by any number of kernels at a time.
_sinks: dict[torch.device, Tensor] = {}
_SINK_BYTES = 1 << 20


def sink_for(x: Tensor) -> int | None:
    """The address of memory for what nobody reads, if a tensor like ``x`` fits."""
    if x.numel() * x.element_size() > _SINK_BYTES:
        return None
    if x.device not in _sinks:
        _sinks.setdefault(x.device, _lasting_zeros(_SINK_BYTES // 4, x.device))
    return _sinks[x.device].data_ptr()


def allocator(device: str) -> Callable[..., Tensor]:
    """``(shape, stride, dtype)`` -> an uninitialised tensor on the current device of a type.

    The functions that PyTorch's own compiled code allocates with cost half of the public one.
    """
    found = getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None)
    if found is not None:
        return found
    return lambda shape, stride, dtype: torch.empty_strided(
        shape, stride, dtype=dtype, device=device
    )


class Launcher:
    """A kernel: ``Launcher(kernel)[grid](*args, **keywords)`` is ``kernel[grid](...)``, noted."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = look_up_first(kernel)
        self.__name__ = kernel.__name__

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., Any]:
        launch = self.kernel[grid]
        if torch.compiler.is_compiling() or _recording.tape is None:
            return launch
        return self._noted(launch, grid, _recording.tape)

    def _noted(self, launch: Any, grid: Sequence[int], tape: Tape) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            device = driver.active.get_current_device()
            stream = driver.active.get_current_stream(device)
            compiled = launch(*args, **keywords)
            noted = Launch(self.kernel, grid, compiled, args, keywords, device, stream)
            tape.launches.append(noted)
            return compiled

        return run


class Handle:
    """A compiled kernel, loaded on the GPU that was current.

    Attributes:
        arguments: what the recorded launch passed, one for each parameter.
        run: ``run(grid, stream, arguments)`` launches. ``arguments`` are those of :attr:`flat`:
            numbers as they are, addresses for tensors, anything for constexprs.
        flat: :attr:`arguments` with each tensor descriptor replaced by what the driver takes for
            it, a :class:`_Map` and its shape and strides.

    Raises:
        Unrepeatable: this Triton, or this kernel, is not launched as was expected.
    """

    def __init__(self, launch: Launch) -> None:
        if not KNOWN_VERSION:
            raise Unrepeatable(f"Triton {triton.__version__} is unknown")
        if not isinstance(launch.kernel, JITFunction) or launch.kernel.pre_run_hooks:
            raise Unrepeatable(f"{launch.kernel!r} is not a plain compiled kernel")
        compiled = launch.compiled
        if hasattr(compiled, "result"):
            compiled = compiled.result()
        bound = inspect.signature(launch.kernel.fn).bind(
            *launch.args, **{k: v for k, v in launch.keywords.items() if _is_parameter(launch, k)}
        )
        bound.apply_defaults()
        self.arguments = list(bound.arguments.values())
        if any(isinstance(x, (tuple, list)) for x in self.arguments):
            raise Unrepeatable("tuple arguments are not repeated")
        try:
            self._bind(compiled)
        except AttributeError as error:
            raise Unrepeatable(f"Triton {triton.__version__}: {error}") from error

    def _bind(self, compiled: Any) -> None:
        self._compiled = compiled  # keeps the module loaded
        launcher, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        descriptors = [i for i, x in enumerate(self.arguments) if hasattr(x, "block_shape")]
        maps = list(getattr(compiled.metadata, "tensordesc_meta", None) or [])
        self.flat: list[Any] = list(self.arguments)
        self._tensor_maps: list[Any] | None = None
        if _is_plain_cuda(launcher):
            if len(maps) != len(descriptors):
                raise Unrepeatable("descriptors that are no tensor maps are not repeated")
            self._expand(launcher, dict(zip(descriptors, maps, strict=True)))
            self.run = _direct(launcher, function, metadata, bool(descriptors))
            self._tensor_maps = maps
        elif descriptors:
            raise Unrepeatable(f"{type(launcher).__name__} takes no tensor maps")
        else:
            self.run = _through_launcher(launcher, function, metadata)

    def prepare(
        self,
        grid: _Grid,
        places: Sequence[tuple[int, int]],
        maps: Sequence[tuple[int, int, _Map]],
        otherwise: _driver.Launch,
    ) -> _driver.Launch:
        """The launch by the driver's library, see :func:`_driver.prepare`.

        Raises:
            _driver.Unprepared: it cannot be.
        """
        if self._tensor_maps is None:
            raise _driver.Unprepared("not one of CUDA's, or one that takes scratch memory")
        compiled, launcher = self._compiled, self._compiled.run
        if launcher.launch_cooperative_grid:
            raise _driver.Unprepared("a cooperative grid")
        kinds = _driver.kinds_of([*compiled.src.signature.values()], self._tensor_maps)
        found = [(position, index, of.for_driver()) for position, index, of in maps]
        return _driver.prepare(
            compiled.function,
            grid,
            compiled.packed_metadata,
            _driver.parameter_sizes(compiled.asm.get("ptx", ""), compiled.name),
            _driver.Arguments(kinds, self.flat, places, found),
            early=bool(launcher.launch_pdl),
            otherwise=otherwise,
        )

    def _expand(self, launcher: Any, maps: dict[int, Any]) -> None:
        make = inspect.getmodule(type(launcher)).make_tensordesc_arg  # type: ignore[union-attr]
        extra = len(inspect.signature(make).parameters) - 2
        self.flat = []
        for position, value in enumerate(self.arguments):
            if position in maps:
                encoded = make(value, maps[position], *[()] * extra)
                self.flat += [_Map(value, maps[position], make, extra, encoded[0]), *encoded[1:]]
            else:
                self.flat.append(value)


def _is_parameter(launch: Launch, name: str) -> bool:
    return name in launch.kernel.arg_names


def _is_plain_cuda(launcher: Any) -> bool:
    """Whether the C function behind Triton's CUDA launcher can be called without it."""
    return (
        type(launcher).__name__ == "CudaLauncher"
        and type(launcher).__module__ == "triton.backends.nvidia.driver"
        and launcher.global_scratch_size == 0
        and launcher.profile_scratch_size == 0
        and not getattr(launcher, "gsan_enabled", False)
    )


def _through_launcher(launcher: Any, function: int, metadata: Any) -> _Run:
    def run(grid: _Grid, stream: int, arguments: Sequence[Any]) -> None:
        launcher(*grid, stream, function, metadata, None, None, None, *arguments)

    return run


def _direct(launcher: Any, function: int, metadata: Any, encoded: bool) -> _Run:
    launch = launcher.launch
    if encoded:
        # Triton wraps the C function to encode descriptors, which is done here.
        launch = inspect.getclosurevars(launch).nonlocals.get("launcher")
        if launch is None:
            raise Unrepeatable("Triton's way to encode descriptors is unknown")
    flags = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    if hasattr(launcher, "arg_annotations"):  # from Triton 3.7 on
        hooks_and_scratch = (None,) * 5
        parsing = (launcher.arg_annotations, launcher.kernel_signature)
        constant: tuple[Any, ...] = (*flags, metadata, *hooks_and_scratch, *parsing)

        def run(grid: _Grid, stream: int, arguments: Sequence[Any]) -> None:
            launch(*grid, stream, function, *constant, arguments)

    else:
        scratch_memory, hooks = (None,) * 2, (None,) * 3
        constant = (*flags, *scratch_memory, metadata, *hooks)

        def run(grid: _Grid, stream: int, arguments: Sequence[Any]) -> None:
            launch(*grid, stream, function, *constant, *arguments)

    return run


class _Map:
    """The tensor map of one argument, encoded for each address once.

    An entry holds an address and 128 bytes, no tensor: where an address comes back with another
    tensor of this layout, the same map is right.
    """

    CAPACITY = 256

    def __init__(self, descriptor: Any, metadata: Any, make: Any, extra: int, encoded: Any) -> None:
        self.base = descriptor.base
        self._fields = (type(descriptor), dict(vars(descriptor), base=None))
        self._make, self._metadata, self._extra = make, metadata, extra
        self._encoded = {descriptor.base.data_ptr(): encoded}
        self._placed: dict[int, tuple[Any, int]] = {}
        self._offset = 0

    def release(self) -> None:
        """Forget the recorded tensor."""
        self.base = None

    def at(self, address: int) -> Any:
        """The driver's object for the tensor at ``address``."""
        encoded = self._encoded.get(address)
        return self._encode(address) if encoded is None else encoded

    def _encode(self, address: int) -> Any:
        kind, fields = self._fields
        descriptor = object.__new__(kind)
        vars(descriptor).update(fields, base=_Address(address))
        encoded = self._make(descriptor, self._metadata, *[()] * self._extra)[0]
        if len(self._encoded) >= self.CAPACITY:
            self._encoded.clear()
            self._placed.clear()
        self._encoded[address] = encoded
        return encoded

    def for_driver(self) -> _driver.TensorMaps:
        """Where the maps lie, by that of the recorded address, before any other is asked for.

        Raises:
            _driver.Unprepared: not where it was expected.
        """
        ((address, encoded),) = self._encoded.items()
        self._offset = _driver.map_offset(encoded, address)
        return _driver.TensorMaps(self._placed.get, self._place)

    def _place(self, address: int) -> tuple[Any, int]:
        encoded = self.at(address)
        self._placed[address] = made = (encoded, id(encoded) + self._offset)
        return made


class _Address(NamedTuple):
    """Stands for a tensor where only its address is asked for."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class Repeat:
    """The launches of a tape, on other tensors.

    Args:
        tape: launches of one stream, and nothing else that is computed but ``ignored`` operators,
            for which the caller cares.
        tensors: the tensors whose addresses the launches depend on, in the order in which
            :meth:`__call__` gets addresses. An argument must be one of them, of the scratch
            tensors or of the counters.

    Attributes:
        device: the GPU of the recording, which must be what ``current_device()`` says.
        only: the launch, taking a stream and addresses, if it is one without memory of its own.

    Raises:
        Unrepeatable: a launch took another tensor, or cannot be launched directly.
    """

    def __init__(
        self, tape: Tape, tensors: Sequence[Tensor], ignored: frozenset[str] = frozenset()
    ) -> None:
        if not tape.launches:
            raise Unrepeatable("nothing was launched")
        others = sorted(set(tape.operators) - ignored)
        if others:
            raise Unrepeatable(f"besides the launches there is {', '.join(others)}")
        if len({(launch.device, launch.stream) for launch in tape.launches}) > 1:
            raise Unrepeatable("the launches were on several streams")
        known = [*tensors, *tape.scratch, *tape.counters]
        self._steps = [_step(launch, known) for launch in tape.launches]
        self._scratch = [
            (allocator(x.device.type), (tuple(x.shape), x.stride(), x.dtype)) for x in tape.scratch
        ]
        self._counters = [x.device for x in tape.counters]
        self.device = tape.launches[0].device
        self.current_device = _current_device()
        self.current_stream = driver.active.get_current_stream
        is_only = len(self._steps) == 1 and not (tape.scratch or tape.counters)
        self.only = self._steps[0] if is_only else None

    def __call__(self, addresses: list[int]) -> None:
        """Launch on the current stream of the current GPU; ``addresses`` is changed."""
        stream = self.current_stream(self.device)
        held = []  # until the launches are made: then the memory is given on in the stream's order
        for allocate, layout in self._scratch:
            held.append(made := allocate(*layout))
            addresses.append(made.data_ptr())
        for device in self._counters:
            held.append(made := _counter(device, self.device, stream))
            addresses.append(made.data_ptr())
        for launch in self._steps:
            launch(stream, addresses)


def _current_device() -> Callable[[], int]:
    """What tells the current GPU."""
    asked = driver.active.get_current_device
    if asked is torch.cuda.current_device:
        # Initialises CUDA and then asks this: three times as long.
        return getattr(torch._C, "_cuda_getDevice", asked)
    return asked


def _step(launch: Launch, known: Sequence[Tensor]) -> _driver.Launch:
    handle = Handle(launch)
    template, places, maps = handle.flat, [], []
    for position, value in enumerate(template):
        if isinstance(value, _Map):
            maps.append((position, _index(value.base, known, launch), value))
            value.release()
        elif isinstance(value, Tensor):
            places.append((position, _index(value, known, launch)))
        else:
            continue
        template[position] = None
    if callable(launch.grid):
        raise Unrepeatable("grids that are functions are not repeated")
    grid = _three(launch.grid)
    by_triton = _by_triton(handle.run, grid, template, places, maps)
    try:
        return handle.prepare(grid, places, maps, otherwise=by_triton)
    except (_driver.Unprepared, AttributeError) as reason:  # or a Triton of another make
        logger.info("%s is launched by Triton's function: %s", launch.kernel.__name__, reason)
        return by_triton


def _by_triton(
    run: _Run,
    grid: _Grid,
    template: list[Any],
    places: list[tuple[int, int]],
    maps: list[tuple[int, int, _Map]],
) -> _driver.Launch:
    def launch(stream: int, addresses: list[int]) -> None:
        arguments = template.copy()
        for position, index in places:
            arguments[position] = addresses[index]
        for position, index, tensor_map in maps:
            arguments[position] = tensor_map.at(addresses[index])
        run(grid, stream, arguments)

    return launch


def _three(grid: Sequence[int]) -> _Grid:
    x, y, z = (*grid, 1, 1)[:3]
    return (x, y, z)


def _index(tensor: Tensor, known: Sequence[Tensor], launch: Launch) -> int:
    """Which of the known tensors an argument is: by identity, since addresses may coincide."""
    for index, candidate in enumerate(known):
        if tensor is candidate:
            return index
    raise Unrepeatable(f"{launch.kernel.__name__} took a tensor made during the call")


def repeat(
    tape: Tape, tensors: Sequence[Tensor], ignored: frozenset[str] = frozenset()
) -> Repeat | None:
    """A :class:`Repeat`, or None with the reason logged."""
    try:
        return Repeat(tape, tensors, ignored)
    except Unrepeatable as reason:
        logger.info("launches stay on Triton's usual path: %s", reason)
        return None
