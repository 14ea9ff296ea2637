"""What to do where Triton cannot build a kernel: one message in place of a compiler's traceback.

On its first launch on a machine Triton builds small C extensions, for which it needs a C compiler
and Python's headers; it keeps them in its cache. ptxas, which turns kernels into machine code,
comes with Triton and knows the GPUs of its day.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from ..errors import ToolchainError

_P = ParamSpec("_P")
_R = TypeVar("_R")

_PURPOSE = (
    "On first use Triton builds the C code that launches kernels and keeps it in its cache "
    "(TRITON_CACHE_DIR, by default ~/.triton/cache)."
)
_INSTALL = (
    "Install one (Debian, Ubuntu: apt-get install gcc; Fedora: dnf install gcc; conda: conda "
    "install -c conda-forge gcc), or name one in the environment variable CC."
)


def explains_toolchain(launch: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function that launches kernels.

    Where ``launch`` fails because a program or file that Triton compiles with is missing or too
    old, or because a CUDA graph is being captured, the error is a
    :class:`~flash_attn.errors.ToolchainError` that says what to do.
    """

    @wraps(launch)
    def launched(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return launch(*args, **kwargs)
        except Exception as error:
            text = explanation(error)
            if text is None:
                raise
            raise ToolchainError(text) from error

    return launched


def explanation(error: Exception) -> str | None:
    """What is missing and how to get it, or None if ``error`` has another cause."""
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith("Triton Error") and "captur" in text:
        return (
            "a kernel was to be loaded while a CUDA graph was being captured, which CUDA does not "
            "permit. Call the function once with such arguments before capturing."
        )
    if isinstance(error, RuntimeError) and "Failed to find C compiler" in text:
        return f"no C compiler: CC is not set, and PATH has no gcc or clang. {_PURPOSE} {_INSTALL}"
    if isinstance(error, OSError):
        return _unusable_compiler(error)
    if isinstance(error, subprocess.CalledProcessError):
        return _failed_compiler(error)
    if type(error).__name__ == "PTXASError":
        return _old_assembler(text)
    return None


def _unusable_compiler(error: OSError) -> str | None:
    """The program that CC names cannot be started."""
    compiler = os.environ.get("CC")
    if compiler is None or error.filename != compiler:
        return None
    return (
        f"no C compiler: CC is {compiler!r}, which cannot be run ({error.strerror}). Triton takes "
        f"the whole of CC as one program's name, without options. {_PURPOSE} {_INSTALL}"
    )


def _failed_compiler(error: subprocess.CalledProcessError) -> str | None:
    """The C compiler ran, and did not like what it got."""
    command = error.cmd if isinstance(error.cmd, list) else []
    if "-shared" not in command:
        return None
    folders = [part[2:] for part in command if part.startswith("-I")]
    if any((Path(folder) / "Python.h").is_file() for folder in folders):
        return (
            f"the C compiler {command[0]!r} failed with status {error.returncode}; what it "
            f"complained about is printed above. {_PURPOSE} Its command was: {' '.join(command)}"
        )
    return (
        f"Python's headers are missing: there is no Python.h in {', '.join(folders)}. {_PURPOSE} "
        "Install them (Debian, Ubuntu: apt-get install python3-dev, or python3.X-dev for another "
        "version; Fedora: dnf install python3-devel), or use a Python that brings them along "
        "(conda, uv, python.org)."
    )


def _old_assembler(text: str) -> str | None:
    """ptxas does not know the GPU or the language that Triton speaks."""
    unknown_gpu = "gpu-name" in text and "not defined" in text
    if not unknown_gpu and "Unsupported .version" not in text:
        return None
    named = [name for name in os.environ if name.startswith("TRITON_PTXAS")]
    using = ", ".join(f"{name}={os.environ[name]}" for name in named) or "the one Triton ships"
    lines = [line.strip() for line in text.splitlines() if "fatal" in line or "error" in line]
    return (
        f"ptxas ({using}) is too old for this GPU or this Triton: {'; '.join(lines) or text}. Use "
        "a newer Triton, or name the ptxas of a newer CUDA toolkit in TRITON_PTXAS_PATH "
        "(Blackwell: TRITON_PTXAS_BLACKWELL_PATH)."
    )
