"""The API reference, "Environment variables": FLASH_ATTENTION_USE_FLAGGEMS.

The variable is looked at on every call, so setting it after the import, or changing it later,
takes effect. TRUE, the default, is the Triton family of kernels; FALSE attempts the original CUDA
kernels and says once, as a warning, when they cannot compute a call.
"""

import os
import warnings

import torch

from flash_attn import flash_attn_func


def main() -> dict[str, torch.Tensor]:
    """Compute the same attention under both values; returns the tensors."""
    os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = "TRUE"

    # Added: the sample sets the variable and stops.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v = torch.randn(3, 2, 128, 4, 64, device=device, dtype=torch.float16)
    output = flash_attn_func(q, k, v, causal=True)

    os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = "FALSE"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        original_output = flash_attn_func(q, k, v, causal=True)
    for warning in caught:
        print(f"{warning.category.__name__}: {warning.message}")

    os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = "TRUE"
    difference = (output.float() - original_output.float()).abs().max()
    print(f"Largest difference between the two: {difference:.5f}")
    return {"q": q, "k": k, "v": v, "output": output, "original_output": original_output}


if __name__ == "__main__":
    main()
