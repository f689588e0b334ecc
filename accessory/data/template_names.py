"""The names of the dialogue templates. Only the standard library is imported here: `accessory --help` reads this file.

The classes of the built-in templates are in `templates.py`; the tokenizer's own template is in `chat_template.py`.
"""

from __future__ import annotations

BUILT_IN = ("default", "alpaca", "mistral", "chatml", "none")
OWN = "tokenizer"  # the chat template that came with the tokenizer
TEMPLATES = (*BUILT_IN, OWN)
