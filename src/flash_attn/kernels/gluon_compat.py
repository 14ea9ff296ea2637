"""The names of Gluon that changed between Triton 3.6 and 3.9, and those it does not export."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate as aggregate

__all__ = ["aggregate", "group_barrier", "scalar_of", "tma_load", "tma_store"]

# (descriptor, coordinates, barrier, shared memory) and (descriptor, coordinates, shared memory)
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# All threads of the warps that run a function.
group_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@builtin
def scalar_of(x, _semantic=None):
    """The element of a tensor of shape (1,), as a scalar."""
    return _semantic.unsplat(x)
