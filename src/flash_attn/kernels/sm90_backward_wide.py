"""dk and dv of the Hopper backward for head dims above 128; the formulas are ``sm90_backward``'s,
and dq is ``sm90_backward_rows``'s.

A program owns 64 keys of one key head and walks over the blocks of 64 queries that see them. Sums
of 64 keys and 256 columns are all that a warpgroup's registers hold, so each gradient has one:

* the value consumer: S = k q^T, P = exp2(S - lse), dV += P do;
* the key consumer:   dP = v do^T, dS = P (dP - delta), dK += dS q.

P goes from the first to the second through shared memory, in the inputs' type. Products of the next
step, S and dP, are started before those of this one are waited for. A producer warp asks for all
tiles.

Rows of BLOCK_D columns lie in shared memory as BLOCK_D / PIECE buffers, because 192 columns are no
tensor's: dv and dk are tuples of as many tensors.

HELD: so many pieces of k and v are held in registers. They come in the first block of q's and do's
place, and what k and v would take is room for more blocks.
TURNS: the consumers start products in turns, so that each computes while the other one's products
run. That takes more than two blocks of q.
With SOFTCAP the slope of tanh is multiplied into what the key consumer gets in P's place.
SPLIT: several programs share the query heads of a key head, see ``sm90_backward``.
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
    come_by,
    meet,
    opaque_zero,
    tma_load,
    tma_store,
    wait_for_dependencies,
)
from .sm90_backward import CONSUMERS_MEET, leave_sums, mask_if_needed
from .sm90_backward_work import (
    ROWS,
    Config,
    Grid,
    Lengths,
    Ring,
    Work,
    buffers_for,
    bytes_of,
    coordinates,
    new_ring,
    padded_start,
    rows_from,
    rows_of_queries,
    share_of,
    step_after,
    tiles_of_blocks,
    whole_sequence,
)

# Hardware barriers where a consumer waits for its turn.
VALUE_TURN, KEY_TURN = gl.constexpr(10), gl.constexpr(11)


@aggregate
class Shared:
    """All shared memory. A slot of q and do is PIECES buffers of 64 rows and PIECE columns; ``lse``
    comes with ``q`` and ``delta`` with ``do``, slot by slot. ``k`` and ``v`` have the pieces that
    are not held in registers; what is held is the first use of ``q`` and ``do``."""

    q: Ring
    do: Ring
    k: Ring
    v: Ring
    p: Ring
    lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    PIECE: gl.constexpr
    PIECES: gl.constexpr
    HELD: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, q, do, k, v, p, lse, delta, PIECE, PIECES, HELD):
        self.q = q
        self.do = do
        self.k = k
        self.v = v
        self.p = p
        self.lse = lse
        self.delta = delta
        self.PIECE = gl.constexpr(PIECE)
        self.PIECES = gl.constexpr(PIECES)
        self.HELD = gl.constexpr(HELD)

    @gluon.jit
    def piece(self, ring, use, NUMBER: gl.constexpr):
        """(ROWS, PIECE) of q or do: some of the columns of the block in use."""
        buffer = ring.data.index(use % ring.SLOTS * self.PIECES + NUMBER)
        return buffer.reshape([ROWS, self.PIECE])


# ---------------------------------------------------------------------------------------- producer
@gluon.jit
def ask_for_some(desc, span, head, row, shared, full, buffers, at, BEGIN: gl.constexpr,
                 END: gl.constexpr):  # fmt: skip
    """Start loading some pieces of a block of rows; their bytes are expected already."""
    for j in gl.static_range(BEGIN, END):
        at_piece = coordinates(span, head, row, j * shared.PIECE)
        tma_load(desc, at_piece, full, buffers.index(at + (j - BEGIN)))


@gluon.jit
def ask_for_pieces(desc, span, head, row, shared, ring, use):
    """Start loading a block of rows; its bytes are expected already."""
    full = ring.full.index(use % ring.SLOTS)
    at = use % ring.SLOTS * shared.PIECES
    ask_for_some(desc, span, head, row, shared, full, ring.data, at, 0, shared.PIECES)


@gluon.jit
def ask_for_keys(desc, span, head, row, shared, place, rest):
    """Start loading k or v: what is held in the first slot of ``place``."""
    HELD: gl.constexpr = shared.HELD
    if HELD > 0:
        full = place.full.index(0)
        mbarrier.expect(full, HELD * bytes_of(desc.block_type))
        ask_for_some(desc, span, head, row, shared, full, place.data, 0, 0, HELD)
    if HELD < shared.PIECES:
        full = rest.full.index(0)
        mbarrier.expect(full, (shared.PIECES - HELD) * bytes_of(desc.block_type))
        ask_for_some(desc, span, head, row, shared, full, rest.data, 0, HELD, shared.PIECES)


@gluon.jit
def ask_for_rows(desc, values_desc, span, head, row, sum_row, shared, ring, values, use, is_first):
    """Start loading a block of q or do and one number for each row.

    Only these numbers come from the launch before, so only they wait for it.
    """
    full = ring.full.index(use % ring.SLOTS)
    size: gl.constexpr = shared.PIECES * bytes_of(desc.block_type)
    mbarrier.expect(full, size + bytes_of(values_desc.block_type))
    ask_for_pieces(desc, span, head, row, shared, ring, use)
    if is_first:
        wait_for_dependencies()
    tma_load(values_desc, [sum_row], full, values.index(use % ring.SLOTS))


@gluon.constexpr_function
def first_use(shared):
    """Of q and do: before that come the pieces of k and v that are held."""
    return 1 if shared.HELD > 0 else 0


@gluon.jit
def producer(work, shared, group, q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc):
    """Ask for everything that the others read, as slots become empty."""
    _, key_head, _ = work.grid.place(gl.program_id(0))
    if work.config.SPLIT:
        key_head = work.key_head
    ask_for_keys(k_desc, work.keys, key_head, work.first_key, shared, shared.q, shared.k)
    ask_for_keys(v_desc, work.keys, key_head, work.first_key, shared, shared.do, shared.v)
    head = key_head * group
    if work.config.SPLIT:
        head = work.first_head
    row = work.first_row
    sum_row = work.first_sum
    for i in range(work.steps):
        use = first_use(shared) + i
        shared.q.wait_empty(use)
        ask_for_rows(
            q_desc, lse_desc, work.queries, head, row, sum_row, shared, shared.q, shared.lse, use,
            i == 0,
        )  # fmt: skip
        shared.do.wait_empty(use)
        ask_for_rows(
            do_desc, delta_desc, work.queries, head, row, sum_row, shared, shared.do, shared.delta,
            use, i == 0,
        )  # fmt: skip
        row, sum_row = step_after(work, row, sum_row)
        head = gl.where(row == work.first_row, head + 1, head)
    if work.steps == 0:
        # What runs next reads the statistics without waiting for them.
        wait_for_dependencies()
    allow_dependents()


# --------------------------------------------------------------------------------------- consumers
@gluon.jit
def release_read(ring, use):
    """Release a slot that this warpgroup's threads have read. TMA writes there next, and no barrier
    orders that behind their reads: without the fence it was seen to come first."""
    fence_async_shared()
    ring.release(use)


@gluon.jit
def hold(shared, place, other, rest, SCORES: gl.constexpr):
    """The pieces of k or v that are held, as soon as all of them are there."""
    held = ()
    if shared.HELD > 0:
        place.wait_full(0)
        other.wait_full(0)  # so that nobody waits for a slot's second use during the first one
        for j in gl.static_range(shared.HELD):
            piece = shared.piece(place, 0, j)
            held += (piece.load(gl.DotOperandLayout(0, SCORES, 2)),)
        release_read(place, 0)
        other.release(0)
    if shared.HELD < shared.PIECES:
        rest.wait_full(0)
    return held


@gluon.jit
def start_products(shared, held, rest, right, right_use, product, BEGIN: gl.constexpr,
                   END: gl.constexpr):  # fmt: skip
    """Start some of the products, one for each piece, whose sum is (ROWS, ROWS), k or v times a
    block of q or do, turned."""
    HELD: gl.constexpr = shared.HELD
    for j in gl.static_range(BEGIN, END):
        b = shared.piece(right, right_use, j).permute([1, 0])
        if j < HELD:
            product = warpgroup_mma(held[j], b, product, use_acc=j > 0, is_async=True)
        else:
            a = rest.data.index(opaque_zero() + (j - HELD)).reshape([ROWS, shared.PIECE])
            product = warpgroup_mma(a, b, product, use_acc=j > 0, is_async=True)
    return product


@gluon.jit
def add_by_rows(shared, weights, rows, use, sums):
    """Start sums += weights rows, piece by piece."""
    added = ()
    for j in gl.static_range(shared.PIECES):
        piece = shared.piece(rows, use, j)
        added += (warpgroup_mma(weights, piece, sums[j], is_async=True),)
    return added


@gluon.jit
def wait_for_sums(shared, sums, PENDING: gl.constexpr):
    """The sums, when at most PENDING later products run."""
    done = warpgroup_mma_wait(PENDING, deps=sums)
    if shared.PIECES == 1:
        done = (done,)
    return done


@gluon.jit
def go_on(shared, held, rest, right, following, zeros, sums, added, use):
    """Start the next step's S or dP, and wait for this step's dv or dk, to which rows of ``added``
    were added. One product is started before that, so that the tensor cores have work, and the
    others after it, so that the rows are released early."""
    product = start_products(shared, held, rest, right, following, zeros, 0, 1)
    sums = wait_for_sums(shared, sums, 1)
    added.release(use)
    product = start_products(shared, held, rest, right, following, product, 1, shared.PIECES)
    return product, sums


@gluon.jit
def capped(work, s, row):
    """u = 1 + 1 / (exp(2 x) + 1), where softcap makes of a score cap tanh(x): tanh(x) = 3 - 2 u and
    its slope 4 (u - 1) (2 - u), so that no score has to be kept beside its weight. 0 is masked."""
    u = 1.0 + 1.0 / (gl.exp2(s * work.scale_log2) + 1.0)
    return mask_if_needed(work, u, work.first_key + opaque_zero(), row)


@gluon.jit
def weights_of_capped(work, u, lse):
    """The weights of scores that softcap has been applied to."""
    p = gl.exp2(3.0 * work.cap_log2 - 2.0 * work.cap_log2 * u - lse)
    return gl.where(u > 0.5, p, 0.0)


@gluon.jit
def handing_order(p):
    """A tile of weights with the eight neighbours that a thread holds next to each other, so that
    it moves whole 16 bytes."""
    return p.reshape([4, 2, 8, 4, 2, 4, 2]).permute([0, 3, 2, 5, 4, 1, 6]).reshape([ROWS, ROWS])


@gluon.jit
def undo_handing_order(p):
    """The tile of weights."""
    return p.reshape([4, 4, 8, 4, 2, 2, 2]).permute([0, 5, 2, 1, 4, 3, 6]).reshape([ROWS, ROWS])


@gluon.jit
def again(grid):
    """The grid with numbers that the compiler takes for others than those at the kernel's begin:
    what it could use again of a place would be held, or spilled, all through the loop."""
    zero = opaque_zero()
    return Grid(grid.nheads_k + zero, grid.key_blocks + zero, grid.sequences + zero,
                grid.section + zero, grid.REVERSED)  # fmt: skip


@gluon.jit
def store_sums(desc, work, shared, ring, sums, factor):
    """Write ``factor`` times dv or dk by TMA, through the buffers of the ring's first slot."""
    grid = again(work.grid)
    if work.config.RAGGED:
        _, key_head, first_key, start, count, _, _ = work.lengths.keys(grid, gl.program_id(0), 64)
        span = rows_from(start, count)
    else:
        batch, key_head, key_block = grid.place(gl.program_id(0))
        first_key = key_block * ROWS
        span = whole_sequence(batch)
    for j in gl.static_range(shared.PIECES):
        shared.piece(ring, 0, j).store((sums[j] * factor).to(desc.dtype))
    fence_async_shared()
    for j in gl.static_range(shared.PIECES):
        at = coordinates(span, key_head, first_key, j * shared.PIECE)
        tma_store(desc, at, ring.data.index(j))
    tma.store_wait(0)


@gluon.jit
def leave_pieces(target, work, shared, sums):
    """Write the sums of dk or dv for finish_keys_sm90: with SPLIT."""
    grid = again(work.grid)
    for j in gl.static_range(shared.PIECES):
        leave_sums(target, grid, gl.program_id(0), sums[j], j, shared.PIECES, shared.PIECE)


@gluon.jit
def row_numbers(ring, numbers, use, LAYOUT: gl.constexpr):
    """(1, ROWS): the log-sum-exp or delta of the rows in a slot."""
    return gl.expand_dims(numbers.index(use % ring.SLOTS).load(LAYOUT), 0)


@gluon.jit
def value_consumer(work, shared, dv_target):
    """P of every step, handed to the key consumer, and dv."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shared.PIECE, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    PIECES: gl.constexpr = shared.PIECES
    dtype: gl.constexpr = shared.p.data.dtype

    dv = (gl.zeros([ROWS, shared.PIECE], gl.float32, SUMS),) * PIECES
    zeros = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    row = work.first_row
    sum_row = work.first_sum
    k = hold(shared, shared.q, shared.do, shared.k, SCORES)
    use = first_use(shared) + opaque_zero()
    if work.steps > 0:  # otherwise it multiplies what lies in shared memory, for nobody
        shared.q.wait_full(use)
    s = start_products(shared, k, shared.k, shared.q, use, zeros, 0, PIECES)
    s = warpgroup_mma_wait(0, deps=[s])
    for i in range(work.steps):
        use = first_use(shared) + i
        if work.config.SOFTCAP:
            u = capped(work, s, row)
            lse = row_numbers(shared.q, shared.lse, use, COLUMN)
            release_read(shared.q, use)
            p = weights_of_capped(work, u, lse)
            weights = p.to(dtype)
            handed = (p * (4.0 * (u - 1.0) * (2.0 - u))).to(dtype)  # times the slope of tanh
        else:
            lse = row_numbers(shared.q, shared.lse, use, COLUMN)
            release_read(shared.q, use)
            p = gl.exp2(s * work.scale_log2 - lse)
            weights = mask_if_needed(work, p, work.first_key + opaque_zero(), row).to(dtype)
            handed = weights
        shared.p.wait_empty(i)
        shared.p.slot(i).store(handing_order(handed))
        shared.p.announce(i)

        # The last step has no next one and starts its own S again, for nobody.
        following = first_use(shared) + gl.minimum(i + 1, work.steps - 1)
        shared.do.wait_full(use)
        if work.config.TURNS:
            shared.q.wait_full(following)
            if i > 0:
                meet(VALUE_TURN, 256)
        dv = add_by_rows(shared, gl.convert_layout(weights, OPERAND), shared.do, use, dv)
        if not work.config.TURNS:
            shared.q.wait_full(following)
        s, dv = go_on(shared, k, shared.k, shared.q, following, zeros, dv, shared.do, use)
        if work.config.TURNS:
            come_by(KEY_TURN, 256)
        s = warpgroup_mma_wait(0, deps=[s])
        row, sum_row = step_after(work, row, sum_row)

    if work.config.SPLIT:
        leave_pieces(dv_target, work, shared, dv)
    else:
        meet(CONSUMERS_MEET, 256)  # nobody reads q or do any more
        store_sums(dv_target, work, shared, shared.do, dv, 1.0)


@gluon.jit
def key_consumer(work, shared, dk_target):
    """dS of every step, and dk."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shared.PIECE, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    PIECES: gl.constexpr = shared.PIECES
    dtype: gl.constexpr = shared.p.data.dtype

    dk = (gl.zeros([ROWS, shared.PIECE], gl.float32, SUMS),) * PIECES
    zeros = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    v = hold(shared, shared.do, shared.q, shared.v, SCORES)
    use = first_use(shared) + opaque_zero()
    if work.steps > 0:
        shared.do.wait_full(use)
    dp = start_products(shared, v, shared.v, shared.do, use, zeros, 0, PIECES)
    dp = warpgroup_mma_wait(0, deps=[dp])
    for i in range(work.steps):
        use = first_use(shared) + i
        dp -= row_numbers(shared.do, shared.delta, use, COLUMN)
        release_read(shared.do, use)
        shared.p.wait_full(i)
        p = undo_handing_order(shared.p.slot(i).load(handing_order(zeros).type.layout))
        p = gl.convert_layout(p, SCORES, assert_trivial=True)
        shared.p.release(i)
        ds = (p.to(gl.float32) * dp).to(dtype)

        following = first_use(shared) + gl.minimum(i + 1, work.steps - 1)
        shared.q.wait_full(use)
        if work.config.TURNS:
            shared.do.wait_full(following)
            meet(KEY_TURN, 256)
        dk = add_by_rows(shared, gl.convert_layout(ds, OPERAND), shared.q, use, dk)
        if not work.config.TURNS:
            shared.do.wait_full(following)
        dp, dk = go_on(shared, v, shared.v, shared.do, following, zeros, dk, shared.q, use)
        if work.config.TURNS:  # noqa: SIM102 -- one condition is a constant, the other is not
            if i + 1 < work.steps:
                come_by(VALUE_TURN, 256)
        dp = warpgroup_mma_wait(0, deps=[dp])

    if work.config.SPLIT:
        leave_pieces(dk_target, work, shared, dk)
    else:
        meet(CONSUMERS_MEET, 256)
        store_sums(dk_target, work, shared, shared.q, dk, work.scale)


# ------------------------------------------------------------------------------------------ kernel
_NUMBERS = (
    "nheads_k", "group", "seqlen_q", "seqlen_k", "padded_rows", "window_left", "window_right",
    "key_blocks", "sequences", "section", "batch_size",
)  # fmt: skip
_POINTERS = ("splits", "bounds_q", "table", "used_q", "used_k")


@gluon.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def attention_backward_wide_sm90(
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dk_target, dv_target,
    scale, scale_log2, cap_log2, nheads_k, group, splits, seqlen_q, seqlen_k, padded_rows,
    window_left, window_right, key_blocks, sequences, section, bounds_q, table, used_q, used_k,
    batch_size,
    BLOCK_D: gl.constexpr, PIECE: gl.constexpr, Q_SLOTS: gl.constexpr, DO_SLOTS: gl.constexpr,
    P_SLOTS: gl.constexpr, HELD: gl.constexpr, TURNS: gl.constexpr,
    REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr, SOFTCAP: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SPLIT: gl.constexpr,
    CU_Q: gl.constexpr, CU_K: gl.constexpr, USED_Q: gl.constexpr, USED_K: gl.constexpr,
):  # fmt: skip
    """See the module's docstring; launched with 4 warps, those of the value consumer.

    Args:
        q_desc, do_desc: TMA descriptors of (batch, nheads, seqlen_q, headdim) with blocks
            (1, 1, 64, PIECE); columns past headdim are read as 0.
        k_desc, v_desc: of (batch, nheads_k, seqlen_k, headdim) with the same blocks; columns past
            headdim are read as 0 and not written.
        dk_target, dv_target: descriptors like k's; with SPLIT pointers to sequences * key_blocks *
            64 * BLOCK_D float32, which finish_keys_sm90 reads.
        lse_desc, delta_desc: of (batch * nheads * padded_rows,) float32 with blocks (64,).
        scale, scale_log2, cap_log2, nheads_k, group, splits, padded_rows, sequences, section: as
            in attention_backward_sm90.
        key_blocks: blocks of 64 keys in a sequence, with CU_K two for each tile of tiles_sm90.
        bounds_q, table, used_q, used_k, batch_size, CU_Q, CU_K, USED_Q, USED_K: as in
            attention_backward_sm90.
        BLOCK_D: columns that are computed, a multiple of PIECE; PIECE: 64, 128 or 256.
        HELD, TURNS: see above.
        REGISTERS, OTHER_REGISTERS: of a thread of the key consumer (the value consumer gets what is
            left) and of the producer.
    """
    gl.static_assert(BLOCK_D % PIECE == 0)
    PIECES: gl.constexpr = BLOCK_D // PIECE
    gl.static_assert(HELD <= PIECES)
    RAGGED: gl.constexpr = CU_Q or CU_K or USED_Q or USED_K
    config = Config(64, BLOCK_D, False, False, False, False, 0, False, SOFTCAP, HAS_LEFT,
                    HAS_RIGHT, False, False, RAGGED, 64, SPLIT=SPLIT, TURNS=TURNS)  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    PLAIN: gl.constexpr = gl.NVMMASharedLayout(0, 16, 2)
    q = new_ring(buffers_for(q_desc, Q_SLOTS * PIECES), Q_SLOTS, 1, 2)
    do = new_ring(buffers_for(do_desc, DO_SLOTS * PIECES), DO_SLOTS, 1, 2)
    if HELD < PIECES:
        k = new_ring(buffers_for(k_desc, PIECES - HELD), 1, 1, 0)
        v = new_ring(buffers_for(v_desc, PIECES - HELD), 1, 1, 0)
    else:
        k, v = q, do  # never asked
    p = new_ring(gl.allocate_shared_memory(dtype, [P_SLOTS, 64, 64], PLAIN), P_SLOTS, 1, 1)
    lse, delta = buffers_for(lse_desc, Q_SLOTS), buffers_for(delta_desc, DO_SLOTS)
    shared = Shared(q, do, k, v, p, lse, delta, PIECE, PIECES, HELD)
    fence_async_shared()

    grid = Grid(nheads_k, key_blocks, sequences, section, False)
    zero = gl.to_tensor(0)  # of what there is no such thing here: chunks and slopes
    lengths = Lengths(bounds_q, table, tiles_of_blocks(key_blocks, 64), used_q, used_k, batch_size,
                      seqlen_q, seqlen_k, window_left, zero, CU_Q, CU_K, USED_Q, USED_K, HAS_LEFT,
                      False)  # fmt: skip
    start_q = zero
    count_q, count_k = seqlen_q, seqlen_k
    if RAGGED:
        batch, key_head, first_key, start_k, _, count_k, _ = lengths.keys(
            grid, gl.program_id(0), 64
        )
        start_q, count_q = lengths.queries(batch)
        queries = rows_from(start_q, count_q)
        keys = rows_from(start_k, count_k)
    else:
        batch, key_head, key_block = grid.place(gl.program_id(0))
        first_key = key_block * ROWS
        queries = whole_sequence(batch)
        keys = whole_sequence(batch)
    shift = count_k - count_q
    reach_left = window_left - shift
    reach_right = window_right + shift
    if RAGGED:  # past the keys in use there is nothing to add
        count_q = gl.where(first_key < count_k, count_q, 0)
    first_row, end_row = rows_of_queries(
        first_key, count_q, count_k, reach_left, reach_right, shift, zero, zero, config
    )
    rows = end_row - first_row
    first_head = key_head
    if SPLIT:
        nheads = nheads_k // splits * group
        key_head, first_head, group = share_of(key_head, group, splits)
        first_sum = first_head * padded_rows + first_row
        first_sum += padded_start(start_q, batch) if CU_Q else batch * nheads * padded_rows
    elif CU_Q:
        first_sum = key_head * group * padded_rows + padded_start(start_q, batch) + first_row
    else:
        first_sum = (batch * nheads_k + key_head) * group * padded_rows + first_row
    work = Work(scale, scale_log2, cap_log2, count_k, reach_left, reach_right, first_key,
                first_row, end_row, first_sum, padded_rows - rows + ROWS, group * (rows // ROWS),
                key_head, first_head, shift, zero, zero, bounds_q, queries, keys, grid, lengths,
                config)  # fmt: skip
    # The list has to be spelled out: in tuples bound to a name, constants become tensors.
    gl.warp_specialize([
        (value_consumer, (work, shared, dv_target)),
        (key_consumer, (work, shared, dk_target)),
        (producer, (work, shared, group, q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc)),
    ], [4, 1], [REGISTERS, OTHER_REGISTERS])  # fmt: skip
