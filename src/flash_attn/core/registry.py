"""Which backend computes a problem, chosen by reasons and never silently.

A backend says why it cannot serve a problem as a list of sentences; an empty list means that it
can. The same sentences choose the backend, fill the error message and explain skipped tests.

Precedence: :func:`use_backend` over :func:`set_backend` over ``FLASH_ATTENTION_USE_FLAGGEMS``.
The choice is a plain module global: it holds for all threads, so that the backward pass, which
PyTorch runs in a thread of its own, sees the same one.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .. import settings
from ..errors import BackendUnavailableError, ConstraintError, UnsupportedProblemError
from .problem import AttentionProblem, AttentionResult, BackwardInputs

logger = logging.getLogger("flash_attn")


class Backend(Protocol):
    """What computes attention problems."""

    name: str

    def unsupported(self, problem: AttentionProblem, backward: bool) -> list[str]:
        """Why this backend cannot compute ``problem``; empty if it can."""

    def forward(self, problem: AttentionProblem, out: Tensor | None = None) -> AttentionResult:
        """Solve ``problem``, into ``out`` if it is given."""

    def backward(self, problem: AttentionProblem, inputs: BackwardInputs) -> Tensor:
        """Write the gradients in place and return softmax_d."""


class CacheWriter(Protocol):
    """What a backend needs besides, to serve KV caches."""

    def rotate(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        seqlen_offsets: int | Tensor,
        interleaved: bool,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Rotary embedding of (batch, seqlen, nheads, headdim), or with ``cu_seqlens`` of packed
        (total, nheads, headdim), into a new tensor."""

    def append_kv(
        self,
        problem: AttentionProblem,
        k_new: Tensor,
        v_new: Tensor,
        at: Tensor,
        cu_seqlens_new: Tensor | None = None,
    ) -> None:
        """Write new rows, dense or packed, into the problem's caches, sequence b's from row
        ``at[b]`` on."""


# Name -> where its object lives. Loaded on first use: importing flash_attn loads torch alone.
_LOCATIONS = {
    "triton": "flash_attn.backends.triton",
    "sm90": "flash_attn.backends.sm90",
    "cuda": "flash_attn.backends.cuda",
    "flag_gems": "flash_attn.backends.flag_gems",
    "cpu": "flash_attn.backends.cpu",
    "reference": "flash_attn.backends.reference",
}
# The families of our own kernels, best first: what "auto" and USE_FLAGGEMS=TRUE choose from. "sm90"
# is chosen by name alone.
_OWN = ("triton", "cpu")
AUTO = "auto"

_loaded: dict[str, Backend] = {}
_failures: dict[str, str] = {}
_process_choice = AUTO
_context_choice: list[str] = []
_warned_fallback = False


def backend_names() -> list[str]:
    """Every name that :func:`set_backend` accepts, besides "auto"."""
    return list(_LOCATIONS)


def load(name: str) -> Backend:
    """The backend object called ``name``.

    Raises:
        BackendUnavailableError: the library behind it is missing or broken.
    """
    if name in _loaded:
        return _loaded[name]
    try:
        backend: Backend = importlib.import_module(_LOCATIONS[name]).BACKEND
    except Exception as error:  # third-party libraries fail to import in every way there is
        _failures[name] = f"cannot be loaded ({type(error).__name__}: {error})"
        raise BackendUnavailableError(f"backend {name!r} {_failures[name]}") from error
    _loaded[name] = backend
    return backend


def _check_name(name: str) -> str:
    if name != AUTO and name not in _LOCATIONS:
        known = ", ".join([AUTO, *_LOCATIONS])
        raise ConstraintError(f"`name` must be one of {known}, found {name!r}")
    if name == "flag_gems":
        load(name)  # a missing library is reported where it is asked for
    return name


def set_backend(name: str) -> None:
    """Choose the backend of every later call in this process.

    Args:
        name: "auto" (the default: our own kernels, by device, unless the environment says
            otherwise), "triton", "sm90", "cuda", "flag_gems", "cpu" or "reference". A named
            backend is used or an error says why it cannot be: there is no fallback from it.

    Raises:
        ConstraintError: no backend has that name.
        BackendUnavailableError: FlagGems was asked for and cannot be loaded.
    """
    global _process_choice
    _process_choice = _check_name(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block; the innermost block wins.

    A backward pass uses the choice that holds when it runs, so run it inside the block too.
    Arguments and errors are those of :func:`set_backend`.
    """
    _context_choice.append(_check_name(name))
    try:
        yield
    finally:
        _context_choice.pop()


def choice() -> tuple[str, bool]:
    """What :func:`select` depends on besides the problem: a name, and what the environment says
    where none is named."""
    name = _context_choice[-1] if _context_choice else _process_choice
    return (name, name != AUTO or settings.use_flaggems())


def is_loaded(backend: Backend) -> bool:
    """Whether ``backend`` is what its name stands for."""
    return _loaded.get(backend.name) is backend


def _reasons(name: str, problem: AttentionProblem, backward: bool) -> list[str]:
    try:
        backend = load(name)
    except BackendUnavailableError:
        return [_failures[name]]
    return backend.unsupported(problem, backward)


def _refuse(problem: AttentionProblem, names: list[str], backward: bool) -> UnsupportedProblemError:
    what = "the backward pass of" if backward else "the forward pass of"
    lines = [f"no permitted backend computes {what} this problem: {problem.describe()}"]
    for name in names:
        lines += [f"  {name}: {reason}" for reason in _reasons(name, problem, backward)]
    lines.append("  choose another with flash_attn.set_backend(...) or change what is named above")
    return UnsupportedProblemError("\n".join(lines))


def select(problem: AttentionProblem, backward: bool = False) -> Backend:
    """The backend for ``problem``.

    Raises:
        UnsupportedProblemError: no permitted backend can; the text lists everyone's reasons.
    """
    choice = _context_choice[-1] if _context_choice else _process_choice
    if choice != AUTO:
        if choice not in _loaded:
            load(choice)
        if _reasons(choice, problem, backward):
            raise _refuse(problem, [choice], backward)
        return _loaded[choice]
    if not settings.use_flaggems():
        reasons = _reasons("cuda", problem, backward)
        if not reasons:
            return _loaded["cuda"]
        _warn_fallback(reasons)
    for name in _OWN:
        if not _reasons(name, problem, backward):
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("backend %s for %s", name, problem.describe())
            return _loaded[name]
    raise _refuse(problem, list(_OWN), backward)


def _warn_fallback(reasons: list[str]) -> None:
    """Say once per process that the original CUDA kernels were asked for and cannot serve."""
    global _warned_fallback
    if _warned_fallback:
        return
    _warned_fallback = True
    warnings.warn(
        "FLASH_ATTENTION_USE_FLAGGEMS=FALSE asks for the original CUDA kernels, which cannot "
        f"compute this call ({'; '.join(reasons)}); our own kernels are used instead",
        RuntimeWarning,
        stacklevel=4,
    )


def cache_writer(device: torch.device) -> CacheWriter:
    """The backend that appends to KV caches and rotates: ours for the device, whoever attends."""
    return load("cpu" if device.type == "cpu" else "triton")  # type: ignore[return-value]
