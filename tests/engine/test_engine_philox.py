import math

import numpy as np
import pytest

from accessory.engine.philox import philox4x32, uniform


def words(text):
    return np.array([[int(word, 16) for word in text.split()]], np.uint64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's tests/kat_vectors, the rows of philox4x32 with 10 rounds
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, expected):
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(expected))


def test_a_number_is_the_first_53_bits_of_the_words():
    (number,) = uniform([0], [0], [0])
    assert number == (0x6627E8D5E169C58D >> 11) / 2**53


def test_seed_copy_and_position_are_three_things():
    key = np.array([[7, 3]], np.uint64)
    counter = np.array([[5, 2, 0, 0]], np.uint64)
    high, low = (int(word) for word in philox4x32(counter, key)[0, :2])
    assert uniform([3 << 32 | 7], [2], [5])[0] == ((high << 32 | low) >> 11) / 2**53


@pytest.mark.parametrize("varied", ["seed", "copy", "position"])
def test_numbers_are_uniform_along_each_of_them(varied):
    n = 20000
    arguments = {name: np.full(n, 11) for name in ("seed", "copy", "position")}
    arguments[varied] = np.arange(n) + 2**31
    number = np.sort(uniform(*arguments.values()))
    assert number[0] >= 0
    assert number[-1] < 1
    steps = np.arange(n)
    distance = max((number - steps / n).max(), ((steps + 1) / n - number).max())  # Kolmogorov and Smirnov's
    assert distance * math.sqrt(n) < 1.63  # one chance in a hundred


def test_a_number_does_not_hang_on_its_batch():
    seeds, copies, positions = np.arange(9) * 2**58, np.arange(9) * 3, np.arange(9) * 1000
    alone = [uniform([s], [c], [p])[0] for s, c, p in zip(seeds, copies, positions, strict=True)]
    np.testing.assert_array_equal(uniform(seeds, copies, positions), alone)
    np.testing.assert_array_equal(uniform(seeds[::-1], copies[::-1], positions[::-1]), alone[::-1])


def test_the_largest_seed_and_counters_have_their_number():
    assert 0 <= uniform([2**63 - 1], [2**32 - 1], [2**32 - 1])[0] < 1
