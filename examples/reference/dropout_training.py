"""The examples page, "Dropout during training".

``flash_attn_func`` takes the probability of every call and does not look at ``model.training``;
the modules (``FlashAttention``, ``FlashMHA``) drop in training mode only. Forward and backward
draw the same mask.
"""

import torch

from flash_attn import FlashAttention, flash_attn_func


def main() -> dict[str, object]:
    """Run the sample; returns tensors from which its dropout mask can be checked."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # differs: CPU works too
    seq_len = 1024 if device.type == "cuda" else 128  # differs: shorter on CPU
    q = torch.randn(2, seq_len, 32, 128, device=device, dtype=torch.float16)  # differs: repeated
    k = torch.randn(2, seq_len, 8, 128, device=device, dtype=torch.float16)  # differs: repeated
    v = torch.randn(2, seq_len, 8, 128, device=device, dtype=torch.float16)  # differs: repeated
    model = FlashAttention(32, 128, dropout=0.1, causal=True)  # differs: a model that heeds train()

    # Apply dropout to the attention weights
    model.train()
    output = flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.1,  # 10% dropout
        causal=True,
    )
    train_output = output  # differs: kept, because the next lines use the name again
    module_train_output = model(q, k, v)  # differs: added

    # Added: a training step. S_dmask carries the mask in its sign bit (set: dropped).
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dropped, _, s_dmask = flash_attn_func(
        *leaves, dropout_p=0.1, causal=True, return_attn_probs=True
    )
    dout = torch.randn_like(dropped)
    dq, dk, dv = torch.autograd.grad(dropped, leaves, dout)

    # Disable dropout for inference
    model.eval()
    with torch.no_grad():
        output = flash_attn_func(q, k, v, dropout_p=0.0, causal=True)
        module_eval_output = model(q, k, v)  # differs: added
    print(f"Mean change by dropout: {(train_output - output).abs().float().mean():.4f}")
    return {
        "q": q,
        "k": k,
        "v": v,
        "output": output,
        "train_output": train_output,
        "module_train_output": module_train_output,
        "module_eval_output": module_eval_output,
        "dropped": dropped.detach(),
        "s_dmask": s_dmask,
        "dout": dout,
        "grads": (dq, dk, dv),
    }


if __name__ == "__main__":
    main()
