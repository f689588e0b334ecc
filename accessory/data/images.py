"""Images opened: `open_image` makes any image a plain RGB one of Pillow's, `read_header` reads its size.

Images come from strangers. So only formats that hold pictures and nothing else are read (never PostScript, which Pillow
would hand to an interpreter). The header is checked before anything is decoded. Of several frames, none is picked for
the user. An image that cannot be used is an error of one line that says what would do.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np

from accessory.errors import AccessoryError, InputError, MissingExtraError

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | Path | bytes | Image.Image"

MAX_PIXELS = 64_000_000  # of an image, before it is made smaller: 192 MB once decoded
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_FRAMES = {"GIF": "an animated GIF", "PNG": "an animated PNG", "WEBP": "an animated WebP", "AVIF": "an animated AVIF"}
_PREFIX = 1024  # bytes that tell what a file is
_WHITE = (255, 255, 255)
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
_TRANSPARENT = ("RGBA", "LA", "RGBa", "La")
_PLAIN = ("RGB", "RGBX", "L", "1", "P", "YCbCr")
# EXIF's orientation -> the name of Pillow's operation that undoes it.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 0x0112


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image of mode RGB: upright as its EXIF says, transparency put on white, 16 bits of grey scaled to 8.

    source: a path, a file's bytes, or an image of Pillow's, which stays unchanged. max_pixels: an image of more pixels,
    width × height, is not decoded. InputError names the file (or "image") and what would do. It is raised for a file
    that is missing, empty, truncated or no image, and for an image that is too large, is CMYK, has a palette with
    transparency, has several frames, or is of a mode without one meaning in RGB. MissingExtraError without Pillow.
    """
    with _opened(source, max_pixels) as (name, image):
        try:
            image.load()
            return _as_rgb(image)
        except Exception as error:  # on broken bytes, decoders raise errors of any class
            what = "is truncated" if "truncated" in str(error).lower() else "is broken"
            raise InputError(f"{name}: {what} ({_reason(error)}); get it again, or leave it out") from error


def read_header(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height as stored. Decodes nothing, and raises those of `open_image`'s errors that the header shows."""
    with _opened(source, max_pixels) as (_, image):
        return image.size


# --------------------------------------------------------------------------- opening


@contextmanager
def _opened(source: ImageSource, max_pixels: int) -> Iterator[tuple[str, Image.Image]]:
    """(its name in messages, the image, not yet decoded). The header has been checked."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("image: images need Pillow: pip install 'mixtral-accessory[vision]'") from error
    if isinstance(source, Image.Image):
        _check(source, "image", max_pixels)
        yield "image", source
    elif isinstance(source, bytes | bytearray | memoryview):
        with BytesIO(source) as file:
            yield "image", _checked(file, "image", max_pixels)
    elif isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        name = text if isinstance(text, str) and text.isprintable() and text else repr(text)
        with _opened_file(text, name) as file:
            yield name, _checked(file, name, max_pixels)
    else:
        raise InputError(
            f"image: got a {type(source).__name__}, but it must be a path, the bytes of a file, or an image of Pillow's"
        )


def _opened_file(path: str | bytes, name: str) -> IO[bytes]:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a path may not hold NUL
        raise InputError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    raise InputError(f"{name}: is {'a folder' if stat.S_ISDIR(mode) else 'no plain file'}; give an image's file")


def _checked(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    """The image in a file, its header read and checked."""
    from PIL import Image

    Image.init()
    try:
        prefix = file.read(_PREFIX)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error
    if not prefix:
        raise InputError(f"{name}: is empty (0 bytes); give an image's file")
    _refuse_no_pixels(prefix, name)
    for kind in FORMATS:
        # Image.open is not called: it warns of large images, and refuses them, by a limit that a whole process shares.
        opener, accepts = Image.OPEN.get(kind, (None, None))
        if opener is None or accepts is None or accepts(prefix) is not True:
            continue
        file.seek(0)
        try:
            image = opener(file, "")
            _check(image, name, max_pixels)
            return image
        except AccessoryError:
            raise
        except Exception as error:
            raise InputError(
                f"{name}: begins as {kind} does, but its header is broken or truncated ({_reason(error)}); get it again"
            ) from error
    raise InputError(f"{name}: {_what(prefix)}")


def _refuse_no_pixels(prefix: bytes, name: str) -> None:
    """Raise InputError for a header of 0 pixels, which Pillow would call no header at all."""
    size: tuple[int, ...] = (1,)
    if prefix.startswith(b"\x89PNG") and prefix[12:16] == b"IHDR" and len(prefix) >= 24:
        size = struct.unpack_from(">II", prefix, 16)
    elif prefix.startswith(b"GIF8") and len(prefix) >= 10:
        size = struct.unpack_from("<HH", prefix, 6)
    elif prefix.startswith(b"BM") and len(prefix) >= 26:
        size = struct.unpack_from("<ii", prefix, 18)
    if 0 in size:
        raise InputError(f"{name}: has no pixels ({size[0]} × {size[1]}); give an image that has some")


def _what(prefix: bytes) -> str:
    """What is wrong with a file that is an image of no known format."""
    text = prefix.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for what, marked in (
        ("an SVG", b"<svg" in text and text.startswith(b"<")),
        ("a PDF", text.startswith(b"%pdf")),
        ("PostScript", text.startswith(b"%!ps")),
        ("a HEIC photograph", prefix[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1")),
    ):
        if marked:
            return f"is {what}, which is not read; save it as PNG or JPEG"
    known = ", ".join(FORMATS)
    return f"is not an image, or of a format that is not read; known are {known}"


# --------------------------------------------------------------------------- what a header tells


def _check(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if not width or not height:
        raise InputError(f"{name}: has no pixels ({width} × {height}); give an image that has some")
    if width * height > max_pixels:
        raise InputError(
            f"{name}: has {width:,} × {height:,} pixels, more than {max_pixels:,}; make it smaller, or raise max_pixels"
        )
    kind, mode = image.format, image.mode
    # Phones add a second picture to a JPEG (MPO): the first one is the photograph.
    if kind != "MPO" and getattr(image, "is_animated", False):
        what = _FRAMES.get(kind or "", "a file of several images")
        raise InputError(f"{name}: is {what}; give one frame, as a PNG or by image.copy() in Pillow")
    if mode == "CMYK":
        raise InputError(f"{name}: is CMYK, colours for a printer; convert it to RGB with its colour profile")
    if mode == "PA" or (mode == "P" and (_has_key(image) or _palette_mode(image) == "RGBA")):
        raise InputError(f"{name}: has a palette with transparency; save it as RGBA or RGB")
    if mode in (*_PLAIN, *_TRANSPARENT, *_DEEP) or (mode == "I" and kind in ("PNG", "PPM")):
        return
    raise InputError(f"{name}: is of mode {mode}, whose range has no one meaning; save it as RGB, or as 8 bits of grey")


def _has_key(image: Image.Image) -> bool:
    return "transparency" in image.info


def _palette_mode(image: Image.Image) -> Any:
    return getattr(image.palette, "mode", None)


# --------------------------------------------------------------------------- to RGB


def _as_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as a new one of mode RGB, upright and without metadata: its EXIF would turn it once more."""
    from PIL import Image

    turn = _UPRIGHT.get(_orientation(image))
    if image.mode in (*_DEEP, "I"):  # I of PNG and PPM holds 16 bits
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("RGBa", "La"):  # colours already multiplied by their alpha
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.mode in _TRANSPARENT or (image.mode in ("RGB", "L", "1") and _has_key(image)):
        image = image.convert("RGBA")
        plain = Image.new("RGB", image.size, _WHITE)
        plain.paste(image, mask=image.getchannel("A"))
    else:
        plain = image.convert("RGB") if image.mode != "RGB" else image.copy()
    plain.info = {}
    return plain if turn is None else plain.transpose(Image.Transpose[turn])


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 (upright) where EXIF is missing or broken, since the picture itself may be good."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _reason(error: Exception) -> str:
    """A decoder's message in one line."""
    said = " ".join(str(error).split())[:100]
    return said or type(error).__name__
