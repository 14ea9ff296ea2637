"""What the attention kernels share: where a tile lies, which keys it sees, scores, random bits.

Scores are kept in base 2, ``score * log2(e)``, so that the hardware's exp2 serves directly. Lengths
and indices read from memory are clamped to what the tensors hold: hostile values can spoil results,
but nothing outside the tensors is read or written.
"""

import triton
import triton.language as tl
from triton.language.random import philox_impl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
DROPOUT_ROUNDS = tl.constexpr(7)
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def clamp(x, low, high):
    """``x`` moved into [low, high]."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def int64(x):
    """``x``, a scalar tensor or a plain number, as a 64-bit scalar."""
    return tl.zeros([], tl.int64) + x


@triton.jit
def floor_multiple(x, step):
    """The largest multiple of ``step`` that is at most ``x``; ``//`` alone rounds towards 0."""
    return tl.where(x < 0, -((step - 1 - x) // step), x // step) * step


@triton.jit
def segment_bound(cu_seqlens, segment, batch_size, total):
    """First row of a segment; segments are the rows before, of, and after the packed sequences."""
    index = clamp(segment - 1, 0, batch_size)
    bound = clamp(tl.load(cu_seqlens + index), 0, total)
    return tl.where(segment <= 0, 0, tl.where(segment > batch_size + 1, total, bound))


@triton.jit
def locate_packed_tile(cu_seqlens, tile, batch_size, total, BLOCK):
    """Which sequence the ``tile``-th tile of all packed rows belongs to.

    Segment s starts at tile ``bound[s] // BLOCK + s``: that leaves every segment room for all its
    tiles, so a binary search needs no prefix sums and the grid needs no lengths on the host.

    Returns (sequence, tile within it, first row, number of rows); sequence is -1 or batch_size for
    rows that belong to none.
    """
    low = 0
    high = batch_size + 1
    while low < high:
        middle = (low + high + 1) // 2
        first_tile = segment_bound(cu_seqlens, middle, batch_size, total) // BLOCK + middle
        if first_tile <= tile:
            low = middle
        else:
            high = middle - 1
    start = segment_bound(cu_seqlens, low, batch_size, total)
    end = tl.maximum(segment_bound(cu_seqlens, low + 1, batch_size, total), start)
    return low - 1, tile - (start // BLOCK + low), start, end - start


@triton.jit
def packed_range(cu_seqlens, b, batch_size, total):
    """(first row, number of rows) of sequence ``b``; none for b outside the batch."""
    index = clamp(b, 0, batch_size - 1)
    start = clamp(tl.load(cu_seqlens + index), 0, total)
    end = clamp(tl.load(cu_seqlens + index + 1), start, total)
    return start, tl.where((b < 0) | (b >= batch_size), 0, end - start)


@triton.jit
def tile_of_program(pid, cu_seqlens, batch_size, nheads, seqlen, num_tiles,
                    IS_VARLEN: tl.constexpr, REVERSE: tl.constexpr, BLOCK):  # fmt: skip
    """(sequence, head, tile, first row, rows) of a one-dimensional grid, tiles running fastest.

    Tiles have BLOCK rows. REVERSE puts the last tiles first: with a causal mask these have the most
    work.
    """
    tile = pid % num_tiles
    head_batch = pid // num_tiles
    if REVERSE:
        tile = num_tiles - 1 - tile
    h = head_batch % nheads
    if IS_VARLEN:
        b, tile, start, rows = locate_packed_tile(cu_seqlens, tile, batch_size, seqlen, BLOCK)
    else:
        b = head_batch // nheads
        start = 0
        rows = seqlen
    return b, h, tile, start, rows


@triton.jit
def key_range(b, cu_seqlens_k, seqused_k, leftpad_k, batch_size, seqlen_k,
              IS_VARLEN: tl.constexpr, IS_PAGED: tl.constexpr,
              HAS_SEQUSED: tl.constexpr, HAS_LEFTPAD: tl.constexpr):  # fmt: skip
    """(first row, number of keys) of sequence ``b``; ``seqlen_k`` is what the tensors hold."""
    index = clamp(b, 0, batch_size - 1)
    first = 0
    count = seqlen_k
    if IS_VARLEN:
        if IS_PAGED:
            # Only the differences count: pages say where the keys are.
            length = tl.load(cu_seqlens_k + index + 1) - tl.load(cu_seqlens_k + index)
            count = clamp(length, 0, seqlen_k)
        else:
            first, count = packed_range(cu_seqlens_k, b, batch_size, seqlen_k)
    if HAS_SEQUSED:
        count = clamp(tl.load(seqused_k + index), 0, count)
    if HAS_LEFTPAD:
        pad = clamp(tl.load(leftpad_k + index), 0, count)
        first += pad
        count -= pad
    return first, tl.where((b < 0) | (b >= batch_size), 0, count)


@triton.jit
def used_rows(seqused, b, batch_size, rows, HAS_SEQUSED: tl.constexpr):
    """How many of the ``rows`` of sequence ``b`` are in use."""
    if HAS_SEQUSED:
        rows = clamp(tl.load(seqused + clamp(b, 0, batch_size - 1)), 0, rows)
    return rows


@triton.jit
def chunk_start(row, shift, chunk, OF_KEYS: tl.constexpr):
    """First key of the chunk of query ``row``; OF_KEYS: first query of the chunk of key ``row``.

    Chunks divide key positions; a query stands at its row plus ``shift``.
    """
    if OF_KEYS:
        start = floor_multiple(row, chunk) + shift
    else:
        start = floor_multiple(row + shift, chunk)
    return start


@triton.jit
def key_bounds(first_row, last_row, seqlen_q, seqlen_k, window_left, window_right, chunk,
               HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CHUNK: tl.constexpr,
               OF_KEYS: tl.constexpr = False):  # fmt: skip
    """What a tile of rows sees: keys [any_first, any_end) by some row, [all_first, all_end) by all.

    Restates flash_attn.core.masking.visible_keys for the first and the last row of the tile; with
    OF_KEYS, queries and keys in exchanged roles, visible_queries.
    """
    shift = seqlen_k - seqlen_q
    any_first = 0
    all_first = 0
    any_end = seqlen_k
    all_end = seqlen_k
    if HAS_LEFT:
        any_first = tl.maximum(first_row + shift - window_left, 0)
        all_first = tl.maximum(last_row + shift - window_left, 0)
    if HAS_RIGHT:
        any_end = tl.minimum(last_row + shift + window_right + 1, seqlen_k)
        all_end = tl.minimum(first_row + shift + window_right + 1, seqlen_k)
    if HAS_CHUNK:
        of_first = chunk_start(first_row, shift, chunk, OF_KEYS)
        of_last = chunk_start(last_row, shift, chunk, OF_KEYS)
        any_first = tl.maximum(any_first, of_first)
        all_first = tl.maximum(all_first, of_last)
        any_end = tl.minimum(any_end, of_last + chunk)
        all_end = tl.minimum(all_end, of_first + chunk)
    return any_first, any_end, all_first, all_end


@triton.jit
def split_loop(any_first, any_end, all_first, all_end, BLOCK: tl.constexpr):
    """Bounds (a, b, c, d) of the loops over tiles: masked [a, b), unmasked [b, c), masked [c, d).

    Loops count tiles, not rows: with a unit step the compiler proves more about them, and the
    tensor-core instructions of one iteration stay in flight into the next.
    """
    a = any_first // BLOCK
    d = tl.maximum(tl.cdiv(tl.maximum(any_end, 0), BLOCK), a)
    b = clamp(tl.cdiv(all_first, BLOCK), a, d)
    c = clamp(tl.maximum(all_end, 0) // BLOCK, b, d)
    return a, b, c, d


@triton.jit
def seen_interval(rows, seqlen_q, seqlen_k, window_left, window_right, chunk,
                  HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CHUNK: tl.constexpr,
                  OF_KEYS: tl.constexpr = False):  # fmt: skip
    """(first, last) key that each row sees. Restates flash_attn.core.masking like key_bounds.

    A mask is then two comparisons with vectors that are computed once; pairwise distances would
    occupy as many registers as the scores.
    """
    position = rows + (seqlen_k - seqlen_q)
    first = tl.zeros_like(rows)
    last = tl.zeros_like(rows) + (seqlen_k - 1)
    if HAS_LEFT:
        first = tl.maximum(position - window_left, 0)
    if HAS_RIGHT:
        last = tl.minimum(position + window_right, last)
    if HAS_CHUNK:
        start = chunk_start(rows, seqlen_k - seqlen_q, chunk, OF_KEYS)
        first = tl.maximum(first, start)
        last = tl.minimum(last, start + (chunk - 1))
    return first, last


@triton.jit
def is_between(values, first, last, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr):
    """first <= values <= last, as far as there are such bounds; at least one must be."""
    if HAS_FIRST and HAS_LAST:
        inside = (values >= first) & (values <= last)
    elif HAS_FIRST:
        inside = values >= first
    else:
        inside = values <= last
    return inside


@triton.jit
def tanh(x):
    """Hyperbolic tangent by exp2; absolute error a few 1e-7."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def mask_values(rows, keys, mask, factor, WIDE: tl.constexpr):
    """A tile of a mask as numbers to add, ``factor`` times its own; -inf where it hides keys.

    ``mask`` is (pointer to the head's first element, strides of rows and keys, sizes of both):
    positions outside of it are hidden, bytes are bools, and a stride of None is a dimension that is
    broadcast. Numbers too low for float32 become the lowest one, which still is not -inf.
    """
    base, stride_m, stride_n, mask_rows, mask_keys = mask
    IS_BOOL: tl.constexpr = base.dtype.element_ty == tl.uint8
    hidden = 0 if IS_BOOL else float("-inf")
    if stride_m is None and stride_n is None:
        value = tl.load(base)
    elif stride_m is None:
        pointers = base + tile_offsets(keys, stride_n, WIDE)
        value = tl.load(pointers, mask=keys < mask_keys, other=hidden)
    elif stride_n is None:
        pointers = base + tile_offsets(rows, stride_m, WIDE)
        value = tl.load(pointers, mask=rows < mask_rows, other=hidden)
    else:
        pointers = base + tile_offsets(rows, stride_m, WIDE) + tile_offsets(keys, stride_n, WIDE)
        inside = (rows < mask_rows) & (keys < mask_keys)
        value = tl.load(pointers, mask=inside, other=hidden)
    if IS_BOOL:
        value = tl.where(value != 0, 0.0, float("-inf"))
    else:
        number = value.to(tl.float32)
        value = number * factor
        if base.dtype.element_ty != tl.float16:
            value = tl.where(number == float("-inf"), number, tl.maximum(value, LOWEST))
    return value


@triton.jit
def transform_scores(s, rows, keys, seqlen_q, seqlen_k, softmax_scale, softcap, slope, mask,
                     HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_MASK: tl.constexpr,
                     WIDE: tl.constexpr):  # fmt: skip
    """From q.k to scores in base 2. Also returns tanh(...) where softcap is on, else 0."""
    capped = 0.0
    if HAS_SOFTCAP:
        capped = tanh(s * (softmax_scale / softcap))
        s = capped * (softcap * LOG2E)
    else:
        s = s * (softmax_scale * LOG2E)
    if HAS_ALIBI:
        distance = tl.abs(rows + (seqlen_k - seqlen_q) - keys)
        s = s - distance.to(tl.float32) * (slope * LOG2E)
    if HAS_MASK:
        s += mask_values(rows, keys, mask, LOG2E, WIDE)
    return s, capped


@triton.jit
def dropout_keep(rng_state, head_batch, rows, first_key, keep_threshold,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """(BLOCK_M, BLOCK_N) bool: which weights survive; restates flash_attn.core.rng.keep_mask.

    One Philox call yields the words of four neighbouring keys.
    """
    seed = tl.load(rng_state).to(tl.uint64)
    offset = tl.load(rng_state + 1).to(tl.uint64)
    key0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
    groups = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    c0 = zeros + groups.to(tl.uint32)[None, :]
    c1 = zeros + rows.to(tl.uint32)[:, None]
    c2 = zeros + head_batch.to(tl.uint32)
    c3 = zeros + (offset & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox_impl(c0, c1, c2, c3, key0, key1, DROPOUT_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N)
    return (words >> 1).to(tl.int32) < keep_threshold


@triton.jit
def eights(a, b, c):
    """Three strides that are multiples of 8, so that the compiler sees it: by itself it looks for
    multiples of 16 alone, and would read rows of 40 numbers one number at a time."""
    return a // 8 * 8, b // 8 * 8, c // 8 * 8


@triton.jit
def tile_offsets(rows, stride, WIDE: tl.constexpr):
    """Row offsets within a tile, 64 bits wide only where the strides need it."""
    if WIDE:
        offsets = rows.to(tl.int64) * stride
    else:
        offsets = rows * stride
    return offsets


@triton.jit
def load_rows(base, rows, stride, cols, rows_end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              MASK_ROWS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Load a (rows, BLOCK_D) tile; rows at or past ``rows_end`` and padded columns read as 0."""
    pointers = base + tile_offsets(rows, stride, WIDE)[:, None] + cols[None, :]
    if BLOCK_D != HEAD_DIM:
        if MASK_ROWS:
            inside = (rows < rows_end)[:, None] & (cols < HEAD_DIM)[None, :]
            return tl.load(pointers, mask=inside, other=0.0)
        return tl.load(pointers, mask=(cols < HEAD_DIM)[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=(rows < rows_end)[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def to_operand(x):
    """``x`` as an operand of a product: bytes are float8 (e4m3) numbers, exact in float16.

    The exponent's bias is 8 less than float16's, subnormal numbers included.
    """
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        moved = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        number = moved.to(tl.float16, bitcast=True) * 256.0
        x = tl.where((bits & 0x7F) == 0x7F, float("nan"), number).to(tl.float16)
    return x


@triton.jit
def store_rows(base, tile, rows, stride, cols, rows_end, HEAD_DIM: tl.constexpr,
               WIDE: tl.constexpr):  # fmt: skip
    """Store a tile, leaving out rows at or past ``rows_end`` and padded columns."""
    pointers = base + tile_offsets(rows, stride, WIDE)[:, None] + cols[None, :]
    inside = (rows < rows_end)[:, None] & (cols < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)
