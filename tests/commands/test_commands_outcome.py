"""Ctrl-C at any moment ends a command with 130, also where Python or an import loses the exception."""

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
from accessory.errors import ConfigError
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


# As modules in C do: they report an error of their own, or go on without what they could not import.
INTERRUPTED_IMPORT = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    {}
"""


@pytest.mark.parametrize("then", ["raise ImportError('no numpy') from None", "import no_such_name_in_numpy", "pass"])
def test_ctrl_c_in_an_import_ends_the_command(then, tmp_path, monkeypatch, capsys):
    (tmp_path / "interrupted_import.py").write_text(INTERRUPTED_IMPORT.format(then))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "interrupted_import", raising=False)

    def run():
        import interrupted_import  # noqa: F401

        time.sleep(5)

    started, handler = time.monotonic(), signal.getsignal(signal.SIGINT)
    assert outcome(run) == 130
    assert time.monotonic() - started < 2
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_command_that_tidies_up_after_ctrl_c_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "import_before_tidying.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)")
    monkeypatch.syspath_prepend(tmp_path)
    tidied = []

    def run():
        try:
            import import_before_tidying  # noqa: F401
        finally:
            time.sleep(0.3)
            tidied.append(True)

    assert outcome(run) == 130
    assert tidied


def test_a_ctrl_c_that_was_heard_hides_no_later_error(capsys):
    def run():
        with pytest.raises(KeyboardInterrupt):  # as a chat stops an answer
            signal.raise_signal(signal.SIGINT)
        raise ConfigError("lr: no")

    assert outcome(run) == 1
    assert capsys.readouterr().err == "accessory: error: lr: no\n"


def test_python_m_ends_with_130_where_ctrl_c_came_while_a_text_was_executed(tmp_path):
    """As in the making of a dataclass. Python would end by the signal."""
    code = "import sys\nfrom accessory.commands.outcome import outcome\n"
    (tmp_path / "command.py").write_text(code + "sys.exit(outcome(lambda: exec('raise KeyboardInterrupt')))\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "command"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


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


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(range(0, MOMENTS, 2), id="even", marks=pytest.mark.slow),
        pytest.param(range(1, MOMENTS, 2), id="odd", marks=pytest.mark.long),
    ],
)
def test_ctrl_c_in_a_terminal_while_a_chat_loads(folder, moments):
    for moment in moments:
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
