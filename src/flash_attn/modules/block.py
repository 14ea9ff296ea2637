"""Transformer blocks: a mixer (attention) and an MLP with norms, dropout and residuals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConstraintError
from ..ops.triton.layer_norm import RMSNorm, layer_norm_fn
from .mlp import Mlp


class StochasticDepth(nn.Module):
    """Drop whole samples (entries of the first dimension) while training.

    Args:
        p: probability of dropping a sample; the others are scaled by 1 / (1 - p).
    """

    def __init__(self, p: float) -> None:
        if not 0.0 <= p <= 1.0:
            raise ConstraintError(f"`p` must be between 0 and 1, found {p}")
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with some of its samples replaced by zeros."""
        if not self.training or self.p == 0.0:
            return x
        keep = 1.0 - self.p
        factors = torch.bernoulli(x.new_full((x.shape[0],) + (1,) * (x.dim() - 1), keep))
        return x * (factors / keep if keep > 0.0 else factors)


def _default_mixer(dim: int) -> nn.Module:
    from .mha import MHA

    mixer: nn.Module = MHA(dim, num_heads=dim // 64)
    return mixer


def _check_fusable(norm: nn.Module, dropout: nn.Module) -> None:
    if not isinstance(norm, (nn.LayerNorm, RMSNorm)):
        raise ConstraintError(
            f"`norm_cls` must make a LayerNorm or RMSNorm to be fused, found {type(norm).__name__}"
        )
    if not isinstance(dropout, nn.Dropout):
        raise ConstraintError(
            f"`dropout_cls` must make an nn.Dropout to be fused, found {type(dropout).__name__}"
        )


def _mark(norms: list[nn.Module], sequence_parallel: bool, shared_params: bool) -> None:
    """Tell distributed trainers which parameters have gradients to sum or values to share."""
    for norm in norms:
        for parameter in norm.parameters():
            if sequence_parallel:
                parameter._sequence_parallel = True  # type: ignore[attr-defined]
            if shared_params:
                parameter._shared_params = True  # type: ignore[attr-defined]


def _fused_norm(x: Tensor, norm: Any, dropout: Any, **options: Any) -> Any:
    """Run dropout, residual addition and norm in one kernel."""
    return layer_norm_fn(
        x,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        dropout_p=dropout.p if dropout.training else 0.0,
        is_rms_norm=isinstance(norm, RMSNorm),
        zero_centered_weight=getattr(norm, "zero_centered_weight", False),
        **options,
    )


class Block(nn.Module):
    """One transformer layer.

    With ``prenorm`` the order is dropout, add, norm, mixer, dropout, add, norm, MLP: the layer
    takes and returns (hidden_states, residual), where the residual still lacks the hidden states.
    Without, it is mixer, dropout, add, norm, MLP, dropout, add, norm.

    Args:
        dim: model width.
        mixer_cls: called with ``dim``; makes the mixer, ``MHA`` with heads of 64 by default.
        mlp_cls: called with ``dim``; makes the MLP, ``Mlp`` by default; ``nn.Identity`` means none.
        norm_cls: called with ``dim``; makes a norm.
        dropout_cls: called with a probability; makes a dropout module.
        prenorm: norm before the mixer and the MLP instead of after.
        resid_dropout1: dropout before the first norm.
        resid_dropout2: dropout before the second norm.
        drop_path1: probability of dropping a sample before the first norm.
        drop_path2: probability of dropping a sample before the second norm.
        fused_dropout_add_ln: run dropout, add and norm as one kernel.
        return_residual: mixer and MLP return (output, input), to be used as residual (postnorm).
        residual_in_fp32: keep the residual in float32 (prenorm).
        sequence_parallel: mark the norm parameters as having gradients to be summed over ranks.
        mark_shared_params: mark the norm parameters as equal on all ranks.

    Raises:
        ConstraintError: the norm or dropout cannot be fused, or the options exclude each other.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module] | None = None,
        mlp_cls: Callable[[int], nn.Module] | None = None,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout_cls: Callable[[float], nn.Module] = nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        if residual_in_fp32 and not prenorm:
            raise ConstraintError("`residual_in_fp32` must be False if `prenorm` is False")
        super().__init__()
        self.prenorm = prenorm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.return_residual = return_residual
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = (mixer_cls or _default_mixer)(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.drop_path1 = StochasticDepth(drop_path1)
        self.norm1 = norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        norms = [self.norm1]
        self._has_mlp = not isinstance(self.mlp, nn.Identity)
        if self._has_mlp:
            self.dropout2 = dropout_cls(resid_dropout2)
            self.drop_path2 = StochasticDepth(drop_path2)
            self.norm2 = norm_cls(dim)
            norms.append(self.norm2)
        if fused_dropout_add_ln:
            for norm in norms:
                _check_fusable(norm, self.dropout1)
        _mark(norms, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """Return what the mixer allocates for decoding."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]

    def _drop_add_norm(
        self, which: int, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (norm(sum), sum) for sum = drop_path(dropout(x)) + residual."""
        norm, dropout, drop_path = (
            (self.norm1, self.dropout1, self.drop_path1)
            if which == 1
            else (self.norm2, self.dropout2, self.drop_path2)
        )
        if self.fused_dropout_add_ln:
            rowscale = None
            if drop_path.training and drop_path.p > 0.0:
                rowscale = drop_path(x.new_ones(x.shape[:-1]))
            fused = _fused_norm(
                x,
                norm,
                dropout,
                residual=residual,
                rowscale=rowscale,
                prenorm=self.prenorm,
                residual_in_fp32=self.residual_in_fp32,
            )
            # A postnorm layer has no use for the sum.
            return fused if self.prenorm else (fused, fused)
        total = drop_path(dropout(x))
        if residual is not None:
            total = total + residual
        y = norm(total.to(norm.weight.dtype))
        return y, total.float() if self.residual_in_fp32 else total

    def _forward_prenorm(
        self, x: Tensor, residual: Tensor | None, mixer_subset: Any, mixer_kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        x, residual = self._drop_add_norm(1, x, residual)
        if mixer_subset is not None:
            mixer_kwargs = {**mixer_kwargs, "mixer_subset": mixer_subset}
        x = self.mixer(x, **mixer_kwargs)
        if mixer_subset is not None:
            residual = residual[:, mixer_subset]
        if self._has_mlp:
            x, residual = self._drop_add_norm(2, x, residual)
            x = self.mlp(x)
        return x, residual

    def _forward_postnorm(self, x: Tensor, mixer_kwargs: dict[str, Any]) -> Tensor:
        out = self.mixer(x, **mixer_kwargs)
        if self.return_residual:
            out, x = out
        x, _ = self._drop_add_norm(1, out, x)
        if self._has_mlp:
            out = self.mlp(x)
            if self.return_residual:
                out, x = out
            x, _ = self._drop_add_norm(2, out, x)
        return x

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        mixer_subset: Any = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Apply the layer.

        Args:
            hidden_states: (batch, seqlen, dim) or (total, dim), as the mixer takes it.
            residual: what to add to the hidden states first; None in the first layer and in
                postnorm layers.
            mixer_subset: index along the sequence of the queries to compute (prenorm), also
                passed to the mixer.
            mixer_kwargs: further arguments of the mixer.

        Returns:
            (hidden_states, residual) with ``prenorm``, else the hidden states.

        Raises:
            ConstraintError: a postnorm layer was given a residual.
        """
        if self.prenorm:
            return self._forward_prenorm(hidden_states, residual, mixer_subset, mixer_kwargs or {})
        if residual is not None:
            raise ConstraintError("`residual` must be None if the block is not prenorm")
        return self._forward_postnorm(hidden_states, mixer_kwargs or {})


class ParallelBlock(nn.Module):
    """One transformer layer whose mixer and MLP run side by side on the same residual.

    The order is dropout, add, norm, then mixer and MLP; the layer takes and returns
    (hidden_states1, hidden_states2, residual), where the residual still lacks both hidden states.

    Args:
        dim: model width.
        mixer_cls: called with ``dim``; makes the mixer, ``MHA`` with heads of 64 by default.
        mlp_cls: called with ``dim``; makes the MLP, ``Mlp`` by default.
        norm_cls: called with ``dim``; makes a norm.
        dropout_cls: called with a probability; makes a dropout module.
        resid_dropout1: dropout of the mixer's output.
        resid_dropout2: dropout of the MLP's output.
        tied_norm: feed mixer and MLP from one norm.
        fused_dropout_add_ln: run dropout, add and norms as one kernel, with one dropout
            probability for both branches.
        residual_in_fp32: keep the residual in float32.
        sequence_parallel: mark the norm parameters as having gradients to be summed over ranks.
        mark_shared_params: mark the norm parameters as equal on all ranks.

    Raises:
        ConstraintError: the norm or dropout cannot be fused.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module] | None = None,
        mlp_cls: Callable[[int], nn.Module] | None = None,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout_cls: Callable[[float], nn.Module] = nn.Dropout,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        tied_norm: bool = False,
        fused_dropout_add_ln: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        self.tied_norm = tied_norm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = (mixer_cls or _default_mixer)(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.norm1 = norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        self.dropout2 = dropout_cls(resid_dropout2)
        norms = [self.norm1]
        if not tied_norm:
            self.norm2 = norm_cls(dim)
            norms.append(self.norm2)
        if fused_dropout_add_ln:
            for norm in norms:
                _check_fusable(norm, self.dropout1)
        _mark(norms, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """Return what the mixer allocates for decoding."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]

    def _norms(
        self, x1: Tensor, x2: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (norm1(sum), norm2(sum), sum) for sum = dropout(x1) + dropout(x2) + residual."""
        if self.fused_dropout_add_ln:
            y1, *rest, total = _fused_norm(
                x1,
                self.norm1,
                self.dropout1,
                residual=residual,
                x1=x2,
                weight1=None if self.tied_norm else self.norm2.weight,
                bias1=None if self.tied_norm else self.norm2.bias,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
            )
            return y1, rest[0] if rest else y1, total
        total = self.dropout1(x1)
        if residual is not None:
            total = residual + total
        if x2 is not None:
            total = total + self.dropout2(x2)
        y1 = self.norm1(total.to(self.norm1.weight.dtype))
        y2 = y1 if self.tied_norm else self.norm2(total.to(self.norm2.weight.dtype))
        return y1, y2, total.float() if self.residual_in_fp32 else total

    def forward(
        self,
        hidden_states1: Tensor,
        hidden_states2: Tensor | None = None,
        residual: Tensor | None = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden_states1: output of the previous mixer, or of the embedding.
            hidden_states2: output of the previous MLP; None in the first layer.
            residual: what to add to both; None in the first layer.
            mixer_kwargs: further arguments of the mixer.

        Returns:
            (mixer output, MLP output, residual).
        """
        x1, x2, residual = self._norms(hidden_states1, hidden_states2, residual)
        return self.mixer(x1, **(mixer_kwargs or {})), self.mlp(x2), residual
