import pytest

from accessory.data.system_prompt import SYSTEM_PROMPTS, format_prompt
from accessory.errors import InputError

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a colour.\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nTranslate.\n\n### Input:\nbleu\n\n### Response:"
)


def test_alpaca_texts_to_the_letter():
    assert format_prompt("Name a colour.") == ALPACA
    assert format_prompt("Translate.", "bleu") == ALPACA_INPUT
    for blank in ("", " \n\t", None):
        assert format_prompt("Name a colour.", blank) == ALPACA


def test_the_others():
    assert format_prompt("Q?", system_prompt="shortqa") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request "
        "using a single word or phrase.\n\n### Instruction:\nQ?\n\n### Response:"
    )
    assert format_prompt("42", system_prompt="qg") == "Generate a question whose answer is:\n42\n\nQuestion:\n"
    assert format_prompt("ignored", system_prompt="caption") == ""
    assert (
        format_prompt("as it is", system_prompt="None") == format_prompt("as it is", system_prompt=None) == "as it is"
    )


@pytest.mark.parametrize("name", SYSTEM_PROMPTS)
def test_braces_in_the_instruction_are_just_braces(name):
    text = format_prompt("f{x} {instruction} {{", system_prompt=name)
    assert name == "caption" or "f{x} {instruction} {{" in text


def test_unknown_name_lists_the_known():
    with pytest.raises(InputError, match=r"'alpacca'.*alpaca, shortqa, qg, caption, None"):
        format_prompt("x", system_prompt="alpacca")
