"""Text to token ids and back, the same for SentencePiece models and Hugging Face's `tokenizer.json`.

Two rules hold everywhere. *One BOS, never two*: a text that begins with the BOS string gets no second one. *Users
cannot forge control tokens*: `encode` reads "</s>" or "<|im_end|>" inside a text as characters, unless the caller
vouches for the whole text and passes `special=True`.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accessory.data.backends import Backend, HuggingFaceBackend, SentencePieceBackend
from accessory.data.tokenizer_files import find_tokenizer, has_tokenizer, read_settings
from accessory.errors import ConfigError, InputError

log = logging.getLogger(__name__)

MIXTRAL_TOKENIZER = Path(__file__).parent / "assets" / "mixtral_tokenizer.model"

# Embedding tables are padded to multiples of 64 or 128 for speed, and a few checkpoints reserve several hundred rows.
MAX_PADDING_IDS = 1024

# A control token of one of these names ends a turn, whatever the configuration says about EOS.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>", "<|end|>")

_SURROGATES = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """The tokenizer of a folder or file.

    Attributes: `path` (the file that was read), `kind` ("sentencepiece" or "huggingface"), `vocab_size` (highest id +
    1), `bos_id` and `eos_id` (None where there is none), `bos_token` and `eos_token` (their strings, "" where there is
    none), `add_bos` (whether a prompt begins with BOS), `stop_ids` (EOS, all end ids that Hugging Face's files
    list, and end-of-turn tokens), `special_tokens` (control strings and their ids), `added_tokens` (of each string
    beside the vocabulary its id, and whether it is a control token), `chat_template` (Jinja source or None) and
    `template_variables` (the variables that it may use).

    Raises CheckpointError when there is no tokenizer or its file is broken, ConfigError for a broken file beside it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.kind = find_tokenizer(path)
        settings = read_settings(self.path.parent)
        backend: Backend
        if self.kind == "sentencepiece":
            backend = SentencePieceBackend(self.path, settings)
        else:
            backend = HuggingFaceBackend(self.path, settings)
        self._backend = backend
        self.vocab_size: int = backend.size
        self.bos_id: int | None = backend.bos_id
        self.eos_id: int | None = backend.eos_id
        self.add_bos: bool = backend.add_bos and backend.bos_id is not None
        self.special_tokens: dict[str, int] = dict(backend.control)
        self.added_tokens = {text: (number, control) for number, (text, control) in backend.added.items()}
        strings = {number: text for text, number in self.special_tokens.items()}
        self.bos_token: str = settings.bos_token or strings.get(self.bos_id, "") if self.bos_id is not None else ""
        self.eos_token: str = settings.eos_token or strings.get(self.eos_id, "") if self.eos_id is not None else ""
        ends = [self.special_tokens[text] for text in _END_OF_TURN if text in self.special_tokens]
        named = [] if self.eos_id is None else [self.eos_id]
        self.stop_ids: frozenset[int] = frozenset([*named, *ends, *settings.eos_ids])
        self.chat_template: str | None = settings.chat_template
        self.template_variables: dict[str, Any] = {
            **settings.extra,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        self._pieces: dict[int, bytes] = {}

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, {self.kind}, {self.vocab_size} ids)"

    def encode(
        self, text: str, bos: bool, eos: bool = False, *, special: bool = False, prefix: bool = True
    ) -> list[int]:
        """The ids of `text`, with BOS before and EOS behind it where they are asked for and known.

        special: control strings in the text become their ids. That is for texts that the caller vouches for, such as a
        rendered chat template.
        prefix: the text opens a sequence (SentencePiece puts a space before the first word); else it continues one.
        Raises InputError when `text` is no string. Lone surrogates are read as U+FFFD.
        """
        if not isinstance(text, str):
            raise InputError(f"text: got a {type(text).__name__}, but it must be a string")
        text = _SURROGATES.sub("\ufffd", text)
        if special:
            ids = self._backend.parsed(text, prefix)
        else:
            while bos and self.bos_token and text.startswith(self.bos_token):
                text = text[len(self.bos_token) :]
            ids = self._backend.plain(text, prefix)
        if bos and self.bos_id is not None:
            begin = next((n for n, token in enumerate(ids) if token != self.bos_id), len(ids)) if special else 0
            ids = [self.bos_id, *ids[begin:]]
        if eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], after: Sequence[int] = ()) -> str:
        """The text of `ids` without control tokens. after: ids that precede them and whose text is not returned.

        Raises nothing: bytes that are not UTF-8 become U+FFFD, and ids outside the vocabulary add no text.
        """
        begun, reader = self.reader(after)
        pieces = []
        for token in ids:
            pieces.append(self.token_bytes(int(token), begun))
            begun = begun or bool(self.token_bytes(int(token)))
        return reader.decode(b"".join(pieces), final=True)

    def token_bytes(self, token: int, begun: bool = True) -> bytes:
        """The UTF-8 bytes that an id adds to a text; they may be part of a character. begun: some text precedes it."""
        if not begun:
            return self._backend.first_piece(token)
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._backend.piece(token)
        return piece

    def reader(self, after: Sequence[int] = ()) -> tuple[bool, codecs.IncrementalDecoder]:
        """Whether the ids `after` hold any text, and a UTF-8 decoder that read them, perhaps up to half a character."""
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token in reversed(after):
            tail = self.token_bytes(int(token)) + tail
            if len(tail) >= 4:  # no character has more bytes, so earlier ones do not matter
                break
        reader.decode(tail)
        return bool(tail), reader


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (tokenizer.model, tokenizer.model.vN or tokenizer.json) or of a file."""
    return Tokenizer(path)


def tokenizer_of(folders: Sequence[Path]) -> Tokenizer:
    """The tokenizer of the last folder that has one. A save of trained tensors alone comes without."""
    for folder in reversed(folders[1:]):
        if has_tokenizer(folder):
            return load_tokenizer(folder)
    return load_tokenizer(folders[0])


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ConfigError when a network with `vocab_size` embedding rows cannot go with the tokenizer.

    An id without a row would index outside the table. Rows without an id are padding: up to 1024 of them
    (`MAX_PADDING_IDS`) only give a warning, and the sampler must mask ids from `tokenizer.vocab_size` on.
    """
    known = tokenizer.vocab_size
    if known > vocab_size:
        raise ConfigError(
            f"vocab_size: the network has {vocab_size} embedding rows, but the tokenizer {tokenizer.path} has {known} "
            "ids; give the tokenizer that belongs to these weights"
        )
    if vocab_size - known > MAX_PADDING_IDS:
        raise ConfigError(
            f"vocab_size: the network has {vocab_size} embedding rows, {vocab_size - known} more than the {known} ids "
            f"of the tokenizer {tokenizer.path}; give the tokenizer that belongs to these weights"
        )
    if vocab_size > known:
        log.warning(
            "vocab_size: the network has %d embedding rows, the tokenizer %s %d ids; the other %d are taken as padding "
            "and never generated",
            vocab_size,
            tokenizer.path,
            known,
            vocab_size - known,
        )
