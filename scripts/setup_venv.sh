#!/usr/bin/env bash
# Sets up a virtual environment for this checkout; running it again only adds what is missing.
#
#   scripts/setup_venv.sh .venv            tests, checks and the demo
#   scripts/setup_venv.sh .venv-newest     the compile tests under the newest Triton
#   PYTHON=.venv/bin/python scripts/setup_venv.sh .venv-clients    laid over the first
#
# Where the base interpreter has PyTorch (a GPU image, perhaps without a network), .venv is laid
# over it: nothing that it has is installed again, and what cannot be installed is only named.
# PYTHON chooses the base interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${1:-.venv}
base=${PYTHON:-python3}
python=$venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*"; }

has_gpu() { [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; }

pip_install() { "$python" -m pip install --quiet "$@"; }

# The requirements of the extras test, dev and demo, and einops: one to a line. With "missing", only
# those that no installed distribution answers to.
requirements() {
    "$python" - "$@" <<'END'
import re
import sys
from importlib import metadata

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
for requirement in ["einops", *extras["test"], *extras["dev"], *extras["demo"]]:
    try:
        metadata.distribution(re.match(r"[\w.-]+", requirement)[0])
        found = True
    except metadata.PackageNotFoundError:
        found = False
    if not (found and "missing" in sys.argv):
        print(requirement)
END
}

install_package() {
    # Without isolation the build needs no download: setuptools is among the requirements.
    pip_install --no-deps --no-build-isolation -e . -e packages/flash-attn-3
}

over_base_torch() {
    say "$venv over $("$base" -c 'import sys, torch; print(sys.prefix, "with PyTorch", torch.__version__)')"
    # pip comes from the base, which may lack the files that venv would copy.
    "$base" -m venv --system-site-packages --without-pip "$venv"
    if ! "$python" -c 'import torch' >/dev/null 2>&1; then
        # The base is itself a virtual environment, whose packages are not the system's.
        "$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    fi
    local missing
    mapfile -t missing < <(requirements missing)
    if [ ${#missing[@]} -gt 0 ]; then
        say "the base has no ${missing[*]}"
        pip_install --retries 0 --timeout 10 "${missing[@]}" 2>/dev/null ||
            say "these could not be installed; what needs them is left out"
    fi
    install_package 2>/dev/null || say "package not installed; it is used from src/"
    touch "$venv/over-base-torch"
}

with_own_torch() {
    say "$venv with its own PyTorch (a few minutes)"
    "$base" -m venv "$venv"
    local extras
    if has_gpu; then
        pip_install torch
    else
        # The interpreter of Triton 3.6 needs a NumPy older than 2.4. A PyTorch wheel may demand
        # another Triton: a step of its own puts this one in its place.
        pip_install torch==2.13.0 'numpy==2.3.5; python_version >= "3.11"' \
            'numpy<2.3; python_version < "3.11"'
        pip_install triton==3.6.0
    fi
    mapfile -t extras < <(requirements)
    pip_install "${extras[@]}"
    install_package
}

with_newest_triton() {
    say "$venv with the newest Triton (a few minutes)"
    "$base" -m venv "$venv"
    pip_install torch==2.13.0 numpy einops hypothesis 'pytest>=8' 'pytest-xdist>=3.2' pytest-timeout
    pip_install triton==3.9.0
}

if [ "$(basename "$venv")" = .venv-newest ]; then
    with_newest_triton
elif "$base" -c 'import torch' >/dev/null 2>&1; then
    over_base_torch
else
    with_own_torch
fi
touch "$venv/stamp"
