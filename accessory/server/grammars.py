"""What an answer must match: JSON, a JSON schema, a regular expression, a grammar, or one of some texts.

llguidance compiles it and says before each draw which tokens may follow. The engine draws no other.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accessory.data.tokenizer import Tokenizer
from accessory.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from accessory.server.protocol import ResponseFormat, StructuredOutputs

Mask = Callable[[list[int]], bytes | None]

# llguidance's bytes have the first token in the lowest bit, the engine's in the highest.
_REVERSED = bytes(int(f"{n:08b}"[::-1], 2) for n in range(256))
_KEPT = 64  # compiled grammars
# White space between two parts of JSON: enough for a line break and an indentation. Without a bound, weak models write
# nothing else until their tokens are spent.
WHITE_SPACE = {"whitespace_pattern": r"[\n\r]{0,2}[ \t]{0,24}"}


class Grammars:
    """The grammars of one tokenizer. vocab_size: of the model, at least the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._making = threading.Lock()
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def of(
        self,
        structured: StructuredOutputs | None,
        response_format: ResponseFormat | None = None,
        calls: str | None = None,
        *,
        ignore_eos: bool = False,
        min_tokens: int = 0,
    ) -> Callable[[], Mask] | None:
        """Makes the hook of one answer each time it is called; None where an answer may be any text.

        calls: Lark's form of the calls of tools that an answer must be.

        InputError for a grammar that no text matches, or that is too large.
        """
        asked: list[tuple[str, str, str]] = []  # field, kind, source
        if response_format is not None and response_format.type != "text":
            asked.append(("response_format", "json", _schema_of(response_format)))
        if structured is not None:
            if structured.json_schema is not None:
                asked.append(("structured_outputs.json", "json", json.dumps(structured.json_schema)))
            if structured.regex is not None:
                asked.append(("structured_outputs.regex", "regex", structured.regex))
            if structured.grammar is not None:
                asked.append(("structured_outputs.grammar", "lark", structured.grammar))
            if structured.choice is not None:
                asked.append(("structured_outputs.choice", "choice", json.dumps(structured.choice)))
        if calls is not None:
            asked.append(("tool_choice", "lark", calls))
        if not asked:
            return None
        if len(asked) > 1:
            raise InputError(f"{asked[0][0]}: an answer can match one thing only, but {asked[1][0]} is given too")
        (field, kind, source) = asked[0]
        for name, given in (("ignore_eos", ignore_eos), ("min_tokens", min_tokens)):
            if given:  # after the last token that matches, only EOS may follow
                raise InputError(f"{name}: an answer that matches {field} ends where that says; leave it out")
        matcher = self._compiled(field, kind, source)
        return lambda: Constraint(matcher.deep_copy(), field, self._vocab_size)

    def _compile(self, field: str, kind: str, source: str) -> Any:
        LLMatcher = _library().LLMatcher
        try:
            if kind == "json":
                grammar = LLMatcher.grammar_from_json_schema(source, defaults=WHITE_SPACE)
            elif kind == "regex":
                grammar = LLMatcher.grammar_from_regex(source)
            elif kind == "lark":
                grammar = LLMatcher.grammar_from_lark(source)
            else:
                grammar = LLMatcher.grammar_from_lark(_choice(json.loads(source)))
            matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{field}: {_reason(error)}") from error
        if matcher.is_error():
            raise InputError(f"{field}: {_reason(matcher.get_error())}")
        return matcher

    @functools.cached_property
    def _vocabulary(self) -> Any:
        with self._making:
            return _library().LLTokenizer(_library().TokenizerWrapper(_Vocabulary(self._tokenizer)))


class Constraint:
    """The hook of one answer: takes the answer's tokens so far, and returns those that may follow, a bit each."""

    def __init__(self, matcher: Any, field: str, vocab_size: int) -> None:
        self._matcher, self._field, self._taken = matcher, field, 0
        self._length = -(-vocab_size // 8)

    def __call__(self, answer: list[int]) -> bytes:
        for token in answer[self._taken :]:
            self._matcher.consume_token(token)
        self._taken = len(answer)
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise InputError(f"{self._field}: {_reason(self._matcher.get_error())}")
        return mask.translate(_REVERSED)[: self._length].ljust(self._length, b"\0")


class _Vocabulary:
    """A tokenizer as llguidance takes one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_id is None:
            raise InputError("response_format: this model's tokenizer has no token that ends an answer")
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        # Control tokens have no text. A byte that UTF-8 does not have marks them as special.
        self.special_token_ids = [token for token, piece in enumerate(pieces) if not piece]
        self.tokens = [piece or b"\xff[%d]" % token for token, piece in enumerate(pieces)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, bos=False, prefix=False)


def _schema_of(asked: ResponseFormat) -> str:
    if asked.type == "json_object":
        return json.dumps({"type": "object"})
    if asked.json_schema is None or asked.json_schema.json_schema is None:
        raise InputError("response_format: json_schema: got no schema; give json_schema.schema")
    return json.dumps(asked.json_schema.json_schema)


def _choice(texts: list[str]) -> str:
    """Lark's form of one of some texts."""
    if not texts or "" in texts:
        raise InputError("structured_outputs.choice: got no text, or an empty one; give at least one text")
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def _reason(error: object) -> str:
    """llguidance's message in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"cannot be followed: {lines[0] if lines else 'it matches no text'}"[:300]


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError(
            "an answer's grammar needs llguidance: pip install 'mixtral-accessory[serve]'"
        ) from error
    return llguidance
