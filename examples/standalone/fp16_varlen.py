"""Standalone API, supported 4: FP16 prefill of packed sequences, without padding."""

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
    seqlens = [256, 512, 128] if device.type == "cuda" else [16, 32, 8]  # differs: shorter on CPU
    total_tokens = sum(seqlens)
    q, k, v = torch.randn(3, total_tokens, 16, 128, device=device).half()  # differs: added
    out = torch.empty_like(q)
    cu_seqlens = torch.tensor([0, *seqlens], device=device).cumsum(0).to(torch.int32)

    params = FlashAttentionParams()
    params.q, params.k, params.v, params.out = q, k, v, out
    params.batch_size = 3
    params.num_heads = params.num_heads_k = 16
    params.head_dim = 128

    params.cu_seqlens_q = cu_seqlens
    params.cu_seqlens_k = cu_seqlens
    params.total_q = total_tokens
    params.total_k = total_tokens

    params.dtype = DataType.FP16  # FP16 instead of FP8: no descales

    code = flash_attention_forward(params, strict=strict)
    print(f"packed {seqlens}: code {code} {get_last_error_message()}")
    return {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "out": out, "code": code}


if __name__ == "__main__":
    main()
