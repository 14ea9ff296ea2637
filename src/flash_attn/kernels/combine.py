"""Merging the partial results of a forward pass whose keys were split.

    lse = log sum_s exp(lse_s),   out = sum_s exp(lse_s - lse) out_s

One program merges one tile of rows of one head. A split without keys has lse_s = -inf and weight 0;
where all have, the row saw no key: out 0 and lse ``empty_lse``. A sink is one more split, whose
output is 0.
"""

import triton
import triton.language as tl

from .common import LN2, LOG2E, int64

_LENGTHS = ("nheads", "rows_q", "num_tiles", "num_splits", "stride_ls", "stride_lb", "stride_lh",
            "stride_pb", "stride_ph")  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=("sinks",))
def attention_combine(
    partial_out, partial_lse, out, lse,
    stride_ps, stride_pb, stride_pm, stride_ph,  # partial_out
    stride_qs, stride_qb, stride_qh,  # partial_lse
    stride_ob, stride_om, stride_oh, stride_lb, stride_lh,
    nheads, rows_q, num_tiles, num_splits, empty_lse, sinks,  # None where there are none
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """See the module's docstring."""
    pid = tl.program_id(0)
    start = (pid % num_tiles) * BLOCK_M
    h = ((pid // num_tiles) % nheads).to(tl.int64)
    b = ((pid // num_tiles) // nheads).to(tl.int64)
    rows = start + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    inside = rows < rows_q
    tile_mask = inside[:, None] & (cols < HEAD_DIM)[None, :]
    wide_rows = rows.to(tl.int64)
    partial_lse += b * stride_qb + h * stride_qh
    partial_out += b * stride_pb + h * stride_ph

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for s in range(num_splits):
        part = tl.load(partial_lse + s * stride_qs + rows, mask=inside, other=float("-inf"))
        largest = tl.maximum(largest, part)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32)
        largest = tl.maximum(largest, sink)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        total += tl.exp2((sink - shift) * LOG2E)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for s in range(num_splits):
        split = int64(s)
        part = tl.load(partial_lse + split * stride_qs + rows, mask=inside, other=float("-inf"))
        weight = tl.exp2((part - shift) * LOG2E)
        pointers = partial_out + split * stride_ps + wide_rows[:, None] * stride_pm + cols[None, :]
        # A part of weight 0 is not read: it may never have been written.
        part_mask = tile_mask & (weight > 0.0)[:, None]
        acc += weight[:, None] * tl.load(pointers, mask=part_mask, other=0.0)
        total += weight
    dead = total == 0.0
    acc = acc * tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, total))[:, None]
    row_lse = tl.where(dead, empty_lse, shift + tl.log2(tl.where(dead, 1.0, total)) * LN2)
    tl.store(lse + b * stride_lb + h * stride_lh + rows, row_lse, mask=inside)
    pointers = out + b * stride_ob + h * stride_oh + wide_rows[:, None] * stride_om + cols[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=tile_mask)
