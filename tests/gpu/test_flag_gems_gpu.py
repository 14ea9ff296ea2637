"""The FlagGems adapter with the library itself: everything that it does not refuse, in the budget.

The library pins versions of what it imports; beside others it is installed with
``pip install --no-deps flag-gems sqlalchemy PyYAML packaging``.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import support
import torch
from support import HALF_DTYPES
from test_kvcache import check as check_cache
from test_kvcache import make_call
from test_paged import check_packed, packed_call

import flash_attn
from flash_attn.core import registry
from flash_attn.errors import UnsupportedProblemError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("flag_gems") is None,
        reason="FlagGems is not installed (pip install flash-attn[flaggems])",
    ),
    # Its kernels and tables are not ours to mend.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    with flash_attn.use_backend("flag_gems"):
        yield


def refusals(inputs: support.Inputs, backward: bool = False) -> list[str]:
    return registry.load("flag_gems").unsupported(inputs.problem(), backward)


def check(inputs: support.Inputs) -> None:
    assert refusals(inputs) == []
    support.check_forward(inputs)


def test_its_own_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import flag_gems

    calls = []
    real = flag_gems.flash_attn_varlen_func
    monkeypatch.setattr(
        flag_gems, "flash_attn_varlen_func", lambda **given: calls.append(given) or real(**given)
    )
    check(support.dense("cuda", torch.float16))
    assert len(calls) == 1
    assert calls[0]["q"].is_cuda


LENGTHS = [(1, 1), (1, 200), (17, 33), (64, 64), (129, 129), (200, 200), (113, 203), (300, 100)]


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlens", LENGTHS)
def test_dense(seqlens: tuple[int, int], causal: bool, dtype: torch.dtype) -> None:
    check(support.dense("cuda", dtype, seqlens=seqlens, headdim=64, causal=causal))


@pytest.mark.parametrize("family", support.FAMILIES)
def test_input_families(family: str) -> None:
    inputs = support.dense(
        "cuda", torch.bfloat16, seqlens=(130, 190), headdim=64, family=family, causal=True
    )
    check(inputs)


@pytest.mark.parametrize("headdim", [*support.ODD_HEADDIMS, 59, *support.HEADDIMS])
def test_head_dims(headdim: int) -> None:
    check(support.dense("cuda", torch.float16, seqlens=(70, 90), headdim=headdim, causal=True))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("seqlen_q", [1, 33])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(heads: tuple[int, int], seqlen_q: int, causal: bool) -> None:
    """With one query a sequence the library turns heads into rows."""
    check(
        support.dense(
            "cuda", torch.float16, seqlens=(seqlen_q, 260), heads=heads, headdim=64, causal=causal
        )
    )


WINDOWS = list(itertools.product([-1, 0, 17, 400], [-1, 0, 23, 400]))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("seqlens", [(128, 128), (100, 217), (1, 90), (250, 90)])
def test_windows_are_right_or_refused(seqlens: tuple[int, int], window: tuple[int, int]) -> None:
    inputs = support.dense(
        "cuda", torch.bfloat16, seqlens=seqlens, heads=(4, 2), headdim=64, window_size=window
    )
    reasons = refusals(inputs)
    if reasons:
        assert seqlens[0] > seqlens[1]
        assert "misplaces" in reasons[0]
    else:
        check(inputs)


SCORES: dict[str, dict[str, Any]] = {
    "scale": {"softmax_scale": 0.7},
    "softcap": {"softcap": 3.0},
    "softcap_causal": {"softcap": 3.0, "causal": True},
    "softcap_window": {"softcap": 15.0, "window_size": (40, 7)},
}


@pytest.mark.parametrize("options", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_scores(options: dict[str, Any], dtype: torch.dtype) -> None:
    check(support.dense("cuda", dtype, seqlens=(130, 190), heads=(4, 2), headdim=64, **options))


@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("options", [{}, {"window_size": (40, 7)}, {"window_size": (40, 0)}])
@pytest.mark.parametrize("seqlen_q", [1, 130])
def test_alibi(seqlen_q: int, options: dict[str, Any], by_sequence: bool) -> None:
    slopes = support.alibi_slopes("cuda", 4, 2 if by_sequence else None)
    check(
        support.dense(
            "cuda", torch.float16, seqlens=(seqlen_q, 190), heads=(4, 2), headdim=64,
            alibi_slopes=slopes, **options,
        )
    )  # fmt: skip


BATCHES = [
    ([17, 40, 3], [17, 40, 3]),
    ([41, 30], [5, 17]),
    ([1, 130, 0, 40], [70, 130, 20, 300]),
    ([1, 1, 1], [5, 200, 64]),
    ([1, 0, 1], [5, 200, 64]),
    ([13, 6, 5], [13, 0, 9]),
]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (20, 0)}])
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_packed(
    lengths: tuple[list[int], list[int]], options: dict[str, Any], padding: int
) -> None:
    inputs = support.varlen(
        "cuda", torch.float16, *lengths, heads=(4, 2), headdim=64, padding=padding, **options
    )
    check(inputs)


@pytest.mark.parametrize("name", list(support.LAYOUTS))
def test_layouts(name: str) -> None:
    lay = support.LAYOUTS[name]
    inputs = support.dense("cuda", torch.float16, seqlens=(33, 47), heads=(2, 2), headdim=32)
    check(inputs.but(q=lay(inputs.q), k=lay(inputs.k), v=lay(inputs.v), causal=True))


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (9, 4)}])
def test_packed_queries_on_pages(page_size: int, options: dict[str, Any]) -> None:
    check_packed(packed_call([3, 40, 1], [17, 90, 33], page_size, **options), "cuda")


@pytest.mark.parametrize("page_size", [None, 16, 64])
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("seqlen_new", [None, 1])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (9, 4)}])
def test_caches(
    page_size: int | None, seqlen_q: int, seqlen_new: int | None, options: dict[str, Any]
) -> None:
    """A cache without pages is handed over as one page a row."""
    call = make_call(
        seqlen_q=seqlen_q, seqlen_new=seqlen_new, lengths=[17, 39, 1], page_size=page_size,
        rotary_dim=16 if seqlen_new else 0, **options,
    )  # fmt: skip
    check_cache(call, "cuda")


def test_cache_rows_chosen_by_index() -> None:
    rows = torch.tensor([4, 0, 2]).int()
    check_cache(
        make_call(cache_rows=5, lengths=[17, 39, 1], cache_batch_idx=rows, causal=True), "cuda"
    )


def test_results_go_into_out() -> None:
    inputs = support.dense("cuda", torch.float16, seqlens=(37, 41), headdim=24, causal=True)
    out = support.poisoned_like(inputs.q)
    returned = flash_attn.flash_attn_interface.flash_attn_gpu.fwd(
        inputs.q, inputs.k, inputs.v, out, None, 0.0, 24**-0.5, True, -1, -1, 0.0, False
    )
    assert returned[0].data_ptr() == out.data_ptr()
    assert torch.equal(out, support.run_forward(inputs)[0])


REFUSED: dict[str, dict[str, Any]] = {
    "dropout": {"dropout_p": 0.1},
    "causal_alibi": {"causal": True, "alibi_slopes": True},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_what_it_gets_wrong_is_refused(options: dict[str, Any]) -> None:
    inputs = support.dense("cuda", torch.float16, **options)
    if "alibi_slopes" in options:
        inputs = inputs.but(alibi_slopes=support.alibi_slopes("cuda", 2))
    with pytest.raises(UnsupportedProblemError, match="flag_gems"):
        support.run_forward(inputs)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (9, 4)}])
@pytest.mark.parametrize("headdim", [16, 40, 64, 128])
def test_backward_is_right_or_refused(headdim: int, options: dict[str, Any]) -> None:
    inputs = support.dense(
        "cuda", torch.float16, seqlens=(70, 70), heads=(4, 2), headdim=headdim, **options
    )
    reasons = refusals(inputs, backward=True)
    if not reasons:
        support.run_and_check(inputs)
        return
    assert reasons == ["this release of FlagGems has no backward pass"]
    with pytest.raises(UnsupportedProblemError, match="no backward pass"):
        support.run(inputs)
