"""The API reference's functions and module classes, each called with every documented argument."""

import torch

from flash_attn import (
    FlashAttention,
    FlashMHA,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)


def main() -> dict[str, object]:
    """Call everything on the same tensors; returns them and the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size, seqlen, nheads, headdim = 2, 100, 4, 64
    qkv = torch.randn(batch_size, seqlen, 3, nheads, headdim, device=device, dtype=torch.bfloat16)
    q, k, v = qkv.unbind(dim=2)
    alibi_slopes = torch.linspace(0.02, 0.2, nheads, device=device)
    arguments = {
        "dropout_p": 0.0,
        "softmax_scale": 0.1,
        "causal": True,
        "window_size": (40, 0),
        "softcap": 25.0,
        "alibi_slopes": alibi_slopes,
        "deterministic": True,
        "return_attn_probs": False,
    }
    output = flash_attn_func(q, k, v, **arguments)
    qkvpacked_output = flash_attn_qkvpacked_func(qkv, **arguments)
    kvpacked_output = flash_attn_kvpacked_func(q, qkv[:, :, 1:], **arguments)
    positional_output = flash_attn_func(q, k, v, *arguments.values())

    attention = FlashAttention(
        num_heads=nheads,
        head_dim=headdim,
        dropout=0.0,
        causal=True,
        window_size=(40, 0),
        alibi_slopes=alibi_slopes,
    ).to(device)
    attention.reset_parameters()  # there are none: the call changes nothing
    module_output = attention(q, k, v)

    mha = FlashMHA(
        embed_dim=nheads * headdim,
        num_heads=nheads,
        dropout=0.0,
        causal=True,
        layer_idx=0,
        device=device,
        dtype=torch.float16,
    )
    x = torch.randn(batch_size, seqlen, nheads * headdim, device=device, dtype=torch.float16)
    mha_output = mha(x)
    print(f"Shapes: {tuple(output.shape)}, FlashMHA {tuple(mha_output.shape)}")
    return {
        "qkv": qkv,
        "arguments": arguments,
        "output": output,
        "qkvpacked_output": qkvpacked_output,
        "kvpacked_output": kvpacked_output,
        "positional_output": positional_output,
        "attention": attention,
        "module_output": module_output,
        "mha": mha,
        "x": x,
        "mha_output": mha_output,
    }


if __name__ == "__main__":
    main()
