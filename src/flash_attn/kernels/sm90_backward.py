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

AHEAD starts the next step's S before dQ leaves the registers (1) or after (2; with DQ_GROUP there
is no difference). EAGER_DV queues dV behind dP instead of waiting for dP first.

Rows past a sequence's end are read as 0 by TMA, with lse +inf, which makes p 0; keys past the end
are masked. Where the sequences' lengths are on the device (RAGGED), TMA is told each sequence's end
too, see ``Span``: a tile never holds, and never writes, anything of the next sequence.

The sums of dq are kept in tiles of 64 x 64 in the order of the registers that hold them, so that
every thread moves whole 16 bytes and no bank conflicts arise.
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

from .gluon_async import (
    aggregate,
    allow_dependents,
    claim,
    count_up,
    fence_async,
    meet,
    opaque_zero,
    peek,
    tma_add,
    tma_complete,
    tma_load,
    tma_store,
    wait_for_dependencies,
    wait_until,
)

LOG2E = gl.constexpr(1.4426950408889634)
# Keys of a consumer and rows of a tile of dq: what one warpgroup MMA instruction computes.
ROWS = gl.constexpr(64)
# The first hardware barrier that the compiler leaves alone.
CONSUMERS_MEET = gl.constexpr(9)
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

    Only with ADDER are the barriers of ``dq`` used.
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
    AHEAD: gl.constexpr
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

    @gluon.constexpr_function
    def __init__(self, BLOCK_M, BLOCK_D, EAGER_DV, AHEAD, DQ_GROUP, FIRST_STORES, ADDER,
                 IN_FLIGHT, DETERMINISTIC, SOFTCAP, HAS_LEFT, HAS_RIGHT, HAS_CHUNK, HAS_ALIBI,
                 RAGGED, BLOCK_N=128, ROTATE=False, SPLIT=False,
                 KEEPS_KEYS=False):  # fmt: skip
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.BLOCK_D = gl.constexpr(BLOCK_D)
        self.EAGER_DV = gl.constexpr(EAGER_DV)
        self.AHEAD = gl.constexpr(AHEAD)
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
def coordinates(span, head, row):
    """Where TMA finds a row."""
    if span.RAGGED:
        at = (gl.to_tensor(FAR), span.outer, head, span.base + row, gl.to_tensor(0))
    else:
        at = (span.outer, head, row, gl.to_tensor(0))
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
    def keys(self, grid, program):
        """(sequence, key head, first key of the program, first row, rows, rows in use, unseen).

        The rows are without the ``unseen`` first ones, keys before every query's window, whose
        gradients the launcher zeroes: they may be anything, and whole tiles are multiplied.
        """
        b, head, block = grid.place(program)
        if self.CU_K:
            entry = self.table + block
            b = gl.load(entry)
            first_key = gl.load(entry + self.tiles)
            start = gl.load(entry + 2 * self.tiles)
            rows = gl.load(entry + 3 * self.tiles)
            used = gl.where((b >= 0) & (b < self.batch), rows, 0)
        else:
            first_key = block * 128
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


# ---------------------------------------------------------------------------------------- producer
@gluon.jit
def ask_for(desc, at, ring, use):
    """Start loading one block; nothing else may be expected in this slot."""
    slot = ring.full.index(use % ring.SLOTS)
    mbarrier.expect(slot, bytes_of(desc.block_type))
    tma_load(desc, at, slot, ring.slot(use))


@gluon.jit
def ask_with_row_values(desc, values_desc, head, row, sum_row, ring, values, use, work):
    """Start loading a block of rows and one number for each row into the same slot.

    Only these numbers come from the launch before, so only they wait for it.
    """
    slot = ring.full.index(use % ring.SLOTS)
    mbarrier.expect(slot, bytes_of(desc.block_type) + bytes_of(values_desc.block_type))
    tma_load(desc, coordinates(work.queries, head, row), slot, ring.slot(use))
    if use == 0:
        wait_for_dependencies()
    tma_load(values_desc, [sum_row], slot, values.index(use % ring.SLOTS))


@gluon.jit
def producer(work, shared, group, q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc):
    """Ask for everything that the consumers read, as slots become empty."""
    at = coordinates(work.keys, work.key_head, work.first_key)
    ask_for(k_desc, at, shared.k, 0)
    ask_for(v_desc, at, shared.v, 0)
    head = first_query_head(work, group)
    row = work.first_row
    sum_row = work.first_sum
    for i in range(work.steps):
        shared.q.wait_empty(i)
        ask_with_row_values(q_desc, lse_desc, head, row, sum_row, shared.q, shared.lse, i, work)
        shared.do.wait_empty(i)
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
def keys_by_rows(keys, rows, zeros):
    """Start keys rows^T: (ROWS, BLOCK_M)."""
    return warpgroup_mma(keys, rows.permute([1, 0]), zeros, use_acc=False, is_async=True)


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
def register_order(tile):
    """A 64 x 64 tile of sums with its elements in the order that the threads hold them: the four
    neighbours in a row are one thread's."""
    return tile.reshape([4, 2, 8, 8, 4, 2]).permute([0, 3, 2, 4, 1, 5]).reshape([ROWS, 64])


@gluon.jit
def dq_operands(work, shared, use, TILE: gl.constexpr):
    """(dS^T, k) whose product is the TILE-th 64 x 64 tile of the block's dq."""
    config = work.config
    COLUMNS: gl.constexpr = config.BLOCK_D // 64
    ds = shared.ds.slot(use)
    if config.BLOCK_M > ROWS:
        ds = ds.slice((TILE // COLUMNS) * ROWS, ROWS, 1)
    k = shared.k.data.index(opaque_zero()).reshape([config.BLOCK_N, config.BLOCK_D])
    if COLUMNS > 1:
        k = k.slice((TILE % COLUMNS) * 64, 64, 1)
    return ds.permute([1, 0]), k


@gluon.constexpr_function
def tiles_in_block(config):
    """64 x 64 tiles of a block's dq."""
    return (config.BLOCK_M // 64) * (config.BLOCK_D // 64)


@gluon.jit
def tile_of(work, sum_row, TILE: gl.constexpr):
    """The number of a 64 x 64 tile of the sums of dq: the TILE-th of a block's."""
    COLUMNS: gl.constexpr = work.config.BLOCK_D // 64
    return (sum_row // ROWS + TILE // COLUMNS) * COLUMNS + TILE % COLUMNS


@gluon.jit
def turn_of(work, row):
    """How many other programs add to a block of dq before this one does."""
    BLOCK_N: gl.constexpr = work.config.BLOCK_N
    turn = work.first_key // BLOCK_N
    if work.grid.REVERSED:
        last = (work.seqlen_k - 1) // BLOCK_N
        if work.config.HAS_RIGHT:
            last = gl.minimum(last, (row + work.config.BLOCK_M - 1 + work.reach_right) // BLOCK_N)
        if work.config.HAS_CHUNK:
            chunk = chunk_of(row + work.config.BLOCK_M - 1 + work.shift, work.chunk, work.phase)
            last = gl.minimum(last, (chunk + work.chunk - 1) // BLOCK_N)
        turn = last - turn
    elif work.config.HAS_LEFT:
        first = gl.maximum(row - work.reach_left, 0)
        if work.config.HAS_CHUNK:
            first = gl.maximum(first, chunk_of(row + work.shift, work.chunk, work.phase))
        turn -= first // BLOCK_N
    return turn


@gluon.jit
def add_to_dq(dq_desc, work, sum_row, dq, buffer, TILE: gl.constexpr):
    """Add a tile to the sums of dq through a buffer that no TMA reads any more."""
    buffer.store(register_order(dq))
    fence_async_shared()
    tma_add(dq_desc, [tile_of(work, sum_row, TILE) * 64, 0], buffer)


@gluon.jit
def leave_to_adder(shared, dq, use):
    """Hand a tile of dq to the adder as soon as there is room for it."""
    shared.dq.wait_empty(use)
    shared.dq.slot(use).store(register_order(dq))
    fence_async_shared()
    shared.dq.announce(use)


@gluon.jit
def store_keys(desc, work, ring, values, LANE: gl.constexpr):
    """Write a consumer's rows of dk or dv by TMA, through the rows of k or v that it owns.

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
    keys_of(ring, LANE, work).store(values.to(desc.dtype))
    fence_async_shared()
    source = ring.data.index(0).slice(LANE * ROWS, ROWS, 3 if work.config.RAGGED else 2)
    tma_store(desc, coordinates(span, key_head, first_key + LANE * ROWS), source)


@gluon.jit
def flat_register_order(tile, COLUMNS: gl.constexpr):
    """register_order for any number of columns, flat: each warp's 16 rows follow each other."""
    parts = tile.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute([0, 3, 2, 4, 1, 5])
    return parts.reshape([ROWS * COLUMNS])


@gluon.jit
def leave_sums(sums, grid, program, values, NUMBER: gl.constexpr, COUNT: gl.constexpr,
               COLUMNS: gl.constexpr):  # fmt: skip
    """Write the NUMBER-th of the COUNT tiles, ROWS keys and COLUMNS each, that a program has of
    the sums of dk, or of dv: with SPLIT, for finish_keys_sm90."""
    batch, part, key_block = grid.place(program)
    block = (batch * grid.nheads_k + part) * grid.key_blocks + key_block
    flat = flat_register_order(values, COLUMNS)
    sums += (block.to(gl.int64) * COUNT + NUMBER) * (ROWS * COLUMNS)
    gl.store(sums + gl.arange(0, ROWS * COLUMNS, layout=flat.type.layout), flat)


@gluon.jit
def consumer(LANE: gl.constexpr, work, shared, group, dk_target, dv_target):
    """dk and dv of keys [64 * LANE, 64 * LANE + 64) of the program's, and dS for dq."""
    config = work.config
    BLOCK_M: gl.constexpr = config.BLOCK_M
    BLOCK_D: gl.constexpr = config.BLOCK_D
    AHEAD: gl.constexpr = config.AHEAD
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    # How many products may be in flight behind those waited for: the next step's S is one.
    EARLY: gl.constexpr = 1 if AHEAD == 1 else 0
    dtype: gl.constexpr = shared.q.data.dtype

    dk = gl.zeros([ROWS, BLOCK_D], gl.float32, SUMS)
    dv = gl.zeros([ROWS, BLOCK_D], gl.float32, SUMS)
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, SCORES)
    dq_zeros = gl.zeros([ROWS, 64], gl.float32, DQ)
    first_key = work.first_key + LANE * ROWS
    row = work.first_row
    shared.k.wait_full(0)
    k = left_operand(keys_of(shared.k, LANE, work), SCORES, config.KEEPS_KEYS)
    s = zeros
    if AHEAD > 0:
        if work.steps > 0:  # otherwise it multiplies what lies in shared memory, for nobody
            shared.q.wait_full(0)
        s = keys_by_rows(k, rows_of(shared.q, 0, work), zeros)
        s = warpgroup_mma_wait(0, deps=[s])
    shared.v.wait_full(0)
    v = left_operand(keys_of(shared.v, LANE, work), SCORES, config.KEEPS_KEYS)
    for i in range(work.steps):
        if not config.KEEPS_KEYS:
            k = keys_of(shared.k, LANE, work)
            v = keys_of(shared.v, LANE, work)
        q = rows_of(shared.q, i, work)
        do = rows_of(shared.do, i, work)
        # The last step has no next one and starts its own S again, for nobody.
        following = gl.minimum(i + 1, work.steps - 1)

        # P, dV, dS.
        if AHEAD == 0:
            shared.q.wait_full(i)
            s = keys_by_rows(k, q, zeros)
        shared.do.wait_full(i)
        dp = keys_by_rows(v, do, zeros)
        if AHEAD == 0:
            s = warpgroup_mma_wait(1, deps=[s])
        lse = shared.lse.index(i % shared.q.SLOTS).load(COLUMN)
        exponent = exponents(work, s)
        if config.HAS_ALIBI:
            head = first_query_head(work, group) + i // (work.steps // group)
            exponent = subtract_alibi(work, exponent, first_key, row, head)
        p = gl.exp2(exponent - gl.expand_dims(lse, 0))
        p = mask_if_needed(work, p, first_key, row)
        weights = gl.convert_layout(p.to(dtype), OPERAND)
        if config.EAGER_DV:
            dv = warpgroup_mma(weights, do, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp])
        else:
            dp = warpgroup_mma_wait(0, deps=[dp])
            dv = warpgroup_mma(weights, do, dv, is_async=True)
        delta = shared.delta.index(i % shared.do.SLOTS).load(COLUMN)
        ds = p * (dp - gl.expand_dims(delta, 0))
        if config.SOFTCAP:
            lse = shared.lse.index(i % shared.q.SLOTS).load(COLUMN)
            ds *= softcap_slope(work, p, gl.expand_dims(lse, 0))
        ds = ds.to(dtype)
        if config.DQ_GROUP:
            shared.ds.wait_empty(i)
        shared.ds.slot(i).slice(LANE * ROWS, ROWS, 0).store(ds)
        fence_async_shared()
        ds = gl.convert_layout(ds, OPERAND)

        # dK, and dQ or its share.
        if config.DQ_GROUP:
            shared.ds.announce(i)
            dk = warpgroup_mma(ds, q, dk, is_async=True)
            if AHEAD > 0:
                shared.q.wait_full(following)
                s = keys_by_rows(k, rows_of(shared.q, following, work), zeros)
                dv = warpgroup_mma_wait(2, deps=[dv])
                shared.do.release(i)
                dk = warpgroup_mma_wait(1, deps=[dk])
                shared.q.release(i)
                s = warpgroup_mma_wait(0, deps=[s])
            else:
                dv = warpgroup_mma_wait(1, deps=[dv])
                shared.do.release(i)
                dk = warpgroup_mma_wait(0, deps=[dk])
                shared.q.release(i)
        else:
            meet(CONSUMERS_MEET, 256)
            ds_turned, k_columns = dq_operands(work, shared, i, LANE)
            dq = warpgroup_mma(ds_turned, k_columns, dq_zeros, use_acc=False, is_async=True)
            dk = warpgroup_mma(ds, q, dk, is_async=True)
            if AHEAD == 1:
                shared.q.wait_full(following)
                s = keys_by_rows(k, rows_of(shared.q, following, work), zeros)
            dv = warpgroup_mma_wait(2 + EARLY, deps=[dv])
            shared.do.release(i)
            dq = warpgroup_mma_wait(1 + EARLY, deps=[dq])
            leave_to_adder(shared, dq, i * 2 + LANE)
            if AHEAD == 2:
                shared.q.wait_full(following)
                s = keys_by_rows(k, rows_of(shared.q, following, work), zeros)
            dk = warpgroup_mma_wait(1 if AHEAD > 0 else 0, deps=[dk])
            shared.q.release(i)
            if AHEAD > 0:
                s = warpgroup_mma_wait(0, deps=[s])
        row = row_after(work, row)

    if config.SPLIT:
        program = gl.program_id(0) + opaque_zero()
        leave_sums(dv_target, work.grid, program, dv, LANE, 2, BLOCK_D)
        leave_sums(dk_target, work.grid, program, dk, LANE, 2, BLOCK_D)
    else:
        # dk and dv leave through k and v; the other groups must be done with k.
        if config.DQ_GROUP:  # noqa: SIM102 -- one condition is a constant, the other is not
            if work.steps > 0:
                shared.ds.wait_empty(work.steps - 1 + shared.ds.SLOTS)
        meet(CONSUMERS_MEET, 256)
        store_keys(dv_target, work, shared.v, dv, LANE)
        store_keys(dk_target, work, shared.k, dk * work.scale, LANE)
        tma.store_wait(0)


@gluon.jit
def dq_group(work, shared, dq_desc):
    """dq of every step, from the dS of both consumers."""
    config = work.config
    TILES: gl.constexpr = tiles_in_block(config)
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    zeros = gl.zeros([ROWS, 64], gl.float32, DQ)
    row = work.first_row
    sum_row = work.first_sum
    shared.k.wait_full(0)
    for i in range(work.steps):
        shared.ds.wait_full(i)
        for tile in gl.static_range(TILES):
            use = i * TILES + tile
            ds_turned, k_columns = dq_operands(work, shared, i, tile)
            dq = warpgroup_mma(ds_turned, k_columns, zeros, use_acc=False, is_async=True)
            if not config.ADDER:
                tma.store_wait(1)  # of two buffers in turn, the older one is free
            dq = warpgroup_mma_wait(0, deps=[dq])
            if tile == TILES - 1:
                shared.ds.release(i)
            if config.ADDER:
                leave_to_adder(shared, dq, use)
            else:
                add_to_dq(dq_desc, work, sum_row, dq, shared.dq.slot(use), tile)
        row, sum_row = step_after(work, row, sum_row)
    tma.store_wait(0)


# ------------------------------------------------------------------------------------------- adder
@gluon.jit
def adder(work, shared, turns, dq_desc):
    """Add every step's tiles of dq to the sums, in order with DETERMINISTIC.

    It takes about three microseconds until an addition is known to be in memory. Not to wait for
    it, the next IN_FLIGHT steps' additions are started before a step's turn passes.
    """
    config = work.config
    TILES: gl.constexpr = tiles_in_block(config)
    wait_for_dependencies()  # that the turns are zeroed
    row = work.first_row
    sum_row = work.first_sum
    earlier = no_steps(config)
    seen = gl.to_tensor(-1)
    for i in range(work.steps):
        if config.DETERMINISTIC:
            turn = turn_of(work, row)
            if seen < turn:
                wait_until(turns + sum_row // ROWS, turn)
            fence_async()  # also behind what was only peeked at
        for tile in gl.static_range(TILES):
            use = i * TILES + tile
            shared.dq.wait_full(use)
            at = [tile_of(work, sum_row, tile) * 64, 0]
            if config.FIRST_STORES:
                store_or_add(dq_desc, at, shared.dq.slot(use), turn == 0)
            else:
                tma_add(dq_desc, at, shared.dq.slot(use))
        earlier = (sum_row,) + earlier
        row, sum_row = step_after(work, row, sum_row)
        if config.DETERMINISTIC:
            seen = gl.to_tensor(-1)
            if i >= config.IN_FLIGHT:
                # The fence of count_up, between this and its use, makes it as good as wait_until.
                next_sum = gl.where(i + 1 < work.steps, sum_row, earlier[0])  # there may be no next
                seen = peek(turns + next_sum // ROWS)
                tma_complete(config.IN_FLIGHT * TILES)
                pass_turn(turns, earlier[config.IN_FLIGHT])
        earlier = earlier[: config.IN_FLIGHT]
        tma.store_wait(0)
        for tile in gl.static_range(TILES):
            shared.dq.release(i * TILES + tile)
    if config.DETERMINISTIC:
        tma_complete(0)
        for j in gl.static_range(config.IN_FLIGHT):
            if config.IN_FLIGHT - 1 - j < work.steps:  # the oldest one first
                pass_turn(turns, earlier[config.IN_FLIGHT - 1 - j])


@gluon.jit
def claiming_adder(work, shared, turns, dq_desc):
    """Add every step's tiles of dq to the sums, in any order behind who stores them: FIRST_STORES.

    A block's counter is 0 before anybody came, then 1, and 2 when the first tiles are in memory,
    which is looked at when IN_FLIGHT more steps' are on their way. Nobody waits in a circle: who is
    waited for has nobody to wait for if IN_FLIGHT is 0, and else is further on, as all programs
    take the blocks in the same order. With ROTATE the blocks of a head are themselves a circle, and
    with IN_FLIGHT 1 all could wait: if each had stored one block and stood at the next, which the
    next program stored. None of them came from a block before, where it would still have to wait.
    So each began at its own block, and every block would be some program's first, but only every
    other one is. With more IN_FLIGHT these would suffice.
    """
    config = work.config
    TILES: gl.constexpr = tiles_in_block(config)
    wait_for_dependencies()  # that the turns are zeroed
    row = work.first_row
    sum_row = work.first_sum
    owed = no_rows(config)  # of the last steps, the rows that this program stored, or -1
    for i in range(work.steps):
        counter = turns + sum_row // ROWS
        state = claim(counter)
        if state == 1:
            wait_until(counter, 2)
        fence_async()
        for tile in gl.static_range(TILES):
            use = i * TILES + tile
            shared.dq.wait_full(use)
            at = [tile_of(work, sum_row, tile) * 64, 0]
            store_or_add(dq_desc, at, shared.dq.slot(use), state == 0)
        owed = (gl.where(state == 0, sum_row, -1),) + owed
        row, sum_row = step_after(work, row, sum_row)
        if owed[config.IN_FLIGHT] >= 0:
            tma_complete(config.IN_FLIGHT * TILES)
            pass_turn(turns, owed[config.IN_FLIGHT])
        owed = owed[: config.IN_FLIGHT]
        tma.store_wait(0)
        for tile in gl.static_range(TILES):
            shared.dq.release(i * TILES + tile)
    tma_complete(0)
    for j in gl.static_range(config.IN_FLIGHT):
        if owed[j] >= 0:
            pass_turn(turns, owed[j])


@gluon.jit
def store_or_add(desc, at, buffer, is_first):
    """Store a tile of the sums of dq if nobody did before, else add to it."""
    if is_first:
        tma_store(desc, at, buffer)
    else:
        tma_add(desc, at, buffer)


@gluon.jit
def no_rows(config):
    """-1 for IN_FLIGHT steps, each another value: see no_steps."""
    rows = ()
    for _ in gl.static_range(config.IN_FLIGHT):
        rows = rows + (opaque_zero() - 1,)
    return rows


@gluon.jit
def no_steps(config):
    """Rows of IN_FLIGHT steps that there are not. Each another value: see test_kernel_loops."""
    rows = ()
    for _ in gl.static_range(config.IN_FLIGHT):
        rows = rows + (opaque_zero(),)
    return rows


@gluon.jit
def pass_turn(turns, sum_row):
    """Let the next program add to a block of dq, to which this one's additions are in memory."""
    fence_async()
    count_up(turns + sum_row // ROWS)


# ------------------------------------------------------------------------------------------ kernel
_NUMBERS = (
    "nheads_k", "group", "seqlen_q", "seqlen_k", "padded_rows", "window_left", "window_right",
    "key_blocks", "sequences", "section", "batch_size", "chunk", "phase", "stride_slope",
)  # fmt: skip
_POINTERS = ("bounds_q", "table", "used_q", "used_k", "slopes")


# A single split is a constant, so that without SPLIT there is no such argument.
@gluon.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=("splits", *_POINTERS))
def attention_backward_sm90(
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dq_desc, dk_target, dv_target,
    scale, scale_log2, cap_log2, nheads_k, group, splits, seqlen_q, seqlen_k, padded_rows,
    window_left, window_right, key_blocks, sequences, section, turns,
    bounds_q, table, used_q, used_k, batch_size, chunk, phase, slopes, stride_slope,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, Q_SLOTS: gl.constexpr, DO_SLOTS: gl.constexpr,
    DS_SLOTS: gl.constexpr, DQ_SLOTS: gl.constexpr,
    EAGER_DV: gl.constexpr, AHEAD: gl.constexpr, DQ_GROUP: gl.constexpr,
    ADDER: gl.constexpr, IN_FLIGHT: gl.constexpr,
    REGISTERS: gl.constexpr, DQ_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
    DETERMINISTIC: gl.constexpr, REVERSED: gl.constexpr, FIRST_STORES: gl.constexpr,
    ROTATE: gl.constexpr, SOFTCAP: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, CU_Q: gl.constexpr, CU_K: gl.constexpr,
    USED_Q: gl.constexpr, USED_K: gl.constexpr, HAS_CHUNK: gl.constexpr, HAS_ALIBI: gl.constexpr,
    SPLIT: gl.constexpr, KEEPS_KEYS: gl.constexpr,
):  # fmt: skip
    """See the module's docstring; launched with 4 warps, those of one consumer.

    Args:
        q_desc, do_desc: TMA descriptors of (batch, nheads, seqlen_q, headdim) with blocks
            (1, 1, BLOCK_M, BLOCK_D); columns past headdim are read as 0.
        k_desc, v_desc: of (batch, nheads_k, seqlen_k, headdim) with blocks (1, 1, 128, BLOCK_D).
        lse_desc, delta_desc: of (batch * nheads * padded_rows,) float32 with blocks (BLOCK_M,).
        dq_desc: of the sums of dq, (batch * nheads * padded_rows * BLOCK_D / 64, 64) float32 with
            blocks (64, 64).
        dk_target, dv_target: descriptors like k's with blocks (1, 1, 64, BLOCK_D); columns past
            headdim are not written. With SPLIT pointers to sequences * key_blocks * 128 * BLOCK_D
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
        DS_SLOTS: buffers of dS; at least 2 without DQ_GROUP.
        DQ_SLOTS: buffers of 64 x 64 of dq; 2, or with ADDER more, even without DQ_GROUP.
        ADDER: needed without DQ_GROUP, and by DETERMINISTIC and FIRST_STORES, for which IN_FLIGHT
            says of how many steps the additions may be on their way before the oldest one's are
            waited for.
        ROTATE: not with DETERMINISTIC, nor windows, causality and chunks; with FIRST_STORES not
            with more than 1 IN_FLIGHT.
        REGISTERS, DQ_REGISTERS, OTHER_REGISTERS: of a thread of the consumers (the first one gets
            what is left), of the dq group, and of the producer and the adder.
    """
    gl.static_assert(DQ_GROUP or (BLOCK_M // 64) * (BLOCK_D // 64) == 2)
    gl.static_assert(DQ_GROUP or DS_SLOTS >= 2)
    gl.static_assert(DQ_SLOTS == 2 or (ADDER and DQ_SLOTS > 2))
    gl.static_assert(DQ_GROUP or DQ_SLOTS % 2 == 0)
    gl.static_assert(ADDER or not (DETERMINISTIC or FIRST_STORES))
    gl.static_assert(ADDER or DQ_GROUP)
    gl.static_assert(not (ROTATE and (DETERMINISTIC or HAS_LEFT or HAS_RIGHT or HAS_CHUNK)))
    gl.static_assert(not (ROTATE and FIRST_STORES and IN_FLIGHT > 1))
    RAGGED: gl.constexpr = CU_Q or CU_K or USED_Q or USED_K
    gl.static_assert(not HAS_CHUNK or (HAS_LEFT and HAS_RIGHT))
    gl.static_assert(not (HAS_ALIBI and SOFTCAP))
    config = Config(BLOCK_M, BLOCK_D, EAGER_DV, AHEAD, DQ_GROUP, FIRST_STORES, ADDER,
                    IN_FLIGHT, DETERMINISTIC, SOFTCAP, HAS_LEFT, HAS_RIGHT, HAS_CHUNK, HAS_ALIBI,
                    RAGGED, 128, ROTATE, SPLIT, KEEPS_KEYS)  # fmt: skip
    q = ring_for(q_desc, Q_SLOTS, 2)
    do = ring_for(do_desc, DO_SLOTS, 2)
    k = ring_for(k_desc, 1, 0)
    v = ring_for(v_desc, 1, 0)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BLOCK_M], q_desc.dtype)
    ds_data = gl.allocate_shared_memory(q_desc.dtype, [DS_SLOTS, 128, BLOCK_M], DS)
    if DQ_GROUP:
        ds = new_ring(ds_data, DS_SLOTS, 2, 1)
    else:
        ds = Ring(ds_data, k.full, k.full, DS_SLOTS)  # the consumers meet: nobody asks its barriers
    if ADDER:
        dq_ring = ring_for(dq_desc, DQ_SLOTS, 1)
    else:
        dq_ring = Ring(buffers_for(dq_desc, DQ_SLOTS), k.full, k.full, DQ_SLOTS)
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


# --------------------------------------------------------------------------- before and after
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
    # 192 columns are no tensor's.
    WIDTH: gl.constexpr = 256 if BLOCK_D > 128 else BLOCK_D
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
        sums = dq_sums + first * BLOCK_D + gl.arange(0, BLOCK_M * 64, layout=FLAT)
        for j in gl.static_range(BLOCK_D // 64):
            gl.store(sums + j * BLOCK_M * 64, gl.zeros([BLOCK_M * 64], gl.float32, FLAT))
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
    return parts.reshape([4, 8, 8, 4, 2, 2]).permute([0, 4, 2, 1, 3, 5]).reshape([ROWS, 64])


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
    FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    COLUMNS: gl.constexpr = BLOCK_D // 64
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
    rows = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, STORED))
    cols = gl.arange(0, 64, layout=gl.SliceLayout(0, STORED))
    flat_rows = gl.arange(0, 64, layout=gl.SliceLayout(1, FLAT)) * 64
    flat = gl.expand_dims(flat_rows, 1) + gl.expand_dims(
        gl.arange(0, 64, layout=gl.SliceLayout(0, FLAT)), 0
    )
    turn = first // BLOCK_M * (BLOCK_M // ROWS)
    if CU_Q:  # rows of no sequence have no turn
        turn = gl.where(has_sums, turn, 0)
    first *= BLOCK_D
    dq += b.to(gl.int64) * stride_b + h.to(gl.int64) * stride_h
    target = dq + gl.expand_dims(rows.to(gl.int64) * stride_m, 1) + gl.expand_dims(cols, 0)
    wait_for_dependencies()
    if FIRST_STORES:
        was_added_to = peek(turns + turn) > 0
    for j in gl.static_range(COLUMNS):
        if CU_Q:
            parts = gl.load(dq_sums + first + j * 4096 + flat, mask=has_sums, other=0.0)
        else:
            parts = gl.load(dq_sums + first + j * 4096 + flat)
        if FIRST_STORES:
            parts = gl.where(was_added_to, parts, 0.0)
        values = (matrix_order(parts) * scale).to(dq.dtype.element_ty)
        values = gl.convert_layout(values, STORED)
        mask = gl.expand_dims(rows < count, 1)
        if BLOCK_D != HEAD_DIM:
            mask = mask & gl.expand_dims(j * 64 + cols < HEAD_DIM, 0)
        gl.store(target + j * 64, values, mask=mask)


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
        lengths = Lengths(bounds_q, table, key_blocks, used_q, used_k, batch_size, seqlen_q,
                          seqlen_k, window_left, chunk, CU_Q, CU_K, USED_Q, USED_K, HAS_LEFT,
                          HAS_CHUNK)  # fmt: skip
        _, _, first, row, count, _, _ = lengths.keys(grid, program)
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
