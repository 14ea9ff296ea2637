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

import logging
from collections.abc import Callable, Sequence
from functools import cache
from itertools import permutations
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import settings
from . import plan, registry
from .problem import AttentionProblem, AttentionResult, BackwardInputs

logger = logging.getLogger("flash_attn")

# PyTorch has no public name for it.
_TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)


class Solve(Protocol):
    """From the call's tensors to its results: (out, softmax_lse), or (softmax_d,)."""

    def __call__(
        self, tensors: Sequence[Tensor], asked: int = 2, addresses: list[int] | None = None
    ) -> tuple[Tensor, ...]:
        """The first ``asked`` results; the others are computed too, but need no memory of their
        own. Who has the tensors' addresses at hand passes them, to be changed."""


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
_cleared = 0  # times


def clear() -> None:
    """Forget all calls."""
    global _cleared
    _cleared += 1
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


def without_tensors(values: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """A problem's values after q, k and v as they stand in a signature, and their tensors."""
    found: list[Tensor] = []
    return _values_of(values, found), found


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
    return known.solve if type(known) is _Known and _is_usable(known.backend) else None


def _is_usable(backend: Any) -> bool:
    return registry.is_loaded(backend) and backend.repeats_now()


# How a call is solved again, and the addresses of its tensors if they were looked at.
Found = tuple[Solve, "list[int] | None"]
# What tells that a call is like one that was found: its guards, :func:`registry.choice`, how often
# everything was forgotten; and what was found.
_Look = tuple[Callable[..., bool], tuple[str, bool], int, Any, Solve]


class Lookout:
    """:func:`find` for calls of always the same values: where tensors are like those before,
    PyTorch's compiled guards tell so in a third of the time that a signature takes.

    They compare class, dispatch keys (device type, negative, inference, with the thread's modes),
    dtype, device index, requires_grad, sizes and strides. Calls that differ in those, as layers of
    several layouts do, would have the guards made anew every time; after some times they are not.

    Args:
        twice: which tensor is one and the same as the one before it, if any; guards, which refuse
            that, are not told.
    """

    MOST = 8

    def __init__(self, twice: int | None = None) -> None:
        self._twice = twice
        self._looks: list[_Look | None] = [None, None]  # by whether q requires a gradient
        self._made = 0

    def find(self, values: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> Found | None:
        """What is found for ``tensors``, q first."""
        look = self._looks[tensors[0].requires_grad]
        if look is None:
            return self._find_and_keep(values, tensors)
        matches, choice, cleared, backend, solve = look
        told = tensors if self._twice is None else self._told(tensors)
        if not matches(*told) or cleared != _cleared or choice != registry.choice():
            return self._find_and_keep(values, tensors)
        addresses, merged = [], 0
        for x in tensors:
            address = x.data_ptr()
            if not address:
                return None
            merged |= address
            addresses.append(address)
        if merged & 15 or settings.CHECK_INDICES or plan.is_overridden():
            return None
        if registry.is_loaded(backend) and backend.repeats_now():
            return solve, addresses
        return None

    def _told(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        twice = self._twice
        return tensors if twice is None else (*tensors[:twice], *tensors[twice + 1 :])

    def _find_and_keep(self, values: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> Found | None:
        signature = signature_of(values, tensors)
        known = None if signature is None else _calls.get(signature)
        if type(known) is not _Known or not _is_usable(known.backend):
            return None
        if self._made < self.MOST:
            self._made += 1
            matches = _matcher(self._told(tensors))
            if matches is not None:
                look = (matches, registry.choice(), _cleared, *known)
                self._looks[tensors[0].requires_grad] = look
        return (known.solve, None)


def _matcher(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Whether others are like ``tensors``; None if PyTorch's guards cannot tell."""
    return _guards(tensors) if _guards_tell(_TensorGuards) else None


def _guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    sizes, strides = ([list(f(x)) for x in tensors] for f in (Tensor.size, Tensor.stride))
    made = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return made.check


@cache
@torch.inference_mode(False)
def _guards_tell(guards: Any) -> bool:
    """Whether PyTorch's guards are what they were: a wrong answer would launch a kernel on memory
    that is not there."""
    # The same tensor twice is never told.
    x, *rest = torch.zeros(3, 2, 2, 4, 2, dtype=torch.float32, device="cpu")
    others = [x[:1], x.transpose(1, 2), x.new_zeros(2, 2, 2, 4).transpose(2, 3), x[..., :1],
              x.half(), x.detach().requires_grad_(), torch._neg_view(x), torch.nn.Parameter(x),
              x.to("meta")]  # fmt: skip
    try:
        matches = _guards((x, *rest))
        found: list[Any] = [matches(*rest, x)]
        found += [matches(*given) for y in others for given in permutations((y, *rest))]
    except (AttributeError, RuntimeError, SystemError, TypeError) as error:
        found = [error]
    if found == [True] + [False] * (6 * len(others)):
        return True
    logger.info("torch %s has no guards, or other ones: %s", torch.__version__, found[0])
    return False


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
