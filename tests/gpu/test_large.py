"""Tensors beyond 2^31 elements and batches beyond 65535: offsets and grids run out of bits."""

from __future__ import annotations

import pytest
import support
import torch

from flash_attn import flash_attn_with_kvcache

pytestmark = pytest.mark.gpu


def needs_free_memory(gigabytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, found {free / 2**30:.1f}")


def test_more_than_2_to_31_packed_elements() -> None:
    needs_free_memory(40)
    count, length = 2**17 + 9, 128
    x = torch.empty(count * length, 1, 128, dtype=torch.bfloat16, device="cuda").normal_()
    bounds = torch.arange(count + 1, dtype=torch.int32, device="cuda") * length
    inputs = support.Inputs(x, x, x, x, {"causal": True}, (bounds, bounds, length, length))
    whole = support.run(inputs)
    for first in (0, 2**17 - 1, count - 2):
        rows = slice(first * length, (first + 2) * length)
        part = x[rows].clone().view(2, length, 1, 128)
        picked = support.Solution(
            whole.out[rows].view_as(part),
            whole.lse[:, rows].view(1, 2, length).transpose(0, 1),
            *(grad[rows].view_as(part) for grad in (whole.dq, whole.dk, whole.dv)),
        )
        support.check(support.Inputs(part, part, part, part, {"causal": True}), picked)


@pytest.mark.parametrize("page_size", [None, 256])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_more_than_2_to_31_elements_in_a_cache(page_size: int | None, num_splits: int) -> None:
    """The last rows of a large cache serve and are written like those of a small one."""
    needs_free_memory(40)
    rows, length, headdim = 2**16 + 9, 256, 128
    caches = [
        torch.empty(rows, length, 1, headdim, dtype=torch.bfloat16, device="cuda").normal_()
        for _ in "kv"
    ]
    chosen = torch.tensor([rows - 1, 0, 2**16 - 1], dtype=torch.int32, device="cuda")
    small = [cache[chosen.long()].clone() for cache in caches]
    q = torch.randn(3, 1, 4, headdim, dtype=torch.bfloat16, device="cuda")
    new = torch.randn(3, 1, 1, headdim, dtype=torch.bfloat16, device="cuda")
    lengths = torch.tensor([200, 255, 17], dtype=torch.int32, device="cuda")
    places = {"cache_batch_idx": chosen} if page_size is None else {"block_table": chosen[:, None]}
    own = torch.arange(3, dtype=torch.int32, device="cuda")
    own_places = {"cache_batch_idx": own} if page_size is None else {"block_table": own[:, None]}
    options = {"cache_seqlens": lengths, "num_splits": num_splits, "causal": True}
    got = flash_attn_with_kvcache(q, *caches, new, new, **places, **options)
    want = flash_attn_with_kvcache(q, *small, new, new, **own_places, **options)
    assert torch.equal(got, want)
    for cache, few in zip(caches, small, strict=True):
        assert torch.equal(cache[chosen.long()], few)


@pytest.mark.parametrize("batch", [65535, 65536, 80000, 131072])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_large_batches_of_caches(batch: int, num_splits: int) -> None:
    q = torch.randn(batch, 1, 2, 16, dtype=torch.float16, device="cuda")
    k, v = torch.randn(2, 7, 40, 1, 16, dtype=torch.float16, device="cuda")
    rows = (torch.arange(batch, device="cuda") % 7).int()
    lengths = (torch.arange(batch, device="cuda") % 41).int()
    out, lse = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, cache_batch_idx=rows, num_splits=num_splits,
        return_softmax_lse=True,
    )  # fmt: skip
    s = torch.einsum("bhd,bkd->bhk", q[:, 0].double(), k[rows.long(), :, 0].double()) / 4.0
    hidden = torch.arange(40, device="cuda") >= lengths[:, None, None]
    s = s.masked_fill(hidden, float("-inf"))
    p = torch.softmax(s, -1).nan_to_num()
    want = torch.einsum("bhk,bkd->bhd", p, v[rows.long(), :, 0].double())
    torch.testing.assert_close(out[:, 0].double(), want, atol=2e-3, rtol=2e-3)
    empty = lengths == 0
    assert (lse[empty] == float("inf")).all()
    true = torch.logsumexp(s, -1)[~empty]
    torch.testing.assert_close(lse[~empty, :, 0].double(), true, atol=1e-5, rtol=1e-5)
