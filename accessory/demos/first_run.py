"""`accessory demo`: makes a real language model of Mixtral's architecture from an installed package, and runs it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console

from accessory.arguments import check_max_gen_len
from accessory.convert.convert import convert
from accessory.convert.upcycle import smollm2_gguf, upcycle
from accessory.convert.verify import verify
from accessory.data.conversation import Conversation
from accessory.data.templates import get_template
from accessory.model.meta import MetaModel

MAX_SEQ_LEN = 2048


def first_run(folder: Path, question: str, max_gen_len: int) -> int:
    """Make both checkpoints if they are missing, and answer with each. Returns 0 when all agree, else 1."""
    check_max_gen_len(max_gen_len, MAX_SEQ_LEN)
    console = Console(highlight=False, soft_wrap=True)  # commands to copy must stay on one line
    console.print("[bold]SmolLM2-135M-Instruct, grown into a mixture of 8 experts, 2 per token[/]")
    base, sparse = folder / "base", folder / "sparse"
    started = time.perf_counter()
    console.print()
    make_base(console, base)
    if not sparse.exists():
        console.print(f"2. Converting to {sparse}: a slice of every expert in every file")
        convert(base, sparse, to="sparse", shards=4)
    else:
        console.print(f"2. {sparse} is there already")

    console.print(f"\n3. Both answer. [bold]> {question}[/]")
    answers = {path.name: _answer(console, path, question, max_gen_len) for path in (base, sparse)}
    same = answers["base"] == answers["sparse"]
    console.print(f"   The {len(answers['base'])} tokens {'agree' if same else '[red]differ[/]'}.")

    console.print("\n4. One model in two layouts has one hash:")
    report = verify(base, sparse)
    console.print(f"   {report.hash}  {'base = sparse' if report.ok else '[red]base and sparse differ[/]'}")
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s. Try next:")
    for line in (
        f"chat {sparse}",
        f"generate {base} --prompt 'Once upon a time' --max-gen-len 60 --stream",
        f"info {base}",
        f"convert {base} {folder / 'hf'} --to hf",
        f"verify {base} {folder / 'hf'}",
    ):
        console.print(f"   {program()} {line}")
    return 0 if same and report.ok else 1


def make_base(console: Console, base: Path) -> None:
    """The first step of a demo: make the mixture in the base layout, if it is missing."""
    if base.exists():
        console.print(f"1. {base} is there already")
        return
    console.print(f"1. Upcycling to {base}: every expert a copy of the dense feed-forward, routers random")
    upcycle(smollm2_gguf(), base, experts=8, top_k=2, to="base", shards=8)


def program() -> str:
    """The command that started this program. It works again even where PATH lacks the program's folder."""
    return sys.argv[0] if Path(sys.argv[0]).name == "accessory" else "accessory"


def _answer(console: Console, path: Path, question: str, max_gen_len: int) -> list[int]:
    """Stream an answer to the terminal. Returns its token ids."""
    started = time.perf_counter()
    model = MetaModel.from_pretrained(path, max_seq_len=MAX_SEQ_LEN, device="cpu")
    loaded = time.perf_counter() - started
    conversation = Conversation(get_template(None, model.tokenizer)).add("user", question)
    prompt = conversation.prompt_ids(model.tokenizer)
    console.print(f"   {model.llma.implementation:>6}: ", end="")
    shown, ids, first = "", [], 0.0
    for answer in model.stream(prompt, max_gen_len=max_gen_len):
        last = time.perf_counter()
        first = first or last
        ids = answer.token_ids
        print(answer.text[len(shown) :], end="", flush=True)
        shown = answer.text
    rate = (len(ids) - 1) / (last - first) if len(ids) > 1 else 0.0
    console.print(f"\n           [dim]loaded in {loaded:.1f} s, {rate:.1f} tokens/s[/]")
    return ids
