"""Fused cross entropy against float64 PyTorch; run as a script, its kernels are interpreted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flash_attn.errors import ConstraintError, UnsupportedProblemError
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton import cross_entropy as module
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

IGNORED = -100
VARIANTS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "scale": {"logit_scale": 0.7},
    "z_loss": {"lse_square_scale": 0.1},
    "all": {"label_smoothing": 0.1, "logit_scale": 1.5, "lse_square_scale": 0.01},
}
GRAD_RTOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def reference(
    logits, labels, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, ignore_index=IGNORED
):
    """Losses and z-losses in float64 from a float64 leaf."""
    scaled = logits * logit_scale
    log_p = torch.log_softmax(scaled, dim=-1)
    kept = labels != ignore_index
    column = labels.long().masked_fill(~kept, 0)
    nll = -log_p.gather(1, column[:, None])[:, 0]
    losses = (1.0 - label_smoothing) * nll - label_smoothing * log_p.mean(dim=-1)
    z_losses = lse_square_scale * torch.logsumexp(scaled, dim=-1).square()
    return torch.where(kept, losses + z_losses, 0.0), torch.where(kept, z_losses, 0.0)


def make_inputs(device, rows=9, classes=83, dtype=torch.float32, strided=False, ignore=True):
    generator = torch.Generator().manual_seed(rows * 1000 + classes)
    logits = 3.0 * torch.randn(rows, classes + 5 * strided, generator=generator)
    logits = logits.to(device=device, dtype=dtype)[:, :classes]
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[0], labels[-1] = 0, classes - 1
    if ignore:
        labels[1::3] = IGNORED
    return logits, labels.to(device)


def check(logits, labels, **options):
    """Compare losses, z-losses and the gradient under a row-dependent upstream gradient."""
    leaf = logits.detach().requires_grad_()
    losses, z_losses = cross_entropy_loss(leaf, labels, **options)
    options.pop("inplace_backward", None)
    wide = logits.double().detach().requires_grad_()
    want, want_z = reference(wide, labels, **options)
    assert losses.dtype == z_losses.dtype == torch.float32
    assert not z_losses.requires_grad
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(z_losses.double(), want_z, rtol=1e-5, atol=2e-6)
    upstream = torch.linspace(0.5, 2.0, labels.shape[0], device=labels.device)
    (want * upstream.double()).sum().backward()
    (losses * upstream).sum().backward()
    rtol = GRAD_RTOL[logits.dtype]
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=rtol, atol=1e-6)
    return leaf


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", GRAD_RTOL)
def test_matches_float64(device, dtype, variant):
    check(*make_inputs(device, dtype=dtype), **VARIANTS[variant])


@pytest.mark.parametrize("classes", [1, 2, 16, 1000, 50257])
def test_vocabulary_sizes(device, classes):
    check(*make_inputs(device, rows=3, classes=classes, ignore=False), **VARIANTS["all"])


def test_strided_rows(device):
    check(*make_inputs(device, strided=True), **VARIANTS["all"])


def test_transposed_logits(device):
    logits, labels = make_inputs(device, rows=7, classes=12)
    check(logits.t().contiguous().t(), labels)


def test_int32_and_strided_labels(device):
    logits, labels = make_inputs(device)
    check(logits, labels.int())
    check(logits, torch.stack([labels, labels], dim=1)[:, 0])


def test_other_ignore_index(device):
    logits, labels = make_inputs(device, ignore=False)
    check(logits, labels, ignore_index=int(labels[2]))


def test_inplace_backward_overwrites_the_logits(device):
    leaf = check(*make_inputs(device, strided=True), inplace_backward=True)
    assert torch.equal(leaf.detach(), leaf.grad)


def test_precomputed_lse(device):
    logits, labels = make_inputs(device)
    lse = torch.logsumexp(logits, dim=-1)
    check(logits, labels, lse_square_scale=0.1)
    leaf = logits.detach().requires_grad_()
    losses, _ = cross_entropy_loss(leaf, labels, precomputed_lse=lse)
    torch.testing.assert_close(losses, reference(logits.double(), labels)[0].float())
    shifted, _ = cross_entropy_loss(logits, labels, precomputed_lse=lse + 1.0)
    assert torch.allclose(shifted, losses + (labels != IGNORED)), "the given lse must be used"
    smooth, _ = cross_entropy_loss(logits, labels, lse + 1.0, label_smoothing=0.1)
    torch.testing.assert_close(smooth, cross_entropy_loss(logits, labels, None, 0.1)[0])


def test_infinite_logits(device):
    """Classes masked with -inf get probability zero; ignored rows never turn into NaN."""
    logits, labels = make_inputs(device)
    logits[:, 5:20] = -torch.inf
    labels[(labels >= 5) & (labels < 20)] = 1
    logits[1] = torch.nan
    assert labels[1] == IGNORED
    leaf = logits.requires_grad_()
    losses, z_losses = cross_entropy_loss(leaf, labels, lse_square_scale=0.1)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(z_losses).all()
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad[:, 5:20] == 0).all()
    assert (leaf.grad[1] == 0).all()


def test_no_rows(device):
    logits = torch.empty(0, 7, device=device, requires_grad=True)
    losses, _ = cross_entropy_loss(logits, torch.empty(0, dtype=torch.long, device=device))
    losses.sum().backward()
    assert losses.shape == (0,)
    assert logits.grad.shape == (0, 7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module_matches_torch(device, reduction):
    logits, labels = make_inputs(device)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)(ours, labels)
    want = torch.nn.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)(theirs, labels)
    torch.testing.assert_close(loss, want)
    loss.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_module_returns_z_loss(device):
    logits, labels = make_inputs(device)
    loss, z_loss = CrossEntropyLoss(lse_square_scale=0.1, return_z_loss=True)(logits, labels)
    kept = (labels != IGNORED).sum()
    want, want_z = reference(logits.double(), labels, lse_square_scale=0.1)
    torch.testing.assert_close(loss.double(), want.sum() / kept)
    torch.testing.assert_close(z_loss.double(), want_z.sum() / kept)


def test_errors(device):
    logits, labels = make_inputs(device)
    with pytest.raises(ConstraintError, match="`labels` must have shape"):
        cross_entropy_loss(logits, labels[1:])
    with pytest.raises(ConstraintError, match="`labels` must hold integers"):
        cross_entropy_loss(logits, labels.float())
    with pytest.raises(ConstraintError, match="`logits` must have shape"):
        cross_entropy_loss(logits[None], labels)
    with pytest.raises(ConstraintError, match="`logit_scale` must be positive"):
        cross_entropy_loss(logits, labels, logit_scale=0.0)
    with pytest.raises(ConstraintError, match="`precomputed_lse` must have shape"):
        cross_entropy_loss(logits, labels, precomputed_lse=labels[1:].float())
    with pytest.raises(UnsupportedProblemError, match="`reduction`"):
        CrossEntropyLoss(reduction="median")


def _vocab_parallel_rank(rank, world_size, address):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    try:
        logits, labels = make_inputs("cpu", rows=11, classes=40)
        for options in VARIANTS.values():
            wide = logits.double().requires_grad_()
            want, want_z = reference(wide, labels, **options)
            want.sum().backward()
            size = logits.shape[1] // world_size
            part = slice(rank * size, (rank + 1) * size)
            local = logits[:, part].clone().requires_grad_()
            group = dist.group.WORLD
            losses, z_losses = cross_entropy_loss(local, labels, process_group=group, **options)
            losses.sum().backward()
            torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(z_losses.double(), want_z, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(
                local.grad.double(), wide.grad[:, part], rtol=1e-5, atol=1e-6
            )
    finally:
        dist.destroy_process_group()


def test_vocabulary_split_over_ranks(tmp_path):
    address = (tmp_path / "store").as_uri()
    mp.spawn(_vocab_parallel_rank, args=(2, address), nprocs=2)


def _interpreted() -> None:
    """Send CPU tensors through the kernels, which TRITON_INTERPRET=1 makes possible."""
    module._runs_on_kernels = lambda _: True
    module._FORWARD_BLOCK = module._BACKWARD_BLOCK = 32
    for dtype in (torch.float32, torch.float16):
        for options in VARIANTS.values():
            check(*make_inputs("cpu", rows=5, dtype=dtype, strided=True), **options)
    check(*make_inputs("cpu", rows=5, classes=64, ignore=False), inplace_backward=True)
    check(*make_inputs("cpu", rows=5, classes=1, ignore=False))
    logits, labels = make_inputs("cpu", rows=5)
    check(logits, labels.int())
    test_precomputed_lse("cpu")
    test_infinite_logits("cpu")
    test_no_rows("cpu")
    test_module_returns_z_loss("cpu")
    _interpreted_vocab_parts()


def _interpreted_vocab_parts() -> None:
    """The parts of a vocabulary must add up to the whole, kernel against PyTorch."""
    logits, labels = make_inputs("cpu", rows=5, classes=40)
    for start in (0, 20):
        options = module._Options(0.1, 1.5, 0.0, IGNORED, start, 40)
        part = logits[:, start : start + 20]
        kept = labels != IGNORED
        lse, losses, _ = module._forward_kernel(part, labels, None, options, partial=True)
        want_lse, want, _ = module._forward_torch(part, labels, None, options, partial=True)
        torch.testing.assert_close(losses, want)
        torch.testing.assert_close(lse[kept], want_lse[kept])


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
