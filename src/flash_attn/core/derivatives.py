"""First derivatives in reverse mode are all there is: who asks for others is told so.

PyTorch itself would not always notice. Its ``once_differentiable`` lets gradients pass as constants
where the incoming gradient is one (``grad(out.sum(), q, create_graph=True)``), and an operator
without a formula drops tangents. Both are zeros where a derivative was asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import UnsupportedProblemError


class _Final(torch.autograd.Function):
    """(count, gradients, other tensors) -> the first ``count``, which cannot be differentiated."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise UnsupportedProblemError(
            "flash_attn's functions have no second derivative: their gradients were asked for with "
            "create_graph=True and are differentiated again; detach them, or use PyTorch's own "
            "functions (for attention scaled_dot_product_attention under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
        )


def first_order(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """A ``backward`` of an autograd.Function that is computed without being recorded.

    Under create_graph=True its results depend on what was saved and on the incoming gradients, so
    that differentiating them again raises :class:`~flash_attn.errors.UnsupportedProblemError`.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *douts: Any) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *douts)
        # Before anything is computed, which may overwrite what was saved.
        origins = [x for x in (*ctx.saved_tensors, *douts) if x is not None and x.requires_grad]
        with torch.no_grad():
            grads = backward(ctx, *douts)
        given = [x for x in grads if x is not None]
        found = iter(_Final.apply(len(given), *given, *origins))
        return tuple(None if x is None else next(found) for x in grads)

    return run


def takes_tangents() -> bool:
    """Whether forward-mode differentiation is at work: tensors may carry tangents."""
    return forward_ad._current_level >= 0


def refuse_tangents(name: str, x: Tensor) -> None:
    """``x``, an argument called ``name``, carries no tangent.

    Raises:
        UnsupportedProblemError: it does.
    """
    if forward_ad.unpack_dual(x).tangent is not None:
        raise UnsupportedProblemError(
            f"flash attention has no forward-mode derivative: `{name}` carries a tangent "
            "(torch.func.jvp, jacfwd, linearize, forward_ad); use reverse mode (backward, "
            "torch.func.grad, vjp, jacrev)"
        )
