"""Text generation with a KV cache: the state, sampling, and the loop over tokens."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.validate import require
from ..errors import UnsupportedProblemError

__all__ = ["DecodeOutput", "GenerationMixin", "InferenceParams", "decode", "sample"]


@dataclass
class InferenceParams:
    """What the layers of a model share during a generation.

    Attributes:
        max_seqlen: largest number of tokens in a sequence.
        max_batch_size: largest number of sequences.
        seqlen_offset: number of tokens that are in the caches.
        batch_size_offset: first row of the caches that the current input belongs to.
        key_value_memory_dict: the caches (max_batch_size, max_seqlen, 2, nheads_k, headdim) by
            ``layer_idx``; a layer without one allocates it.
        lengths_per_sample: (max_batch_size,) number of tokens that are in the caches of every
            sequence; replaces ``seqlen_offset`` in the attention if the lengths differ.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start anew in the same caches, with other limits."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class DecodeOutput:
    """What a generation gives.

    Attributes:
        sequences: (batch_size, seqlen) tokens, the prompt included.
        scores: the logits (batch_size, vocab_size) of every new token.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Draw the next tokens.

    Args:
        logits: (batch_size, vocab_size).
        top_k: draw among the likeliest ``top_k`` tokens; 1 takes the likeliest, 0 keeps all.
        top_p: draw among the fewest tokens that are together at least this likely; 0 keeps all.
        temperature: divides the logits; higher is more random.

    Returns:
        (batch_size,) int64.

    Raises:
        ConstraintError: an argument is out of range.
    """
    require(logits.dim() == 2, f"`logits` must have 2 dimensions, found {logits.dim()}")
    require(top_k >= 0, f"`top_k` must be at least 0, found {top_k}")
    require(0.0 <= top_p <= 1.0, f"`top_p` must be from 0 to 1, found {top_p}")
    if top_k == 1:
        return logits.argmax(dim=-1)
    require(temperature > 0.0, f"`temperature` must be positive, found {temperature}")
    kept = min(top_k, logits.shape[-1]) if top_k else logits.shape[-1]
    values, tokens = torch.topk(logits.float() / temperature, kept, dim=-1)
    probs = torch.softmax(values, dim=-1)
    if 0.0 < top_p < 1.0:
        # A token is kept if those before it do not reach top_p yet: at least one always is.
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
    return tokens.gather(-1, torch.multinomial(probs, 1)).squeeze(-1)


class _Caller:
    """Calls a model with those of our keyword arguments that its forward takes."""

    def __init__(self, model: Any) -> None:
        forward = model.forward if isinstance(model, nn.Module) else model
        parameters = inspect.signature(forward).parameters.values()
        self._any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters}
        self._model = model
        require(
            self._any or "inference_params" in self._names,
            "`model` must take the keyword argument `inference_params`",
        )

    def __call__(self, tokens: Tensor, state: InferenceParams) -> Tensor:
        """Logits (batch_size, vocab_size) of the token after ``tokens``."""
        options: dict[str, Any] = {"inference_params": state, "num_last_tokens": 1}
        if state.seqlen_offset > 0:
            shape = (tokens.shape[0], tokens.shape[1])
            first = torch.arange(tokens.shape[1], device=tokens.device) + state.seqlen_offset
            options["position_ids"] = first.expand(shape)
        if not self._any:
            options = {name: value for name, value in options.items() if name in self._names}
        out = self._model(tokens, **options)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return logits[:, -1] if logits.dim() == 3 else logits


@torch.no_grad()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
) -> DecodeOutput:
    """Continue token sequences, computing only the new tokens in every step.

    The model is called as it is: put it into evaluation mode to switch dropout off. It must take
    ``inference_params`` and return logits (batch_size, seqlen, vocab_size), or an object with
    ``logits``; ``position_ids`` and ``num_last_tokens`` are passed if it takes them.

    Args:
        input_ids: (batch_size, seqlen) int64 prompts of the same length.
        model: the language model.
        max_length: number of tokens to end with, the prompt included.
        top_k: see :func:`sample`.
        top_p: see :func:`sample`.
        temperature: see :func:`sample`.
        eos_token_id: a sequence that has drawn it repeats it, and when all have, the loop ends.
        teacher_outputs: (batch_size, seqlen_teacher) tokens to take instead of drawing, as far as
            they reach.
        vocab_size: ignore the logits from this index on.
        cg: capture the steps as a CUDA graph; only False is supported.

    Raises:
        ConstraintError: an argument is wrong.
        UnsupportedProblemError: ``cg`` is true.
    """
    require(
        input_ids.dim() == 2 and input_ids.shape[1] > 0,
        f"`input_ids` must have shape (batch_size, seqlen), found {tuple(input_ids.shape)}",
    )
    if cg:
        raise UnsupportedProblemError("`cg` must be False: CUDA graphs are not supported here")
    batch_size, prompt = input_ids.shape
    caller = _Caller(model)
    state = InferenceParams(max_seqlen=max_length, max_batch_size=batch_size)
    sequences, scores = input_ids, []
    fresh = input_ids
    finished = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
    for length in range(prompt, max_length):
        logits = caller(fresh, state)[..., :vocab_size]
        scores.append(logits)
        state.seqlen_offset += fresh.shape[1]
        if teacher_outputs is not None and length < teacher_outputs.shape[1]:
            token = teacher_outputs[:, length]
        else:
            token = sample(logits, top_k, top_p, temperature)
        if eos_token_id is not None:
            token = token.masked_fill(finished, eos_token_id)
            finished = finished | (token == eos_token_id)
        fresh = token[:, None].to(input_ids.dtype)
        sequences = torch.cat((sequences, fresh), dim=1)
        if eos_token_id is not None and bool(finished.all()):
            break
    return DecodeOutput(sequences, tuple(scores))


class GenerationMixin:
    """Gives a language model ``generate``."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> dict[Any, Any]:
        """Return the caches of all layers by ``layer_idx``, for ``key_value_memory_dict``."""
        require(isinstance(self, nn.Module), "`self` must be a torch.nn.Module")
        caches: dict[Any, Any] = {}
        for module in self.modules():  # type: ignore[attr-defined]
            index = getattr(module, "layer_idx", None)
            allocate = getattr(module, "allocate_inference_cache", None)
            if module is not self and index is not None and allocate is not None:
                caches[index] = allocate(batch_size, max_seqlen, dtype=dtype)
        return caches

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        *,
        eos_token_id: int | None = None,
        teacher_outputs: Tensor | None = None,
        vocab_size: int | None = None,
        cg: bool = False,
    ) -> Tensor | DecodeOutput:
        """Continue ``input_ids``; the arguments are those of :func:`decode`.

        Args:
            return_dict_in_generate: return a :class:`DecodeOutput` instead of the tokens.
            output_scores: keep the logits in it.

        Returns:
            (batch_size, seqlen) tokens, or a :class:`DecodeOutput`.
        """
        output = decode(
            input_ids, self, max_length, top_k, top_p, temperature, eos_token_id, teacher_outputs,
            vocab_size, cg,
        )  # fmt: skip
        if not return_dict_in_generate:
            return output.sequences
        return output if output_scores else DecodeOutput(output.sequences)
