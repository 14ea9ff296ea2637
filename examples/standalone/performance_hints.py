"""Standalone API, performance hints: each as a call, so that it can be tried."""

import torch

from flash_attn.standalone import DataType, FlashAttentionParams, flash_attention_forward


def main() -> dict[str, object]:
    """Run the samples; returns their tensors and codes."""
    # differs: strict calls run on Hopper GPUs alone; elsewhere strict=False runs the same call
    strict = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, dict[str, object]] = {}

    def run(name, q, k, v, **fields):  # differs: added
        dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
        out = torch.empty(q.shape, dtype=dtype, device=device)
        params = FlashAttentionParams(q=q, k=k, v=v, out=out, **fields)
        code = flash_attention_forward(params, strict=strict and fields.get("num_splits", 1) == 1)
        results[name] = {"q": q, "k": k, "v": v, "out": out, "code": code, **fields}
        print(f"{name}: code {code}")

    # 1. Decoding: few KV heads make the cache small
    q = torch.randn(4, 1, 16, 128, device=device).half()
    k, v = torch.randn(2, 4, 512, 2, 128, device=device).half()
    run("decode", q, k, v, num_heads=16, num_heads_k=2)  # 8:1
    # Added: beyond strict, num_splits=0 divides the keys so that few heads fill the GPU, too
    run("decode_split", q, k, v, num_heads=16, num_heads_k=2, num_splits=0)

    # 2. Packed sequences: similar lengths in one batch
    lengths = [64, 62, 61]  # rather than [64, 16, 4]; differs: shorter than the sample's
    q, k, v = torch.randn(3, sum(lengths), 4, 128, device=device).half()
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    run("varlen", q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds)

    # 3. FP8: a descale that makes fp8_value * descale the original value
    exact = torch.randn(3, 2, 64, 4, 128, device=device) * 3.0
    factors, quantised = [], []
    for x in exact:
        max_abs_value = x.abs().max()
        # 448 is FP8's largest number: a smaller descale overflows, a larger one loses precision
        descale = max_abs_value / 448.0
        factors.append(descale)
        quantised.append((x / descale).to(torch.float8_e4m3fn))
    names = ("q_descale_ptr", "k_descale_ptr", "v_descale_ptr")
    run("fp8", *quantised, dtype=DataType.FP8_E4M3, **dict(zip(names, factors, strict=True)))
    results["fp8"]["exact"] = exact

    # 4. Head dims: all that strict takes; differs: the sample ranks them by speed
    for headdim in (64, 96, 128, 192, 256):
        q, k, v = torch.randn(3, 1, 64, 2, headdim, device=device).half()
        run(f"headdim_{headdim}", q, k, v)
    return results


if __name__ == "__main__":
    main()
