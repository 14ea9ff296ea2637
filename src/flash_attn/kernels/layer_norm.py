"""Triton kernels of the fused dropout + residual add + LayerNorm (or RMSNorm).

The forward kernel runs one program per row.  In the backward kernel a program walks a fixed block
of rows and keeps its share of the weight gradients in registers, so that summing these shares in
order gives the same bits on every run.  Pointers that are ``None`` switch their feature off.
"""

import triton
import triton.language as tl


@triton.jit
def _dropout_keep(seed_ptr, row, cols, dropout_p, STREAM: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return which entries of a row survive; forward and backward draw the same bits."""
    seed = tl.load(seed_ptr) + row
    return tl.rand(seed, cols + STREAM * BLOCK_N) >= dropout_p


@triton.jit
def _affine(x_hat, W, B, cols, inside, ZERO_CENTERED: tl.constexpr):
    """Scale and shift normalised values."""
    y = x_hat
    if W is not None:
        weight = tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
        if ZERO_CENTERED:
            weight += 1.0
        y = y * weight
    if B is not None:
        y += tl.load(B + cols, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def layer_norm_fwd_kernel(
    X,
    RESIDUAL,
    X1,
    ROWSCALE,
    SEED,
    W,
    B,
    W1,
    B1,
    Y,
    Y1,
    RESIDUAL_OUT,
    MASK,
    MASK1,
    MEAN,
    RSTD,
    stride_x,
    stride_residual,
    stride_x1,
    N,
    eps,
    dropout_p,
    keep_scale,
    IS_RMS_NORM: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Normalise one row of ``dropout(x * rowscale) + dropout(x1) + residual``.

    The outputs are contiguous (rows, N).
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    inside = cols < N
    x = tl.load(X + row * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
    if ROWSCALE is not None:
        x *= tl.load(ROWSCALE + row).to(tl.float32)
    if SEED is not None:
        keep = _dropout_keep(SEED, row, cols, dropout_p, 0, BLOCK_N)
        x = tl.where(keep, x * keep_scale, 0.0)
        if MASK is not None:
            tl.store(MASK + row * N + cols, keep.to(tl.int8), mask=inside)
    if X1 is not None:
        x1 = tl.load(X1 + row * stride_x1 + cols, mask=inside, other=0.0).to(tl.float32)
        if SEED is not None:
            keep1 = _dropout_keep(SEED, row, cols, dropout_p, 1, BLOCK_N)
            x1 = tl.where(keep1, x1 * keep_scale, 0.0)
            if MASK1 is not None:
                tl.store(MASK1 + row * N + cols, keep1.to(tl.int8), mask=inside)
        x += x1
    if RESIDUAL is not None:
        residual = tl.load(RESIDUAL + row * stride_residual + cols, mask=inside, other=0.0)
        x += residual.to(tl.float32)
    if RESIDUAL_OUT is not None:
        out = x.to(RESIDUAL_OUT.dtype.element_ty)
        tl.store(RESIDUAL_OUT + row * N + cols, out, mask=inside)
    if IS_RMS_NORM:
        centred = x
    else:
        mean = tl.sum(x, axis=0) / N
        tl.store(MEAN + row, mean)
        centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / N + eps)
    tl.store(RSTD + row, rstd)
    x_hat = centred * rstd
    y = _affine(x_hat, W, B, cols, inside, ZERO_CENTERED)
    tl.store(Y + row * N + cols, y.to(Y.dtype.element_ty), mask=inside)
    if Y1 is not None:
        y1 = _affine(x_hat, W1, B1, cols, inside, ZERO_CENTERED)
        tl.store(Y1 + row * N + cols, y1.to(Y1.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "rows_per_program"])
def layer_norm_bwd_kernel(
    X,
    W,
    W1,
    ROWSCALE,
    SEED,
    MEAN,
    RSTD,
    DY,
    DY1,
    DRESIDUAL,
    DX,
    DX1,
    DRESIDUAL_IN,
    DW,
    DB,
    DW1,
    DB1,
    stride_x,
    stride_dy,
    stride_dy1,
    stride_dresidual,
    M,
    N,
    rows_per_program,
    dropout_p,
    keep_scale,
    IS_RMS_NORM: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the input gradients of some rows and this program's share of the weight gradients.

    ``X`` is what was normalised.  DX, DX1 and DRESIDUAL_IN are contiguous (M, N); DW, DB, DW1 and
    DB1 are float32 (programs, N).
    """
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    inside = cols < N
    if W is not None:
        weight = tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
        if ZERO_CENTERED:
            weight += 1.0
    if W1 is not None:
        weight1 = tl.load(W1 + cols, mask=inside, other=0.0).to(tl.float32)
        if ZERO_CENTERED:
            weight1 += 1.0
    dw = tl.zeros([BLOCK_N], dtype=tl.float32)
    db = tl.zeros([BLOCK_N], dtype=tl.float32)
    dw1 = tl.zeros([BLOCK_N], dtype=tl.float32)
    db1 = tl.zeros([BLOCK_N], dtype=tl.float32)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    for row in range(first, last):
        x = tl.load(X + row * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        if IS_RMS_NORM:
            x_hat = x * rstd
        else:
            x_hat = tl.where(inside, (x - tl.load(MEAN + row)) * rstd, 0.0)
        dy = tl.load(DY + row * stride_dy + cols, mask=inside, other=0.0).to(tl.float32)
        if DW is not None:
            dw += dy * x_hat
        if DB is not None:
            db += dy
        dx_hat = dy
        if W is not None:
            dx_hat = dy * weight
        if DY1 is not None:
            dy1 = tl.load(DY1 + row * stride_dy1 + cols, mask=inside, other=0.0).to(tl.float32)
            if DW1 is not None:
                dw1 += dy1 * x_hat
            if DB1 is not None:
                db1 += dy1
            dx_hat += dy1 * weight1
        dx = dx_hat - x_hat * (tl.sum(x_hat * dx_hat, axis=0) / N)
        if not IS_RMS_NORM:
            dx -= tl.sum(dx_hat, axis=0) / N
        dx *= rstd
        if DRESIDUAL is not None:
            dresidual = tl.load(DRESIDUAL + row * stride_dresidual + cols, mask=inside, other=0.0)
            dx += dresidual.to(tl.float32)
        if DRESIDUAL_IN is not None:
            out = dx.to(DRESIDUAL_IN.dtype.element_ty)
            tl.store(DRESIDUAL_IN + row * N + cols, out, mask=inside)
        if DX1 is not None:
            dx1 = dx
            if SEED is not None:
                keep1 = _dropout_keep(SEED, row, cols, dropout_p, 1, BLOCK_N)
                dx1 = tl.where(keep1, dx * keep_scale, 0.0)
            tl.store(DX1 + row * N + cols, dx1.to(DX1.dtype.element_ty), mask=inside)
        if SEED is not None:
            keep = _dropout_keep(SEED, row, cols, dropout_p, 0, BLOCK_N)
            dx = tl.where(keep, dx * keep_scale, 0.0)
        if ROWSCALE is not None:
            dx *= tl.load(ROWSCALE + row).to(tl.float32)
        tl.store(DX + row * N + cols, dx.to(DX.dtype.element_ty), mask=inside)
    if DW is not None:
        tl.store(DW + program * N + cols, dw, mask=inside)
    if DB is not None:
        tl.store(DB + program * N + cols, db, mask=inside)
    if DW1 is not None:
        tl.store(DW1 + program * N + cols, dw1, mask=inside)
    if DB1 is not None:
        tl.store(DB1 + program * N + cols, db1, mask=inside)
