"""What goes beyond FlashAttention-2's arguments, against the reference and the error budget.

Masks, sinks, chunks, used queries, a second product, head dims of v, float8, pages with padding and
cache rows, gradients of the log-sum-exp and of masks: each alone, in combinations, and with hostile
values. Results go into buffers full of NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import support
import torch
from support import DTYPES, cumulative, some
from torch import Tensor

from flash_attn.core.attend import attend, attend_backward
from flash_attn.core.problem import (
    AttentionProblem,
    AttentionResult,
    BackwardInputs,
    ScoreTransform,
    SequenceLayout,
    Visibility,
)
from flash_attn.core.problem_ops import solve

FLOAT8 = torch.float8_e4m3fn
NAN = float("nan")
_GROUPS = {"transform": ScoreTransform, "visibility": Visibility, "layout": SequenceLayout}


@dataclass(frozen=True)
class Call:
    """A problem and the gradients of its results."""

    problem: AttentionProblem
    dout: Tensor
    dlse: Tensor | None = None

    def but(self, **changes: Any) -> Call:
        """A copy with other fields of this class, of the problem, or of one of its groups."""
        own = {name: changes.pop(name) for name in ("dout", "dlse") if name in changes}
        problem = changes.pop("problem", self.problem)
        for group, kind in _GROUPS.items():
            inner = {name: changes.pop(name) for name in kind._fields if name in changes}
            problem = problem._replace(**{group: getattr(problem, group)._replace(**inner)})
        return replace(self, problem=problem._replace(**changes), **own)


def _rounded(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return x.to(dtype).to(device)


def dense(
    device: str,
    dtype: torch.dtype,
    seqlens: tuple[int, int] = (40, 72),
    heads: tuple[int, int] = (4, 2),
    headdim: int = 32,
    headdim_v: int | None = None,
    batch: int = 2,
    family: str = "gaussian",
    **more: Any,
) -> Call:
    """A call on (batch, seqlen, heads, headdim) tensors; ``more`` as for :meth:`Call.but`."""
    headdim_v = headdim if headdim_v is None else headdim_v
    shapes = {
        "q": (batch, seqlens[0], heads[0], headdim),
        "k": (batch, seqlens[1], heads[1], headdim),
        "v": (batch, seqlens[1], heads[1], headdim_v),
        "dout": (batch, seqlens[0], heads[0], headdim_v),
    }
    x = {name: support.draw(family, shape, name) for name, shape in shapes.items()}
    dout = _rounded(x.pop("dout"), torch.bfloat16 if dtype == FLOAT8 else dtype, device)
    q, k, v = (_rounded(value, dtype, device) for value in x.values())
    problem = AttentionProblem(q, k, v, ScoreTransform(headdim**-0.5))
    return Call(problem, dout).but(**more)


def varlen(
    device: str,
    dtype: torch.dtype,
    lengths_q: list[int],
    lengths_k: list[int],
    padding: int = 3,
    **more: Any,
) -> Call:
    """The same packed; ``padding`` rows that belong to no sequence follow the last one."""
    rows = (sum(lengths_q) + padding, sum(lengths_k) + padding)
    call = dense(device, dtype, rows, batch=1, **more)
    q, k, v = (x[0] for x in call.problem[:3])
    return call.but(
        q=q, k=k, v=v, dout=call.dout[0],
        cu_seqlens_q=cumulative(lengths_q, device), cu_seqlens_k=cumulative(lengths_k, device),
        max_seqlen_q=max(lengths_q), max_seqlen_k=max(lengths_k),
    )  # fmt: skip


def paged(call: Call, page_size: int, rows: list[int] | None = None) -> Call:
    """The same dense call with its keys on shuffled pages; ``rows``: of the table, by sequence."""
    k, v = call.problem.k, call.problem.v
    batch, capacity = k.shape[0], k.shape[1]
    assert capacity % page_size == 0
    rows = list(range(batch)) if rows is None else rows
    pages = capacity // page_size
    order = torch.randperm(batch * pages + 3)
    table = torch.full((max(rows) + 2, pages), 2**31 - 1, dtype=torch.int32)
    stored = []
    for x in (k, v):
        shape = (len(order), page_size, *x.shape[2:])
        to = torch.empty(shape, dtype=torch.float32).fill_(NAN)
        cut = x.cpu().float().view(batch * pages, page_size, *x.shape[2:])
        to[order[: batch * pages]] = cut
        stored.append(_rounded(to, x.dtype, str(x.device)))
    for b, row in enumerate(rows):
        table[row] = order[b * pages : (b + 1) * pages]
    identity = rows == list(range(batch))
    table = table[:batch] if identity else table
    index = None if identity else torch.tensor(rows, dtype=torch.int32, device=k.device)
    return call.but(k=stored[0], v=stored[1], page_table=table.to(k.device), cache_batch_idx=index)


def ints(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def run_forward(call: Call) -> AttentionResult:
    """Into a buffer full of NaN."""
    problem = call.problem
    shape, device = problem.out_shape, problem.q.device
    out = torch.full(shape, NAN, dtype=problem.result_dtype, device=device)
    result = attend(problem, out)
    assert result.out is out
    return result


def run(call: Call, backward: bool = True) -> dict[str, Tensor]:
    """Out, lse, rng_state and, if asked for, all gradients."""
    problem, transform = call.problem, call.problem.transform
    result = run_forward(call)
    answer = {"out": result.out, "lse": result.softmax_lse, "rng_state": result.rng_state}
    if not backward:
        return answer
    given = {"dq": problem.q, "dk": problem.k, "dv": problem.v}
    given |= {"dmask": transform.attn_mask, "dsinks": transform.sinks}
    grads = {
        name: support.poisoned_like(x)
        for name, x in given.items()
        if x is not None and x.dtype != torch.bool
    }
    inputs = BackwardInputs(
        call.dout, result.out, result.softmax_lse, grads["dq"], grads["dk"], grads["dv"],
        result.rng_state, call.dlse, grads.get("dmask"), grads.get("dsinks"),
    )  # fmt: skip
    attend_backward(problem, inputs)
    return answer | grads


def _floors(call: Call) -> dict[str, float]:
    """Float32's own rounding of each result, where values cancel."""
    problem, transform = call.problem, call.problem.transform
    finite = {
        name: x.double().nan_to_num(0.0, 0.0, 0.0)
        for name, x in (("q", problem.q), ("k", problem.k), ("v", problem.v), ("dout", call.dout))
    }
    rms = {name: float(x.square().mean().sqrt()) for name, x in finite.items()}
    eps = torch.finfo(torch.float32).eps
    width = max(problem.headdim, problem.headdim_v) ** 0.5
    ds = 8.0 * eps * max(rms["v"], 1.0) * max(rms["dout"], 1.0) * width
    if call.dlse is not None:
        ds += 8.0 * eps * float(call.dlse.abs().max())
    scale = max(abs(transform.softmax_scale), 0.1) * max(rms["q"], rms["k"], 1.0)
    rows = max(1, problem.q.shape[-3] // max(1, problem.k.shape[-3]))
    floors = {"out": 0.5 * eps * rms["v"], "dq": ds * scale, "dv": ds, "dsinks": ds}
    floors["dk"] = ds * scale * rows**0.5
    mask = transform.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        # A score's rounding grows with it; weights below exp(-20) do not count.
        floors["out"] *= 1.0 + float(
            mask.double().nan_to_num(0.0, 0.0, 0.0).clamp(-20.0, 20.0).abs().max()
        )
    for name, x in (("dmask", transform.attn_mask), ("dsinks", transform.sinks)):
        if x is not None:
            cells = problem.batch_size * problem.nheads * problem.max_seqlen_q
            cells *= problem.max_seqlen_k if name == "dmask" else 1
            floors[name] = ds * max(1.0, cells / max(1, x.numel())) ** 0.5
    return floors


def largest_value(problem: AttentionProblem) -> float:
    """The largest element of v, descaled."""
    descale = problem.transform.v_descale
    factor = 1.0 if descale is None else float(descale.abs().max())
    return factor * float(problem.v.float().nan_to_num(0.0, 0.0, 0.0).abs().max())


def check(
    call: Call, got: dict[str, Tensor], forward_factor: float = 2.0, float8_cuts: int = 1
) -> None:
    """Everything in ``got`` is within the error budget."""
    problem, backward = call.problem, "dq" in got
    with torch.no_grad() if not backward else torch.enable_grad():
        rng_state, dlse = got["rng_state"], call.dlse
        same = support.plain_answer(problem, call.dout, rng_state, dlse)
        true, owed = support.exact_answer(problem, call.dout, rng_state, got["out"], dlse)
    slack = support.float8_score_error(problem, float8_cuts)
    support.check_lse(got["lse"], true["lse"], slack)
    floors = _floors(call)
    names = [name for name in got if name not in ("lse", "rng_state")]
    # A score that is off by e moves a row by at most e |v - out|.
    peak = 0.0 if float8_cuts == 1 else 4.0 * slack / float8_cuts * largest_value(problem)
    for name in names:
        factor = forward_factor if name == "out" else 3.0
        tensors = (got[name], true[name], same[name])
        more = peak if name == "out" else 0.0
        support.check_error(name, *tensors, factor, floors[name], owed.get(name), more)
        if name in support.GRADIENT_NAMES:
            support.check_direction(name, *tensors, owed.get(name))


def run_and_check(call: Call, backward: bool = True) -> dict[str, Tensor]:
    got = run(call, backward)
    check(call, got)
    return got


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor], names: str = "") -> None:
    """Bitwise equality of two answers, infinities included; NaN equals nothing."""
    for name in names.split() or [name for name in a if name != "rng_state"]:
        assert torch.equal(a[name], b[name]), name


# Chunks ------------------------------------------------------------------------------------------

VISIBILITIES = [
    Visibility(None, None, 16),
    Visibility(None, 0, 13),
    Visibility(9, None, 70),
    Visibility(5, 3, 1),
    Visibility(None, 40, 64),
    Visibility(2**31 - 1, 7, 2**28),
]


@pytest.mark.families
@pytest.mark.parametrize("visibility", some(VISIBILITIES, VISIBILITIES[:5:2]), ids=str)
@pytest.mark.parametrize("seqlens", some([(40, 75), (75, 40), (64, 64)], [(40, 75), (75, 40)]))
@pytest.mark.parametrize("dtype", some(DTYPES, [torch.float32]))
def test_feature_chunks(
    device: str, dtype: torch.dtype, seqlens: tuple[int, int], visibility: Visibility
) -> None:
    run_and_check(dense(device, dtype, seqlens, visibility=visibility))


@pytest.mark.families
@pytest.mark.parametrize("chunk", [1, 7, 32, 64, 100])
@pytest.mark.parametrize("seqlens", [(19, 33), (33, 19), (130, 257)])
def test_every_chunk(device: str, seqlens: tuple[int, int], chunk: int) -> None:
    for left, right in ((None, None), (None, 0), (6, 2), (0, None)):
        call = dense(
            device, torch.float32, seqlens, heads=(1, 1), batch=1,
            visibility=Visibility(left, right, chunk),
        )  # fmt: skip
        run_and_check(call)


@pytest.mark.families
def test_feature_chunks_of_packed_sequences(device: str) -> None:
    call = varlen(device, support.HALF_DTYPES[-1], [5, 0, 40, 9], [33, 7, 20, 0])
    for visibility in (Visibility(None, None, 12), Visibility(None, 0, 5)):
        run_and_check(call.but(visibility=visibility))


@pytest.mark.families
@pytest.mark.parametrize("dtype", some(DTYPES, [torch.float16]))
def test_feature_keys_before_the_first_chunk_may_be_nan(device: str, dtype: torch.dtype) -> None:
    """Results equal those with zeros there, bit for bit, and the gradients there are 0."""
    for seqlens, visibility in (
        ((8, 100), Visibility(None, 0, 40)),  # first query at 92: its chunk starts at 80
        ((30, 100), Visibility(None, None, 65)),
        ((16, 140), Visibility(3, None, 50)),
    ):
        call = dense(device, dtype, seqlens, visibility=visibility)
        shift, chunk = seqlens[1] - seqlens[0], visibility.attention_chunk
        first = max(shift // chunk * chunk, shift - (visibility.window_left or shift))
        unseen = slice(0, first)
        assert first > 0
        clean, dirty = call, call
        for name in ("k", "v"):
            zeroed = getattr(call.problem, name).clone()
            zeroed[:, unseen] = 0
            clean = clean.but(**{name: zeroed})
            dirty = dirty.but(**{name: support.poison(zeroed, unseen, 1)})
        want, got = run(clean), run(dirty)
        assert_same_bits(got, want)
        assert not got["dk"][:, unseen].any()
        assert not got["dv"][:, unseen].any()


# Used queries ------------------------------------------------------------------------------------


def _with_rows(x: Tensor, keep: list[slice], value: float) -> Tensor:
    """``value`` everywhere but in the rows ``keep[b]`` of sequence b."""
    filled = torch.full_like(x, value)
    for b, rows in enumerate(keep):
        filled[b, rows] = x[b, rows]
    return filled


@pytest.mark.families
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", some(DTYPES, [torch.float32]))
def test_feature_used_queries(device: str, dtype: torch.dtype, causal: bool) -> None:
    """Rows past the used ones may hold NaN: they are rows of no sequence."""
    used_q, used_k = ints(device, 0, 17, 40), ints(device, 33, 72, 20)
    visibility = Visibility(None, 0 if causal else None)
    for seqused_k in (None, used_k):
        call = dense(
            device, dtype, batch=3, seqused_q=used_q, seqused_k=seqused_k, visibility=visibility
        )
        keep = [slice(0, int(n)) for n in used_q]
        results = []
        for value in (0.0, NAN):
            q = _with_rows(call.problem.q, keep, value)
            one = call.but(q=q, dout=_with_rows(call.dout, keep, value))
            if seqused_k is not None:
                keys = [slice(0, int(n)) for n in used_k]
                k, v = (_with_rows(x, keys, value) for x in call.problem[1:3])
                one = one.but(k=k, v=v)
            results.append(run(one))
            if value == 0.0:
                check(one, results[0])
        assert_same_bits(*results)
        for b, rows in enumerate(keep):
            assert not results[0]["out"][b, rows.stop :].any()
            assert not results[0]["dq"][b, rows.stop :].any()
            assert (results[0]["lse"][b, :, rows.stop :] == math.inf).all()
            if seqused_k is not None:
                assert not results[0]["dk"][b, int(used_k[b]) :].any()
                assert not results[0]["dv"][b, int(used_k[b]) :].any()


@pytest.mark.families
@pytest.mark.parametrize("dtype", some(DTYPES, [torch.float32]))
def test_feature_used_queries_of_packed_sequences(device: str, dtype: torch.dtype) -> None:
    call = varlen(
        device, dtype, [40, 7, 0, 21], [33, 70, 9, 5],
        seqused_q=ints(device, 11, 7, 0, 20), seqused_k=ints(device, 33, 40, 9, 0),
        visibility=Visibility(None, 0), empty_lse=-math.inf,
    )  # fmt: skip
    clean = run_and_check(call)
    q, k, v = (x.clone() for x in call.problem[:3])
    dout = call.dout.clone()
    for x in (q, dout):
        x[11:40] = NAN
        x[67:] = NAN
    for x in (k, v):
        x[73:103] = NAN
        x[112:] = NAN
    assert_same_bits(run(call.but(q=q, k=k, v=v, dout=dout)), clean)


@pytest.mark.families
@pytest.mark.parametrize("value", [-1, -(2**31), 41, 2**31 - 1])
def test_feature_hostile_used_lengths(device: str, value: int) -> None:
    """Clamped to what the tensors hold: below 0 is 0, beyond the end is the end."""
    call = dense(device, torch.float32, batch=2, visibility=Visibility(None, 0, 20))
    clamped = max(0, min(value, 40))
    got = run(call.but(seqused_q=ints(device, value, 9), seqused_k=ints(device, 50, value)))
    clamped_k = max(0, min(value, 72))
    want = run(call.but(seqused_q=ints(device, clamped, 9), seqused_k=ints(device, 50, clamped_k)))
    assert_same_bits(got, want)


@pytest.mark.parametrize("splits", [2, 7])
def test_feature_used_queries_with_splits(device: str, splits: int) -> None:
    used = ints(device, 3, 40)
    call = dense(device, torch.float32, seqused_q=used, num_splits=splits, empty_lse=-math.inf)
    run_and_check(call, backward=False)


# Masks -------------------------------------------------------------------------------------------


def additive(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], dead_rows: bool = True
) -> Tensor:
    """Random numbers with some -inf; one row of all -inf where the shape has rows."""
    mask = torch.randn(shape)
    mask[torch.rand(shape) < 0.2] = -math.inf
    if dead_rows and shape[-2] > 1:
        mask[..., shape[-2] // 2, :] = -math.inf
    if shape[-1] == 1 and shape[-2] == 1:
        mask = torch.randn(shape)
    return mask.to(dtype).to(device)


MASK_SHAPES = [
    (2, 4, 40, 72),
    (1, 1, 40, 72),
    (2, 1, 1, 72),
    (1, 4, 40, 1),
    (2, 4, 1, 1),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize("shape", MASK_SHAPES)
@pytest.mark.parametrize("dtype", some(DTYPES, [torch.float32]))
def test_feature_additive_masks(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    run_and_check(dense(device, dtype, attn_mask=additive(device, dtype, shape)))


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_feature_dtypes_of_masks(device: str, mask_dtype: torch.dtype) -> None:
    """The mask's dtype is independent of q's."""
    mask = additive(device, mask_dtype, (2, 1, 40, 72))
    got = run_and_check(dense(device, torch.float16, attn_mask=mask))
    assert got["dmask"].dtype == mask_dtype
    run_and_check(dense(device, torch.float32, attn_mask=mask))


@pytest.mark.parametrize("shape", some(MASK_SHAPES[:4], MASK_SHAPES[:3:2]))
@pytest.mark.parametrize("dtype", some(DTYPES, [torch.float32]))
def test_feature_bool_masks(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.7
    if shape[-2] > 1:
        mask[..., 3, :] = False
    run_and_check(dense(device, dtype, attn_mask=mask.to(device)))


def test_feature_masks_of_any_layout(device: str) -> None:
    """Expanded masks equal their copies; other strides may be compiled otherwise, so transposed and
    sliced ones are held to the error budget, their gradient with them."""
    full = additive(device, torch.float32, (2, 4, 40, 72), dead_rows=False)
    layouts = {
        "expanded": full[:1, :1].expand(2, 4, 40, 72),
        "transposed": full.transpose(-1, -2).contiguous().transpose(-1, -2),
        "sliced": torch.cat([full, full], dim=-1)[..., 36:108],
        "expanded keys": full[..., :1].expand(2, 4, 40, 72),
    }
    call = dense(device, torch.float32)
    for name, mask in layouts.items():
        if name in ("transposed", "sliced"):
            run_and_check(call.but(attn_mask=mask))
            continue
        got = run(call.but(attn_mask=mask))
        want = run(call.but(attn_mask=mask.contiguous()))
        assert_same_bits(got, want, "out lse dq dk dv")


@pytest.mark.parametrize("dtype", some(DTYPES, [torch.float32]))
def test_feature_masks_with_other_features(device: str, dtype: torch.dtype) -> None:
    mask = additive(device, torch.float32, (2, 4, 40, 72))
    call = dense(device, dtype, attn_mask=mask)
    for more in (
        {"visibility": Visibility(None, 0)},
        {"visibility": Visibility(9, 5, 30), "softcap": 3.0},
        {"alibi_slopes": support.alibi_slopes(device, 4), "softmax_scale": -0.2},
        {"dropout_p": 0.3},
        {"seqused_q": ints(device, 17, 40), "seqused_k": ints(device, 72, 31)},
    ):
        run_and_check(call.but(**more))


def test_feature_masks_of_packed_sequences(device: str) -> None:
    """Indexed by the position within each sequence; positions past the mask are not seen."""
    for shape in ((4, 4, 40, 70), (1, 1, 40, 70), (4, 1, 1, 70), (1, 4, 50, 90)):
        mask = additive(device, torch.float32, shape)
        call = varlen(
            device, torch.float32, [40, 7, 0, 21], [33, 70, 9, 0], attn_mask=mask,
            visibility=Visibility(None, None),
        )  # fmt: skip
        run_and_check(call)
        run_and_check(call.but(visibility=Visibility(None, 0)))


def test_feature_masks_smaller_than_the_sequences(device: str) -> None:
    """Where max_seqlen understates the lengths, the mask may be too small: nothing beyond it is
    seen, nor read."""
    call = varlen(device, torch.float32, [40, 30], [60, 20])
    for shape in ((2, 4, 16, 24), (2, 1, 16, 1), (1, 4, 1, 24)):
        mask = additive(device, torch.float32, shape, dead_rows=False)
        run_and_check(call.but(attn_mask=mask, max_seqlen_q=16, max_seqlen_k=24))
        seen = torch.ones(shape, dtype=torch.bool, device=device)
        run_and_check(call.but(attn_mask=seen, max_seqlen_q=16, max_seqlen_k=24))


@pytest.mark.parametrize("splits", [1, 3])
def test_feature_masks_over_caches(device: str, splits: int) -> None:
    """Key 0 of the mask is the first key in use, after left padding."""
    call = dense(
        device, torch.float32, (5, 64), num_splits=splits,
        attn_mask=additive(device, torch.float32, (2, 1, 5, 64)),
        leftpad_k=ints(device, 3, 0), seqused_k=ints(device, 60, 33),
        visibility=Visibility(None, 0),
    )  # fmt: skip
    run_and_check(call, backward=False)
    run_and_check(paged(call, 16), backward=False)


def test_feature_masked_sequences_are_what_lengths_are(device: str) -> None:
    """A bool mask of the lengths gives what ``seqused_k`` does."""
    used = ints(device, 50, 9)
    mask = torch.arange(72, device=device) < used[:, None, None, None]
    call = dense(device, torch.float32)
    masked, shortened = run(call.but(attn_mask=mask)), run(call.but(seqused_k=used))
    for name in ("out", "lse", "dq", "dk", "dv"):
        support.assert_close(masked[name], shortened[name], torch.float32, name)


# Sinks -------------------------------------------------------------------------------------------


@pytest.mark.families
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", some(DTYPES, [torch.float32]))
def test_feature_sinks(device: str, dtype: torch.dtype, splits: int) -> None:
    """Rows without keys have their sink as log-sum-exp."""
    sinks = (2.0 * torch.randn(4)).to(device)
    for sink_dtype in (torch.float32, torch.bfloat16):
        call = dense(
            device, dtype, (72, 40), sinks=sinks.to(sink_dtype), num_splits=splits,
            visibility=Visibility(None, 0),
        )  # fmt: skip
        got = run_and_check(call)
        expected = sinks.to(sink_dtype).float()[None, :, None].expand(2, 4, 32)
        support.check_lse(got["lse"][..., :32], expected.double())
        assert not got["out"][:, :32].any()


@pytest.mark.families
def test_feature_sinks_with_other_features(device: str) -> None:
    sinks = torch.tensor([0.5, -3.0, 30.0, -50.0], device=device)
    call = dense(device, torch.float32, sinks=sinks)
    for more in (
        {"softmax_scale": 0.0},
        {"softmax_scale": -0.3, "softcap": 2.0},
        {"dropout_p": 0.4},
        {"attn_mask": additive(device, torch.float32, (2, 1, 40, 72))},
        {"seqused_q": ints(device, 0, 33), "visibility": Visibility(None, None, 9)},
        {"dlse": torch.randn(2, 4, 40, device=device)},
    ):
        run_and_check(call.but(**more))
    packed = varlen(device, torch.float32, [40, 0, 9], [3, 50, 60], sinks=sinks)
    run_and_check(packed.but(seqused_q=ints(device, 40, 0, 5)))


@pytest.mark.families
def test_feature_sinks_of_minus_infinity(device: str) -> None:
    """They add nothing: as without sinks, and rows without keys have no weight either."""
    call = dense(device, torch.float32, (72, 40), visibility=Visibility(None, 0))
    want = run(call.but(empty_lse=-math.inf))
    got = run(call.but(sinks=torch.full((4,), -math.inf, device=device)))
    assert_same_bits(want, got)
    assert not got["dsinks"].any()


@pytest.mark.families
def test_feature_sinks_and_unused_queries(device: str) -> None:
    """What lies in rows past the used ones does not reach the sinks' gradient."""
    sinks = torch.randn(4, device=device)
    call = dense(device, torch.float32, sinks=sinks, seqused_q=ints(device, 17, 0))
    keep = [slice(0, 17), slice(0, 0)]
    dirty = call.but(q=_with_rows(call.problem.q, keep, NAN), dout=_with_rows(call.dout, keep, NAN))
    assert_same_bits(run(dirty), run_and_check(call))


# A second product, and head dims of v ------------------------------------------------------------


@pytest.mark.parametrize("headdims", some([(32, 64), (64, 512), (16, 40)], [(32, 64), (16, 40)]))
@pytest.mark.parametrize("dtype", some(DTYPES, [torch.float32, torch.float16]))
def test_feature_second_products(
    device: str, dtype: torch.dtype, headdims: tuple[int, int]
) -> None:
    headdim, headdim_v = headdims
    call = dense(
        device, dtype, (20, 64), (4, 1), headdim, headdim_v,
        softmax_scale=(headdim + headdim_v) ** -0.5,
    )  # fmt: skip
    call = call.but(qv=torch.randn(call.problem.out_shape).to(dtype).to(device))
    run_and_check(call, backward=False)
    call = call.but(visibility=Visibility(None, 0), seqused_k=ints(device, 64, 30))
    run_and_check(call.but(num_splits=2), backward=False)
    run_and_check(paged(call, 16), backward=False)
    run_and_check(call.but(softcap=2.0, sinks=torch.randn(4, device=device)), backward=False)


HEADDIMS = [(64, 512), (192, 128), (32, 64), (64, 32), (16, 512), (256, 512), (40, 24), (128, 200)]


@pytest.mark.families
@pytest.mark.parametrize("headdims", some(HEADDIMS, [(192, 128), (32, 64), (64, 24), (16, 512)]))
@pytest.mark.parametrize("dtype", some(DTYPES, [torch.float32]))
def test_feature_head_dims_of_v(device: str, dtype: torch.dtype, headdims: tuple[int, int]) -> None:
    call = dense(device, dtype, (33, 50), (2, 1), *headdims)
    run_and_check(call)
    run_and_check(call.but(visibility=Visibility(None, 0), num_splits=3))


@pytest.mark.families
@pytest.mark.parametrize("family", support.FAMILIES)
@pytest.mark.parametrize("headdims", [(64, 512), (192, 128)])
def test_families_with_head_dims_of_v(device: str, headdims: tuple[int, int], family: str) -> None:
    dtype = support.HALF_DTYPES[-1]  # float16 overflows in dout.v of the offset
    call = dense(device, dtype, (70, 130), (2, 1), *headdims, family=family)
    run_and_check(call.but(visibility=Visibility(None, 0)))


@pytest.mark.families
def test_feature_head_dims_of_v_with_other_features(device: str) -> None:
    call = dense(device, torch.float32, (33, 50), (2, 1), 32, 80)
    run_and_check(call.but(dropout_p=0.3, visibility=Visibility(20, 3)))
    run_and_check(call.but(attn_mask=additive(device, torch.float32, (1, 2, 33, 50))))
    packed = varlen(device, torch.float32, [5, 20, 0], [40, 3, 8], headdim=64, headdim_v=16)
    run_and_check(packed)


# Output dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("splits", [1, 3])
def test_feature_output_dtypes(device: str, splits: int, out_dtype: torch.dtype) -> None:
    call = dense(device, support.HALF_DTYPES[-1], out_dtype=out_dtype, num_splits=splits)
    got = run(call, backward=False)
    assert got["out"].dtype == out_dtype
    check(call, got)


# float8 ------------------------------------------------------------------------------------------


def descales(device: str, batch: int, heads: tuple[int, int]) -> dict[str, Tensor]:
    """Different factors for each sequence and head; q's by query head."""
    shapes = {"q": heads[0], "k": heads[1], "v": heads[1]}
    return {
        f"{name}_descale": (0.5 + torch.rand(batch, count)).to(device)
        for name, count in shapes.items()
    }


@pytest.mark.parametrize("out_dtype", some([None, torch.float16, torch.float32], [torch.float32]))
@pytest.mark.parametrize("headdim", some([64, 128, 256, 40], [64]))
@pytest.mark.parametrize("causal", [False, True])
def test_feature_float8(
    device: str, causal: bool, headdim: int, out_dtype: torch.dtype | None
) -> None:
    call = dense(
        device, FLOAT8, (70, 130), headdim=headdim, out_dtype=out_dtype,
        visibility=Visibility(None, 0 if causal else None),
    )  # fmt: skip
    run_and_check(call, backward=False)
    run_and_check(call.but(**descales(device, 2, (4, 2))), backward=False)


def test_feature_float8_descales_of_any_stride(device: str) -> None:
    call = dense(device, FLOAT8, out_dtype=torch.float32)
    one = torch.tensor(1.7, device=device)
    wide = (0.5 + torch.rand(2, 6)).to(device)
    for q, k, v in (
        (one.expand(2, 4), one.expand(2, 2), one.expand(2, 2)),
        (wide[:, ::3], wide[:, 1:5:2], wide.T[:2, :].T),
        (wide[:, :1].expand(2, 2), None, wide[:1, :2].expand(2, 2)),
    ):
        given = {"q_descale": q, "k_descale": k, "v_descale": v}
        got = run_and_check(call.but(**given), backward=False)
        copies = {key: None if x is None else x.contiguous() for key, x in given.items()}
        assert_same_bits(run(call.but(**copies), backward=False), got)


@pytest.mark.parametrize("splits", [1, 3])
def test_feature_float8_with_other_features(device: str, splits: int) -> None:
    factors = descales(device, 2, (4, 2))
    call = dense(device, FLOAT8, out_dtype=torch.float32, num_splits=splits, **factors)
    for more in (
        {"softcap": 2.0, "visibility": Visibility(30, 0)},
        {"sinks": torch.randn(4, device=device), "visibility": Visibility(None, None, 20)},
        {"attn_mask": additive(device, torch.float32, (2, 4, 40, 72))},
        {"alibi_slopes": support.alibi_slopes(device, 4)},
        {"seqused_q": ints(device, 9, 40), "seqused_k": ints(device, 0, 70)},
    ):
        run_and_check(call.but(**more), backward=False)
    few = dense(device, FLOAT8, (1, 96), out_dtype=torch.float32, num_splits=splits, **factors)
    run_and_check(few, backward=False)
    lengths = few.but(seqused_k=ints(device, 90, 17))
    run_and_check(paged(lengths, 16), backward=False)
    run_and_check(paged(lengths.but(leftpad_k=ints(device, 7, 0)), 16, [3, 1]), backward=False)
    packed = varlen(
        device, FLOAT8, [20, 0, 33], [40, 5, 30], out_dtype=torch.float32,
        **descales(device, 3, (4, 2)),
    )  # fmt: skip
    run_and_check(packed, backward=False)
    dims = dense(device, FLOAT8, headdim=64, headdim_v=32, out_dtype=torch.float32)
    run_and_check(dims.but(num_splits=splits), backward=False)


def test_feature_float8_large_values(device: str) -> None:
    """The largest numbers of the type, and logits that leave one weight near 1."""
    call = dense(device, FLOAT8, (33, 64), family="large_logits", out_dtype=torch.float32)
    run_and_check(call, backward=False)
    v = torch.where(call.problem.v.float() > 0, 448.0, -448.0).to(FLOAT8)
    run_and_check(call.but(v=v), backward=False)


# Pages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", some([1, 4, 256], [1, 4]))
@pytest.mark.parametrize("rows", [None, [4, 0]])
@pytest.mark.parametrize("page_size", some([4, 16, 128], [16]))
def test_feature_pages_with_padding_and_rows(
    device: str, page_size: int, rows: list[int] | None, splits: int
) -> None:
    call = dense(
        device, torch.float32, (3, 128), leftpad_k=ints(device, 37, 5),
        seqused_k=ints(device, 128, 71), num_splits=splits, visibility=Visibility(None, 0),
    )  # fmt: skip
    run_and_check(paged(call, page_size, rows), backward=False)


def test_feature_hostile_rows_of_pages(device: str) -> None:
    """Rows of the table outside of it are clamped into it."""
    call = paged(dense(device, torch.float32, (3, 64)), 16, [3, 0])
    table = call.problem.layout.page_table.clamp(0, 10)
    call = call.but(page_table=table, k=torch.nan_to_num(call.problem.k, 0.0),
                    v=torch.nan_to_num(call.problem.v, 0.0))  # fmt: skip
    got = run(call.but(cache_batch_idx=ints(device, -7, 2**31 - 1)), backward=False)
    last = table.shape[0] - 1
    want = run(call.but(cache_batch_idx=ints(device, 0, last)), backward=False)
    assert_same_bits(got, want)


def test_feature_rows_of_pages_for_packed_queries(device: str) -> None:
    call = paged(dense(device, torch.float32, (3, 64), batch=3), 16, [3, 0, 2])
    problem = call.problem
    flat = call.but(
        q=problem.q.flatten(0, 1)[:7], dout=call.dout.flatten(0, 1)[:7],
        cu_seqlens_q=ints(device, 0, 1, 5, 7), cu_seqlens_k=ints(device, 0, 60, 77, 77 + 64),
        max_seqlen_q=4, max_seqlen_k=64, leftpad_k=ints(device, 2, 0, 40),
    )  # fmt: skip
    run_and_check(flat, backward=False)
    run_and_check(flat.but(num_splits=3, seqused_k=ints(device, 9, 2, 64)), backward=False)


@pytest.mark.parametrize("splits", [2, 33, 129, 256])
def test_feature_many_splits(device: str, splits: int) -> None:
    call = dense(device, torch.float32, (2, 300), num_splits=splits, headdim=64)
    run_and_check(call, backward=False)


# Gradients of the log-sum-exp --------------------------------------------------------------------


@pytest.mark.families
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", some(DTYPES, [torch.float32]))
def test_feature_gradient_of_the_lse(device: str, dtype: torch.dtype, causal: bool) -> None:
    for seqlens in ((40, 72), (72, 40)):
        call = dense(device, dtype, seqlens, visibility=Visibility(None, 0 if causal else None))
        run_and_check(call.but(dlse=torch.randn(2, 4, seqlens[0], device=device)))
    packed = varlen(device, dtype, [20, 0, 33], [40, 5, 3], visibility=Visibility(None, 0))
    dlse = torch.randn(packed.problem.lse_shape, device=device)
    run_and_check(packed.but(dlse=dlse))


@pytest.mark.families
def test_feature_lse_gradients_of_any_stride(device: str) -> None:
    call = dense(device, torch.float32)
    strided = torch.randn(40, 2, 4, device=device).permute(1, 2, 0)
    expanded = torch.randn(2, 4, 1, device=device).expand(2, 4, 40)
    for dlse in (strided, expanded):
        got, want = run(call.but(dlse=dlse)), run(call.but(dlse=dlse.contiguous()))
        assert_same_bits(got, want)


@pytest.mark.families
def test_feature_returned_row_sums(device: str) -> None:
    """Backward returns rowsum(out * dout) - dlse."""
    call = dense(device, torch.float32).but(dlse=torch.randn(2, 4, 40, device=device))
    result = run_forward(call)
    grads = [torch.empty_like(x) for x in call.problem[:3]]
    inputs = BackwardInputs(call.dout, result.out, result.softmax_lse, *grads, result.rng_state)
    softmax_d = attend_backward(call.problem, inputs._replace(dlse=call.dlse))
    want = (result.out * call.dout).sum(-1).transpose(1, 2) - call.dlse
    support.assert_close(softmax_d[..., :40], want, torch.float32, "softmax_d")


# Packed heads, combinations, autograd ------------------------------------------------------------


@pytest.mark.families
@pytest.mark.parametrize("seqlen_q", [1, 3, 40])
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)])
def test_feature_packed_heads(device: str, heads: tuple[int, int], seqlen_q: int) -> None:
    """A hint: results are the same up to rounding, whatever it says."""
    slopes = support.alibi_slopes(device, heads[0])
    sinks = torch.randn(heads[0], device=device)
    mask = additive(device, torch.float32, (2, heads[0], seqlen_q, 72), dead_rows=False)
    for more in (
        {"visibility": Visibility(None, 0)},
        {"visibility": Visibility(20, 3, 30), "alibi_slopes": slopes, "sinks": sinks},
        {"attn_mask": mask, "num_splits": 2, "seqused_k": ints(device, 60, 9)},
        {"seqused_q": ints(device, seqlen_q - 1, seqlen_q), "leftpad_k": ints(device, 2, 0)},
    ):
        call = dense(device, torch.float32, (seqlen_q, 72), heads, **more)
        for pack_gqa in (True, False, None):
            run_and_check(call.but(pack_gqa=pack_gqa), backward=False)
            if "attn_mask" not in more:
                run_and_check(paged(call.but(pack_gqa=pack_gqa), 8), backward=False)


@pytest.mark.families
def test_feature_packed_heads_of_packed_sequences(device: str) -> None:
    call = varlen(device, torch.float32, [1, 0, 5, 2], [30, 4, 50, 0], heads=(6, 2))
    for pack_gqa in (True, False, None):
        run_and_check(call.but(pack_gqa=pack_gqa, visibility=Visibility(None, 0)), backward=False)


def test_feature_everything_at_once(device: str) -> None:
    call = dense(
        device, torch.float32, (40, 75), (4, 2), 24, 72, batch=3,
        visibility=Visibility(30, 6, 25), softcap=4.0,
        alibi_slopes=support.alibi_slopes(device, 4, 3),
        attn_mask=additive(device, torch.float32, (3, 1, 40, 75)),
        sinks=torch.randn(4, device=device),
        seqused_q=ints(device, 40, 33, 0), seqused_k=ints(device, 75, 20, 9),
        dlse=torch.randn(3, 4, 40, device=device),
    )  # fmt: skip
    run_and_check(call)
    run_and_check(call.but(softcap=0.0, dropout_p=0.25))
    run_and_check(call.but(num_splits=4), backward=False)


def test_feature_dropout_probabilities_of_extended_problems(device: str) -> None:
    """S_dmask knows chunks, masks and head dims of v."""
    call = dense(
        device, torch.float32, dropout_p=0.3, return_softmax=True, headdim_v=48,
        visibility=Visibility(None, None, 30),
        attn_mask=additive(device, torch.float32, (2, 1, 40, 72)),
        seqused_q=ints(device, 40, 12), seqused_k=ints(device, 60, 72),
    )  # fmt: skip
    result = run_forward(call)
    want = support.reference.attention(call.problem, rng_state=result.rng_state).s_dmask
    support.assert_close(result.s_dmask, want, torch.float32, "S_dmask")
    assert torch.equal(result.s_dmask > 0, want > 0)


@pytest.mark.families
def test_feature_through_autograd(device: str) -> None:
    """All five gradients of :func:`solve`, with that of the log-sum-exp."""
    call = dense(
        device, torch.float32, sinks=torch.randn(4, device=device), headdim_v=48,
        attn_mask=torch.randn(1, 4, 40, 72, device=device), visibility=Visibility(None, 0),
        dlse=torch.randn(2, 4, 40, device=device),
    )  # fmt: skip
    problem, leaves = support.with_leaves(call.problem)
    out, lse, _ = solve(problem, differentiable_lse=True)
    found = torch.autograd.grad([out, lse], list(leaves.values()), [call.dout, call.dlse])
    got = dict(zip(leaves, found, strict=True))
    rng_state = torch.zeros(2, dtype=torch.int64, device=device)
    check(call, {"out": out.detach(), "lse": lse.detach(), "rng_state": rng_state} | got)


@pytest.mark.families
def test_feature_repeatable(device: str) -> None:
    """No kernel adds across programs: two runs have the same bits, the mask's gradient too."""
    mask = additive(device, torch.float32, (1, 1, 40, 72))
    sinks = torch.randn(4, device=device)
    call = dense(device, torch.float16, attn_mask=mask, sinks=sinks, headdim_v=48)
    assert_same_bits(run(call), run(call))
