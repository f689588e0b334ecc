"""Images in requests: data URLs, and addresses of hosts that the server's owner allows."""

from __future__ import annotations

import base64
import binascii
import http.client
import urllib.parse
import urllib.request
from collections.abc import Collection
from typing import Any

from accessory.data.images import open_image
from accessory.errors import InputError, one_line

PATIENCE = 10.0  # seconds to fetch an image


def read_image(url: str, most: int, hosts: Collection[str]) -> Any:
    """The decoded image at a data URL, or at an address on one of `hosts`. InputError for any other, and for more than
    `most` bytes."""
    if url.startswith("data:"):
        return open_image(_decode(url, most))
    if _host(url) not in hosts:
        allowed = f"fetches images from {', '.join(sorted(hosts))} only" if hosts else "fetches no images"
        raise InputError(
            f"image_url: got {url!r:.80}, but this server {allowed}; give a data URL: data:image/png;base64,…"
        )
    try:
        with _NO_REDIRECTS.open(url, timeout=PATIENCE) as answer:
            content = answer.read(most + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"image_url: {url!r:.80} could not be fetched ({one_line(error)})") from error
    if len(content) > most:
        raise InputError(f"image_url: {url!r:.80} has more than {most} bytes")
    return open_image(content)


def _host(url: str) -> str | None:
    """The host of an address of the web; None for anything else."""
    try:
        address = urllib.parse.urlsplit(url)
        return address.hostname if address.scheme in ("http", "https") else None
    except ValueError:
        return None


def _decode(url: str, most: int) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError(f"image_url: got {head!r:.80}, but a data URL must be data:image/…;base64,…")
    if len(data) * 3 // 4 > most:
        raise InputError(f"image_url: the image has more than {most} bytes")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"image_url: the data is not base64 ({error})") from error


class _Refuse(urllib.request.HTTPRedirectHandler):
    """A host that is allowed must not lead to one that is not."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_NO_REDIRECTS = urllib.request.build_opener(_Refuse)
