"""What runs before and after the Hopper backward's main kernels: numbers of each row, and rounding
the sums of dq, dk and dv; see ``sm90_backward``."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_async import allow_dependents, peek, wait_for_dependencies
from .sm90_backward_work import (
    LOG2E,
    ROWS,
    Grid,
    Lengths,
    clamp,
    padded_start,
    tiles_of_blocks,
    used_rows,
)


@gluon.jit
def base_two(lse):
    """The log-sum-exp in base 2, and +inf of rows that see no key, so that their weights are 0."""
    sees_none = (lse == float("-inf")) | (lse == float("inf"))
    return gl.where(sees_none, float("inf"), lse * LOG2E)


@gluon.jit(do_not_specialize=("batch", "total", "tiles", "steps"))
def tiles_sm90(bounds, table, batch, total, tiles, steps):
    """Which rows of packed sequences belong to each of ``tiles`` tiles of 128 rows.

    Segments are the rows before, of, and after the sequences. Segment s starts at tile
    ``first row // 128 + s``, which leaves each room for all its tiles, so that a search among
    ``bounds``, (batch + 1,) first rows that never decrease, finds a tile's segment and nobody has
    to know the lengths. There are ``total // 128 + batch + 2`` tiles.

    Args:
        table: (4, tiles) int32: the sequence, -1 or ``batch`` for rows of none; the tile's first
            row within it, which may lie past its end; the sequence's first row; its rows.
        steps: of the search; 2**steps segments.
    """
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tile = gl.program_id(0) * 128 + gl.arange(0, 128, layout=FLAT)
    low = tile * 0
    high = low + (batch + 1)
    for _ in range(steps):
        middle = (low + high + 1) // 2
        is_before = segment_bound(bounds, middle, batch, total) // 128 + middle <= tile
        low = gl.where(is_before, middle, low)
        high = gl.where(is_before, high, middle - 1)
    start = segment_bound(bounds, low, batch, total)
    end = segment_bound(bounds, low + 1, batch, total)
    inside = tile < tiles
    gl.store(table + tile, low - 1, mask=inside)
    gl.store(table + tiles + tile, (tile - (start // 128 + low)) * 128, mask=inside)
    gl.store(table + 2 * tiles + tile, start, mask=inside)
    gl.store(table + 3 * tiles + tile, end - start, mask=inside)


@gluon.jit
def segment_bound(bounds, segment, batch, total):
    """First row of a segment, see tiles_sm90."""
    bound = clamp(gl.load(bounds + clamp(segment - 1, 0, batch)), 0, total)
    return gl.where(segment <= 0, 0, gl.where(segment > batch + 1, total, bound))


@gluon.jit
def entry_of(table, tiles, tile):
    """(sequence, first row of the tile, first row of the sequence, rows) from tiles_sm90."""
    entry = table + tile
    return (
        gl.load(entry),
        gl.load(entry + tiles),
        gl.load(entry + 2 * tiles),
        gl.load(entry + 3 * tiles),
    )


@gluon.jit(
    do_not_specialize=(
        "nheads", "seqlen_q", "padded_rows", "tiles", "num_turns", "batch_size", "table_tiles",
    ),
    do_not_specialize_on_alignment=("table", "used_q"),
)  # fmt: skip
def row_statistics_sm90(
    out, dout, lse, dlse, lse_log2, delta, dq_sums, turns, num_turns,
    stride_ob, stride_om, stride_oh, stride_gb, stride_gm, stride_gh, stride_lb, stride_lh,
    nheads, seqlen_q, padded_rows, tiles, table, table_tiles, used_q, batch_size,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, HAS_DLSE: gl.constexpr,
    CU_Q: gl.constexpr, USED_Q: gl.constexpr, ZEROES: gl.constexpr,
):  # fmt: skip
    """delta and log-sum-exp in base 2 of BLOCK_M rows; with ZEROES zeroes their sums of dq.

    ``tiles`` of them make up a head of a sequence, with CU_Q one of all packed sequences.

    Rows past the end, up to padded_rows, and rows that see no key get 0 and +inf. The gradient of
    the log-sum-exp, dlse (like lse, contiguous), only changes delta. The turns are zeroed too.
    The last rows come first, so that the first ones are still in the L2 cache after it.
    """
    allow_dependents()
    # 96 and 192 columns are no tensor's.
    WIDTH: gl.constexpr = 256 if BLOCK_D > 128 else 128 if BLOCK_D > 64 else 64
    STEP: gl.constexpr = 64 if BLOCK_D % 64 == 0 else 32
    THREADS: gl.constexpr = WIDTH // 8
    ROWS_OF_OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [4, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    ROW: gl.constexpr = gl.SliceLayout(1, ROWS_OF_OUT)
    pid = gl.num_programs(0) - 1 - gl.program_id(0)
    for i in range(pid * 512, num_turns, gl.num_programs(0) * 512):
        places = i + gl.arange(0, 512, layout=FLAT)
        gl.store(turns + places, gl.zeros([512], gl.int32, FLAT), mask=places < num_turns)
    head_batch = pid // tiles
    tile = pid - head_batch * tiles
    b = head_batch // nheads
    h = head_batch - b * nheads
    first_row = tile * BLOCK_M
    count = seqlen_q
    first = head_batch.to(gl.int64) * padded_rows + first_row
    if CU_Q:
        # The heads of all sequences are those of one.
        PARTS: gl.constexpr = 128 // BLOCK_M
        sequence, first_row, start, count = entry_of(table, table_tiles, tile // PARTS)
        first_row += tile % PARTS * BLOCK_M
        # Nobody reads statistics of rows of no sequence, nor of tiles past a sequence's end.
        if (first_row >= (count + 127) // 128 * 128) | (sequence < 0) | (sequence >= batch_size):
            return
        first = head_batch.to(gl.int64) * padded_rows + padded_start(start, sequence) + first_row
        out += start.to(gl.int64) * stride_om
        dout += start.to(gl.int64) * stride_gm
        lse += start
        dlse += start
    else:
        sequence = b
    if USED_Q:
        count = used_rows(used_q, sequence, batch_size, count)
    rows = first_row + gl.arange(0, BLOCK_M, layout=ROW)
    cols = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, ROWS_OF_OUT))
    inside = rows < count
    mask = gl.expand_dims(inside, 1)
    if WIDTH != HEAD_DIM:
        mask = mask & gl.expand_dims(cols < HEAD_DIM, 0)
    at = gl.expand_dims(rows.to(gl.int64), 1)
    column = gl.expand_dims(cols, 0)
    b64 = b.to(gl.int64)
    out += b64 * stride_ob + h.to(gl.int64) * stride_oh
    dout += b64 * stride_gb + h.to(gl.int64) * stride_gh
    o = gl.load(out + at * stride_om + column, mask=mask, other=0.0)
    do = gl.load(dout + at * stride_gm + column, mask=mask, other=0.0)
    row_lse = gl.load(lse + b64 * stride_lb + h.to(gl.int64) * stride_lh + rows, mask=inside,
                      other=float("inf"))  # fmt: skip
    if ZEROES:
        sums = dq_sums + first * BLOCK_D + gl.arange(0, BLOCK_M * STEP, layout=FLAT)
        for j in gl.static_range(BLOCK_D // STEP):
            gl.store(sums + j * BLOCK_M * STEP, gl.zeros([BLOCK_M * STEP], gl.float32, FLAT))
    row_delta = gl.sum(o.to(gl.float32) * do.to(gl.float32), 1)
    if HAS_DLSE:
        row_delta -= gl.load(dlse + head_batch.to(gl.int64) * seqlen_q + rows, mask=inside,
                             other=0.0)  # fmt: skip
    row_lse = base_two(row_lse)
    target = first + gl.arange(0, BLOCK_M, layout=ROW)
    gl.store(lse_log2 + target, row_lse)
    gl.store(delta + target, gl.where(row_lse == float("inf"), 0.0, row_delta))


@gluon.jit
def matrix_order(parts):
    """Undo register_order."""
    COLUMNS: gl.constexpr = parts.shape[0]
    tile = parts.reshape([4, COLUMNS // 8, 8, 4, 2, 2]).permute([0, 4, 2, 1, 3, 5])
    return tile.reshape([ROWS, COLUMNS])


@gluon.jit
def finish_columns(sums, dq, stride_m, scale, first_row, count, has_any, HEAD_DIM: gl.constexpr,
                   NUMBER: gl.constexpr, COLUMNS: gl.constexpr):  # fmt: skip
    """COLUMNS columns of dq from the 64 * NUMBER-th on; zeros unless ``has_any``, which may be None
    where there are sums always, as HEAD_DIM may where it is a multiple of COLUMNS."""
    FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    flat_rows = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, FLAT)) * 64
    flat_cols = gl.arange(0, 64, layout=gl.SliceLayout(0, FLAT))
    sums += NUMBER * 4096 + gl.expand_dims(flat_rows, 1) + gl.expand_dims(flat_cols, 0)
    if has_any is None:
        parts = gl.load(sums)
    else:
        parts = gl.load(sums, mask=has_any, other=0.0)
    values = (matrix_order(parts) * scale).to(dq.dtype.element_ty)
    values = gl.convert_layout(values, STORED)
    rows = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, STORED))
    cols = NUMBER * 64 + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, STORED))
    mask = gl.expand_dims(rows < count, 1)
    if HEAD_DIM is not None:
        mask = mask & gl.expand_dims(cols < HEAD_DIM, 0)
    at = gl.expand_dims(rows.to(gl.int64) * stride_m, 1) + gl.expand_dims(cols, 0)
    gl.store(dq + at, values, mask=mask)


@gluon.jit(
    do_not_specialize=(
        "nheads", "seqlen_q", "padded_rows", "tiles", "batch_size", "table_tiles",
    ),
    do_not_specialize_on_alignment=("table",),
)  # fmt: skip
def finish_dq_sm90(
    dq_sums, dq, stride_b, stride_m, stride_h, scale, nheads, seqlen_q, padded_rows, tiles,
    table, table_tiles, batch_size, turns,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, CU_Q: gl.constexpr,
    FIRST_STORES: gl.constexpr,
):  # fmt: skip
    """dq = scale * sums, for 64 rows of one head, of which ``tiles`` make a padded sequence.

    With CU_Q ``tiles`` make all packed ones; rows of no sequence get 0. With FIRST_STORES so do
    those to whose block of BLOCK_M nobody came, whose turn is 0.
    The last rows come first, whose sums are still in the L2 cache.
    """
    pid = gl.num_programs(0) - 1 - gl.program_id(0)
    head_batch = pid // tiles
    tile = pid - head_batch * tiles
    b = head_batch // nheads
    h = head_batch - b * nheads
    first_row = tile * 64
    count = seqlen_q
    first = head_batch.to(gl.int64) * padded_rows + first_row
    if CU_Q:
        sequence, first_row, start, count = entry_of(table, table_tiles, tile // 2)
        first_row += tile % 2 * 64
        has_sums = (first_row < count) & (sequence >= 0) & (sequence < batch_size)
        first = head_batch.to(gl.int64) * padded_rows + padded_start(start, sequence) + first_row
        dq += start.to(gl.int64) * stride_m
    turn = first // BLOCK_M * (BLOCK_M // ROWS)
    if CU_Q:  # rows of no sequence have no turn
        turn = gl.where(has_sums, turn, 0)
    first *= BLOCK_D
    dq += b.to(gl.int64) * stride_b + h.to(gl.int64) * stride_h
    wait_for_dependencies()
    has_any = None
    if FIRST_STORES:
        has_any = peek(turns + turn) > 0
        if CU_Q:
            has_any = has_any & has_sums
    elif CU_Q:
        has_any = has_sums
    left: gl.constexpr = HEAD_DIM if BLOCK_D != HEAD_DIM else None
    for j in gl.static_range(BLOCK_D // 64):
        finish_columns(dq_sums + first, dq, stride_m, scale, first_row, count, has_any, left, j, 64)
    if BLOCK_D % 64 != 0:
        finish_columns(dq_sums + first, dq, stride_m, scale, first_row, count, has_any, left,
                       BLOCK_D // 64, BLOCK_D % 64)  # fmt: skip


@gluon.jit
def sum_of_parts(sums, number, splits, step, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """The sum of ``splits`` pieces of SIZE numbers, ``step`` apart, in their order."""
    BATCH: gl.constexpr = 4  # loaded before the first one is added
    sums += number + gl.arange(0, SIZE, layout=LAYOUT)
    total = gl.zeros([SIZE], gl.float32, LAYOUT)
    for i in range(0, splits, BATCH):
        loaded = ()
        for j in gl.static_range(BATCH):
            here = gl.full([SIZE], i + j, gl.int32, LAYOUT) < splits
            loaded += (gl.load(sums + j * step, mask=here, other=0.0),)
        for j in gl.static_range(BATCH):
            total += loaded[j]
        sums += BATCH * step
    return total


@gluon.jit
def store_strip(total, factor, grad, stride_m, rows, first_column, count,
                HEAD_DIM: gl.constexpr, COLUMNS: gl.constexpr):  # fmt: skip
    """Write ``factor`` times 16 ``rows`` of sums, those before ``count``."""
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    # Undo flat_register_order, of one warp.
    strip = total.reshape([COLUMNS // 8, 8, 4, 2, 2]).permute([3, 1, 0, 2, 4])
    values = (strip.reshape([16, COLUMNS]) * factor).to(grad.dtype.element_ty)
    rows += gl.arange(0, 16, layout=gl.SliceLayout(1, STORED))
    columns = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, STORED))
    mask = gl.expand_dims(rows < count, 1) & gl.expand_dims(columns < HEAD_DIM, 0)
    at = gl.expand_dims(rows.to(gl.int64) * stride_m, 1) + gl.expand_dims(columns, 0)
    gl.store(grad + at, gl.convert_layout(values, STORED), mask=mask)


@gluon.jit(
    do_not_specialize=(
        "splits", "nheads_k", "key_blocks", "sequences", "seqlen_q", "seqlen_k", "window_left",
        "chunk", "batch_size",
    ),
    do_not_specialize_on_alignment=("bounds_q", "table", "used_q", "used_k"),
)  # fmt: skip
def finish_keys_sm90(
    dk_sums, dv_sums, dk, dv, stride_kb, stride_km, stride_kh, stride_vb, stride_vm, stride_vh,
    scale, splits, nheads_k, key_blocks, sequences, seqlen_q, seqlen_k, window_left, chunk,
    bounds_q, table, used_q, used_k, batch_size,
    HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, BLOCK_D: gl.constexpr, PIECE: gl.constexpr,
    BLOCK_N: gl.constexpr, CU_Q: gl.constexpr, CU_K: gl.constexpr, USED_Q: gl.constexpr,
    USED_K: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_CHUNK: gl.constexpr,
):  # fmt: skip
    """dk = scale * sums and dv = sums of the ``splits`` parts of a key head, added in their order:
    16 keys and PIECE columns of each of both.

    Args:
        dk_sums, dv_sums: what the main kernel left: for each of ``splits`` * ``sequences`` parts
            and ``key_blocks`` blocks of BLOCK_N keys, for each 64 of these and each PIECE of
            BLOCK_D columns, one tile in the order of flat_register_order.
        nheads_k, sequences: as in the main kernel, but of whole key heads.
        dk, dv: (batch, seqlen_k, nheads_k, headdim) with strides, columns next to each other, and
            with CU_K (total, nheads_k, headdim). With HAS_LEFT and lengths on the device, keys
            before every query's window are left as they are.
    """
    allow_dependents()
    RAGGED: gl.constexpr = CU_Q or CU_K or USED_Q or USED_K
    PIECES: gl.constexpr = BLOCK_D // PIECE
    STRIPS: gl.constexpr = BLOCK_N // 16 * PIECES
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    pid = gl.program_id(0)
    program = pid // STRIPS
    strip = pid % STRIPS // PIECES
    piece = pid % PIECES
    grid = Grid(nheads_k, key_blocks, sequences, sequences, False)
    batch, head, key_block = grid.place(program)
    first = key_block * BLOCK_N
    count = seqlen_k
    row = batch * 0
    if RAGGED:
        lengths = Lengths(bounds_q, table, tiles_of_blocks(key_blocks, BLOCK_N), used_q, used_k,
                          batch_size, seqlen_q, seqlen_k, window_left, chunk, CU_Q, CU_K, USED_Q,
                          USED_K, HAS_LEFT, HAS_CHUNK)  # fmt: skip
        _, _, first, row, count, _, _ = lengths.keys(grid, program, BLOCK_N)
        row -= batch * seqlen_k  # all packed sequences are the first one
    rows = first + strip * 16
    block = (batch * nheads_k + head).to(gl.int64) * splits * key_blocks + key_block
    tile = (block * (BLOCK_N // 64) + strip // 4) * PIECES + piece
    number = (tile * 4 + strip % 4) * (16 * PIECE)
    step = key_blocks.to(gl.int64) * (BLOCK_N * BLOCK_D)
    b64 = batch.to(gl.int64)
    row64 = row.to(gl.int64)
    dk += b64 * stride_kb + head.to(gl.int64) * stride_kh + row64 * stride_km
    dv += b64 * stride_vb + head.to(gl.int64) * stride_vh + row64 * stride_vm
    wait_for_dependencies()
    total = sum_of_parts(dk_sums, number, splits, step, 16 * PIECE, LAYOUT)
    store_strip(total, scale, dk, stride_km, rows, piece * PIECE, count, HEAD_DIM, PIECE)
    total = sum_of_parts(dv_sums, number, splits, step, 16 * PIECE, LAYOUT)
    store_strip(total, 1.0, dv, stride_vm, rows, piece * PIECE, count, HEAD_DIM_V, PIECE)
