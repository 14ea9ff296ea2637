"""Attention backward for Hopper: TMA and warpgroup MMA in specialised warps.

    p[i, j]  = exp(score[i, j] - lse[i])              recomputed, never stored
    delta[i] = sum_d out[i, d] dout[i, d]
    ds[i, j] = p[i, j] (dout[i] . v[j] - delta[i])
    dv[j] = sum_i p dout[i],   dk[j] = scale sum_i ds q[i],   dq[i] = scale sum_j ds k[j]

* ``row_statistics_sm90``: delta and log-sum-exp in base 2 of all rows, padded; zeroes the sums of
  dq.
* ``attention_backward_sm90``: a program owns 128 keys of one key head and walks over the blocks of
  queries that see them, for every query head of the group, so dk and dv are summed in float32 in
  registers. Its share of dq is added to float32 sums in global memory by TMA.
* ``finish_dq_sm90``: rounds the sums of dq to the result's type.
* ``finish_keys_sm90``: with SPLIT dk and dv from their sums.

All but the second are in ``sm90_backward_around``; how dq is computed and added is in
``sm90_backward_dq``, and what a program works on in ``sm90_backward_work``.

The main kernel has a producer warpgroup, whose only task is to ask for tiles, and two consumer
warpgroups with 64 keys each. They compute transposed tiles, keys x queries, because then p and ds
are already in the registers that the next products read them from. A consumer's step:

    S = k q^T;  dP = v do^T;  P = exp2(S - lse);  dV += P do;  dS = P (dP - delta)
    dS to shared memory; meet the other consumer
    dQ = half of dS^T k;  dK += dS q;  dQ to shared memory

ADDER: a warp of its own has TMA add dQ to the sums, and whoever computes it only waits for room to
leave it in.
DQ_GROUP: a third group computes dQ instead, so that the consumers never wait for each other.
Without an adder it asks TMA itself.
FIRST_STORES: the first program that comes to a block of dq stores it, so nobody has to zero it.
ROTATE: without a mask, the programs of a head begin at different queries and wrap around, so that
they do not come to the same block of dq at the same time.
SPLIT: several programs share the query heads of a key head, and each leaves sums of dk and dv in
float32 in global memory.
DETERMINISTIC: the programs add to each block of dq in the order of their keys, REVERSED from the
last to the first. A program waits only for programs with smaller numbers, which started before it.

KEEPS_KEYS: a consumer holds its rows of k and v in registers and computes S and dP from there. That
is half of what these read of shared memory, whose bandwidth limits small head dims.

WIDTH: of 128 columns in shared memory 96 are multiplied, as 64 and 32: for head dims up to 96. TMA
fills the others with zeros. The sums of dq have WIDTH columns, those of dk and dv are two tensors.

A consumer's step is one chain of waits, which is what limits it at head dims up to 96, more than
any unit of the hardware. So whatever can wait for something else does: the next step's S and dK are
started before what was written to shared memory is fenced for TMA and the tensor cores, with
DQ_GROUP q and do come and go together, EARLY_LSE reads the next step's log-sum-exp while its S is
computed, and DELTA_FIRST starts dP from -delta. EAGER_DV queues dV behind dP instead of waiting for
dP first.

Rows past a sequence's end are read as 0 by TMA, with lse +inf, which makes p 0; keys past the end
are masked. Where the sequences' lengths are on the device (RAGGED), TMA is told each sequence's end
too, see ``Span``: a tile never holds, and never writes, anything of the next sequence.

The sums of dq are kept in tiles of 64 rows and 64 columns, or 32, in the order of the registers
that hold them, so that every thread moves whole 16 bytes and no bank conflicts arise.
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
    allow_dependents,
    meet,
    opaque_zero,
    tma_load,
    tma_store,
    wait_for_dependencies,
)
from .sm90_backward_dq import (
    adder,
    claiming_adder,
    columns_of_tile,
    dq_group,
    dq_operands,
    rows_of_box,
    store_for_adder,
)
from .sm90_backward_work import (
    LOG2E,
    NO_ROW,
    ROWS,
    Config,
    Grid,
    Lengths,
    Ring,
    Shared,
    Work,
    buffers_for,
    bytes_of,
    chunk_of,
    columns_of,
    coordinates,
    first_of_rotation,
    first_query_head,
    layout_of_sums,
    new_ring,
    no_sums,
    padded_start,
    piece_of,
    pieces_of,
    ring_for,
    row_after,
    rows_from,
    rows_of_queries,
    share_of,
    step_after,
    whole_sequence,
)

# The first hardware barrier that the compiler leaves alone.
CONSUMERS_MEET = gl.constexpr(9)


# ---------------------------------------------------------------------------------------- producer
@gluon.jit
def ask_for(desc, at, ring, use):
    """Start loading one block; nothing else may be expected in this slot."""
    slot = ring.full.index(use % ring.SLOTS)
    mbarrier.expect(slot, bytes_of(desc.block_type))
    tma_load(desc, at, slot, ring.slot(use))


@gluon.jit
def ask_with_row_values(desc, values_desc, head, row, sum_row, ring, values, use, work):
    """Start loading a block of rows and one number for each row, whose bytes are expected already.

    Only these numbers come from the launch before, so only they wait for it.
    """
    slot = ring.full.index(use % ring.SLOTS)
    tma_load(desc, coordinates(work.queries, head, row), slot, ring.slot(use))
    if use == 0:
        wait_for_dependencies()
    tma_load(values_desc, [sum_row], slot, values.index(use % ring.SLOTS))


@gluon.jit
def producer(work, shared, group, q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc):
    """Ask for everything that the consumers read, as slots become empty."""
    TOGETHER: gl.constexpr = 2 if work.config.DQ_GROUP else 1
    BYTES: gl.constexpr = bytes_of(q_desc.block_type) + bytes_of(lse_desc.block_type)
    at = coordinates(work.keys, work.key_head, work.first_key)
    ask_for(k_desc, at, shared.k, 0)
    ask_for(v_desc, at, shared.v, 0)
    head = first_query_head(work, group)
    row = work.first_row
    sum_row = work.first_sum
    for i in range(work.steps):
        shared.q.wait_empty(i)
        mbarrier.expect(shared.q.full.index(i % shared.q.SLOTS), TOGETHER * BYTES)
        ask_with_row_values(q_desc, lse_desc, head, row, sum_row, shared.q, shared.lse, i, work)
        if not work.config.DQ_GROUP:
            shared.do.wait_empty(i)
            mbarrier.expect(shared.do.full.index(i % shared.do.SLOTS), BYTES)
        ask_with_row_values(
            do_desc, delta_desc, head, row, sum_row, shared.do, shared.delta, i, work
        )
        row, sum_row = step_after(work, row, sum_row)
        head = gl.where(row == work.first_row, head + 1, head)
    allow_dependents()


# ---------------------------------------------------------------------------------------- consumer
@gluon.jit
def mask_weights(work, p, first_key, first_row):
    """0 where a query does not see a key; ``p`` is (ROWS keys, BLOCK_M queries).

    The registers of a thread hold columns 8a + 2t + c with t the thread's place among four. Taken
    apart like that, the comparison is with a constant for each register and one or two numbers for
    each key, so no register holds column numbers.
    """
    WEIGHTS: gl.constexpr = p.type.layout
    BLOCK_M: gl.constexpr = work.config.BLOCK_M
    parts = p.reshape([ROWS, BLOCK_M // 8, 4, 2])
    PARTS: gl.constexpr = parts.type.layout
    A: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, PARTS)))
    T: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, PARTS)))
    C: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, PARTS)))
    K: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PARTS)))
    column = gl.arange(0, BLOCK_M // 8, layout=A)[None, :, None, None] * 8
    column = column + gl.arange(0, 2, layout=C)[None, None, None, :]
    origin = gl.arange(0, 4, layout=T)[None, None, :, None] * 2 + first_row
    key = first_key + gl.arange(0, ROWS, layout=K)
    first = key * 0
    if work.config.HAS_RIGHT:
        first = key - work.reach_right
    if work.config.HAS_CHUNK:
        chunk = chunk_of(key, work.chunk, work.phase) - work.shift
        first = gl.maximum(first, chunk)
    first = gl.where(key < work.seqlen_k, first, NO_ROW)
    seen = column >= first[:, None, None, None] - origin
    if work.config.HAS_LEFT:
        last = key + work.reach_left
        if work.config.HAS_CHUNK:
            last = gl.minimum(last, chunk + work.chunk - 1)
        seen = seen & (column <= last[:, None, None, None] - origin)
    parts = gl.where(seen, parts, 0.0)
    return gl.convert_layout(parts.reshape([ROWS, BLOCK_M]), WEIGHTS, assert_trivial=True)


@gluon.jit
def mask_if_needed(work, p, first_key, first_row):
    """Weights of ROWS keys, masked unless every query of the block sees every key."""
    outside = first_key + ROWS > work.seqlen_k
    if work.config.HAS_RIGHT:
        outside = outside | (first_row + work.reach_right < first_key + ROWS - 1)
    if work.config.HAS_LEFT:
        outside = outside | (first_row + work.config.BLOCK_M - 1 - work.reach_left > first_key)
    if work.config.HAS_CHUNK:
        begin = chunk_of(first_key, work.chunk, work.phase)
        last = gl.maximum(first_key + ROWS, first_row + work.config.BLOCK_M + work.shift) - 1
        outside = outside | (first_row + work.shift < begin) | (last >= begin + work.chunk)
    if outside:
        p = mask_weights(work, p, first_key, first_row)
    return p


@gluon.jit
def subtract_alibi(work, s, first_key, first_row, head):
    """Base-2 exponents less the head's slope times the distance between query and key.

    Taken apart as in mask_weights.
    """
    SCORES: gl.constexpr = s.type.layout
    BLOCK_M: gl.constexpr = work.config.BLOCK_M
    parts = s.reshape([ROWS, BLOCK_M // 8, 4, 2])
    PARTS: gl.constexpr = parts.type.layout
    A: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, PARTS)))
    T: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, PARTS)))
    C: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, PARTS)))
    K: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PARTS)))
    slope = gl.load(work.slopes + head).to(gl.float32) * LOG2E
    column = gl.arange(0, BLOCK_M // 8, layout=A)[None, :, None, None] * 8
    column = column + gl.arange(0, 2, layout=C)[None, None, None, :]
    origin = gl.arange(0, 4, layout=T)[None, None, :, None] * 2 + (first_row + work.shift)
    key = first_key + gl.arange(0, ROWS, layout=K)
    ahead = (origin - key[:, None, None, None]).to(gl.float32) + column.to(gl.float32)
    parts = parts - slope * gl.maximum(ahead, -ahead)
    return gl.convert_layout(parts.reshape([ROWS, BLOCK_M]), SCORES, assert_trivial=True)


@gluon.jit
def keys_of(ring, LANE: gl.constexpr, work):
    """The 64 rows of k or v that a consumer owns."""
    whole = ring.data.index(opaque_zero()).reshape([work.config.BLOCK_N, work.config.BLOCK_D])
    return whole.slice(LANE * ROWS, ROWS, 0)


@gluon.jit
def left_operand(keys, SCORES: gl.constexpr, KEEPS: gl.constexpr):
    """k or v as what S or dP are computed from: in registers or in shared memory."""
    if KEEPS:
        keys = keys.load(gl.DotOperandLayout(0, SCORES, 2))
    return keys


@gluon.jit
def rows_of(ring, use, work):
    """The block of q or do in use."""
    return ring.slot(use).reshape([work.config.BLOCK_M, work.config.BLOCK_D])


@gluon.jit
def keys_by_rows(keys, rows, start, config, ADDS: gl.constexpr = False):
    """Start keys rows^T, (ROWS, BLOCK_M), with ADDS added to ``start``: as many products as there
    are pieces."""
    if config.KEEPS_KEYS:
        product = warpgroup_mma(keys, rows.permute([1, 0]), start, use_acc=ADDS, is_async=True)
    else:
        product = start
        for j in gl.static_range(pieces_of(config.WIDTH)):
            left = piece_of(keys, j, config)
            right = piece_of(rows, j, config).permute([1, 0])
            product = warpgroup_mma(left, right, product, use_acc=ADDS or j > 0, is_async=True)
    return product


@gluon.jit
def no_sums_of_pieces(config):
    """Zeros for dk or dv."""
    sums = ()
    for j in gl.static_range(pieces_of(config.WIDTH)):
        sums += (no_sums(columns_of(config.WIDTH, j)),)
    return sums


@gluon.jit
def left_of_sums(weights, COLUMNS: gl.constexpr):
    """Weights as what sums of so many columns are added up from."""
    return gl.convert_layout(weights, gl.DotOperandLayout(0, layout_of_sums(COLUMNS), 2))


@gluon.jit
def add_by_rows(sums, weights, rows, config):
    """Start sums += weights rows, piece by piece."""
    added = ()
    for j in gl.static_range(pieces_of(config.WIDTH)):
        left = left_of_sums(weights, columns_of(config.WIDTH, j))
        added += (warpgroup_mma(left, piece_of(rows, j, config), sums[j], is_async=True),)
    return added


@gluon.jit
def wait_for_sums(sums, PENDING: gl.constexpr, config):
    """The sums, when at most PENDING later products run."""
    done = warpgroup_mma_wait(PENDING, deps=sums)
    if pieces_of(config.WIDTH) == 1:
        done = (done,)
    return done


@gluon.jit
def exponents(work, s):
    """Base-2 exponents of the weights, before the log-sum-exp: of products q.k."""
    s = s * work.scale_log2
    if work.config.SOFTCAP:
        s = work.cap_log2 - 2.0 * work.cap_log2 / (gl.exp2(s) + 1.0)  # cap * tanh
    return s


@gluon.jit
def softcap_slope(work, p, lse):
    """The derivative of softcap, 1 - tanh^2. From the weights, because nothing else of the scores
    is left by then; where a weight is 0 it does not matter, as long as it is a number."""
    capped = (gl.log2(gl.maximum(p, 1e-37)) + lse) * (1.0 / work.cap_log2)
    capped = gl.minimum(gl.maximum(capped, -1.0), 1.0)
    return 1.0 - capped * capped


@gluon.jit
def store_keys(desc, work, ring, sums, factor, LANE: gl.constexpr):
    """Write ``factor`` times a consumer's rows of dv or dk by TMA, through those of v or k.

    Where they go is computed again: held through the loop, it would cost registers.
    """
    program = gl.program_id(0) + opaque_zero()
    if work.config.RAGGED:
        _, key_head, first_key, start, count, _, _ = work.lengths.keys(work.grid, program)
        span = rows_from(start, count)
    else:
        batch, key_head, key_block = work.grid.place(program)
        first_key = key_block * work.config.BLOCK_N
        span = whole_sequence(batch)
    rows = keys_of(ring, LANE, work)
    for j in gl.static_range(pieces_of(work.config.WIDTH)):
        piece_of(rows, j, work.config).store((sums[j] * factor).to(desc.dtype))
    fence_async_shared()
    source = ring.data.index(0).slice(LANE * ROWS, ROWS, 3 if work.config.RAGGED else 2)
    tma_store(desc, coordinates(span, key_head, first_key + LANE * ROWS), source)


@gluon.jit
def flat_register_order(tile, PIECE: gl.constexpr):
    """register_order, flat, of PIECE columns after the other: of each of these every warp's 16 rows
    follow each other."""
    COLUMNS: gl.constexpr = tile.shape[1]
    parts = tile.reshape([4, 2, 8, COLUMNS // PIECE, PIECE // 8, 4, 2])
    return parts.permute([3, 0, 4, 2, 5, 1, 6]).reshape([ROWS * COLUMNS])


@gluon.jit
def leave_sums(sums, grid, program, values, NUMBER: gl.constexpr, COUNT: gl.constexpr,
               PIECE: gl.constexpr):  # fmt: skip
    """Write the NUMBER-th of the COUNT tiles, ROWS keys and PIECE columns each, that a program has
    of the sums of dk, or of dv, and those after it, if there are more columns: with SPLIT, for
    finish_keys_sm90."""
    COLUMNS: gl.constexpr = values.shape[1]
    batch, part, key_block = grid.place(program)
    block = (batch * grid.nheads_k + part) * grid.key_blocks + key_block
    flat = flat_register_order(values, PIECE)
    sums += (block.to(gl.int64) * COUNT + NUMBER) * (ROWS * PIECE)
    gl.store(sums + gl.arange(0, ROWS * COLUMNS, layout=flat.type.layout), flat)


@gluon.jit
def leave_pieces(target, work, values, LANE: gl.constexpr):
    """Write a consumer's sums of dk or dv for finish_keys_sm90."""
    config = work.config
    LAST: gl.constexpr = columns_of(config.WIDTH, pieces_of(config.WIDTH) - 1)
    TILES: gl.constexpr = config.WIDTH // LAST
    program = gl.program_id(0) + opaque_zero()
    for j in gl.static_range(pieces_of(config.WIDTH)):
        number = LANE * TILES + j * 64 // LAST
        leave_sums(target, work.grid, program, values[j], number, 2 * TILES, LAST)


@gluon.jit
def wait_for_do(shared, use, config):
    """Wait for a block of do, which with DQ_GROUP comes with that of q."""
    if not config.DQ_GROUP:
        shared.do.wait_full(use)


@gluon.jit
def consumer(LANE: gl.constexpr, work, shared, group, dk_target, dv_target):
    """dk and dv of keys [64 * LANE, 64 * LANE + 64) of the program's, and dS for dq."""
    config = work.config
    BLOCK_M: gl.constexpr = config.BLOCK_M
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    FIRST: gl.constexpr = columns_of(config.WIDTH, 0)
    # How many products belong to one tensor: of those in flight behind what is waited for.
    ONE: gl.constexpr = pieces_of(config.WIDTH)
    dtype: gl.constexpr = shared.q.data.dtype

    dk = no_sums_of_pieces(config)
    dv = no_sums_of_pieces(config)
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, SCORES)
    dq_zeros = no_sums(columns_of_tile(config.WIDTH, config.BLOCK_D, LANE))
    first_key = work.first_key + LANE * ROWS
    row = work.first_row
    shared.k.wait_full(0)
    k = left_operand(keys_of(shared.k, LANE, work), SCORES, config.KEEPS_KEYS)
    if work.steps > 0:  # otherwise it multiplies what lies in shared memory, for nobody
        shared.q.wait_full(0)
    s = keys_by_rows(k, rows_of(shared.q, 0, work), zeros, config)
    s = warpgroup_mma_wait(0, deps=[s])
    if config.EARLY_LSE:
        lse = shared.lse.index(opaque_zero()).load(COLUMN)
    shared.v.wait_full(0)
    v = left_operand(keys_of(shared.v, LANE, work), SCORES, config.KEEPS_KEYS)
    start = zeros
    if config.DELTA_FIRST:
        if work.steps > 0:
            wait_for_do(shared, 0, config)
        start = zeros - gl.expand_dims(shared.delta.index(opaque_zero()).load(COLUMN), 0)
    for i in range(work.steps):
        if not config.KEEPS_KEYS:
            k = keys_of(shared.k, LANE, work)
            v = keys_of(shared.v, LANE, work)
        q = rows_of(shared.q, i, work)
        do = rows_of(shared.do, i, work)
        # The last step has no next one and starts its own S again, for nobody.
        following = gl.minimum(i + 1, work.steps - 1)

        # P, dV, dS.
        if not config.DELTA_FIRST:
            wait_for_do(shared, i, config)
        dp = keys_by_rows(v, do, start, config, config.DELTA_FIRST)
        if not config.EARLY_LSE:
            lse = shared.lse.index(i % shared.q.SLOTS).load(COLUMN)
        exponent = exponents(work, s)
        if config.HAS_ALIBI:
            head = first_query_head(work, group) + i // (work.steps // group)
            exponent = subtract_alibi(work, exponent, first_key, row, head)
        p = gl.exp2(exponent - gl.expand_dims(lse, 0))
        p = mask_if_needed(work, p, first_key, row)
        weights = left_of_sums(p.to(dtype), FIRST)
        if config.EAGER_DV:
            dv = add_by_rows(dv, weights, do, config)
            dp = warpgroup_mma_wait(ONE, deps=[dp])
        else:
            dp = warpgroup_mma_wait(0, deps=[dp])
            dv = add_by_rows(dv, weights, do, config)
        if not config.DELTA_FIRST:
            dp -= gl.expand_dims(shared.delta.index(i % shared.do.SLOTS).load(COLUMN), 0)
        ds = p * dp
        if config.SOFTCAP:
            lse_again = shared.lse.index(i % shared.q.SLOTS).load(COLUMN)
            ds *= softcap_slope(work, p, gl.expand_dims(lse_again, 0))
        ds = ds.to(dtype)
        if config.DQ_GROUP:
            shared.ds.wait_empty(i)
        shared.ds.slot(i).slice(LANE * ROWS, ROWS, 0).store(ds)
        ds = left_of_sums(ds, FIRST)

        # dK, the next S, and dQ or its share. Fences, which wait for all that was stored, come when
        # the products are on their way.
        if config.DQ_GROUP:
            dk = add_by_rows(dk, ds, q, config)
            shared.q.wait_full(following)  # and do
            s = keys_by_rows(k, rows_of(shared.q, following, work), zeros, config)
            fence_async_shared()
            shared.ds.announce(i)
        else:
            fence_async_shared()
            meet(CONSUMERS_MEET, 256)
            ds_turned, k_columns = dq_operands(work, shared, i, LANE)
            dq = warpgroup_mma(ds_turned, k_columns, dq_zeros, use_acc=False, is_async=True)
            dk = add_by_rows(dk, ds, q, config)
            dv = wait_for_sums(dv, 1 + ONE, config)  # and dq
            shared.do.release(i)
            dq = warpgroup_mma_wait(ONE, deps=[dq])
            store_for_adder(shared, dq, i * 2 + LANE)
            shared.q.wait_full(following)
            s = keys_by_rows(k, rows_of(shared.q, following, work), zeros, config)
            fence_async_shared()
            shared.dq.announce(i * 2 + LANE)
        if config.EARLY_LSE:
            lse = shared.lse.index(following % shared.q.SLOTS).load(COLUMN)
        if config.DELTA_FIRST:
            wait_for_do(shared, following, config)
            delta = shared.delta.index(following % shared.do.SLOTS).load(COLUMN)
            start = zeros - gl.expand_dims(delta, 0)
        dk = wait_for_sums(dk, ONE, config)
        if config.DQ_GROUP:
            dv = wait_for_sums(dv, ONE, config)
        shared.q.release(i)
        s = warpgroup_mma_wait(0, deps=[s])
        row = row_after(work, row)

    if config.SPLIT:
        leave_pieces(dv_target, work, dv, LANE)
        leave_pieces(dk_target, work, dk, LANE)
    else:
        # dk and dv leave through k and v; the other groups must be done with k.
        if config.DQ_GROUP:  # noqa: SIM102 -- one condition is a constant, the other is not
            if work.steps > 0:
                shared.ds.wait_empty(work.steps - 1 + shared.ds.SLOTS)
        meet(CONSUMERS_MEET, 256)
        store_keys(dv_target, work, shared.v, dv, 1.0, LANE)
        store_keys(dk_target, work, shared.k, dk, work.scale, LANE)
        tma.store_wait(0)


_NUMBERS = (
    "nheads_k", "group", "seqlen_q", "seqlen_k", "padded_rows", "window_left", "window_right",
    "key_blocks", "sequences", "section", "batch_size", "chunk", "phase", "stride_slope",
)  # fmt: skip
_POINTERS = ("bounds_q", "table", "used_q", "used_k", "slopes")


# ------------------------------------------------------------------------------------------ kernel
# A single split is a constant, so that without SPLIT there is no such argument.
@gluon.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=("splits", *_POINTERS))
def attention_backward_sm90(
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dq_desc, dk_target, dv_target,
    scale, scale_log2, cap_log2, nheads_k, group, splits, seqlen_q, seqlen_k, padded_rows,
    window_left, window_right, key_blocks, sequences, section, turns,
    bounds_q, table, used_q, used_k, batch_size, chunk, phase, slopes, stride_slope,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, Q_SLOTS: gl.constexpr, DO_SLOTS: gl.constexpr,
    DS_SLOTS: gl.constexpr, DQ_SLOTS: gl.constexpr,
    EAGER_DV: gl.constexpr, EARLY_LSE: gl.constexpr, DELTA_FIRST: gl.constexpr,
    DQ_GROUP: gl.constexpr, ADDER: gl.constexpr, IN_FLIGHT: gl.constexpr,
    REGISTERS: gl.constexpr, DQ_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
    DETERMINISTIC: gl.constexpr, REVERSED: gl.constexpr, FIRST_STORES: gl.constexpr,
    ROTATE: gl.constexpr, SOFTCAP: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, CU_Q: gl.constexpr, CU_K: gl.constexpr,
    USED_Q: gl.constexpr, USED_K: gl.constexpr, HAS_CHUNK: gl.constexpr, HAS_ALIBI: gl.constexpr,
    SPLIT: gl.constexpr, KEEPS_KEYS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """See the module's docstring; launched with 4 warps, those of one consumer.

    Args:
        q_desc, do_desc: TMA descriptors of (batch, nheads, seqlen_q, headdim) with blocks
            (1, 1, BLOCK_M, BLOCK_D); columns past headdim are read as 0.
        k_desc, v_desc: of (batch, nheads_k, seqlen_k, headdim) with blocks (1, 1, 128, BLOCK_D).
        lse_desc, delta_desc: of (batch * nheads * padded_rows,) float32 with blocks (BLOCK_M,).
        dq_desc: of the sums of dq, (batch * nheads * padded_rows * WIDTH / 64, 64) float32 with
            blocks (64, 64), or (32, 64) where WIDTH is 96.
        dk_target, dv_target: descriptors like k's with blocks (1, 1, 64, BLOCK_D); columns past
            headdim are not written. With SPLIT pointers to sequences * key_blocks * 128 * WIDTH
            float32, which finish_keys_sm90 reads.
        scale: softmax_scale; scale_log2: softmax_scale * log2(e), with SOFTCAP
            2 * softmax_scale / softcap * log2(e); cap_log2: softcap * log2(e).
        padded_rows: seqlen_q, up to a multiple of 128.
        key_blocks: blocks of 128 keys in a sequence, with CU_K the tiles of tiles_sm90.
        nheads_k, group: key heads, and query heads of each. With SPLIT ``nheads_k`` are parts of
            key heads, ``splits`` of each, 2 to ``group``.
        sequences: batch * nheads_k, with CU_K nheads_k; ``section`` of them are worked on at a
            time.
        turns: one for each 64 rows of all padded ones, int32, zeros. With DETERMINISTIC they count
            the programs that have added to these rows, for a block of more the first one does; with
            FIRST_STORES they are what claiming_adder says.
        bounds_q, table, used_q, used_k: see Lengths; with CU_Q, CU_K, USED_Q, USED_K alone, and
            with any of these all descriptors of rows are ragged, see Span. seqlen_q and
            seqlen_k are totals with CU_Q and CU_K, padded_rows with CU_Q too.
        chunk, phase: with HAS_CHUNK, which needs HAS_LEFT and HAS_RIGHT, keys of a chunk and how
            many of the first one the descriptors leave out.
        slopes, stride_slope: ALiBi's (batch, nheads), with HAS_ALIBI and without SOFTCAP.
        Q_SLOTS, DO_SLOTS: blocks of q and do; as many of each with DQ_GROUP.
        DS_SLOTS: buffers of dS; at least 2 without DQ_GROUP.
        DQ_SLOTS: buffers of 64 x 64 of dq; 2, or with ADDER more, even without DQ_GROUP.
        ADDER: needed without DQ_GROUP, and by DETERMINISTIC and FIRST_STORES, for which IN_FLIGHT
            says of how many steps the additions may be on their way before the oldest one's are
            waited for.
        WIDTH: columns that are multiplied, BLOCK_D, or 96 of 128 with ADDER; head dims are no
            larger.
        ROTATE: not with DETERMINISTIC, nor windows, causality and chunks; with FIRST_STORES not
            with more than 1 IN_FLIGHT.
        REGISTERS, DQ_REGISTERS, OTHER_REGISTERS: of a thread of the consumers (the first one gets
            what is left), of the dq group, and of the producer and the adder.
    """
    gl.static_assert(DQ_GROUP or (BLOCK_M // 64) * (BLOCK_D // 64) == 2)
    gl.static_assert(DQ_GROUP or DS_SLOTS >= 2)
    gl.static_assert(not DQ_GROUP or Q_SLOTS == DO_SLOTS)
    gl.static_assert(DQ_SLOTS == 2 or (ADDER and DQ_SLOTS > 2))
    gl.static_assert(DQ_GROUP or DQ_SLOTS % 2 == 0)
    gl.static_assert(ADDER or not (DETERMINISTIC or FIRST_STORES))
    gl.static_assert(ADDER or DQ_GROUP)
    gl.static_assert(not (ROTATE and (DETERMINISTIC or HAS_LEFT or HAS_RIGHT or HAS_CHUNK)))
    gl.static_assert(not (ROTATE and FIRST_STORES and IN_FLIGHT > 1))
    RAGGED: gl.constexpr = CU_Q or CU_K or USED_Q or USED_K
    gl.static_assert(not HAS_CHUNK or (HAS_LEFT and HAS_RIGHT))
    gl.static_assert(not (HAS_ALIBI and SOFTCAP))
    gl.static_assert(WIDTH == BLOCK_D or (WIDTH == 96 and BLOCK_D == 128))
    gl.static_assert(WIDTH == BLOCK_D or (ADDER and not KEEPS_KEYS))
    config = Config(BLOCK_M, BLOCK_D, EAGER_DV, DQ_GROUP, FIRST_STORES, ADDER,
                    IN_FLIGHT, DETERMINISTIC, SOFTCAP, HAS_LEFT, HAS_RIGHT, HAS_CHUNK, HAS_ALIBI,
                    RAGGED, 128, ROTATE, SPLIT, KEEPS_KEYS, WIDTH, EARLY_LSE,
                    DELTA_FIRST)  # fmt: skip
    q = ring_for(q_desc, Q_SLOTS, 2)
    if DQ_GROUP:
        do = Ring(buffers_for(do_desc, DO_SLOTS), q.full, q.empty, DO_SLOTS)
    else:
        do = ring_for(do_desc, DO_SLOTS, 2)
    k = ring_for(k_desc, 1, 0)
    v = ring_for(v_desc, 1, 0)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BLOCK_M], q_desc.dtype)
    ds_data = gl.allocate_shared_memory(q_desc.dtype, [DS_SLOTS, 128, BLOCK_M], DS)
    if DQ_GROUP:
        ds = new_ring(ds_data, DS_SLOTS, 2, 1)
    else:
        ds = Ring(ds_data, k.full, k.full, DS_SLOTS)  # the consumers meet: nobody asks its barriers
    gl.static_assert(dq_desc.block_type.shape[0] == rows_of_box(WIDTH))
    dq_data = gl.allocate_shared_memory(gl.float32, [DQ_SLOTS, ROWS, 64], dq_desc.layout)
    if ADDER:
        dq_ring = new_ring(dq_data, DQ_SLOTS, 1, 1)
    else:
        dq_ring = Ring(dq_data, k.full, k.full, DQ_SLOTS)
    shared = Shared(q, do, k, v, ds, buffers_for(lse_desc, Q_SLOTS),
                    buffers_for(delta_desc, DO_SLOTS), dq_ring)  # fmt: skip
    fence_async_shared()

    grid = Grid(nheads_k, key_blocks, sequences, section, REVERSED)
    lengths = Lengths(bounds_q, table, key_blocks, used_q, used_k, batch_size, seqlen_q, seqlen_k,
                      window_left, chunk, CU_Q, CU_K, USED_Q, USED_K, HAS_LEFT,
                      HAS_CHUNK)  # fmt: skip
    if RAGGED:
        batch, key_head, first_key, start_k, _, count_k, unseen = lengths.keys(
            grid, gl.program_id(0)
        )
        start_q, count_q = lengths.queries(batch)
        queries = rows_from(start_q, count_q)
        keys = rows_from(start_k, count_k)
    else:
        batch, key_head, key_block = grid.place(gl.program_id(0))
        first_key = key_block * 128
        count_q = seqlen_q
        count_k = seqlen_k
        queries = whole_sequence(batch)
        keys = whole_sequence(batch)
    shift = count_k - count_q
    reach_left = window_left - shift
    reach_right = window_right + shift
    if RAGGED and HAS_CHUNK:
        phase = unseen % chunk
    if RAGGED:  # past the keys in use there is nothing to add, and nobody waits for it
        count_q = gl.where(first_key < count_k, count_q, 0)
    first_row, end_row = rows_of_queries(
        first_key, count_q, count_k, reach_left, reach_right, shift, chunk, phase, config
    )
    rows = end_row - first_row
    to_next_head = padded_rows - rows + BLOCK_M
    if ROTATE:
        first_row = first_of_rotation(first_key, count_k, end_row, config)
        to_next_head = padded_rows
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
                first_row, end_row, first_sum, to_next_head,
                group * (rows // BLOCK_M), key_head, first_head, shift, chunk, phase,
                slopes + batch * stride_slope, queries, keys, grid, lengths,
                config)  # fmt: skip
    # Spelled out, because in tuples bound to a name constants become tensors.
    gl.warp_specialize(
        [
            (consumer, (0, work, shared, group, dk_target, dv_target)),
            (consumer, (1, work, shared, group, dk_target, dv_target)),
        ]
        + ([(dq_group, (work, shared, dq_desc))] if DQ_GROUP else [])
        + ([(claiming_adder if FIRST_STORES and not DETERMINISTIC else adder,
             (work, shared, turns, dq_desc))] if ADDER else [])
        + [
            (producer, (work, shared, group, q_desc, k_desc, v_desc, do_desc, lse_desc,
                        delta_desc)),
        ],
        [4]
        + ([4] if DQ_GROUP else [])
        + ([1] if ADDER else [])
        + [1],
        [REGISTERS]
        + ([DQ_REGISTERS] if DQ_GROUP else [])
        + ([OTHER_REGISTERS] if ADDER else [])
        + [OTHER_REGISTERS],
    )  # fmt: skip
