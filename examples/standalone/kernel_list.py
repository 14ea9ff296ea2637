"""Standalone API, the list of kernels: the eight (type, head dim) pairs that strict accepts."""

from flash_attn.standalone import DataType, FlashAttentionParams, validate_params


def main() -> dict[str, object]:
    """Ask for every pair; returns the accepted ones with strict on and off."""
    accepted: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    for strict, found in accepted.items():
        for dtype in DataType:
            for head_dim in (32, 40, 64, 80, 96, 128, 160, 192, 224, 256):
                # differs: validate_params reads the numbers alone, so any address will do
                params = FlashAttentionParams(q=64, k=64, v=64, out=96, head_dim=head_dim)
                params.batch_size = params.num_heads = params.num_heads_k = 1
                params.seqlen_q = params.seqlen_k = 512
                params.dtype = dtype
                if validate_params(params, strict=strict) == 0:
                    found.append((dtype.name, head_dim))
        print(f"strict={strict}: {found}")
    return {"accepted": accepted}


if __name__ == "__main__":
    main()
