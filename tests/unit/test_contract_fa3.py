"""What programs rely on in FlashAttention-3: names, signatures, operators, PyTorch's own hook."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flash_attn
import flash_attn_config
import flash_attn_interface as fa3
from flash_attn import hopper_interface
from flash_attn.core import problem_ops
from flash_attn.core.hopper import BackwardArguments, ForwardArguments
from flash_attn.core.problem import AttentionProblem, ScoreTransform, SequenceLayout, Visibility

ROOT = Path(__file__).parents[2]

SIGNATURES = {
    "flash_attn_func": (
        "q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
        "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False, *, s_aux=None, "
        "attn_mask=None"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
        "seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, "
        "k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False, "
        "*, s_aux=None, attn_mask=None"
    ),
    "flash_attn_qkvpacked_func": (
        "qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, "
        "num_heads_q=None, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, "
        "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
        "q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, "
        "return_softmax_lse=False, *, s_aux=None, attn_mask=None"
    ),
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "get_scheduler_metadata": (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, "
        "cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, "
        "cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, "
        "causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, "
        "pack_gqa=None, sm_margin=0"
    ),
    "_flash_attn_forward": (
        "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, "
        "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, "
        "max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, "
        "leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, "
        "k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, "
        "window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0"
    ),
    "_flash_attn_backward": (
        "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
        "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
        "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, "
        "softcap=0.0, deterministic=False, sm_margin=0"
    ),
    "maybe_contiguous": "x",
    "round_multiple": "x, m",
    "round_up_headdim": "head_size",
}
COUNTS = {
    "flash_attn_func": 17, "flash_attn_varlen_func": 23, "flash_attn_qkvpacked_func": 13,
    "flash_attn_with_kvcache": 30, "get_scheduler_metadata": 21, "_flash_attn_forward": 34,
    "_flash_attn_backward": 22,
}  # fmt: skip


def plain(function: object) -> str:
    """The signature without annotations."""
    signature = inspect.signature(function)
    parameters = [x.replace(annotation=x.empty) for x in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))[1:-1]


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_signatures(name):
    assert plain(getattr(fa3, name)) == SIGNATURES[name]
    kinds = [x.kind for x in inspect.signature(getattr(fa3, name)).parameters.values()]
    if name in COUNTS:
        assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) == COUNTS[name]


def test_the_operators_arguments_are_the_private_functions():
    for kind, function in (
        (ForwardArguments, fa3._flash_attn_forward),
        (BackwardArguments, fa3._flash_attn_backward),
    ):
        assert plain(kind) == plain(function)


def test_modules():
    import flash_attn_3
    import flash_attn_3._C
    import flash_attn_3.flash_attn_config
    import flash_attn_3.flash_attn_interface

    assert flash_attn_3.__version__ == "3.0.0"
    for name in (*SIGNATURES, "FlashAttnFunc", "FlashAttnVarlenFunc", "FlashAttnQKVPackedFunc"):
        found = getattr(fa3, name)
        assert getattr(flash_attn_3.flash_attn_interface, name) is found
        assert getattr(hopper_interface, name) is found
    assert flash_attn_3.flash_attn_config.CONFIG is flash_attn_config.CONFIG


def test_config(capsys):
    flags = flash_attn_config.CONFIG["build_flags"]
    for name in ("HDIM64", "HDIM256", "FP8", "PAGEDKV", "BACKWARD"):
        assert flags[f"FLASHATTENTION_DISABLE_{name}"] is False
    flash_attn_config.show()
    assert "FLASHATTENTION_DISABLE_FP8" in capsys.readouterr().out


def run(code: str, *options: str) -> str:
    """Standard output of ``code`` in a new interpreter."""
    paths = [ROOT / "src", ROOT / "packages" / "flash-attn-3" / "src"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths)}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_operators_are_registered_on_request():
    code = """
import sys, torch, flash_attn
names = ("_flash_attn_forward", "fwd", "bwd", "fwd_combine", "get_scheduler_metadata")
def known():
    return [hasattr(torch.ops.flash_attn_3, name) for name in names]
print(known(), "flash_attn.hopper_interface" in sys.modules)
import flash_attn.hopper_interface
print(known())
import flash_attn_3
print(known())
import MODULE
print(known(), "triton" in sys.modules)
"""
    for module in ("flash_attn_interface", "flash_attn_3._C"):
        assert run(code.replace("MODULE", module)).splitlines() == [
            "[False, False, False, False, False] False",
            "[True, False, False, False, False]",
            "[True, False, False, False, False]",
            "[True, True, True, True, True] False",
        ]


def test_an_operator_of_another_library_stays():
    code = """
import warnings, torch
other = torch.library.Library("flash_attn_3", "FRAGMENT")
other.define("fwd(Tensor q) -> Tensor")
other.impl("fwd", lambda q: q + 1, "CompositeExplicitAutograd")
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    import flash_attn_interface
print([str(x.message)[:48] for x in found if issubclass(x.category, RuntimeWarning)])
print(torch.ops.flash_attn_3.fwd(torch.zeros(1)).item())
print(tuple(flash_attn_interface.flash_attn_func(*torch.randn(3, 1, 4, 2, 8)).shape))
"""
    assert run(code).splitlines() == [
        "['torch.ops.flash_attn_3.fwd is registered by anot']",
        "1.0",
        "(1, 4, 2, 8)",
    ]


RAW_SCHEMAS = [
    "flash_attn_3::fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, "
    "Tensor(v_new!)? v_new=None, Tensor? q_v=None, Tensor(out!)? out=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, "
    "int? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, "
    "Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, "
    "int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0., "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)",
    "flash_attn_3::bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, float softcap=0., bool deterministic=False, int sm_margin=0) "
    "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)",
    "flash_attn_3::fwd_combine(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, "
    "ScalarType? out_dtype=None) -> (Tensor(out!), Tensor)",
    "flash_attn_3::get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, "
    "int num_heads, int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, "
    "Tensor seqused_k, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? leftpad_k=None, "
    "int? page_size=None, int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, bool has_softcap=False, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> Tensor",
]
PRIVATE_SCHEMAS = [
    "flash_attn_3::_flash_attn_forward(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, "
    "Tensor? v_new=None, Tensor? qv=None, Tensor? out_=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool causal=False, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, SymInt attention_chunk=0, float softcap=0., "
    "bool rotary_interleaved=True, Tensor? scheduler_metadata=None, SymInt num_splits=1, "
    "bool? pack_gqa=None, SymInt sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)",
    "flash_attn_3::_flash_attn_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? sequed_q=None, Tensor? sequed_k=None, SymInt? max_seqlen_q=None, "
    "SymInt? max_seqlen_k=None, Tensor(a12!)? dq=None, Tensor(a13!)? dk=None, "
    "Tensor(a14!)? dv=None, float? softmax_scale=None, bool is_causal=False, "
    "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0., "
    "bool deterministic=False, SymInt sm_margin=0) -> Tensor",
]


@pytest.mark.parametrize("schema", [*RAW_SCHEMAS, *PRIVATE_SCHEMAS])
def test_schemas(schema):
    parsed = torch._C.parse_schema(schema)
    name = parsed.name.partition("::")[2]
    found = getattr(torch.ops.flash_attn_3, name).default._schema
    assert str(found) == str(parsed)
    assert found.is_backward_compatible_with(parsed)


def test_the_extension_may_return_fewer_gradients_to_those_who_ask():
    """xFormers also looks for the schema that later builds declare."""
    arguments = RAW_SCHEMAS[1].partition(" -> ")[0]
    found = torch.ops.flash_attn_3.bwd.default._schema
    assert len(found.returns) == 8
    assert str(found).startswith(arguments)


# Values ------------------------------------------------------------------------------------------


def q_k_v(dtype=torch.float32, grad=False):
    q, k, v = torch.randn(2, 6, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    return [x.to(dtype).requires_grad_(grad) for x in (q, k, v)]


def bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed_q_k_v():
    q, k = torch.randn(8, 4, 16), torch.randn(11, 2, 16)
    return q, k, k + 1


def cache(**more):
    """Keyword arguments of the private forward function over a cache of 12 rows."""
    k_cache, v_cache = torch.randn(2, 2, 12, 2, 16)
    k, v = torch.randn(2, 2, 3, 2, 16)
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    return {
        "q": torch.randn(2, 3, 4, 16), "k": k_cache, "v": v_cache, "k_new": k, "v_new": v,
        "seqused_k": lengths,
    } | more  # fmt: skip


def test_raw_forward_by_position():
    """As PyTorch and xFormers call it: 34 arguments by position."""
    q, k, v = q_k_v()
    want, want_lse = fa3.flash_attn_func(
        q, k, v, 0.3, True, window_size=(4, 2), softcap=2.0, return_attn_probs=True
    )
    out = torch.empty(2, 4, 6, 16).transpose(1, 2)
    results = torch.ops.flash_attn_3.fwd(
        q, k, v, None, None, None, out, None, None, None, None, None, 6, 9, None, None, None, None,
        None, None, None, None, None, 0.3, True, 4, 2, 0, 2.0, True, None, 1, None, 0,
    )  # fmt: skip
    assert len(results) == 4
    assert results[0].data_ptr() == out.data_ptr()
    assert torch.equal(out, want)
    assert torch.equal(results[1], want_lse)
    assert results[2].numel() == results[3].numel() == 0


@pytest.mark.parametrize("given", [True, False])
def test_raw_backward(given):
    q, k, v = q_k_v()
    out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, is_causal=True)
    dout = torch.randn_like(out)
    grads = [torch.empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v)]
    results = torch.ops.flash_attn_3.bwd(
        dout, q, k, v, out, lse, *(grads if given else (None, None, None)), None, None, None, None,
        6, 9, None, True, -1, -1, 0.0, False, 0,
    )  # fmt: skip
    assert len(results) == 8
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(fa3.flash_attn_func(*leaves, causal=True), leaves, dout)
    for x, true, buffer in zip(results[:3], want, grads, strict=True):
        torch.testing.assert_close(x, true)
        assert (x.data_ptr() == buffer.data_ptr()) is given
    assert results[3].shape == (2, 4, 128)
    assert [x.numel() for x in results[4:]] == [0, 0, 0, 0]


def test_raw_defaults_are_the_extensions():
    """Rotation of halves by default, unlike the private function."""
    call = cache()
    cos, sin = torch.rand(12, 8).cos(), torch.rand(12, 8).sin()
    for interleaved in (False, True):
        mine = {**call, "k": call["k"].clone(), "v": call["v"].clone()}
        raw = {**call, "k": call["k"].clone(), "v": call["v"].clone()}
        more = {"rotary_interleaved": interleaved}
        want = fa3._flash_attn_forward(**mine, rotary_cos=cos, rotary_sin=sin, **more)
        given = {"is_rotary_interleaved": True} if interleaved else {}
        got = torch.ops.flash_attn_3.fwd(**raw, rotary_cos=cos, rotary_sin=sin, **given)
        assert torch.equal(got[0], want[0])
        assert torch.equal(raw["k"], mine["k"])
        assert not torch.equal(raw["k"], call["k"])


def test_raw_combine_and_metadata():
    outs, lses = torch.randn(3, 2, 5, 4, 16), torch.randn(3, 2, 5, 4)
    want = fa3.flash_attn_combine(outs, lses)
    buffer = torch.empty(2, 5, 4, 16)
    got = torch.ops.flash_attn_3.fwd_combine(outs, lses, buffer, None)
    assert got[0].data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, want[0])
    assert torch.equal(got[1], want[1])
    half, _ = torch.ops.flash_attn_3.fwd_combine(outs, lses, out_dtype=torch.float16)
    assert half.dtype == torch.float16
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    metadata = torch.ops.flash_attn_3.get_scheduler_metadata(
        2, 3, 12, 4, 2, 64, 64, torch.bfloat16, lengths, None, None, None, None, None, 16, 0, True,
        -1, -1, 0, False, 0, None, 0,
    )  # fmt: skip
    assert metadata.dtype == torch.int32
    assert torch.equal(metadata, fa3.get_scheduler_metadata(2, 3, 12, 4, 2, 64, lengths))


METADATA = {"batch_size": 2, "max_seqlen_q": 3, "max_seqlen_k": 12, "num_heads_q": 4,
            "num_heads_kv": 2, "headdim": 64, "cache_seqlens": torch.zeros(2).int()}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cache_seqlens": torch.zeros(2)}, "`cache_seqlens` must have dtype int32"),
        ({"cache_seqlens": torch.zeros(3).int()}, "`cache_seqlens` must have shape \\(2,\\)"),
        ({"cache_seqlens": 4}, "`cache_seqlens` must be a torch.Tensor"),
        ({"cu_seqlens_q": torch.zeros(2).int()}, "`cu_seqlens_q` must have shape \\(3,\\)"),
        ({"cu_seqlens_k_new": torch.zeros(3)}, "`cu_seqlens_k_new` must have dtype int32"),
        ({"cache_leftpad": torch.zeros(2).long()}, "`cache_leftpad` must have dtype int32"),
        ({"num_splits": 257}, "`num_splits` must be 0 to 256, found 257"),
        ({"headdim": 257}, "`headdim` must be 1 to 256"),
        ({"headdim_v": 513}, "`headdim_v` must be 1 to 512"),
        ({"num_heads_kv": 3}, "Number of heads in key/value.*`num_heads_q` is 4"),
        ({"page_size": 0}, "`page_size` must be at least 1"),
        ({"batch_size": "2"}, "`batch_size` must be an integer"),
        ({"qkv_dtype": torch.int8}, "`qkv_dtype` is torch.int8"),
        ({"window_size": 3}, "`window_size`"),
        ({"sm_margin": -1}, "`sm_margin` must be at least 0"),
    ],
)
def test_wrong_metadata(changes, text):
    with pytest.raises(RuntimeError, match=text):
        fa3.get_scheduler_metadata(**(METADATA | changes))


# PyTorch's own use -------------------------------------------------------------------------------


def test_pytorch_calls_our_operators():
    """What ``activate_flash_attention_impl("FA3")`` runs on GPUs, on CPU tensors."""
    hook = pytest.importorskip("torch.nn.attention._fa3")
    hook._fa3_import_module("flash_attn_interface")
    q, k, v = q_k_v()
    want, want_lse = fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    out, lse = hook._fa3_run_forward(
        q, k, v, None, None, 6, 9, None, True, None, None, None, torch.empty_like(q)
    )
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    dout = torch.randn_like(q)
    grads = hook._fa3_run_backward(
        dout, q, k, v, out, lse, None, None, 6, 9, None, True, -1, -1, True
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    true = torch.autograd.grad(fa3.flash_attn_func(*leaves, causal=True), leaves, dout)
    for x, y in zip(grads, true, strict=True):
        torch.testing.assert_close(x, y)


def test_pytorch_calls_our_operators_on_packed_sequences():
    hook = pytest.importorskip("torch.nn.attention._fa3")
    hook._fa3_import_module("flash_attn_interface")
    q, k, v = packed_q_k_v()
    lengths = (bounds(3, 5), bounds(4, 7))
    out, lse = hook._fa3_run_forward(q, k, v, *lengths, 5, 7, 0.3, False, 2, 1, None)
    want = fa3.flash_attn_varlen_func(
        q, k, v, *lengths, 5, 7, softmax_scale=0.3, window_size=(2, 1), return_attn_probs=True
    )
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    if "block_table" not in inspect.signature(hook._fa3_run_forward).parameters:
        pytest.skip(f"PyTorch {torch.__version__} passes no pages")
    pages, table = torch.randn(2, 6, 4, 2, 16), torch.tensor([[0, 2], [5, 1]], dtype=torch.int32)
    used = torch.tensor([8, 5], dtype=torch.int32)
    out, _ = hook._fa3_run_forward(
        q, *pages, lengths[0], None, 5, 8, None, True, -1, -1, used, block_table=table, num_splits=2
    )
    want = fa3.flash_attn_with_kvcache(
        q, *pages, cache_seqlens=used, page_table=table, cu_seqlens_q=lengths[0], max_seqlen_q=5,
        causal=True,
    )  # fmt: skip
    torch.testing.assert_close(out, want)


def test_activation():
    """PyTorch finds the module, and registers its own kernels around it; without a GPU, too."""
    code = """
import torch
from torch.nn import attention
attention.activate_flash_attention_impl("FA3")
print(attention.current_flash_attention_impl())
q = torch.randn(1, 2, 8, 16)
print(tuple(torch.nn.functional.scaled_dot_product_attention(q, q, q).shape))
attention.restore_flash_attention_impl()
"""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        pytest.skip("this PyTorch cannot be told which implementation to use")
    if "FA3" not in torch.nn.attention.list_flash_attention_impls():
        pytest.skip(f"PyTorch {torch.__version__} knows no FlashAttention-3")
    assert run(code).splitlines() == ["FA3", "(1, 2, 8, 16)"]


# Operators under tracing -------------------------------------------------------------------------


def flat_problem(q, k, v, layout=None, **changes):
    transform = ScoreTransform(0.25, softcap=2.0)
    problem = AttentionProblem(q, k, v, transform, Visibility(None, 0), layout or SequenceLayout())
    return problem_ops.flatten(problem._replace(**changes))


def operator_calls():
    q, k, v = q_k_v(grad=True)
    forward = torch.ops.flash_attn_3._flash_attn_forward.default
    backward = torch.ops.flash_attn_3._flash_attn_backward.default
    yield "forward", forward, (q, k, v), {}
    yield "forward with options", forward, (q, k, v), {"causal": True, "sm_margin": 1}
    x, y, z = (t.requires_grad_() for t in packed_q_k_v())
    lengths = {"cu_seqlens_q": bounds(3, 5), "cu_seqlens_k": bounds(4, 7)}
    longest = {"max_seqlen_q": 5, "max_seqlen_k": 7}
    yield "forward of packed sequences", forward, (x, y, z), lengths | longest
    plain = [t.detach() for t in (q, k, v)]
    out, lse, *_ = forward(*plain, causal=True)
    inputs = (torch.ones_like(out), *plain, out, lse)
    yield "backward", backward, inputs, {"is_causal": True}
    buffers = {name: torch.empty_like(t) for name, t in zip(("dq", "dk", "dv"), plain, strict=True)}
    yield "backward into buffers", backward, inputs, {"is_causal": True} | buffers
    yield "traced forward", problem_ops.traced_forward.default, flat_problem(q, k, v), {}
    update = (*torch.randn(2, 2, 2, 2, 16), None, None, True, None, None)
    layout = SequenceLayout(seqused_k=torch.tensor([2, 7], dtype=torch.int32))
    append = problem_ops.with_kvcache.default
    yield "append", append, (*update, *flat_problem(*plain, layout)), {}
    combine = torch.ops.flash_attn._attention_combine.default
    parts = (torch.randn(3, 2, 5, 4, 16), torch.randn(3, 2, 5, 4))
    yield "combine", combine, (*parts, torch.empty(2, 5, 4, 16)), {}


CALLS = list(operator_calls())


@pytest.mark.parametrize(
    ("operator", "arguments", "named"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS]
)
def test_opcheck(operator, arguments, named):
    torch.library.opcheck(operator, arguments, named)


def test_fakes_of_the_raw_operators():
    """Shapes, dtypes and strides; opcheck refuses operators that return their arguments."""
    q, k, v = q_k_v()
    out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v)
    transposed = torch.empty(2, 4, 6, 16).transpose(1, 2)
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    calls = [
        ("fwd", (q, k, v), {}),
        ("fwd", (q, k, v), {"out": transposed}),
        ("fwd", (q.to(torch.float8_e4m3fn), *(x.to(torch.float8_e4m3fn) for x in (k, v))), {}),
        ("bwd", (out, q, k, v, out, lse), {}),
        ("bwd", (out, q, k, v, out, lse), {"dq": transposed}),
        ("fwd_combine", (torch.randn(3, 2, 5, 4, 16), torch.randn(3, 2, 5, 4)), {}),
        ("get_scheduler_metadata", (2, 3, 12, 4, 2, 64, 64, torch.float16, lengths), {}),
    ]
    for name, arguments, named in calls:
        operator = getattr(torch.ops.flash_attn_3, name)
        real = operator(*arguments, **named)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
            more = {key: mode.from_tensor(x) for key, x in named.items()}
            fake = operator(*fakes, **more)
        if isinstance(real, Tensor):
            real, fake = (real,), (fake,)
        for x, y in zip(fake, real, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()), name


def test_tracing_refuses_what_schemas_do_not_say():
    q, k, v = q_k_v()
    mode = torch._subclasses.FakeTensorMode()
    fakes = [mode.from_tensor(x) for x in (q, k, v)]
    with mode, pytest.raises(TypeError, match="pre-allocated output tensor.*`out_` is given"):
        torch.ops.flash_attn_3._flash_attn_forward(*fakes, out_=fakes[0])
    call = {name: mode.from_tensor(x) for name, x in cache().items()}
    with mode, pytest.raises(TypeError, match="`k_new` is given"):
        torch.ops.flash_attn_3._flash_attn_forward(**call)


def test_the_forward_operator_appends_in_eager_mode():
    call = cache()
    again = {name: x.clone() for name, x in call.items()}
    out = torch.ops.flash_attn_3._flash_attn_forward(**call, causal=True)[0]
    want = fa3._flash_attn_forward(**again, causal=True)[0]
    assert torch.equal(out, want)
    assert torch.equal(call["k"], again["k"])


def attend(q, k, v):
    return fa3.flash_attn_func(q, k, v, causal=True, softcap=2.0)


def attend_with_everything(q, k, v):
    bias = torch.linspace(-1.0, 1.0, 54).view(1, 1, 6, 9)
    sinks = torch.linspace(-1.0, 1.0, 4)
    out, lse = fa3.flash_attn_func(
        q, k, v, 0.3, True, window_size=(4, 0), attention_chunk=5, num_splits=2, pack_gqa=True,
        return_attn_probs=True, s_aux=sinks, attn_mask=bias,
    )  # fmt: skip
    return out * lse.transpose(1, 2)[..., None]


def attend_packed(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    used = torch.tensor([5, 3], dtype=torch.int32)
    return fa3.flash_attn_varlen_func(
        q, k, v, bounds(6, 6), bounds(9, 9), 6, 9, seqused_k=used, causal=True
    )


def attend_privately(q, k, v):
    return fa3._flash_attn_forward(q, k, v, causal=True, softcap=2.0)[0]


FUNCTIONS = [attend, attend_with_everything, attend_packed, attend_privately]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_is_eager(backend, function):
    """One graph, forward and backward, bit by bit."""
    torch._dynamo.reset()
    inputs = q_k_v(grad=True)
    out = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    want = function(*inputs)
    assert torch.equal(out, want)
    grads, true = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, want))
    assert all(torch.equal(x, y) for x, y in zip(grads, true, strict=True))


def test_compiled_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in (5, 17, 33):
            inputs = [torch.randn(2, seqlen, 2, 16, requires_grad=True) for _ in "qkv"]
            out, want = compiled(*inputs), attend(*inputs)
            assert torch.equal(out, want)
            grads, true = (torch.autograd.grad(x.sum(), inputs) for x in (out, want))
            assert all(torch.equal(x, y) for x, y in zip(grads, true, strict=True))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_exported_is_eager(function, strict):
    """An exported graph computes and differentiates like the function."""

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return function(q, k, v)

    inputs = tuple(q_k_v(grad=True))
    module = torch.export.export(Module(), inputs, strict=strict).module()
    out, want = module(*inputs), function(*inputs)
    assert torch.equal(out, want)
    grads, true = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, want))
    assert all(torch.equal(x, y) for x, y in zip(grads, true, strict=True))


@pytest.mark.skipif(
    torch.__version__.startswith("2.10."), reason="PyTorch 2.10 traces no properties of tuples"
)
def test_compiled_appends_to_the_cache():
    """The operator over caches says what it writes."""

    def step(q, k_cache, v_cache, k, v, lengths):
        out = fa3.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, page_table=None
        )
        return out, k_cache.sum()

    torch._dynamo.reset()
    names = ("q", "k", "v", "k_new", "v_new", "seqused_k")
    call = cache()
    mine, theirs = ([call[name].clone() for name in names] for _ in range(2))
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*mine)
    want = step(*theirs)
    assert all(torch.equal(x, y) for x, y in zip((*got, *mine), (*want, *theirs), strict=True))
    assert not torch.equal(mine[1], call["k"])


def test_the_choice_of_a_backend_reaches_the_operators():
    q, k, v = q_k_v()
    with flash_attn.use_backend("cuda"), pytest.raises(NotImplementedError, match="GPU"):
        torch.ops.flash_attn_3.fwd(q, k, v)
