"""Ctrl-C at any moment ends a command with 130, also where Python drops the exception."""

from __future__ import annotations

import gc
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.command_line import write_hf

from accessory.commands.outcome import outcome
from accessory.model.meta import MetaModel

MOMENTS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("outcome") / "hf")


class Interrupted:
    """Ctrl-C comes while it is destroyed."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def in_a_destructor():
    Interrupted()


def in_a_cycle():
    cycle = [Interrupted()]
    cycle.append(cycle)
    del cycle
    gc.collect()


@pytest.mark.parametrize("interrupt", [in_a_destructor, in_a_cycle])
@pytest.mark.parametrize("after", [0.0, 5.0], ids=["at the end", "while it works"])
def test_ctrl_c_in_a_destructor_ends_the_command(interrupt, after, capsys):
    def run():
        interrupt()
        time.sleep(after)

    started, hook = time.monotonic(), sys.unraisablehook
    assert outcome(run) == 130
    assert time.monotonic() - started < 2
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert sys.unraisablehook is hook


def test_another_error_in_a_destructor_is_told_as_ever(monkeypatch):
    class Broken:
        def __del__(self):
            raise RuntimeError

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(found.exc_type))
    assert outcome(lambda: Broken() and None) == 0
    assert told == [RuntimeError]


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_loading_ends_the_command(folder, monkeypatch, capsys):
    """The terminal's bar is shown, as in a real chat."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    started = time.monotonic()
    MetaModel.from_pretrained(folder, device="cpu", progress=True)
    loading = time.monotonic() - started

    main = threading.main_thread().ident

    def chat(moment):
        wait = loading * moment / MOMENTS
        threading.Timer(wait, signal.pthread_kill, (main, signal.SIGINT)).start()
        MetaModel.from_pretrained(folder, device="cpu", progress=True)
        time.sleep(10)

    for moment in range(MOMENTS):
        assert outcome(lambda moment=moment: chat(moment)) == 130


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_while_a_chat_loads(folder):
    for moment in range(MOMENTS):
        driver, terminal = pty.openpty()
        command = [sys.executable, "-m", "accessory", "chat", str(folder), "--device", "cpu"]
        chat = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
                                preexec_fn=take_terminal)  # fmt: skip
        os.close(terminal)
        time.sleep(1.5 + 0.1 * moment)
        os.write(driver, b"\x03")
        said = read_all(driver)
        assert chat.wait(20) == 130, (moment, said)
        assert b"Traceback" not in said
        os.close(driver)


def take_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_all(driver: int) -> bytes:
    said = b""
    while select.select([driver], [], [], 20)[0]:
        try:
            piece = os.read(driver, 4096)
        except OSError:  # the terminal's other end is closed
            break
        said += piece
        if not piece:
            break
    return said
