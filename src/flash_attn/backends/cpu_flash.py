"""PyTorch's own CPU flash kernel, for the problems that it computes exactly as defined here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.problem import AttentionProblem, BackwardInputs
from ..core.sequences import sequences

_aten = torch.ops.aten


def serves(problem: AttentionProblem) -> bool:
    """Whether the kernel computes this problem: no extra feature, and masks that it shares."""
    layout, transform = problem.layout, problem.transform
    left, right, _ = problem.visibility
    cu_q, cu_k = layout.cu_seqlens_q, layout.cu_seqlens_k
    cache = (layout.seqused_k, layout.leftpad_k, layout.page_table, layout.cache_batch_idx)
    plain = (
        not problem.extensions()
        and all(x is None for x in cache)
        and (cu_q is None) == (cu_k is None)
        and transform.softcap == 0.0
        # PyTorch's kernel scales what it has masked already: 0 * -inf is NaN, a negative one +inf.
        and transform.softmax_scale > 0.0
        and transform.alibi_slopes is None
        and problem.dropout_p == 0.0
        and left is None
        and right in (None, 0)
    )
    if not plain:
        return False
    # PyTorch's kernel needs rows and keys, and aligns causal masks at the start, which is the same
    # only for equal lengths.
    return all(
        part.seqlen_q > 0
        and part.seqlen_k > 0
        and (right is None or part.seqlen_q == part.seqlen_k)
        for part in sequences(problem)
    )


def _parts(
    problem: AttentionProblem, like_q: list[Tensor], like_k: list[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor], tuple[int | slice, ...]]]:
    """(batch, nheads, seqlen, headdim) views, whole or by sequence, and their LSE index."""
    if not problem.is_varlen_q:
        yield (
            [x.transpose(1, 2) for x in like_q],
            [x.transpose(1, 2) for x in like_k],
            (slice(None),),
        )
        return
    for sequence in sequences(problem):
        yield (
            [x[sequence.q_rows][None].transpose(1, 2) for x in like_q],
            [x[sequence.k_rows][None].transpose(1, 2) for x in like_k],
            sequence.lse_index(varlen=True),
        )


def _repeat_heads(x: Tensor, nheads: int) -> Tensor:
    return x if x.shape[1] == nheads else x.repeat_interleave(nheads // x.shape[1], dim=1)


def _wide(x: Tensor) -> Tensor:
    """16-bit inputs are computed in float32: the kernel's 16-bit exponential is a fast one, whose
    log-sum-exp is off in the fifth digit."""
    return x.float() if x.element_size() == 2 else x


def forward(problem: AttentionProblem, out: Tensor, lse: Tensor) -> None:
    """Write ``out`` and ``lse``."""
    for (q, target), keys_values, index in _parts(
        problem, [problem.q, out], [problem.k, problem.v]
    ):
        q, k, v = (_wide(x) for x in (q, *keys_values))
        k, v = _repeat_heads(k, problem.nheads), _repeat_heads(v, problem.nheads)
        result, row_lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q,
            k,
            v,
            0.0,
            problem.visibility.window_right == 0,
            scale=problem.transform.softmax_scale,
        )
        target.copy_(result)
        lse[index] = (row_lse[0] if problem.is_varlen_q else row_lse).float()


def backward(problem: AttentionProblem, inputs: BackwardInputs) -> None:
    """Write ``dq``, ``dk`` and ``dv``."""
    like_q = [problem.q, inputs.out, inputs.dout, inputs.dq]
    like_k = [problem.k, problem.v, inputs.dk, inputs.dv]
    for (q, out, dout, dq), (k, v, dk, dv), index in _parts(problem, like_q, like_k):
        lse = inputs.softmax_lse[index]
        q, k, v, out, dout = (_wide(x) for x in (q, k, v, out, dout))
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout,
            q,
            _repeat_heads(k, problem.nheads),
            _repeat_heads(v, problem.nheads),
            out,
            (lse[None] if problem.is_varlen_q else lse).to(q.dtype),
            0.0,
            problem.visibility.window_right == 0,
            scale=problem.transform.softmax_scale,
        )
        dq.copy_(grads[0])
        for target, grad in ((dk, grads[1]), (dv, grads[2])):
            group = grad.shape[1] // target.shape[1]
            target.copy_(grad if group == 1 else grad.unflatten(1, (-1, group)).sum(2))
