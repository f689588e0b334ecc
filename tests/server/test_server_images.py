"""Images in dialogues: data URLs, and addresses that are allowed."""

from __future__ import annotations

import base64
import http.server
import io
import struct
import threading
import zlib

import pytest
import torch
from helpers.seeing import write_seeing
from helpers.serving import check_error, serving

from accessory.model.meta import MetaModel
from accessory.server.service import Limits

Image = pytest.importorskip("PIL.Image", reason="images need Pillow: pip install 'mixtral-accessory[vision]'")
N = 8
MOST = 300_000


def png(size=(20, 10), colour=(200, 30, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def huge_png(width: int, height: int) -> bytes:
    """A few kilobytes that would decode to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(10**6), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


class Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.2:1/secret")
            self.end_headers()
        elif self.path == "/broken":
            self.wfile.write(b"no HTTP at all\r\n\r\n")
        elif self.path == "/large":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bytes(MOST + 1))
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    folder = write_seeing(tmp_path_factory.mktemp("seeing") / "model")
    return MetaModel.from_pretrained(folder, dtype=torch.float32, device="cpu", max_seq_len=256, with_visual=True)


@pytest.fixture(scope="module")
def server(seeing):
    limits = Limits(image_bytes=MOST, hosts=frozenset({"localhost"}))
    with serving(seeing, limits=limits) as made:
        yield made


@pytest.fixture(scope="module")
def pictures():
    with http.server.ThreadingHTTPServer(("localhost", 0), Pictures) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://localhost:{made.server_address[1]}"
        made.shutdown()


def asked(url: str, text: str = "What is this?") -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_an_image_is_seen_as_generate_sees_it(server, seeing, pictures):
    template = server.service.template
    ids = template.prompt_ids([{"role": "user", "content": "What is this?"}], seeing.tokenizer)
    stops = template.stop_strings
    for content in (png(), png(colour=(0, 0, 250))):
        (text,) = seeing.generate([ids], images=[Image.open(io.BytesIO(content))], max_gen_len=N,
                                  additional_stop_symbols=stops)  # fmt: skip
        answer = server.post("/v1/chat/completions", messages=asked(data_url(content)), max_tokens=N, temperature=0)
        assert answer.json()["choices"][0]["message"]["content"] == template.reply(text)
        assert answer.json()["usage"]["prompt_tokens"] == len(ids) + seeing.image_words
    fetched = server.post("/v1/chat/completions", messages=asked(f"{pictures}/red"), max_tokens=N, temperature=0)
    again = server.post("/v1/chat/completions", messages=asked(data_url(png())), max_tokens=N, temperature=0)
    assert fetched.json()["choices"][0]["message"] == again.json()["choices"][0]["message"]


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,!!!!",
        "data:image/png;base64,",
        "data:image/png,abc",
        "data:",
        data_url(b"no image"),
        data_url(png()[:40]),
        data_url(png()[:-20] + bytes(20)),
        data_url(huge_png(100_000, 100_000)),
        data_url(huge_png(7_000, 7_000)),
        data_url(huge_png(2**31 - 1, 2**31 - 1)),
        data_url(bytes(MOST + 10)),
        "http://127.0.0.1:1/a.png",
        "http://localhost@127.0.0.1:1/a.png",
        "http://localhost:1/a.png",
        "http://localhost:99999/a.png",
        "http://localhost/a b\r\nX: y",
        "http://[",
        "file:///etc/passwd",
        "ftp://localhost/a",
        "/etc/passwd",
        "",
    ],
    ids=lambda url: url[:40],
)
def test_what_is_no_image(server, url):
    check_error(server.post("/v1/chat/completions", messages=asked(url), max_tokens=N), 400, "messages")


@pytest.mark.parametrize("path", ["elsewhere", "broken", "large"])
def test_hosts_that_misbehave(server, pictures, path):
    check_error(server.post("/v1/chat/completions", messages=asked(f"{pictures}/{path}")), 400, "messages", path)


def test_a_dialogue_has_one_image(server):
    both = asked(data_url(png()))
    both[0]["content"] *= 2
    check_error(server.post("/v1/chat/completions", messages=both, max_tokens=N), 400, "messages", "2 images")
    assert server.post("/v1/chat/completions", messages=asked(data_url(png())), max_tokens=N).status_code == 200
