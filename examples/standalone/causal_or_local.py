"""Standalone API, limits: causal and local attention exclude each other, heads must divide.

The first holds for ``strict=True``; ``strict=False`` takes a causal mask with a window.
"""

import torch

from flash_attn.standalone import (
    FlashAttentionParams,
    flash_attention_forward,
    get_error_string,
    validate_params,
)


def main() -> dict[str, object]:
    """Run the sample; returns its tensors and codes."""
    # differs: strict calls run on Hopper GPUs alone; elsewhere strict=False runs the same call
    strict = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    window = 16  # differs: the sample has 256
    q, k, v = torch.randn(3, 2, 64, 4, 128, device=device).half()  # differs: added
    outs = {name: torch.empty_like(q) for name in ("causal", "local", "both")}
    params = FlashAttentionParams(q=q, k=k, v=v)
    codes = {}

    # Wrong
    params.out = outs["both"]
    params.is_causal = True
    params.window_size_left = window  # conflict
    refused = validate_params(params)
    codes["both"] = flash_attention_forward(params, strict=False)

    # Right: one of the two
    params.out = outs["causal"]
    params.is_causal = True
    params.window_size_left = -1
    codes["causal"] = flash_attention_forward(params, strict=strict)
    params.out = outs["local"]
    params.is_causal = False
    params.window_size_left = window
    codes["local"] = flash_attention_forward(params, strict=strict)

    # num_heads % num_heads_k == 0 and num_heads_k <= num_heads
    heads = {
        "too_many": FlashAttentionParams(q=q[:, :, :2], k=k, v=v, out=q[:, :, :2]),
        "no_multiple": FlashAttentionParams(q=q, k=k[:, :, :3], v=v[:, :, :3], out=q),
    }
    codes |= {name: validate_params(wrong) for name, wrong in heads.items()}
    print(f"both: {refused} ({get_error_string(refused)}), strict=False {codes['both']}")
    print(f"causal {codes['causal']}, local {codes['local']}")
    for name in heads:
        print(f"{name}: {codes[name]} ({get_error_string(codes[name])})")
    found = {"refused": refused, "codes": codes}
    return {"q": q, "k": k, "v": v, "window": window, "outs": outs, **found}


if __name__ == "__main__":
    main()
