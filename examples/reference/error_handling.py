"""The API reference, "Error handling": every error on purpose is a ``RuntimeError``.

Wrong arguments are also ``AssertionError`` and ``ValueError``, a missing backend is also an
``ImportError``, so each line of the reference's table of exceptions holds.
"""

import torch
import torch.nn.functional as F

from flash_attn import flash_attn_func


def standard_attention(q, k, v):  # differs: added, the sample leaves it undefined
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def main() -> dict[str, object]:
    """Run the sample on a head dim that is refused; returns its result and the errors."""
    # Added: tensors for the sample. The largest head dim is 256, so 512 is an error.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v = torch.randn(3, 2, 128, 4, 512, device=device, dtype=torch.float16)
    error = None

    try:
        output = flash_attn_func(q, k, v, causal=True)
    except RuntimeError as e:
        print(f"FlashAttention error: {e}")
        error = e  # differs: kept to be returned
        # Fall back to standard attention
        output = standard_attention(q, k, v)

    # Added: the reference also lists constraint violations as AssertionError.
    constraint_error = None
    try:
        flash_attn_func(q[..., :64], k[..., :32], v[..., :64], causal=True)
    except AssertionError as e:
        print(f"Constraint violated: {e}")
        constraint_error = e
    return {
        "q": q,
        "k": k,
        "v": v,
        "output": output,
        "error": error,
        "constraint_error": constraint_error,
    }


if __name__ == "__main__":
    main()
