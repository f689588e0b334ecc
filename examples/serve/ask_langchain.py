"""Asks a server through LangChain. It needs the package langchain-openai, which is no part of any extra here.

    accessory serve demo-model/base --max-seq-len 512
    pip install langchain-openai
    python examples/serve/ask_langchain.py MODEL [http://127.0.0.1:8000/v1]

MODEL is the name of a model or an adapter that the server has.
"""

from __future__ import annotations

import os
import sys


def main(model: str, url: str = "http://127.0.0.1:8000/v1") -> None:
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_openai import ChatOpenAI

    key = os.environ.get("ACCESSORY_API_KEY", "none is needed")
    chat = ChatOpenAI(model=model, base_url=url, api_key=key, temperature=0, max_tokens=40)
    chain = ChatPromptTemplate.from_messages([("user", "What is the capital of {country}?")]) | chat
    print("At once:", chain.invoke({"country": "France"}).content)
    print("Piece by piece: ", end="")
    for piece in chain.stream({"country": "Italy"}):
        print(piece.content, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
