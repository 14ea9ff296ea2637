"""Standalone API, supported 1: FP16 prefill with a causal mask."""

import torch

from flash_attn.standalone import (
    DataType,
    FlashAttentionParams,
    flash_attention_forward,
    get_last_error_message,
)


def main() -> dict[str, object]:
    """Run the sample; returns its tensors and the code."""
    # differs: strict calls run on Hopper GPUs alone; elsewhere strict=False runs the same call
    strict = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seqlen = 512 if device.type == "cuda" else 64  # differs: shorter on CPU
    q, k, v = torch.randn(3, 2, seqlen, 16, 128, device=device).half()  # differs: added
    out = torch.empty_like(q)

    params = FlashAttentionParams()
    params.q = q  # [batch, seqlen, num_heads, head_dim]
    params.k = k
    params.v = v
    params.out = out

    params.batch_size = 2
    params.seqlen_q = seqlen
    params.seqlen_k = seqlen
    params.num_heads = 16
    params.num_heads_k = 16  # MHA
    params.head_dim = 128

    params.is_causal = True  # causal masking
    params.dtype = DataType.FP16

    code = flash_attention_forward(params, strict=strict)
    print(f"causal prefill of 2 x {seqlen} tokens: code {code} {get_last_error_message()}")
    return {"q": q, "k": k, "v": v, "out": out, "code": code}


if __name__ == "__main__":
    main()
