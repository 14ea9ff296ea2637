"""RMSNorm after dropout and residual addition, under the names of the former CUDA extension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layer_norm import _dropout_add_norm, _parallel_residual
from .triton.layer_norm import RMSNorm as _RMSNorm
from .triton.layer_norm import rms_norm_fn


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """Apply RMSNorm to ``x`` (..., N) over its last dimension."""
    y: Tensor = rms_norm_fn(x, weight, None, eps=epsilon)
    return y


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Apply RMSNorm to ``dropout(x0 * rowscale * layerscale) + residual``.

    The arguments, results and errors are those of ``ops.layer_norm.dropout_add_layer_norm``.
    """
    return _dropout_add_norm(
        x0,
        residual,
        weight,
        bias,
        dropout_p,
        epsilon,
        rowscale,
        layerscale,
        prenorm,
        residual_in_fp32,
        return_dropout_mask,
        is_rms_norm=True,
    )


def dropout_add_rms_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Tensor | None, ...]:
    """Apply two RMSNorms to ``dropout(x0) + dropout(x1) + residual``.

    The arguments, results and errors are those of
    ``ops.layer_norm.dropout_add_layer_norm_parallel_residual``.
    """
    return _parallel_residual(
        x0,
        x1,
        residual,
        (weight0, bias0, weight1, bias1),
        dropout_p,
        epsilon,
        prenorm,
        residual_in_fp32,
        return_dropout_mask,
        is_rms_norm=True,
    )


class RMSNorm(_RMSNorm):
    """Divide by the root mean square and scale.

    Args:
        hidden_size: length of the last dimension.
        eps: added to the mean square.
        device: where the weight lives.
        dtype: dtype of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps=eps, device=device, dtype=dtype)


class DropoutAddRMSNorm(torch.nn.Module):
    """Dropout, residual addition and RMSNorm in one step.

    Args:
        hidden_size: length of the last dimension.
        prenorm: return (output, sum) instead of the output.
        p: dropout probability while training.
        eps: added to the mean square.
        residual_in_fp32: keep the returned sum in float32 when no residual comes in.
        device: where the weight lives.
        dtype: dtype of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the scaling the identity."""
        torch.nn.init.ones_(self.weight)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """Normalise ``dropout(x0) + residual``."""
        return dropout_add_rms_norm(
            x0,
            residual,
            self.weight,
            None,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
