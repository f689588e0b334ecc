"""Philox4x32-10: random numbers that are a function of a key and a counter.

Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3". What a generator with a state gives depends on all
that was drawn before. Here each draw has a counter of its own.

Legend: B draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The paper's constants: the multipliers of a round, and what is added to the key between rounds.
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter_B4: NDArray[np.uint64], key_B2: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Four random 32-bit words for each counter, (B, 4). All words are held as uint64, so that products fit."""
    words_B4, key_B2 = counter_B4, key_B2.copy()
    for _ in range(_ROUNDS):
        product_B2 = words_B4[:, 0::2] * _MULTIPLIERS
        high_B2, low_B2 = product_B2 >> _32, product_B2 & _LOW
        # The second product's halves become words 0 and 1, the first one's words 2 and 3.
        mixed_B2 = high_B2[:, ::-1] ^ words_B4[:, 1::2] ^ key_B2
        words_B4 = np.stack([mixed_B2[:, 0], low_B2[:, 1], mixed_B2[:, 1], low_B2[:, 0]], axis=1)
        key_B2 = (key_B2 + _KEY_STEPS) & _LOW
    return words_B4


def uniform(seed_B: ArrayLike, copy_B: ArrayLike, position_B: ArrayLike) -> NDArray[np.float64]:
    """A number in [0, 1) for each draw, float64 (B,), from 53 random bits.

    The key is the seed's two 32-bit words, low word first. The counter is (position, copy, 0, 0), each below 2^32.
    """
    seed_B = np.asarray(seed_B, np.uint64)
    key_B2 = np.stack([seed_B & _LOW, seed_B >> _32], axis=1)
    counter_B4 = np.zeros((len(seed_B), 4), np.uint64)
    counter_B4[:, 0], counter_B4[:, 1] = position_B, copy_B
    words_B4 = philox4x32(counter_B4, key_B2)
    bits_B = words_B4[:, 0] << np.uint64(21) | words_B4[:, 1] >> np.uint64(11)
    return bits_B * 2.0**-53
