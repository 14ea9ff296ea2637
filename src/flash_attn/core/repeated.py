"""Repeating calls whose like was solved before.

On small tensors the host decides how long a call takes: checks, the choice of a backend, its plan
and the kernels' arguments are worked out anew although only addresses differ from the call before.
All of that depends on a call's *signature* alone: dtypes, shapes, strides and devices of all its
tensors, all other values of the problem, and the backend asked for. The first call of a signature
takes the ordinary way; the second one is recorded by the backend, if that can; later ones are
repeated with other addresses.

A backend takes part by three more methods (:class:`Recorder`). What cannot be repeated, or is not
worth a thought, has no signature: problems with dropout, whose random state is drawn anew; tensors
that do not start at a multiple of 16 bytes, or of a class that is not PyTorch's own; anything
under FLASH_ATTN_CHECK=1 or with plans overridden for tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import settings
from . import plan, registry
from .problem import AttentionProblem, AttentionResult, BackwardInputs


class Solve(Protocol):
    """From the call's tensors to its results: (out, softmax_lse), or (softmax_d,)."""

    def __call__(self, tensors: Sequence[Tensor], asked: int = 2) -> tuple[Tensor, ...]:
        """The first ``asked`` results; the others are computed too, but need no memory of their
        own."""


class Recorder(Protocol):
    """What a backend needs besides, for its calls to be repeated."""

    name: str

    def repeats_now(self) -> bool:
        """Whether calls may be recorded and repeated at the moment."""

    def record_forward(
        self, problem: AttentionProblem, tensors: Sequence[Tensor]
    ) -> tuple[AttentionResult, Solve | None]:
        """Solve ``problem``, and say how to solve it for others in the place of ``tensors``.

        ``tensors`` are those of the problem, each a tensor object of its own. None: these calls
        cannot be repeated.
        """

    def record_backward(
        self, problem: AttentionProblem, inputs: BackwardInputs, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Solve | None]:
        """The same for a backward pass; ``tensors`` end with the inputs, without rng_state."""


class Call(NamedTuple):
    """A call that can be repeated: its signature and its tensors, in the order of the fields."""

    signature: tuple[Any, ...]
    tensors: list[Tensor]


class _Known(NamedTuple):
    backend: Any
    solve: Solve


_CAPACITY = 1024
_SEEN, _ORDINARY = "seen once", "not repeated"
_calls: dict[tuple[Any, ...], _Known | str] = {}
_tensor_free: set[tuple[Any, ...]] = set()  # values known to contain no tensor
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def clear() -> None:
    """Forget all calls."""
    _calls.clear()
    _tensor_free.clear()


def _values_of(rest: tuple[Any, ...], found: list[Tensor]) -> tuple[Any, ...]:
    """``rest`` without its tensors, which go to ``found``."""
    if rest in _tensor_free:
        return rest
    before = len(found)
    values = _without_tensors(rest, found)
    if len(found) == before:
        if len(_tensor_free) >= _CAPACITY:
            _tensor_free.clear()
        _tensor_free.add(rest)
    return values


def _without_tensors(values: tuple[Any, ...], found: list[Tensor]) -> tuple[Any, ...]:
    kept: list[Any] = []
    for x in values:
        if x is None:
            kept.append(None)
        elif isinstance(x, Tensor):
            found.append(x)
            kept.append(Tensor)  # its layout is held beside
        elif isinstance(x, tuple):
            kept.append(_without_tensors(x, found))
        else:
            kept.append(x)
    return tuple(kept)


def _restored(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` with ``tensors``, which are used up from the front, in the place of its own."""
    if isinstance(value, Tensor):
        return tensors.pop(0)
    if isinstance(value, tuple):
        parts = [_restored(x, tensors) for x in value]
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    return value


def identify(problem: AttentionProblem, *more: Tensor) -> Call | None:
    """The call of ``problem`` (a backward pass if ``more`` tensors are given), if it has one."""
    if problem.dropout_p > 0.0 or torch.compiler.is_compiling():
        return None
    tensors: list[Tensor] = [*problem[:3]]
    values = _values_of(problem[3:], tensors)
    tensors += more
    signature = signature_of(values, tensors)
    return None if signature is None else Call(signature, tensors)


def signature_of(values: tuple[Any, ...], tensors: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """From a problem's values after q, k, v, without tensors, and all tensors of the call; None
    for tensors that cannot be told by layout and address, and under the settings above."""
    if settings.CHECK_INDICES or plan.is_overridden():
        return None
    addresses, layouts = 0, [values, registry.choice()]
    try:
        for x in tensors:
            if type(x) not in _PLAIN or x.is_neg():
                return None
            address = x.data_ptr()
            if not address:
                return None
            addresses |= address
            layouts.append((x.shape, x.stride(), x.dtype, x.device))
    except (RuntimeError, NotImplementedError):  # no memory or no strides
        return None
    return None if addresses % 16 else tuple(layouts)


def find(signature: tuple[Any, ...]) -> Solve | None:
    """How calls of this signature are solved again, if that is known and allowed now."""
    known = _calls.get(signature)
    if type(known) is not _Known:
        return None
    backend, solve = known
    if registry.is_loaded(backend) and backend.repeats_now():
        return solve
    return None


def find_plain(values: tuple[Any, ...], tensors: Sequence[Tensor]) -> Solve | None:
    """:func:`find` for a problem of ``values`` after q, k and v, all ``tensors`` being at hand."""
    signature = signature_of(values, tensors)
    return None if signature is None else find(signature)


def forward(call: Call, problem: AttentionProblem, backend: registry.Backend) -> AttentionResult:
    """Solve a call that is not known yet, by ``backend``, which was chosen for it."""
    if not _is_due(call, backend):
        return backend.forward(problem)
    own, tensors = _separated(problem, call)
    recorder: Recorder = backend  # type: ignore[assignment]
    result, solve = recorder.record_forward(own, tensors)
    _remember(call, backend, solve)
    return result


def backward(
    call: Call, problem: AttentionProblem, inputs: BackwardInputs, backend: registry.Backend
) -> Tensor:
    """The same for a backward pass."""
    if not _is_due(call, backend):
        return backend.backward(problem, inputs)
    own, tensors = _separated(problem, call)
    dout, out, lse, dq, dk, dv = tensors[-6:]
    inputs = BackwardInputs(dout, out, lse, dq, dk, dv, inputs.rng_state)
    recorder: Recorder = backend  # type: ignore[assignment]
    softmax_d, solve = recorder.record_backward(own, inputs, tensors)
    _remember(call, backend, solve)
    return softmax_d


def _is_due(call: Call, backend: registry.Backend) -> bool:
    """Whether the call is to be recorded: it is not the first of its kind."""
    known = _calls.get(call.signature)
    if known is None:
        if len(_calls) >= _CAPACITY:
            _calls.clear()
        _calls[call.signature] = _SEEN if hasattr(backend, "record_forward") else _ORDINARY
    return known is _SEEN and backend.repeats_now()  # type: ignore[attr-defined]


def _remember(call: Call, backend: Any, solve: Solve | None) -> None:
    _calls[call.signature] = _ORDINARY if solve is None else _Known(backend, solve)


def _separated(problem: AttentionProblem, call: Call) -> tuple[AttentionProblem, list[Tensor]]:
    """The problem and the call's tensors as objects of their own: a caller's may coincide, as in
    attention of x on x, where those of a later call do not."""
    tensors = [x.detach() for x in call.tensors]
    return _restored(problem, tensors.copy()), tensors
