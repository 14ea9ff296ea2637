"""Standalone API, error handling: codes, their texts, and the message that names the parameter."""

import sys

import torch

from flash_attn.standalone import (
    FlashAttentionParams,
    flash_attention_forward,
    get_error_string,
    get_last_error_message,
)


def main() -> dict[str, object]:
    """Run the sample on calls that fail; returns codes and messages."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v = torch.randn(3, 2, 64, 16, 80, device=device).half()  # differs: added
    small_q, small_k, small_v = (x[..., :64] for x in (q, k, v))
    bounds = torch.tensor([0, 64, 128], dtype=torch.int32, device=device)
    out, small_out = torch.empty_like(q), torch.empty_like(small_q)

    # The common codes; differs: a call shows each
    calls = {
        -1: FlashAttentionParams(q=q, k=k, v=v),  # null pointer: out
        -2: FlashAttentionParams(q=q, k=k, v=v, out=out),  # unsupported head_dim
        -3: FlashAttentionParams(q=1, k=1, v=1, out=2, head_dim=256, dtype=2),  # of FP8
        -6: FlashAttentionParams(  # cu_seqlens mismatch
            q=q.flatten(0, 1), k=k.flatten(0, 1), v=v.flatten(0, 1), out=out.flatten(0, 1),
            cu_seqlens_q=bounds, head_dim=64,
        ),
        -11: FlashAttentionParams(  # -10 to -19: unsupported features
            q=small_q, k=small_k, v=small_v, out=small_out, softcap=30.0
        ),
    }  # fmt: skip
    found = {}
    for expected, params in calls.items():
        result = flash_attention_forward(params)

        if result != 0:
            # What went wrong
            print(f"Flash Attention failed: {get_error_string(result)}", file=sys.stderr)

            # Which parameter, and what was found; with -100 it is the CUDA error
            print(f"  {get_last_error_message()}", file=sys.stderr)
        found[expected] = (result, get_last_error_message())
    print(f"codes {[result for result, _ in found.values()]}")
    return {"found": found}


if __name__ == "__main__":
    main()
