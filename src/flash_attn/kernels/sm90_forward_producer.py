"""Who asks for tiles in the Hopper forward, and how the consumers are told of them; see
``sm90_forward``."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_compat import scalar_of
from .sm90_forward_work import (
    DYNAMIC,
    SHAPES,
    Span,
    entry_of,
    key_use,
    load_rows,
    programs_of,
    tile_at,
    tile_of,
    uses_of,
)

# Numbers that describe a tile, see announce_tile.
RECORD = gl.constexpr(8)


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
