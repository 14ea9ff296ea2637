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

With P_SHARED some weights, or all, are multiplied from shared memory: registers hold a block's
scores and the output, but not weights besides. They are stored when the products with the values
before have been waited for, in a buffer of the consumer's own.

With JOINT keys and values share one ring, whose slots are used in the order in which the consumers
need them: k[0], k[1], v[0], k[2], v[1], .., v[last]. Three slots are enough for that, where two
rings need four.

SCHEDULER says how programs find tiles: ROUND_ROBIN (a program takes every n-th tile), DYNAMIC (the
producer takes the next tile from a counter in global memory while the consumers still compute, and
tells them through a mailbox; the last fetch of a launch sets the counter back to 0).
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_compat import aggregate, group_barrier, scalar_of, tma_load, tma_store

ROUND_ROBIN = gl.constexpr(0)
DYNAMIC = gl.constexpr(1)

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
# Where the sequences' lengths come from: the shapes, (batch,) tensors, or cumulative ones.
SHAPES = gl.constexpr(0)
USED = gl.constexpr(1)
PACKED = gl.constexpr(2)
# Numbers that describe a tile, see announce_tile, and bounds that are searched at a time.
RECORD = gl.constexpr(8)
SEARCHED = gl.constexpr(128)
# Weights grow to 2 to this power before their row's reference moves.
MOST_GROWTH = gl.constexpr(8.0)
# Rows of a consumer: what one warpgroup MMA instruction computes.
ROWS = gl.constexpr(64)
# The first hardware barrier that the compiler leaves alone.
FIRST_BARRIER = gl.constexpr(8)


# ---------------------------------------------------------------------------------- shared memory
@aggregate
class Ring:
    """Slots of shared memory that are written and read in turn.

    The n-th use of the ring takes slot n % SLOTS; a slot has LANES independent parts, each with a
    barrier of its own. Waiting on a barrier names the parity of the use: a barrier counts how
    often it completed, in one bit.
    """

    data: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    SLOTS: gl.constexpr
    LANES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, data, full, empty, SLOTS, LANES):
        self.data = data
        self.full = full
        self.empty = empty
        self.SLOTS = gl.constexpr(SLOTS)
        self.LANES = gl.constexpr(LANES)

    @gluon.jit
    def index(self, use, lane):
        return (use % self.SLOTS) * self.LANES + lane

    @gluon.jit
    def wait_full(self, use, lane):
        mbarrier.wait(self.full.index(self.index(use, lane)), (use // self.SLOTS) & 1)

    @gluon.jit
    def wait_empty(self, use, lane):
        mbarrier.wait(self.empty.index(self.index(use, lane)), ((use // self.SLOTS) & 1) ^ 1)

    @gluon.jit
    def release(self, use, lane):
        """Tell the writer that this warpgroup is done with the slot."""
        mbarrier.arrive(self.empty.index(self.index(use, lane)), count=1)


@gluon.constexpr_function
def stacked(count, block_type):
    """The shape of ``count`` blocks."""
    return [count, *block_type.shape]


@gluon.constexpr_function
def bytes_of(block_type):
    """Bytes of a block of 16-bit elements."""
    return 2 * math.prod(block_type.shape)


@gluon.jit
def new_ring(data, SLOTS: gl.constexpr, LANES: gl.constexpr, READERS: gl.constexpr):
    """A ring of SLOTS * LANES buffers, each read by READERS warpgroups."""
    COUNT: gl.constexpr = SLOTS * LANES
    BARRIERS: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], BARRIERS)
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], BARRIERS)
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return Ring(data, full, empty, SLOTS, LANES)


@gluon.jit
def buffers_for(desc, COUNT: gl.constexpr):
    """COUNT buffers for blocks of a descriptor."""
    return gl.allocate_shared_memory(desc.dtype, stacked(COUNT, desc.block_type), desc.layout)


@aggregate
class Shared:
    """All shared memory: what the producer and the consumers exchange, and the way out."""

    q: Ring
    k: Ring
    v: Ring
    mailbox: Ring
    out: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, k, v, mailbox, out, p):
        self.q = q
        self.k = k
        self.v = v
        self.mailbox = mailbox
        self.out = out
        self.p = p


@gluon.jit
def load_rows(desc, batch, head, row, ring, use, lane, PIECES: gl.constexpr):
    """Ask for the rows from ``row`` on, of a head or of as many as a block has; the slot's full
    barrier completes with them."""
    BYTES: gl.constexpr = bytes_of(desc.block_type)
    slot = ring.index(use, lane)
    COLUMNS: gl.constexpr = desc.block_type.shape[3]
    mbarrier.expect(ring.full.index(slot), PIECES * BYTES)
    for piece in gl.static_range(PIECES):
        tma_load(desc, [batch, head, row, piece * COLUMNS], ring.full.index(slot),
                 ring.data.index(slot * PIECES + piece))  # fmt: skip


# -------------------------------------------------------------------------------------------- work
@aggregate
class Config:
    """What is known when the kernel is compiled; see attention_forward_sm90."""

    PACK: gl.constexpr
    POSITIONS: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    BLOCK_D: gl.constexpr
    BLOCK_DV: gl.constexpr
    PIECES: gl.constexpr
    PIECES_V: gl.constexpr
    PARTS_V: gl.constexpr
    CONSUMERS: gl.constexpr
    SCHEDULER: gl.constexpr
    OUT_COLUMNS: gl.constexpr
    PING_PONG: gl.constexpr
    MOST_SKIPPED: gl.constexpr
    HAS_LEFT: gl.constexpr
    HAS_RIGHT: gl.constexpr
    HAS_CHUNK: gl.constexpr
    HAS_SOFTCAP: gl.constexpr
    HAS_SINKS: gl.constexpr
    HAS_ALIBI: gl.constexpr
    LENGTHS: gl.constexpr
    SLIM: gl.constexpr
    LATE: gl.constexpr
    OVERLAP: gl.constexpr
    PEEL: gl.constexpr
    JOINT: gl.constexpr
    P_SHARED: gl.constexpr
    PRODUCTS_V: gl.constexpr
    OUT_BUFFERS: gl.constexpr
    TRACE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, PACK, BLOCK_N, BLOCK_D, BLOCK_DV, CONSUMERS, SCHEDULER, OUT_COLUMNS,
                 PING_PONG, SKIP, HAS_LEFT, HAS_RIGHT, HAS_CHUNK, HAS_SOFTCAP, HAS_SINKS,
                 HAS_ALIBI, LENGTHS, SLIM, LATE, OVERLAP, PEEL, JOINT, P_SHARED,
                 TRACE):  # fmt: skip
        self.PACK = gl.constexpr(PACK)
        self.POSITIONS = gl.constexpr(64 // PACK)
        self.BLOCK_M = gl.constexpr(64 // PACK * CONSUMERS)
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.BLOCK_D = gl.constexpr(BLOCK_D)
        self.BLOCK_DV = gl.constexpr(BLOCK_DV)
        self.PIECES = gl.constexpr(3 if BLOCK_D % 3 == 0 else 1)
        self.PIECES_V = gl.constexpr(3 if BLOCK_DV % 3 == 0 else 1)
        # Products that the values' columns are multiplied in.
        self.PARTS_V = gl.constexpr(2 if BLOCK_DV % 3 == 0 else 1)
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.SCHEDULER = gl.constexpr(SCHEDULER)
        self.OUT_COLUMNS = gl.constexpr(OUT_COLUMNS)
        self.PING_PONG = gl.constexpr(PING_PONG)
        self.MOST_SKIPPED = gl.constexpr(CONSUMERS if SKIP and HAS_RIGHT else 0)
        self.HAS_LEFT = gl.constexpr(HAS_LEFT)
        self.HAS_RIGHT = gl.constexpr(HAS_RIGHT)
        self.HAS_CHUNK = gl.constexpr(HAS_CHUNK)
        self.HAS_SOFTCAP = gl.constexpr(HAS_SOFTCAP)
        self.HAS_SINKS = gl.constexpr(HAS_SINKS)
        self.HAS_ALIBI = gl.constexpr(HAS_ALIBI)
        self.LENGTHS = gl.constexpr(LENGTHS)
        self.SLIM = gl.constexpr(SLIM)
        self.LATE = gl.constexpr(LATE)
        self.OVERLAP = gl.constexpr(OVERLAP)
        self.PEEL = gl.constexpr(PEEL)
        self.JOINT = gl.constexpr(JOINT)
        self.P_SHARED = gl.constexpr(P_SHARED)
        # Products that values are multiplied in: by columns, and by where keys' weights are.
        self.PRODUCTS_V = gl.constexpr(self.PARTS_V * (2 if 0 < P_SHARED < BLOCK_N else 1))
        # Buffers of a consumer that results leave through.
        self.OUT_BUFFERS = gl.constexpr(self.PIECES_V if P_SHARED else 1)
        self.TRACE = gl.constexpr(TRACE)


@aggregate
class Sequences:
    """Where the sequences' rows are, with LENGTHS; see attention_forward_sm90."""

    batch: gl.tensor
    cu_seqlens_q: gl.tensor
    cu_seqlens_k: gl.tensor
    used_q: gl.tensor
    used_k: gl.tensor
    HAS_USED_Q: gl.constexpr
    HAS_USED_K: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, batch, cu_seqlens_q, cu_seqlens_k, used_q, used_k, HAS_USED_Q, HAS_USED_K):
        self.batch = batch
        self.cu_seqlens_q = cu_seqlens_q
        self.cu_seqlens_k = cu_seqlens_k
        self.used_q = used_q
        self.used_k = used_k
        self.HAS_USED_Q = gl.constexpr(HAS_USED_Q)
        self.HAS_USED_K = gl.constexpr(HAS_USED_K)


@aggregate
class Work:
    """What is known when the kernel is launched, and the configuration.

    ``nheads`` counts the heads of tiles: PACK query heads each. ``seqlen_q`` and ``seqlen_k`` are
    what the tensors hold, totals with PACKED.
    """

    scale_log2: gl.tensor
    cap_scale: gl.tensor
    empty_lse: gl.tensor
    nheads: gl.tensor
    group: gl.tensor
    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor
    chunk: gl.tensor
    row_tiles: gl.tensor
    sequences: gl.tensor
    section: gl.tensor
    in_sections: gl.tensor
    tiles: gl.tensor
    trace: gl.tensor
    slopes: gl.tensor
    step_slope: gl.tensor
    places: Sequences
    config: Config

    @gluon.constexpr_function
    def __init__(self, scale_log2, cap_scale, empty_lse, nheads, group, seqlen_q, seqlen_k,
                 window_left, window_right, chunk, row_tiles, sequences, section, in_sections,
                 tiles, trace, slopes, step_slope, places, config):  # fmt: skip
        self.scale_log2 = scale_log2
        self.cap_scale = cap_scale
        self.empty_lse = empty_lse
        self.nheads = nheads
        self.group = group
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self.window_left = window_left
        self.window_right = window_right
        self.chunk = chunk
        self.row_tiles = row_tiles
        self.sequences = sequences
        self.section = section
        self.in_sections = in_sections
        self.tiles = tiles
        self.trace = trace
        self.slopes = slopes
        self.step_slope = step_slope
        self.places = places
        self.config = config


@aggregate
class Span:
    """Rows of a tile's head in a sequence: where they are and how many there are.

    Queries are rows [q_start, q_start + rows) of the tensors' entry, of which the first rows_q take
    part (the others are as rows without keys), and keys rows [k_start, k_start + rows_k). The entry
    is that of the sequence, with PACKED the only one.
    """

    sequence: gl.tensor
    head: gl.tensor
    q_start: gl.tensor
    rows: gl.tensor
    rows_q: gl.tensor
    k_start: gl.tensor
    rows_k: gl.tensor

    @gluon.constexpr_function
    def __init__(self, sequence, head, q_start, rows, rows_q, k_start, rows_k):
        self.sequence = sequence
        self.head = head
        self.q_start = q_start
        self.rows = rows
        self.rows_q = rows_q
        self.k_start = k_start
        self.rows_k = rows_k


@aggregate
class Tile:
    """BLOCK_M positions of queries from ``first_row`` on, and the blocks
    [first_block, first_block + blocks) of keys that they see.

    There is always at least one block, with ``is_empty`` if no row sees any of its keys.
    """

    span: Span
    first_row: gl.tensor
    first_block: gl.tensor
    blocks: gl.tensor
    is_empty: gl.tensor

    @gluon.constexpr_function
    def __init__(self, span, first_row, first_block, blocks, is_empty):
        self.span = span
        self.first_row = first_row
        self.first_block = first_block
        self.blocks = blocks
        self.is_empty = is_empty


@gluon.jit
def entry_of(work, span):
    """Where the tensors have the span's sequence."""
    entry = span.sequence
    if work.config.LENGTHS == PACKED:
        entry = gl.to_tensor(0)
    return entry


@gluon.jit
def row_of(work, first_row, i):
    """Where row ``i`` of a consumer is in its sequence, when its first one is at ``first_row``."""
    if work.config.PACK > 1:
        i = i & (work.config.POSITIONS - 1)
    return first_row + i


@gluon.jit
def head_of(work, span, i):
    """The query head of row ``i`` of a consumer."""
    head = span.head
    if work.config.PACK > 1:
        head = head * work.config.PACK + i // work.config.POSITIONS
    return head


@gluon.jit
def chunk_of(work, position):
    """First position of the chunk of a position, which may be negative."""
    start = position // work.chunk * work.chunk  # rounded towards 0
    return gl.where(start > position, start - work.chunk, start)


@gluon.jit
def first_key_of(work, span, row):
    """First key that ``row`` sees, with HAS_LEFT; maybe negative."""
    position = row + (span.rows_k - span.rows_q)
    first = position - work.window_left
    if work.config.HAS_CHUNK:
        first = gl.maximum(first, chunk_of(work, position))
    return first


@gluon.jit
def key_end(work, span, row):
    """End of the keys that ``row`` sees; not past ``rows_k``, but maybe negative."""
    end = span.rows_k
    if work.config.HAS_RIGHT:
        position = row + (span.rows_k - span.rows_q)
        end = gl.minimum(position + work.window_right + 1, end)
        if work.config.HAS_CHUNK:
            end = gl.minimum(chunk_of(work, position) + work.chunk, end)
    return end


@gluon.jit
def tile_of(work, span, first_row):
    """The tile of a span's rows from ``first_row`` on."""
    last_row = gl.minimum(first_row + work.config.BLOCK_M, span.rows_q) - 1
    end = key_end(work, span, last_row)
    end_block = (end + work.config.BLOCK_N - 1) // work.config.BLOCK_N
    first_block = gl.to_tensor(0)
    if work.config.HAS_LEFT:
        first = gl.maximum(first_key_of(work, span, first_row), 0)
        first_block = first // work.config.BLOCK_N
    blocks = end_block - first_block
    if work.config.LENGTHS != SHAPES:
        blocks = gl.where(first_row < span.rows_q, blocks, 0)
    return Tile(span, first_row, first_block, gl.maximum(blocks, 1), blocks <= 0)


@gluon.jit
def place_of(work, index):
    """(sequence, head, row tile) of number ``index``; row tiles of all sequences with PACKED.

    Heads (of all sequences) are taken in sections whose keys and values stay in the L2 cache.
    Within a section heads run fastest; with a right bound rows run from the last, which has the
    most work, to the first. Small sections spread the memory's work, but end with few light tiles
    to share out: from head ``in_sections`` on the rest is one section.
    """
    span = work.row_tiles * work.section
    first_head = gl.minimum(index // span * work.section, work.in_sections)
    last_head = first_head + work.section
    last_head = gl.where(first_head == work.in_sections, work.sequences, last_head)
    within = index - first_head * work.row_tiles
    # An index past the last tile is asked about too, with LENGTHS: whatever comes out is unused.
    heads = gl.maximum(gl.minimum(last_head, work.sequences) - first_head, 1)
    row_tile = within // heads
    sequence = first_head + within - row_tile * heads
    if work.config.HAS_RIGHT:
        row_tile = work.row_tiles - 1 - row_tile
    batch = sequence // work.nheads
    return batch, sequence - batch * work.nheads, row_tile


@gluon.jit
def tile_at(work, index):
    """The tile of number ``index``; with LENGTHS it may have no rows."""
    batch, head, row_tile = place_of(work, index)
    if work.config.LENGTHS == PACKED:
        span, row_tile = packed_span(work, head, row_tile)
    else:
        zero = gl.to_tensor(0)
        rows_q, rows_k = work.seqlen_q, work.seqlen_k
        if work.config.LENGTHS == USED:
            rows_q, rows_k = used_lengths(work, batch, rows_q, rows_k)
        span = Span(batch, head, zero, work.seqlen_q, rows_q, zero, rows_k)
    return tile_of(work, span, row_tile * work.config.BLOCK_M)


@gluon.jit
def clamp(x, low, high):
    """``x`` moved into [low, high]."""
    return gl.minimum(gl.maximum(x, low), high)


@gluon.jit
def used_lengths(work, sequence, rows_q, rows_k):
    """The lengths of a sequence of the batch, clamped to the given ones."""
    places = work.places
    index = clamp(sequence, 0, places.batch - 1)
    if places.HAS_USED_Q:
        rows_q = clamp(gl.load(places.used_q + index), 0, rows_q)
    if places.HAS_USED_K:
        rows_k = clamp(gl.load(places.used_k + index), 0, rows_k)
    return rows_q, rows_k


@gluon.jit
def segment_bound(work, segment):
    """First row of a segment; segments are the rows before, of, and after the packed sequences."""
    batch = work.places.batch
    bound = gl.load(work.places.cu_seqlens_q + clamp(segment - 1, 0, batch))
    bound = clamp(bound, 0, work.seqlen_q)
    return gl.where(segment <= 0, 0, gl.where(segment > batch + 1, work.seqlen_q, bound))


@gluon.jit
def packed_span(work, head, slot):
    """(span, row tile within it) of the ``slot``-th tile of all packed rows.

    Segment s has the slots from ``segment_bound(s) // BLOCK_M + s`` on: enough for all its tiles,
    so nobody needs sums over the lengths. Its last slots may lie past its rows. Rows of no sequence
    are a span without keys.
    """
    EVERY_WARP: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    places = work.places
    started = 0
    for first in range(0, places.batch + 2, SEARCHED):
        segment = first + gl.arange(0, SEARCHED, layout=EVERY_WARP)
        first_slot = segment_bound(work, segment) // work.config.BLOCK_M + segment
        has_started = (segment < places.batch + 2) & (first_slot <= slot)
        started += gl.sum(has_started.to(gl.int32), 0)
    segment = started - 1
    start = segment_bound(work, segment)
    rows = gl.maximum(segment_bound(work, segment + 1) - start, 0)
    row_tile = slot - (start // work.config.BLOCK_M + segment)
    sequence = segment - 1
    index = clamp(sequence, 0, places.batch - 1)
    k_start = clamp(gl.load(places.cu_seqlens_k + index), 0, work.seqlen_k)
    k_end = clamp(gl.load(places.cu_seqlens_k + index + 1), k_start, work.seqlen_k)
    rows_q, rows_k = used_lengths(work, sequence, rows, k_end - k_start)
    rows_k = gl.where((sequence < 0) | (sequence >= places.batch), 0, rows_k)
    # Bounds that do not grow may put a slot before its segment: nobody computes it.
    rows = gl.where(row_tile < 0, 0, rows)
    span = Span(index, head, start, rows, rows_q, k_start, rows_k)
    return span, gl.maximum(row_tile, 0)


@gluon.jit
def blocks_to_skip(work, tile, LANE: gl.constexpr):
    """How many of the tile's last blocks no row of consumer LANE sees; at least one remains."""
    skipped = gl.to_tensor(0)
    if work.config.MOST_SKIPPED > 0:
        first_row = tile.first_row + LANE * work.config.POSITIONS
        end = key_end(work, tile.span, first_row + work.config.POSITIONS - 1)
        end = gl.where(first_row < tile.span.rows_q, end, 0)
        end_block = (end + work.config.BLOCK_N - 1) // work.config.BLOCK_N
        unseen = tile.first_block + tile.blocks - end_block
        most = gl.minimum(tile.blocks - 1, work.config.MOST_SKIPPED)
        skipped = gl.maximum(gl.minimum(unseen, most), 0)
    return skipped


# A tile uses the slots of keys and values from one on: once for each block, of both with JOINT.
@gluon.jit
def uses_of(work, blocks):
    """How many uses a tile of so many blocks is."""
    return 2 * blocks if work.config.JOINT else blocks


@gluon.jit
def key_use(work, first_use, i):
    """The use of a tile's i-th block of keys, counted from the last one."""
    use = first_use + i
    if work.config.JOINT:
        use = first_use + gl.maximum(2 * i - 1, 0)
    return use


@gluon.jit
def value_use(work, first_use, i, blocks):
    """The use of a tile's i-th block of values."""
    use = first_use + i
    if work.config.JOINT:
        use = first_use + gl.minimum(2 * i + 2, 2 * blocks - 1)
    return use


# ---------------------------------------------------------------------------------------- producer
@gluon.jit
def producer(work, shared, q_desc, k_desc, v_desc, counter):
    """Ask for everything that the consumers read, as slots become empty."""
    config = work.config
    index = gl.program_id(0)
    block_use = 0
    tile_use = 0
    if config.LENGTHS != SHAPES:
        index, tile = tile_with_rows(work, counter, index)
        announce_tile(index, tile, shared.mailbox, 0)
    while index < work.tiles:
        if config.LENGTHS == SHAPES:
            tile = tile_at(work, index)
        span = tile.span
        key_head = span.head // work.group
        entry = entry_of(work, span)
        next_index = work.tiles
        next_tile = tile
        for i in range(tile.blocks):
            row = span.k_start + (tile.first_block + tile.blocks - 1 - i) * config.BLOCK_N
            # Nobody sees an empty tile's keys: those past the end are zeros, whatever the others.
            row = gl.where(tile.is_empty, work.seqlen_k, row)
            use = key_use(work, block_use, i) if config.JOINT else block_use
            shared.k.wait_empty(use, 0)
            load_rows(k_desc, entry, key_head, row, shared.k, use, 0, config.PIECES)
            if i == 0:
                for lane in gl.static_range(config.CONSUMERS):
                    shared.q.wait_empty(tile_use, lane)
                    load_rows(q_desc, entry, span.head * config.PACK,
                              span.q_start + tile.first_row + lane * config.POSITIONS,
                              shared.q, tile_use, lane, config.PIECES)  # fmt: skip
            if not config.JOINT:
                shared.v.wait_empty(use, 0)
                load_rows(v_desc, entry, key_head, row, shared.v, use, 0, config.PIECES_V)
                block_use += 1
            elif i > 0:
                # The values of the keys before: of those behind in memory.
                shared.v.wait_empty(use + 1, 0)
                load_rows(v_desc, entry, key_head, row + config.BLOCK_N, shared.v, use + 1, 0,
                          config.PIECES_V)  # fmt: skip
            if config.SCHEDULER == DYNAMIC and not config.SLIM:
                # The first loads are on their way: time to fetch the next tile. Later, and it is
                # known better who will be free first; but then the fetch is waited for.
                at = gl.minimum(1, tile.blocks - 1)
                if config.LATE:
                    at = gl.maximum(tile.blocks - 2, 0)
                if i == at:
                    next_index = fetch_index(work, counter)
                    if config.LENGTHS == SHAPES:
                        announce(next_index, shared.mailbox, tile_use)
                    else:
                        next_index, next_tile = tile_with_rows(work, counter, next_index)
                        announce_tile(next_index, next_tile, shared.mailbox, tile_use + 1)
        if config.JOINT:
            row = span.k_start + tile.first_block * config.BLOCK_N
            row = gl.where(tile.is_empty, work.seqlen_k, row)
            block_use += uses_of(work, tile.blocks)
            shared.v.wait_empty(block_use - 1, 0)
            load_rows(v_desc, entry, key_head, row, shared.v, block_use - 1, 0, config.PIECES_V)
        if config.SCHEDULER == DYNAMIC and not config.SLIM:
            index = next_index
            tile = next_tile
        else:
            index = index_after(work, index, shared.mailbox, tile_use)
        tile_use += 1


@gluon.jit
def scheduler(work, mailbox, counter):
    """Fetch tiles, one ahead of the consumers."""
    index = gl.program_id(0)
    use = 0
    while index < work.tiles:
        mailbox.wait_empty(use, 0)
        index = fetch_index(work, counter)
        announce(index, mailbox, use)
        use += 1


@gluon.jit
def fetch_index(work, counter):
    """The next tile that no program has taken.

    A launch fetches once for each of its tiles: the last fetch leaves the counter at 0.
    """
    fetched = gl.atomic_add(counter, 1, sem="relaxed")
    if fetched == work.tiles - 1:
        gl.atomic_xchg(counter, 0, sem="relaxed")
    return fetched + gl.num_programs(0)


@gluon.jit
def tile_with_rows(work, counter, index):
    """(index, tile) of the first tile that has rows among ``index`` and those fetched after it."""
    tile = tile_at(work, index)
    while (index < work.tiles) & (tile.first_row >= tile.span.rows):
        index = fetch_index(work, counter)
        tile = tile_at(work, index)
    return index, tile


@gluon.jit
def put(mailbox, slot, number):
    ONE_NUMBER: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mailbox.data.index(slot).store(gl.full([1], number, gl.int32, ONE_NUMBER))


@gluon.jit
def get(mailbox, slot):
    ONE_NUMBER: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return scalar_of(mailbox.data.index(slot).load(ONE_NUMBER))


@gluon.jit
def announce(index, mailbox, use):
    """Tell the consumers which tile comes after the ``use``-th."""
    mailbox.wait_empty(use, 0)
    slot = mailbox.index(use, 0)
    put(mailbox, slot, index)
    mbarrier.arrive(mailbox.full.index(slot), count=1)


@gluon.jit
def announce_tile(index, tile, mailbox, use):
    """Tell the consumers what the ``use``-th tile is."""
    mailbox.wait_empty(use, 0)
    slot = mailbox.index(use, 0)
    first = slot * RECORD
    put(mailbox, first, index)
    put(mailbox, first + 1, tile.span.sequence)
    put(mailbox, first + 2, tile.span.head)
    put(mailbox, first + 3, tile.span.q_start)
    put(mailbox, first + 4, tile.span.rows)
    put(mailbox, first + 5, tile.span.rows_q)
    put(mailbox, first + 6, tile.span.rows_k)
    put(mailbox, first + 7, tile.first_row)
    mbarrier.arrive(mailbox.full.index(slot), count=1)


@gluon.jit
def announced_tile(work, mailbox, use):
    """(index, tile): what announce_tile said."""
    mailbox.wait_full(use, 0)
    slot = mailbox.index(use, 0)
    first = slot * RECORD
    index = get(mailbox, first)
    # Where the keys are is the producer's matter alone.
    span = Span(get(mailbox, first + 1), get(mailbox, first + 2), get(mailbox, first + 3),
                get(mailbox, first + 4), get(mailbox, first + 5), gl.to_tensor(0),
                get(mailbox, first + 6))  # fmt: skip
    first_row = get(mailbox, first + 7)
    mailbox.release(use, 0)
    return index, tile_of(work, span, first_row)


@gluon.constexpr_function
def register_text(name):
    return f"mov.u32 $0, %{name};"


@gluon.jit
def special_register(NAME: gl.constexpr):
    return gl.inline_asm_elementwise(register_text(NAME), "=r", [], dtype=gl.int32, is_pure=False,
                                     pack=1)  # fmt: skip


@gluon.jit
def program_of(work):
    """This program's number; see ``afresh``."""
    if work.config.P_SHARED:
        number = special_register("ctaid.x")
    else:
        number = gl.program_id(0)
    return number


@gluon.jit
def programs_of(work):
    """How many programs there are; see ``afresh``."""
    if work.config.P_SHARED:
        count = special_register("nctaid.x")
    else:
        count = gl.num_programs(0)
    return count


@gluon.jit
def index_after(work, index, mailbox, use):
    """The consumers' view of the schedule: the tile after the ``use``-th of this program."""
    if work.config.SCHEDULER == DYNAMIC:
        mailbox.wait_full(use, 0)
        following = get(mailbox, mailbox.index(use, 0))
        mailbox.release(use, 0)
    else:
        following = index + programs_of(work)
    return following


# ---------------------------------------------------------------------------------------- consumer
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
def here(x):
    """``x``, in a way that keeps the compiler from computing with it anywhere but here.

    Without windows the masks of all tiles are the same: kept in registers between tiles, they
    would take them from scores.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32,
                                     is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def afresh(work):
    """``work`` for one tile, with P_SHARED: what tiles are found by is read when it is needed.

    Else the compiler computes it once for all partitions, and keeps it in registers that P_SHARED
    has not got.
    """
    if work.config.P_SHARED:
        work = Work(work.scale_log2, work.cap_scale, work.empty_lse, here(work.nheads), work.group,
                    here(work.seqlen_q), here(work.seqlen_k), work.window_left, work.window_right,
                    work.chunk, here(work.row_tiles), work.sequences, here(work.section),
                    work.in_sections, work.tiles, work.trace, work.slopes, work.step_slope,
                    work.places, work.config)  # fmt: skip
    return work


@gluon.constexpr_function
def part_layouts(parts):
    """Of the numbers of columns a and c, of threads t, and of rows, in ``apart``'s layout."""
    s = gl.SliceLayout
    return (s(0, s(2, s(3, parts))), s(0, s(1, s(2, parts))), s(0, s(1, s(3, parts))),
            s(1, s(2, s(3, parts))))  # fmt: skip


@gluon.jit
def apart(work, s, first_key):
    """(scores, their columns, the number of the first key that a thread has less first_key's).

    The registers of a thread hold columns 8a + 2t + c with t the thread's place among four. Taken
    apart like that, what depends on a column is a constant for each register and one or two numbers
    for each row, so no register holds column numbers.
    """
    BLOCK_N: gl.constexpr = work.config.BLOCK_N
    parts = s.reshape([ROWS, BLOCK_N // 8, 4, 2])
    LAYOUTS: gl.constexpr = part_layouts(parts.type.layout)
    column = gl.arange(0, BLOCK_N // 8, layout=LAYOUTS[0])[None, :, None, None] * 8
    column = column + gl.arange(0, 2, layout=LAYOUTS[1])[None, None, None, :]
    origin = gl.arange(0, 4, layout=LAYOUTS[2])[None, None, :, None] * 2 + here(first_key)
    return parts, column, origin


@gluon.jit
def together(work, parts, s):
    """Scores that ``apart`` took apart, as ``s`` were."""
    SCORES: gl.constexpr = s.type.layout
    return gl.convert_layout(parts.reshape([ROWS, work.config.BLOCK_N]), SCORES,
                             assert_trivial=True)  # fmt: skip


@gluon.jit
def part_rows(work, first_row, parts):
    """The rows of scores taken apart."""
    LAYOUTS: gl.constexpr = part_layouts(parts.type.layout)
    return row_of(work, first_row, gl.arange(0, ROWS, layout=LAYOUTS[3]))[:, None, None, None]


@gluon.jit
def mask_scores(work, span, s, first_row, first_key):
    """-inf where a row does not see a key."""
    parts, column, origin = apart(work, s, first_key)
    row = part_rows(work, first_row, parts)
    seen = column < key_end(work, span, row) - origin
    if work.config.HAS_LEFT:
        seen = seen & (column >= first_key_of(work, span, row) - origin)
    return together(work, gl.where(seen, parts, float("-inf")), s)


@gluon.jit
def biased(work, span, s, first_row, first_key, slope):
    """``s`` less ``slope`` times the distance between a row's position and a key, with HAS_ALIBI.

    Distances are exact in float32 up to 2^24.
    """
    if work.config.HAS_ALIBI:
        parts, column, origin = apart(work, s, first_key)
        LAYOUTS: gl.constexpr = part_layouts(parts.type.layout)
        position = part_rows(work, first_row, parts) + (span.rows_k - span.rows_q)
        distance = gl.abs((position - origin).to(gl.float32) - column.to(gl.float32))
        slope = gl.convert_layout(slope, LAYOUTS[3], assert_trivial=True)
        parts = parts - slope[:, None, None, None] * distance
        s = together(work, parts, s)
    return s


@gluon.jit
def slopes_of(work, span, ROW_LAYOUT: gl.constexpr):
    """The consumer's rows' slopes in units of the unscaled scores, with HAS_ALIBI."""
    i = gl.arange(0, ROWS, ROW_LAYOUT)
    slope = gl.full([ROWS], 0.0, gl.float32, ROW_LAYOUT)
    if work.config.HAS_ALIBI:
        head = head_of(work, span, i) + i * 0
        at = work.slopes + span.sequence.to(gl.int64) * work.step_slope
        slope = gl.load(at + head) * (LOG2E / work.scale_log2)
    return slope


@gluon.jit
def mask_if_needed(work, span, s, first_row, first_key):
    """Scores of consumer rows from ``first_row`` on with keys from ``first_key`` on, masked unless
    every row sees every key."""
    outside = first_key + work.config.BLOCK_N > key_end(work, span, first_row)
    if work.config.HAS_LEFT:
        outside = outside | (
            first_key < first_key_of(work, span, first_row + work.config.POSITIONS - 1)
        )
    if outside:
        s = mask_scores(work, span, s, first_row, first_key)
    return s


@gluon.jit
def capped(work, s):
    """tanh(s * cap_scale): scores in units of the cap, with HAS_SOFTCAP."""
    if work.config.HAS_SOFTCAP:
        s = 1.0 - 2.0 / (1.0 + gl.exp2(s * (2.0 * LOG2E * work.cap_scale)))
    return s


@gluon.jit
def now():
    return gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], dtype=gl.int32,
                                     is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def nanoseconds():
    return gl.inline_asm_elementwise("mov.u32 $0, %globaltimer_lo;", "=r", [], dtype=gl.int32,
                                     is_pure=False, pack=1)  # fmt: skip


# Whether a row of the warp moved is a bit that the language has no value for: one a warp, which a
# branch can read without a vote of its own. It lives in a predicate register that is declared once.
@gluon.constexpr_function
def declare_flag(lane):
    return f".reg .pred moved_{lane}; mov.b32 $0, 0;"


@gluon.constexpr_function
def read_flag(lane):
    return f"selp.b32 $0, 1, 0, moved_{lane};"


@gluon.constexpr_function
def settle_text(lane):
    return f"""{{
        .reg .pred a, b;
        setp.gt.f32 a, $4, $6;
        setp.gt.f32 b, $5, $7;
        selp.f32 $0, $4, $2, a;
        selp.f32 $1, $5, $3, b;
        or.pred a, a, b;
        vote.sync.any.pred moved_{lane}, a, 0xffffffff;
    }}"""


@gluon.jit
def settle_maximum(m, m_new, limit, LANE: gl.constexpr):
    """``m_new`` where it is above ``limit``, else ``m``; notes whether a row of the warp moved.

    A thread holds two rows, and both are settled at once.
    """
    return gl.inline_asm_elementwise(
        settle_text(LANE), "=f,=f,f,f,f,f,f,f", [m, m_new, limit], dtype=gl.float32,
        is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def warp_has_moved(LANE: gl.constexpr):
    """What the last settle_maximum of this consumer noted; may differ between warps."""
    moved = gl.inline_asm_elementwise(read_flag(LANE), "=r", [], dtype=gl.int32, is_pure=False,
                                      pack=1)  # fmt: skip
    return moved != 0


@gluon.jit
def weights_of(work, s, maximum, MAYBE_EMPTY: gl.constexpr):
    """(exp2 of the scaled scores less the scaled row maximum, that maximum)."""
    shift = maximum
    if MAYBE_EMPTY:  # a row that has seen no key yet: every weight is 0, not NaN
        shift = gl.where(maximum == float("-inf"), 0.0, maximum)
    shift = shift * work.scale_log2
    return gl.exp2(s * work.scale_log2 - gl.expand_dims(shift, 1)), shift


@gluon.jit
def growth_of(work, m, shift, sums):
    """(ROWS, 1): what ``sums`` with reference ``m`` are multiplied by for that of ``shift``."""
    factor = gl.exp2(m * work.scale_log2 - shift)
    return gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, sums.type.layout)), 1)


@gluon.jit
def partial_sums(p, BLOCK_N: gl.constexpr):
    """(ROWS, 4): the sums of what each of the four threads that share a row holds."""
    return gl.sum(gl.sum(p.reshape([ROWS, BLOCK_N // 8, 4, 2]), 3), 1)


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
    if N == work.config.BLOCK_N:
        shared.p.index(LANE).store(p)
        fence_async_shared()
    elif N > 0:
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
    if IN_REGISTERS > 0:
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


@gluon.jit
def finish_rows(work, span, row, head, m, total, sinks):
    """(whether a row sees a key, what its weights are divided by, its log-sum-exp).

    ``head`` is its query head, one for all or one for each row.
    """
    sees = total > 0.0
    if work.config.LENGTHS != SHAPES:
        sees = sees & (row < span.rows_q)
    exponent = m * work.scale_log2
    divisor = total
    empty = work.empty_lse
    if work.config.HAS_SINKS:
        sink = gl.load(sinks + head).to(gl.float32)
        # Of a sink above all scores the weights may vanish, never the sum overflow.
        top = gl.maximum(exponent, sink * LOG2E)
        down = gl.where(sees, gl.exp2(exponent - top), 1.0)
        total = total * down + gl.exp2(sink * LOG2E - top)
        divisor = total / down
        exponent = top
        empty = sink
    lse = gl.where(sees, (exponent + gl.log2(total)) * LN2, empty)
    return sees, divisor, lse


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


# ------------------------------------------------------------------------------------------ kernel
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
            from registers: 0, half of BLOCK_N, or BLOCK_N.
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
    gl.static_assert(P_SHARED == 0 or P_SHARED == BLOCK_N // 2 or P_SHARED == BLOCK_N)
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
