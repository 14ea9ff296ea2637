"""The FlagGems adapter against a stand-in for the library, which knows its conventions.

The stand-in refuses what the library gets wrong, records its arguments, computes densely in
float64, and leaves NaN where the library writes nothing.
"""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.core import ops, reference, registry
from flash_attn.core.problem import AttentionProblem, SequenceLayout, Visibility, make_transform
from flash_attn.errors import BackendUnavailableError, UnsupportedProblemError

ADAPTER = "flash_attn.backends.flag_gems"


def make_library(with_backward=True):
    library = types.ModuleType("flag_gems")
    library.calls = []

    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q=None, cu_seqlens_q=None, max_seqlen_k=None, cu_seqlens_k=None,
        seqused_k=None, q_v=None, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None,
        scheduler_metadata=None, q_descale=None, k_descale=None, v_descale=None, s_aux=None,
        num_splits=0, fa_version=2,
    ):  # fmt: skip
        library.calls.append(dict(locals()))
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.shape[-1] >= 16
        assert q.shape[-1] % 8 == 0
        assert all(x.is_contiguous() for x in (q, k, v))
        assert cu_seqlens_q.dtype == torch.int32
        assert (cu_seqlens_k is None) != (seqused_k is None)
        assert (block_table is None) == (seqused_k is None)
        assert dropout_p == 0.0
        assert return_softmax_lse
        assert fa_version == 2
        assert num_splits == 0
        left, right = window_size
        assert (left < 0) == (right < 0), "one-sided windows are not masked"
        assert not (causal and left >= 0)
        layout = SequenceLayout(
            cu_seqlens_q, cu_seqlens_k, seqused_k, None, block_table,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        )  # fmt: skip
        problem = AttentionProblem(
            q, k, v, make_transform(q.shape[-1], softmax_scale, softcap, alibi_slopes),
            Visibility.from_window(left, right, causal), layout,
        )  # fmt: skip
        result = reference.attention(problem)
        answer, lse = result.out.to(q.dtype), result.softmax_lse.float()
        last = int(cu_seqlens_q[-1])
        answer[last:], lse[:, last:] = float("nan"), float("nan")
        nheads, nheads_k, batch = q.shape[1], k.shape[-2], len(cu_seqlens_q) - 1
        if max_seqlen_q == 1 and nheads > nheads_k and alibi_slopes is None and left < 0:
            assert q.shape[0] == batch, "grouped decoding reshapes to one query a sequence"
            lse = lse.view(nheads_k, -1, batch).transpose(1, 2).reshape(nheads, batch)
        return answer, lse

    def flash_attention_backward(
        dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, seed, offset, *,
        scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        library.calls.append(dict(locals()))
        assert q.shape[-1] in (16, 32, 64, 128, 256)
        assert all(x.is_contiguous() for x in (dout, q, k, v, out, lse))
        shape = (q.shape[0], q.shape[1]) if cu_q is not None else q.transpose(1, 2).shape[:3]
        assert lse.shape == shape
        transform = make_transform(q.shape[-1], scale)
        visibility = Visibility.from_window(window_size_left, window_size_right, is_causal)
        layout = SequenceLayout(cu_q, cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k)
        problem = AttentionProblem(q, k, v, transform, visibility, layout)
        grads = [grad.to(q.dtype) for grad in reference.gradients(problem, dout)[:3]]
        if cu_q is not None:
            for grad, bounds in zip(grads, (cu_q, cu_k, cu_k), strict=True):
                grad[int(bounds[-1]) :] = float("nan")
        return tuple(grads)

    def never(*args, **kwargs):
        raise AssertionError("the dense entry must not be called")

    library.flash_attn_varlen_func = flash_attn_varlen_func
    library.flash_attention_forward = never
    library.enable = library.use_gems = never
    if with_backward:
        library.flash_attention_backward = flash_attention_backward
    return library


@pytest.fixture
def install(monkeypatch):
    """Load the adapter on a stand-in; it forgets both afterwards."""
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    monkeypatch.setattr(registry, "_failures", {})
    monkeypatch.setattr(registry, "_context_choice", [])

    def put(library):
        monkeypatch.setitem(sys.modules, "flag_gems", library)
        monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
        registry._loaded.pop("flag_gems", None)
        adapter = importlib.import_module(ADAPTER)
        inputs = adapter.refused_inputs
        monkeypatch.setattr(
            adapter,
            "refused_inputs",
            lambda problem: [x for x in inputs(problem) if "needs GPU tensors" not in x],
        )
        monkeypatch.setattr(adapter, "_triton_version", lambda: (3, 6))
        return adapter

    yield put
    sys.modules.pop(ADAPTER, None)


@pytest.fixture
def gems(install):
    library = make_library()
    install(library)
    return library


def randn(*shape):
    return torch.randn(*shape).half()


def bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def expect(found, function, *args, **kwargs):
    """``found`` is (out, lse, ...) of the same call on the reference."""
    with flash_attn.use_backend("reference"):
        expected = function(*args, **kwargs)
    for have, want in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(have, want, atol=2e-3, rtol=2e-3)


# Windows that must arrive as (causal, left, right), for 7 keys.
WINDOWS = [
    ({}, 5, (False, -1, -1)),
    ({"causal": True}, 5, (True, -1, -1)),
    ({"causal": True}, 9, (True, -1, -1)),
    ({"window_size": (-1, 0)}, 5, (True, -1, -1)),
    ({"window_size": (2, 0)}, 9, (False, 2, 0)),
    ({"causal": True, "window_size": (2, 3)}, 5, (False, 2, 0)),
    ({"window_size": (2, -1)}, 5, (False, 2, 6)),
    ({"window_size": (2, -1)}, 7, (False, 2, 6)),
    ({"window_size": (-1, 2)}, 5, (False, 6, 2)),
    ({"window_size": (-1, 2)}, 9, (False, 6, 2)),
    ({"window_size": (7, 7)}, 5, (False, -1, -1)),
    ({"window_size": (100, 0)}, 9, (True, -1, -1)),
    ({"window_size": (6, 100)}, 7, (False, 6, 6)),
]


@pytest.mark.parametrize(("options", "seqlen_q", "passed"), WINDOWS)
@pytest.mark.parametrize("nheads_k", [1, 4])
def test_dense_windows(options, seqlen_q, passed, nheads_k, gems):
    q, k, v = randn(2, seqlen_q, 4, 16), randn(2, 7, nheads_k, 16), randn(2, 7, nheads_k, 16)
    with flash_attn.use_backend("flag_gems"):
        found = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    (call,) = gems.calls
    assert (call["causal"], *call["window_size"]) == passed
    assert call["cu_seqlens_q"].tolist() == [0, seqlen_q, 2 * seqlen_q]
    assert call["cu_seqlens_k"].tolist() == [0, 7, 14]
    expect(found, flash_attn_func, q, k, v, return_attn_probs=True, **options)


@pytest.mark.parametrize("headdim", [1, 8, 12, 16, 20, 40, 256])
def test_head_dims_are_padded_and_keep_their_scale(headdim, gems):
    q, k, v = (randn(1, 6, 2, headdim) for _ in range(3))
    with flash_attn.use_backend("flag_gems"):
        found = flash_attn_func(q, k, v, return_attn_probs=True)
    (call,) = gems.calls
    assert call["q"].shape[-1] == max(16, -(-headdim // 8) * 8)
    assert call["softmax_scale"] == headdim**-0.5
    expect(found, flash_attn_func, q, k, v, return_attn_probs=True)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.1])},
        {"alibi_slopes": torch.rand(2, 4), "window_size": (3, 3)},
        {"softmax_scale": 0.3},
    ],
)
def test_scores(options, gems):
    q, k, v = randn(2, 5, 4, 16), randn(2, 7, 2, 16), randn(2, 7, 2, 16)
    with flash_attn.use_backend("flag_gems"):
        found = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    expect(found, flash_attn_func, q, k, v, return_attn_probs=True, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_grouped_decoding_gets_its_lse_back_in_order(causal, batch_size, gems):
    q, k, v = randn(batch_size, 1, 6, 16), randn(batch_size, 9, 2, 16), randn(batch_size, 9, 2, 16)
    with flash_attn.use_backend("flag_gems"):
        found = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    expect(found, flash_attn_func, q, k, v, causal=causal, return_attn_probs=True)
    assert gems.calls[0]["max_seqlen_q"] == 1


def test_strided_inputs_are_copied(gems):
    qkv = randn(2, 3, 4, 5, 16).transpose(1, 3)  # (2, 5, 4, 3, 16)
    q, k, v = qkv.unbind(3)
    with flash_attn.use_backend("flag_gems"):
        found = flash_attn_func(q, k, v, return_attn_probs=True)
    expect(found, flash_attn_func, q, k, v, return_attn_probs=True)


@pytest.mark.parametrize("lengths_q", [(3, 5, 1), (1, 1, 1), (1, 0, 1), (0, 0, 0)])
def test_packed(lengths_q, gems):
    cu_q, cu_k = bounds(*lengths_q), bounds(6, 5, 7)
    # Two rows more than the sequences have: they belong to none and must come out 0.
    q, k, v = randn(sum(lengths_q) + 2, 4, 16), randn(20, 2, 16), randn(20, 2, 16)
    args = (q, k, v, cu_q, cu_k, max(lengths_q) or 1, 7)
    with flash_attn.use_backend("flag_gems"):
        found = flash_attn_varlen_func(*args, causal=True, return_attn_probs=True)
    assert found[0][-2:].abs().max() == 0.0
    assert torch.isposinf(found[1][:, -2:]).all()
    expect(found, flash_attn_varlen_func, *args, causal=True, return_attn_probs=True)


def test_packed_decoding_without_spare_rows_keeps_the_bound(gems):
    cu_q, cu_k = bounds(1, 1, 1), bounds(6, 5, 7)
    args = (randn(3, 4, 16), randn(18, 2, 16), randn(18, 2, 16), cu_q, cu_k, 1, 7)
    with flash_attn.use_backend("flag_gems"):
        found = flash_attn_varlen_func(*args, return_attn_probs=True)
    assert gems.calls[0]["max_seqlen_q"] == 1
    expect(found, flash_attn_varlen_func, *args, return_attn_probs=True)


def test_rows_without_keys(gems):
    q, k, v = randn(1, 6, 2, 16), randn(1, 3, 2, 16), randn(1, 3, 2, 16)
    with flash_attn.use_backend("flag_gems"):
        out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert out[:, :3].abs().max() == 0.0
    assert torch.isposinf(lse[..., :3]).all()
    assert torch.isfinite(lse[..., 3:]).all()


def test_packed_queries_on_pages(gems):
    q, pages = randn(7, 4, 16), randn(6, 4, 2, 16)
    table = torch.tensor([[5, 0], [2, 3]], dtype=torch.int32)
    args = (q, pages, pages + 1, bounds(3, 4), bounds(5, 8), 4, 8)
    with flash_attn.use_backend("flag_gems"):
        found = flash_attn_varlen_func(*args, block_table=table, return_attn_probs=True)
    (call,) = gems.calls
    assert call["cu_seqlens_k"] is None
    assert call["seqused_k"].tolist() == [5, 8]
    expect(found, flash_attn_varlen_func, *args, block_table=table, return_attn_probs=True)


@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_a_paged_cache(seqlen_q, gems):
    q, pages = randn(2, seqlen_q, 4, 16), randn(6, 4, 2, 16)
    table = torch.tensor([[5, 0, 1], [2, 3, 4]], dtype=torch.int32)
    used = torch.tensor([5, 12], dtype=torch.int32)
    options = {"cache_seqlens": used, "block_table": table, "return_softmax_lse": True}
    with flash_attn.use_backend("flag_gems"):
        found = flash_attn_with_kvcache(q, pages, pages + 1, causal=True, **options)
    (call,) = gems.calls
    assert call["max_seqlen_k"] == 12
    expect(found, flash_attn_with_kvcache, q, pages, pages + 1, causal=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_seqlens": torch.tensor([5, 0], dtype=torch.int32)},
        {"cache_seqlens": 4},
        {"cache_batch_idx": torch.tensor([2, 0], dtype=torch.int32)},
        {
            "cache_seqlens": torch.tensor([5, 9], dtype=torch.int32),
            "cache_batch_idx": torch.tensor([2, 0], dtype=torch.int32),
        },
    ],
)
def test_a_cache_is_one_page_a_row(options, gems):
    rows = 3 if "cache_batch_idx" in options else 2
    q, k, v = randn(2, 2, 4, 16), randn(rows, 9, 2, 16), randn(rows, 9, 2, 16)
    with flash_attn.use_backend("flag_gems"):
        found = flash_attn_with_kvcache(q, k, v, return_softmax_lse=True, **options)
    (call,) = gems.calls
    assert call["block_table"].shape == (2, 1)
    expect(found, flash_attn_with_kvcache, q, k, v, return_softmax_lse=True, **options)


def test_appending_is_done_before(gems):
    q, new, lengths = randn(2, 1, 4, 16), randn(2, 1, 2, 16), torch.tensor([3, 8]).int()
    caches = [randn(2, 9, 2, 16), randn(2, 9, 2, 16)]
    copies = [x.clone() for x in caches]
    options = {"k": new, "v": -new, "cache_seqlens": lengths, "return_softmax_lse": True}
    with flash_attn.use_backend("flag_gems"):
        found = flash_attn_with_kvcache(q, *caches, **options)
    assert gems.calls[0]["seqused_k"].tolist() == [4, 9]
    expect(found, flash_attn_with_kvcache, q, *copies, **options)
    assert all(torch.equal(x, y) for x, y in zip(caches, copies, strict=True))


def test_results_go_into_a_given_output(gems):
    q, k, v = (randn(1, 5, 2, 16) for _ in range(3))
    out = torch.full((1, 5, 2, 32), float("nan"), dtype=torch.float16)[..., :16]
    with flash_attn.use_backend("flag_gems"):
        result = flash_attn.flash_attn_interface.flash_attn_gpu.fwd(
            q, k, v, out, None, 0.0, 0.25, False, -1, -1, 0.0, False
        )
    assert result[0] is out
    expect((out, result[1]), flash_attn_func, q, k, v, return_attn_probs=True)


# Backward


def gradients(function, inputs, dout):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    function(*leaves).backward(dout)
    return [x.grad for x in leaves]


@pytest.mark.parametrize("headdim", [8, 16, 40, 64])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 0)}])
def test_dense_backward(headdim, options, gems):
    inputs = [randn(2, 7, 4, headdim), randn(2, 7, 2, headdim), randn(2, 7, 2, headdim)]
    dout = randn(2, 7, 4, headdim)
    found, expected = (
        _under(name, lambda: gradients(lambda *x: flash_attn_func(*x, **options), inputs, dout))
        for name in ("flag_gems", "reference")
    )
    assert len(gems.calls) == 2
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, atol=4e-3, rtol=4e-3)


def _under(name, function):
    with flash_attn.use_backend(name):
        return function()


def test_packed_backward_on_shared_bounds(gems):
    cu_seqlens = bounds(3, 5)
    inputs = [randn(10, 2, 16), randn(10, 2, 16), randn(10, 2, 16)]
    dout = randn(10, 2, 16)

    def call(q, k, v):
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 5, 5, causal=True)

    found, expected = (
        _under(name, lambda: gradients(call, inputs, dout)) for name in ("flag_gems", "reference")
    )
    for have, want in zip(found, expected, strict=True):
        assert have[-2:].abs().max() == 0.0
        torch.testing.assert_close(have, want, atol=4e-3, rtol=4e-3)


def problem_of(seqlen_q=4, seqlen_k=4, causal=False, softcap=0.0, alibi_slopes=None, **options):
    q, k = randn(2, seqlen_q, 4, 16), randn(2, seqlen_k, 2, 16)
    transform = make_transform(16, None, softcap, alibi_slopes)
    visibility = options.pop("visibility", Visibility.from_window(-1, -1, causal))
    return AttentionProblem(q, k, k, transform, visibility, **options)


def test_what_is_refused(install):
    adapter = install(make_library())
    index, slopes = torch.zeros(2, dtype=torch.int32), torch.ones(4)
    packed = ops.varlen_problem(
        randn(4, 2, 16), randn(4, 2, 16), randn(4, 2, 16), bounds(2, 2), bounds(1, 3), 2, 3, 0.0,
        None, True,
    )  # fmt: skip
    used = packed._replace(layout=packed.layout._replace(seqused_k=index))
    for text, problem, backward in (
        ("random bits", problem_of(dropout_p=0.1), False),
        ("`cache_leftpad`", problem_of(layout=SequenceLayout(leftpad_k=index)), False),
        ("`num_splits`", problem_of(num_splits=4), False),
        ("misplaces", problem_of(9, visibility=Visibility(2, None)), False),
        ("causal ALiBi", problem_of(causal=True, alibi_slopes=slopes), False),
        ("`seqused_k` with packed keys", used, False),
        ("at least one", problem_of(0), False),
        ("backward pass does not take `softcap`", problem_of(softcap=3.0), True),
        ("backward pass does not take `alibi_slopes`", problem_of(alibi_slopes=slopes), True),
        ("misaligns masks", problem_of(5, causal=True), True),
        ("misaligns masks", packed, True),
        ("pages or caches", problem_of(layout=SequenceLayout(seqused_k=index)), True),
    ):
        assert any(text in reason for reason in adapter.BACKEND.unsupported(problem, backward)), (
            text
        )
    for plain in (problem_of(), problem_of(5), problem_of(causal=True)):
        assert adapter.BACKEND.unsupported(plain, True) == []


def test_dtypes_and_devices_are_refused(gems, install):
    from flash_attn.backends import _foreign

    for dtype in (torch.float32, torch.float64):
        q = torch.zeros(1, 2, 2, 16, dtype=dtype)
        problem = AttentionProblem(q, q, q, make_transform(16))
        text = "\n".join(_foreign.refused_inputs(problem))
        assert str(dtype).removeprefix("torch.") in text
        assert "needs GPU tensors, `q` is on cpu" in text


def test_releases_without_backward(install):
    adapter = install(make_library(with_backward=False))
    assert adapter.BACKEND.unsupported(problem_of(), False) == []
    assert "no backward pass" in adapter.BACKEND.unsupported(problem_of(), True)[0]


def test_newer_triton_and_the_c_extension_are_refused(install, monkeypatch):
    adapter = install(make_library())
    monkeypatch.setattr(adapter, "_triton_version", lambda: (3, 9))
    assert "triton 3.9" in adapter.BACKEND.unsupported(problem_of(), False)[0]
    monkeypatch.setattr(adapter, "_triton_version", lambda: (3, 8))
    adapter.flag_gems.config = types.SimpleNamespace(use_c_extension=True)
    assert "USE_C_EXTENSION" in adapter.BACKEND.unsupported(problem_of(), False)[0]


def test_dropout_names_the_reason(gems):
    q = randn(1, 4, 2, 16)
    with flash_attn.use_backend("flag_gems"), pytest.raises(UnsupportedProblemError) as caught:
        flash_attn_func(q, q, q, dropout_p=0.5)
    assert "flag_gems: draws dropout's random bits" in str(caught.value)
    assert gems.calls == []


# The library is missing or broken


@pytest.mark.parametrize("choose", [flash_attn.set_backend, lambda name: _enter(name)])
@pytest.mark.parametrize("failure", [ImportError, RuntimeError, AssertionError, OSError])
def test_a_library_that_fails_to_import(choose, failure, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "flag_gems":
                raise failure("No device were detected")

    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    monkeypatch.setattr(registry, "_failures", {})
    registry._loaded.pop("flag_gems", None)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    monkeypatch.delitem(sys.modules, "flag_gems", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match="flag_gems.*No device were detected") as caught:
        choose("flag_gems")
    assert isinstance(caught.value, BackendUnavailableError)
    assert isinstance(caught.value, RuntimeError)
    assert registry._process_choice != "flag_gems"
    assert registry._context_choice == []
    flash_attn_func(*(torch.randn(1, 2, 1, 8) for _ in range(3)))


def _enter(name):
    with flash_attn.use_backend(name):
        pass
