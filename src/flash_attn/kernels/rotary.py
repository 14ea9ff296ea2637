"""Rotary position embedding of dense or packed rows, out of place or in place.

One program turns a tile of rows of a few heads, so that it reads the tables once for all of them.
Rows of all sequences are numbered through: short sequences share a tile, and the grid depends on
nothing that lies in device memory. Positions are clamped to the tables and sequences are found by
binary search, so hostile offsets can spoil a result, but nothing outside the tensors is touched.
"""

import triton
import triton.language as tl

from .common import eights

_LENGTHS = ("total", "seqlen", "nheads", "seqlen_rotary", "batch_size", "search_step", "offset",
            "num_tiles")  # fmt: skip
_METADATA = ("seqlen_offsets", "cu_seqlens")


@triton.jit
def _find_sequence(cu_seqlens, rows, batch_size, search_step):
    """The last sequence that starts at or before each row, which skips empty sequences."""
    sequence = tl.zeros_like(rows)
    step = search_step
    while step > 0:
        candidate = sequence + step
        start = tl.load(cu_seqlens + candidate, mask=candidate < batch_size, other=0).to(tl.int64)
        sequence = tl.where((candidate < batch_size) & (start <= rows), candidate, sequence)
        step = step // 2
    return sequence


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_METADATA)
def rotary_kernel(
    out, x, cos, sin, seqlen_offsets, cu_seqlens,
    stride_out_batch, stride_out_seq, stride_out_head, stride_out_dim,
    stride_x_batch, stride_x_seq, stride_x_head, stride_x_dim,
    stride_cos, stride_sin,
    total, seqlen, nheads, seqlen_rotary, batch_size, search_step, offset, num_tiles,
    HEADDIM: tl.constexpr, ROTARY_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, COPY_REST: tl.constexpr,
    EIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotate x, (batch_size, seqlen, nheads, headdim) or packed (total, nheads, headdim), into out.

    ``total`` counts the rows of all sequences. ``seqlen_offsets`` may be None (``offset`` holds for
    all) and so may ``cu_seqlens`` (dense). ``out`` may be ``x``.
    """
    if EIGHTS:
        stride_out_batch, stride_out_seq, stride_out_head = eights(
            stride_out_batch, stride_out_seq, stride_out_head
        )
        stride_x_batch, stride_x_seq, stride_x_head = eights(
            stride_x_batch, stride_x_seq, stride_x_head
        )
    pid = tl.program_id(0)
    rows = (pid % num_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = (pid // num_tiles).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = rows < total
    if cu_seqlens is not None:
        sequence = _find_sequence(cu_seqlens, rows, batch_size, search_step)
        known = exists & (sequence < batch_size)
        start = tl.load(cu_seqlens + sequence, mask=known, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1, mask=known, other=0).to(tl.int64)
        inside = known & (start <= rows) & (rows < end)
        positions = rows - start
        x_rows = rows * stride_x_seq
        out_rows = rows * stride_out_seq
    else:
        sequence = rows // seqlen
        inside = exists
        positions = rows - sequence * seqlen
        x_rows = sequence * stride_x_batch + positions * stride_x_seq
        out_rows = sequence * stride_out_batch + positions * stride_out_seq
    if seqlen_offsets is not None:
        positions += tl.load(seqlen_offsets + sequence, mask=inside, other=0).to(tl.int64)
    else:
        positions += offset
    positions = tl.minimum(tl.maximum(positions, 0), seqlen_rotary - 1)

    pairs = tl.arange(0, BLOCK_K).to(tl.int64)
    table_mask = inside[:, None] & (pairs < ROTARY_HALF)[None, :]
    cos_ptrs = cos + positions[:, None] * stride_cos + pairs[None, :]
    sin_ptrs = sin + positions[:, None] * stride_sin + pairs[None, :]
    c = tl.load(cos_ptrs, mask=table_mask, other=0.0)
    s = tl.load(sin_ptrs, mask=table_mask, other=0.0)
    if x.dtype.element_ty == tl.float64:
        c, s = c.to(tl.float64), s.to(tl.float64)
    else:
        c, s = c.to(tl.float32), s.to(tl.float32)
    if CONJUGATE:
        s = -s
    c, s = c[:, None, :], s[:, None, :]

    mask = exists[:, None] & (heads < nheads)[None, :]
    x_tile = x + x_rows[:, None] + heads[None, :] * stride_x_head
    out_tile = out + out_rows[:, None] + heads[None, :] * stride_out_head
    turns = inside[:, None, None]
    if INTERLEAVED:
        # Whole pairs are read side by side: reading every other entry would waste half of a sector.
        cols = tl.arange(0, 2 * BLOCK_K).to(tl.int64)
        pair_mask = mask[:, :, None] & (cols < 2 * ROTARY_HALF)[None, None, :]
        tile = tl.load(x_tile[:, :, None] + cols * stride_x_dim, mask=pair_mask, other=0.0)
        x0, x1 = tl.split(tl.reshape(tile, [BLOCK_M, BLOCK_H, BLOCK_K, 2]))
        y0 = tl.where(turns, (x0 * c - x1 * s).to(x0.dtype), x0)
        y1 = tl.where(turns, (x0 * s + x1 * c).to(x1.dtype), x1)
        tile = tl.reshape(tl.join(y0, y1), [BLOCK_M, BLOCK_H, 2 * BLOCK_K])
        tl.store(out_tile[:, :, None] + cols * stride_out_dim, tile, mask=pair_mask)
    else:
        half_mask = mask[:, :, None] & (pairs < ROTARY_HALF)[None, None, :]
        x_ptrs = x_tile[:, :, None] + pairs * stride_x_dim
        x0 = tl.load(x_ptrs, mask=half_mask, other=0.0)
        x1 = tl.load(x_ptrs + ROTARY_HALF * stride_x_dim, mask=half_mask, other=0.0)
        y0 = tl.where(turns, (x0 * c - x1 * s).to(x0.dtype), x0)
        y1 = tl.where(turns, (x0 * s + x1 * c).to(x1.dtype), x1)
        out_ptrs = out_tile[:, :, None] + pairs * stride_out_dim
        tl.store(out_ptrs, y0, mask=half_mask)
        tl.store(out_ptrs + ROTARY_HALF * stride_out_dim, y1, mask=half_mask)
    if COPY_REST:
        rest = 2 * ROTARY_HALF + tl.arange(0, BLOCK_REST).to(tl.int64)
        rest_mask = mask[:, :, None] & (rest < HEADDIM)[None, None, :]
        tile = tl.load(x_tile[:, :, None] + rest * stride_x_dim, mask=rest_mask, other=0.0)
        tl.store(out_tile[:, :, None] + rest * stride_out_dim, tile, mask=rest_mask)
