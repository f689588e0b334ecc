"""What the model learns: emoji with their names and groups, which of them are held out, questions and answers.

There are nine groups, as in Unicode. Unicode's tenth, Component, is left out: it holds skin tones and hair, which are
no emoji by themselves.

Shapes: N emoji, P numbers of a thumbnail.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accessory.errors import InputError

GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
_LIST = ", ".join(GROUPS)
# The wordings of each kind of question. Training draws one at random; evaluation asks the first.
NAME = ("What is this?", "What does this picture show?", "Which emoji is this?", "Name this emoji.")
GROUP = (
    f"Which of these groups does it belong to: {_LIST}?",
    f"To which group does this emoji belong? Choose one of {_LIST}.",
    f"{_LIST}: which group is this emoji in?",
)
BOTH = (
    f"What is this, and which of these groups does it belong to: {_LIST}?",
    f"Name this emoji, then its group, one of {_LIST}.",
)
BRIEF = ("Its group:",)  # few tokens for a slow CPU: the model learns the groups' names from the answers
KINDS = {"name": NAME, "group": GROUP, "both": BOTH, "brief": BRIEF}

NEAR = 0.05  # two drawings count as one if the root mean square difference of their thumbnails (0 … 1) is below this


@dataclass(frozen=True)
class Emoji:
    """One emoji: its characters (`text`), their code points (`code`, as 1f468-200d-1f3a4), its name and group."""

    code: str
    text: str
    name: str
    group: str

    @property
    def turns(self) -> bool:
        """Whether its mirror image shows the same emoji. Not so for signs, flags, clocks, moons and what has a side."""
        sided = re.search(r"\b(left|right|east|west|clock|clockwise|o’clock|thirty|quarter|crescent)", self.name)
        return self.group not in ("Symbols", "Flags") and sided is None


def code_of(text: str) -> str:
    """The code points of the characters in hexadecimal, joined by hyphens."""
    return "-".join(f"{ord(c):04x}" for c in text)


def plain(code: str) -> str:
    """The code without the variation selector fe0f, which some file names have and others lack."""
    return code.replace("-fe0f", "")


def read_emoji(names: Path, codes: Iterable[str]) -> list[Emoji]:
    """Read the emoji of unicode-emoji-json whose code is among `codes`, in Unicode's order.

    The package lists no variants by skin tone, so these are left out. Raises InputError if the file is another one, or
    if it has none of the codes.
    """
    path = names / "data-by-emoji.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        listed = [Emoji(code_of(text), text, told["name"], told["group"]) for text, told in known.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the file of unicode-emoji-json ({' '.join(str(error).split())})") from error
    wanted = {plain(code) for code in codes}
    found = [e for e in listed if plain(e.code) in wanted and e.group in GROUPS]
    if not found:
        raise InputError(f"{path}: none of its emoji is among the {len(wanted)} pictures; are those of code points?")
    return found


# --------------------------------------------------------------------------- families

_PERSONS = r"\b(men|women|man|woman|person|people|boy|girl|child|older|old|mrs?|mx)\b\.?"
_SIDES = r"\b(backhand|index|pointing|upwards?|up|downwards?|down|left|right)(wards)?\b(-facing| facing)?"
_SHADES = r"\b(red|orange|yellow|green|light blue|blue|purple|brown|black|white|grey|pink)\b"
_SIZES = r"\b(large|medium-small|medium|small)\b"


def stem(emoji: Emoji) -> str:
    """The group, and the name without the words that tell variants apart.

    Such words say a skin tone, hair, a person's sex or age, a direction, or the colour of a plain shape. Emoji of one
    stem are drawn alike, so whoever has learnt one of them knows the others.
    """
    name = emoji.name.lower().partition(":")[0]
    if re.search(r"o’clock|-thirty$", name):
        name = "clock"
    elif emoji.group == "People & Body":
        name = re.sub(r"^(family|kiss|couple with heart)\b.*", r"\1", name)
        name = re.sub(r"\b(red|curly|white|blond) hair\b|\bbald\b|\bbeard\b", "hair", name)
        name = re.sub(r"\bmer(man|maid|person)\b", "mer", name)
        name = re.sub(r"\bprince(ss)?\b", "with crown", name)
        name = re.sub(r"\b(santa )?claus\b", "claus", name)
        name = re.sub(_SIDES, "", re.sub(_PERSONS, "", name)).replace("facing", "")
    elif emoji.group == "Symbols" and "arrow" in name and "curving" not in name:
        name = re.sub(r"\b(up|down|left|right)(-(up|down|left|right))?\b", "", name)
    elif re.search(r"\b(heart|circle|square|diamond|book|apple)$", name):
        name = re.sub(_SIZES, "", re.sub(_SHADES, "", name))
    elif name.startswith("keycap"):
        name = "keycap"
    return f"{emoji.group}: {' '.join(name.split())}"


def families(emoji: Sequence[Emoji], thumbnails_NP: np.ndarray, near: float = NEAR) -> list[int]:
    """Sort the emoji into families, and give each emoji the number of its family.

    Two emoji are in one family if they have the same stem, if the root mean square difference of their thumbnails is
    below `near`, or if a chain of such pairs joins them. thumbnails_NP: (N, P), each 0 … 1.
    """
    parents = list(range(len(emoji)))

    def root(n: int) -> int:
        while parents[n] != n:
            parents[n] = n = parents[parents[n]]
        return n

    first: dict[str, int] = {}
    for n, one in enumerate(emoji):
        parents[root(n)] = root(first.setdefault(stem(one), n))
    for n in range(1, len(emoji)):
        distance = np.sqrt(np.mean((thumbnails_NP[:n] - thumbnails_NP[n]) ** 2, axis=1))
        for other in np.flatnonzero(distance < near):
            parents[root(n)] = root(int(other))
    return [root(n) for n in range(len(emoji))]


def held_out(groups: Sequence[str], families_N: Sequence[int], share: float, seed: int) -> set[int]:
    """Choose the emoji that are kept out of training, by number.

    Whole families are drawn at random, up to `share` of each group's emoji. A family that spans groups counts for the
    group of most of its members.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for n, family in enumerate(families_N):
        members[family].append(n)
    of_group: dict[str, list[list[int]]] = defaultdict(list)
    for numbers in members.values():
        of_group[Counter(groups[n] for n in numbers).most_common(1)[0][0]].append(numbers)
    generator, chosen = random.Random(seed), set[int]()
    for group in sorted(of_group):
        some = of_group[group]
        room = round(share * sum(map(len, some)))
        for numbers in generator.sample(some, len(some)):
            if len(numbers) <= room:
                chosen.update(numbers)
                room -= len(numbers)
    return chosen


# --------------------------------------------------------------------------- questions and answers


def answer(kind: str, emoji: Emoji) -> str:
    """The right answer to a question of this kind."""
    if kind == "name":
        return emoji.name
    return emoji.group if kind in ("group", "brief") else f"{emoji.name}: {emoji.group}"


def items(emoji: Emoji, image: str, kinds: Sequence[str], generator: random.Random) -> list[str]:
    """One dialogue about the image for each kind of question, as a line of JSON. The wording is drawn at random."""
    out = []
    for kind in kinds:
        turns = [("human", generator.choice(KINDS[kind])), ("gpt", answer(kind, emoji))]
        told = [{"from": who, "value": text} for who, text in turns]
        out.append(json.dumps({"image": image, "conversations": told}, ensure_ascii=False) + "\n")
    return out


def group_of(reply: str) -> str | None:
    """The group that a reply names in full. None if the reply names no group, or more than one."""
    told = " ".join(reply.split()).casefold()
    named = [group for group in GROUPS if re.search(rf"(?<!\w){re.escape(group.casefold())}(?!\w)", told)]
    return named[0] if len(named) == 1 else None


def is_name(reply: str, name: str) -> bool:
    """Whether a reply is the name and nothing else. Capitals and a full stop make no difference."""
    return " ".join(reply.split()).strip(" .").casefold() == name.casefold()
