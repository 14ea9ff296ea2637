"""Wrong calls: each raises an exception that names argument, value found and what it must be."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_attn
from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.core.validate import check_not_expanded
from flash_attn.errors import ConstraintError, FlashAttentionError
from flash_attn.flash_attn_interface import flash_attn_gpu

ROOT = Path(__file__).parents[2]
INT = torch.int32


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def bounds(*lengths, dtype=INT):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def dense(**changes):
    given = {"q": zeros(2, 4, 4, 16), "k": zeros(2, 6, 2, 16), "v": zeros(2, 6, 2, 16)}
    return flash_attn_func(**(given | changes))


def raw(**changes):
    """Without the dispatcher, which would take tensors on the meta device for tracing."""
    given = {"q": zeros(2, 4, 4, 16), "k": zeros(2, 6, 2, 16), "v": zeros(2, 6, 2, 16)}
    given |= {"alibi_slopes": None} | changes
    return flash_attn_gpu.fwd(
        given["q"], given["k"], given["v"], None, given["alibi_slopes"], 0.0, 0.25, False, -1, -1,
        0.0, False,
    )  # fmt: skip


def packed(**changes):
    given = {
        "q": zeros(8, 4, 16),
        "k": zeros(11, 2, 16),
        "v": zeros(11, 2, 16),
        "cu_seqlens_q": bounds(3, 5),
        "cu_seqlens_k": bounds(4, 7),
        "max_seqlen_q": 5,
        "max_seqlen_k": 7,
    }
    return flash_attn_varlen_func(**(given | changes))


def cached(**changes):
    given = {
        "q": zeros(2, 1, 4, 16),
        "k_cache": zeros(2, 8, 2, 16),
        "v_cache": zeros(2, 8, 2, 16),
        "cache_seqlens": torch.tensor([3, 5], dtype=INT),
    }
    return flash_attn_with_kvcache(**(given | changes))


def new(rows=1):
    return {"k": zeros(2, rows, 2, 16), "v": zeros(2, rows, 2, 16)}


HALF = torch.float16
# The call, its wrong arguments, and what the message must hold: argument, found, required.
TABLE = [
    # dtypes and devices
    (dense, {"q": zeros(2, 4, 4, 16, dtype=torch.int64)}, ["`q`", "int64", "fp16 and bf16"]),
    (dense, {"q": zeros(2, 4, 4, 16, dtype=HALF)}, ["`q` and `k`", "float16", "float32", "same"]),
    (dense, {"v": zeros(2, 6, 2, 16, dtype=HALF)}, ["`q` and `v`", "float16", "float32", "same"]),
    (raw, {"k": torch.zeros(2, 6, 2, 16, device="meta")}, ["`k`", "meta", "on cpu like `q`"]),
    (dense, {"q": [1.0]}, ["`q`", "list", "torch.Tensor"]),
    (dense, {"q": zeros(2, 4, 4, 16).to_sparse()}, ["`q`", "dense", "sparse"]),
    (
        dense,
        {"k": torch.nested.nested_tensor([zeros(3, 2, 16), zeros(6, 2, 16)], layout=torch.jagged)},
        ["`k`", "dense", "nested", "packed sequences"],
    ),
    (dense, {"k": None}, ["`k`", "NoneType", "torch.Tensor"]),
    # shapes
    (dense, {"q": zeros(4, 4, 16)}, ["`q`", "(4, 4, 16)", "(batch_size, seqlen_q"]),
    (dense, {"k": zeros(6, 2, 16), "v": zeros(6, 2, 16)}, ["`k`", "(6, 2, 16)", "(batch_size"]),
    (dense, {"k": zeros(2, 6, 2, 8)}, ["`k`", "found 8", "16 like `q`"]),
    (dense, {"v": zeros(2, 6, 2, 8)}, ["`v`", "found 8", "16 like `q`"]),
    (dense, {"v": zeros(2, 7, 2, 16)}, ["`v`", "(2, 7, 2, 16)", "(2, 6, 2, 16)"]),
    (dense, {"k": zeros(3, 6, 2, 16), "v": zeros(3, 6, 2, 16)}, ["`k`", "found 3", "batch size 2"]),
    (dense, {"k": zeros(2, 6, 3, 16), "v": zeros(2, 6, 3, 16)}, ["`q`", "`k`", "3", "4", "divide"]),
    (dense, {"k": zeros(2, 6, 0, 16), "v": zeros(2, 6, 0, 16)}, ["`k`", "0", "divide"]),
    (dense, {"q": zeros(2, 4, 4, 0)}, ["`q`", "(2, 4, 4, 0)", "head dim"]),
    (dense, dict.fromkeys("qkv", zeros(1, 2, 2, 257)), ["`q`", "257", "at most 256"]),
    # scores
    (dense, {"dropout_p": 1.0}, ["`dropout_p`", "1.0", "[0, 1)"]),
    (dense, {"dropout_p": -0.1}, ["`dropout_p`", "-0.1", "[0, 1)"]),
    (dense, {"dropout_p": float("nan")}, ["`dropout_p`", "nan", "[0, 1)"]),
    (dense, {"dropout_p": 0.1, "softcap": 3.0}, ["`softcap`", "`dropout_p`", "3.0", "0.1"]),
    (dense, {"softmax_scale": float("nan")}, ["`softmax_scale`", "nan", "finite"]),
    (dense, {"softmax_scale": "1"}, ["`softmax_scale`", "str", "number"]),
    (dense, {"softcap": float("inf")}, ["`softcap`", "inf", "finite"]),
    (dense, {"softcap": float("nan")}, ["`softcap`", "nan", "finite"]),
    (dense, {"softcap": None}, ["`softcap`", "NoneType", "number"]),
    (dense, {"causal": "yes"}, ["`causal`", "'yes'", "True or False"]),
    (dense, {"deterministic": "no"}, ["`deterministic`", "'no'", "True or False"]),
    (dense, {"window_size": None}, ["`window_size`", "None", "(left, right)", "-1"]),
    (dense, {"window_size": (None, 0)}, ["`window_size`", "(None, 0)", "-1 is no limit"]),
    (dense, {"window_size": (3.0, 0)}, ["`window_size`", "(3.0, 0)", "two integers"]),
    (dense, {"window_size": (1, 2, 3)}, ["`window_size`", "(1, 2, 3)", "(left, right)"]),
    (dense, {"window_size": (1,)}, ["`window_size`", "(1,)", "(left, right)"]),
    (dense, {"alibi_slopes": zeros(4, dtype=HALF)}, ["`alibi_slopes`", "float16", "fp32"]),
    (dense, {"alibi_slopes": zeros(5)}, ["`alibi_slopes`", "(5,)", "(4,)", "(2, 4)"]),
    (dense, {"alibi_slopes": zeros(3, 4)}, ["`alibi_slopes`", "(3, 4)", "(2, 4)"]),
    (raw, {"alibi_slopes": torch.zeros(4, device="meta")}, ["`alibi_slopes`", "meta", "cpu"]),
    # packed
    (packed, {"q": zeros(2, 4, 4, 16)}, ["`q`", "(2, 4, 4, 16)", "(total_q"]),
    (packed, {"cu_seqlens_q": bounds(3, 5, dtype=torch.int64)}, ["`cu_seqlens_q`", "int64", "32"]),
    (packed, {"cu_seqlens_k": bounds(3, 5, 3)}, ["`cu_seqlens_k`", "(4,)", "(3,)"]),
    (packed, {"cu_seqlens_q": zeros(0, dtype=INT)}, ["`cu_seqlens_q`", "(0,)"]),
    (packed, {"cu_seqlens_q": zeros(2, 3, dtype=INT)}, ["`cu_seqlens_q`", "(2, 3)"]),
    (packed, {"cu_seqlens_q": None}, ["`cu_seqlens_q`", "NoneType", "torch.Tensor"]),
    (packed, {"cu_seqlens_k": [0, 4, 11]}, ["`cu_seqlens_k`", "list", "torch.Tensor"]),
    (packed, {"cu_seqlens_q": bounds(1, 2, 3, 4)[::2]}, ["`cu_seqlens_q`", "stride 2", "contig"]),
    (packed, {"max_seqlen_q": -1}, ["`max_seqlen_q`", "-1"]),
    (packed, {"max_seqlen_k": 7.0}, ["`max_seqlen_k`", "7.0", "integer"]),
    (packed, {"max_seqlen_q": None}, ["`max_seqlen_q`", "None", "integer"]),
    (packed, {"block_table": zeros(2, 1, dtype=INT)}, ["`k`", "(11, 2, 16)", "(num_pages"]),
    # packed in one tensor
    (
        lambda **given: flash_attn_qkvpacked_func(**given),
        {"qkv": zeros(2, 4, 2, 4, 16)},
        ["`qkv`", "(2, 4, 2, 4, 16)", "3"],
    ),
    (
        lambda **given: flash_attn_qkvpacked_func(**given),
        {"qkv": zeros(4, 3, 4, 16)},
        ["`qkv`", "(4, 3, 4, 16)", "(batch_size, seqlen, 3"],
    ),
    (
        lambda **given: flash_attn_kvpacked_func(zeros(2, 4, 4, 16), **given),
        {"kv": zeros(2, 4, 3, 4, 16)},
        ["`kv`", "(2, 4, 3, 4, 16)", "2"],
    ),
    (
        lambda **given: flash_attn_varlen_qkvpacked_func(
            cu_seqlens=bounds(4), max_seqlen=4, **given
        ),
        {"qkv": zeros(2, 4, 3, 4, 16)},
        ["`qkv`", "(2, 4, 3, 4, 16)", "(total, 3"],
    ),
    (
        lambda **given: flash_attn_varlen_kvpacked_func(
            zeros(8, 4, 16), zeros(8, 2, 4, 16), bounds(8), bounds(8), 8, 8, **given
        ),
        {"dropout_p": 2.0},
        ["`dropout_p`", "2.0", "[0, 1)"],
    ),
    # caches
    (cached, {"k_cache": zeros(2, 8, 16, 2).mT}, ["`k_cache`", "stride 2", "contiguous"]),
    (cached, {"v_cache": zeros(2, 8, 16, 2).mT}, ["`v_cache`", "stride 2", "contiguous"]),
    (cached, {"k_cache": zeros(8, 2, 16)}, ["`k_cache`", "(8, 2, 16)", "(batch_size_cache"]),
    (cached, {"cache_seqlens": zeros(2, dtype=torch.int64)}, ["`cache_seqlens`", "int64", "int32"]),
    (cached, {"cache_seqlens": zeros(3, dtype=INT)}, ["`cache_seqlens`", "(3,)", "(2,)"]),
    (cached, {"q": zeros(2, 9, 4, 16)}, ["`q`", "9", "8", "seqlen of the KV cache"]),
    (cached, {"k": zeros(2, 1, 2, 16)}, ["`v`", "None", "value must also be passed"]),
    (cached, {"v": zeros(2, 1, 2, 16)}, ["`v`", "`k`", "both or none"]),
    (cached, new() | {"cache_seqlens": None}, ["`cache_seqlens`", "None", "must also be passed"]),
    (cached, new(9), ["`k`", "9", "8", "seqlen of the KV cache"]),
    (
        cached,
        new() | {"k": zeros(3, 1, 2, 16)},
        ["`k`", "(3, 1, 2, 16)", "(2, seqlen_new, 2, 16)"],
    ),
    (cached, new() | {"k": zeros(2, 2, 2, 16)}, ["`v`", "found 1", "seqlen 2"]),
    (cached, {"rotary_cos": zeros(8, 8)}, ["`rotary_sin`", "None", "together"]),
    (cached, {"rotary_cos": zeros(8, 8), "rotary_sin": zeros(8, 8)}, ["`k`", "None", "must also"]),
    (
        cached,
        new() | {"rotary_cos": zeros(4, 8), "rotary_sin": zeros(4, 8)},
        ["`rotary_cos`", "4", "8", "at least"],
    ),
    (
        cached,
        new() | {"rotary_cos": zeros(8, 16), "rotary_sin": zeros(8, 16)},
        ["rotary_dim", "32", "16", "<= headdim"],
    ),
    (
        cached,
        new() | {"rotary_cos": zeros(8, 4), "rotary_sin": zeros(8, 4)},
        ["rotary dim", "8", "divisible by 16"],
    ),
    (
        cached,
        new() | {"rotary_cos": zeros(8, 8, dtype=HALF), "rotary_sin": zeros(8, 8)},
        ["rotary_cos", "float16", "float32", "same dtype"],
    ),
    (
        cached,
        {"k_cache": zeros(3, 8, 2, 16), "v_cache": zeros(3, 8, 2, 16)},
        ["`k_cache`", "found 3", "batch size 2", "`cache_batch_idx`"],
    ),
    (cached, {"k_cache": zeros(2, 8, 2, 16, dtype=HALF)}, ["`k_cache`", "float16", "same dtype"]),
    (cached, {"v_cache": zeros(2, 8, 2, 16, dtype=HALF)}, ["`v_cache`", "float16", "same dtype"]),
    (cached, {"cache_seqlens": 3.0}, ["`cache_seqlens`", "float", "integer", "int32"]),
    (cached, {"cache_seqlens": [3, 4]}, ["`cache_seqlens`", "list", "integer", "int32"]),
    (cached, {"cache_seqlens": -1}, ["`cache_seqlens`", "-1", "between 0"]),
    (cached, {"cache_seqlens": 9}, ["`k_cache`", "`cache_seqlens`", "9", "8"]),
    (cached, new() | {"cache_seqlens": 8}, ["`k_cache`", "`cache_seqlens`", "9", "8"]),
    (
        cached,
        new() | {"k_cache": zeros(1, 8, 2, 16).expand(2, -1, -1, -1)},
        ["`k_cache`", "expanded", "(0, 32, 16, 1)"],
    ),
    (cached, {"softcap": "x"}, ["`softcap`", "str", "number"]),
    (cached, {"softmax_scale": float("inf")}, ["`softmax_scale`", "inf", "finite"]),
    (cached, {"alibi_slopes": [0.5] * 4}, ["`alibi_slopes`", "list", "torch.Tensor"]),
    (cached, {"causal": "yes"}, ["`causal`", "'yes'", "True or False"]),
    (cached, new() | {"rotary_interleaved": "no"}, ["`rotary_interleaved`", "'no'", "True or"]),
    (cached, {"num_splits": 129}, ["`num_splits`", "129", "> 128"]),
    (cached, {"num_splits": -1}, ["`num_splits`", "-1", "positive"]),
    (
        cached,
        {"block_table": zeros(2, 2, dtype=INT), "cache_leftpad": zeros(2, dtype=INT)},
        ["`block_table`", "`cache_leftpad`", "either"],
    ),
    (
        cached,
        {"block_table": zeros(2, 2, dtype=INT), "cache_batch_idx": zeros(2, dtype=INT)},
        ["`block_table`", "`cache_batch_idx`", "either"],
    ),
    (cached, {"block_table": zeros(3, 2, dtype=INT)}, ["`block_table`", "(3, 2)", "(2, 'any')"]),
    (cached, {"cache_batch_idx": zeros(3, dtype=INT)}, ["`cache_batch_idx`", "(3,)", "(2,)"]),
]


def identity(row):
    return " ".join(row[2][:2])


@pytest.mark.parametrize(("function", "changes", "words"), TABLE, ids=map(identity, TABLE))
def test_messages_name_argument_value_and_requirement(function, changes, words):
    with pytest.raises(ConstraintError) as caught:
        function(**changes)
    text = str(caught.value)
    assert [word for word in words if word not in text] == [], text
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, ValueError)


def test_the_raw_layer_refuses_what_it_cannot_honour():
    q = zeros(1, 2, 2, 16)
    tail = (0.25, False, -1, -1, 0.0)
    with pytest.raises(RuntimeError, match="generator` argument is no longer supported"):
        flash_attn_gpu.fwd("no tensor", q, q, None, None, 0.0, *tail, False, torch.Generator())
    with pytest.raises(RuntimeError, match=r"return_softmax.*p_dropout > 0\.0"):
        flash_attn_gpu.fwd(q, q, q, None, None, 0.0, *tail, True)
    with pytest.raises(RuntimeError, match=r"`out` must have shape \(1, 2, 2, 16\).*\(2, 2, 16\)"):
        flash_attn_gpu.fwd(q, q, q, q[0], None, 0.0, *tail, False)
    lse = zeros(1, 2, 2)
    for name, place, bad in (("dout", 0, q[:, :1]), ("out", 4, q.half()), ("softmax_lse", 5, q)):
        given = [q, q, q, q, q, lse, None, None, None, None, 0.0, *tail, False]
        given[place] = bad
        with pytest.raises(ConstraintError, match=f"`{name}`"):
            flash_attn_gpu.bwd(*given)
    with pytest.raises(ConstraintError, match=r"`dk` must have shape.*found \(2, 2, 16\)"):
        flash_attn_gpu.bwd(q, q, q, q, q, lse, None, q[0], None, None, 0.0, *tail, False)
    for bad in (None, "no tensor"):
        with pytest.raises(ConstraintError, match=r"`k` must be a torch\.Tensor, found"):
            flash_attn_gpu.fwd(q, bad, q, None, None, 0.0, *tail, False)


def test_what_is_written_to_must_not_be_expanded():
    q, lse = zeros(2, 2, 2, 16), zeros(2, 2, 2)
    wide, tail = zeros(1, 2, 2, 16).expand(2, -1, -1, -1), (0.25, False, -1, -1, 0.0)
    with pytest.raises(ConstraintError, match="`out` is written to and must not be expanded"):
        flash_attn_gpu.fwd(q, q, q, wide, None, 0.0, *tail, False)
    with pytest.raises(ConstraintError, match="`dq` is written to and must not be expanded"):
        flash_attn_gpu.bwd(q, q, q, q, q, lse, wide, None, None, None, 0.0, *tail, False)


def test_strides_of_what_has_no_elements_do_not_matter():
    """As PyTorch gives them to a selection of several batches of nothing."""
    x = torch.empty_strided((3, 0, 1, 16), (0, 16, 0, 1), dtype=torch.float16).requires_grad_()
    out = flash_attn.flash_attn_func(x, x, x)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.shape == x.shape
    check_not_expanded(x, "dq")


@pytest.mark.parametrize("state", [zeros(2), zeros(1, dtype=torch.int64)], ids=["float", "short"])
def test_a_dropout_state_is_what_the_forward_pass_returned(state):
    q, lse = zeros(1, 2, 2, 16), zeros(1, 2, 2)
    tail = (None, 0.1, 0.25, False, -1, -1, 0.0, False, None, state)
    with pytest.raises(ConstraintError, match=r"`rng_state` must be int64 of shape \(2,\).*found"):
        flash_attn_gpu.bwd(q, q, q, q, q, lse, None, None, None, *tail)


def test_split_paged_packed_calls_are_refused():
    given = (zeros(3, 2, 16), zeros(2, 4, 2, 16), zeros(2, 4, 2, 16), bounds(3), bounds(5), 3, 5)
    with pytest.raises(RuntimeError, match="`num_splits` is 2"):
        flash_attn.flash_attn_interface._flash_attn_varlen_forward(
            *given, 0.0, 0.25, False, block_table=torch.tensor([[0, 1]], dtype=INT), num_splits=2
        )


# What is odd but right


def test_window_size_may_be_a_tensor_or_a_list():
    q = torch.randn(1, 5, 2, 16)
    expected = flash_attn_func(q, q, q, window_size=(2, 1))
    for window in ([2, 1], torch.tensor([2, 1]), (torch.tensor(2), torch.tensor(1))):
        assert torch.equal(flash_attn_func(q, q, q, window_size=window), expected)


def test_max_seqlen_may_be_a_tensor_without_dimensions():
    q, k = torch.randn(8, 4, 16), torch.randn(11, 2, 16)
    given = {"q": q, "k": k, "v": k}
    expected = packed(**given)
    lengths = {"max_seqlen_q": torch.tensor(5, dtype=INT), "max_seqlen_k": torch.tensor(7)}
    assert torch.equal(packed(**given, **lengths), expected)
    qkv = torch.randn(8, 3, 2, 16)
    expected = flash_attn_varlen_qkvpacked_func(qkv, bounds(3, 5), 5)
    found = flash_attn_varlen_qkvpacked_func(qkv, bounds(3, 5), torch.tensor(5))
    assert torch.equal(found, expected)


def test_other_strides_of_the_last_dimension_are_copied():
    q = torch.randn(1, 4, 16, 2).mT
    assert torch.equal(flash_attn_func(q, q, q), flash_attn_func(*[q.contiguous()] * 3))


def test_meta_tensors_give_shapes():
    q, k = torch.empty(2, 4, 4, 16, device="meta"), torch.empty(2, 6, 2, 16, device="meta")
    out, lse, _ = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", q.shape, (2, 4, 4))
    for device in ("cpu", "meta", "meta"):  # also where the same call was seen before
        given = [torch.ones_like(x, device=device, requires_grad=True) for x in (q, k, k)]
        flash_attn_func(*given).sum().backward()
        assert [x.grad.device.type for x in given] == [device] * 3


def test_one_meta_tensor_among_others_is_refused():
    q, k = zeros(2, 4, 4, 16), zeros(2, 6, 2, 16)
    for given in ((q, k.to("meta"), k), (q, k, k.to("meta"))):
        for more in ({}, {"s_aux": zeros(4)}):
            with pytest.raises(ConstraintError, match="`[kv]` must be on cpu like `q`, found meta"):
                flash_attn_func(*given, **more)


# 2000 random wrong calls

WRONG_TENSORS = [
    lambda x, draw: x.to(draw.choice([torch.int32, torch.float16, torch.complex64, torch.bool])),
    lambda x, draw: x.unsqueeze(draw.randrange(x.dim() + 1)),
    lambda x, draw: x.select(draw.randrange(x.dim()), 0),
    lambda x, draw: torch.cat([x, x], dim=draw.randrange(x.dim())),
    lambda x, draw: x.narrow(draw.randrange(x.dim()), 0, 0),
    lambda x, draw: x.to("meta"),
    lambda x, draw: draw.choice([None, 3, "text", [1, 2], 2.5, {}, object()]),
    lambda x, draw: x.new_zeros(()),
    lambda x, draw: x.transpose(0, -1),
]
WRONG_NUMBERS = [-1, -5, 1.0, 1.5, float("nan"), float("inf"), 10**30, None, "x", [], (), (1,), {}]


def wrong_call(draw):
    """A random function with one to three of its arguments replaced; some end up valid."""
    q, k = torch.randn(2, 4, 4, 16), torch.randn(2, 6, 2, 16)
    flat_q, flat_k = torch.randn(8, 4, 16), torch.randn(11, 2, 16)
    lengths = {
        "cu_seqlens_q": bounds(3, 5),
        "cu_seqlens_k": bounds(4, 7),
        "max_seqlen_q": 5,
        "max_seqlen_k": 7,
    }
    scores = {"dropout_p": 0.0, "softcap": 0.0, "window_size": (-1, -1), "softmax_scale": 0.25}
    scores |= {"alibi_slopes": torch.rand(4)}
    cache = {"q": torch.randn(2, 1, 4, 16), "k_cache": k.clone(), "v_cache": k.clone()}
    cache |= {"cache_seqlens": torch.tensor([3, 4], dtype=INT), "num_splits": 0}
    cache |= {"cache_batch_idx": torch.tensor([1, 0], dtype=INT)}
    added = {"k": torch.randn(2, 1, 2, 16), "v": torch.randn(2, 1, 2, 16)}
    rotary = {"rotary_cos": torch.randn(6, 8), "rotary_sin": torch.randn(6, 8)}
    pages = {"block_table": torch.tensor([[0], [1]], dtype=INT)}
    function, given = draw.choice(
        [
            (flash_attn_func, {"q": q, "k": k, "v": k, **scores}),
            (flash_attn_qkvpacked_func, {"qkv": torch.randn(2, 4, 3, 4, 16), **scores}),
            (flash_attn_kvpacked_func, {"q": q, "kv": torch.randn(2, 6, 2, 2, 16), **scores}),
            (flash_attn_varlen_func, {"q": flat_q, "k": flat_k, "v": flat_k, **lengths, **scores}),
            (
                flash_attn_varlen_qkvpacked_func,
                {
                    "qkv": torch.randn(8, 3, 4, 16),
                    "cu_seqlens": bounds(3, 5),
                    "max_seqlen": 5,
                    **scores,
                },
            ),
            (
                flash_attn_varlen_kvpacked_func,
                {"q": flat_q, "kv": torch.randn(11, 2, 2, 16), **lengths, **scores},
            ),
            (flash_attn_with_kvcache, cache),
            (flash_attn_with_kvcache, cache | added | rotary),
            (
                flash_attn_with_kvcache,
                {name: x for name, x in cache.items() if name != "cache_batch_idx"} | pages,
            ),
        ]
    )
    for name in draw.sample(list(given), draw.choice([1, 1, 2, 3])):
        if isinstance(given[name], torch.Tensor):
            given[name] = draw.choice(WRONG_TENSORS)(given[name], draw)
        else:
            given[name] = draw.choice(WRONG_NUMBERS)
    return function, given


def describe(given):
    return {
        name: (x.dtype, tuple(x.shape), x.device.type) if isinstance(x, torch.Tensor) else x
        for name, x in given.items()
    }


def fuzz(count, seed):
    """Run ``count`` random calls; returns (how many raised, descriptions of foreign errors)."""
    draw, raised, foreign = random.Random(seed), 0, []
    for _ in range(count):
        function, given = wrong_call(draw)
        try:
            function(**given)
        except FlashAttentionError:
            raised += 1
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else ""
            foreign.append(f"{function.__name__} {type(error).__name__}: {text} {describe(given)}")
    return raised, foreign


def test_random_wrong_calls_raise_our_exceptions_only():
    raised, foreign = fuzz(2000, seed=1)
    assert foreign == [], f"{len(foreign)} foreign errors:\n" + "\n".join(foreign[:20])
    assert raised > 1200


OPTIMISED = """
import sys
sys.path.insert(0, sys.argv[1])
import pytest, torch
assert False, "this line is not run under -O"
import test_bad_input as t
bad = []
for function, changes, words in t.TABLE:
    try:
        function(**changes)
        bad.append(words)
    except t.ConstraintError as error:
        if any(word not in str(error) for word in words):
            bad.append((words, str(error)))
raised, foreign = t.fuzz(200, seed=2)
if bad or foreign or raised < 100:
    sys.exit(f"{bad} {foreign[:5]} {raised}")
"""


def test_the_same_under_python_optimisation():
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-O", "-W", "ignore", "-c", OPTIMISED, str(Path(__file__).parent)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
