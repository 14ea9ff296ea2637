"""The Hopper kernels: TMA and warpgroup MMA, for GPUs of compute capability 9.0."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import triton
from torch import Tensor
from triton import knobs

from ...core import plan
from ...core.device import arch_of
from ...core.problem import AttentionProblem, AttentionResult, BackwardInputs, is_half
from ...core.repeated import Solve
from ...core.toolchain import explains_toolchain
from .._compiled import KNOWN_VERSION
from .._launcher import undisturbed

if not KNOWN_VERSION:
    raise ImportError(f"is written for Triton 3.6 to 3.9, found {triton.__version__}")

from . import launch, record
from .plans import MAX_HEADDIM
from .refusal import reports_refusal

# At most half of the smallest tile. For so few queries of dense tensors the portable kernels have
# smaller tiles, and divide the keys among programs, which keeps more of a GPU busy.
_FEW_QUERIES = 64
_INTERPRETED = bool(knobs.runtime.interpret)


class Sm90Backend:
    """Float16 and bfloat16 with dense and packed layouts; see the reasons for what is left out."""

    name = "sm90"

    def unsupported(self, problem: AttentionProblem, backward: bool) -> list[str]:
        reasons = _place_reasons(problem.q)
        if reasons:
            return reasons
        if plan.is_overridden():
            return ["has no use for the overridden plans, which are the portable kernels'"]
        if backward:
            return _gradients().unsupported_backward(problem)
        return [*_tensor_reasons(problem), *_feature_reasons(problem)]

    def better_elsewhere(self, problem: AttentionProblem) -> list[str]:
        """Why the automatic choice leaves a problem to the portable kernels, both passes of it."""
        if problem.is_varlen_q:
            # Bounds and neighbours do not change a sequence's bits, so they choose no backend.
            return []
        queries = problem.q.shape[1]
        if queries > _FEW_QUERIES:
            return []
        return [
            f"leaves up to {_FEW_QUERIES} dense queries, here {queries}, to kernels with smaller "
            "tiles that divide the keys"
        ]

    @explains_toolchain
    @reports_refusal
    def forward(self, problem: AttentionProblem, out: Tensor | None = None) -> AttentionResult:
        return launch.forward(problem, out)

    @explains_toolchain
    @reports_refusal
    def backward(self, problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
        return _gradients().backward(problem, inputs)

    # See flash_attn.core.repeated for these.
    repeats_now = staticmethod(undisturbed)

    @explains_toolchain
    @reports_refusal
    def record_forward(
        self, problem: AttentionProblem, tensors: Sequence[Tensor]
    ) -> tuple[AttentionResult, Solve | None]:
        return record.forward(problem, tensors)

    @explains_toolchain
    @reports_refusal
    def record_backward(
        self, problem: AttentionProblem, inputs: BackwardInputs, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Solve | None]:
        return record.backward(problem, inputs, tensors, _gradients().backward)


def _gradients() -> ModuleType:
    """What computes the gradients, loaded with the first of them: inference never asks."""
    from . import launch_backward

    return launch_backward


def _place_reasons(q: Tensor) -> list[str]:
    """Why no problem at all is served here and now."""
    if not q.is_cuda:
        return [f"needs tensors on a GPU of compute capability 9.0, `q` is on {q.device}"]
    if arch_of(q.device.index) != "sm90":
        return [f"needs a GPU of compute capability 9.0, this one is {arch_of(q.device.index)}"]
    if _INTERPRETED:
        return ["is not run by Triton's interpreter"]
    return []


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
    return reasons


BACKEND = Sm90Backend()
