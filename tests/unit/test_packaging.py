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


def build(root, names, tmp_path_factory):
    """Build from a copy: the working tree gets no build folders."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in names:
        if (root / name).is_dir():
            shutil.copytree(root / name, source / name, ignore=ignored)
        else:
            shutil.copy(root / name, source)
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


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # All that lies beside it in the repository, so that what does not belong in it could get in.
    names = ("pyproject.toml", "README.md", "LICENSE", "src", "tests", "packages")
    return build(ROOT, names, tmp_path_factory)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The wheel of the distribution flash-attn-3."""
    names = ("pyproject.toml", "README.md", "LICENSE", "src")
    return build(ROOT / "packages" / "flash-attn-3", names, tmp_path_factory)


@pytest.fixture(scope="module")
def files(wheel):
    return contents(wheel)


@pytest.fixture(scope="module")
def second_files(second):
    return contents(second)


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
print(importlib.util.find_spec("flash_attn.cute"))
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
        "None",  # what others take for FlashAttention 4
    ]


# The second distribution.


def test_the_second_holds_the_modules_and_no_more(second, second_files):
    assert second.name == "flash_attn_3-3.0.0-py3-none-any.whl"
    assert {name for name in second_files if ".dist-info/" not in name} == {
        "flash_attn_interface.py",
        "flash_attn_config.py",
        "flash_attn_3/__init__.py",
        "flash_attn_3/_C.py",
        "flash_attn_3/flash_attn_interface.py",
        "flash_attn_3/flash_attn_config.py",
    }


def test_the_metadata_of_the_second(second_files):
    info = "flash_attn_3-3.0.0.dist-info"
    metadata = message_from_string(second_files[f"{info}/METADATA"].decode())
    assert metadata["Name"] == "flash-attn-3"
    assert metadata["Version"] == "3.0.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata.get_all("Requires-Dist") == [f"flash-attn=={flash_attn.__version__}"]
    assert f"{info}/licenses/LICENSE" in second_files
    licence = (ROOT / "LICENSE").read_bytes()
    assert second_files[f"{info}/licenses/LICENSE"] == licence


def test_the_second_names_its_top_level_modules(second_files):
    text = second_files["flash_attn_3-3.0.0.dist-info/top_level.txt"].decode()
    assert sorted(text.split()) == ["flash_attn_3", "flash_attn_config", "flash_attn_interface"]


@pytest.mark.parametrize(
    "name", ["flash_attn_interface.py", "flash_attn_3/flash_attn_interface.py"]
)
def test_the_second_only_re_exports(second_files, name):
    tree = ast.parse(second_files[name])
    assert not [x for x in ast.walk(tree) if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    sources = {x.module for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}
    assert sources <= {"flash_attn", "flash_attn.hopper_interface", "flash_attn_interface"}


@pytest.fixture(scope="module")
def site(wheel, second, tmp_path_factory):
    """Both wheels as pip installs them, into a folder of their own."""
    target = tmp_path_factory.mktemp("site")
    pytest.importorskip("pip")
    options = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), wheel, second],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return target


# How programs find an implementation, written from what their checks ask for.
_CHECKS = """
import importlib.metadata as metadata
import inspect
from importlib.util import find_spec

import torch

torch.cuda.is_available = lambda: True  # asked by all of them, answered no by this machine


def version(name):
    return tuple(int(part) for part in metadata.version(name).split(".")[:3])


def owned(module, distribution):
    owners = metadata.packages_distributions().get(module, [])
    return distribution in [owner.replace("_", "-") for owner in owners]


def transformers():
    gpu = torch.cuda.is_available()
    second = owned("flash_attn", "flash-attn") and version("flash_attn") >= (2, 3, 3) and gpu
    third = find_spec("flash_attn_interface") and owned("flash_attn_interface", "flash-attn-3")
    fourth = owned("flash_attn", "flash-attn-4")
    from flash_attn import flash_attn_func
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
    from flash_attn_interface import flash_attn_with_kvcache
    sends = [name in inspect.signature(flash_attn_varlen_func).parameters for name in
             ("s_aux", "softcap", "window_size", "deterministic", "dropout_p")]
    return second, bool(third and gpu), fourth, sends


def diffusers():
    second = version("flash_attn") >= (2, 6, 3)
    third = find_spec("flash_attn_3") is not None and metadata.version("flash_attn_3")
    from flash_attn.flash_attn_interface import _wrapped_flash_attn_forward
    return second, third


def xformers():
    import flash_attn
    found = tuple(int(part) for part in flash_attn.__version__.split("."))
    second = (2, 7, 1) <= found <= (2, 8, 4) and hasattr(
        flash_attn.flash_attn_interface, "flash_attn_gpu"
    )
    third = find_spec("flash_attn_3") is not None and find_spec("flash_attn_3._C") is not None
    import flash_attn_3._C
    wanted = torch._C.parse_schema(
        "flash_attn_3::bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
        "Tensor softmax_lse, Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None) -> "
        "(Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    schema = torch.ops.flash_attn_3.bwd.default._schema
    return second, third, schema.is_backward_compatible_with(wanted)


def megatron():
    from flash_attn_3.flash_attn_interface import _flash_attn_forward, flash_attn_with_kvcache
    names = inspect.signature(_flash_attn_forward).parameters
    return all(name in names for name in ("page_table", "kv_batch_idx", "leftpad_k", "sm_margin"))


def transformer_engine():
    import flash_attn_2_cuda
    from flash_attn_interface import _flash_attn_backward, _flash_attn_forward, flash_attn_func
    limits = (2, 1, 1) <= version("flash-attn") < (2, 8, 4)
    return limits, metadata.version("flash-attn-3"), hasattr(flash_attn_2_cuda, "varlen_bwd")


for check in (transformers, diffusers, xformers, megatron, transformer_engine):
    print(check.__name__, check())
import flash_attn, flash_attn_3, flash_attn_interface, sys
print(all(x.__file__.startswith(sys.argv[1]) for x in
          (flash_attn, flash_attn_3, flash_attn_interface)), flash_attn_3.__version__)
print(tuple(flash_attn_interface.flash_attn_func(*torch.randn(3, 1, 4, 2, 8)).shape))
"""


def test_installed_both_are_found(site, tmp_path):
    """Hugging Face's, diffusers', xFormers', Megatron's and Transformer Engine's questions.

    The checks above are written from a description of what those libraries ask, not run from their
    sources, and the answer of ``torch.cuda.is_available`` is faked: an empty environment with
    PyTorch of its own would take minutes to fill. The two wheels are installed by pip into a folder
    that stands first on the path; only PyTorch comes from the environment of the tests.
    """
    kept = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _CHECKS, str(site)],
        env=kept | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "transformers (True, True, False, [True, True, True, True, False])",
        "diffusers (True, '3.0.0')",
        "xformers (True, True, True)",
        "megatron True",
        "transformer_engine (True, '3.0.0', True)",
        "True 3.0.0",
        "(1, 4, 2, 8)",
    ]


def test_without_the_second_there_is_no_third_generation(wheel, tmp_path):
    """The main wheel alone must not be taken for FlashAttention-3."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = """
import sys
from importlib.util import find_spec
sys.path.insert(0, sys.argv[1])
print([find_spec(name) for name in ("flash_attn_interface", "flash_attn_3", "flash_attn_config")])
"""
    # Without site packages: the environment may have the second distribution installed.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(site)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.splitlines() == ["[None, None, None]"]
