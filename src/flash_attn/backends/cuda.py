"""FlashAttention-2's own CUDA kernels, in the build that is part of PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from ..core.outputs import empty_lse, empty_out, new_s_dmask, softmax_d
from ..core.problem import AttentionProblem, AttentionResult, BackwardInputs
from ..core.rng import unused_state
from ._foreign import (
    clear_unused_rows,
    pad_headdim,
    refuse_lse_gradient,
    refused_inputs,
    window,
)

# The kernels load 16 bytes at a time.
_ALIGNMENT = 16
_mode_lock = threading.Lock()


@lru_cache(maxsize=64)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _refused_device(problem: AttentionProblem) -> list[str]:
    if torch.version.hip is not None:
        return ["needs an NVIDIA GPU: PyTorch's kernels for AMD GPUs mask differently"]
    if not problem.q.is_cuda:
        return []
    major, minor = _capability(problem.q.device.index)
    if major < 8:
        return [f"needs compute capability 8.0 or later, found {major}.{minor}"]
    return []


def _padded_headdim(problem: AttentionProblem) -> int:
    return (problem.headdim + 7) // 8 * 8


def _prepare(x: Tensor, headdim: int) -> Tensor:
    """``x`` with padded head dim, copied if its rows do not start at multiples of 16 bytes."""
    x = pad_headdim(x, headdim)
    rows = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    starts = [x.data_ptr(), *(stride * x.element_size() for size, stride in rows if size > 1)]
    aligned = all(start % _ALIGNMENT == 0 for start in starts)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _masking(problem: AttentionProblem) -> tuple[bool, int, int]:
    """(is_causal, left, right) as the operators take them."""
    left, right = window(problem)
    if (left, right) != (-1, 0):
        return False, left, right
    return True, -1, -1


def _lengths(problem: AttentionProblem) -> tuple[Tensor | None, Tensor | None, int, int]:
    layout = problem.layout
    if layout.cu_seqlens_q is None:
        return None, None, problem.max_seqlen_q, problem.max_seqlen_k
    # For a bound of one query the operator takes it that every sequence has exactly one.
    longest_q = max(problem.max_seqlen_q, 2)
    return layout.cu_seqlens_q, layout.cu_seqlens_k, longest_q, problem.max_seqlen_k


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's process-wide switch is the only way to ask for an ordered sum of dq."""
    with _mode_lock:
        mode = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("error")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)


class CudaBackend:
    """float16 and bfloat16 on NVIDIA GPUs from compute capability 8.0; no caches, no dropout."""

    name = "cuda"

    def unsupported(self, problem: AttentionProblem, backward: bool) -> list[str]:
        reasons = refused_inputs(problem) + _refused_device(problem)
        layout, transform = problem.layout, problem.transform
        if transform.softcap > 0.0:
            reasons.append("PyTorch's operator does not take `softcap`")
        if transform.alibi_slopes is not None:
            # The forward operator has the argument, but PyTorch's builds refuse it.
            reasons.append("PyTorch's build of the kernels does not support `alibi_slopes`")
        if layout.page_table is not None:
            reasons.append("does not serve paged keys (`block_table`)")
        if layout.seqused_k is not None or layout.cache_batch_idx is not None:
            reasons.append("does not serve KV caches (`cache_seqlens`, `cache_batch_idx`)")
        return reasons

    @torch.no_grad()
    def forward(self, problem: AttentionProblem, out: Tensor | None = None) -> AttentionResult:
        headdim = _padded_headdim(problem)
        q, k, v = (_prepare(x, headdim) for x in (problem.q, problem.k, problem.v))
        is_causal, left, right = _masking(problem)
        result, found_lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_lengths(problem), 0.0, is_causal, False,
            scale=problem.transform.softmax_scale,
            window_size_left=left,
            window_size_right=right,
        )  # fmt: skip
        if out is None and headdim == problem.headdim:
            out = result
        else:
            out = empty_out(problem) if out is None else out
            out.copy_(result[..., : problem.headdim])
        lse = empty_lse(problem).copy_(found_lse)
        if problem.empty_lse != float("inf"):
            lse.masked_fill_(lse == float("inf"), problem.empty_lse)
        cu_seqlens = problem.layout.cu_seqlens_q
        clear_unused_rows(out, cu_seqlens, 0.0)
        clear_unused_rows(lse, cu_seqlens, problem.empty_lse, dim=1)
        return AttentionResult(out, lse, new_s_dmask(problem), unused_state(problem.q.device))

    @torch.no_grad()
    def backward(self, problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
        refuse_lse_gradient(self.name, inputs)
        headdim = _padded_headdim(problem)
        tensors = (inputs.dout, problem.q, problem.k, problem.v, inputs.out)
        is_causal, left, right = _masking(problem)
        lse = inputs.softmax_lse.contiguous()
        # Rows without keys: whatever they are reported as, +inf is what makes their weights 0.
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        unused = unused_state(problem.q.device)
        with _deterministic():
            grads = torch.ops.aten._flash_attention_backward(
                *(_prepare(x, headdim) for x in tensors), lse, *_lengths(problem), 0.0, is_causal,
                unused, unused,
                scale=problem.transform.softmax_scale,
                window_size_left=left,
                window_size_right=right,
            )  # fmt: skip
        layout = problem.layout
        bounds = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.cu_seqlens_k)
        targets = (inputs.dq, inputs.dk, inputs.dv)
        for target, grad, cu_seqlens in zip(targets, grads, bounds, strict=True):
            target.copy_(grad[..., : problem.headdim])
            clear_unused_rows(target, cu_seqlens, 0.0)
        return softmax_d(problem, inputs.out, inputs.dout)


BACKEND = CudaBackend()
