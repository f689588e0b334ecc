"""Write the emoji as finetuning data: pictures in two drawing styles, dialogues in JSONL, and YAML that names them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accessory.checkpoint.atomic import new_folder
from accessory.data.images import open_image
from accessory.errors import InputError, MissingExtraError

from .corpus import Emoji, families, held_out, items, plain, read_emoji
from .packages import FLUENT, NAMES, Say, noto_font, npm_package

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = Any

SHARE, SEED = 0.18, 0  # how much of each group is held out
SIZE = 224  # pixels a side of the pictures that are made here
_NOTO_SIZE = 109  # the font holds its pictures in this size alone
_THUMBNAIL = 32  # pixels a side
_NOWHERE = "\U0010fffd"  # a character that no font has a picture of


@dataclass(frozen=True)
class Pictured:
    """An emoji, its family, whether it is held out, and where its pictures lie: paths within the data's folder."""

    emoji: Emoji
    family: int
    held_out: bool
    fluent: str
    noto: str | None


@dataclass(frozen=True)
class Amount:
    """How much training data is written: `variants` more pictures of each emoji, and a dialogue for each of `kinds`."""

    variants: int
    kinds: tuple[str, ...]


def prepare(packages: Path, folder: Path, amount: Amount, say: Say) -> list[Pictured]:
    """Write the data into `folder` unless it is there, and return every emoji in it.

    The folder holds train.jsonl and held_out.jsonl, a YAML for each, pictures and emoji.json. Raises InputError if a
    package is neither there nor can be fetched. Noto's font may be missing: then `say` gets the reason, and the
    pictures in that style are left out.
    """
    if not (folder / "emoji.json").is_file():
        _need_pillow()
        fluent = npm_package(FLUENT, packages, say) / "assets"
        names = npm_package(NAMES, packages, say)
        try:
            font: Path | None = noto_font(packages, say)
        except InputError as error:
            say(f"without Noto's drawings: {error}")
            font = None
        with new_folder(folder) as partial:
            _write(partial, folder, fluent, names, font, amount)
    return read(folder)


def read(folder: Path) -> list[Pictured]:
    """Read back what `prepare` wrote. Raises InputError if emoji.json is missing or damaged."""
    path = folder / "emoji.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return [Pictured(emoji=Emoji(**one.pop("emoji")), **one) for one in told]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); remove {folder}") from error


def _write(partial: Path, folder: Path, fluent: Path, names: Path, font: Path | None, amount: Amount) -> None:
    files = {plain(path.stem): path for path in sorted(fluent.glob("*.webp"))}
    emoji = read_emoji(names, files)
    for kind in ("fluent", "noto", "variants"):
        (partial / kind).mkdir()
    drawings = []
    for one in emoji:  # the files are copied as they are, with their transparency
        (partial / "fluent" / f"{one.code}.webp").write_bytes(files[plain(one.code)].read_bytes())
        drawings.append(_square(_picture(files[plain(one.code)]), _THUMBNAIL))
    small = np.stack([np.asarray(_on_white(d), np.float32).reshape(-1) / 255 for d in drawings])
    family = families(emoji, small)
    kept = held_out([e.group for e in emoji], family, SHARE, SEED)
    drawn = {} if font is None else _draw_noto(emoji, font, partial)
    people = [
        Pictured(e, family[n], n in kept, f"fluent/{e.code}.webp", drawn.get(e.code)) for n, e in enumerate(emoji)
    ]
    generator = random.Random(SEED)
    lines: dict[bool, list[str]] = {False: [], True: []}
    for some in people:
        pictures = [some.fluent]
        for n in range(0 if some.held_out else amount.variants):
            pictures.append(f"variants/{some.emoji.code}_{n}.webp")
            vary(_picture(partial / some.fluent), some.emoji.turns, generator).save(partial / pictures[-1], quality=85)
        for path in pictures:
            lines[some.held_out] += items(some.emoji, path, amount.kinds, generator)
    for name, written in (("train", lines[False]), ("held_out", lines[True])):
        (partial / f"{name}.jsonl").write_text("".join(generator.sample(written, len(written))), encoding="utf-8")
        meta = f"META:\n  - path: {name}.jsonl\n    type: emoji\n    root: {json.dumps(str(folder))}\n"
        (partial / f"{name}.yaml").write_text(meta, encoding="utf-8")
    told = json.dumps([asdict(some) for some in people], ensure_ascii=False, indent=0)
    (partial / "emoji.json").write_text(told, encoding="utf-8")


def vary(picture: Image, turns: bool, generator: random.Random) -> Image:
    """Draw a variant of a transparent picture: RGB, SIZE pixels a side, on a plain ground of any colour.

    The variant is rotated a little, scaled down and moved, and its colours change a little. If `turns` is true, it may
    be mirrored as well.
    """
    from PIL import Image, ImageEnhance

    ground = tuple(generator.randrange(256) for _ in range(3)) if generator.random() < 0.7 else (255, 255, 255)
    if turns and generator.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(generator.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
    red, green, blue, alpha = picture.split()
    colours = Image.merge("RGB", (red, green, blue))
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        colours = enhance(colours).enhance(generator.uniform(0.7, 1.3))
    colours.putalpha(alpha)
    side = round(SIZE * generator.uniform(0.65, 1.0))
    drawn = _square(colours, side)
    out = Image.new("RGBA", (SIZE, SIZE), (*ground, 255))
    out.alpha_composite(drawn, (generator.randint(0, SIZE - side), generator.randint(0, SIZE - side)))
    return out.convert("RGB")


def _draw_noto(emoji: Sequence[Emoji], font: Path, partial: Path) -> dict[str, str]:
    """Draw each emoji that the font has, and return the paths by code, within `partial`."""
    from PIL import ImageFont

    face = ImageFont.truetype(str(font), _NOTO_SIZE)
    unknown, out = draw(_NOWHERE, face), {}
    for one in emoji:
        picture = draw(one.text, face)
        if picture is not None and (unknown is None or picture.tobytes() != unknown.tobytes()):
            out[one.code] = f"noto/{one.code}.webp"
            picture.save(partial / out[one.code], lossless=True)
    return out


def draw(text: str, face: Any) -> Image | None:
    """Draw a text in a colour font, in the middle of a transparent square. None if nothing is visible.

    The square is 8% larger than the drawing's longer side.
    """
    from PIL import Image, ImageDraw

    left, top, right, bottom = map(round, ImageDraw.Draw(Image.new("RGBA", (1, 1))).textbbox((0, 0), text, face))
    if right <= left or bottom <= top:
        return None
    cell = Image.new("RGBA", (right - left, bottom - top))
    ImageDraw.Draw(cell).text((-left, -top), text, font=face, embedded_color=True)
    box = cell.getchannel("A").getbbox()
    if box is None:
        return None
    cell = cell.crop(box)
    side = round(max(cell.size) * 1.08)
    out = Image.new("RGBA", (side, side))
    out.paste(cell, ((side - cell.width) // 2, (side - cell.height) // 2))
    return out


def _picture(path: Path) -> Image:
    from PIL import Image

    open_image(path)  # only for its error message: it gives an RGB image, and transparency is needed here
    with Image.open(path) as image:
        return image.convert("RGBA")


def _square(picture: Image, side: int) -> Image:
    """Scale a picture to fit a transparent square of `side` pixels, and put it in the middle."""
    from PIL import Image

    scale = side / max(picture.size)
    width, height = (max(1, round(s * scale)) for s in picture.size)
    out = Image.new("RGBA", (side, side))
    small = picture.convert("RGBa").resize((width, height), Image.Resampling.BICUBIC).convert("RGBA")
    out.paste(small, ((side - width) // 2, (side - height) // 2))
    return out


def _on_white(picture: Image) -> Image:
    from PIL import Image

    ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    ground.alpha_composite(picture)
    return ground.convert("RGB")


def _need_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the demo that sees needs Pillow: pip install 'mixtral-accessory[vision]'") from error
