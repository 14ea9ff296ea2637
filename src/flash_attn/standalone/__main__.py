"""``python -m flash_attn.standalone``: three calls held against a float64 computation.

Causal prefill, GQA decoding and FP8 with packed sequences. On a Hopper GPU they are strict; on
other GPUs, and in smaller sizes on the CPU, they run with ``strict=False``. The exit status is 1 if
a call fails or its error is too large.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import reference
from ..core.device import arch_of
from ..core.problem import (
    AttentionProblem,
    SequenceLayout,
    Visibility,
    make_transform,
)
from . import (
    AttentionMode,
    DataType,
    FlashAttentionParams,
    flash_attention_forward,
    get_error_string,
    get_last_error_message,
)

_NAN = float("nan")


class Case(NamedTuple):
    """A call, the same as a problem for the reference, and the largest relative error."""

    name: str
    params: FlashAttentionParams
    problem: AttentionProblem
    tolerance: float


class Outcome(NamedTuple):
    """The code of a call, and the relative errors of its output and log-sum-exp."""

    code: int
    out_error: float
    lse_error: float


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).half()


def prefill(device: torch.device, seqlen: int, heads: int) -> Case:
    """FP16, causal, every query head with keys of its own."""
    q, k, v = (_random(device, 2, seqlen, heads, 128) for _ in range(3))
    params = FlashAttentionParams(
        q=q,
        k=k,
        v=v,
        out=torch.full_like(q, _NAN),
        softmax_lse=torch.full((2, heads, seqlen), _NAN, device=device),
        batch_size=2,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        num_heads=heads,
        num_heads_k=heads,
        head_dim=128,
        is_causal=True,
        dtype=DataType.FP16,
    )
    problem = AttentionProblem(q, k, v, make_transform(128), Visibility(window_right=0))
    return Case(f"FP16 causal prefill, 2 x {seqlen} tokens", params, problem, 2e-3)


def decode(device: torch.device, seqlen: int) -> Case:
    """FP16, one new query a sequence, 16 query heads on 2 KV heads."""
    q = _random(device, 4, 1, 16, 128)
    k, v = (_random(device, 4, seqlen, 2, 128) for _ in range(2))
    params = FlashAttentionParams(
        q=q,
        k=k,
        v=v,
        out=torch.full_like(q, _NAN),
        softmax_lse=torch.full((4, 16, 1), _NAN, device=device),
        batch_size=4,
        seqlen_q=1,
        seqlen_k=seqlen,
        num_heads=16,
        num_heads_k=2,
        head_dim=128,
        dtype=DataType.FP16,
        mode=AttentionMode.DECODE,
    )
    problem = AttentionProblem(q, k, v, make_transform(128))
    return Case(f"FP16 GQA decode 16:2, {seqlen} keys", params, problem, 2e-3)


def float8_varlen(device: torch.device, lengths: list[int], heads: int) -> Case:
    """FP8 E4M3, packed sequences, one descale for each of q, k and v."""
    total = sum(lengths)
    exact = [torch.randn(total, heads, 128, device=device) for _ in range(3)]
    descales = [(x.abs().max() / 448.0).reshape(1) for x in exact]
    q, k, v = ((x / s).to(torch.float8_e4m3fn) for x, s in zip(exact, descales, strict=True))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    params = FlashAttentionParams(
        q=q,
        k=k,
        v=v,
        out=torch.full((total, heads, 128), _NAN, dtype=torch.bfloat16, device=device),
        softmax_lse=torch.full((heads, total), _NAN, device=device),
        batch_size=len(lengths),
        num_heads=heads,
        num_heads_k=heads,
        head_dim=128,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        total_q=total,
        total_k=total,
        q_descale_ptr=descales[0],
        k_descale_ptr=descales[1],
        v_descale_ptr=descales[2],
        dtype=DataType.FP8_E4M3,
        mode=AttentionMode.VARLEN_PREFILL,
    )
    q_descale, k_descale, v_descale = (x.expand(len(lengths), heads) for x in descales)
    transform = make_transform(128)._replace(
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale
    )
    layout = SequenceLayout(cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    problem = AttentionProblem(q, k, v, transform, layout=layout)
    # Weights are rounded to FP8 on the way to v, which has 3 bits after the leading one.
    return Case(f"FP8 varlen, lengths {lengths}", params, problem, 6e-2)


def run(case: Case, strict: bool) -> Outcome:
    """Make the call and measure it."""
    code = flash_attention_forward(case.params, strict=strict)
    if code:
        return Outcome(code, _NAN, _NAN)
    true = reference.attention(case.problem, torch.float64)
    out, lse = case.params.out.double(), case.params.softmax_lse.double()
    norm = torch.linalg.vector_norm
    out_error = float(norm(out - true.out) / norm(true.out))
    lse_error = float(((lse - true.softmax_lse).abs() / true.softmax_lse.abs().clamp_min(1)).max())
    return Outcome(0, out_error, lse_error)


def main() -> int:
    """Run the three cases; returns the exit status."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    strict = on_gpu and arch_of(device.index) == "sm90"
    where = torch.cuda.get_device_name(device) if on_gpu else "the CPU, in smaller sizes"
    sys.stdout.write(f"on {where}, strict={strict}\n")
    if on_gpu:
        cases = [
            prefill(device, 512, 16),
            decode(device, 2048),
            float8_varlen(device, [256, 512, 128], 16),
        ]
    else:
        cases = [
            prefill(device, 64, 4),
            decode(device, 256),
            float8_varlen(device, [32, 64, 16], 4),
        ]
    status = 0
    for case in cases:
        outcome = run(case, strict)
        # NaN compares false: what was not written does not pass.
        passed = outcome.out_error <= case.tolerance and outcome.lse_error <= case.tolerance
        status = status if passed else 1
        reason = ""
        if outcome.code:
            reason = f" ({get_error_string(outcome.code)}: {get_last_error_message()})"
        sys.stdout.write(
            f"{'PASS' if passed else 'FAIL'}  {case.name}: code {outcome.code}{reason}, "
            f"out error {outcome.out_error:.2e}, lse error {outcome.lse_error:.2e}, "
            f"allowed {case.tolerance:.0e}\n"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
