"""Compiled kernels from Triton's cache, without Triton's hash of its own files.

In Triton's cache a kernel lies under a key that begins with a hash of Triton's own files, its
library of several hundred megabytes among them: 0.2 to 0.4 s of every process that launches a
kernel. :func:`look_up_first` lets one kernel look there for itself. It asks for what Triton would
ask for, by the same key; the hash alone comes from a file in the same cache, where it lies beside
a signature of the files that it was computed from.

Whatever is not found like this, :func:`triton.compile` is asked for as ever: after an unexpected
error, and where kernels are dumped, overridden or instrumented, too. Nothing of Triton's is
replaced for other kernels.

Read against Triton 3.6 to 3.9. Where a version makes its keys another way nothing is found.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from hashlib import sha256
from importlib.machinery import SOURCE_SUFFIXES, all_suffixes
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.compiler import compiler
from triton.runtime import cache

logger = logging.getLogger("flash_attn")

_major, _minor = triton.__version__.split(".")[:2]
KNOWN_VERSION = (3, 6) <= (int(_major), int(_minor)) <= (3, 9)
_FILE_NAME = "triton_key"
_ROOT = os.path.dirname(triton.__file__)
_MODULES, _SOURCES = tuple(all_suffixes()), tuple(SOURCE_SUFFIXES)
# Of an ELF file they hold the first notes, of which one is usually the linker's hash of the whole.
_HEAD_BYTES = 4096


def look_up_first(kernel: Any) -> Any:
    """``kernel``, which from now on looks for itself in Triton's cache before it is compiled.

    In the interpreter, and for a Triton that is not known, it is left as it is.
    """
    caches = getattr(kernel, "device_caches", None)
    if KNOWN_VERSION and isinstance(caches, defaultdict):
        make = caches.default_factory
        if make is not None and not isinstance(make, _Binder):
            caches.default_factory = _Binder(kernel, make)
    return kernel


class _Binder:
    """Makes what a kernel needs for another device: Triton then sets ``kernel.compile``."""

    def __init__(self, kernel: Any, make: Callable[[], Any]) -> None:
        self.kernel, self.make = kernel, make

    def __call__(self) -> Any:
        made = self.make()
        self.kernel.compile = functools.partial(_found_or_compiled, self.kernel.compile)
        return made


def _found_or_compiled(
    compile_it: Callable[..., Any], src: Any, target: Any = None, options: Any = None, **more: Any
) -> Any:
    """:func:`triton.compile`; ``compile_it`` is Triton's own."""
    listener = knobs.compilation.listener
    timer = compiler.CompileTimer() if listener else None
    entry = None if more else _entry(src, target, options)
    if entry is None:
        return compile_it(src, target=target, options=options, **more)
    found, group = compiler.CompiledKernel(src, *entry), entry[0]
    if timer is not None:
        times, metadata = timer.end(), found.metadata._asdict()
        listener(src=src, metadata=metadata, metadata_group=group, times=times, cache_hit=True)
    return found


def _entry(src: Any, target: Any, options: dict[str, Any]) -> tuple[dict[str, str], str] | None:
    """The files and the key of what :func:`triton.compile` would find in the cache, or None."""
    try:
        if _is_watched():
            return None
        backend = compiler.make_backend(target)
        parts = [
            _key_of_files(),
            src.hash(),
            backend.hash(),
            backend.parse_options(dict(options, **src.parse_options())).hash(),
            str(sorted(compiler.get_cache_invalidating_env_vars().items())),
        ]
        key, name = _hash("-".join(parts)), f"{src.name[:150]}.json"
        group = cache.get_cache_manager(key).get_group(name) or {}
        return (group, key) if name in group else None
    except Exception:  # whatever it is, triton.compile knows better
        logger.debug("%s was not looked up in Triton's cache", src.name, exc_info=True)
        return None


def _is_watched() -> bool:
    """Whether something looks at compilation, or changes it in a way that no key tells."""
    compilation = knobs.compilation
    return bool(
        compilation.always_compile
        or compilation.override
        or compilation.dump_ir
        or knobs.runtime.add_stages_inspection_hook
    )


def _key_of_files() -> str:
    """What Triton's ``triton_key`` returns."""
    compute = cache.triton_key
    if not hasattr(compute, "cache_info") or compute.cache_info().currsize:
        return compute()  # this process has it already
    return _kept_key()


@functools.cache
def _kept_key() -> str:
    """The same from our file; where that does not hold it, it is computed and put there."""
    manager = cache.get_cache_manager(_hash(f"flash_attn {triton.__version__} {_ROOT}"))
    signature, path = _signature(), manager.get_file(_FILE_NAME)
    if path is not None:
        text = Path(path).read_text(errors="replace")
        key = text.partition("\n")[2]
        if text == _sealed(signature, key):
            return key
    key = cache.triton_key()
    if signature == _signature():  # nothing was installed meanwhile
        manager.put(_sealed(signature, key), _FILE_NAME, binary=False)
    return key


def _sealed(signature: str, key: str) -> str:
    """The contents of our file."""
    return f"{_hash(f'{signature} {key}')}\n{key}"


def _signature() -> str:
    """Changes with Triton's files: of sources it holds the contents, of libraries what tells them.

    Raises:
        OSError: a file or folder cannot be read.
    """
    found = []
    for folder, folders, names in os.walk(_ROOT, onerror=_raise, followlinks=True):
        if "__pycache__" in folders:
            folders.remove("__pycache__")
        modules = (os.path.join(folder, name) for name in names if name.endswith(_MODULES))
        found += [(path, _traits(path)) for path in modules]
    return _hash(repr(sorted(found)))


def _traits(path: str) -> str:
    """What tells the file at ``path`` from what it was and will be."""
    with open(path, "rb") as file:
        if path.endswith(_SOURCES):
            return sha256(file.read()).hexdigest()
        status = os.fstat(file.fileno())
        times = (status.st_mtime_ns, status.st_ctime_ns)
        return repr((status.st_size, status.st_ino, times, file.read(_HEAD_BYTES)))


def _raise(error: OSError) -> None:
    raise error


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()
