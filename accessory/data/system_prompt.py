"""Prompts of a single turn, by name. Their texts are those that the original project finetuned models with."""

from __future__ import annotations

from accessory.errors import InputError

ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_TEXTS = {
    "alpaca": ALPACA_PREAMBLE + "\n\n### Instruction:\n{instruction}\n\n### Response:",
    "shortqa": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request using a single word or phrase.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
    "qg": "Generate a question whose answer is:\n{instruction}\n\nQuestion:\n",
    "caption": "",
    "None": "{instruction}",
}

SYSTEM_PROMPTS = tuple(_TEXTS)


def format_prompt(instruction: str, input: str | None = None, system_prompt: str | None = "alpaca") -> str:
    """The prompt for one instruction. `system_prompt` is "alpaca", "shortqa", "qg", "caption" or None (or "None").

    Only alpaca uses `input`, and only where it holds more than white space. Raises InputError for an unknown name.
    """
    name = "None" if system_prompt is None else system_prompt
    if name not in _TEXTS:
        raise InputError(f"system_prompt: got {system_prompt!r}, but it must be one of {', '.join(SYSTEM_PROMPTS)}")
    text = _ALPACA_WITH_INPUT if name == "alpaca" and input is not None and input.strip() else _TEXTS[name]
    return text.format(instruction=instruction, input=input)
