"""Which backend computes a call, and what is said where none can."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

import flash_attn
from flash_attn import flash_attn_func, set_backend, settings, use_backend
from flash_attn.backends import cuda
from flash_attn.core import ops, registry
from flash_attn.core.problem import AttentionProblem, SequenceLayout, Visibility, make_transform
from flash_attn.errors import (
    BackendUnavailableError,
    ConstraintError,
    FlashAttentionError,
    UnsupportedProblemError,
)


class Recorder:
    """A backend that notes its calls and lets the CPU backend compute."""

    def __init__(self, name, reasons=()):
        self.name, self.reasons, self.calls = name, list(reasons), []

    def unsupported(self, problem, backward):
        return self.reasons

    def forward(self, problem, out=None):
        self.calls.append("forward")
        return registry.load("cpu").forward(problem, out)

    def backward(self, problem, inputs):
        self.calls.append("backward")
        return registry.load("cpu").backward(problem, inputs)


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    """No choice made outside of the test, and none left behind."""
    monkeypatch.setattr(registry, "_process_choice", registry.AUTO)
    monkeypatch.setattr(registry, "_context_choice", [])
    monkeypatch.setattr(registry, "_warned_fallback", False)
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    monkeypatch.setattr(registry, "_failures", {})
    monkeypatch.delenv("FLASH_ATTENTION_USE_FLAGGEMS", raising=False)


@pytest.fixture
def record(monkeypatch):
    """Replace a named backend by a recorder."""

    def replace(name, reasons=()):
        recorder = Recorder(name, reasons)
        monkeypatch.setitem(registry._loaded, name, recorder)
        return recorder

    return replace


def tensors(dtype=torch.float32, **options):
    return [torch.randn(1, 5, 2, 16, dtype=dtype, **options) for _ in range(3)]


def dense(dtype=torch.float16, seqlen_q=4, seqlen_k=6, headdim=16, **options):
    q = torch.zeros(2, seqlen_q, 4, headdim, dtype=dtype)
    k = torch.zeros(2, seqlen_k, 2, headdim, dtype=dtype)
    scores = {key: options.pop(key) for key in ("softcap", "alibi_slopes") if key in options}
    return AttentionProblem(q, k, k, make_transform(headdim, **scores), **options)


def test_the_default_takes_our_own_kernels_by_device(record):
    triton, cpu = record("triton", ["not here"]), Recorder("cpu")
    flash_attn_func(*tensors())
    assert registry.select(dense()).name == "cpu"
    assert triton.calls == cpu.calls == []
    usable = record("triton")
    assert registry.select(dense()) is usable


def test_the_default_never_considers_other_libraries(record):
    others = [record(name) for name in ("sm90", "cuda", "flag_gems", "reference")]
    flash_attn_func(*tensors())
    assert all(other.calls == [] for other in others)


def test_precedence_of_block_over_process_over_environment(record, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "FALSE")
    record("cuda")
    assert registry.select(dense()).name == "cuda"
    set_backend("reference")
    assert registry.select(dense()).name == "reference"
    with use_backend("cpu"):
        assert registry.select(dense()).name == "cpu"
        with use_backend("auto"):
            assert registry.select(dense()).name == "cuda"
        assert registry.select(dense()).name == "cpu"
    assert registry.select(dense()).name == "reference"
    set_backend("auto")
    assert registry.select(dense()).name == "cuda"


def test_a_block_ends_after_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        1 / 0  # noqa: B018
    assert registry._context_choice == []


def test_the_choice_holds_for_the_backward_pass_and_in_other_threads(record):
    chosen = record("reference")
    q, k, v = tensors(requires_grad=True)
    with use_backend("reference"):
        out = flash_attn_func(q, k, v)
        worker = threading.Thread(target=lambda: out.sum().backward())
        worker.start()
        worker.join()
    assert chosen.calls == ["forward", "backward"]
    assert q.grad is not None


@pytest.mark.parametrize("name", ["", "TRITON", "flaggems", "cudnn", None, 3])
def test_unknown_names_are_refused(name):
    with pytest.raises(ConstraintError, match="must be one of auto, triton, sm90, cuda"):
        set_backend(name)
    with pytest.raises(RuntimeError), use_backend(name):
        pass
    assert registry._process_choice == registry.AUTO


def test_every_name_is_accepted_except_missing_libraries():
    for name in ("auto", *registry.backend_names()):
        if name != "flag_gems":
            set_backend(name)
    assert registry.backend_names() == [
        "triton",
        "sm90",
        "cuda",
        "flag_gems",
        "cpu",
        "reference",
    ]


def test_a_named_backend_is_used_or_says_why_not(record):
    record("triton", ["first reason", "second reason"])
    with use_backend("triton"), pytest.raises(UnsupportedProblemError) as caught:
        flash_attn_func(*tensors(torch.float16))
    text = str(caught.value)
    assert "q (1, 5, 2, 16)" in text
    assert "float16 on cpu" in text
    assert "triton: first reason" in text
    assert "triton: second reason" in text
    assert "set_backend" in text
    assert isinstance(caught.value, RuntimeError | NotImplementedError)


def test_with_no_backend_left_all_reasons_are_listed(record):
    record("triton", ["no GPU"])
    record("cpu", ["no time"])
    with pytest.raises(UnsupportedProblemError, match=r"(?s)triton: no GPU.*cpu: no time"):
        flash_attn_func(*tensors())


def test_the_backward_pass_asks_again(record):
    class ForwardOnly(Recorder):
        def unsupported(self, problem, backward):
            return ["has no backward pass"] if backward else []

    registry._loaded["triton"] = ForwardOnly("triton")
    q, k, v = tensors(requires_grad=True)
    flash_attn_func(q, k, v).sum().backward()
    assert registry._loaded["triton"].calls == ["forward"]
    with use_backend("triton"):
        out = flash_attn_func(q, k, v)
        with pytest.raises(UnsupportedProblemError, match="backward pass of this problem"):
            out.sum().backward()


def test_the_hopper_kernels_refuse_other_devices_by_a_reason():
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    for backward, what in ((False, "forward"), (True, "backward")):
        match = rf"(?s){what} pass of.*sm90: needs tensors on a GPU.*set_backend"
        with use_backend("sm90"), pytest.raises(UnsupportedProblemError, match=match):
            registry.select(dense(), backward=backward)
    assert registry.select(dense(), backward=True).name == "cpu"


def test_a_backward_pass_outside_of_the_choice_takes_its_results(record):
    class ForwardOnly(Recorder):
        def unsupported(self, problem, backward):
            return ["computes no gradients"] if backward else []

    hopper = ForwardOnly("sm90")
    registry._loaded["sm90"] = hopper
    q, k, v = tensors(requires_grad=True)
    with use_backend("sm90"):
        out = flash_attn_func(q, k, v)
    out.sum().backward()
    assert hopper.calls == ["forward"]
    assert q.grad is not None


def test_a_broken_library_is_a_reason_not_a_crash(monkeypatch):
    monkeypatch.setitem(registry._LOCATIONS, "triton", "flash_attn.backends.not_there")
    registry._loaded.pop("triton", None)
    flash_attn_func(*tensors())
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match="ModuleNotFoundError"):
        flash_attn_func(*tensors())


# FLASH_ATTENTION_USE_FLAGGEMS


@pytest.mark.parametrize("text", ["TRUE", "true", "1", "yes", "on", ""])
def test_the_variable_true_is_the_default(text, record, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", text)
    original = record("cuda")
    flash_attn_func(*tensors())
    assert original.calls == []


@pytest.mark.parametrize("text", ["FALSE", "false", "0", "no", "off"])
def test_the_variable_false_asks_for_the_original_kernels(text, record, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", text)
    original = record("cuda")
    flash_attn_func(*tensors())
    assert original.calls == ["forward"]


def test_the_variable_is_read_on_every_call(record, monkeypatch):
    original = record("cuda")
    flash_attn_func(*tensors())
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "FALSE")
    flash_attn_func(*tensors())
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "TRUE")
    flash_attn_func(*tensors())
    assert original.calls == ["forward"]


def test_the_fallback_warns_once(monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "FALSE")
    with pytest.warns(RuntimeWarning, match="needs GPU tensors, `q` is on cpu"):
        out = flash_attn_func(*tensors())
    assert torch.isfinite(out).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attn_func(*tensors())


def test_the_variable_with_another_value_is_an_error(monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "maybe")
    with pytest.raises(ConstraintError, match="FLASH_ATTENTION_USE_FLAGGEMS.*'maybe'"):
        flash_attn_func(*tensors())
    assert settings._last_text != "maybe"


# What PyTorch's CUDA kernels cannot serve


def reasons(problem, backward=False):
    return "\n".join(cuda.BACKEND.unsupported(problem, backward))


def test_cuda_refuses_what_the_operators_do_not_define():
    index = torch.zeros(2, dtype=torch.int32)
    paged = dense(layout=SequenceLayout(page_table=index[:, None]))
    slopes = torch.ones(4)
    for text, problem, backward in (
        ("needs GPU tensors, `q` is on cpu", dense(), False),
        ("dtype float32", dense(torch.float32), False),
        ("dtype float64", dense(torch.float64), False),
        ("`softcap`", dense(softcap=5.0), False),
        ("random bits", dense(dropout_p=0.1), False),
        ("S_dmask", dense(dropout_p=0.1, return_softmax=True), False),
        ("does not support `alibi_slopes`", dense(alibi_slopes=slopes), False),
        ("`block_table`", paged, False),
        ("`cache_seqlens`", dense(layout=SequenceLayout(seqused_k=index)), False),
        ("`cache_batch_idx`", dense(layout=SequenceLayout(cache_batch_idx=index)), False),
        ("`cache_leftpad`", dense(layout=SequenceLayout(leftpad_k=index)), False),
        ("`num_splits`", dense(num_splits=2), False),
        ("head dim at most 256, found 264", dense(headdim=264), False),
        ("at least one sequence", dense(seqlen_q=0), False),
        ("at least one sequence", dense(seqlen_k=0), False),
    ):
        assert text in reasons(problem, backward), text


def test_cuda_has_nothing_against_a_plain_problem_but_the_device():
    for backward in (False, True):
        plain = dense(visibility=Visibility(window_left=2, window_right=1))
        assert reasons(plain, backward) == "needs GPU tensors, `q` is on cpu"


@pytest.mark.parametrize(
    ("left", "right", "refused"),
    [
        (None, None, False),
        (None, 0, False),  # causal
        (None, 2, False),
        (3, 0, False),
        (3, 2, False),
        (3, None, True),
        (None, 9, True),
        (3, 9, True),
        (9, None, False),  # the left limit hides nothing
    ],
)
def test_cuda_refuses_windows_that_more_queries_than_keys_misplace(left, right, refused):
    problem = dense(seqlen_q=8, seqlen_k=4, visibility=Visibility(left, right))
    assert ("misplaces" in reasons(problem)) == refused
    fewer_queries = dense(seqlen_q=4, seqlen_k=4, visibility=Visibility(left, right))
    assert "misplaces" not in reasons(fewer_queries)


def test_cuda_refuses_old_gpus(monkeypatch):
    monkeypatch.setattr(cuda, "_capability", lambda index: (7, 5))
    q = torch.zeros(1, 1, 1, 8, dtype=torch.float16, device="meta")
    problem = ops.dense_problem(q, q, q, 0.0, None, False, -1, -1, 0.0, None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    assert "compute capability 8.0 or later, found 7.5" in reasons(problem)


def test_cuda_operators_accept_what_the_adapter_passes():
    """Shapes only: the operators' own shape functions check the arguments."""
    q = torch.empty(2, 5, 4, 20, dtype=torch.float16, device="meta")
    k = torch.empty(2, 7, 2, 20, dtype=torch.float16, device="meta")
    slopes = torch.empty(4, device="meta")
    problem = ops.dense_problem(q, k, k, 0.0, None, True, -1, -1, 0.0, slopes)
    result = cuda.BACKEND.forward(problem)
    assert result.out.shape == q.shape
    assert result.softmax_lse.shape == (2, 4, 5)
    packed, cu_seqlens = q.flatten(0, 1), torch.empty(3, dtype=torch.int32, device="meta")
    problem = ops.varlen_problem(
        packed, k.flatten(0, 1), k.flatten(0, 1), cu_seqlens, cu_seqlens, 5, 7, 0.0, None, True
    )
    out = torch.empty_like(packed)
    result = cuda.BACKEND.forward(problem, out)
    assert result.out is out
    assert result.softmax_lse.shape == (4, 10)


def test_all_errors_are_of_one_family():
    for error in (ConstraintError, BackendUnavailableError, UnsupportedProblemError):
        assert issubclass(error, FlashAttentionError)
        assert issubclass(error, RuntimeError)
    assert flash_attn.errors.FlashAttentionError is FlashAttentionError
