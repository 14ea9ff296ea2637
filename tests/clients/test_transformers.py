"""Hugging Face Transformers: models with ``attn_implementation="flash_attention_2"`` and ``_3``.

Small models with random weights in bfloat16. Their error against the same model in float32 with
Transformers' own attention is at most twice that of Transformers' own attention in bfloat16.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from clients import DEVICE, as_if_there_were_a_gpu, error
from torch import Tensor

import flash_attn

with as_if_there_were_a_gpu():
    transformers: Any = pytest.importorskip("transformers", reason="make test-clients installs it")
    # Answers are remembered: also those to somebody who asked before.
    for function in vars(transformers.utils.import_utils).values():
        getattr(function, "cache_clear", lambda: None)()
    assert transformers.utils.is_flash_attn_2_available()
    assert transformers.utils.is_flash_attn_3_available()
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"]),
]

TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# The family's name, and what its configuration has besides.
DECODERS = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 16, "attn_logit_softcapping": 5.0},
}
ENCODER_DECODER = TOKENS | {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "decoder_start_token_id": 1,
}


class Models:
    """One model three times: in float32, and in bfloat16 with Transformers' attention and ours."""

    def __init__(self, model: str, options: dict[str, Any], implementation: str) -> None:
        family = re.sub("Model$|ForCausalLM$|ForConditionalGeneration$", "", model)
        config = getattr(transformers, family + "Config")
        self.config, self.kind = config(**options), getattr(transformers, model)
        self.exact = self._make("eager").float()
        weights = self.exact.state_dict()
        self.plain, self.ours = self._make("eager"), self._make(implementation)
        self.plain.load_state_dict(weights)
        self.ours.load_state_dict(weights)

    def _make(self, implementation: str) -> Any:
        torch.manual_seed(1)
        with as_if_there_were_a_gpu():
            model = self.kind._from_config(
                copy.deepcopy(self.config), attn_implementation=implementation, dtype=torch.bfloat16
            )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval().to(DEVICE)

    def check(self, compute: Any) -> None:
        """Hold our model's ``compute(model)`` against the other two's."""
        expected, plain, found = (compute(m) for m in (self.exact, self.plain, self.ours))
        assert error(found, expected) <= 2 * error(plain, expected) + 1e-3


def tokens(*shape: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randint(3, 128, shape, device=DEVICE)


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(use_cache=False, **inputs).logits


@pytest.fixture
def llama(implementation):
    return Models("LlamaForCausalLM", DECODER, implementation)


def test_it_is_this_package_that_computes(llama):
    elsewhere = "triton" if DEVICE == "cpu" else "cpu"
    with flash_attn.use_backend(elsewhere), pytest.raises(RuntimeError, match=elsewhere):
        logits(llama.ours, input_ids=tokens(1, 4))


@pytest.mark.parametrize("family", DECODERS)
def test_logits_of_padded_prompts(family, implementation):
    models = Models(f"{family}ForCausalLM", DECODER | DECODERS[family], implementation)
    ids = tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mask[1, :5] = 0
    models.check(lambda m: logits(m, input_ids=ids, attention_mask=mask)[mask.bool()])


@pytest.mark.parametrize("family", DECODERS)
def test_gradients_of_a_training_step(family, implementation):
    models = Models(f"{family}ForCausalLM", DECODER | DECODERS[family], implementation)
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0

    def gradients(model):
        labels = ids.masked_fill(mask == 0, -100)
        model.train()
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters()])

    models.check(gradients)


def test_gradient_checkpointing(llama):
    ids = tokens(2, 24)

    def gradients(model):
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    usual = gradients(llama.ours)
    llama.ours.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(llama.ours), usual, rtol=0, atol=0)


@pytest.mark.parametrize("told", ["by positions", "by lengths"])
def test_sequences_without_padding(llama, told):
    lengths = [7, 1, 20, 12]
    ids = tokens(1, sum(lengths))
    packed = {"position_ids": torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None]}
    if told == "by lengths":
        bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
        packed |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        packed |= {"max_length_q": 20, "max_length_k": 20}

    def compute(model):
        if model is llama.ours:
            return logits(model, input_ids=ids, **packed)[0]
        one_by_one = ids[0].split(lengths)
        return torch.cat([logits(model, input_ids=part[None])[0] for part in one_by_one])

    llama.check(compute)


def test_modernbert(implementation):
    options = TOKENS | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "local_attention": 16,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    models = Models("ModernBertModel", options, implementation)
    ids = tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    mask[2, 9:] = 0

    def compute(model):
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states if states.dim() == 2 else states[mask.bool()]

    models.check(compute)


def test_whisper(implementation):
    options = ENCODER_DECODER | {
        "max_source_positions": 50,
        "num_mel_bins": 20,
        "begin_suppress_tokens": None,
        "suppress_tokens": None,
    }
    models = Models("WhisperForConditionalGeneration", options, implementation)
    sound = torch.randn(2, 20, 100, device=DEVICE)
    ids = tokens(2, 9)
    models.check(lambda m: logits(m, input_features=sound.to(m.dtype), decoder_input_ids=ids))


def test_bart(implementation):
    options = ENCODER_DECODER | {"max_position_embeddings": 64}
    models = Models("BartForConditionalGeneration", options, implementation)
    ids, answer = tokens(3, 40), tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0  # Transformers takes the last columns for the queries' too
    models.check(lambda m: logits(m, input_ids=ids, attention_mask=mask, decoder_input_ids=answer))


@pytest.mark.parametrize("how", ["greedy", "beams", "static cache", "prompt in pieces"])
def test_generation_agrees_with_a_pass_over_all(llama, how):
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    options = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "static cache": {"cache_implementation": "static"},
        "prompt in pieces": {"prefill_chunk_size": 8},
    }[how]
    made = llama.ours.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True, **options
    )  # fmt: skip
    whole = torch.cat([mask, mask.new_ones(2, 8)], 1)
    after = logits(llama.exact, input_ids=made.sequences, attention_mask=whole)[:, 19:-1]
    if how == "beams":  # their logits come in another order, but the sequences must be likely
        chosen = after.log_softmax(-1).gather(2, made.sequences[:, 20:, None])
        assert chosen.mean() > after.log_softmax(-1).mean()
    else:
        assert error(torch.stack(made.logits, 1), after) < 0.05


@contextmanager
def pages_without_a_gpu() -> Iterator[None]:
    """What Transformers asks a GPU for before it makes its pages: free memory and pinned memory."""
    if DEVICE == "cuda":
        yield
        return
    memory = "transformers.generation.continuous_batching.cache.get_device_and_memory_breakdown"
    empty = torch.empty

    def not_pinned(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*shape, **options)

    with (
        mock.patch(memory, return_value=(torch.device("cpu"), 2**30, 0, 0)),
        mock.patch("torch.empty", not_pinned),
    ):
        yield


def test_continuous_batching_with_pages(llama):
    prompts = [tokens(n).tolist() for n in (5, 17, 33)]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    config = transformers.GenerationConfig(eos_token_id=-1, **options)
    with pages_without_a_gpu():
        answers = llama.ours.generate_batch(
            inputs=prompts, generation_config=config, progress_bar=False
        )
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        ids = torch.tensor([prompt], device=DEVICE)
        alone = llama.ours.generate(ids, eos_token_id=None, **options)
        assert answer.generated_tokens == alone[0, len(prompt) :].tolist()


def test_sinks(implementation):
    """GPT-OSS, whose list of implementations names other packages: the list is lifted."""
    options = DECODER | {"head_dim": 16, "sliding_window": 16}
    options |= {"num_local_experts": 2, "num_experts_per_tok": 2}
    listed = "_compatible_flash_implementations"
    owner = next(c for c in transformers.GptOssForCausalLM.__mro__ if listed in vars(c))
    with mock.patch.object(owner, listed, None):
        models = Models("GptOssForCausalLM", options, implementation)
    for model in (models.exact, models.plain, models.ours):
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.data.fill_(1.5)
    ids = tokens(2, 40)
    models.check(lambda m: logits(m, input_ids=ids))


def test_compiled(llama):
    ids = tokens(2, 20)
    compiled = torch.compile(llama.ours, fullgraph=True, backend="aot_eager")
    usual = logits(llama.ours, input_ids=ids)
    torch.testing.assert_close(logits(compiled, input_ids=ids), usual, rtol=0, atol=0)
