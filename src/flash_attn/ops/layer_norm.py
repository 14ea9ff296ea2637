"""LayerNorm after dropout and residual addition, under the names of the former CUDA extension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .triton.layer_norm import layer_norm_fn


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Apply LayerNorm to ``x`` (..., N) over its last dimension."""
    y: Tensor = layer_norm_fn(x, weight, bias, eps=epsilon)
    return y


def _as_bytes(mask: Tensor | None, x: Tensor) -> Tensor:
    """Return a dropout mask as uint8, all ones where nothing was dropped."""
    if mask is None:
        return torch.ones(x.shape, dtype=torch.uint8, device=x.device)
    return mask.to(torch.uint8)


def _dropout_add_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
    is_rms_norm: bool,
) -> Any:
    dtype = x0.dtype
    if layerscale is not None:
        # Scaling in the wider of both dtypes keeps the product unrounded up to the sum.
        x0 = x0 * layerscale
        if residual is None and not residual_in_fp32:
            x0 = x0.to(dtype)
    y, *rest = layer_norm_fn(
        x0,
        weight,
        bias,
        residual=residual,
        eps=epsilon,
        dropout_p=dropout_p,
        rowscale=rowscale,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        return_dropout_mask=True,
        out_dtype=dtype,
    )
    results = [y]
    if prenorm:
        results.append(rest[0])
    if return_dropout_mask:
        results.append(_as_bytes(rest[-2], x0))
    return results[0] if len(results) == 1 else tuple(results)


def dropout_add_layer_norm(
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
    """Apply LayerNorm to ``dropout(x0 * rowscale * layerscale) + residual``.

    Args:
        x0: (..., N).
        residual: (..., N), or None.
        weight: (N,).
        bias: (N,), or None.
        dropout_p: probability of dropping an entry.
        epsilon: added to the variance.
        rowscale: (...), factors of the rows; no gradient flows to it.
        layerscale: (N,), factors of the columns.
        prenorm: return the sum that was normalised, too.
        residual_in_fp32: return that sum in float32; used only if ``residual`` is None.
        return_dropout_mask: return the uint8 mask, 1 where an entry was kept.

    Returns:
        The output, or a tuple of the output, the sum and the mask, each if asked for.

    Raises:
        ConstraintError: an argument has a wrong shape, device or value.
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
        is_rms_norm=False,
    )


def _parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    dropout_p: float,
    epsilon: float,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
    is_rms_norm: bool,
) -> tuple[Tensor | None, ...]:
    weight0, bias0, weight1, bias1 = weights
    y0, *rest = layer_norm_fn(
        x0,
        weight0,
        bias0,
        residual=residual,
        x1=x1,
        weight1=weight1,
        bias1=bias1 if weight1 is not None else None,
        eps=epsilon,
        dropout_p=dropout_p,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        return_dropout_mask=True,
    )
    results = [y0, rest.pop(0) if weight1 is not None else None]
    if prenorm:
        results.append(rest.pop(0))
    if return_dropout_mask:
        results.append(_as_bytes(rest[0], x0))
        results.append(_as_bytes(rest[1], x0) if x1 is not None else None)
    return tuple(results)


def dropout_add_layer_norm_parallel_residual(
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
    """Apply two LayerNorms to ``dropout(x0) + dropout(x1) + residual``.

    Args:
        x0: (..., N), one branch.
        x1: (..., N), the other branch, or None.
        residual: (..., N), or None.
        weight0: (N,), scaling of the first output.
        bias0: (N,), or None.
        weight1: (N,), scaling of the second output, or None for no second output.
        bias1: (N,), or None.
        dropout_p: probability of dropping an entry.
        epsilon: added to the variance.
        prenorm: return the sum that was normalised, too.
        residual_in_fp32: return that sum in float32; used only if ``residual`` is None.
        return_dropout_mask: return the uint8 masks of both branches, 1 where an entry was kept.

    Returns:
        The first output, the second output or None, then the sum and the two masks if asked for.

    Raises:
        ConstraintError: an argument has a wrong shape, device or value.
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
        is_rms_norm=False,
    )


class DropoutAddLayerNorm(torch.nn.Module):
    """Dropout, residual addition and LayerNorm in one step.

    Args:
        hidden_size: length of the last dimension.
        prenorm: return (output, sum) instead of the output.
        p: dropout probability while training.
        eps: added to the variance.
        residual_in_fp32: keep the returned sum in float32 when no residual comes in.
        device: where the parameters live.
        dtype: dtype of the parameters.
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
        self.bias = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make scaling and shift the identity."""
        torch.nn.init.ones_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """Normalise ``dropout(x0) + residual``."""
        return dropout_add_layer_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
