"""Standalone API, unsupported 6: rotary position embedding.

It turns the keys that are appended and the queries; keys that lie in the cache were turned when
they were appended. A prefill appends its whole prompt to an empty cache.

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
    seqlen, rotary_dim = 48, 64
    q, k_new, v_new = torch.randn(3, 2, seqlen, 4, 128, device=device).half()  # differs: added
    k, v = torch.zeros(2, 2, 64, 4, 128, device=device).half()  # empty caches of 64 rows
    out = torch.empty_like(q)
    angles = torch.arange(64.0)[:, None] / 10_000 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    cos, sin = angles.cos().half().to(device), angles.sin().half().to(device)
    params = FlashAttentionParams(q=q, k=k, v=v, out=out, is_causal=True)
    params.k_new, params.v_new = k_new, v_new
    params.seqused_k = torch.zeros(2, dtype=torch.int32, device=device)

    params.rotary_cos = cos
    params.rotary_sin = sin
    params.rotary_dim = rotary_dim

    refused = validate_params(params)
    code = flash_attention_forward(params, strict=False)
    print(f"strict: {refused} ({get_error_string(refused)}), not strict: {code}")
    return {
        "q": q,
        "k_new": k_new,
        "v_new": v_new,
        "k": k,
        "v": v,
        "cos": cos,
        "sin": sin,
        "out": out,
        "refused": refused,
        "code": code,
    }


if __name__ == "__main__":
    main()
