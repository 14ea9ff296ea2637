"""S_dmask, the testing aid of ``return_attn_probs``: exp(score - row maximum), negative if dropped.

One program computes one tile of rows of one head in two walks over the keys: the first finds the
row maxima, the second recomputes the scores and stores. It shares tiles, masks, scores and random
bits with kernels/forward.py and makes no claim to speed. The target is filled with 0 beforehand.
"""

import triton
import triton.language as tl

from .common import (
    dropout_keep,
    int64,
    is_between,
    key_range,
    load_rows,
    seen_interval,
    tile_of_program,
    transform_scores,
    used_rows,
)


@triton.jit
def masked_scores(q_tile, qv_tile, k_base, v_base, stride_kn, stride_vn, rows, keys, cols, cols_v,
                  seqlen_q, seqlen_k, softmax_scale, softcap, slope, mask, window_left,
                  window_right, chunk,
                  HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
                  HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores in base 2 of a tile, -inf where unseen."""
    k = load_rows(k_base, keys, stride_kn, cols, seqlen_k, HEAD_DIM, BLOCK_D, True, True)
    s = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION)
    if qv_tile is not None:
        v = load_rows(v_base, keys, stride_vn, cols_v, seqlen_k, HEAD_DIM_V, BLOCK_DV, True, True)
        s = tl.dot(qv_tile, tl.trans(v), s, input_precision=PRECISION)
    s, _ = transform_scores(s, rows[:, None], keys[None, :], seqlen_q, seqlen_k, softmax_scale,
                            softcap, slope, mask, False, HAS_ALIBI, mask is not None,
                            True)  # fmt: skip
    first, last = seen_interval(rows, seqlen_q, seqlen_k, window_left, window_right, chunk,
                                HAS_LEFT, HAS_RIGHT, chunk is not None)  # fmt: skip
    seen = is_between(keys[None, :], first[:, None], last[:, None], True, True)
    seen = seen & (rows < seqlen_q)[:, None]
    return tl.where(seen, s, float("-inf")), seen


@triton.jit
def softmax_debug(
    q, k, s_dmask,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_sb, stride_sh, stride_sm, target_rows, target_keys,
    cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state, stride_slope,
    batch_size, nheads, group, seqlen_q, seqlen_k, num_tiles,
    softmax_scale, softcap, window_left, window_right, keep_threshold,
    # None, as are their strides and sizes, where they are not in use.
    chunk, seqused_q, seqused_k,
    v, stride_vb, stride_vn, stride_vh, qv, stride_wb, stride_wm, stride_wh,
    attn_mask, stride_ab, stride_ah, stride_am, stride_an, mask_rows, mask_keys,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_VARLEN_Q: tl.constexpr, IS_VARLEN_K: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module's docstring."""
    b, h, tile, q_start, rows_q = tile_of_program(
        tl.program_id(0), cu_seqlens_q, batch_size, nheads, seqlen_q, num_tiles,
        IS_VARLEN_Q, False, BLOCK_M,
    )  # fmt: skip
    rows_q = used_rows(seqused_q, b, batch_size, rows_q, seqused_q is not None)
    if (tile * BLOCK_M >= rows_q) | (b < 0) | (b >= batch_size):
        return
    k_start, rows_k = key_range(b, cu_seqlens_k, seqused_k, None, batch_size, seqlen_k,
                                IS_VARLEN_K, False, seqused_k is not None, False)  # fmt: skip
    batch = b.to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    cols_v = tl.arange(0, BLOCK_DV)
    offs_n = tl.arange(0, BLOCK_N)
    head = h.to(tl.int64)
    head_k = (h // group).to(tl.int64)
    row0 = int64(q_start)
    key0 = int64(k_start)
    q_base = q + head * stride_qh + row0 * stride_qm
    k_base = k + head_k * stride_kh + key0 * stride_kn
    if not IS_VARLEN_Q:
        q_base += batch * stride_qb
    if not IS_VARLEN_K:
        k_base += batch * stride_kb
    q_tile = load_rows(q_base, rows, stride_qm, cols, rows_q, HEAD_DIM, BLOCK_D, True, True)
    v_base = None
    qv_tile = None
    if qv is not None:
        v_base = v + head_k * stride_vh + key0 * stride_vn
        qv_base = qv + head * stride_wh + row0 * stride_wm
        if not IS_VARLEN_K:
            v_base += batch * stride_vb
        if not IS_VARLEN_Q:
            qv_base += batch * stride_wb
        qv_tile = load_rows(qv_base, rows, stride_wm, cols_v, rows_q, HEAD_DIM_V, BLOCK_DV, True,
                            True)  # fmt: skip
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + b * stride_slope + h)
    mask = None
    if attn_mask is not None:
        mask_base = attn_mask + batch * stride_ab + head * stride_ah
        mask = (mask_base, stride_am, stride_an, mask_rows, mask_keys)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start_n in range(0, rows_k, BLOCK_N):
        s, _ = masked_scores(q_tile, qv_tile, k_base, v_base, stride_kn, stride_vn, rows,
                             start_n + offs_n, cols, cols_v, rows_q, rows_k, softmax_scale,
                             softcap, slope, mask, window_left, window_right, chunk, HEAD_DIM,
                             HEAD_DIM_V, BLOCK_D, BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_ALIBI,
                             PRECISION)  # fmt: skip
        m_i = tl.maximum(m_i, tl.max(s, 1))
    shift = tl.where(m_i == float("-inf"), 0.0, m_i)
    target = s_dmask + batch * stride_sb + head * stride_sh + rows.to(tl.int64)[:, None] * stride_sm
    for start_n in range(0, rows_k, BLOCK_N):
        keys = start_n + offs_n
        s, seen = masked_scores(q_tile, qv_tile, k_base, v_base, stride_kn, stride_vn, rows, keys,
                                cols, cols_v, rows_q, rows_k, softmax_scale, softcap, slope, mask,
                                window_left, window_right, chunk, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
                                BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_ALIBI, PRECISION)  # fmt: skip
        keep = dropout_keep(rng_state, b * nheads + h, rows, start_n, keep_threshold, BLOCK_M,
                            BLOCK_N)  # fmt: skip
        p = tl.exp2(s - shift[:, None])
        inside = seen & (rows < target_rows)[:, None] & (keys < target_keys)[None, :]
        tl.store(target + keys[None, :], tl.where(keep, p, -p).to(s_dmask.dtype.element_ty),
                 mask=inside)  # fmt: skip
