"""Launches by the driver's library hand over what Triton's function hands over."""

from __future__ import annotations

import ctypes
import logging
import re
import struct
import sys
import threading
import time
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

from cubin import parameter_sizes
from stub_driver import STREAM, StubDriver, TensorMap, stub_driver
from test_launcher import addresses, copy_tile, pair, record, record_tiles, tiles
from test_repeated_sm90 import CALLS, _forget, gpu  # noqa: F401  (a fixture)
from triton import knobs
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

from flash_attn.backends import _driver, _launcher
from flash_attn.backends._launcher import Repeat

# That of the package; the stub's stands in its place during every test.
map_offset = _driver.map_offset

pytestmark = [
    pytest.mark.skipif(knobs.runtime.interpret, reason="nothing is compiled in the interpreter"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
]


@pytest.fixture
def driver():
    with stub_driver(library=True) as made:
        yield made


def as_handed(value, size):
    """An argument of Triton's C function as the bytes that the driver reads."""
    if isinstance(value, TensorMap):
        return value
    if isinstance(value, float):
        return struct.pack("<f" if size == 4 else "<d", value)
    return value.to_bytes(size, "little", signed=value < 0)


def usual_parameters(driver: StubDriver, launched, signature):
    """What Triton's function makes of its arguments, followed by its two pointers to scratch."""
    sizes = driver.sizes[launched.function]
    kinds = _driver.kinds_of(signature, [x for x in launched.arguments if type(x) is TensorMap])
    kept = [x for x, kind in zip(launched.arguments, kinds, strict=True) if kind != "constexpr"]
    values = [as_handed(x, size) for x, size in zip(kept, sizes[:-2], strict=True)]
    return (*values, bytes(8), bytes(8))


def signature_of(launch):
    return tuple(launch.compiled.src.signature.values())


def test_a_repeat_hands_over_what_tritons_function_does(driver):
    x, y = pair()
    tape = record(x, y, num_warps=2)
    repeat, usual = Repeat(tape, [x, y]), driver.launches.pop()
    repeat(addresses(x, y))
    assert driver.launches == []
    (direct,) = driver.handed
    assert direct.parameters == usual_parameters(driver, usual, signature_of(tape.launches[0]))
    assert direct.parameters[2:4] == (b"\x40\0\0\0", struct.pack("<f", 2.5))
    assert direct.function == usual.function
    assert direct.stream == usual.stream == STREAM + driver.device
    assert direct.config == (*usual.grid, 64, 1, 1, usual.metadata[2])


def test_other_addresses_are_all_that_changes(driver):
    x, y = pair()
    repeat = Repeat(record(x, y), [y, x])
    repeat(addresses(y, x))
    a, b = pair()
    repeat(addresses(b, a))
    first, second = (x.parameters for x in driver.handed)
    assert [int.from_bytes(x, "little") for x in second[:2]] == addresses(a, b)
    assert first[2:] == second[2:]


def test_tensor_maps(driver):
    tensors, descriptors = tiles()
    repeat = record_tiles(tensors, descriptors)
    usual = driver.launches.pop()
    others, _ = tiles()
    for given in (tensors, others, tensors):
        repeat(addresses(*given))
    assert driver.launches == []
    same, moved, again = (x.parameters for x in driver.handed)
    assert [x for x in same if isinstance(x, TensorMap)] == list(usual.arguments[0:10:5])
    assert same == again
    for i in (0, 5):
        assert moved[i] == usual.arguments[i]._replace(address=others[i // 5].data_ptr())
    assert moved[1:5] == same[1:5]


def test_gluon_kernels(driver):
    from test_launcher import gluon_tile

    x, out = torch.zeros(64, 32, dtype=torch.float16), torch.zeros(16, 32, dtype=torch.float16)
    layout = gl.NVMMASharedLayout.get_default_for([16, 32], gl.float16)
    descriptor = GluonDescriptor.from_tensor(x, [16, 32], layout)
    with _launcher.recording() as tape:
        _launcher.Launcher(gluon_tile)[(1,)](out, descriptor, 16, num_warps=4)
    repeat, usual = Repeat(tape, [out, x]), driver.launches.pop()
    repeat(addresses(out, x))
    (direct,) = driver.handed
    assert direct.parameters == usual_parameters(driver, usual, signature_of(tape.launches[0]))


def test_maps_are_right_after_they_were_forgotten(driver, monkeypatch):
    monkeypatch.setattr(_launcher._Map, "CAPACITY", 4)
    tensors, descriptors = tiles()
    repeat = record_tiles(tensors, descriptors)
    for address in list(range(4096, 4096 + 32 * 20, 32)) * 2:
        repeat([address, address + 16])
        found = driver.handed[-1].parameters
        assert (found[0].address, found[5].address) == (address, address + 16)


def test_launches_at_the_same_time_have_memory_of_their_own(driver):
    x, y = pair()
    a, b = pair()
    repeat = Repeat(record(x, y), [x, y])
    take, inner = driver._take, []

    def interrupted(*args):
        if not inner:
            inner.append(True)
            repeat(addresses(a, b))  # as another thread, while the driver reads
        return take(*args)

    driver._take = interrupted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_driver, "library", driver._library)
        repeat = Repeat(record(x, y), [x, y])
        repeat(addresses(x, y))
    found = [[int.from_bytes(p, "little") for p in h.parameters[:2]] for h in driver.handed]
    assert found == [addresses(a, b), addresses(x, y)]


def test_threads(monkeypatch):
    """Each launch hands over its own addresses; the driver is slow, so that threads overlap."""
    tensors, descriptors = tiles()
    seen, failures = [], []
    function = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)

    @function
    def launch(config, handle, pointers, extra):
        stream, first_map = (
            ctypes.c_uint64.from_address(at).value for at in (config + 32, pointers)
        )
        time.sleep(1e-5)
        seen.append((stream, first_map == ctypes.c_uint64.from_address(pointers).value))
        return 0

    with stub_driver(library=True):
        monkeypatch.setattr(_driver, "library", lambda: launch)
        repeat = record_tiles(tensors, descriptors)
        stream = threading.local()
        monkeypatch.setattr(repeat, "current_stream", lambda device: stream.number)

        def work(number):
            stream.number = number
            try:
                for address in range(4096, 4096 + 3200, 32):
                    repeat([address, address + 16])
            except BaseException as error:
                failures.append(error)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            sys.setswitchinterval(before)
    assert failures == []
    assert Counter(number for number, _ in seen) == dict.fromkeys(range(8), 100)
    assert all(is_same for _, is_same in seen)


def test_what_the_driver_refuses_goes_to_tritons_function(driver):
    x, y = pair()
    repeat, usual = Repeat(record(x, y), [x, y]), driver.launches.pop()
    driver.refusals.append(201)  # no context in this thread
    repeat(addresses(x, y))
    (launched,) = driver.launches
    assert launched.arguments == usual.arguments
    assert driver.handed == []
    repeat(addresses(x, y))
    assert len(driver.handed) == 1


def reason_for(tape, tensors, caplog):
    """Why the launches of ``tape`` go to Triton's function; they do go there."""
    with caplog.at_level(logging.INFO, logger="flash_attn"):
        repeat = Repeat(tape, tensors)
    assert "launched by Triton's function" in caplog.text
    repeat(addresses(*tensors))
    return caplog.text


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (".u32 scale_param_2", ".u64 scale_param_2", r"\[8, 8, 8, 4, 8, 8\] bytes in place of"),
        (".param .f32 scale_param_3,", "", r"\[8, 8, 4, 8, 8\] bytes in place of"),
        (".f32 scale_param_3,", ".f32 scale_param_3, .param .u8 more,", r"4, 4, 1, 8, 8\] bytes"),
        (".f32 scale_param_3", ".pred scale_param_3", "a parameter '.pred scale_param_3"),
        (".entry scale", ".entry other", "not in its text"),
    ],
)
def test_kernels_with_other_parameters_stay_with_triton(driver, caplog, old, new, reason):
    x, y = pair()
    tape = record(x, y)
    compiled = tape.launches[0].compiled
    before = compiled.asm["ptx"]
    assert old in before
    compiled.asm["ptx"] = before.replace(old, new)
    try:
        assert re.search(reason, reason_for(tape, [x, y], caplog))
    finally:
        compiled.asm["ptx"] = before
    assert driver.handed == []
    assert len(driver.launches) == 2


def test_a_kernel_without_its_text_stays_with_triton(driver, caplog):
    x, y = pair()
    tape = record(x, y)
    asm = tape.launches[0].compiled.asm
    text = asm.pop("ptx")
    try:
        assert "not in its text" in reason_for(tape, [x, y], caplog)
    finally:
        asm["ptx"] = text


def test_the_text_says_of_parameters_what_the_binary_says(driver):
    tensors, descriptors = tiles()
    x, y = pair()
    with _launcher.recording() as tape:
        _launcher.Launcher(copy_tile)[(1,)](*descriptors, 16, BLOCK=16)
    for launch in (*tape.launches, *record(x, y).launches):
        compiled = launch.compiled
        found = _driver.parameter_sizes(compiled.asm["ptx"], compiled.name)
        assert found == parameter_sizes(compiled.asm["cubin"], compiled.name)
        assert found[-2:] == [8, 8]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("packed_metadata", (4, 2, 0), "clusters of 2"),
        ("packed_metadata", (4, 1, 229 << 10), "of shared memory"),
        ("packed_metadata", (4, 1, 0, 1), "a launch described by"),
        ("launch_cooperative_grid", True, "a cooperative grid"),
    ],
)
def test_launches_that_need_more_stay_with_triton(driver, caplog, monkeypatch, name, value, reason):
    x, y = pair()
    tape = record(x, y)
    compiled = tape.launches[0].compiled
    owner = compiled if hasattr(compiled, name) else compiled.run
    monkeypatch.setattr(owner, name, value)
    assert reason in reason_for(tape, [x, y], caplog)
    assert driver.handed == []


def test_a_kernel_of_another_make_stays_with_triton(driver, caplog, monkeypatch):
    x, y = pair()
    tape = record(x, y)
    monkeypatch.setattr(tape.launches[0].compiled, "src", object())
    assert "no attribute 'signature'" in reason_for(tape, [x, y], caplog)
    assert driver.handed == []


@pytest.mark.parametrize("early", [False, True])
def test_kernels_that_may_start_early(driver, early):
    x, y = pair()
    repeat = Repeat(record(x, y, launch_pdl=early), [x, y])
    assert driver.launches[-1].flags == (False, early)
    repeat(addresses(x, y))
    # The attribute's number, and from its second word of eight bytes on its value.
    assert driver.handed[-1].attributes == ((6, 0, 1) + (0,) * 15 if early else ())


def test_without_a_driver_triton_launches(caplog):
    with stub_driver() as driver:
        x, y = pair()
        assert "there is no driver" in reason_for(record(x, y), [x, y], caplog)
        assert len(driver.launches) == 2


def test_numbers_that_do_not_fit_are_refused():
    for kind, value in (("i32", 2**31), ("i8", 200), ("u32", -1), ("i32", 1.5), ("*fp32", 4096)):
        with pytest.raises(_driver.Unprepared):
            _driver._word(kind, value)
    with pytest.raises(_driver.Unprepared, match="type fp16"):
        _driver._word("fp16", 1.0)
    assert _driver._word("i32", -2) == 2**32 - 2
    assert _driver._word("i64", -1) == 2**64 - 1
    assert _driver._word("fp32", 1.0) == 0x3F800000
    assert _driver._word("*fp32", None) == 0


def test_signatures_that_are_not_understood_are_refused():
    assert _driver.kinds_of(["*bf16", "constexpr"], []) == ["*bf16", "constexpr"]
    tile = "tensordesc<bf16[1, 1, 64, 64],NVMMASharedLayout(swizzle_byte_width=128)>"
    assert _driver.kinds_of([tile, "i32"], [{}]) == [
        "nvTmaDesc", *["i32"] * 4, *["i64"] * 4, "i32",
    ]  # fmt: skip
    with pytest.raises(_driver.Unprepared, match="no tensor maps"):
        _driver.kinds_of([tile], [])
    with pytest.raises(_driver.Unprepared, match="of type"):
        _driver.kinds_of([("i32", "i32")], [])


def test_a_map_that_is_not_where_it_was_expected_is_refused():
    for found in (object(), b"x" * 300, (ctypes.c_uint64 * 40)(4096)):
        with pytest.raises(_driver.Unprepared, match="holds no tensor map"):
            map_offset(found, 4096)


@pytest.mark.parametrize("name", CALLS)
def test_public_calls(gpu, name):  # noqa: F811
    """All launches of a third call, against those of a first one with Triton's function."""
    make = CALLS[name]
    with stub_driver(library=True) as driver:
        call, tensors = make()
        for _ in range(2):
            call(**tensors)
        driver.launches.clear()
        others = make()[1]
        call(**others)
        assert driver.launches == []
        direct = driver.handed
        names = [driver.names[x.function] for x in direct]
        assert all("sm90" in x for x in names)
        _forget()
        with _launcher.recording() as tape:
            call(**others)
        usual = driver.launches
        assert len(usual) == len(direct) == len(tape.launches)
        known: tuple[dict, dict] = ({}, {})
        for one, other, launch in zip(direct, usual, tape.launches, strict=True):
            assert one.config[:3] == other.grid
            assert one.config[3:] == (32 * other.metadata[0], 1, 1, other.metadata[2])
            assert (one.function, one.stream) == (other.function, other.stream)
            assert bool(one.attributes) == other.flags[1]
            want = usual_parameters(driver, other, signature_of(launch))
            given = {x.data_ptr(): x for x in others.values()}
            assert len(one.parameters) == len(want)
            for pair_of in zip(one.parameters, want, strict=True):
                first, second = (
                    named(value, given, seen) for value, seen in zip(pair_of, known, strict=True)
                )
                assert first == second


def named(value, given, seen):
    """Addresses of results by the order in which they occur."""
    if isinstance(value, TensorMap):
        return value._replace(address=named(value.address, given, seen))
    number = value if isinstance(value, int) else int.from_bytes(value, "little")
    if number > 2**40 and number not in given:
        return seen.setdefault(number, f"new {len(seen)}")
    return value
