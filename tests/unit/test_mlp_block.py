"""MLPs, activations and transformer blocks against their definitions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from flash_attn.errors import ConstraintError
from flash_attn.modules.block import Block, ParallelBlock, StochasticDepth
from flash_attn.modules.mlp import GatedMlp, Mlp, ParallelFusedMLP, ParallelGatedMlp, ParallelMLP
from flash_attn.ops import activations
from flash_attn.ops.fused_dense import FusedDense, FusedMLP, fused_mlp_func
from flash_attn.ops.triton.layer_norm import RMSNorm

DIM = 24


class Mixer(nn.Module):
    """A mixer with the call protocol of attention: ``mixer(x, **mixer_kwargs)``."""

    def __init__(self, dim, return_residual=False):
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.return_residual = return_residual

    def forward(self, x, scale=1.0, mixer_subset=None):
        y = self.proj(x) * scale
        y = y if mixer_subset is None else y[:, mixer_subset]
        return (y, x) if self.return_residual else y

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None):
        return batch_size, max_seqlen, dtype


def draw(*shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device)


def numeric(function, x):
    """The derivative of an elementwise function by autograd, in float64."""
    leaf = x.double().requires_grad_()
    function(leaf).sum().backward()
    return leaf.grad


@pytest.mark.parametrize(
    ("forward", "backward", "meaning"),
    [
        (activations.gelu_fwd, activations.gelu_bwd, partial(F.gelu, approximate="tanh")),
        (activations.sqrelu_fwd, activations.sqrelu_bwd, lambda t: F.relu(t) ** 2),
        (F.relu, activations.relu_bwd, F.relu),
    ],
)
def test_activation_derivatives(device, forward, backward, meaning):
    x, g = draw(50, device=device), draw(50, device=device, seed=1)
    torch.testing.assert_close(forward(x), meaning(x))
    torch.testing.assert_close(backward(g, x), g * numeric(meaning, x).float())
    half = x.half()
    assert forward(half).dtype == backward(g.half(), half).dtype == torch.float16


def test_bias_gelu(device):
    x = draw(2, 5, 7, device=device).requires_grad_()
    bias = draw(7, device=device, seed=1).requires_grad_()
    g = draw(2, 5, 7, device=device, seed=2)
    out = activations.bias_gelu_impl(x, bias)
    torch.testing.assert_close(out, F.gelu(x + bias, approximate="tanh"))
    out.backward(g)
    dx, dbias = activations.bias_gelu_back(g, x.detach(), bias.detach())
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dbias, bias.grad)
    torch.testing.assert_close(activations.fast_gelu_impl(x), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_swiglu(device, dtype):
    x, y, g = (draw(6, 9, device=device, seed=s).to(dtype) for s in range(3))
    x.requires_grad_()
    y.requires_grad_()
    wide_x, wide_y = (t.detach().double().requires_grad_() for t in (x, y))
    out, want = activations.swiglu(x, y), F.silu(wide_x) * wide_y
    out.backward(g)
    want.backward(g.double())
    rtol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for got, wanted in ((out, want), (x.grad, wide_x.grad), (y.grad, wide_y.grad)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=1e-6)


def test_swiglu_broadcasts(device):
    x = draw(4, 1, device=device).requires_grad_()
    y = draw(4, 5, device=device, seed=1).requires_grad_()
    activations.swiglu(x, y).sum().backward()
    got, x.grad = x.grad, None
    (F.silu(x) * y).sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_mlp(device):
    mlp = Mlp(DIM, device=device)
    assert {k: tuple(v.shape) for k, v in mlp.state_dict().items()} == {
        "fc1.weight": (96, DIM),
        "fc1.bias": (96,),
        "fc2.weight": (DIM, 96),
        "fc2.bias": (DIM,),
    }
    x = draw(2, 3, DIM, device=device)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))
    small = Mlp(DIM, 8, 5, F.relu, bias1=False, bias2=False, return_residual=True, device=device)
    y, same = small(x)
    assert y.shape == (2, 3, 5)
    assert same is x
    assert list(small.state_dict()) == ["fc1.weight", "fc2.weight"]


@pytest.mark.parametrize("activation", [F.sigmoid, F.silu, F.gelu])
def test_gated_mlp(device, activation):
    mlp = GatedMlp(DIM, activation=activation, device=device)
    assert mlp.fc1.weight.shape == (256, DIM), "8/3 of the width, rounded up to 128, twice"
    assert mlp.fc2.weight.shape == (DIM, 128)
    x = draw(2, 3, DIM, device=device)
    values, gate = mlp.fc1(x).chunk(2, dim=-1)
    torch.testing.assert_close(mlp(x), mlp.fc2(values * activation(gate)))
    assert GatedMlp(DIM, 10, multiple_of=4).fc2.in_features == 12


@pytest.mark.parametrize("activation", ["gelu_approx", "relu", "sqrelu"])
@pytest.mark.parametrize("checkpoint_lvl", [0, 1, 2])
def test_fused_mlp(device, activation, checkpoint_lvl):
    mlp = FusedMLP(DIM, 40, activation=activation, checkpoint_lvl=checkpoint_lvl, device=device)
    assert list(mlp.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    act = {
        "gelu_approx": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "sqrelu": lambda t: F.relu(t).square(),
    }[activation]
    x = draw(2, 3, DIM, device=device).requires_grad_()
    out = mlp(x)
    out.square().sum().backward()
    got = [x.grad, *(p.grad for p in mlp.parameters())]
    x.grad = None
    mlp.zero_grad()
    want = mlp.fc2(act(mlp.fc1(x)))
    want.square().sum().backward()
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(got, [x.grad, *(p.grad for p in mlp.parameters())])
    torch.testing.assert_close(mlp.eval()(x), want)


def test_fused_dense(device):
    layer = FusedDense(DIM, 7, return_residual=True, device=device)
    x = draw(3, DIM, device=device)
    y, same = layer(x)
    assert same is x
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))


def test_fused_mlp_errors(device):
    x = draw(3, DIM, device=device)
    with pytest.raises(ConstraintError, match="`activation` must be one of"):
        fused_mlp_func(x, x, x, activation="tanh")
    with pytest.raises(ConstraintError, match="`checkpoint_lvl` must be"):
        FusedMLP(DIM, checkpoint_lvl=3)


def make_block(device, kind=Block, **options):
    torch.manual_seed(0)
    block = kind(DIM, mixer_cls=Mixer, **options).to(device)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return block


@pytest.mark.parametrize("fused", [False, True])
def test_prenorm_block(device, fused):
    block = make_block(device, fused_dropout_add_ln=fused)
    names = {name.split(".")[0] for name in block.state_dict()}
    assert names == {"mixer", "norm1", "mlp", "norm2"}
    x = draw(2, 5, DIM, device=device)
    residual = draw(2, 5, DIM, device=device, seed=1)
    out, total = block(x, residual, mixer_kwargs={"scale": 2.0})
    want = x + residual
    mixed = block.mixer(block.norm1(want), scale=2.0)
    want = want + mixed
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(out, block.mlp(block.norm2(want)))
    first, total = block(x)
    torch.testing.assert_close(total, x + block.mixer(block.norm1(x)))
    assert first.shape == x.shape


@pytest.mark.parametrize("fused", [False, True])
def test_postnorm_block(device, fused):
    plain = make_block(device, prenorm=False, fused_dropout_add_ln=fused)
    x = draw(2, 5, DIM, device=device)
    mid = plain.norm1(plain.mixer(x) + x)
    want = plain.norm2(plain.mlp(mid) + mid)
    torch.testing.assert_close(plain(x), want)
    paired = make_block(device, prenorm=False, fused_dropout_add_ln=fused, return_residual=True)
    paired.load_state_dict(plain.state_dict())
    paired.mixer.return_residual = paired.mlp.return_residual = True
    torch.testing.assert_close(paired(x), want)
    with pytest.raises(ConstraintError, match="`residual` must be None"):
        plain(x, x)


@pytest.mark.parametrize(
    "norm_cls", [nn.LayerNorm, RMSNorm, partial(RMSNorm, zero_centered_weight=True)]
)
def test_fused_block_has_the_gradients_of_the_plain_one(device, norm_cls):
    results = []
    for fused in (False, True):
        block = make_block(device, norm_cls=norm_cls, fused_dropout_add_ln=fused)
        x = draw(2, 5, DIM, device=device).requires_grad_()
        residual = draw(2, 5, DIM, device=device, seed=1).requires_grad_()
        out, total = block(x, residual)
        (out.square().sum() + total.sum()).backward()
        results.append([out, total, x.grad, residual.grad, *(p.grad for p in block.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("fused", [False, True])
def test_block_options(device, fused):
    x = draw(2, 5, DIM, device=device)
    block = make_block(device, residual_in_fp32=True, fused_dropout_add_ln=fused).half()
    assert block(x.half())[1].dtype == torch.float32
    bare = make_block(device, mlp_cls=nn.Identity, fused_dropout_add_ln=fused)
    assert not hasattr(bare, "norm2")
    torch.testing.assert_close(bare(x)[0], bare.mixer(bare.norm1(x)))
    part = make_block(device, fused_dropout_add_ln=fused)
    out, total = part(x, mixer_subset=slice(0, 1))
    assert out.shape == total.shape == (2, 1, DIM)
    marked = make_block(device, sequence_parallel=True, mark_shared_params=True)
    assert marked.norm2.bias._sequence_parallel
    assert marked.norm1.weight._shared_params
    assert marked.allocate_inference_cache(2, 8) == (2, 8, None)


@pytest.mark.parametrize("fused", [False, True])
def test_dropout_and_drop_path_only_while_training(device, fused):
    x = draw(64, 3, DIM, device=device)
    options = {"mlp_cls": nn.Identity, "fused_dropout_add_ln": fused}
    block = make_block(device, resid_dropout1=0.5, drop_path1=0.5, **options)
    block.mixer = nn.Identity()
    _, total = block(x)
    dropped = (total == 0).all(dim=-1).all(dim=-1)
    assert 10 < dropped.sum() < 54, "whole samples must be dropped"
    kept = total[~dropped]
    assert 0.4 < (kept == 0).float().mean() < 0.6
    torch.testing.assert_close(kept[kept != 0], (4.0 * x[~dropped])[kept != 0])
    torch.testing.assert_close(block.eval()(x)[1], x)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tied_norm", [False, True])
def test_parallel_block(device, tied_norm, fused):
    block = make_block(device, ParallelBlock, tied_norm=tied_norm, fused_dropout_add_ln=fused)
    assert hasattr(block, "norm2") != tied_norm
    x1, x2, residual = (draw(2, 5, DIM, device=device, seed=s) for s in range(3))
    norm2 = block.norm1 if tied_norm else block.norm2
    out1, out2, total = block(x1, x2, residual, mixer_kwargs={"scale": 0.5})
    torch.testing.assert_close(total, x1 + x2 + residual)
    torch.testing.assert_close(out1, block.mixer(block.norm1(total), scale=0.5))
    torch.testing.assert_close(out2, block.mlp(norm2(total)))
    out1, out2, total = block(x1)
    torch.testing.assert_close(total, x1)
    torch.testing.assert_close(out2, block.mlp(norm2(x1)))


def test_stochastic_depth(device):
    x = torch.ones(1000, 2, device=device)
    y = StochasticDepth(0.25)(x)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (y[:, 0] == y[:, 1]).all()
    assert abs(y.mean().item() - 1.0) < 0.1
    assert (StochasticDepth(1.0)(x) == 0).all()
    assert torch.equal(StochasticDepth(0.25).eval()(x), x)


def test_block_errors():
    with pytest.raises(ConstraintError, match="`norm_cls` must make a LayerNorm"):
        Block(DIM, Mixer, norm_cls=lambda dim: nn.GroupNorm(1, dim), fused_dropout_add_ln=True)
    with pytest.raises(ConstraintError, match="`residual_in_fp32` must be False"):
        Block(DIM, Mixer, prenorm=False, residual_in_fp32=True)
    with pytest.raises(ConstraintError, match="`dropout_cls` must make"):
        ParallelBlock(DIM, Mixer, dropout_cls=StochasticDepth, fused_dropout_add_ln=True)


def _load_shard(parallel, whole, rank, world_size, gated):
    def rows(t):
        return t.chunk(world_size)[rank]

    def fc1(t):
        return torch.cat([rows(half) for half in t.chunk(2)]) if gated else rows(t)

    with torch.no_grad():
        parallel.fc1.weight.copy_(fc1(whole.fc1.weight))
        parallel.fc1.bias.copy_(fc1(whole.fc1.bias))
        parallel.fc2.weight.copy_(whole.fc2.weight.chunk(world_size, dim=1)[rank])
        assert (parallel.fc2.bias is not None) == (rank == 0)
        if rank == 0:
            parallel.fc2.bias.copy_(whole.fc2.bias)


def _parallel_rank(rank, world_size, address):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    try:
        group = dist.group.WORLD
        torch.manual_seed(0)
        cases = [
            (Mlp(DIM), partial(ParallelMLP, DIM, process_group=group), False),
            (FusedMLP(DIM), partial(ParallelFusedMLP, DIM, process_group=group), False),
            (GatedMlp(DIM, activation=F.silu), partial(_parallel_gated, group), True),
        ]
        for (whole, make, gated), split in ((c, s) for c in cases for s in (False, True)):
            parallel = make(sequence_parallel=split)
            _load_shard(parallel, whole, rank, world_size, gated)
            x = draw(4, 3, DIM, device="cpu").requires_grad_()
            want = whole(x)
            want.square().sum().backward()
            mine = slice(2 * rank, 2 * rank + 2) if split else slice(None)
            local = x.detach()[mine].clone().requires_grad_()
            out = parallel(local)
            out.square().sum().backward()
            torch.testing.assert_close(out, want[mine])
            torch.testing.assert_close(local.grad, x.grad[mine])
            shard = whole.fc2.weight.grad.chunk(world_size, dim=1)[rank]
            torch.testing.assert_close(parallel.fc2.weight.grad, shard)
            whole.zero_grad()
    finally:
        dist.destroy_process_group()


def _parallel_gated(group, sequence_parallel):
    return ParallelGatedMlp(DIM, group, activation=F.silu, sequence_parallel=sequence_parallel)


def test_hidden_features_split_over_ranks(tmp_path):
    address = (tmp_path / "store").as_uri()
    mp.spawn(_parallel_rank, args=(2, address), nprocs=2)
