"""PyTorch's own CUDA kernels through the adapter, against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.backends.cuda import BACKEND
from flash_attn.core import ops, reference
from flash_attn.core.problem import BackwardInputs
from flash_attn.errors import UnsupportedProblemError

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def supported():
    if torch.version.hip is not None or torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("PyTorch's kernels need an NVIDIA GPU of compute capability 8.0")


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def check(problem):
    """Forward and backward: errors at most twice those of PyTorch arithmetic in the dtype."""
    assert BACKEND.unsupported(problem, backward=False) == []
    exact = reference.attention(problem)
    out = torch.full_like(problem.q, float("nan"))
    result = BACKEND.forward(problem, out)
    assert result.out is out
    rough = _rough(problem)
    bound = 2 * (rough - exact.out).abs().max().item() + 1e-5
    assert (out - exact.out).abs().max().item() <= bound
    dead = torch.isposinf(exact.softmax_lse)
    assert torch.equal(torch.isposinf(result.softmax_lse), dead)
    torch.testing.assert_close(
        result.softmax_lse[~dead].double(), exact.softmax_lse[~dead], atol=1e-3, rtol=1e-4
    )
    fresh = BACKEND.forward(problem)
    assert torch.equal(fresh.out, out)
    if BACKEND.unsupported(problem, backward=True):
        return
    _check_backward(problem, result)


def _rough(problem):
    """The same arithmetic in the inputs' dtype: scores and weights are rounded to it."""
    return reference.attention(problem, problem.q.dtype).out.double()


def _check_backward(problem, result):
    dout = torch.randn_like(problem.q)
    grads = [torch.full_like(x, float("nan")) for x in problem[:3]]
    inputs = BackwardInputs(dout, result.out, result.softmax_lse, *grads, result.rng_state)
    BACKEND.backward(problem, inputs)
    exact = reference.gradients(problem, dout)[:3]
    rough = reference.gradients(problem, dout, problem.q.dtype)[:3]
    for found, want, other, name in zip(grads, exact, rough, ("dq", "dk", "dv"), strict=True):
        bound = 3 * (other.double() - want).abs().max().item() + 1e-4
        assert (found - want).abs().max().item() <= bound, name
    again = [torch.full_like(x, float("nan")) for x in problem[:3]]
    BACKEND.backward(problem, inputs._replace(dq=again[0], dk=again[1], dv=again[2]))
    assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True))


def dense(seqlen_q, seqlen_k, headdim, dtype, causal=False, window=(-1, -1), **options):
    q = randn(2, seqlen_q, 4, headdim, dtype=dtype)
    k, v = (randn(2, seqlen_k, options.get("nheads_k", 2), headdim, dtype=dtype) for _ in "kv")
    return ops.dense_problem(
        q, k, v, 0.0, options.get("scale"), causal, *window, 0.0, options.get("slopes")
    )


LENGTHS = [(1, 1), (1, 200), (64, 64), (129, 129), (113, 203), (300, 100), (2, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
def test_dense(seqlen_q, seqlen_k, causal, dtype):
    check(dense(seqlen_q, seqlen_k, 64, dtype, causal))


@pytest.mark.parametrize("headdim", [1, 8, 20, 59, 96, 128, 160, 192, 224, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(headdim, causal):
    check(dense(70, 90, headdim, torch.bfloat16, causal))


@pytest.mark.parametrize("nheads_k", [1, 2, 4])
@pytest.mark.parametrize("seqlen_q", [1, 33])
def test_grouped_heads(nheads_k, seqlen_q):
    check(dense(seqlen_q, 260, 64, torch.float16, True, nheads_k=nheads_k))


WINDOWS = list(itertools.product([-1, 0, 17, 400], [-1, 0, 23, 400]))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(128, 128), (100, 217), (250, 90)])
def test_windows_are_right_or_refused(seqlen_q, seqlen_k, window):
    problem = dense(seqlen_q, seqlen_k, 64, torch.bfloat16, window=window)
    reasons = BACKEND.unsupported(problem, backward=False)
    if reasons:
        assert seqlen_q > seqlen_k
        assert "misplaces" in reasons[0]
    else:
        check(problem)


@pytest.mark.parametrize("backward", [False, True])
def test_alibi_is_refused(backward):
    slopes = torch.rand(4, device="cuda")
    problem = dense(150, 200, 64, torch.float16, True, (-1, -1), slopes=slopes)
    (reason,) = BACKEND.unsupported(problem, backward)
    assert "alibi_slopes" in reason


def bounds(*lengths):
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).int()


PACKED = [
    ((64, 64), (64, 64)),
    ((1, 130, 0, 40), (70, 130, 20, 300)),
    ((1, 1, 1), (5, 200, 64)),
    ((1, 0, 1), (5, 200, 64)),
    ((5, 40), (0, 33)),
    ((100, 20), (30, 60)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths_q", "lengths_k"), PACKED)
@pytest.mark.parametrize("spare", [0, 3])
def test_packed(lengths_q, lengths_k, causal, dtype, spare):
    q = randn(sum(lengths_q) + spare, 4, 64, dtype=dtype)
    k, v = (randn(sum(lengths_k) + spare, 2, 64, dtype=dtype) for _ in "kv")
    check(
        ops.varlen_problem(
            q, k, v, bounds(*lengths_q), bounds(*lengths_k), max(lengths_q), max(lengths_k), 0.0,
            None, causal,
        )
    )  # fmt: skip


def test_packed_windows():
    q, k, v = randn(150, 4, 40), randn(250, 4, 40), randn(250, 4, 40)
    for window in ((20, 0), (20, 9), (-1, 9), (20, -1)):
        check(
            ops.varlen_problem(
                q, k, v, bounds(50, 100), bounds(150, 100), 100, 150, 0.0, None, False, *window
            )
        )


def test_misaligned_and_strided_inputs():
    flat = randn(2 * 40 * 4 * 64 + 1)
    q = flat[1:].view(2, 40, 4, 64)  # starts 2 bytes past an aligned address
    k = randn(2, 40, 4, 3 * 67)[..., 67:131]
    v = randn(2, 4, 40, 64).transpose(1, 2)
    check(ops.dense_problem(q, k, v, 0.0, None, True, -1, -1, 0.0, None))


def test_public_functions():
    q, k, v = (randn(2, 50, 4, 32).requires_grad_() for _ in range(3))
    with flash_attn.use_backend("cuda"):
        out = flash_attn_func(q, k, v, causal=True)
        out.sum().backward()
        with pytest.raises(UnsupportedProblemError, match="cuda: .*`softcap`"):
            flash_attn_func(q, k, v, softcap=10.0)
        packed = flash_attn_varlen_func(
            *(x.detach().flatten(0, 1) for x in (q, k, v)), bounds(50, 50), bounds(50, 50), 50, 50,
            causal=True,
        )  # fmt: skip
    torch.testing.assert_close(packed.view_as(out), out.detach(), atol=2e-2, rtol=2e-2)
    assert q.grad is not None


def test_the_variable_false_uses_them(monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "FALSE")
    calls = []
    monkeypatch.setattr(
        type(BACKEND), "forward", lambda self, *args: calls.append(1) or _original(self, *args)
    )
    q = randn(1, 8, 2, 64)
    flash_attn_func(q, q, q)
    assert calls == [1]


_original = type(BACKEND).forward


def test_the_deterministic_switch_is_left_as_it_was():
    before = torch.get_deterministic_debug_mode()
    check(dense(64, 64, 64, torch.bfloat16))
    assert torch.get_deterministic_debug_mode() == before
