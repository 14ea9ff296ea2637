"""The examples page, "Migrating from standard attention": before, after, and that they agree.

The two functions differ in layout, (batch, heads, seq, dim) before and (batch, seq, heads, dim)
after, and in how causality is asked for: a mask before, an argument after.
"""

# ruff: noqa: RET504 (the code as printed)

import os

import torch


# Before (standard PyTorch)
def standard_attention(q, k, v, mask=None, dropout_p=0.0):
    d_k = q.size(-1)
    scores = torch.matmul(q, k.transpose(-2, -1)) / (d_k**0.5)

    if mask is not None:
        scores = scores.masked_fill(mask == 0, float("-inf"))  # differs: -1e9 overflows float16

    attn_weights = torch.softmax(scores, dim=-1)
    if dropout_p > 0:
        attn_weights = torch.dropout(attn_weights, dropout_p, train=True)

    output = torch.matmul(attn_weights, v)
    return output


# After (FlashAttention-Plus)
os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = "TRUE"
from flash_attn import flash_attn_func


def flash_attention(q, k, v, is_causal=True, dropout_p=0.0):
    # Note: q, k, v should be (batch, seq_len, n_heads, head_dim)
    # If your tensors are (batch, n_heads, seq_len, head_dim), transpose them:
    # q = q.transpose(1, 2)
    # k = k.transpose(1, 2)
    # v = v.transpose(1, 2)

    output = flash_attn_func(q, k, v, causal=is_causal, dropout_p=dropout_p)
    return output


def main() -> dict[str, torch.Tensor]:
    """Run both on the same tensors; returns them, in the layout of "after"."""
    # Added: the sample defines the two functions without calling them.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seq_len = 1024 if device.type == "cuda" else 128
    q, k, v = torch.randn(3, 2, 16, seq_len, 64, device=device, dtype=torch.float16)

    mask = torch.ones(seq_len, seq_len, device=device).tril()
    before = standard_attention(q, k, v, mask=mask)
    before_dropout = standard_attention(q, k, v, mask=mask, dropout_p=0.1)

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    after = flash_attention(q, k, v)
    after_full = flash_attention(q, k, v, is_causal=False)
    after_dropout = flash_attention(q, k, v, dropout_p=0.1)
    before, before_dropout = before.transpose(1, 2), before_dropout.transpose(1, 2)
    print(f"Largest difference: {(before - after).abs().max():.5f}")
    return {
        "q": q,
        "k": k,
        "v": v,
        "before": before,
        "after": after,
        "after_full": after_full,
        "before_dropout": before_dropout,
        "after_dropout": after_dropout,
    }


if __name__ == "__main__":
    main()
