"""Fused softmax cross entropy with label smoothing, z-loss and a vocabulary split over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...core.derivatives import first_order
from ...core.toolchain import explains_toolchain
from ...core.validate import check_number
from ...errors import ConstraintError

_FORWARD_BLOCK = 16 * 1024
_BACKWARD_BLOCK = 4 * 1024


class _Options(NamedTuple):
    """The numbers a loss depends on besides its tensors."""

    label_smoothing: float
    logit_scale: float
    lse_square_scale: float
    ignore_index: int
    class_start: int  # first class that this rank holds
    total_classes: int  # classes of all ranks together


def _runs_on_kernels(tensor: Tensor) -> bool:
    return tensor.device.type in ("cuda", "xpu")


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a guard: Triton launches on the current device, which may be another GPU."""
    if tensor.device.type == "cpu":
        return nullcontext()
    module: Any = torch.get_device_module(tensor.device)
    return module.device(tensor.device)


def _num_warps(block: int) -> int:
    return 4 if block < 2048 else 8 if block < 8192 else 16


def _block_size(n_cols: int, limit: int) -> int:
    return min(limit, max(16, 1 << (n_cols - 1).bit_length()))


@explains_toolchain
def _forward_kernel(
    logits: Tensor, labels: Tensor, lse: Tensor | None, options: _Options, partial: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (lse, losses, z_losses) of every row; see the kernel for ``partial``."""
    from ...backends._compiled import look_up_first
    from ...kernels.cross_entropy import cross_entropy_fwd_kernel

    n_rows, n_cols = logits.shape
    losses = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    z_losses = torch.empty_like(losses)
    precomputed = lse is not None
    if lse is None:
        lse = torch.empty_like(losses)
    if n_rows == 0:
        return lse, losses, z_losses
    block = _block_size(n_cols, _FORWARD_BLOCK)
    with _device_of(logits):
        look_up_first(cross_entropy_fwd_kernel)[(n_rows,)](
            logits,
            labels,
            lse,
            losses,
            z_losses,
            logits.stride(0),
            n_cols,
            options.class_start,
            options.total_classes,
            options.ignore_index,
            options.logit_scale,
            options.label_smoothing,
            options.lse_square_scale,
            HAS_SMOOTHING=options.label_smoothing != 0.0,
            PRECOMPUTED_LSE=precomputed,
            VOCAB_PARALLEL=partial,
            BLOCK=block,
            num_warps=_num_warps(block),
        )
    return lse, losses, z_losses


@explains_toolchain
def _backward_kernel(
    logits: Tensor, labels: Tensor, lse: Tensor, dlosses: Tensor, out: Tensor, options: _Options
) -> None:
    from ...backends._compiled import look_up_first
    from ...kernels.cross_entropy import cross_entropy_bwd_kernel

    n_rows, n_cols = logits.shape
    if n_rows == 0:
        return
    block = _block_size(n_cols, _BACKWARD_BLOCK)
    with _device_of(logits):
        look_up_first(cross_entropy_bwd_kernel)[(n_rows, -(-n_cols // block))](
            logits,
            labels,
            lse,
            dlosses,
            out,
            logits.stride(0),
            out.stride(0),
            n_cols,
            options.class_start,
            options.total_classes,
            options.ignore_index,
            options.logit_scale,
            options.label_smoothing,
            options.lse_square_scale,
            HAS_SMOOTHING=options.label_smoothing != 0.0,
            BLOCK=block,
            num_warps=_num_warps(block),
        )


def _local_labels(labels: Tensor, n_cols: int, class_start: int) -> tuple[Tensor, Tensor]:
    """Return (column, is_local): labels as columns of this rank, 0 where another rank has them."""
    column = labels.to(torch.int64) - class_start
    is_local = (column >= 0) & (column < n_cols)
    return column.masked_fill(~is_local, 0), is_local


def _forward_torch(
    logits: Tensor, labels: Tensor, lse: Tensor | None, options: _Options, partial: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what the forward kernel does with PyTorch operations."""
    scaled = logits.float() * options.logit_scale
    if lse is None:
        lse = torch.logsumexp(scaled, dim=-1)
    column, is_local = _local_labels(labels, logits.shape[1], options.class_start)
    target = scaled.gather(1, column[:, None])[:, 0].masked_fill(~is_local, 0.0)
    if options.label_smoothing != 0.0:
        share = options.label_smoothing / options.total_classes
        target = (1.0 - options.label_smoothing) * target + share * scaled.sum(dim=-1)
    ignored = labels == options.ignore_index
    losses = (-target).masked_fill(ignored, 0.0)
    if partial:
        return lse, losses, torch.zeros_like(losses)
    return _add_lse(lse, losses, ignored, options)


def _backward_torch(
    logits: Tensor, labels: Tensor, lse: Tensor, dlosses: Tensor, out: Tensor, options: _Options
) -> None:
    """Do what the backward kernel does with PyTorch operations."""
    column, is_local = _local_labels(labels, logits.shape[1], options.class_start)
    grad = torch.exp(logits.float() * options.logit_scale - lse[:, None])
    grad *= (1.0 + 2.0 * options.lse_square_scale * lse)[:, None]
    one_hot = is_local.float() * (1.0 - options.label_smoothing)
    grad.scatter_add_(1, column[:, None], -one_hot[:, None])
    if options.label_smoothing != 0.0:
        grad -= options.label_smoothing / options.total_classes
    grad *= (dlosses * options.logit_scale)[:, None]
    grad.masked_fill_((labels == options.ignore_index)[:, None], 0.0)
    out.copy_(grad)


def _add_lse(
    lse: Tensor, losses: Tensor, ignored: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Complete losses that lack their log-sum-exp and z-loss terms."""
    z_losses = (options.lse_square_scale * lse.square()).masked_fill(ignored, 0.0)
    return lse, losses + lse.masked_fill(ignored, 0.0) + z_losses, z_losses


def _merge_ranks(
    lse: Tensor, losses: Tensor, labels: Tensor, options: _Options, process_group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine what every rank found on its part of the vocabulary."""
    world_size = dist.get_world_size(process_group)
    gathered = torch.empty(world_size * lse.shape[0], dtype=lse.dtype, device=lse.device)
    dist.all_gather_into_tensor(gathered, lse.contiguous(), group=process_group)
    dist.all_reduce(losses, op=dist.ReduceOp.SUM, group=process_group)
    lse = torch.logsumexp(gathered.view(world_size, -1), dim=0)
    return _add_lse(lse, losses, labels == options.ignore_index, options)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Tensor,
        labels: Tensor,
        precomputed_lse: Tensor | None,
        options: _Options,
        inplace_backward: bool,
        process_group: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        partial = options.total_classes > logits.shape[1]
        forward = _forward_kernel if _runs_on_kernels(logits) else _forward_torch
        lse, losses, z_losses = forward(logits, labels, precomputed_lse, options, partial)
        if partial:
            lse, losses, z_losses = _merge_ranks(lse, losses, labels, options, process_group)
        # An input may not be saved as an output.
        return losses, z_losses, lse.view_as(lse) if lse is precomputed_lse else lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, labels, _, ctx.options, ctx.inplace_backward, _ = inputs
        _, z_losses, lse = output
        ctx.save_for_backward(logits, labels, lse)
        ctx.mark_non_differentiable(z_losses, lse)

    @staticmethod
    @first_order
    def backward(ctx: Any, dlosses: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        out = logits if ctx.inplace_backward else torch.empty_like(logits)
        backward = _backward_kernel if _runs_on_kernels(logits) else _backward_torch
        backward(logits, labels, lse, dlosses.contiguous(), out, ctx.options)
        return out, None, None, None, None, None


def _check(
    logits: Tensor, labels: Tensor, precomputed_lse: Tensor | None, logit_scale: float
) -> None:
    for name, given in (("logits", logits), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise ConstraintError(f"`{name}` must be a torch.Tensor, found {type(given).__name__}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ConstraintError(
            "`logits` must have shape (rows, classes) with at least one class, "
            f"found {tuple(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise ConstraintError(f"`logits` must be floating point, found {logits.dtype}")
    rows = (logits.shape[0],)
    for name, tensor in (("labels", labels), ("precomputed_lse", precomputed_lse)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != rows:
            raise ConstraintError(f"`{name}` must have shape {rows}, found {tuple(tensor.shape)}")
        if tensor.device != logits.device:
            raise ConstraintError(
                f"`{name}` must be on {logits.device} like `logits`, found {tensor.device}"
            )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ConstraintError(f"`labels` must hold integers, found {labels.dtype}")
    if not logit_scale > 0.0:
        raise ConstraintError(f"`logit_scale` must be positive, found {logit_scale}")


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Compute the softmax cross entropy of every row.

    Args:
        logits: (rows, classes), any floating dtype and row stride; the computation is in float32.
        labels: (rows,), integers.  A label outside the vocabulary contributes no target logit.
        precomputed_lse: (rows,), the log-sum-exp of each row of ``logits`` (with ``process_group``
            of this rank's part).  It is used only if ``logit_scale`` is 1 and ``label_smoothing``
            is 0, and no gradient flows to it.
        label_smoothing: share of the target distribution that is spread over all classes.
        logit_scale: positive factor applied to the logits.
        lse_square_scale: weight of the z-loss, the squared log-sum-exp added to each loss.
        ignore_index: rows with this label have zero loss and zero gradient.
        inplace_backward: write the gradient over ``logits`` to save memory; a second backward pass
            through the same graph is then wrong.
        process_group: ranks that hold equal parts of the vocabulary, in rank order.

    Returns:
        (losses, z_losses), both float32 (rows,); ``losses`` include ``z_losses``, which carry no
        gradient.

    Raises:
        ConstraintError: an argument has a wrong shape, dtype, device or value.
    """
    logit_scale = float(check_number(logit_scale, "logit_scale"))
    label_smoothing = float(check_number(label_smoothing, "label_smoothing"))
    _check(logits, labels, precomputed_lse, logit_scale)
    n_cols = logits.shape[1]
    world_size, rank = 1, 0
    if process_group is not None:
        world_size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    options = _Options(
        label_smoothing=label_smoothing,
        logit_scale=logit_scale,
        lse_square_scale=float(check_number(lse_square_scale, "lse_square_scale")),
        ignore_index=int(ignore_index),
        class_start=rank * n_cols,
        total_classes=world_size * n_cols,
    )
    if precomputed_lse is not None:
        usable = logit_scale == 1.0 and label_smoothing == 0.0
        precomputed_lse = precomputed_lse.detach().float().contiguous() if usable else None
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    losses, z_losses, _ = _CrossEntropy.apply(
        logits, labels.contiguous(), precomputed_lse, options, inplace_backward, process_group
    )
    return losses, z_losses
