"""The portable Triton kernels: any GPU that Triton supports, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import knobs

from ...core.problem import AttentionProblem, AttentionResult, BackwardInputs
from ...core.repeated import Solve
from ...core.toolchain import explains_toolchain
from .._launcher import undisturbed
from . import launch, launch_backward, launch_cache, record
from .launch_rotary import apply_rotary

_INTERPRETED = bool(knobs.runtime.interpret)


class TritonBackend:
    """float16, bfloat16, float32 and float8 (e4m3) on GPU tensors.

    In Triton's interpreter also on CPU tensors.
    """

    name = "triton"

    def unsupported(self, problem: AttentionProblem, backward: bool) -> list[str]:
        reasons = []
        if not problem.q.is_cuda and not _INTERPRETED:
            reasons.append(f"needs GPU tensors, `q` is on {problem.q.device}")
        if problem.q.dtype == torch.float64:
            reasons.append("does not compute in float64, the dtype of `q`")
        return reasons

    @explains_toolchain
    def forward(self, problem: AttentionProblem, out: Tensor | None = None) -> AttentionResult:
        return launch.forward(problem, out)

    @explains_toolchain
    def backward(self, problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
        return launch_backward.backward(problem, inputs)

    # See flash_attn.core.repeated for these three.
    repeats_now = staticmethod((lambda: False) if _INTERPRETED else undisturbed)

    def record_forward(
        self, problem: AttentionProblem, tensors: Sequence[Tensor]
    ) -> tuple[AttentionResult, Solve | None]:
        return record.forward(problem, tensors)

    def record_backward(
        self, problem: AttentionProblem, inputs: BackwardInputs, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Solve | None]:
        return record.backward(problem, inputs, tensors)

    def rotate(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        seqlen_offsets: int | Tensor,
        interleaved: bool,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Rotary embedding of dense or packed rows, into a new tensor."""
        return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, interleaved=interleaved)

    @explains_toolchain
    def append_kv(
        self,
        problem: AttentionProblem,
        k_new: Tensor,
        v_new: Tensor,
        at: Tensor,
        cu_seqlens_new: Tensor | None = None,
    ) -> None:
        """Write new rows into the caches of ``problem``, sequence b's from row ``at[b]`` on."""
        launch_cache.append_kv(problem, k_new, v_new, at, cu_seqlens_new)

    def combine(self, out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge partial results into ``out`` and ``lse``; see flash_attn.core.combine."""
        launch_cache.combine(out_partial, lse_partial, out, lse)


BACKEND = TritonBackend()
