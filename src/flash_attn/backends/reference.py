"""The reference as a backend: dense, in float32 or better, on any device. Only on request."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import reference
from ..core.outputs import empty_out, softmax_d
from ..core.problem import AttentionProblem, AttentionResult, BackwardInputs


def _dtype(problem: AttentionProblem) -> torch.dtype:
    return torch.float64 if problem.q.dtype == torch.float64 else torch.float32


class ReferenceBackend:
    """Computes :func:`flash_attn.core.reference.attention`; memory grows with seqlen squared."""

    name = "reference"

    def unsupported(self, problem: AttentionProblem, backward: bool) -> list[str]:
        return []

    @torch.no_grad()
    def forward(self, problem: AttentionProblem, out: Tensor | None = None) -> AttentionResult:
        result = reference.attention(problem, _dtype(problem))
        out = empty_out(problem) if out is None else out
        out.copy_(result.out)
        s_dmask = result.s_dmask.to(problem.q.dtype)
        return result._replace(out=out, softmax_lse=result.softmax_lse.float(), s_dmask=s_dmask)

    def backward(self, problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
        grads = reference.gradients(
            problem, inputs.dout, _dtype(problem), inputs.rng_state, inputs.dlse
        )
        targets = (inputs.dq, inputs.dk, inputs.dv, inputs.dmask)
        for target, grad in zip(targets, grads[:4], strict=True):
            if target is not None and grad is not None:
                target.copy_(grad)
        return softmax_d(problem, inputs.out, inputs.dout, inputs.dlse)


BACKEND = ReferenceBackend()
