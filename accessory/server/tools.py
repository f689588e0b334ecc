"""Tools in requests. A model's tokenizer says whether it can call them: Mistral's format has tokens of its own."""

from __future__ import annotations

from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError
from accessory.server.protocol import ChatRequest


def refuse_tools(body: ChatRequest, tokenizer: Tokenizer) -> None:
    """InputError where a request has tools, or speaks of their calls: no released model of this family has tokens for
    them."""
    asked = body.tools and body.tool_choice != "none"
    if asked or any(message.role == "tool" or message.tool_calls for message in body.messages):
        raise InputError("tools: this model's tokenizer has no tokens for calls of tools; leave tools out")
