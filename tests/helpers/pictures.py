"""Small image files, good and broken in every way; made with Pillow, or byte by byte where Pillow refuses."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    x = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, 0)
    y = np.linspace(0, 255, height).astype(np.uint8)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], axis=2))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header states a size and whose data has almost none of the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def animated(kind: str) -> bytes:
    frames = [noise(8, 8, seed) for seed in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def palette_with_alpha() -> bytes:
    image = noise(8, 8).quantize(16)
    return encoded(image, "PNG", transparency=bytes(range(16)))


# name -> (file's bytes, pattern of the error message)
BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", r"is empty \(0 bytes\); give an image's file"),
    "text": (b"not a picture at all", r"is not an image, or of a format that is not read; known are JPEG, PNG, WEBP"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', r"is an SVG, which is not read; save it as PNG or JPEG"),
    "pdf": (b"%PDF-1.7\n", r"is a PDF, which is not read; save it as PNG or JPEG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", r"is PostScript, which is not read; save it as PNG or JPEG"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", r"is a HEIC photograph, which is not read; save it as PNG or JPEG"),
    "no pixels": (png_header(0, 5), r"has no pixels \(0 × 5\); give an image that has some"),
    "no pixels, GIF": (b"GIF89a\x03\0\0\0\0\0\0", r"has no pixels \(3 × 0\); give an image that has some"),
    "no pixels, BMP": (
        encoded(noise(4, 4), "BMP")[:18] + struct.pack("<ii", 4, 0) + bytes(28),
        r"has no pixels \(4 × 0",
    ),
    "huge": (
        png_header(30_000, 30_000),
        r"has 30,000 × 30,000 pixels, more than 64,000,000; make it smaller, or raise max_pixels",
    ),
    "CMYK": (
        encoded(noise(8, 8).convert("CMYK"), "JPEG"),
        r"is CMYK, colours for a printer; convert it to RGB with its colour profile",
    ),
    "CMYK, TIFF": (encoded(noise(8, 8).convert("CMYK"), "TIFF"), r"is CMYK, colours for a printer"),
    "palette with alpha": (palette_with_alpha(), r"has a palette with transparency; save it as RGBA or RGB"),
    "animated GIF": (
        animated("GIF"),
        r"is an animated GIF; give one frame, as a PNG or by image\.copy\(\) in Pillow",
    ),
    "animated PNG": (animated("PNG"), r"is an animated PNG; give one frame"),
    "animated WebP": (animated("WEBP"), r"is an animated WebP; give one frame"),
    "pages": (animated("TIFF"), r"is a file of several images; give one frame"),
    "32 bits": (
        encoded(Image.new("F", (4, 4)), "TIFF"),
        r"is of mode F, whose range has no one meaning; save it as RGB, or as 8 bits of grey",
    ),
    "LAB": (encoded(Image.new("LAB", (4, 4)), "TIFF"), r"is of mode LAB, whose range has no one meaning"),
    "broken header": (
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 60,
        r"begins as PNG does, but its header is broken or truncated",
    ),
    "cut in the header": (encoded(noise(8, 8), "JPEG")[:40], r"begins as JPEG does, but its header is broken or trunc"),
}
# These files have good headers; only decoding shows that they are broken.
BROKEN_INSIDE: dict[str, tuple[bytes, str]] = {
    "truncated JPEG": (encoded(noise(64, 64), "JPEG")[:2000], r"is truncated \(.+\); get it again, or leave it out"),
    "truncated PNG": (encoded(noise(64, 64), "PNG")[:2000], r"is truncated \(.+\); get it again, or leave it out"),
    "truncated TIFF": (encoded(noise(64, 64), "TIFF")[:2000], r"is (truncated|broken) \(.+\); get it again"),
    "truncated GIF": (encoded(noise(64, 64), "GIF")[:2000], r"is (truncated|broken) \(.+\); get it again"),
    "little of much": (png_header(4000, 4000), r"is (truncated|broken) \(.+\); get it again, or leave it out"),
}


def write_picture(path: Path, width: int = 12, height: int = 9, seed: int = 0) -> Path:
    noise(width, height, seed).save(path)
    return path
