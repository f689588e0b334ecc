"""Text out of token ids while they arrive (`StreamDecoder`), and the first stop string in it (`StopScanner`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from accessory.arguments import check_stops
from accessory.data.tokenizer import Tokenizer


class StreamDecoder:
    """Incremental detokenisation: each `push` returns the text that is certain now, never half a character.

    All pushed and flushed texts together are `tokenizer.decode(ids, after=prompt_ids)`. Give the prompt's ids to keep
    the space before the first generated word. A token costs the same time, however many came before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._begun, self._reader = tokenizer.reader(prompt_ids)

    def push(self, token: int) -> str:
        token = int(token)
        piece = self._tokenizer.token_bytes(token, self._begun)
        self._begun = self._begun or bool(self._tokenizer.token_bytes(token))
        return self._reader.decode(piece)

    def flush(self) -> str:
        """The rest at the end: U+FFFD where the ids end within a character, else nothing."""
        return self._reader.decode(b"", final=True)


class StopScanner:
    """Finds the first stop string in text that arrives in pieces, and lets only the text before it through.

    The first stop string is the one whose last character comes first; of several with the same last character, it is
    the longest. So the result does not depend on how the text was cut into pieces. `found` is the stop string, None
    until there is one. Raises InputError for an empty stop string.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        if isinstance(stops, str):
            stops = (stops,)
        self._stops = tuple(dict.fromkeys(stops))
        check_stops(self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def push(self, text: str) -> str:
        """The text that was not returned yet and that cannot be part of a stop string; nothing after a stop."""
        if self.found is not None:
            return ""
        text = self._held + text
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that was held back. Call it at the end, when no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """How many of the last characters of `text` could be the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
