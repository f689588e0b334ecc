"""Checks the arguments of generation: one rule each for the API, the commands and the pages.

Only the standard library is imported here, so that a command refuses a value before it imports torch.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

from accessory.errors import InputError
from accessory.formats import CACHE_DTYPES
from accessory.limits import LARGEST_SEED

LARGEST_PORT = 65535
FREE = "free"  # as `cache_gb`: most of what is free beside the largest step
Named = Callable[[str], str]  # from the name of an argument to the name that the user knows


def option_of(name: str) -> str:
    """What an argument is called on the command line: --max-gen-len for max_gen_len."""
    return "--" + name.replace("_", "-")


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number, also one of numpy's. True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_seed(seed: Any, name: str = "seed") -> None:
    if not is_whole(seed) or not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"{name}: got {seed!r:.60}, but it must be a whole number from 0 to 2^63 - 1")


def check_max_seq_len(max_seq_len: Any, named: Named = str) -> None:
    if not is_whole(max_seq_len) or max_seq_len < 2:
        raise InputError(
            f"{named('max_seq_len')}: got {max_seq_len!r:.60}, but it must be a whole number of at least 2"
        )


def check_max_gen_len(max_gen_len: Any, max_seq_len: int, named: Named = str) -> None:
    if not is_whole(max_gen_len) or not 1 <= max_gen_len < max_seq_len:
        raise InputError(
            f"{named('max_gen_len')}: got {max_gen_len!r:.60}, but it must be a whole number from 1 to "
            f"{named('max_seq_len')} - 1 = {max_seq_len - 1}"
        )


def check_stops(stops: Iterable[Any], named: Named = str) -> None:
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise InputError(
                f"{named('stop')}: got {stop!r:.60}, but a stop string must be text of at least one character"
            )


def check_cache_dtype(cache_dtype: Any) -> None:
    if cache_dtype is not None and not (isinstance(cache_dtype, str) and cache_dtype in CACHE_DTYPES):
        raise InputError(
            f"cache_dtype: got {cache_dtype!r:.60}, but it must be {' or '.join(CACHE_DTYPES)}, or None: the dtype of "
            "the products"
        )


def check_cache_gb(cache_gb: Any) -> None:
    if cache_gb is None or (isinstance(cache_gb, str) and cache_gb == FREE):
        return
    real = isinstance(cache_gb, numbers.Real) and not isinstance(cache_gb, bool)
    if not (real and 0 < cache_gb < math.inf):
        raise InputError(
            f"cache_gb: got {cache_gb!r:.60}, but it must be a number of GB above 0, or {FREE!r}: most of what is free"
        )


def check_port(port: Any, name: str) -> None:
    if not is_whole(port) or not 0 <= port <= LARGEST_PORT:
        raise InputError(f"{name}: got {port!r:.60}, but a port lies in 0 … {LARGEST_PORT}")
