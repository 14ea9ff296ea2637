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
"""

import triton
import triton.language as tl

from .common import (
    LN2,
    LOG2E,
    clamp,
    dropout_keep,
    is_between,
    key_bounds,
    key_range,
    load_rows,
    seen_interval,
    split_loop,
    store_rows,
    tile_of_program,
    tile_offsets,
    transform_scores,
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
def attend_tiles(acc, l_i, m_i, q, k_base, v_base, table, rng_state, begin, end, rows, cols,
                 first_seen, last_seen, first_key, keys_first, keys_end, seqlen_q, seqlen_k,
                 stride_kn, stride_vn, stride_kb, stride_vb, page_size, num_pages, head_batch,
                 softmax_scale, softcap, slope, keep_threshold,
                 HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_D: tl.constexpr, MASKED: tl.constexpr, FOLD_SCALE: tl.constexpr,
                 HAS_LEFT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                 HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_PAGED: tl.constexpr,
                 WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Walk over the tiles [begin, end) of keys and return the updated (acc, l_i, m_i)."""
    offs_n = tl.arange(0, BLOCK_N)
    for tile in range(begin, end):
        start_n = tile * BLOCK_N
        k = load_keys(k_base, start_n, first_key, stride_kn, stride_kb, table, page_size,
                      num_pages, cols, keys_first, keys_end, HEAD_DIM, BLOCK_N, BLOCK_D,
                      IS_PAGED, MASKED, WIDE)  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        keys = start_n + offs_n
        if not FOLD_SCALE:
            s, _ = transform_scores(s, rows[:, None], keys[None, :], seqlen_q, seqlen_k,
                                    softmax_scale, softcap, slope, HAS_SOFTCAP,
                                    HAS_ALIBI)  # fmt: skip
        if MASKED:
            seen = is_between(offs_n[None, :], (first_seen - start_n)[:, None],
                              (last_seen - start_n)[:, None], HAS_LEFT, True)  # fmt: skip
            s = tl.where(seen, s, float("-inf"))
        if FOLD_SCALE:
            # One fused multiply-add an element: the scale, positive here, commutes with max.
            scale_log2 = softmax_scale * LOG2E
            m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
            shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
            p = tl.exp2(s * scale_log2 - shift[:, None])
        else:
            m_new = tl.maximum(m_i, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
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
        v = load_keys(v_base, start_n, first_key, stride_vn, stride_vb, table, page_size,
                      num_pages, cols, keys_first, keys_end, HEAD_DIM, BLOCK_N, BLOCK_D,
                      IS_PAGED, MASKED, WIDE)  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, l_i, m_i


_LENGTHS = (
    "batch_size", "nheads", "group", "seqlen_q", "seqlen_k", "num_tiles", "num_splits", "page_size",
    "num_pages", "window_left", "window_right", "keep_threshold", "stride_table", "stride_slope",
    "stride_lb", "stride_lh", "stride_ls",
)  # fmt: skip
_METADATA = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "page_table", "cache_batch_idx",
    "alibi_slopes", "rng_state", "lse",
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
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_VARLEN_Q: tl.constexpr, IS_VARLEN_K: tl.constexpr, IS_PAGED: tl.constexpr,
    HAS_SEQUSED: tl.constexpr, HAS_LEFTPAD: tl.constexpr, HAS_BATCH_IDX: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, SPLIT: tl.constexpr,
    FOLD_SCALE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module's docstring. ``seqlen_q``/``seqlen_k`` are totals where packed, and
    ``seqlen_k`` is the table's capacity where paged."""
    # Locate the tile.
    pid = tl.program_id(0)
    split = 0
    if SPLIT:
        split = pid % num_splits
        pid = pid // num_splits
    b, h, tile, q_start, rows_q = tile_of_program(
        pid, cu_seqlens_q, batch_size, nheads, seqlen_q, num_tiles,
        IS_VARLEN_Q, HAS_RIGHT, BLOCK_M,
    )  # fmt: skip
    if tile * BLOCK_M >= rows_q:
        return
    first_key, rows_k = key_range(b, cu_seqlens_k, seqused_k, leftpad_k, batch_size, seqlen_k,
                                  IS_VARLEN_K, IS_PAGED, HAS_SEQUSED, HAS_LEFTPAD)  # fmt: skip
    b_index = clamp(b, 0, batch_size - 1)
    b_k = b_index
    if HAS_BATCH_IDX:
        b_k = clamp(tl.load(cache_batch_idx + b_index), 0, num_pages - 1)
    h_k = h // group

    # Load the queries: (BLOCK_M, BLOCK_D).
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    q_base = q + h.to(tl.int64) * stride_qh + (q_start + tile * BLOCK_M).to(tl.int64) * stride_qm
    if not IS_VARLEN_Q:
        q_base += b.to(tl.int64) * stride_qb
    q_tile = load_rows(q_base, rows - tile * BLOCK_M, stride_qm, cols, rows_q - tile * BLOCK_M,
                       HEAD_DIM, BLOCK_D, True, WIDE)  # fmt: skip
    k_base = k + h_k.to(tl.int64) * stride_kh
    v_base = v + h_k.to(tl.int64) * stride_vh
    if not IS_PAGED and not IS_VARLEN_K:
        k_base += b_k.to(tl.int64) * stride_kb
        v_base += b_k.to(tl.int64) * stride_vb
    table = page_table + b_index.to(tl.int64) * stride_table
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + b_index * stride_slope + h)

    # Walk over the keys.
    last_row = tl.minimum((tile + 1) * BLOCK_M, rows_q) - 1
    any_first, any_end, all_first, all_end = key_bounds(
        tile * BLOCK_M, last_row, rows_q, rows_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
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
        rows, rows_q, rows_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    if SPLIT:
        last_seen = tl.minimum(last_seen, any_end - 1)
    head_batch = b_index * nheads + h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if HAS_LEFT:
        acc, l_i, m_i = attend_tiles(
            acc, l_i, m_i, q_tile, k_base, v_base, table, rng_state, a, b_loop, rows, cols,
            first_seen, last_seen, first_key, any_first, any_end, rows_q, rows_k, stride_kn,
            stride_vn, stride_kb, stride_vb, page_size, num_pages, head_batch, softmax_scale,
            softcap, slope, keep_threshold, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, True, FOLD_SCALE,
            HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, IS_PAGED, WIDE, PRECISION,
        )  # fmt: skip
    acc, l_i, m_i = attend_tiles(
        acc, l_i, m_i, q_tile, k_base, v_base, table, rng_state, b_loop, c, rows, cols,
        first_seen, last_seen, first_key, any_first, any_end, rows_q, rows_k, stride_kn,
        stride_vn, stride_kb, stride_vb, page_size, num_pages, head_batch, softmax_scale,
        softcap, slope, keep_threshold, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, False, FOLD_SCALE,
        HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, IS_PAGED, WIDE, PRECISION,
    )  # fmt: skip
    acc, l_i, m_i = attend_tiles(
        acc, l_i, m_i, q_tile, k_base, v_base, table, rng_state, c, d, rows, cols,
        first_seen, last_seen, first_key, any_first, any_end, rows_q, rows_k, stride_kn,
        stride_vn, stride_kb, stride_vb, page_size, num_pages, head_batch, softmax_scale,
        softcap, slope, keep_threshold, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, True, FOLD_SCALE,
        HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, IS_PAGED, WIDE, PRECISION,
    )  # fmt: skip

    # Normalise and store.
    dead = l_i == 0.0
    factor = tl.where(dead, 0.0, dropout_scale / tl.where(dead, 1.0, l_i))
    row_lse = tl.where(dead, empty_lse, (m_i + tl.log2(tl.where(dead, 1.0, l_i))) * LN2)
    out_base = out + split.to(tl.int64) * stride_os if SPLIT else out
    lse_base = lse + split.to(tl.int64) * stride_ls if SPLIT else lse
    out_base += h.to(tl.int64) * stride_oh + (q_start + tile * BLOCK_M).to(tl.int64) * stride_om
    lse_base += h.to(tl.int64) * stride_lh + q_start
    if not IS_VARLEN_Q:
        out_base += b.to(tl.int64) * stride_ob
        lse_base += b.to(tl.int64) * stride_lb
    store_rows(out_base, acc * factor[:, None], rows - tile * BLOCK_M, stride_om, cols,
               rows_q - tile * BLOCK_M, HEAD_DIM, WIDE)  # fmt: skip
    tl.store(lse_base + rows, row_lse, mask=rows < rows_q)
