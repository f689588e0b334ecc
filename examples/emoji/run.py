"""The whole demo: get the model and the data, write recipes, train in two stages, ask, and print the tables."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from accessory.demos.first_run import make_base, program
from accessory.errors import AccessoryError
from accessory.model.meta import MetaModel
from accessory.train.config import FinetuneConfig
from accessory.train.metrics import write_whole
from accessory.train.run import finetune
from accessory.train.run_folder import FINAL

from .corpus import KINDS
from .data import Amount, Pictured, prepare
from .evaluate import OWN, Said, examine, page, pick, show, summary
from .packages import encoder_folder

MAX_SEQ_LEN = 512


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    size: int  # pixels a side that the encoder sees
    amount: Amount  # of training data
    asked: str  # the kind of question that evaluation asks
    names: bool  # whether names are learnt; evaluation then asks for them too
    recipe: dict[str, Any]  # what the recipes of all stages say
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each stage's recipe adds


_COMMON: dict[str, Any] = {
    "llama_type": "mixtral_sparse_ens",
    "norm_tuning": False,
    "packing": True,
    "warmup_epochs": 0.05,
    "clip_grad": 1.0,
    "weight_decay": 0.0,
    "image_transform": "random_resized_crop",
    "save_interval": 0,
    "only_save_trainable": True,
    "resume": "auto",
}
FULL = Scale(
    size=224,
    amount=Amount(variants=3, kinds=("name", "group", "both")),
    asked="group",
    names=True,
    recipe={**_COMMON, "template": "tokenizer", "max_words": 1024, "batch_size": 16, "num_workers": 8},
    stages={
        "stage1": {"trainable_mode": "mm_stage1", "epochs": 1.0, "lr": 2e-3},
        "stage2": {"trainable_mode": "mm_stage2", "epochs": 0.728, "lr": 5e-4, "lora_rank": 16, "lora_alpha": 32.0},
    },
)
SHORT = Scale(
    size=128,
    amount=Amount(variants=0, kinds=("brief",)),
    asked="brief",
    names=False,
    recipe={**_COMMON, "template": "chatml", "max_words": 160, "batch_size": 1, "num_workers": 1},
    stages={
        "stage1": {"trainable_mode": "mm_stage1", "epochs": 0.2, "lr": 2e-3},
        "stage2": {"trainable_mode": "mm_stage2", "epochs": 0.4, "lr": 1e-3, "lora_rank": 8, "lora_alpha": 16.0},
    },
)
_COMMENT = "# The emoji demo trained by this recipe. To train with other values:\n#   {} finetune {} output_dir=…\n"


def emoji_demo(folder: Path, scale: Scale, *, device: str | None = None, batch: int = 64) -> dict[str, Any]:
    """Make the model, the data and the runs unless they are there, ask the result, and return its figures.

    The figures are written to results.json as well. folder: where everything goes; the model in `folder`/base may be
    there already, from `accessory demo`. device: None takes cuda if there is one. batch: questions asked at once.
    """
    console = Console(highlight=False, soft_wrap=True)  # commands to copy must stay on one line
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    home = folder / ("emoji" if scale is FULL else "emoji-short")
    encoder = encoder_folder()  # before anything slow: it may not be installed
    console.print("[bold]SmolLM2-135M-Instruct, a mixture of 8 experts, learns to see emoji[/]\n")
    base = folder / "base"
    make_base(console, base)
    everyone = prepare(folder / "packages", home / "data", scale.amount, lambda text: console.print(f"   {text}"))
    kept = [one for one in everyone if one.held_out]
    console.print(f"2. {home / 'data'}: {len(everyone) - len(kept)} emoji to learn from, {len(kept)} held out")
    chain = [base]
    for number, (name, changes) in enumerate(scale.stages.items(), start=3):
        recipe = _write_recipe(home, name, chain, encoder, scale, changes, device)
        final = home / name / FINAL
        if final.is_dir():
            console.print(f"{number}. {home / name} is there already")
        else:
            console.print(f"{number}. Training, as [bold]{recipe}[/] says")
            finetune(FinetuneConfig.from_yaml(recipe))
        chain.append(final)
    trained = time.perf_counter() - started
    console.print(f"5. Asking about {len(kept)} emoji that it has never seen\n")
    told = _examine(chain, home, kept, scale, device, batch, console)
    console.print(
        f"\n{trained:.0f} s to learn, {time.perf_counter() - started - trained:.0f} s to ask. Answers: "
        f"{home / 'results.json'}, pictures: {home / 'fluent.png'}. Try next:"
    )
    paths = " ".join(map(str, chain))
    console.print(f"   {program()} merge {paths} {home / 'model'}")
    how = f"--template {scale.recipe['template']} --image {home / 'data' / kept[0].fluent}"
    console.print(f"   {program()} chat {home / 'model'} {how}")
    console.print(f"   and ask: {KINDS[scale.asked][0]}", markup=False)
    return told


def _write_recipe(
    home: Path,
    name: str,
    chain: Sequence[Path],
    encoder: Path,
    scale: Scale,
    changes: dict[str, Any],
    device: str,
) -> Path:
    """Write the YAML of a stage, and the JSON with the image encoder's configuration. Returns the YAML's path.

    chain: the checkpoints to start from; later ones replace tensors of earlier ones. changes: the stage's own values.
    """
    home.mkdir(parents=True, exist_ok=True)
    encoder_args = {"name": "efficientnet", "kind": "efficientnet_lite0", "size": scale.size, "path": str(encoder)}
    vision = home / "vision.json"
    vision.write_text(json.dumps({"vision": {"encoders": [encoder_args]}}, indent=1), encoding="utf-8")
    values = {
        "pretrained_path": [str(path) for path in chain],
        "llama_config": [str(vision)],
        "data_config": str(home / "data" / "train.yaml"),
        "output_dir": str(home / name),
        **scale.recipe,
        "precision": "bf16" if device.startswith("cuda") else "fp32",  # many CPUs multiply bf16 slowly
        "device": device,
        **changes,
    }
    recipe = home / f"{name}.yaml"
    comment = _COMMENT.format(program(), recipe)
    recipe.write_text(comment + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return recipe


def _examine(
    chain: Sequence[Path],
    home: Path,
    kept: Sequence[Pictured],
    scale: Scale,
    device: str,
    batch: int,
    console: Console,
) -> dict[str, Any]:
    """Ask about the held-out emoji in both styles. Writes results.json and a page for each style."""
    model = MetaModel.from_pretrained(
        chain,
        max_seq_len=MAX_SEQ_LEN,
        device=device,
        dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32,
        with_visual=True,
    )
    results: dict[str, dict[str, list[Said]]] = {}
    for style in ("Fluent", "Noto"):
        drawn = [(one, one.fluent if style == "Fluent" else one.noto) for one in kept]
        there = [(one.emoji, home / "data" / path) for one, path in drawn if path is not None]
        if there:
            some, images = zip(*there, strict=True)
            template = scale.recipe["template"]
            results[style] = examine(model, some, images, scale.asked, template, batch, scale.names)
            page(pick(kept, results[style][OWN], home / "data", style), home / f"{style.lower()}.png")
    told = summary(results)
    show(console, told)
    with write_whole(home / "results.json") as file:
        file.write(json.dumps(told, ensure_ascii=False, indent=1).encode())
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.emoji", description="a small model that sees")
    parser.add_argument(
        "--dir", default="demo-model", metavar="DIR", help="where everything goes (default: demo-model)"
    )
    parser.add_argument("--short", action="store_true", help="minutes on a CPU, and a lesser result")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    options = parser.parse_args(arguments)
    try:
        emoji_demo(Path(options.dir), SHORT if options.short else FULL, device=options.device)
    except AccessoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
