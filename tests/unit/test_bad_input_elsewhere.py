"""Random wrong calls of FlashAttention-3's functions and of the modules around attention."""

from __future__ import annotations

import random

import pytest
import torch
from test_bad_input import INT, WRONG_NUMBERS, WRONG_TENSORS, bounds, describe

from flash_attn import attention_probs, flash_attn_func, flash_attn_varlen_func
from flash_attn import hopper_interface as fa3
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.errors import FlashAttentionError
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import layer_norm_fn
from flash_attn.quantize import quantize_fp8


def ints(*values):
    return torch.tensor(values, dtype=INT)


def hopper_calls():
    q, k = torch.randn(2, 4, 4, 16), torch.randn(2, 6, 2, 16)
    flat_q, flat_k = torch.randn(8, 4, 16), torch.randn(11, 2, 16)
    scores = {"softmax_scale": 0.25, "window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0}
    scores |= {"num_splits": 1, "pack_gqa": None, "sm_margin": 0, "causal": True}
    q8, k8 = q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn)
    descales = {name: torch.rand(2, 2) for name in ("q_descale", "k_descale", "v_descale")}
    beyond = {"s_aux": torch.randn(4), "attn_mask": torch.randn(1, 1, 4, 6)}
    yield fa3.flash_attn_func, {"q": q, "k": k, "v": k, **scores, **beyond}
    yield fa3.flash_attn_func, {"q": q, "k": k, "v": k, "qv": q + 1, **scores}
    yield fa3.flash_attn_func, {"q": q8, "k": k8, "v": k8, **scores, **descales}
    lengths = {"cu_seqlens_q": bounds(3, 5), "cu_seqlens_k": bounds(4, 7)}
    lengths |= {"max_seqlen_q": 5, "max_seqlen_k": 7}
    used = {"seqused_q": ints(2, 3), "seqused_k": ints(2, 3)}
    yield fa3.flash_attn_varlen_func, {
        "q": flat_q, "k": flat_k, "v": flat_k, **lengths, **used, **scores
    }  # fmt: skip
    qkv = {"qkv": torch.randn(2, 4, 8, 16), "num_heads_q": 4, "softcap": 0.0}
    yield fa3.flash_attn_qkvpacked_func, qkv
    cache = {"q": torch.randn(2, 1, 4, 16), "k_cache": k.clone(), "v_cache": k.clone(), **scores}
    cache |= {"cache_seqlens": ints(3, 4)}
    new = {"k": torch.randn(2, 1, 2, 16), "v": torch.randn(2, 1, 2, 16)}
    rotary = {"rotary_cos": torch.randn(6, 8), "rotary_sin": torch.randn(6, 8)}
    rotary |= {"rotary_seqlens": ints(1, 2)}
    pages = {"page_table": ints(0, 1)[:, None], "cache_leftpad": ints(0, 1)}
    packed = {"q": torch.randn(3, 4, 16), "cu_seqlens_q": bounds(1, 2), "max_seqlen_q": 2}
    packed |= {"k": torch.randn(3, 2, 16), "v": torch.randn(3, 2, 16)}
    yield fa3.flash_attn_with_kvcache, cache | new | rotary
    yield fa3.flash_attn_with_kvcache, cache | pages | {"cache_batch_idx": ints(0, 1)}
    yield fa3.flash_attn_with_kvcache, cache | packed | {"cu_seqlens_k_new": bounds(1, 2)}
    parts = {"out_partial": torch.randn(3, 2, 5, 4, 16), "lse_partial": torch.randn(3, 2, 5, 4)}
    yield fa3.flash_attn_combine, parts | {"out": torch.empty(2, 5, 4, 16), "out_dtype": None}
    sizes = {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 10, "num_heads_q": 4}
    sizes |= {"num_heads_kv": 2, "headdim": 16, "cache_seqlens": ints(3, 4), "page_size": 1}
    yield fa3.get_scheduler_metadata, sizes


def other_calls():
    q, k, flat = torch.randn(2, 4, 4, 16), torch.randn(2, 6, 2, 16), torch.randn(8, 4, 16)
    mask = {"s_aux": torch.randn(4), "attn_mask": torch.randn(1, 1, 4, 6)}
    yield flash_attn_func, {"q": q, "k": k, "v": k, "causal": True, **mask}
    pages, lengths = torch.randn(6, 2, 2, 16), (bounds(3, 5), bounds(4, 4))
    packed = {"q": flat, "k": pages, "v": pages, "max_seqlen_q": 5, "max_seqlen_k": 4}
    packed |= {"cu_seqlens_q": lengths[0], "cu_seqlens_k": lengths[1]}
    yield flash_attn_varlen_func, packed | {"block_table": torch.zeros(2, 4, dtype=INT)}
    scores = {"softmax_scale": 0.2, "window_size": (-1, -1), "softcap": 0.0}
    yield attention_probs, {"q": q, "k": k, "alibi_slopes": torch.rand(4), **scores}
    yield quantize_fp8, {"q": q, "k": k, "v": k, "seed": 1, "hadamard": True}
    bounded = {"cu_seqlens_q": bounds(3, 5), "cu_seqlens_k": bounds(3, 5)}
    yield quantize_fp8, {"q": flat, "k": flat, "v": flat, **bounded}
    tables = {"cos": torch.randn(6, 8), "sin": torch.randn(6, 8)}
    yield apply_rotary_emb, {"x": q, "seqlen_offsets": torch.tensor([0, 1]), **tables}
    yield apply_rotary_emb, {"x": flat, "cu_seqlens": bounds(3, 5), "max_seqlen": 5, **tables}
    loss = {"logits": torch.randn(3, 5), "labels": torch.tensor([0, 1, 2])}
    yield cross_entropy_loss, loss | {"label_smoothing": 0.0, "logit_scale": 1.0}
    norm = {"x": torch.randn(3, 8), "weight": torch.ones(8), "bias": torch.ones(8)}
    yield layer_norm_fn, norm | {"residual": torch.randn(3, 8), "eps": 1e-5, "dropout_p": 0.0}
    yield unpad_input, {"hidden_states": torch.randn(2, 5, 8), "attention_mask": torch.ones(2, 5)}
    rows = {"hidden_states": torch.randn(3, 8), "indices": torch.tensor([0, 1, 5])}
    yield pad_input, rows | {"batch": 2, "seqlen": 5}


@pytest.mark.parametrize("calls", [hopper_calls, other_calls])
def test_random_wrong_calls_raise_our_exceptions_only(calls):
    draw, raised, foreign = random.Random(5), 0, []
    for _ in range(60):
        for function, call in calls():
            given = dict(call)
            for name in draw.sample(sorted(given), draw.randint(1, 2)):
                x = given[name]
                is_tensor = isinstance(x, torch.Tensor) and x.dim() > 0
                if is_tensor and draw.random() < 0.85:
                    given[name] = draw.choice(WRONG_TENSORS)(x, draw)
                else:
                    given[name] = draw.choice(WRONG_NUMBERS)
            try:
                function(**given)
            except Exception as error:
                raised += 1
                named = isinstance(error, FlashAttentionError) and "`" in str(error)
                # PyTorch cannot count what is on no device.
                countless = function is unpad_input and isinstance(error, NotImplementedError)
                if not named and not countless:
                    foreign.append(f"{function.__name__} {error!r} {describe(given)}")
    assert foreign == [], f"{len(foreign)} foreign errors:\n" + "\n".join(foreign[:20])
    assert raised > 400
