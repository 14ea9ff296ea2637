"""Writing new keys and values into a KV cache, plain or paged.

One program copies one tile of new rows of one key head. Row t of sequence b goes to cache row
``at[b] + t``; rows outside the cache, and pages, cache rows or rows of the page table that do not
exist, are not written. New rows are dense or packed one sequence after another.
"""

import triton
import triton.language as tl

from .common import clamp, eights, tile_of_program

_LENGTHS = ("batch_size", "nheads_k", "seqlen_new", "capacity", "page_size", "num_pages",
            "table_rows", "num_tiles", "stride_table")  # fmt: skip
_METADATA = ("at", "cu_seqlens_new", "page_table", "cache_batch_idx")


@triton.jit
def copy_rows(source, target, source_rows, target_offsets, stride_source, inside,
              HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Copy the rows that are ``inside``, HEAD_DIM entries of each."""
    cols = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (cols < HEAD_DIM)[None, :]
    rows = source_rows.to(tl.int64)[:, None] * stride_source
    tile = tl.load(source + rows + cols[None, :], mask=mask, other=0)
    tl.store(target + target_offsets[:, None] + cols[None, :], tile, mask=mask)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_METADATA)
def append_kv(
    k_new, v_new, k_cache, v_cache, at, cu_seqlens_new, page_table, cache_batch_idx,
    stride_knb, stride_knm, stride_knh, stride_vnb, stride_vnm, stride_vnh,
    stride_kcb, stride_kcn, stride_kch,  # stride_kcb is a page's with IS_PAGED
    stride_vcb, stride_vcn, stride_vch, stride_table,
    batch_size, nheads_k, seqlen_new, capacity, page_size, num_pages, table_rows, num_tiles,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    IS_VARLEN: tl.constexpr, IS_PAGED: tl.constexpr, HAS_BATCH_IDX: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    """See the module's docstring. ``seqlen_new`` counts all packed rows with IS_VARLEN."""
    if EIGHTS:
        stride_knb, stride_knm, stride_knh = eights(stride_knb, stride_knm, stride_knh)
        stride_vnb, stride_vnm, stride_vnh = eights(stride_vnb, stride_vnm, stride_vnh)
        stride_kcb, stride_kcn, stride_kch = eights(stride_kcb, stride_kcn, stride_kch)
        stride_vcb, stride_vcn, stride_vch = eights(stride_vcb, stride_vcn, stride_vch)
    sequence, h, tile, start, rows = tile_of_program(
        tl.program_id(0), cu_seqlens_new, batch_size, nheads_k, seqlen_new, num_tiles,
        IS_VARLEN, False, BLOCK_M,
    )  # fmt: skip
    exists = (sequence >= 0) & (sequence < batch_size)
    b = clamp(sequence, 0, batch_size - 1).to(tl.int64)
    h = h.to(tl.int64)
    own_rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    new_rows = start + own_rows
    # 64 bits: a hostile start near the largest int32 must not wrap around.
    cache_rows = tl.load(at + b).to(tl.int64) + own_rows
    inside = exists & (own_rows < rows) & (cache_rows >= 0) & (cache_rows < capacity)
    row = b
    if HAS_BATCH_IDX:
        row = tl.load(cache_batch_idx + b).to(tl.int64)
    if IS_PAGED:
        inside = inside & (row >= 0) & (row < table_rows)
        entry = page_table + row * stride_table + cache_rows // page_size
        page = tl.load(entry, mask=inside, other=-1).to(tl.int64)
        place = cache_rows % page_size
    else:
        page = row
        place = cache_rows
    inside = inside & (page >= 0) & (page < num_pages)
    if not IS_VARLEN:
        k_new += b * stride_knb
        v_new += b * stride_vnb
    copy_rows(k_new + h * stride_knh, k_cache, new_rows,
              page * stride_kcb + h * stride_kch + place * stride_kcn, stride_knm, inside,
              HEAD_DIM, BLOCK_D)  # fmt: skip
    copy_rows(v_new + h * stride_vnh, v_cache, new_rows,
              page * stride_vcb + h * stride_vch + place * stride_vcn, stride_vnm, inside,
              HEAD_DIM_V, BLOCK_DV)  # fmt: skip
