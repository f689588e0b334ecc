"""One rule for each argument of generation, whoever gives it."""

from __future__ import annotations

import numpy as np
import pytest

from accessory import arguments as rules
from accessory.engine.sampling_params import SamplingParams
from accessory.errors import InputError

LARGEST = 2**63 - 1


@pytest.mark.parametrize("seed", [0, 7, LARGEST, np.int64(5)])
def test_whole_numbers_of_63_bits_are_seeds(seed):
    rules.check_seed(seed)
    assert SamplingParams(seed=seed).seed == seed


@pytest.mark.parametrize("seed", [-1, LARGEST + 1, 10**22, True, 1.0, "3", float("nan"), [1]])
def test_nothing_else_is_a_seed(seed):
    for check, also in ((rules.check_seed, ""), (lambda seed: SamplingParams(seed=seed), ", or None")):
        says = rf"^seed: got [^\n]*, but it must be a whole number from 0 to 2\^63 - 1{also}$"
        with pytest.raises(InputError, match=says):
            check(seed)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: rules.check_max_gen_len(True, 9), "max_gen_len: got True, but"),
        (lambda: rules.check_max_gen_len(9, 9, rules.option_of), "--max-gen-len: got 9, but it must be a whole number "
         "from 1 to --max-seq-len - 1 = 8"),
        (lambda: rules.check_max_seq_len("x"), "max_seq_len: got 'x', but"),
        (lambda: rules.check_stops(["a", 3]), "stop: got 3, but"),
        (lambda: rules.check_port(99999999, "master_port"), "master_port: got 99999999, but a port lies in 0 … 65535"),
        (lambda: rules.check_port(-4, "master_port"), "master_port: got -4, but"),
    ],
)  # fmt: skip
def test_a_message_names_the_argument_as_its_caller_does(check, message):
    with pytest.raises(InputError) as error:
        check()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
