"""From the items of a file to token ids, and whether a model learns each of them: `encode_source`.

Items are dialogues (`conversations`, or OpenAI's `messages`), single turns (`instruction`, `input`, `output`) or plain
`text`. A message about a broken item names its file and line. All ids of a file lie in flat arrays; an item is a slice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from accessory.data.image_tokens import item_without_tags
from accessory.data.messages import check_answers, read_messages
from accessory.data.records import Records, Source
from accessory.data.system_prompt import format_prompt
from accessory.data.template_base import Template
from accessory.data.templates import get_template
from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError
from accessory.progress import progress_bar

_PIECE = 128  # items that a thread encodes in one go
_PLAIN = get_template("none")
_ANSWERS = {"single_turn_llava": "conversations[1]", "caption": "caption"}  # where preprocessing takes `output` from


@dataclass(frozen=True)
class Encoding:
    """How items become ids.

    With `dialog`, a single turn is a dialogue of two messages, written by `template`. Without it, or where its file
    names a `prompt_type`, a single turn is that prompt (alpaca's by default) and its answer.
    """

    tokenizer: Tokenizer
    template: Template
    dialog: bool = True

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]] | type[np.signedinteger[Any]]:
        return np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.int32


@dataclass(frozen=True)
class Encoded:
    """A file's N items, whole: item i is ids[start[i] : start[i + 1]]."""

    ids: np.ndarray  # uint16 or int32
    learn: np.ndarray  # bool
    start: np.ndarray  # int64 (N + 1,)
    first: np.ndarray  # int64 (N,): which id of an item is the first one learnt
    lines: np.ndarray  # int64 (N,)
    images: dict[int, str]  # item -> path, as the file gives it


def encode_item(item: Any, source: Source, how: Encoding, index: int = 0) -> tuple[list[int], list[bool], str | None]:
    """(ids, learnt, image) of one item. InputError says what is wrong with it; the caller adds file and line."""
    if not isinstance(item, Mapping):
        raise InputError(f"got {item!r:.60}, but an item must be an object")
    if source.preprocess is not None:
        item = _preprocessed(item, source.preprocess, index)
    image = item.get("image") or None
    if image is not None:
        image_path(image, source)
        item = item_without_tags(item)
    turns = next((item[key] for key in ("conversations", "messages") if item.get(key) is not None), None)
    if turns is not None:
        messages = read_messages(turns, training=True)
        check_answers(messages)
        ids, learn = how.template.encode(messages, how.tokenizer, _tools(item))
    elif item.get("output") is not None:
        ids, learn = _single_turn(item, source, how)
    elif item.get("text") is not None:
        ids, learn = _plain_text(item["text"], how)
    else:
        raise InputError(
            f"no dialogue and no single turn: found {', '.join(map(str, item)) or 'nothing'}; "
            "an item has conversations, or messages, or instruction and output, or text"
        )
    if not any(learn[1:]):  # the first id follows nothing, so no model learns to write it
        speaks = turns is not None and any(message["role"] == "assistant" for message in messages)
        why = "every turn of the assistant has weight 0" if speaks else "the assistant says nothing"
        raise InputError(f"there is nothing to learn: {why}")
    return ids, learn, image


def _tools(item: Mapping[str, Any]) -> list[Any] | None:
    """The tools that an item offers to the assistant: a list of objects, as OpenAI's."""
    tools = item.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InputError(f"tools: got {tools!r:.60}, but it must be a list of objects")
    return tools


def _plain_text(text: Any, how: Encoding) -> tuple[list[int], list[bool]]:
    """A text that is learnt whole, with the EOS that ends it."""
    if not isinstance(text, str):
        raise InputError(f"text: got {text!r:.60}, but it must be text")
    if not text.strip():
        raise InputError("text: there is nothing to learn: it is empty")
    begins = how.template.begins_with_bos(how.tokenizer)
    ids = how.tokenizer.encode(text, bos=begins, eos=True)
    return ids, [False] + [True] * (len(ids) - 1)


def image_path(image: Any, source: Source) -> str:
    """The image's path below the file's `root`, whether or not the image exists. InputError for what is no path."""
    if not isinstance(image, str):
        raise InputError(f"image: got {image!r:.60}, but it must be a path")
    return os.path.join(source.root, image)


def _single_turn(item: Mapping[str, Any], source: Source, how: Encoding) -> tuple[list[int], list[bool]]:
    named = source.prompt_type is not None or source.preprocess == "caption"
    if "instruction" not in item and source.prompt_type != "caption" and source.preprocess != "caption":
        raise InputError(f"instruction: missing; found {', '.join(map(str, item))}")
    texts = {key: "" if item.get(key) is None else item[key] for key in ("instruction", "input", "output")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise InputError(f"{key}: got {text!r:.60}, but it must be text")
    if not texts["output"].strip():
        answer = "output" if source.preprocess is None else _ANSWERS[source.preprocess]
        raise InputError(f"{answer}: there is nothing to learn: the answer is empty")
    question, template = texts["instruction"], how.template
    if how.dialog and not named:
        question += f"\n{texts['input']}" if texts["input"].strip() else ""
    else:
        prompt_type = source.prompt_type or ("caption" if source.preprocess == "caption" else "alpaca")
        question, template = format_prompt(question, texts["input"], prompt_type), _PLAIN
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": texts["output"]}]
    return template.encode(messages, how.tokenizer)


def _preprocessed(item: Mapping[str, Any], recipe: str, index: int) -> Mapping[str, Any]:
    """An item as one of the original project's recipes changes it.

    single_turn_llava: LLaVA's first question and answer as a single turn. caption: an image's path and its caption.
    """
    try:
        if recipe == "single_turn_llava":
            question, answer = item["conversations"][:2]
            new = {"instruction": question["value"], "output": answer["value"]}
            return new if item.get("image") is None else {**new, "image": item["image"]}
        caption = item["caption"]
        # Where an image has several captions, an item takes one of them, the same in every run.
        return {"image": item["url"], "output": caption[index % len(caption)] if isinstance(caption, list) else caption}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        wanted = "conversations of two turns" if recipe == "single_turn_llava" else "url and caption"
        raise InputError(f"preprocess: {recipe} needs {wanted}; found {', '.join(map(str, item))}") from error


def encode_source(
    source: Source,
    records: Records,
    chosen: np.ndarray,
    how: Encoding,
    *,
    problems: list[str] | None = None,
    progress: bool = False,
) -> Encoded:
    """Encode the `chosen` items of a file.

    problems: a list to which a line is added for each item that is broken; such items are left out. Without it, raises
    InputError for the first one.
    """
    pieces = [chosen[i : i + _PIECE] for i in range(0, len(chosen), _PIECE)]
    work = partial(_encode_piece, source, records, how, all_problems=problems is not None)
    parts: list[Encoded] = []
    with (
        ThreadPoolExecutor(_threads()) as pool,
        progress_bar(len(chosen), source.path.name, progress, unit=" items") as shown,
    ):
        try:
            for piece, (part, found) in zip(pieces, pool.map(work, pieces), strict=True):
                if found and problems is None:
                    raise InputError(found[0])
                if problems is not None:
                    problems += found
                parts.append(part)
                shown.update(len(piece))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return _joined(parts, how)


def _threads() -> int:
    """How many threads encode: this rank's share of the cores, at most 8.

    Tokenizers release Python's lock, but the code around them holds it, so more threads do not help.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, min(8, cores // max(1, int(ranks) if ranks.isdigit() else 1)))


def _encode_piece(
    source: Source, records: Records, how: Encoding, chosen: np.ndarray, *, all_problems: bool
) -> tuple[Encoded, list[str]]:
    ids: list[int] = []
    learn: list[bool] = []
    ends: list[int] = []
    first: list[int] = []
    lines: list[int] = []
    images: dict[int, str] = {}
    problems: list[str] = []
    for index in chosen.tolist():
        line = int(records.lines[index])
        try:
            item = records.read(index)
        except InputError as error:
            problems.append(str(error))
        else:
            try:
                new, mask, image = encode_item(item, source, how, index)
            except InputError as error:
                problems.append(f"{records.place(line)}: {error}")
            else:
                if image is not None:
                    images[len(ends)] = image
                ids += new
                learn += mask
                ends.append(len(ids))
                first.append(mask.index(True, 1))
                lines.append(line)
        if problems and not all_problems:
            break
    start, firsts, places = (np.asarray(values, np.int64) for values in ([0, *ends], first, lines))
    return Encoded(np.asarray(ids, how.dtype), np.asarray(learn, bool), start, firsts, places, images), problems


def _joined(parts: Sequence[Encoded], how: Encoding) -> Encoded:
    none = np.empty(0, np.int64)
    before = np.cumsum([0, *(len(p.ids) for p in parts)])
    items = np.cumsum([0, *(len(p.lines) for p in parts)])
    return Encoded(
        np.concatenate([np.empty(0, how.dtype), *(p.ids for p in parts)]),
        np.concatenate([np.empty(0, bool), *(p.learn for p in parts)]),
        np.concatenate([np.zeros(1, np.int64), *(p.start[1:] + n for p, n in zip(parts, before[:-1], strict=True))]),
        np.concatenate([none, *(p.first for p in parts)]),
        np.concatenate([none, *(p.lines for p in parts)]),
        {int(i + n): image for p, n in zip(parts, items[:-1], strict=True) for i, image in p.images.items()},
    )
