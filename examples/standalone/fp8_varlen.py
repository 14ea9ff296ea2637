"""Standalone API, supported 3: FP8 E4M3 with packed sequences, one descale or one for each head.

Both ways of descaling are shown: ``float_value = fp8_value * descale_factor``.
"""

import torch

from flash_attn.standalone import (
    AttentionMode,
    DataType,
    FlashAttentionParams,
    flash_attention_forward,
    get_last_error_message,
)


def quantise(x, dims):  # differs: added, the sample has no data
    """(x in FP8, its float32 descale): the largest value of ``dims`` becomes 448, FP8's largest."""
    descale = x.abs().amax(dim=dims, keepdim=True) / 448.0
    return (x / descale).to(torch.float8_e4m3fn), descale


def main() -> dict[str, object]:
    """Run the sample; returns its tensors and the codes."""
    # differs: strict calls run on Hopper GPUs alone; elsewhere strict=False runs the same call
    strict = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_heads, head_dim = 16, 128

    # A batch of three sequences of these lengths
    batch_size = 3
    seqlens = [256, 512, 128] if device.type == "cuda" else [16, 32, 8]  # differs: shorter on CPU

    # Cumulative lengths
    h_cu_seqlens = [0] * (batch_size + 1)
    for i in range(batch_size):
        h_cu_seqlens[i + 1] = h_cu_seqlens[i] + seqlens[i]
    total_tokens = h_cu_seqlens[batch_size]

    # Q, K and V lie together: [total_tokens, num_heads, head_dim]
    exact = torch.randn(3, total_tokens, num_heads, head_dim, device=device)
    (q, q_descale), (k, k_descale), (v, v_descale) = (quantise(x, (0, 1, 2)) for x in exact)
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=device)  # never FP8

    cu_seqlens = torch.tensor(h_cu_seqlens, dtype=torch.int32, device=device)

    params = FlashAttentionParams()
    params.q = q
    params.k = k
    params.v = v
    params.out = out

    params.batch_size = batch_size
    params.seqlen_q = 0  # ignored with cu_seqlens
    params.seqlen_k = 0  # likewise
    params.num_heads = num_heads
    params.num_heads_k = num_heads
    params.head_dim = head_dim

    params.cu_seqlens_q = cu_seqlens
    params.cu_seqlens_k = cu_seqlens
    params.total_q = total_tokens
    params.total_k = total_tokens

    params.q_descale_ptr = q_descale  # one float
    params.k_descale_ptr = k_descale
    params.v_descale_ptr = v_descale
    params.q_descale_batch_stride = 0  # 0: one factor for everything
    params.q_descale_head_stride = 0

    params.dtype = DataType.FP8_E4M3
    params.mode = AttentionMode.VARLEN_PREFILL

    code = flash_attention_forward(params, strict=strict)
    print(f"one descale: code {code} {get_last_error_message()}")

    # Per-head scaling: [batch, num_heads] floats. Here every sequence has the same ones.
    quantised = [quantise(x, (0, 2)) for x in exact]
    heads_out = torch.empty_like(out)
    params.out = heads_out
    for name, (x, descale) in zip("qkv", quantised, strict=True):
        setattr(params, name, x)
        by_head = descale.view(1, num_heads).repeat(batch_size, 1)
        setattr(params, f"{name}_descale_ptr", by_head)
        setattr(params, f"{name}_descale_batch_stride", num_heads)
        setattr(params, f"{name}_descale_head_stride", 1)

    heads_code = flash_attention_forward(params, strict=strict)
    print(f"one descale for each head: code {heads_code} {get_last_error_message()}")
    return {
        "exact": exact,
        "cu_seqlens": cu_seqlens,
        "global": (q, k, v, q_descale, k_descale, v_descale),
        "by_head": tuple(x for x, _ in quantised) + tuple(s for _, s in quantised),
        "out": out,
        "heads_out": heads_out,
        "code": code,
        "heads_code": heads_code,
    }


if __name__ == "__main__":
    main()
