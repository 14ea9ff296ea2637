"""Standalone API, unsupported 4: split-KV, the keys in parts that are merged at the end.

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
    context = 70_000 if device.type == "cuda" else 4_000  # differs: shorter on CPU
    q = torch.randn(1, 1, 16, 128, device=device).half()  # differs: added
    k, v = torch.randn(2, 1, context, 2, 128, device=device).half()
    out = torch.empty_like(q)
    params = FlashAttentionParams(q=q, k=k, v=v, out=out)

    params.num_splits = 4  # 0 would choose a number that fills the GPU

    refused = validate_params(params)
    code = flash_attention_forward(params, strict=False)
    print(f"strict: {refused} ({get_error_string(refused)}), not strict: {code}")
    return {"q": q, "k": k, "v": v, "out": out, "refused": refused, "code": code}


if __name__ == "__main__":
    main()
