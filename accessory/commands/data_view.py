"""The output of `accessory data check`: counts, a histogram, steps, and items whose learnt tokens are coloured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from accessory.commands import data_result as result
from accessory.commands.data_choices import Choices
from accessory.commands.training_speed import Speed
from accessory.data.dataset import FinetuneData
from accessory.data.images import read_header
from accessory.data.tokenizer import Tokenizer
from accessory.errors import AccessoryError
from accessory.train.dataloader import Schedule
from accessory.train.metrics import METRICS_FILE
from accessory.vision_config import IMAGE_ID

SHOWN_PROBLEMS = 20
_BAR = 40  # characters of the histogram's longest bar
LEARNT, REST, SPECIAL = "green", "dim", "bold magenta"
MARKS = ("⟦", "⟧")  # put around learnt tokens where there are no colours


def heading(choices: Choices, tokenizer: Tokenizer) -> str:
    template = choices.template or "default"
    turns = "dialogues" if choices.dialog and not choices.prompt_type else choices.prompt_type or "alpaca"
    return (
        f"tokenizer {tokenizer.path} ({tokenizer.kind}, {tokenizer.vocab_size:,} ids)\n"
        f"items     at most {choices.max_words:,} tokens; template {template}; single turns: {turns}"
    )


def counts(data: FinetuneData) -> RenderableType:
    """Items, tokens, and how many are cut, left out and learnt: by file, and by group if there are several."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("file", "type", "items", "tokens", "mean", "cut", "left out", "learnt"):
        table.add_column(name, justify="left" if name in ("file", "type") else "right", overflow="fold")
    for count in result.counts(data):
        file = count.file or ("all" if count.type is None else "all of")
        table.add_row(file, count.type or "", *_cells(count))
    return table


def _cells(count: result.Count) -> list[str]:
    return [
        f"{count.items:,}" + ("" if count.of is None else f" of {count.of:,}"),
        f"{count.tokens:,}",
        f"{count.tokens / max(count.items, 1):,.0f}",
        f"{count.cut:,} ({_percent(count.cut, count.items)})",
        "" if count.left_out is None else f"{count.left_out:,}",
        _percent(count.learnt, count.tokens),
    ]


def images(found: result.Images, data: FinetuneData, image_tokens: int | None) -> str:
    """The number of items with an image, and the share of image tokens among all tokens."""
    share = f"images    {found.items:,} of {found.of:,} items have one, of {found.files:,} files"
    left = f"; {found.left_out:,} items are left out for theirs" if found.left_out else ""
    if image_tokens:
        taken = _percent(found.positions, int(data.lengths.sum()))
        return f"{share}; {image_tokens:,} positions each, {taken} of all tokens{left}"
    if image_tokens is None:
        return f"{share}; the positions they take are not counted: --model is no folder of a model that sees{left}"
    return f"{share}; the run looks at none{left}"


def histogram(data: FinetuneData) -> RenderableType:
    """The number of items by their tokens before any cut. Each bin is twice as wide as the one before."""
    lines, found = [Text("tokens of an item", style="bold")], result.lengths(data)
    most = max(number for _, _, number in found.bins)
    for low, high, number in found.bins:
        bar = "█" * round(_BAR * number / most) or ("▏" if number else "")
        cut = "  longer ones are cut" if low <= data.max_words < high and data.truncated else ""
        lines.append(Text(f"{low:>7,} – {high:<7,} {bar:<{_BAR}} {number:>9,} {_percent(number, len(data)):>6}{cut}"))
    summary = f"median {found.median:,.0f}, 99 of 100 at most {found.of_99_in_100:,.0f}, longest {found.longest:,}"
    lines.append(Text(summary))
    return Group(*lines)


def steps(choices: Choices, schedule: Schedule) -> str:
    first = result.rows(schedule)
    if choices.packing:
        how = f"{first.fill:.1%} of {choices.max_words:,} tokens a row filled, {first.items_a_row:.1f} items a row"
    else:
        how = "one item a row, neighbours by length together"
    split = f"{choices.batch_size} a GPU × {choices.accum_iter} accumulated × {choices.replicas} data-parallel"
    return (
        f"packing   {'on' if choices.packing else 'off'}: {how}\n"
        f"steps     {first.steps:,} an epoch of {first.full:,} rows, {choices.rows} a step ({split}); "
        f"{schedule.steps:,} in all ({choices.epochs:g} epoch{'s' * (choices.epochs != 1)})"
    )


def time(data: FinetuneData, schedule: Schedule, speed: Speed | None) -> str:
    """The duration of the run and the source of the estimate; without one, how to get it."""
    if speed is None:
        return (
            "time      unknown here; give --tokens-per-second (of all GPUs together), or make a few steps of the run: "
            f"its {METRICS_FILE} tells"
        )
    tokens = result.tokens_in_all(data, schedule)
    rate = speed.tokens_per_second
    return f"time      about {duration(tokens / rate)} for {tokens:,} tokens at {rate:,.0f} a second ({speed.source})"


def bos(data: FinetuneData, tokenizer: Tokenizer, misplaced: Sequence[str] | None) -> str:
    """A line that says whether BOS begins each item. misplaced: the result of `check_bos`."""
    if misplaced is None:
        return "BOS       the tokenizer puts none before a text"
    if misplaced:
        return f"BOS       wrong in {len(misplaced):,} items"
    items = sum(len(f.encoded.lines) for f in data.files)
    name = f"{tokenizer.bos_token} (id {tokenizer.bos_id})"
    return f"BOS       {name} begins each of the {items:,} items, and is nowhere else"


def problems(found: Iterable[str]) -> RenderableType:
    """The first problems, then the number of problems in each file."""
    found = list(found)
    if not found:
        return Text("\nnothing is wrong", style="green")
    lines = [Text(line, style="red") for line in found[:SHOWN_PROBLEMS]]
    if len(found) > SHOWN_PROBLEMS:
        lines.append(Text(f"… and {len(found) - SHOWN_PROBLEMS:,} more"))
    files = Counter(_file_of(line) for line in found)
    told = ", ".join(f"{number:,} in {name}" for name, number in files.items())
    lines.append(Text(f"{len(found):,} problem{'s' * (len(found) > 1)}: {told}", style="bold red"))
    return Group(Text(), *lines)


def _file_of(problem: str) -> str:
    """The file of a problem, which has the form "file:line: what" or "file: what"."""
    return problem.split(": ", 1)[0].rpartition(":")[0] or problem.split(": ", 1)[0]


def preview(data: FinetuneData, group: int, tokenizer: Tokenizer, *, marked: bool) -> RenderableType:
    """The first items of a group as the model reads them. `marked`: show learnt tokens by brackets, not colours."""
    lines = []
    for item in result.previewed(data, group):
        example = data.example(item)
        title = f"{data.where(item)} ({data.group_names[group]}), {len(example.ids):,} tokens"
        cut = f", cut from {data.whole[item]:,}" if example.truncated else ""
        image = f", image {example.image}{_size(example.image)}" if example.image else ""
        lines.append(Text.assemble("\n", (title + cut + image, "bold"), ": learnt is ", _legend(marked)))
        words = [(i, on) for i, on in zip(example.ids, example.learn, strict=True) if i != IMAGE_ID]
        ids, learn = [i for i, _ in words[: result.TOKENS]], [on for _, on in words[: result.TOKENS]]
        at = example.ids.index(IMAGE_ID) if example.places else 0
        lines.append(painted(ids, learn, tokenizer, marked=marked, places=example.places, at=at))
        if len(words) > result.TOKENS:
            lines.append(Text(f"… {len(words) - result.TOKENS:,} tokens more", style=REST))
    return Group(*lines)


def _size(image: str) -> str:
    try:
        return " ({:,} × {:,})".format(*read_header(image))
    except AccessoryError:  # the list of problems has it, or images are not checked
        return ""


def _legend(marked: bool) -> Text:
    return Text(f"in {''.join(MARKS)}") if marked else Text("green", style=LEARNT)


def painted(
    ids: list[int], learn: list[bool], tokenizer: Tokenizer, *, marked: bool, places: int = 0, at: int = 0
) -> Text:
    """Token ids as text: control tokens by their names, line ends visible, learnt tokens in a different colour.

    places: the number of image tokens; the text shows it before token number `at`.
    """
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    text, run, before, begun = Text(), b"", False, False

    def close() -> None:
        nonlocal run
        text.append(run.decode("utf-8", "replace").replace("\n", "↵\n"), style=LEARNT if before else REST)
        run = b""

    for number, (token, on) in enumerate(zip(ids, learn, strict=True)):
        if places and number == at:
            close()
            text.append(f"[image: {places:,} positions]", style=SPECIAL)
        if on != before:
            close()
            if marked:
                text.append(MARKS[0] if on else MARKS[1])
            before = on
        if token in names:
            close()
            text.append(names[token], style=f"{SPECIAL} {'' if on else 'dim'}".strip())
        else:
            run += tokenizer.token_bytes(token, begun)
            begun = True
    close()
    if marked and before:
        text.append(MARKS[1])
    return text


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"
