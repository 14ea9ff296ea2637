"""FlashAttention-3's calls as problems: its arguments, defaults and rules.

The flat argument lists of its private functions and operators are two named tuples here, whose
``problem`` is the canonical form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attend import attend, attend_backward
from .kvcache import attend_with_kvcache
from .outputs import empty_lse, empty_out
from .problem import (
    AttentionProblem,
    BackwardInputs,
    SequenceLayout,
    Visibility,
    make_transform,
)
from .rng import unused_state
from .validate import check_index, require


class ForwardArguments(NamedTuple):
    """The private forward function's arguments: names, order and defaults.

    Shapes are those of :mod:`flash_attn.hopper_interface`; ``out_`` is a buffer to write into.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_new: Tensor | None = None
    v_new: Tensor | None = None
    qv: Tensor | None = None
    out_: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    cu_seqlens_k_new: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    page_table: Tensor | None = None
    kv_batch_idx: Tensor | None = None
    leftpad_k: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    seqlens_rotary: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    softmax_scale: float | None = None
    causal: bool = False
    window_size_left: int = -1
    window_size_right: int = -1
    attention_chunk: int = 0
    softcap: float = 0.0
    rotary_interleaved: bool = True
    scheduler_metadata: Tensor | None = None
    num_splits: int = 1
    pack_gqa: bool | None = None
    sm_margin: int = 0

    def problem(self) -> AttentionProblem:
        """The problem that the arguments describe, before anything is appended.

        Raises:
            ConstraintError: arguments exclude each other or are missing.
        """
        check_metadata(self.scheduler_metadata, self.q)
        layout = hopper_layout(
            self.q,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.seqused_q,
            self.seqused_k,
            self.max_seqlen_q,
            self.max_seqlen_k,
            self.page_table,
            self.kv_batch_idx,
            self.leftpad_k,
        )
        problem = hopper_problem(
            self.q,
            self.k,
            self.v,
            layout,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            qv=self.qv,
            descales=(self.q_descale, self.k_descale, self.v_descale),
            window=(self.window_size_left, self.window_size_right),
            attention_chunk=self.attention_chunk,
            softcap=self.softcap,
            num_splits=self.num_splits,
            pack_gqa=self.pack_gqa,
            sm_margin=self.sm_margin,
        )
        return with_empty_lse(problem, self.k_new)


def has_cache(arguments: ForwardArguments) -> bool:
    """Whether new keys are appended, or rotated. (No property, which PyTorch 2.10 cannot trace.)"""
    new = (arguments.k_new, arguments.v_new, arguments.cu_seqlens_k_new)
    rotary = (arguments.rotary_cos, arguments.rotary_sin, arguments.seqlens_rotary)
    return any(x is not None for x in (*new, *rotary))


def hopper_layout(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> SequenceLayout:
    """The layout, with FlashAttention-3's rules on what goes together.

    Raises:
        ConstraintError: arguments exclude each other or are missing.
    """
    for name, bound, cu_seqlens in (
        ("q", max_seqlen_q, cu_seqlens_q),
        ("k", max_seqlen_k, cu_seqlens_k),
    ):
        require(
            bound is not None or cu_seqlens is None,
            f"max_seqlen_{name} must be provided if cu_seqlens_{name} is provided: "
            f"`max_seqlen_{name}` is None",
        )
    if cu_seqlens_k is not None:
        for name, x in (("page_table", page_table), ("cache_batch_idx", cache_batch_idx)):
            require(
                x is None,
                "If cu_seqlens_k is passed in, then page table is not supported, nor are rows of "
                f"a cache: leave out `cu_seqlens_k` or `{name}`",
            )
    if page_table is not None:
        batch_size = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        rows = batch_size if cache_batch_idx is None else None
        check_index(page_table, "page_table", q, (rows, None))
    return SequenceLayout(
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        leftpad_k,
        page_table,
        cache_batch_idx,
        max_seqlen_q=0 if max_seqlen_q is None else max_seqlen_q,
        max_seqlen_k=0 if max_seqlen_k is None else max_seqlen_k,
        seqused_q=seqused_q,
    )


def hopper_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    softmax_scale: float | None,
    causal: bool,
    qv: Tensor | None,
    descales: tuple[Tensor | None, Tensor | None, Tensor | None],
    window: tuple[int, int],
    attention_chunk: int,
    softcap: float,
    num_splits: int,
    pack_gqa: bool | None,
    sm_margin: int,
    s_aux: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> AttentionProblem:
    """A problem by FlashAttention-3's rules: the default scale is
    ``(headdim + headdim of qv) ** -0.5`` and rows that see no key have an LSE of -inf."""
    require(
        attention_chunk >= 0, f"`attention_chunk` must not be negative, found {attention_chunk}"
    )
    require(
        pack_gqa is None or isinstance(pack_gqa, bool),
        f"`pack_gqa` must be True, False or None, found {pack_gqa!r}",
    )
    headdim = q.shape[-1] + (0 if qv is None else qv.shape[-1])
    q_descale, k_descale, v_descale = descales
    transform = make_transform(headdim, softmax_scale, softcap)._replace(
        attn_mask=attn_mask,
        sinks=s_aux,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    return AttentionProblem(
        q,
        k,
        v,
        transform,
        Visibility.from_window(*window, causal, attention_chunk),
        layout,
        num_splits=num_splits,
        empty_lse=float("-inf"),
        qv=qv,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )


def with_empty_lse(problem: AttentionProblem, k_new: Tensor | None = None) -> AttentionProblem:
    """Where there is no key at all, by the shapes, every row's LSE is +inf instead of -inf."""
    appended = 0 if k_new is None else k_new.numel()
    table = problem.layout.page_table
    no_pages = table is not None and table.shape[1] * problem.k.shape[1] == 0
    if problem.k.numel() + appended == 0 or no_pages:
        return problem._replace(empty_lse=float("inf"))
    return problem


def check_metadata(scheduler_metadata: Tensor | None, q: Tensor) -> None:
    """``scheduler_metadata`` is None or what :func:`get_scheduler_metadata` gives."""
    check_index(scheduler_metadata, "scheduler_metadata", q, (None,))


def solve(arguments: ForwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Append if there are new keys, attend: (out, softmax_lse, out_accum, softmax_lse_accum).

    The last two, upstream's partial results of split keys, are empty: they are not kept.

    Raises:
        ConstraintError: an argument is wrong.
        UnsupportedProblemError: no permitted backend computes it.
    """
    problem = arguments.problem()
    if has_cache(arguments):
        result = attend_with_kvcache(
            problem,
            arguments.k_new,
            arguments.v_new,
            arguments.rotary_cos,
            arguments.rotary_sin,
            arguments.rotary_interleaved,
            arguments.out_,
            cu_seqlens_k_new=arguments.cu_seqlens_k_new,
            rotary_seqlens=arguments.seqlens_rotary,
        )
    else:
        result = attend(problem, arguments.out_)
    return (result.out, result.softmax_lse, *no_partial_results(problem.q))


def no_partial_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Two empty float32 tensors, for what upstream returns where it splits the keys."""
    empty = (q.new_empty(0, dtype=torch.float32) for _ in range(2))
    return next(empty), next(empty)


def fake_result(arguments: ForwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of :func:`solve` as far as their metadata goes."""
    problem = arguments.problem()
    out = empty_out(problem) if arguments.out_ is None else arguments.out_
    return (out, empty_lse(problem), *no_partial_results(problem.q))


def solve_backward(
    problem: AttentionProblem,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients into ``grads``, or new tensors where these are None: (dq, dk, dv, softmax_d)."""
    likes = (problem.q, problem.k, problem.v)
    dq, dk, dv = (
        torch.empty_like(like) if grad is None else grad
        for grad, like in zip(grads, likes, strict=True)
    )
    rng_state = unused_state(problem.q.device)
    inputs = BackwardInputs(dout, out, softmax_lse, dq, dk, dv, rng_state)
    return dq, dk, dv, attend_backward(problem, inputs)


class BackwardArguments(NamedTuple):
    """The private backward function's arguments; "sequed" is upstream's spelling."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    sequed_q: Tensor | None = None
    sequed_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    softmax_scale: float | None = None
    is_causal: bool = False
    window_size_left: int = -1
    window_size_right: int = -1
    softcap: float = 0.0
    deterministic: bool = False
    sm_margin: int = 0

    def problem(self) -> AttentionProblem:
        """The problem whose gradients are asked for."""
        forward = ForwardArguments(
            self.q,
            self.k,
            self.v,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            seqused_q=self.sequed_q,
            seqused_k=self.sequed_k,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
            softmax_scale=self.softmax_scale,
            causal=self.is_causal,
            window_size_left=self.window_size_left,
            window_size_right=self.window_size_right,
            softcap=self.softcap,
            sm_margin=self.sm_margin,
        )
        return forward.problem()._replace(deterministic=self.deterministic)
