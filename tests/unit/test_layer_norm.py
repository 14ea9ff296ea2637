"""Fused LayerNorm and RMSNorm against float64; run as a script, the kernels are interpreted."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from flash_attn.errors import ConstraintError
from flash_attn.ops import layer_norm as cuda_names
from flash_attn.ops import rms_norm as cuda_rms_names
from flash_attn.ops.triton import layer_norm as module
from flash_attn.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)

# (relative, absolute) for values of order one that are rounded once.
TOLERANCE = {torch.float32: (1e-5, 2e-5), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)}


def make_inputs(device, dtype=torch.float32, shape=(3, 5, 37), wanted=(), strided=False):
    """Return the tensor arguments by name, all of them leaves."""
    generator = torch.Generator().manual_seed(sum(shape))
    size = shape[-1]

    def draw(*dims):
        padded = torch.randn(*dims[:-1], dims[-1] + 3 * strided, generator=generator)
        return padded.to(device=device, dtype=dtype)[..., : dims[-1]].requires_grad_()

    found = {"x": draw(*shape), "weight": draw(size)}
    for name in wanted:
        found[name] = draw(*shape) if name in ("residual", "x1") else draw(size)
    if "rowscale" in wanted:
        found["rowscale"] = draw(*shape[:-1]).detach() + 0.1
    return found


def widen(tensors):
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()
    }


def check(tensors, is_rms_norm=False, dropout_p=0.0, prenorm=True, zero_centered_weight=False):
    """Compare all outputs and all gradients with the plain formula in float64."""
    options = {"eps": 1e-5, "dropout_p": dropout_p, "prenorm": prenorm}
    options["zero_centered_weight"] = zero_centered_weight
    tensors = {"bias": None, **tensors}
    given = {name: t for name, t in tensors.items() if t is not None}
    outs = layer_norm_fn(**tensors, is_rms_norm=is_rms_norm, return_dropout_mask=True, **options)
    *outs, mask, mask1 = outs
    assert (mask is not None) == (dropout_p > 0.0)
    assert (mask1 is not None) == (dropout_p > 0.0 and "x1" in given)
    wide = widen(given)
    ref = rms_norm_ref if is_rms_norm else layer_norm_ref
    wants = ref(**{"bias": None, **wide}, **options, dropout_mask=mask, dropout_mask1=mask1)
    wants = wants if isinstance(wants, tuple) else (wants,)
    assert len(outs) == len(wants)
    dtype = given["x"].dtype
    rtol, atol = TOLERANCE[dtype]
    for out, want in zip(outs, wants, strict=True):
        assert out.shape == given["x"].shape
        torch.testing.assert_close(out.double(), want, rtol=rtol, atol=atol)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    torch.autograd.backward(outs, grads)
    torch.autograd.backward(wants, [g.double() for g in grads])
    rows = given["x"].shape[:-1].numel()
    for name, tensor in given.items():
        if not tensor.requires_grad:
            continue
        assert tensor.grad.dtype == tensor.dtype
        # A weight gradient sums a term per row, from a sum that was rounded to `dtype`.
        slack = atol * (max(1, rows) ** 0.5 if tensor.dim() == 1 else 4.0)
        torch.testing.assert_close(
            tensor.grad.double(),
            wide[name].grad,
            rtol=4 * rtol,
            atol=slack,
            msg=lambda m, n=name: n + m,
        )


FEATURES = {
    "plain": (),
    "bias": ("bias",),
    "residual": ("bias", "residual"),
    "x1": ("bias", "residual", "x1"),
    "weight1": ("bias", "x1", "weight1", "bias1"),
    "weight1_without_bias": ("residual", "weight1"),
    "rowscale": ("bias", "residual", "rowscale"),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("features", FEATURES)
def test_matches_float64(device, features, is_rms_norm, dropout_p, dtype):
    check(make_inputs(device, dtype, wanted=FEATURES[features]), is_rms_norm, dropout_p)


@pytest.mark.parametrize("size", [1, 2, 16, 63, 192, 1000, 4096])
def test_sizes(device, size):
    check(make_inputs(device, shape=(7, size), wanted=("bias", "residual")), prenorm=False)


@pytest.mark.parametrize("shape", [(17,), (1, 1, 2, 9)])
def test_numbers_of_dimensions(device, shape):
    check(make_inputs(device, shape=shape, wanted=("bias", "residual")))


def test_strided_rows(device):
    check(make_inputs(device, wanted=("bias", "residual", "x1"), strided=True))


def test_zero_centered_weight(device):
    wanted = ("bias", "weight1")
    check(make_inputs(device, wanted=wanted), zero_centered_weight=True)
    check(make_inputs(device, wanted=wanted), True, zero_centered_weight=True)


def test_no_rows(device):
    tensors = make_inputs(device, shape=(0, 8), wanted=("bias", "residual"))
    layer_norm_fn(**tensors).sum().backward()
    assert (tensors["weight"].grad == 0).all()
    assert tensors["residual"].grad.shape == (0, 8)


def test_constant_rows_stay_finite(device):
    x = torch.zeros(4, 33, device=device, requires_grad=True)
    weight = torch.ones(33, device=device)
    y = layer_norm_fn(x, weight, None) + rms_norm_fn(x, weight, None)
    y.sum().backward()
    assert (y == 0).all()
    assert torch.isfinite(x.grad).all()


def test_dtypes_of_outputs(device):
    tensors = make_inputs(device, torch.float16, wanted=("bias",))
    wide = tensors["x"].detach().float()
    y, total = layer_norm_fn(**tensors, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, total.dtype) == (torch.float16, torch.float32)
    assert torch.equal(total, wide)
    y, total = layer_norm_fn(**tensors, residual=wide, prenorm=True, out_dtype=torch.bfloat16)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, wide + wide)
    _, total = layer_norm_fn(**tensors, prenorm=True)
    assert total.dtype == torch.float16
    (total * 2.0).sum().backward()
    assert (tensors["x"].grad == 2.0).all()


@pytest.mark.parametrize("learns", [False, True])
def test_given_buffers_are_filled(device, learns):
    tensors = make_inputs(device, wanted=("bias", "residual"))
    out, total = (torch.full((3, 5, 37), torch.nan, device=device) for _ in range(2))
    want, want_total = layer_norm_fn(**tensors, prenorm=True)
    with torch.set_grad_enabled(learns):
        found = layer_norm_fn(**tensors, prenorm=True, out=out, residual_out=total)
    assert found[0] is out
    assert found[1] is total
    assert torch.equal(out, want)
    assert torch.equal(total, want_total)
    assert out.requires_grad == learns


def test_dropout_follows_the_seed(device):
    x = torch.ones(64, 128, device=device)
    weight = torch.ones(128, device=device)

    def draw(seed):
        torch.manual_seed(seed)
        return layer_norm_fn(
            x, weight, None, x1=x, dropout_p=0.25, prenorm=True, return_dropout_mask=True
        )

    _, total, mask, mask1 = draw(0)
    assert torch.equal(total, (mask.float() + mask1.float()) / 0.75)
    assert not torch.equal(mask, mask1)
    assert abs(mask.float().mean().item() - 0.75) < 0.03
    assert mask.float().mean(dim=0).std() > 0.0, "rows must not share their mask"
    assert torch.equal(draw(0)[2], mask)
    assert not torch.equal(draw(1)[2], mask)


def test_everything_dropped(device):
    tensors = make_inputs(device, wanted=("bias", "residual"))
    _, total = layer_norm_fn(**tensors, dropout_p=1.0, prenorm=True)
    total.sum().backward()
    assert torch.equal(total, tensors["residual"])
    assert (tensors["x"].grad == 0).all()


def test_frozen_weights_and_shared_gradients(device):
    tensors = make_inputs(device, wanted=("bias", "residual"))
    tensors["weight"].requires_grad_(False)
    layer_norm_fn(**tensors).square().sum().backward()
    assert tensors["weight"].grad is None
    torch.testing.assert_close(tensors["x"].grad, tensors["residual"].grad)
    kept = tensors["residual"].grad.clone()
    tensors["x"].grad.mul_(2.0)
    assert torch.equal(tensors["residual"].grad, kept), "the two gradients must not share memory"


def test_results_can_be_changed_in_place(device):
    tensors = make_inputs(device, wanted=("bias",))
    layer_norm_fn(**tensors).relu_().sum().backward()
    got = tensors["x"].grad.clone()
    tensors["x"].grad = None
    layer_norm_fn(**tensors).relu().sum().backward()
    torch.testing.assert_close(got, tensors["x"].grad)


def test_inputs_may_be_overwritten_before_backward(device):
    """The backward pass keeps the sum alone, so the branches that went into it are free."""
    tensors = make_inputs(device, wanted=("bias",))
    tensors["x"] = tensors["x"] + 0.0
    tensors["residual"] = tensors["x"] + 1.0
    tensors["x1"] = tensors["x"] + 2.0
    y = layer_norm_fn(**tensors)
    for name in ("x", "residual", "x1"):
        tensors[name].detach().fill_(torch.nan)
    y.square().sum().backward()
    assert torch.isfinite(tensors["weight"].grad).all()


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_linear(device, is_rms_norm):
    tensors = make_inputs(device, wanted=("bias", "residual"))
    linear = torch.nn.Linear(37, 11, device=device)
    x, weight, bias, residual = (tensors[n] for n in ("x", "weight", "bias", "residual"))
    out, total = layer_norm_linear_fn(
        x, weight, bias, linear.weight, linear.bias, residual, 1e-5, True, False, is_rms_norm
    )
    y = layer_norm_fn(x, weight, bias, residual, eps=1e-5, is_rms_norm=is_rms_norm)
    torch.testing.assert_close(out, linear(y))
    torch.testing.assert_close(total, x + residual)
    out.sum().backward()
    assert all(t.grad is not None for t in (*tensors.values(), linear.weight, linear.bias))


def test_linear_under_autocast(device):
    tensors = make_inputs(device, wanted=("bias",))
    linear = torch.nn.Linear(37, 11, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = layer_norm_linear_fn(
            **_linear_names(tensors), linear_weight=linear.weight, linear_bias=None
        )
    assert out.dtype == torch.bfloat16


def _linear_names(tensors):
    return {"x": tensors["x"], "norm_weight": tensors["weight"], "norm_bias": tensors["bias"]}


def test_rms_norm_module(device):
    norm = RMSNorm(37, eps=1e-5, device=device)
    assert list(norm.state_dict()) == ["weight"]
    x = make_inputs(device)["x"]
    want = torch.nn.functional.rms_norm(x, (37,), eps=1e-5)
    torch.testing.assert_close(norm(x), want)
    centred = RMSNorm(37, zero_centered_weight=True, device=device)
    assert (centred.weight == 0).all()
    torch.testing.assert_close(centred(x), want)
    _, total = norm(x, residual=x, prenorm=True)
    torch.testing.assert_close(total, x + x)
    drop = RMSNorm(37, dropout_p=1.0, device=device)
    assert (drop(x) == 0).all()
    torch.testing.assert_close(drop.eval()(x), want)


@pytest.mark.parametrize("rms", [False, True])
def test_names_of_the_cuda_extension(device, rms):
    names = cuda_rms_names if rms else cuda_names
    function = names.dropout_add_rms_norm if rms else names.dropout_add_layer_norm
    tensors = make_inputs(device, wanted=("bias", "residual", "layerscale", "rowscale"))
    x, weight, bias, residual, layerscale, rowscale = tensors.values()
    y, total, mask = function(
        x, residual, weight, bias, 0.4, 1e-5, rowscale, layerscale, True, False, True
    )
    assert mask.dtype == torch.uint8
    want = x * rowscale[..., None] * layerscale * mask / 0.6 + residual
    torch.testing.assert_close(total, want)
    plain = rms_norm_ref if rms else layer_norm_ref
    torch.testing.assert_close(y, plain(want, weight, bias, eps=1e-5))
    y.sum().backward()
    assert layerscale.grad.abs().sum() > 0
    if rms:
        torch.testing.assert_close(
            names.rms_norm(x, weight, 1e-5), plain(x, weight, None, eps=1e-5)
        )
    else:
        want = torch.nn.functional.layer_norm(x, (37,), weight, bias, 1e-5)
        torch.testing.assert_close(names.layer_norm(x, weight, bias, 1e-5), want)


@pytest.mark.parametrize("rms", [False, True])
def test_parallel_residual(device, rms):
    function = (
        cuda_rms_names.dropout_add_rms_norm_parallel_residual
        if rms
        else cuda_names.dropout_add_layer_norm_parallel_residual
    )
    tensors = make_inputs(device, wanted=("bias", "residual", "x1", "weight1", "bias1"))
    x, weight, bias, residual, x1, weight1, bias1 = tensors.values()
    y0, y1, total, mask0, mask1 = function(
        x, x1, residual, weight, bias, weight1, bias1, 0.0, 1e-5, True, False, True
    )
    plain = rms_norm_ref if rms else layer_norm_ref
    want0, want1, want = plain(
        x, weight, bias, residual, x1, weight1, bias1, eps=1e-5, prenorm=True
    )
    for got, wanted in ((y0, want0), (y1, want1), (total, want)):
        torch.testing.assert_close(got, wanted)
    assert mask0.all()
    assert mask1.all()
    assert function(x, None, None, weight, bias, None, None, 0.0, 1e-5)[1] is None


def test_dropout_add_modules(device):
    x = make_inputs(device)["x"]
    layer = cuda_names.DropoutAddLayerNorm(37, prenorm=True, p=1.0, device=device)
    rms = cuda_rms_names.DropoutAddRMSNorm(37, p=1.0, device=device)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert list(rms.state_dict()) == ["weight"]
    y, total = layer(x, x)
    assert torch.equal(total, x)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (37,), eps=1e-5))
    torch.testing.assert_close(rms(x, x), torch.nn.functional.rms_norm(x, (37,), eps=1e-5))
    assert torch.equal(layer.eval()(x, x)[1], x + x)
    torch.testing.assert_close(cuda_rms_names.RMSNorm(37, device=device)(x), rms(x, x))


def test_errors(device):
    t = make_inputs(device, wanted=("bias", "x1", "rowscale"))
    x, weight, bias = t["x"], t["weight"], t["bias"]
    with pytest.raises(ConstraintError, match="`weight` must have shape"):
        layer_norm_fn(x, weight[1:], bias)
    with pytest.raises(ConstraintError, match="`residual` must have shape"):
        layer_norm_fn(x, weight, bias, residual=x[1:])
    with pytest.raises(ConstraintError, match="`rowscale` must be None"):
        layer_norm_fn(x, weight, bias, x1=t["x1"], rowscale=t["rowscale"])
    with pytest.raises(ConstraintError, match="`bias1` must be None"):
        layer_norm_fn(x, weight, bias, bias1=bias)
    with pytest.raises(ConstraintError, match="`dropout_p` must be between"):
        layer_norm_fn(x, weight, bias, dropout_p=1.5)
    with pytest.raises(ConstraintError, match="`out` must have shape"):
        layer_norm_fn(x, weight, bias, out=torch.empty(1, device=device))


def _interpreted() -> None:
    """Send CPU tensors through the kernels, which TRITON_INTERPRET=1 makes possible."""
    module._runs_on_kernels = lambda _: True
    small = {"shape": (2, 4, 21), "strided": True}
    for wanted, rms, p in itertools.product(FEATURES.values(), (False, True), (0.0, 0.3)):
        check(make_inputs("cpu", wanted=wanted, **small), rms, p)
    for wanted in FEATURES.values():
        check(make_inputs("cpu", torch.float16, wanted=wanted, **small), prenorm=False)
    for shape in ((17,), (1, 1), (5, 1), (2, 64)):
        check(make_inputs("cpu", shape=shape, wanted=("bias", "residual")))
    test_zero_centered_weight("cpu")
    test_no_rows("cpu")
    test_constant_rows_stay_finite("cpu")
    test_dtypes_of_outputs("cpu")
    test_given_buffers_are_filled("cpu", True)
    test_given_buffers_are_filled("cpu", False)
    test_dropout_follows_the_seed("cpu")
    test_everything_dropped("cpu")
    test_frozen_weights_and_shared_gradients("cpu")
    test_results_can_be_changed_in_place("cpu")
    test_inputs_may_be_overwritten_before_backward("cpu")
    test_linear("cpu", False)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    _interpreted()
