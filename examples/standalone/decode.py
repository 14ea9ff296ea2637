"""Standalone API, supported 2: FP16 decoding of one token a sequence with grouped queries."""

import torch

from flash_attn.standalone import (
    AttentionMode,
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
    context = 2048 if device.type == "cuda" else 256  # differs: shorter on CPU
    q = torch.randn(4, 1, 16, 128, device=device).half()  # differs: added
    k, v = torch.randn(2, 4, context, 2, 128, device=device).half()
    out = torch.empty_like(q)

    params = FlashAttentionParams()
    params.q = q  # [batch, 1, num_heads, head_dim]: one new token
    params.k = k  # [batch, context_len, num_heads_k, head_dim]: the whole context
    params.v = v
    params.out = out

    params.batch_size = 4
    params.seqlen_q = 1  # single token
    params.seqlen_k = context  # full context length
    params.num_heads = 16
    params.num_heads_k = 2  # GQA, 16:2
    params.head_dim = 128

    params.is_causal = False  # the token stands at the end: it may see every key
    params.dtype = DataType.FP16
    params.mode = AttentionMode.DECODE

    code = flash_attention_forward(params, strict=strict)
    print(f"decoding over {context} keys: code {code} {get_last_error_message()}")
    return {"q": q, "k": k, "v": v, "out": out, "code": code}


if __name__ == "__main__":
    main()
