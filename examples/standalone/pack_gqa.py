"""Standalone API, unsupported 3: PackGQA, query heads grouped by the KV head that they share.

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
    q = torch.randn(2, 64, 16, 128, device=device).half()  # plain: [batch, seqlen, 16 heads, dim]
    k, v = torch.randn(2, 2, 64, 2, 128, device=device).half()
    out = torch.empty_like(q)
    params = FlashAttentionParams(q=q, k=k, v=v, out=out)

    params.pack_gqa = True

    refused = validate_params(params)
    code = flash_attention_forward(params, strict=False)

    # PackGQA: [batch, seqlen, 2 kv_groups, 8 q_per_kv, dim], the same memory
    params.q = q.view(2, 64, 2, 8, 128)
    packed_out = torch.empty_like(params.q)
    params.out = packed_out
    packed_code = flash_attention_forward(params, strict=False)
    print(f"strict: {refused} ({get_error_string(refused)}), not strict: {code}, {packed_code}")
    return {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "packed_out": packed_out,
        "refused": refused,
        "code": code,
        "packed_code": packed_code,
    }


if __name__ == "__main__":
    main()
