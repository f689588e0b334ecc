"""Opening images: every accepted kind, every refused kind, and that refusing is cheap."""

import contextlib
import io
import os
import re
import sys
import threading
import tracemalloc
import warnings

import numpy as np
import pytest
from helpers.pictures import BROKEN, BROKEN_INSIDE, encoded, gradient, noise, png_header
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from accessory.data.images import MAX_PIXELS, open_image, read_header
from accessory.errors import InputError, MissingExtraError


def pixels(image):
    return np.asarray(image)


@pytest.mark.parametrize("name", [*BROKEN, *BROKEN_INSIDE])
def test_what_cannot_be_used_is_one_line(tmp_path, name):
    content, message = (BROKEN | BROKEN_INSIDE)[name]
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source, shown in ((path, re.escape(str(path))), (str(path), re.escape(str(path))), (content, "image")):
            with pytest.raises(InputError, match=rf"^{shown}: {message}") as error:
                open_image(source)
            assert "\n" not in str(error.value)
        if name in BROKEN:
            with pytest.raises(InputError, match=message):
                read_header(path)
        else:
            assert min(read_header(path)) > 0


def test_what_is_no_file(tmp_path):
    for source, message in (
        (tmp_path / "no.png", rf"^{tmp_path}/no\.png: no such file"),
        (tmp_path, rf"^{tmp_path}: is a folder; give an image's file"),
        ("", r"^'': no such file"),
        ("a\0b", r"^'a\\x00b': cannot be read \(embedded null byte\)"),
        ("two\nlines", r"^'two\\nlines': no such file$"),
        ("x" * 5000, r"cannot be read \(File name too long\)"),
        ("/dev/null", r"^/dev/null: is no plain file; give an image's file"),
        (3, r"^image: got a int, but it must be a path, the bytes of a file, or an image of Pillow's"),
        (None, r"^image: got a NoneType, but"),
    ):
        with pytest.raises(InputError, match=message) as error:
            open_image(source)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(InputError, match=r"a\.png: cannot be read \(Permission denied\)"):
        open_image(tmp_path / "a.png")


def test_pillow_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mixtral-accessory\[vision\]'"):
        open_image(b"x")


def test_images_of_pillows_are_checked_too():
    for image, message in (
        (Image.new("RGB", (0, 5)), r"^image: has no pixels \(0 × 5\)"),
        (Image.new("CMYK", (2, 2)), "^image: is CMYK"),
        (Image.new("PA", (2, 2)), "^image: has a palette with transparency"),
        (Image.new("I", (2, 2)), "^image: is of mode I, whose range has no one meaning"),
        (Image.new("HSV", (2, 2)), "^image: is of mode HSV"),
        (Image.new("1", (9000, 9000)), r"^image: has 9,000 × 9,000 pixels, more than 64,000,000"),
    ):
        with pytest.raises(InputError, match=message):
            open_image(image)
    given = Image.new("L", (3, 2), 7)
    opened = open_image(given)
    assert (opened.mode, opened.size, opened.getpixel((0, 0))) == ("RGB", (3, 2), (7, 7, 7))
    assert given.mode == "L"
    given = noise(3, 2)
    opened = open_image(given)
    opened.putpixel((0, 0), (1, 2, 3))
    assert pixels(given).tolist() == pixels(noise(3, 2)).tolist(), "it is left as it is"


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF"])
def test_formats_that_lose_nothing(kind):
    image = noise(16, 9) if kind != "GIF" else noise(16, 9).quantize(256)
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(image, kind, **options)
    assert np.array_equal(pixels(open_image(content)), pixels(image.convert("RGB")))
    assert read_header(content) == (16, 9)


def test_formats_that_lose_a_little():
    image = gradient(64, 48)
    for kind in ("JPEG", "JPEG2000", "WEBP"):
        opened = open_image(encoded(image, kind))
        assert (opened.mode, opened.size) == ("RGB", (64, 48))
        assert np.abs(pixels(opened).astype(int) - pixels(image)).mean() < 6
    second = encoded(image, "MPO", save_all=True, append_images=[noise(64, 48)])
    assert np.abs(pixels(open_image(second)).astype(int) - pixels(image)).mean() < 6, "a phone's first picture"


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (3, 1))
    for x, value in enumerate([(10, 20, 30, 255), (10, 20, 30, 0), (0, 100, 255, 51)]):
        image.putpixel((x, 0), value)
    wanted = [[10, 20, 30], [255, 255, 255], [204, 224, 255]]  # 0.8 · 255 + 0.2 · colour
    assert pixels(open_image(encoded(image)))[0].tolist() == wanted
    assert pixels(open_image(image))[0].tolist() == wanted
    grey = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)])
    assert pixels(open_image(encoded(grey)))[0].tolist() == [[224] * 3]
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((0, 0), (9, 9, 9))
    assert pixels(open_image(encoded(keyed, transparency=(1, 2, 3))))[0].tolist() == [[9, 9, 9], [255, 255, 255]]
    keyed = Image.new("L", (1, 1), 40)
    assert pixels(open_image(encoded(keyed, transparency=40)))[0].tolist() == [[255] * 3]
    assert pixels(open_image(image.convert("RGBa")))[0].tolist()[:2] == wanted[:2]


def test_grey_black_and_white_and_palettes():
    bits = Image.new("1", (2, 1))
    bits.putpixel((0, 0), 1)
    assert pixels(open_image(encoded(bits)))[0].tolist() == [[255] * 3, [0] * 3]
    assert pixels(open_image(encoded(Image.new("L", (1, 1), 77))))[0].tolist() == [[77] * 3]
    few = noise(8, 8).quantize(16)
    assert np.array_equal(pixels(open_image(encoded(few))), pixels(few.convert("RGB")))


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 128, 257, 1000, 32768, 65535]], np.uint16)
    wanted = [round(v / 257) for v in values[0].tolist()]
    image = Image.fromarray(values)
    for source in (image, encoded(image, "PNG"), encoded(image, "TIFF")):
        opened = pixels(open_image(source))
        assert opened[0, :, 0].tolist() == wanted
        assert (opened == opened[..., :1]).all()
    swapped = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert pixels(open_image(swapped))[0, :, 0].tolist() == wanted
    plain = b"P5 6 1 65535\n" + values.astype(">u2").tobytes()
    assert pixels(open_image(plain))[0, :, 0].tolist() == wanted


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    content = encoded(gradient(24, 12), kind, exif=exif, **options)
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        wanted = ImageOps.exif_transpose(image).convert("RGB")
    opened = open_image(content)
    assert opened.size == ((12, 24) if orientation > 4 else (24, 12))
    assert np.array_equal(pixels(opened), pixels(wanted))
    assert ImageOps.exif_transpose(opened).tobytes() == opened.tobytes(), "nobody turns it again"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_is_no_broken_image():
    content = encoded(gradient(8, 4), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert open_image(content).size == (8, 4)


# --------------------------------------------------------------------------- limits


def test_a_huge_image_costs_nothing(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(30_000, 30_000))
    tracemalloc.start()
    with pytest.raises(InputError, match="30,000 × 30,000"):
        open_image(path)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_the_limit_is_the_callers(monkeypatch):
    content = png_header(100, 50)
    with pytest.raises(InputError, match="has 100 × 50 pixels, more than 4,999; make it smaller, or raise max_pixels"):
        read_header(content, max_pixels=4999)
    assert read_header(content, max_pixels=5000) == (100, 50)
    assert read_header(png_header(8000, 8000)) == (8000, 8000), MAX_PIXELS
    # Pillow's own limit is global to the process; our limit does not depend on it.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert np.array_equal(pixels(open_image(encoded(noise(16, 9)))), pixels(noise(16, 9)))
    assert read_header(png_header(30_000, 30_000), max_pixels=10**9) == (30_000, 30_000)


def test_only_pictures_are_opened(monkeypatch, tmp_path):
    """Pillow would run an interpreter for PostScript; we refuse it first."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.setattr("subprocess.check_call", None)
    with pytest.raises(InputError, match="is PostScript, which is not read"):
        open_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000"]))
def test_broken_bytes_are_an_input_error_and_nothing_else(data, kind):
    content = bytearray(encoded(noise(12, 12).quantize(8) if kind == "GIF" else noise(12, 12), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(1, len(content)))])
    with contextlib.suppress(InputError):
        assert open_image(content).mode == "RGB"


def test_threads(tmp_path):
    paths = []
    for n in range(8):
        noise(40, 30, n).save(tmp_path / f"{n}.png")
        paths.append(tmp_path / f"{n}.png")
    wrong = []

    def work(n):
        for _ in range(5):
            if not np.array_equal(pixels(open_image(paths[n])), pixels(noise(40, 30, n))):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_files_are_closed(tmp_path, monkeypatch):
    noise(4, 4).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(BROKEN["animated GIF"][0])
    (tmp_path / "c.png").write_bytes(BROKEN_INSIDE["truncated PNG"][0])
    before = len(os.listdir("/proc/self/fd"))
    kept = [open_image(tmp_path / "a.png")]
    for name in ("b.png", "c.png"):
        with pytest.raises(InputError):
            open_image(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before
    assert kept[0].getpixel((0, 0))
