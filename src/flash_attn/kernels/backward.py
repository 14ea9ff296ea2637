"""Attention backward in a few kernels; none of them adds across programs, so all are repeatable.

    p[i, j]  = exp(score[i, j] - lse[i])              recomputed, never stored
    delta[i] = sum_d out[i, d] dout[i, d] - dlse[i]
    dp[i, j] = dout[i] . v[j] * keep[i, j] / (1 - dropout_p)
    ds[i, j] = p[i, j] (dp[i, j] - delta[i])          times 1 - tanh^2 with softcap
    dv[j] = sum_i keep p dout[i],   dk[j] = scale sum_i ds q[i],   dq[i] = scale sum_j ds k[j]
    dmask = ds before the factor of softcap, summed over whatever the mask is broadcast

* ``attention_row_statistics``: delta and log-sum-exp of all rows, padded.
* ``attention_dkdv``: one program owns one tile of keys of one key head and walks over the queries
  that see it, for every query head of the group, so that dk and dv are summed in float32 in
  registers. It works on transposed tiles (keys x queries). Where both do not fit in registers, a
  launch makes one of them.
* ``attention_dq``: one program owns one tile of queries and walks over its keys.
* ``attention_dmask``: one program owns one tile of the mask's own elements and walks over all
  sequences, heads, rows and keys that share them.

Rows and keys outside a sequence read as 0 with lse +inf, which makes p, ds and all sums 0.
"""

import triton
import triton.language as tl

from .common import (
    LOG2E,
    chunk_start,
    clamp,
    dropout_keep,
    eights,
    int64,
    is_between,
    key_bounds,
    load_rows,
    packed_range,
    seen_interval,
    split_loop,
    store_rows,
    tile_of_program,
    transform_scores,
    used_rows,
)

_LENGTHS = (
    "batch_size", "nheads", "nheads_k", "group", "seqlen_q", "seqlen_k", "num_tiles",
    "window_left", "window_right", "chunk", "keep_threshold", "stride_slope", "stride_lb",
    "stride_lh", "stride_tb", "stride_th", "stride_db", "stride_dh", "stride_ab", "stride_ah",
    "mask_rows", "mask_keys", "mask_batch", "mask_heads", "stride_dab", "stride_dah", "tiles_m",
    "tiles_n",
)  # fmt: skip
_METADATA = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "alibi_slopes", "rng_state", "lse",
    "dlse",
)  # fmt: skip


@triton.jit
def statistics_start(cu_seqlens_q, b, batch_size, total, IS_VARLEN: tl.constexpr):
    """First element of sequence ``b`` in the row statistics: each has its length up to 128."""
    start = 0
    if IS_VARLEN:
        start = (clamp(tl.load(cu_seqlens_q + b), 0, total) + 128 * b) // 128 * 128
    return start


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_METADATA)
def attention_row_statistics(
    out, dout, lse, softmax_d, lse_log2,
    stride_ob, stride_om, stride_oh, stride_gb, stride_gm, stride_gh,
    stride_lb, stride_lh, stride_db, stride_dh,
    cu_seqlens_q, batch_size, nheads, seqlen_q, num_tiles,
    seqused_q, dlse, stride_tb, stride_th,  # None where they are not in use
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """delta and log-sum-exp in base 2 of 128 rows, BLOCK_M at a time; HEAD_DIM is that of v.

    Rows past a sequence's end, up to a multiple of 128, and rows that see no key get 0 and +inf,
    so that the main kernels need no masks when they load. Strides that are multiples of 8 are not
    announced here: the order of these sums is that of the addresses that a thread loads together.
    """
    b, h, tile, q_start, rows_q = tile_of_program(
        tl.program_id(0), cu_seqlens_q, batch_size, nheads, seqlen_q, num_tiles,
        IS_VARLEN, False, 128,
    )  # fmt: skip
    if (tile * 128 >= rows_q) | (b < 0) | (b >= batch_size):
        return
    batch = int64(0) if IS_VARLEN else int64(b)
    head = int64(h)
    cols = tl.arange(0, BLOCK_D)
    start = statistics_start(cu_seqlens_q, b, batch_size, seqlen_q, IS_VARLEN)
    rows_q = used_rows(seqused_q, b, batch_size, rows_q, seqused_q is not None)
    out += batch * stride_ob + head * stride_oh
    dout += batch * stride_gb + head * stride_gh
    if dlse is not None:
        dlse += batch * stride_tb + head * stride_th + q_start
    lse += batch * stride_lb + head * stride_lh + q_start
    target = batch * stride_db + head * stride_dh + start
    for part in tl.static_range(0, 128 // BLOCK_M):
        rows = tile * 128 + part * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < rows_q
        mask = inside[:, None] & (cols < HEAD_DIM)[None, :]
        at = (q_start + rows).to(tl.int64)[:, None]
        o = tl.load(out + at * stride_om + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        do = tl.load(dout + at * stride_gm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        row_lse = tl.load(lse + rows, mask=inside, other=float("inf"))
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
        delta = tl.sum(o * do, 1)
        if dlse is not None:
            row_dlse = tl.load(dlse + rows, mask=inside, other=0.0)
            delta -= tl.where(row_lse == float("inf"), 0.0, row_dlse)
        tl.store(softmax_d + target + rows, delta)
        tl.store(lse_log2 + target + rows, row_lse * LOG2E)


@triton.jit
def load_query_rows(base, start_m, offs_m, stride, cols, seqlen_q, HEAD_DIM: tl.constexpr,
                    BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr, FROM_FIRST: tl.constexpr,
                    WIDE: tl.constexpr):  # fmt: skip
    """A tile of rows of q or dout. FROM_FIRST counts offsets from the sequence's first row, which
    keeps no addresses in registers from one iteration to the next."""
    if FROM_FIRST:
        tile = load_rows(base, start_m + offs_m, stride, cols, seqlen_q, HEAD_DIM, BLOCK_D,
                         MASK_ROWS, WIDE)  # fmt: skip
    else:
        tile = load_rows(base + int64(start_m) * stride, offs_m, stride, cols, seqlen_q - start_m,
                         HEAD_DIM, BLOCK_D, MASK_ROWS, WIDE)  # fmt: skip
    return tile


@triton.jit
def dkdv_tiles(dk, dv, k_tile, v_tile, q_base, dout_base, lse_log2, softmax_d, rng_state, begin,
               end, group, keys, start_n, cols, cols_v, first_seen, last_seen, seqlen_q, seqlen_k,
               stride_qm, stride_qh, stride_gm, stride_gh, stride_dh, head_batch, softmax_scale,
               softcap, slopes, mask, stride_ah, keep_threshold, dropout_scale,
               HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
               MASKED: tl.constexpr, MASK_ROWS: tl.constexpr,
               HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
               HAS_ALIBI: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
               WIDE: tl.constexpr, WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Walk over the tiles [begin, end) of queries of a group of heads; the updated (dk, dv).

    One loop runs over all heads and tiles: a loop within a loop would double the registers.
    """
    # Registers decide: without a mask this is what compiles without spills on Hopper.
    FROM_FIRST: tl.constexpr = not HAS_LEFT and not HAS_RIGHT
    offs_m = tl.arange(0, BLOCK_M)
    count = end - begin
    for step in range(group * count):
        g = step // count
        start_m = (begin + step - g * count) * BLOCK_M
        rows = start_m + offs_m
        if FROM_FIRST:  # the same sum: only the number of registers differs
            statistics = (int64(g) * stride_dh + start_m) + offs_m
        else:
            statistics = int64(g) * stride_dh + rows
        q = load_query_rows(q_base + int64(g) * stride_qh, start_m, offs_m, stride_qm, cols,
                            seqlen_q, HEAD_DIM, BLOCK_D, MASK_ROWS, FROM_FIRST, WIDE)  # fmt: skip
        row_lse = tl.load(lse_log2 + statistics)
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slopes + g)
        mask_g = None
        if HAS_MASK:
            mask_g = (mask[0] + int64(g) * stride_ah, mask[1], mask[2], mask[3], mask[4])
        s = tl.dot(k_tile, tl.trans(q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        s, capped = transform_scores(s, rows[None, :], keys[:, None], seqlen_q, seqlen_k,
                                     softmax_scale, softcap, slope, mask_g, HAS_SOFTCAP,
                                     HAS_ALIBI, HAS_MASK, WIDE)  # fmt: skip
        p = tl.exp2(s - row_lse[None, :])
        if MASKED:
            seen = is_between(offs_m[None, :], (first_seen - start_m)[:, None],
                              (last_seen - start_m)[:, None], HAS_RIGHT, HAS_LEFT)  # fmt: skip
            p = tl.where(seen, p, 0.0)
        dout = load_query_rows(dout_base + int64(g) * stride_gh, start_m, offs_m, stride_gm,
                               cols_v, seqlen_q, HEAD_DIM_V, BLOCK_DV, MASK_ROWS, False,
                               WIDE)  # fmt: skip
        dropped = p
        if WITH_DK:
            dp = tl.dot(v_tile, tl.trans(dout), input_precision=PRECISION)
        if HAS_DROPOUT:
            keep = tl.trans(dropout_keep(rng_state, head_batch + g, rows, start_n,
                                         keep_threshold, BLOCK_M, BLOCK_N))  # fmt: skip
            dropped = tl.where(keep, p * dropout_scale, 0.0)
            if WITH_DK:
                dp = tl.where(keep, dp * dropout_scale, 0.0)
        if WITH_DK:
            delta = tl.load(softmax_d + statistics)
            ds = p * (dp - delta[None, :])
            if HAS_SOFTCAP:
                ds = ds * (1.0 - capped * capped)
        if WITH_DV:
            dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if WITH_DK:
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_METADATA)
def attention_dkdv(
    q, k, v, dout, lse_log2, softmax_d, dk, dv,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_gb, stride_gm, stride_gh,
    stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
    stride_db, stride_dh,
    cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state, stride_slope,
    batch_size, nheads_k, group, seqlen_q, seqlen_k, num_tiles,
    softmax_scale, softcap, window_left, window_right, keep_threshold, dropout_scale,
    # None, as are their strides and sizes, where they are not in use.
    chunk, seqused_q, seqused_k,
    attn_mask, stride_ab, stride_ah, stride_am, stride_an, mask_rows, mask_keys,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_VARLEN_Q: tl.constexpr, IS_VARLEN_K: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, WIDE: tl.constexpr, EIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys; see the module's docstring."""
    HAS_CHUNK: tl.constexpr = chunk is not None
    HAS_MASK: tl.constexpr = attn_mask is not None
    if EIGHTS:
        stride_qb, stride_qm, stride_qh = eights(stride_qb, stride_qm, stride_qh)
        stride_kb, stride_kn, stride_kh = eights(stride_kb, stride_kn, stride_kh)
        stride_vb, stride_vn, stride_vh = eights(stride_vb, stride_vn, stride_vh)
        stride_gb, stride_gm, stride_gh = eights(stride_gb, stride_gm, stride_gh)
        stride_dkb, stride_dkn, stride_dkh = eights(stride_dkb, stride_dkn, stride_dkh)
        stride_dvb, stride_dvn, stride_dvh = eights(stride_dvb, stride_dvn, stride_dvh)
    # Locate the tile. Without reversal the first keys, which most queries see, come first.
    b, h_k, tile, k_start, all_k = tile_of_program(
        tl.program_id(0), cu_seqlens_k, batch_size, nheads_k, seqlen_k, num_tiles,
        IS_VARLEN_K, False, BLOCK_N,
    )  # fmt: skip
    start_n = tile * BLOCK_N
    if start_n >= all_k:
        return
    q_start = 0
    rows_q = seqlen_q
    if IS_VARLEN_Q:
        q_start, rows_q = packed_range(cu_seqlens_q, b, batch_size, seqlen_q)
    rows_q = used_rows(seqused_q, b, batch_size, rows_q, seqused_q is not None)
    rows_k = used_rows(seqused_k, b, batch_size, all_k, seqused_k is not None)
    if seqused_k is not None:
        rows_q = tl.where(start_n < rows_k, rows_q, 0)
    b_index = clamp(b, 0, batch_size - 1)
    batch_q = int64(0) if IS_VARLEN_Q else int64(b)
    batch_k = int64(0) if IS_VARLEN_K else int64(b)

    # Load keys and values: (BLOCK_N, BLOCK_D).
    offs_n = tl.arange(0, BLOCK_N)
    keys = start_n + offs_n
    cols = tl.arange(0, BLOCK_D)
    cols_v = tl.arange(0, BLOCK_DV)
    first_k = (k_start + start_n).to(tl.int64)
    head_k = h_k.to(tl.int64)
    left_k = rows_k - start_n
    k += batch_k * stride_kb + head_k * stride_kh + first_k * stride_kn
    v += batch_k * stride_vb + head_k * stride_vh + first_k * stride_vn
    k_tile = load_rows(k, offs_n, stride_kn, cols, left_k, HEAD_DIM, BLOCK_D, True, WIDE)
    v_tile = load_rows(v, offs_n, stride_vn, cols_v, left_k, HEAD_DIM_V, BLOCK_DV, True, WIDE)
    if HAS_LEFT:
        # Keys before the first query's window read as 0: NaN there must not reach their gradients.
        # (The last query sees the last key, so there are none after it.)
        first_key = rows_k - rows_q - window_left
        if HAS_CHUNK:
            first_key = tl.maximum(first_key, chunk_start(0, rows_k - rows_q, chunk, False))
        seen = (keys >= first_key)[:, None]
        k_tile = tl.where(seen, k_tile, 0.0)
        v_tile = tl.where(seen, v_tile, 0.0)

    # Which queries see these keys: masking.visible_queries of the first and the last key. The
    # roles of left and right are exchanged.
    last_key = tl.minimum(start_n + BLOCK_N, rows_k) - 1
    any_first, any_end, all_first, all_end = key_bounds(
        start_n, last_key, rows_k, rows_q, window_right, window_left, chunk, HAS_RIGHT, HAS_LEFT,
        HAS_CHUNK, True,
    )  # fmt: skip
    a, b_loop, c, d = split_loop(any_first, any_end, all_first, all_end, BLOCK_M)
    first_seen, last_seen = seen_interval(
        keys, rows_k, rows_q, window_right, window_left, chunk, HAS_RIGHT, HAS_LEFT, HAS_CHUNK, True
    )
    acc_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first_head = int64(h_k) * group
    q += batch_q * stride_qb + first_head * stride_qh + int64(q_start) * stride_qm
    dout += batch_q * stride_gb + first_head * stride_gh + int64(q_start) * stride_gm
    at = statistics_start(cu_seqlens_q, b_index, batch_size, seqlen_q, IS_VARLEN_Q)
    lse_log2 += batch_q * stride_db + first_head * stride_dh + at
    softmax_d += batch_q * stride_db + first_head * stride_dh + at
    alibi_slopes += b_index * stride_slope + h_k * group
    mask = None
    if HAS_MASK:
        mask_base = attn_mask + int64(b_index) * stride_ab + first_head * stride_ah
        mask = (mask_base, stride_am, stride_an, mask_rows, mask_keys)
    head_batch = b_index * (nheads_k * group) + h_k * group
    if HAS_RIGHT:
        acc_dk, acc_dv = dkdv_tiles(
            acc_dk, acc_dv, k_tile, v_tile, q, dout, lse_log2, softmax_d, rng_state, a, b_loop,
            group, keys, start_n, cols, cols_v, first_seen, last_seen, rows_q, rows_k, stride_qm,
            stride_qh, stride_gm, stride_gh, stride_dh, head_batch, softmax_scale, softcap,
            alibi_slopes, mask, stride_ah, keep_threshold, dropout_scale, HEAD_DIM, HEAD_DIM_V,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
            HAS_ALIBI, HAS_MASK, HAS_DROPOUT, WIDE, WITH_DK, WITH_DV, PRECISION,
        )  # fmt: skip
    acc_dk, acc_dv = dkdv_tiles(
        acc_dk, acc_dv, k_tile, v_tile, q, dout, lse_log2, softmax_d, rng_state, b_loop, c,
        group, keys, start_n, cols, cols_v, first_seen, last_seen, rows_q, rows_k, stride_qm,
        stride_qh, stride_gm, stride_gh, stride_dh, head_batch, softmax_scale, softcap,
        alibi_slopes, mask, stride_ah, keep_threshold, dropout_scale, HEAD_DIM, HEAD_DIM_V,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, False, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
        HAS_ALIBI, HAS_MASK, HAS_DROPOUT, WIDE, WITH_DK, WITH_DV, PRECISION,
    )  # fmt: skip
    acc_dk, acc_dv = dkdv_tiles(
        acc_dk, acc_dv, k_tile, v_tile, q, dout, lse_log2, softmax_d, rng_state, c, d,
        group, keys, start_n, cols, cols_v, first_seen, last_seen, rows_q, rows_k, stride_qm,
        stride_qh, stride_gm, stride_gh, stride_dh, head_batch, softmax_scale, softcap,
        alibi_slopes, mask, stride_ah, keep_threshold, dropout_scale, HEAD_DIM, HEAD_DIM_V,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LEFT, True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
        HAS_ALIBI, HAS_MASK, HAS_DROPOUT, WIDE, WITH_DK, WITH_DV, PRECISION,
    )  # fmt: skip

    # Scale and store.
    if seqused_k is not None:
        used = (keys < rows_k)[:, None]
        acc_dk = tl.where(used, acc_dk, 0.0)
        acc_dv = tl.where(used, acc_dv, 0.0)
    dk += batch_k * stride_dkb + head_k * stride_dkh + first_k * stride_dkn
    dv += batch_k * stride_dvb + head_k * stride_dvh + first_k * stride_dvn
    end_k = all_k - start_n
    if WITH_DK:
        store_rows(dk, acc_dk * softmax_scale, offs_n, stride_dkn, cols, end_k, HEAD_DIM, WIDE)
    if WITH_DV:
        store_rows(dv, acc_dv, offs_n, stride_dvn, cols_v, end_k, HEAD_DIM_V, WIDE)


@triton.jit
def dq_tiles(dq, q_tile, dout_tile, row_lse, delta, k_base, v_base, rng_state, begin, end, rows,
             cols, cols_v, first_seen, last_seen, keys_first, keys_end, seqlen_q, seqlen_k,
             stride_kn, stride_vn, head_batch, softmax_scale, softcap, slope, mask, keep_threshold,
             dropout_scale,
             HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
             MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
             HAS_ALIBI: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
             WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Walk over the tiles [begin, end) of keys and return the updated dq."""
    offs_n = tl.arange(0, BLOCK_N)
    for tile in range(begin, end):
        start_n = tile * BLOCK_N
        keys = start_n + offs_n
        k = load_rows(k_base, keys, stride_kn, cols, keys_end, HEAD_DIM, BLOCK_D, MASKED, WIDE)
        v = load_rows(v_base, keys, stride_vn, cols_v, keys_end, HEAD_DIM_V, BLOCK_DV, MASKED, WIDE)
        if MASKED and HAS_LEFT:
            before = (keys >= keys_first)[:, None]
            k = tl.where(before, k, 0.0)
            v = tl.where(before, v, 0.0)
        s = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        s, capped = transform_scores(s, rows[:, None], keys[None, :], seqlen_q, seqlen_k,
                                     softmax_scale, softcap, slope, mask, HAS_SOFTCAP,
                                     HAS_ALIBI, HAS_MASK, WIDE)  # fmt: skip
        p = tl.exp2(s - row_lse[:, None])
        if MASKED:
            seen = is_between(offs_n[None, :], (first_seen - start_n)[:, None],
                              (last_seen - start_n)[:, None], HAS_LEFT, True)  # fmt: skip
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(dout_tile, tl.trans(v), input_precision=PRECISION)
        if HAS_DROPOUT:
            keep = dropout_keep(
                rng_state, head_batch, rows, start_n, keep_threshold, BLOCK_M, BLOCK_N
            )
            dp = tl.where(keep, dp * dropout_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if HAS_SOFTCAP:
            ds = ds * (1.0 - capped * capped)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_METADATA)
def attention_dq(
    q, k, v, dout, lse_log2, softmax_d, dq,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_gb, stride_gm, stride_gh,
    stride_dqb, stride_dqm, stride_dqh, stride_db, stride_dh,
    cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state, stride_slope,
    batch_size, nheads, group, seqlen_q, seqlen_k, num_tiles,
    softmax_scale, softcap, window_left, window_right, keep_threshold, dropout_scale,
    # None, as are their strides and sizes, where they are not in use.
    chunk, seqused_q, seqused_k,
    attn_mask, stride_ab, stride_ah, stride_am, stride_an, mask_rows, mask_keys,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_VARLEN_Q: tl.constexpr, IS_VARLEN_K: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, WIDE: tl.constexpr, EIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries; see the module's docstring."""
    HAS_CHUNK: tl.constexpr = chunk is not None
    HAS_MASK: tl.constexpr = attn_mask is not None
    if EIGHTS:
        stride_qb, stride_qm, stride_qh = eights(stride_qb, stride_qm, stride_qh)
        stride_kb, stride_kn, stride_kh = eights(stride_kb, stride_kn, stride_kh)
        stride_vb, stride_vn, stride_vh = eights(stride_vb, stride_vn, stride_vh)
        stride_gb, stride_gm, stride_gh = eights(stride_gb, stride_gm, stride_gh)
        stride_dqb, stride_dqm, stride_dqh = eights(stride_dqb, stride_dqm, stride_dqh)
    # Locate the tile.
    b, h, tile, q_start, all_q = tile_of_program(
        tl.program_id(0), cu_seqlens_q, batch_size, nheads, seqlen_q, num_tiles,
        IS_VARLEN_Q, HAS_RIGHT, BLOCK_M,
    )  # fmt: skip
    start_m = tile * BLOCK_M
    if start_m >= all_q:
        return
    k_start = 0
    rows_k = seqlen_k
    if IS_VARLEN_K:
        k_start, rows_k = packed_range(cu_seqlens_k, b, batch_size, seqlen_k)
    rows_q = used_rows(seqused_q, b, batch_size, all_q, seqused_q is not None)
    rows_k = used_rows(seqused_k, b, batch_size, rows_k, seqused_k is not None)
    if seqused_q is not None:
        rows_k = tl.where(start_m < rows_q, rows_k, 0)
    b_index = clamp(b, 0, batch_size - 1)
    batch_q = int64(0) if IS_VARLEN_Q else int64(b)
    batch_k = int64(0) if IS_VARLEN_K else int64(b)

    # Load queries, output gradients and row statistics.
    offs_m = tl.arange(0, BLOCK_M)
    rows = start_m + offs_m
    cols = tl.arange(0, BLOCK_D)
    cols_v = tl.arange(0, BLOCK_DV)
    first_q = (q_start + start_m).to(tl.int64)
    head = h.to(tl.int64)
    head_k = (h // group).to(tl.int64)
    left_q = rows_q - start_m
    q += batch_q * stride_qb + head * stride_qh + first_q * stride_qm
    dout += batch_q * stride_gb + head * stride_gh + first_q * stride_gm
    q_tile = load_rows(q, offs_m, stride_qm, cols, left_q, HEAD_DIM, BLOCK_D, True, WIDE)
    dout_tile = load_rows(dout, offs_m, stride_gm, cols_v, left_q, HEAD_DIM_V, BLOCK_DV, True, WIDE)
    # Rows that belong to no sequence have no statistics and see no keys.
    counted = (rows < rows_q) & (b >= 0) & (b < batch_size)
    at = batch_q * stride_db + head * stride_dh + rows
    at += statistics_start(cu_seqlens_q, b_index, batch_size, seqlen_q, IS_VARLEN_Q)
    row_lse = tl.load(lse_log2 + at, mask=counted, other=float("inf"))
    delta = tl.load(softmax_d + at, mask=counted, other=0.0)
    row0 = int64(k_start)
    k_base = k + batch_k * stride_kb + head_k * stride_kh + row0 * stride_kn
    v_base = v + batch_k * stride_vb + head_k * stride_vh + row0 * stride_vn
    head_batch = b_index * nheads + h
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + b_index * stride_slope + h)
    mask = None
    if HAS_MASK:
        mask_base = attn_mask + int64(b_index) * stride_ab + head * stride_ah
        mask = (mask_base, stride_am, stride_an, mask_rows, mask_keys)

    # Walk over the keys.
    last_row = tl.minimum(start_m + BLOCK_M, rows_q) - 1
    any_first, any_end, all_first, all_end = key_bounds(
        start_m, last_row, rows_q, rows_k, window_left, window_right, chunk, HAS_LEFT, HAS_RIGHT,
        HAS_CHUNK,
    )  # fmt: skip
    a, b_loop, c, d = split_loop(any_first, any_end, all_first, all_end, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_seen, last_seen = seen_interval(
        rows, rows_q, rows_k, window_left, window_right, chunk, HAS_LEFT, HAS_RIGHT, HAS_CHUNK
    )
    if HAS_LEFT:
        acc = dq_tiles(
            acc, q_tile, dout_tile, row_lse, delta, k_base, v_base, rng_state, a, b_loop, rows,
            cols, cols_v, first_seen, last_seen, any_first, any_end, rows_q, rows_k, stride_kn,
            stride_vn, head_batch, softmax_scale, softcap, slope, mask, keep_threshold,
            dropout_scale, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True,
            HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI, HAS_MASK, HAS_DROPOUT, WIDE, PRECISION,
        )  # fmt: skip
    acc = dq_tiles(
        acc, q_tile, dout_tile, row_lse, delta, k_base, v_base, rng_state, b_loop, c, rows, cols,
        cols_v, first_seen, last_seen, any_first, any_end, rows_q, rows_k, stride_kn, stride_vn,
        head_batch, softmax_scale, softcap, slope, mask, keep_threshold, dropout_scale, HEAD_DIM,
        HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI,
        HAS_MASK, HAS_DROPOUT, WIDE, PRECISION,
    )  # fmt: skip
    acc = dq_tiles(
        acc, q_tile, dout_tile, row_lse, delta, k_base, v_base, rng_state, c, d, rows, cols,
        cols_v, first_seen, last_seen, any_first, any_end, rows_q, rows_k, stride_kn, stride_vn,
        head_batch, softmax_scale, softcap, slope, mask, keep_threshold, dropout_scale, HEAD_DIM,
        HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI,
        HAS_MASK, HAS_DROPOUT, WIDE, PRECISION,
    )  # fmt: skip

    # Scale and store.
    dq += batch_q * stride_dqb + head * stride_dqh + first_q * stride_dqm
    end_q = all_q - start_m
    store_rows(dq, acc * softmax_scale, offs_m, stride_dqm, cols, end_q, HEAD_DIM, WIDE)


@triton.jit
def tile_range(own_tile, rows, BLOCK: tl.constexpr, BROADCAST: tl.constexpr):
    """Tiles [begin, end) of ``rows`` that share a tile of the mask: its own, or all of them."""
    count = tl.cdiv(rows, BLOCK)
    if BROADCAST:
        begin = count * 0
        end = count
    else:
        begin = own_tile
        end = tl.minimum(own_tile + 1, count)
    return begin, end


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_METADATA)
def attention_dmask(
    q, k, v, dout, lse_log2, softmax_d, dmask,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_gb, stride_gm, stride_gh,
    stride_db, stride_dh, stride_dab, stride_dah, stride_dam, stride_dan,
    cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state, stride_slope,
    batch_size, nheads, group, seqlen_q, seqlen_k, mask_batch, mask_heads, tiles_m, tiles_n,
    softmax_scale, softcap, window_left, window_right, keep_threshold, dropout_scale,
    # None where they are not in use.
    chunk, seqused_q, seqused_k,
    attn_mask, stride_ab, stride_ah, stride_am, stride_an, mask_rows, mask_keys,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr,  # the mask has one row, or key, for all
    IS_VARLEN_Q: tl.constexpr, IS_VARLEN_K: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, WIDE: tl.constexpr, EIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of the mask's own elements; see the module's docstring."""
    HAS_CHUNK: tl.constexpr = chunk is not None
    if EIGHTS:
        stride_qb, stride_qm, stride_qh = eights(stride_qb, stride_qm, stride_qh)
        stride_kb, stride_kn, stride_kh = eights(stride_kb, stride_kn, stride_kh)
        stride_vb, stride_vn, stride_vh = eights(stride_vb, stride_vn, stride_vh)
        stride_gb, stride_gm, stride_gh = eights(stride_gb, stride_gm, stride_gh)
    # Locate the tile.
    pid = tl.program_id(0)
    own_n = pid % tiles_n
    own_m = (pid // tiles_n) % tiles_m
    own_h = (pid // tiles_n // tiles_m) % mask_heads
    own_b = pid // tiles_n // tiles_m // mask_heads
    each_h = nheads // mask_heads
    each_b = batch_size // mask_batch
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    cols_v = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    # Walk over the sequences and heads that share it, and over their tiles.
    for shared in range(each_b * each_h):
        b = own_b * each_b + shared // each_h
        h = own_h * each_h + shared % each_h
        q_start = 0
        rows_q = seqlen_q
        k_start = 0
        rows_k = seqlen_k
        if IS_VARLEN_Q:
            q_start, rows_q = packed_range(cu_seqlens_q, b, batch_size, seqlen_q)
        if IS_VARLEN_K:
            k_start, rows_k = packed_range(cu_seqlens_k, b, batch_size, seqlen_k)
        rows_q = used_rows(seqused_q, b, batch_size, rows_q, seqused_q is not None)
        rows_k = used_rows(seqused_k, b, batch_size, rows_k, seqused_k is not None)
        batch_q = int64(0) if IS_VARLEN_Q else int64(b)
        batch_k = int64(0) if IS_VARLEN_K else int64(b)
        head = int64(h)
        head_k = int64(h // group)
        q_base = q + batch_q * stride_qb + head * stride_qh + int64(q_start) * stride_qm
        dout_base = dout + batch_q * stride_gb + head * stride_gh + int64(q_start) * stride_gm
        k_base = k + batch_k * stride_kb + head_k * stride_kh + int64(k_start) * stride_kn
        v_base = v + batch_k * stride_vb + head_k * stride_vh + int64(k_start) * stride_vn
        at = batch_q * stride_db + head * stride_dh
        at += statistics_start(cu_seqlens_q, b, batch_size, seqlen_q, IS_VARLEN_Q)
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(alibi_slopes + b * stride_slope + h)
        mask_base = attn_mask + int64(b) * stride_ab + head * stride_ah
        mask = (mask_base, stride_am, stride_an, mask_rows, mask_keys)
        first_m, end_m = tile_range(own_m, rows_q, BLOCK_M, ONE_ROW)
        for tile_m in range(first_m, end_m):
            rows = tile_m * BLOCK_M + offs_m
            q_tile = load_rows(q_base, rows, stride_qm, cols, rows_q, HEAD_DIM, BLOCK_D, True, WIDE)
            dout_tile = load_rows(dout_base, rows, stride_gm, cols_v, rows_q, HEAD_DIM_V, BLOCK_DV,
                                  True, WIDE)  # fmt: skip
            counted = rows < rows_q
            row_lse = tl.load(lse_log2 + at + rows, mask=counted, other=float("inf"))
            delta = tl.load(softmax_d + at + rows, mask=counted, other=0.0)
            last_row = tl.minimum(tile_m * BLOCK_M + BLOCK_M, rows_q) - 1
            any_first, any_end, _first, _end = key_bounds(
                tile_m * BLOCK_M, last_row, rows_q, rows_k, window_left, window_right, chunk,
                HAS_LEFT, HAS_RIGHT, HAS_CHUNK,
            )  # fmt: skip
            first_seen, last_seen = seen_interval(
                rows, rows_q, rows_k, window_left, window_right, chunk, HAS_LEFT, HAS_RIGHT,
                HAS_CHUNK,
            )  # fmt: skip
            first_n, end_n = tile_range(own_n, rows_k, BLOCK_N, ONE_KEY)
            first_n = tl.maximum(first_n, any_first // BLOCK_N)
            end_n = tl.minimum(end_n, tl.cdiv(tl.maximum(any_end, 0), BLOCK_N))
            for tile_n in range(first_n, end_n):
                keys = tile_n * BLOCK_N + offs_n
                k_tile = load_rows(k_base, keys, stride_kn, cols, rows_k, HEAD_DIM, BLOCK_D, True,
                                   WIDE)  # fmt: skip
                v_tile = load_rows(v_base, keys, stride_vn, cols_v, rows_k, HEAD_DIM_V, BLOCK_DV,
                                   True, WIDE)  # fmt: skip
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                s, _capped = transform_scores(s, rows[:, None], keys[None, :], rows_q, rows_k,
                                        softmax_scale, softcap, slope, mask, HAS_SOFTCAP,
                                        HAS_ALIBI, True, WIDE)  # fmt: skip
                p = tl.exp2(s - row_lse[:, None])
                dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
                if HAS_DROPOUT:
                    keep = dropout_keep(rng_state, b * nheads + h, rows, tile_n * BLOCK_N,
                                        keep_threshold, BLOCK_M, BLOCK_N)  # fmt: skip
                    dp = tl.where(keep, dp * dropout_scale, 0.0)
                seen = is_between(keys[None, :], first_seen[:, None], last_seen[:, None], True,
                                  True)  # fmt: skip
                acc += tl.where(seen, p * (dp - delta[:, None]), 0.0)

    # Sum over what is broadcast, and store.
    dmask += int64(own_b) * stride_dab + int64(own_h) * stride_dah
    rows = own_m * BLOCK_M + offs_m
    keys = own_n * BLOCK_N + offs_n
    row_offsets = rows.to(tl.int64) * stride_dam
    key_offsets = keys.to(tl.int64) * stride_dan
    dtype = dmask.dtype.element_ty
    if ONE_ROW and ONE_KEY:
        tl.store(dmask, tl.sum(acc).to(dtype))
    elif ONE_ROW:
        tl.store(dmask + key_offsets, tl.sum(acc, 0).to(dtype), mask=keys < mask_keys)
    elif ONE_KEY:
        tl.store(dmask + row_offsets, tl.sum(acc, 1).to(dtype), mask=rows < mask_rows)
    else:
        inside = (rows < mask_rows)[:, None] & (keys < mask_keys)[None, :]
        pointers = dmask + row_offsets[:, None] + key_offsets[None, :]
        tl.store(pointers, acc.to(dtype), mask=inside)
