"""What every result file says of itself, and how it is written."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
# What is measured must be what the source hash names, not an installed distribution.
sys.path.insert(0, str(REPOSITORY / "src"))

SCHEMA = 1


def source_hash(root: Path = REPOSITORY) -> str:
    """The first 16 digits of a SHA-256 over names and contents of every Python file of src/."""
    digest = hashlib.sha256()
    for path in sorted((root / "src").rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def git_commit(root: Path = REPOSITORY) -> str:
    """The commit of the checkout, with ``-dirty`` if src/ differs from it; else ``unknown``."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown"
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--short", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return text.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def environment(commit: str | None = None) -> dict[str, str]:
    """What a figure depends on besides the code, and which code it was."""
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "none"
    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "driver": _driver() if has_gpu else "none",
        "torch": str(torch.__version__),
        "triton": triton_version,
        "cuda": str(torch.version.cuda or torch.version.hip or "none"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or git_commit(),
        "source": source_hash(),
    }


def new_result(benchmark: str, commit: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The head of a result file, to which a benchmark adds what it measures."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "environment": environment(commit),
        "settings": settings,
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write ``data`` so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(data, indent=1) + "\n")
    draft.replace(path)


def describe(error: BaseException) -> str:
    """One line for a record: the type and the beginning of the message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
