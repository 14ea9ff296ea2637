"""The examples page, "Performance benchmark": milliseconds of the causal forward pass."""

import time

import torch

from flash_attn import flash_attn_func


def synchronize(device):  # differs: added, because a CPU has nothing to wait for
    if device.type == "cuda":
        torch.cuda.synchronize()


def benchmark_attention(seq_lengths, n_heads=16, head_dim=64, num_iters=100):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # differs: CPU works too
    dtype = torch.float16
    times = {}  # differs: the figures are returned as well

    for seq_len in seq_lengths:
        q = torch.randn(1, seq_len, n_heads, head_dim, device=device, dtype=dtype)
        k = torch.randn(1, seq_len, n_heads, head_dim, device=device, dtype=dtype)
        v = torch.randn(1, seq_len, n_heads, head_dim, device=device, dtype=dtype)

        # Warm up
        for _ in range(10):
            _ = flash_attn_func(q, k, v, causal=True)

        synchronize(device)  # differs: see above
        start = time.time()

        for _ in range(num_iters):
            _ = flash_attn_func(q, k, v, causal=True)

        synchronize(device)  # differs: see above
        end = time.time()

        avg_time = (end - start) / num_iters * 1000  # milliseconds
        print(f"Sequence length {seq_len}: {avg_time:.2f} ms")
        times[seq_len] = avg_time  # differs: see above
    return times  # differs: see above


def main() -> dict[str, object]:
    """Run the benchmark; returns its times and one checked call of its first shape."""
    # Run the benchmark
    if torch.cuda.is_available():  # differs: two short lengths and few repeats on a CPU
        times = benchmark_attention([512, 1024, 2048, 4096, 8192])
    else:
        times = benchmark_attention([64, 128], num_iters=2)

    # Added: a time says nothing about the result, so one call is handed out to be checked.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v = torch.randn(3, 1, 512, 16, 64, device=device, dtype=torch.float16)
    output = flash_attn_func(q, k, v, causal=True)
    return {"times": times, "q": q, "k": k, "v": v, "output": output}


if __name__ == "__main__":
    main()
