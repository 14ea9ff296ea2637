"""The examples page, "Error handling": a wrapper that falls back to standard attention.

What the printed wrapper gets right: the layout, it transposes in and back. What it leaves out,
silently: ``softmax_scale``, ``window_size``, ``softcap``, ``alibi_slopes``, ``dropout_p`` and
``return_attn_probs`` are ignored; fewer key/value heads than query heads, or ``causal`` with
two lengths, fail in the fallback itself; and ``except Exception`` hides errors of any kind.
``complete_flash_attention`` below the sample does without these gaps.
"""

import torch
import torch.nn.functional as F

from flash_attn import flash_attn_func


def safe_flash_attention(q, k, v, **kwargs):
    """A wrapper with a fallback to standard attention."""
    try:
        # Try FlashAttention first
        return flash_attn_func(q, k, v, **kwargs)
    except Exception as e:
        print(f"FlashAttention failed: {e}, falling back to standard attention")

        # Fallback implementation
        batch, seq_len, n_heads, head_dim = q.shape
        q = q.transpose(1, 2)  # (batch, n_heads, seq_len, head_dim)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)

        scores = torch.matmul(q, k.transpose(-2, -1)) / (head_dim**0.5)

        if kwargs.get("causal", False):
            mask = torch.triu(torch.ones(seq_len, seq_len, device=q.device), diagonal=1)
            scores = scores.masked_fill(mask.bool(), float("-inf"))

        attn = torch.softmax(scores, dim=-1)
        output = torch.matmul(attn, v)
        return output.transpose(1, 2)  # back to (batch, seq_len, n_heads, head_dim)


def complete_flash_attention(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
):
    """Added: the fallback with every argument of flash_attn_func that changes the output."""
    try:
        return flash_attn_func(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
        )
    except RuntimeError as e:  # every error of this package is a RuntimeError
        print(f"FlashAttention failed: {e}, falling back to standard attention")
    seqlen_q, seqlen_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    # Queries and keys are aligned at their ends; distance > 0 is the past.
    row = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
    distance = row - torch.arange(seqlen_k, device=q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[..., None, None] * distance.abs()
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    # A row that sees no key has output 0; softmax alone would make it NaN.
    attn = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    attn = attn.masked_fill(hidden, 0.0)
    attn = torch.dropout(attn, dropout_p, train=dropout_p > 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", attn, v)


def main() -> dict[str, object]:
    """Force both wrappers to fall back; returns their results beside those of the kernels."""
    # Added: the sample only defines the function. Head dim 512 is refused, hence the fallback;
    # columns of zeros make it the same attention as head dim 64 with the scale of 512.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seq_len = 512 if device.type == "cuda" else 96
    q, k, v = torch.randn(3, 2, seq_len, 8, 64, device=device, dtype=torch.float16)
    q = q * 4  # keeps the softmax away from uniform under the scale of 512
    wide = [F.pad(x.float(), (0, 512 - 64)) for x in (q, k, v)]
    softmax_scale = 512**-0.5
    fast = safe_flash_attention(q, k, v, softmax_scale=softmax_scale, causal=True)
    fallback = safe_flash_attention(*wide, causal=True)
    print(f"Largest difference: {(fast - fallback[..., :64]).abs().max():.5f}")

    # The printed fallback ignores the window without a word.
    ignored = safe_flash_attention(*wide, causal=True, window_size=(16, 0))

    options = {
        "softmax_scale": 0.1,
        "causal": True,
        "window_size": (48, 0),
        "softcap": 15.0,
        "alibi_slopes": torch.linspace(0.02, 0.2, 8, device=device),
    }
    short_q, k2, v2 = q[:, :-7], k[:, :, :2], v[:, :, :2]
    complete_fast = complete_flash_attention(short_q, k2, v2, **options)
    complete_fallback = complete_flash_attention(
        wide[0][:, :-7], wide[1][:, :, :2], wide[2][:, :, :2], **options
    )
    return {
        "q": q,
        "k": k,
        "v": v,
        "softmax_scale": softmax_scale,
        "fast": fast,
        "fallback": fallback,
        "ignored": ignored,
        "options": options,
        "short_q": short_q,
        "k2": k2,
        "v2": v2,
        "complete_fast": complete_fast,
        "complete_fallback": complete_fallback,
    }


if __name__ == "__main__":
    main()
