"""Triton kernels of the fused softmax cross entropy: one program per row, then one per block.

A row of logits is read once in the forward pass (a running maximum and sum, so the vocabulary may
be any size) and once in the backward pass.  Everything is computed in float32.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["class_start", "total_classes", "ignore_index"])
def cross_entropy_fwd_kernel(
    logits_ptr,
    labels_ptr,
    lse_ptr,
    loss_ptr,
    z_loss_ptr,
    stride_row,
    n_cols,
    class_start,
    total_classes,
    ignore_index,
    logit_scale,
    smoothing,
    lse_square_scale,
    HAS_SMOOTHING: tl.constexpr,
    PRECOMPUTED_LSE: tl.constexpr,
    VOCAB_PARALLEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the log-sum-exp and the loss of one row.

    With ``VOCAB_PARALLEL`` the row holds one part of the vocabulary: ``lse`` then covers that part
    alone and ``loss`` receives the share of the loss that is linear in these logits.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    label = tl.load(labels_ptr + row).to(tl.int64)
    lse = 0.0
    loss = 0.0
    z_loss = 0.0
    if label != ignore_index:
        running_max = -float("inf")
        running_sum = 0.0
        logit_sum = 0.0
        if PRECOMPUTED_LSE:
            lse = tl.load(lse_ptr + row).to(tl.float32)
        else:
            for start in range(0, n_cols, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                inside = cols < n_cols
                x = tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32) * logit_scale
                if HAS_SMOOTHING:
                    logit_sum += tl.sum(x, axis=0)
                x = tl.where(inside, x, -float("inf"))
                new_max = tl.maximum(running_max, tl.max(x, axis=0))
                # A row that is -inf so far would give exp(-inf + inf).
                shift = tl.where(new_max == -float("inf"), 0.0, new_max)
                running_sum = running_sum * tl.exp(running_max - shift)
                running_sum += tl.sum(tl.exp(x - shift), axis=0)
                running_max = new_max
            lse = running_max + tl.log(running_sum)
        local_label = label - class_start
        is_local = (local_label >= 0) & (local_label < n_cols)
        target = tl.load(row_ptr + local_label, mask=is_local, other=0.0).to(tl.float32)
        target *= logit_scale
        if HAS_SMOOTHING:
            target = (1.0 - smoothing) * target + smoothing / total_classes * logit_sum
        loss = -target
        if not VOCAB_PARALLEL:
            z_loss = lse_square_scale * lse * lse
            loss = lse - target + z_loss
    if not PRECOMPUTED_LSE:
        tl.store(lse_ptr + row, lse)
    if not VOCAB_PARALLEL:
        tl.store(z_loss_ptr + row, z_loss)
    tl.store(loss_ptr + row, loss)


@triton.jit(do_not_specialize=["class_start", "total_classes", "ignore_index"])
def cross_entropy_bwd_kernel(
    logits_ptr,
    labels_ptr,
    lse_ptr,
    dloss_ptr,
    dlogits_ptr,
    stride_row,
    stride_drow,
    n_cols,
    class_start,
    total_classes,
    ignore_index,
    logit_scale,
    smoothing,
    lse_square_scale,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one block of one row of the logit gradient; it may overwrite the logits themselves."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    label = tl.load(labels_ptr + row).to(tl.int64)
    grad = tl.zeros([BLOCK], dtype=tl.float32)
    # Ignored rows get exact zeros, whatever their logits (and the incoming gradient) hold.
    if label != ignore_index:
        dloss = tl.load(dloss_ptr + row).to(tl.float32)
        lse = tl.load(lse_ptr + row).to(tl.float32)
        x = tl.load(logits_ptr + row * stride_row + cols, mask=inside, other=0.0)
        grad = tl.exp(x.to(tl.float32) * logit_scale - lse)
        grad *= 1.0 + 2.0 * lse_square_scale * lse
        if HAS_SMOOTHING:
            grad -= tl.where(cols == label - class_start, 1.0 - smoothing, 0.0)
            grad -= smoothing / total_classes
        else:
            grad -= tl.where(cols == label - class_start, 1.0, 0.0)
        grad *= dloss * logit_scale
    grad = grad.to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + row * stride_drow + cols, grad, mask=inside)
