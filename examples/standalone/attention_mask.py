"""Standalone API, unsupported 8: a mask of your own.

The default, ``strict=True``, refuses it with the original's code; ``strict=False`` computes it.
"""

import torch

from flash_attn.standalone import (
    FlashAttentionParams,
    flash_attention_forward,
    get_error_string,
    validate_params,
)


def main() -> dict[str, object]:
    """Run the sample; returns its tensors, the strict code and the code of the call."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # differs: CPU works too
    q, k, v = torch.randn(3, 2, 64, 4, 128, device=device).half()  # differs: added
    out = torch.empty_like(q)
    # One mask for all heads: every query sees its own block of 16 keys and the first 4.
    block = torch.arange(64, device=device) // 16
    mask = (block[:, None] == block) | (torch.arange(64, device=device) < 4)
    params = FlashAttentionParams(q=q, k=k, v=v, out=out)

    params.attn_mask = mask[None, None]  # (1 or batch, 1 or heads, seqlen_q, seqlen_k)

    refused = validate_params(params)
    code = flash_attention_forward(params, strict=False)
    print(f"strict: {refused} ({get_error_string(refused)}), not strict: {code}")
    return {
        "q": q,
        "k": k,
        "v": v,
        "mask": params.attn_mask,
        "out": out,
        "refused": refused,
        "code": code,
    }


if __name__ == "__main__":
    main()
