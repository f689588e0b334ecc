import subprocess
import sys

import pytest

from accessory.engine.sampling_params import SamplingParams
from accessory.errors import InputError

NAN, INF = float("nan"), float("inf")
REFUSED = {
    "temperature": [-0.1, NAN, INF, 10**400, "hot", None, True],
    "top_p": [0, -0.5, 1.01, NAN, None, True, "0.9"],
    "top_k": [-2, 1.0, True, None, "5"],
    "min_p": [-0.1, 1.1, NAN, None, False],
    "repetition_penalty": [0, 0.001, 101, -1, NAN, INF, None, True],
    "presence_penalty": [-2.1, 2.1, NAN, None, True],
    "frequency_penalty": [-2.1, 2.1, NAN, None, True],
    "logit_bias": [[1, 2], 3, {"7": 1.0}, {-1: 1.0}, {True: 1.0}, {7: NAN}, {7: 100.5}, {7: None}, {7: True}],
    "seed": [-1, 2**63, 1.5, True, "1"],
    "copy": [-1, 2**32, 0.0, None, False],
    "logprobs": [-1, 1025, 1.0, True],
    "prompt_logprobs": [-1, 1025, 1.0, True],
    "ignore_eos": [1, None, "yes"],
    "min_tokens": [-1, 2**32, 1.5, None, True],
}  # fmt: skip
ACCEPTED = {
    "temperature": [0, 0.0, 1e-30, 1, 50.0],
    "top_p": [1, 1e-9],
    "top_k": [-1, 0, 1, 10**9],
    "min_p": [0, 1],
    "repetition_penalty": [0.1, 1, 5],
    "presence_penalty": [-2, 2.0],
    "frequency_penalty": [-2.0, 2],
    "logit_bias": [None, {}, {0: -100, 31999: 100.0}],
    "seed": [None, 0, 2**63 - 1],
    "copy": [0, 2**32 - 1],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "ignore_eos": [True],
    "min_tokens": [0, 7],
}


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


def test_every_field_is_tried():
    assert set(REFUSED) == set(ACCEPTED) == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(("field", "value"), cases(REFUSED))
def test_a_bad_value_is_one_line_naming_the_field(field, value):
    with pytest.raises(InputError, match=f"^{field}: got ") as error:
        SamplingParams(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("field", "value"), cases(ACCEPTED))
def test_the_ends_of_a_range_are_accepted(field, value):
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_a_drawn_seed_fills_only_a_gap():
    assert SamplingParams(top_k=3).with_seed(9) == SamplingParams(top_k=3, seed=9)
    assert SamplingParams(seed=4).with_seed(9).seed == 4


def test_a_bias_is_copied_and_checked_against_the_tokenizer():
    given = {5: 1.0}
    params = SamplingParams(logit_bias=given)
    given[6] = float("nan")
    assert params.logit_bias == {5: 1.0}
    params.check_vocabulary(6)
    with pytest.raises(InputError, match=r"^logit_bias: got the token 5, but the tokenizer's tokens are 0 to 4$"):
        params.check_vocabulary(5)


def test_neither_params_nor_random_numbers_need_torch():
    code = "import sys, accessory.engine.sampling_params, accessory.engine.philox; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
