"""Ask a model about emoji that it has never seen, with and without their pictures; scores, tables and a page."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from accessory.data.conversation import Conversation
from accessory.data.images import open_image
from accessory.data.templates import get_template
from accessory.vision_config import CLIP_MEAN

from .corpus import GROUPS, KINDS, Emoji, group_of, is_name
from .data import SIZE, Pictured

if TYPE_CHECKING:
    from accessory.model.meta import MetaModel

LONGEST = 16  # tokens of an answer
# What is shown with the question. The last three are controls: they tell nothing about the emoji.
OWN, NONE, GREY, OTHER = "its picture", "no picture", "a grey picture", "another emoji's picture"
SIGHTS = (OWN, NONE, GREY, OTHER)


@dataclass(frozen=True)
class Said:
    """The model's answers about one emoji: to the question for its group, and for its name if that was asked."""

    emoji: Emoji
    group: str
    name: str | None = None

    @property
    def right(self) -> bool:
        """Whether the answer names the right group."""
        return group_of(self.group) == self.emoji.group

    @property
    def named(self) -> bool:
        """Whether the emoji was called by its very name."""
        return self.name is not None and is_name(self.name, self.emoji.name)


def ask(
    model: MetaModel, question: str, images: Sequence[Any], template: str | None, batch: int, longest: int = LONGEST
) -> list[str]:
    """Ask one question about each image, and return the greedy answers, each in one line.

    images: paths or images of Pillow's. A batch in which all are None is asked without images.
    """
    how = get_template(template, model.tokenizer)
    prompt = Conversation(how).add("user", question).prompt_ids(model.tokenizer)
    out: list[str] = []
    for start in range(0, len(images), batch):
        here = list(images[start : start + batch])
        seen = here if any(image is not None for image in here) else None
        stops = how.stop_strings
        texts = model.generate([prompt] * len(here), seen, max_gen_len=longest, additional_stop_symbols=stops)
        out += [" ".join(how.reply(text).split()) for text in texts]
    return out


def others(count: int, seed: int = 0) -> list[int]:
    """For each of `count` emoji, another one, whose picture it is shown with. They form one circle, at random."""
    order = random.Random(seed).sample(range(count), count)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [following[n] for n in range(count)]


def grey() -> Any:
    """A picture of one colour, which is zero in every channel once CLIP's mean is subtracted."""
    from PIL import Image

    red, green, blue = (int(255 * c) for c in CLIP_MEAN)
    return Image.new("RGB", (SIZE, SIZE), (red, green, blue))


def examine(
    model: MetaModel,
    some: Sequence[Emoji],
    images: Sequence[Any],
    kind: str,
    template: str | None,
    batch: int,
    name: bool = True,
) -> dict[str, list[Said]]:
    """Ask about every emoji, once for each of SIGHTS. Names are asked for only with the emoji's own picture.

    Answers are greedy, so they depend on nothing but the question and the picture. So one answer does for all emoji
    without a picture, and one for all with a grey picture. The answer to another emoji's picture is known already: it
    is the answer that this emoji got.
    """
    question = KINDS[kind][0]
    own = ask(model, question, images, template, batch)
    names = ask(model, KINDS["name"][0], images, template, batch) if name else [None] * len(some)
    blind, dim = (ask(model, question, [image], template, 1)[0] for image in (None, grey()))
    count = len(some)
    groups = {OWN: own, NONE: [blind] * count, GREY: [dim] * count, OTHER: [own[n] for n in others(count)]}
    return {
        sight: [Said(e, g, n if sight == OWN else None) for e, g, n in zip(some, told, names, strict=True)]
        for sight, told in groups.items()
    }


# --------------------------------------------------------------------------- tables


def accuracy(said: Sequence[Said]) -> float:
    """The share of answers that name the right group."""
    return sum(s.right for s in said) / len(said)


def majority(some: Sequence[Emoji]) -> float:
    """The share of the largest group: the accuracy of always answering with that group."""
    return max(Counter(e.group for e in some).values()) / len(some)


def summary(results: dict[str, dict[str, list[Said]]]) -> dict[str, Any]:
    """Every figure, by drawing style, ready to be written as JSON. results: answers by style and by sight."""
    out: dict[str, Any] = {}
    for style, by_sight in results.items():
        own = by_sight[OWN]
        asked = [s for s in own if s.name is not None]
        per_group = {}
        for group in GROUPS:
            here = [s for s in own if s.emoji.group == group]
            if here:
                named = sum(s.named for s in here) if asked else None
                per_group[group] = {"emoji": len(here), "right": sum(s.right for s in here), "named": named}
        out[style] = {
            "emoji": len(own),
            "accuracy": {sight: accuracy(said) for sight, said in by_sight.items()},
            "no_group": {sight: sum(group_of(s.group) is None for s in said) for sight, said in by_sight.items()},
            "named": sum(s.named for s in own) / len(own) if asked else None,
            "majority": majority([s.emoji for s in own]),
            "groups": per_group,
            "answers": [[s.emoji.text, s.emoji.name, s.group, s.name] for s in own],
        }
    return out


def show(console: Console, told: dict[str, Any]) -> None:
    """Print two tables: the accuracy with each of SIGHTS, and the accuracy of each group."""
    styles = list(told)
    sight_table = Table("what is shown", *styles, title="Groups told rightly, of held-out emoji")
    for sight in SIGHTS:
        sight_table.add_row(sight, *(f"{told[s]['accuracy'][sight]:.1%}" for s in styles))
    sight_table.add_row("(always the largest group)", *(f"{told[s]['majority']:.1%}" for s in styles))
    sight_table.add_row(f"(one of {len(GROUPS)} at random)", *(f"{1 / len(GROUPS):.1%}" for _ in styles))
    if all(told[s]["named"] is not None for s in styles):
        sight_table.add_row("its very name, with its picture", *(f"{told[s]['named']:.1%}" for s in styles))
    console.print(sight_table)
    group_table = Table("group", "emoji", *styles, title="Group by group, with the picture")
    for group in GROUPS:
        here = [told[s]["groups"].get(group) for s in styles]
        if any(here):
            count = next(h["emoji"] for h in here if h)
            group_table.add_row(group, str(count), *(f"{h['right'] / h['emoji']:.0%}" if h else "–" for h in here))
    console.print(group_table)


# --------------------------------------------------------------------------- a page of pictures

_CELL, _TEXT, _COLUMNS, _ROWS = 150, 74, 7, 4
_INK, _FAINT, _GOOD, _BAD = (30, 30, 30), (120, 120, 120), (20, 120, 50), (180, 30, 30)


def page(chosen: Sequence[tuple[Pictured, Said, Path]], path: Path) -> None:
    """Draw pictures with the answers below them, and write the page to `path`.

    A right group is green, a wrong one red. The right name, and the right group if the answer was wrong, follow in
    grey.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    width = _CELL + 40
    sheet = Image.new("RGB", (columns * width, rows * (_CELL + _TEXT)), (255, 255, 255))
    pen, face = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for n, (_, said, picture) in enumerate(chosen):
        left, top = n % columns * width, n // columns * (_CELL + _TEXT)
        image = open_image(picture)
        image.thumbnail((_CELL - 20, _CELL - 20))
        sheet.paste(image, (left + (width - image.width) // 2, top + 10 + (_CELL - 20 - image.height) // 2))
        told = [(said.name, _INK)] if said.name is not None else []
        told.append((said.group, _GOOD if said.right else _BAD))
        wanted = said.emoji.name if said.right else f"{said.emoji.name}: {said.emoji.group}"
        told.append((f"({wanted})", _FAINT))
        for line, (text, ink) in enumerate(told):
            text = _fitting(text, pen, face, width - 12)
            place = left + (width - pen.textlength(text, face)) / 2
            pen.text((place, top + _CELL - 8 + 20 * line), text, ink, face)
    sheet.save(path, optimize=True)


def pick(everyone: Sequence[Pictured], said: Sequence[Said], folder: Path, style: str, seed: int = 0) -> list[Any]:
    """Choose emoji for `page` at random: about as many of each group, up to what the page holds, sorted by group."""
    generator, out = random.Random(seed), []
    by_code = {one.emoji.code: one for one in everyone}
    each = -(-_COLUMNS * _ROWS // len(GROUPS))
    for group in GROUPS:
        here = [s for s in said if s.emoji.group == group]
        for s in generator.sample(here, min(each, len(here))):
            one = by_code[s.emoji.code]
            out.append((one, s, folder / (one.fluent if style == "Fluent" else str(one.noto))))
    return sorted(generator.sample(out, min(_COLUMNS * _ROWS, len(out))), key=lambda c: GROUPS.index(c[1].emoji.group))


def _fitting(text: str, pen: Any, face: Any, width: float) -> str:
    """Cut the text, with an ellipsis, until it is at most `width` pixels wide."""
    while text and pen.textlength(text, face) > width:
        text = text[:-2].rstrip() + "…" if not text.endswith("…") else text[:-2].rstrip("… ") + "…"
    return text
