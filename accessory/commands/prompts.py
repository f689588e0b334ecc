"""The prompts of `accessory generate`, read and checked before a model is loaded: `Prompts`.

A file with `--lines` may be longer than memory. So it is read twice, once to check it, once while it is answered. This
file imports no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from accessory.arguments import check_max_gen_len, check_stops
from accessory.commands.text_options import SAMPLING, named_adapters
from accessory.data.images import read_header
from accessory.data.messages import check_ends_with_user, read_messages
from accessory.data.records import Records, open_records, refuse_unknown
from accessory.data.template_names import OWN
from accessory.data.templates import get_template
from accessory.engine.sampling_params import SamplingParams
from accessory.errors import InputError
from accessory.model.options import NO_ADAPTER

NO_IMAGE = ("none", "-")
STDIN = "-"
# The fields of a line of a .jsonl file. The last ones are settings, which win over the options of the same names.
FIELDS = ("prompt", "messages", "image", "adapter", *SAMPLING, "max_gen_len", "stop")


@dataclasses.dataclass(frozen=True)
class Ask:
    """A prompt, and how it is to be answered.

    place: what messages call it. said: what the JSON of its answer repeats, its prompt or messages and its image.
    """

    place: str
    said: Mapping[str, Any]
    image: str | None
    sampling: SamplingParams
    max_gen_len: int
    stops: list[str]
    adapter: str | None

    @property
    def messages(self) -> list[dict[str, str]] | None:
        """The messages of a dialogue; None where the prompt is a text."""
        return read_messages(self.said["messages"]) if "messages" in self.said else None


class Prompts:
    """The prompts that the options name, `count` of them, in their order, from `files`. They may be read repeatedly.

    InputError names the option, or the file and its line, that cannot be used.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.files = list(options.prompt_file)
        if not options.prompt and not self.files:
            if sys.stdin.isatty():
                raise InputError("--prompt: missing; give --prompt TEXT, --prompt-file FILE, or text on standard input")
            self.files = [STDIN]
        self._kept: dict[str, str] = {}
        self._records: dict[str, Records] = {
            name: open_records(Path(name)) for name in self.files if options.lines and name.endswith(".jsonl")
        }
        self._images = options.image if any(name not in NO_IMAGE for name in options.image) else []
        template = options.template
        self._adapters = named_adapters(options)
        self._template = None if template in (None, OWN) else get_template(template)
        self.count = 0
        for ask in self:
            self._check(ask)
            self.count += 1
        if not self.count:
            raise InputError("--lines: the input has no line with text")
        if len(self._adapters) not in (1, self.count):
            raise InputError(
                f"--use-adapter: got {len(self._adapters)} for {self.count} prompts; give one each, or one for all"
            )
        if options.image and len(options.image) != self.count:
            raise InputError(
                f"--image: got {len(options.image)} for {self.count} prompts; give one each, in their order, and none "
                "for those without"
            )

    def __iter__(self) -> Iterator[Ask]:
        copies: Counter[bytes] = Counter()
        for n, (place, given) in enumerate(self._given()):
            ask = self._ask(place, given, n)
            if ask.sampling.temperature and ask.sampling.seed is not None:
                # Equal lines draw other numbers, as equal prompts of one call do, also when a run goes on later.
                key = blake2b(json.dumps(given, sort_keys=True).encode(), digest_size=16).digest()
                sampling = dataclasses.replace(ask.sampling, copy=copies[key])
                copies[key] += 1
                ask = dataclasses.replace(ask, sampling=sampling)
            yield ask

    # ----------------------------------------------------------------- reading

    def _given(self) -> Iterator[tuple[str, Any]]:
        """Each prompt's place, and an object with its fields."""
        for n, text in enumerate(self._options.prompt):
            yield f"prompts[{n}]", {"prompt": text}
        for number, name in enumerate(self.files, len(self._options.prompt)):
            if name in self._records:
                records = self._records[name]
                for n, line in enumerate(records.lines):
                    yield records.place(int(line)), records.read(n)
            elif self._options.lines:
                yield from self._text_lines(name)
            else:
                # The newline at the end of a text file is not part of the prompt: models continue worse after it.
                with _utf8(name), self._open(name) as file:
                    yield f"prompts[{number}]", {"prompt": file.read().removesuffix("\n")}

    def _text_lines(self, name: str) -> Iterator[tuple[str, Any]]:
        called = "standard input" if name == STDIN else name
        with _utf8(name), self._open(name) as file:
            for number, line in enumerate(file, start=1):
                for text in line.splitlines():
                    if text:
                        yield f"{called}:{number}", {"prompt": text}

    def _open(self, name: str) -> IO[str]:
        """A file, from its beginning. What can be read only once, standard input or a pipe, is kept in memory."""
        if name not in self._kept:
            if name != STDIN and os.path.isfile(name):
                return open(name, encoding="utf-8")
            self._kept[name] = sys.stdin.read() if name == STDIN else Path(name).read_text(encoding="utf-8")
        return io.StringIO(self._kept[name])

    def _ask(self, place: str, given: Any, number: int) -> Ask:
        options = self._options
        if not isinstance(given, dict):
            raise InputError(f'{place}: got {given!r:.60}, but a line must be an object, as {{"prompt": "Hello"}}')
        refuse_unknown(given, FIELDS, place, "field")
        if ("prompt" in given) == ("messages" in given):
            raise InputError(f"{place}: give either prompt or messages")
        if not isinstance(given.get("prompt", ""), str):
            raise InputError(f"{place}: prompt: got {given['prompt']!r:.60}, but it must be text")
        image = given.get("image")
        if number < len(self._images):
            if image is not None:
                raise InputError(f"{place}: image: this line names one itself, so leave --image out")
            image = self._images[number]
        elif image is not None:
            if not isinstance(image, str):
                raise InputError(f"{place}: image: got {image!r:.60}, but it must be a path")
            if image not in NO_IMAGE and not options.with_visual:  # other ranks read no lines, but load the model
                raise InputError(f"{place}: image: the model would be loaded for text only; give --with-visual too")
        said = {name: given[name] for name in ("prompt", "messages") if name in given}
        if image is not None:
            said["image"] = image
        picture = None if image is None or image in NO_IMAGE else os.path.expanduser(image)
        stops = given.get("stop", options.stop)
        with _named(place):
            stops = [stops] if isinstance(stops, str) else stops
            if not isinstance(stops, list):
                raise InputError(f"stop: got {stops!r:.60}, but it must be a text, or a list of texts")
            check_stops(stops)
            max_gen_len = given.get("max_gen_len", options.max_gen_len)
            check_max_gen_len(max_gen_len, options.max_seq_len)
            own = {name: given[name] for name in SAMPLING if name in given}
            sampling = dataclasses.replace(options.sampling, **own) if own else options.sampling
        adapter = self._adapters[number if number < len(self._adapters) > 1 else 0]
        if "adapter" in given:
            adapter = None if given["adapter"] == NO_ADAPTER else given["adapter"]
            if adapter not in (None, *(name for name, _ in options.adapter or ())):
                raise InputError(f"{place}: adapter: got {adapter!r:.60}, but no --adapter has this name")
        return Ask(place, said, picture, sampling, max_gen_len, stops, adapter)

    # ----------------------------------------------------------------- checking

    def _check(self, ask: Ask) -> None:
        """What can be told of a prompt without the model, once."""
        with _named(ask.place):
            if (messages := ask.messages) is not None:
                check_ends_with_user(messages)
                if self._template is not None:
                    self._template.text(messages, prompt=True)
        if ask.image is not None and self._options.lines:
            with _named(f"{ask.place}: image"):
                read_header(ask.image)


@contextmanager
def _utf8(name: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        # `error.start` is no place in the file, which is read in pieces.
        raise InputError(f"{name}: not UTF-8 text ({error.reason}: 0x{error.object[error.start]:02x})") from error


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Put a place in front of the messages of InputErrors."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
