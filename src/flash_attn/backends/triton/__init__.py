"""The portable Triton kernels: any GPU that Triton supports, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

from ...core.problem import AttentionProblem, AttentionResult, BackwardInputs
from ...core.toolchain import explains_toolchain
from . import launch, launch_backward
from .launch_rotary import apply_rotary

_INTERPRETED = bool(knobs.runtime.interpret)


class TritonBackend:
    """float16, bfloat16 and float32 on GPU tensors (and CPU tensors in Triton's interpreter)."""

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

    def rotate(
        self, x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, interleaved: bool
    ) -> Tensor:
        """Rotary embedding of (batch, seqlen, nheads, headdim), into a new tensor."""
        return apply_rotary(x, cos, sin, seqlen_offsets=seqlen_offsets, interleaved=interleaved)

    @explains_toolchain
    def append_kv(
        self, problem: AttentionProblem, k_new: Tensor, v_new: Tensor, at: Tensor
    ) -> None:
        """Write new rows into the caches of ``problem``, sequence b's from row ``at[b]`` on."""
        launch.append_kv(problem, k_new, v_new, at)


BACKEND = TritonBackend()
