"""The examples page, "Custom attention layer": a pre-norm transformer block around FlashMHA.

The printed usage feeds float16 activations to float32 weights, which linear layers refuse
in eager PyTorch. Both ways that work are shown: float16 weights
(``.half()``) and float32 weights under autocast.
"""

# ruff: noqa: RET504 (the code as printed)

import torch
import torch.nn as nn

from flash_attn.modules.mha import FlashMHA


class TransformerBlock(nn.Module):
    def __init__(self, dim, n_heads, dropout=0.1):
        super().__init__()
        self.attn = FlashMHA(embed_dim=dim, num_heads=n_heads, dropout=dropout, causal=True)
        self.ln1 = nn.LayerNorm(dim)
        self.ln2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x):
        # Pre-norm architecture
        x = x + self.attn(self.ln1(x))
        x = x + self.mlp(self.ln2(x))
        return x


def main() -> dict[str, object]:
    """Run the sample both ways; returns the models, the input and the outputs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # differs: CPU works too
    seq_len = 512 if device.type == "cuda" else 64  # differs: shorter on CPU

    # Usage
    model = TransformerBlock(dim=768, n_heads=12).to(device).half()  # differs: weights like x
    x = torch.randn(2, seq_len, 768, device=device, dtype=torch.float16)  # differs: device, length
    output = model(x)

    # Added: the weights stay in float32 and autocast chooses the precision of every operation.
    autocast_model = TransformerBlock(dim=768, n_heads=12).to(device)
    with torch.autocast(device.type, dtype=torch.float16):
        autocast_output = autocast_model(x)

    # Added: without dropout, so that the results can be checked.
    model.eval()
    autocast_model.eval()
    with torch.no_grad():
        eval_output = model(x)
        with torch.autocast(device.type, dtype=torch.float16):
            autocast_eval_output = autocast_model(x)
    print(f"Output: {output.shape} {output.dtype}, under autocast {autocast_output.dtype}")
    return {
        "model": model,
        "x": x,
        "output": output,
        "eval_output": eval_output,
        "autocast_model": autocast_model,
        "autocast_output": autocast_output,
        "autocast_eval_output": autocast_eval_output,
    }


if __name__ == "__main__":
    main()
