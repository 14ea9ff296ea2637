"""FlashAttention-3's functions against the reference in float64 and the error budget.

A call is written as a problem, translated here into the functions' arguments, and what comes back
is held against the problem's meaning. The caches have a file of their own.
"""

from __future__ import annotations

from typing import Any

import pytest
import support
import torch
from support import DTYPES, some
from test_extensions import FLOAT8, Call, check, dense, ints, paged, varlen
from torch import Tensor

import flash_attn
import flash_attn_interface as fa3
from flash_attn.core.problem import AttentionProblem, ScoreTransform, Visibility
from flash_attn.errors import ConstraintError
from flash_attn.quantize import quantize_fp8

pytestmark = pytest.mark.families

INF = float("inf")


def arguments_of(problem: AttentionProblem) -> dict[str, Any]:
    """The keywords of ``flash_attn_func`` and ``flash_attn_varlen_func`` for ``problem``."""
    transform, (left, right, chunk) = problem.transform, problem.visibility
    arguments: dict[str, Any] = {
        "softmax_scale": transform.softmax_scale,
        "qv": problem.qv,
        "q_descale": transform.q_descale,
        "k_descale": transform.k_descale,
        "v_descale": transform.v_descale,
        "window_size": (-1 if left is None else left, -1 if right is None else right),
        "attention_chunk": chunk,
        "softcap": transform.softcap,
        "num_splits": problem.num_splits,
        "pack_gqa": problem.pack_gqa,
        "sm_margin": problem.sm_margin,
        "s_aux": transform.sinks,
        "attn_mask": transform.attn_mask,
    }
    return arguments


def lengths_of(problem: AttentionProblem) -> dict[str, Any]:
    """The keywords that ``flash_attn_varlen_func`` takes besides."""
    layout = problem.layout
    return {
        "cu_seqlens_q": layout.cu_seqlens_q,
        "cu_seqlens_k": layout.cu_seqlens_k,
        "max_seqlen_q": None if layout.cu_seqlens_q is None else layout.max_seqlen_q,
        "max_seqlen_k": None if layout.cu_seqlens_k is None else layout.max_seqlen_k,
        "seqused_q": layout.seqused_q,
        "seqused_k": layout.seqused_k,
    }


def run(call: Call, backward: bool = True, **changes: Any) -> dict[str, Tensor]:
    """Through the public function and autograd; ``changes`` replace arguments."""
    problem = call.problem
    copy, leaves = support.with_leaves(problem) if backward else (problem, {})
    arguments = arguments_of(copy)
    function: Any = fa3.flash_attn_func
    if any(x is not None for x in (*problem.layout[:3], problem.layout.seqused_q)):
        function, arguments = fa3.flash_attn_varlen_func, arguments | lengths_of(problem)
    arguments |= changes
    out, lse = function(copy.q, copy.k, copy.v, **arguments, return_attn_probs=True)
    state = torch.zeros(2, dtype=torch.int64, device=problem.q.device)
    answer = {"out": out.detach(), "lse": lse.detach(), "rng_state": state}
    if not backward:
        return answer
    outputs, douts = [out], [call.dout]
    if call.dlse is not None:
        outputs, douts = [out, lse], [call.dout, call.dlse]
    grads = torch.autograd.grad(outputs, leaves.values(), douts)
    return answer | dict(zip(leaves, grads, strict=True))


def run_and_check(call: Call, backward: bool = True, **changes: Any) -> dict[str, Tensor]:
    """The rows that see no key have -inf here, as the problem must say."""
    call = call.but(empty_lse=-INF)
    got = run(call, backward, **changes)
    check(call, got)
    return got


# Dense -------------------------------------------------------------------------------------------

MASKS = {
    "full": Visibility(),
    "causal": Visibility(None, 0),
    "window": Visibility(9, 4),
    "left": Visibility(5, None),
    "chunk": Visibility(None, None, 16),
    "causal chunk": Visibility(None, 0, 13),
    "window chunk": Visibility(9, 0, 24),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", some(list(MASKS), ["causal", "window chunk"]))
def test_masks(device: str, dtype: torch.dtype, mask: str) -> None:
    run_and_check(dense(device, dtype, visibility=MASKS[mask]))


def test_causal_replaces_the_right_limit(device: str) -> None:
    call = dense(device, torch.float32, visibility=Visibility(7, 0))
    run_and_check(call, causal=True, window_size=(7, 30))
    run_and_check(call, causal=True, window_size=torch.tensor([7, -1]))


@pytest.mark.parametrize("seqlens", some([(1, 1), (3, 70), (70, 3), (97, 113)], [(7, 3)]), ids=str)
@pytest.mark.parametrize("mask", ["causal", "window", "causal chunk"])
def test_lengths(device: str, mask: str, seqlens: tuple[int, int]) -> None:
    run_and_check(dense(device, torch.float32, seqlens, visibility=MASKS[mask]))


@pytest.mark.parametrize("heads", some([(1, 1), (4, 4), (6, 2), (5, 1)], [(6, 2)]), ids=str)
@pytest.mark.parametrize("headdim", some([8, 59, 64, 128, 256], [59]))
def test_heads(device: str, headdim: int, heads: tuple[int, int]) -> None:
    """Odd head dims, which upstream refuses, too."""
    visibility = MASKS["causal"]
    run_and_check(
        dense(device, torch.float16, (17, 33), heads=heads, headdim=headdim, visibility=visibility)
    )


@pytest.mark.parametrize("headdims", some([(192, 128), (64, 512), (40, 24)], [(40, 24)]), ids=str)
def test_head_dims_of_v(device: str, headdims: tuple[int, int]) -> None:
    headdim, headdim_v = headdims
    call = dense(
        device, torch.float16, (17, 33), headdim=headdim, headdim_v=headdim_v,
        visibility=MASKS["causal"],
    )  # fmt: skip
    got = run_and_check(call)
    assert got["out"].shape == (2, 17, 4, headdim_v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_and_softcap(device: str, dtype: torch.dtype) -> None:
    transform = ScoreTransform(0.3, softcap=2.0)
    run_and_check(dense(device, dtype, transform=transform, visibility=MASKS["causal"]))


def test_numbers_may_be_tensors(device: str) -> None:
    call = dense(device, torch.float32, transform=ScoreTransform(0.25, softcap=2.0))
    changes = {"softmax_scale": torch.tensor(0.25), "softcap": torch.tensor(2.0)}
    run_and_check(call, **changes)


def test_the_default_scale(device: str) -> None:
    call = dense(device, torch.float32, headdim=40, softmax_scale=40**-0.5)
    run_and_check(call, softmax_scale=None)
    qv = torch.randn(2, 40, 4, 24, device=device)
    call = dense(device, torch.float32, headdim=40, headdim_v=24, qv=qv, softmax_scale=64**-0.5)
    run_and_check(call, backward=False, softmax_scale=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_lse(device: str, dtype: torch.dtype) -> None:
    dlse = torch.randn(2, 4, 40, device=device)
    run_and_check(dense(device, dtype, dlse=dlse, visibility=MASKS["causal"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_and_masks(device: str, dtype: torch.dtype) -> None:
    """Both with gradients, the bias broadcast over heads."""
    sinks, bias = torch.randn(4, device=device), torch.randn(2, 1, 40, 72, device=device)
    call = dense(device, dtype, visibility=MASKS["window"], sinks=sinks)
    run_and_check(call)
    run_and_check(call.but(attn_mask=bias))
    run_and_check(call.but(attn_mask=bias > 0, sinks=None))


def test_positional_order(device: str) -> None:
    """Every argument of ``flash_attn_func`` by position."""
    call = dense(device, torch.float32, softmax_scale=0.2, visibility=Visibility(9, 0, 24),
                 softcap=3.0, empty_lse=-INF)  # fmt: skip
    problem = call.problem
    out, lse = fa3.flash_attn_func(
        problem.q, problem.k, problem.v, 0.2, True, None, None, None, None, (9, 5), 24, 3.0, 3,
        True, True, 2, True,
    )  # fmt: skip
    state = torch.zeros(2, dtype=torch.int64, device=device)
    check(call, {"out": out, "lse": lse, "rng_state": state})


# Packed in one tensor ----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_qkvpacked(device: str, heads: tuple[int, int]) -> None:
    """One tensor of five dimensions, or of four with ``num_heads_q``; one gradient."""
    call = dense(device, torch.float16, (40, 40), heads=heads, visibility=MASKS["causal chunk"])
    want = run(call)
    tensors, num_heads_q = call.problem[:3], None
    if heads == (4, 4):
        packed = torch.stack(tensors, 2)
    else:
        packed, num_heads_q = torch.cat(tensors, 2), 4
    packed.requires_grad_()
    out, lse = fa3.flash_attn_qkvpacked_func(
        packed, causal=True, attention_chunk=13, num_heads_q=num_heads_q, return_attn_probs=True
    )
    (grad,) = torch.autograd.grad(out, packed, call.dout)
    grads = grad.unbind(2) if num_heads_q is None else grad.split([4, 2, 2], 2)
    for name, x in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True):
        assert torch.equal(x, want[name]), name


def test_qkvpacked_takes_all_options(device: str) -> None:
    call = dense(device, torch.float32, (40, 40), (4, 4), visibility=Visibility(9, 3),
                 softcap=3.0, softmax_scale=0.4, empty_lse=-INF)  # fmt: skip
    packed = torch.stack(call.problem[:3], 2)
    out, lse = fa3.flash_attn_qkvpacked_func(
        packed, 0.4, False, None, None, None, (9, 3), 0, 3.0, True, None, 1, True
    )
    state = torch.zeros(2, dtype=torch.int64, device=device)
    check(call, {"out": out, "lse": lse, "rng_state": state})
    assert torch.equal(fa3.flash_attn_qkvpacked_func(packed, 0.4, window_size=(9, 3), softcap=3.0),
                       out)  # fmt: skip


# Sequences of different lengths ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", some(list(MASKS), ["causal", "causal chunk"]))
def test_packed_sequences(device: str, dtype: torch.dtype, mask: str) -> None:
    """Empty ones in all places, more queries than keys, rows of no sequence."""
    lengths = ([0, 17, 5, 0, 30, 1], [3, 17, 0, 0, 21, 40])
    got = run_and_check(varlen(device, dtype, *lengths, visibility=MASKS[mask]))
    assert got["lse"].shape == (4, 56)


@pytest.mark.parametrize("used", ["q", "k", "qk"])
@pytest.mark.parametrize("packed", [True, False])
def test_used_lengths(device: str, packed: bool, used: str) -> None:
    """``seqused_q`` and ``seqused_k`` shorten packed and padded sequences alike."""
    more: dict[str, Any] = {"visibility": MASKS["causal"]}
    if "q" in used:
        more["seqused_q"] = ints(device, 5, 0, 11)
    if "k" in used:
        more["seqused_k"] = ints(device, 20, 7, 0)
    if packed:
        call = varlen(device, torch.float16, [9, 4, 11], [20, 30, 8], **more)
    else:
        call = dense(device, torch.float16, (11, 30), batch=3, **more)
    run_and_check(call)


def test_seqused_beyond_the_lengths_changes_nothing(device: str) -> None:
    call = varlen(device, torch.float32, [9, 4], [20, 30], visibility=MASKS["causal"])
    want = run(call)
    far = ints(device, 2**31 - 1, 1000)
    got = run(call.but(seqused_q=far, seqused_k=far))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_packed_queries_of_padded_keys(device: str) -> None:
    """Bounds of the queries alone: k has a batch dimension, shortened by ``seqused_k``."""
    keys = dense(device, torch.float32, (1, 30), batch=3).problem
    call = varlen(device, torch.float32, [9, 4, 11], [1, 1, 1], visibility=MASKS["causal"])
    call = call.but(k=keys.k, v=keys.v, cu_seqlens_k=None, max_seqlen_k=0,
                    seqused_k=ints(device, 30, 7, 0))  # fmt: skip
    run_and_check(call, backward=False)


def test_length_bounds_may_be_tensors_or_wrong(device: str) -> None:
    """Bit by bit; with fewer key heads a bound may decide whether heads share a tile."""
    lengths, visibility = ([9, 4, 11], [20, 30, 8]), MASKS["causal"]
    call = varlen(device, torch.float32, *lengths, heads=(2, 2), visibility=visibility)
    want = run(call)
    for bound in (torch.tensor(30), torch.tensor(30, device=device), 30, 1000):
        got = run(call, max_seqlen_q=bound, max_seqlen_k=bound)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_strided_indices(device: str) -> None:
    call = varlen(device, torch.float32, [9, 4], [20, 30], seqused_k=ints(device, 3, 20))
    want = run(call)
    layout = call.problem.layout
    strided = {
        name: torch.stack([x, x], 1)[:, 0]
        for name, x in lengths_of(call.problem).items()
        if isinstance(x, Tensor)
    }
    assert len(strided) == 3
    assert layout.seqused_q is None
    got = run(call, **strided)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_sinks_and_masks_of_packed_sequences(device: str) -> None:
    sinks, bias = torch.randn(4, device=device), torch.randn(1, 4, 17, 40, device=device)
    call = varlen(device, torch.float32, [0, 17, 5], [3, 17, 40], sinks=sinks, attn_mask=bias)
    run_and_check(call)


# float8 ------------------------------------------------------------------------------------------


def descales(device: str, batch: int = 2, heads: int = 2) -> dict[str, Tensor]:
    """Three tensors whose strides all differ: rows, columns, and one number for all."""
    whole = 0.5 + torch.rand(heads, 2 * batch, device=device)
    return {
        "q_descale": whole[:, ::2].T,
        "k_descale": torch.rand(batch, heads, device=device) + 0.5,
        "v_descale": torch.full((1, 1), 0.7, device=device).expand(batch, heads),
    }


@pytest.mark.parametrize("mask", some(["full", "causal", "chunk"], ["causal"]))
@pytest.mark.parametrize("headdim", some([32, 64, 128, 256], [64]))
def test_float8(device: str, headdim: int, mask: str) -> None:
    call = dense(device, FLOAT8, headdim=headdim, visibility=MASKS[mask], **descales(device))
    got = run_and_check(call, backward=False)
    assert got["out"].dtype == torch.bfloat16


def test_float8_without_descales_and_of_other_head_dims(device: str) -> None:
    run_and_check(dense(device, FLOAT8), backward=False)
    one = torch.ones(2, 2, device=device)
    call = dense(device, FLOAT8, headdim_v=16)
    want = run(call, backward=False)
    got = run(call.but(q_descale=one, k_descale=one, v_descale=one), backward=False)
    assert torch.equal(got["out"], want["out"])


def test_float8_of_packed_sequences(device: str) -> None:
    call = varlen(device, FLOAT8, [0, 17, 5], [3, 17, 40], visibility=MASKS["causal"],
                  **descales(device, 3))  # fmt: skip
    run_and_check(call, backward=False)


def test_float8_values_in_columns(device: str) -> None:
    """V may lie with its rows together."""
    call = dense(device, FLOAT8, (40, 64), **descales(device))
    want = run(call, backward=False)
    v = call.problem.v.view(torch.uint8).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    got = run(call.but(v=v.view(FLOAT8)), backward=False)
    assert torch.equal(got["out"], want["out"])


def test_float8_from_the_quantiser(device: str) -> None:
    """Its results are the function's arguments by name."""
    call = dense(device, torch.float16, headdim=64, visibility=MASKS["causal"])
    want = fa3.flash_attn_func(*call.problem[:3], causal=True)
    q, k, v, *factors = quantize_fp8(*call.problem[:3], hadamard=True)
    named = dict(zip(("q_descale", "k_descale", "v_descale"), factors, strict=True))
    out = fa3.flash_attn_func(q, k, v, causal=True, **named)
    error = torch.linalg.vector_norm(out.double() - want.double())
    assert error <= 0.06 * torch.linalg.vector_norm(want.double())


def test_float8_has_no_gradient(device: str) -> None:
    call = dense(device, FLOAT8)
    q = call.problem.q.requires_grad_()
    with pytest.raises(RuntimeError, match="`q` has dtype float8_e4m3fn"):
        fa3.flash_attn_func(q, call.problem.k, call.problem.v).sum().backward()


# A second product --------------------------------------------------------------------------------


@pytest.mark.parametrize("headdims", some([(64, 512), (64, 256), (32, 40)], [(32, 40)]), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qv(device: str, dtype: torch.dtype, headdims: tuple[int, int]) -> None:
    headdim, headdim_v = headdims
    call = dense(device, dtype, (17, 40), (4, 1), headdim, headdim_v, visibility=MASKS["causal"])
    qv = support.draw("gaussian", (2, 17, 4, headdim_v), "q").to(dtype).to(device)
    scale = (headdim + headdim_v) ** -0.5
    run_and_check(call.but(qv=qv, softmax_scale=scale), backward=False)


def test_qv_of_packed_queries(device: str) -> None:
    call = varlen(device, torch.float32, [0, 17, 5], [3, 17, 40], headdim_v=48)
    qv = torch.randn(25, 4, 48, device=device)
    run_and_check(call.but(qv=qv), backward=False)


def test_qv_has_no_gradient(device: str) -> None:
    q, k, v = (torch.randn(1, 4, 2, 16, device=device, requires_grad=True) for _ in range(3))
    out = fa3.flash_attn_func(q, k, v, qv=torch.randn(1, 4, 2, 16, device=device))
    with pytest.raises(ConstraintError, match="`qv`"):
        out.sum().backward()


# Hints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits(device: str, dtype: torch.dtype) -> None:
    seqlens = support.pick(device, (3, 300), (5, 3000))
    call = dense(device, dtype, seqlens, visibility=MASKS["causal"])
    for splits in some([0, 1, 3, 256], [0, 3]):
        run_and_check(call.but(num_splits=splits))


@pytest.mark.parametrize("pack_gqa", [True, False, None])
def test_pack_gqa(device: str, pack_gqa: bool | None) -> None:
    call = dense(device, torch.float16, (3, 72), (8, 2), visibility=MASKS["causal"])
    run_and_check(call.but(pack_gqa=pack_gqa))


def test_sm_margin_and_deterministic(device: str) -> None:
    call = dense(device, torch.float16, visibility=MASKS["causal"])
    want = run(call)
    got = run(call.but(sm_margin=7), deterministic=True)
    assert all(torch.equal(got[name], want[name]) for name in want)


# Rows without keys -------------------------------------------------------------------------------


def test_rows_without_keys(device: str) -> None:
    """0 and -inf, and no gradient."""
    call = dense(device, torch.float32, (40, 8), visibility=MASKS["causal"])
    got = run_and_check(call)
    assert not got["out"][:, :32].any()
    assert bool((got["lse"][..., :32] == -INF).all())
    assert not got["dq"][:, :32].any()


@pytest.mark.parametrize("packed", [False, True])
def test_no_keys_at_all(device: str, packed: bool) -> None:
    """+inf where k has no elements."""
    if packed:
        call = varlen(device, torch.float32, [3, 4], [0, 0], padding=0)
    else:
        call = dense(device, torch.float32, (7, 0))
    got = run(call)
    assert not got["out"].any()
    assert bool((got["lse"] == INF).all())
    assert not got["dq"].any()
    assert got["dk"].shape == call.problem.k.shape


def test_no_queries_and_no_sequences(device: str) -> None:
    for call in (dense(device, torch.float32, (0, 7)), dense(device, torch.float32, batch=0)):
        got = run(call)
        assert got["out"].shape == call.problem.q.shape
        assert not got["dk"].any()


def test_empty_sequences_among_others(device: str) -> None:
    """-inf where only a sequence has no key."""
    got = run_and_check(varlen(device, torch.float32, [3, 4], [0, 9], padding=0))
    assert bool((got["lse"][:, :3] == -INF).all())


# Returns -----------------------------------------------------------------------------------------


def test_returns(device: str) -> None:
    q = torch.randn(2, 5, 4, 16, device=device)
    bounds = ints(device, 0, 2, 5)
    assert isinstance(fa3.flash_attn_func(q, q, q), Tensor)
    assert isinstance(fa3.flash_attn_varlen_func(q[0], q[0], q[0], bounds, bounds, 3, 3), Tensor)
    assert isinstance(fa3.flash_attn_qkvpacked_func(torch.stack([q] * 3, 2)), Tensor)
    both = fa3.flash_attn_func(q, q, q, return_attn_probs=True)
    assert isinstance(both, tuple)
    assert [x.shape for x in both] == [q.shape, (2, 4, 5)]
    assert both[1].dtype == torch.float32
    both = fa3.flash_attn_varlen_func(
        q[0], q[0], q[0], bounds, bounds, 3, 3, return_attn_probs=True
    )
    assert [x.shape for x in both] == [(5, 4, 16), (4, 5)]


def test_nothing_is_saved_without_a_gradient(device: str) -> None:
    q = torch.randn(2, 5, 4, 16, device=device)
    assert fa3.flash_attn_func(q, q, q).grad_fn is None
    q.requires_grad_()
    with torch.no_grad():
        assert fa3.flash_attn_func(q, q, q).grad_fn is None
    assert fa3.flash_attn_func(q, q, q).grad_fn is not None


def test_autocast(device: str) -> None:
    q = torch.randn(2, 5, 4, 16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = fa3.flash_attn_func(q, q, q, qv=q)
        packed = fa3.flash_attn_qkvpacked_func(torch.stack([q] * 3, 2))
    assert out.dtype == packed.dtype == torch.bfloat16
    low = q.bfloat16()
    assert torch.equal(out, fa3.flash_attn_func(low, low, low, qv=low))


def test_upstream_class_names(device: str) -> None:
    """``apply`` takes the order of the autograd functions, where seqused stands before max."""
    call = varlen(device, torch.float32, [9, 4], [20, 30], seqused_k=ints(device, 3, 20))
    want, (q, k, v), layout = run(call, backward=False), call.problem[:3], call.problem.layout
    scale = call.problem.transform.softmax_scale
    out = fa3.FlashAttnVarlenFunc.apply(
        q, k, v, layout.cu_seqlens_q, layout.cu_seqlens_k, None, layout.seqused_k,
        layout.max_seqlen_q, layout.max_seqlen_k, scale, False, None, None, None, None, (-1, -1),
        0, 0.0, 1, None, False, 0, False,
    )  # fmt: skip
    assert torch.equal(out, want["out"])
    q = torch.randn(2, 5, 4, 16, device=device)
    out, lse = fa3.FlashAttnFunc.apply(
        q, q, q, None, True, None, None, None, None, (3, 0), 0, 0.0, 1, None, False, 0, True
    )
    want = fa3.flash_attn_func(q, q, q, causal=True, window_size=(3, 0), return_attn_probs=True)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    packed = torch.stack([q] * 3, 2)
    out = fa3.FlashAttnQKVPackedFunc.apply(
        packed, None, True, None, None, None, (3, 0), 0, 0.0, False, None, 0, False
    )
    assert torch.equal(out, want[0])


def test_small_helpers() -> None:
    x = torch.zeros(4, 6)
    assert fa3.maybe_contiguous(None) is None
    assert fa3.maybe_contiguous(x) is x
    assert fa3.maybe_contiguous(x.T).stride() == (4, 1)
    assert [fa3.round_multiple(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
    classes = {1: 64, 64: 64, 65: 96, 97: 128, 129: 192, 192: 192, 193: 256, 256: 256}
    assert {n: fa3.round_up_headdim(n) for n in classes} == classes


# The private functions ---------------------------------------------------------------------------


def test_private_forward_and_backward(device: str) -> None:
    """Four results; gradients go into buffers of any strides, and softmax_d comes back."""
    call = dense(device, torch.float16, visibility=Visibility(9, 0), softcap=2.0, empty_lse=-INF)
    (q, k, v), scale = call.problem[:3], call.problem.transform.softmax_scale
    out, lse, out_accum, lse_accum = fa3._flash_attn_forward(
        q, k, v, softmax_scale=scale, causal=True, window_size_left=9, softcap=2.0
    )
    assert out_accum.numel() == lse_accum.numel() == 0
    dkv = torch.full((2, 72, 2, 2, 32), float("nan"), device=device).half()
    dq = torch.full((2, 4, 40, 32), float("nan"), device=device).half().transpose(1, 2)
    softmax_d = fa3._flash_attn_backward(
        call.dout, q, k, v, out, lse, dq=dq, dk=dkv[:, :, 0], dv=dkv[:, :, 1], softmax_scale=scale,
        is_causal=True, window_size_left=9, softcap=2.0, deterministic=True, sm_margin=1,
    )  # fmt: skip
    state = torch.zeros(2, dtype=torch.int64, device=device)
    got = {"out": out, "lse": lse, "rng_state": state}
    check(call, got | {"dq": dq, "dk": dkv[:, :, 0], "dv": dkv[:, :, 1]})
    delta = (out.float() * call.dout.float()).sum(-1).transpose(1, 2)
    assert softmax_d.shape == (2, 4, 128)
    torch.testing.assert_close(softmax_d[..., :40], delta, atol=1e-3, rtol=1e-3)


def test_private_functions_on_packed_sequences(device: str) -> None:
    call = varlen(device, torch.float32, [9, 4], [20, 30], visibility=MASKS["causal"],
                  seqused_q=ints(device, 7, 4), seqused_k=ints(device, 3, 20),
                  empty_lse=-INF)  # fmt: skip
    (q, k, v), layout = call.problem[:3], call.problem.layout
    bounds = (layout.cu_seqlens_q, layout.cu_seqlens_k)
    longest = (layout.max_seqlen_q, layout.max_seqlen_k)
    scale = call.problem.transform.softmax_scale
    out, lse, *_ = fa3._flash_attn_forward(
        q, k, v, None, None, None, None, *bounds, None, layout.seqused_q, layout.seqused_k,
        *longest, softmax_scale=scale, causal=True,
    )  # fmt: skip
    grads = [support.poisoned_like(x) for x in (q, k, v)]
    fa3._flash_attn_backward(
        call.dout, q, k, v, out, lse, *bounds, layout.seqused_q, layout.seqused_k, *longest, *grads,
        scale, True,
    )  # fmt: skip
    state = torch.zeros(2, dtype=torch.int64, device=device)
    got = {"out": out, "lse": lse, "rng_state": state}
    check(call, got | dict(zip(("dq", "dk", "dv"), grads, strict=True)))


def test_private_forward_writes_into_out(device: str) -> None:
    call = dense(device, torch.float16)
    want = fa3._flash_attn_forward(*call.problem[:3])[0]
    buffer = torch.full((2, 4, 40, 32), float("nan"), device=device).half().transpose(1, 2)
    out, *_ = fa3._flash_attn_forward(*call.problem[:3], out_=buffer)
    assert out.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, want)


def test_private_forward_is_differentiable(device: str) -> None:
    """Also where trailing arguments have other than their default values."""
    for more in ({}, {"causal": True, "attention_chunk": 16}, {"sm_margin": 2, "num_splits": 3}):
        chunk = more.get("attention_chunk", 0)
        visibility = Visibility(None, 0 if more.get("causal") else None, chunk)
        call = dense(device, torch.float32, visibility=visibility)
        want = run(call)
        leaves = [x.clone().requires_grad_() for x in call.problem[:3]]
        out, lse, *_ = fa3._flash_attn_forward(*leaves, **more)
        assert not lse.requires_grad
        grads = torch.autograd.grad(out, leaves, call.dout)
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            support.assert_close(grad, want[name], torch.float32, name)


def test_private_forward_on_pages(device: str) -> None:
    """Packed queries over pages with lengths of their own, as servers call it."""
    call = dense(device, torch.float16, (1, 64), batch=3)
    used = ints(device, 64, 7, 30)
    call = paged(call.but(seqused_k=used, empty_lse=-INF), 4, [4, 0, 2])
    queries = varlen(device, torch.float16, [9, 4, 11], [1, 1, 1], padding=0)
    packed = queries.problem.layout
    call = call.but(q=queries.problem.q, dout=queries.dout, cu_seqlens_q=packed.cu_seqlens_q,
                    max_seqlen_q=11, visibility=MASKS["causal"])  # fmt: skip
    problem, layout = call.problem, call.problem.layout
    out, lse, *_ = fa3._flash_attn_forward(
        problem.q, problem.k, problem.v, cu_seqlens_q=layout.cu_seqlens_q, seqused_k=used,
        max_seqlen_q=11, page_table=layout.page_table, kv_batch_idx=layout.cache_batch_idx,
        causal=True, num_splits=0,
    )  # fmt: skip
    state = torch.zeros(2, dtype=torch.int64, device=device)
    check(call, {"out": out, "lse": lse, "rng_state": state})


# Errors ------------------------------------------------------------------------------------------


def q_k_v(**changes: Any) -> dict[str, Any]:
    tensors = {name: torch.zeros(2, 6, 4, 16) for name in ("q", "k", "v")}
    return tensors | changes


def packed_q_k_v(**changes: Any) -> dict[str, Any]:
    tensors = {name: torch.zeros(8, 4, 16) for name in ("q", "k", "v")}
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    lengths = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 5, "max_seqlen_k": 5}
    return tensors | lengths | changes


float8 = {name: torch.zeros(2, 6, 4, 16).to(FLOAT8) for name in ("q", "k", "v")}
WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (fa3.flash_attn_func, q_k_v(num_splits=257), "num_splits > 256 not supported.*257"),
    (fa3.flash_attn_func, q_k_v(num_splits=-1), "`num_splits`.*-1"),
    (fa3.flash_attn_func, q_k_v(num_splits=1.5), "`num_splits`.*1.5"),
    (fa3.flash_attn_func, q_k_v(pack_gqa="yes"), "`pack_gqa`.*'yes'"),
    (fa3.flash_attn_func, q_k_v(sm_margin=-2), "`sm_margin`.*-2"),
    (fa3.flash_attn_func, q_k_v(attention_chunk=-4), "`attention_chunk`.*-4"),
    (fa3.flash_attn_func, q_k_v(window_size=3), "`window_size`.*3"),
    (fa3.flash_attn_func, q_k_v(window_size=(1, 2, 3)), "`window_size`"),
    (fa3.flash_attn_func, q_k_v(softmax_scale="one"), "`softmax_scale`") ,
    (fa3.flash_attn_func, q_k_v(q=[1.0]), "`q` must be a torch.Tensor, found list"),
    (fa3.flash_attn_func, q_k_v(qv=1.0), "`qv` must be a torch.Tensor, found float"),
    (fa3.flash_attn_func, q_k_v(qv=torch.zeros(2, 6, 4, 8)), "`qv` must have shape"),
    (fa3.flash_attn_func, q_k_v(q=torch.zeros(2, 6, 4, 16).int()), "`q` has dtype int32"),
    (fa3.flash_attn_func, q_k_v(k=torch.zeros(2, 6, 4, 16).half()), "`q` and `k`.*float16"),
    (fa3.flash_attn_func, q_k_v(k=torch.zeros(2, 6, 3, 16), v=torch.zeros(2, 6, 3, 16)),
     "Number of heads in key/value must divide"),
    (fa3.flash_attn_func, q_k_v(v=torch.zeros(2, 5, 4, 16)), "`v` must have shape"),
    (fa3.flash_attn_func, q_k_v(q=torch.zeros(2, 6, 4, 264), k=torch.zeros(2, 6, 4, 264)),
     "head dimension at most 256: `q`"),
    (fa3.flash_attn_func, q_k_v(v=torch.zeros(2, 6, 4, 520)), "at most 512: `v`"),
    (fa3.flash_attn_func, q_k_v(q_descale=torch.ones(2, 4)), "`q_descale` is for float8"),
    (fa3.flash_attn_func, float8 | {"k_descale": torch.ones(2)}, "`k_descale` must have shape"),
    (fa3.flash_attn_func, float8 | {"v_descale": torch.ones(2, 3)}, "`v_descale`.*\\(2, 3\\)"),
    (fa3.flash_attn_func, float8 | {"q_descale": torch.ones(2, 4).int()}, "`q_descale`.*int32"),
    (fa3.flash_attn_func, float8 | {"q_descale": 1.0}, "`q_descale` must be a torch.Tensor"),
    (fa3.flash_attn_func, q_k_v(s_aux=torch.zeros(3)), "`s_aux`.*\\(3,\\)"),
    (fa3.flash_attn_func, q_k_v(attn_mask=torch.zeros(2, 4, 6, 5)), "`attn_mask` must have shape"),
    (fa3.flash_attn_varlen_func, packed_q_k_v(max_seqlen_q=None),
     "max_seqlen_q must be provided if cu_seqlens_q is provided"),
    (fa3.flash_attn_varlen_func, packed_q_k_v(max_seqlen_k=None),
     "max_seqlen_k must be provided if cu_seqlens_k is provided"),
    (fa3.flash_attn_varlen_func, packed_q_k_v(max_seqlen_q=-1), "`max_seqlen_q`.*-1"),
    (fa3.flash_attn_varlen_func, packed_q_k_v(seqused_q=torch.zeros(3).int()), "`seqused_q`"),
    (fa3.flash_attn_varlen_func, packed_q_k_v(seqused_k=torch.zeros(2)), "`seqused_k`.*int32"),
    (fa3.flash_attn_varlen_func, packed_q_k_v(seqused_k=3), "`seqused_k` must be a torch.Tensor"),
    (fa3.flash_attn_varlen_func, packed_q_k_v(cu_seqlens_q=torch.zeros(3)), "`cu_seqlens_q`"),
    (fa3.flash_attn_varlen_func, packed_q_k_v(cu_seqlens_k=torch.zeros(5).int()),
     "`cu_seqlens_k` must have shape"),
    (fa3.flash_attn_qkvpacked_func, {"qkv": torch.zeros(2, 6, 2, 4, 16)}, "`qkv` must have shape"),
    (fa3.flash_attn_qkvpacked_func, {"qkv": torch.zeros(2, 6, 8, 16)}, "`num_heads_q` is needed"),
    (fa3.flash_attn_qkvpacked_func, {"qkv": torch.zeros(2, 6, 8, 16), "num_heads_q": 3},
     "`num_heads_q` must leave an even number"),
    (fa3.flash_attn_qkvpacked_func, {"qkv": torch.zeros(2, 6, 8, 16), "num_heads_q": 8},
     "`num_heads_q` must leave"),
    (fa3.flash_attn_qkvpacked_func, {"qkv": torch.zeros(6, 8, 16)}, "`qkv` must have shape"),
    (fa3._flash_attn_forward, packed_q_k_v(page_table=torch.zeros(2, 2).int()),
     "If cu_seqlens_k is passed in, then page table is not supported.*`page_table`"),
    (fa3._flash_attn_forward, packed_q_k_v(kv_batch_idx=torch.zeros(2).int()),
     "If cu_seqlens_k is passed in"),
    (fa3._flash_attn_forward, q_k_v(page_table=torch.zeros(3, 2).int()),
     "`page_table` must have shape \\(2, 'any'\\)"),
    (fa3._flash_attn_forward, q_k_v(page_table=torch.zeros(2, 2)), "`page_table`.*int32"),
    (fa3._flash_attn_forward, q_k_v(scheduler_metadata=torch.zeros(2)), "`scheduler_metadata`"),
    (fa3._flash_attn_forward, q_k_v(out_=torch.zeros(2, 6, 4, 8)), "`out` must be float32"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "text"), WRONG, ids=[text for *_, text in WRONG])
def test_wrong_arguments(function: Any, arguments: dict[str, Any], text: str) -> None:
    for kind in (RuntimeError, AssertionError, ValueError):
        with pytest.raises(kind, match=text):
            function(**arguments)


def test_the_backward_pass_names_what_it_has_not(device: str) -> None:
    k = torch.zeros(4, 4, 2, 16, device=device)
    q = torch.zeros(2, 6, 2, 16, device=device, requires_grad=True)
    table = torch.zeros(2, 2, dtype=torch.int32, device=device)
    out, *_ = fa3._flash_attn_forward(q, k, k, page_table=table)
    with pytest.raises(ConstraintError, match="`block_table`"):
        out.sum().backward()


def test_a_backend_without_a_feature_says_so() -> None:
    """Nothing falls back silently."""
    q = torch.zeros(2, 6, 2, 16, dtype=torch.float16)
    with (
        flash_attn.use_backend("cuda"),
        pytest.raises(NotImplementedError, match="attention_chunk"),
    ):
        fa3.flash_attn_func(q, q, q, attention_chunk=4)
