"""Standalone API, unsupported 7: dropout of attention weights.

It acts on the weights before they meet the values, so nothing done to the output can replace it.

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
    rng_state = torch.zeros(2, dtype=torch.int64, device=device)  # filled: seed and offset
    params = FlashAttentionParams(q=q, k=k, v=v, out=out)

    params.p_dropout = 0.1
    params.rng_state = rng_state

    refused = validate_params(params)
    code = flash_attention_forward(params, strict=False)
    print(f"strict: {refused} ({get_error_string(refused)}), not strict: {code}")
    return {
        "q": q,
        "k": k,
        "v": v,
        "rng_state": rng_state,
        "out": out,
        "refused": refused,
        "code": code,
    }


if __name__ == "__main__":
    main()
