"""Runs the Hopper kernel's own source on the CPU, for its barriers and its tiles, not its numbers.

The source of kernels/sm90_forward*.py is executed with stand-ins for Gluon: whole numbers divide as
on the GPU, tensors of scores are a :class:`Blank` that absorbs every operation, shared memory and
barriers are objects that know what lies in them and who is reading. Every warpgroup is a thread, of
which one runs at a time; a random generator picks it at every access, and picks when loads and
stores that are on their way arrive. Found are deadlocks, reads of anything but what was asked for,
and writes into what is being read.
"""

from __future__ import annotations

import ast
import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np

import flash_attn

KERNELS = Path(flash_attn.__file__).parent / "kernels"
# In the order in which they import each other.
MODULES = [f"sm90_forward{part}" for part in ("_work", "_producer", "_softmax", "_store", "")]


class Int(int):
    """A whole number whose division rounds towards 0."""

    def to(self, _dtype: Any) -> Int:
        return self

    def __floordiv__(self, other: Any) -> Any:
        return Int(math.trunc(int(self) / int(other)))

    def __mod__(self, other: Any) -> Any:
        return Int(math.fmod(int(self), int(other)))


def _closed(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def operation(self: Int, other: Any) -> Any:
        result = plain(self, other)
        return result if result is NotImplemented else Int(result)

    return operation


for _name in ("add", "sub", "mul", "radd", "rsub", "rmul"):
    setattr(Int, f"__{_name}__", _closed(f"__{_name}__"))


class Blank:
    """A tensor whose numbers do not matter: all that is done with it gives the same again."""

    shape: Any = None  # of results, which the kernel looks at; set by Machine

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_args: Any, **_options: Any) -> Blank:
        return self

    def split(self) -> tuple[Blank, Blank]:
        return self, self

    def __bool__(self) -> bool:
        raise TypeError("a branch depends on numbers that the model does not have")


def _absorb(self: Blank, *_others: Any) -> Blank:
    return self


_ABSORBED = ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "lt", "le", "gt", "ge", "eq",
             "ne", "getitem", "radd", "rsub", "rmul", "rtruediv")  # fmt: skip
for _name in _ABSORBED:
    setattr(Blank, f"__{_name}__", _absorb)
BLANK = Blank()


class Array:
    """Global memory of whole numbers; nothing outside of it may be read."""

    def __init__(self, numbers: Any, offset: Any = 0):
        self.numbers = numbers
        self.offset = offset

    def __add__(self, step: Any) -> Array:
        return Array(self.numbers, self.offset + step)

    def read(self) -> Any:
        assert np.all((self.offset >= 0) & (self.offset < len(self.numbers))), "read outside"
        found = self.numbers[self.offset]
        return found if isinstance(found, np.ndarray) else Int(found)


class Cell:
    """A buffer or barrier in shared memory."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.content: Any = None
        self.readers: Counter[Any] = Counter()
        self.arriving = 0  # loads on their way
        self.leaving = 0  # stores that read it
        self.expected = self.missing = self.bytes = self.phase = 0

    # A view of a buffer is the buffer.
    def reshape(self, _shape: Any) -> Cell:
        return self

    def permute(self, _order: Any) -> Cell:
        return self

    def slice(self, _start: int, _length: int) -> Cell:
        return self

    def load(self, _layout: Any) -> Any:
        self.machine.pause()
        assert not self.arriving, "read while a load arrives"
        return self.content

    def store(self, value: Any) -> None:
        self.machine.pause()
        assert not self.arriving, "written while a load arrives"
        assert not self.leaving, "written while a store reads it"
        # Values that are cleared keep their name, for the readers' sake.
        if not (isinstance(self.content, tuple) and self.content[0] == "v"):
            assert not self.readers.total(), "written while it is read"
        if not isinstance(self.content, tuple):
            self.content = value

    def complete_if_due(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.expected


class Memory:
    """What allocate_shared_memory gives."""

    def __init__(self, machine: Machine, shape: Any):
        self.cells = [Cell(machine) for _ in range(int(shape[0]))]

    def index(self, i: int) -> Cell:
        return self.cells[i]


class Task:
    """A warpgroup."""

    def __init__(self, machine: Machine, program: int, function: Any, arguments: Any):
        self.program = program
        self.ready: Callable[[], bool] = lambda: True
        self.done = False
        self.groups: list[list[Cell]] = []
        self.stores = 0
        self.speed = 1.0
        self.products: list[tuple[Any, Any]] = []
        self.values: list[Any] = []
        self.turn: SimpleQueue[None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, args=(machine, function, arguments))
        self.thread.daemon = True

    def _run(self, machine: Machine, function: Any, arguments: Any) -> None:
        self.turn.get()
        try:
            if not machine.failed:
                function(*arguments)
        except BaseException as error:
            machine.failed = machine.failed or error
        self.done = True
        machine.idle.put(None)


class Machine:
    """A GPU that runs the kernel's programs.

    Args:
        seed: of the order in which things happen.
        programs: how many.
        headdim_v: width of results.
    """

    def __init__(self, seed: int, programs: int, headdim_v: int):
        self.random = random.Random(seed)
        self.programs = programs
        self.program = 0
        self.tasks: list[Task] = []
        self.pending: list[Callable[[], None]] = []
        self.turns: dict[Any, list[int]] = {}
        self.idle: SimpleQueue[None] = SimpleQueue()
        self.current: Task | None = None
        self.failed: BaseException | None = None
        self.steps = 0
        self.likely = 0.0
        self.stored: list[tuple[Any, int, int]] = []  # coordinates, heads, rows
        Blank.shape = (64, headdim_v)
        self.kernel = load_kernel(self)

    # -- scheduling
    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run, and wait until ``ready``."""
        task = self.current
        assert task is not None
        task.ready = ready
        self.idle.put(None)
        task.turn.get()
        if self.failed:
            raise SystemExit

    def run(self, arguments: dict[str, Any]) -> None:
        """Launch, and run to the end."""
        for program in range(self.programs):
            self.program = program
            self.kernel["attention_forward_sm90"](**arguments)
        for task in self.tasks:
            task.thread.start()
        while not self.failed and not all(task.done for task in self.tasks):
            able = [task for task in self.tasks if not task.done and task.ready()]
            if not able and not self.pending:
                self.failed = AssertionError("deadlock")
            elif self.pending and (not able or self.random.random() < self.arrival()):
                self.pending.pop(self.random.randrange(len(self.pending)))()
            else:
                self.resume(self.random.choices(able, [task.speed for task in able])[0])
        for task in self.tasks:
            if not task.done:
                self.resume(task)
        while self.pending and not self.failed:
            self.pending.pop()()
        if self.failed:
            raise self.failed

    def arrival(self) -> float:
        """How likely something on its way arrives now; now and then everybody's speed changes."""
        self.steps += 1
        if self.steps % 100 == 1:
            self.likely = self.random.choice([0.5, 0.1, 0.005, 0.0])
            for task in self.tasks:
                task.speed = self.random.choice([1.0, 0.1, 0.003])
        return self.likely

    def resume(self, task: Task) -> None:
        self.current = task
        task.turn.put(None)
        self.idle.get()

    # -- what the kernel calls
    def specialize(self, parts: Any, _warps: Any, _registers: Any) -> None:
        self.tasks += [Task(self, self.program, *part) for part in parts]

    def program_id(self, _axis: int) -> Int:
        return Int(self.program if self.current is None else self.current.program)

    def init(self, barrier: Cell, count: int) -> None:
        barrier.expected = barrier.missing = count

    def arrive(self, barrier: Cell, count: int = 1) -> None:
        self.pause()
        barrier.missing -= count
        assert barrier.missing >= 0, "too many arrivals"
        barrier.complete_if_due()

    def expect(self, barrier: Cell, size: int) -> None:
        self.pause()
        barrier.bytes += size
        barrier.missing -= 1
        assert barrier.missing >= 0, "too many arrivals"

    def wait(self, barrier: Cell, parity: int) -> None:
        self.pause(lambda: barrier.phase % 2 != parity)

    def load(self, desc: Any, coordinates: Any, barrier: Cell, buffer: Cell) -> None:
        self.pause()
        assert not buffer.readers.total(), f"{desc.name} overwritten while it is read"
        assert not buffer.leaving, "overwritten while a store reads it"
        buffer.arriving += 1

        def finish() -> None:
            assert not buffer.readers.total(), f"{desc.name} overwritten while it is read"
            buffer.content = (desc.name, *(int(x) for x in coordinates))
            buffer.arriving -= 1
            barrier.bytes -= desc.size
            barrier.complete_if_due()

        self.pending.append(finish)

    def store(self, desc: Any, coordinates: Any, buffer: Cell) -> None:
        self.pause()
        task = self.current
        assert task is not None
        task.stores += 1
        buffer.leaving += 1
        heads, rows = desc.block_type.shape[1:3]
        self.stored.append((tuple(int(x) for x in coordinates), heads, rows))

        def finish() -> None:
            task.stores -= 1
            buffer.leaving -= 1

        self.pending.append(finish)

    def store_wait(self, _count: int) -> None:
        task = self.current
        assert task is not None
        self.pause(lambda: task.stores == 0)

    def store_part(
        self, work: Any, _target: Any, span: Any, row: int, column: int, _buffer: Any
    ) -> None:
        heads, rows = work.config.PACK, min(span.rows - row, work.config.POSITIONS)
        if rows > 0:
            at = (0, int(span.head * heads), int(span.q_start + row), int(column))
            self.stored.append((at, heads, rows))

    def multiply(self, a: Any, b: Cell, _acc: Any, **_options: Any) -> Blank:
        self.pause()
        task = self.current
        assert task is not None
        read = [x for x in (a, b) if isinstance(x, Cell)]
        for cell in read:
            assert not cell.arriving, "multiplied while a load arrives"
            assert cell.content is not None, "multiplied what was never loaded"
            cell.readers[task] += 1
        if isinstance(read[0].content, tuple) and len(read) == 2:
            task.products.append((read[0].content, read[1].content))
        else:
            task.values.append(b.content)
        task.groups.append(read)
        return BLANK

    def multiply_wait(self, count: int, deps: Any) -> Any:
        self.pause()
        task = self.current
        assert task is not None
        while len(task.groups) > count:
            for cell in task.groups.pop(0):
                cell.readers[task] -= 1
        return deps[0]

    def take_turn(self, kind: str, lane: int) -> None:
        self.pause()
        task = self.current
        assert task is not None
        state = self.turns.setdefault((task.program, lane), [0, 0])  # arrivals, completions
        completed = state[1]
        state[0] += 1
        if state[0] == 2:
            state[0], state[1] = 0, completed + 1
        elif kind == "sync":
            self.pause(lambda: state[1] > completed)

    def atomic_add(self, counter: Array, step: int, sem: str = "") -> Int:
        self.pause()
        old = counter.numbers[0]
        counter.numbers[0] += step
        return Int(old)

    def atomic_xchg(self, counter: Array, value: int, sem: str = "") -> None:
        self.pause()
        counter.numbers[0] = value


class _Language(SimpleNamespace):
    """Gluon's language: what matters, and blanks for the rest."""

    def __getattr__(self, _name: str) -> Any:
        return BLANK


def _pick(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Blank):
        return BLANK
    if isinstance(condition, np.ndarray):
        return np.where(condition, a, b)
    return _number(a if condition else b)


def _number(x: Any) -> Any:
    return Int(x) if isinstance(x, int) else x


def _extreme(scalar: Any, array: Any) -> Callable[[Any, Any], Any]:
    def operation(a: Any, b: Any) -> Any:
        if isinstance(a, Blank) or isinstance(b, Blank):
            return BLANK
        arrays = isinstance(a, np.ndarray) or isinstance(b, np.ndarray)
        return array(a, b) if arrays else Int(scalar(a, b))

    return operation


class _Flags(np.ndarray):
    """Numbers of several threads."""

    def to(self, _dtype: Any) -> Any:
        return self.astype(int)


def load_kernel(machine: Machine) -> dict[str, Any]:
    """The names of the kernel's modules, with stand-ins for Gluon."""
    language = _Language(
        constexpr=lambda x: x,
        static_range=range,
        static_assert=lambda condition: None,
        to_tensor=Int,
        minimum=_extreme(min, np.minimum),
        maximum=_extreme(max, np.maximum),
        where=_pick,
        load=lambda address: BLANK if isinstance(address, Blank) else address.read(),
        arange=lambda start, end, layout=None: np.arange(start, end).view(_Flags),
        sum=lambda x, axis: BLANK if isinstance(x, Blank) else Int(x.sum()),
        full=lambda shape, value, dtype, layout: int(value),
        allocate_shared_memory=lambda dtype, shape, layout: Memory(machine, shape),
        program_id=machine.program_id,
        num_programs=lambda axis: Int(machine.programs),
        atomic_add=machine.atomic_add,
        atomic_xchg=machine.atomic_xchg,
        warp_specialize=machine.specialize,
    )

    def jit(function: Any = None, **_options: Any) -> Any:
        return function if function is not None else lambda given: given

    names: dict[str, Any] = {
        "math": math,
        "gluon": SimpleNamespace(jit=jit, constexpr_function=lambda function: function),
        "gl": language,
        "mbarrier": SimpleNamespace(
            init=machine.init,
            expect=machine.expect,
            arrive=machine.arrive,
            wait=machine.wait,
            MBarrierLayout=BLANK,
        ),
        "tma": SimpleNamespace(store_wait=machine.store_wait, tensor_descriptor=None),
        "tma_load": machine.load,
        "tma_store": machine.store,
        "warpgroup_mma": machine.multiply,
        "warpgroup_mma_wait": machine.multiply_wait,
        "fence_async_shared": lambda: None,
        "group_barrier": lambda: None,
        "aggregate": lambda cls: cls,
        "scalar_of": Int,
    }
    for module in MODULES:
        source = KERNELS / f"{module}.py"
        tree = ast.parse(source.read_text(encoding="utf-8"))
        tree.body = [x for x in tree.body if not isinstance(x, (ast.Import, ast.ImportFrom))]
        exec(compile(tree, str(source), "exec"), names)  # noqa: S102
    # Numbers, which the model has not.
    names["here"] = lambda x: x
    names["program_of"] = lambda work: machine.program_id(0)
    names["programs_of"] = lambda work: Int(machine.programs)
    for name in ("mask_scores", "capped"):
        names[name] = lambda work, *arguments: BLANK
    names["settle_maximum"] = lambda *arguments: BLANK
    names["warp_has_moved"] = lambda lane: False
    names["partial_sums"] = lambda *arguments: BLANK
    names["weights_of"] = lambda *arguments: (BLANK, BLANK)
    names["finish_rows"] = lambda *arguments: (BLANK, BLANK, BLANK)
    names["take_turn"] = machine.take_turn
    names["store_part"] = machine.store_part
    return names


def descriptor(name: str, shape: list[int]) -> Any:
    """What stands for a TMA descriptor of blocks of a shape."""
    block = SimpleNamespace(shape=shape)
    return SimpleNamespace(
        name=name, dtype=BLANK, block_type=block, layout=BLANK, size=2 * math.prod(shape)
    )
