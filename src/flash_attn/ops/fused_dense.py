"""Linear layers and two-layer MLPs, for one process or with the weights split over ranks.

The matrix products are PyTorch's.  With a process group, the first layer's weight holds some of
the output features and the second layer's some of the input features.  With sequence parallelism
the activations between such layers are split along their first dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConstraintError
from .activations import gelu_fwd, sqrelu_fwd

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_approx": gelu_fwd,
    "relu": F.relu,
    "sqrelu": sqrelu_fwd,
}


def _gather(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous()
    out = x.new_empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x, group=group)
    return out


def _scatter_sum(x: Tensor, group: Any) -> Tensor:
    world_size = dist.get_world_size(group)
    if x.shape[0] % world_size:
        raise ConstraintError(
            f"`x` must have a first dimension divisible by {world_size} ranks, found {x.shape[0]}"
        )
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // world_size, *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x, group=group)
    return out


def _all_sum(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


class _Enter(torch.autograd.Function):
    """Bring the input to every rank; the ranks' input gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, sequence_parallel: bool) -> Tensor:
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        return _gather(x, group) if sequence_parallel else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return (_scatter_sum if ctx.sequence_parallel else _all_sum)(g, ctx.group), None, None


class _Leave(torch.autograd.Function):
    """Add up the ranks' outputs; every rank needs the whole output gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, sequence_parallel: bool) -> Tensor:
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        return (_scatter_sum if sequence_parallel else _all_sum)(x, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return (_gather(g, ctx.group) if ctx.sequence_parallel else g), None, None


def _enter(x: Tensor, group: Any, sequence_parallel: bool) -> Tensor:
    if group is None:
        return x
    out: Tensor = _Enter.apply(x, group, sequence_parallel)
    return out


def _leave(x: Tensor, group: Any, sequence_parallel: bool) -> Tensor:
    if group is None:
        return x
    out: Tensor = _Leave.apply(x, group, sequence_parallel)
    return out


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """Apply a linear layer.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,), or None.
        return_residual: return ``x`` as well.
        process_group: ranks that hold different output features.
        sequence_parallel: with a group, ``x`` is split along its first dimension.

    Returns:
        (..., out_features), or that and ``x``.
    """
    out = F.linear(_enter(x, process_group, sequence_parallel), weight, bias)
    return (out, x) if return_residual else out


class FusedDense(nn.Linear):
    """A linear layer that can return its input, too.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias: whether to add a bias.
        return_residual: return (output, input).
        device: where the parameters live.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        """Apply the layer to ``x`` (..., in_features)."""
        return fused_dense_func(
            x, self.weight, self.bias, self.return_residual, process_group=process_group
        )


def _local_features(name: str, features: int, multiple_of: int, group: Any) -> int:
    """Return this rank's share of the features; the first ranks get what does not divide."""
    if features % multiple_of:
        raise ConstraintError(f"`{name}` must be a multiple of {multiple_of}, found {features}")
    share, extra = divmod(features // multiple_of, dist.get_world_size(group))
    return (share + int(dist.get_rank(group) < extra)) * multiple_of


class ColumnParallelLinear(nn.Linear):
    """A linear layer whose output features are split over the ranks of a group.

    Args:
        in_features: size of the input.
        out_features: size of the output over all ranks.
        process_group: the ranks.
        bias: whether to add a bias.
        sequence_parallel: the input is split along its first dimension.
        multiple_of: unit in which output features are dealt out.
        device: where the parameters live.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: Any,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        local = _local_features("out_features", out_features, multiple_of, process_group)
        super().__init__(in_features, local, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's output features."""
        return F.linear(
            _enter(x, self.process_group, self.sequence_parallel), self.weight, self.bias
        )


class RowParallelLinear(nn.Linear):
    """A linear layer whose input features are split over the ranks of a group.

    Only the first rank has a bias, so that the sum over the ranks holds it once.

    Args:
        in_features: size of the input over all ranks.
        out_features: size of the output.
        process_group: the ranks.
        bias: whether to add a bias.
        sequence_parallel: split the output along its first dimension.
        multiple_of: unit in which input features are dealt out.
        device: where the parameters live.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: Any,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        local = _local_features("in_features", in_features, multiple_of, process_group)
        own_bias = bias and dist.get_rank(process_group) == 0
        super().__init__(local, out_features, bias=own_bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' products, or this rank's part of it."""
        out = F.linear(x, self.weight, self.bias)
        return _leave(out, self.process_group, self.sequence_parallel)


def _check_mlp(activation: str, checkpoint_lvl: int) -> None:
    if activation not in _ACTIVATIONS:
        raise ConstraintError(
            f"`activation` must be one of {', '.join(_ACTIVATIONS)}, found {activation!r}"
        )
    if checkpoint_lvl not in (0, 1, 2):
        raise ConstraintError(f"`checkpoint_lvl` must be 0, 1 or 2, found {checkpoint_lvl}")


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int | str = 0,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """Apply a linear layer, an activation and another linear layer.

    Args:
        x: (..., in_features).
        weight1: (hidden_features, in_features).
        weight2: (out_features, hidden_features).
        bias1: (hidden_features,), or None.
        bias2: (out_features,), or None.
        activation: "gelu_approx", "relu" or "sqrelu".
        save_pre_act: False recomputes everything in the backward pass, as checkpoint_lvl 2 does.
        return_residual: return ``x`` as well.
        checkpoint_lvl: 1 recomputes the activation in the backward pass, 2 the first layer too.
        heuristic: accepted for compatibility; the matrix products choose for themselves.
        process_group: ranks that hold different hidden features; the outputs are not summed.
        sequence_parallel: with a group, ``x`` is split along its first dimension.

    Returns:
        (..., out_features), or that and ``x``.

    Raises:
        ConstraintError: ``activation`` or ``checkpoint_lvl`` is none of the allowed values.
    """
    _check_mlp(activation, checkpoint_lvl)
    act = _ACTIVATIONS[activation]
    total_x = _enter(x, process_group, sequence_parallel)
    learns = torch.is_grad_enabled()
    level = checkpoint_lvl if save_pre_act else 2

    def hidden(total_x: Tensor) -> Tensor:
        return act(F.linear(total_x, weight1, bias1))

    def second(pre_act: Tensor) -> Tensor:
        return F.linear(act(pre_act), weight2, bias2)

    if not learns or level == 0:
        out = F.linear(hidden(total_x), weight2, bias2)
    elif level == 1:
        pre_act = F.linear(total_x, weight1, bias1)
        out = checkpoint(second, pre_act, use_reentrant=False, preserve_rng_state=False)
    else:
        out = checkpoint(
            lambda t: F.linear(hidden(t), weight2, bias2),
            total_x,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return (out, x) if return_residual else out


class FusedMLP(nn.Module):
    """A two-layer MLP.

    Args:
        in_features: size of the input.
        hidden_features: size in between, ``4 * in_features`` by default.
        out_features: size of the output, ``in_features`` by default.
        bias1: whether the first layer has a bias.
        bias2: whether the second layer has a bias.
        activation: "gelu_approx", "relu" or "sqrelu".
        return_residual: return (output, input).
        checkpoint_lvl: 1 recomputes the activation in the backward pass, 2 the first layer too.
        heuristic: accepted for compatibility; the matrix products choose for themselves.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ConstraintError: ``activation`` or ``checkpoint_lvl`` is none of the allowed values.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_mlp(activation, checkpoint_lvl)
        super().__init__()
        hidden = hidden_features or in_features * 4
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(
            hidden, out_features or in_features, bias=bias2, device=device, dtype=dtype
        )

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        """Apply the MLP to ``x``; with a group, sum over the ranks and split the result."""
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            checkpoint_lvl=self.checkpoint_lvl,
            process_group=process_group,
        )
        out = _leave(out, process_group, True)
        return (out, x) if self.return_residual else out


class ParallelFusedMLP(nn.Module):
    """A two-layer MLP whose hidden features are split over the ranks of a group.

    Args:
        in_features: size of the input.
        hidden_features: size in between over all ranks, ``4 * in_features`` by default.
        out_features: size of the output, ``in_features`` by default.
        activation: "gelu_approx", "relu" or "sqrelu".
        process_group: the ranks.
        bias1: whether the first layer has a bias.
        bias2: whether the second layer has a bias.
        sequence_parallel: input and output are split along their first dimension.
        checkpoint_lvl: 1 recomputes the activation in the backward pass, 2 the first layer too.
        heuristic: accepted for compatibility; the matrix products choose for themselves.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ConstraintError: an argument is none of the allowed values.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str = "gelu_approx",
        process_group: Any = None,
        bias1: bool = True,
        bias2: bool = True,
        sequence_parallel: bool = True,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_mlp(activation, checkpoint_lvl)
        if process_group is None:
            raise ConstraintError("`process_group` must be a process group, found None")
        super().__init__()
        hidden = hidden_features or in_features * 4
        out_features = out_features or in_features
        factory = {"device": device, "dtype": dtype}
        self.activation = activation
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = ColumnParallelLinear(in_features, hidden, process_group, bias1, **factory)
        self.fc2 = RowParallelLinear(hidden, out_features, process_group, bias2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to ``x`` and sum over the ranks."""
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            checkpoint_lvl=self.checkpoint_lvl,
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
        )
        return _leave(out, self.process_group, self.sequence_parallel)
