"""What needs a process of its own: allocators, sanitizers, equal bits from start to start."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

_HERE = Path(__file__).resolve().parent
_SRC = _HERE.parents[1] / "src"
_COMPLETED = "everything is done"
_TORN_DOWN = "terminate called without an active exception"
_START = """
import hashlib, torch
import test_runtime as runtime
from flash_attn import flash_attn_func
"""


def child(code: str, **environment: str | None) -> str:
    """Standard output of ``code`` in a new interpreter, with ``runtime`` for test_runtime.

    A thread of PyTorch's autograd that wants Python's lock while the interpreter is being torn down
    ends a process that has done everything (pytorch issues 38228 and 190489). That alone is no
    failure, but is warned of.
    """
    paths = [str(_HERE), str(_HERE.parent), str(_SRC), os.environ.get("PYTHONPATH", "")]
    changed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONFAULTHANDLER": "1", **environment}
    kept = {name: text for name, text in os.environ.items() if name not in changed}
    done = subprocess.run(
        [sys.executable, "-c", f"{_START}{code}\nprint({_COMPLETED!r}, flush=True)"],
        env=kept | {name: text for name, text in changed.items() if text is not None},
        capture_output=True,
        text=True,
        timeout=280,
    )
    said = done.stdout[-1000:] + done.stderr[-3000:]
    output = done.stdout.strip()
    assert output.endswith(_COMPLETED), said
    if done.returncode == -signal.SIGABRT and _TORN_DOWN in done.stderr:
        warnings.warn(f"aborted after its end: {said}", stacklevel=2)
    else:
        assert done.returncode == 0, said
    return output.removesuffix(_COMPLETED).strip()


# Streams ------------------------------------------------------------------------------------------

_ON_SIDE_STREAMS = """
for name, make in runtime.CALLS.items():
    call = make()
    want = [x.clone() for x in call()]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(10):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = call()
            # What a call has freed is handed out again, here or on another stream, and overwritten.
            junk = [torch.full((1 << 18,), float("nan"), device="cuda") for _ in range(4)]
        torch.cuda.current_stream().wait_stream(stream)
        del junk
        runtime.assert_equal(got, want)
print("equal", len(runtime.CALLS))
"""


@pytest.mark.parametrize("caching", [True, False])
def test_side_streams_with_and_without_the_caching_allocator(caching: bool) -> None:
    """Without it every block is returned to the driver when it is freed."""
    variable = None if caching else "1"
    found = child(_ON_SIDE_STREAMS, PYTORCH_NO_CUDA_MEMORY_CACHING=variable)
    assert found.startswith("equal")


# The sanitizer of torch.cuda sees operators, ours included, with what they read and write, and the
# events between streams. It does not see kernels inside an operator.
_SANITIZED = """
from torch.cuda._sanitizer import CUDASanitizerErrors

def reported(function):
    try:
        function()
    except CUDASanitizerErrors:
        return True
    return False

def ordered():
    for name, make in runtime.CALLS.items():
        call = make()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = call()
        torch.cuda.current_stream().wait_stream(stream)
        [x + 1 for x in got]

def unordered_pytorch():
    x = torch.rand(1000, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        x.mul_(2)

def unordered_read():
    q = torch.rand(1, 64, 2, 64, device="cuda").half()
    with torch.cuda.stream(torch.cuda.Stream()):
        flash_attn_func(q, q, q)

def unordered_write():
    q = torch.rand(1, 64, 2, 64, device="cuda").half()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        out = flash_attn_func(q, q, q)
    out + 1

print(reported(ordered), reported(unordered_pytorch), reported(unordered_read),
      reported(unordered_write))
"""


def test_the_sanitizer_has_nothing_to_report() -> None:
    """Nothing where streams are ordered; each race that the calls themselves could hide."""
    assert child(_SANITIZED, TORCH_CUDA_SANITIZER="1") == "False True True True"


# Determinism --------------------------------------------------------------------------------------

_DIGESTS = """
torch.use_deterministic_algorithms(True)
for name, make in runtime.CALLS.items():
    torch.manual_seed(1)
    digest = hashlib.sha256()
    for x in make(DEVICE)():
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    print(name, digest.hexdigest())
"""


def _digests(device: str) -> list[str]:
    return child(_DIGESTS.replace("DEVICE", repr(device))).splitlines()


@pytest.fixture(scope="module")
def digests() -> list[str]:
    return _digests("cuda:0")


def test_processes_agree_bit_for_bit(digests: list[str]) -> None:
    assert len(digests) >= 8
    assert len(set(digests)) == len(digests)
    assert _digests("cuda:0") == digests


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
def test_gpus_of_one_model_agree_bit_for_bit(digests: list[str]) -> None:
    names = {torch.cuda.get_device_name(index) for index in range(2)}
    if len(names) > 1:
        pytest.skip(f"needs two GPUs of one model, found {', '.join(sorted(names))}")
    assert _digests("cuda:1") == digests


# What a first launch needs ------------------------------------------------------------------------

_FIRST_LAUNCH = """
from flash_attn.errors import ToolchainError
q = torch.rand(1, 64, 2, 64, device="cuda").half()
try:
    flash_attn_func(q, q, q)
except ToolchainError as error:
    print(error)
"""


def test_no_compiler_is_said_in_one_message(tmp_path: Path) -> None:
    found = child(_FIRST_LAUNCH, PATH=str(tmp_path), CC=None, TRITON_CACHE_DIR=str(tmp_path))
    assert found.startswith("no C compiler: CC is not set, and PATH has no gcc or clang.")


def test_with_a_warm_cache_no_compiler_is_needed(tmp_path: Path) -> None:
    code = _FIRST_LAUNCH + "print(float(flash_attn_func(q, q, q).isfinite().all()))"
    cache, path = str(tmp_path / "cache"), tmp_path / "bin"
    path.mkdir()
    # Triton's cache is one of the platform, which Python describes with the help of `file`.
    if (file := shutil.which("file")) is not None:
        (path / "file").symlink_to(file)
    assert child(code, TRITON_CACHE_DIR=cache) == "1.0"
    assert child(code, TRITON_CACHE_DIR=cache, PATH=str(path), CC=None) == "1.0"


_CAPTURED_COLD = """
q = torch.rand(1, 64, 2, 64, device="cuda").half()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        try:
            out = flash_attn_func(q, q, q)
        except RuntimeError as error:
            print("refused:", error)
            raise
except RuntimeError:
    pass
else:
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, flash_attn_func(q, q, q))
    print("captured")
"""


def test_a_call_that_was_never_compiled_is_captured_or_refused_by_name(tmp_path: Path) -> None:
    found = child(_CAPTURED_COLD, TRITON_CACHE_DIR=str(tmp_path))
    assert found == "captured" or (found.startswith("refused:") and "before capturing" in found)
