"""Standalone API, the minimal example: causal FP16 attention on a stream of its own."""

import sys

import torch

from flash_attn.standalone import (
    DataType,
    FlashAttentionParams,
    flash_attention_forward,
    get_error_string,
)


def main() -> dict[str, object]:
    """Run the sample; returns its tensors and the code."""
    on_gpu = torch.cuda.is_available()
    # differs: strict calls run on Hopper GPUs alone; elsewhere strict=False runs the same call
    strict = on_gpu and torch.cuda.get_device_capability() == (9, 0)
    batch, seqlen, heads, headdim = 2, 512 if on_gpu else 64, 16, 128  # differs: shorter on CPU

    # Device memory
    device = torch.device("cuda" if on_gpu else "cpu")
    q, k, v = torch.randn(3, batch, seqlen, heads, headdim, device=device).half()
    out = torch.empty_like(q)

    # Parameters; differs: addresses are of GPU memory, so CPU tensors are passed themselves
    params = FlashAttentionParams()
    params.q, params.k, params.v, params.out = (
        x.data_ptr() if on_gpu else x for x in (q, k, v, out)
    )
    params.batch_size = 2
    params.seqlen_q = seqlen
    params.seqlen_k = seqlen
    params.num_heads = 16
    params.num_heads_k = 16
    params.head_dim = 128
    params.is_causal = True
    params.dtype = DataType.FP16

    # Run
    stream = torch.cuda.Stream() if on_gpu else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())  # differs: q, k and v are made there
    result = flash_attention_forward(params, stream, strict=strict)
    if result != 0:
        print(f"Error: {get_error_string(result)}", file=sys.stderr)
    if stream is not None:
        stream.synchronize()
    print(f"code {result}, out {tuple(out.shape)}")
    return {"q": q, "k": k, "v": v, "out": out, "code": result}


if __name__ == "__main__":
    main()
