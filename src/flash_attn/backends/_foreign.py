"""What the adapters to other libraries' kernels share: FlashAttention-2's conventions.

Those kernels take windows as a pair of numbers, -1 for no limit, and replace numbers that reach
past the keys. They leave rows that belong to no packed sequence unwritten.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.problem import AttentionProblem, BackwardInputs
from ..errors import UnsupportedProblemError


def window(problem: AttentionProblem) -> tuple[int, int]:
    """(left, right), -1 where there is no limit or one that reaches past all keys."""
    longest = problem.max_seqlen_k
    left, right = (
        -1 if limit is None or limit >= longest else limit for limit in problem.visibility[:2]
    )
    return left, right


def refused_inputs(problem: AttentionProblem) -> list[str]:
    """What neither library computes as it is defined here."""
    q, layout = problem.q, problem.layout
    reasons = [f"does not know {name}" for name in problem.extensions()]
    if not q.is_cuda:
        reasons.append(f"needs GPU tensors, `q` is on {q.device}")
    if q.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(q.dtype).removeprefix("torch.")
        reasons.append(f"computes in float16 and bfloat16 only, `q` has dtype {dtype}")
    if problem.headdim > 256:
        reasons.append(f"head dim at most 256, found {problem.headdim}")
    if problem.dropout_p > 0.0:
        reasons.append("draws dropout's random bits otherwise than defined here")
    if problem.return_softmax:
        reasons.append("does not return S_dmask as it is defined here")
    if problem.num_splits > 1:
        reasons.append(f"cannot be told `num_splits`, found {problem.num_splits}")
    if layout.leftpad_k is not None:
        reasons.append("does not take `cache_leftpad`")
    if (layout.cu_seqlens_q is None) != (layout.cu_seqlens_k is None):
        reasons.append("needs both of `cu_seqlens_q` and `cu_seqlens_k` or none")
    if 0 in (problem.batch_size, problem.max_seqlen_q, problem.max_seqlen_k):
        reasons.append("needs at least one sequence, one query and one key")
    return reasons + _refused_window(problem)


def _refused_window(problem: AttentionProblem) -> list[str]:
    """A window without right limit ends ``max_seqlen_k`` keys on, too early for the first rows if
    there are more queries than keys; a right limit past all keys drops out, though for those rows
    it hides keys."""
    left, right = window(problem)
    wide = problem.visibility.window_right is not None and right < 0
    if problem.max_seqlen_q > problem.max_seqlen_k and right < 0 and (left >= 0 or wide):
        return [
            "misplaces a right window limit that is absent or past all keys where `seqlen_q` "
            f"({problem.max_seqlen_q}) exceeds `seqlen_k` ({problem.max_seqlen_k})"
        ]
    return []


def pad_headdim(x: Tensor, headdim: int) -> Tensor:
    """``x`` with zeros up to ``headdim``."""
    missing = headdim - x.shape[-1]
    return x if missing == 0 else F.pad(x, (0, missing))


def clear_unused_rows(x: Tensor, cu_seqlens: Tensor | None, value: float, dim: int = 0) -> None:
    """Fill the rows of a packed tensor after the last sequence, without reading its end."""
    if cu_seqlens is None:
        return
    rows = torch.arange(x.shape[dim], device=x.device) >= cu_seqlens[-1]
    shape = [1] * x.dim()
    shape[dim] = -1
    x.masked_fill_(rows.view(shape), value)


def refuse_lse_gradient(name: str, inputs: BackwardInputs) -> None:
    """These libraries' operators have no argument for a gradient of the log-sum-exp.

    Raises:
        UnsupportedProblemError: one is given.
    """
    if inputs.dlse is not None:
        raise UnsupportedProblemError(
            f"the backend {name} does not take a gradient of softmax_lse; choose another with "
            "flash_attn.set_backend(...) or do not differentiate the log-sum-exp"
        )
