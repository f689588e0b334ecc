"""What the finetuning demo learns from: brief answers of a machine, out of the installed package chatterbot-corpus.

The package is data (YAML files under a BSD licence); it is found, not imported, and nothing of it is shipped here.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from accessory.errors import InputError, MissingExtraError

Pair = tuple[str, str]

# What a machine says of itself. Left out are files of facts, jokes, insults, source code, and few answers many times.
SUBJECTS = ("ai", "botprofile", "computers", "emotion", "food", "greetings")
# In these, what follows a question are answers to it; elsewhere the dialogue goes on.
ALTERNATIVES = ("computers", "emotion")
LONGEST = 15  # words of an answer


def corpus_folder() -> Path:
    """The English files of the installed package. MissingExtraError with the pip line where it is not installed."""
    spec = importlib.util.find_spec("chatterbot_corpus")  # of a top-level package: finds it without running it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (english := Path(folder) / "data" / "english").is_dir():
            return english
    raise MissingExtraError("the demo's dialogues are missing: pip install --no-deps chatterbot-corpus==1.3.3")


def pairs(folder: Path) -> list[Pair]:
    """Questions with each of their answers that is one brief statement, in order and each once."""
    found = [pair for subject in SUBJECTS for pair in _pairs_of(folder / f"{subject}.yml")]
    if not found:
        raise InputError(f"{folder}: no question with a brief answer in it; install chatterbot-corpus==1.3.3")
    return list(dict.fromkeys(found))


def _pairs_of(path: Path) -> Iterator[Pair]:
    try:
        entries = list(yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file of chatterbot-corpus ({' '.join(str(error).split())})") from error
    for entry in entries:
        if not isinstance(entry, list) or not all(isinstance(text, str) for text in entry):
            continue  # some have lost a bracket
        question, *answers = entry
        for answer in answers if path.stem in ALTERNATIVES else answers[:1]:
            if (said := _statement(answer)) is not None:
                yield " ".join(question.split()), said


def _statement(answer: str) -> str | None:
    """The answer as a sentence with a capital and a full stop; None where it is a question, long or several lines."""
    text = " ".join(answer.split())
    if not text or "?" in text or len(text.split()) > LONGEST or "\n" in answer.strip():
        return None
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!\"'" else ".")


def split(all_pairs: Sequence[Pair], held_out: Sequence[str], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(to learn from, held out), each in random order.

    A question is on one side with all of its answers, however it is spelled: those of `held_out`, and of the others
    about `share`.
    """
    generator = random.Random(seed)
    kept = {_key(question) for question in held_out}
    others = sorted({_key(question) for question, _ in all_pairs} - kept)
    kept |= set(generator.sample(others, round(share * len(others))))
    shuffled = generator.sample(all_pairs, len(all_pairs))
    return [p for p in shuffled if _key(p[0]) not in kept], [p for p in shuffled if _key(p[0]) in kept]


def _key(question: str) -> str:
    return " ".join(re.findall(r"\w+", question.casefold()))


def as_json_lines(some_pairs: Sequence[Pair]) -> str:
    """One dialogue a line, in the form of OpenAI's messages."""
    lines = []
    for question, answer in some_pairs:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines)
