"""Attention forward for Hopper: TMA and warpgroup MMA in specialised warps.

    out[i] = sum_j exp(score[i, j] - lse[i]) v[j],  lse[i] = log sum_j exp(score[i, j])

A program has one producer warpgroup (with SLIM a warp), whose only task is to ask for tiles of q, k
and v, and CONSUMERS warpgroups that compute 64 rows each of the same tile of 64 * CONSUMERS
queries. They meet in rings of shared memory: for each slot a barrier says "full" (TMA has written
it) and another "empty" (all its readers are done). A consumer keeps scores, probabilities and the
unnormalised output in registers and walks over the keys that some row of the tile sees, from the
last block to the first, one step ahead with the first product:

    S = q k[0]^T;  P = softmax step of S
    for i = 1 ..: start S = q k[i]^T and O += P v[i - 1]; wait for S; softmax step; wait for O
    O += P v[last]; normalise; store

The softmax step subtracts from a row's scores a reference m, the largest score so far, but m stays
as it is while weights exp(score - m) stay below 2^MOST_GROWTH; only when m moves are O and the row
sums l rescaled, by the warps that hold such a row. Any m is exact: out = O / l and lse = m + log l
hold with the same m in all three. What m is for is that nothing overflows, and nothing does:
weights up to 256 fit float16 (65504), their sums are float32, and rounding of floating weights is
relative. Weights are never smaller than with the largest score, so no more of them vanish.

Tensors are described to TMA with their own bounds in every sequence, so rows past a sequence's end
are read as 0 and never written, whatever lies there. Scores past the end are masked besides. One
loop serves masked and unmasked blocks by a branch: two loops would keep P in different registers.

With LENGTHS the sequences' places and lengths are known on the device alone: rows behind a sequence
may hold anything, also NaN. Scores there are masked, values there are set to 0 in shared memory by
every consumer that is about to use such a block (all write the same), and a tile that ends before
its 64 rows do is stored by pointers. The producer finds the tile and tells the consumers its
numbers. Keys in front of the first row's window are dealt with like those behind a sequence.

With PACK a tile holds fewer positions, but each for all PACK query heads that share keys and
values: first all positions of one head, then those of the next. PACK divides a consumer's 64 rows,
so each consumer has all heads for positions of its own, and to TMA they are a block of
(PACK, 64 / PACK) rows of neighbouring heads. Apart from masks, addresses and what is said of a
head, nobody notices.

Head dims 96 and 192 are no powers of two, as the language wants tensors to be: their tiles lie in
three pieces of 32 or 64 columns, each loaded and stored by itself. The first two pieces of values,
which lie side by side, are multiplied at once: products of 32 columns cost more than half of those
of 64.

With P_SHARED half of a block's weights are multiplied from shared memory: registers hold a block's
scores, the output, and the other half. They are stored when the products with the values before
have been waited for, in a buffer of the consumer's own.

With JOINT keys and values share one ring, whose slots are used in the order in which the consumers
need them: k[0], k[1], v[0], k[2], v[1], .., v[last]. Three slots are enough for that, where two
rings need four.

SCHEDULER says how programs find tiles: ROUND_ROBIN (a program takes every n-th tile), DYNAMIC (the
producer takes the next tile from a counter in global memory while the consumers still compute, and
tells them through a mailbox; the last fetch of a launch sets the counter back to 0).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_compat import group_barrier
from .sm90_forward_producer import RECORD, announced_tile, index_after, producer, scheduler
from .sm90_forward_softmax import (
    MOST_GROWTH,
    biased,
    capped,
    declare_flag,
    finish_rows,
    growth_of,
    mask_if_needed,
    partial_sums,
    settle_maximum,
    slopes_of,
    warp_has_moved,
    weights_of,
)
from .sm90_forward_store import Destination, normalised, store_columns, store_pieces, store_rows
from .sm90_forward_work import (
    DYNAMIC,
    ROWS,
    SHAPES,
    Config,
    Sequences,
    Shared,
    Work,
    afresh,
    blocks_to_skip,
    buffers_for,
    entry_of,
    first_key_of,
    head_of,
    key_use,
    new_ring,
    program_of,
    row_of,
    tile_at,
    uses_of,
    value_use,
)

# The first hardware barrier that the compiler leaves alone.
FIRST_BARRIER = gl.constexpr(8)


# ----------------------------------------------------------------------------------------- consumer
@gluon.constexpr_function
def barrier_instruction(kind, number):
    """A hardware barrier between two warpgroups, as an instruction that yields 0."""
    return f"bar.{kind} {number}, 256; mov.b32 $0, 0;"


@gluon.jit
def take_turn(KIND: gl.constexpr, LANE: gl.constexpr):
    """Wait for ("sync") or give ("arrive") consumer LANE's turn to start products."""
    gl.inline_asm_elementwise(barrier_instruction(KIND, FIRST_BARRIER + LANE), "=r", [],
                              dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def now():
    return gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], dtype=gl.int32,
                                     is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def nanoseconds():
    return gl.inline_asm_elementwise("mov.u32 $0, %globaltimer_lo;", "=r", [], dtype=gl.int32,
                                     is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def scores(work, shared, zeros, tile_use, block_use, LANE: gl.constexpr):
    """Start q k^T of the slots: PIECES products."""
    PIECES: gl.constexpr = work.config.PIECES
    COLUMNS: gl.constexpr = work.config.BLOCK_D // PIECES
    q_slot = shared.q.index(tile_use, LANE) * PIECES
    k_slot = shared.k.index(block_use, 0) * PIECES
    s = zeros
    for piece in gl.static_range(PIECES):
        q = shared.q.data.index(q_slot + piece).reshape([ROWS, COLUMNS])
        k = shared.k.data.index(k_slot + piece).reshape([work.config.BLOCK_N, COLUMNS])
        s = warpgroup_mma(q, k.permute([1, 0]), s, use_acc=piece > 0, is_async=True)
    return s


@gluon.jit
def first_scores(work, shared, zeros, tile_use, block_use, skipped, LANE: gl.constexpr):
    """Start the first product of a tile; blocks that this consumer skips are released unread."""
    for at in range(block_use, block_use + skipped):
        use = key_use(work, block_use, at - block_use)
        shared.k.wait_full(use, 0)
        shared.k.release(use, 0)
        # Never the tile's last block.
        use = value_use(work, block_use, at - block_use, skipped + 1)
        shared.v.wait_full(use, 0)
        shared.v.release(use, 0)
    use = key_use(work, block_use, skipped)
    shared.q.wait_full(tile_use, LANE)
    shared.k.wait_full(use, 0)
    return scores(work, shared, zeros, tile_use, use, LANE)


@gluon.jit
def put_weights(work, shared, p, LAYOUT: gl.constexpr, LANE: gl.constexpr):
    """The weights of the block's first keys in ``LAYOUT``; those of the last P_SHARED keys go to
    the consumer's buffer, where products that read the ones before have been waited for."""
    N: gl.constexpr = work.config.P_SHARED
    if N > 0:
        HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
        p, last = p.reshape([ROWS, 2, N]).permute([0, 2, 1]).split()
        shared.p.index(LANE).store(gl.convert_layout(last, HALF, assert_trivial=True))
        fence_async_shared()
    return gl.convert_layout(p, LAYOUT)


@gluon.jit
def add_values(work, shared, weights, acc, block_use, LANE: gl.constexpr, FIRST: gl.constexpr,
               COUNT: gl.constexpr):  # fmt: skip
    """Start acc += weights v of the slot, of COUNT pieces of its columns from the FIRST on.

    The last P_SHARED keys' weights are those in the consumer's buffer.
    """
    BLOCK_N: gl.constexpr = work.config.BLOCK_N
    COLUMNS: gl.constexpr = work.config.BLOCK_DV // work.config.PIECES_V
    v = shared.v.data.index(shared.v.index(block_use, 0) * work.config.PIECES_V + FIRST)
    if COUNT == 1:
        v = v.reshape([BLOCK_N, COLUMNS])
    else:
        # Blocks of columns as wide as the swizzle follow each other in memory, as the pieces do.
        BESIDE: gl.constexpr = gl.NVMMASharedLayout(2 * COLUMNS, 16, 2)
        v = v._reinterpret(v.dtype, [BLOCK_N, COUNT * COLUMNS], BESIDE)
    IN_REGISTERS: gl.constexpr = BLOCK_N - work.config.P_SHARED
    acc = warpgroup_mma(weights, v.slice(0, IN_REGISTERS), acc, is_async=True)
    if IN_REGISTERS < BLOCK_N:
        last = v.slice(IN_REGISTERS, BLOCK_N - IN_REGISTERS)
        acc = warpgroup_mma(shared.p.index(LANE), last, acc, is_async=True)
    return acc


@gluon.jit
def clear_values(work, shared, use, first, end):
    """Set the slot's values outside of rows [first, end) to 0: nobody sees them, NaN may lie there.

    Every consumer does it for itself, all writing the same.
    """
    BLOCK_N: gl.constexpr = work.config.BLOCK_N
    PIECES_V: gl.constexpr = work.config.PIECES_V
    COLUMNS: gl.constexpr = work.config.BLOCK_DV // PIECES_V
    STEP: gl.constexpr = 16
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    if (first > 0) | (end < BLOCK_N):
        shared.v.wait_full(use, 0)
        slot = shared.v.index(use, 0) * PIECES_V
        for piece in gl.static_range(PIECES_V):
            v = shared.v.data.index(slot + piece).reshape([BLOCK_N, COLUMNS])
            for part in gl.static_range(0, BLOCK_N, STEP):
                if (part < first) | (part + STEP > end):
                    rows = v.slice(part, STEP)
                    row = part + gl.arange(0, STEP, layout=gl.SliceLayout(1, BY_ROW))
                    inside = (row >= first) & (row < end)
                    rows.store(gl.where(gl.expand_dims(inside, 1), rows.load(BY_ROW), 0.0))
        fence_async_shared()
        group_barrier()


@gluon.jit
def consumer(LANE: gl.constexpr, work, shared, target, lse, sinks):
    """Compute POSITIONS positions of every tile, from the (LANE * POSITIONS)-th on."""
    config = work.config
    BLOCK_N: gl.constexpr = config.BLOCK_N
    PARTS_V: gl.constexpr = config.PARTS_V
    # Columns of a piece, and pieces and columns of the first accumulator.
    PIECE: gl.constexpr = config.BLOCK_DV // config.PIECES_V
    FIRST: gl.constexpr = 2 if PARTS_V > 1 else 1
    BLOCK_DV: gl.constexpr = FIRST * PIECE
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    OUTPUT_PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    WEIGHTS_1: gl.constexpr = gl.DotOperandLayout(0, OUTPUT_PIECE, 2)
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    PIECE_ROWS: gl.constexpr = gl.SliceLayout(1, OUTPUT_PIECE)
    MASKED: gl.constexpr = (config.HAS_LEFT or config.HAS_RIGHT) and not config.PEEL
    # Uses from one block to the next, and from values to the keys of the block after theirs.
    STEP: gl.constexpr = 2 if config.JOINT else 1
    TO_KEYS: gl.constexpr = -1 if config.JOINT else 1
    DTYPE: gl.constexpr = target.desc.dtype
    if config.PING_PONG and LANE == config.CONSUMERS - 1:
        take_turn("arrive", 0)  # consumer 0 goes first
    gl.inline_asm_elementwise(declare_flag(LANE), "=r", [], dtype=gl.int32, is_pure=False,
                              pack=1)  # fmt: skip
    most_growth = MOST_GROWTH / work.scale_log2
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    index = program_of(work)
    if config.TRACE:
        record = work.trace + (gl.program_id(0) * config.CONSUMERS + LANE) * (66 * 16)
        gl.store(record, nanoseconds())
        gl.store(record + 1, now())
    block_use = 0
    tile_use = 0
    if config.LENGTHS != SHAPES:
        index, tile = announced_tile(work, shared.mailbox, 0)
    while index < work.tiles:
        if config.TRACE:
            at_top = now()
        work_here = afresh(work)
        if config.LENGTHS == SHAPES:
            tile = tile_at(work_here, index)
        skipped = blocks_to_skip(work, tile, LANE)
        s = first_scores(work, shared, zeros, tile_use, block_use, skipped, LANE)
        s = warpgroup_mma_wait(0, deps=[s])
        shared.k.release(key_use(work, block_use, skipped), 0)
        if config.TRACE:
            at_scores = now()
            wait_k = 0
            wait_v = 0
            wait_s = 0
        if config.PING_PONG:
            # Consumers that skip blocks still take their turns.
            for _ in range(skipped):
                take_turn("sync", LANE)
                take_turn("arrive", (LANE + 1) % config.CONSUMERS)
        span = tile.span
        first_row = tile.first_row + LANE * config.POSITIONS
        if tile.blocks - skipped == 1:
            shared.q.release(tile_use, LANE)

        # The first block.
        first_key = (tile.first_block + tile.blocks - 1 - skipped) * BLOCK_N
        slope = slopes_of(work, span, SCORE_ROWS)
        s = biased(work, span, capped(work, s), first_row, first_key, slope)
        s = mask_if_needed(work, span, s, first_row, first_key)
        m = gl.max(s, 1)
        p, shift = weights_of(work, s, m, True)
        l = partial_sums(p, BLOCK_N)
        weights = put_weights(work, shared, p.to(DTYPE), WEIGHTS, LANE)
        acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, OUTPUT)
        if PARTS_V > 1:
            acc_1 = gl.zeros([ROWS, PIECE], gl.float32, OUTPUT_PIECE)

        # The others: scores of block i and values of block i - 1 at a time.
        use = value_use(work, block_use, skipped, tile.blocks)
        if config.LENGTHS != SHAPES:
            clear_values(work, shared, use, 0, span.rows_k - first_key)
        if config.TRACE:
            at_loop = now()
        for i in range(skipped + 1, tile.blocks):
            first_key -= BLOCK_N
            if config.TRACE:
                wait_k -= now()
            shared.k.wait_full(use + TO_KEYS, 0)
            if config.TRACE:
                wait_k += now()
            if config.PING_PONG:
                take_turn("sync", LANE)
            s = scores(work, shared, zeros, tile_use, use + TO_KEYS, LANE)
            if config.TRACE:
                wait_v -= now()
            shared.v.wait_full(use, 0)
            if config.TRACE:
                wait_v += now()
            acc = add_values(work, shared, weights, acc, use, LANE, 0, FIRST)
            if PARTS_V > 1:
                weights_1 = gl.convert_layout(weights, WEIGHTS_1, assert_trivial=True)
                acc_1 = add_values(work, shared, weights_1, acc_1, use, LANE, FIRST, 1)
            if config.PING_PONG:
                take_turn("arrive", (LANE + 1) % config.CONSUMERS)
            if config.TRACE:
                wait_s -= now()
            s = warpgroup_mma_wait(config.PRODUCTS_V, deps=[s])
            if config.TRACE:
                wait_s += now()
            shared.k.release(use + TO_KEYS, 0)
            if not config.OVERLAP:
                if i == tile.blocks - 1:
                    shared.q.release(tile_use, LANE)
            s = biased(work, span, capped(work, s), first_row, first_key, slope)
            if MASKED:
                s = mask_if_needed(work, span, s, first_row, first_key)
            m_new = gl.maximum(m, gl.max(s, 1))
            m_new = settle_maximum(m, m_new, m + most_growth, LANE)
            p, shift = weights_of(work, s, m_new, MASKED)
            sums = partial_sums(p, BLOCK_N)
            if config.OVERLAP:
                # The assembler moves a wait for products up to the branch in front of it: this one
                # keeps it behind the weights.
                if i == tile.blocks - 1:
                    shared.q.release(tile_use, LANE)
            if PARTS_V > 1:
                acc, acc_1 = warpgroup_mma_wait(0, deps=[acc, acc_1])
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
            shared.v.release(use, 0)
            if warp_has_moved(LANE):
                l = l * growth_of(work, m, shift, l)
                acc = acc * growth_of(work, m, shift, acc)
                if PARTS_V > 1:
                    acc_1 = acc_1 * growth_of(work, m, shift, acc_1)
            l = l + sums
            m = m_new
            weights = put_weights(work, shared, p.to(DTYPE), WEIGHTS, LANE)
            use += STEP

        # The last values.
        if config.TRACE:
            at_end = now()
            traced = tile.blocks - skipped
        block_use += uses_of(work, tile.blocks)
        if config.HAS_LEFT:
            first = first_key_of(work, span, 0) - tile.first_block * BLOCK_N
            clear_values(work, shared, block_use - 1, first, BLOCK_N)
        shared.v.wait_full(block_use - 1, 0)
        acc = add_values(work, shared, weights, acc, block_use - 1, LANE, 0, FIRST)
        if PARTS_V > 1:
            weights_1 = gl.convert_layout(weights, WEIGHTS_1, assert_trivial=True)
            acc_1 = add_values(work, shared, weights_1, acc_1, block_use - 1, LANE, FIRST, 1)
        if config.TRACE:
            at_mail = now()
        if config.LENGTHS != SHAPES:
            index, next_tile = announced_tile(work, shared.mailbox, tile_use + 1)
        else:
            index = index_after(work, index, shared.mailbox, tile_use)
        if config.TRACE:
            at_index = now()
        if PARTS_V > 1:
            acc, acc_1 = warpgroup_mma_wait(0, deps=[acc, acc_1])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        shared.v.release(block_use - 1, 0)
        if config.TRACE:
            at_values = now()

        # Normalise and store.
        total = gl.convert_layout(gl.sum(l, 1), SCORE_ROWS)
        i = gl.arange(0, ROWS, SCORE_ROWS)
        row, head = row_of(work, first_row, i), head_of(work, span, i)
        sees, divisor, row_lse = finish_rows(work, span, row, head, m, total, sinks)
        row_zero = entry_of(work, span) * work_here.nheads * config.PACK + head
        row_zero = row_zero.to(gl.int64) * work_here.seqlen_q
        gl.store(lse + row_zero + span.q_start + row, row_lse, mask=row < span.rows)
        row_factor = gl.where(sees, 1.0 / divisor, 0.0)
        factor = gl.expand_dims(gl.convert_layout(row_factor, OUTPUT_ROWS), 1)
        out = normalised(work, acc, factor).to(DTYPE)
        if config.OUT_BUFFERS > 1:
            factor_1 = gl.expand_dims(gl.convert_layout(row_factor, PIECE_ROWS), 1)
            out_1 = normalised(work, acc_1, factor_1).to(DTYPE)
            store_pieces(work, target, span, first_row, out, out_1, shared.out,
                         config.OUT_BUFFERS * LANE)  # fmt: skip
        elif PARTS_V > 1:
            buffer = shared.out.index(LANE)
            store_rows(work, target, span, first_row, out, buffer, PIECE)
            factor_1 = gl.expand_dims(gl.convert_layout(row_factor, PIECE_ROWS), 1)
            out = normalised(work, acc_1, factor_1).to(DTYPE)
            store_columns(work, target, span, first_row, FIRST * PIECE, out, buffer)
        else:
            store_rows(work, target, span, first_row, out, shared.out.index(LANE),
                       config.OUT_COLUMNS)  # fmt: skip
        if config.LENGTHS != SHAPES:
            tile = next_tile
        if config.TRACE:
            if tile_use < 64:
                at = record + 16 * (tile_use + 1)
                gl.store(at, traced)
                gl.store(at + 1, at_scores - at_top)
                gl.store(at + 2, at_loop - at_scores)
                gl.store(at + 3, at_end - at_loop)
                gl.store(at + 4, wait_k)
                gl.store(at + 5, wait_v)
                gl.store(at + 6, wait_s)
                gl.store(at + 7, at_mail - at_end)
                gl.store(at + 8, at_index - at_mail)
                gl.store(at + 9, at_values - at_index)
                gl.store(at + 10, now() - at_values)
        tile_use += 1
    tma.store_wait(0)
    if config.TRACE:
        gl.store(record + 2, nanoseconds())
        gl.store(record + 3, now())
        gl.store(record + 4, tile_use)


# ------------------------------------------------------------------------------------------- kernel
_NUMBERS = (
    "nheads", "group", "seqlen_q", "seqlen_k", "window_left", "window_right", "chunk", "row_tiles",
    "sequences", "section", "in_sections", "tiles", "batch", "step_row", "step_head", "columns",
    "step_slope",
)  # fmt: skip
_POINTERS = (
    "lse", "counter", "trace", "sinks", "cu_seqlens_q", "cu_seqlens_k", "used_q", "used_k",
    "slopes",
)  # fmt: skip


@gluon.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def attention_forward_sm90(
    q_desc, k_desc, v_desc, out_desc, lse, counter, trace, sinks, scale_log2, cap_scale, empty_lse,
    nheads, group, seqlen_q, seqlen_k, window_left, window_right, chunk, row_tiles, sequences,
    section, in_sections, tiles, batch, cu_seqlens_q, cu_seqlens_k, used_q, used_k, out, step_row,
    step_head, columns, slopes, step_slope,
    PACK: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, Q_SLOTS: gl.constexpr, OUT_COLUMNS: gl.constexpr,
    SCHEDULER: gl.constexpr, PING_PONG: gl.constexpr, SKIP: gl.constexpr,
    REGISTERS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    HAS_CHUNK: gl.constexpr, HAS_SOFTCAP: gl.constexpr, HAS_SINKS: gl.constexpr,
    HAS_ALIBI: gl.constexpr, LENGTHS: gl.constexpr, HAS_USED_Q: gl.constexpr,
    HAS_USED_K: gl.constexpr, SLIM: gl.constexpr, LATE: gl.constexpr, OVERLAP: gl.constexpr,
    PEEL: gl.constexpr, JOINT: gl.constexpr, P_SHARED: gl.constexpr, TRACE: gl.constexpr,
):  # fmt: skip
    """See the module's docstring; launched with 4 warps, the producer's.

    Args:
        q_desc, k_desc, v_desc, out_desc: TMA descriptors of (batch, nheads, seqlen, headdim) with
            blocks (1, PACK, 64 / PACK, BLOCK_D), (1, 1, BLOCK_N, BLOCK_D),
            (1, 1, BLOCK_N, BLOCK_DV) and (1, PACK, 64 / PACK, OUT_COLUMNS); columns
            past headdim are read as 0 and not written. The batch is 1 with PACKED. BLOCK_D and
            BLOCK_DV are 64, 96, 128, 192 or 256; of 96 and 192 the blocks have a third.
        lse: (batch, nheads, seqlen_q) float32, packed (nheads, seqlen_q).
        counter: one int32, 0 before and after the launch; used with DYNAMIC alone.
        sinks: (query heads,) with HAS_SINKS.
        slopes, step_slope: (query heads,) or (batch, query heads) float32 with HAS_ALIBI, and the
            step from one sequence to the next in elements.
        scale_log2: softmax_scale * log2(e), positive; with HAS_SOFTCAP softcap * log2(e).
        cap_scale: softmax_scale / softcap with HAS_SOFTCAP.
        empty_lse: what lse says of a row that sees no key, without HAS_SINKS.
        nheads: query heads, divided by PACK: the heads of tiles.
        group: heads of tiles for each head of keys.
        seqlen_q, seqlen_k: rows of the tensors, which are totals with PACKED.
        chunk: positions in a chunk with HAS_CHUNK, which needs HAS_LEFT and HAS_RIGHT.
        row_tiles: tiles of M = 64 / PACK * CONSUMERS positions in a sequence; with PACKED
            seqlen_q // M + batch + 2, see packed_span.
        sequences: batch * nheads, with PACKED nheads; ``section`` of them are worked on at a time,
            of the first ``in_sections`` (a multiple, or not below ``sequences``), and then the
            others at once.
        tiles: row_tiles * sequences.
        batch: sequences of the batch, with LENGTHS.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 with PACKED.
        used_q, used_k: (batch,) int32 with HAS_USED_Q and HAS_USED_K.
        out, step_row, step_head, columns: with PACKED, the output's memory, steps in elements and
            head dim.
        PACK: query heads of one head of keys in a tile: 1, or all of them, a power of 2 up to 64.
        OUT_COLUMNS: width of the buffer that results leave through.
        PING_PONG: consumers take turns in starting products.
        SKIP: consumers leave out the last blocks of keys if none of their rows sees them.
        SLIM: the producer is one warp, and the counter has a warp of its own.
        LATE: with DYNAMIC, fetch a tile under the end of the tile before, not under its start.
        OVERLAP: compute a block's weights while the products with the values before run.
        PEEL: of a tile's blocks the first alone has keys that some row does not see, and each row
            sees one of that block, so only that one is masked.
        JOINT: keys and values share a ring of STAGES slots, 3 or more; not with both PING_PONG
            and SKIP.
        P_SHARED: of so many last keys of a block weights are multiplied from shared memory, not
            from registers: 0 or half of BLOCK_N.
        TRACE: write to ``trace`` where the time goes; without, it is not used.
        REGISTERS: of a consumer's thread.
        LENGTHS: SHAPES, USED (with HAS_USED_Q, HAS_USED_K or both) or PACKED.
    """
    gl.static_assert(CONSUMERS >= 1 and CONSUMERS <= 4)
    gl.static_assert(CONSUMERS > 1 or not (SLIM or PING_PONG))
    gl.static_assert(LENGTHS == SHAPES or (SCHEDULER == DYNAMIC and not SLIM))
    gl.static_assert(not HAS_CHUNK or (HAS_LEFT and HAS_RIGHT))
    gl.static_assert(not JOINT or (BLOCK_D == BLOCK_DV and STAGES >= 3))
    # A consumer that skips blocks waits for values whose slots the others free only after its turn.
    gl.static_assert(not JOINT or not (PING_PONG and SKIP))
    gl.static_assert(P_SHARED == 0 or P_SHARED == BLOCK_N // 2)
    gl.static_assert(not LATE or (SCHEDULER == DYNAMIC and not SLIM))
    gl.static_assert(not PEEL or (HAS_RIGHT and not HAS_LEFT and LENGTHS == SHAPES))
    config = Config(PACK, BLOCK_N, BLOCK_D, BLOCK_DV, CONSUMERS, SCHEDULER, OUT_COLUMNS,
                    PING_PONG, SKIP, HAS_LEFT, HAS_RIGHT, HAS_CHUNK, HAS_SOFTCAP, HAS_SINKS,
                    HAS_ALIBI, LENGTHS, SLIM, LATE, OVERLAP, PEEL, JOINT, P_SHARED,
                    TRACE)  # fmt: skip
    places = Sequences(batch, cu_seqlens_q, cu_seqlens_k, used_q, used_k, HAS_USED_Q, HAS_USED_K)
    work = Work(scale_log2, cap_scale, empty_lse, nheads, group, seqlen_q, seqlen_k, window_left,
                window_right, chunk, row_tiles, sequences, section, in_sections, tiles, trace,
                slopes, step_slope, places, config)  # fmt: skip
    target = Destination(out_desc, out, step_row, step_head, columns)
    PIECES: gl.constexpr = config.PIECES
    q_buffers = buffers_for(q_desc, Q_SLOTS * CONSUMERS * PIECES)
    q_ring = new_ring(q_buffers, Q_SLOTS, CONSUMERS, 1)
    k_ring = new_ring(buffers_for(k_desc, STAGES * PIECES), STAGES, 1, CONSUMERS)
    if JOINT:
        v_ring = k_ring
    else:
        v_ring = new_ring(buffers_for(v_desc, STAGES * config.PIECES_V), STAGES, 1, CONSUMERS)
    if SCHEDULER == DYNAMIC:
        PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        READERS: gl.constexpr = CONSUMERS + (1 if SLIM else 0)
        # A tile that is taken early is taken without knowing who will be free first. A producer
        # that takes tiles itself must not wait for the mail to be read, though.
        MAIL: gl.constexpr = 1 if SLIM else 2
        NUMBERS: gl.constexpr = MAIL if LENGTHS == SHAPES else MAIL * RECORD
        numbers = gl.allocate_shared_memory(gl.int32, [NUMBERS, 1], PLAIN)
        mailbox = new_ring(numbers, MAIL, 1, READERS)
    else:
        mailbox = q_ring  # never asked
    out_buffers = buffers_for(out_desc, CONSUMERS * config.OUT_BUFFERS)
    if P_SHARED:
        SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(min(2 * P_SHARED, 128), 16, 2)
        p_buffers = gl.allocate_shared_memory(v_desc.dtype, [CONSUMERS, ROWS, P_SHARED], SWIZZLED)
    else:
        p_buffers = out_buffers  # never asked
    shared = Shared(q_ring, k_ring, v_ring, mailbox, out_buffers, p_buffers)
    fence_async_shared()
    # The lists have to be spelled out: in tuples bound to a name, constants become tensors.
    R: gl.constexpr = REGISTERS
    if SLIM:
        if CONSUMERS == 2 and SCHEDULER == DYNAMIC:
            gl.warp_specialize([
                (consumer, (0, work, shared, target, lse, sinks)),
                (consumer, (1, work, shared, target, lse, sinks)),
                (producer, (work, shared, q_desc, k_desc, v_desc, counter)),
                (scheduler, (work, shared.mailbox, counter)),
            ], [4, 1, 1], [R, 24, 24])  # fmt: skip
        elif CONSUMERS == 2:
            gl.warp_specialize([
                (consumer, (0, work, shared, target, lse, sinks)),
                (consumer, (1, work, shared, target, lse, sinks)),
                (producer, (work, shared, q_desc, k_desc, v_desc, counter)),
            ], [4, 1], [R, 24])  # fmt: skip
        elif CONSUMERS == 3 and SCHEDULER == DYNAMIC:
            gl.warp_specialize([
                (consumer, (0, work, shared, target, lse, sinks)),
                (consumer, (1, work, shared, target, lse, sinks)),
                (consumer, (2, work, shared, target, lse, sinks)),
                (producer, (work, shared, q_desc, k_desc, v_desc, counter)),
                (scheduler, (work, shared.mailbox, counter)),
            ], [4, 4, 1, 1], [R, R, 24, 24])  # fmt: skip
        elif CONSUMERS == 3:
            gl.warp_specialize([
                (consumer, (0, work, shared, target, lse, sinks)),
                (consumer, (1, work, shared, target, lse, sinks)),
                (consumer, (2, work, shared, target, lse, sinks)),
                (producer, (work, shared, q_desc, k_desc, v_desc, counter)),
            ], [4, 4, 1], [R, R, 24])  # fmt: skip
        elif SCHEDULER == DYNAMIC:
            gl.warp_specialize([
                (consumer, (0, work, shared, target, lse, sinks)),
                (consumer, (1, work, shared, target, lse, sinks)),
                (consumer, (2, work, shared, target, lse, sinks)),
                (consumer, (3, work, shared, target, lse, sinks)),
                (producer, (work, shared, q_desc, k_desc, v_desc, counter)),
                (scheduler, (work, shared.mailbox, counter)),
            ], [4, 4, 4, 1, 1], [R, R, R, 24, 24])  # fmt: skip
        else:
            gl.warp_specialize([
                (consumer, (0, work, shared, target, lse, sinks)),
                (consumer, (1, work, shared, target, lse, sinks)),
                (consumer, (2, work, shared, target, lse, sinks)),
                (consumer, (3, work, shared, target, lse, sinks)),
                (producer, (work, shared, q_desc, k_desc, v_desc, counter)),
            ], [4, 4, 4, 1], [R, R, R, 24])  # fmt: skip
    elif CONSUMERS == 1:
        gl.warp_specialize([
            (producer, (work, shared, q_desc, k_desc, v_desc, counter)),
            (consumer, (0, work, shared, target, lse, sinks)),
        ], [4], [R])  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize([
            (producer, (work, shared, q_desc, k_desc, v_desc, counter)),
            (consumer, (0, work, shared, target, lse, sinks)),
            (consumer, (1, work, shared, target, lse, sinks)),
        ], [4, 4], [R, R])  # fmt: skip
    elif CONSUMERS == 3:
        gl.warp_specialize([
            (producer, (work, shared, q_desc, k_desc, v_desc, counter)),
            (consumer, (0, work, shared, target, lse, sinks)),
            (consumer, (1, work, shared, target, lse, sinks)),
            (consumer, (2, work, shared, target, lse, sinks)),
        ], [4, 4, 4], [R, R, R])  # fmt: skip
    else:
        gl.warp_specialize([
            (producer, (work, shared, q_desc, k_desc, v_desc, counter)),
            (consumer, (0, work, shared, target, lse, sinks)),
            (consumer, (1, work, shared, target, lse, sinks)),
            (consumer, (2, work, shared, target, lse, sinks)),
            (consumer, (3, work, shared, target, lse, sinks)),
        ], [4, 4, 4, 4], [R, R, R, R])  # fmt: skip
