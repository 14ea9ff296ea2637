"""Activation functions and their derivatives, computed in float32 and returned in x's dtype.

"gelu" is the tanh approximation throughout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.derivatives import first_order


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gelu_fwd(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU."""
    return F.gelu(x, approximate="tanh")


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of ``gelu_fwd`` at ``x`` for the output gradient ``g``."""
    grad: Tensor = torch.ops.aten.gelu_backward(_wide(g), _wide(x), approximate="tanh")
    return grad.to(x.dtype)


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """Return ``gelu_fwd(y + bias)`` in the dtype of ``y``."""
    return gelu_fwd(y + bias).to(y.dtype)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``bias_gelu`` for ``y`` (..., N) and ``bias`` (N,)."""
    grad = torch.ops.aten.gelu_backward(_wide(g), _wide(y + bias), approximate="tanh")
    return grad.to(y.dtype), grad.flatten(0, -2).sum(0).to(bias.dtype)


def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    """Return the tanh approximation of GELU of ``input + bias``, with gradients for both."""
    return bias_gelu(input, bias)


def fast_gelu_impl(input: Tensor) -> Tensor:
    """Return the tanh approximation of GELU."""
    return gelu_fwd(input)


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of ReLU at ``x`` (1 at zero) for the output gradient ``g``."""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """Return the square of ReLU."""
    return F.relu(x).square()


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of ``sqrelu_fwd`` at ``x`` for the output gradient ``g``."""
    return (2.0 * _wide(g) * F.relu(_wide(x))).to(x.dtype)


def swiglu_fwd(x: Tensor, y: Tensor) -> Tensor:
    """Return ``silu(x) * y`` in the dtype of ``x``, rounded once."""
    out = F.silu(_wide(x)) * y
    # Not a conversion to what it is: PyTorch 2.11 compiles a wrong gradient around one.
    return out if out.dtype == x.dtype else out.to(x.dtype)


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``swiglu_fwd`` for ``x`` and ``y``."""
    wide_x, wide_g = _wide(x), _wide(g)
    sigmoid = torch.sigmoid(wide_x)
    dx = sigmoid * (1.0 + wide_x * (1.0 - sigmoid)) * wide_g * y
    dy = wide_x * sigmoid * wide_g
    return dx.to(x.dtype), dy.to(y.dtype)


class _SwiGLU(torch.autograd.Function):
    """Keep the narrow inputs instead of the wide intermediates that autograd would keep."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return swiglu_fwd(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        dx, dy = swiglu_bwd(x, y, g)
        return dx.sum_to_size(x.shape), dy.sum_to_size(y.shape)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """Return ``silu(x) * y``, differentiable in both.

    Args:
        x: the gate, any shape.
        y: the values, broadcastable with ``x``.

    Returns:
        A tensor in the dtype of ``x``.
    """
    out: Tensor = _SwiGLU.apply(x, y)
    return out
