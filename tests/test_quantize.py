"""float8 inputs and their factors: exactness, layouts, rotation, what attention makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import support
import torch
from torch import Tensor

from flash_attn import quantize
from flash_attn.core import problem_ops, reference
from flash_attn.core.problem import AttentionProblem, ScoreTransform
from flash_attn.errors import ConstraintError
from flash_attn.quantize import QuantizedQKV, quantize_fp8

FLOAT8 = torch.float8_e4m3fn
NAMES = ("q", "k", "v")


def inputs(
    device: str, dtype: torch.dtype = torch.float32, headdim: int = 64, family: str = "gaussian"
) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences of 20 queries in 4 heads and 33 keys in 2, heads of different sizes."""
    x = support.dense(device, dtype, 2, (20, 33), (4, 2), headdim, family=family)
    sizes = torch.tensor([0.1, 5.0], dtype=dtype, device=device)[:, None]
    return x.q, x.k * sizes, x.v * sizes.flip(0)


def restored(x: Tensor, descale: Tensor) -> Tensor:
    """The numbers that a dense float8 tensor stands for."""
    factors = descale.repeat_interleave(x.shape[-2] // descale.shape[-1], dim=-1)
    return x.float() * factors[:, None, :, None]


def pairs(got: QuantizedQKV) -> list[tuple[Tensor, Tensor]]:
    return list(zip(got[:3], got[3:], strict=True))


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip(device: str, dtype: torch.dtype, per_head: bool) -> None:
    """Off by half a step of the type, and its whole range is used."""
    given = inputs(device, dtype)
    got = quantize_fp8(*given, per_head=per_head)
    for x, (x8, descale) in zip(given, pairs(got), strict=True):
        assert (x8.dtype, x8.shape) == (FLOAT8, x.shape)
        assert (descale.dtype, descale.shape) == (torch.float32, (2, 2))
        error = (restored(x8, descale) - x.float()).abs()
        step = torch.maximum(x.float().abs() * 2.0**-4, descale.max() * 2.0**-10)
        assert (error <= step * (1.0 + 1e-5)).all()
        heads = x8.float().unflatten(2, (2, -1)).abs().amax(dim=(1, 3, 4))
        assert (heads == 448.0).all() if per_head else heads.max() == 448.0
        assert per_head or (descale == descale[0, 0]).all()


def test_factors_of_each_sequence_and_head(device: str) -> None:
    q, k, v = inputs(device)
    got = quantize_fp8(q, k, v)
    groups = q.unflatten(2, (2, 2)).abs().amax(dim=(1, 3, 4))
    for descale, largest in zip(
        got[3:], (groups, k.abs().amax(dim=(1, 3)), v.abs().amax(dim=(1, 3))), strict=True
    ):
        torch.testing.assert_close(descale, largest / 448.0)
    assert (got.k_descale[:, 1] > 10.0 * got.k_descale[:, 0]).all()


@pytest.mark.parametrize("options", [{}, {"per_head": False}])
def test_packed_is_as_dense(device: str, options: dict[str, Any]) -> None:
    """The same bits; rows of no sequence are 0 and count for nothing."""
    q, k, v = inputs(device)
    want = quantize_fp8(q, k, v, **options)
    bad = torch.full((3,), float("nan"), device=device)
    bad[1] = 1e30
    packed = []
    for x in (q, k, v):
        rows = x.flatten(0, 1)
        packed.append(torch.cat((bad[:, None, None].expand(3, *rows.shape[1:]), rows, rows[:5])))
    lengths = {
        f"cu_seqlens_{name}": torch.tensor([3, 3 + n, 3 + n, 3 + 2 * n]).int().to(device)
        for name, n in (("q", 20), ("k", 33))
    }
    packed[1][-5:] = packed[2][:1].mul(1e3)
    got = quantize_fp8(*packed, **options, **lengths)
    for name, x in zip(NAMES, got[:3], strict=True):
        inner = x[3:-5].float().unflatten(0, (2, -1))
        assert torch.equal(inner, getattr(want, name).float())
        assert not x[:3].float().any()
        assert not x[-5:].float().any()
    for found, expected in zip(got[3:], want[3:], strict=True):
        assert torch.equal(found[[0, 2]], expected)
        # The sequence in between is empty.
        empty = torch.ones_like(expected[0]) if options.get("per_head", True) else expected[0]
        assert torch.equal(found[1], empty)


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_to_quantize(device: str, packed: bool) -> None:
    shape = (0, 2, 8) if packed else (2, 0, 2, 8)
    x = torch.empty(shape, device=device)
    cu = torch.zeros(3, dtype=torch.int32, device=device)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu} if packed else {}
    for per_head in (True, False):
        for x8, descale in pairs(quantize_fp8(x, x, x, per_head=per_head, **lengths)):
            assert x8.shape == shape
            assert torch.equal(descale, torch.ones(2, 2, device=device))
    none = torch.empty(0, 3, 2, 8, device=device)
    assert quantize_fp8(none, none, none, per_head=False).q_descale.shape == (0, 2)


def test_zeros_are_exact(device: str) -> None:
    q, k, v = inputs(device)
    k = k.clone()
    k[1, :, 0] = 0.0
    got = quantize_fp8(torch.zeros_like(q), k, v, hadamard=True)
    assert not got.q.float().any()
    assert (got.q_descale == 1.0).all()
    assert got.k_descale[1, 0] == 1.0
    assert not got.k[1, :, 0].float().any()
    assert got.k_descale[1, 1] != 1.0


def test_tiny_and_huge_numbers(device: str) -> None:
    """No factor is 0 or infinite."""
    q, k, v = inputs(device)
    for size in (1e-44, 1e-38, 1e-30, 1e37):
        for x8, descale in pairs(quantize_fp8(q * size, k * size, v * size)):
            assert torch.isfinite(x8.float()).all()
            assert (torch.isfinite(descale) & (descale > 0.0)).all()
            assert size < 1e-37 or (x8.float().abs().amax() == 448.0)


def test_non_finite_numbers_stand_alone(device: str) -> None:
    """They become NaN; all others and the factors are as without them."""
    q, k, v = inputs(device)
    clean, dirty = v.clone(), v.clone()
    bad = [float("nan"), float("inf"), float("-inf")]
    for row, value in enumerate(bad):
        clean[0, row, 1, 5], dirty[0, row, 1, 5] = 0.0, value
    want, got = quantize_fp8(q, k, clean), quantize_fp8(q, k, dirty)
    assert torch.equal(got.v_descale, want.v_descale)
    found, expected = got.v.float(), want.v.float()
    assert found[0, :3, 1, 5].isnan().all()
    found[0, :3, 1, 5] = 0.0
    assert torch.equal(found, expected)
    only = torch.full_like(v, float("inf"))
    nothing = quantize_fp8(q, k, only)
    assert nothing.v.float().isnan().all()
    assert (nothing.v_descale == 1.0).all()


# Rotation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0, 2**63 - 1])
@pytest.mark.parametrize("headdim", [1, 7, 40, 64, 96, 128, 256])
def test_rotation_keeps_scores(device: str, headdim: int, seed: int | None) -> None:
    q, k, _ = inputs(device, headdim=headdim)
    turned_q, turned_k = (quantize._rotated(x, seed) for x in (q, k))
    k, turned_k = (x.repeat_interleave(2, dim=2).double() for x in (k, turned_k))
    want = torch.einsum("bqhd,bkhd->bhqk", q.double(), k)
    got = torch.einsum("bqhd,bkhd->bhqk", turned_q.double(), turned_k)
    torch.testing.assert_close(got, want, atol=1e-5 * headdim, rtol=1e-5)
    one = torch.eye(headdim, device=device)
    matrix = quantize._rotated(one, seed)
    width = headdim & -headdim
    assert ((matrix != 0).sum(1) == width).all()
    torch.testing.assert_close(matrix[matrix != 0].abs(), torch.full_like(one, width**-0.5)[
        matrix != 0
    ])  # fmt: skip


def test_rotation_does_not_depend_on_autocast(device: str) -> None:
    q, k, v = inputs(device)
    want = quantize_fp8(q, k, v, hadamard=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = quantize_fp8(q, k, v, hadamard=True)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.float(), b.float())


def test_seeds(device: str) -> None:
    signs = {seed: quantize._signs(4096, seed, torch.device(device)) for seed in (0, 1, 2**40)}
    for x in signs.values():
        assert (x.abs() == 1.0).all()
        assert abs(float(x.mean())) < 0.08  # five standard deviations
    assert not torch.equal(signs[0], signs[1])
    assert not torch.equal(signs[0], signs[2**40])
    assert torch.equal(signs[1], quantize._signs(4096, 1, torch.device(device)))


def attention_error(given: tuple[Tensor, ...], **options: Any) -> float:
    """Relative error of float8 attention, against float64 on the numbers before quantisation."""
    transform = ScoreTransform(given[0].shape[-1] ** -0.5)
    want = reference.attention(AttentionProblem(*given, transform)).out
    got = quantize_fp8(*given, **options)
    factors = dict(zip(("q_descale", "k_descale", "v_descale"), got[3:], strict=True))
    problem = AttentionProblem(*got[:3], transform._replace(**factors), out_dtype=torch.float32)
    out = problem_ops.solve(problem)[0]
    return float((out.double() - want).norm() / want.norm())


def with_outliers(device: str, headdim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Few channels of q and k 20 times as large as the others: they leave those few bits."""
    x = support.dense(device, torch.float32, 2, (64, 128), (4, 2), headdim)
    size = torch.ones(headdim, device=device)
    size[:: headdim // 2] = 20.0
    return x.q * size, x.k * size / 20.0, x.v


@pytest.mark.parametrize("headdim", [64, 96, 128])
def test_attention_error(device: str, headdim: int) -> None:
    """A few hundredths on Gaussian inputs, whatever is asked for; rotation does not hurt them."""
    given = support.dense(device, torch.float32, 2, (64, 128), (4, 2), headdim).tensors[:3]
    for options in ({}, {"per_head": False}, {"hadamard": True}, {"hadamard": True, "seed": 1}):
        assert attention_error(given, **options) < 0.07, options


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("headdim", [64, 96, 128])
def test_rotation_helps_against_outliers(device: str, headdim: int, seed: int | None) -> None:
    given = with_outliers(device, headdim)
    plain = attention_error(given)
    assert attention_error(given, hadamard=True, seed=seed) < 0.5 * plain


def test_factors_of_heads_help(device: str) -> None:
    """Heads of very different sizes: one factor for all leaves the small ones few bits."""
    q, k, v = support.dense(device, torch.float32, 2, (64, 128), (4, 2), 64).tensors[:3]
    size = torch.tensor([1e-5, 1.0], device=device)[:, None]
    given = (q / size.repeat_interleave(2, dim=0), k * size, v)
    assert attention_error(given) < 0.07
    assert attention_error(given, per_head=False) > 2.0 * attention_error(given)


# Use ---------------------------------------------------------------------------------------------


def test_layouts_are_kept(device: str) -> None:
    q, k, v = inputs(device)
    want = quantize_fp8(q, k, v)
    for name, layout in support.LAYOUTS.items():
        if not name.startswith("expanded"):
            got = quantize_fp8(layout(q), layout(k), layout(v))
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a.float(), b.float()), name
                assert a.stride(-1) == 1


def test_leaves_no_gradient(device: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(device))
    assert not any(x.requires_grad for x in quantize_fp8(q, k, v))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled(device: str, packed: bool) -> None:
    torch._dynamo.reset()
    given = inputs(device)
    if packed:
        given = tuple(x.flatten(0, 1) for x in given)
    cu_q, cu_k = (torch.tensor([0, n, 2 * n]).int().to(device) for n in (20, 33))
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k} if packed else {}

    def function(q: Tensor, k: Tensor, v: Tensor) -> QuantizedQKV:
        return quantize_fp8(q, k, v, hadamard=True, seed=4, **lengths)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for found, want in zip(compiled(*given), function(*given), strict=True):
        assert torch.equal(found.float(), want.float())


@pytest.mark.gpu
def test_the_host_does_not_wait() -> None:
    given = inputs("cuda")
    packed = tuple(x.flatten(0, 1) for x in given)
    cu_q, cu_k = (torch.tensor([0, n, 2 * n]).int().cuda() for n in (20, 33))
    quantize_fp8(*given, hadamard=True, seed=1)  # cuBLAS may wait when it is first used
    with support.no_synchronisation():
        quantize_fp8(*given, hadamard=True, seed=1)
        quantize_fp8(*packed, per_head=False, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def _wrong() -> dict[str, tuple[dict[str, Any], str]]:
    q, k, v = inputs("cpu")
    cu = torch.tensor([0, 3], dtype=torch.int32)
    packed = {"q": q[0], "k": k[0], "v": v[0], "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    return {
        "not a tensor": ({"q": [1.0]}, "`q` must be a torch.Tensor, found list"),
        "dimensions": ({"k": k[0]}, r"`k` must have shape \(batch, seqlen, nheads_k, headdim\)"),
        "packed dimensions": (packed | {"q": q}, r"`q` must have shape \(total, nheads, headdim\)"),
        "integers": ({"q": q.int()}, "`q` has dtype int32"),
        "dtypes": ({"v": v.half()}, "`q` and `v` must have the same dtype"),
        "again": ({"q": q.to(FLOAT8)}, "`q` is float8 already"),
        "heads": ({"q": q[:, :, :3]}, "`q` has 3, `k` has 2"),
        "head dims": ({"k": k[..., :32]}, "`k` must have head dim 64"),
        "batch": ({"k": k[:1], "v": v[:1]}, "`k` must have batch size 2 like `q`, found 1"),
        "one length": (packed | {"cu_seqlens_k": None}, "`cu_seqlens_k` is None"),
        "other length": (packed | {"cu_seqlens_q": None}, "`cu_seqlens_q` is None"),
        "int64": (packed | {"cu_seqlens_q": cu.long()}, "`cu_seqlens_q` must have dtype int32"),
        "count": (packed | {"cu_seqlens_k": cu[:1]}, "`cu_seqlens_k` must have shape"),
        "none": (packed | {"cu_seqlens_q": cu[:0]}, "`cu_seqlens_q` must have batch"),
        "seed alone": ({"seed": 3}, "`seed` is for `hadamard=True`, found 3"),
        "negative seed": ({"seed": -1, "hadamard": True}, "`seed` must not be negative"),
        "no seed": ({"seed": "a", "hadamard": True}, "`seed` must be an integer"),
    }


@pytest.mark.parametrize("name", list(_wrong()))
def test_bad_input(name: str) -> None:
    changes, message = _wrong()[name]
    given = dict(zip(NAMES, inputs("cpu"), strict=True)) | changes
    with pytest.raises(ConstraintError, match=message):
        quantize_fp8(**given)
