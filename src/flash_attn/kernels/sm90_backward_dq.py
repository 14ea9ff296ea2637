"""dq in the Hopper backward: its products, and adding them to sums in global memory, in order or as
they come; see ``sm90_backward``."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_async import (
    claim,
    count_up,
    fence_async,
    opaque_zero,
    peek,
    tma_add,
    tma_complete,
    tma_store,
    wait_for_dependencies,
    wait_until,
)
from .sm90_backward_work import ROWS, chunk_of, no_sums, step_after


@gluon.jit
def register_order(tile):
    """A tile of 64 rows of sums with its elements in the order that the threads hold them, 64 in a
    row: the four neighbours in a row are one thread's."""
    COLUMNS: gl.constexpr = tile.shape[1]
    parts = tile.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute([0, 3, 2, 4, 1, 5])
    return parts.reshape([COLUMNS, 64])


@gluon.jit
def dq_operands(work, shared, use, TILE: gl.constexpr):
    """(dS^T, k) whose product is the TILE-th tile, 64 rows and at most 64 columns, of the block's
    dq."""
    config = work.config
    COLUMNS: gl.constexpr = config.BLOCK_D // 64
    ds = shared.ds.slot(use)
    if config.BLOCK_M > ROWS:
        ds = ds.slice((TILE // COLUMNS) * ROWS, ROWS, 1)
    k = shared.k.data.index(opaque_zero()).reshape([config.BLOCK_N, config.BLOCK_D])
    if COLUMNS > 1:
        k = k.slice((TILE % COLUMNS) * 64, columns_of_tile(config.WIDTH, config.BLOCK_D, TILE), 1)
    return ds.permute([1, 0]), k


@gluon.constexpr_function
def tiles_in_block(config):
    """Tiles of a block's dq, of 64 rows and at most 64 columns."""
    return (config.BLOCK_M // 64) * (config.BLOCK_D // 64)


@gluon.constexpr_function
def columns_of_tile(width, block_d, tile):
    """Columns of a tile of dq."""
    return min(64, width - tile % (block_d // 64) * 64)


@gluon.constexpr_function
def rows_of_box(width):
    """Rows of 64 numbers that TMA adds at a time: all tiles are whole boxes."""
    return 64 if width % 64 == 0 else width % 64


@gluon.constexpr_function
def boxes_in_block(block_m, width):
    """How often TMA is asked to add a block's dq."""
    return block_m * width // (64 * 64 if width % 64 == 0 else 64 * (width % 64))


@gluon.jit
def sums_of_tile(work, sum_row, TILE: gl.constexpr):
    """Where the sums of a tile of dq, the TILE-th of a block's, begin: a row of 64 numbers."""
    COLUMNS: gl.constexpr = work.config.BLOCK_D // 64
    WIDTH: gl.constexpr = work.config.WIDTH
    return (sum_row // ROWS + TILE // COLUMNS) * WIDTH + TILE % COLUMNS * 64


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
    tma_add(dq_desc, [sums_of_tile(work, sum_row, TILE), 0], buffer)


@gluon.jit
def store_for_adder(shared, dq, use):
    """Store a tile of dq for the adder as soon as there is room; to be fenced and announced."""
    COLUMNS: gl.constexpr = dq.shape[1]
    shared.dq.wait_empty(use)
    buffer = shared.dq.slot(use)
    if COLUMNS != 64:
        buffer = buffer.slice(0, COLUMNS, 0)
    buffer.store(register_order(dq))


@gluon.jit
def dq_group(work, shared, dq_desc):
    """dq of every step, from the dS of both consumers."""
    config = work.config
    TILES: gl.constexpr = tiles_in_block(config)
    row = work.first_row
    sum_row = work.first_sum
    shared.k.wait_full(0)
    for i in range(work.steps):
        shared.ds.wait_full(i)
        for tile in gl.static_range(TILES):
            use = i * TILES + tile
            ds_turned, k_columns = dq_operands(work, shared, i, tile)
            zeros = no_sums(columns_of_tile(config.WIDTH, config.BLOCK_D, tile))
            dq = warpgroup_mma(ds_turned, k_columns, zeros, use_acc=False, is_async=True)
            if not config.ADDER:
                tma.store_wait(1)  # of two buffers in turn, the older one is free
            dq = warpgroup_mma_wait(0, deps=[dq])
            if tile == TILES - 1:
                shared.ds.release(i)
            if config.ADDER:
                store_for_adder(shared, dq, use)
                fence_async_shared()
                shared.dq.announce(use)
            else:
                add_to_dq(dq_desc, work, sum_row, dq, shared.dq.slot(use), tile)
        row, sum_row = step_after(work, row, sum_row)
    tma.store_wait(0)


@gluon.jit
def adder(work, shared, turns, dq_desc):
    """Add every step's tiles of dq to the sums, in order with DETERMINISTIC.

    It takes about three microseconds until an addition is known to be in memory. Not to wait for
    it, the next IN_FLIGHT steps' additions are started before a step's turn passes.
    """
    config = work.config
    TILES: gl.constexpr = tiles_in_block(config)
    BOXES: gl.constexpr = boxes_in_block(config.BLOCK_M, config.WIDTH)
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
            if config.FIRST_STORES:
                send_tile(dq_desc, work, sum_row, shared.dq.slot(use), turn == 0, tile)
            else:
                send_tile(dq_desc, work, sum_row, shared.dq.slot(use), False, tile)
        earlier = (sum_row,) + earlier
        row, sum_row = step_after(work, row, sum_row)
        if config.DETERMINISTIC:
            seen = gl.to_tensor(-1)
            if i >= config.IN_FLIGHT:
                # The fence of count_up, between this and its use, makes it as good as wait_until.
                next_sum = gl.where(i + 1 < work.steps, sum_row, earlier[0])  # there may be no next
                seen = peek(turns + next_sum // ROWS)
                tma_complete(config.IN_FLIGHT * BOXES)
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
    BOXES: gl.constexpr = boxes_in_block(config.BLOCK_M, config.WIDTH)
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
            send_tile(dq_desc, work, sum_row, shared.dq.slot(use), state == 0, tile)
        owed = (gl.where(state == 0, sum_row, -1),) + owed
        row, sum_row = step_after(work, row, sum_row)
        if owed[config.IN_FLIGHT] >= 0:
            tma_complete(config.IN_FLIGHT * BOXES)
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
def send_tile(desc, work, sum_row, buffer, is_first, TILE: gl.constexpr):
    """Add a tile to the sums of dq, or store it if nobody did before."""
    config = work.config
    BOX: gl.constexpr = rows_of_box(config.WIDTH)
    BOXES: gl.constexpr = columns_of_tile(config.WIDTH, config.BLOCK_D, TILE) // BOX
    at = sums_of_tile(work, sum_row, TILE)
    for j in gl.static_range(BOXES):
        source = buffer
        if BOX != 64:
            source = buffer.slice(j * BOX, BOX, 0)
        if is_first:
            tma_store(desc, [at + j * BOX, 0], source)
        else:
            tma_add(desc, [at + j * BOX, 0], source)


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
