"""The parameters of a standalone call and the codes that it may answer with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class DataType(IntEnum):
    """Type of the elements of q, k and v."""

    FP16 = 0
    BF16 = 1
    FP8_E4M3 = 2
    FP8_E5M2 = 3


class AttentionMode(IntEnum):
    """What a call is for. Advice alone: results never depend on it."""

    PREFILL = 0
    DECODE = 1
    VARLEN_PREFILL = 2
    VARLEN_DECODE = 3


@dataclass
class FlashAttentionParams:
    """Everything that describes one call; a mutable record that is checked when it is used.

    Memory is a tensor, an object with ``__cuda_array_interface__`` or the address of GPU memory as
    an integer (PyTorch needs NumPy for these two); None and 0 are null. Tensors may be strided
    where the last dimension lies together; addresses are of row-major memory without gaps. Sizes
    that are 0 are taken from the tensors. "(not strict)" marks what ``strict=True`` refuses.

    Attributes:
        q: (batch_size, seqlen_q, num_heads, head_dim), or (total_q, num_heads, head_dim) with
            cu_seqlens. Not strict: heads may be two dimensions, (num_heads_k, num_heads //
            num_heads_k), the PackGQA view.
        k: (batch_size, seqlen_k, num_heads_k, head_dim), or (total_k, num_heads_k, head_dim) with
            cu_seqlens, or (num_pages, page_size, num_heads_k, head_dim) with page_table.
        v: like k.
        out: like q, written in place: float16 for FP16, bfloat16 for BF16, bfloat16 or float16 for
            FP8 (an address is bfloat16).
        softmax_lse: (batch_size, num_heads, seqlen_q), or (num_heads, total_q) with cu_seqlens,
            float32, written in place if given: natural log-sum-exp of the scores, -inf for rows
            that see no key (their out is 0).
        batch_size: number of sequences.
        seqlen_q: queries of a sequence; ignored with cu_seqlens.
        seqlen_k: keys of a sequence; ignored with cu_seqlens. With page_table: the keys that a
            sequence has, or has room for where seqused_k is given.
        num_heads: heads of q, a multiple of num_heads_k.
        num_heads_k: heads of k and v.
        head_dim: 64, 96, 128, 192 or 256 (FP8: up to 128). Not strict: 1 to 256.
        cu_seqlens_q: (batch_size + 1,) int32 bounds of packed sequences; both or none.
        cu_seqlens_k: likewise for the keys.
        total_q: rows of packed q.
        total_k: rows of packed k. With page_table or kv_batch_idx: all rows of the cache, where k
            is an address.
        max_seqlen_q: bound on the lengths of packed sequences, 0 if unknown. A hint.
        max_seqlen_k: likewise for the keys.
        seqused_q: (batch_size,) int32 queries in use; later rows of out become 0.
        seqused_k: (batch_size,) int32 end of the keys in use, left padding included; with k_new
            before appending.
        leftpad_k: (batch_size,) int32 first key in use (not strict).
        q_descale_ptr: float32, FP8 queries stand for ``q * descale``; null is 1. The factor of
            sequence b and KV head h is element ``b * batch_stride + h * head_stride``. If the
            strides are (num_heads, 1), h is the query head.
        k_descale_ptr: likewise, by KV head.
        v_descale_ptr: likewise, by KV head.
        is_causal: a query sees keys up to its own position; ends of sequences are aligned.
        window_size_left: keys that a query sees before its position, -1 for all. Together with
            is_causal: not strict.
        window_size_right: keys after it, likewise.
        attn_mask: (1 or batch_size, 1 or num_heads, 1 or seqlen_q, 1 or seqlen_k), bool (True: may
            be seen) or floating (added to the scores); no address (not strict).
        softmax_scale: factor of the scores; 0 is ``head_dim ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off (not strict).
        dtype: type of q, k and v. BF16: not strict.
        pack_gqa: work on query heads that share keys together (not strict). A hint.
        page_table: (batch_size, max_pages) int32; with kv_batch_idx any number of rows (then no
            address) (not strict).
        page_size: rows of a page.
        kv_batch_idx: (batch_size,) int32 row of k and v, or of page_table, that each sequence uses
            (not strict).
        k_new: (batch_size, seqlen_knew, num_heads_k, head_dim), written into k from row seqused_k
            on and attended to (not strict). Rows that do not fit are dropped. Needs seqused_k,
            which is not updated; packed queries on pages may leave it to cu_seqlens_k.
        v_new: like k_new.
        seqlen_knew: rows of k_new.
        rotary_cos: (at least seqlen_k, rotary_dim / 2) in q's type, beside FP8 any of 16 or 32 bits
            (an address is bfloat16) (not strict). Turns k_new at
            ``seqused_k + t`` and q at ``seqused_k + i`` if causal or windowed, else all of q at
            ``seqused_k``. Needs k_new.
        rotary_sin: like rotary_cos.
        rotary_dim: entries of a head that are turned, a multiple of 16.
        is_rotary_interleaved: pairs are neighbours instead of the two halves.
        p_dropout: probability of dropping an attention weight (not strict).
        rng_state: (2,) int64 or uint64, filled with the seed and offset of the dropout mask.
        num_splits: into how many parts the keys are divided, at most 256; 0 or less chooses. Other
            than 1: not strict.
        out_accum: scratch memory of the original's splits. Ours allocate their own and leave it
            as it is.
        softmax_lse_accum: likewise.
        mode: advice, see :class:`AttentionMode`.
    """

    q: Any = None
    k: Any = None
    v: Any = None
    out: Any = None
    softmax_lse: Any = None
    batch_size: int = 0
    seqlen_q: int = 0
    seqlen_k: int = 0
    num_heads: int = 0
    num_heads_k: int = 0
    head_dim: int = 0
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    total_q: int = 0
    total_k: int = 0
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    seqused_q: Any = None
    seqused_k: Any = None
    leftpad_k: Any = None
    q_descale_ptr: Any = None
    k_descale_ptr: Any = None
    v_descale_ptr: Any = None
    q_descale_batch_stride: int = 0
    q_descale_head_stride: int = 0
    k_descale_batch_stride: int = 0
    k_descale_head_stride: int = 0
    v_descale_batch_stride: int = 0
    v_descale_head_stride: int = 0
    is_causal: bool = False
    window_size_left: int = -1
    window_size_right: int = -1
    attn_mask: Any = None
    softmax_scale: float = 0.0
    softcap: float = 0.0
    dtype: DataType = DataType.FP16
    pack_gqa: bool = False
    page_table: Any = None
    page_size: int = 0
    kv_batch_idx: Any = None
    k_new: Any = None
    v_new: Any = None
    seqlen_knew: int = 0
    rotary_cos: Any = None
    rotary_sin: Any = None
    rotary_dim: int = 0
    is_rotary_interleaved: bool = False
    p_dropout: float = 0.0
    rng_state: Any = None
    num_splits: int = 1
    out_accum: Any = None
    softmax_lse_accum: Any = None
    mode: AttentionMode = AttentionMode.PREFILL


ERROR_STRINGS = {
    0: "Success",
    -1: "Null pointer: q, k, v or out is missing",
    -2: "Unsupported head_dim",
    -3: "FP8 head_dim constraint: 64, 96 or 128",
    -4: "num_heads_k exceeds num_heads",
    -5: "num_heads must be divisible by num_heads_k",
    -6: "Varlen cu_seqlens mismatch: give both cu_seqlens_q and cu_seqlens_k or neither",
    -7: "Varlen needs total_q and total_k",
    -8: "Invalid dimension, stride or value",
    -9: "Invalid sequence lengths or descale",
    -10: "PackGQA not supported",
    -11: "Softcap not supported",
    -12: "Dropout not supported",
    -13: "Split-KV not supported",
    -14: "Paged KV cache not supported",
    -15: "Rotary embeddings not supported",
    -16: "Causal and local are mutually exclusive",
    -17: "Custom mask not supported",
    -18: "Left padding not supported",
    -19: "Appending KV not supported",
    -20: "BF16 not supported",
    -21: "FP8 E5M2 not supported",
    -22: "Unsupported data type",
    -23: "Requires SM90, a Hopper GPU",
    -24: "Data type or device mismatch",
    -100: "CUDA runtime error, or the launch failed",
}


class Refused(Exception):
    """A call ends with ``code``, and the message says why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
