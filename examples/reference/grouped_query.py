"""The examples page, "Multi-query attention": printed with 8 key/value heads, so it is GQA.

Multi-query attention in the strict sense has one key/value head; it is added below the sample.
"""

import torch

from flash_attn import flash_attn_func


def main() -> dict[str, torch.Tensor]:
    """Run the sample and the strict MQA case; returns the tensors."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # differs: CPU works too
    dtype = torch.float16  # differs: from the first sample

    # GQA: several query heads share one key/value head (differs: printed as MQA)
    batch_size, seq_len = 2, 1024
    n_heads_q, n_heads_kv = 32, 8  # 32 query heads, 8 key/value heads
    head_dim = 128
    seq_len = seq_len if device.type == "cuda" else 128  # differs: shorter on CPU

    q = torch.randn(batch_size, seq_len, n_heads_q, head_dim, device=device, dtype=dtype)
    k = torch.randn(batch_size, seq_len, n_heads_kv, head_dim, device=device, dtype=dtype)
    v = torch.randn(batch_size, seq_len, n_heads_kv, head_dim, device=device, dtype=dtype)

    # FlashAttention handles it by the shapes
    output = flash_attn_func(q, k, v, causal=True)
    print(f"GQA output shape: {output.shape}")  # differs: GQA; (2, 1024, 32, 128) on a GPU

    # Added: MQA proper, all query heads share one key/value head.
    k_mqa, v_mqa = k[:, :, :1], v[:, :, :1]
    mqa_output = flash_attn_func(q, k_mqa, v_mqa, causal=True)
    print(f"MQA output shape: {mqa_output.shape}")
    return {
        "q": q,
        "k": k,
        "v": v,
        "output": output,
        "k_mqa": k_mqa,
        "v_mqa": v_mqa,
        "mqa_output": mqa_output,
    }


if __name__ == "__main__":
    main()
