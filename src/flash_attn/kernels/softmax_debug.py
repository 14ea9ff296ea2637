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
    load_rows,
    packed_range,
    seen_interval,
    tile_of_program,
    transform_scores,
)


@triton.jit
def masked_scores(q_tile, k_base, start_n, stride_kn, rows, keys, cols, seqlen_q, seqlen_k,
                  softmax_scale, softcap, slope, window_left, window_right,
                  HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                  HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_ALIBI: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Scores in base 2 of a tile, -inf where unseen."""
    k = load_rows(k_base, keys, stride_kn, cols, seqlen_k, HEAD_DIM, BLOCK_D, True, True)
    s = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION)
    s, _ = transform_scores(s, rows[:, None], keys[None, :], seqlen_q, seqlen_k, softmax_scale,
                            softcap, slope, False, HAS_ALIBI)  # fmt: skip
    first, last = seen_interval(rows, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT,
                                HAS_RIGHT)  # fmt: skip
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
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module's docstring."""
    b, h, tile, q_start, rows_q = tile_of_program(
        tl.program_id(0), cu_seqlens_q, batch_size, nheads, seqlen_q, num_tiles,
        IS_VARLEN, False, BLOCK_M,
    )  # fmt: skip
    if (tile * BLOCK_M >= rows_q) | (b < 0) | (b >= batch_size):
        return
    k_start = 0
    rows_k = seqlen_k
    if IS_VARLEN:
        k_start, rows_k = packed_range(cu_seqlens_k, b, batch_size, seqlen_k)
    batch = b.to(tl.int64)
    in_tensor = int64(0) if IS_VARLEN else batch
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    head = h.to(tl.int64)
    row0 = int64(q_start)
    key0 = int64(k_start)
    q_base = q + in_tensor * stride_qb + head * stride_qh + row0 * stride_qm
    k_base = k + in_tensor * stride_kb + (h // group).to(tl.int64) * stride_kh + key0 * stride_kn
    q_tile = load_rows(q_base, rows, stride_qm, cols, rows_q, HEAD_DIM, BLOCK_D, True, True)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + b * stride_slope + h)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start_n in range(0, rows_k, BLOCK_N):
        s, _ = masked_scores(q_tile, k_base, start_n, stride_kn, rows, start_n + offs_n, cols,
                             rows_q, rows_k, softmax_scale, softcap, slope, window_left,
                             window_right, HEAD_DIM, BLOCK_N, BLOCK_D, HAS_LEFT, HAS_RIGHT,
                             HAS_ALIBI, PRECISION)  # fmt: skip
        m_i = tl.maximum(m_i, tl.max(s, 1))
    shift = tl.where(m_i == float("-inf"), 0.0, m_i)
    target = s_dmask + batch * stride_sb + head * stride_sh + rows.to(tl.int64)[:, None] * stride_sm
    for start_n in range(0, rows_k, BLOCK_N):
        keys = start_n + offs_n
        s, seen = masked_scores(q_tile, k_base, start_n, stride_kn, rows, keys, cols, rows_q,
                                rows_k, softmax_scale, softcap, slope, window_left, window_right,
                                HEAD_DIM, BLOCK_N, BLOCK_D, HAS_LEFT, HAS_RIGHT, HAS_ALIBI,
                                PRECISION)  # fmt: skip
        keep = dropout_keep(rng_state, b * nheads + h, rows, start_n, keep_threshold, BLOCK_M,
                            BLOCK_N)  # fmt: skip
        p = tl.exp2(s - shift[:, None])
        inside = seen & (rows < target_rows)[:, None] & (keys < target_keys)[None, :]
        tl.store(target + keys[None, :], tl.where(keep, p, -p).to(s_dmask.dtype.element_ty),
                 mask=inside)  # fmt: skip
