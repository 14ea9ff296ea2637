"""Repeated calls launch what the ordinary way launches, and nothing escapes their signature.

The portable kernels' launches are made on CPU tensors and noted instead of run, see stub_driver.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from unittest import mock

import pytest
import torch
from stub_driver import StubDriver, stub_driver
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    hopper_interface,
    set_backend,
    settings,
    use_backend,
)
from flash_attn.backends.triton import BACKEND, launch
from flash_attn.core import autograd, plan, registry, repeated
from flash_attn.core.plan import TilePlan
from flash_attn.errors import ConstraintError, UnsupportedProblemError
from flash_attn.kernels import backward as backward_kernels
from flash_attn.kernels import combine as combine_kernels
from flash_attn.kernels import forward as forward_kernels

pytestmark = [
    pytest.mark.skipif(knobs.runtime.interpret, reason="nothing is compiled in the interpreter"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
]


@pytest.fixture(autouse=True)
def gpu(monkeypatch) -> StubDriver:
    """CPU tensors are served by the portable kernels, whose launches are noted."""
    monkeypatch.setattr(registry, "_process_choice", registry.AUTO)
    monkeypatch.setattr(registry, "_context_choice", [])
    monkeypatch.delenv("FLASH_ATTENTION_USE_FLAGGEMS", raising=False)
    registry.load("triton")
    monkeypatch.setattr(BACKEND, "unsupported", lambda problem, backward: [])
    _forget()
    with stub_driver() as made:
        yield made
    _forget()


def _forget() -> None:
    repeated.clear()
    autograd._known.clear()


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def qkv(
    batch: int = 1, seqlen: int = 32, nheads: int = 4, nheads_k: int = 4, d: int = 32
) -> list[Tensor]:
    heads = (nheads, nheads_k, nheads_k)
    return [half(batch, seqlen, h, d) for h in heads]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


KERNELS = (
    forward_kernels.attention_forward,
    combine_kernels.attention_combine,
    backward_kernels.attention_row_statistics,
    backward_kernels.attention_dkdv,
    backward_kernels.attention_dq,
)
_BY_NAME = {kernel.__name__: kernel for kernel in KERNELS}


def named(driver: StubDriver, tensors: dict[str, Tensor]) -> list[dict[str, object]]:
    """The launches since the last look: arguments by name, with known addresses by name too and
    new ones by the order in which they occur."""
    known = {x.data_ptr(): name for name, x in tensors.items()}
    found = []
    for one in driver.launches:
        kernel = _BY_NAME[driver.names[one.function]]
        # Compiled anew for other types, alignments or constants, a kernel is another function.
        values: dict[str, object] = {"function": one.function, "grid": one.grid}
        for name, value, param in zip(kernel.arg_names, one.arguments, kernel.params, strict=True):
            if name == "rng_state":
                value = "unused"
            elif isinstance(value, int) and value > 2**40 and not param.is_constexpr:
                value = known.setdefault(value, f"new {len(known)}")
            values[name] = value
        found.append({**values, "stream": one.stream, "metadata": one.metadata})
    driver.launches.clear()
    return found


def is_direct(driver: StubDriver) -> bool:
    """Whether the latest launch went past Triton's usual path."""
    return driver.launches[-1].hooks == (None, None, None)


Call = tuple[Callable[..., object], dict[str, Tensor]]


def dense(**options: object) -> Callable[[], Call]:
    def make() -> Call:
        shapes = {key: options[key] for key in ("batch", "nheads_k", "d") if key in options}
        q, k, v = qkv(**shapes)
        rest = {key: value for key, value in options.items() if key not in shapes}
        return (lambda q, k, v: flash_attn_func(q, k, v, **rest)), {"q": q, "k": k, "v": v}

    return make


def transposed() -> Call:
    q, k, v = (half(2, 4, 32, 32).transpose(1, 2) for _ in "qkv")
    return flash_attn_func, {"q": q, "k": k, "v": v}


def alibi() -> Call:
    q, k, v = qkv()
    slopes = torch.zeros(4)
    tensors = {"q": q, "k": k, "v": v, "slopes": slopes}
    return (lambda q, k, v, slopes: flash_attn_func(q, k, v, alibi_slopes=slopes)), tensors


def varlen() -> Call:
    q, k, v = (half(48, 4, 32) for _ in "qkv")
    tensors = {"q": q, "k": k, "v": v, "cu_q": ints(0, 20, 48), "cu_k": ints(0, 7, 48)}

    def call(q, k, v, cu_q, cu_k):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 28, 41, causal=True)

    return call, tensors


def varlen_with_lse() -> Call:
    call, tensors = varlen()

    def with_lse(q, k, v, cu_q, cu_k):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 28, 41, return_attn_probs=True)

    return with_lse, tensors


def varlen_of_one(backward: bool) -> Callable[[], Call]:
    """The same lengths for queries and keys."""

    def make() -> Call:
        tensors = {name: half(48, 4, 32) for name in ("q", "k", "v", "dout")}
        tensors["cu"] = ints(0, 20, 48)

        def call(q, k, v, dout, cu):
            leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]
            out = flash_attn_varlen_func(*leaves, cu, cu, 28, 28, causal=True)
            return torch.autograd.grad(out, leaves, dout) if backward else out

        return call, tensors

    return make


def varlen_backward() -> Call:
    _, tensors = varlen()
    tensors["dout"] = half(48, 4, 32)

    def call(q, k, v, cu_q, cu_k, dout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_attn_varlen_func(*leaves, cu_q, cu_k, 28, 41, causal=True)
        return torch.autograd.grad(out, leaves, dout)

    return call, tensors


def hopper(**options: object) -> Callable[[], Call]:
    """FlashAttention-3's function."""

    def make() -> Call:
        q, k, v = qkv(nheads_k=2)
        call = partial(hopper_interface.flash_attn_func, **options)
        return call, {"q": q, "k": k, "v": v}

    return make


def hopper_varlen(**options: object) -> Callable[[], Call]:
    def make() -> Call:
        _, tensors = varlen()

        def call(q, k, v, cu_q, cu_k):
            return hopper_interface.flash_attn_varlen_func(
                q, k, v, cu_q, cu_k, 28, 41, causal=True, **options
            )

        return call, tensors

    return make


def decode(num_splits: int) -> Callable[[], Call]:
    def make() -> Call:
        tensors = {"q": half(2, 1, 4, 32), "k": half(2, 256, 2, 32), "v": half(2, 256, 2, 32)}
        tensors["lengths"] = ints(100, 30)

        def call(q, k, v, lengths):
            return flash_attn_with_kvcache(
                q, k, v, cache_seqlens=lengths, num_splits=num_splits, causal=True
            )

        return call, tensors

    return make


def paged() -> Call:
    tensors = {"q": half(2, 1, 4, 32), "k": half(8, 16, 2, 32), "v": half(8, 16, 2, 32)}
    tensors |= {"lengths": ints(60, 30), "table": torch.zeros(2, 4, dtype=torch.int32)}

    def call(q, k, v, lengths, table):
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table)

    return call, tensors


def private() -> Call:
    q, k, v = qkv()

    def call(q, k, v):
        return flash_attn_interface._flash_attn_forward(
            q, k, v, 0.0, 0.1, True, -1, -1, 0.0, None, False
        )

    return call, {"q": q, "k": k, "v": v}


def backward(**options: object) -> Callable[[], Call]:
    def make() -> Call:
        q, k, v = qkv(nheads_k=2)
        dout = half(1, 32, 4, 32)

        def call(q, k, v, dout):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(flash_attn_func(*leaves, **options), leaves, dout)

        return call, {"q": q, "k": k, "v": v, "dout": dout}

    return make


CALLS: dict[str, Callable[[], Call]] = {
    "plain": dense(),
    "causal": dense(causal=True),
    "window": dense(window_size=(7, 3)),
    "scale and softcap": dense(softmax_scale=0.3, softcap=5.0),
    "grouped": dense(batch=2, nheads_k=2),
    "odd head dim": dense(d=40),
    "lists": dense(window_size=[7, 3]),
    "with lse": dense(return_attn_probs=True),
    "transposed": transposed,
    "alibi": alibi,
    "varlen": varlen,
    "varlen, the same lengths": varlen_of_one(backward=False),
    "varlen backward": varlen_backward,
    "varlen backward, the same lengths": varlen_of_one(backward=True),
    "varlen with lse": varlen_with_lse,
    "hopper": hopper(causal=True),
    "hopper with lse": hopper(return_attn_probs=True, softcap=3.0),
    "hopper varlen": hopper_varlen(),
    "hopper varlen with lse": hopper_varlen(return_attn_probs=True),
    "decode": decode(1),
    "split": decode(3),
    "paged": paged,
    "private": private,
    "backward": backward(),
    "causal backward": backward(causal=True, deterministic=True),
}


@pytest.mark.parametrize("before", [2, 3], ids=["third", "fourth"])
@pytest.mark.parametrize("name", CALLS)
def test_a_later_call_launches_what_the_first_does(gpu, name, before):
    make = CALLS[name]
    call, tensors = make()
    for _ in range(before):
        call(**tensors)
    others = make()[1]
    assert not {x.data_ptr() for x in others.values()} & {x.data_ptr() for x in tensors.values()}
    gpu.launches.clear()
    call(**others)
    assert is_direct(gpu)
    third = named(gpu, others)
    _forget()
    call(**others)
    assert not is_direct(gpu)
    assert third == named(gpu, others)


@pytest.mark.parametrize("name", CALLS)
def test_results_have_the_same_metadata_each_time(name):
    def described(x: object) -> object:
        if isinstance(x, Tensor):
            return (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, type(x))
        return tuple(described(y) for y in x)

    call, tensors = CALLS[name]()
    first, *others = (described(call(**tensors)) for _ in range(4))
    assert all(x == first for x in others)


def warm(**options: object) -> None:
    for _ in range(3):
        flash_attn_func(*qkv(), **options)


def launched(driver: StubDriver, tensors: list[Tensor], **options: object) -> dict[str, object]:
    """The one launch of a call, by name."""
    driver.launches.clear()
    flash_attn_func(*tensors, **options)
    (one,) = named(driver, dict(zip("qkv", tensors, strict=True)))
    return one


def assert_is_ordinary(driver: StubDriver, tensors: list[Tensor], **options: object) -> None:
    """A call after others launches what it launches on its own."""
    after_others = launched(driver, tensors, **options)
    _forget()
    assert after_others == launched(driver, tensors, **options)


OTHERS = {
    "seqlen": lambda: qkv(seqlen=48),
    "batch": lambda: qkv(batch=2),
    "heads": lambda: qkv(nheads_k=2),
    "head dim": lambda: qkv(d=16),
    "dtype": lambda: [x.half() for x in qkv()],
    "strides of q": lambda: [half(1, 4, 32, 32).transpose(1, 2), *qkv()[1:]],
    "strides of v": lambda: [*qkv()[:2], half(1, 4, 32, 32).transpose(1, 2)],
    "rows of k": lambda: [qkv()[0], half(1, 64, 4, 32)[:, ::2], qkv()[2]],
    "fewer keys": lambda: [qkv()[0], *(half(1, 16, 4, 32) for _ in "kv")],
    "negative": lambda: [qkv()[0], torch._neg_view(qkv()[1]), qkv()[2]],
    "alignment": lambda: [half(32 * 4 * 32 + 1)[1:].view(1, 32, 4, 32), *qkv()[1:]],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tensors_are_another_call(gpu, name):
    warm()
    assert_is_ordinary(gpu, OTHERS[name]())


OTHER_GUARDS = {
    "none": None,
    "other arguments": mock.Mock(side_effect=TypeError("changed")),
    "another answer": mock.Mock(**{"return_value.check.return_value": None}),
    "always": mock.Mock(**{"return_value.check.return_value": True}),
}


def packed(total: int = 48, rows: int | None = None, **lengths: Tensor) -> list[Tensor]:
    bounds = [lengths.get(name, ints(0, 20, 48)) for name in ("cu_q", "cu_k")]
    return [half(total, 4, 32), *(half(rows or total, 4, 32) for _ in "kv"), *bounds]


OTHER_PACKED = {
    "rows": lambda: packed(64),
    "rows of keys": lambda: packed(48, 64),
    "rows that nobody has": lambda: packed(48, 0),
    "sequences": lambda: packed(cu_q=ints(0, 9, 20, 48), cu_k=ints(0, 9, 20, 48)),
    "strides of lengths": lambda: packed(cu_k=ints(0, 1, 20, 1, 48, 1)[::2]),
    "alignment of lengths": lambda: packed(cu_q=ints(1, 0, 20, 48)[1:]),
    "negative": lambda: [*packed()[:2], torch._neg_view(packed()[2]), *packed()[3:]],
    "the same lengths": lambda: [*packed()[:4], None],
}


@pytest.mark.parametrize("name", OTHER_PACKED)
def test_other_packed_tensors_are_another_call(gpu, name):
    """And after those the first ones still are what they were."""

    def launches(tensors: list[Tensor]) -> object:
        gpu.launches.clear()
        q, k, v, cu_q, cu_k = tensors
        try:
            flash_attn_varlen_func(q, k, v, cu_q, cu_q if cu_k is None else cu_k, 28, 28)
        except ConstraintError as error:
            return str(error)
        names = ("q", "k", "v", "cu_q", "cu_k")
        return named(gpu, {n: x for n, x in zip(names, tensors, strict=True) if x is not None})

    for _ in range(4):
        usual = launches(packed())
    assert usual
    made = OTHER_PACKED[name]()
    after_others = launches(made)
    assert launches(packed()) == usual
    _forget()
    assert launches(made) == after_others


@pytest.mark.parametrize("function", [flash_attn_func, hopper_interface.flash_attn_func])
def test_what_is_no_tensor_is_named_on_the_fifth_call_too(gpu, function):
    for _ in range(4):
        function(*qkv())
    q, k, v = qkv()
    with pytest.raises((ConstraintError, TypeError), match="`k`"):
        function(q, None, v)
    with pytest.raises((ConstraintError, TypeError), match="`v`"):
        function(q, k, 3)
    with pytest.raises((ConstraintError, TypeError), match="`q`"):
        function([1.0], k, v)


def test_lengths_of_another_dtype_are_refused(gpu):
    tensors = packed()
    for _ in range(4):
        flash_attn_varlen_func(*tensors, 28, 28)
    tensors[4] = tensors[4].long()
    with pytest.raises(ConstraintError, match="cu_seqlens_k"):
        flash_attn_varlen_func(*tensors, 28, 28)


@pytest.mark.parametrize("guards", OTHER_GUARDS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_tensors_without_the_guards_of_pytorch(gpu, monkeypatch, name, guards):
    monkeypatch.setattr(repeated, "_TensorGuards", OTHER_GUARDS[guards])
    warm()
    assert is_direct(gpu)
    assert_is_ordinary(gpu, OTHERS[name]())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_guards_are_tried_in_any_mode(mode):
    """Once in a process."""
    repeated._guards_tell.cache_clear()
    torch.set_default_dtype(torch.float16)
    try:
        with mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            assert repeated._guards_tell(repeated._TensorGuards)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_fourth_call_is_found_by_a_look(gpu, monkeypatch):
    """And another one of its kind that requires gradients, and not when the settings differ."""
    signatures = []
    usual = repeated.signature_of
    monkeypatch.setattr(repeated, "signature_of", lambda *x: signatures.append(x) or usual(*x))
    warm()
    signatures.clear()
    flash_attn_func(*qkv())
    assert is_direct(gpu)
    with_gradient = [x.requires_grad_() for x in qkv()]
    for _ in range(3):
        assert flash_attn_func(*with_gradient).requires_grad
        assert not flash_attn_func(*qkv()).requires_grad
    assert len(signatures) == 1
    with use_backend("triton"):
        flash_attn_func(*qkv())
    assert len(signatures) > 1


def test_a_freed_tensor_is_not_taken_for_another(gpu):
    warm()
    q, k, v = qkv()
    v.untyped_storage().resize_(0)
    gpu.launches.clear()
    with suppress(Exception):
        flash_attn_func(q, k, v)
    assert not gpu.launches or not is_direct(gpu)


def test_layouts_that_alternate_are_not_looked_at_for_good(gpu, monkeypatch):
    """Guards that are made anew for every call cost more than they save."""
    made = []
    usual = repeated._matcher
    monkeypatch.setattr(repeated, "_matcher", lambda x: made.append(x) or usual(x))
    turned = [half(1, 4, 32, 32).transpose(1, 2) for _ in "qkv"]
    for _ in range(20):
        for tensors in (qkv(), turned):
            flash_attn_func(*tensors)
            assert launched(gpu, tensors)["q"] == "q"
            flash_attn_func(*tensors)
    assert is_direct(gpu)
    assert len(made) == repeated.Lookout.MOST


def incoming(name: str) -> Tensor:
    """A gradient of ``out`` that is like the usual one in all but what its name says."""
    shape = (2, 32, 4, 32)
    if name == "transposed":
        return half(2, 4, 32, 32).transpose(1, 2)
    if name == "expanded":
        return half(1, 1, 1, 1).expand(shape)
    if name == "unaligned":
        return half(2 * 32 * 4 * 32 + 1)[1:].view(shape)
    if name == "negative":
        return torch._neg_view(half(*shape))
    return half(*shape)


@pytest.mark.parametrize("name", ["usual", "transposed", "expanded", "unaligned", "negative"])
def test_other_incoming_gradients_are_another_call(gpu, name):
    leaves = [x.requires_grad_() for x in qkv(batch=2)]

    def launches(dout: Tensor) -> list[dict[str, object]]:
        gpu.launches.clear()
        made = torch.autograd.grad(flash_attn_func(*leaves), leaves, dout)
        names = ("q", "k", "v", "dout", "dq", "dk", "dv")
        return named(gpu, dict(zip(names, (*leaves, dout, *made), strict=True)))

    for _ in range(4):
        usual = launches(incoming("usual"))
    assert usual
    others = [launches(incoming(name)) for _ in range(4)]
    assert launches(incoming("usual")) == usual
    _forget()
    assert launches(incoming(name)) == others[0] == others[3]


def test_known_gradients_are_found_by_a_look(gpu, monkeypatch):
    """Of those in order and of the others; not when the settings differ."""
    leaves = [x.requires_grad_() for x in qkv(batch=2)]

    def both() -> bool:
        gpu.launches.clear()
        torch.autograd.grad(flash_attn_func(*leaves), leaves, half(2, 32, 4, 32))
        return all(x.hooks == (None, None, None) for x in gpu.launches)

    for _ in range(4):
        both()
    signatures = []
    usual = repeated.signature_of
    monkeypatch.setattr(repeated, "signature_of", lambda *x: signatures.append(x) or usual(*x))
    assert both()
    assert signatures == []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            both()
        signatures.clear()
        assert both()
        assert signatures == []
    finally:
        torch.use_deterministic_algorithms(False)
    assert both()
    assert signatures == []
    with use_backend("triton"):
        both()
    assert signatures


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"softmax_scale": 0.5},
        {"softmax_scale": -0.5},
        {"window_size": (4, -1)},
        {"window_size": (-1, 4)},
        {"window_size": [3, 3]},
        {"softcap": 3.0},
        {"softcap": -3.0},
        {"softmax_scale": torch.tensor(0.5)},
    ],
)
def test_other_options_are_another_call(gpu, options):
    warm()
    assert_is_ordinary(gpu, qkv(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softmax_scale": 0.5},
        {"causal": True, "window_size": (4, 4)},
        {"causal": True, "softcap": 3.0},
        {"causal": True, "return_attn_probs": True},
        {"causal": True, "qv": half(1, 32, 4, 32)},
        {"causal": True, "s_aux": torch.zeros(4)},
    ],
)
def test_other_options_of_flash_attention_3_are_another_call(gpu, options):
    def launches() -> object:
        q, k, v = qkv()
        gpu.launches.clear()
        try:
            results = hopper_interface.flash_attn_func(q, k, v, **options)
        except UnsupportedProblemError as error:
            return str(error)
        return isinstance(results, tuple), named(gpu, {"q": q, "k": k, "v": v})

    for _ in range(4):
        hopper_interface.flash_attn_func(*qkv(), causal=True)
    flash_attn_func(*qkv(), causal=True)
    assert is_direct(gpu) is False  # its rows without keys have another log-sum-exp
    after_others = launches()
    _forget()
    assert after_others == launches()


def test_flash_attention_3_has_gradients_after_calls_without(gpu):
    for _ in range(4):
        hopper_interface.flash_attn_func(*qkv())
    assert is_direct(gpu)
    q, k, v = (x.requires_grad_() for x in qkv())
    for _ in range(3):
        out, lse = hopper_interface.flash_attn_func(q, k, v, return_attn_probs=True)
        assert out.requires_grad
        assert lse.requires_grad
        assert hopper_interface.flash_attn_func(q, k, v).requires_grad
        with torch.no_grad():
            assert not hopper_interface.flash_attn_func(q, k, v).requires_grad
            assert is_direct(gpu)


def test_the_log_sum_exp_has_no_gradient_in_flash_attention_2(gpu):
    q, k, v = (x.requires_grad_() for x in qkv())
    for _ in range(4):
        out, lse, s_dmask = flash_attn_func(q, k, v, return_attn_probs=True)
        assert out.requires_grad
        assert not lse.requires_grad
        assert s_dmask.shape == (0,)


def test_a_tensor_as_a_number_is_read_on_each_call(gpu):
    scale = torch.tensor(0.5)
    for value in (0.5, 0.5, 0.5, 0.25):
        scale.fill_(value)
        assert launched(gpu, qkv(), softmax_scale=scale)["softmax_scale"] == value


def test_tensors_that_coincide_once_do_not_coincide_later(gpu):
    x, _, _ = qkv()
    for _ in range(3):
        flash_attn_func(x, x, x)
    assert is_direct(gpu)
    q, k, v = qkv()
    one = launched(gpu, [q, k, v])
    assert [one[name] for name in ("q", "k", "v")] == ["q", "k", "v"]


def test_parameters_are_repeated_too(gpu):
    q, k, v = qkv()
    slopes = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    for _ in range(3):
        flash_attn_func(q, k, v, alibi_slopes=slopes)
    assert is_direct(gpu)


def test_nothing_is_kept_alive():
    import gc
    import weakref

    call, tensors = CALLS["backward"]()
    for _ in range(3):
        results = call(**tensors)
    seen = [weakref.ref(x) for x in (*tensors.values(), *results)]
    del tensors, results
    gc.collect()
    assert all(reference() is None for reference in seen)


def test_dropout_is_never_repeated(gpu):
    for _ in range(4):
        flash_attn_func(*qkv(), dropout_p=0.1)
    assert not is_direct(gpu)


def test_calls_with_another_tensor_in_a_list_of_arguments_are_ordinary(gpu):
    """A signature that would hold a tensor's value is never stored."""
    warm(window_size=(torch.tensor(3), torch.tensor(3)))
    assert autograd._known == {}


def test_memory_is_bounded(gpu, monkeypatch):
    monkeypatch.setattr(repeated, "_CAPACITY", 4)
    for seqlen in range(1, 12):
        for _ in range(3):
            flash_attn_func(*qkv(seqlen=seqlen))
        assert len(repeated._calls) <= 4
    assert is_direct(gpu)


# What holds on the first call holds on the fourth


def test_named_backends(gpu):
    warm()
    gpu.launches.clear()
    with use_backend("reference"):
        flash_attn_func(*qkv())
    assert gpu.launches == []
    set_backend("cpu")
    flash_attn_func(*qkv())
    assert gpu.launches == []
    with use_backend("triton"):
        for _ in range(3):
            flash_attn_func(*qkv())
        assert is_direct(gpu)
    gpu.launches.clear()
    flash_attn_func(*qkv())
    assert gpu.launches == []
    set_backend("auto")
    flash_attn_func(*qkv())
    assert is_direct(gpu)


def test_a_backend_that_refuses_is_asked(gpu):
    warm()
    with use_backend("cuda"), pytest.raises(UnsupportedProblemError):
        flash_attn_func(*qkv())


def test_another_object_by_the_name_of_the_backend(gpu, monkeypatch):
    warm()
    monkeypatch.setitem(registry._loaded, "triton", registry.load("reference"))
    gpu.launches.clear()
    flash_attn_func(*qkv())
    assert gpu.launches == []


def test_the_environment_is_read_on_each_call(gpu, monkeypatch):
    warm()
    asked = []
    monkeypatch.setattr(registry, "_warn_fallback", asked.append)
    for text, count in (("FALSE", 1), ("TRUE", 1), ("", 1), ("0", 2)):
        monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", text)
        flash_attn_func(*qkv())
        assert len(asked) == count
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "perhaps")
    with use_backend("triton"):
        warm()
    with pytest.raises(ConstraintError, match="FLASH_ATTENTION_USE_FLAGGEMS"):
        flash_attn_func(*qkv())


def test_checks_of_contents_are_not_skipped(gpu, monkeypatch):
    call, tensors = varlen()
    for _ in range(3):
        call(**tensors)
    assert is_direct(gpu)
    monkeypatch.setattr(settings, "CHECK_INDICES", True)
    call(**tensors)
    assert not is_direct(gpu)
    tensors["cu_q"] = ints(0, 60, 48)
    with pytest.raises(ConstraintError, match="cu_seqlens_q"):
        call(**tensors)


def test_overridden_plans_are_used(gpu):
    warm()
    usual = launched(gpu, qkv())
    with plan.override(forward=TilePlan(16, 32, 2, 1)):
        for _ in range(3):
            one = launched(gpu, qkv())
            assert (one["BLOCK_M"], one["BLOCK_N"]) == (16, 32)
    assert launched(gpu, qkv()) == usual
    assert usual["BLOCK_M"] != 16


def test_launch_hooks_fire(gpu):
    warm()
    seen: list[object] = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        for _ in range(3):
            flash_attn_func(*qkv())
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == 3
    flash_attn_func(*qkv())
    assert is_direct(gpu)
    assert len(seen) == 3


def test_what_is_seen_while_hooks_are_set_is_recorded_later(gpu):
    knobs.runtime.launch_enter_hook.add(print)
    try:
        warm()
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    assert not is_direct(gpu)
    for _ in range(2):
        flash_attn_func(*qkv())
    assert is_direct(gpu)


def test_calls_that_cannot_be_repeated_are_not_recorded_again(gpu, monkeypatch):
    recorded = []
    forward = launch.forward

    def with_a_tensor_of_its_own(problem, out):
        recorded.append(problem)
        return forward(problem._replace(k=problem.k.clone()), out)

    monkeypatch.setattr(launch, "forward", with_a_tensor_of_its_own)
    for _ in range(5):
        flash_attn_func(*qkv())
    assert not is_direct(gpu)
    assert len(recorded) == 5
    assert list(repeated._calls.values()) == [repeated._ORDINARY]


def test_autocast_casts(gpu):
    tensors = [x.float() for x in qkv()]
    for _ in range(3):
        flash_attn_func(*tensors)
    assert is_direct(gpu)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            assert flash_attn_func(*tensors).dtype == torch.bfloat16
    assert flash_attn_func(*tensors).dtype == torch.float32


def test_the_gpu_of_the_tensors_is_made_current(gpu, monkeypatch):
    warm()
    home, entered = gpu.device, []

    class Guard:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            self.before, gpu.device = gpu.device, home

        def __exit__(self, *_):
            gpu.device = self.before

    monkeypatch.setattr(torch.cuda, "device", Guard)
    gpu.device = home + 1
    flash_attn_func(*qkv())
    assert entered == [home]
    assert is_direct(gpu)
    assert gpu.device == home + 1


# Autograd


def test_gradients_are_asked_for_or_not(gpu):
    for _ in range(4):
        q, k, v = qkv()
        assert not flash_attn_func(q, k, v).requires_grad
        k.requires_grad_()
        out = flash_attn_func(q, k, v)
        assert out.requires_grad
        with torch.no_grad():
            assert not flash_attn_func(q, k, v).requires_grad
        (grad,) = torch.autograd.grad(out, k, torch.ones_like(out))
        assert grad.shape == k.shape
    with torch.inference_mode():
        assert flash_attn_func(q, k, v).is_inference()


def test_changes_in_place_are_noticed(gpu):
    warm()
    q, k, v = (x.requires_grad_() for x in qkv())
    out = flash_attn_func(q, k, v)
    with torch.no_grad():
        q.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_differentiation_is_refused(gpu):
    warm()
    q, k, v = (x.requires_grad_() for x in qkv())
    out = flash_attn_func(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), q)


def test_backward_in_another_thread(gpu):
    call, tensors = CALLS["backward"]()
    for _ in range(3):
        call(**tensors)
    leaves = [tensors[name].detach().requires_grad_() for name in "qkv"]
    out = flash_attn_func(*leaves)
    worker = threading.Thread(target=lambda: out.backward(tensors["dout"]))
    worker.start()
    worker.join()
    assert is_direct(gpu)
    assert all(x.grad is not None for x in leaves)


def test_threads_do_not_mix_their_tensors(gpu):
    failures: list[object] = []
    warm()
    gpu.launches.clear()
    owned: dict[int, set[int]] = {}
    start = threading.Barrier(4)

    def work(number: int) -> None:
        mine = qkv()
        owned[number] = {x.data_ptr() for x in mine}
        start.wait()
        try:
            for seqlen in [32] * 50 + list(range(1, 30)) + [32] * 50:
                flash_attn_func(*(x[:, :seqlen] for x in mine))
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert len(gpu.launches) == 4 * 129
    for one in gpu.launches:
        assert set(one.arguments[:3]) in owned.values()


class Watcher(TorchDispatchMode):
    """Notes the names of the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_known_calls_are_operators_to_whoever_watches(gpu):
    q, k, v = (x.requires_grad_() for x in qkv())
    for _ in range(4):
        with Watcher() as watcher:
            out = flash_attn_func(q, k, v)
            out.backward(torch.zeros_like(out))
        assert "flash_attn::_flash_attn_forward" in watcher.seen
        assert "flash_attn::_flash_attn_backward" in watcher.seen
    assert is_direct(gpu)
    for _ in range(3):
        out = flash_attn_func(q, k, v)
    with Watcher() as watcher:
        out.backward(torch.zeros_like(out))
    assert "flash_attn::_flash_attn_backward" in watcher.seen


def test_known_calls_are_traced(gpu):
    warm()
    graph = make_fx(lambda q, k, v: flash_attn_func(q, k, v))(*qkv())
    assert "_flash_attn_forward" in graph.code
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="eager")
    assert compiled(*qkv()).shape == (1, 32, 4, 32)
    assert not torch.compiler.is_compiling()
