"""Dropout's draws: 16 bits of Philox4x32-7 an entry, a counter-based generator (Salmon et al. 2011, SC '11).

A word depends on its key and counter alone, so every backend, tiling and layout drops the same entries, and the
backward pass draws again what the forward pass drew instead of keeping a mask. Seven rounds are the fewest that pass
BigCrush (table 2 there), which FlashAttention takes too. Sixteen bits make the probability a multiple of 2⁻¹⁶; what is
kept is scaled by that one, so that the mean stays exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_WORD = 0xFFFFFFFF
_STEPS = 1 << 16


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors of words in [0, 2^32) that broadcast together.
        key: two words in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, uniform in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products of two words wrap around in int64, whose bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _WORD, (p1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropped_steps(p: float) -> int:
    """q 2¹⁶, where q is the probability `p` rounded to a multiple of 2⁻¹⁶ below 1: the draws below it are dropped."""
    return min(math.floor(p * _STEPS + 0.5), _STEPS - 1)


def dropout_scale(p: float) -> float:
    """1/(1 - q), what an entry that is kept is multiplied by."""
    return _STEPS / (_STEPS - dropped_steps(p))


def attention_keep_mask(
    batch: int, heads: int, queries: int, keys: int, dropout_p: float, seed: int, device: torch.device
) -> Tensor:
    """Which attention weights dropout keeps: (batch, heads, queries, keys) bool.

    Entry (b, h, i, j) is kept where half ``j mod 8`` (of each word the low one first) of counter ``(j div 8, i, h, b)``
    under the key `seed` is at least q 2¹⁶: positions count within their own sample, so the packed and the padded layout
    agree.

    Args:
        dropout_p: p, probability of being dropped, in [0, 1).
        seed: a number in [0, 2^64).
    """

    def words(n: int, dim: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = n
        return torch.arange(n, device=device).reshape(shape)

    counter = (words((keys + 7) // 8, 3), words(queries, 2), words(heads, 1), words(batch, 0))
    drawn = philox4x32(counter, (seed & _WORD, seed >> 32))
    halves = torch.stack([half for word in drawn for half in (word % _STEPS, word // _STEPS)], dim=-1)
    return halves.flatten(-2)[..., :keys] >= dropped_steps(dropout_p)
