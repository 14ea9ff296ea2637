"""The one noun of this package: a validated attention problem, and what solves it.

Every public surface translates its arguments into an :class:`AttentionProblem`; everything below
(validation, backends, reference) speaks of problems only. The groups are ``NamedTuple`` because
they are immutable and cheap to build on every call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SequenceLayout(NamedTuple):
    """Where the sequences lie: dense, packed (varlen), in a cache or in pages.

    Attributes:
        cu_seqlens_q: (batch + 1,) int32 row bounds of packed queries, or None for dense ones.
        cu_seqlens_k: (batch + 1,) int32 row bounds of packed keys. With ``page_table`` only the
            differences (the lengths) are used.
        seqused_q: (batch,) int32 number of queries in use; rows after them are as rows of no
            sequence.
        seqused_k: (batch,) int32 absolute end of the keys in use, left padding included.
        leftpad_k: (batch,) int32 first key in use.
        page_table: (batch, max_pages) int32 pages of each sequence; k and v are then
            (num_pages, page_size, nheads_k, headdim). With ``cache_batch_idx`` it may have any
            number of rows.
        cache_batch_idx: (batch,) int32 row of k and v, or of ``page_table``, that each sequence
            uses.
        max_seqlen_q: bound on the packed queries' lengths (a hint, it never changes results).
        max_seqlen_k: bound on the packed keys' lengths (likewise).
    """

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    page_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    seqused_q: Tensor | None = None


class Visibility(NamedTuple):
    """How far a query sees, in keys; None is without limit. See :mod:`.masking`.

    ``attention_chunk`` > 0: only keys in the query's own chunk of that many positions; 0: none.
    """

    window_left: int | None = None
    window_right: int | None = None
    attention_chunk: int = 0

    @classmethod
    def from_window(
        cls, left: int, right: int, causal: bool, attention_chunk: int = 0
    ) -> Visibility:
        """Translate ``causal`` and ``window_size``: negative is no limit, causal is right = 0."""
        right = 0 if causal else right
        return cls(
            None if left < 0 else left, None if right < 0 else right, max(attention_chunk, 0)
        )


class ScoreTransform(NamedTuple):
    """From q.k to the exponent::

        softcap * tanh(softmax_scale * (q.k + qv.v) / softcap) + alibi + attn_mask

    Attributes:
        softmax_scale: factor of the products.
        softcap: bound of the scores, 0 for none.
        alibi_slopes: (nheads,) or (batch, nheads) float32.
        attn_mask: (1 or batch, 1 or nheads, 1 or seqlen_q, 1 or seqlen_k): float, added to the
            scores, or bool, True where a key may be seen. Indexed by the position within the
            sequence, keys from the first one in use; positions outside it are not seen.
        sinks: (nheads,) float, logits of a key without value: ``exp(sink)`` joins the sum.
        q_descale: (batch, nheads_k) or (batch, nheads) float32 with any strides: float8 queries
            stand for ``q * q_descale``. None is 1.
        k_descale: (batch, nheads_k) likewise.
        v_descale: (batch, nheads_k) likewise.
    """

    softmax_scale: float
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    attn_mask: Tensor | None = None
    sinks: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None


DENSE = SequenceLayout()
FULL = Visibility()


class AttentionProblem(NamedTuple):
    """One attention call in canonical form.

    Attributes:
        q: (batch, seqlen_q, nheads, headdim), or (total_q, nheads, headdim) with cu_seqlens_q.
        k: (batch, seqlen_k, nheads_k, headdim), (total_k, nheads_k, headdim) with cu_seqlens_k,
            or (num_pages, page_size, nheads_k, headdim) with page_table.
        v: like k; its head dim, headdim_v, may differ.
        num_splits: into how many parts the keys are divided; 0 leaves it to the plan. A hint.
        empty_lse: the log-sum-exp of a row that sees no key (FlashAttention-2: +inf,
            FlashAttention-3: -inf). With sinks such a row's is its sink.
        return_softmax: also write S_dmask (needs dropout).
        qv: like q with headdim_v, or None: ``qv.v`` is added to ``q.k``.
        out_dtype: dtype of the output; None is q's, bfloat16 for float8.
        pack_gqa: whether query heads that share keys lie in one tile; None leaves it to the plan.
            A hint.
        sm_margin: multiprocessors to leave to others. A hint: kernels without a persistent grid
            have no use for it.
        deterministic: whether the gradients must have the same bits every time. Gradients of k and
            v always have; others may be summed in any order where this is False.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    transform: ScoreTransform
    visibility: Visibility = FULL
    layout: SequenceLayout = DENSE
    dropout_p: float = 0.0
    num_splits: int = 0
    empty_lse: float = float("inf")
    return_softmax: bool = False
    qv: Tensor | None = None
    out_dtype: torch.dtype | None = None
    pack_gqa: bool | None = None
    sm_margin: int = 0
    deterministic: bool = False

    @property
    def is_varlen_q(self) -> bool:
        return self.layout.cu_seqlens_q is not None

    @property
    def is_paged(self) -> bool:
        return self.layout.page_table is not None

    @property
    def batch_size(self) -> int:
        cu_seqlens_q = self.layout.cu_seqlens_q
        return self.q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1

    @property
    def max_seqlen_q(self) -> int:
        return self.layout.max_seqlen_q if self.is_varlen_q else self.q.shape[1]

    @property
    def max_seqlen_k(self) -> int:
        """The most keys that a sequence can have, by the tensors' shapes."""
        layout = self.layout
        if layout.page_table is not None:
            return layout.page_table.shape[1] * self.k.shape[1]
        return layout.max_seqlen_k if layout.cu_seqlens_k is not None else self.k.shape[1]

    @property
    def nheads(self) -> int:
        return self.q.shape[-2]

    @property
    def nheads_k(self) -> int:
        return self.k.shape[-2]

    @property
    def headdim(self) -> int:
        return self.q.shape[-1]

    @property
    def headdim_v(self) -> int:
        return self.v.shape[-1]

    @property
    def result_dtype(self) -> torch.dtype:
        """The output's dtype."""
        if self.out_dtype is not None:
            return self.out_dtype
        return torch.bfloat16 if is_float8(self.q.dtype) else self.q.dtype

    @property
    def out_shape(self) -> tuple[int, ...]:
        """q's shape with the values' head dim."""
        return (*self.q.shape[:-1], self.v.shape[-1])

    def extensions(self) -> list[str]:
        """What the problem uses beyond FlashAttention-2's features, by argument name."""
        layout, transform = self.layout, self.transform
        used = {
            "seqused_q": layout.seqused_q is not None,
            "page_table with leftpad_k": self.is_paged and layout.leftpad_k is not None,
            "page_table with cache_batch_idx": self.is_paged and layout.cache_batch_idx is not None,
            "attention_chunk": self.visibility.attention_chunk > 0,
            "attn_mask": transform.attn_mask is not None,
            "s_aux": transform.sinks is not None,
            "qv": self.qv is not None,
            "a head dim of v of its own": self.v.shape[-1] != self.q.shape[-1],
            "float8 inputs": is_float8(self.q.dtype),
            "out_dtype": self.out_dtype not in (None, self.q.dtype),
        }
        return [name for name, is_used in used.items() if is_used]

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(batch, nheads, seqlen_q), packed: (nheads, total_q)."""
        if self.is_varlen_q:
            return (self.nheads, self.q.shape[0])
        return (self.q.shape[0], self.nheads, self.q.shape[1])

    def describe(self) -> str:
        """A line for error messages: shapes, dtype, device and the features in use."""
        layout, transform = self.layout, self.transform
        parts = [
            f"q {tuple(self.q.shape)}",
            f"k {tuple(self.k.shape)}",
            f"{str(self.q.dtype).removeprefix('torch.')} on {self.q.device}",
        ]
        if self.visibility != FULL:
            parts.append(f"window {tuple(self.visibility)}")
        named = {
            "varlen": layout.cu_seqlens_q is not None,
            "paged": layout.page_table is not None,
            "softcap": transform.softcap > 0.0,
            "alibi": transform.alibi_slopes is not None,
            "dropout": self.dropout_p > 0.0,
        }
        names = [name for name, used in named.items() if used]
        return ", ".join(parts + names + self.extensions())


class AttentionResult(NamedTuple):
    """What a forward pass yields.

    Attributes:
        out: like q, with the values' head dim, in :attr:`AttentionProblem.result_dtype`.
        softmax_lse: float32 natural log-sum-exp, see :attr:`AttentionProblem.lse_shape`.
        s_dmask: (batch, nheads, seqlen_q, seqlen_k) each rounded up to 128, or shape (0,).
        rng_state: (2,) int64 seed and offset of the dropout mask; without dropout any two numbers.
    """

    out: Tensor
    softmax_lse: Tensor
    s_dmask: Tensor
    rng_state: Tensor


class BackwardInputs(NamedTuple):
    """What a backward pass needs beside the problem; the gradients are written in place.

    Attributes:
        dlse: gradient of softmax_lse, like it, or None.
        dmask: gradient of a float ``attn_mask``, like it, or None where none is asked for.
        dsinks: gradient of ``sinks``, like it, or None likewise.
    """

    dout: Tensor
    out: Tensor
    softmax_lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    rng_state: Tensor
    dlse: Tensor | None = None
    dmask: Tensor | None = None
    dsinks: Tensor | None = None


def make_transform(
    headdim: int,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> ScoreTransform:
    """Fill in the default scale ``headdim ** -0.5``."""
    scale = headdim**-0.5 if softmax_scale is None else float(softmax_scale)
    return ScoreTransform(scale, max(float(softcap), 0.0), alibi_slopes)


def is_half(dtype: torch.dtype) -> bool:
    """Whether ``dtype`` is one of the two 16-bit types."""
    return dtype in (torch.float16, torch.bfloat16)


def is_float8(dtype: torch.dtype) -> bool:
    """Whether ``dtype`` is the float8 type that attention takes."""
    return dtype == torch.float8_e4m3fn
