"""Feed-forward layers of a transformer, plain and gated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.activations import swiglu
from ..ops.fused_dense import ColumnParallelLinear, FusedMLP, ParallelFusedMLP, RowParallelLinear

__all__ = [
    "FusedMLP",
    "GatedMlp",
    "Mlp",
    "ParallelFusedMLP",
    "ParallelGatedMlp",
    "ParallelMLP",
]

Activation = Callable[[Tensor], Tensor]


def _gated_size(in_features: int, hidden_features: int | None, multiple_of: int) -> int:
    """Return the hidden size of a gated MLP: 8/3 of the input by default, rounded up."""
    hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
    return -(-hidden // multiple_of) * multiple_of


def _gate(y: Tensor, activation: Activation) -> Tensor:
    """Multiply the first half of the features by the activated second half."""
    if activation is F.sigmoid:
        return F.glu(y, dim=-1)
    values, gate = y.chunk(2, dim=-1)
    return swiglu(gate, values) if activation is F.silu else values * activation(gate)


class Mlp(nn.Module):
    """Linear, activation, linear.

    Args:
        in_features: size of the input.
        hidden_features: size in between, ``4 * in_features`` by default.
        out_features: size of the output, ``in_features`` by default.
        activation: function applied in between.
        bias1: whether the first layer has a bias.
        bias2: whether the second layer has a bias.
        return_residual: return (output, input).
        device: where the parameters live.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = in_features * 4 if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        """Apply the layers to ``x`` (..., in_features)."""
        y = self.fc2(self.activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class GatedMlp(nn.Module):
    """Linear, gate, linear: GLU, SwiGLU (``F.silu``) or another gate.

    ``fc1`` yields the values first and the gate second.

    Args:
        in_features: size of the input.
        hidden_features: size in between, 8/3 of ``in_features`` by default.
        out_features: size of the output, ``in_features`` by default.
        activation: function applied to the gate.
        bias1: whether the first layer has a bias.
        bias2: whether the second layer has a bias.
        multiple_of: unit to which the hidden size is rounded up.
        return_residual: return (output, input).
        device: where the parameters live.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _gated_size(in_features, hidden_features, multiple_of)
        out_features = in_features if out_features is None else out_features
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias1, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        """Apply the layers to ``x`` (..., in_features)."""
        y = self.fc2(_gate(self.fc1(x), self.activation))
        return (y, x) if self.return_residual else y


class ParallelMLP(nn.Module):
    """``Mlp`` with its hidden features split over the ranks of a group.

    Args:
        in_features: size of the input.
        hidden_features: size in between over all ranks, ``4 * in_features`` by default.
        out_features: size of the output, ``in_features`` by default.
        activation: function applied in between.
        process_group: the ranks.
        sequence_parallel: input and output are split along their first dimension.
        bias1: whether the first layer has a bias.
        bias2: whether the second layer has a bias.
        device: where the parameters live.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.gelu,
        process_group: Any = None,
        sequence_parallel: bool = True,
        bias1: bool = True,
        bias2: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = in_features * 4 if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        factory = {"device": device, "dtype": dtype}
        self.fc1 = ColumnParallelLinear(
            in_features, hidden, process_group, bias1, sequence_parallel, **factory
        )
        self.activation = activation
        self.fc2 = RowParallelLinear(
            hidden, out_features, process_group, bias2, sequence_parallel, **factory
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to ``x`` and sum over the ranks."""
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


class ParallelGatedMlp(nn.Module):
    """``GatedMlp`` with its hidden features split over the ranks of a group.

    Every rank's part of ``fc1`` holds its values first and its gate second.

    Args:
        in_features: size of the input.
        process_group: the ranks.
        hidden_features: size in between over all ranks, 8/3 of ``in_features`` by default.
        out_features: size of the output, ``in_features`` by default.
        activation: function applied to the gate.
        bias1: whether the first layer has a bias.
        bias2: whether the second layer has a bias.
        multiple_of: unit to which the hidden size is rounded up.
        sequence_parallel: input and output are split along their first dimension.
        device: where the parameters live.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        process_group: Any,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _gated_size(in_features, hidden_features, multiple_of)
        out_features = in_features if out_features is None else out_features
        factory = {"device": device, "dtype": dtype}
        # Units of two features keep every rank's values and gate the same size.
        self.fc1 = ColumnParallelLinear(
            in_features, 2 * hidden, process_group, bias1, sequence_parallel, 2, **factory
        )
        self.activation = activation
        self.fc2 = RowParallelLinear(
            hidden, out_features, process_group, bias2, sequence_parallel, **factory
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to ``x`` and sum over the ranks."""
        y: Tensor = self.fc2(_gate(self.fc1(x), self.activation))
        return y
