"""The surface that other programs rely on: names, signatures, operators, compilation."""

from __future__ import annotations

import importlib
import inspect
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import flash_attn
import flash_attn_2_cuda
from flash_attn import flash_attn_interface as interface
from flash_attn.core import ops, problem_ops
from flash_attn.core.combine import combine
from flash_attn.core.problem import (
    AttentionProblem,
    BackwardInputs,
    ScoreTransform,
    SequenceLayout,
    Visibility,
)
from flash_attn.errors import ConstraintError

REQUIRED = inspect.Parameter.empty
SCORES = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}


def required(names):
    return dict.fromkeys(names.split(), REQUIRED)


LENGTHS = required("cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k")
PUBLIC = {
    "flash_attn_func": required("q k v") | SCORES,
    "flash_attn_qkvpacked_func": required("qkv") | SCORES,
    "flash_attn_kvpacked_func": required("q kv") | SCORES,
    "flash_attn_varlen_func": required("q k v") | LENGTHS | SCORES | {"block_table": None},
    "flash_attn_varlen_qkvpacked_func": required("qkv cu_seqlens max_seqlen") | SCORES,
    "flash_attn_varlen_kvpacked_func": required("q kv") | LENGTHS | SCORES,
    "flash_attn_with_kvcache": required("q k_cache v_cache")
    | {
        "k": None,
        "v": None,
        "rotary_cos": None,
        "rotary_sin": None,
        "cache_seqlens": None,
        "cache_batch_idx": None,
        "cache_leftpad": None,
        "block_table": None,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
}
PUBLIC_COUNTS = [11, 9, 10, 16, 11, 14, 19]
# Ours, by keyword only. Hugging Face sends sinks to both functions where it sees this name.
_BEYOND = {"s_aux": None, "attn_mask": None}
KEYWORD_ONLY = dict.fromkeys(
    ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"), _BEYOND
)

TAIL = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
GRADS = "dout q k v out softmax_lse dq dk dv"
PRIVATE = {
    "_flash_attn_forward": required(f"q k v {TAIL} return_softmax"),
    "_flash_attn_varlen_forward": required("q k v")
    | LENGTHS
    | required("dropout_p softmax_scale causal")
    | {
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "return_softmax": False,
        "block_table": None,
        "leftpad_k": None,
        "seqused_k": None,
        "zero_tensors": False,
        "num_splits": 0,
    },
    "_flash_attn_backward": required(f"{GRADS} {TAIL} deterministic") | {"rng_state": None},
    "_flash_attn_varlen_backward": required(GRADS)
    | LENGTHS
    | required(f"{TAIL} deterministic")
    | {"rng_state": None, "zero_tensors": False},
}

RAW_TAIL = "window_size_left window_size_right softcap"
RAW = {
    "fwd": (
        "q k v out alibi_slopes p_dropout softmax_scale is_causal "
        f"{RAW_TAIL} return_softmax gen=None"
    ),
    "varlen_fwd": (
        "q k v out cu_seqlens_q cu_seqlens_k seqused_k leftpad_k block_table alibi_slopes "
        "max_seqlen_q max_seqlen_k p_dropout softmax_scale zero_tensors is_causal "
        f"{RAW_TAIL} return_softmax gen=None num_splits=0"
    ),
    "bwd": (
        f"{GRADS} alibi_slopes p_dropout softmax_scale is_causal "
        f"{RAW_TAIL} deterministic gen=None rng_state=None"
    ),
    "varlen_bwd": (
        f"{GRADS} cu_seqlens_q cu_seqlens_k alibi_slopes max_seqlen_q max_seqlen_k p_dropout "
        f"softmax_scale zero_tensors is_causal {RAW_TAIL} deterministic gen=None rng_state=None"
    ),
    "fwd_kvcache": (
        "q k_cache v_cache k v seqlens_k rotary_cos rotary_sin cache_batch_idx leftpad_k "
        f"block_table alibi_slopes out softmax_scale is_causal {RAW_TAIL} "
        "is_rotary_interleaved num_splits"
    ),
}

SCHEMAS = {
    "_flash_attn_forward": (
        "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
        "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, "
        "bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "_flash_attn_varlen_forward": (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, "
        "bool causal, SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0., "
        "Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, "
        "Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False, "
        "SymInt num_splits=0) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "_flash_attn_backward": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, float dropout_p, float softmax_scale, "
        "bool causal, SymInt window_size_left, SymInt window_size_right, float softcap, "
        "Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None) -> Tensor"
    ),
    "_flash_attn_varlen_backward": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, Tensor cu_seqlens_q, "
        "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, "
        "float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right, "
        "float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None, "
        "bool zero_tensors=False) -> Tensor"
    ),
}


def parameters(function, keyword_only=None):
    """Names and defaults in order, without those by keyword only, which must be as given."""
    found = inspect.signature(function).parameters
    own = {name: p.default for name, p in found.items() if p.kind is p.KEYWORD_ONLY}
    assert own == (keyword_only or {})
    rest = [(name, p) for name, p in found.items() if name not in own]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for _, p in rest)
    return [(name, p.default) for name, p in rest]


# Names and signatures


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signatures(name):
    function = getattr(flash_attn, name)
    assert function is getattr(interface, name)
    assert inspect.isfunction(function)
    assert parameters(function, KEYWORD_ONLY.get(name)) == list(PUBLIC[name].items())


def test_the_table_has_the_right_counts():
    assert [len(signature) for signature in PUBLIC.values()] == PUBLIC_COUNTS


@pytest.mark.parametrize("name", PRIVATE)
def test_private_signatures(name):
    function = getattr(interface, name)
    assert inspect.isfunction(function)
    assert parameters(function) == list(PRIVATE[name].items())
    assert inspect.getfullargspec(function).args == list(PRIVATE[name])


@pytest.mark.parametrize("name", RAW)
def test_raw_signatures(name):
    defaults = {"None": None, "0": 0}
    expected = [
        (text.partition("=")[0], defaults[text.partition("=")[2]] if "=" in text else REQUIRED)
        for text in RAW[name].split()
    ]
    function = getattr(flash_attn_2_cuda, name)
    assert function is getattr(interface.flash_attn_gpu, name)
    assert parameters(function) == expected


def test_other_names_of_the_interface():
    for name in PRIVATE:
        wrapped = getattr(interface, "_wrapped" + name)
        assert wrapped is getattr(torch.ops.flash_attn, name)
    assert interface.USE_TRITON_ROCM is False
    x = torch.zeros(4, 6)
    assert interface.maybe_contiguous(x) is x
    assert interface.maybe_contiguous(x.t()).is_contiguous()
    assert interface.maybe_contiguous(torch.zeros(2, 9, 6)[:, ::2]).stride() == (54, 12, 1)
    assert interface.round_multiple(129, 128) == 256
    assert interface.round_multiple(128, 128) == 128
    assert interface._get_block_size_n(torch.device("cpu"), 64, True, False) >= 2**30
    assert parameters(interface._get_block_size_n) == list(
        required("device head_dim is_dropout is_causal").items()
    )


@pytest.mark.parametrize(
    "name",
    [
        "FlashAttnFunc",
        "FlashAttnQKVPackedFunc",
        "FlashAttnKVPackedFunc",
        "FlashAttnVarlenFunc",
        "FlashAttnVarlenQKVPackedFunc",
        "FlashAttnVarlenKVPackedFunc",
    ],
)
def test_autograd_names_take_the_arguments_in_order(name):
    assert callable(getattr(interface, name).apply)


def test_applying_a_class_is_calling_the_function():
    q, k, v = (torch.randn(1, 5, 2, 16, requires_grad=True) for _ in range(3))
    options = (0.0, None, True, (-1, -1), 0.0, None, False, True)
    with torch.enable_grad():
        found = interface.FlashAttnFunc.apply(q, k, v, *options, torch.is_grad_enabled())
    expected = flash_attn.flash_attn_func(q, k, v, *options)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert found[0].requires_grad
    assert not interface.FlashAttnFunc.apply(q, k, v, *options, False)[0].requires_grad
    kv = torch.stack([k, v], dim=2)
    packed = interface.FlashAttnKVPackedFunc.apply(q, kv, *options)
    assert torch.equal(packed[0], expected[0])


def test_the_package_exports():
    for name in (*PUBLIC, "__version__", "set_backend", "use_backend", "attention_probs"):
        assert name in flash_attn.__all__
        assert hasattr(flash_attn, name)
    assert flash_attn.__version__ == "2.8.3"
    with pytest.raises(AttributeError, match="flash_attn.*no attribute 'flash_attn_unpadded'"):
        flash_attn.flash_attn_unpadded  # noqa: B018
    importlib.import_module("flash_attn.bert_padding")


def test_everything_in_all_exists():
    for module in (flash_attn, interface, flash_attn_2_cuda):
        for name in module.__all__:
            getattr(module, name)


# Operators


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(name):
    overload = getattr(torch.ops.flash_attn, name).default
    assert str(overload._schema) == f"flash_attn::{name}{SCHEMAS[name]}"


def bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def dense_tensors(dtype=torch.float32, seqlen_q=6, seqlen_k=9, grad=False):
    shapes = [(2, seqlen_q, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 16)]
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def packed_tensors(grad=False):
    return [torch.randn(shape, requires_grad=grad) for shape in ((8, 4, 16), (11, 2, 16))]


def operator_calls():
    slopes = torch.rand(4)
    q, k, v = dense_tensors()
    forward, varlen, backward, varlen_backward = (
        getattr(torch.ops.flash_attn, name).default for name in SCHEMAS
    )
    yield "dense", forward, (q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    yield "alibi", forward, (q, k, v, 0.0, 0.25, False, 3, 2, 0.0, slopes, False)
    yield "softcap", forward, (q, k, v, 0.0, 0.25, False, -1, -1, 2.0, None, False)
    out, lse, _, rng = forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    tail = (0.0, 0.25, True, -1, -1, 0.0, None, False, rng)
    yield "dense backward", backward, (torch.ones_like(q), q, k, v, out, lse, *grads, *tail)
    no_grads = (None, None, None)
    yield "dense backward, own", backward, (torch.ones_like(q), q, k, v, out, lse, *no_grads, *tail)
    x, y = packed_tensors()
    lengths = (bounds(3, 5), bounds(4, 7), 5, 7)
    yield "packed", varlen, (x, y, y + 1, *lengths, 0.0, 0.25, True)
    out, lse, _, rng = varlen(x, y, y + 1, *lengths, 0.0, 0.25, True)
    grads = (torch.empty_like(x), torch.empty_like(y), torch.empty_like(y))
    tail = (*lengths, 0.0, 0.25, True, -1, -1, 0.0, None, False, rng)
    arguments = (torch.ones_like(x), x, y, y + 1, out, lse, *grads, *tail)
    yield "packed backward", varlen_backward, arguments


def whole_problem_calls():
    """The operators that take every field of a problem."""
    for name, problem in problems():
        flat = problem_ops.flatten(problem)
        yield name, problem_ops.forward.default, flat
        if problem.qv is not None:  # which has no gradient
            continue
        out, lse, _, rng = problem_ops.forward(*flat)
        mask = problem.transform.attn_mask
        dmask = None if mask.dtype == torch.bool else torch.empty_like(mask)
        inputs = BackwardInputs(
            torch.ones_like(out),
            out,
            lse,
            *(torch.empty_like(x) for x in problem[:3]),
            rng,
            torch.ones_like(lse),
            dmask,
            torch.empty_like(problem.transform.sinks),
        )
        yield f"{name} backward", problem_ops.backward.default, (*inputs, *flat)


def problems():
    q, k, v = dense_tensors()
    transform = ScoreTransform(0.25, attn_mask=torch.randn(2, 1, 6, 9), sinks=torch.randn(4))
    yield "mask and sinks", AttentionProblem(q, k, v, transform, Visibility(None, 0, 4))
    yield "a second product", AttentionProblem(q, k, v, transform, qv=q + 1)
    wide = torch.randn(2, 9, 2, 24)
    yield "a head dim of v of its own", AttentionProblem(q, k, wide, transform)
    x, y = packed_tensors()
    layout = SequenceLayout(
        bounds(3, 5), bounds(4, 7), max_seqlen_q=5, max_seqlen_k=7, seqused_q=bounds(2, 2)[1:]
    )
    transform = transform._replace(attn_mask=torch.rand(1, 4, 5, 7) > 0.3)
    yield "packed", AttentionProblem(x, y, y + 1, transform, layout=layout)


CALLS = [*operator_calls(), *whole_problem_calls()]


@pytest.mark.parametrize(
    ("operator", "arguments"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS]
)
def test_opcheck(operator, arguments):
    """All four: schema, autograd's registration, fakes, and tracing with dynamic shapes."""
    torch.library.opcheck(operator, arguments)


def test_fakes_of_float8():
    """opcheck itself cannot compare float8 tensors."""
    q, k, v = (x.to(torch.float8_e4m3fn) for x in dense_tensors())
    transform = ScoreTransform(0.25, k_descale=torch.rand(2, 2))
    problem = AttentionProblem(q, k, v, transform)
    for out_dtype, found in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        flat = problem_ops.flatten(problem._replace(out_dtype=out_dtype))
        real = problem_ops.forward(*flat)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = problem_ops.forward(
                *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in flat)
            )
        assert real[0].dtype == found
        for have, want in zip(fake, real, strict=True):
            assert (have.shape, have.dtype, have.stride()) == (
                want.shape,
                want.dtype,
                want.stride(),
            )


@pytest.mark.parametrize("return_softmax", [False, True])
def test_fakes_agree_with_results_under_dropout(return_softmax):
    q, k, v = dense_tensors()
    arguments = (0.3, 0.25, False, -1, -1, 0.0, None, return_softmax)
    real = ops.forward(q, k, v, *arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.forward(*(mode.from_tensor(x) for x in (q, k, v)), *arguments)
    for have, want in zip(fake, real, strict=True):
        assert (have.shape, have.dtype, have.stride()) == (want.shape, want.dtype, want.stride())
    assert real[2].shape == ((2, 4, 128, 128) if return_softmax else (0,))
    assert real[3].dtype == torch.int64


def test_fakes_keep_strides_of_transposed_queries():
    q = torch.randn(2, 4, 6, 16).transpose(1, 2)
    _, k, v = dense_tensors()
    torch.library.opcheck(
        torch.ops.flash_attn._flash_attn_forward.default,
        (q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_private_operators_are_not_differentiable():
    q, k, v = dense_tensors(grad=True)
    out = interface._flash_attn_forward(q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False)[0]
    with pytest.raises(RuntimeError):
        out.sum().backward()


def test_backward_writes_into_slices_of_a_packed_buffer():
    q, k, v = dense_tensors(seqlen_k=6)
    k, v = k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)
    out, lse, _, rng = ops.forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    arguments = (0.0, 0.25, True, -1, -1, 0.0, None, False, rng)
    plain = [torch.empty_like(x) for x in (q, k, v)]
    dout = torch.randn_like(q)
    softmax_d = interface._flash_attn_backward(dout, q, k, v, out, lse, *plain, *arguments)
    assert softmax_d.shape == (2, 4, 128)
    buffer = torch.full((2, 6, 3, 4, 16), float("nan"))
    interface._flash_attn_backward(dout, q, k, v, out, lse, *buffer.unbind(2), *arguments)
    assert torch.equal(buffer, torch.stack(plain, dim=2))


# Compilation, checkpointing, autocast


def gradients(function, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def same(found, expected):
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


COMPILED = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1), "softcap": 2.0},
}


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_compiled_without_graph_breaks(options):
    torch._dynamo.reset()
    function = partial(flash_attn.flash_attn_func, **options)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = dense_tensors()
    assert same(gradients(compiled, inputs), gradients(function, inputs))


def test_compiled_with_a_mask_and_sinks():
    torch._dynamo.reset()

    def function(q, k, v, sinks, mask):
        return flash_attn.flash_attn_func(q, k, v, causal=True, s_aux=sinks, attn_mask=mask)

    def packed(q, k, v, sinks, mask):
        lengths = (bounds(3, 5), bounds(4, 7), 5, 7)
        return flash_attn.flash_attn_varlen_func(q, k, v, *lengths, s_aux=sinks, attn_mask=mask)

    x, y = packed_tensors()
    for call, inputs in (
        (function, (*dense_tensors(), torch.randn(4), torch.randn(1, 4, 6, 9))),
        (packed, (x, y, y + 1, torch.randn(4), torch.randn(2, 1, 5, 7))),
    ):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert same(gradients(compiled, inputs), gradients(call, inputs))


def test_compiled_with_dynamic_shapes_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = partial(flash_attn.flash_attn_func, causal=True)
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for seqlen_q, seqlen_k in ((6, 9), (11, 17), (5, 30)):
        inputs = dense_tensors(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        assert same(gradients(compiled, inputs), gradients(function, inputs))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] > 0


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_compiled_without_queries_or_keys(lengths):
    torch._dynamo.reset()
    function = partial(flash_attn.flash_attn_func, causal=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = dense_tensors(seqlen_q=lengths[0], seqlen_k=lengths[1])
    found = gradients(compiled, inputs)
    assert same(found, gradients(function, inputs))
    assert not any(x.any() for x in found)


def test_strides_of_empty_tensors_do_not_matter():
    """Compiled programs pass gradients of nothing as they come, expanded for one."""
    q, k, v = dense_tensors(seqlen_q=0)
    forward, backward = ops.forward, ops.backward
    out, lse, _, rng = forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    dk = torch.full_like(k, float("nan"))
    dout = torch.ones(()).expand(q.shape)
    tail = (0.0, 0.25, True, -1, -1, 0.0, None, False, rng)
    backward(dout, q, k, v, out, lse, None, dk, None, *tail)
    assert not dk.any()


def test_compiled_packed_sequences():
    torch._dynamo.reset()
    lengths = (bounds(3, 5), bounds(4, 7), 5, 7)

    def function(q, k, v):
        return flash_attn.flash_attn_varlen_func(q, k, v, *lengths, causal=True)

    q, k = packed_tensors()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert same(gradients(compiled, (q, k, k + 1)), gradients(function, (q, k, k + 1)))


def test_compiled_packed_tensors():
    torch._dynamo.reset()
    qkv = torch.randn(2, 5, 3, 2, 16)
    compiled = torch.compile(
        flash_attn.flash_attn_qkvpacked_func, fullgraph=True, backend="aot_eager"
    )
    expected = gradients(flash_attn.flash_attn_qkvpacked_func, [qkv])
    assert same(gradients(compiled, [qkv]), expected)


def test_compiled_with_lengths_that_only_the_device_knows():
    torch._dynamo.reset()

    def function(q, cu_seqlens):
        longest = cu_seqlens.diff().max().item()
        return flash_attn.flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, longest, longest)

    q = torch.randn(8, 4, 16)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for lengths in ((3, 5), (1, 7)):
            cu_seqlens = bounds(*lengths)
            assert torch.equal(compiled(q, cu_seqlens), function(q, cu_seqlens))


def decode(q, k_cache, v_cache, k, v, cache_seqlens):
    return flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True, return_softmax_lse=True
    )


def decoding_tensors():
    """q, the caches, new keys and values."""
    shapes = ((2, 1, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16), (2, 1, 2, 16), (2, 1, 2, 16))
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.skipif(
    torch.__version__.startswith("2.10."), reason="PyTorch 2.10 traces no properties of tuples"
)
@pytest.mark.parametrize("lengths", [3, torch.tensor([3, 8], dtype=torch.int32)], ids=type)
def test_compiled_decoding_writes_into_the_caches(lengths):
    torch._dynamo.reset()
    given = decoding_tensors()
    copies = [x.clone() for x in given]
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert same(compiled(*copies, lengths), decode(*given, lengths))
    assert same(copies, given)


def test_decoding_of_fake_and_meta_tensors_gives_shapes():
    given = decoding_tensors()
    meta = [x.to("meta") for x in given]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = decode(*(mode.from_tensor(x) for x in given), 3)
    for out, lse in (decode(*meta, 3), fake):
        assert (out.shape, lse.shape) == ((2, 1, 4, 16), (2, 4, 1))


def test_decoding_under_autocast_takes_the_dtype_of_the_caches():
    q, k_cache, v_cache, k, v = decoding_tensors()
    caches = [x.bfloat16() for x in (k_cache, v_cache)]
    expected = decode(q.bfloat16(), *(x.clone() for x in caches), k.bfloat16(), v.bfloat16(), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(decode(q, *caches, k, v, 3), expected)
        wide = decode(q, k_cache, v_cache, k, v, 3)
    assert wide[0].dtype == torch.float32


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_is_bitwise_equal(dropout_p, use_reentrant):
    function = partial(flash_attn.flash_attn_func, causal=True, dropout_p=dropout_p)
    inputs = dense_tensors()
    torch.manual_seed(7)
    expected = gradients(function, inputs)
    torch.manual_seed(7)
    found = gradients(partial(checkpoint, function, use_reentrant=use_reentrant), inputs)
    assert same(found, expected)


def test_autocast_casts_float32_to_its_dtype():
    q, k, v = dense_tensors(grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn.flash_attn_func(q, k, v)
        qkv = torch.randn(1, 4, 3, 2, 16)
        assert flash_attn.flash_attn_qkvpacked_func(qkv).dtype == torch.bfloat16
        mixed = flash_attn.flash_attn_func(q, k.bfloat16(), v)
    assert out.dtype == mixed.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    expected = flash_attn.flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"alibi_slopes": torch.rand(4)}], ids=["plain", "alibi"])
def test_autocast_reaches_no_sum_of_a_kernel(backend, options):
    """Within a call all is as precise as without autocast."""
    inputs = [x.bfloat16() for x in dense_tensors()]
    function = partial(flash_attn.flash_attn_func, **options)
    with flash_attn.use_backend(backend):
        expected = gradients(function, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same(gradients(function, inputs), expected)


def test_autocast_reaches_neither_probabilities_nor_merged_results():
    q, k, _ = dense_tensors()
    parts = torch.randn(3, 2, 5, 4, 16), torch.randn(3, 2, 5, 4)
    probs, merged = flash_attn.attention_probs(q, k), combine(*parts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flash_attn.attention_probs(q, k), probs)
        assert same(combine(*parts), merged)


def test_outside_of_autocast_mixed_dtypes_are_named():
    q, k, v = dense_tensors()
    with pytest.raises(ConstraintError, match="`q` and `k`.*float32 and bfloat16.*autocast"):
        flash_attn.flash_attn_func(q, k.bfloat16(), v)


def test_return_arity():
    q, k, v = dense_tensors()
    assert isinstance(flash_attn.flash_attn_func(q, k, v), torch.Tensor)
    out, lse, s_dmask = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert lse.shape == (2, 4, 6)
    assert lse.dtype == torch.float32
    assert s_dmask.shape == (0,)
    assert s_dmask.dtype == q.dtype
    x, y = packed_tensors()
    lengths = (bounds(3, 5), bounds(4, 7), 5, 7)
    _, lse, _ = flash_attn.flash_attn_varlen_func(x, y, y, *lengths, return_attn_probs=True)
    assert lse.shape == (4, 8)
    assert isinstance(flash_attn.flash_attn_with_kvcache(q, k, v), torch.Tensor)
    out, lse = flash_attn.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    assert (out.shape, lse.shape) == (q.shape, (2, 4, 6))
    raw = flash_attn_2_cuda.fwd(q, k, v, None, None, 0.0, 0.25, False, -1, -1, 0.0, False)
    assert isinstance(raw, list)
    assert len(raw) == 4
    torch.testing.assert_close(raw[0], out)
