"""Repeated launches, on a driver that notes what C code would receive."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from stub_driver import STREAM, TensorMap, stub_driver
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_attn.backends import _launcher as launcher
from flash_attn.backends._launcher import Launcher, Repeat, Unrepeatable, recording, scratch

pytestmark = [
    pytest.mark.skipif(knobs.runtime.interpret, reason="nothing is compiled in the interpreter"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
]


@triton.jit(do_not_specialize=["count"])
def scale(x, y, count, one, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + offsets * one, mask=offsets < count) * factor
    if TWICE:
        values *= 2
    tl.store(y + offsets, values, mask=offsets < count)


@triton.jit
def copy_tile(target, source, row, BLOCK: tl.constexpr):
    target.store([row, 0], source.load([row, 0]))


# Its name from Triton 3.7 on, and before.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def gluon_tile(out, source, row):
    """Load one tile through its tensor map and store it through pointers."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    mbarrier.init(barrier, count=1)
    mbarrier.expect(barrier, source.block_type.nbytes)
    load_tile(source, [row, 0], barrier, tile)
    mbarrier.wait(barrier, 0)
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))
    cols = gl.arange(0, 32, gl.SliceLayout(0, layout))
    gl.store(out + rows[:, None] * 32 + cols[None, :], tile.load(layout))


@pytest.fixture
def driver():
    with stub_driver() as made:
        yield made


def pair(count=64, offset=0):
    """Two float32 vectors, ``offset`` elements after an aligned address."""
    return [torch.zeros(count + offset)[offset:] for _ in range(2)]


def record(x, y, **keywords):
    with recording() as tape:
        Launcher(scale)[(2,)](x, y, x.numel(), 1, 2.5, BLOCK=32, **keywords)
    return tape


def addresses(*tensors):
    return [x.data_ptr() for x in tensors]


def without_hooks(launched):
    return launched._replace(hooks=None, arguments=None)


def test_the_installed_triton_is_known():
    assert launcher.KNOWN_VERSION


def test_a_repeat_passes_what_the_usual_path_passes(driver):
    x, y = pair()
    repeat = Repeat(record(x, y, num_warps=2), [x, y])
    usual = driver.launches.pop()
    a, b = pair()
    repeat(addresses(a, b))
    (direct,) = driver.launches
    assert without_hooks(direct) == without_hooks(usual)
    assert direct.grid == (2, 1, 1)
    assert direct.stream == STREAM + driver.device
    assert direct.metadata[:1] == (2,)
    assert usual.arguments == (x.data_ptr(), y.data_ptr(), 64, 1, 2.5, 32, False)
    assert direct.arguments == (a.data_ptr(), b.data_ptr(), 64, 1, 2.5, 32, False)
    assert direct.hooks == (None, None, None)


def test_order_of_addresses_is_that_of_the_tensors(driver):
    x, y = pair()
    repeat = Repeat(record(x, y), [y, x])
    a, b = pair()
    repeat(addresses(a, b))
    assert driver.launches[-1].arguments[:2] == (b.data_ptr(), a.data_ptr())


def test_several_launches_and_scratch(driver):
    x, y = pair()
    with recording() as tape:
        between = scratch((64,), torch.float32, x.device)
        Launcher(scale)[(2,)](x, between, 64, 1, 2.5, BLOCK=32)
        Launcher(scale)[(1, 3)](between, y, 64, 1, 0.5, BLOCK=64, TWICE=True)
    repeat = Repeat(tape, [x, y])
    driver.launches.clear()
    a, b = pair()
    repeat(addresses(a, b))
    first, second = driver.launches
    assert first.arguments[0] == a.data_ptr()
    assert second.arguments[1] == b.data_ptr()
    assert first.arguments[1] == second.arguments[0]
    assert first.arguments[1] not in addresses(a, b, x, y, between)
    assert (first.grid, second.grid) == ((2, 1, 1), (1, 3, 1))
    assert first.arguments[2:] == (64, 1, 2.5, 32, False)
    assert second.arguments[2:] == (64, 1, 0.5, 64, True)


def test_outside_of_a_recording_nothing_is_noted(driver):
    x, y = pair()
    with recording() as tape:
        pass
    Launcher(scale)[(2,)](x, y, 64, 1, 2.5, BLOCK=32)
    assert tape.launches == []
    assert len(driver.launches) == 1


def test_recordings_belong_to_a_thread(driver):
    x, y = pair()
    with recording() as tape:
        worker = threading.Thread(target=lambda: Launcher(scale)[(2,)](x, y, 64, 1, 2.5, BLOCK=32))
        worker.start()
        worker.join()
    assert len(driver.launches) == 1
    assert tape.launches == []


@pytest.mark.parametrize("library", [False, True])
def test_a_repeat_keeps_no_tensor(library):
    with stub_driver(library=library):
        x, y = pair()
        seen = [weakref.ref(x), weakref.ref(y)]
        repeat = Repeat(record(x, y), [x, y])
        del x, y
        gc.collect()
        assert [ref() for ref in seen] == [None, None]
        assert repeat.device


def test_the_current_stream_is_asked_for_on_each_launch(driver, monkeypatch):
    x, y = pair()
    repeat = Repeat(record(x, y), [x, y])
    monkeypatch.setattr(repeat, "current_stream", lambda device: 12345)
    repeat(addresses(x, y))
    assert driver.launches[-1].stream == 12345


def test_which_gpu_is_current_is_asked_for(driver):
    x, y = pair()
    tape, home = record(x, y), driver.device
    driver.device = home + 1
    repeat = Repeat(tape, [x, y])
    assert repeat.device == home
    assert repeat.current_device() != home
    driver.device = home
    assert repeat.current_device() == home


# Tensor maps


def tiles(rows=64):
    tensors = [torch.zeros(rows, 32, dtype=torch.float16) for _ in range(2)]
    return tensors, [TensorDescriptor.from_tensor(x, [16, 32]) for x in tensors]


def record_tiles(tensors, descriptors):
    with recording() as tape:
        Launcher(copy_tile)[(1,)](*descriptors, 16, BLOCK=16)
    return Repeat(tape, tensors)


def test_descriptors_become_maps_of_the_new_addresses(driver):
    tensors, descriptors = tiles()
    repeat = record_tiles(tensors, descriptors)
    usual = driver.launches.pop()
    repeat(addresses(*tensors))
    direct = driver.launches.pop()
    assert direct.arguments == usual.arguments
    assert isinstance(direct.arguments[0], TensorMap)
    others, _ = tiles()
    repeat(addresses(*others))
    moved = driver.launches.pop()
    for position in (0, 5):
        before, after = usual.arguments[position], moved.arguments[position]
        assert after == before._replace(address=others[position // 5].data_ptr())
    assert moved.arguments[1:5] == usual.arguments[1:5] == (64, 32, 32, 1)


def test_a_map_is_encoded_once_for_each_address(driver):
    tensors, descriptors = tiles()
    repeat = record_tiles(tensors, descriptors)
    driver.encoded.clear()
    for _ in range(3):
        repeat(addresses(*tensors))
    assert driver.encoded == []
    others, _ = tiles()
    for _ in range(3):
        repeat(addresses(*others))
        repeat(addresses(*tensors))
    assert [made.address for made in driver.encoded] == addresses(*others)


def test_an_address_with_another_layout_has_another_map(driver):
    tensors, descriptors = tiles()
    first = record_tiles(tensors, descriptors)
    shorter = [TensorDescriptor(x, [48, 32], [32, 1], [16, 32]) for x in tensors]
    second = record_tiles(tensors, shorter)
    driver.launches.clear()
    first(addresses(*tensors))
    second(addresses(*tensors))
    shapes = [launched.arguments[0].shape for launched in driver.launches]
    assert shapes == [(64, 32), (48, 32)]


def test_maps_are_bounded_and_right_after_overflow(driver, monkeypatch):
    monkeypatch.setattr(launcher._Map, "CAPACITY", 4)
    made, make = [], launcher._Map.__init__

    def noted(self, *args):
        made.append(self)
        make(self, *args)

    monkeypatch.setattr(launcher._Map, "__init__", noted)
    tensors, descriptors = tiles()
    repeat = record_tiles(tensors, descriptors)
    tensor_map = made[0]
    for address in range(4096, 4096 + 32 * 20, 32):
        repeat([address, address + 16])
        arguments = driver.launches[-1].arguments
        assert (arguments[0].address, arguments[5].address) == (address, address + 16)
        assert len(tensor_map._encoded) <= 4
    assert tensor_map.base is None


def test_gluon_kernels(driver):
    x, out = torch.zeros(64, 32, dtype=torch.float16), torch.zeros(16, 32, dtype=torch.float16)
    layout = gl.NVMMASharedLayout.get_default_for([16, 32], gl.float16)
    descriptor = GluonDescriptor.from_tensor(x, [16, 32], layout)
    with recording() as tape:
        Launcher(gluon_tile)[(1,)](out, descriptor, 16, num_warps=4)
    repeat, usual = Repeat(tape, [out, x]), driver.launches.pop()
    repeat(addresses(out, x))
    direct = driver.launches.pop()
    assert direct.arguments == usual.arguments
    assert without_hooks(direct) == without_hooks(usual)
    other = torch.zeros(64, 32, dtype=torch.float16)
    repeat(addresses(out, other))
    encoded = driver.launches.pop().arguments[1]
    assert encoded == usual.arguments[1]._replace(address=other.data_ptr())


# Where launches stay on the usual path


def test_hooks_disturb(driver):
    assert launcher.undisturbed()
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(print)
        try:
            assert not launcher.undisturbed()
        finally:
            chain.remove(print)
    assert launcher.undisturbed()


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (knobs.runtime, "launch_enter_hook", lambda metadata: None),
        (knobs.runtime, "launch_exit_hook", None),
        (knobs.runtime, "debug", True),
        (knobs.runtime, "add_stages_inspection_hook", lambda *_: ("", "")),
        (knobs.compilation, "instrumentation_mode", "consan"),
    ],
)
def test_what_else_disturbs(monkeypatch, owner, name, value):
    monkeypatch.setitem(owner.__dict__, name, value)
    assert not launcher.undisturbed()


def test_hooks_fire_on_the_usual_path(driver):
    x, y = pair()
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        record(x, y)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == 1


def unrepeatable(tape, tensors, caplog):
    """The reason why ``tape`` cannot be repeated, as it is logged."""
    with caplog.at_level(logging.INFO, logger="flash_attn"):
        assert launcher.repeat(tape, tensors) is None
    return caplog.text


def test_unknown_tensors_are_refused(driver, caplog):
    x, y = pair()
    assert "scale took a tensor made during the call" in unrepeatable(record(x, y), [x], caplog)
    # The same memory is not the same tensor: other calls may not share it.
    assert "made during the call" in unrepeatable(record(x, y), [x, y.view(-1)], caplog)


@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (lambda x: x.zero_(), "zero_"),
        (lambda x: torch.zeros(3), "zeros"),
        (lambda x: torch.zeros_like(x), "zeros_like"),
        (lambda x: x[32:].copy_(x[:32]), "copy_"),
        (lambda x: x.cumsum(0), "cumsum"),
    ],
)
def test_what_else_is_computed_is_refused(driver, caplog, compute, name):
    """A repeat would leave it out."""
    x, y = pair()
    with recording() as tape:
        Launcher(scale)[(2,)](x, y, 64, 1, 2.5, BLOCK=32)
        compute(x)
    assert f"besides the launches there is {name}" in unrepeatable(tape, [x, y], caplog)
    assert launcher.repeat(tape, [x, y], frozenset({name})) is not None


def test_memory_and_views_are_no_computation(driver):
    x, y = pair()
    with recording() as tape:
        for made in (torch.empty(3), torch.empty_like(x), x.new_empty(5), x.new_zeros(0)):
            made.view(-1)
        x[1:].view(1, -1).transpose(0, 1).detach().unbind(0)
        launcher.counter_for(x)
        Launcher(scale)[(2,)](x, y, 64, 1, 2.5, BLOCK=32)
    assert tape.operators == []
    Repeat(tape, [x, y])


def test_pytorchs_compiler_is_kept_out_of_recordings_where_it_is_loaded():
    """Elsewhere keeping it out would load it, see the processes of test_compiled.py."""
    watched, free = (launcher._operators(loaded) for loaded in (True, False))
    assert hasattr(watched.__torch_dispatch__, "__wrapped__")
    assert not hasattr(free.__torch_dispatch__, "__wrapped__")


def test_nothing_launched_is_refused(driver, caplog):
    with recording() as tape:
        pass
    assert "nothing was launched" in unrepeatable(tape, [], caplog)


def test_several_streams_are_refused(driver, caplog):
    x, y = pair()
    tape = record(x, y)
    tape.launches.append(tape.launches[0]._replace(stream=1))
    assert "several streams" in unrepeatable(tape, [x, y], caplog)


def test_unknown_versions_are_refused(driver, caplog, monkeypatch):
    monkeypatch.setattr(launcher, "KNOWN_VERSION", False)
    x, y = pair()
    assert f"Triton {triton.__version__} is unknown" in unrepeatable(record(x, y), [x, y], caplog)


def test_a_launcher_of_another_make_is_refused(driver, caplog):
    x, y = pair()
    tape = record(x, y)
    del tape.launches[0].compiled.run.launch_pdl
    assert "launch_pdl" in unrepeatable(tape, [x, y], caplog)


def test_kernels_with_hooks_of_their_own_are_refused(driver, caplog):
    x, y = pair()
    tape = record(x, y)
    kernel = JITFunction(scale.fn)
    kernel.add_pre_run_hook(print)
    tape.launches[0] = tape.launches[0]._replace(kernel=kernel)
    assert "plain compiled kernel" in unrepeatable(tape, [x, y], caplog)


def test_grids_that_are_functions_are_refused(driver):
    x, y = pair()
    with recording() as tape:
        Launcher(scale)[lambda meta: (64 // meta["BLOCK"],)](x, y, 64, 1, 2.5, BLOCK=32)
    with pytest.raises(Unrepeatable, match="grids"):
        Repeat(tape, [x, y])


def test_scratch_memory_of_kernels_goes_through_tritons_launcher(driver, monkeypatch):
    """A kernel that needs memory from Triton's allocator gets it from Triton's launcher."""
    x, y = pair()
    tape = record(x, y)
    run = tape.launches[0].compiled.run
    called = []
    run.profile_scratch_size = 8
    monkeypatch.setattr(type(run), "__call__", lambda self, *args: called.append(args))
    Repeat(tape, [x, y])(addresses(x, y))
    (arguments,) = called
    assert arguments[:3] == (2, 1, 1)
    assert arguments[-7:] == (x.data_ptr(), y.data_ptr(), 64, 1, 2.5, 32, False)


_KEYS = """
import sys
from flash_attn.backends.triton import launch_backward, launch_cache, launch_rotary
from flash_attn.kernels import backward, combine, forward, kv_append, rotary, softmax_debug
kernels = [
    backward.attention_dkdv, backward.attention_dmask, backward.attention_dq,
    backward.attention_row_statistics, combine.attention_combine, forward.attention_forward,
    kv_append.append_kv, rotary.rotary_kernel, softmax_debug.softmax_debug,
]
keys = {kernel.__name__: kernel.cache_key for kernel in kernels[:: int(sys.argv[1])]}
print(sorted(keys.items()))
"""


def test_keys_do_not_depend_on_what_was_launched_before() -> None:
    source = Path(launcher.__file__).parents[2]
    found = [
        subprocess.run(
            [sys.executable, "-c", _KEYS, step], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(source)},
        ).stdout
        for step in ("1", "-1")
    ]  # fmt: skip
    assert "attention_forward" in found[0]
    assert found[0] == found[1]
