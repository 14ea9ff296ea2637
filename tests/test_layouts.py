"""Strides and offsets: any view gives what its contiguous copy gives, and inputs are unchanged."""

from __future__ import annotations

import pytest
import support
import torch
from support import DTYPES, HALF_DTYPES, LAYOUTS, WRITABLE_LAYOUTS

import flash_attn

pytestmark = pytest.mark.families


def _inputs(device: str, dtype: torch.dtype, layout: str) -> support.Inputs:
    """All four tensors in ``layout``, several tiles long, with rows of no multiple of 16 bytes."""
    seqlens = support.pick(device, (37, 43), (150, 211))
    inputs = support.dense(
        device, dtype, seqlens=seqlens, heads=(4, 2), headdim=24, causal=True, window_size=(30, -1)
    )
    place = LAYOUTS[layout]
    return inputs.but(**{name: place(getattr(inputs, name)) for name in ("q", "k", "v", "dout")})


@pytest.mark.parametrize("layout", support.some(list(LAYOUTS), ["hbsd", "expanded_rows"]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_layout(device: str, dtype: torch.dtype, layout: str) -> None:
    inputs = _inputs(device, dtype, layout)
    before = [x.clone() for x in inputs.tensors]
    got = support.run_and_check(inputs)
    for x, copy in zip(inputs.tensors, before, strict=True):
        assert torch.equal(x, copy)
    if "expanded" in layout:
        # Strides of 0 are compiled for themselves: equal to rounding, and to itself bit by bit.
        support.assert_same_bits(got, support.run(inputs), "when repeated")
        return
    names = ("q", "k", "v", "dout")
    compact = {name: x.contiguous() for name, x in zip(names, inputs.tensors, strict=True)}
    copy = inputs.but(**compact)
    # Not every layout is served by the same kernels; the budget holds for all.
    if support.families_of(inputs) == support.families_of(copy):
        support.assert_same_bits(got, support.run(copy), "from the contiguous copy")


@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_one_tensor_lies_elsewhere(device: str, dtype: torch.dtype, which: str) -> None:
    """The strides of one tensor are not taken for another's."""
    inputs = support.dense(device, dtype, seqlens=(33, 47), heads=(4, 2), headdim=40)
    want = support.run(inputs)
    for layout, place in WRITABLE_LAYOUTS.items():
        moved = inputs.but(**{which: place(getattr(inputs, which))})
        if support.families_of(inputs) == support.families_of(moved):
            support.assert_same_bits(support.run(moved), want, f"with {which} as {layout}")
        else:
            support.run_and_check(moved)


@pytest.mark.parametrize("layout", support.some(list(WRITABLE_LAYOUTS), ["hbsd", "wide_rows"]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_gradient_buffers(device: str, dtype: torch.dtype, layout: str) -> None:
    """Gradients go to strided buffers, and nowhere beside them."""
    inputs = support.dense(device, dtype, seqlens=(35, 41), heads=(4, 2), headdim=24, causal=True)
    place = WRITABLE_LAYOUTS[layout]
    buffers = tuple(place(support.poisoned_like(x)) for x in (inputs.q, inputs.k, inputs.v))
    whole = [
        torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage()) for x in buffers
    ]
    got, _ = support.run_private(inputs, buffers)
    support.assert_same_bits(got, support.run(inputs))
    for x, storage in zip(buffers, whole, strict=True):
        assert int(torch.isnan(storage).sum()) == storage.numel() - x.numel()


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
def test_out_buffer(device: str, layout: str) -> None:
    inputs = support.dense(device, torch.float16, seqlens=(35, 41), headdim=24)
    out = WRITABLE_LAYOUTS[layout](support.poisoned_like(inputs.q))
    flash_attn.flash_attn_interface.flash_attn_gpu.fwd(
        inputs.q, inputs.k, inputs.v, out, None, 0.0, 24**-0.5, False, -1, -1, 0.0, False
    )
    assert torch.equal(out, support.run(inputs).out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_feature_packed_rows(device: str, dtype: torch.dtype) -> None:
    """Varlen tensors as slices of a packed projection, as heads-first views, and expanded."""
    inputs = support.varlen(device, dtype, [33, 0, 8], [33, 5, 40], heads=(2, 2), causal=True)
    want = support.run(inputs)
    places = {
        "packed": lambda x: torch.stack([x + 1, x, x - 1], dim=1)[:, 1],
        "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "last stride 2": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    }
    for name, place in places.items():
        moved = {key: place(getattr(inputs, key)) for key in ("q", "k", "v", "dout")}
        support.assert_same_bits(support.run(inputs.but(**moved)), want, name)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_sum_of_the_output(device: str, dtype: torch.dtype) -> None:
    """The gradient of a plain sum is one expanded number."""
    inputs = support.dense(device, dtype, seqlens=(20, 30))
    ones = torch.ones_like(inputs.q)
    want = support.run(inputs.but(dout=ones))
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    flash_attn.flash_attn_func(*leaves).sum().backward()
    for leaf, grad in zip(leaves, want[2:], strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("seqlens", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_sum_of_an_output_without_queries_or_keys(device: str, seqlens: tuple[int, int]) -> None:
    inputs = support.dense(device, torch.float16, seqlens=seqlens)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    flash_attn.flash_attn_func(*leaves).sum().backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()
