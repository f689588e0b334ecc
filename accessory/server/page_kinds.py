"""The pages that there are, as `Demo`s: a dialogue, and single questions, each with a place for an image or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accessory.data.conversation import Conversation
from accessory.data.system_prompt import SYSTEM_PROMPTS, format_prompt
from accessory.data.template_names import OWN, TEMPLATES
from accessory.data.templates import get_template, usual_name
from accessory.server.page import Ask, Demo, Message, import_gradio

# --------------------------------------------------------------------------- dialogues


def _dialogue_settings(tokenizer: Any, chosen: str | None = None) -> list[Any]:
    gr = import_gradio()
    own = tokenizer.chat_template is not None
    names = [name for name in TEMPLATES if own or name != OWN]
    template = gr.Dropdown(
        names, value=chosen or usual_name(tokenizer), label="Template", elem_id="template",
        info="How the dialogue is written; the one that the model was finetuned with",
    )  # fmt: skip
    system = gr.Textbox(
        label="System message", lines=2, max_lines=8, elem_id="system", placeholder="Empty: what the template has"
    )
    return [template, system]


def _dialogue_ask(tokenizer: Any, history: Sequence[Message], template_name: str, system: str) -> Ask:
    template = get_template(template_name, tokenizer)
    conversation = Conversation(template, system if system.strip() else None)
    for message in history:
        conversation.add(message["role"], message["content"])
    return Ask(conversation.prompt_ids(tokenizer), template.stop_strings, template.reply)


DIALOGUE = Demo(
    title="Multi turn",
    about="A dialogue. Template and system message may change at any time; the whole dialogue is then written anew.",
    chat=True,
    settings=_dialogue_settings,
    ask=_dialogue_ask,
)
DIALOGUE_WITH_IMAGE = replace(
    DIALOGUE,
    title="Multi turn, with an image",
    about="A dialogue about an image, or without one. Another image begins another dialogue; template and system "
    "message may change at any time.",
    images=True,
)


def served_dialogue(template: str | None, images: bool) -> Demo:
    """The dialogue as a server shows it. template: the one that is chosen at first; None: the usual one."""
    demo = DIALOGUE_WITH_IMAGE if images else DIALOGUE
    return replace(demo, title="Dialogue", settings=lambda tokenizer: _dialogue_settings(tokenizer, template))


# --------------------------------------------------------------------------- single questions


def _single_below(tokenizer: Any) -> list[Any]:
    box = import_gradio().Textbox(
        label="Input", lines=1, max_lines=10, elem_id="input", placeholder="Optional; only alpaca has a place for it"
    )
    return [box]


def _single_settings(tokenizer: Any) -> list[Any]:
    box = import_gradio().Dropdown(
        list(SYSTEM_PROMPTS), value="alpaca", label="System prompt", elem_id="system_prompt",
        info="None for pretrained models: the question as it stands",
    )  # fmt: skip
    return [box]


def _single_ask(tokenizer: Any, history: Sequence[Message], input: str, system_prompt: str) -> Ask:
    return Ask(format_prompt(history[-1]["content"], input, system_prompt))


def _single_ask_with_image(tokenizer: Any, history: Sequence[Message], input: str, system_prompt: str) -> Ask:
    ask = _single_ask(tokenizer, history, input, system_prompt)
    if not ask.prompt and "image" in history[-1] and tokenizer.bos_id is not None:
        return replace(ask, prompt=[tokenizer.bos_id])  # the image comes after BOS
    return ask


SINGLE = Demo(
    title="Single turn",
    about="One question, one answer. For finetuned models keep the system prompt they know; for pretrained ones take "
    "None.",
    chat=False,
    below=_single_below,
    settings=_single_settings,
    ask=_single_ask,
)
SINGLE_WITH_IMAGE = replace(
    SINGLE,
    title="Single turn, with an image",
    about="One question about an image, or without one, and one answer. For finetuned models keep the system prompt "
    "they know; for pretrained ones take None, or caption.",
    images=True,
    ask=_single_ask_with_image,
)
