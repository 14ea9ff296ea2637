"""The examples page, "Sliding window attention": causal attention that looks 256 tokens back.

``causal=True`` together with a window is accepted: the window's right side becomes 0.
"""

import torch

from flash_attn import flash_attn_func


def main() -> dict[str, object]:
    """Run the sample on the tensors of the grouped-query sample; returns them and the output."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # differs: CPU works too
    seq_len = 1024 if device.type == "cuda" else 320  # differs: shorter on CPU, window still binds
    q = torch.randn(2, seq_len, 32, 128, device=device, dtype=torch.float16)  # differs: repeated
    k = torch.randn(2, seq_len, 8, 128, device=device, dtype=torch.float16)  # differs: repeated
    v = torch.randn(2, seq_len, 8, 128, device=device, dtype=torch.float16)  # differs: repeated

    # Local attention with a window size
    window_size = (256, 0)  # look back 256 tokens, do not look ahead
    output = flash_attn_func(q, k, v, causal=True, window_size=window_size)
    print(f"Output shape: {output.shape}")
    return {"q": q, "k": k, "v": v, "window_size": window_size, "output": output}


if __name__ == "__main__":
    main()
