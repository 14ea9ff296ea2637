"""The wheel: one file for all platforms, recognised as flash-attn by those who look."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import flash_attn

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy: the working tree gets no build folders."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    target = tmp_path_factory.mktemp("wheel")
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(target)!r})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="module")
def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_name_says_any_platform(wheel):
    assert wheel.name == "flash_attn-2.8.3-py3-none-any.whl"


def test_it_holds_the_package_and_no_more(files):
    top = {name.partition("/")[0] for name in files}
    assert top == {"flash_attn", "flash_attn_2_cuda.py", "flash_attn-2.8.3.dist-info"}
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*.py")
        if ".egg-info" not in str(path)
    }
    assert {name for name in files if name.endswith(".py")} == sources
    assert "flash_attn/py.typed" in files
    assert not [name for name in files if name.endswith((".so", ".cu", ".pyc"))]


def test_the_oldest_python_can_parse_it(files):
    for name, source in files.items():
        if name.endswith(".py"):
            ast.parse(source, name, feature_version=(3, 10))


def test_its_metadata(files):
    metadata = message_from_string(files["flash_attn-2.8.3.dist-info/METADATA"].decode())
    assert metadata["Name"] == "flash-attn"
    assert metadata["Version"] == flash_attn.__version__ == "2.8.3"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    required = {
        line.split(";")[0].strip()
        for line in metadata.get_all("Requires-Dist")
        if "extra ==" not in line
    }
    assert required == {"torch>=2.10", "einops", "triton>=3.6"}
    assert "flash_attn-2.8.3.dist-info/licenses/LICENSE" in files


def test_it_names_its_top_level_modules(files):
    text = files["flash_attn-2.8.3.dist-info/top_level.txt"].decode()
    assert sorted(text.split()) == ["flash_attn", "flash_attn_2_cuda"]


def test_installed_it_is_found_by_its_module_names(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = """
import importlib.metadata as metadata
owners = metadata.packages_distributions()
print(set(owners["flash_attn"]), set(owners["flash_attn_2_cuda"]), metadata.version("flash_attn"))
import flash_attn, flash_attn_2_cuda, torch
print(flash_attn.__file__.startswith(__import__("sys").argv[1]), flash_attn.__version__)
print(tuple(flash_attn.flash_attn_func(*torch.randn(3, 1, 4, 2, 8)).shape))
import importlib.util
print([importlib.util.find_spec(name) for name in ("flash_attn.cute", "flash_attn_interface")])
"""
    kept = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)],
        env=kept | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "{'flash-attn'} {'flash-attn'} 2.8.3",
        "True 2.8.3",
        "(1, 4, 2, 8)",
        "[None, None]",  # what others take for FlashAttention 4 and 3
    ]
