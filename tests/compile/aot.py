"""Compiling the package's kernels ahead of time, for GPUs that need not be there.

A launch goes through the package's own launch functions, with meta or CPU tensors; instead of
running, each kernel call is recorded with its arguments. :func:`compile_launch` then does what
Triton would do on the first launch, for the architecture asked for, and reads the resources that
the kernel takes from the compiled object.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import barriers
import descriptors
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from flash_attn.backends.triton import launch, launch_backward
from flash_attn.core.plan import PlanKey, TilePlan

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm89": GPUTarget("cuda", 89, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one block can use.
SHARED_LIMIT = {
    "sm80": 166912,
    "sm86": 101376,
    "sm89": 101376,
    "sm90": 232448,
    "sm100": 232448,
    "sm120": 101376,
    "gfx942": 65536,
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launch(NamedTuple):
    """A kernel call as the package made it."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    key: PlanKey | None = None  # of the plan that it took, if it took one

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def plan(self) -> list[int | None]:
        """Tile sizes, warps and stages, as far as the call names them."""
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        return [self.keywords.get(name) for name in names]

    def under(self, plan: TilePlan) -> Launch:
        """The same call with another plan."""
        return self._replace(keywords={**self.keywords, **launch.compile_options(plan)})


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: a thread's registers; on AMD vector and accumulation registers together.
        spilled: bytes of a thread's stack on NVIDIA, where only spilled registers live; spilled
            vector registers on AMD.
        shared: bytes of shared memory of a block.
        seconds: how long the compilation took.
        lost: products of Hopper's that may read through something that is no descriptor.
        unused: barriers that nobody uses, whose memory is free to the compiler.
        overlaid: barriers whose memory the compiler gave to other data as well.
    """

    registers: int
    spilled: int
    shared: int
    seconds: float
    lost: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    overlaid: tuple[str, ...] = ()

    def failures(self, arch: str) -> list[str]:
        """What makes the kernel unfit for ``arch``."""
        found = []
        if self.spilled:
            found.append(f"{self.spilled} spilled")
        if self.shared > SHARED_LIMIT[arch]:
            found.append(f"{self.shared} bytes of shared memory, limit {SHARED_LIMIT[arch]}")
        found += [f"lost descriptor: {one}" for one in self.lost]
        found += [f"unused barrier: {one}" for one in self.unused]
        found += [f"overlaid barrier: {one}" for one in self.overlaid]
        return found

    def as_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)


@contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """Record kernel calls instead of running them; plans are those of ``arch``."""
    launches: list[Launch] = []
    keys: dict[str, PlanKey] = {}

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(Launch(self, args, keywords, keys.pop(self.__name__, None)))

    def plan_key(kernel: str, *args: Any) -> PlanKey:
        key = _real_plan_key(kernel, *args)._replace(arch=arch)
        keys["attention_" + kernel] = key
        return key

    _real_plan_key = launch.plan_key
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        stack.enter_context(mock.patch.object(launch, "plan_key", plan_key))
        stack.enter_context(mock.patch.object(launch_backward, "plan_key", plan_key))
        yield launches


def record(run: Callable[[], object], arch: str) -> list[Launch]:
    """The kernel calls that ``run`` makes on ``arch``."""
    with recorded(arch) as launches:
        run()
    return launches


def compile_kernel(one: Launch, arch: str) -> tuple[ASTSource, Any]:
    """Compile a recorded kernel call for ``arch``: what Triton compiled, and the result."""
    target, kernel = TARGETS[arch], one.kernel
    backend = make_backend(target)
    keywords = {"debug": False, **one.keywords}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*one.arguments, **keywords)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, options
    )
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(kernel, signature, constexprs, attributes)
    return source, triton.compile(source, target=target, options=options.__dict__)


def resources_of(compiled: Any, arch: str, seconds: float = 0.0) -> Resources:
    """What a compiled kernel takes; ``seconds`` is how long its compilation took."""
    registers, spilled = usage_of(compiled, arch)
    faults: list[list[str]] = []
    if arch == "sm90":
        ttgir = compiled.asm["ttgir"]
        faults = [
            descriptors.lost(descriptors.disassemble(compiled.asm["cubin"])),
            barriers.unused(ttgir),
            barriers.overlaid(barriers.allocated(ttgir)),
        ]
    return Resources(
        registers, spilled, compiled.metadata.shared, seconds, *(tuple(one) for one in faults)
    )


def usage_of(compiled: Any, arch: str) -> tuple[int, int]:
    """(registers, spilled) as in :class:`Resources`; machine code alone is looked at."""
    if TARGETS[arch].backend == "hip":
        return _usage_amd(compiled.asm["amdgcn"])
    return _usage_nvidia(compiled.asm["cubin"])


def compile_launch(one: Launch, arch: str) -> Resources:
    """Compile a recorded kernel call for ``arch``."""
    started = time.perf_counter()
    _, compiled = compile_kernel(one, arch)
    return resources_of(compiled, arch, round(time.perf_counter() - started, 2))


def _usage_nvidia(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack); unlike the assembler's log, also of kernels from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [str(_CUOBJDUMP), "-res-usage", str(path)], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"no resource usage in {done.stdout!r}")
    return int(found[1]), int(found[2])


def _usage_amd(assembly: str) -> tuple[int, int]:
    """(vector and accumulation registers, spilled vector registers)."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"no {name} in the assembly")
        return int(found[1])

    return number("vgpr_count"), number("vgpr_spill_count")
