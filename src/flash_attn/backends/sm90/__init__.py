"""The Hopper kernels: TMA and warpgroup MMA, for GPUs of compute capability 9.0."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ...core.device import arch_of
from ...core.problem import AttentionProblem, AttentionResult, BackwardInputs, is_half
from . import launch, launch_backward
from .plans import MAX_HEADDIM

# Up to here the portable kernels, which divide the keys among programs, keep more of a GPU busy.
_FEW_QUERIES = 64


class Sm90Backend:
    """Float16 and bfloat16 with dense and packed layouts; see the reasons for what is left out."""

    name = "sm90"

    def unsupported(self, problem: AttentionProblem, backward: bool) -> list[str]:
        q = problem.q
        if not q.is_cuda:
            return [f"needs tensors on a GPU of compute capability 9.0, `q` is on {q.device}"]
        if arch_of(q.device.index) != "sm90":
            return [f"needs a GPU of compute capability 9.0, this one is {arch_of(q.device.index)}"]
        if backward:
            return _gradients_of(problem).unsupported_backward(problem)
        return [*_tensor_reasons(problem), *_feature_reasons(problem)]

    def forward(self, problem: AttentionProblem, out: Tensor | None = None) -> AttentionResult:
        return launch.forward(problem, out)

    def backward(self, problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
        return _gradients_of(problem).backward(problem, inputs)


def _gradients_of(problem: AttentionProblem) -> ModuleType:
    """What computes the gradients, by head dim; for now there is one."""
    return launch_backward


def _tensor_reasons(problem: AttentionProblem) -> list[str]:
    reasons = []
    if not is_half(problem.q.dtype):
        reasons.append(f"computes in float16 and bfloat16, `q` is {problem.q.dtype}")
    for name, headdim in (("", problem.headdim), (" of v", problem.headdim_v)):
        if headdim > MAX_HEADDIM or headdim % 8:
            reasons.append(
                f"serves head dims{name} of a multiple of 8 up to {MAX_HEADDIM}, found {headdim}"
            )
    for name, x in (("q", problem.q), ("k", problem.k), ("v", problem.v)):
        if x.numel() and not launch.is_describable(x):
            reasons.append(
                f"needs steps of a multiple of 16 bytes from a 16-byte boundary, `{name}` has "
                f"strides {x.stride()} and starts at {x.data_ptr() % 16} past one"
            )
    return reasons


def _feature_reasons(problem: AttentionProblem) -> list[str]:
    layout, transform = problem.layout, problem.transform
    features = {
        "packed queries with other keys, or the reverse": (layout.cu_seqlens_q is None)
        != (layout.cu_seqlens_k is None),
        "leftpad_k": layout.leftpad_k is not None,
        "pages": layout.page_table is not None,
        "cache_batch_idx": layout.cache_batch_idx is not None,
        "ALiBi": transform.alibi_slopes is not None,
        "dropout": problem.dropout_p > 0.0,
        "num_splits > 1": problem.num_splits > 1,
        "attn_mask": transform.attn_mask is not None,
        "qv": problem.qv is not None,
        "out_dtype": problem.result_dtype != problem.q.dtype,
    }
    reasons = [f"does not serve {name}" for name, used in features.items() if used]
    reasons += launch.register_reasons(problem)
    if not transform.softmax_scale > 0.0:
        reasons.append(f"needs softmax_scale > 0, found {transform.softmax_scale}")
    if not problem.is_varlen_q and problem.num_splits == 0 and problem.q.shape[1] <= _FEW_QUERIES:
        reasons.append(f"leaves up to {_FEW_QUERIES} queries to kernels that divide the keys")
    return reasons


BACKEND = Sm90Backend()
