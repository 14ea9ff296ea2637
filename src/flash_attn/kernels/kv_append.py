"""Writing new keys and values into a KV cache, plain or paged.

One program copies one tile of new rows of one key head. Row t of sequence b goes to cache row
``at[b] + t``; rows outside the cache, and pages or cache rows that do not exist, are not written.
"""

import triton
import triton.language as tl

_LENGTHS = ("batch_size", "nheads_k", "seqlen_new", "capacity", "page_size", "num_pages",
            "num_tiles", "stride_table")  # fmt: skip
_METADATA = ("at", "page_table", "cache_batch_idx")


@triton.jit
def copy_rows(source, target, source_rows, target_offsets, stride_source, cols, mask):
    """Copy (rows, BLOCK_D) where ``mask`` allows."""
    rows = source_rows.to(tl.int64)[:, None] * stride_source
    tile = tl.load(source + rows + cols[None, :], mask=mask, other=0.0)
    tl.store(target + target_offsets[:, None] + cols[None, :], tile, mask=mask)


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_METADATA)
def append_kv(
    k_new, v_new, k_cache, v_cache, at, page_table, cache_batch_idx,
    stride_knb, stride_knm, stride_knh, stride_vnb, stride_vnm, stride_vnh,
    stride_kcb, stride_kcn, stride_kch,  # stride_kcb is a page's with IS_PAGED
    stride_vcb, stride_vcn, stride_vch, stride_table,
    nheads_k, seqlen_new, capacity, page_size, num_pages, num_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_PAGED: tl.constexpr, HAS_BATCH_IDX: tl.constexpr,
):  # fmt: skip
    """See the module's docstring."""
    pid = tl.program_id(0)
    start = (pid % num_tiles) * BLOCK_M
    h = ((pid // num_tiles) % nheads_k).to(tl.int64)
    b = ((pid // num_tiles) // nheads_k).to(tl.int64)
    new_rows = start + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    # 64 bits: a hostile start near the largest int32 must not wrap around.
    cache_rows = tl.load(at + b).to(tl.int64) + new_rows
    inside = (new_rows < seqlen_new) & (cache_rows >= 0) & (cache_rows < capacity)
    if IS_PAGED:
        entry = page_table + b * stride_table + cache_rows // page_size
        page = tl.load(entry, mask=inside, other=-1).to(tl.int64)
        inside = inside & (page >= 0) & (page < num_pages)
        row = cache_rows % page_size
    else:
        page = b
        if HAS_BATCH_IDX:
            page = tl.load(cache_batch_idx + b).to(tl.int64)
        inside = inside & (page >= 0) & (page < num_pages)
        row = cache_rows
    mask = inside[:, None] & (cols < HEAD_DIM)[None, :]
    copy_rows(k_new + b * stride_knb + h * stride_knh, k_cache, new_rows,
              page * stride_kcb + h * stride_kch + row * stride_kcn, stride_knm, cols,
              mask)  # fmt: skip
    copy_rows(v_new + b * stride_vnb + h * stride_vnh, v_cache, new_rows,
              page * stride_vcb + h * stride_vch + row * stride_vcn, stride_vnm, cols,
              mask)  # fmt: skip
