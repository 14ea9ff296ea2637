"""Repeated calls of the Hopper kernels launch what the ordinary way launches.

Their launches are made on CPU tensors and noted instead of run, see stub_driver.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton exists on Linux only")

from stub_driver import STREAM, StubDriver, TensorMap, stub_driver
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attn import flash_attn_func, flash_attn_varlen_func, use_backend
from flash_attn.backends import _launcher, sm90, triton
from flash_attn.backends.sm90 import launch, launch_backward, refusal
from flash_attn.core import autograd, ops, plan, registry, repeated
from flash_attn.core.plan import TilePlan
from flash_attn.core.problem import AttentionProblem
from flash_attn.errors import ToolchainError, UnsupportedProblemError

pytestmark = [
    pytest.mark.skipif(knobs.runtime.interpret, reason="nothing is compiled in the interpreter"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
]

Call = tuple[Callable[..., object], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def gpu(monkeypatch) -> StubDriver:
    """CPU tensors are taken for a Hopper GPU's; launches are noted."""
    monkeypatch.setattr(registry, "_process_choice", registry.AUTO)
    monkeypatch.setattr(registry, "_context_choice", [])
    monkeypatch.setattr(registry, "_given_up", {})
    monkeypatch.delenv("FLASH_ATTENTION_USE_FLAGGEMS", raising=False)
    monkeypatch.setattr(registry, "own_families", lambda device: ("sm90", "triton"))
    monkeypatch.setattr(sm90, "_place_reasons", lambda q: [])
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "multiprocessors_of", lambda index: 132)
    monkeypatch.setattr(triton.BACKEND, "unsupported", lambda problem, backward: [])
    monkeypatch.setattr(_launcher, "_counters", {})
    _forget()
    with stub_driver() as made:
        yield made
    _forget()


def _forget() -> None:
    repeated.clear()
    autograd._known.clear()


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def qkv(seqlen: int = 200, nheads_k: int = 4, d: int = 64) -> dict[str, Tensor]:
    return {
        "q": half(2, seqlen, 4, d),
        "k": half(2, seqlen, nheads_k, d),
        "v": half(2, seqlen, nheads_k, d),
    }


def dense(nheads_k: int = 4, **options: object) -> Callable[[], Call]:
    def make() -> Call:
        return (lambda q, k, v: flash_attn_func(q, k, v, **options)), qkv(nheads_k=nheads_k)

    return make


def transposed() -> Call:
    tensors = {name: half(2, 4, 200, 64).transpose(1, 2) for name in "qkv"}
    return flash_attn_func, tensors


def sinks() -> Call:
    def call(q, k, v, sinks):
        return flash_attn_func(q, k, v, s_aux=sinks)

    return call, qkv() | {"sinks": torch.zeros(4)}


def varlen() -> Call:
    tensors = {name: half(300, 4, 64) for name in "qkv"}
    tensors |= {"cu_q": ints(0, 100, 300), "cu_k": ints(0, 70, 300)}

    def call(q, k, v, cu_q, cu_k):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 200, 230, causal=True)

    return call, tensors


def backward(nheads_k: int = 4, **options: object) -> Callable[[], Call]:
    def make() -> Call:
        def call(q, k, v, dout):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(flash_attn_func(*leaves, **options), leaves, dout)

        return call, qkv(nheads_k=nheads_k) | {"dout": half(2, 200, 4, 64)}

    return make


CALLS: dict[str, Callable[[], Call]] = {
    "plain": dense(),
    "causal": dense(causal=True),
    "grouped": dense(nheads_k=2, causal=True),
    "transposed": transposed,
    "with lse": dense(return_attn_probs=True),
    "varlen": varlen,
    "backward": backward(),
    "causal backward": backward(causal=True),
    "backward of divided groups": backward(nheads_k=1, causal=True),
}


def noted(driver: StubDriver, tensors: dict[str, Tensor]) -> list[object]:
    """The launches since the last look, with known addresses by name and new ones by the order in
    which they occur."""
    known = {x.data_ptr(): name for name, x in tensors.items()}
    known |= {x.data_ptr(): "counter" for x in _launcher._counters.values()}

    def named(value: object) -> object:
        if isinstance(value, TensorMap):
            return value._replace(address=named(value.address))
        if type(value) is int and value > 2**40:
            return known.setdefault(value, f"new {len(known)}")
        return value

    found = [
        (driver.names[x.function], x.function, x.grid, x.stream, x.flags, x.metadata,
         [named(value) for value in x.arguments])
        for x in driver.launches
    ]  # fmt: skip
    driver.launches.clear()
    return found


def is_direct(driver: StubDriver) -> bool:
    """Whether the latest launch went past Triton's usual path."""
    return driver.launches[-1].hooks == (None, None, None)


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
    third = noted(gpu, others)
    assert all("sm90" in launched[0] for launched in third)
    _forget()
    call(**others)
    assert not is_direct(gpu)
    assert third == noted(gpu, others)


def test_packed_passes_with_gradients(gpu):
    """The forward pass is repeated, the backward pass has numbers of its own each time."""
    call, tensors = varlen()
    leaves = {name: x.requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    for _ in range(4):
        gpu.launches.clear()
        out = call(**leaves)
        forward = gpu.launches.copy()
        out.backward(torch.zeros_like(out))
    assert all(x.hooks == (None, None, None) for x in forward)
    assert len(gpu.launches) > len(forward)
    assert all(leaves[name].grad.shape == out.shape for name in "qkv")


def warm(make: Callable[[], Call] = CALLS["causal"], times: int = 3) -> Call:
    call, tensors = make()
    for _ in range(times):
        call(**tensors)
    return call, tensors


def kernels(driver: StubDriver) -> list[str]:
    """The names of the kernels that were launched since the last look."""
    found = [driver.names[x.function] for x in driver.launches]
    driver.launches.clear()
    return found


def test_inputs_are_described_once_for_each_address(gpu):
    call, tensors = warm()
    gpu.encoded.clear()
    for _ in range(5):
        call(**tensors)
    inputs = {x.data_ptr() for x in tensors.values()}
    assert not inputs & {x.address for x in gpu.encoded}
    assert is_direct(gpu)


def test_results_have_the_same_metadata_each_time():
    def described(x: object) -> object:
        if isinstance(x, Tensor):
            return (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
        return tuple(described(y) for y in x)

    for name in ("causal", "with lse", "transposed", "varlen", "backward"):
        call, tensors = CALLS[name]()
        first, second, third = (described(call(**tensors)) for _ in range(3))
        assert first == second == third


def counter_of(driver: StubDriver) -> int:
    """The address that the latest launch of the forward kernel got for its counter: after four
    descriptors of 9 values each and the log-sum-exp."""
    return driver.launches[-1].arguments[4 * 9 + 1]


def test_each_stream_has_a_counter_of_its_own(gpu):
    call, tensors = warm(CALLS["varlen"], times=4)
    first = counter_of(gpu)
    assert [x.data_ptr() for x in _launcher._counters.values()] == [first]
    gpu.stream = STREAM + 1
    for _ in range(2):
        call(**tensors)
        assert is_direct(gpu)
        assert counter_of(gpu) not in (first, *(x.data_ptr() for x in tensors.values()))
    second = counter_of(gpu)
    _forget()
    call(**tensors)  # in the ordinary way
    assert not is_direct(gpu)
    assert counter_of(gpu) == second
    gpu.stream = STREAM
    call(**tensors)
    assert counter_of(gpu) == first
    assert all(x.item() == 0 for x in _launcher._counters.values())


def test_fixed_schedules_have_no_counter(gpu):
    warm(CALLS["plain"])
    assert is_direct(gpu)
    assert _launcher._counters == {}


def takes_the_sink(driver: StubDriver) -> bool:
    """Whether the latest launch writes to the memory that nobody reads."""
    return _launcher._sinks[torch.device("cpu")].data_ptr() in driver.launches[-1].arguments


def test_a_log_sum_exp_that_nobody_asks_for_has_no_memory(gpu, monkeypatch):
    warm(CALLS["causal"], times=3)
    assert is_direct(gpu)
    assert takes_the_sink(gpu)
    for name in ("with lse", "backward"):
        call, tensors = warm(CALLS[name], times=3)
        assert is_direct(gpu)
        assert not takes_the_sink(gpu)
    q, k, v = (x.requires_grad_() for x in qkv().values())
    for _ in range(3):
        flash_attn_func(q, k, v)
    assert not takes_the_sink(gpu)
    _forget()
    monkeypatch.setattr(_launcher, "_SINK_BYTES", 2 * 4 * 200 * 4 - 1)
    warm(CALLS["causal"], times=3)
    assert is_direct(gpu)
    assert not takes_the_sink(gpu)


def test_nothing_is_kept_alive():
    import gc
    import weakref

    for name in ("causal", "backward"):
        call, tensors = warm(CALLS[name])
        results = call(**tensors)
        results = results if isinstance(results, tuple) else (results,)
        seen = [weakref.ref(x) for x in (*tensors.values(), *results)]
        del tensors, results
        gc.collect()
        assert all(reference() is None for reference in seen)


# Which kernels serve


def test_another_choice_is_another_call(gpu):
    call, tensors = warm(CALLS["plain"])
    assert set(kernels(gpu)) == {"attention_forward_sm90"}
    with use_backend("triton"):
        for _ in range(3):
            call(**tensors)
    assert set(kernels(gpu)) == {"attention_forward"}
    call(**tensors)
    assert is_direct(gpu)
    assert set(kernels(gpu)) == {"attention_forward_sm90"}


@pytest.mark.parametrize(
    ("seqlen", "name"), [(1, "attention_forward"), (64, "attention_forward"),
                         (65, "attention_forward_sm90")],
)  # fmt: skip
def test_few_queries_are_left_to_the_portable_kernels(gpu, seqlen, name):
    for _ in range(3):
        flash_attn_func(**qkv(seqlen))
    assert is_direct(gpu)
    assert set(kernels(gpu)) == {name}
    with use_backend("sm90"):
        flash_attn_func(**qkv(seqlen))
    assert kernels(gpu) == ["attention_forward_sm90"]


@pytest.mark.parametrize("bound", [20, 64, 65, 1000])
def test_bounds_of_packed_queries_choose_no_kernels(gpu, bound):
    x, bounds = half(40, 4, 64), ints(0, 20, 40)
    flash_attn_varlen_func(x, x, x, bounds, bounds, bound, bound)
    assert kernels(gpu) == ["attention_forward_sm90"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout_p": 0.1}, "does not serve dropout"),
        ({"q": half(2, 200, 4, 72)[..., 4:68]}, "needs steps of a multiple of 16 bytes"),
        ({"q": half(2, 200, 4, 68)[..., :64]}, "needs steps of a multiple of 16 bytes"),
        ({"softmax_scale": -1.0}, "needs softmax_scale > 0"),
    ],
)
def test_what_is_not_served_goes_to_the_portable_kernels_with_a_reason(gpu, caplog, change, reason):
    arguments = qkv() | change
    caplog.set_level("DEBUG", logger="flash_attn")
    flash_attn_func(**arguments)
    assert kernels(gpu) == ["attention_forward"]
    assert "backend triton for the forward pass of q (2, 200, 4, 64)" in caplog.text
    assert re.search(f"not sm90: .*{reason}", caplog.text)


def test_divided_groups_are_added_up_in_repeated_calls_too(gpu):
    call, tensors = warm(CALLS["backward of divided groups"])
    gpu.launches.clear()
    call(**tensors)
    assert is_direct(gpu)
    assert kernels(gpu)[-4:] == ["row_statistics_sm90", "attention_backward_sm90",
                                 "finish_keys_sm90", "finish_dq_sm90"]  # fmt: skip


def test_one_pass_by_each(gpu):
    """The passes of a call are chosen apart, and take each other's results."""
    q, k, v = (x.requires_grad_() for x in qkv().values())
    with use_backend("triton"):
        out = flash_attn_func(q, k, v)
    out.sum().backward()
    assert kernels(gpu) == ["attention_forward", "row_statistics_sm90", "attention_backward_sm90",
                            "finish_dq_sm90"]  # fmt: skip
    out = flash_attn_func(q, k, v)
    with use_backend("triton"):
        out.sum().backward()
    names = kernels(gpu)
    assert names[0] == "attention_forward_sm90"
    assert not any("sm90" in name for name in names[1:])


def test_overridden_plans_are_the_portable_kernels(gpu):
    with plan.override(forward=TilePlan(16, 32, 2, 1)):
        flash_attn_func(**qkv())
        with use_backend("sm90"), pytest.raises(UnsupportedProblemError, match="overridden"):
            registry.select(problem())
    assert kernels(gpu) == ["attention_forward"]


def problem() -> AttentionProblem:
    return ops.dense_problem(*qkv().values(), 0.0, None, False, -1, -1, 0.0, None)


# Where Triton does not compile a kernel


@gluon.jit
def refused(q_desc, k_desc):
    gl.this_name_is_not_there(q_desc)


@pytest.fixture
def broken(monkeypatch):
    """A forward kernel that Triton refuses; yields how often it was tried."""
    tried = []

    class Broken:
        def __getitem__(self, grid):
            def run(*args, **keywords):
                tried.append(grid)
                return refused[grid](args[0], args[1], num_warps=4)

            return run

    monkeypatch.setattr(launch, "attention_forward_sm90", Broken())
    return tried


def test_a_refused_kernel_is_said_once_and_the_portable_ones_take_over(gpu, broken, caplog):
    for _ in range(4):
        out = flash_attn_func(**qkv())
        assert out.shape == (2, 200, 4, 64)
        flash_attn_func(**qkv(), causal=True)
    assert len(broken) == 1
    assert set(kernels(gpu)) == {"attention_forward"}
    (said,) = [x for x in caplog.records if x.levelname == "WARNING"]
    assert "backend sm90 is left out of forward passes in this process" in said.getMessage()
    assert "this_name_is_not_there" in said.getMessage()
    # The other pass has kernels of its own.
    q, k, v = (x.requires_grad_() for x in qkv().values())
    flash_attn_func(q, k, v).sum().backward()
    assert "attention_backward_sm90" in kernels(gpu)


def test_a_refused_kernel_that_was_asked_for_by_name_is_an_error(broken):
    with use_backend("sm90"):
        for _ in range(2):
            with pytest.raises(UnsupportedProblemError, match="sm90: has a kernel that Triton"):
                flash_attn_func(**qkv())
    assert len(broken) == 1


def test_known_calls_are_forgotten_with_their_backend(gpu, monkeypatch):
    call, tensors = warm(CALLS["plain"])
    kernels(gpu)
    registry.give_up("sm90", False, refusal.KernelCompilationError("is broken"))
    repeated.clear()
    for _ in range(3):
        call(**tensors)
    assert set(kernels(gpu)) == {"attention_forward"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
         RuntimeError),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), ToolchainError),
        (TypeError("ours, not Triton's"), TypeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)  # fmt: skip
def test_other_errors_stay_what_they_are(monkeypatch, error, expected):
    class Failing:
        def __getitem__(self, grid):
            raise error

    monkeypatch.setattr(launch, "attention_forward_sm90", Failing())
    with pytest.raises(expected):
        flash_attn_func(**qkv())
    assert registry._given_up == {}
