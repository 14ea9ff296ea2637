"""The module form of the fused cross entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ConstraintError, UnsupportedProblemError
from ..ops.triton.cross_entropy import cross_entropy_loss


class CrossEntropyLoss(nn.Module):
    """Softmax cross entropy with label smoothing, z-loss and a vocabulary split over ranks.

    Args:
        ignore_index: rows with this target have zero loss and do not count in the mean.
        reduction: "mean", "sum" or "none".
        label_smoothing: share of the target distribution that is spread over all classes.
        logit_scale: positive factor applied to the logits.
        lse_square_scale: weight of the z-loss, the squared log-sum-exp added to each loss.
        inplace_backward: write the gradient over the logits to save memory.
        process_group: ranks that hold equal parts of the vocabulary.
        return_z_loss: return the z-loss part as well, for logging; it carries no gradient.

    Raises:
        UnsupportedProblemError: ``reduction`` is none of the three.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise UnsupportedProblemError(
                f'`reduction` must be "mean", "sum" or "none", found {reduction!r}'
            )
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def _reduce(self, values: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "mean":
            return values.sum() / (target != self.ignore_index).sum()
        if self.reduction == "sum":
            return values.sum()
        return values

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss of ``input`` (rows, classes) against ``target`` (rows,).

        Args:
            input: logits, any floating dtype.
            target: integer classes.
            precomputed_lse: (rows,) log-sum-exp of the logits, if the caller has it.

        Returns:
            The float32 loss, reduced as asked, or (loss, z_loss) with ``return_z_loss``.

        Raises:
            ConstraintError: an argument has a wrong shape, dtype, device or value.
        """
        if target.shape != input.shape[:-1]:
            raise ConstraintError(
                f"`target` must have shape {tuple(input.shape[:-1])}, found {tuple(target.shape)}"
            )
        losses, z_losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        loss = self._reduce(losses, target)
        return (loss, self._reduce(z_losses, target)) if self.return_z_loss else loss
