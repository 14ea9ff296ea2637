"""Without a C compiler, Python's headers or a new enough ptxas, one message says what to do.

In new interpreters, where Triton's own build step runs and fails; only the kernel is left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_attn.core.toolchain import explains_toolchain, explanation
from flash_attn.errors import ToolchainError

SRC = Path(__file__).parents[2] / "src"

# A launch builds a C module, as the first one on a machine does.
SETUP = """
import sys, sysconfig
import torch
from triton.runtime import build
from triton.runtime.jit import JITFunction

def run(self, *args, grid, warmup, **keywords):
    folders = INCLUDE_DIRS
    build.compile_module_from_src("#include <Python.h>\\nSTATEMENT;", "nothing", [], folders, [])

JITFunction.run = run
from flash_attn.backends.triton import BACKEND
from flash_attn.core import ops
from flash_attn.core.problem import BackwardInputs
from flash_attn.errors import ToolchainError

def forward():
    BACKEND.forward(ops.dense_problem(q, q, q, 0.0, None, False, -1, -1, 0.0, None))

def backward():
    problem = ops.dense_problem(q, q, q, 0.0, None, False, -1, -1, 0.0, None)
    state = torch.zeros(2, dtype=torch.int64)
    BACKEND.backward(problem, BackwardInputs(q, q, q[:, :, :, 0].mT, q, q, q, state))

def append_kv():
    problem = ops.dense_problem(q, q, q, 0.0, None, False, -1, -1, 0.0, None)
    BACKEND.append_kv(problem, q, q, torch.zeros(1, dtype=torch.int32))

def rotary():
    BACKEND.rotate(q, q[0, :, 0, :4], q[0, :, 0, :4], 0, False)

def cross_entropy():
    from flash_attn.ops.triton import cross_entropy as module
    module._runs_on_kernels = lambda x: True
    module.cross_entropy_loss(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64))

def layer_norm():
    from flash_attn.ops.triton import layer_norm as module
    module._runs_on_kernels = lambda x: True
    module.layer_norm_fn(torch.zeros(2, 8), torch.ones(8), None)

q = torch.zeros(1, 4, 2, 16)
try:
    LAUNCH()
except ToolchainError as error:
    assert isinstance(error, RuntimeError)
    assert error.__cause__ is not None
    print(error)
"""


def message(
    tmp_path: Path,
    launch: str = "forward",
    include_dirs: str = "[]",
    statement: str = "",
    before: str = "",
    **environment: str | None,
) -> str:
    """What a launch says in an interpreter with other environment variables (None: unset)."""
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    code = before + SETUP.replace("LAUNCH", launch).replace("INCLUDE_DIRS", include_dirs)
    changed = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(SRC), **environment}
    kept = {k: v for k, v in os.environ.items() if k not in (*changed, "TRITON_INTERPRET", "CC")}
    done = subprocess.run(
        [sys.executable, "-c", code.replace("STATEMENT", statement)],
        env=kept | {k: v for k, v in changed.items() if v is not None},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LAUNCHES = ["forward", "backward", "append_kv", "rotary", "cross_entropy", "layer_norm"]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_no_compiler(tmp_path: Path, launch: str) -> None:
    text = message(tmp_path, launch, PATH=str(tmp_path))
    assert text.startswith("no C compiler: CC is not set, and PATH has no gcc or clang.")
    assert "apt-get install gcc" in text


def test_cc_names_nothing(tmp_path: Path) -> None:
    text = message(tmp_path, CC="/no/such/cc")
    assert "CC is '/no/such/cc', which cannot be run (No such file or directory)" in text
    assert "apt-get install gcc" in text


def test_cc_with_options(tmp_path: Path) -> None:
    assert "one program's name, without options" in message(tmp_path, CC="gcc -m64")


def test_cc_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "cc").write_text("")
    assert "cannot be run (Permission denied)" in message(tmp_path, CC=str(tmp_path / "cc"))


# An interpreter whose folder of headers is empty.
NO_HEADERS = """
import sysconfig
_paths = sysconfig.get_paths
sysconfig.get_paths = lambda *a, **k: {**_paths(*a, **k), "include": "/no/headers"}
"""


def test_no_headers(tmp_path: Path) -> None:
    """With a compiler that looks for them like the real one, but says nothing."""
    compiler = tmp_path / "fake-cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    text = message(tmp_path, before=NO_HEADERS, CC=str(compiler))
    assert text.startswith("Python's headers are missing: there is no Python.h in ")
    assert "/no/headers" in text
    assert "apt-get install python3-dev" in text


def test_the_compiler_fails(tmp_path: Path) -> None:
    compiler = tmp_path / "fake-cc"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    compiler.chmod(0o755)
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "Python.h").write_text("")
    text = message(tmp_path, include_dirs=f"[{str(headers)!r}]", CC=str(compiler))
    assert "failed with status 3" in text
    assert f"-I{headers}" in text


OLD = "PTXAS error: `ptxas` failed with error code 255\n`ptxas` stderr:\n"
GPU = "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'\n"
VERSION = "ptxas /tmp/x.ptx, line 5; fatal   : Unsupported .version 8.7; current version is '8.4'\n"


class PTXASError(Exception):
    """Triton's, which only Linux has."""


@pytest.mark.parametrize("line", [GPU, VERSION])
def test_old_ptxas(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/usr/local/cuda-11/bin/ptxas")
    text = explanation(PTXASError(OLD + line + "Repro command: ptxas -v x.ptx"))
    assert text is not None
    assert "TRITON_PTXAS_PATH=/usr/local/cuda-11/bin/ptxas" in text
    assert line.strip() in text
    assert "Repro" not in text


def test_capture() -> None:
    error = RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")
    text = explanation(error)
    assert text is not None
    assert "once with such arguments before capturing" in text


OTHERS = [
    PTXASError(OLD + "ptxas error: Internal compiler error"),
    RuntimeError("CUDA out of memory"),
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    FileNotFoundError(2, "No such file or directory", "data.txt"),
    subprocess.CalledProcessError(1, ["nvidia-smi"]),
    subprocess.CalledProcessError(1, "shell line -shared"),
    ValueError("Failed to find C compiler"),
]


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_other_errors_pass(error: Exception) -> None:
    assert explanation(error) is None

    @explains_toolchain
    def launch() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        launch()
    assert caught.value is error


def test_results_and_arguments_pass() -> None:
    launch = explains_toolchain(torch.add)
    assert int(launch(torch.tensor(1), torch.tensor(2), alpha=3)) == 7
    assert issubclass(ToolchainError, RuntimeError)
