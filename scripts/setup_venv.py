"""Make the virtual environment that ``make demo`` and ``make test`` run in.

Where the calling Python already has torch (a GPU image, often without network), the environment
sees its packages and only what is missing is installed, as far as that is possible. Elsewhere
everything is installed, with versions pinned so that the CPU run and Triton's interpreter agree.
Only the standard library is used here.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
# The newest versions on which Triton's CPU interpreter and this torch were seen to work together.
TRITON = "triton==3.6.0"
NUMPY = "numpy==2.3.5" if sys.version_info >= (3, 11) else "numpy<2.3"
EXTRAS = ("test", "dev", "demo")
# Requirement name -> module to look for, where the two differ.
_MODULES = {
    "pytest-xdist": "xdist",
    "pytest-timeout": "pytest_timeout",
    "import-linter": "importlinter",
}


def can_import(python: Path | str, module: str) -> bool:
    """Whether ``python`` imports ``module``; a broken installation counts as none."""
    command = [str(python), "-c", f"import {module}"]
    return subprocess.run(command, capture_output=True, cwd=Path(sys.prefix)).returncode == 0


def has_gpu() -> bool:
    """Whether an NVIDIA or AMD driver answers."""
    for tool, argument in (("nvidia-smi", "-L"), ("rocminfo", None)):
        path = shutil.which(tool)
        command = [part for part in (path, argument) if part]
        if path and subprocess.run(command, capture_output=True).returncode == 0:
            return True
    return False


def requirement_lists() -> list[str]:
    """The requirements of the extras named in EXTRAS, from pyproject.toml.

    Read by pattern, because Python 3.10 has no TOML reader.
    """
    text = (ROOT / "pyproject.toml").read_text()
    found: list[str] = []
    for extra in EXTRAS:
        match = re.search(rf"^{extra} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
        if match is None:
            raise SystemExit(f"pyproject.toml has no extra named {extra!r}")
        found += re.findall(r'"([^"]+)"', match.group(1))
    return found


def module_of(requirement: str) -> str:
    """The module that a requirement provides."""
    name = re.split(r"[\s<>=!~;\[]", requirement)[0]
    return _MODULES.get(name, name.replace("-", "_"))


def pip(python: Path, *arguments: str, required: bool = True) -> bool:
    """Run pip; a failure ends the set-up where ``required``."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", *arguments]
    print("pip install", *arguments, flush=True)
    failed = subprocess.run(command, cwd=ROOT).returncode != 0
    if failed and required:
        raise SystemExit(f"pip install {' '.join(arguments)} failed")
    return not failed


def site_packages(python: Path) -> Path:
    """Where ``python`` keeps its packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return Path(answer.stdout.strip())


def install_beside_base(python: Path) -> None:
    """Use the calling Python's packages; what is missing is wished for, not required."""
    if not can_import(python, "torch"):
        # The caller is itself a virtual environment, whose packages are not the system's.
        paths = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        (site_packages(python) / "_base_packages.pth").write_text("\n".join(paths) + "\n")
    online = True
    for requirement in ["einops", *requirement_lists()]:
        if can_import(python, module_of(requirement)):
            continue
        # One failure means no registry: the others would only wait for their time-outs.
        online = online and pip(python, "--retries=0", "--timeout=10", requirement, required=False)
        if not online:
            print(f"without {requirement}: what needs it is left out", flush=True)
    editable = ("-e", ".", "--no-deps", "--no-build-isolation")
    if not pip(python, *editable, required=False):
        (site_packages(python) / "_flash_attn_source.pth").write_text(f"{ROOT / 'src'}\n")
        print("the source folder is used without being installed", flush=True)


def install_everything(python: Path) -> None:
    """Install pinned versions of all that demo and tests use."""
    gpu = has_gpu()
    pip(python, "torch" if gpu else TORCH)
    if sys.platform == "linux" and not can_import(python, "triton"):
        pip(python, TRITON)
    pip(python, NUMPY, "einops", *requirement_lists())
    pip(python, "-e", ".", "--no-deps")


def main() -> None:
    """Make the environment named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    beside = can_import(sys.executable, "torch")
    options = ["--clear", "--system-site-packages"] if beside else ["--clear"]
    subprocess.run([sys.executable, "-m", "venv", *options, str(folder)], check=True)
    python = folder / "bin" / "python"
    if beside:
        install_beside_base(python)
    else:
        install_everything(python)


if __name__ == "__main__":
    main()
