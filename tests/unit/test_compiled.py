"""Kernels from Triton's cache without its hash of its own files, on a driver that launches nothing.

A process is played by another device, for which a kernel remembers nothing, and a hash that is not
known yet. The hash is a small one, of a folder that stands for Triton's own.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from stub_driver import StubDriver, stub_driver
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import compiler
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime import cache

from flash_attn.backends import _compiled
from flash_attn.backends._compiled import look_up_first

pytestmark = [
    pytest.mark.skipif(knobs.runtime.interpret, reason="nothing is compiled in the interpreter"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
]
SOURCE = Path(_compiled.__file__).parents[2]


@triton.jit
def add_one(x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x + offsets, tl.load(x + offsets) + 1)


@gluon.jit
def add_two(x, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offsets = gl.arange(0, BLOCK, layout)
    gl.store(x + offsets, gl.load(x + offsets) + 2)


# Triton unloads what a kernel compiled when the kernel is gone, for which it needs a driver.
_kernels: list[Any] = []


def usual_kernel() -> Any:
    """A kernel like ``add_one`` on Triton's own path."""
    _kernels.append(triton.jit(add_one.fn))
    return _kernels[-1]


class Machine:
    """Triton's files, its cache, and what processes on it do.

    Attributes:
        files: the folder that stands for Triton's.
        cache: Triton's cache.
        hashed: how often the files were hashed, by any process.
        compiled: names of the kernels that :func:`triton.compile` was asked for.
        driver: of the current process.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files, self.cache, self.patch = folder / "triton", folder / "cache", monkeypatch
        for name in ("language/core.py", "_C/libtriton.so", "_C/__pycache__/x.pyc", "README"):
            (self.files / name).parent.mkdir(parents=True, exist_ok=True)
            (self.files / name).write_text(" " * _compiled._HEAD_BYTES + f"contents of {name}")
        self.hashed, self.compiled = 0, []
        self.driver: StubDriver
        monkeypatch.setenv("TRITON_CACHE_DIR", str(self.cache))
        monkeypatch.setattr(_compiled, "_ROOT", str(self.files))
        triton_compile = compiler.compile

        def compile_noted(src: Any, **keywords: Any) -> Any:
            self.compiled.append(src.name)
            return triton_compile(src, **keywords)

        monkeypatch.setattr(triton.compiler, "compile", compile_noted)

    def start_process(self) -> None:
        """Forget what a process remembers."""
        self.driver.device += 1
        self.compiled.clear()
        _compiled._kept_key.cache_clear()

        @functools.lru_cache
        def triton_key() -> str:
            self.hashed += 1
            paths = [p for p in self.files.rglob("*.*") if p.suffix in (".py", ".so")]
            return "the hash of " + "-".join(p.read_text() for p in sorted(paths))

        self.patch.setattr(cache, "triton_key", triton_key)

    def launch(self, kernel: Any = add_one, block: int = 64, **options: Any) -> Any:
        """The compiled kernel that a new process launches."""
        self.start_process()
        return look_up_first(kernel)[(1,)](torch.zeros(64), BLOCK=block, **options)

    def kept(self) -> Path:
        """The file that holds the hash."""
        (path,) = self.cache.glob(f"*/{_compiled._FILE_NAME}")
        return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path, monkeypatch)
    with stub_driver() as made.driver:
        yield made
    _compiled._kept_key.cache_clear()


@pytest.mark.parametrize("kernel", [add_one, add_two])
def test_what_was_compiled_is_found_without_a_hash(machine: Machine, kernel: Any) -> None:
    first = machine.launch(kernel)
    assert (machine.hashed, machine.compiled) == (1, [kernel.__name__])
    found = machine.launch(kernel)
    assert (machine.hashed, machine.compiled) == (1, [])
    assert found is not first
    assert type(found) is type(first)
    assert (found.hash, found.asm, found.metadata) == (first.hash, first.asm, first.metadata)
    assert found.metadata_group == first.metadata_group
    usual, direct = machine.driver.launches
    assert direct[:2] == (usual.grid, usual.stream + 1)
    assert direct.arguments[1:] == usual.arguments[1:]


def test_tritons_own_path_finds_the_same(machine: Machine) -> None:
    """Both ways use one entry of the cache, whichever came first."""
    usual = usual_kernel()
    machine.start_process()
    first = usual[(1,)](torch.zeros(64), BLOCK=64)
    machine.compiled.clear()
    found = machine.launch()
    assert machine.compiled == []
    assert found.hash == first.hash
    machine.launch(block=32)
    machine.start_process()
    entries = set(machine.cache.rglob("*.cubin"))
    usual[(1,)](torch.zeros(64), BLOCK=32)
    assert machine.compiled == ["add_one"]
    assert set(machine.cache.rglob("*.cubin")) == entries


def test_other_kernels_are_left_alone(machine: Machine) -> None:
    kernel = usual_kernel()
    machine.start_process()
    kernel[(1,)](torch.zeros(64), BLOCK=64)
    assert kernel.compile is triton.compiler.compile
    assert cache.triton_key.cache_info().currsize == 1
    assert list(machine.cache.glob(f"*/{_compiled._FILE_NAME}")) == []


def test_a_kernel_is_wrapped_once(machine: Machine) -> None:
    assert look_up_first(add_one) is look_up_first(add_one) is add_one
    machine.launch()
    assert add_one.compile.args == (triton.compiler.compile,)


# What makes another kernel


def in_module(folder: Path, body: str) -> Any:
    """A kernel ``add_one`` that is alike but for a line."""
    path = folder / "kernels_of_a_test.py"
    path.write_text(
        "import triton\nimport triton.language as tl\n\n@triton.jit\n"
        f"def add_one(x, BLOCK: tl.constexpr):\n    offsets = tl.arange(0, BLOCK)\n    {body}\n"
    )
    spec = importlib.util.spec_from_file_location("kernels_of_a_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    spec.loader.exec_module(module)
    sys.dont_write_bytecode = before
    _kernels.append(module.add_one)
    return module.add_one


def test_a_changed_source_is_compiled(machine: Machine, tmp_path: Path) -> None:
    store = "tl.store(x + offsets, tl.load(x + offsets) + {})"
    first = machine.launch(in_module(tmp_path, store.format(1)))
    again = machine.launch(in_module(tmp_path, store.format(1)))
    assert (machine.compiled, again.hash) == ([], first.hash)
    other = machine.launch(in_module(tmp_path, store.format(3)))
    assert machine.compiled == ["add_one"]
    assert other.hash != first.hash
    assert other.asm["ptx"] != first.asm["ptx"]


Change = Callable[[Machine], "dict[str, Any] | None"]


def other_gpu(machine: Machine) -> None:
    machine.patch.setattr(
        machine.driver, "get_current_target", lambda: GPUTarget("cuda", 80, 32), raising=True
    )


def other_assembler(machine: Machine) -> None:
    machine.patch.setattr(nvidia, "get_ptxas_version", lambda arch: "ptxas of another day")


def other_variable(machine: Machine) -> None:
    machine.patch.setenv("TRITON_DISABLE_LINE_INFO", "1")


def debugging(machine: Machine) -> None:
    machine.patch.setattr(knobs.runtime, "debug", True)


@pytest.mark.parametrize(
    "change",
    [
        other_gpu,
        other_assembler,
        other_variable,
        debugging,
        lambda machine: {"num_warps": 2},
        lambda machine: {"block": 32},
    ],
    ids=["architecture", "assembler", "variable", "debug", "option", "constexpr"],
)
def test_what_is_in_the_key_makes_another_kernel(machine: Machine, change: Change) -> None:
    first = machine.launch()
    different = change(machine) or {}
    other = machine.launch(**different)
    assert (machine.hashed, machine.compiled) == (2, ["add_one"])
    assert other.hash != first.hash
    assert machine.launch(**different).hash == other.hash
    assert (machine.hashed, machine.compiled) == (2, [])


# Triton's files


def edit(path: Path) -> None:
    """Other contents of the same size, with the same beginning and time."""
    status, text = path.stat(), path.read_text()
    path.write_text(text.replace("contents", "CONTENTS"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def edited_source(machine: Machine) -> None:
    edit(machine.files / "language/core.py")


def added_source(machine: Machine) -> None:
    (machine.files / "language/more.py").write_text("more")


def removed_source(machine: Machine) -> None:
    (machine.files / "language/core.py").unlink()


def edited_library(machine: Machine) -> None:
    """Its status alone tells."""
    edit(machine.files / "_C/libtriton.so")


def relinked_library(machine: Machine) -> None:
    path = machine.files / "_C/libtriton.so"
    path.write_text("another beginning" + path.read_text())


@pytest.mark.parametrize(
    "change", [edited_source, added_source, removed_source, edited_library, relinked_library]
)
def test_other_files_are_hashed_again(machine: Machine, change: Change) -> None:
    first = machine.launch()
    change(machine)
    other = machine.launch()
    assert (machine.hashed, machine.compiled) == (2, ["add_one"])
    assert other.hash != first.hash
    assert machine.launch().hash == other.hash
    assert (machine.hashed, machine.compiled) == (2, [])


@pytest.mark.parametrize("trait", ["st_size", "st_ino", "st_mtime_ns", "st_ctime_ns", "head"])
def test_each_trait_of_a_library_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trait: str
) -> None:
    path = tmp_path / "libtriton.so"
    path.write_bytes(b"contents")
    known = dict.fromkeys(("st_size", "st_ino", "st_mtime_ns", "st_ctime_ns"), 1)
    monkeypatch.setattr(os, "fstat", lambda number: SimpleNamespace(**known))
    before = _compiled._traits(str(path))
    assert _compiled._traits(str(path)) == before
    if trait == "head":
        path.write_bytes(b"CONTENTS")
    else:
        known[trait] = 2
    assert _compiled._traits(str(path)) != before


def test_another_version_has_its_own_file(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.launch()
    monkeypatch.setattr(triton, "__version__", "3.6.99")
    machine.launch()
    assert machine.hashed == 2
    assert len(list(machine.cache.glob(f"*/{_compiled._FILE_NAME}"))) == 2


def test_what_no_module_is_does_not_matter(machine: Machine) -> None:
    machine.launch()
    (machine.files / "README").write_text("other")
    (machine.files / "_C/__pycache__/x.pyc").write_text("other")
    machine.launch()
    assert machine.hashed == 1


def test_files_that_change_meanwhile_are_not_kept(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.start_process()
    compute = cache.triton_key

    @functools.lru_cache
    def while_installing() -> str:
        edited_source(machine)
        return compute()

    monkeypatch.setattr(cache, "triton_key", while_installing)
    look_up_first(add_one)[(1,)](torch.zeros(64), BLOCK=64)
    assert machine.compiled == ["add_one"]
    assert list(machine.cache.glob(f"*/{_compiled._FILE_NAME}")) == []


def test_folders_that_cannot_be_read_are_hashed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compiled, "_ROOT", str(machine.files / "nowhere"))
    for times in (1, 2):
        machine.launch()
        assert (machine.hashed, machine.compiled) == (times, ["add_one"])


def test_a_hash_that_the_process_has_is_used(machine: Machine) -> None:
    """It may be of files that were replaced since: it is not written beside today's signature."""
    machine.start_process()
    cache.triton_key()
    look_up_first(add_one)[(1,)](torch.zeros(64), BLOCK=64)
    assert machine.hashed == 1
    assert list(machine.cache.glob(f"*/{_compiled._FILE_NAME}")) == []


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: data.replace(b"core", b"cone"),
        lambda data: data + b"\n",
        lambda data: b"\xff\x00" * 40,
    ],
    ids=["empty", "cut", "short", "changed", "longer", "binary"],
)
def test_a_damaged_file_is_written_anew(machine: Machine, damage: Callable[..., bytes]) -> None:
    first = machine.launch()
    path = machine.kept()
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    assert machine.launch().hash == first.hash
    assert (machine.hashed, machine.compiled) == (2, [])
    assert path.read_bytes() == before


def test_removed_entries_are_compiled_again(machine: Machine) -> None:
    first = machine.launch()
    (entry,) = machine.cache.rglob("*.cubin")
    shutil.rmtree(entry.parent)
    assert machine.launch().hash == first.hash
    assert (machine.hashed, machine.compiled) == (2, ["add_one"])
    shutil.rmtree(machine.cache)
    assert machine.launch().hash == first.hash
    assert (machine.hashed, machine.compiled) == (3, ["add_one"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # CompiledKernel's
def test_damaged_entries_fail_as_on_tritons_path(machine: Machine) -> None:
    machine.launch()
    (entry,) = machine.cache.rglob("add_one.json")
    entry.write_text(entry.read_text()[:100])
    with pytest.raises(json.JSONDecodeError):
        usual_kernel()[(1,)](torch.zeros(64), BLOCK=64)
    with pytest.raises(json.JSONDecodeError):
        machine.launch()


# The cache


class NothingIsWritten(cache.FileCacheManager):
    """A cache that cannot be written: as it is where it is complete, an error elsewhere."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        folder = Path(knobs.cache.dir) / key
        if not folder.exists():
            raise PermissionError(f"read-only: {folder}")
        super().__init__(key, override, dump)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        raise PermissionError(f"read-only: {filename}")


def test_a_cache_that_cannot_be_written(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = machine.launch()
    monkeypatch.setattr(knobs.cache, "manager_class", NothingIsWritten)
    assert machine.launch().hash == first.hash
    assert machine.hashed == 1
    kept = machine.kept()
    kept.write_text("")
    assert machine.launch().hash == first.hash
    assert (machine.hashed, kept.read_text()) == (2, "")
    shutil.rmtree(kept.parent)
    assert machine.launch().hash == first.hash
    assert machine.hashed == 3
    with pytest.raises(PermissionError, match="read-only"):  # as ever
        machine.launch(num_warps=2)


def test_a_manager_of_the_users_own(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: dict[tuple[str, str], Any] = {}

    class InMemory(cache.FileCacheManager):
        def get_file(self, filename: str) -> str | None:
            if (self.key, filename) not in stored:
                return None
            return super().put(stored[self.key, filename], filename)

        def put(self, data: Any, filename: str, binary: bool = True) -> str:
            stored[self.key, filename] = data
            return super().put(data, filename, binary)

    monkeypatch.setattr(knobs.cache, "manager_class", InMemory)
    machine.launch()
    assert _compiled._FILE_NAME in {name for _, name in stored}
    shutil.rmtree(machine.kept().parent)
    machine.launch()
    assert (machine.hashed, machine.compiled) == (1, [])


# Knobs and hooks


@pytest.mark.parametrize("knob", ["always_compile", "override", "dump_ir"])
def test_knobs_of_compilation_are_tritons_affair(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knob: str
) -> None:
    first = machine.launch()
    for name in ("dump_dir", "override_dir"):
        monkeypatch.setattr(knobs.cache, name, str(tmp_path / name))
    monkeypatch.setattr(knobs.compilation, knob, True)
    assert machine.launch().hash == first.hash
    assert machine.compiled == ["add_one"]


def test_hooks_into_stages_are_tritons_affair(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.launch()
    stages = []

    def inspect(*args: Any) -> tuple[str, str]:
        stages.append(args)
        return "key", "hash"

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", inspect)
    machine.launch()
    assert machine.compiled == ["add_one"]


def test_listeners_hear_of_what_was_found(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[dict[str, Any]] = []

    def listen(**facts: Any) -> None:
        heard.append(facts)

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    machine.launch()
    found = machine.launch()
    machine.start_process()
    usual_kernel()[(1,)](torch.zeros(64), BLOCK=64)
    compiled, ours, tritons = heard
    assert [x["cache_hit"] for x in heard] == [False, True, True]
    assert ours.keys() == tritons.keys() == compiled.keys()
    assert ours["src"] is found.src
    assert (ours["metadata"], ours["metadata_group"]) == (
        tritons["metadata"],
        tritons["metadata_group"],
    )
    assert type(ours["times"]) is type(tritons["times"])
    assert 0 <= ours["times"].total < 10e6

    def refuse(**facts: Any) -> None:
        heard.clear()
        raise ValueError("not today")

    monkeypatch.setattr(knobs.compilation, "listener", refuse)
    with pytest.raises(ValueError, match="not today"):
        machine.launch()
    assert machine.compiled == []


def test_unexpected_errors_are_tritons_affair(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = machine.launch()
    monkeypatch.setattr(_compiled, "_key_of_files", lambda: 1 / 0)
    with caplog.at_level("DEBUG", logger="flash_attn"):
        assert machine.launch().hash == first.hash
    assert machine.compiled == ["add_one"]
    assert "add_one was not looked up in Triton's cache" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_arguments_that_are_not_known_are_tritons_affair(machine: Machine) -> None:
    """As where kernels are compiled in other threads."""
    machine.launch()
    machine.compiled.clear()
    seen = {}

    def compile_it(src: Any, **keywords: Any) -> str:
        seen.update(keywords, src=src)
        return "compiled"

    made = _compiled._found_or_compiled(compile_it, "src", target=1, options={}, _env_vars={})
    assert made == "compiled"
    assert seen == {"src": "src", "target": 1, "options": {}, "_env_vars": {}}


def test_a_hash_of_another_make_is_asked_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's worker processes are given theirs."""
    first = machine.launch()
    key = cache.triton_key()
    machine.start_process()
    monkeypatch.setattr(cache, "triton_key", lambda: key)
    found = look_up_first(add_one)[(1,)](torch.zeros(64), BLOCK=64)
    assert (machine.compiled, found.hash) == ([], first.hash)


def test_unknown_versions_and_the_interpreter_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    interpreted = InterpretedFunction(add_one.fn)
    before = dict(vars(interpreted))
    assert look_up_first(interpreted) is interpreted
    assert vars(interpreted) == before
    kernel = triton.jit(add_one.fn)
    monkeypatch.setattr(_compiled, "KNOWN_VERSION", False)
    assert look_up_first(kernel).device_caches.default_factory == kernel.create_binder


# Processes

_PROCESS = """
import os, sys, time, torch
from pathlib import Path
from stub_driver import stub_driver
from triton.runtime import cache
from flash_attn.backends._launcher import Launcher, recording
from test_compiled import add_one

class Met:
    # Triton's hash, once as many processes ask for it as have to.
    def __init__(self, folder, count):
        self.key, self.folder, self.count = cache.triton_key, Path(folder), int(count)
        self.cache_info = self.key.cache_info

    def __call__(self):
        (self.folder / str(os.getpid())).touch()
        end = time.monotonic() + 100
        while len(list(self.folder.iterdir())) < self.count:
            if time.monotonic() > end:
                sys.exit("the other process never asked for the hash")
            time.sleep(0.01)
        return self.key()

cache.triton_key = Met(*sys.argv[1:])
with stub_driver(), recording() as tape:
    x = torch.zeros(64)
    compiled = Launcher(add_one)[(1,)](x, BLOCK=64)
hashed = bool(cache.triton_key.cache_info().currsize)
print(compiled.hash, hashed, "torch._dynamo" in sys.modules, tape.operators)
"""


def started(folder: Path, meeting: Path, count: int) -> subprocess.Popen[str]:
    """A process that gets Triton's hash when ``count`` processes have asked for it."""
    tests = Path(__file__).parents[1]
    paths = [str(x) for x in (SOURCE, tests, tests / "unit")]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS, str(meeting), str(count)], env=os.environ | variables,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_two_processes_at_once_and_one_later(tmp_path: Path) -> None:
    """With Triton's own files and hash. Neither of the two finds what the other has kept."""
    meetings = [tmp_path / "two", tmp_path / "one"]
    for meeting in meetings:
        meeting.mkdir()
    both = [started(tmp_path / "cache", meetings[0], 2) for _ in range(2)]
    said = [(process.communicate(timeout=120), process.returncode) for process in both]
    later = started(tmp_path / "cache", meetings[1], 1)
    said.append((later.communicate(timeout=120), later.returncode))
    assert [code for _, code in said] == [0, 0, 0], said
    words = [out.split(maxsplit=1) for (out, _), _ in said]
    assert len({key for key, _ in words}) == 1
    assert words[0][1] == words[1][1] == "True False ['zeros']\n"
    assert words[2][1] == "False False ['zeros']\n"
    assert [len(list(meeting.iterdir())) for meeting in meetings] == [2, 0]
