"""Asynchronous operations of Hopper that Gluon names differently between releases or not at all.

Triton 3.6 has TMA reductions in its compiler but exports none; hardware barriers and dependencies
between launches are single instructions.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate as aggregate

__all__ = [
    "aggregate", "allow_dependents", "claim", "come_by", "count_up", "fence_async",
    "meet", "opaque_zero", "peek", "tma_add", "tma_complete", "tma_load", "tma_store",
    "wait_for_dependencies", "wait_until",
]  # fmt: skip

# (descriptor, coordinates, barrier, shared memory) and (descriptor, coordinates, shared memory)
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

if hasattr(tma, "async_atomic_add"):
    tma_add = tma.async_atomic_add
else:

    @builtin
    def tma_add(desc, coordinates, source, _semantic=None):
        """Add a block of shared memory to global memory, asynchronously, as a TMA store would."""
        coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
        kind = triton._C.libtriton.ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, desc.handle, coordinates, source.handle)


@gluon.constexpr_function
def _then_zero(instruction):
    return instruction + " mov.b32 $0, 0;"


@gluon.jit
def _instruction(TEXT: gl.constexpr):
    """Execute an instruction without operands once in every thread; yields 0."""
    return gl.inline_asm_elementwise(
        _then_zero(TEXT), "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def _barrier(kind, number, threads):
    return f"bar.{kind} {number}, {threads};"


@gluon.jit
def meet(NUMBER: gl.constexpr, THREADS: gl.constexpr):
    """Wait until THREADS threads came here, and see what they wrote to shared memory.

    The compiler itself uses the hardware's barriers up to 2 plus the number of partitions.
    """
    _instruction(_barrier("sync", NUMBER, THREADS))


@gluon.jit
def come_by(NUMBER: gl.constexpr, THREADS: gl.constexpr):
    """Count as one that came to where others ``meet``, without waiting for them."""
    _instruction(_barrier("arrive", NUMBER, THREADS))


@gluon.jit
def opaque_zero():
    """0, unknown to the compiler. As an index it keeps addresses that never change from being
    computed before a loop and held, or spilled, all through it."""
    return _instruction("")


@gluon.jit
def fence_async():
    """Order what this thread wrote or saw in global memory before what TMA does there from here on.

    Of all memory (without ``.global``) it would be a fence of the whole GPU too, which waits until
    all that the thread asked of memory before is done.
    """
    _instruction("fence.proxy.async.global;")


@gluon.constexpr_function
def _wait_group(pending):
    return f"cp.async.bulk.wait_group {pending};"


@gluon.jit
def tma_complete(PENDING: gl.constexpr):
    """Wait until what this thread had TMA write or add, but the last PENDING, is in memory."""
    _instruction(_wait_group(PENDING))


_COUNT_UP = gl.constexpr(
    "{ .reg .pred is_first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 is_first, lane, 0; "
    "bar.warp.sync 0xffffffff; fence.acq_rel.gpu; "
    "@is_first red.relaxed.gpu.global.add.s32 [$1], 1; mov.b32 $0, 0; }"
)


@gluon.jit
def count_up(counter):
    """Each warp adds 1 to a counter in global memory, behind all that it wrote.

    What it does from here on is behind all that it has peeked at; for TMA that takes fence_async.
    """
    gl.inline_asm_elementwise(_COUNT_UP, "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1)


_CLAIM = gl.constexpr(
    "{ .reg .pred is_first; .reg .b32 lane, old; mov.u32 lane, %laneid; "
    "setp.eq.u32 is_first, lane, 0; mov.b32 old, 0; "
    "@is_first atom.acquire.gpu.global.max.s32 old, [$1], 1; "
    "bar.warp.sync 0xffffffff; shfl.sync.idx.b32 $0, old, 0, 31, 0xffffffff; }"
)


@gluon.jit
def claim(counter):
    """What a counter in global memory was before it became at least 1; for a single warp, which
    then sees what was written before the counter became what it was."""
    return gl.inline_asm_elementwise(
        _CLAIM, "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _load_acquire(counter):
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def peek(counter):
    """A counter in global memory, without waiting for the answer before it is used."""
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [counter], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def wait_until(counter, count):
    """Wait until a counter in global memory is at least ``count``; then this thread, and what it
    asks of TMA, sees what was written before it was counted up."""
    seen = _load_acquire(counter)
    while seen < count:
        _instruction("nanosleep.u32 100;")
        seen = _load_acquire(counter)
    fence_async()


@gluon.jit
def wait_for_dependencies():
    """Wait until the launch before this one is done and its results can be read.

    Needs the launch option ``launch_pdl``; without it the launch itself waited.
    """
    _instruction("griddepcontrol.wait;")


@gluon.jit
def allow_dependents():
    """Let the next launch start as soon as every program of this one said so or ended."""
    _instruction("griddepcontrol.launch_dependents;")
