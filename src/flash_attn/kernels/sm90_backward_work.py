"""What a program of the Hopper backward works on: rings of shared memory, its keys, and the rows of
queries that see them; see ``sm90_backward``."""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_async import aggregate

LOG2E = gl.constexpr(1.4426950408889634)
# Keys of a consumer and rows of a tile of dq: what one warpgroup MMA instruction computes.
ROWS = gl.constexpr(64)
NO_ROW = gl.constexpr(0x3FFFFFFF)
# The rows that a ragged descriptor claims to have: see Span.
FAR = gl.constexpr(1 << 30)


# ---------------------------------------------------------------------------------- shared memory
@aggregate
class Ring:
    """Slots of shared memory that are written and read in turn.

    The n-th use of the ring takes slot n % SLOTS. Waiting on a barrier names the parity of the
    use: a barrier counts how often it completed, in one bit.
    """

    data: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    SLOTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, data, full, empty, SLOTS):
        self.data = data
        self.full = full
        self.empty = empty
        self.SLOTS = gl.constexpr(SLOTS)

    @gluon.jit
    def slot(self, use):
        return self.data.index(use % self.SLOTS)

    @gluon.jit
    def wait_full(self, use):
        mbarrier.wait(self.full.index(use % self.SLOTS), (use // self.SLOTS) & 1)

    @gluon.jit
    def wait_empty(self, use):
        mbarrier.wait(self.empty.index(use % self.SLOTS), ((use // self.SLOTS) & 1) ^ 1)

    @gluon.jit
    def announce(self, use):
        """This warpgroup has written its part of the slot."""
        mbarrier.arrive(self.full.index(use % self.SLOTS), count=1)

    @gluon.jit
    def release(self, use):
        """This warpgroup is done with the slot."""
        mbarrier.arrive(self.empty.index(use % self.SLOTS), count=1)


@gluon.jit
def new_ring(data, SLOTS: gl.constexpr, WRITERS: gl.constexpr, READERS: gl.constexpr):
    """A ring over SLOTS buffers; TMA counts as one writer.

    Without READERS nobody says, or asks, whether a slot is empty. There are no barriers for that
    then: the compiler would put other data in the place of barriers that nobody uses, and the
    hardware may write an initialised barrier back to memory later.
    """
    BARRIERS: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIERS)
    empty = full
    if READERS > 0:
        empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIERS)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=WRITERS)
        if READERS > 0:
            mbarrier.init(empty.index(i), count=READERS)
    return Ring(data, full, empty, SLOTS)


@gluon.constexpr_function
def stacked(count, block_type):
    """The shape of ``count`` blocks."""
    return [count, *block_type.shape]


@gluon.constexpr_function
def bytes_of(block_type):
    """Bytes of a block."""
    return math.prod(block_type.shape) * block_type.element_ty.primitive_bitwidth // 8


@gluon.jit
def ring_for(desc, SLOTS: gl.constexpr, READERS: gl.constexpr):
    """A ring that TMA fills with blocks of a descriptor."""
    shape: gl.constexpr = stacked(SLOTS, desc.block_type)
    return new_ring(gl.allocate_shared_memory(desc.dtype, shape, desc.layout), SLOTS, 1, READERS)


@gluon.jit
def buffers_for(desc, COUNT: gl.constexpr):
    """COUNT buffers for blocks of a descriptor."""
    return gl.allocate_shared_memory(desc.dtype, stacked(COUNT, desc.block_type), desc.layout)


@aggregate
class Shared:
    """All shared memory. ``lse`` comes with ``q`` and ``delta`` with ``do``, slot by slot.

    With DQ_GROUP ``do`` comes and goes with ``q`` and has the same barriers. Only with ADDER are
    those of ``dq`` used.
    """

    q: Ring
    do: Ring
    k: Ring
    v: Ring
    ds: Ring
    lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    dq: Ring

    @gluon.constexpr_function
    def __init__(self, q, do, k, v, ds, lse, delta, dq):
        self.q = q
        self.do = do
        self.k = k
        self.v = v
        self.ds = ds
        self.lse = lse
        self.delta = delta
        self.dq = dq


# -------------------------------------------------------------------------------------------- work
@aggregate
class Config:
    """What is known when the kernel is compiled; see attention_backward_sm90."""

    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    BLOCK_D: gl.constexpr
    EAGER_DV: gl.constexpr
    TURNS: gl.constexpr
    DQ_GROUP: gl.constexpr
    FIRST_STORES: gl.constexpr
    ADDER: gl.constexpr
    IN_FLIGHT: gl.constexpr
    DETERMINISTIC: gl.constexpr
    ROTATE: gl.constexpr
    SOFTCAP: gl.constexpr
    HAS_LEFT: gl.constexpr
    HAS_RIGHT: gl.constexpr
    HAS_CHUNK: gl.constexpr
    HAS_ALIBI: gl.constexpr
    RAGGED: gl.constexpr
    SPLIT: gl.constexpr
    KEEPS_KEYS: gl.constexpr
    WIDTH: gl.constexpr
    EARLY_LSE: gl.constexpr
    DELTA_FIRST: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, BLOCK_M, BLOCK_D, EAGER_DV, DQ_GROUP, FIRST_STORES, ADDER, IN_FLIGHT,
                 DETERMINISTIC, SOFTCAP, HAS_LEFT, HAS_RIGHT, HAS_CHUNK, HAS_ALIBI, RAGGED,
                 BLOCK_N=128, ROTATE=False, SPLIT=False, KEEPS_KEYS=False, WIDTH=None,
                 EARLY_LSE=False, DELTA_FIRST=False, TURNS=False):  # fmt: skip
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.BLOCK_D = gl.constexpr(BLOCK_D)
        self.EAGER_DV = gl.constexpr(EAGER_DV)
        self.TURNS = gl.constexpr(TURNS)
        self.DQ_GROUP = gl.constexpr(DQ_GROUP)
        self.FIRST_STORES = gl.constexpr(FIRST_STORES)
        self.ADDER = gl.constexpr(ADDER)
        self.IN_FLIGHT = gl.constexpr(IN_FLIGHT)
        self.DETERMINISTIC = gl.constexpr(DETERMINISTIC)
        self.ROTATE = gl.constexpr(ROTATE)
        self.SOFTCAP = gl.constexpr(SOFTCAP)
        self.HAS_LEFT = gl.constexpr(HAS_LEFT)
        self.HAS_RIGHT = gl.constexpr(HAS_RIGHT)
        self.HAS_CHUNK = gl.constexpr(HAS_CHUNK)
        self.HAS_ALIBI = gl.constexpr(HAS_ALIBI)
        self.RAGGED = gl.constexpr(RAGGED)
        self.SPLIT = gl.constexpr(SPLIT)
        self.KEEPS_KEYS = gl.constexpr(KEEPS_KEYS)
        self.WIDTH = gl.constexpr(BLOCK_D if WIDTH is None else WIDTH)
        self.EARLY_LSE = gl.constexpr(EARLY_LSE)
        self.DELTA_FIRST = gl.constexpr(DELTA_FIRST)


@gluon.constexpr_function
def pieces_of(width):
    """Into how many pieces so many columns are divided: 64 or 128 are one, 96 are 64 and 32."""
    return 1 if width % 64 == 0 else 2


@gluon.constexpr_function
def columns_of(width, number):
    """Columns of a piece."""
    if width % 64 == 0:
        return width
    return 64 if number == 0 else width - 64


@gluon.jit
def piece_of(tile, NUMBER: gl.constexpr, config):
    """Some columns of a tile in shared memory."""
    COLUMNS: gl.constexpr = columns_of(config.WIDTH, NUMBER)
    if config.WIDTH != config.BLOCK_D:
        tile = tile.slice(NUMBER * 64, COLUMNS, 1)
    return tile


@gluon.constexpr_function
def layout_of_sums(columns):
    """Of 64 rows of sums."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def no_sums(COLUMNS: gl.constexpr):
    """Zeros."""
    return gl.zeros([ROWS, COLUMNS], gl.float32, layout_of_sums(COLUMNS))


@aggregate
class Grid:
    """How programs divide ``key_blocks`` blocks of keys of ``sequences`` key heads.

    Packed, all sequences together count as one. With SPLIT, what is said of key heads is true of
    their parts, ``splits`` of each: see share_of.

    Heads (of all sequences) are taken in sections. Within a section heads run fastest and blocks
    of keys from the first, which most queries see, to the last; REVERSED from the last.
    """

    nheads_k: gl.tensor
    key_blocks: gl.tensor
    sequences: gl.tensor
    section: gl.tensor
    REVERSED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, nheads_k, key_blocks, sequences, section, REVERSED):
        self.nheads_k = nheads_k
        self.key_blocks = key_blocks
        self.sequences = sequences
        self.section = section
        self.REVERSED = gl.constexpr(REVERSED)

    @gluon.jit
    def place(self, program):
        """(batch, key head, block of keys) of a program."""
        span = self.key_blocks * self.section
        number = program // span
        within = program - number * span
        heads = gl.minimum(self.section, self.sequences - number * self.section)
        key_block = within // heads
        sequence = number * self.section + within - key_block * heads
        if self.REVERSED:
            key_block = self.key_blocks - 1 - key_block
        batch = sequence // self.nheads_k
        return batch, sequence - batch * self.nheads_k, key_block


@aggregate
class Span:
    """Rows of one sequence, as TMA finds them: dense ``outer`` is the sequence.

    A ragged descriptor has the dimensions (far, end, head, row, column), where a step of ``end`` is
    a row, and FAR steps of ``far`` are -FAR rows, because addresses wrap at 2**64. So
    (FAR, end of the rows, head, FAR - their number + row, column) is a row of the sequence, and
    those past its end are past the end of the dimension, which has FAR rows.
    """

    outer: gl.tensor
    base: gl.tensor
    RAGGED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, outer, base, RAGGED):
        self.outer = outer
        self.base = base
        self.RAGGED = gl.constexpr(RAGGED)


@gluon.jit
def whole_sequence(batch):
    """All rows of a sequence of a dense tensor."""
    return Span(batch, batch, False)


@gluon.jit
def rows_from(start, count):
    """``count`` rows of a packed tensor from ``start`` on."""
    return Span(start + count, FAR - count, True)


@gluon.jit
def coordinates(span, head, row, COLUMN: gl.constexpr = 0):
    """Where TMA finds a row, from a column on."""
    if span.RAGGED:
        at = (gl.to_tensor(FAR), span.outer, head, span.base + row, gl.to_tensor(COLUMN))
    else:
        at = (span.outer, head, row, gl.to_tensor(COLUMN))
    return at


@gluon.jit
def clamp(x, low, high):
    """``x`` moved into [low, high]."""
    return gl.minimum(gl.maximum(x, low), high)


@gluon.jit
def used_rows(used, b, batch, rows):
    """How many of the ``rows`` of sequence ``b`` are in use."""
    inside = (b >= 0) & (b < batch)
    return clamp(gl.load(used + b, mask=inside, other=0), 0, rows)


@aggregate
class Lengths:
    """Where sequences lie whose lengths are on the device.

    ``bounds_q`` holds (batch + 1,) first rows that never decrease (CU_Q), ``table`` what
    tiles_sm90 says of ``tiles`` tiles of keys (CU_K), ``used_q`` and ``used_k`` (batch,) numbers
    of rows in use (USED_Q, USED_K). ``seqlen_q`` and ``seqlen_k`` are rows of a dense sequence or
    of all packed ones.
    """

    bounds_q: gl.tensor
    table: gl.tensor
    tiles: gl.tensor
    used_q: gl.tensor
    used_k: gl.tensor
    batch: gl.tensor
    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    window_left: gl.tensor
    chunk: gl.tensor
    CU_Q: gl.constexpr
    CU_K: gl.constexpr
    USED_Q: gl.constexpr
    USED_K: gl.constexpr
    HAS_LEFT: gl.constexpr
    HAS_CHUNK: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, bounds_q, table, tiles, used_q, used_k, batch, seqlen_q, seqlen_k,
                 window_left, chunk, CU_Q, CU_K, USED_Q, USED_K, HAS_LEFT,
                 HAS_CHUNK):  # fmt: skip
        self.bounds_q = bounds_q
        self.table = table
        self.tiles = tiles
        self.used_q = used_q
        self.used_k = used_k
        self.batch = batch
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self.window_left = window_left
        self.chunk = chunk
        self.CU_Q = gl.constexpr(CU_Q)
        self.CU_K = gl.constexpr(CU_K)
        self.USED_Q = gl.constexpr(USED_Q)
        self.USED_K = gl.constexpr(USED_K)
        self.HAS_LEFT = gl.constexpr(HAS_LEFT)
        self.HAS_CHUNK = gl.constexpr(HAS_CHUNK)

    @gluon.jit
    def queries(self, b):
        """(first row, rows in use) of sequence ``b``; no rows outside of the batch."""
        inside = (b >= 0) & (b < self.batch)
        if self.CU_Q:
            bounds = self.bounds_q + b
            start = clamp(gl.load(bounds, mask=inside, other=0), 0, self.seqlen_q)
            end = clamp(gl.load(bounds + 1, mask=inside, other=0), start, self.seqlen_q)
            count = end - start
        else:
            start = b * self.seqlen_q
            count = gl.where(inside, self.seqlen_q, 0)
        if self.USED_Q:
            count = used_rows(self.used_q, b, self.batch, count)
        return start, count

    @gluon.jit
    def keys(self, grid, program, BLOCK_N: gl.constexpr = 128):
        """(sequence, key head, first key of the program, first row, rows, rows in use, unseen) of
        a program that has BLOCK_N keys, 128 or 64.

        The rows are without the ``unseen`` first ones, keys before every query's window, whose
        gradients the launcher zeroes: they may be anything, and whole tiles are multiplied.
        """
        b, head, block = grid.place(program)
        if self.CU_K:
            tile = block if BLOCK_N == 128 else block // 2
            entry = self.table + tile
            b = gl.load(entry)
            first_key = gl.load(entry + self.tiles)
            if BLOCK_N != 128:
                first_key += (block - 2 * tile) * BLOCK_N
            start = gl.load(entry + 2 * self.tiles)
            rows = gl.load(entry + 3 * self.tiles)
            used = gl.where((b >= 0) & (b < self.batch), rows, 0)
        else:
            first_key = block * BLOCK_N
            start = b * self.seqlen_k
            rows = self.seqlen_k
            used = self.seqlen_k
        if self.USED_K:
            used = used_rows(self.used_k, b, self.batch, used)
        unseen = gl.to_tensor(0)
        if self.HAS_LEFT:
            _, queries = self.queries(b)
            unseen = used - queries - self.window_left
            if self.HAS_CHUNK:
                unseen = gl.maximum(unseen, (used - queries) // self.chunk * self.chunk)
            unseen = clamp(unseen, 0, used)
        return b, head, first_key, start + unseen, rows - unseen, used - unseen, unseen


@gluon.jit
def tiles_of_blocks(blocks, BLOCK_N: gl.constexpr):
    """How many tiles of 128 rows so many blocks of BLOCK_N keys are."""
    return blocks if BLOCK_N == 128 else blocks // 2


@gluon.jit
def padded_start(start, b):
    """The first row of packed sequence ``b`` in statistics and sums, where each has its length up
    to a multiple of 128."""
    return (start + 128 * b) // 128 * 128


@aggregate
class Work:
    """A program's work: 128 keys of one key head, and the queries that see them.

    A query at row r sees the keys [r - reach_left, r + reach_right], as far as there are such
    bounds, before seqlen_k; it stands at key r + shift, and with HAS_CHUNK sees only the chunk of
    that key, where chunks of ``chunk`` keys begin ``phase`` keys before the first one.

    In each of ``steps`` steps the program takes BLOCK_M queries: the rows [first_row, end_row) of
    every query head of the group in turn. ``first_sum`` is the first of these rows in the padded
    statistics and the sums of dq, and ``to_next_head`` leads from the last step of a head to the
    first one of the next there. ``queries`` and ``keys`` are where the sequence's rows lie.
    With ROTATE the rows are all, [0, end_row), from first_row on and around, and ``to_next_head``
    leads from a row to the next head's.
    ``slopes`` points to the sequence's ALiBi slopes, with HAS_ALIBI. ``first_head`` is the first
    query head, with SPLIT: see first_query_head.
    """

    scale: gl.tensor
    scale_log2: gl.tensor
    cap_log2: gl.tensor
    seqlen_k: gl.tensor
    reach_left: gl.tensor
    reach_right: gl.tensor
    first_key: gl.tensor
    first_row: gl.tensor
    end_row: gl.tensor
    first_sum: gl.tensor
    to_next_head: gl.tensor
    steps: gl.tensor
    key_head: gl.tensor
    first_head: gl.tensor
    shift: gl.tensor
    chunk: gl.tensor
    phase: gl.tensor
    slopes: gl.tensor
    queries: Span
    keys: Span
    grid: Grid
    lengths: Lengths
    config: Config

    @gluon.constexpr_function
    def __init__(self, scale, scale_log2, cap_log2, seqlen_k, reach_left, reach_right, first_key,
                 first_row, end_row, first_sum, to_next_head, steps, key_head, first_head, shift,
                 chunk, phase, slopes, queries, keys, grid, lengths, config):  # fmt: skip
        self.scale = scale
        self.scale_log2 = scale_log2
        self.cap_log2 = cap_log2
        self.seqlen_k = seqlen_k
        self.reach_left = reach_left
        self.reach_right = reach_right
        self.first_key = first_key
        self.first_row = first_row
        self.end_row = end_row
        self.first_sum = first_sum
        self.to_next_head = to_next_head
        self.steps = steps
        self.key_head = key_head
        self.first_head = first_head
        self.shift = shift
        self.chunk = chunk
        self.phase = phase
        self.slopes = slopes
        self.queries = queries
        self.keys = keys
        self.grid = grid
        self.lengths = lengths
        self.config = config


@gluon.jit
def share_of(part, group, splits):
    """(key head, first query head, query heads) of a part: the ``group`` query heads of a key head
    are divided into ``splits`` parts as evenly as can be."""
    key_head = part // splits
    number = part - key_head * splits
    first = number * group // splits
    end = (number + 1) * group // splits
    return key_head, key_head * group + first, end - first


@gluon.jit
def first_query_head(work, group):
    """The first of the ``group`` query heads of a program."""
    if work.config.SPLIT:
        head = work.first_head
    else:
        head = work.key_head * group
    return head


@gluon.jit
def row_after(work, row):
    """The next step's row."""
    first = 0 if work.config.ROTATE else work.first_row
    following = row + work.config.BLOCK_M
    return gl.where(following >= work.end_row, first, following)


@gluon.jit
def step_after(work, row, sum_row):
    """The next step's (row, row of the sums)."""
    BLOCK_M: gl.constexpr = work.config.BLOCK_M
    following = row_after(work, row)
    if work.config.ROTATE:
        further = gl.where(following == work.first_row, work.to_next_head, 0)
        further += following - row
    else:
        further = gl.where(row + BLOCK_M >= work.end_row, work.to_next_head, BLOCK_M)
    return following, sum_row + further


@gluon.jit
def first_of_rotation(first_key, seqlen_k, end_row, config):
    """Where a program begins among the rows [0, end_row): as far on as its keys are among all.

    In pairs of blocks, see claiming_adder.
    """
    PAIR: gl.constexpr = 2 * config.BLOCK_M
    blocks = gl.maximum((seqlen_k + config.BLOCK_N - 1) // config.BLOCK_N, 1)
    row = (first_key // config.BLOCK_N).to(gl.int64) * end_row // blocks
    return row.to(gl.int32) // PAIR * PAIR


@gluon.jit
def chunk_of(key, chunk, phase):
    """The first key of a key's chunk, either of which may be negative."""
    place = key + phase
    start = place // chunk * chunk  # rounded towards 0
    return gl.where(start > place, start - chunk, start) - phase


@gluon.jit
def rows_of_queries(
    first_key, seqlen_q, seqlen_k, reach_left, reach_right, shift, chunk, phase, config
):
    """[first, end) of the queries that see some of BLOCK_N keys, in whole blocks."""
    last_key = gl.minimum(first_key + config.BLOCK_N, seqlen_k) - 1
    first = gl.to_tensor(0)
    end = seqlen_q
    if config.HAS_RIGHT:
        first = gl.maximum(first_key - reach_right, 0)
    if config.HAS_LEFT:
        end = gl.maximum(gl.minimum(last_key + reach_left + 1, seqlen_q), 0)
    if config.HAS_CHUNK:
        first = gl.maximum(first, chunk_of(first_key, chunk, phase) - shift)
        end = gl.maximum(gl.minimum(chunk_of(last_key, chunk, phase) + chunk - shift, end), 0)
    first = first // config.BLOCK_M * config.BLOCK_M
    end = (end + config.BLOCK_M - 1) // config.BLOCK_M * config.BLOCK_M
    return first, gl.maximum(end, first)
