"""Run the checks named on the command line: ``lint``, ``unit``, ``gpu``; stop at the first failure.

In an environment that borrows another Python's packages a tool may be missing; it is then named
and left out. In any other environment a missing tool is a failure.
"""
# ruff: noqa: T201

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def borrows_packages() -> bool:
    """Whether this environment sees another Python's packages."""
    settings = Path(sys.prefix) / "pyvenv.cfg"
    text = settings.read_text().lower() if settings.exists() else ""
    return "include-system-site-packages = true" in text


def installed(module: str) -> bool:
    """Whether ``module`` can be found; without it, a strict environment fails."""
    if importlib.util.find_spec(module) is not None:
        return True
    if not borrows_packages():
        raise SystemExit(f"{module} is not installed: remove the environment and make it again")
    print(f"-- {module} is not installed here: left out", flush=True)
    return False


def run(*command: str, **variables: str) -> None:
    """Run ``command`` in the repository's root and stop everything if it fails."""
    print("$", " ".join(command), flush=True)
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode
    if code:
        raise SystemExit(code)


def configured(table: str) -> bool:
    """Whether pyproject.toml holds ``[table]``."""
    return f"\n[{table}" in (ROOT / "pyproject.toml").read_text()


def lint() -> None:
    """Style, types and import rules."""
    if installed("ruff"):
        run(sys.executable, "-m", "ruff", "check", ".")
    if configured("tool.mypy") and installed("mypy"):
        run(sys.executable, "-m", "mypy")
    if configured("tool.importlinter") and installed("importlinter"):
        run(str(Path(sys.executable).with_name("lint-imports")))


def pytest(marker: str, workers: str) -> None:
    """Run the tests that ``marker`` selects; every worker computes on one thread."""
    options: list[str] = []
    if workers != "0" and installed("xdist"):
        options += ["-n", workers]
    if not installed("pytest_timeout"):
        options += ["-W", "ignore::pytest.PytestConfigWarning"]
    threads = {} if workers == "0" else {"OMP_NUM_THREADS": "1"}
    run(sys.executable, "-m", "pytest", "-m", marker, *options, **threads)


def unit() -> None:
    """Everything that needs no GPU."""
    pytest("not gpu", os.environ.get("TEST_WORKERS", "auto"))


def gpu() -> None:
    """The GPU tests, where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        return
    pytest("gpu", os.environ.get("GPU_TEST_WORKERS", "0"))


CHECKS = {"lint": lint, "unit": unit, "gpu": gpu}


def main() -> None:
    """Run the named checks in order."""
    for name in sys.argv[1:]:
        if name not in CHECKS:
            raise SystemExit(f"checks are {', '.join(CHECKS)}; found {name!r}")
        CHECKS[name]()


if __name__ == "__main__":
    main()
