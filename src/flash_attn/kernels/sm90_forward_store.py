"""How results leave the Hopper forward; see ``sm90_forward``."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from .gluon_compat import aggregate, tma_store
from .sm90_forward_work import PACKED, ROWS, SHAPES, head_of, here, row_of


@aggregate
class Destination:
    """Where results go: a descriptor, and for parts of tiles a pointer with steps in elements."""

    desc: tma.tensor_descriptor
    out: gl.tensor
    step_row: gl.tensor
    step_head: gl.tensor
    columns: gl.tensor

    @gluon.constexpr_function
    def __init__(self, desc, out, step_row, step_head, columns):
        self.desc = desc
        self.out = out
        self.step_row = step_row
        self.step_head = step_head
        self.columns = columns


@gluon.jit
def store_rows(work, target, span, row, values, buffer, COLUMNS: gl.constexpr):
    """Write (ROWS, COLUMNS) through a buffer, or twice as many columns half by half."""
    if values.shape[1] == COLUMNS:
        store_columns(work, target, span, row, 0, values, buffer)
    else:
        halves = values.reshape([ROWS, 2, COLUMNS]).permute([0, 2, 1])
        left, right = halves.split()
        store_columns(work, target, span, row, 0, left, buffer)
        store_columns(work, target, span, row, COLUMNS, right, buffer)


@gluon.jit
def store_columns(work, target, span, row, column, values, buffer):
    tma.store_wait(0)  # the buffer's previous store has read it
    buffer.reshape(values.shape).store(values)
    fence_async_shared()
    store_buffer(work, target, span, row, column, buffer)


@gluon.jit
def store_pieces(work, target, span, row, first, last, buffers, FIRST_BUFFER: gl.constexpr):
    """Write the pieces of rows through a buffer each: two of ``first``, and ``last``.

    In a loop: the compiler keeps the coordinates of several stores, in registers that P_SHARED
    has not got.
    """
    COLUMNS: gl.constexpr = last.shape[1]
    left, right = first.reshape([ROWS, 2, COLUMNS]).permute([0, 2, 1]).split()
    tma.store_wait(0)
    buffers.index(FIRST_BUFFER).reshape(last.shape).store(left)
    buffers.index(FIRST_BUFFER + 1).reshape(last.shape).store(right)
    buffers.index(FIRST_BUFFER + 2).reshape(last.shape).store(last)
    fence_async_shared()
    for piece in range(here(work.config.PIECES_V)):
        buffer = buffers.index(FIRST_BUFFER + piece)
        store_buffer(work, target, span, row, piece * COLUMNS, buffer)


@gluon.jit
def store_buffer(work, target, span, row, column, buffer):
    """Write a buffer's rows to columns from ``column`` on."""
    head = span.head * work.config.PACK
    if work.config.LENGTHS == PACKED:
        # TMA cannot end with the sequence: what lies behind it is another's.
        if row + work.config.POSITIONS <= span.rows:
            tma_store(target.desc, [0, head, span.q_start + row, column], buffer)
        else:
            COLUMNS: gl.constexpr = target.desc.block_type.shape[3]
            store_part(work, target, span, row, column, buffer.reshape([ROWS, COLUMNS]))
    else:
        tma_store(target.desc, [span.sequence, head, row, column], buffer)


@gluon.jit
def store_part(work, target, span, row, column, buffer):
    """Write those of the buffer's rows that are the span's."""
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    i = gl.arange(0, ROWS, layout=gl.SliceLayout(1, BY_ROW))
    rows = row_of(work, row, i)
    columns = column + gl.arange(0, buffer.shape[1], layout=gl.SliceLayout(0, BY_ROW))
    offsets = (span.q_start + rows).to(gl.int64) * target.step_row
    offsets = offsets + head_of(work, span, i).to(gl.int64) * target.step_head
    pointers = target.out + gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0)
    inside = gl.expand_dims(rows < span.rows, 1) & gl.expand_dims(columns < target.columns, 0)
    gl.store(pointers, buffer.load(BY_ROW), mask=inside)


@gluon.jit
def normalised(work, acc, factor):
    """Results, 0 where ``factor`` is."""
    out = acc * factor
    if work.config.LENGTHS != SHAPES:  # queries that take no part may be NaN
        out = gl.where(factor > 0.0, out, 0.0)
    return out
