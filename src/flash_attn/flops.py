"""Operation counts of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Importing this module registers them. ``import flash_attn`` does it by itself where PyTorch's
counter is loaded already; otherwise import this before the counter is made (PyTorch's module loads
Triton, which importing ``flash_attn`` must not do).

Counted are the products of the (query, key) pairs that masks, windows and lengths leave: two for
each pair and head in a forward pass, five in a backward pass, each 2 operations per entry of the
head dim. Lengths on a device are read, which synchronises; of fake and meta tensors every sequence
counts with its bound.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from .core import hopper_ops, ops, problem_ops
from .core.hopper import BackwardArguments, ForwardArguments
from .core.kvcache import CacheUpdate, new_lengths
from .core.masking import count_visible
from .core.problem import AttentionProblem, BackwardInputs
from .core.sequences import sequences


def visible_pairs(problem: AttentionProblem) -> int:
    """How many (query, key) pairs a head of ``problem`` computes, over all sequences."""
    tensors = [x for x in problem.layout if isinstance(x, Tensor)]
    if any(isinstance(x, FakeTensor) or x.is_meta for x in tensors) or not tensors:
        shapes = Counter({(problem.max_seqlen_q, problem.max_seqlen_k): problem.batch_size})
    else:
        shapes = Counter((part.seqlen_q, part.seqlen_k) for part in sequences(problem))
    return sum(
        number * count_visible(seqlen_q, seqlen_k, problem.visibility)
        for (seqlen_q, seqlen_k), number in shapes.items()
    )


def forward_flops(problem: AttentionProblem) -> int:
    """q k^T, qv v^T where there is one, and p v."""
    second = 0 if problem.qv is None else problem.headdim_v
    width = problem.headdim + problem.headdim_v + second
    return 2 * width * problem.nheads * visible_pairs(problem)


def backward_flops(problem: AttentionProblem) -> int:
    """q k^T again, dout v^T, and the products that make dq, dk and dv."""
    width = 3 * problem.headdim + 2 * problem.headdim_v
    return 2 * width * problem.nheads * visible_pairs(problem)


def _arguments(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments in the schema's order, defaults filled in."""
    rest = packet.default._schema.arguments[len(args) :]
    return [*args, *(kwargs.get(x.name, x.default_value) for x in rest)]


_IN_BACKWARD = len(BackwardInputs._fields)
_IN_UPDATE = len(CacheUpdate._fields)


def _with_kvcache(given: list[Any]) -> AttentionProblem:
    update = CacheUpdate(*given[:_IN_UPDATE])
    problem = problem_ops.unflatten(given[_IN_UPDATE:])
    used = problem.layout.seqused_k
    if used is None:
        return problem
    return problem._replace(layout=problem.layout._replace(seqused_k=used + new_lengths(update)))


# Each operator, what problem its arguments describe, and what solving it costs.
_FORMULAS: list[tuple[Any, Any, Any]] = [
    (ops.forward, lambda x: ops.dense_problem(*x), forward_flops),
    (ops.varlen_forward, lambda x: ops.varlen_problem(*x), forward_flops),
    (ops.backward, lambda x: ops.dense_problem(*x[1:4], *x[9:16]), backward_flops),
    (ops.varlen_backward, lambda x: ops.varlen_problem(*x[1:4], *x[9:20]), backward_flops),
    (problem_ops.forward, problem_ops.unflatten, forward_flops),
    (problem_ops.traced_forward, problem_ops.unflatten, forward_flops),
    (problem_ops.backward, lambda x: problem_ops.unflatten(x[_IN_BACKWARD:]), backward_flops),
    (problem_ops.with_kvcache, _with_kvcache, forward_flops),
    (hopper_ops.forward, lambda x: ForwardArguments(*x).problem(), forward_flops),
    (hopper_ops.backward, lambda x: BackwardArguments(*x).problem(), backward_flops),
]


def _register(packet: Any, problem: Any, flops: Any) -> None:
    @register_flop_formula(packet, get_raw=True)
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        count: int = flops(problem(_arguments(packet, args, kwargs)))
        return count


for _formula in _FORMULAS:
    _register(*_formula)
