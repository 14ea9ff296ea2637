"""Standalone API, unsupported 5: a paged KV cache.

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
    page_size, lengths = 64, [150, 40]
    q = torch.randn(2, 1, 8, 128, device=device).half()  # differs: added
    k, v = torch.randn(2, 10, page_size, 2, 128, device=device).half()  # a pool of ten pages
    out = torch.empty_like(q)
    # Each sequence names its pages in order; what lies after its length is never read.
    page_table = torch.tensor([[7, 2, 9], [4, 0, 0]], dtype=torch.int32, device=device)
    seqused_k = torch.tensor(lengths, dtype=torch.int32, device=device)
    params = FlashAttentionParams(q=q, k=k, v=v, out=out, seqused_k=seqused_k)

    params.page_table = page_table
    params.page_size = page_size

    refused = validate_params(params)
    code = flash_attention_forward(params, strict=False)
    print(f"strict: {refused} ({get_error_string(refused)}), not strict: {code}")
    return {
        "q": q,
        "k": k,
        "v": v,
        "page_table": page_table,
        "seqused_k": seqused_k,
        "out": out,
        "refused": refused,
        "code": code,
    }


if __name__ == "__main__":
    main()
