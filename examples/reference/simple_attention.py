"""The examples page, "Simple attention computation": causal attention of one batch."""

import os

import torch

# Enable the FlagGems backend
os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = "TRUE"

from flash_attn import flash_attn_func


def main() -> dict[str, torch.Tensor]:
    """Run the sample; returns its tensors."""
    # Create example tensors
    batch_size, seq_len, n_heads, head_dim = 2, 1024, 16, 64
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # differs: CPU works too
    seq_len = seq_len if device.type == "cuda" else 128  # differs: shorter on CPU
    dtype = torch.float16

    q = torch.randn(batch_size, seq_len, n_heads, head_dim, device=device, dtype=dtype)
    k = torch.randn(batch_size, seq_len, n_heads, head_dim, device=device, dtype=dtype)
    v = torch.randn(batch_size, seq_len, n_heads, head_dim, device=device, dtype=dtype)

    # Compute attention
    output = flash_attn_func(q, k, v, causal=True)
    print(f"Output shape: {output.shape}")
    return {"q": q, "k": k, "v": v, "output": output}


if __name__ == "__main__":
    main()
