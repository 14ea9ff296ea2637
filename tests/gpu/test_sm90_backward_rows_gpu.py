"""The Hopper backward for head dims above 128: lengths on the device, divided groups of query
heads, launches behind each other. The rest is in ``test_sm90_backward_wide_gpu``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from support import Inputs, Solution, assert_same_bits, check, dense, extended, varlen
from test_sm90_backward_gpu import (
    BATCHES,
    HOSTILE,
    MASKS,
    _packed_inside_nan,
    arguments_of,
    hopper,
)

from flash_attn.backends.sm90 import launch_backward
from flash_attn.backends.sm90.plans_backward import MAX_HEADDIM_SOFTCAP, plan_backward
from flash_attn.core.sequences import sequences

__all__ = ["hopper"]  # a fixture of these tests too
pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
HEADDIMS = [136, 192, 256]
WITHOUT_SOFTCAP = [mask for mask in MASKS if mask != "softcap"]
NAMES = ("q", "k", "v", "dout")


def solve(
    inputs: Inputs,
    results: Any = None,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
    splits: int = 1,
) -> Solution:
    """Gradients by the kernels, with the reference's (out, lse) or ``known`` ones."""
    problem, arguments = arguments_of(inputs, results)
    if known is not None:
        arguments = arguments._replace(out=known[0], softmax_lse=known[1])
    plan = plan_backward(inputs.q.shape[-1], True, 512)._replace(splits=splits)
    launch_backward.backward(problem, arguments, plan)
    return Solution(arguments.out, arguments.softmax_lse, *arguments[3:6])


@pytest.mark.parametrize("headdim", HEADDIMS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch", BATCHES)
def test_packed_sequences(headdim: int, mask: str, batch: str) -> None:
    """Rows of no sequence lie behind the last one: they hold NaN and get zeros."""
    if mask == "softcap" and headdim > MAX_HEADDIM_SOFTCAP:
        pytest.skip("softcap at head dim 256 is the portable kernels'")
    inputs = varlen("cuda", BF16, *BATCHES[batch], (4, 2), headdim, 70, **MASKS[mask])
    ends = [int(inputs.lengths[rows][-1]) for rows in (0, 1, 1, 0)]
    clean, dirty = {}, {}
    for name, end in zip(NAMES, ends, strict=True):
        clean[name], dirty[name] = getattr(inputs, name).clone(), getattr(inputs, name).clone()
        clean[name][end:] = 0.0
        dirty[name][end:] = float("nan")
    known = arguments_of(inputs.but(**clean))[1][1:3]
    for splits in (1, 2):
        got = solve(inputs.but(**dirty), known=known, splits=splits)
        check(inputs.but(**clean), got)
        for grad, end in zip((got.dq, got.dk, got.dv), (ends[0], ends[1], ends[1]), strict=True):
            assert not grad[end:].any()


@pytest.mark.parametrize("headdim", HEADDIMS)
@pytest.mark.parametrize("mask", ["full", "causal", "both"])
def test_nan_stays_in_its_sequence(headdim: int, mask: str) -> None:
    lengths = ([170, 33, 90, 300], [150, 161, 140, 300])
    inputs = varlen("cuda", FP16, *lengths, (4, 2), headdim, **MASKS[mask])
    want = solve(inputs)
    dirty = inputs.but(**{n: getattr(inputs, n).clone() for n in NAMES})
    for tensor, rows in zip(dirty.tensors, (0, 1, 1, 0), strict=True):
        begin, end = dirty.lengths[rows][1:3].tolist()
        tensor[begin:end] = float("nan")
    got = solve(dirty)
    for one, other, rows in ((got.dq, want.dq, 0), (got.dk, want.dk, 1), (got.dv, want.dv, 1)):
        begin, end = dirty.lengths[rows][1:3].tolist()
        for rest in (slice(None, begin), slice(end, None)):
            assert torch.equal(one[rest], other[rest])


@pytest.mark.parametrize("headdim", HEADDIMS)
@pytest.mark.parametrize("bounds", HOSTILE)
def test_bounds_that_lie(headdim: int, bounds: str) -> None:
    """Nothing outside is read or written, nobody waits for ever, and gradients are numbers."""
    lies = torch.tensor(HOSTILE[bounds], dtype=torch.int32, device="cuda")
    honest = torch.tensor([0, 140, 141, 750], dtype=torch.int32, device="cuda")
    for cu_q, cu_k in ((lies, honest), (honest, lies), (lies, lies)):
        inputs = varlen("cuda", FP16, [750], [750], (4, 2), headdim, window_size=(200, 0))
        inputs = inputs.but(
            **{name: _packed_inside_nan(getattr(inputs, name)) for name in NAMES},
            lengths=(cu_q, cu_k, 750, 750),
        )
        results = tuple(_packed_inside_nan(x) for x in (inputs.q, inputs.k, inputs.v))
        solve(inputs, results)
        for view in results:
            buffer = view._base
            assert buffer is not None
            assert view.isfinite().all()
            assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


@pytest.mark.parametrize("headdim", HEADDIMS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask", ["full", "causal", "left"])
def test_rows_in_use(headdim: int, packed: bool, mask: str) -> None:
    """Rows that are not in use hold NaN and get zeros; lengths that lie are cut off."""
    used_q = torch.tensor([270, 0, 133, 9000], dtype=torch.int32, device="cuda")
    used_k = torch.tensor([0, 120, 350, -3], dtype=torch.int32, device="cuda")
    if packed:
        lengths = ([280, 120, 140, 50], [90, 340, 350, 130])
        inputs = varlen("cuda", BF16, *lengths, (4, 2), headdim, **MASKS[mask])
    else:
        inputs = dense("cuda", BF16, 4, (290, 350), (4, 2), headdim, **MASKS[mask])
    inputs = extended(inputs, seqused_q=used_q, seqused_k=used_k)
    hidden_q, hidden_k = (
        torch.ones(x.shape[:-2], dtype=torch.bool, device="cuda") for x in (inputs.q, inputs.k)
    )
    for one in sequences(inputs.problem()):
        hidden_q[one.q_rows] = False
        hidden_k[one.k_rows] = False
    hidden = {"q": hidden_q, "k": hidden_k, "v": hidden_k, "dout": hidden_q}
    dirty = inputs.but(**{
        n: getattr(inputs, n).masked_fill(x[..., None, None], float("nan"))
        for n, x in hidden.items()
    })  # fmt: skip
    for splits in (1, 2):
        got = solve(inputs, splits=splits)
        check(inputs, got)
        again = solve(dirty, splits=splits)
        assert_same_bits(again, got, "NaN in rows that are not in use")
        assert not got.dq[hidden_q].any()
        assert not got.dk[hidden_k].any()
        assert not got.dv[hidden_k].any()


@pytest.mark.parametrize("headdim", HEADDIMS)
def test_divided_groups(headdim: int) -> None:
    for heads, splits in (((8, 1), 8), ((8, 2), 2), ((7, 1), 3)):
        inputs = dense("cuda", BF16, 2, (400, 500), heads, headdim, causal=True)
        check(inputs, solve(inputs, splits=splits))


@pytest.mark.parametrize("headdim", [192, 256])
@pytest.mark.parametrize("splits", [1, 2])
def test_launches_behind_each_other(headdim: int, splits: int) -> None:
    """Two problems in turns in the same memory, without a pause: a kernel that begins before the
    numbers are there that it reads would take the other problem's."""
    plan = plan_backward(headdim, True, 512)._replace(splits=splits)
    one = dense("cuda", BF16, 2, (700, 700), (8, 4), headdim, causal=True)
    other = one.but(**{name: torch.randn_like(getattr(one, name)) for name in NAMES})
    problem, shared = arguments_of(one)
    problem = problem._replace(**{n: getattr(problem, n).clone() for n in ("q", "k", "v")})
    shared = shared._replace(dout=shared.dout.clone())
    filled = [arguments_of(x) for x in (one, other)]
    wanted = [solve(x, splits=splits)[2:] for x in (one, other)]
    for _ in range(20):
        results = []
        for turn in range(10):
            from_problem, from_inputs = filled[turn % 2]
            for name in ("q", "k", "v"):
                getattr(problem, name).copy_(getattr(from_problem, name))
            for name in ("dout", "out", "softmax_lse"):
                getattr(shared, name).copy_(getattr(from_inputs, name))
            launch_backward.backward(problem, shared, plan)
            results.append([x.clone() for x in shared[3:6]])
        for turn, got in enumerate(results):
            assert all(map(torch.equal, got, wanted[turn % 2]))
