"""The data of the finetuning demo: brief answers of a machine, from the installed package chatterbot-corpus.

The package is data (YAML files under a BSD licence). This module finds its folder without importing it. No file of the
package is shipped here.
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

# Files in which a machine talks about itself. The others have facts, jokes, insults, source code, or few answers that
# repeat often.
SUBJECTS = ("ai", "botprofile", "computers", "emotion", "food", "greetings")
# In these files, all lines after a question are answers to it. In the others, the dialogue goes on.
ALTERNATIVES = ("computers", "emotion")
LONGEST = 15  # words of an answer


def corpus_folder() -> Path:
    """The English files of the installed package. MissingExtraError with the pip line where it is not installed."""
    spec = importlib.util.find_spec("chatterbot_corpus")  # finds a top-level package without importing it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (english := Path(folder) / "data" / "english").is_dir():
            return english
    raise MissingExtraError("the demo's dialogues are missing: pip install --no-deps chatterbot-corpus==1.3.3")


def pairs(folder: Path) -> list[Pair]:
    """The pairs of a question and an answer that is one brief statement, in order and without duplicates."""
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
            continue  # some entries of the corpus lack a bracket
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
    """Split the pairs into (training, held out), each in random order.

    The questions `held_out` and about `share` of the others are held out. All answers of a question are on one side.
    Spellings that differ only in case and punctuation are one question.
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
    """One dialogue per line, in the format of OpenAI's messages."""
    lines = []
    for question, answer in some_pairs:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines)
