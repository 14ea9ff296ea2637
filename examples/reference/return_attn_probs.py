"""The API reference, ``return_attn_probs``: what comes back, and where probabilities come from.

The reference says "also returns attention probabilities". What comes back is FlashAttention-2's
tuple ``(out, softmax_lse, S_dmask)``: S_dmask is empty without dropout, and with dropout its sign
tells which entries were dropped. The probability matrix is never formed by the kernels; where it
is wanted, ``attention_probs`` forms it.
"""

import torch

from flash_attn import attention_probs, flash_attn_func


def main() -> dict[str, torch.Tensor]:
    """Run the call and the helper; returns the tensors."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seq_len = 512 if device.type == "cuda" else 96
    q = torch.randn(2, seq_len, 8, 64, device=device, dtype=torch.float16)
    k, v = torch.randn(2, 2, seq_len + 5, 2, 64, device=device, dtype=torch.float16)

    out, softmax_lse, s_dmask = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    probs = attention_probs(q, k, causal=True)

    dropped, _, dropped_dmask = flash_attn_func(
        q, k, v, dropout_p=0.25, causal=True, return_attn_probs=True
    )
    print(f"out {tuple(out.shape)}, lse {tuple(softmax_lse.shape)}, probs {tuple(probs.shape)}")
    print(f"S_dmask {tuple(s_dmask.shape)}, with dropout {tuple(dropped_dmask.shape)}")

    options = {
        "softmax_scale": 0.2,
        "window_size": (24, 8),
        "softcap": 20.0,
        "alibi_slopes": torch.linspace(0.02, 0.2, 8, device=device),
    }
    return {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "softmax_lse": softmax_lse,
        "s_dmask": s_dmask,
        "probs": probs,
        "dropped": dropped,
        "dropped_dmask": dropped_dmask,
        "options": options,
        "option_probs": attention_probs(q, k, **options),
    }


if __name__ == "__main__":
    main()
