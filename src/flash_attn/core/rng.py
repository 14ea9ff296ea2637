"""Dropout's random bits: one definition for every backend.

The state is two int64 numbers (seed, offset), drawn from PyTorch's generator of the tensors'
device and kept there: the host never reads them, so calls can be captured in CUDA graphs and
replays differ. Each attention weight has its own number, a function of the state and of its
(batch, head, query, key) coordinates alone: Philox-4x32 with 7 rounds (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011), keyed by the seed, at counter
``(key // 4, query, batch * nheads + head, offset)``, whose word ``key % 4`` is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_MASK = 0xFFFFFFFF


def new_state(device: torch.device) -> Tensor:
    """Draw a fresh (2,) int64 state on ``device`` from its default generator."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def unused_state(device: torch.device) -> Tensor:
    """The (2,) int64 state that operators without dropout return."""
    return torch.zeros(2, dtype=torch.int64, device=device)


def placeholder_state(device: torch.device) -> Tensor:
    """Stands for a (2,) int64 state where none is read: uninitialised, which launches nothing."""
    return torch.empty(2, dtype=torch.int64, device=device)


def keep_threshold(dropout_p: float) -> int:
    """Weights whose upper 31 random bits are below this number are kept."""
    return min(round((1.0 - dropout_p) * 2**31), 2**31 - 1)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product; int64 wraps around, which keeps the bits right."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32 on int64 tensors that hold 32-bit words; returns its four output words."""
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(ROUNDS):
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        high_a, low_a = _multiply(0xD2511F53, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ key0, low_b, high_a ^ c3 ^ key1, low_a
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def keep_mask(
    rng_state: Tensor,
    dropout_p: float,
    batch_index: int,
    nheads: int,
    rows: Tensor,
    keys: Tensor,
) -> Tensor:
    """Which weights of one sequence survive dropout.

    Args:
        rng_state: (2,) int64.
        dropout_p: probability of dropping.
        batch_index: which sequence.
        nheads: number of query heads.
        rows: (m,) int64 query indices within the sequence.
        keys: (n,) int64 key indices within the sequence.

    Returns:
        (nheads, m, n) bool.
    """
    heads = batch_index * nheads + torch.arange(nheads, device=rows.device)
    words = philox(
        rng_state[0],
        (keys // 4)[None, None, :],
        rows[None, :, None],
        heads[:, None, None],
        rng_state[1] & _MASK,
    )
    # The words come broadcast to different shapes after few rounds; all are full after seven.
    choice = (keys % 4).expand(nheads, rows.numel(), keys.numel())
    word = torch.stack(words).gather(0, choice[None]).squeeze(0)
    return (word >> 1) < keep_threshold(dropout_p)
