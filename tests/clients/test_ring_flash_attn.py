"""ring-flash-attn: its forward and backward passes over two processes (gloo, CPU tensors)."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from clients import error
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        importlib.util.find_spec("ring_flash_attn") is None, reason="make test-clients installs it"
    ),
]
RANKS = 2
RINGS = ["ring_flash_attn_func", "zigzag_ring_flash_attn_func", "stripe_flash_attn_func"]
BOUNDS = [0, 40, 100, 128]


def load_library() -> Any:
    """The package without its adapter, which wants an older Transformers."""
    adapters = ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None  # type: ignore[attr-defined]
    sys.modules[adapters.__name__] = adapters
    import ring_flash_attn

    return ring_flash_attn


def my_part(x: Tensor, name: str, rank: int) -> Tensor:
    """What a rank has of a sequence along dimension 0."""
    if name.startswith("stripe"):
        return x[rank::RANKS].contiguous()
    if name.startswith("zigzag"):
        pieces = x.chunk(2 * RANKS)
        return torch.cat([pieces[rank], pieces[2 * RANKS - 1 - rank]])
    return x.chunk(RANKS)[rank].contiguous()


def attend(library: Any, name: str, rank: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The library's causal attention on this rank's part of a sequence."""
    if name in RINGS:
        return getattr(library, name)(q[None], k[None], v[None], causal=True)[0]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    cu_q, cu_k, longest_q, longest_k, keys = library.llama3_flash_attn_prepare_cu_seqlens(
        bounds, causal=True, rank=rank, world_size=RANKS
    )
    return library.llama3_flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, longest_q, longest_k,
        heads_k_stride=1, local_k_slice=keys, causal=True,
    )  # fmt: skip


def exact(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if name in RINGS:
        return flash_attn_func(q[None], k[None], v[None], causal=True)[0]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    return flash_attn_varlen_func(q, k, v, bounds, bounds, 60, 60, causal=True)


def run_rank(rank: int, store: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    library = load_library()
    torch.manual_seed(0)
    whole = torch.randn(4, BOUNDS[-1], 4, 32, dtype=torch.bfloat16)
    parts = [my_part(x, name, rank).requires_grad_() for x in whole[:3]]
    out = attend(library, name, rank, *parts)
    out.backward(my_part(whole[3], name, rank))

    leaves = [x.float().requires_grad_() for x in whole[:3]]
    expected = exact(name, *leaves)
    expected.backward(whole[3].float())
    assert error(out, my_part(expected, name, rank)) < 4e-3
    for part, leaf in zip(parts, leaves, strict=True):
        assert error(part.grad, my_part(leaf.grad, name, rank)) < 6e-3
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [*RINGS, "llama3_flash_attn_varlen_func"])
def test_two_ranks(name, tmp_path):
    mp.spawn(run_rank, args=((tmp_path / "store").as_uri(), name), nprocs=RANKS)
