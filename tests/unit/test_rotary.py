"""Rotary embedding: meaning, gradients, in-place behaviour, validation and the module."""

from __future__ import annotations

import itertools

import pytest
import torch

from flash_attn.core.rotary import rotate
from flash_attn.errors import ConstraintError
from flash_attn.layers import rotary as layer
from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from flash_attn.ops.triton.rotary import apply_rotary

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-6, torch.float64: 1e-13}


def make_tables(seqlen, half, device, dtype=torch.float32):
    angle = torch.randn(seqlen, half, device=device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_by_complex_numbers(x, cos, sin, positions, interleaved, conjugate=False):
    """float64: pair (a, b) is a + ib, times cos + i sin; positions has x's shape less (H, D)."""
    half = cos.shape[1]
    x = x.double()
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = head.unflatten(-1, (half, 2)) if interleaved else head.unflatten(-1, (2, half)).mT
    turn = torch.complex(cos.double(), sin.double())[positions].unsqueeze(-2)
    if conjugate:
        turn = turn.conj()
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = turned.flatten(-2) if interleaved else turned.mT.flatten(-2)
    return torch.cat((turned, rest), -1)


def assert_near(got, want):
    atol = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=atol)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize(
    ("headdim", "rotary_dim"), [(64, 64), (64, 32), (96, 22), (59, 58), (256, 256), (2, 2)]
)
def test_dense_matches_complex_numbers(device, dtype, interleaved, conjugate, headdim, rotary_dim):
    x = torch.randn(2, 13, 3, headdim, device=device, dtype=dtype)
    before = x.clone()
    cos, sin = make_tables(20, rotary_dim // 2, device, dtype)
    out = apply_rotary(x, cos, sin, seqlen_offsets=5, interleaved=interleaved, conjugate=conjugate)
    positions = (torch.arange(13, device=device) + 5).expand(2, 13)
    assert_near(out, rotate_by_complex_numbers(x, cos, sin, positions, interleaved, conjugate))
    assert out.dtype == dtype
    assert torch.equal(x, before)
    assert torch.equal(out[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_offsets_of_every_sequence(device, interleaved, index_dtype):
    x = torch.randn(4, 7, 2, 32, device=device)
    cos, sin = make_tables(50, 12, device)
    offsets = torch.tensor([0, 43, 7, 1], device=device, dtype=index_dtype)
    out = apply_rotary(x, cos, sin, seqlen_offsets=offsets, interleaved=interleaved)
    positions = offsets.long()[:, None] + torch.arange(7, device=device)
    assert_near(out, rotate_by_complex_numbers(x, cos, sin, positions, interleaved))
    for offset in (3, torch.tensor(3, device=device)):
        same = apply_rotary(x, cos, sin, seqlen_offsets=offset)
        assert torch.equal(same, apply_rotary(x, cos, sin, torch.full_like(offsets, 3)))


@pytest.mark.parametrize("with_offsets", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "lengths", [[5, 1, 9], [0, 5, 0, 0, 9, 0], [0, 0], [17], [1] * 40, [70, 3]]
)
def test_packed_equals_each_sequence_alone(device, lengths, interleaved, with_offsets):
    bounds = list(itertools.accumulate(lengths, initial=0))
    x = torch.randn(bounds[-1], 3, 32, device=device)
    cos, sin = make_tables(90, 8, device)
    cu_seqlens = torch.tensor(bounds, device=device, dtype=torch.int32)
    offsets = [(3 * b) % 19 if with_offsets else 0 for b in range(len(lengths))]
    given = torch.tensor(offsets, device=device, dtype=torch.int32) if with_offsets else 0
    out = apply_rotary(x, cos, sin, given, cu_seqlens, max(lengths), interleaved)
    for start, end, offset in zip(bounds, bounds[1:], offsets, strict=False):
        alone = apply_rotary(x[None, start:end], cos, sin, offset, interleaved=interleaved)
        assert torch.equal(out[start:end], alone[0])


def test_packed_rows_of_no_sequence_are_copied(device):
    x = torch.randn(20, 2, 16, device=device)
    x[0], x[19] = float("inf"), float("nan")
    cos, sin = make_tables(20, 8, device)
    cu_seqlens = torch.tensor([3, 8, 15], device=device, dtype=torch.int32)
    out = apply_rotary(x, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=7)
    assert torch.equal(out[:3], x[:3])
    assert torch.equal(out[15:19], x[15:19])
    assert out[19].isnan().all()
    assert torch.equal(out[3:8], apply_rotary(x[None, 3:8], cos, sin)[0])
    nothing = torch.zeros(1, device=device, dtype=torch.int32)
    assert torch.equal(apply_rotary(x[:19], cos, sin, cu_seqlens=nothing, max_seqlen=0), x[:19])


def test_hostile_offsets_use_the_nearest_row(device):
    x = torch.randn(5, 3, 2, 16, device=device)
    cos, sin = make_tables(6, 8, device)
    extreme = torch.tensor([-1, 5, 6, 2**31 - 1, -(2**31)], device=device, dtype=torch.int32)
    out = apply_rotary(x, cos, sin, extreme)
    positions = (extreme.long()[:, None] + torch.arange(3, device=device)).clamp(0, 5)
    assert_near(out, rotate_by_complex_numbers(x, cos, sin, positions, False))


def test_hostile_packed_bounds_stay_inside(device):
    x = torch.randn(9, 2, 16, device=device)
    cos, sin = make_tables(9, 8, device)
    for bounds in ([0, 1000, 2**31 - 1], [-5, 4, -7, 9], [2**31 - 1, -(2**31)], [9, 5, 0]):
        cu_seqlens = torch.tensor(bounds, device=device, dtype=torch.int32)
        out = apply_rotary(x, cos, sin, cu_seqlens=cu_seqlens)
        assert out.shape == x.shape
        assert out.isfinite().all()
        norms = out.reshape(9, 2, 2, 8).norm(dim=2)
        torch.testing.assert_close(norms, x.reshape(9, 2, 2, 8).norm(dim=2))


def test_conjugate_is_the_inverse(device):
    x = torch.randn(2, 9, 3, 40, device=device, dtype=torch.float64)
    cos, sin = (t.double() for t in make_tables(9, 16, device, torch.float64))
    norm = (cos**2 + sin**2).sqrt()
    cos, sin = cos / norm, sin / norm
    back = apply_rotary(apply_rotary(x, cos, sin), cos, sin, conjugate=True)
    torch.testing.assert_close(back, x, atol=1e-13, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["heads first", "every other", "odd start", "one of three"])
def test_strided_input(device, layout, inplace, interleaved):
    base = torch.randn(2, 12, 24, 3, 101, device=device)
    x = {
        "heads first": base[:, :, :, 0, :64].permute(0, 2, 1, 3),
        "every other": base[:, :, ::2, 1, :100:2],
        "odd start": base[:, :, :, 2, 1:65],
        "one of three": base[..., 1, :64],
    }[layout]
    cos, sin = make_tables(24, 16, device)
    want = apply_rotary(x.contiguous(), cos, sin, interleaved=interleaved)
    untouched, tokens = base.clone(), x.clone()
    strided_cos = torch.stack((cos, cos), -1)[..., 0]
    out = apply_rotary(x, strided_cos, sin, interleaved=interleaved, inplace=inplace)
    assert torch.equal(out, want)
    assert (out.data_ptr() == x.data_ptr()) == inplace
    x.copy_(tokens)
    assert torch.equal(base, untouched)  # nothing beside x was written


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16), (2, 5, 2, 0)])
def test_empty(device, shape):
    cos, sin = make_tables(5, 8 if shape[-1] else 0, device)
    for inplace in (False, True):
        x = torch.empty(shape, device=device, requires_grad=True)
        out = apply_rotary_emb(x, cos, sin, inplace=inplace)
        assert out.shape == shape
        out.sum().backward()
        assert x.grad.shape == shape


def test_nothing_to_rotate(device):
    x = torch.randn(1, 5, 2, 3, device=device)
    cos, sin = make_tables(5, 0, device)
    out = apply_rotary(x, cos, sin)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()
    assert apply_rotary(x, cos, sin, inplace=True) is x


def test_tables_of_another_dtype(device):
    x = torch.randn(1, 6, 2, 32, device=device, dtype=torch.bfloat16)
    cos, sin = make_tables(6, 16, device)
    positions = torch.arange(6, device=device)[None]
    out = apply_rotary(x, cos, sin)
    want = rotate_by_complex_numbers(x, cos, sin, positions, False)
    # Rounded once: tables rounded to x's dtype would double the error.
    assert ((out.double() - want).abs() <= 1.001 * 2**-8 * want.abs() + 1e-6).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_agrees_with_the_torch_formula(device, interleaved):
    x = torch.randn(2, 11, 4, 48, device=device)
    cos, sin = make_tables(11, 16, device)
    want = apply_rotary_emb_torch(x, cos, sin, interleaved)
    torch.testing.assert_close(apply_rotary_emb_func(x, cos, sin, interleaved), want)
    batched = (cos.expand(2, 11, 16), sin.expand(2, 11, 16))
    assert torch.equal(apply_rotary_emb_torch(x, *batched, interleaved), want)


def test_rotate_half():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rotate_half(x).tolist() == [-3.0, -4.0, 1.0, 2.0]
    assert rotate_half(x, interleaved=True).tolist() == [-2.0, 1.0, -4.0, 3.0]


# Gradients


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", ["number", "tensor", "packed"])
def test_gradcheck(device, kind, interleaved):
    cos, sin = make_tables(9, 3, device, torch.float64)
    options = {"interleaved": interleaved}
    shape = (2, 4, 2, 8)
    if kind == "number":
        options["seqlen_offsets"] = 2
    elif kind == "tensor":
        options["seqlen_offsets"] = torch.tensor([4, 1], device=device)
    else:
        bounds = torch.tensor([0, 3, 3, 6], device=device, dtype=torch.int32)
        options |= {"cu_seqlens": bounds, "max_seqlen": 3}
        shape = (7, 2, 8)
    x = torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)

    def forward(x):
        return apply_rotary_emb(x, cos, sin, **options)

    assert torch.autograd.gradcheck(forward, x)
    assert torch.autograd.gradgradcheck(forward, x)
    options["inplace"] = True
    assert torch.autograd.gradcheck(lambda x: forward(x * 1), x)
    assert torch.autograd.gradgradcheck(lambda x: forward(x * 1), x)


@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("gqa", [False, True])
def test_gradcheck_packed_projections(device, gqa, own_tables):
    cos, sin = make_tables(6, 2, device, torch.float64)
    keys = make_tables(6, 2, device, torch.float64) if own_tables else (None, None)
    shape = (2, 3, 4, 6) if gqa else (2, 3, 3, 2, 6)
    qkv = torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([3, 0], device=device)

    def of_qkv(qkv):
        return apply_rotary_emb_qkv_(
            qkv.clone(), cos, sin, *keys, seqlen_offsets=offsets, num_heads_q=2 if gqa else None
        )

    def of_kv(qkv):
        return apply_rotary_emb_kv_(qkv[:, :, 1:].clone(), cos, sin, True, 1)

    assert torch.autograd.gradcheck(of_qkv, qkv)
    assert torch.autograd.gradgradcheck(of_qkv, qkv)
    if not gqa:
        assert torch.autograd.gradcheck(of_kv, qkv)
        assert torch.autograd.gradgradcheck(of_kv, qkv)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_leaf(device, dtype, inplace):
    x = torch.randn(2, 17, 2, 32, device=device, dtype=dtype, requires_grad=True)
    reference = x.detach().double().requires_grad_()
    cos, sin = make_tables(17, 8, device, dtype)
    out = apply_rotary_emb(x, cos, sin, inplace=inplace)
    assert (out.data_ptr() == x.data_ptr()) == inplace
    positions = torch.arange(17, device=device).expand(2, 17)
    want = rotate_by_complex_numbers(reference, cos, sin, positions, False)
    grad = torch.randn_like(out)
    out.backward(grad.clone())
    want.backward(grad.double())
    assert_near(out.detach(), want.detach())
    assert_near(x.grad, reference.grad)


@pytest.mark.parametrize("function", ["one", "qkv", "kv"])
def test_incoming_gradients_are_left_alone(device, function):
    """Addition hands one gradient tensor to both of its terms; a sum hands out an expanded one."""
    cos, sin = make_tables(5, 4, device)
    shape = {"one": (2, 5, 3, 8), "qkv": (2, 5, 3, 3, 8), "kv": (2, 5, 2, 3, 8)}[function]
    x, other = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))

    def turn(x):
        if function == "one":
            return apply_rotary_emb(x, cos, sin, inplace=True)
        return (apply_rotary_emb_qkv_ if function == "qkv" else apply_rotary_emb_kv_)(x, cos, sin)

    grad = torch.randn(shape, device=device)
    given = grad.clone()
    (turn(x.clone()) + other).backward(given)
    assert torch.equal(other.grad, grad)
    assert torch.equal(given, grad)
    expected, x.grad = x.grad, None
    turn(x.clone()).backward(grad)
    assert torch.equal(x.grad, expected)
    x.grad = None
    turn(x.clone()).sum().backward()
    expected, x.grad = x.grad, None
    turn(x.clone()).backward(torch.ones(shape, device=device))
    assert torch.equal(x.grad, expected)


def test_saved_tensors_notice_the_change(device):
    x = torch.randn(1, 4, 1, 8, device=device, requires_grad=True)
    cos, sin = make_tables(4, 4, device)
    y = x.exp()  # keeps its result for the backward pass
    out = apply_rotary_emb(y, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("layout", ["packed", "grouped", "strided"])
def test_qkv_equals_its_parts(device, layout, own_tables, interleaved):
    cos, sin = make_tables(12, 8, device)
    keys = make_tables(12, 8, device) if own_tables else (None, None)
    nheads, nheads_k = (6, 2) if layout == "grouped" else (3, 3)
    if layout == "packed":
        qkv = torch.randn(2, 7, 3, 3, 24, device=device)
    elif layout == "grouped":
        qkv = torch.randn(2, 7, 10, 24, device=device)
    else:
        qkv = torch.randn(2, 7, 3, 3, 24, device=device).transpose(2, 3).contiguous()
        qkv = qkv.transpose(2, 3)
    flat = qkv.reshape(2, 7, -1, 24)
    q, k, v = flat.split((nheads, nheads_k, nheads_k), dim=2)
    turn = {"interleaved": interleaved, "seqlen_offsets": 4}
    want = torch.cat(
        (
            apply_rotary_emb(q, cos, sin, **turn),
            apply_rotary_emb(k, *(keys if own_tables else (cos, sin)), **turn),
            v,
        ),
        dim=2,
    )
    out = apply_rotary_emb_qkv_(
        qkv, cos, sin, *keys, interleaved, 4, nheads if layout == "grouped" else None
    )
    assert out.data_ptr() == qkv.data_ptr()
    assert torch.equal(out.reshape(2, 7, -1, 24), want)


def test_kv_equals_its_parts(device):
    cos, sin = make_tables(9, 8, device)
    kv = torch.randn(2, 7, 2, 3, 16, device=device)
    want = torch.stack((apply_rotary_emb(kv[:, :, 0], cos, sin, True, False, 2), kv[:, :, 1]), 2)
    out = apply_rotary_emb_kv_(kv, cos, sin, True, 2)
    assert torch.equal(out, want)
    assert out.data_ptr() == kv.data_ptr()


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_equals_eager(device, inplace):
    torch._dynamo.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"
    cos, sin = make_tables(8, 8, device)
    qkv = torch.randn(2, 8, 3, 2, 16, device=device)
    offsets = torch.tensor([0, 0], device=device, dtype=torch.int32)

    def forward(qkv):
        if inplace:
            return apply_rotary_emb_qkv_(qkv * 1, cos, sin, seqlen_offsets=offsets)
        return apply_rotary_emb(qkv[:, :, 0], cos, sin, interleaved=True)

    results = []
    for function in (forward, torch.compile(forward, backend=backend, fullgraph=True)):
        x = qkv.clone().requires_grad_()
        out = function(x)
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


# Validation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 5, 16)}, "`x` must have shape"),
        ({"x": (2, 5, 2, 264)}, "at most 256"),
        ({"x": (2, 5, 2, 8)}, "rotary_dim must be <= headdim: `cos` has 8"),
        ({"x": (2, 6, 2, 16)}, "at least 6 rows"),
        ({"cos": (4, 8)}, "same shape"),
        ({"cos": (5, 1, 8), "sin": (5, 1, 8)}, "same shape"),
        ({"seqlen_offsets": 1}, "at least 6 rows"),
        ({"seqlen_offsets": -1}, "must not be negative"),
        ({"seqlen_offsets": torch.zeros(3, dtype=torch.int32)}, r"must have shape \(2,\)"),
        ({"seqlen_offsets": torch.zeros(2)}, "int32 or int64"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int32)}, "with `cu_seqlens`"),
    ],
)
def test_bad_arguments(device, change, message):
    arguments = {"x": (2, 5, 2, 16), "cos": (5, 8), "sin": (5, 8)} | change
    for name, value in arguments.items():
        if isinstance(value, tuple):
            arguments[name] = torch.zeros(value, device=device)
        elif isinstance(value, torch.Tensor):
            arguments[name] = value.to(device)
    with pytest.raises(ConstraintError, match=message):
        apply_rotary_emb(**arguments)


def test_more_bad_arguments(device):
    x, (cos, sin) = torch.zeros(1, 5, 2, 16, device=device), make_tables(5, 8, device)
    with pytest.raises(ConstraintError, match="in place"):
        apply_rotary_emb(x[:, :1].expand(1, 5, 2, 16), cos, sin, inplace=True)
    with pytest.raises(ConstraintError, match="floating point"):
        apply_rotary(x.int(), cos, sin)
    with pytest.raises(ConstraintError, match="must be on"):
        apply_rotary(x, cos.to("meta"), sin.to("meta"))
    cu_seqlens = torch.tensor([0, 5], device=device, dtype=torch.int32)
    with pytest.raises(ConstraintError, match="at least 6 rows"):
        apply_rotary(x[0], cos, sin, cu_seqlens=cu_seqlens, max_seqlen=6)
    with pytest.raises(ConstraintError, match="cu_seqlens"):
        apply_rotary(x[0], cos, sin, cu_seqlens=cu_seqlens.float(), max_seqlen=5)
    with pytest.raises(ConstraintError, match="num_heads_q"):
        apply_rotary_emb_qkv_(x, cos, sin)
    with pytest.raises(ConstraintError, match="num_heads_q"):
        apply_rotary_emb_qkv_(x, cos, sin, num_heads_q=1)
    with pytest.raises(ConstraintError, match="`qkv` must have shape"):
        apply_rotary_emb_qkv_(x[:, :, None], cos, sin)
    with pytest.raises(ConstraintError, match="`kv` must have shape"):
        apply_rotary_emb_kv_(x, cos, sin)


# The module


@pytest.mark.parametrize("interleaved", [False, True])
def test_module_matches_its_definition(device, interleaved):
    rotary = RotaryEmbedding(16, base=100.0, interleaved=interleaved, device=device)
    assert rotary.state_dict() == {}
    assert list(rotary.parameters()) == []
    qkv = torch.randn(2, 10, 3, 2, 24, device=device)
    positions = (torch.arange(10, device=device) + 3).expand(2, 10)
    angle = torch.arange(13)[:, None] * 100.0 ** (-torch.arange(0, 16, 2).double() / 16)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    q, k, v = qkv.clone().unbind(2)
    out = rotary(qkv, seqlen_offset=3)
    assert out.data_ptr() == qkv.data_ptr()
    for got, x in ((out[:, :, 0], q), (out[:, :, 1], k)):
        want = rotate_by_complex_numbers(x, cos, sin, positions, interleaved)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    assert torch.equal(out[:, :, 2], v)
    assert rotary._cos_cached.shape == (13, 8)
    assert rotary._cos_k_cached is None


def test_module_with_separate_and_grouped_tensors(device):
    rotary = RotaryEmbedding(8, device=device)
    q = torch.randn(2, 6, 4, 16, device=device)
    kv = torch.randn(2, 6, 2, 2, 16, device=device)
    grouped = torch.cat((q, kv.flatten(2, 3)), dim=2)
    packed = rotary(grouped.clone(), num_heads_q=4, seqlen_offset=1)
    q_out, kv_out = rotary(q.clone(), kv.clone(), seqlen_offset=1)
    assert torch.equal(packed, torch.cat((q_out, kv_out.flatten(2, 3)), dim=2))
    offsets = torch.tensor([1, 1], device=device, dtype=torch.int32)
    q_out, kv_out = rotary(q.clone(), kv.clone(), seqlen_offset=offsets, max_seqlen=7)
    assert torch.equal(packed, torch.cat((q_out, kv_out.flatten(2, 3)), dim=2))
    with pytest.raises(ConstraintError, match="max_seqlen"):
        RotaryEmbedding(8, device=device)(q, kv, seqlen_offset=offsets)


def test_module_scores_depend_on_the_distance(device):
    for scale_base in (None, 512):
        rotary = RotaryEmbedding(16, scale_base=scale_base, device=device)
        token = torch.randn(1, 1, 2, 1, 16, device=device, dtype=torch.float64)
        qkv = torch.cat((token, token[:, :, :1]), dim=2).repeat(1, 40, 1, 1, 1)
        q, k, _ = rotary(qkv)[0, :, :, 0].unbind(1)
        scores = q @ k.T
        for distance in (0, 5, 20):
            diagonal = scores.diagonal(-distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5,
                                       atol=1e-4)  # fmt: skip


def test_module_xpos_tables(device):
    rotary = RotaryEmbedding(8, scale_base=4.0, device=device)
    assert rotary.state_dict() == {}
    rotary._update_cos_sin_cache(10, torch.device(device), torch.float32)
    plain = RotaryEmbedding(8, device=device)
    plain._update_cos_sin_cache(10, torch.device(device), torch.float32)
    scale = (torch.arange(0, 8, 2) + 3.2) / 11.2
    growth = (scale ** ((torch.arange(10)[:, None] - 5) / 4.0)).to(device)
    torch.testing.assert_close(rotary._cos_cached, plain._cos_cached * growth)
    torch.testing.assert_close(rotary._sin_k_cached, plain._sin_cached / growth)
    q = torch.randn(1, 10, 2, 8, device=device)
    kv = torch.randn(1, 10, 2, 2, 8, device=device)
    qkv = torch.cat((q[:, :, None], kv), dim=2)
    packed = rotary(qkv.clone())
    q_out, kv_out = rotary(q.clone(), kv.clone())
    assert torch.equal(packed, torch.cat((q_out[:, :, None], kv_out), dim=2))


def test_module_cache_is_renewed_when_needed(device):
    rotary = RotaryEmbedding(8, device=device)
    here = torch.empty(0, device=device).device
    rotary._update_cos_sin_cache(10, here, torch.float32)
    first = rotary._cos_cached
    rotary._update_cos_sin_cache(4, here, torch.float32)
    assert rotary._cos_cached is first
    rotary._update_cos_sin_cache(11, here, torch.float32)
    assert rotary._cos_cached.shape == (11, 4)
    rotary._update_cos_sin_cache(4, here, torch.float16)
    assert rotary._cos_cached.dtype == torch.float16
    with torch.inference_mode():
        rotary._update_cos_sin_cache(12, here, torch.float32)
    assert rotary._cos_cached.is_inference()
    x = torch.randn(1, 12, 3, 1, 8, device=device, requires_grad=True)
    rotary.train()(x * 1).sum().backward()
    assert not rotary._cos_cached.is_inference()


def test_module_cast_to_16_bits_keeps_precise_tables(device):
    precise, cast = RotaryEmbedding(32, device=device), RotaryEmbedding(32, device=device)
    cast = cast.to(torch.bfloat16)
    for rotary in (precise, cast):
        rotary._update_cos_sin_cache(2000, torch.device(device), torch.float32)
    assert cast.inv_freq.dtype == torch.bfloat16
    assert torch.equal(precise._cos_cached, cast._cos_cached)


def test_public_names():
    for name in layer.__all__:
        assert hasattr(layer, name)
    assert layer.apply_rotary_emb_func is layer.apply_rotary_emb


def test_core_gradients_flow_through_plain_operations():
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = make_tables(5, 3, "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin, seqlen_offsets=2), x)


def test_meta_tensors_give_shapes():
    x, table = torch.empty(2, 5, 4, 16, device="meta"), torch.empty(5, 8, device="meta")
    out = apply_rotary_emb(x, table, table, interleaved=True)
    assert (out.device.type, out.shape) == ("meta", x.shape)


def test_what_is_no_tensor_is_named():
    x, table = torch.randn(2, 5, 4, 16), torch.randn(5, 8)
    with pytest.raises(ConstraintError, match=r"`x` must be a torch\.Tensor.*list"):
        apply_rotary_emb([1.0], table, table)
    with pytest.raises(ConstraintError, match=r"`sin` must be a torch\.Tensor.*float"):
        apply_rotary_emb(x, table, 1.0)
