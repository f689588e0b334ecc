"""Answers many prompts with one model, as they end: printed, or written into a file, in the order of the prompts."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

from accessory.commands.answer_file import AnswerFile
from accessory.commands.interrupting import first_ctrl_c
from accessory.commands.prompts import Ask, Prompts
from accessory.data.conversation import Conversation
from accessory.data.image_tokens import refuse_tag, without_tag
from accessory.data.template_base import Template
from accessory.data.templates import get_template
from accessory.data.tokenizer import Tokenizer
from accessory.errors import AccessoryError, InputError, one_line
from accessory.launch.environment import launch_of
from accessory.model.text_model import TextModel
from accessory.model.writing import Completion, TextRequest
from accessory.progress import progress_bar


class Asking:
    """How prompts become requests to a model, and its answers lines: with the template of the options, if any."""

    def __init__(self, options: argparse.Namespace, model: TextModel) -> None:
        self._system, self._tokenizer, self._timing = options.system, model.tokenizer, options.timing
        self._sees = model.image_processor is not None
        self._named = None if options.template is None else get_template(options.template, model.tokenizer)
        # Messages are written with a template in any case: that of a chat.
        self._of_messages = self._named or get_template(None, model.tokenizer)

    def request(self, ask: Ask) -> TextRequest:
        """InputError for messages that the template does not take."""
        template = self._template(ask)
        if template is None:
            return TextRequest(
                ask.said["prompt"], ask.image, ask.max_gen_len, ask.sampling, ask.stops, ask.place, ask.adapter
            )
        messages = ask.messages or [{"role": "user", "content": ask.said["prompt"]}]
        talk = Conversation(template, None if messages[0]["role"] == "system" else self._system)
        for message in messages:
            if self._sees:  # for a text-only model, an image tag is plain text
                refuse_tag(message["content"], ask.image, ask.place)
                message["content"] = without_tag(message["content"])
            talk.add(**message)
        try:
            ids = talk.prompt_ids(self._tokenizer)
        except InputError as error:
            raise InputError(f"{ask.place}: {error}") from error
        stops = [*template.stop_strings, *ask.stops]
        return TextRequest(ids, ask.image, ask.max_gen_len, ask.sampling, stops, ask.place, ask.adapter)

    def text(self, ask: Ask, answer: Completion) -> str:
        return self.tidy(ask)(answer.text)

    def tidy(self, ask: Ask) -> Callable[[str], str]:
        """What makes a reply out of the text so far."""
        template = self._template(ask)
        return str if template is None else template.reply

    def told(self, ask: Ask, answer: Completion) -> dict[str, Any]:
        """What a line of JSON says of an answer."""
        if answer.error is not None:
            return {**ask.said, "error": one_line(answer.error)}
        told = {
            **ask.said,
            "text": self.text(ask, answer),
            "prompt_tokens": answer.prompt_tokens,
            "tokens": len(answer.token_ids),
            "finish_reason": answer.finish_reason,
        }
        if self._timing and answer.seconds:
            told |= {"seconds": answer.seconds, "tokens_per_second": len(answer.token_ids) / answer.seconds}
        if answer.logprobs is not None:
            tokens = [_token(*pair, self._tokenizer) for pair in zip(answer.token_ids, answer.logprobs, strict=True)]
            for token, top in zip(tokens, answer.top_logprobs or (), strict=False):
                token["top"] = [_token(*pair, self._tokenizer) for pair in top.items()]
            told["logprobs"] = tokens
        return told

    def _template(self, ask: Ask) -> Template | None:
        return self._of_messages if "messages" in ask.said else self._named


def _token(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"id": token, "token": tokenizer.decode([token]), "logprob": logprob}


def print_answer(
    options: argparse.Namespace, asking: Asking, number: int, count: int, ask: Ask, answer: Completion
) -> None:
    """Print answer `number`, counted from 1, of `count`."""
    if options.json:
        print(json.dumps(asking.told(ask, answer), ensure_ascii=False), flush=True)
        return
    if count > 1:
        prompt = ask.messages[-1]["content"] if ask.messages else ask.said["prompt"]
        last = (prompt.splitlines() or [""])[-1]
        print(f"# {number}/{count}: {last[:70]}")
    print(f"({one_line(answer.error)})" if answer.error is not None else asking.text(ask, answer), flush=True)


# --------------------------------------------------------------------------- many prompts


def answer_all(options: argparse.Namespace, model: TextModel, prompts: Prompts, file: AnswerFile | None) -> int:
    """Answer the prompts that the file lacks, and write them there, or print all. Returns how many have an error.

    Raises KeyboardInterrupt after Ctrl-C: what is being answered is dropped.
    """
    asking = Asking(options, model)
    done, failed = (0, 0) if file is None else (file.done, file.failed)
    asks: dict[int, Ask] = {}  # of requests that are not written yet
    ended: dict[int, Completion] = {}  # before an earlier one

    def requests() -> Iterator[TextRequest | AccessoryError]:
        for number, ask in enumerate(islice(prompts, done, None)):
            asks[number] = ask
            yield _request(asking, ask)

    # On a terminal that shows the answers, they are the progress.
    shown = file is not None or not sys.stdout.isatty()
    bar = progress_bar(prompts.count, "answering", shown, unit=" prompts", done=done)
    tokens, begin = 0, time.monotonic()

    def note(new: int) -> None:
        nonlocal tokens
        tokens += new
        bar.set_postfix_str(f"{tokens / max(time.monotonic() - begin, 1e-3):.0f} tokens/s", refresh=False)
        bar.update(0)  # shows it, when it is time

    # A launcher ends all ranks itself.
    with bar, first_ctrl_c() if launch_of() is None else nullcontext(threading.Event()) as stopped:
        next_ = 0
        for number, answer in model.answers(requests(), stopped.is_set, note):
            ended[number] = answer
            bar.update()
            while next_ in ended:
                ask, answer = asks.pop(next_), ended.pop(next_)
                if file is not None:
                    file.write(asking.told(ask, answer))
                else:
                    print_answer(options, asking, next_ + 1, prompts.count, ask, answer)
                failed += answer.error is not None
                next_ += 1
        if stopped.is_set():
            raise KeyboardInterrupt
    return failed


def _request(asking: Asking, ask: Ask) -> TextRequest | AccessoryError:
    """The request, or why there is none."""
    try:
        return asking.request(ask)
    except AccessoryError as error:
        return error
