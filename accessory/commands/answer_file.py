"""The file that `accessory generate --out` writes, a line of JSON for each prompt, in their order: `AnswerFile`.

This file imports no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from accessory.commands.prompts import Prompts
from accessory.errors import InputError


class AnswerFile:
    """An open file of answers. `done` prompts have their line, and `failed` of these lines are errors."""

    def __init__(self, path: Path, file: IO[bytes], prompts: Prompts) -> None:
        self.path, self._file = path, file
        self.done = self.failed = 0
        self._go_on(prompts)

    def _go_on(self, prompts: Prompts) -> None:
        """Read what an earlier run wrote. InputError unless these are answers to the first prompts.

        The last line is cut where the run was killed while it wrote it.
        """
        asks, end = iter(prompts), 0
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            ask = next(asks, None)
            if not line.endswith(b"\n"):
                begin = line_of({} if ask is None else ask.said)[:-2]  # without what closes the object
                if ask is None or line[: len(begin)] != begin[: len(line)]:
                    raise self._other(number, "it is no answer to this prompt")
                self._file.truncate(end)
                break
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict) or not ("text" in found or "error" in found):
                raise self._other(number, "it is no line of answers")
            if ask is None:
                raise self._other(number, f"there are only {prompts.count} prompts")
            if any(found.get(name) != ask.said.get(name) for name in ("prompt", "messages", "image")):
                raise self._other(number, f"it answers another prompt than {ask.place}")
            self.done += 1
            self.failed += "error" in found
            end += len(line)
        self._file.seek(0, os.SEEK_END)

    def _other(self, number: int, why: str) -> InputError:
        return InputError(f"{self.path}:{number}: {why}; give another --out, or delete this file")

    def write(self, answer: Mapping[str, Any]) -> None:
        """Append a line. It is in the file when this returns, whatever happens to the process."""
        try:
            self._file.write(line_of(answer))
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); with room for it, the same command goes on"
            ) from error
        self.done += 1
        self.failed += "error" in answer


def line_of(answer: Mapping[str, Any]) -> bytes:
    """A line of JSON. Half a surrogate pair, which UTF-8 does not have, is escaped."""
    return (json.dumps(answer, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


@contextmanager
def open_answers(path: Path, prompts: Prompts) -> Iterator[AnswerFile]:
    """The file at `path`, where a run goes on or begins. InputError where it cannot be written, or holds other lines.

    One without a line is removed at the end.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"--out: {path}: is no file; give a file, or leave --out out to print the answers")
    if any(path.exists() and os.path.exists(name) and os.path.samefile(path, name) for name in prompts.files):
        raise InputError(f"--out: {path}: holds the prompts; give another file")
    try:
        file = open(path, "r+b" if path.exists() else "x+b")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"--out: {path}: cannot be written ({error.strerror}); give a file in a folder that is there"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out: {path}: another process is writing there") from error
        try:
            yield AnswerFile(path, file, prompts)
        finally:
            if path.is_file() and not path.stat().st_size:
                path.unlink()
