"""FlagGems' attention, on request: its packed entry alone, for every kind of problem.

The dense entry of that library is never called: it mixes up rows of several layouts. Dense
batches and KV caches are put as packed sequences and as pages instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flag_gems
import torch
from torch import Tensor

from ..core.outputs import empty_lse, empty_out, new_s_dmask, softmax_d
from ..core.problem import AttentionProblem, AttentionResult, BackwardInputs
from ..core.rng import unused_state
from ..core.toolchain import explains_toolchain
from ._foreign import (
    clear_unused_rows,
    pad_headdim,
    refuse_lse_gradient,
    refused_inputs,
    window,
)

_INT32_ELEMENTS = 2**31


def _has_backward() -> bool:
    return hasattr(flag_gems, "flash_attention_backward")


def _triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _is_cache(problem: AttentionProblem) -> bool:
    """Dense keys of which each sequence uses a row and a length of its own."""
    layout = problem.layout
    selected = layout.seqused_k is not None or layout.cache_batch_idx is not None
    return selected and layout.cu_seqlens_k is None and layout.page_table is None


class _Keys(NamedTuple):
    """How the library finds the keys: by packed bounds, or by pages and lengths."""

    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    block_table: Tensor | None = None


def _steps(count: int, length: int, device: torch.device) -> Tensor:
    """Bounds of ``count`` packed sequences of one length."""
    return torch.arange(count + 1, dtype=torch.int32, device=device) * length


def _lengths(problem: AttentionProblem) -> Tensor:
    """(batch,) int32 lengths of paged or cached keys, within what the tensors hold."""
    layout, capacity = problem.layout, problem.max_seqlen_k
    lengths = layout.seqused_k
    if layout.cu_seqlens_k is not None:
        packed = layout.cu_seqlens_k.diff()
        lengths = packed if lengths is None else torch.minimum(packed, lengths)
    if lengths is None:
        device = problem.q.device
        return torch.full((problem.batch_size,), capacity, dtype=torch.int32, device=device)
    return lengths.clamp(0, capacity)


def _keys(problem: AttentionProblem) -> _Keys:
    layout, k = problem.layout, problem.k
    if layout.page_table is not None:
        return _Keys(seqused_k=_lengths(problem), block_table=layout.page_table.contiguous())
    if _is_cache(problem):
        rows = layout.cache_batch_idx
        if rows is None:
            rows = torch.arange(problem.batch_size, dtype=torch.int32, device=k.device)
        # Each row of the cache is one page.
        return _Keys(seqused_k=_lengths(problem), block_table=rows[:, None].contiguous())
    if layout.cu_seqlens_k is not None:
        return _Keys(cu_seqlens_k=layout.cu_seqlens_k)
    return _Keys(cu_seqlens_k=_steps(k.shape[0], k.shape[1], k.device))


def _masking(problem: AttentionProblem) -> tuple[bool, int, int]:
    """(causal, left, right): both limits given, or both -1; one-sided windows are not masked."""
    left, right = window(problem)
    if left < 0 and right <= 0:
        return right == 0, -1, -1
    longest = problem.max_seqlen_k - 1
    return False, longest if left < 0 else left, longest if right < 0 else right


def _flat(x: Tensor, headdim: int, packed: bool) -> Tensor:
    x = pad_headdim(x, headdim).contiguous()
    return x if packed else x.flatten(0, 1)


def _is_equal_length(problem: AttentionProblem) -> bool:
    """Whether every sequence has as many keys as queries, as far as shapes tell."""
    cu_q, cu_k = problem.layout.cu_seqlens_q, problem.layout.cu_seqlens_k
    if cu_q is None or cu_k is None:
        return problem.max_seqlen_q == problem.max_seqlen_k
    return cu_q is cu_k or cu_q.data_ptr() == cu_k.data_ptr()


def _refused_backward(problem: AttentionProblem) -> list[str]:
    if not _has_backward():
        return ["this release of FlagGems has no backward pass"]
    reasons = []
    if problem.transform.softcap > 0.0:
        reasons.append("the backward pass does not take `softcap`")
    if problem.transform.alibi_slopes is not None:
        reasons.append("the backward pass does not take `alibi_slopes`")
    if problem.is_paged or _is_cache(problem):
        reasons.append("the backward pass does not serve pages or caches")
    if window(problem) != (-1, -1) and not _is_equal_length(problem):
        reasons.append("the backward pass misaligns masks unless `seqlen_q` equals `seqlen_k`")
    return reasons


class FlagGemsBackend:
    """float16 and bfloat16 on GPU tensors, through ``flag_gems.flash_attn_varlen_func``."""

    name = "flag_gems"

    def unsupported(self, problem: AttentionProblem, backward: bool) -> list[str]:
        reasons = refused_inputs(problem)
        layout = problem.layout
        if _triton_version() >= (3, 9):
            reasons.append("its kernels need block pointers, which triton 3.9 removed")
        if getattr(getattr(flag_gems, "config", None), "use_c_extension", False):
            reasons.append("its C++ extension checks no arguments: set USE_C_EXTENSION=0")
        if (
            layout.seqused_k is not None
            and layout.cu_seqlens_k is not None
            and not problem.is_paged
        ):
            reasons.append("does not take `seqused_k` with packed keys")
        if problem.transform.alibi_slopes is not None and window(problem) == (-1, 0):
            reasons.append("shifts the log-sum-exp of causal ALiBi")
        paged = problem.is_paged or _is_cache(problem)
        if paged and not _has_backward() and problem.k.numel() >= _INT32_ELEMENTS:
            reasons.append("this release of FlagGems counts cache elements in 32 bits")
        return reasons + (_refused_backward(problem) if backward else [])

    @explains_toolchain
    @torch.no_grad()
    def forward(self, problem: AttentionProblem, out: Tensor | None = None) -> AttentionResult:
        headdim = max(16, (problem.headdim + 7) // 8 * 8)
        keys = _keys(problem)
        causal, left, right = _masking(problem)
        cu_seqlens_q, longest_q = self._queries(problem)
        dense_k = keys.cu_seqlens_k is None or problem.layout.cu_seqlens_k is not None
        given: dict[str, Any] = {name: x for name, x in keys._asdict().items() if x is not None}
        result, lse = flag_gems.flash_attn_varlen_func(
            q=_flat(problem.q, headdim, problem.is_varlen_q),
            k=_flat(problem.k, headdim, dense_k),
            v=_flat(problem.v, headdim, dense_k),
            max_seqlen_q=longest_q,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_k=problem.max_seqlen_k,
            dropout_p=0.0,
            softmax_scale=problem.transform.softmax_scale,
            causal=causal,
            window_size=(left, right),
            softcap=problem.transform.softcap,
            alibi_slopes=problem.transform.alibi_slopes,
            return_softmax_lse=True,
            fa_version=2,
            **given,
        )
        if self._permutes_lse(problem, longest_q, (left, right)):
            groups = (problem.nheads_k, problem.batch_size, -1)
            lse = lse.reshape(groups).transpose(1, 2).reshape(problem.nheads, -1)
        return self._result(problem, out, result, lse)

    @staticmethod
    def _queries(problem: AttentionProblem) -> tuple[Tensor, int]:
        """Packed bounds of the queries and their longest length."""
        cu_seqlens_q = problem.layout.cu_seqlens_q
        if cu_seqlens_q is None:
            batch_size, seqlen_q = problem.q.shape[:2]
            return _steps(batch_size, seqlen_q, problem.q.device), seqlen_q
        # For a bound of one query the library takes it that every sequence has exactly one.
        exactly_one = problem.q.shape[0] == problem.batch_size
        return cu_seqlens_q, max(problem.max_seqlen_q, 1 if exactly_one else 2)

    @staticmethod
    def _permutes_lse(problem: AttentionProblem, longest_q: int, limits: tuple[int, int]) -> bool:
        """Grouped decoding turns query heads into rows and forgets to turn the LSE back."""
        grouped = longest_q == 1 and problem.nheads > problem.nheads_k
        return grouped and problem.transform.alibi_slopes is None and limits == (-1, -1)

    @staticmethod
    def _result(
        problem: AttentionProblem, out: Tensor | None, result: Tensor, lse: Tensor
    ) -> AttentionResult:
        out = empty_out(problem) if out is None else out
        out.copy_(result[..., : problem.headdim].reshape(out.shape))
        if not problem.is_varlen_q:
            batch_size, seqlen_q = problem.q.shape[:2]
            lse = lse.reshape(problem.nheads, batch_size, seqlen_q).permute(1, 0, 2)
        lse = empty_lse(problem).copy_(lse)
        lse.masked_fill_(torch.isinf(lse), problem.empty_lse)
        clear_unused_rows(out, problem.layout.cu_seqlens_q, 0.0)
        clear_unused_rows(lse, problem.layout.cu_seqlens_q, problem.empty_lse, dim=1)
        return AttentionResult(out, lse, new_s_dmask(problem), unused_state(problem.q.device))

    @explains_toolchain
    @torch.no_grad()
    def backward(self, problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
        refuse_lse_gradient(self.name, inputs)
        # The backward kernels take head dims that are powers of two.
        headdim = max(16, 1 << (problem.headdim - 1).bit_length())
        tensors = (inputs.dout, problem.q, problem.k, problem.v, inputs.out)
        causal, left, right = _masking(problem)
        lse = inputs.softmax_lse
        layout = problem.layout
        grads = flag_gems.flash_attention_backward(
            *(pad_headdim(x, headdim).contiguous() for x in tensors),
            lse.t().contiguous() if problem.is_varlen_q else lse.contiguous(),
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            problem.max_seqlen_q,
            problem.max_seqlen_k,
            0.0,
            causal,
            None,
            None,
            scale=problem.transform.softmax_scale,
            window_size_left=left,
            window_size_right=right,
        )
        bounds = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.cu_seqlens_k)
        targets = (inputs.dq, inputs.dk, inputs.dv)
        for target, grad, cu_seqlens in zip(targets, grads, bounds, strict=True):
            target.copy_(grad[..., : problem.headdim])
            clear_unused_rows(target, cu_seqlens, 0.0)
        return softmax_d(problem, inputs.out, inputs.dout)


BACKEND = FlagGemsBackend()
