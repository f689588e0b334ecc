"""Uploaded images: who needs them, and when they are removed."""

from __future__ import annotations

import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from accessory.server import uploads


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time() + self.now - Clock.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(uploads, "time", clock)
    return clock


@pytest.fixture
def kept(clock, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # monkeypatch restores it, since Uploads sets it
    made = uploads.Uploads()
    yield made
    made.close()


def upload(kept: uploads.Uploads, name: str) -> str:
    """Stores an upload as Gradio does, in a folder that is named after the content."""
    path = Path(kept._folder.name) / name.replace(".", "") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    return str(path)


def there(kept: uploads.Uploads) -> list[str]:
    return sorted(path.name for path in Path(kept._folder.name).rglob("*"))


def test_what_nobody_needs_goes_with_its_folder(kept):
    cat, dog = upload(kept, "cat.png"), upload(kept, "dog.png")
    kept.need("one", cat, None)
    kept.need("two", cat, dog)
    kept.need("one")
    assert there(kept) == ["cat.png", "catpng", "dog.png", "dogpng"]
    kept.need("two", dog)
    assert there(kept) == ["dog.png", "dogpng"]
    kept.leave("two")
    assert there(kept) == []
    folder = Path(kept._folder.name)
    upload(kept, "cow.png")
    kept.close()
    assert not folder.exists()


def test_what_arrives_after_its_visitor_has_left_goes_at_once(kept, clock):
    cat, dog = upload(kept, "cat.png"), upload(kept, "dog.png")
    kept.need("stays", dog)
    kept.leave("gone")
    clock.now += 5
    kept.need("gone", cat, dog)
    assert there(kept) == ["dog.png", "dogpng"]
    kept.need("stays")
    assert there(kept) == []


def test_a_visitor_whom_the_network_brings_back_is_one_again(kept, clock):
    kept.leave("one")
    clock.now += uploads._UNDER_WAY
    kept.need("one", upload(kept, "cat.png"))
    assert there(kept) == ["cat.png", "catpng"]
    kept.leave("two")
    assert list(kept._left) == ["two"], "earlier leavings are forgotten"


def test_what_was_uploaded_and_never_told_of_goes_soon(kept, clock, monkeypatch):
    later = []
    monkeypatch.setattr(uploads.threading, "Timer", lambda seconds, sweep: later.append((seconds, sweep)) or Mock())
    kept.need("stays", upload(kept, "cat.png"))
    upload(kept, "dog.png")
    kept.leave("gone")
    ((seconds, sweep),) = later
    sweep()
    assert "dog.png" in there(kept), "it may be another visitor's, who is about to tell"
    clock.now += seconds
    sweep()
    assert there(kept) == ["cat.png", "catpng"]


def test_the_folder_is_its_owners_alone(kept):
    assert Path(kept._folder.name).stat().st_mode & 0o077 == 0
