"""Importing the package is light, quiet, and possible without Triton. In new interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"


def run(code, *options, **environment):
    """Standard output of ``code`` in a new interpreter."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FLASH_ATT")}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env=kept | {"PYTHONPATH": str(SRC)} | environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


# A finder in front of all others; blocked modules fail to import like absent ones.
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def test_the_import_loads_only_torch():
    heavy = "triton", "flag_gems", "einops", "numpy", "transformers", "torch._inductor"
    code = f"""
import sys, torch
before = set(sys.modules)
import flash_attn, flash_attn_2_cuda
loaded = set(sys.modules) - before
print([name for name in {heavy} if name in loaded])
print(sorted(name for name in loaded if name.startswith("flash_attn.")
             and name.split(".")[1] in ("kernels", "modules", "layers", "ops", "losses")))
print("triton" in sys.modules and "triton" not in before)
"""
    assert run(code).splitlines() == ["[]", "[]", "False"]


def test_the_hopper_backward_is_loaded_with_the_first_gradient():
    """A kernel module takes tens of milliseconds, which inference has no use for."""
    code = """
import sys
from flash_attn.backends import sm90
print("flash_attn.kernels.sm90_forward" in sys.modules)
print([name for name in sys.modules if name.startswith("flash_attn.kernels.sm90_backward")])
print(sm90._gradients().__name__, "flash_attn.kernels.sm90_backward" in sys.modules)
"""
    backward = "flash_attn.backends.sm90.launch_backward"
    assert run(code).splitlines() == ["True", "[]", f"{backward} True"]


def test_the_import_starts_nothing():
    code = """
import os, subprocess, sys, threading, torch
def refuse(*args, **kwargs):
    raise SystemExit(f"started {args}")
subprocess.Popen.__init__ = os.system = os.fork = os.popen = refuse
threads = threading.active_count()
environment = dict(os.environ)
def audit(event, args):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect"):
        raise SystemExit(f"{event} {args}")
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        if not str(args[0]).endswith(".pyc") and "__pycache__" not in str(args[0]):
            raise SystemExit(f"wrote {args[0]}")
sys.addaudithook(audit)
import flash_attn
assert threading.active_count() == threads
assert dict(os.environ) == environment
assert not torch.cuda.is_initialized()
import logging
assert logging.getLogger("flash_attn").handlers == []
assert logging.getLogger().handlers == []
print("quiet")
"""
    assert run(code, "-W", "error::UserWarning:flash_attn") == "quiet"


def test_the_import_is_fast():
    code = """
import time, torch
start = time.perf_counter()
import flash_attn
print(time.perf_counter() - start)
"""
    # A tenth of this on an idle core; the best of three because machines are busy.
    assert min(float(run(code)) for _ in range(3)) < 1.0


CALLS = """
import torch, flash_attn
q = torch.randn(1, 6, 2, 16, requires_grad=True)
k, v = torch.randn(2, 1, 6, 2, 16)
for options in ({}, {"causal": True}, {"softcap": 2.0, "window_size": (2, 1)}):
    flash_attn.flash_attn_func(q, k, v, **options).sum().backward()
cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
flat = [x.detach().flatten(0, 1) for x in (q, k, v)]
flash_attn.flash_attn_varlen_func(*flat, cu_seqlens, cu_seqlens, 4, 4)
rotary = {"rotary_cos": torch.ones(6, 8), "rotary_sin": torch.zeros(6, 8)}
flash_attn.flash_attn_with_kvcache(
    q.detach()[:, :1], k, v, k[:, :1], v[:, :1], cache_seqlens=3, causal=True, **rotary
)
assert q.grad is not None
"""


def test_cpu_tensors_work_without_triton():
    code = BLOCK.format(names={"triton", "flag_gems"}) + CALLS + "print('done')"
    assert run(code) == "done"


def test_cpu_tensors_work_without_einops():
    assert run(BLOCK.format(names={"einops"}) + CALLS + "print('done')") == "done"


def test_without_triton_the_triton_backend_says_so():
    code = BLOCK.format(names={"triton"}) + (
        """
import torch, flash_attn
flash_attn.set_backend("triton")
try:
    flash_attn.flash_attn_func(*torch.zeros(3, 1, 2, 1, 8))
except ImportError as error:
    assert isinstance(error, RuntimeError)
    print(error)
"""
    )
    assert "triton" in run(code)


@pytest.mark.parametrize("choose", ["flash_attn.set_backend", "flash_attn.use_backend"])
def test_a_missing_library_is_an_import_error(choose):
    code = BLOCK.format(names={"flag_gems"}) + (
        f"""
import flash_attn
try:
    with_block = {choose}("flag_gems")
    with with_block:
        pass
except ImportError as error:
    print(error)
"""
    )
    text = run(code)
    assert "flag_gems" in text
    assert "ModuleNotFoundError" in text


@pytest.mark.parametrize("value", [None, "TRUE", "FALSE"])
def test_the_default_never_raises_without_libraries(value):
    environment = {} if value is None else {"FLASH_ATTENTION_USE_FLAGGEMS": value}
    code = BLOCK.format(names={"triton", "flag_gems"}) + CALLS + "print('done')"
    assert run(code, "-W", "ignore::RuntimeWarning", **environment) == "done"


def test_a_fork_after_the_import_works():
    code = (
        """
import os, sys, torch
torch.set_num_threads(1)
"""
        + CALLS
        + """
child = os.fork()
if child == 0:
    flash_attn.flash_attn_func(q, k, v, causal=True).sum().backward()
    os._exit(17)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    assert run(code) == "17"


def test_a_fresh_thread_can_be_the_first_to_call():
    code = """
import threading, torch, flash_attn
q = torch.randn(1, 4, 1, 8, requires_grad=True)
worker = threading.Thread(target=lambda: flash_attn.flash_attn_func(q, q, q).sum().backward())
worker.start(); worker.join()
print(q.grad.shape)
"""
    assert run(code) == "torch.Size([1, 4, 1, 8])"
