"""The examples page, "Using packed formats": QKV and KV in one tensor."""

import torch


def main() -> dict[str, torch.Tensor]:
    """Run the sample; returns its tensors."""
    batch_size, seq_len, n_heads, head_dim = 2, 1024, 16, 64  # differs: from the first sample
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # differs: CPU works too
    seq_len = seq_len if device.type == "cuda" else 128  # differs: shorter on CPU
    dtype = torch.float16  # differs: from the first sample

    # QKV packed format
    qkv = torch.randn(batch_size, seq_len, 3, n_heads, head_dim, device=device, dtype=dtype)
    from flash_attn import flash_attn_qkvpacked_func

    output = flash_attn_qkvpacked_func(qkv, causal=True)
    qkv_output = output  # differs: kept, because the next lines use the name again

    # KV packed format (for cross attention)
    q = torch.randn(batch_size, seq_len, n_heads, head_dim, device=device, dtype=dtype)
    kv = torch.randn(batch_size, seq_len, 2, n_heads, head_dim, device=device, dtype=dtype)
    from flash_attn import flash_attn_kvpacked_func

    output = flash_attn_kvpacked_func(q, kv)

    # Added: in cross attention the two lengths need not agree.
    short_q = q[:, : seq_len // 2 + 3]
    cross_output = flash_attn_kvpacked_func(short_q, kv)
    print(f"Shapes: {qkv_output.shape}, {output.shape}, {cross_output.shape}")
    return {
        "qkv": qkv,
        "qkv_output": qkv_output,
        "q": q,
        "kv": kv,
        "output": output,
        "short_q": short_q,
        "cross_output": cross_output,
    }


if __name__ == "__main__":
    main()
