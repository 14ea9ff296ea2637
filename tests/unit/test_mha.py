"""The attention modules against plain PyTorch in float64, gradients included."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import flash_attn
from flash_attn.errors import ConstraintError
from flash_attn.layers.rotary import apply_rotary_emb_torch
from flash_attn.modules import mha as module
from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashAttention,
    FlashCrossAttention,
    FlashMHA,
    FlashSelfAttention,
    ParallelMHA,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.utils.generation import InferenceParams

FP32 = {"rtol": 1e-4, "atol": 1e-5}
HALF = {torch.float16: {"rtol": 4e-3, "atol": 4e-3}, torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}
BATCH, SEQLEN, NHEADS, HEADDIM = 2, 11, 4, 16
EMBED = NHEADS * HEADDIM


def close(actual, expected, tolerance=FP32):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected.double(), **tolerance)


def linear(x, layer):
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.weight.double(), bias)


def visible(seqlen_q, seqlen_k, device, causal=False, window=(-1, -1)):
    ahead = torch.arange(seqlen_k, device=device) - (
        torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    )
    keep = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        keep &= ahead <= 0
    if window[0] >= 0:
        keep &= ahead >= -window[0]
    if window[1] >= 0:
        keep &= ahead <= window[1]
    return keep, ahead


def attention(q, k, v, causal=False, window=(-1, -1), slopes=None, mask=None, scale=None):
    """float64 attention on (batch, seqlen, heads, headdim); rows without keys give zeros."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    keep, ahead = visible(q.shape[1], k.shape[1], q.device, causal, window)
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * ahead.abs()
    keep = keep.expand(scores.shape)
    if mask is not None:
        keep = keep & mask[:, None, None]
    scores = scores.masked_fill(~keep, -1e300)
    probs = scores.softmax(-1) * keep
    return torch.einsum("bhts,bshd->bthd", probs, v)


def tables(rotary_dim, seqlen, device, base=10000.0):
    exponents = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float64) / rotary_dim
    angles = torch.arange(seqlen, device=device, dtype=torch.float64)[:, None] * base**-exponents
    return angles.cos(), angles.sin()


def convolve(x, layer):
    weight, bias = layer.weight.double(), layer.bias.double()
    x = F.pad(x.transpose(1, 2), (2, 0))
    return F.conv1d(x, weight, bias, groups=x.shape[1]).transpose(1, 2)


def project(x, layer, x_kv=None):
    """float64 q, k, v of an MHA layer."""
    if layer.cross_attn:
        q, kv = linear(x, layer.Wq), linear(x if x_kv is None else x_kv, layer.Wkv)
        if layer.dwconv:
            q, kv = convolve(q, layer.dwconv_q), convolve(kv, layer.dwconv_kv)
    else:
        qkv = linear(x, layer.Wqkv)
        if layer.dwconv and layer.num_heads == layer.num_heads_kv:
            qkv = convolve(qkv, layer.dwconv_qkv)
        q, kv = qkv.split((layer.embed_dim, qkv.shape[-1] - layer.embed_dim), dim=-1)
        if layer.dwconv and layer.num_heads != layer.num_heads_kv:
            q, kv = convolve(q, layer.dwconv_q), convolve(kv, layer.dwconv_kv)
    q = q.unflatten(-1, (layer.num_heads, layer.head_dim))
    k, v = kv.unflatten(-1, (2, layer.num_heads_kv, layer.head_dim)).unbind(-3)
    if layer.rotary_emb_dim:
        longest = max(q.shape[1], k.shape[1])
        cos, sin = tables(layer.rotary_emb_dim, longest, x.device, layer.rotary_emb.base)
        style = layer.rotary_emb.interleaved
        q, k = (
            apply_rotary_emb_torch(y, cos[: y.shape[1]], sin[: y.shape[1]], style) for y in (q, k)
        )
    return q, k, v


def reference(x, layer, x_kv=None, mask=None, pad_rows=False):
    q, k, v = project(x, layer, x_kv)
    slopes = None
    if layer.use_alibi:
        slopes = torch.tensor(get_alibi_slopes(layer.num_heads), device=x.device)
    out = attention(q, k, v, layer.causal, layer.window_size, slopes, mask, layer.softmax_scale)
    if pad_rows:
        out = out * mask[..., None, None]
    return linear(out.flatten(2), layer.out_proj)


def gradients(out, weights, *inputs):
    return torch.autograd.grad((out.double() * weights).sum(), inputs, allow_unused=True)


def check(layer, x, x_kv=None, tolerance=FP32, pad_rows=False, **options):
    """Outputs and the gradients of the inputs and all parameters agree with float64."""
    inputs = [y.requires_grad_() for y in (x, x_kv) if y is not None]
    parameters = list(layer.parameters())
    if x_kv is not None:
        options["x_kv"] = x_kv
    out = layer(x, **options)
    mask = options.get("key_padding_mask")
    expected = reference(x, layer, x_kv, mask, pad_rows)
    close(out, expected, tolerance)
    weights = torch.randn_like(expected)
    actual = gradients(out, weights, *inputs, *parameters)
    wanted = gradients(expected, weights, *inputs, *parameters)
    for a, b in zip(actual, wanted, strict=True):
        assert a is not None
        # Sums over all rows: the error grows with the size of the gradient.
        scale = b.double().abs().max().clamp(min=1.0)
        close(a / scale, b / scale, tolerance)
    return out


def make_input(device, dtype=torch.float32, seqlen=SEQLEN):
    return torch.randn(BATCH, seqlen, EMBED, device=device, dtype=dtype)


def make_mask(device, kind, seqlen=SEQLEN):
    mask = torch.ones(BATCH, seqlen, dtype=torch.bool, device=device)
    if kind == "right":
        mask[0, 7:] = False
    elif kind == "left":
        mask[1, :4] = False
    elif kind == "empty":
        mask[0] = False
    else:
        mask[:, 2::3] = False
    return mask


# ---- slopes and the modules without projections -------------------------------------------------


def test_slopes_of_a_power_of_two():
    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(1) == [2.0**-8]


def test_slopes_of_other_numbers():
    expected = get_alibi_slopes(8) + get_alibi_slopes(16)[0:8:2]
    assert get_alibi_slopes(12) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ConstraintError, match="nheads"):
        get_alibi_slopes(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [SelfAttention, FlashSelfAttention])
def test_self_attention(device, kind, causal):
    qkv = torch.randn(BATCH, SEQLEN, 3, NHEADS, HEADDIM, device=device, requires_grad=True)
    layer = kind(causal=causal, softmax_scale=0.3)
    out = layer(qkv)
    expected = attention(*qkv.unbind(2), causal=causal, scale=0.3)
    close(out, expected)
    weights = torch.randn_like(expected)
    close(gradients(out, weights, qkv)[0], gradients(expected, weights, qkv)[0])
    close(layer(qkv, causal=not causal), attention(*qkv.unbind(2), causal=not causal, scale=0.3))
    assert not list(layer.parameters())
    assert not layer.state_dict()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [CrossAttention, FlashCrossAttention])
def test_cross_attention_with_grouped_heads(device, kind, causal):
    q = torch.randn(BATCH, 5, NHEADS, HEADDIM, device=device, requires_grad=True)
    kv = torch.randn(BATCH, SEQLEN, 2, 2, HEADDIM, device=device, requires_grad=True)
    out = kind(causal=causal)(q, kv)
    expected = attention(q, *kv.unbind(2), causal=causal)
    close(out, expected)
    weights = torch.randn_like(expected)
    for a, b in zip(
        gradients(out, weights, q, kv), gradients(expected, weights, q, kv), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize("kind", ["right", "left", "holes", "empty"])
@pytest.mark.parametrize("causal", [False, True])
def test_plain_cross_attention_counts_kept_keys(device, kind, causal):
    q = torch.randn(BATCH, 3, NHEADS, HEADDIM, device=device)
    kv = torch.randn(BATCH, SEQLEN, 2, 2, HEADDIM, device=device)
    mask = make_mask(device, kind)
    out = CrossAttention(causal=causal)(q, kv, key_padding_mask=mask)
    for b in range(BATCH):
        kept = kv[b : b + 1, mask[b]]
        expected = torch.zeros_like(q[b : b + 1]).double()
        if kept.shape[1]:
            expected = attention(q[b : b + 1], *kept.unbind(2), causal=causal)
        close(out[b : b + 1], expected)


def test_flash_modules_on_packed_sequences(device):
    lengths = [5, 1, 7]
    bounds = torch.tensor([0, 5, 6, 13], dtype=torch.int32, device=device)
    qkv = torch.randn(13, 3, NHEADS, HEADDIM, device=device)
    expected = torch.cat(
        [attention(*part[None].unbind(2), causal=True)[0] for part in qkv.split(lengths)]
    )
    close(FlashSelfAttention(causal=True)(qkv, cu_seqlens=bounds, max_seqlen=7), expected)
    cross = FlashCrossAttention(causal=True)
    q, kv = qkv[:, 0], qkv[:, 1:]
    close(cross(q, kv, None, bounds, 7, bounds, 7), expected)
    with pytest.raises(ConstraintError, match="max_seqlen"):
        FlashSelfAttention()(qkv, cu_seqlens=bounds)
    with pytest.raises(ConstraintError, match="cu_seqlens_k"):
        cross(q, kv, cu_seqlens=bounds, max_seqlen=7)


def test_signatures_keep_their_order():
    """Window and slopes come in another order in the two modules."""
    slopes = torch.rand(NHEADS)
    first = FlashSelfAttention(True, 0.5, 0.1, (3, 4), slopes, True)
    second = FlashCrossAttention(True, 0.5, 0.1, slopes, (3, 4), True)
    for layer in (first, second):
        assert (layer.causal, layer.softmax_scale, layer.drop.p) == (True, 0.5, 0.1)
        assert layer.window_size == (3, 4)
        assert layer.deterministic
        assert torch.equal(layer.alibi_slopes, slopes)


# ---- FlashAttention -----------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_flash_attention_layouts(device, flat):
    slopes = torch.tensor(get_alibi_slopes(NHEADS), device=device)
    layer = FlashAttention(NHEADS, HEADDIM, causal=True, window_size=(4, 0), alibi_slopes=slopes)
    q = torch.randn(BATCH, 6, NHEADS, HEADDIM, device=device)
    k, v = torch.randn(2, BATCH, SEQLEN, 2, HEADDIM, device=device)
    expected = attention(q, k, v, True, (4, 0), slopes)
    if flat:
        close(layer(q.flatten(2), k.flatten(2), v.flatten(2)), expected.flatten(2))
    else:
        close(layer(q, k, v), expected)


def test_flash_attention_has_no_parameters_and_keeps_exact_slopes(device):
    slopes = torch.tensor(get_alibi_slopes(NHEADS * 3), device=device)
    layer = FlashAttention(NHEADS * 3, HEADDIM, 0.25, alibi_slopes=slopes.double()).to(device)
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert layer.reset_parameters() is None
    layer = layer.half()
    assert torch.equal(layer.alibi_slopes, slopes)
    assert torch.equal(layer.bfloat16().alibi_slopes, slopes)
    assert FlashAttention(2, 8).half().alibi_slopes is None


def test_flash_attention_drops_in_training_only(device):
    layer = FlashAttention(NHEADS, HEADDIM, dropout=0.5)
    q, k, v = torch.randn(3, BATCH, SEQLEN, NHEADS, HEADDIM, device=device)
    expected = attention(q, k, v)
    assert (layer(q, k, v) - expected).abs().max() > 0.05
    close(layer.eval()(q, k, v), expected)


def test_flash_attention_errors():
    with pytest.raises(ConstraintError, match="num_heads"):
        FlashAttention(0, 8)
    with pytest.raises(ConstraintError, match="head_dim"):
        FlashAttention(2, 257)
    with pytest.raises(ConstraintError, match="dropout"):
        FlashAttention(2, 8, dropout=1.0)
    with pytest.raises(ConstraintError, match="alibi_slopes"):
        FlashAttention(2, 8, alibi_slopes=torch.ones(3))
    with pytest.raises(ConstraintError, match="window_size.*None"):
        FlashAttention(2, 8, window_size=None)
    layer, x = FlashAttention(2, 8), torch.randn(1, 3, 2, 8)
    with pytest.raises(ConstraintError, match="`q`.*found"):
        layer(torch.randn(1, 3, 20), x, x)
    with pytest.raises(ConstraintError, match="`q` must have 2 heads"):
        layer(torch.randn(1, 3, 4, 8), x, x)
    with pytest.raises(ConstraintError, match="`v`"):
        layer(x, x, torch.randn(3, 16))


def test_lazy_exports():
    assert flash_attn.FlashAttention is FlashAttention
    assert flash_attn.FlashMHA is FlashMHA
    assert module.flash_attn_varlen_kvpacked_func is flash_attn.flash_attn_varlen_kvpacked_func


# ---- MHA ----------------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.4},
    "grouped": {"num_heads_kv": 2, "causal": True},
    "one key head": {"num_heads_kv": 1},
    "no bias": {"qkv_proj_bias": False, "out_proj_bias": False},
    "rotary": {"rotary_emb_dim": 16, "causal": True},
    "rotary of a part, pairs": {"rotary_emb_dim": 6, "rotary_emb_interleaved": True},
    "rotary, grouped": {"rotary_emb_dim": 8, "num_heads_kv": 2, "rotary_emb_base": 500.0},
    "dwconv": {"dwconv": True, "causal": True},
    "dwconv, grouped": {"dwconv": True, "num_heads_kv": 2},
    "recomputed": {"checkpointing": True, "causal": True},
    "fused": {"fused_bias_fc": True},
}
FLASH_CASES = {
    "alibi": {"use_alibi": True, "causal": True},
    "window": {"window_size": (3, 1)},
    "window, alibi, grouped": {"window_size": (3, 0), "use_alibi": True, "num_heads_kv": 2},
}


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize("case", CASES)
def test_mha(device, case, flash):
    layer = MHA(EMBED, NHEADS, use_flash_attn=flash, device=device, **CASES[case])
    check(layer, make_input(device))


@pytest.mark.parametrize("case", FLASH_CASES)
def test_mha_flash_only(device, case):
    check(FlashMHA(EMBED, NHEADS, device=device, **FLASH_CASES[case]), make_input(device))


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True, "num_heads_kv": 2}, {"dwconv": True}, {"rotary_emb_dim": 8}],
    ids=str,
)
def test_mha_cross(device, options, flash):
    layer = MHA(EMBED, NHEADS, cross_attn=True, use_flash_attn=flash, device=device, **options)
    check(layer, make_input(device, seqlen=6), make_input(device))
    check(layer, make_input(device))


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize("kind", ["right", "left", "holes", "empty"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "num_heads_kv": 2, "rotary_emb_dim": 8}], ids=str
)
def test_key_padding_mask(device, options, kind, flash):
    layer = MHA(EMBED, NHEADS, use_flash_attn=flash, device=device, **options)
    mask = make_mask(device, kind)
    check(layer, make_input(device), key_padding_mask=mask, pad_rows=flash)
    assert torch.equal(
        layer(x := make_input(device), key_padding_mask=mask.int()), layer(x, key_padding_mask=mask)
    )


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize("kind", ["right", "left", "holes", "empty"])
def test_key_padding_mask_of_cross_attention(device, kind, flash):
    layer = MHA(EMBED, NHEADS, 2, cross_attn=True, use_flash_attn=flash, device=device)
    mask = make_mask(device, kind)
    check(layer, make_input(device, seqlen=6), make_input(device), key_padding_mask=mask)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_heads_kv": 2},
        {"rotary_emb_dim": 16},
        {"rotary_emb_dim": 8, "num_heads_kv": 2, "rotary_emb_interleaved": True},
    ],
    ids=str,
)
def test_packed_sequences(device, options):
    layer = FlashMHA(EMBED, NHEADS, causal=True, device=device, **options)
    lengths = [5, 1, 7]
    bounds = torch.tensor([0, 5, 6, 13], dtype=torch.int32, device=device)
    x = torch.randn(13, EMBED, device=device, requires_grad=True)
    out = layer(x, cu_seqlens=bounds, max_seqlen=7)
    expected = torch.cat([reference(part[None], layer)[0] for part in x.split(lengths)])
    close(out, expected)
    weights = torch.randn_like(expected)
    inputs = (x, layer.Wqkv.weight)
    for a, b in zip(
        gradients(out, weights, *inputs), gradients(expected, weights, *inputs), strict=True
    ):
        close(a, b, {"rtol": 1e-4, "atol": 1e-4})


@pytest.mark.parametrize("rotary", [0, 8])
def test_packed_cross_attention(device, rotary):
    layer = FlashMHA(EMBED, NHEADS, cross_attn=True, rotary_emb_dim=rotary, device=device)
    x, x_kv = torch.randn(8, EMBED, device=device), torch.randn(13, EMBED, device=device)
    bounds_q = torch.tensor([0, 2, 8], dtype=torch.int32, device=device)
    bounds_k = torch.tensor([0, 9, 13], dtype=torch.int32, device=device)
    out = layer(
        x, cu_seqlens=bounds_q, max_seqlen=6, x_kv=x_kv, cu_seqlens_k=bounds_k, max_seqlen_k=9
    )
    expected = [
        reference(a[None], layer, b[None])[0]
        for a, b in zip(x.split([2, 6]), x_kv.split([9, 4]), strict=True)
    ]
    close(out, torch.cat(expected))


def test_xpos_packed_equals_dense(device):
    layer = FlashMHA(EMBED, NHEADS, rotary_emb_dim=8, rotary_emb_scale_base=64.0, device=device)
    x = make_input(device)
    bounds = torch.tensor([0, SEQLEN, 2 * SEQLEN], dtype=torch.int32, device=device)
    packed = layer(x.flatten(0, 1), cu_seqlens=bounds, max_seqlen=SEQLEN)
    close(packed.unflatten(0, (BATCH, SEQLEN)), layer(x))
    layer.rotary_emb.scale_base = None
    layer.rotary_emb._seq_len_cached = 0
    layer.rotary_emb._cos_k_cached = layer.rotary_emb._sin_k_cached = None
    assert (layer(x) - packed.unflatten(0, (BATCH, SEQLEN))).abs().max() > 1e-3


def test_mixer_subset(device):
    layer = MHA(EMBED, NHEADS, cross_attn=True, device=device)
    x = make_input(device)
    close(layer(x, mixer_subset=slice(0, 1)), reference(x[:, :1], layer, x))


def test_return_residual_and_causal_override(device):
    layer = FlashMHA(EMBED, NHEADS, return_residual=True, device=device)
    x = make_input(device)
    out, residual = layer(x)
    assert residual is x
    close(out, reference(x, layer))
    layer.return_residual = False
    layer.causal = True
    close(layer(x, causal=True), reference(x, layer))


def test_constructor_arguments():
    names = list(inspect.signature(MHA).parameters)
    assert names == [
        "embed_dim",
        "num_heads",
        "num_heads_kv",
        "cross_attn",
        "qkv_proj_bias",
        "out_proj_bias",
        "dropout",
        "softmax_scale",
        "causal",
        "layer_idx",
        "dwconv",
        "rotary_emb_dim",
        "rotary_emb_base",
        "rotary_emb_scale_base",
        "rotary_emb_interleaved",
        "use_alibi",
        "window_size",
        "fused_bias_fc",
        "use_flash_attn",
        "return_residual",
        "checkpointing",
        "device",
        "dtype",
    ]
    flash = inspect.signature(FlashMHA).parameters.values()
    positional = [p.name for p in flash if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == [
        "embed_dim",
        "num_heads",
        "dropout",
        "causal",
        "layer_idx",
        "device",
        "dtype",
    ]
    assert {p.name for p in flash} == set(names) - {"use_flash_attn"}
    for p in flash:
        assert p.default == inspect.signature(MHA).parameters[p.name].default


def test_all_arguments_reach_mha():
    options = {
        "num_heads_kv": 2, "qkv_proj_bias": False, "out_proj_bias": False, "dropout": 0.1,
        "softmax_scale": 0.2, "causal": True, "layer_idx": 7, "rotary_emb_dim": 4,
        "rotary_emb_base": 5.0, "rotary_emb_scale_base": 6.0, "rotary_emb_interleaved": True,
        "use_alibi": True, "window_size": (3, 2), "return_residual": True, "checkpointing": True,
        "dtype": torch.bfloat16,
    }  # fmt: skip
    layer = FlashMHA(EMBED, NHEADS, **options)
    for name in ("num_heads_kv", "softmax_scale", "causal", "layer_idx", "rotary_emb_dim",
                 "use_alibi", "window_size", "return_residual", "checkpointing"):  # fmt: skip
        assert getattr(layer, name) == options[name], name
    for inner in (layer.inner_attn, layer.inner_cross_attn):
        assert (inner.drop.p, inner.softmax_scale, inner.causal) == (0.1, 0.2, True)
        assert inner.window_size == (3, 2)
        assert inner.alibi_slopes.tolist() == get_alibi_slopes(NHEADS)
    rotary = layer.rotary_emb
    assert (rotary.base, rotary.scale_base, rotary.interleaved) == (5.0, 6.0, True)
    assert layer.Wqkv.bias is None
    assert layer.out_proj.bias is None
    assert layer.Wqkv.weight.dtype == torch.bfloat16
    assert FlashMHA(EMBED, NHEADS, dwconv=True, cross_attn=True).dwconv_q is not None


def test_state_dict_keys():
    qkv = ["Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"]
    rotary = FlashMHA(EMBED, NHEADS, rotary_emb_dim=8, use_alibi=True)
    assert sorted(rotary.state_dict()) == sorted(qkv)
    assert rotary.Wqkv.weight.shape == (3 * EMBED, EMBED)
    cross = MHA(EMBED, NHEADS, cross_attn=True, qkv_proj_bias=False)
    assert sorted(cross.state_dict()) == sorted(
        ["Wq.weight", "Wkv.weight", "out_proj.weight", "out_proj.bias"]
    )
    convolved = set(MHA(EMBED, NHEADS, dwconv=True).state_dict()) - set(qkv)
    assert convolved == {"dwconv_qkv.weight", "dwconv_qkv.bias"}
    parts = {f"dwconv_{part}.{name}" for part in ("q", "kv") for name in ("weight", "bias")}
    assert set(MHA(EMBED, NHEADS, 2, dwconv=True).state_dict()) - set(qkv) == parts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"rotary_emb_dim": 16, "use_alibi": True}], ids=str)
def test_half_weights(device, dtype, options):
    layer = FlashMHA(EMBED, NHEADS, causal=True, device=device, **options).to(dtype)
    x = make_input(device, dtype)
    out = layer(x)
    assert out.dtype == dtype
    close(out, reference(x, layer), HALF[dtype])
    out.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"rotary_emb_dim": 16, "num_heads_kv": 2}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_autocast(device, dtype, options, masked):
    layer = FlashMHA(EMBED, NHEADS, causal=True, device=device, **options)
    x = make_input(device, dtype)
    mask = make_mask(device, "right") if masked else None
    with torch.autocast(device, dtype=dtype):
        out = layer(x, key_padding_mask=mask)
    assert out.dtype == dtype
    close(out, reference(x, layer, mask=mask, pad_rows=masked), HALF[dtype])
    out.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_dropout(device):
    layer = FlashMHA(EMBED, NHEADS, dropout=0.5, checkpointing=True, device=device)
    x = make_input(device)
    expected = reference(x, layer)
    assert (layer(x) - expected).abs().max() > 0.02
    close(layer.eval()(x), expected)


def test_recomputed_dropout_has_the_same_gradients(device):
    layer = FlashMHA(EMBED, NHEADS, dropout=0.5, device=device)
    x = make_input(device)
    results = []
    for checkpointing in (False, True):
        layer.checkpointing = checkpointing
        layer.zero_grad()
        torch.manual_seed(5)
        layer(x).square().sum().backward()
        results.append(layer.Wqkv.weight.grad.clone())
    close(*results)


BAD = [
    ("embed_dim", {"embed_dim": 65}),
    ("num_heads", {"num_heads": 0}),
    ("num_heads_kv", {"num_heads_kv": 3}),
    ("num_heads_kv", {"num_heads_kv": 0}),
    ("dropout", {"dropout": 1.5}),
    ("rotary_emb_dim", {"rotary_emb_dim": 18}),
    ("rotary_emb_dim", {"rotary_emb_dim": 3}),
    ("use_alibi", {"use_alibi": True}),
    ("window_size", {"window_size": (3, 0)}),
]


@pytest.mark.parametrize(("name", "options"), BAD, ids=str)
def test_wrong_configurations(name, options):
    with pytest.raises(ConstraintError, match=f"`{name}`"):
        MHA(**{"embed_dim": EMBED, "num_heads": NHEADS, **options})


def test_wrong_calls(device):
    x, bounds = make_input(device), torch.tensor([0, 5], dtype=torch.int32, device=device)
    mask = make_mask(device, "right")
    params = InferenceParams(max_seqlen=20, max_batch_size=2)
    flash, plain = (
        MHA(EMBED, NHEADS, use_flash_attn=on, layer_idx=0, device=device) for on in (True, False)
    )
    convolved, cross = (
        MHA(EMBED, NHEADS, layer_idx=0, use_flash_attn=True, device=device, **{name: True})
        for name in ("dwconv", "cross_attn")
    )
    packed = {"cu_seqlens": bounds, "max_seqlen": 5}
    calls = [
        ("x_kv", flash, {"x_kv": x}),
        ("mixer_subset", flash, {"mixer_subset": slice(0, 1)}),
        ("max_seqlen", flash, {"cu_seqlens": bounds}),
        ("key_padding_mask", flash, {**packed, "key_padding_mask": mask}),
        ("cu_seqlens", plain, packed),
        ("cu_seqlens", convolved, packed),
        ("key_padding_mask", plain, {"key_padding_mask": mask[:, :3]}),
        ("key_padding_mask", flash, {"inference_params": params, "key_padding_mask": mask}),
        ("layer_idx", FlashMHA(EMBED, NHEADS, device=device), {"inference_params": params}),
        ("inference_params", convolved, {"inference_params": params}),
        ("inference_params", cross, {"inference_params": params}),
    ]
    for name, layer, options in calls:
        with pytest.raises(ConstraintError, match=f"`{name}`"):
            layer(x, **options)


# ---- KV cache -----------------------------------------------------------------------------------

CACHE_CASES = {
    "plain": {},
    "grouped": {"num_heads_kv": 2},
    "rotary": {"rotary_emb_dim": 16},
    "rotary, grouped, pairs": {
        "rotary_emb_dim": 16, "rotary_emb_interleaved": True, "num_heads_kv": 2,
    },
    "rotary of a part": {"rotary_emb_dim": 6},
    "scale": {"softmax_scale": 0.5},
}  # fmt: skip
FLASH_CACHE_CASES = {
    "alibi": {"use_alibi": True},
    "window": {"window_size": (4, 0), "rotary_emb_dim": 16},
}
ALL_CACHE_CASES = [(name, flash) for name in CACHE_CASES for flash in (False, True)] + [
    (name, True) for name in FLASH_CACHE_CASES
]


def cache_layer(name, flash, device, **options):
    options = {**CACHE_CASES, **FLASH_CACHE_CASES}[name] | options
    return MHA(
        EMBED, NHEADS, causal=True, layer_idx=3, use_flash_attn=flash, device=device, **options
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize(("name", "flash"), ALL_CACHE_CASES)
@pytest.mark.parametrize("chunks", [[6, 1, 1, 1, 1, 1], [1, 4, 1, 5], [11]], ids=str)
def test_cache_equals_recomputation(device, name, flash, chunks):
    layer = cache_layer(name, flash, device)
    x = make_input(device)
    expected = reference(x, layer)
    params = InferenceParams(max_seqlen=13, max_batch_size=BATCH)
    for chunk in x.split(chunks, dim=1):
        first = params.seqlen_offset
        out = layer(chunk, inference_params=params)
        params.seqlen_offset += chunk.shape[1]
        close(out, expected[:, first : params.seqlen_offset])
    cache = params.key_value_memory_dict[3]
    assert cache.shape == (BATCH, 13, 2, layer.num_heads_kv, HEADDIM)
    _, k, v = project(x, layer)
    close(cache[:, :SEQLEN], torch.stack((k, v), dim=2))


@torch.no_grad()
@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize("rotary", [0, 6, 16])
def test_lengths_per_sample(device, flash, rotary):
    layer = cache_layer("grouped", flash, device, rotary_emb_dim=rotary)
    x = make_input(device)
    lengths = torch.tensor([7, 3], dtype=torch.int32, device=device)
    params = InferenceParams(max_seqlen=13, max_batch_size=BATCH)
    layer(x[:, :7], inference_params=params)  # the second sequence is padded
    params.seqlen_offset = 7
    params.lengths_per_sample = lengths
    more = torch.stack([x[b, n : n + 2] for b, n in enumerate(lengths.tolist())])
    out = layer(more, inference_params=params)
    expected = reference(x, layer)
    for b, n in enumerate(lengths.tolist()):
        close(out[b], expected[b, n : n + 2])


@torch.no_grad()
@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
def test_zero_lengths_start_from_nothing(device, flash):
    layer = cache_layer("rotary", flash, device)
    x = make_input(device)
    params = InferenceParams(max_seqlen=13, max_batch_size=BATCH)
    params.lengths_per_sample = torch.full((BATCH,), 9, device=device)
    params.reset(13, BATCH)
    close(layer(x, inference_params=params), reference(x, layer))


@torch.no_grad()
@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
def test_batch_size_offset(device, flash):
    layer = cache_layer("rotary", flash, device)
    x = make_input(device)
    expected = reference(x, layer)
    params = InferenceParams(max_seqlen=SEQLEN, max_batch_size=BATCH)
    params.key_value_memory_dict[3] = layer.allocate_inference_cache(BATCH, SEQLEN)
    for first, last in ((0, 6), (6, SEQLEN)):
        params.seqlen_offset = first
        for b in range(BATCH):
            params.batch_size_offset = b
            out = layer(x[b : b + 1, first:last], inference_params=params)
            close(out, expected[b : b + 1, first:last])


@torch.no_grad()
@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
def test_without_causal_mask_every_query_sees_all(device, flash):
    layer = cache_layer("rotary", flash, device)
    layer.causal = layer.inner_attn.causal = layer.inner_cross_attn.causal = False
    x = make_input(device)
    params = InferenceParams(max_seqlen=SEQLEN, max_batch_size=BATCH)
    layer(x[:, :4], inference_params=params)
    params.seqlen_offset = 4
    close(layer(x[:, 4:], inference_params=params), reference(x, layer)[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash"])
def test_cache_of_another_dtype(device, flash):
    layer = cache_layer("rotary", flash, device)
    x = make_input(device)
    params = InferenceParams(max_seqlen=SEQLEN, max_batch_size=BATCH)
    cache = layer.allocate_inference_cache(BATCH, SEQLEN, dtype=torch.float16)
    params.key_value_memory_dict[3] = cache
    layer(x[:, :4], inference_params=params)
    params.seqlen_offset = 4
    out = layer(x[:, 4:], inference_params=params)
    assert (out.dtype, cache.dtype) == (torch.float32, torch.float16)
    close(out, reference(x, layer)[:, 4:], HALF[torch.float16])


@torch.no_grad()
def test_cache_under_autocast(device):
    layer = cache_layer("rotary, grouped, pairs", True, device)
    x = make_input(device)
    params = InferenceParams(max_seqlen=SEQLEN, max_batch_size=BATCH)
    outs = []
    with torch.autocast(device, dtype=torch.bfloat16):
        for chunk in x.split(4, dim=1):
            outs.append(layer(chunk, inference_params=params))
            params.seqlen_offset += chunk.shape[1]
    close(torch.cat(outs, dim=1), reference(x, layer), HALF[torch.bfloat16])


def test_cache_does_not_hold_the_graph(device):
    layer = cache_layer("plain", True, device).train()
    params = InferenceParams(max_seqlen=SEQLEN, max_batch_size=BATCH)
    out = layer(make_input(device), inference_params=params)
    assert out.requires_grad
    assert not params.key_value_memory_dict[3].requires_grad


def test_cache_errors(device):
    layer = cache_layer("plain", True, device)
    x = make_input(device)
    with pytest.raises(ConstraintError, match="`max_seqlen` must be at least 11"):
        layer(x, inference_params=InferenceParams(max_seqlen=10, max_batch_size=BATCH))
    with pytest.raises(ConstraintError, match="`max_seqlen` must be at least 12"):
        layer(x, inference_params=InferenceParams(11, BATCH, seqlen_offset=1))
    with pytest.raises(ConstraintError, match="`max_batch_size` must be at least 2"):
        layer(x, inference_params=InferenceParams(max_seqlen=11, max_batch_size=1))
    wrong = InferenceParams(11, BATCH, key_value_memory_dict={3: torch.zeros(2, 11, 2, 1, 16)})
    with pytest.raises(ConstraintError, match="`key_value_memory_dict`"):
        layer(x, inference_params=wrong)
    xpos = cache_layer("rotary", True, device, rotary_emb_scale_base=64.0)
    with pytest.raises(ConstraintError, match="`rotary_emb_scale_base`"):
        xpos(x, inference_params=InferenceParams(11, BATCH))


def test_update_kv_cache(device):
    params = InferenceParams(max_seqlen=6, max_batch_size=3, seqlen_offset=2, batch_size_offset=1)
    kv = torch.randn(2, 3, 2, 4, 8, device=device)
    view = module._update_kv_cache(kv, params, 0)
    assert view.shape == (2, 5, 2, 4, 8)
    assert torch.equal(view[:, 2:], kv)
    assert view.data_ptr() == params.key_value_memory_dict[0][1].data_ptr()
    assert torch.equal(
        params.key_value_memory_dict[0][0], torch.zeros_like(view[0, :1]).expand(6, -1, -1, -1)
    )


# ---- ParallelMHA --------------------------------------------------------------------------------

RANKS = 2
PARALLEL_CASES = [
    {"use_flash_attn": True, "causal": True},
    {"num_heads_kv": 3, "use_flash_attn": True, "use_alibi": True, "rotary_emb_dim": 8},
    {"num_heads_kv": 2, "sequence_parallel": False},
]


def shares(whole, rank, heads_kv):
    """Indices of this rank's rows of Wqkv and columns of out_proj."""
    middle = (heads_kv + 1) // 2
    mine = torch.arange(middle) if rank == 0 else torch.arange(middle, heads_kv)
    index = torch.arange(whole.Wqkv.weight.shape[0])
    q, k, v = index.split((whole.embed_dim, *(heads_kv * whole.head_dim,) * 2))
    q, k, v = (x.unflatten(0, (heads_kv, -1))[mine].flatten() for x in (q, k, v))
    return torch.cat((q, k, v)), q


@torch.no_grad()
def split_weights(whole, layer, rank, heads_kv):
    rows, columns = shares(whole, rank, heads_kv)
    layer.Wqkv.weight.copy_(whole.Wqkv.weight[rows])
    layer.Wqkv.bias.copy_(whole.Wqkv.bias[rows])
    layer.out_proj.weight.copy_(whole.out_proj.weight[:, columns])
    if rank == 0:
        layer.out_proj.bias.copy_(whole.out_proj.bias)


def grad_shares(whole, rank, heads_kv):
    rows, columns = shares(whole, rank, heads_kv)
    return whole.Wqkv.weight.grad[rows], whole.out_proj.weight.grad[:, columns]


def run_rank(rank, address):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    try:
        for case in PARALLEL_CASES:
            check_rank(rank, dist.group.WORLD, **case)
        dist.barrier()  # a rank that leaves early would break the others' connections
    finally:
        dist.destroy_process_group()


def check_rank(rank, group, sequence_parallel=True, **options):
    """This rank's results and gradients are its share of the whole layer's."""
    torch.manual_seed(3)
    heads, batch, seqlen = 6, 2, 4
    width = heads * 8
    whole, x = MHA(width, heads, **options), torch.randn(batch, seqlen, width)
    layer = ParallelMHA(width, heads, group, sequence_parallel=sequence_parallel, **options)
    heads_kv = options.get("num_heads_kv", heads)
    assert layer.num_heads * heads_kv == layer.num_heads_kv * heads
    split_weights(whole, layer, rank, heads_kv)
    whole_x = x.flatten(0, 1).requires_grad_()
    expected = whole(whole_x.view_as(x)).flatten(0, 1)
    (expected**2).sum().backward()
    share = slice(None)
    if sequence_parallel:
        rows = batch * seqlen // RANKS
        share = slice(rank * rows, (rank + 1) * rows)
    mine = x.flatten(0, 1)[share].requires_grad_()
    out = layer(mine, seqlen=seqlen)
    torch.testing.assert_close(out, expected[share])
    (out**2).sum().backward()
    torch.testing.assert_close(mine.grad, whole_x.grad[share])
    for parameter, part in zip(
        (layer.Wqkv.weight, layer.out_proj.weight),
        grad_shares(whole, rank, heads_kv),
        strict=True,
    ):
        torch.testing.assert_close(parameter.grad, part)


def test_parallel(tmp_path):
    mp.spawn(run_rank, args=((tmp_path / "store").as_uri(),), nprocs=RANKS)


def test_more_ranks_than_key_heads(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    with pytest.raises(ConstraintError, match="`num_heads_kv` must be at least the 4 ranks"):
        ParallelMHA(EMBED, 8, None, num_heads_kv=2)
