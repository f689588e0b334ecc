"""A dialogue in progress: `Conversation`."""

from __future__ import annotations

from accessory.data.messages import read_messages
from accessory.data.template_base import Template
from accessory.data.templates import get_template
from accessory.data.tokenizer import Tokenizer


class Conversation:
    """The messages of a dialogue so far, and the template that turns them into text and ids."""

    def __init__(self, template: Template | str = "default", system: str | None = None) -> None:
        self.template = get_template(template) if isinstance(template, str) else template
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def add(self, role: str, content: str) -> Conversation:
        """Append a message. Pass a generated answer through `template.reply` first."""
        self.messages += read_messages([{"role": role, "content": content}])
        return self

    def text(self, *, prompt: bool = False) -> str:
        return self.template.text(self.messages, prompt=prompt)

    def prompt_ids(self, tokenizer: Tokenizer) -> list[int]:
        return self.template.prompt_ids(self.messages, tokenizer)

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        return self.template.encode(self.messages, tokenizer)
