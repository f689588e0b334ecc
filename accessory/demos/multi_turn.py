"""A web page to talk to a model: `python demos/multi_turn.py --n_gpus N --pretrained_path PATH`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: look for the package in this checkout, not for modules in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accessory.data.conversation import Conversation
from accessory.data.template_names import OWN, TEMPLATES
from accessory.data.templates import get_template
from accessory.demos import serving
from accessory.demos.page import Ask, Demo, Message, import_gradio
from accessory.model.options import add_option


def _settings(tokenizer: Any) -> list[Any]:
    gr = import_gradio()
    own = tokenizer.chat_template is not None
    names = [name for name in TEMPLATES if own or name != OWN]
    template = gr.Dropdown(
        names, value=OWN if own else "default", label="Template", elem_id="template",
        info="How the dialogue is written; the one that the model was finetuned with",
    )  # fmt: skip
    system = gr.Textbox(
        label="System message", lines=2, max_lines=8, elem_id="system", placeholder="Empty: what the template has"
    )
    return [template, system]


def _ask(tokenizer: Any, history: Sequence[Message], template_name: str, system: str) -> Ask:
    template = get_template(template_name, tokenizer)
    conversation = Conversation(template, system if system.strip() else None)
    for message in history:
        conversation.add(message["role"], message["content"])
    return Ask(conversation.prompt_ids(tokenizer), template.stop_strings, template.reply)


DEMO = Demo(
    title="Multi turn",
    about="A dialogue. Template and system message may change at any time; the whole dialogue is then written anew.",
    chat=True,
    settings=_settings,
    ask=_ask,
)


def main(argv: Sequence[str] | None = None, demo: Demo = DEMO, program: str = "multi_turn.py") -> int:
    """Serve the page until Ctrl-C. Returns the exit status."""
    parser = serving.parser(program, "Talk to a model on a web page.", images=demo.images)
    about = "ranks to start (default: as many as --gpu_ids, else 1)"
    add_option(parser, "n_gpus", type=int, metavar="N", help=about)
    return serving.run(demo, parser.parse_args(argv), serving.start_own)


if __name__ == "__main__":
    sys.exit(main())
