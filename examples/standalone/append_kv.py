"""Standalone API, unsupported 10: appending new keys and values to the cache.

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
    q, k_new, v_new = torch.randn(3, 2, 128, 4, 128, device=device).half()  # differs: added
    k, v = torch.randn(2, 2, 300, 4, 128, device=device).half()  # caches with room for 300 keys
    out = torch.empty_like(q)
    seqused_k = torch.tensor([100, 172], dtype=torch.int32, device=device)  # of which so many are
    params = FlashAttentionParams(q=q, k=k, v=v, out=out, seqused_k=seqused_k, is_causal=True)

    params.k_new = k_new
    params.v_new = v_new
    params.seqlen_knew = 128

    refused = validate_params(params)
    code = flash_attention_forward(params, strict=False)
    seqused_k += 128  # the call does not change the lengths
    print(f"strict: {refused} ({get_error_string(refused)}), not strict: {code}")
    return {
        "q": q,
        "k_new": k_new,
        "v_new": v_new,
        "k": k,
        "v": v,
        "seqused_k": seqused_k,
        "out": out,
        "refused": refused,
        "code": code,
    }


if __name__ == "__main__":
    main()
