"""The exceptions of this package; every one of them is a ``RuntimeError`` too."""

from __future__ import annotations


class FlashAttentionError(RuntimeError):
    """Base class of all errors raised on purpose by this package."""


class ConstraintError(FlashAttentionError, AssertionError, ValueError):
    """An argument has a wrong shape, dtype, device, layout or value."""


class UnsupportedProblemError(FlashAttentionError, NotImplementedError):
    """The arguments are meaningful, but no permitted backend computes them."""


class BackendUnavailableError(FlashAttentionError, ImportError):
    """A backend was asked for by name and the library behind it cannot be loaded."""


class KernelCompilationError(FlashAttentionError):
    """This Triton does not compile a backend's kernel.

    Programs see it only from backends that are called directly: the automatic choice goes on to
    another backend, and for one chosen by name it becomes an :class:`UnsupportedProblemError`.
    """


class ToolchainError(FlashAttentionError):
    """Triton cannot compile or load a kernel here: what that needs is missing or not permitted."""
