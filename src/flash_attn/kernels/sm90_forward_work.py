"""What a program of the Hopper forward works on: rings of shared memory, and the tiles of queries
with the blocks of keys that they see; see ``sm90_forward``."""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_compat import aggregate, tma_load

ROUND_ROBIN = gl.constexpr(0)
DYNAMIC = gl.constexpr(1)

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
# Where the sequences' lengths come from: the shapes, (batch,) tensors, or cumulative ones.
SHAPES = gl.constexpr(0)
USED = gl.constexpr(1)
PACKED = gl.constexpr(2)
# Bounds that are searched at a time.
SEARCHED = gl.constexpr(128)
# Rows of a consumer: what one warpgroup MMA instruction computes.
ROWS = gl.constexpr(64)


# ------------------------------------------------------------------------------------ shared memory
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


# --------------------------------------------------------------------------------------------- work
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
    AFRESH: gl.constexpr
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
        # Registers are so few that what tiles are found by is not kept: see afresh.
        self.AFRESH = gl.constexpr(P_SHARED > 0)
        # Products that values are multiplied in: by columns, and by where keys' weights are.
        self.PRODUCTS_V = gl.constexpr(self.PARTS_V * (2 if P_SHARED else 1))
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


# ---------------------------------------------------------------------------------------- registers
@gluon.jit
def here(x):
    """``x``, in a way that keeps the compiler from computing with it anywhere but here.

    Without windows the masks of all tiles are the same: kept in registers between tiles, they
    would take them from scores.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32,
                                     is_pure=False, pack=1)  # fmt: skip


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
    if work.config.AFRESH:
        number = special_register("ctaid.x")
    else:
        number = gl.program_id(0)
    return number


@gluon.jit
def programs_of(work):
    """How many programs there are; see ``afresh``."""
    if work.config.AFRESH:
        count = special_register("nctaid.x")
    else:
        count = gl.num_programs(0)
    return count


@gluon.jit
def afresh(work):
    """``work`` for one tile, with AFRESH: what tiles are found by is read when it is needed.

    Else the compiler computes it once for all partitions, and keeps it in registers that are not
    there.
    """
    if work.config.AFRESH:
        work = Work(work.scale_log2, work.cap_scale, work.empty_lse, here(work.nheads), work.group,
                    here(work.seqlen_q), here(work.seqlen_k), work.window_left, work.window_right,
                    work.chunk, here(work.row_tiles), work.sequences, here(work.section),
                    work.in_sections, work.tiles, work.trace, work.slopes, work.step_slope,
                    work.places, work.config)  # fmt: skip
    return work
