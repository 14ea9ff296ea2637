"""Bounds for Triton's interpreter: a load or store outside the tensors of a launch raises.

The interpreter follows pointers into the process's memory, where most of those that a GPU would
stumble over find something. Installed for all tests that run in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, _get_np_dtype


class _Bounds:
    """Where the storages of the launch in progress begin and end, in order."""

    def __init__(self) -> None:
        self.begin = self.end = np.empty(0, np.uint64)

    def allow(self, arguments: list[Any]) -> None:
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in arguments
            if hasattr(x, "untyped_storage")
        }
        order = sorted(storages)
        self.begin = np.array(order, np.uint64)
        self.end = np.array([at + storages[at] for at in order], np.uint64)

    def check(self, what: str, pointers: Any, mask: Any) -> None:
        itemsize = np.dtype(_get_np_dtype(pointers.get_element_ty())).itemsize
        where = np.asarray(pointers.data)[np.asarray(mask.data).astype(bool)].astype(np.uint64)
        if not where.size:
            return
        index = np.searchsorted(self.begin, where, side="right").astype(np.int64) - 1
        inside = (index >= 0) & (where + np.uint64(itemsize) <= self.end[np.maximum(index, 0)])
        if not inside.all():
            bad = int(where[~inside][0])
            raise IndexError(f"{what} of {itemsize} bytes at {bad:#x}, outside of all tensors")


def install() -> None:
    """Check every access from now on."""
    bounds = _Bounds()
    prepare = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def prepared(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = prepare(self, args, kwargs)
        bounds.allow([*on_host[0], *on_host[1].values()])
        return on_host

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        bounds.check("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        bounds.check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    GridExecutor._init_args_hst = prepared
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
