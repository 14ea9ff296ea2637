"""Triton's interpreter, made to prepare its language once for a launch.

To interpret, Triton puts functions of its own in place of those of ``triton.language``. It does so
when a kernel is launched, and again at every call of a device function, of which a program makes
hundreds: about half of the interpreter's time. What is there already is put there no second time.
Installed for all tests that run in the interpreter.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _modules(function: Any) -> frozenset[str]:
    """The modules of the language that a function sees, which are those that it needs prepared."""
    members = filter(inspect.ismodule, function.__globals__.values())
    return frozenset(x.__name__ for x in members if x in (tl, tl.core))


def install() -> None:
    """Prepare the language once for each launch from now on."""
    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[str] = set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()  # a launch puts back what it replaced when it ends
        return launch(self, *args, **kwargs)

    def prepared_once(function: Any) -> Any:
        modules = _modules(function)
        if modules and modules <= prepared:
            return None  # what to put back is asked for by launches alone, which find none prepared
        prepared.update(modules)
        return prepare(function)

    interpreter.GridExecutor.__call__ = launched
    interpreter._patch_lang = prepared_once
