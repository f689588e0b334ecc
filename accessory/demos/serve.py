"""`accessory demo --serve`: starts a server with the demo's model, asks it through the package openai, and stops it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from accessory.arguments import check_max_gen_len
from accessory.demos.first_run import make_base, program
from accessory.errors import MissingExtraError, ServerError

MAX_SEQ_LEN = 512
ENDING = 30  # seconds that the server has to end
# An answer of this form is short, whatever the model makes of the question.
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"type": "string", "maxLength": 20}},
    "required": ["city", "country"],
    "additionalProperties": False,
}


def serve_demo(folder: Path, question: str, max_gen_len: int) -> int:
    """Make the model if it is missing, serve it, ask, stop. Returns 0 when the server answered and ended in order."""
    check_max_gen_len(max_gen_len, MAX_SEQ_LEN)
    client_class = _openai().OpenAI
    console = Console(highlight=False, soft_wrap=True)
    console.print("[bold]SmolLM2-135M-Instruct, a mixture of 8 experts, behind OpenAI's API[/]\n")
    started, base = time.perf_counter(), folder / "base"
    make_base(console, base)
    words = ["serve", str(base), "--max-seq-len", str(MAX_SEQ_LEN), "--port", "0", "--no-access-log"]
    console.print(f"\n2. {program()} {' '.join(words)}")
    with _server(words) as server:
        said = _first_line(server)
        console.print(f"   {said}")
        found = re.search(r"http://\S+/v1", said)
        assert found is not None
        client = client_class(base_url=found[0], api_key="none is needed", max_retries=0)
        model = client.models.list().data[0].id

        console.print(f"\n3. The package openai asks it. [bold]> {question}[/]")
        asked = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        console.print("   ", end="")
        for event in client.chat.completions.create(**asked, max_tokens=max_gen_len, stream=True):
            for choice in event.choices:
                print(choice.delta.content or "", end="", flush=True)

        console.print("\n\n4. And again, for an answer that matches a JSON schema:")
        form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
        answer = client.chat.completions.create(**asked, max_tokens=80, response_format=form)
        place = json.loads(answer.choices[0].message.content)
        console.print(f"   {json.dumps(place, ensure_ascii=False)}", markup=False)
        used = answer.usage
        console.print(f"   {used.prompt_tokens} tokens of the prompt, {used.completion_tokens} of the answer")
    console.print(f"\n5. SIGTERM: the server ended with status {server.returncode}")
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s. Try next:")
    for line in (
        f"serve {base} --max-seq-len {MAX_SEQ_LEN}",
        "chat --url http://127.0.0.1:8000",
        "bench http://127.0.0.1:8000 --what serve --requests 20",
    ):
        console.print(f"   {program()} {line}")
    return int(server.returncode != 0)


@contextmanager
def _server(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """`accessory` with these words, as a process that is ended with the context. It warns on our standard error."""
    with subprocess.Popen([sys.executable, "-m", "accessory", *words], stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(ENDING)
            except subprocess.TimeoutExpired:
                server.kill()


def _first_line(server: subprocess.Popen[str]) -> str:
    """What the server prints when it answers. ServerError where it ends before."""
    assert server.stdout is not None
    line = server.stdout.readline().strip()
    if not line:
        raise ServerError(f"the server ended with status {server.wait()} before it answered; it says why above")
    return line


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise MissingExtraError("the demo asks through the package openai: pip install openai") from error
    return openai
