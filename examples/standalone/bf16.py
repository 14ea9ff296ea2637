"""Standalone API, unsupported 1: the data type BF16.

The default, ``strict=True``, refuses it with the original's code; ``strict=False`` computes it.
"""

import torch

from flash_attn.standalone import (
    DataType,
    FlashAttentionParams,
    flash_attention_forward,
    get_error_string,
    validate_params,
)


def main() -> dict[str, object]:
    """Run the sample; returns its tensors, the strict code and the code of the call."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # differs: CPU works too
    q, k, v = torch.randn(3, 2, 64, 4, 128, device=device).bfloat16()  # differs: added
    out = torch.empty_like(q)
    params = FlashAttentionParams(q=q, k=k, v=v, out=out)

    params.dtype = DataType.BF16

    refused = validate_params(params)
    code = flash_attention_forward(params, strict=False)
    print(f"strict: {refused} ({get_error_string(refused)}), not strict: {code}")
    return {"q": q, "k": k, "v": v, "out": out, "refused": refused, "code": code}


if __name__ == "__main__":
    main()
