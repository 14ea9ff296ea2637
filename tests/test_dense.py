"""The dense functions against float64: head dims, lengths, masks, scores, heads, hard inputs."""

from __future__ import annotations

from typing import Any

import pytest
import support
import torch
from support import DTYPES, FAMILIES, HALF_DTYPES, HEADDIMS, ODD_HEADDIMS

import flash_attn
from flash_attn.core.plan import TilePlan, override
from flash_attn.errors import ConstraintError

pytestmark = pytest.mark.families


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("headdim", HEADDIMS + ODD_HEADDIMS)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_headdim(device: str, dtype: torch.dtype, headdim: int, causal: bool) -> None:
    seqlens = support.pick(device, (33, 49), (113, 203))
    inputs = support.dense(device, dtype, seqlens=seqlens, headdim=headdim, causal=causal)
    support.run_and_check(inputs)


def test_headdim_float32(device: str) -> None:
    seqlens = support.pick(device, (33, 49), (113, 203))
    for headdim in support.pick(device, HEADDIMS + ODD_HEADDIMS, [24, 64, 72, 128, 256]):
        inputs = support.dense(device, torch.float32, seqlens=seqlens, headdim=headdim, causal=True)
        support.run_and_check(inputs)


SEQLENS = [0, 1, 2, 3, 17, 97, 113, 129, 200]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", SEQLENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_seqlens(device: str, dtype: torch.dtype, seqlen_q: int, causal: bool) -> None:
    """Every pair of lengths, queries more and fewer than keys."""
    for seqlen_k in SEQLENS:
        inputs = support.dense(
            device, dtype, batch=1, seqlens=(seqlen_q, seqlen_k), heads=(1, 1), causal=causal
        )
        support.run_and_check(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize(
    "seqlens", [(300, 100), (129, 500), (1023, 1023), (1023, 1025), (2048, 17)]
)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_long_seqlens(
    dtype: torch.dtype, seqlens: tuple[int, int], headdim: int, causal: bool
) -> None:
    inputs = support.dense(
        "cuda", dtype, seqlens=seqlens, heads=(4, 2), headdim=headdim, causal=causal
    )
    support.run_and_check(inputs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_family(device: str, dtype: torch.dtype, family: str, causal: bool) -> None:
    seqlens = support.pick(device, (65, 65), (257, 257))
    inputs = support.dense(
        device, dtype, batch=3, seqlens=seqlens, heads=(4, 2), headdim=64, family=family,
        causal=causal,
    )  # fmt: skip
    support.run_and_check(inputs)


# Names of features, for the tests that run each of them once on small problems; these tests are
# also what the interpreter runs.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "left": {"window_size": (11, -1)},
    "right": {"window_size": (-1, 5)},
    "both": {"window_size": (13, 4)},
    "causal_left": {"causal": True, "window_size": (9, 30)},
    "one_key": {"window_size": (0, 0)},
    "softcap": {"softcap": 2.5},
    "softcap_causal": {"softcap": 2.5, "causal": True},
    "negative_scale": {"softmax_scale": -0.4},
    "negative_scale_window": {"softmax_scale": -0.4, "window_size": (13, 4)},
    "zero_scale": {"softmax_scale": 0.0},
    "large_scale": {"softmax_scale": 1.7, "causal": True},
}


@pytest.mark.parametrize("seqlens", support.some([(50, 50), (33, 71), (71, 33)], [(66, 71)]))
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_dense(
    device: str, dtype: torch.dtype, feature: str, seqlens: tuple[int, int]
) -> None:
    if device == "cuda":
        seqlens = (3 * seqlens[0] + 1, 3 * seqlens[1] + 1)
    inputs = support.dense(device, dtype, batch=1, seqlens=seqlens, headdim=24, **FEATURES[feature])
    support.run_and_check(inputs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("seqlens", support.some([(40, 40), (19, 70), (70, 19)], [(70, 19)]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_alibi(
    device: str, dtype: torch.dtype, seqlens: tuple[int, int], per_batch: bool, causal: bool
) -> None:
    slopes = support.alibi_slopes(device, 2, 2 if per_batch else None)
    inputs = support.dense(device, dtype, seqlens=seqlens, headdim=16, causal=causal)
    support.run_and_check(inputs.but(alibi_slopes=slopes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_alibi_with_softcap_and_window(device: str, dtype: torch.dtype) -> None:
    slopes = support.alibi_slopes(device, 2, 2)
    inputs = support.dense(
        device, dtype, seqlens=(45, 60), headdim=32, softcap=3.0, window_size=(20, 7)
    )
    support.run_and_check(inputs.but(alibi_slopes=slopes))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(6, 2), (4, 1), (5, 5), (8, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_heads(
    device: str, dtype: torch.dtype, heads: tuple[int, int], causal: bool
) -> None:
    seqlens = support.pick(device, (33, 40), (130, 190))
    inputs = support.dense(device, dtype, seqlens=seqlens, heads=heads, headdim=64, causal=causal)
    support.run_and_check(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_shared_heads(device: str, dtype: torch.dtype) -> None:
    inputs = support.dense(device, dtype, seqlens=(35, 41), heads=(4, 2), headdim=40, causal=True)
    support.run_and_check(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys(device: str, dtype: torch.dtype) -> None:
    """Their output and gradients are 0, their LSE is +inf, and other rows do not notice."""
    inputs = support.dense(device, dtype, seqlens=(40, 12), causal=True)
    got = support.run_and_check(inputs)
    dead = slice(0, 28)
    assert (got.out[:, dead] == 0).all()
    assert (got.lse[:, :, dead] == float("inf")).all()
    assert (got.dq[:, dead] == 0).all()
    assert torch.isfinite(got.lse[:, :, 28:]).all()
    louder = inputs.dout.clone()
    louder[:, dead] *= 1000.0
    again = support.run(inputs.but(dout=louder))
    assert torch.equal(again.dk, got.dk)
    assert torch.equal(again.dv, got.dv)


@pytest.mark.parametrize("seqlens", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_empty(
    device: str, dtype: torch.dtype, batch: int, seqlens: tuple[int, int]
) -> None:
    inputs = support.dense(device, dtype, batch=batch, seqlens=seqlens)
    got, _ = support.run_private(inputs)
    support.assert_same_bits(got, support.run(inputs))
    assert got.lse.shape == (batch, 2, seqlens[0])
    assert (got.lse == float("inf")).all()
    for x in (got.out, got.dq, got.dk, got.dv):
        assert (x == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_private_backward_writes_everything(device: str, dtype: torch.dtype) -> None:
    """Buffers full of NaN end up as the public function's gradients, bit for bit."""
    for options in support.some(
        [{}, {"causal": True}, {"window_size": (7, 3)}], [{"causal": True}]
    ):
        inputs = support.dense(device, dtype, seqlens=(37, 21), headdim=24, **options)
        got, _ = support.run_private(inputs)
        support.assert_same_bits(got, support.run(inputs), str(options))


def test_forward_writes_into_out(device: str) -> None:
    inputs = support.dense(device, torch.float16, seqlens=(37, 21), causal=True)
    scale = 32**-0.5
    out = support.poisoned_like(inputs.q)
    results = flash_attn.flash_attn_interface.flash_attn_gpu.fwd(
        inputs.q, inputs.k, inputs.v, out, None, 0.0, scale, True, -1, -1, 0.0, False
    )
    assert results[0].data_ptr() == out.data_ptr()
    assert torch.equal(out, support.run(inputs).out)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (30, 9)}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_repeatable(device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    seqlens = support.pick(device, (65, 65), (700, 700))
    inputs = support.dense(
        device, dtype, seqlens=seqlens, heads=(4, 2), headdim=64, deterministic=True, **options
    )
    first = support.run(inputs)
    for repeat in range(support.pick(device, 5, 200)):
        support.assert_same_bits(support.run(inputs), first, f"in repeat {repeat}")


def _batched_truth(inputs: support.Inputs) -> support.Solution:
    """Unmasked attention of one head in float64 over the batch at once."""
    q, k, v, dout = (x.double().squeeze(-2) for x in inputs.tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    s = q @ k.mT * q.shape[-1] ** -0.5
    out = torch.softmax(s, -1) @ v
    grads = torch.autograd.grad(out, leaves, dout)
    lse = torch.logsumexp(s, -1).detach()[:, None]
    return support.Solution(out.detach()[:, :, None], lse, *(x[:, :, None] for x in grads))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_large_batch(device: str, dtype: torch.dtype) -> None:
    """More sequences than a grid's second and third dimensions can count."""
    for batch in support.pick(device, [300], [65535, 65536, 80000, 131072]):
        inputs = support.dense(device, dtype, batch=batch, seqlens=(2, 3), heads=(1, 1), headdim=16)
        got, true = support.run(inputs), _batched_truth(inputs)
        support.check_lse(got.lse, true.lse)
        for name in ("out", *support.GRADIENT_NAMES):
            support.assert_close(getattr(got, name), getattr(true, name), dtype, name)


def _needs_free_memory(gigabytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, found {free / 2**30:.1f}")


@pytest.mark.gpu
def test_more_than_2_to_31_elements_in_a_sequence() -> None:
    _needs_free_memory(40)
    rows, seen, headdim = 2**24 + 77, 200, 128
    k = torch.zeros(1, rows, 1, headdim, dtype=torch.bfloat16, device="cuda")
    k[:, -seen:].normal_()
    q, dout = torch.randn(2, 1, 64, 1, headdim, device="cuda").bfloat16()
    options = {"window_size": (50, 0)}
    whole = support.run(support.Inputs(q, k, k, dout, options))
    tail = k[:, -seen:].clone()
    part = whole._replace(dk=whole.dk[:, -seen:], dv=whole.dv[:, -seen:])
    support.check(support.Inputs(q, tail, tail, dout, options), part)
    assert not whole.dk[:, :-seen].any()
    assert not whole.dv[:, :-seen].any()


@pytest.mark.gpu
def test_more_than_2_to_31_elements_in_a_batch() -> None:
    _needs_free_memory(40)
    x = torch.empty(2**17 + 9, 128, 1, 128, dtype=torch.bfloat16, device="cuda").normal_()
    inputs = support.Inputs(x, x, x, x, {"causal": True})
    whole = support.run(inputs)
    for rows in (slice(0, 2), slice(2**16, 2**16 + 2), slice(2**17 + 7, None)):
        part = x[rows].clone()
        picked = support.Solution(*(result[rows] for result in whole))
        support.check(support.Inputs(part, part, part, part, {"causal": True}), picked)


# Returns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_returns(device: str, dtype: torch.dtype) -> None:
    inputs = support.dense(device, dtype, seqlens=(5, 9), heads=(4, 2))
    q, k, v = inputs.q, inputs.k, inputs.v
    alone = flash_attn.flash_attn_func(q, k, v)
    out, lse, s_dmask = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert torch.equal(alone, out)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)
    assert (s_dmask.shape, s_dmask.dtype) == ((0,), dtype)
    private = support.run_forward(inputs)
    assert len(private) == 4
    assert torch.equal(private[0], out)
    assert (private[3].shape, private[3].dtype) == ((2,), torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_out_is_differentiable(device: str, dtype: torch.dtype) -> None:
    inputs = support.dense(device, dtype)
    q = inputs.q.requires_grad_()
    out, lse, s_dmask = flash_attn.flash_attn_func(q, inputs.k, inputs.v, return_attn_probs=True)
    assert out.requires_grad
    assert not lse.requires_grad
    assert not s_dmask.requires_grad
    with torch.no_grad():
        assert flash_attn.flash_attn_func(q, inputs.k, inputs.v).grad_fn is None
    out.sum().backward()
    assert inputs.k.grad is None


@pytest.mark.parametrize("causal", support.some([False, True], [True]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_packed(device: str, dtype: torch.dtype, causal: bool) -> None:
    """qkv and kv in one tensor: the same numbers, and one contiguous gradient."""
    inputs = support.dense(device, dtype, seqlens=(35, 35), causal=causal)
    want = support.run(inputs)
    qkv = torch.stack([inputs.q, inputs.k, inputs.v], dim=2).requires_grad_()
    out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=causal)
    (dqkv,) = torch.autograd.grad(out, qkv, inputs.dout)
    assert torch.equal(out, want.out)
    assert dqkv.is_contiguous()
    assert torch.equal(dqkv, torch.stack([want.dq, want.dk, want.dv], dim=2))

    q, kv = inputs.q.requires_grad_(), torch.stack([inputs.k, inputs.v], dim=2).requires_grad_()
    out = flash_attn.flash_attn_kvpacked_func(q, kv, causal=causal)
    dq, dkv = torch.autograd.grad(out, (q, kv), inputs.dout)
    assert torch.equal(out, want.out)
    assert dkv.is_contiguous()
    assert torch.equal(dq, want.dq)
    assert torch.equal(dkv, torch.stack([want.dk, want.dv], dim=2))


def test_packed_returns(device: str) -> None:
    inputs = support.dense(device, torch.float16, seqlens=(6, 6))
    qkv = torch.stack([inputs.q, inputs.k, inputs.v], dim=2)
    for result in (
        flash_attn.flash_attn_qkvpacked_func(qkv, return_attn_probs=True),
        flash_attn.flash_attn_kvpacked_func(inputs.q, qkv[:, :, 1:], return_attn_probs=True),
    ):
        assert [tuple(x.shape) for x in result] == [(2, 6, 2, 32), (2, 2, 6), (0,)]


@pytest.mark.parametrize("causal", [False, True])
def test_probabilities(device: str, causal: bool) -> None:
    inputs = support.dense(device, torch.float32, seqlens=(9, 6), heads=(4, 2), causal=causal)
    p = flash_attn.flash_attn_interface.attention_probs(inputs.q, inputs.k, causal=causal)
    v = inputs.v.repeat_interleave(2, dim=2)
    out = torch.einsum("bhqk,bkhd->bqhd", p, v)
    support.assert_close(out, support.run(inputs).out, torch.float32)


def test_wrong_arguments_raise(device: str) -> None:
    inputs = support.dense(device, torch.float16)
    for change in (
        {"k": inputs.k[:, :, :, :16]},
        {"v": inputs.v[:, :-1]},
        {"k": inputs.k.bfloat16()},
        {"q": inputs.q[:, :, :1].expand(-1, -1, 3, -1)},
        {"dropout_p": 1.0},
        {"softcap": 1.0, "dropout_p": 0.1},
        {"alibi_slopes": torch.ones(3, device=device)},
        {"window_size": (1, 2, 3)},
    ):
        changed = inputs.but(**change)
        with pytest.raises(ConstraintError):
            flash_attn.flash_attn_func(changed.q, changed.k, changed.v, **changed.options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softmax_scale", [0.0, -0.4, 1.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_scale_under_a_mask(
    device: str, dtype: torch.dtype, softmax_scale: float, causal: bool
) -> None:
    """Equal lengths, where kernels of others may serve: they may scale what is masked already."""
    inputs = support.dense(
        device, dtype, seqlens=(33, 33), headdim=32, causal=causal, softmax_scale=softmax_scale
    )
    support.run_and_check(inputs)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (20, 5), "softcap": 5.0}, {"dropout_p": 0.3}],
    ids=str,
)
def test_feature_dk_and_dv_apart(
    device: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch of the portable kernels for each gives what one for both does."""
    if device == "cpu" and not support.INTERPRETED:
        pytest.skip("the portable kernels need a GPU or the interpreter")
    launch_backward = pytest.importorskip("flash_attn.backends.triton.launch_backward")
    launched, launch = [], launch_backward._launch_dkdv

    def noted(kernel: str, *rest: Any) -> None:
        launched.append(kernel)
        launch(kernel, *rest)

    monkeypatch.setattr(launch_backward, "_launch_dkdv", noted)
    inputs = support.dense(
        device, torch.float16, seqlens=(70, 75), heads=(4, 2), headdim=40, **options
    )
    plan = TilePlan(32, 32, 4, 1)
    found = []
    for plans in ({"dkdv": plan}, {"dk": plan, "dv": plan}):
        torch.manual_seed(1)
        with flash_attn.use_backend("triton"), override(**plans):
            found.append(support.run(inputs))
    assert launched == ["dkdv", "dk", "dv"]
    support.assert_same_bits(*found)
    assert found[0].dk.any()
    assert found[0].dv.any()
