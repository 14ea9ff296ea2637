"""Attention forward: one program computes one tile of queries of one head.

    out[i] = sum_j exp(score[i, j] - lse[i]) v[j],  lse[i] = log sum_j exp(score[i, j])

The program keeps its (BLOCK_M, BLOCK_D) queries and walks over the keys that any of its rows sees,
(BLOCK_N) at a time, with an online softmax: running row maximum m_i (base 2), row sum l_i and
unnormalised output acc stay in registers in float32. Tiles that all rows see in full take a loop
without masks; the tiles at the edges of the mask and of the sequence take the same loop with them.
Keys outside the tile's hull are read as 0, values too, so that NaN lying there cannot enter through
0 * NaN. With SPLIT, the keys are divided among programs that write float32 partial results, which
kernels/combine.py merges. Programs of packed layouts find their sequence on the device; rows that
belong to no sequence are computed as rows without keys: out 0, lse ``empty_lse``.

With PACK_GQA a tile holds fewer rows, but each for all query heads that share a key head: the keys
are then read once for all of them, which is what decoding waits for.

float8 inputs are multiplied as they are where the tensor cores can (FLOAT8_PRODUCT), else as
float16, which holds them exactly. The weights of float8 values are rounded to float8 (FLOAT8_P)
2**P_SHIFT times as large, so that they use its whole range; the row sum keeps the unrounded ones,
and the factor cancels.
"""

import triton
import triton.language as tl

from .common import (
    LN2,
    LOG2E,
    clamp,
    dropout_keep,
    eights,
    is_between,
    key_bounds,
    key_range,
    load_rows,
    mask_values,
    seen_interval,
    split_loop,
    store_rows,
    tile_of_program,
    tile_offsets,
    to_operand,
    transform_scores,
    used_rows,
)


@triton.jit
def load_keys(base, start_n, first_key, stride_n, stride_page, table, page_size, num_pages,
              cols, keys_first, keys_end, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_D: tl.constexpr, IS_PAGED: tl.constexpr, MASKED: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    """A (BLOCK_N, BLOCK_D) tile of keys or values from key ``start_n``; others than the hull's
    [keys_first, keys_end) read as 0 if MASKED."""
    offs_n = tl.arange(0, BLOCK_N)
    keys = start_n + offs_n
    if IS_PAGED:
        row = first_key + keys
        inside = (keys >= keys_first) & (keys < keys_end)
        page = tl.load(table + row // page_size, mask=inside, other=0)
        page = clamp(page, 0, num_pages - 1).to(tl.int64)
        offsets = page * stride_page + (row % page_size).to(tl.int64) * stride_n
        pointers = base + offsets[:, None] + cols[None, :]
        mask = inside[:, None] & (cols < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    base += (first_key + start_n).to(tl.int64) * stride_n
    pointers = base + tile_offsets(offs_n, stride_n, WIDE)[:, None] + cols[None, :]
    if MASKED:
        inside = (keys >= keys_first) & (keys < keys_end)
        if BLOCK_D != HEAD_DIM:
            mask = inside[:, None] & (cols < HEAD_DIM)[None, :]
            return tl.load(pointers, mask=mask, other=0.0)
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    if BLOCK_D != HEAD_DIM:
        return tl.load(pointers, mask=(cols < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_queries(base, rows, first_row, heads, stride_m, stride_h, cols, rows_end,
                 HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PACK_GQA: tl.constexpr,
                 WIDE: tl.constexpr):  # fmt: skip
    """The (BLOCK_M, BLOCK_D) tile of ``rows``; ``base`` is that of row ``first_row``. With PACK_GQA
    ``heads`` names the head of each row, counted from ``base``'s."""
    if PACK_GQA:
        offsets = (rows - first_row).to(tl.int64) * stride_m + heads.to(tl.int64) * stride_h
        inside = (rows < rows_end)[:, None] & (cols < HEAD_DIM)[None, :]
        tile = tl.load(base + offsets[:, None] + cols[None, :], mask=inside, other=0.0)
    else:
        tile = load_rows(base, rows - first_row, stride_m, cols, rows_end - first_row, HEAD_DIM,
                         BLOCK_D, True, WIDE)  # fmt: skip
    return to_operand(tile)


@triton.jit
def multiply_descale(factor, descale, stride_b, stride_h, b, h):
    """``factor`` times the descale of sequence ``b`` and head ``h``, where there is one."""
    if descale is not None:
        offset = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        factor *= tl.load(descale + offset)
    return factor


@triton.jit
def row_products(a, b, PRECISION: tl.constexpr):
    """Products of the rows of ``a`` with those of ``b`` in float32."""
    WIDTH: tl.constexpr = a.shape[1]
    # Hopper adds float8 products with 14 bits: at most 128 of them, and those sums in float32.
    FEW: tl.constexpr = 128 if a.dtype.is_fp8() and WIDTH > 128 else None
    return tl.dot(a, tl.trans(b), input_precision=PRECISION, max_num_imprecise_acc=FEW)


@triton.jit
def attend_tiles(acc, l_i, m_i, q, qv, k_base, v_base, table, rng_state, begin, end, rows, cols,
                 cols_v, first_seen, last_seen, first_key, keys_first, keys_end, seqlen_q, seqlen_k,
                 stride_kn, stride_vn, stride_kb, stride_vb, page_size, num_pages, head_batch,
                 softmax_scale, softcap, slope, mask, qk_factor, v_factor, keep_threshold,
                 HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                 MASKED: tl.constexpr, FOLD_SCALE: tl.constexpr,
                 HAS_LEFT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                 HAS_ALIBI: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
                 HAS_QV: tl.constexpr, IS_PAGED: tl.constexpr, FLOAT8_P: tl.constexpr,
                 P_SHIFT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Walk over the tiles [begin, end) of keys and return the updated (acc, l_i, m_i)."""
    # Rows may have seen nothing yet, wherever something hides keys.
    MAY_BE_EMPTY: tl.constexpr = MASKED or HAS_MASK
    offs_n = tl.arange(0, BLOCK_N)
    for tile in range(begin, end):
        start_n = tile * BLOCK_N
        k = load_keys(k_base, start_n, first_key, stride_kn, stride_kb, table, page_size,
                      num_pages, cols, keys_first, keys_end, HEAD_DIM, BLOCK_N, BLOCK_D,
                      IS_PAGED, MASKED, WIDE)  # fmt: skip
        k = to_operand(k)
        keys = start_n + offs_n
        if HAS_MASK and FOLD_SCALE:
            # Sums start from the mask. (Adding it to them would pull its layout into the softmax.)
            start = mask_values(rows[:, None], keys[None, :], mask, 1.0 / softmax_scale, WIDE)
            start = tl.broadcast_to(start, [BLOCK_M, BLOCK_N])
            s = tl.dot(q, tl.trans(k), start, input_precision=PRECISION)
        else:
            s = row_products(q, k, PRECISION)  # (BLOCK_M, BLOCK_N)
        if HAS_QV:
            v = load_keys(v_base, start_n, first_key, stride_vn, stride_vb, table, page_size,
                          num_pages, cols_v, keys_first, keys_end, HEAD_DIM_V, BLOCK_N, BLOCK_DV,
                          IS_PAGED, MASKED, WIDE)  # fmt: skip
            v = to_operand(v)
            if qk_factor is None:
                s = tl.dot(qv, tl.trans(v), s, input_precision=PRECISION)
            else:
                s = s * qk_factor + row_products(qv, v, PRECISION) * v_factor
        if not FOLD_SCALE:
            s, _ = transform_scores(s, rows[:, None], keys[None, :], seqlen_q, seqlen_k,
                                    softmax_scale, softcap, slope, mask, HAS_SOFTCAP,
                                    HAS_ALIBI, HAS_MASK, WIDE)  # fmt: skip
        if MASKED:
            seen = is_between(offs_n[None, :], (first_seen - start_n)[:, None],
                              (last_seen - start_n)[:, None], HAS_LEFT, True)  # fmt: skip
            s = tl.where(seen, s, float("-inf"))
        if FOLD_SCALE:
            # One fused multiply-add an element: the scale, positive here, commutes with max.
            scale_log2 = softmax_scale * LOG2E
            m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
            shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MAY_BE_EMPTY else m_new
            if P_SHIFT:
                p = tl.exp2(s * scale_log2 - (shift - P_SHIFT)[:, None])
            else:
                p = tl.exp2(s * scale_log2 - shift[:, None])
        else:
            m_new = tl.maximum(m_i, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MAY_BE_EMPTY else m_new
            if P_SHIFT:
                p = tl.exp2(s - (shift - P_SHIFT)[:, None])
            else:
                p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        m_i = m_new
        if HAS_DROPOUT:
            keep = dropout_keep(
                rng_state, head_batch, rows, start_n, keep_threshold, BLOCK_M, BLOCK_N
            )
            p = tl.where(keep, p, 0.0)
        if not HAS_QV:
            v = load_keys(v_base, start_n, first_key, stride_vn, stride_vb, table, page_size,
                          num_pages, cols_v, keys_first, keys_end, HEAD_DIM_V, BLOCK_N, BLOCK_DV,
                          IS_PAGED, MASKED, WIDE)  # fmt: skip
            v = to_operand(v)
        if v.dtype.is_fp8():
            if FLOAT8_P:
                acc = tl.dot(p.to(v.dtype), v, acc, max_num_imprecise_acc=BLOCK_N)
            else:
                acc = tl.dot(p.to(tl.float16), v.to(tl.float16), acc)
        else:
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, l_i, m_i


_LENGTHS = (
    "batch_size", "nheads", "group", "seqlen_q", "seqlen_k", "num_tiles", "num_splits", "page_size",
    "num_pages", "table_rows", "window_left", "window_right", "chunk", "keep_threshold",
    "stride_table", "stride_slope", "stride_lb", "stride_lh", "stride_ls", "stride_ab", "stride_ah",
    "mask_rows", "mask_keys", "q_descale_group", "stride_qdb", "stride_qdh", "stride_kdb",
    "stride_kdh", "stride_vdb", "stride_vdh",
)  # fmt: skip
_METADATA = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "page_table",
    "cache_batch_idx", "alibi_slopes", "rng_state", "sinks", "q_descale", "k_descale", "v_descale",
    "lse",
)  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_METADATA)
def attention_forward(
    q, k, v, out, lse,
    stride_qb, stride_qm, stride_qh,
    stride_kb, stride_kn, stride_kh,  # stride_kb is a page's with IS_PAGED
    stride_vb, stride_vn, stride_vh,
    stride_os, stride_ob, stride_om, stride_oh,
    stride_ls, stride_lb, stride_lh,
    cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, page_table, cache_batch_idx,
    alibi_slopes, rng_state, stride_table, stride_slope,
    batch_size, nheads, group, seqlen_q, seqlen_k, num_tiles, num_splits, page_size, num_pages,
    softmax_scale, softcap, window_left, window_right, keep_threshold, dropout_scale, empty_lse,
    # None, as are their strides and sizes, where they are not in use.
    chunk, seqused_q, sinks, table_rows,
    qv, stride_wb, stride_wm, stride_wh,
    attn_mask, stride_ab, stride_ah, stride_am, stride_an, mask_rows, mask_keys,
    q_descale, stride_qdb, stride_qdh, q_descale_group, k_descale, stride_kdb, stride_kdh,
    v_descale, stride_vdb, stride_vdh,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_VARLEN_Q: tl.constexpr, IS_VARLEN_K: tl.constexpr, IS_PAGED: tl.constexpr,
    HAS_SEQUSED: tl.constexpr, HAS_LEFTPAD: tl.constexpr, HAS_BATCH_IDX: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, SPLIT: tl.constexpr,
    FOLD_SCALE: tl.constexpr, PACK_GQA: tl.constexpr, FLOAT8_P: tl.constexpr, WIDE: tl.constexpr,
    EIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module's docstring. ``seqlen_q``/``seqlen_k`` are totals where packed, and
    ``seqlen_k`` is the table's capacity where paged."""
    HAS_CHUNK: tl.constexpr = chunk is not None
    HAS_SEQUSED_Q: tl.constexpr = seqused_q is not None
    HAS_MASK: tl.constexpr = attn_mask is not None
    HAS_QV: tl.constexpr = qv is not None
    HAS_QK_DESCALE: tl.constexpr = q_descale is not None or k_descale is not None
    HAS_DESCALE: tl.constexpr = HAS_QK_DESCALE or v_descale is not None
    P_SHIFT: tl.constexpr = 8 if FLOAT8_P else 0
    if EIGHTS:
        stride_qb, stride_qm, stride_qh = eights(stride_qb, stride_qm, stride_qh)
        stride_kb, stride_kn, stride_kh = eights(stride_kb, stride_kn, stride_kh)
        stride_vb, stride_vn, stride_vh = eights(stride_vb, stride_vn, stride_vh)
        stride_ob, stride_om, stride_oh = eights(stride_ob, stride_om, stride_oh)
        stride_os = stride_os // 8 * 8
        if HAS_QV:
            stride_wb, stride_wm, stride_wh = eights(stride_wb, stride_wm, stride_wh)
    # Locate the tile.
    pid = tl.program_id(0)
    split = 0
    if SPLIT:
        split = pid % num_splits
        pid = pid // num_splits
    tile_rows = BLOCK_M
    heads = nheads
    if PACK_GQA:
        tile_rows = BLOCK_M // group
        heads = nheads // group
    b, h, tile, q_start, rows_all = tile_of_program(
        pid, cu_seqlens_q, batch_size, heads, seqlen_q, num_tiles,
        IS_VARLEN_Q, HAS_RIGHT, tile_rows,
    )  # fmt: skip
    first_row = tile * tile_rows
    if first_row >= rows_all:
        return
    first_key, rows_k = key_range(b, cu_seqlens_k, seqused_k, leftpad_k, batch_size, seqlen_k,
                                  IS_VARLEN_K, IS_PAGED, HAS_SEQUSED, HAS_LEFTPAD)  # fmt: skip
    rows_q = used_rows(seqused_q, b, batch_size, rows_all, HAS_SEQUSED_Q)
    if HAS_SEQUSED_Q:
        rows_k = tl.where(first_row < rows_q, rows_k, 0)
    b_index = clamp(b, 0, batch_size - 1)
    b_k = b_index
    if HAS_BATCH_IDX:
        b_k = clamp(tl.load(cache_batch_idx + b_index), 0, table_rows - 1)

    # Load the queries: (BLOCK_M, BLOCK_D).
    offs_m = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    cols_v = tl.arange(0, BLOCK_DV)
    if PACK_GQA:
        h_k = h
        rows = offs_m // group
        g = offs_m - rows * group
        # What is left of the tile after its last whole row stands on no row.
        rows = tl.where(rows < tile_rows, first_row + rows, rows_all)
        h = h_k * group
        each_head = h + g  # a row's own head
    else:
        h_k = h // group
        rows = first_row + offs_m
        g = 0
        each_head = h
    q_base = q + h.to(tl.int64) * stride_qh + (q_start + first_row).to(tl.int64) * stride_qm
    if not IS_VARLEN_Q:
        q_base += b.to(tl.int64) * stride_qb
    q_tile = load_queries(q_base, rows, first_row, g, stride_qm, stride_qh, cols, rows_q, HEAD_DIM,
                          BLOCK_D, PACK_GQA, WIDE)  # fmt: skip
    qv_tile = None
    if HAS_QV:
        qv_base = qv + h.to(tl.int64) * stride_wh + (q_start + first_row).to(tl.int64) * stride_wm
        if not IS_VARLEN_Q:
            qv_base += b.to(tl.int64) * stride_wb
        qv_tile = load_queries(qv_base, rows, first_row, g, stride_wm, stride_wh, cols_v, rows_q,
                               HEAD_DIM_V, BLOCK_DV, PACK_GQA, WIDE)  # fmt: skip
    k_base = k + h_k.to(tl.int64) * stride_kh
    v_base = v + h_k.to(tl.int64) * stride_vh
    if not IS_PAGED and not IS_VARLEN_K:
        k_base += b_k.to(tl.int64) * stride_kb
        v_base += b_k.to(tl.int64) * stride_vb
    b_table = b_k if IS_PAGED else b_index
    table = page_table + b_table.to(tl.int64) * stride_table
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + b_index * stride_slope + each_head)
        if PACK_GQA:
            slope = slope[:, None]
    mask = None
    if HAS_MASK:
        mask_base = attn_mask + b_index.to(tl.int64) * stride_ab
        mask_base += each_head.to(tl.int64) * stride_ah
        if PACK_GQA:
            mask_base = mask_base[:, None]
        mask = (mask_base, stride_am, stride_an, mask_rows, mask_keys)
    qk_factor = None
    v_factor = None
    if HAS_DESCALE:
        v_factor = multiply_descale(1.0, v_descale, stride_vdb, stride_vdh, b_index, h_k)
        qk_factor = multiply_descale(1.0, k_descale, stride_kdb, stride_kdh, b_index, h_k)
        if q_descale is not None:
            qk_factor = multiply_descale(qk_factor, q_descale, stride_qdb, stride_qdh, b_index,
                                         h // q_descale_group)  # fmt: skip
        if not HAS_QV:
            softmax_scale = softmax_scale * qk_factor
            qk_factor = None
            if FOLD_SCALE:
                # Folding needs a positive scale: its sign goes into the queries, and 0 is almost 0.
                sign = tl.where(softmax_scale < 0.0, -1.0, 1.0)
                q_tile = (q_tile.to(tl.float32) * sign).to(q_tile.dtype)
                softmax_scale = tl.maximum(tl.abs(softmax_scale), 1e-30)

    # Walk over the keys.
    last_row = tl.minimum(first_row + tile_rows, rows_q) - 1
    any_first, any_end, all_first, all_end = key_bounds(
        first_row, last_row, rows_q, rows_k, window_left, window_right, chunk, HAS_LEFT, HAS_RIGHT,
        HAS_CHUNK,
    )  # fmt: skip
    if SPLIT:
        begin = any_first // BLOCK_N * BLOCK_N
        tiles = tl.cdiv(tl.maximum(any_end - begin, 0), BLOCK_N)
        share = tl.cdiv(tiles, num_splits) * BLOCK_N
        any_first = tl.maximum(any_first, begin + split * share)
        any_end = tl.minimum(any_end, begin + (split + 1) * share)
        all_first = tl.maximum(all_first, any_first)
        all_end = tl.minimum(all_end, any_end)
    a, b_loop, c, d = split_loop(any_first, any_end, all_first, all_end, BLOCK_N)
    first_seen, last_seen = seen_interval(
        rows, rows_q, rows_k, window_left, window_right, chunk, HAS_LEFT, HAS_RIGHT, HAS_CHUNK
    )
    if SPLIT:
        last_seen = tl.minimum(last_seen, any_end - 1)
    head_batch = b_index * nheads + h
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if HAS_LEFT:
        acc, l_i, m_i = attend_tiles(
            acc, l_i, m_i, q_tile, qv_tile, k_base, v_base, table, rng_state, a, b_loop, rows,
            cols, cols_v, first_seen, last_seen, first_key, any_first, any_end, rows_q, rows_k,
            stride_kn, stride_vn, stride_kb, stride_vb, page_size, num_pages, head_batch,
            softmax_scale, softcap, slope, mask, qk_factor, v_factor, keep_threshold, HEAD_DIM,
            HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, FOLD_SCALE, HAS_LEFT,
            HAS_SOFTCAP, HAS_ALIBI, HAS_MASK, HAS_DROPOUT, HAS_QV, IS_PAGED, FLOAT8_P, P_SHIFT,
            WIDE, PRECISION,
        )  # fmt: skip
    acc, l_i, m_i = attend_tiles(
        acc, l_i, m_i, q_tile, qv_tile, k_base, v_base, table, rng_state, b_loop, c, rows, cols,
        cols_v, first_seen, last_seen, first_key, any_first, any_end, rows_q, rows_k, stride_kn,
        stride_vn, stride_kb, stride_vb, page_size, num_pages, head_batch, softmax_scale, softcap,
        slope, mask, qk_factor, v_factor, keep_threshold, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N,
        BLOCK_D, BLOCK_DV, False, FOLD_SCALE, HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI, HAS_MASK,
        HAS_DROPOUT, HAS_QV, IS_PAGED, FLOAT8_P, P_SHIFT, WIDE, PRECISION,
    )  # fmt: skip
    acc, l_i, m_i = attend_tiles(
        acc, l_i, m_i, q_tile, qv_tile, k_base, v_base, table, rng_state, c, d, rows, cols,
        cols_v, first_seen, last_seen, first_key, any_first, any_end, rows_q, rows_k, stride_kn,
        stride_vn, stride_kb, stride_vb, page_size, num_pages, head_batch, softmax_scale, softcap,
        slope, mask, qk_factor, v_factor, keep_threshold, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N,
        BLOCK_D, BLOCK_DV, True, FOLD_SCALE, HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI, HAS_MASK,
        HAS_DROPOUT, HAS_QV, IS_PAGED, FLOAT8_P, P_SHIFT, WIDE, PRECISION,
    )  # fmt: skip

    # Normalise and store.
    if HAS_SEQUSED_Q:
        used = rows < rows_q
        acc = tl.where(used[:, None], acc, 0.0)
        l_i = tl.where(used, l_i, 0.0)
        m_i = tl.where(used, m_i, float("-inf"))
    if sinks is not None:
        # One more key, whose value is 0.
        sink = tl.load(sinks + each_head).to(tl.float32) * LOG2E
        m_new = tl.maximum(m_i, sink)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.exp2(sink - shift + P_SHIFT)
        acc = acc * alpha[:, None]
        m_i = m_new
    dead = l_i == 0.0
    factor = tl.where(dead, 0.0, dropout_scale / tl.where(dead, 1.0, l_i))
    if HAS_DESCALE:
        factor *= v_factor
    log2_sum = m_i + tl.log2(tl.where(dead, 1.0, l_i))
    if P_SHIFT:
        log2_sum -= P_SHIFT
    row_lse = tl.where(dead, empty_lse, log2_sum * LN2)
    out_base = out + split.to(tl.int64) * stride_os if SPLIT else out
    lse_base = lse + split.to(tl.int64) * stride_ls if SPLIT else lse
    out_base += h.to(tl.int64) * stride_oh + (q_start + first_row).to(tl.int64) * stride_om
    lse_base += h.to(tl.int64) * stride_lh + q_start
    if not IS_VARLEN_Q:
        out_base += b.to(tl.int64) * stride_ob
        lse_base += b.to(tl.int64) * stride_lb
    result = acc * factor[:, None]
    inside = rows < rows_all
    if PACK_GQA:
        g = g.to(tl.int64)
        offsets = (rows - first_row).to(tl.int64) * stride_om + g * stride_oh
        tl.store(out_base + offsets[:, None] + cols_v[None, :], result.to(out.dtype.element_ty),
                 mask=inside[:, None] & (cols_v < HEAD_DIM_V)[None, :])  # fmt: skip
        tl.store(lse_base + rows + g * stride_lh, row_lse, mask=inside)
    else:
        store_rows(out_base, result, rows - first_row, stride_om, cols_v, rows_all - first_row,
                   HEAD_DIM_V, WIDE)  # fmt: skip
        tl.store(lse_base + rows, row_lse, mask=inside)
