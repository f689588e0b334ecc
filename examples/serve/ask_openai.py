"""Asks a server through the package openai: at once, piece by piece, and for JSON that matches a schema.

    accessory serve demo-model/base --max-seq-len 512
    python examples/serve/ask_openai.py [http://127.0.0.1:8000/v1]

It needs the package openai: pip install openai. The key is that of ACCESSORY_API_KEY, if the server wants one.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

QUESTION = "What is the capital of France?"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"type": "string", "maxLength": 20}},
    "required": ["city", "country"],
    "additionalProperties": False,
}


def main(url: str = "http://127.0.0.1:8000/v1") -> None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=os.environ.get("ACCESSORY_API_KEY", "none is needed"))
    model = client.models.list().data[0].id
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 60,
    }

    print("At once:", client.chat.completions.create(**asked).choices[0].message.content)

    print("Piece by piece: ", end="")
    for event in client.chat.completions.create(**asked, stream=True):
        print(event.choices[0].delta.content or "", end="", flush=True)
    print()

    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    choice = client.chat.completions.create(**asked, response_format=form).choices[0]
    if choice.finish_reason == "length":  # cut off in the middle: no JSON
        print("As JSON: not ready after", asked["max_tokens"], "tokens")
    else:
        print("As JSON:", json.loads(choice.message.content))


if __name__ == "__main__":
    main(*sys.argv[1:])
