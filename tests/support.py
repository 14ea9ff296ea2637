"""What the semantic tests share: inputs, ways to run them, the error budget, layouts, poison.

The budget holds a result against float64 arithmetic on the same rounded inputs
(:mod:`flash_attn.core.reference`): its error, in the Frobenius and in the maximum norm, may be at
most twice that of plain PyTorch in the inputs' dtype for the output and three times for gradients,
plus the rounding of the exact answer itself. The log-sum-exp is float32 everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flash_attn
from flash_attn import flash_attn_interface as interface
from flash_attn.core import ops, reference, rng
from flash_attn.core.masking import visible_matrix
from flash_attn.core.problem import AttentionProblem
from flash_attn.core.sequences import sequences

# The tensors on the CPU are small: threads would only get in each other's way.
torch.set_num_threads(1)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF_DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
# Products of bfloat16 are wrong in Triton's interpreter.
DTYPES = [torch.float32, *HALF_DTYPES]
HEADDIMS = [32, 40, 64, 80, 96, 128, 160, 192, 224, 256]
ODD_HEADDIMS = [1, 8, 16, 24, 72]
GRADIENT_NAMES = ("dq", "dk", "dv")


class Solution(NamedTuple):
    """Everything that one forward and backward pass yields."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def pick(device: str, cpu: Any, cuda: Any) -> Any:
    """A size for the device at hand: ``cuda``'s are larger."""
    return cuda if device == "cuda" else cpu


def some(every: list[Any], few: list[Any]) -> list[Any]:
    """Parameters of a test; ``few`` in the interpreter, where each takes about a second."""
    return few if INTERPRETED else every


# Input families ----------------------------------------------------------------------------------


def _heavy_tailed(shape: tuple[int, ...]) -> Tensor:
    """Like activations: few directions carry most, neighbours agree, tails are fat."""
    headdim = shape[-1]
    directions = torch.randn(max(1, headdim // 8), headdim)
    weights = torch.randn(*shape[:-1], directions.shape[0])
    weights = weights + weights.roll(1, dims=0) if weights.numel() else weights
    tails = torch.randn(shape) / torch.rand(shape).clamp_min(0.05).sqrt()
    return (weights @ directions) / directions.shape[0] ** 0.5 + 0.3 * tails


def draw(family: str, shape: tuple[int, ...], name: str) -> Tensor:
    """Float32 numbers of a family for the argument ``name`` (q, k, v or dout)."""
    x = torch.randn(shape)
    if family == "large_logits":
        return x * {"q": 5.0, "k": 3.0}.get(name, 1.0)
    if family == "outlier_channels" and name in ("q", "k"):
        x[..., :: max(1, shape[-1] // 3)] *= 20.0
        return x / 2.0
    if family == "offset" and name == "v":
        return x + 1000.0
    if family == "activations":
        return _heavy_tailed(shape)
    return x


FAMILIES = ["gaussian", "large_logits", "outlier_channels", "offset", "activations"]


# Problems ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of ``flash_attn_func`` or, with ``lengths``, of the varlen one.

    ``lengths`` is (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) or empty.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[Any, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.dout

    def but(self, **changes: Any) -> Inputs:
        """A copy with other fields; unknown names change ``options``."""
        fields = {name: changes.pop(name) for name in list(changes) if name in self._names}
        return replace(self, **{"options": {**self.options, **changes}, **fields})

    _names = ("q", "k", "v", "dout", "lengths")

    def flat_options(self) -> tuple[Any, ...]:
        """dropout_p to alibi_slopes in the private functions' order."""
        given = self.options
        scale = given.get("softmax_scale")
        return (
            given.get("dropout_p", 0.0),
            self.q.shape[-1] ** -0.5 if scale is None else scale,
            given.get("causal", False),
            *given.get("window_size", (-1, -1)),
            given.get("softcap", 0.0),
            given.get("alibi_slopes"),
        )

    def problem(self) -> AttentionProblem:
        """The same call as the package's noun, for the reference."""
        make = ops.varlen_problem if self.lengths else ops.dense_problem
        return make(self.q, self.k, self.v, *self.lengths, *self.flat_options())


def dense(
    device: str,
    dtype: torch.dtype,
    batch: int = 2,
    seqlens: tuple[int, int] = (17, 33),
    heads: tuple[int, int] = (2, 2),
    headdim: int = 32,
    family: str = "gaussian",
    **options: Any,
) -> Inputs:
    """Inputs (batch, seqlen, heads, headdim) of ``family``."""
    like_q = (batch, seqlens[0], heads[0], headdim)
    like_k = (batch, seqlens[1], heads[1], headdim)
    shapes = {"q": like_q, "k": like_k, "v": like_k, "dout": like_q}
    tensors = {name: draw(family, shape, name).to(dtype) for name, shape in shapes.items()}
    return Inputs(**{name: x.to(device) for name, x in tensors.items()}, options=options)


def cumulative(lengths: list[int], device: str, start: int = 0) -> Tensor:
    """cu_seqlens of these lengths."""
    bounds = torch.tensor([start, *lengths]).cumsum(0)
    return bounds.to(torch.int32).to(device)


def varlen(
    device: str,
    dtype: torch.dtype,
    lengths_q: list[int],
    lengths_k: list[int] | None = None,
    heads: tuple[int, int] = (2, 2),
    headdim: int = 32,
    padding: int = 0,
    family: str = "gaussian",
    **options: Any,
) -> Inputs:
    """Packed inputs; ``padding`` rows that belong to no sequence follow the last one."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    like_q = (sum(lengths_q) + padding, heads[0], headdim)
    like_k = (sum(lengths_k) + padding, heads[1], headdim)
    shapes = {"q": like_q, "k": like_k, "v": like_k, "dout": like_q}
    tensors = {name: draw(family, shape, name).to(dtype) for name, shape in shapes.items()}
    bounds = (
        cumulative(lengths_q, device),
        cumulative(lengths_k, device),
        max(lengths_q, default=0),
        max(lengths_k, default=0),
    )
    moved = {name: x.to(device) for name, x in tensors.items()}
    return Inputs(**moved, options=options, lengths=bounds)


def alibi_slopes(device: str, nheads: int, batch: int | None = None) -> Tensor:
    """(nheads,) or (batch, nheads) float32 slopes, all different."""
    shape = (nheads,) if batch is None else (batch, nheads)
    return (0.02 + 0.3 * torch.rand(shape)).to(device)


# Running -----------------------------------------------------------------------------------------


def run(inputs: Inputs) -> Solution:
    """Through the public function and autograd."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    function = flash_attn.flash_attn_varlen_func if inputs.lengths else flash_attn.flash_attn_func
    out, lse, _ = function(*leaves, *inputs.lengths, **inputs.options, return_attn_probs=True)
    grads = torch.autograd.grad(out, leaves, inputs.dout)
    return Solution(out.detach(), lse, *grads)


def run_forward(inputs: Inputs, return_softmax: bool = False) -> tuple[Tensor, ...]:
    """Through the private forward function: (out, lse, S_dmask, rng_state)."""
    if inputs.lengths:
        return interface._flash_attn_varlen_forward(
            inputs.q, inputs.k, inputs.v, *inputs.lengths, *inputs.flat_options(), return_softmax
        )
    return interface._flash_attn_forward(
        inputs.q, inputs.k, inputs.v, *inputs.flat_options(), return_softmax
    )


def run_private(
    inputs: Inputs, buffers: tuple[Tensor, ...] | None = None
) -> tuple[Solution, Tensor]:
    """Through the private functions, gradients into ``buffers``: (solution, rng_state)."""
    out, lse, _, rng_state = run_forward(inputs)
    likes = (inputs.q, inputs.k, inputs.v)
    grads = tuple(poisoned_like(x) for x in likes) if buffers is None else buffers
    arguments = (inputs.dout, inputs.q, inputs.k, inputs.v, out, lse, *grads)
    if inputs.lengths:
        interface._flash_attn_varlen_backward(
            *arguments, *inputs.lengths, *inputs.flat_options(), False, rng_state
        )
    else:
        interface._flash_attn_backward(*arguments, *inputs.flat_options(), False, rng_state)
    return Solution(out, lse, *grads), rng_state


# Error budget ------------------------------------------------------------------------------------


def exact(
    problem: AttentionProblem,
    dout: Tensor,
    rng_state: Tensor | None = None,
    returned: Tensor | None = None,
) -> tuple[Solution, dict[str, Tensor]]:
    """The answer in float64, and by name what a gradient owes to the error of the output.

    Backward starts from rowsum(out * dout) of the output as it was ``returned``, whose own error is
    bounded by itself. An error e of that sum changes the score gradients by -e times the softmax,
    which is the gradient of the log-sum-exp.
    """
    leaves = [x.detach().double().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    q, k, v = leaves
    copy = problem._replace(q=q, k=k, v=v)
    result = reference.attention(copy, torch.float64, rng_state)
    true = result.out.detach()
    if not result.out.requires_grad:
        zeros = [torch.zeros_like(x) for x in leaves]
        return Solution(true, result.softmax_lse, *zeros), {}
    grads = _gradients(result.out, leaves, dout.double())
    returned = true.to(problem.q.dtype) if returned is None else returned
    shift = ((returned.double() - true) * dout.double()).sum(-1)
    lse = result.softmax_lse
    shift = shift.transpose(-1, -2).masked_fill(torch.isinf(lse), 0.0)
    dq, dk, _ = _gradients(lse, leaves, shift) if lse.requires_grad else grads
    return Solution(true, lse.detach(), *grads), {"dq": dq, "dk": dk}


def _gradients(x: Tensor, leaves: list[Tensor], dx: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(x, leaves, dx, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, grads, strict=True)
    ]


def _plain_forward(
    problem: AttentionProblem, leaves: list[Tensor], rng_state: Tensor | None
) -> Tensor:
    """Attention as one writes it in PyTorch: products in the dtype, softmax in float32."""
    q, k, v = leaves
    transform, group = problem.transform, problem.nheads // problem.nheads_k
    out = torch.zeros_like(q)
    for sequence in sequences(problem):
        q_part = q[sequence.q_rows].transpose(0, 1) * transform.softmax_scale
        k_part, v_part = (
            x[sequence.k_rows].repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v)
        )
        s = (q_part @ k_part.mT).float()
        seqlen_q, seqlen_k = s.shape[-2:]
        if transform.softcap > 0.0:
            s = transform.softcap * torch.tanh(s / transform.softcap)
        if transform.alibi_slopes is not None:
            slopes = transform.alibi_slopes
            slopes = slopes if slopes.dim() == 1 else slopes[sequence.number]
            row = torch.arange(seqlen_q, device=s.device)[:, None] + (seqlen_k - seqlen_q)
            distance = (row - torch.arange(seqlen_k, device=s.device)).abs()
            s = s - slopes[:, None, None] * distance
        seen = visible_matrix(seqlen_q, seqlen_k, problem.visibility, s.device)
        dead = ~seen.any(-1, keepdim=True)
        # A finite stand-in keeps rows without keys free of NaN; they are blanked afterwards.
        p = torch.softmax(s.masked_fill(~seen, -1e30), dim=-1).masked_fill(dead, 0.0)
        if problem.dropout_p > 0.0 and rng_state is not None:
            rows = torch.arange(seqlen_q, device=s.device)
            keys = torch.arange(seqlen_k, device=s.device)
            keep = rng.keep_mask(
                rng_state, problem.dropout_p, sequence.number, problem.nheads, rows, keys
            )
            p = p.masked_fill(~keep, 0.0) / (1.0 - problem.dropout_p)
        out[sequence.q_rows] = (p.to(q.dtype) @ v_part).transpose(0, 1)
    return out


def plain(problem: AttentionProblem, dout: Tensor, rng_state: Tensor | None = None) -> Solution:
    """The answer of plain PyTorch in the inputs' dtype (without a log-sum-exp)."""
    leaves = [x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = _plain_forward(problem, leaves, rng_state)
    if not out.requires_grad:
        zeros = [torch.zeros_like(x) for x in leaves]
        return Solution(out, out, *zeros)
    grads = torch.autograd.grad(out, leaves, dout)
    return Solution(out.detach(), out.detach(), *grads)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def _floors(problem: AttentionProblem, dout: Tensor) -> dict[str, float]:
    """Float32's own rounding, by name: of the output's weights, and of the terms that cancel in
    gradients whose exact value is zero (dk sums them over all queries)."""
    eps = torch.finfo(torch.float32).eps
    size = max(_rms(problem.q), _rms(problem.k), 1.0) * _rms(problem.v) * _rms(dout)
    scale = max(abs(problem.transform.softmax_scale), 0.1)
    floor = 8.0 * eps * scale * size * problem.headdim**0.5
    rows = problem.max_seqlen_q / (1 if problem.is_varlen_q else max(1, problem.max_seqlen_k))
    out = 0.5 * eps * _rms(problem.v)
    return {"out": out, "dq": floor, "dk": floor * max(1.0, rows) ** 0.5, "dv": floor}


def check_error(
    name: str,
    got: Tensor,
    true: Tensor,
    same: Tensor,
    factor: float,
    floor: float = 0.0,
    owed: Tensor | None = None,
) -> None:
    """``got`` errs at most ``factor`` times as much as ``same``, plus the rounding of ``true``,
    plus ``owed``."""
    assert got.shape == true.shape, f"{name} has shape {tuple(got.shape)}"
    assert got.dtype == same.dtype, f"{name} has dtype {got.dtype}"
    if not got.numel():
        return
    assert torch.isfinite(got).all(), f"{name} is not finite"
    error, allowed = got.double() - true, same.double() - true
    rounding = true.to(got.dtype).double() - true
    count = got.numel() ** 0.5
    for norm, size, extra in (
        ("Frobenius", torch.linalg.vector_norm, floor * count),
        ("maximum", lambda x: x.abs().max(), 4.0 * floor),
    ):
        found = float(size(error))
        bound = factor * float(size(allowed)) + float(size(rounding)) + extra
        bound += 0.0 if owed is None else float(size(owed))
        assert found <= bound, f"{name}: {norm} error {found:.3e} exceeds {bound:.3e}"


def check_direction(
    name: str, got: Tensor, true: Tensor, same: Tensor, owed: Tensor | None = None
) -> None:
    """Cosine and norm ratio of a gradient, where plain PyTorch, and the exact answer with what it
    owes to the output's rounding, keep half of the bounds themselves."""

    def angle_and_ratio(x: Tensor) -> tuple[float, float]:
        x, norm = x.double().flatten(), float(torch.linalg.vector_norm(true))
        size = float(torch.linalg.vector_norm(x))
        cosine = float(x @ true.flatten()) / max(size * norm, 1e-300)
        return 1.0 - cosine, abs(size / norm - 1.0)

    if float(torch.linalg.vector_norm(true)) <= 1e-5 * true.numel() ** 0.5:
        return
    for x in (same, true if owed is None else true + owed):
        angle, ratio = angle_and_ratio(x)
        if angle > 5e-5 or ratio > 5e-3:
            return
    angle, ratio = angle_and_ratio(got)
    assert angle <= 1e-4, f"{name}: cosine {1.0 - angle}"
    assert ratio <= 1e-2, f"{name}: norm off by {ratio}"


def check_lse(got: Tensor, true: Tensor) -> None:
    """The log-sum-exp is float32, infinite exactly where it should be, and exact to 1e-5."""
    assert got.dtype == torch.float32
    assert got.shape == true.shape
    infinite = torch.isinf(true)
    assert torch.equal(got[infinite].double(), true[infinite])
    error = (got.double() - true)[~infinite].abs()
    bound = 1e-5 * true[~infinite].abs().clamp_min(1.0)
    assert (error <= bound).all(), f"lse is off by {float((error / bound).max()) * 1e-5:.2e}"


def check(inputs: Inputs, got: Solution, rng_state: Tensor | None = None) -> None:
    """Everything in ``got`` is within the error budget."""
    problem = inputs.problem()
    true, owed = exact(problem, inputs.dout, rng_state, got.out)
    same = plain(problem, inputs.dout, rng_state)
    check_lse(got.lse, true.lse)
    floors = _floors(problem, inputs.dout)
    check_error("out", got.out, true.out, same.out, 2.0, floors["out"])
    for name in GRADIENT_NAMES:
        tensors = [getattr(solution, name) for solution in (got, true, same)]
        check_error(name, *tensors, 3.0, floors[name], owed.get(name))
        check_direction(name, *tensors, owed.get(name))


def check_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Run the private forward function, hold it against the budget, and return out and lse."""
    problem = inputs.problem()
    out, lse, *_ = run_forward(inputs)
    true, _ = exact(problem, inputs.dout)
    check_lse(lse, true.lse)
    floor = _floors(problem, inputs.dout)["out"]
    check_error("out", out, true.out, plain(problem, inputs.dout).out, 2.0, floor)
    return out, lse


def run_and_check(inputs: Inputs) -> Solution:
    """Run the public function, hold it against the budget, and return what it gave."""
    got = run(inputs)
    check(inputs, got)
    return got


def assert_same_bits(a: Solution, b: Solution, what: str = "") -> None:
    """Bitwise equality of two solutions; NaN equals nothing, so none may occur."""
    for name in Solution._fields:
        assert torch.equal(getattr(a, name), getattr(b, name)), f"{name} differs {what}"


def assert_close(a: Tensor, b: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Two orders of the same sums agree to a few rounding steps of ``dtype``."""
    if not a.numel():
        assert a.shape == b.shape
        return
    finite = torch.isfinite(b)
    assert torch.equal(torch.isfinite(a), finite), what
    a, b = a.double()[finite], b.double()[finite]
    bound = 16.0 * torch.finfo(dtype).eps * max(1.0, float(b.abs().max()) if b.numel() else 0.0)
    error = float((a - b).abs().max()) if a.numel() else 0.0
    assert error <= bound, f"{what}: off by {error:.2e}, allowed {bound:.2e}"


# Poison and layouts ------------------------------------------------------------------------------


def poisoned_like(x: Tensor) -> Tensor:
    """A buffer like ``x`` filled with NaN: what is not written shows."""
    return torch.empty_like(x).fill_(float("nan"))


def poison(x: Tensor, rows: slice | Tensor, dim: int) -> Tensor:
    """A copy of ``x`` with NaN and infinities in ``rows`` of ``dim``."""
    x = x.clone()
    target = x.transpose(0, dim)[rows]
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=x.dtype, device=x.device)
    index = torch.arange(target.numel(), device=x.device) % 3
    x.transpose(0, dim)[rows] = bad[index].view(target.shape)
    return x


def _inside(shape: tuple[int, ...], where: tuple[Any, ...], x: Tensor) -> Tensor:
    """Put ``x`` into part of a NaN-filled tensor of ``shape``, and return that view."""
    view = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)[where]
    view.copy_(x)
    return view


def _packed_slice(x: Tensor) -> Tensor:
    shape = (*x.shape[:-2], 3, *x.shape[-2:])
    return _inside(shape, (..., 1, slice(None), slice(None)), x)


def _inside_wide_rows(x: Tensor) -> Tensor:
    return _inside((*x.shape[:-1], x.shape[-1] + 5), (..., slice(2, 2 + x.shape[-1])), x)


def _shifted(x: Tensor) -> Tensor:
    storage = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


def _permuted(*order: int) -> Callable[[Tensor], Tensor]:
    """Store the dimensions in ``order``, and view them as they were."""
    inverse = [order.index(dim) for dim in range(len(order))]
    return lambda x: x.permute(order).contiguous().permute(inverse)


# Of (batch, seqlen, heads, headdim) tensors: same values at other places.
WRITABLE_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bshd": lambda x: x.contiguous(),
    "sbhd": _permuted(1, 0, 2, 3),
    "bhsd": _permuted(0, 2, 1, 3),
    "hbsd": _permuted(2, 0, 1, 3),
    "packed_slice": _packed_slice,
    "heads_slice": lambda x: _inside(
        (x.shape[0], x.shape[1], x.shape[2] * 3, x.shape[3]),
        (slice(None), slice(None), slice(x.shape[2], 2 * x.shape[2])),
        x,
    ),
    "wide_rows": _inside_wide_rows,
    "every_second_row": lambda x: _inside(
        (x.shape[0], 2 * x.shape[1], *x.shape[2:]), (slice(None), slice(None, None, 2)), x
    ),
    "storage_offset_1": _shifted,
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **WRITABLE_LAYOUTS,
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_rows": lambda x: x[:, :1].expand_as(x),
    "expanded_heads": lambda x: x[:, :, :1].expand_as(x),
    "expanded_columns": lambda x: x[..., :1].expand_as(x),
    "last_stride_2": lambda x: _inside((*x.shape, 2), (..., 0), x),
    "last_dim_outermost": _permuted(3, 0, 1, 2),
}
