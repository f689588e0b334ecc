"""How the tokens of one request are drawn. Names, ranges and meanings are those of vLLM and transformers."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from accessory.arguments import is_whole
from accessory.errors import InputError

# At most so many best tokens can be asked for. It bounds what one step returns.
MOST_LOGPROBS = 1024
_MOST_32_BITS = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """InputError for a value of the wrong type or out of range; it names the field.

    At temperature 0 the likeliest token is taken. Otherwise a token is drawn from softmax(logits / temperature):
    `top_k` keeps the k likeliest tokens (0 or -1: all), `top_p` keeps the smallest set of those whose mass reaches it,
    `min_p` keeps tokens whose probability is at least `min_p` times the largest one. At any temperature the logits are
    changed before:

    * `logit_bias` is added to the logits of the tokens that it names;
    * `repetition_penalty` divides positive logits and multiplies negative ones of tokens in the prompt or the answer;
    * `frequency_penalty` is subtracted each time that the answer has the token, `presence_penalty` once if it has it.

    `seed`, `copy` (the number of this answer among several to one request) and a token's number in its answer determine
    the random number that draws the token. `logprobs` and `prompt_logprobs` ask for log-probabilities: 0 for those of
    the tokens themselves, n for those of the n likeliest tokens too. No token that stops the answer is drawn before it
    has `min_tokens` tokens. With `ignore_eos`, EOS does not stop it.
    """

    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    copy: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        self._check_number("temperature", 0, math.inf, "0 (greedy) or a greater number")
        self._check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number greater than 0 and at most 1")
        object.__setattr__(self, "top_p", float(self.top_p))
        self._check_int("top_k", -1, None, "a whole number: -1 or 0 (all tokens) or more")
        self._check_number("min_p", 0, 1, "a number from 0 to 1")
        self._check_number("repetition_penalty", 0.01, 100, "a number from 0.01 to 100 (1: none)")
        self._check_number("presence_penalty", -2, 2, "a number from -2 to 2")
        self._check_number("frequency_penalty", -2, 2, "a number from -2 to 2")
        self._check_bias()
        if self.seed is not None:
            self._check_int("seed", 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1, or None")
        self._check_int("copy", 0, _MOST_32_BITS, "a whole number from 0 to 2^32 - 1")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_int(name, 0, MOST_LOGPROBS, f"a whole number from 0 to {MOST_LOGPROBS}, or None")
        self._check(isinstance(self.ignore_eos, bool), "ignore_eos", "true or false")
        self._check_int("min_tokens", 0, _MOST_32_BITS, "a whole number: 0 or more")

    def with_seed(self, drawn: int) -> SamplingParams:
        """These parameters with the seed `drawn`, where the request gave none."""
        return replace(self, seed=drawn) if self.seed is None else self

    def check_vocabulary(self, vocab_size: int) -> None:
        """InputError if `logit_bias` names a token that the tokenizer does not have."""
        for token in self.logit_bias or ():
            if token >= vocab_size:
                raise InputError(
                    f"logit_bias: got the token {token}, but the tokenizer's tokens are 0 to {vocab_size - 1}"
                )

    @property
    def counts_tokens(self) -> bool:
        """Whether a draw depends on which tokens came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        self._check(isinstance(self.logit_bias, Mapping), "logit_bias", "a mapping from token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not (is_whole(token) and token >= 0):
                raise InputError(f"logit_bias: got the token {token!r}, but it must be a whole number: 0 or more")
            if not (_is_number(bias) and -100 <= bias <= 100):
                raise InputError(
                    f"logit_bias: got {bias!r} for token {token}, but it must be a number from -100 to 100"
                )
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # a copy, which the caller cannot change

    def _check_number(self, name: str, low: float, high: float, wanted: str) -> None:
        value = getattr(self, name)
        self._check(_is_number(value) and low <= value <= high, name, wanted)
        object.__setattr__(self, name, float(value))

    def _check_int(self, name: str, low: int, high: int | None, wanted: str) -> None:
        value = getattr(self, name)
        self._check(is_whole(value) and low <= value and (high is None or value <= high), name, wanted)
        object.__setattr__(self, name, int(value))  # it may be one of numpy's

    def _check(self, condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise InputError(f"{name}: got {getattr(self, name)!r:.60}, but it must be {wanted}")


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold: NaN and infinity are none. numpy's numbers are such too."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and bool(abs(value) <= sys.float_info.max)
