"""dq of the Hopper backward in a kernel of its own, for head dims above 128; the formulas are
``sm90_backward``'s.

A program owns 128 queries of one head, 64 for each of two consumers, and walks over the blocks of
64 keys that they see:

    S = q k^T, P = exp2(S - lse), dP = do v^T, dS = P (dP - delta), dQ += dS k

S and dP are multiplied here as well as where dk and dv are, so all gradients take seven products
where one kernel for all takes five. But dq stays in registers: nobody adds to sums in memory, which
at 256 columns are what one kernel waits for. There is no workspace, and dq has the same bits every
time.

While a consumer computes dS, the other one's products run. A producer warp asks for all tiles. In
shared memory a tile of BLOCK_D columns is BLOCK_D / PIECE buffers, as in ``sm90_backward_wide``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_async import (
    aggregate,
    allow_dependents,
    opaque_zero,
    tma_store,
    wait_for_dependencies,
)
from .sm90_backward_wide import (
    add_by_rows,
    again,
    ask_for_pieces,
    wait_for_sums,
)
from .sm90_backward_work import (
    ROWS,
    Grid,
    Lengths,
    Ring,
    Span,
    buffers_for,
    bytes_of,
    clamp,
    coordinates,
    new_ring,
    padded_start,
    rows_from,
    whole_sequence,
)


@aggregate
class Shared:
    """All shared memory. ``q`` and ``do`` have a slot for each consumer, used once. A slot is
    PIECES buffers of 64 rows and PIECE columns."""

    q: Ring
    do: Ring
    k: Ring
    v: Ring
    PIECE: gl.constexpr
    PIECES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, q, do, k, v, PIECE, PIECES):
        self.q = q
        self.do = do
        self.k = k
        self.v = v
        self.PIECE = gl.constexpr(PIECE)
        self.PIECES = gl.constexpr(PIECES)

    @gluon.jit
    def piece(self, ring, use, NUMBER: gl.constexpr):
        """(ROWS, PIECE): some of the columns of the block in use."""
        buffer = ring.data.index(use % ring.SLOTS * self.PIECES + NUMBER)
        return buffer.reshape([ROWS, self.PIECE])


@aggregate
class Rows:
    """A program's rows from ``first_row`` on, and the ``blocks`` blocks of keys from
    ``first_block`` on that some of them see.

    A query at row r sees the keys [r - reach_left, r + reach_right], as far as there are such
    bounds, before seqlen_k. ``first_sum`` is the first row in the padded statistics. ``queries``
    and ``keys`` are where the rows in use lie, and ``lengths`` says where all are: see mirrored.
    """

    scale: gl.tensor
    scale_log2: gl.tensor
    cap_log2: gl.tensor
    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    reach_left: gl.tensor
    reach_right: gl.tensor
    first_row: gl.tensor
    first_sum: gl.tensor
    first_block: gl.tensor
    blocks: gl.tensor
    queries: Span
    keys: Span
    grid: Grid
    lengths: Lengths
    DQ_FIRST: gl.constexpr
    SOFTCAP: gl.constexpr
    HAS_LEFT: gl.constexpr
    HAS_RIGHT: gl.constexpr
    RAGGED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, scale, scale_log2, cap_log2, seqlen_q, seqlen_k, reach_left, reach_right,
                 first_row, first_sum, first_block, blocks, queries, keys, grid, lengths, DQ_FIRST,
                 SOFTCAP, HAS_LEFT, HAS_RIGHT, RAGGED):  # fmt: skip
        self.scale = scale
        self.scale_log2 = scale_log2
        self.cap_log2 = cap_log2
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self.reach_left = reach_left
        self.reach_right = reach_right
        self.first_row = first_row
        self.first_sum = first_sum
        self.first_block = first_block
        self.blocks = blocks
        self.queries = queries
        self.keys = keys
        self.grid = grid
        self.lengths = lengths
        self.DQ_FIRST = gl.constexpr(DQ_FIRST)
        self.SOFTCAP = gl.constexpr(SOFTCAP)
        self.HAS_LEFT = gl.constexpr(HAS_LEFT)
        self.HAS_RIGHT = gl.constexpr(HAS_RIGHT)
        self.RAGGED = gl.constexpr(RAGGED)


@gluon.jit
def mirrored(bounds_k, table, tiles, used_q, used_k, batch_size, seqlen_q, seqlen_k,
             CU_Q: gl.constexpr, CU_K: gl.constexpr, USED_Q: gl.constexpr,
             USED_K: gl.constexpr):  # fmt: skip
    """Lengths with queries and keys in each other's place: ``keys`` finds a program's queries in
    the table of their tiles, and ``queries`` a sequence's keys."""
    zero = gl.to_tensor(0)
    return Lengths(bounds_k, table, tiles, used_k, used_q, batch_size, seqlen_k, seqlen_q, zero,
                   zero, CU_K, CU_Q, USED_K, USED_Q, False, False)  # fmt: skip


@gluon.jit
def blocks_of_rows(first_row, COUNT: gl.constexpr, seqlen_q, seqlen_k, reach_left, reach_right,
                   HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    """(first, end) of the blocks of keys that some of COUNT rows see; end <= first for none."""
    first_key = gl.to_tensor(0)
    end_key = seqlen_k
    if HAS_LEFT:
        first_key = gl.maximum(first_row - reach_left, 0)
    if HAS_RIGHT:
        last_row = gl.minimum(first_row + COUNT, seqlen_q) - 1
        end_key = gl.minimum(last_row + reach_right + 1, seqlen_k)
    end_key = gl.where(first_row < seqlen_q, gl.maximum(end_key, 0), 0)
    return first_key // ROWS, (end_key + ROWS - 1) // ROWS


# ---------------------------------------------------------------------------------------- producer
@gluon.jit
def ask(desc, span, head, row, shared, ring, use):
    """Start loading a block of rows into a slot."""
    full = ring.full.index(use % ring.SLOTS)
    mbarrier.expect(full, shared.PIECES * bytes_of(desc.block_type))
    ask_for_pieces(desc, span, head, row, shared, ring, use)


@gluon.jit
def producer(work, shared, group, q_desc, k_desc, v_desc, do_desc):
    """Ask for everything that the consumers read, in the order in which they do."""
    _, head, _ = work.grid.place(gl.program_id(0))
    key_head = head // group
    for i in range(work.blocks):
        key = (work.first_block + i) * ROWS
        shared.k.wait_empty(i)
        ask(k_desc, work.keys, key_head, key, shared, shared.k, i)
        if i == 0:
            for lane in gl.static_range(2):
                row = work.first_row + lane * ROWS
                ask(q_desc, work.queries, head, row, shared, shared.q, lane)
        shared.v.wait_empty(i)
        ask(v_desc, work.keys, key_head, key, shared, shared.v, i)
        if i == 0:
            for lane in gl.static_range(2):
                row = work.first_row + lane * ROWS
                ask(do_desc, work.queries, head, row, shared, shared.do, lane)
    allow_dependents()
    # What runs after this launch wants dk and dv as well: this one does not end before the one
    # before it, on which nothing here depends.
    wait_for_dependencies()


# --------------------------------------------------------------------------------------- consumers
@gluon.jit
def start_product(shared, left, left_use, right, right_use, zeros):
    """Start left right^T, (ROWS, ROWS), of all columns: as many products as there are pieces."""
    product = zeros
    for j in gl.static_range(shared.PIECES):
        a = shared.piece(left, left_use, j)
        b = shared.piece(right, right_use, j).permute([1, 0])
        product = warpgroup_mma(a, b, product, use_acc=j > 0, is_async=True)
    return product


@gluon.jit
def pass_over(shared, first, end):
    """Release blocks that none of the consumer's rows sees."""
    for i in range(first, end):
        shared.k.wait_full(i)
        shared.k.release(i)
        shared.v.wait_full(i)
        shared.v.release(i)


@gluon.jit
def mask_weights(work, p, first_row, first_key):
    """0 where a query does not see a key; ``p`` is (ROWS queries, ROWS keys).

    Taken apart as in sm90_backward.mask_weights.
    """
    WEIGHTS: gl.constexpr = p.type.layout
    parts = p.reshape([ROWS, ROWS // 8, 4, 2])
    PARTS: gl.constexpr = parts.type.layout
    A: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, PARTS)))
    T: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, PARTS)))
    C: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, PARTS)))
    R: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PARTS)))
    column = gl.arange(0, ROWS // 8, layout=A)[None, :, None, None] * 8
    column = column + gl.arange(0, 2, layout=C)[None, None, None, :]
    origin = gl.arange(0, 4, layout=T)[None, None, :, None] * 2 + first_key
    row = first_row + gl.arange(0, ROWS, layout=R)
    last = row * 0 + (work.seqlen_k - 1)
    if work.HAS_RIGHT:
        last = gl.minimum(last, row + work.reach_right)
    seen = column <= last[:, None, None, None] - origin
    if work.HAS_LEFT:
        first = row - work.reach_left
        seen = seen & (column >= first[:, None, None, None] - origin)
    parts = gl.where(seen, parts, 0.0)
    return gl.convert_layout(parts.reshape([ROWS, ROWS]), WEIGHTS, assert_trivial=True)


@gluon.jit
def mask_if_needed(work, p, first_row, first_key):
    """Weights of ROWS queries, masked unless each of them sees every key of the block."""
    outside = first_key + ROWS > work.seqlen_k
    if work.HAS_RIGHT:
        outside = outside | (first_row + work.reach_right < first_key + ROWS - 1)
    if work.HAS_LEFT:
        outside = outside | (first_row + ROWS - 1 - work.reach_left > first_key)
    if outside:
        p = mask_weights(work, p, first_row, first_key)
    return p


@gluon.jit
def weights_of(work, s, lse, first_row, i):
    """P of the i-th block, with SOFTCAP times the slope of tanh: see sm90_backward_wide.capped.
    Then ``lse`` is less by 3 caps."""
    if work.SOFTCAP:
        u = 1.0 + 1.0 / (gl.exp2(s * work.scale_log2) + 1.0)
        p = gl.exp2(u * (-2.0 * work.cap_log2) - lse)
        p = p * (4.0 * (u - 1.0) * (2.0 - u))
    else:
        p = gl.exp2(s * work.scale_log2 - lse)
    first_key = (work.first_block + i) * ROWS + opaque_zero()
    return mask_if_needed(work, p, first_row, first_key)


@gluon.jit
def consumer(LANE: gl.constexpr, work, shared, lse_log2, delta, dq_desc):
    """dq of the LANE-th 64 of the program's rows."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shared.PIECE, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    PIECES: gl.constexpr = shared.PIECES
    dtype: gl.constexpr = dq_desc.dtype

    first_row = work.first_row + LANE * ROWS
    first, end = blocks_of_rows(first_row, ROWS, work.seqlen_q, work.seqlen_k, work.reach_left,
                                work.reach_right, work.HAS_LEFT, work.HAS_RIGHT)  # fmt: skip
    # The consumer's own of the program's blocks, [begin, stop); if it has none, one that is masked.
    has_any = work.blocks > 0
    begin = gl.maximum(gl.minimum(first - work.first_block, work.blocks - 1), 0)
    stop = gl.maximum(gl.minimum(end - work.first_block, work.blocks), begin + 1)
    # These come from the launch before the one before this one, whose programs have all waited for
    # it; what this multiprocessor may have had in its cache before is not asked.
    at = work.first_sum + LANE * ROWS + gl.arange(0, ROWS, layout=ROW)
    lse = gl.expand_dims(gl.load(lse_log2 + at, cache_modifier=".cg"), 1)
    if work.SOFTCAP:
        lse -= 3.0 * work.cap_log2
    row_delta = gl.expand_dims(gl.load(delta + at, cache_modifier=".cg"), 1)

    dq = (gl.zeros([ROWS, shared.PIECE], gl.float32, SUMS),) * PIECES
    zeros = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    pass_over(shared, 0, begin)
    if has_any:  # otherwise it multiplies what lies in shared memory, for nobody
        shared.q.wait_full(LANE)
        shared.k.wait_full(begin)
    s = start_product(shared, shared.q, LANE + opaque_zero(), shared.k, begin, zeros)
    if has_any:
        shared.do.wait_full(LANE)
        shared.v.wait_full(begin)
    dp = start_product(shared, shared.do, LANE + opaque_zero(), shared.v, begin, zeros)
    s = warpgroup_mma_wait(PIECES, deps=[s])
    p = weights_of(work, s, lse, first_row, begin)
    dp = warpgroup_mma_wait(0, deps=[dp])
    if has_any:
        shared.v.release(begin)
    ds = gl.convert_layout((p * (dp - row_delta)).to(dtype), OPERAND)
    for i in range(begin + 1, stop):
        if work.DQ_FIRST:
            dq = add_by_rows(shared, ds, shared.k, i - 1, dq)
        shared.k.wait_full(i)
        s = start_product(shared, shared.q, LANE + opaque_zero(), shared.k, i, zeros)
        if work.DQ_FIRST:
            # Before dP is started, whose registers dS has until here.
            dq = wait_for_sums(shared, dq, PIECES)
            shared.k.release(i - 1)
        shared.v.wait_full(i)
        dp = start_product(shared, shared.do, LANE + opaque_zero(), shared.v, i, zeros)
        if not work.DQ_FIRST:
            dq = add_by_rows(shared, ds, shared.k, i - 1, dq)
        s = warpgroup_mma_wait(PIECES if work.DQ_FIRST else 2 * PIECES, deps=[s])
        p = weights_of(work, s, lse, first_row, i)
        dp = warpgroup_mma_wait(0 if work.DQ_FIRST else PIECES, deps=[dp])
        shared.v.release(i)
        p = p * (dp - row_delta)
        if not work.DQ_FIRST:
            dq = wait_for_sums(shared, dq, 0)
            shared.k.release(i - 1)
        ds = gl.convert_layout(p.to(dtype), OPERAND)
    dq = add_by_rows(shared, ds, shared.k, stop - 1, dq)
    dq = wait_for_sums(shared, dq, 0)
    if has_any:
        shared.k.release(stop - 1)
    pass_over(shared, stop, work.blocks)

    # The consumer's q is read no more: the way out.
    for j in gl.static_range(PIECES):
        values = gl.where(has_any, dq[j] * work.scale, 0.0)
        shared.piece(shared.q, LANE, j).store(values.to(dtype))
    fence_async_shared()
    grid = again(work.grid)
    if work.RAGGED:  # rows that are not in use get zeros too
        _, head, tile_row, start, count, _, _ = work.lengths.keys(grid, gl.program_id(0))
        span = rows_from(start, count)
    else:
        batch, head, tile = grid.place(gl.program_id(0))
        tile_row = tile * (2 * ROWS)
        span = whole_sequence(batch)
    for j in gl.static_range(PIECES):
        at_piece = coordinates(span, head, tile_row + LANE * ROWS, j * shared.PIECE)
        tma_store(dq_desc, at_piece, shared.q.data.index(LANE * PIECES + j))
    tma.store_wait(0)


# ------------------------------------------------------------------------------------------ kernel
_NUMBERS = (
    "nheads", "group", "seqlen_q", "seqlen_k", "padded_rows", "window_left", "window_right",
    "row_tiles", "sequences", "section", "batch_size",
)  # fmt: skip
_POINTERS = ("bounds_k", "table", "used_q", "used_k")


@gluon.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def attention_backward_rows_sm90(
    q_desc, k_desc, v_desc, do_desc, dq_desc, lse_log2, delta, scale, scale_log2, cap_log2,
    nheads, group, seqlen_q, seqlen_k, padded_rows, window_left, window_right, row_tiles,
    sequences, section, bounds_k, table, used_q, used_k, batch_size,
    BLOCK_D: gl.constexpr, PIECE: gl.constexpr, K_SLOTS: gl.constexpr, V_SLOTS: gl.constexpr,
    DQ_FIRST: gl.constexpr, REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
    SOFTCAP: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, CU_Q: gl.constexpr,
    CU_K: gl.constexpr, USED_Q: gl.constexpr, USED_K: gl.constexpr,
):  # fmt: skip
    """See the module's docstring; launched with 4 warps, those of the first consumer.

    The launch before it is that of ``attention_backward_wide_sm90``, and need not have ended.

    Args:
        q_desc, do_desc, dq_desc: TMA descriptors of (batch, nheads, seqlen_q, headdim) with blocks
            (1, 1, 64, PIECE); columns past headdim are read as 0 and not written.
        k_desc, v_desc: of (batch, nheads_k, seqlen_k, headdim), likewise.
        lse_log2, delta: (batch * nheads, padded_rows) float32, see row_statistics_sm90; padded_rows
            is a multiple of 128.
        scale, scale_log2, cap_log2: as in attention_backward_sm90.
        group: query heads of a key head.
        row_tiles: padded_rows / 128, with CU_Q the tiles of tiles_sm90.
        sequences, section: batch * nheads, with CU_Q nheads, and how many of them are worked on at
            a time.
        bounds_k, table, used_q, used_k, batch_size: see Lengths, with queries and keys in each
            other's place; with CU_K, CU_Q, USED_Q and USED_K alone. With any of these all
            descriptors are ragged, see Span; seqlen_q and seqlen_k are totals with CU_Q and CU_K,
            padded_rows with CU_Q too.
        BLOCK_D: columns that are computed, a multiple of PIECE; PIECE: 64, 128 or 256.
        DQ_FIRST: a block's dQ is started before the next block's S, not behind its dP: its keys
            are released earlier, and dS is computed while only the other consumer's products run.
        REGISTERS, OTHER_REGISTERS: of a thread of the second consumer (the first one gets what is
            left) and of the producer.
    """
    gl.static_assert(BLOCK_D % PIECE == 0)
    gl.static_assert(K_SLOTS >= 2)  # a block of keys is released after the next one is waited for
    RAGGED: gl.constexpr = CU_Q or CU_K or USED_Q or USED_K
    PIECES: gl.constexpr = BLOCK_D // PIECE
    shared = Shared(
        new_ring(buffers_for(q_desc, 2 * PIECES), 2, 1, 0),
        new_ring(buffers_for(do_desc, 2 * PIECES), 2, 1, 0),
        new_ring(buffers_for(k_desc, K_SLOTS * PIECES), K_SLOTS, 1, 2),
        new_ring(buffers_for(v_desc, V_SLOTS * PIECES), V_SLOTS, 1, 2),
        PIECE, PIECES,
    )  # fmt: skip
    fence_async_shared()
    # The last rows first: with a right bound they see most keys.
    grid = Grid(nheads, row_tiles, sequences, section, HAS_RIGHT)
    lengths = mirrored(bounds_k, table, row_tiles, used_q, used_k, batch_size, seqlen_q, seqlen_k,
                       CU_Q, CU_K, USED_Q, USED_K)  # fmt: skip
    count_q = seqlen_q + opaque_zero()
    count_k = seqlen_k + opaque_zero()
    start_q = gl.to_tensor(0)
    if RAGGED:
        batch, head, first_row, start_q, _, count_q, _ = lengths.keys(grid, gl.program_id(0))
        start_k, count_k = lengths.queries(batch)
        if HAS_LEFT:  # keys before every query's window may be anything
            unseen = clamp(count_k - count_q - window_left, 0, count_k)
            start_k += unseen
            count_k -= unseen
        queries = rows_from(start_q, count_q)
        keys = rows_from(start_k, count_k)
    else:
        batch, head, tile = grid.place(gl.program_id(0))
        first_row = tile * (2 * ROWS)
        queries = whole_sequence(batch)
        keys = whole_sequence(batch)
    shift = count_k - count_q
    reach_left = window_left - shift
    reach_right = window_right + shift
    first, end = blocks_of_rows(
        first_row, 2 * ROWS, count_q, count_k, reach_left, reach_right, HAS_LEFT, HAS_RIGHT
    )
    blocks = gl.maximum(end - first, 0)
    first_sum = head * padded_rows + first_row
    if CU_Q:  # rows of no sequence have no statistics
        first_sum = gl.where(blocks > 0, first_sum + padded_start(start_q, batch), 0)
    else:
        first_sum += batch * nheads * padded_rows
    work = Rows(scale, scale_log2, cap_log2, count_q, count_k, reach_left, reach_right, first_row,
                first_sum, first, blocks, queries, keys, grid, lengths, DQ_FIRST, SOFTCAP, HAS_LEFT,
                HAS_RIGHT, RAGGED)  # fmt: skip
    # The list has to be spelled out: in tuples bound to a name, constants become tensors.
    gl.warp_specialize([
        (consumer, (0, work, shared, lse_log2, delta, dq_desc)),
        (consumer, (1, work, shared, lse_log2, delta, dq_desc)),
        (producer, (work, shared, group, q_desc, k_desc, v_desc, do_desc)),
    ], [4, 1], [REGISTERS, OTHER_REGISTERS])  # fmt: skip
