"""`accessory finetune init`: writes a recipe for a model, data and cards, with what the planner says will fit."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accessory.checkpoint.hub import check_there, fetch_resources, is_remote
from accessory.commands.plan import chosen_card, look_at
from accessory.commands.plan_result import Model
from accessory.commands.plan_view import A_MACHINE, gb
from accessory.config import LlamaType
from accessory.data.dataset import FinetuneData
from accessory.data.template_names import OWN
from accessory.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from accessory.errors import ConfigError, InputError, one_line
from accessory.formats import Quant
from accessory.launch.memory import room_for
from accessory.planner.cards import Card
from accessory.planner.search import Fitting, on_all, smallest
from accessory.planner.setup import ParameterBytes, Setup, Training
from accessory.train.config import FinetuneConfig
from accessory.train.recipe_text import recipe_text

Kind = Literal["full", "lora", "qlora"]
OUT = "finetune.yaml"
TITLES: dict[Kind, str] = {"full": "full finetuning", "lora": "LoRA", "qlora": "QLoRA"}
FORMAT = "nf4"  # of QLoRA's frozen weights
_LORA = {"lora_rank": 16, "lora_alpha": 32.0, "bias_tuning": False, "norm_tuning": False}
# Of the recipes that come along: how a kind learns.
_LEARNS: dict[Kind, dict[str, Any]] = {
    "full": {"epochs": 1.0, "lr": 5e-6, "clip_grad": 2.0},
    "lora": {"epochs": 3.0, "lr": 1e-4, "clip_grad": 1.0},
    "qlora": {"epochs": 3.0, "lr": 1e-4, "clip_grad": 1.0},
}
_BATCH_SIZES = (8, 4, 2, 1)
_MOST_ROWS, _FEWEST_STEPS = 64, 20  # rows of a step, but no more than leave an epoch so many steps
_MOST_WORDS, _FEWEST_WORDS = 4096, 512  # tokens of a row


@dataclass(frozen=True)
class _Chosen:
    kind: Kind
    found: Fitting
    refused: list[Kind]  # what was tried before it, and does not fit


def init(options: argparse.Namespace) -> int:
    """Write the recipe, or with `--dry-run` print it. AccessoryError, with nothing written, for what cannot be used."""
    out = _check(options)
    card = _card(options)
    model = look_at(options.model)
    tokenizer = load_tokenizer(fetch_resources(options.model) if is_remote(options.model) else options.model)
    check_vocabulary(tokenizer, model.args.vocab_size)
    template = OWN if tokenizer.chat_template is not None else None
    data = _read(options.data, tokenizer, model, template)
    on_gpu = card.name != _HOST
    chosen = _choose(options.train, model, card, _words(data), _most_rows(data))
    values = _values(options, model, chosen, template, data)
    values |= {"output_dir": f"output/{out.stem}", "precision": "bf16" if on_gpu else "fp32"}
    values |= {} if on_gpu else {"device": "cpu"}
    FinetuneConfig(**values)
    text = recipe_text(values, _about(options, out, chosen, data))
    if options.dry_run:
        print(text, end="")
        return 0
    _write(out, text)
    print(f"{out}: written: {TITLES[chosen.kind]} on {_cards(card)}; next: {_command(out, chosen)} --dry-run")
    return 0


# --------------------------------------------------------------------------- what is asked

_HOST = "this machine's CPU"


def _check(options: argparse.Namespace) -> Path:
    """The file to write. InputError for options that are missing or wrong, before any file is read."""
    words = options.overrides
    wrong = [word for word in words if "=" in word]
    if wrong:
        raise InputError(f"{wrong[0]}: init takes no key=value; change the field in the recipe that it writes")
    if len(words) > 1:
        raise InputError(f"{words[1]}: one word too many; init writes one file, here {words[0]}")
    for name in ("model", "data"):
        if getattr(options, name) is None:
            raise InputError(f"--{name}: missing; `accessory finetune init` needs --model PATH and --data FILE")
    if options.gpus is not None and options.gpus < 1:
        raise InputError(f"--gpus: got {options.gpus}, but it must be at least 1")
    out = Path(words[0] if words else OUT)
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"{out}: a recipe is a YAML file; give a name that ends in .yaml")
    if not options.dry_run:
        if out.exists():
            raise InputError(f"{out}: is there already, and is not written over; give another name")
        if not out.parent.is_dir():
            raise InputError(f"{out}: {out.parent} is no folder that is there; make it, or give another name")
    check_there(options.model)
    if not Path(options.data).is_file():
        raise InputError(f"--data: {options.data}: no such file")
    return out


def _card(options: argparse.Namespace) -> Card:
    """The cards of the run: as named, else those that are here, else this machine's CPU as one."""
    card = chosen_card(options.card, options.gpu_memory, options.gpus, "--gpu-memory")
    if card is not None:
        return Card(card.name, card.nbytes, card.count or 1)
    if options.gpus is not None:
        raise InputError("--gpus: no GPU is here; say which ones with --card H100 or --gpu-memory 80")
    room = room_for("cpu")
    if room is None:
        raise InputError("--card: no GPU is here, and the system does not say how much memory it has; name a card")
    return Card(_HOST, room.nbytes, 1)


def _read(path: str, tokenizer: Tokenizer, model: Model, template: str | None) -> FinetuneData:
    """The items, cut to the most tokens that a row may have."""
    return FinetuneData.open(
        path,
        tokenizer,
        max_words=min(_MOST_WORDS, model.args.max_seq_len),
        template=template,
        image_tokens=model.args.sees_with.image_tokens(model.views) if model.views else 0,
    )


# --------------------------------------------------------------------------- what is chosen


def _words(data: FinetuneData) -> int:
    """Tokens of a row: those of the longest item, as a power of two, but at least a few hundred."""
    longest = int(data.whole.max())
    return min(data.max_words, max(_FEWEST_WORDS, 1 << (longest - 1).bit_length()))


def _most_rows(data: FinetuneData) -> int:
    """Rows that a step may have, so that an epoch has some steps: a power of two."""
    rows, every = _MOST_ROWS, int(data.lengths.sum()) / _words(data)
    while rows > 1 and every / rows < _FEWEST_STEPS:
        rows //= 2
    return rows


def _choose(asked: Kind | None, model: Model, card: Card, max_words: int, most_rows: int) -> _Chosen:
    """The first kind that fits all cards, with its setup; of them, the one that is asked for. InputError for none."""
    count = card.count or 1
    kinds = _kinds(model)
    if asked is not None and asked not in kinds:
        what = "quantised weights" if model.quant is not None else "adapters beside its weights"
        raise InputError(f"--train: got {asked}, but {model.name} has {what}; give {' or '.join(kinds)}")
    refused: list[Kind] = []
    for kind in kinds if asked is None else [asked]:
        setup = _setup(kind, model, card, max_words)
        sizes = [n for n in _BATCH_SIZES if n == 1 or n * count <= most_rows]
        if (found := on_all(setup, card, sizes)) is not None:
            task = found.setup.task
            assert isinstance(task, Training)
            accum = max(1, most_rows // (task.batch_size * found.setup.dp))
            task = replace(task, accum_iter=accum)
            return _Chosen(kind, replace(found, setup=replace(found.setup, task=task)), refused)
        refused.append(kind)
    raise InputError(_too_small(refused, model, card, max_words))


def _too_small(refused: list[Kind], model: Model, card: Card, max_words: int) -> str:
    """The message where no kind fits, with what would do for the last of them."""
    setup = _setup(refused[-1], model, card, max_words)
    task = replace(setup.task, batch_size=1)  # type: ignore[arg-type]
    would = "larger cards would do"
    if card.name != _HOST and (found := smallest(replace(setup, task=task), Card(card.name, card.nbytes), 1)):
        would = f"{found[0].setup.gpus} such cards would do"
    tried = ", ".join(TITLES[kind] for kind in refused)
    return f"memory: {tried} of {model.name} cannot fit {_cards(card)}; {would}"


def _kinds(model: Model) -> tuple[Kind, ...]:
    if model.quant is not None:
        return ("qlora",)
    return ("lora", "qlora") if model.args.lora_rank > 0 or model.args.bias_tuning else ("full", "lora", "qlora")


def _setup(kind: Kind, model: Model, card: Card, max_words: int) -> Setup:
    on_gpu = card.name != _HOST
    args = model.args
    if kind == "full":
        args = args.replace(lora_rank=-1, bias_tuning=False)
    elif args.lora_rank < 1:
        args = args.replace(**_LORA)
    quant = model.quant or (Quant.parse(FORMAT) if kind == "qlora" else None) or Quant()
    parameter = ParameterBytes() if on_gpu else ParameterBytes(copy=0)
    try:
        return Setup(
            args=args,
            task=Training(kind="full" if kind == "full" else "lora", max_words=max_words, parameter=parameter),
            implementation=model.implementation or "sparse",
            quant=quant,
            views=model.views,
            device="cuda" if on_gpu else "cpu",
            dense_bytes=2 if on_gpu else 4,
        )
    except ConfigError as error:
        raise InputError(f"--model: {one_line(error)}") from error


def _values(
    options: argparse.Namespace, model: Model, chosen: _Chosen, template: str | None, data: FinetuneData
) -> dict[str, Any]:
    """The fields of the recipe that follow from model, data and setup."""
    setup, kind = chosen.found.setup, chosen.kind
    task = setup.task
    assert isinstance(task, Training)
    values: dict[str, Any] = {
        "pretrained_path": options.model,
        "llama_type": str(LlamaType(setup.implementation, kind != "full", model.views)),
        "data_config": options.data,
        "max_words": task.max_words,
        "packing": True,
        "batch_size": task.batch_size,
        "accum_iter": task.accum_iter,
        **_LEARNS[kind],
        "model_parallel_size": setup.tp,
        "data_parallel": task.data_parallel,
        "checkpointing": task.checkpointing,
        "resume": "auto",
    }
    if template is not None:
        values["template"] = template
    if kind == "qlora" and model.quant is None:
        values["quant"] = FORMAT
    if kind != "full":
        values["only_save_trainable"] = True
        values |= _LORA if model.args.lora_rank < 1 else {}
    return values


# --------------------------------------------------------------------------- what is written


def _about(options: argparse.Namespace, out: Path, chosen: _Chosen, data: FinetuneData) -> list[str]:
    found, setup = chosen.found, chosen.found.setup
    tokens = int(data.lengths.sum())
    title = TITLES[chosen.kind]
    lines = [
        f"{title[0].upper()}{title[1:]} of {options.model} on {_cards(found.card)}, made by `accessory finetune init`.",
        f"The data: {len(data):,} items, {tokens:,} tokens, the longest item {int(data.whole.max()):,}.",
        f"The planner: about {gb(found.estimate.total)} each at the largest moment ({found.estimate.moment}), "
        f"{gb(found.margin)} to spare.",
    ]
    if setup.gpus > 1:
        lines.append(f"Ranks: {setup.gpus} = {setup.tp} model-parallel × {setup.dp} data-parallel.")
    if chosen.refused:
        lines.append(f"What cannot fit: {', '.join(TITLES[kind] for kind in chosen.refused)}.")
    command = _command(out, chosen)
    return [*lines, f"Check it: {command} --dry-run", f"Train:    {command}"]


def _command(out: Path, chosen: _Chosen) -> str:
    gpus = chosen.found.setup.gpus
    if gpus <= A_MACHINE:
        return f"accessory finetune {out}" + (f" --n-gpus {gpus}" if gpus > 1 else "")
    return f"torchrun --nnodes={gpus // A_MACHINE} --nproc-per-node={A_MACHINE} -m accessory finetune {out}"


def _cards(card: Card) -> str:
    return ("" if card.name == _HOST else f"{card.count} × ") + f"{card.name} ({gb(card.nbytes)})"


def _write(out: Path, text: str) -> None:
    """The file appears whole or not at all, and never in place of another one."""
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.link(partial, out)
    except FileExistsError as error:
        raise InputError(f"{out}: is there already, and is not written over; give another name") from error
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
