"""Sampling, and generation with a KV cache against recomputation of the whole sequence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flash_attn.errors import ConstraintError, UnsupportedProblemError
from flash_attn.modules.mha import FlashMHA
from flash_attn.utils.generation import GenerationMixin, InferenceParams, decode, sample

VOCAB, WIDTH = 31, 32


class Model(nn.Module, GenerationMixin):
    """Two layers of attention with residuals."""

    def __init__(self, device, learned_positions=False):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH, device=device)
        self.positions = nn.Embedding(40, WIDTH, device=device) if learned_positions else None
        rotary = 0 if learned_positions else 16
        self.layers = nn.ModuleList(
            FlashMHA(WIDTH, 2, causal=True, layer_idx=i, device=device, rotary_emb_dim=rotary)
            for i in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCAB, device=device)
        self.calls = []

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        self.calls.append(input_ids.shape[1])
        x = self.tokens(input_ids)
        if self.positions is not None:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
            x = x + self.positions(position_ids)
        for layer in self.layers:
            x = x + 4 * layer(x, inference_params=inference_params)
        if num_last_tokens:
            x = x[:, -num_last_tokens:]
        return SimpleNamespace(logits=self.head(x))


def recompute(model, tokens, length):
    """Greedy decoding that computes the whole sequence for every token."""
    scores = []
    while tokens.shape[1] < length:
        scores.append(model(tokens).logits[:, -1])
        tokens = torch.cat((tokens, scores[-1].argmax(-1, keepdim=True)), dim=1)
    return tokens, scores


@torch.no_grad()
@pytest.mark.parametrize("learned", [False, True])
def test_decode_equals_recomputation(device, learned):
    model = Model(device, learned).eval()
    prompt = torch.randint(VOCAB, (3, 5), device=device)
    expected, scores = recompute(model, prompt, 14)
    model.calls.clear()
    result = decode(prompt, model, 14)
    assert torch.equal(result.sequences, expected)
    assert model.calls == [5] + [1] * 8
    for a, b in zip(result.scores, scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert expected[:, 5:].unique().numel() > 2


@torch.no_grad()
def test_generate(device):
    model = Model(device).eval()
    prompt = torch.randint(VOCAB, (2, 3), device=device)
    expected, _ = recompute(model, prompt, 9)
    assert torch.equal(model.generate(prompt, 9), expected)
    result = model.generate(prompt, 9, return_dict_in_generate=True)
    assert result.scores is None
    assert torch.equal(result.sequences, expected)
    result = model.generate(prompt, 9, return_dict_in_generate=True, output_scores=True)
    assert len(result.scores) == 6
    assert torch.equal(model.generate(prompt, 3), prompt)


def test_simple_models_get_what_they_take(device):
    inner = Model(device)

    def model(tokens, inference_params):
        return inner(tokens, inference_params=inference_params).logits

    prompt = torch.randint(VOCAB, (2, 3), device=device)
    assert torch.equal(decode(prompt, model, 8).sequences, inner.generate(prompt, 8))
    with pytest.raises(ConstraintError, match="`model`.*`inference_params`"):
        decode(prompt, lambda tokens: tokens, 8)


def scripted(table):
    """A model whose likeliest token of sequence b at length n is table[b][n]."""

    def model(tokens, inference_params):
        place = inference_params.seqlen_offset + tokens.shape[1]
        wanted = torch.tensor([row[place] for row in table])
        return torch.nn.functional.one_hot(wanted, 10)[:, None].float()

    return model


def test_end_of_sequence():
    prompt = torch.zeros(2, 1, dtype=torch.int64)
    model = scripted([[0, 7, 1, 2, 3, 4], [0, 5, 6, 7, 8, 9]])
    result = decode(prompt, model, 6, eos_token_id=7).sequences
    assert result.tolist() == [[0, 7, 7, 7], [0, 5, 6, 7]]
    assert decode(prompt, model, 6).sequences.tolist() == [[0, 7, 1, 2, 3, 4], [0, 5, 6, 7, 8, 9]]


def test_teacher_and_vocabulary():
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    model = scripted([[0, 9, 8, 3, 2]])
    teacher = torch.tensor([[0, 4, 5]])
    assert decode(prompt, model, 5, teacher_outputs=teacher).sequences.tolist() == [[0, 4, 5, 3, 2]]
    result = decode(prompt, model, 5, vocab_size=5)
    assert result.sequences.tolist() == [[0, 0, 0, 3, 2]]
    assert result.scores[0].shape == (1, 5)


def test_decode_errors():
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(UnsupportedProblemError, match="cg"):
        decode(prompt, scripted([[0, 1]]), 2, cg=True)
    with pytest.raises(ConstraintError, match="`input_ids`"):
        decode(prompt[0], scripted([[0, 1]]), 2)


# ---- sampling -----------------------------------------------------------------------------------


def frequencies(logits, draws=20000, **options):
    tokens = sample(logits.expand(draws, -1), **options)
    assert tokens.dtype == torch.int64
    return torch.bincount(tokens, minlength=logits.shape[-1]).double() / draws


def test_sample_greedy(device):
    logits = torch.randn(6, VOCAB, device=device)
    assert torch.equal(sample(logits), logits.argmax(-1))
    assert torch.equal(sample(logits, top_k=1, top_p=0.5, temperature=0.0), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_follows_the_distribution(temperature):
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, 0.5])
    expected = torch.softmax(logits.double() / temperature, -1)
    found = frequencies(logits, top_k=0, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_sample_top_k():
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, 0.5])
    expected = torch.zeros(5, dtype=torch.float64)
    expected[[1, 3]] = torch.softmax(torch.tensor([2.0, 1.0], dtype=torch.float64), -1)
    torch.testing.assert_close(frequencies(logits, top_k=2), expected, rtol=0, atol=0.02)
    assert frequencies(logits, top_k=50).count_nonzero() == 5


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.79, 2), (0.81, 3)])
def test_sample_top_p(top_p, kept):
    logits = torch.tensor([0.3, 0.15, 0.5, 0.05]).log()
    found = frequencies(logits, top_k=0, top_p=top_p)
    assert found.count_nonzero() == kept
    assert found.argmax() == 2
    assert frequencies(logits, top_k=2, top_p=1.0).count_nonzero() == 2


def test_sample_errors():
    logits = torch.zeros(1, 4)
    for name, options in (("top_k", {"top_k": -1}), ("top_p", {"top_p": 1.5})):
        with pytest.raises(ConstraintError, match=f"`{name}`"):
            sample(logits, **options)
    with pytest.raises(ConstraintError, match="`temperature`"):
        sample(logits, top_k=2, temperature=0.0)
    with pytest.raises(ConstraintError, match="`logits`"):
        sample(logits[0])


# ---- the state ----------------------------------------------------------------------------------


def test_inference_params():
    params = InferenceParams(8, 2)
    assert (params.max_seqlen, params.max_batch_size) == (8, 2)
    assert (params.seqlen_offset, params.batch_size_offset) == (0, 0)
    assert params.key_value_memory_dict == {}
    assert params.key_value_memory_dict is not InferenceParams(8, 2).key_value_memory_dict
    params.seqlen_offset = 5
    params.lengths_per_sample = torch.tensor([3, 5])
    params.key_value_memory_dict[0] = "kept"
    params.reset(16, 4)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (16, 4, 0)
    assert params.lengths_per_sample.tolist() == [0, 0]
    assert params.key_value_memory_dict == {0: "kept"}


@torch.no_grad()
def test_allocated_caches(device):
    model = Model(device).eval()
    caches = model.allocate_inference_cache(2, 9, dtype=torch.float16)
    assert sorted(caches) == [0, 1]
    assert caches[0].shape == (2, 9, 2, 2, 16)
    assert caches[0].dtype == torch.float16
    params = InferenceParams(9, 2, key_value_memory_dict=model.allocate_inference_cache(2, 9))
    tokens = torch.randint(VOCAB, (2, 9), device=device)
    first = model(tokens[:, :5], inference_params=params).logits
    params.seqlen_offset = 5
    second = model(tokens[:, 5:], inference_params=params).logits
    torch.testing.assert_close(
        torch.cat((first, second), dim=1), model(tokens).logits, rtol=1e-4, atol=1e-4
    )
