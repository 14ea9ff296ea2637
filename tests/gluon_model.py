"""A model of Gluon on the CPU: runs the source of a warp-specialised Hopper kernel in plain Python.

The kernel's module is loaded a second time with stand-ins for Triton. Tensors are numpy arrays,
layouts are ignored, and every partition of every resident program is a thread of its own; one runs
at a time, and who comes next, and when TMA finishes what, is drawn at random. So one run is one
possible interleaving, and a run finds

* wrong results: shared memory starts as NaN and global memory as the caller left it;
* deadlocks: nobody can go on and TMA has nothing to do, also where programs wait for each other;
* shared memory written while TMA or a warpgroup MMA still reads or writes it;
* results of a product used before they were waited for;
* shared memory handed to the asynchronous proxy (TMA, MMA) without a fence after threads wrote it,
  or, if TMA writes there, read it;
* barriers completed too often, and waits that miss a phase;
* TMA asked to write before a fence puts it behind the counters that were looked at;
* in kernels with DETERMINISTIC, additions to global memory in another order than that of the
  programs' numbers, or started before the one that they follow is in memory;
* additions that start before what TMA stores in the same place is in memory, and such a store after
  additions or another one.

What it does not model: registers, bank conflicts, the barriers that the compiler itself adds, and
warps of one warpgroup apart from each other.
"""

from __future__ import annotations

import functools
import importlib
import random
import re
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.runtime.jit import JITFunction

KERNELS = Path(__file__).resolve().parents[1] / "src" / "flash_attn" / "kernels"


class ModelError(AssertionError):
    """The kernel broke a rule of the machine."""


# ------------------------------------------------------------------------------------------ values
class DType(NamedTuple):
    """An element type."""

    name: str
    primitive_bitwidth: int

    @property
    def element_ty(self) -> DType:
        return self


FLOAT32, FLOAT16, BFLOAT16 = DType("float32", 32), DType("float16", 16), DType("bfloat16", 16)
INT32, INT64 = DType("int32", 32), DType("int64", 64)
_OF_TORCH = {
    torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16,
    torch.int32: INT32, torch.int64: INT64,
}  # fmt: skip


def rounded(x: np.ndarray, dtype: DType) -> np.ndarray:
    """``x`` with the precision of ``dtype``; floats stay float32 arrays."""
    if dtype == FLOAT16:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    if dtype == BFLOAT16:
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().float().numpy()
    if dtype == FLOAT32:
        return x.astype(np.float32)
    return x.astype(np.int64 if dtype == INT64 else np.int32)


class Int(int):
    """A scalar: integer division truncates, as on the GPU."""

    def to(self, dtype: DType) -> Int:
        return self

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, int):
            quotient = abs(int(self)) // abs(int(other))
            return Int(quotient if (self >= 0) == (other >= 0) else -quotient)
        return NotImplemented

    def __mod__(self, other: Any) -> Any:
        return Int(int(self) - int(self // other) * int(other))


def _keep_type(name: str) -> Callable[..., Any]:
    def operation(self: Int, other: Any) -> Any:
        result = getattr(int, name)(self, other)
        return Int(result) if isinstance(result, int) and not isinstance(result, bool) else result

    return operation


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "and", "or", "xor"):
    setattr(Int, f"__{_name}__", _keep_type(f"__{_name}__"))


class Tensor(np.ndarray):
    """A tensor in registers."""

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: DType) -> Tensor:
        return rounded(np.asarray(self), dtype).view(Tensor)

    def permute(self, order: list[int]) -> Tensor:
        return self.transpose(order)

    def split(self) -> tuple[Tensor, Tensor]:
        return self[..., 0], self[..., 1]


def tensor(x: Any) -> Tensor:
    return np.asarray(x).view(Tensor)


class Pending:
    """The result of a product that nobody has waited for."""

    def __init__(self, value: Tensor, sources: list[Memory]) -> None:
        self.value, self.sources, self.is_done = value, sources, False


# ------------------------------------------------------------------------------------------ memory
class Memory:
    """A view of shared memory, with who uses each element at the moment, who wrote it, and whose
    threads read it (a bit for each partition) without a fence since."""

    def __init__(self, data: Any, busy: Any, unfenced: Any, read: Any, dtype: DType) -> None:
        self.data, self.busy, self.unfenced, self.read = data, busy, unfenced, read
        self.dtype = dtype
        self.following: Memory = self  # of an array's buffer, that buffer and those after it

    @classmethod
    def allocate(cls, dtype: DType, shape: list[int]) -> Memory:
        data = np.full(shape, np.nan, np.float32)
        return cls(data, *(np.zeros(shape, np.int32) for _ in range(3)), dtype)

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        return self.data, self.busy, self.unfenced, self.read

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def _view(self, change: Callable[[np.ndarray], np.ndarray]) -> Memory:
        views = [change(x) for x in self.parts]
        if not all(np.shares_memory(a, b) for a, b in zip(views, self.parts, strict=True)):
            raise ModelError("a view that needs a copy")
        return Memory(*views, self.dtype)

    def index(self, i: int) -> Memory:
        if not 0 <= i < self.data.shape[0]:
            raise ModelError(f"slot {i} of {self.data.shape[0]}")
        found = self._view(lambda x: x[int(i)])
        found.following = self._view(lambda x: x[int(i) :])
        return found

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        where = [slice(None)] * self.data.ndim
        where[dim] = slice(start, start + length)
        return self._view(lambda x: x[tuple(where)])

    def reshape(self, shape: list[int]) -> Memory:
        return self._view(lambda x: x.reshape(shape))

    def permute(self, order: list[int]) -> Memory:
        return self._view(lambda x: x.transpose(order))

    def _reinterpret(self, dtype: DType, shape: list[int], layout: Any) -> Beside:
        """Of an array's buffer: it and those after it as one, their columns side by side."""
        rows, columns = shape
        count = columns // self.data.shape[-1]
        parts = self.following.slice(0, count)
        if parts.data.size != rows * columns:
            raise ModelError(f"{parts.data.shape} is not {shape}")
        view = parts.reshape([count, rows, -1]).permute([1, 0, 2])
        return Beside(*view.parts, dtype)

    def load(self, layout: Any = None) -> Tensor:
        if (self.busy < 0).any():
            raise ModelError("read while TMA writes it")
        self.read |= here().bit
        return tensor(self.data.copy())

    def store(self, value: Tensor) -> None:
        here().pause()
        new = rounded(np.asarray(value), self.dtype).reshape(self.data.shape)
        # Several may write the same: who reads meanwhile sees no difference, and whoever's fence
        # comes first will do. Of that the model knows no more than that it may happen.
        changed = ~((new == self.data) | (np.isnan(new) & np.isnan(self.data)))
        if (self.busy < 0).any() or self.busy[changed].any():
            raise ModelError("written while TMA or a product uses it")
        self.data[...] = new
        me = here().identity
        self.unfenced[...] = np.where(changed | (self.unfenced == me), me, 0)

    def read_begins(self) -> None:
        """By TMA or a product."""
        if (self.busy < 0).any():
            raise ModelError("read while TMA writes it")
        if self.unfenced.any():
            raise ModelError("read asynchronously without a fence after writing")
        self.busy += 1

    def read_ends(self) -> None:
        self.busy -= 1

    def write_begins(self) -> None:
        """By TMA."""
        if self.busy.any():
            raise ModelError("TMA writes what is in use")
        if self.read.any():
            raise ModelError("TMA writes what threads read without a fence behind it")
        self.busy -= 1

    def write_ends(self, value: np.ndarray) -> None:
        self.data[...] = value.reshape(self.data.shape)
        self.unfenced[...] = 0
        self.busy += 1


class Beside(Memory):
    """Buffers side by side, (rows, count, columns of each), as an operand of products."""

    @property
    def matrix(self) -> np.ndarray:
        return self.data.reshape(self.data.shape[0], -1)

    def slice(self, start: int, length: int, dim: int = 0) -> Beside:
        part = super().slice(start, length, dim)
        return Beside(*part.parts, self.dtype)


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.left = self.bytes = self.phase = 0

    def arrive(self, count: int = 1) -> None:
        self.left -= count
        if self.left < 0:
            raise ModelError("more arrivals than a barrier counts")
        self.settle()

    def settle(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.left, self.phase = self.count, self.phase ^ 1


class Barriers:
    """An array of mbarriers."""

    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self.all[i]


class Pointer:
    """Addresses in a torch tensor's storage."""

    def __init__(self, base: torch.Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset
        self.dtype = _OF_TORCH[base.dtype]

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.base, self.offset + offset)

    def _places(self, mask: Any) -> tuple[torch.Tensor, Any, Any]:
        flat = torch.empty(0, dtype=self.base.dtype).set_(self.base.untyped_storage())
        at = np.asarray(self.offset) + self.base.storage_offset()
        inside = np.broadcast_to(True if mask is None else np.asarray(mask), at.shape)
        if at[inside].size and not (at[inside].min() >= 0 and at[inside].max() < flat.numel()):
            raise ModelError("an address outside the tensor")
        return flat, at, inside

    def load(self, mask: Any, other: float) -> Tensor:
        flat, at, inside = self._places(mask)
        found = flat[torch.from_numpy(at[inside].astype(np.int64))]
        if not self.base.is_floating_point():
            values = np.full(at.shape, int(other), np.int64)
            values[inside] = found.numpy()
            return tensor(values) if at.ndim else Int(values)
        values = np.full(at.shape, other, np.float32)
        values[inside] = found.float().numpy()
        return tensor(values)

    def store(self, value: Any, mask: Any) -> None:
        flat, at, inside = self._places(mask)
        kind = np.float32 if self.base.is_floating_point() else np.int64
        values = np.broadcast_to(np.asarray(value, kind), at.shape)[inside]
        where = torch.from_numpy(at[inside].astype(np.int64))
        flat[where] = torch.from_numpy(np.ascontiguousarray(values)).to(flat.dtype)


class Descriptor:
    """A TMA descriptor of a torch tensor. Addresses wrap at 2**64, as they do for TMA."""

    def __init__(self, host: Any) -> None:
        base = host.base
        self.flat = torch.empty(0, dtype=base.dtype).set_(base.untyped_storage())
        self.first, self.shape, self.strides = base.storage_offset(), host.shape, host.strides
        self.dtype = _OF_TORCH[base.dtype]
        self.layout = None
        self.block_type = types.SimpleNamespace(shape=host.block_shape, element_ty=self.dtype)

    @property
    def bytes(self) -> int:
        return int(np.prod(self.block_type.shape)) * self.dtype.primitive_bitwidth // 8

    def _places(self, at: Any) -> tuple[tuple[slice, ...], torch.Tensor]:
        """The part of a block at ``at`` that is inside of the tensor, and where it lies."""
        ranges = [
            (max(-int(a), 0), max(min(n, size - int(a)), max(-int(a), 0)))
            for a, n, size in zip(at, self.block_type.shape, self.shape, strict=True)
        ]
        places = np.zeros([1] * len(ranges), np.int64) + self.first
        for dim, ((begin, end), a, stride) in enumerate(zip(ranges, at, self.strides, strict=True)):
            index = (np.arange(begin, end, dtype=np.int64) + int(a)) * np.int64(stride)
            places = places + index.reshape([-1 if i == dim else 1 for i in range(len(ranges))])
        if places.size and not (places.min() >= 0 and places.max() < self.flat.numel()):
            raise ModelError("TMA outside of the tensor's memory")
        return tuple(slice(*one) for one in ranges), torch.from_numpy(places)

    def touches(self, at: Any) -> bool:
        """Whether some of a block at ``at`` is inside of the tensor."""
        return all(part.start < part.stop for part in self._places(at)[0])

    def read(self, at: Any) -> np.ndarray:
        inside, places = self._places(at)
        block = np.zeros(self.block_type.shape, np.float32)
        block[inside] = self.flat[places].float().numpy()
        return block

    def write(self, at: Any, block: np.ndarray, add: bool) -> None:
        inside, places = self._places(at)
        part = block.reshape(self.block_type.shape)[inside]
        values = torch.from_numpy(np.ascontiguousarray(part))
        if add:
            values = values + self.flat[places]
        self.flat[places] = values.to(self.flat.dtype)


# -------------------------------------------------------------------------------------- scheduling
class Agent:
    """A partition of a program, on a thread that runs only when it is told to."""

    def __init__(self, machine: Machine, program: int, name: str, work: Callable[[], None]) -> None:
        self.machine, self.program, self.name = machine, program, name
        self.identity = machine.next_identity()
        self.bit = 1  # of a program's partitions each has another one
        # Some are much slower than others, or lags of more than a few instructions never happen.
        self.speed = machine.random.choice((0.01, 1.0))
        self.may_run: SimpleQueue[None] = SimpleQueue()
        self.ready: Callable[[], bool] = lambda: True
        self.error: BaseException | None = None
        self.is_done = False
        self.products: list[Pending] = []
        self.stores: list[Transfer] = []
        self.memories: list[Memory] = []
        self.seen: tuple[Pointer, int]
        # Whether what was looked at is "relaxed" or "acquired", for which TMA needs a fence more.
        self.looked = ""
        self.has_moved = False
        self.warps = 4
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        self.may_run.get()
        _CURRENT.agent = self
        try:
            if not self.machine.is_over:
                with np.errstate(all="ignore"):  # infinities are numbers to the kernels
                    work()
                if self.products:
                    raise ModelError("ends with products that nobody waited for")
                if any(not one.is_read for one in self.stores):
                    raise ModelError("ends while TMA reads its shared memory")
        except _Stop:
            pass
        except BaseException as problem:
            self.error = problem
        self.is_done = True
        self.machine.ended.put(self)

    def pause(self, ready: Callable[[], bool] | None = None) -> None:
        """Let others run; go on when ``ready``."""
        self.ready = ready or (lambda: True)
        chosen = self.machine.choose()
        if chosen is not self:  # else a turn costs no change of threads
            chosen.may_run.put(None)
            self.may_run.get()
        if self.machine.is_over:
            raise _Stop

    def look(self, counter: Pointer) -> int:
        """The value of a counter in global memory."""
        self.pause()
        self.seen = (counter, int(counter.load(None, 0)))
        return self.seen[1]

    def fence_looks(self, text: str) -> None:
        """The fences of an instruction, one after the other."""
        for kind in re.findall(r"fence\.(acq_rel\.gpu|proxy\.async)", text):
            if kind == "acq_rel.gpu" and self.looked:
                self.looked = "acquired"
            elif kind == "proxy.async" and self.looked == "acquired":
                self.looked = ""

    def sleep(self) -> None:
        """Before another look at the counter looked at last: until it changes."""
        counter, value = self.seen
        self.pause(lambda: int(counter.load(None, 0)) != value)


class _Stop(BaseException):
    """Ends an agent whose machine has failed."""


class Transfer:
    """Something that TMA is asked to do: in parts, between which others happen."""

    def __init__(self, *parts: Callable[[], None]) -> None:
        self.parts = list(parts)

    def go_on(self) -> None:
        """Do the next part."""
        self.parts.pop(0)()

    @property
    def is_done(self) -> bool:
        return not self.parts

    @property
    def is_read(self) -> bool:
        """Of two parts, reading shared memory is done."""
        return len(self.parts) < 2


_CURRENT = threading.local()


def here() -> Agent:
    """The agent that is running."""
    return _CURRENT.agent


class Machine:
    """Runs programs, ``resident`` at a time, in the order of their numbers."""

    def __init__(self, seed: int, resident: int, is_ordered: bool) -> None:
        self.random = random.Random(seed)
        self.resident, self.is_ordered = resident, is_ordered
        # The latest addition to each place of global memory, and whose it is.
        self.additions: dict[Any, tuple[int, Transfer]] = {}
        self.stores: dict[Any, Transfer] = {}  # to each place of global memory
        self.tma_speed = self.random.choice((0.01, 0.3))
        self.ended: SimpleQueue[Agent] = SimpleQueue()
        self.agents: list[Agent] = []
        self.transfers: list[Transfer] = []
        self.meetings: dict[tuple[int, int], list[int]] = {}
        self.is_over = False
        self._identity = 0

    def next_identity(self) -> int:
        self._identity += 1
        return self._identity

    def run(self, kernel: Callable[[], None], programs: int) -> None:
        """Run all programs to their end."""
        waiting = list(range(programs))
        self.programs = programs
        try:
            while waiting or self.agents:
                busy = {agent.program for agent in self.agents}
                while waiting and len(busy) < self.resident:
                    program = waiting.pop(0)
                    busy.add(program)
                    self.agents.append(Agent(self, program, "kernel", kernel))
                self.choose().may_run.put(None)
                agent = self.ended.get()
                self.agents.remove(agent)
                if agent.error is not None:
                    raise agent.error
            while self.transfers:
                self._transfer()
        finally:
            self.is_over = True
            for agent in self.agents:
                agent.may_run.put(None)
            for agent in self.agents:
                agent.thread.join(timeout=10)

    def choose(self) -> Agent:
        """Who runs next; before it, what TMA does meanwhile."""
        while True:
            able = [agent for agent in self.agents if agent.ready()]
            if self.transfers and (not able or self.random.random() < self.tma_speed):
                self._transfer()
            elif able:
                return self.random.choices(able, [agent.speed for agent in able])[0]
            else:
                names = ", ".join(f"{a.name} of program {a.program}" for a in self.agents)
                raise ModelError(f"deadlock: {names}")

    def _transfer(self) -> None:
        """The next part of any transfer."""
        transfer = self.transfers.pop(self.random.randrange(len(self.transfers)))
        transfer.go_on()
        if not transfer.is_done:
            self.transfers.append(transfer)

    def ask_tma(self, *parts: Callable[[], None]) -> Transfer:
        transfer = Transfer(*parts)
        self.transfers.append(transfer)
        return transfer

    def note_addition(self, place: Any, program: int, transfer: Transfer) -> None:
        """A program adds to a place."""
        if place in self.stores and not self.stores[place].is_done:
            raise ModelError("an addition while a store to its place may still be on its way")
        if self.is_ordered and place in self.additions:
            before, earlier = self.additions[place]
            if before >= program:
                raise ModelError(f"program {program} adds after program {before}")
            if not earlier.is_done:
                raise ModelError("an addition while the one before it may still be on its way")
        self.additions[place] = (program, transfer)

    def note_store(self, place: Any, program: int, transfer: Transfer) -> None:
        """A program stores to a place, which nobody may have done anything to."""
        if place in self.stores or place in self.additions:
            raise ModelError("a store over what is there")
        self.stores[place] = transfer
        if self.is_ordered:
            self.additions[place] = (program, transfer)


# ---------------------------------------------------------------------------- stand-ins for Triton
def _mma(a: Any, b: Memory, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    here().pause()
    sources = [x for x in (a, b) if isinstance(x, Memory)]
    for source in sources:
        source.read_begins()
    left = a.data if isinstance(a, Memory) else np.asarray(a)
    right = b.matrix if isinstance(b, Beside) else b.data
    start = acc.value if isinstance(acc, Pending) else np.asarray(acc)
    with np.errstate(invalid="ignore", over="ignore"):
        value = left.astype(np.float32) @ right.astype(np.float32)
    pending = Pending(tensor(value + start if use_acc else value), sources)
    here().products.append(pending)
    return pending if is_async else _mma_wait(0, [pending])


def _mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    here().pause()
    agent = here()
    while len(agent.products) > num_outstanding:
        done = agent.products.pop(0)
        done.is_done = True
        for source in done.sources:
            source.read_ends()
    for dep in deps:
        if isinstance(dep, Pending) and not dep.is_done:
            raise ModelError("the product waited for may still be running")
    values = [dep.value if isinstance(dep, Pending) else dep for dep in deps]
    return values[0] if len(values) == 1 else tuple(values)


def _fence() -> None:
    identity = here().identity
    for memory in here().memories:
        memory.unfenced[memory.unfenced == identity] = 0
        memory.read &= ~here().bit


def _tma_load(desc: Descriptor, at: list[int], barrier: Barrier, target: Memory) -> None:
    here().pause()
    target.write_begins()

    def finish() -> None:
        target.write_ends(desc.read(at))
        barrier.bytes -= desc.bytes
        barrier.settle()

    here().machine.ask_tma(finish)


def _tma_out(add: bool) -> Callable[..., None]:
    def start(desc: Descriptor, at: list[int], source: Memory) -> None:
        agent = here()
        agent.pause()
        if agent.looked:
            raise ModelError(f"TMA writes, not behind what was looked at ({agent.looked})")
        source.read_begins()
        block: list[np.ndarray] = []

        def read() -> None:
            block.append(source.data.copy())
            source.read_ends()

        transfer = agent.machine.ask_tma(read, lambda: desc.write(at, block[0], add))
        agent.stores.append(transfer)
        if desc.touches(at):
            note = agent.machine.note_addition if add else agent.machine.note_store
            note((desc.flat.data_ptr(), *map(int, at)), agent.program, transfer)

    return start


def _store_wait(pendings: int) -> None:
    """Shared memory is read, but by the last ``pendings``."""
    _wait_for_stores(pendings, lambda one: one.is_read)


def _wait_for_stores(pendings: int, is_over: Callable[[Transfer], bool]) -> None:
    agent = here()
    agent.pause(lambda: all(map(is_over, agent.stores[: max(0, len(agent.stores) - pendings)])))
    # A later one counts among the last ``pendings`` also when it is done before an earlier one.
    while agent.stores and agent.stores[0].is_done:
        agent.stores.pop(0)


def _wait(barrier: Barrier, phase: int) -> None:
    here().pause(lambda: barrier.phase != phase)


def _expect(barrier: Barrier, size: int) -> None:
    barrier.bytes += size
    barrier.arrive()
    here().pause()


def _arrive(barrier: Barrier, count: int = 1) -> None:
    here().pause()
    barrier.arrive(count)


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.left = count


def _instruction(text: str, _: str = "", arguments: Any = (), **__: Any) -> Any:
    if text.startswith("nanosleep"):
        here().sleep()
    here().fence_looks(text)
    if text.startswith(("ld.acquire", "ld.relaxed")):
        here().looked = "acquired" if "acquire" in text else "relaxed"
        return Int(here().look(arguments[0]))
    if "atom.acquire.gpu.global.max.s32 old, [$1], 1" in text:
        here().pause()
        here().looked = "acquired"
        counter = arguments[0]
        old = int(counter.load(None, 0))
        counter.store(max(old, 1), None)
        return Int(old)
    if "red.relaxed" in text:
        for _warp in range(here().warps):
            here().pause()
            counter = arguments[0]
            counter.store(int(counter.load(None, 0)) + 1, None)
    if text.startswith("cp.async.bulk.wait_group"):
        _wait_for_stores(int(text.split()[1].rstrip(";")), lambda one: one.is_done)
    if "vote.sync.any" in text:  # the larger where it is past a limit; whether it is anywhere
        kept, new, limit = (np.asarray(x) for x in arguments)
        here().has_moved = bool((new > limit).any())
        return tensor(np.where(new > limit, new, kept))
    if text.startswith("selp.b32 $0, 1, 0, moved"):
        return Int(here().has_moved)
    if text == "mov.b32 $0, $1;":
        return arguments[0]
    if text == "mov.u32 $0, %ctaid.x;":
        return Int(here().program)
    if text == "mov.u32 $0, %nctaid.x;":
        return Int(here().machine.programs)
    found = re.match(r"bar\.(sync|arrive) (\d+), (\d+);", text)
    if found:
        agent = here()
        number, groups = int(found[2]), max(1, int(found[3]) // 128)
        meeting = agent.machine.meetings.setdefault((agent.program, number), [0, 0])
        meeting[0] += 1
        round_ = meeting[1]
        if meeting[0] == groups:
            meeting[:] = [0, round_ + 1]
        agent.pause(lambda: found[1] == "arrive" or meeting[1] > round_)
    return Int(0)


def _warp_specialize(partitions: list[Any], warps: list[int], registers: list[int]) -> None:
    agent = here()
    workers = []
    for (work, arguments), count in zip(partitions, [agent.warps, *warps], strict=True):
        worker = Agent(agent.machine, agent.program, f"{work.__name__}{_lane(arguments)}",
                       lambda work=work, arguments=arguments: work(*arguments))  # fmt: skip
        worker.memories, worker.warps, worker.bit = agent.memories, count, 2 << len(workers)
        workers.append(worker)
    agent.machine.agents.extend(workers)
    agent.pause(lambda: all(worker.is_done for worker in workers))


def _lane(arguments: tuple[Any, ...]) -> str:
    return f" {arguments[0]}" if isinstance(arguments[0], int) else ""


def _allocate(dtype: DType, shape: list[int], layout: Any = None) -> Any:
    if layout == "barriers":
        return Barriers(shape[0])
    memory = Memory.allocate(dtype, list(shape))
    here().memories.append(memory)
    return memory


def _scalar_or_array(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        result = function(*arguments)
        if any(isinstance(x, np.ndarray) and x.ndim for x in arguments):
            return tensor(result)
        value = result.item() if hasattr(result, "item") else result
        return Int(value) if isinstance(value, int) and not isinstance(value, bool) else value

    return call


def _sum(x: Any, axis: int) -> Any:
    x = np.asarray(x)
    if x.dtype.kind == "f":
        return tensor(x.sum(axis, dtype=np.float32))
    total = x.sum(axis)
    return tensor(total) if total.ndim else Int(total)


def _exp2(x: Any) -> Tensor:
    with np.errstate(over="ignore", invalid="ignore"):
        return tensor(np.exp2(np.asarray(x, np.float32)))


class _Layout:
    """Any layout: ignored."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return None

    @classmethod
    def get_default_for(cls, *_: Any) -> _Layout:
        return cls()


def _add(pointer: Pointer, step: int, sem: str = "") -> Int:
    here().pause()
    old = Int(pointer.load(None, 0))
    pointer.store(int(old) + step, None)
    return old


def _exchange(pointer: Pointer, value: int, sem: str = "") -> Int:
    return _add(pointer, value - int(pointer.load(None, 0)))


def _builtin(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the compiler; ``unsplat`` is what it may need."""
    semantic = types.SimpleNamespace(unsplat=lambda x: Int(np.asarray(x).item()))
    return functools.partial(function, _semantic=semantic)


def _decorator(*arguments: Any, **_: Any) -> Any:
    return arguments[0] if arguments and callable(arguments[0]) else lambda function: function


def _assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise ModelError(f"static assertion failed {message}")


def _stand_ins() -> dict[str, types.ModuleType]:
    def module(name: str, **members: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        return made

    def arange(first: int, end: int, layout: Any = None) -> Tensor:
        return tensor(np.arange(first, end))

    language = module(
        "language", constexpr=lambda x: x, tensor=Tensor, shared_memory_descriptor=Memory,
        float32=FLOAT32, float16=FLOAT16, bfloat16=BFLOAT16, int32=INT32, int64=INT64,
        static_range=range, static_assert=_assert, to_tensor=Int, arange=arange,
        minimum=_scalar_or_array(np.minimum), maximum=_scalar_or_array(np.maximum),
        where=_scalar_or_array(np.where), expand_dims=lambda x, axis: tensor(
            np.expand_dims(np.asarray(x), axis)),
        convert_layout=lambda x, *_, **__: x, exp2=_exp2, abs=_scalar_or_array(np.abs),
        log2=lambda x: tensor(np.log2(np.asarray(x, np.float32))),
        sum=_sum,
        max=lambda x, axis: tensor(np.asarray(x).max(axis)),
        num_warps=lambda: 4, barrier=lambda: None, atomic_add=_add, atomic_xchg=_exchange,
        zeros=lambda shape, dtype, layout=None: tensor(rounded(np.zeros(shape), dtype)),
        full=lambda shape, value, dtype, layout=None: tensor(
            rounded(np.full(shape, value), dtype)),
        load=lambda p, mask=None, other=0.0, **_: p.load(mask, other),
        store=lambda p, value, mask=None, **_: p.store(value, mask),
        program_id=lambda axis: Int(here().program),
        num_programs=lambda axis: Int(here().machine.programs),
        allocate_shared_memory=_allocate,
        warp_specialize=_warp_specialize, inline_asm_elementwise=_instruction,
        NVMMADistributedLayout=_Layout, SliceLayout=_Layout, DotOperandLayout=_Layout,
        NVMMASharedLayout=_Layout, BlockedLayout=_Layout, SwizzledSharedLayout=_Layout,
    )  # fmt: skip
    barriers = module("mbarrier", MBarrierLayout=lambda: "barriers", init=_init, wait=_wait,
                      expect=_expect, arrive=_arrive)  # fmt: skip
    transfers = module("tma", async_load=_tma_load, async_store=_tma_out(False),
                       async_atomic_add=_tma_out(True), store_wait=_store_wait,
                       tensor_descriptor=Descriptor)  # fmt: skip
    hopper = module("hopper", mbarrier=barriers, tma=transfers, fence_async_shared=_fence,
                    warpgroup_mma=_mma, warpgroup_mma_wait=_mma_wait)  # fmt: skip
    gluon = module("gluon", jit=_decorator, constexpr_function=_decorator, language=language)
    root = "triton.experimental.gluon"
    return {
        "triton": module("triton", experimental=None),
        "triton.language": module("language"),
        "triton.language.core": module("core", _aggregate=_decorator),
        "triton.experimental": module("experimental", gluon=gluon),
        root: gluon,
        f"{root}.language": language,
        f"{root}.language._core": module("_core", builtin=_builtin),
        f"{root}.language.nvidia": module("nvidia", hopper=hopper),
        f"{root}.language.nvidia.hopper": hopper,
    }


_FORWARD_PARTS = (
    "sm90_forward_work",
    "sm90_forward_producer",
    "sm90_forward_softmax",
    "sm90_forward_store",
)
_PARTS = ("sm90_backward_work", "sm90_backward_dq", "sm90_backward_around")
# Modules that a module takes names from, or whose kernels run around its own.
_BEFORE = {
    "sm90_forward": _FORWARD_PARTS,
    "sm90_backward": _PARTS,
    "sm90_backward_wide": (*_PARTS, "sm90_backward"),
    "sm90_backward_rows": (*_PARTS, "sm90_backward", "sm90_backward_wide"),
}


def load_kernels(name: str, change: tuple[str, str] | None = None) -> types.ModuleType:
    """The module ``flash_attn.kernels.<name>`` and those of _BEFORE, as one, with the model in
    Triton's place.

    ``change`` replaces one piece of their source by another, to see whether the model notices.
    """
    sources = {
        each: (KERNELS / f"{each}.py").read_text() for each in (*_BEFORE.get(name, ()), name)
    }
    if change is not None:
        counts = {each: source.count(change[0]) for each, source in sources.items()}
        changed = [name] if counts[name] else [each for each in counts if counts[each]]
        found = sum(counts[each] for each in changed)
        assert found == 1, f"{found} times {change[0]!r}"
        sources[changed[0]] = sources[changed[0]].replace(*change)
    package = types.ModuleType("modelled_kernels")
    package.__path__ = [str(KERNELS)]
    together = types.ModuleType(name)
    with mock.patch.dict(sys.modules, {**_stand_ins(), "modelled_kernels": package}):
        for each, source in sources.items():
            loaded = types.ModuleType(f"modelled_kernels.{each}")
            loaded.__package__ = "modelled_kernels"
            sys.modules[loaded.__name__] = loaded
            exec(compile(source, f"{each}.py", "exec"), loaded.__dict__)
            together.__dict__.update(loaded.__dict__)
    return together


def argument(module: str, kernel: str, name: str) -> int:
    """Which argument of a kernel of ``flash_attn.kernels.<module>`` has a name."""
    loaded = importlib.import_module(f"flash_attn.kernels.{module}")
    return getattr(loaded, kernel).arg_names.index(name)


class Launch(NamedTuple):
    """A kernel call as the package made it."""

    name: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def record(run: Callable[[], object]) -> list[Launch]:
    """The kernel calls that ``run`` makes, which are not carried out."""
    launches: list[Launch] = []

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(Launch(self.__name__, grid, args, keywords))

    with mock.patch.object(JITFunction, "run", note):
        run()
    return launches


def run_launch(
    kernels: types.ModuleType, launch: Launch, *, seed: int = 0, resident: int = 1
) -> None:
    """Carry out a kernel call; torch tensors and what descriptors describe change in place."""

    def convert(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return Pointer(x)
        if hasattr(x, "block_shape"):
            return Descriptor(x)
        return Int(x) if isinstance(x, int) and not isinstance(x, bool) else x

    function = getattr(kernels, launch.name)
    options = ("num_warps", "launch_pdl")
    named = {key: convert(x) for key, x in launch.keywords.items() if key not in options}
    positional = [convert(x) for x in launch.arguments]

    def kernel() -> None:
        here().memories = []
        function(*positional, **named)

    is_ordered = bool(launch.keywords.get("DETERMINISTIC", False))
    Machine(seed, resident, is_ordered).run(kernel, launch.grid[0])
