"""What the semantic tests share: inputs, ways to run them, the error budget, layouts, poison.

The budget holds a result against float64 arithmetic on the same rounded inputs
(:mod:`flash_attn.core.reference`): its error, in the Frobenius and in the maximum norm, may be at
most twice that of plain PyTorch in the inputs' dtype for the output and three times for gradients,
plus the rounding of the exact answer itself. The log-sum-exp is float32 everywhere.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flash_attn
from flash_attn import flash_attn_interface as interface
from flash_attn.core import ops, reference, registry, rng
from flash_attn.core.masking import visible_matrix
from flash_attn.core.problem import AttentionProblem
from flash_attn.core.sequences import Sequence, sequences

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


@dataclass(frozen=True)
class Extended(Inputs):
    """Inputs of a problem with more fields of its layout, its visibility or its scores, or with a
    head dim of v of its own."""

    more: dict[str, Any] = field(default_factory=dict)

    _names = (*Inputs._names, "more")

    def problem(self) -> AttentionProblem:
        problem, more = Inputs.problem(self.but(v=self.k))._replace(v=self.v), dict(self.more)
        for part in ("layout", "visibility", "transform"):
            group = getattr(problem, part)
            mine = {name: more.pop(name) for name in list(more) if name in group._fields}
            problem = problem._replace(**{part: group._replace(**mine)})
        assert not more, f"no part of a problem has {list(more)}"
        return problem


def extended(inputs: Inputs, **more: Any) -> Extended:
    """``inputs`` with further fields of the problem's parts."""
    return Extended(*inputs.tensors, inputs.options, inputs.lengths, more)


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


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whoever waits for the GPU inside raises; of this thread alone and whatever happens."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


# The tensors of a problem that have gradients, by the gradients' names.
_LEAVES = {"dq": "q", "dk": "k", "dv": "v", "dmask": "attn_mask", "dsinks": "sinks"}


def with_leaves(
    problem: AttentionProblem, dtype: torch.dtype | None = None
) -> tuple[AttentionProblem, dict[str, Tensor]]:
    """A copy on leaf tensors, in ``dtype`` or their own, and those leaves by gradient name."""
    found = {name: getattr(problem, key) for name, key in list(_LEAVES.items())[:3]}
    found |= {name: getattr(problem.transform, _LEAVES[name]) for name in ("dmask", "dsinks")}
    leaves = {
        name: x.detach().clone().to(dtype or x.dtype).requires_grad_()
        for name, x in found.items()
        if x is not None and x.dtype != torch.bool
    }
    changes = {_LEAVES[name]: leaf for name, leaf in leaves.items()}
    transform = {key: changes.pop(key) for key in ("attn_mask", "sinks") if key in changes}
    return problem._replace(**changes, transform=problem.transform._replace(**transform)), leaves


def exact_answer(
    problem: AttentionProblem,
    dout: Tensor,
    rng_state: Tensor | None = None,
    returned: Tensor | None = None,
    dlse: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Out, lse and all gradients in float64, and what a gradient owes to the output's error.

    Backward starts from rowsum(out * dout) of the output as it was ``returned``, whose own error is
    bounded by itself. An error e of that sum changes the score gradients by -e times the softmax,
    which is the gradient of the log-sum-exp.
    """
    copy, leaves = with_leaves(problem, torch.float64)
    result = reference.attention(copy, torch.float64, rng_state)
    true, lse = result.out.detach(), result.softmax_lse
    answer = {"out": true, "lse": lse.detach()}
    if not result.out.requires_grad:
        return answer | {name: torch.zeros_like(x) for name, x in leaves.items()}, {}
    finite = torch.isfinite(lse)
    grads = _gradients(result.out, leaves, dout.double())
    returned = true.to(problem.q.dtype) if returned is None else returned
    shift = ((returned.double() - true) * dout.double()).sum(-1).transpose(-1, -2)
    through_lse = {}
    for name, dx in (("shift", shift), ("dlse", dlse)):
        if dx is not None and lse.requires_grad:
            through_lse[name] = _gradients(lse, leaves, dx.double().masked_fill(~finite, 0.0))
    for name, grad in through_lse.get("dlse", {}).items():
        grads[name] = grads[name] + grad
    return answer | grads, through_lse.get("shift", {})


def exact(
    problem: AttentionProblem,
    dout: Tensor,
    rng_state: Tensor | None = None,
    returned: Tensor | None = None,
) -> tuple[Solution, dict[str, Tensor]]:
    """:func:`exact_answer` of a problem whose gradients are dq, dk and dv alone."""
    answer, owed = exact_answer(problem, dout, rng_state, returned)
    return Solution(**answer), owed


def _gradients(x: Tensor, leaves: dict[str, Tensor], dx: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(x, leaves.values(), dx, retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def _repeated(problem: AttentionProblem, x: Tensor, name: str, index: int) -> Tensor:
    """(rows, heads, dim) as (nheads, rows, dim) of numbers to multiply; float8 in float32."""
    factors = getattr(problem.transform, f"{name}_descale")
    if x.dtype == torch.float8_e4m3fn:
        x = x.float()
    if factors is not None:
        x = x * factors[index].repeat_interleave(x.shape[1] // factors.shape[1])[:, None]
    return x.repeat_interleave(problem.nheads // x.shape[1], dim=1).transpose(0, 1)


def _plain_scores(problem: AttentionProblem, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in float32, where they are seen, and values (nheads, seqlen_k, headdim_v)."""
    transform, index = problem.transform, sequence.number
    q = _repeated(problem, problem.q[sequence.q_rows], "q", index) * transform.softmax_scale
    k = _repeated(problem, problem.k[sequence.k_rows], "k", index)
    v = _repeated(problem, problem.v[sequence.k_rows], "v", index)
    s = (q @ k.mT).float()
    if problem.qv is not None:
        qv = problem.qv[sequence.q_rows]
        qv = (qv.float() if qv.dtype == torch.float8_e4m3fn else qv).transpose(0, 1)
        s = s + ((qv * transform.softmax_scale) @ v.mT).float()
    seqlen_q, seqlen_k = s.shape[-2:]
    if transform.softcap > 0.0:
        s = transform.softcap * torch.tanh(s / transform.softcap)
    if transform.alibi_slopes is not None:
        slopes = transform.alibi_slopes
        slopes = slopes if slopes.dim() == 1 else slopes[index]
        row = torch.arange(seqlen_q, device=s.device)[:, None] + (seqlen_k - seqlen_q)
        distance = (row - torch.arange(seqlen_k, device=s.device)).abs()
        s = s - slopes[:, None, None] * distance
    seen = visible_matrix(seqlen_q, seqlen_k, problem.visibility, s.device)
    if transform.attn_mask is not None:
        mask = reference.mask_block(transform.attn_mask, index, seqlen_q, seqlen_k)
        seen = seen & (mask != float("-inf"))
        s = s + mask.float()
    return s, seen.expand(s.shape), v


def _plain_forward(problem: AttentionProblem, rng_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention as one writes it in PyTorch: products in the dtype, softmax in float32; float8
    weights, scaled to their whole range, for float8 values. Also the log-sum-exp."""
    transform, is_float8 = problem.transform, problem.q.dtype == torch.float8_e4m3fn
    out = torch.zeros(problem.out_shape, dtype=problem.result_dtype, device=problem.q.device)
    lse = torch.zeros(problem.lse_shape, device=problem.q.device)
    for sequence in sequences(problem):
        s, seen, v = _plain_scores(problem, sequence)
        dead = ~seen.any(-1, keepdim=True)
        # A finite stand-in keeps rows without keys free of NaN; they are blanked afterwards.
        s = s.masked_fill(~seen, -1e30)
        if transform.sinks is not None:
            sinks = transform.sinks.float()[:, None, None].expand(*s.shape[:-1], 1)
            s = torch.cat([s, sinks], dim=-1)
        elif not s.shape[-1]:
            continue
        p = torch.softmax(s, dim=-1)[..., : v.shape[-2]].masked_fill(dead, 0.0)
        lse[sequence.lse_index(problem.is_varlen_q)] = torch.logsumexp(s, dim=-1)
        if problem.dropout_p > 0.0 and rng_state is not None:
            rows = torch.arange(s.shape[-2], device=s.device)
            keys = torch.arange(v.shape[-2], device=s.device)
            keep = rng.keep_mask(
                rng_state, problem.dropout_p, sequence.number, problem.nheads, rows, keys
            )
            p = p.masked_fill(~keep, 0.0) / (1.0 - problem.dropout_p)
        if is_float8:
            largest = p.amax(-1, keepdim=True).clamp_min(1e-30) if v.shape[-2] else 1.0
            p = (256.0 * p / largest).to(problem.q.dtype).float() * (largest / 256.0)
        out[sequence.q_rows] = (p.to(v.dtype) @ v).transpose(0, 1).to(out.dtype)
    return out, lse


def plain_answer(
    problem: AttentionProblem,
    dout: Tensor,
    rng_state: Tensor | None = None,
    dlse: Tensor | None = None,
) -> dict[str, Tensor]:
    """Out and all gradients by plain PyTorch in the inputs' dtype."""
    copy, leaves = with_leaves(problem)
    out, lse = _plain_forward(copy, rng_state)
    answer = {"out": out.detach()}
    if not out.requires_grad or problem.q.dtype == torch.float8_e4m3fn:
        return answer | {name: torch.zeros_like(x) for name, x in leaves.items()}
    outputs, douts = [out], [dout]
    if dlse is not None:
        outputs, douts = [out, lse], [dout, dlse]
    grads = torch.autograd.grad(outputs, leaves.values(), douts, allow_unused=True)
    return answer | {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def plain(problem: AttentionProblem, dout: Tensor, rng_state: Tensor | None = None) -> Solution:
    """:func:`plain_answer` of a problem whose gradients are dq, dk and dv alone (no lse)."""
    answer = plain_answer(problem, dout, rng_state)
    return Solution(lse=answer["out"], **answer)


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
    peak: float = 0.0,
) -> None:
    """``got`` errs at most ``factor`` times as much as ``same``, plus the rounding of ``true``,
    plus ``owed``; a single element by ``peak`` more."""
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
        ("maximum", lambda x: x.abs().max(), 4.0 * floor + peak),
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


def float8_score_error(problem: AttentionProblem, cuts: int = 1) -> float:
    """What tensor cores may lose of a score when they multiply float8 themselves.

    They cut each product to about 14 bits of the largest number that it is added to, products or
    the sum so far (DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.3.2). |q| |k|
    bounds all of these. One such cut is allowed; ``cuts`` is for inputs where they add up.
    """
    q, transform = problem.q, problem.transform
    if q.dtype != torch.float8_e4m3fn or not q.is_cuda:
        return 0.0
    if torch.cuda.get_device_capability(q.device) < (8, 9):
        return 0.0
    size = abs(transform.softmax_scale) * cuts
    for x, descale in ((q, transform.q_descale), (problem.k, transform.k_descale)):
        finite = x.float().nan_to_num(0.0, 0.0, 0.0)
        size *= float(finite.norm(dim=-1).max())
        size *= 1.0 if descale is None else float(descale.abs().max())
    return 2.0**-14 * size


def check_lse(got: Tensor, true: Tensor, slack: float = 0.0) -> None:
    """The log-sum-exp is float32, infinite exactly where it should be, and exact to 1e-5, or to
    ``slack`` more."""
    assert got.dtype == torch.float32
    assert got.shape == true.shape
    infinite = torch.isinf(true)
    assert torch.equal(got[infinite].double(), true[infinite])
    error = (got.double() - true)[~infinite].abs()
    bound = 1e-5 * true[~infinite].abs().clamp_min(1.0) + slack
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


def families_of(inputs: Inputs) -> tuple[str, str]:
    """The names of the backends that compute the forward and the backward pass of a call."""
    problem = inputs.problem()
    return registry.select(problem).name, registry.select(problem, backward=True).name


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


def thinned(
    *choices: Iterable[Any], keep_each: int, always: Callable[[Any], bool] = lambda first: False
) -> list[tuple[Any, ...]]:
    """Of all combinations one in ``keep_each``, so that every two choices still meet in some; all
    of those whose first choice is to be kept ``always``, and with FLASH_ATTN_TEST_ALL=1 all."""
    if os.environ.get("FLASH_ATTN_TEST_ALL") == "1":
        keep_each = 1
    numbered = itertools.product(*(enumerate(x) for x in choices))
    return [
        tuple(x for _, x in combination)
        for combination in numbered
        if sum(i for i, _ in combination) % keep_each == 0 or always(combination[0][1])
    ]
