"""Who computes attention: this package, what PyTorch brings, FlashAttention-3 and -4.

The last two are no dependencies. ``--peers FOLDER`` names a folder that holds FlashAttention-3's
library (``fa3_C.so`` or ``flash_attn_3/_C.so``, and ``libcudart.so.12`` if it needs that) and,
where FlashAttention-4 is wanted, its package under the name ``fa4_peer`` (else it takes ours).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cells import Cell
from recording import REPOSITORY
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_FA3_LIBRARIES = ("fa3_C.so", "flash_attn_3/_C.so", "xformers/flash_attn_3/_C.so")
_RUNTIMES = ("libcudart.so.12", "nvidia/cuda_runtime/lib/libcudart.so.12")


class PeerMissingError(RuntimeError):
    """A peer was asked for and is not there."""


class Inputs(NamedTuple):
    """(batch, seqlen, nheads, headdim) each, (tokens, nheads, headdim) of packed sequences."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Runner(NamedTuple):
    """A provider on a cell: its call, the leaves in its own layout, and which layout that is.

    Attributes:
        heads_first: (batch, nheads, seqlen, headdim) instead of the layout of :class:`Inputs`.
    """

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    dout: Tensor
    heads_first: bool


Maker = Callable[[Cell, Inputs], Runner]


def make_inputs(cell: Cell, dtype: torch.dtype, device: str) -> Inputs:
    """Standard normal inputs, the same for every run of a cell."""
    generator = torch.Generator(device).manual_seed(cell.seqlen + cell.headdim)
    rows = (sum(cell.lengths),) if cell.lengths else (cell.batch, cell.seqlen)

    def draw(nheads: int) -> Tensor:
        shape = (*rows, nheads, cell.headdim)
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    return Inputs(*(draw(n) for n in (cell.nheads, cell.kv_heads, cell.kv_heads, cell.nheads)))


def _leaves(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_(True) for x in tensors)


def bounds_of(cell: Cell, device: torch.device) -> Tensor:
    """The packed sequences' first rows and, last, their number: int32."""
    return torch.tensor([0, *accumulate(cell.lengths)], dtype=torch.int32, device=device)


# ------------------------------------------------------------------------------------------ ours
def make_ours(cell: Cell, inputs: Inputs, deterministic: bool = False) -> Runner:
    """``flash_attn_func`` or ``flash_attn_varlen_func`` by the backend in use."""
    import flash_attn

    leaves = _leaves(inputs[:3])
    options: dict[str, Any] = {"causal": cell.causal, "deterministic": deterministic}
    if cell.left is not None:
        options["window_size"] = (cell.left, 0)
    attend: Callable[..., Tensor] = functools.partial(flash_attn.flash_attn_func, **options)
    if cell.lengths:
        cu = bounds_of(cell, inputs.q.device)
        bounds = (cu, cu, max(cell.lengths), max(cell.lengths))
        options |= dict(zip(_BOUNDS, bounds, strict=True))
        attend = functools.partial(flash_attn.flash_attn_varlen_func, **options)
    return Runner(lambda: attend(*leaves), leaves, inputs.dout, False)


_BOUNDS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


# --------------------------------------------------------------------------------------- PyTorch's
def _causal_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@functools.lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import flex_attention

    functorch.donated_buffer = False  # it forbids retain_graph
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1024  # one graph for each cell
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _refuse_special(cell: Cell, who: str) -> None:
    if cell.lengths or cell.left is not None:
        raise PeerMissingError(f"{who} is not asked for packed sequences and windows")


def make_flex(cell: Cell, inputs: Inputs) -> Runner:
    """Compiled FlexAttention on its own (batch, nheads, seqlen, headdim) layout."""
    from torch.nn.attention.flex_attention import create_block_mask

    _refuse_special(cell, "FlexAttention")
    flex, s, device = _compiled_flex(), cell.seqlen, inputs.q.device
    mask = create_block_mask(_causal_mask, None, None, s, s, device=device) if cell.causal else None
    q, k, v, dout = (x.transpose(1, 2).contiguous() for x in inputs)
    leaves = _leaves((q, k, v))
    grouped = cell.kv_heads != cell.nheads
    return Runner(lambda: flex(*leaves, block_mask=mask, enable_gqa=grouped), leaves, dout, True)


def make_sdpa(backend: SDPBackend, cell: Cell, inputs: Inputs) -> Runner:
    """``scaled_dot_product_attention`` on views of (batch, seqlen, nheads, headdim) memory."""
    _refuse_special(cell, "SDPA")
    q, k, v, dout = (x.transpose(1, 2) for x in inputs)
    leaves = _leaves((q, k, v))
    grouped = cell.kv_heads != cell.nheads

    def call() -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(
                *leaves, is_causal=cell.causal, enable_gqa=grouped
            )

    return Runner(call, leaves, dout, True)


# --------------------------------------------------------------------- FlashAttention-3 and -4
class Kernels(NamedTuple):
    """A peer's passes: (q, k, v) to (out, lse), and (dout, q, k, v, out, lse) to (dq, dk, dv)."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class _Graph(torch.autograd.Function):
    """A peer's kernels as an operation with a gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernels: Kernels) -> Tensor:
        out, lse = kernels.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernels = kernels
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernels.backward(dout, *ctx.saved_tensors), None)


def differentiable(kernels: Kernels) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(q, k, v) to out, with a gradient."""
    return lambda q, k, v: _Graph.apply(q, k, v, kernels)


def add_peers(folder: Path) -> None:
    """Let the process import what lies in ``folder``; our own sources go before it."""
    found = [str(folder), str(folder / "nvidia_cutlass_dsl" / "dsl_packages")]
    sys.path[:] = [x for x in sys.path if x not in found]
    ours = str(REPOSITORY / "src")
    place = sys.path.index(ours) + 1 if ours in sys.path else 0
    sys.path[place:place] = found


def _first(*names: str) -> Path | None:
    """The first of ``names`` in a folder of the import path."""
    places = (Path(folder) / name for name in names for folder in sys.path)
    return next((place for place in places if place.is_file()), None)


@functools.lru_cache(maxsize=1)
def fa3_operators() -> Any:
    """FlashAttention-3's operators, ``fwd`` and ``bwd``, of its own library.

    Raises:
        PeerMissingError: there is none, or another library has taken their names.
    """
    library = _first(*_FA3_LIBRARIES)
    if library is None:
        raise PeerMissingError(f"no {' or '.join(_FA3_LIBRARIES)} on the import path: see --peers")
    if hasattr(torch.ops.flash_attn_3, "fwd"):
        raise PeerMissingError("the operators flash_attn_3::* are another library's already")
    runtime = _first(*_RUNTIMES)
    if runtime is not None:
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(library))
    return torch.ops.flash_attn_3


def fa3_kernels(cell: Cell, device: torch.device, deterministic: bool = False) -> Kernels:
    """FlashAttention-3's operators on a cell."""
    operators = fa3_operators()
    options: dict[str, Any] = {"is_causal": cell.causal and cell.left is None}
    if cell.left is not None:
        options |= {"window_size_left": cell.left, "window_size_right": 0}
    if cell.lengths:
        cu, longest = bounds_of(cell, device), max(cell.lengths)
        options |= dict(zip(_BOUNDS, (cu, cu, longest, longest), strict=True))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = operators.fwd(q, k, v, num_splits=1, **options)
        return out, lse

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        more = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        operators.bwd(dout, q, k, v, *rest, **more, deterministic=deterministic, **options)
        return grads

    return Kernels(forward, backward)


def fa4_kernels(cell: Cell, device: torch.device) -> Kernels:
    """FlashAttention-4's functions on a cell; they compile at their first call."""
    if cell.left is not None:
        raise PeerMissingError("FlashAttention-4 is not asked for windows")
    try:
        from fa4_peer.cute import interface
    except ImportError as error:
        raise PeerMissingError(f"FlashAttention-4 as fa4_peer: {error}; see --peers") from error
    options: dict[str, Any] = {"causal": cell.causal}
    if cell.lengths:
        cu, longest = bounds_of(cell, device), max(cell.lengths)
        options |= dict(zip(_BOUNDS, (cu, cu, longest, longest), strict=True))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = interface._flash_attn_fwd(q, k, v, return_lse=True, **options)
        return out, lse

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(interface._flash_attn_bwd(q, k, v, out, dout, lse, **options)[:3])  # type: ignore[return-value]

    return Kernels(forward, backward)


def make_peer(kernels_of: Callable[..., Kernels], cell: Cell, inputs: Inputs) -> Runner:
    """A peer's kernels on leaves in the layout of :class:`Inputs`."""
    leaves = _leaves(inputs[:3])
    attend = differentiable(kernels_of(cell, inputs.q.device))
    return Runner(lambda: attend(*leaves), leaves, inputs.dout, False)


PROVIDERS: dict[str, Maker] = {
    "ours": make_ours,
    "ordered": functools.partial(make_ours, deterministic=True),
    "flex": make_flex,
    "flash": functools.partial(make_sdpa, SDPBackend.FLASH_ATTENTION),
    "cudnn": functools.partial(make_sdpa, SDPBackend.CUDNN_ATTENTION),
    "fa3": functools.partial(make_peer, fa3_kernels),
    "fa3_ordered": functools.partial(make_peer, functools.partial(fa3_kernels, deterministic=True)),
    "fa4": functools.partial(make_peer, fa4_kernels),
}
