"""Bars on a terminal, in a log, and on one of several processes."""

import io

import pytest

from accessory import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(monkeypatch, stream, shown=True, unit="B", seconds=100):
    now = iter(range(0, 10 * seconds, 5))  # five seconds pass whenever tqdm looks at its clock
    monkeypatch.setattr("tqdm.std.time", lambda: next(now))
    monkeypatch.setattr("sys.stderr", stream)
    with progress.progress_bar(4 * 10**9, "loading", shown, unit=unit) as bar:
        for _ in range(40):
            bar.update(10**8)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_a_terminal_sees_every_step(monkeypatch):
    text = run(monkeypatch, Terminal())
    assert text.count("loading:") >= 38
    assert "2.00G/4.00G" in text


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    assert 2 <= run(monkeypatch, io.StringIO()).count("loading:") <= 20


def test_a_log_gets_nothing_of_what_is_soon_over(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress.progress_bar(10, "loading") as bar:
        bar.update(10)
    assert bar.fp.getvalue() == ""


def test_other_units_are_not_scaled(monkeypatch):
    assert "layers" in run(monkeypatch, Terminal(), unit=" layers")
    assert "G" not in run(monkeypatch, Terminal(), unit=" layers")


def test_the_first_process_alone_shows_it_where_it_is_wanted(monkeypatch):
    assert run(monkeypatch, Terminal(), shown=False) == ""
    monkeypatch.setenv("RANK", "3")
    assert run(monkeypatch, Terminal()) == ""
    monkeypatch.setenv("RANK", "0")
    assert run(monkeypatch, Terminal()) != ""
