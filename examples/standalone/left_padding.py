"""Standalone API, unsupported 9: left padding of keys and values.

``seqused_k`` cuts at the other end, so it cannot replace it; the two go together.

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
    q = torch.randn(2, 1, 4, 128, device=device).half()  # differs: added
    k, v = torch.randn(2, 2, 64, 4, 128, device=device).half()
    k[0, :20] = float("nan")  # padding is never read
    out = torch.empty_like(q)
    leftpad_k = torch.tensor([20, 0], dtype=torch.int32, device=device)
    params = FlashAttentionParams(q=q, k=k, v=v, out=out)

    params.leftpad_k = leftpad_k  # first key in use

    refused = validate_params(params)
    code = flash_attention_forward(params, strict=False)
    print(f"strict: {refused} ({get_error_string(refused)}), not strict: {code}")
    return {
        "q": q,
        "k": k,
        "v": v,
        "leftpad_k": leftpad_k,
        "out": out,
        "refused": refused,
        "code": code,
    }


if __name__ == "__main__":
    main()
