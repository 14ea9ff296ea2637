"""The Hopper backward on a GPU of compute capability 9.0, against float64."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from support import (
    Inputs,
    Solution,
    alibi_slopes,
    assert_same_bits,
    check,
    check_error,
    dense,
    exact_answer,
    extended,
    no_synchronisation,
    plain_answer,
    poisoned_like,
    run_and_check,
    varlen,
)

import flash_attn
from flash_attn.backends.sm90 import launch_backward
from flash_attn.backends.sm90.plans_backward import BackwardPlan, plan_backward, plan_ordered
from flash_attn.core import problem_ops, reference, registry
from flash_attn.core.problem import BackwardInputs
from flash_attn.core.sequences import sequences

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "left": {"window_size": (70, 0)},
    "both": {"window_size": (30, 20)},
    "softcap": {"softcap": 1.5, "causal": True},
    "right": {"window_size": (-1, 15)},
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.hip is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def arguments_of(inputs: Inputs, results: Any = None) -> tuple[Any, BackwardInputs]:
    """(problem, inputs of the backward pass); forward is the reference's."""
    problem = inputs.problem()
    forward = reference.attention(problem, torch.float64)
    out, lse = forward.out.to(inputs.q.dtype), forward.softmax_lse.float()
    grads = results or tuple(poisoned_like(x) for x in (inputs.q, inputs.k, inputs.v))
    state = torch.zeros(2, dtype=torch.int64, device=inputs.q.device)
    return problem, BackwardInputs(inputs.dout, out, lse, *grads, state)


def solve(inputs: Inputs, plan: BackwardPlan | None = None, results: Any = None) -> Solution:
    """Gradients by the kernels."""
    problem, arguments = arguments_of(inputs, results)
    assert launch_backward.unsupported_backward(problem) == []
    launch_backward.backward(problem, arguments, plan)
    return Solution(arguments.out, arguments.softmax_lse, *arguments[3:6])


def plans(headdim: int, is_masked: bool) -> list[BackwardPlan]:
    """The plan in use, without first stores, the other order of programs, and sums in order."""
    plan = plan_backward(headdim, is_masked, 512)
    zeros = plan._replace(first_stores=False, rotates=False)  # in use for other lengths
    other = plan._replace(is_reversed=True)
    return list(dict.fromkeys([plan, zeros, other, plan_ordered(headdim, is_masked, 512)]))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("headdim", [1, 8, 40, 61, 64, 72, 96, 127, 128])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlens", [(1, 1), (128, 128), (113, 203), (400, 250), (129, 640)])
def test_gradients(dtype: torch.dtype, headdim: int, mask: str, seqlens: tuple[int, int]) -> None:
    inputs = dense("cuda", dtype, 2, seqlens, (4, 2), headdim, **MASKS[mask])
    for plan in plans(headdim, mask != "full"):
        check(inputs, solve(inputs, plan))


@pytest.mark.parametrize("family", ["large_logits", "outlier_channels", "offset", "activations"])
@pytest.mark.parametrize("headdim", [64, 96, 128])
def test_input_families(family: str, headdim: int) -> None:
    inputs = dense("cuda", BF16, 2, (300, 300), (4, 4), headdim, family=family, causal=True)
    check(inputs, solve(inputs))


@pytest.mark.parametrize("heads", [(8, 1), (6, 2), (16, 16)])
@pytest.mark.parametrize("headdim", [64, 96, 128])
def test_many_programs(heads: tuple[int, int], headdim: int) -> None:
    """Several times what a GPU runs at a time."""
    inputs = dense("cuda", BF16, 8, (1024, 1100), heads, headdim, causal=True)
    for plan in plans(headdim, is_masked=True):
        check(inputs, solve(inputs, plan))


@pytest.mark.parametrize("headdim", [64, 96, 128])
def test_unseen_keys_may_be_nan(headdim: int) -> None:
    inputs = dense("cuda", FP16, 2, (100, 400), (4, 2), headdim, window_size=(64, 0))
    want = solve(inputs)
    for x in (inputs.k, inputs.v):
        x[:, : 400 - 100 - 64] = float("nan")
    problem, arguments = arguments_of(inputs)
    arguments = arguments._replace(out=want.out, softmax_lse=want.lse)
    launch_backward.backward(problem, arguments)
    assert_same_bits(Solution(want.out, want.lse, *arguments[3:6]), want, "NaN in unseen keys")
    assert not want.dk[:, : 400 - 100 - 64].any()


def _inside_nan(x: torch.Tensor, columns: int) -> torch.Tensor:
    batch, rows, heads, headdim = x.shape
    buffer = x.new_full((batch, rows + 70, heads + 1, headdim + columns), float("nan"))
    view = buffer[:, :rows, :heads, :headdim]
    view.copy_(x)
    return view


@pytest.mark.parametrize("columns", [8, 3])  # the latter is nothing that TMA can address
@pytest.mark.parametrize("headdim", [64, 96, 128])
def test_nothing_outside_is_read_or_written(headdim: int, columns: int) -> None:
    inputs = dense("cuda", FP16, 2, (170, 250), (2, 1), headdim, causal=True)
    names = ("q", "k", "v", "dout")
    inputs = inputs.but(**{name: _inside_nan(getattr(inputs, name), columns) for name in names})
    for plan in plans(headdim, is_masked=True):
        results = tuple(_inside_nan(x, columns) for x in (inputs.q, inputs.k, inputs.v))
        check(inputs, solve(inputs, plan, results))
        for view in results:
            buffer = view._base
            assert buffer is not None
            assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


@pytest.mark.parametrize("layout", ["bhsd", "expanded dout", "columns apart"])
def test_strides(layout: str) -> None:
    inputs = dense("cuda", BF16, 2, (150, 150), (2, 2), 64, causal=True)
    want = solve(inputs)
    results = None
    if layout == "bhsd":
        turned = {n: getattr(inputs, n).transpose(1, 2).contiguous().transpose(1, 2)
                  for n in ("q", "k", "v", "dout")}  # fmt: skip
        inputs = inputs.but(**turned)
        results = tuple(torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v))
    elif layout == "columns apart":
        results = tuple(
            torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device)[..., 0]
            for x in (inputs.q, inputs.k, inputs.v)
        )
    else:
        inputs = inputs.but(dout=inputs.dout[:, :, :1].expand_as(inputs.dout))
        want = solve(inputs.but(dout=inputs.dout.contiguous()))
    assert_same_bits(solve(inputs, None, results), want, layout)


@pytest.mark.parametrize("headdim", [64, 96, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "both"])
def test_a_thousand_repeats_have_the_same_bits(headdim: int, mask: str) -> None:
    inputs = dense("cuda", BF16, 2, (700, 700), (8, 4), headdim, **MASKS[mask])
    problem, arguments = arguments_of(inputs)
    for plan in plans(headdim, mask != "full"):
        launch_backward.backward(problem, arguments, plan)
        first = [x.clone() for x in arguments[3:6]]
        different = torch.zeros(3, dtype=torch.int64, device="cuda")
        for _ in range(1000):
            launch_backward.backward(problem, arguments, plan)
            pairs = zip(arguments[3:6], first, strict=True)
            different += torch.stack([(x != y).sum() for x, y in pairs])
        dq, dk, dv = different.tolist()
        assert dk == dv == 0
        assert dq == 0 or not plan.deterministic


def test_ten_thousand_launches_over_random_shapes() -> None:
    """None hangs, and the last of each shape is right."""
    chosen = random.Random(0)
    for _ in range(100):
        headdim = chosen.choice([64, 96, 128])
        seqlens = (chosen.randint(1, 1500), chosen.randint(1, 1500))
        nheads_k = chosen.choice([1, 2, 4])
        heads = (nheads_k * chosen.choice([1, 2, 3]), nheads_k)
        mask = MASKS[chosen.choice(list(MASKS))]
        inputs = dense("cuda", BF16, chosen.choice([1, 2, 8]), seqlens, heads, headdim, **mask)
        plan = chosen.choice(plans(headdim, bool(mask)))
        problem, arguments = arguments_of(inputs)
        for _ in range(100):
            launch_backward.backward(problem, arguments, plan)
        check(inputs, Solution(arguments.out, arguments.softmax_lse, *arguments[3:6]))


def test_empty_problems() -> None:
    for seqlens in itertools.product((0, 5), (0, 5)):
        if seqlens == (5, 5):
            continue
        inputs = dense("cuda", BF16, 2, seqlens, (2, 2), 64)
        got = solve(inputs)
        assert not got.dq.any()
        assert not got.dk.any()
        assert not got.dv.any()


# Packed sequences, and other lengths on the device

BATCHES = {
    "equal": ([119, 280, 21], [119, 280, 21]),
    "fewer keys": ([287, 210], [35, 119]),
    "more keys": ([7, 140, 49], [231, 427, 49]),
    "empty": ([0, 91, 0, 0, 35, 0], [0, 91, 0, 60, 63, 0]),
    "whole blocks": ([128, 256, 128], [256, 128, 128]),
    "no keys": ([91, 42, 35], [91, 0, 63]),
    "many": ([1] * 60, [1, 2, 3] * 20),
    "long": ([1, 3000], [3000, 1]),
}


@pytest.mark.parametrize("headdim", [40, 60, 64, 96, 128])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch", BATCHES)
def test_packed_sequences(headdim: int, mask: str, batch: str) -> None:
    """Rows of no sequence lie behind the last one: they hold NaN and get zeros."""
    inputs = varlen("cuda", BF16, *BATCHES[batch], (4, 2), headdim, 70, **MASKS[mask])
    clean = inputs
    for name, rows in (("q", 0), ("k", 1), ("v", 1), ("dout", 0)):
        x, end = getattr(inputs, name).clone(), int(inputs.lengths[rows][-1])
        x[end:] = 0.0
        clean = clean.but(**{name: x.clone()})
        x[end:] = float("nan")
        inputs = inputs.but(**{name: x})
    out, lse = arguments_of(clean)[1][1:3]
    for plan in plans(headdim, mask != "full"):
        _, arguments = arguments_of(clean)
        arguments = arguments._replace(dout=inputs.dout)
        launch_backward.backward(inputs.problem(), arguments, plan)
        check(clean, Solution(out, lse, *arguments[3:6]))
        for grad, rows in zip(arguments[3:6], (0, 1, 1), strict=True):
            assert not grad[int(inputs.lengths[rows][-1]) :].any()


@pytest.mark.parametrize("headdim", [64, 96, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "both"])
def test_nan_stays_in_its_sequence(headdim: int, mask: str) -> None:
    lengths = ([170, 33, 90, 300], [150, 161, 140, 300])
    inputs = varlen("cuda", FP16, *lengths, (4, 2), headdim, **MASKS[mask])
    for plan in plans(headdim, mask != "full"):
        want = solve(inputs, plan)
        dirty = inputs.but(**{n: getattr(inputs, n).clone() for n in ("q", "k", "v", "dout")})
        for tensor, rows in zip(dirty.tensors, (0, 1, 1, 0), strict=True):
            begin, end = dirty.lengths[rows][1:3].tolist()
            tensor[begin:end] = float("nan")
        got = solve(dirty, plan)
        for one, other, rows in ((got.dq, want.dq, 0), (got.dk, want.dk, 1), (got.dv, want.dv, 1)):
            begin, end = dirty.lengths[rows][1:3].tolist()
            for rest in (slice(None, begin), slice(end, None)):
                if one is got.dq and not plan.deterministic:
                    assert torch.isfinite(one[rest]).all()
                else:
                    assert torch.equal(one[rest], other[rest])


HOSTILE = {
    "decreasing": [0, 450, 70, 750],
    "negative": [-5, -1, 320, 750],
    "beyond": [0, 300, 760, 4000],
    "all beyond": [1000, 1100, 1200, 1300],
    "highest": [2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1],
    "lowest": [-(2**31), -(2**31), 3, 2**31 - 1],
    "backwards": [750, 500, 100, 0],
}


def _packed_inside_nan(x: torch.Tensor) -> torch.Tensor:
    rows, heads, columns = x.shape
    buffer = x.new_full((rows + 280, heads + 1, columns + 8), float("nan"))
    view = buffer[140 : 140 + rows, :heads, :columns]
    view.copy_(x)
    return view


@pytest.mark.parametrize("headdim", [64, 96, 128])
@pytest.mark.parametrize("bounds", HOSTILE)
def test_bounds_that_lie(headdim: int, bounds: str) -> None:
    """Nothing outside is read or written, nobody waits for ever, and gradients are numbers."""
    lies = torch.tensor(HOSTILE[bounds], dtype=torch.int32, device="cuda")
    honest = torch.tensor([0, 140, 141, 750], dtype=torch.int32, device="cuda")
    names = ("q", "k", "v", "dout")
    for cu_q, cu_k in ((lies, honest), (honest, lies), (lies, lies)):
        inputs = varlen("cuda", FP16, [750], [750], (4, 2), headdim, window_size=(200, 0))
        inputs = inputs.but(
            **{name: _packed_inside_nan(getattr(inputs, name)) for name in names},
            lengths=(cu_q, cu_k, 750, 750),
        )
        for plan in plans(headdim, is_masked=True):
            results = tuple(_packed_inside_nan(x) for x in (inputs.q, inputs.k, inputs.v))
            solve(inputs, plan, results)
            for view in results:
                buffer = view._base
                assert buffer is not None
                assert view.isfinite().all()
                assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


@pytest.mark.parametrize("headdim", [64, 96, 128])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask", ["full", "causal", "left", "softcap"])
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
    for plan in plans(headdim, mask != "full"):
        got = solve(inputs, plan)
        check(inputs, got)
        if plan.deterministic:
            assert_same_bits(solve(dirty, plan), got, "NaN in rows that are not in use")
        else:
            check(inputs, solve(dirty, plan))
        assert not got.dq[hidden_q].any()
        assert not got.dk[hidden_k].any()
        assert not got.dv[hidden_k].any()


@pytest.mark.parametrize("headdims", [(64, 40), (40, 128), (128, 64), (96, 128), (64, 8)])
@pytest.mark.parametrize("packed", [False, True])
def test_head_dims_of_v(headdims: tuple[int, int], packed: bool) -> None:
    make: Any = varlen if packed else dense
    lengths = ([170, 280], [190, 330]) if packed else (2, (270, 330))
    inputs = make("cuda", BF16, *lengths, (4, 2), headdims[0], causal=True)
    other = make("cuda", BF16, *lengths, (4, 2), headdims[1], causal=True)
    inputs = extended(inputs.but(v=other.v, dout=other.dout))
    check(inputs, solve(inputs))


@pytest.mark.parametrize("headdim", [40, 64])
@pytest.mark.parametrize("chunk", [1, 100, 128, 1000])
@pytest.mark.parametrize("mask", ["full", "causal", "both"])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks(headdim: int, chunk: int, mask: str, packed: bool) -> None:
    make: Any = varlen if packed else dense
    lengths = ([190, 430], [600, 370]) if packed else (2, (350, 800))
    inputs = make("cuda", BF16, *lengths, (4, 2), headdim, **MASKS[mask])
    inputs = extended(inputs, attention_chunk=chunk)
    for plan in plans(headdim, is_masked=True):
        check(inputs, solve(inputs, plan))
    with flash_attn.use_backend("sm90"):
        assert registry.select(inputs.problem(), backward=True).name == "sm90"


@pytest.mark.parametrize("headdim", [40, 64, 96, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "left", "both"])
@pytest.mark.parametrize("packed", [False, True])
def test_alibi(headdim: int, mask: str, packed: bool) -> None:
    if packed and headdim > 64:
        pytest.skip("refused by reason, see tests/unit/test_sm90_backward_reasons.py")
    make: Any = varlen if packed else dense
    lengths = ([190, 0, 430], [600, 60, 370]) if packed else (3, (350, 300))
    inputs = make("cuda", BF16, *lengths, (4, 2), headdim, **MASKS[mask])
    for batch in (None, 3):
        inputs = inputs.but(alibi_slopes=alibi_slopes("cuda", 4, batch))
        for plan in plans(headdim, mask != "full"):
            check(inputs, solve(inputs, plan))


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_of_the_log_sum_exp(packed: bool) -> None:
    make: Any = varlen if packed else dense
    lengths = ([170, 280], [190, 230]) if packed else (2, (270, 330))
    inputs = make("cuda", BF16, *lengths, (4, 2), 64, causal=True)
    problem, arguments = arguments_of(inputs)
    dlse = torch.randn_like(arguments.softmax_lse)
    arguments = arguments._replace(dlse=dlse)
    launch_backward.backward(problem, arguments)
    true, owed = exact_answer(problem, inputs.dout, None, arguments.out, dlse)
    same = plain_answer(problem, inputs.dout, None, dlse)
    for name in ("dq", "dk", "dv"):
        got = getattr(arguments, name)
        check_error(name, got, true[name], same[name], 3.0, 1e-6, owed.get(name))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("headdim", [64, 96, 128])
def test_the_public_functions(packed: bool, headdim: int) -> None:
    """Forward and backward by the same kernels, which never wait for the GPU."""
    make: Any = varlen if packed else dense
    lengths = ([170, 0, 280], [190, 5, 330]) if packed else (2, (270, 330))
    with flash_attn.use_backend("sm90"):
        inputs = make("cuda", BF16, *lengths, (4, 2), headdim, causal=True)
        assert registry.select(inputs.problem(), backward=True).name == "sm90"
        run_and_check(inputs)
        problem, arguments = arguments_of(inputs)
        with no_synchronisation():
            launch_backward.backward(problem, arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_sinks(packed: bool) -> None:
    make: Any = varlen if packed else dense
    lengths = ([170, 280], [190, 330]) if packed else (2, (270, 330))
    inputs = make("cuda", BF16, *lengths, (4, 2), 64, causal=True)
    sinks = torch.randn(4, device="cuda", requires_grad=True)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    problem = extended(inputs, sinks=sinks).problem()
    problem = problem._replace(q=leaves[0], k=leaves[1], v=leaves[2])
    with flash_attn.use_backend("sm90"):
        out, _, _ = problem_ops.solve(problem)
        grads = torch.autograd.grad(out, [*leaves, sinks], inputs.dout)
    problem = extended(inputs, sinks=sinks.detach()).problem()
    true, owed = exact_answer(problem, inputs.dout, None, out.detach())
    same = plain_answer(problem, inputs.dout)
    for name, got in zip(("dq", "dk", "dv", "dsinks"), grads, strict=True):
        check_error(name, got, true[name], same[name], 3.0, 1e-5, owed.get(name))


@pytest.mark.parametrize("headdim", [64, 96, 128])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_packed_sequences_repeat_their_bits(headdim: int, mask: str) -> None:
    lengths = [700, 1, 300, 0, 1500, 64] * 3
    inputs = varlen("cuda", BF16, lengths, lengths, (8, 4), headdim, **MASKS[mask])
    problem, arguments = arguments_of(inputs)
    launch_backward.backward(problem, arguments)
    first = [x.clone() for x in arguments[4:6]]  # dq is summed in any order
    for _ in range(300):
        launch_backward.backward(problem, arguments)
        for x, y in zip(arguments[4:6], first, strict=True):
            assert torch.equal(x, y)


def test_thousands_of_launches_over_random_batches() -> None:
    """None hangs, and the last of each is right."""
    chosen = random.Random(1)
    for _ in range(60):
        headdim = chosen.choice([64, 96, 128])
        count = chosen.choice([1, 2, 5, 30])
        lengths = [
            [chosen.choice([0, 1, 100, chosen.randint(1, 1200)]) for _ in range(count)]
            for _ in range(2)
        ]
        nheads_k = chosen.choice([1, 2, 4])
        heads = (nheads_k * chosen.choice([1, 2, 3]), nheads_k)
        mask = MASKS[chosen.choice(list(MASKS))]
        inputs = varlen("cuda", BF16, *lengths, heads, headdim, chosen.choice([0, 33]), **mask)
        problem, arguments = arguments_of(inputs)
        plan = chosen.choice(plans(headdim, bool(mask)))
        for _ in range(50):
            launch_backward.backward(problem, arguments, plan)
        check(inputs, Solution(arguments.out, arguments.softmax_lse, *arguments[3:6]))
