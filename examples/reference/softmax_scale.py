"""The examples page, "Custom softmax scale": 1.5 times the default."""

import torch

from flash_attn import flash_attn_func


def main() -> dict[str, object]:
    """Run the sample on the tensors of the grouped-query sample; returns them and the output."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # differs: CPU works too
    seq_len = 1024 if device.type == "cuda" else 128  # differs: shorter on CPU
    head_dim = 128  # differs: repeated from the grouped-query sample
    q = torch.randn(2, seq_len, 32, 128, device=device, dtype=torch.float16)  # differs: repeated
    k = torch.randn(2, seq_len, 8, 128, device=device, dtype=torch.float16)  # differs: repeated
    v = torch.randn(2, seq_len, 8, 128, device=device, dtype=torch.float16)  # differs: repeated

    # Override the default scale (1/sqrt(head_dim))
    custom_scale = 1.0 / (head_dim**0.5) * 1.5
    output = flash_attn_func(q, k, v, softmax_scale=custom_scale, causal=True)
    print(f"Output shape: {output.shape}, scale {custom_scale:.4f}")
    return {"q": q, "k": k, "v": v, "custom_scale": custom_scale, "output": output}


if __name__ == "__main__":
    main()
