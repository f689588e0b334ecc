"""`accessory plan`: the memory that a task needs on GPUs, host and disk, before anything is downloaded or loaded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from accessory.commands.json_output import print_json
from accessory.commands.plan_result import Model, Plan
from accessory.commands.plan_view import formats_of, show
from accessory.config import PRESETS, Implementation, ModelArgs
from accessory.errors import ConfigError, InputError
from accessory.formats import Quant
from accessory.planner.cards import USUAL, Card, card_of
from accessory.planner.host import disk_bytes, host_bytes
from accessory.planner.moments import check_blocks
from accessory.planner.peak import estimate
from accessory.planner.search import smallest, smallest_of_each
from accessory.planner.setup import Inference, Setup, Training

GB = 1e9


def plan(options: argparse.Namespace) -> int:
    """Print the plan. Returns 1 where the task does not fit the cards, else 0. AccessoryError for wrong options."""
    made = make_plan(options)
    if options.json:
        print_json(as_json(made))
    else:
        show(made)
    return 1 if made.fits is False else 0


def make_plan(options: argparse.Namespace) -> Plan:
    _check(options)
    model = look_at(options.path)
    card = chosen_card(options.card, options.memory, options.gpus)
    setup = _setup(options, model)
    found = estimate(setup)
    setups = smallest(setup, card) if card is not None else smallest_of_each(setup, [card_of(name) for name in USUAL])
    return Plan(model, setup, found, card, setups, host_bytes(setup), disk_bytes(setup, model.nbytes))


def look_at(path: str) -> Model:
    """The model at `path`: the name of a preset, a JSON file, a folder or an hf:// address.

    Reads the headers of a folder's tensors, or only its configuration if the folder has no weights. Downloads only the
    configuration of an address.
    """
    if path.lower() in PRESETS:
        return Model(path.lower(), PRESETS[path.lower()])
    if path.startswith(("hf://", "hf:/")):
        from accessory.checkpoint.hub import fetch_configuration

        files = fetch_configuration(path)
        return Model(path, ModelArgs.from_files(*files))
    file = Path(path)
    if file.suffix == ".json" and file.is_file():
        return Model(path, ModelArgs.from_files(file))
    if not file.exists():
        raise InputError(f"{path}: no such file or folder, and none of {', '.join(PRESETS)} or hf://owner/name")
    configs = [file / name for name in ("params.json", "config.json") if (file / name).is_file()]
    if configs and not any(p.suffix in (".safetensors", ".pth", ".pt", ".bin") for p in file.iterdir()):
        return Model(path, ModelArgs.from_files(*configs))
    from accessory.checkpoint.folder import open_checkpoint

    checkpoint = open_checkpoint(file)
    return Model(
        path,
        checkpoint.args,
        checkpoint.llama_type.implementation,
        checkpoint.quant,
        sum(p.stat().st_size for p in checkpoint.files),
        checkpoint.llama_type.image_views,
    )


def _check(options: argparse.Namespace) -> None:
    for name in (
        "tp",
        "dp",
        "cp",
        "ep",
        "batch",
        "context",
        "prompt",
        "lora_rank",
        "batch_size",
        "max_words",
        "accum_iter",
        "gpus",
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: got {value}, but it must be at least 1")
    inference = ("batch", "context", "prompt", "cache_dtype")
    rows = ("batch_size", "max_words", "accum_iter")
    ranks = ("dp", "cp", "ep", "data_parallel", "checkpointing")
    training = ("lora_rank", *rows, *ranks, "optimizer", "offload", "gradient_dtype")
    wrong = dict.fromkeys(training, "is for --finetune")
    if options.finetune is not None:
        wrong = dict.fromkeys(inference, "is for running a model, not for --finetune")
    if options.finetune == "mm_stage1":
        wrong["lora_rank"] = "is LoRA's, and --finetune mm_stage1 trains none"
    for name, when in wrong.items():
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: {when}; leave it out")
    if options.optimizer == "adamw_8bit" and options.offload == "optimizer":
        raise InputError("--offload: got optimizer, but adamw_8bit keeps its moments on the GPU; give one of them")
    if options.finetune == "mm_stage1" and options.image_views == 0:
        raise InputError("--image-views: got 0, but mm_stage1 trains what makes words of images; give 1 or 5")
    quant = _quant(options)
    if options.finetune in ("full", "lora") and quant != Quant():
        kept = f"--finetune {options.finetune} keeps weights in 16 bits or more"
        raise InputError(f"--quant: {kept}; use qlora for {formats_of(quant)}")
    if options.finetune == "qlora" and options.quant == "none" and quant == Quant():
        raise InputError("--quant: got none, but qlora stands on quantised weights; use --finetune lora")


def chosen_card(name: str | None, memory: float | None, gpus: int | None, option: str = "--memory") -> Card | None:
    """The card of this name, or with so many GB of memory, else this machine's cards, else None. gpus: their number.

    option: the one that gives the memory. InputError for a memory that no card has, and for a name beside it;
    ConfigError for an unknown name.
    """
    if memory is not None and not 0 < memory < float("inf"):
        raise InputError(f"{option}: got {memory:g}, but it must be a number of GB above 0")
    if name is not None and memory is not None:
        raise InputError(f"--card, {option}: both say how large a card is; give one of them")
    if name is not None:
        card = card_of(name, option)
    elif memory is not None:
        card = Card(f"{memory:g} GB", int(memory * GB))
    else:
        return _present(gpus)
    return Card(card.name, card.nbytes, gpus)


def _present(gpus: int | None) -> Card | None:
    if not _has_driver():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    least = min(cards, key=lambda c: c.total_memory)
    return Card(least.name, least.total_memory, gpus or len(cards))


def _has_driver() -> bool:
    """Whether this machine has NVIDIA's driver. It is checked first, because importing torch takes seconds."""
    import ctypes

    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _quant(options: argparse.Namespace) -> Quant:
    return Quant.parse(options.quant, options.quant_attention, options.quant_output) or Quant()


def _setup(options: argparse.Namespace, model: Model) -> Setup:
    tp, dp = _ranks(options)
    args, quant = model.args, _quant(options)
    if (options.quant, options.quant_attention, options.quant_output) == (None, None, None) and model.quant:
        quant = model.quant
    views = options.image_views if options.image_views is not None else model.views
    task: Inference | Training
    if options.finetune is None:
        context = options.context if options.context is not None else min(4096, args.max_seq_len)
        if options.prompt is not None and options.prompt >= context:
            raise InputError(
                f"--prompt: got {options.prompt}, but it must be less than --context {context}, prompt and answer"
            )
        task = Inference(
            batch=options.batch or 1, context=context, prompt=options.prompt, cache_dtype=options.cache_dtype
        )
    else:
        if options.finetune == "full":
            if quant != Quant():
                raise ConfigError(
                    f"quant: {model.name} is quantised ({formats_of(quant)}), and quantised weights cannot be trained"
                )
            args = args.replace(lora_rank=-1, bias_tuning=False)
        elif options.finetune == "mm_stage1":
            views = views or 1
        else:
            rank = options.lora_rank or (args.lora_rank if args.lora_rank > 0 else 16)
            args = args.replace(lora_rank=rank)
        if options.finetune == "qlora" and options.quant is None and quant.experts is None and not model.quant:
            quant = Quant.parse("nf4", options.quant_attention, options.quant_output) or Quant()
        task = Training(
            kind="lora" if options.finetune == "qlora" else options.finetune,
            batch_size=options.batch_size or 4,
            max_words=options.max_words or 4096,
            accum_iter=options.accum_iter or 1,
            checkpointing=bool(options.checkpointing),
            data_parallel=options.data_parallel or "sdp",
            optimizer=options.optimizer or "adamw",
            offload=options.offload or "none",
            gradient_dtype=options.gradient_dtype or "fp32",
        )
    implementation: Implementation = options.implementation or model.implementation or "sparse"
    cp, ep = options.cp or 1, options.ep or 1
    if isinstance(task, Training) and cp > 1 and task.max_words % (2 * cp):
        raise InputError(f"--cp: got {cp}, but --max-words {task.max_words} must be a multiple of 2 × {cp}")
    setup = Setup(
        args=args, task=task, implementation=implementation, quant=quant, tp=tp, dp=dp, cp=cp, ep=ep, views=views
    )
    check_blocks(setup)
    name, room = ("context", task.context) if isinstance(task, Inference) else ("max-words", task.max_words)
    if setup.image_tokens >= room:
        raise InputError(
            f"--{name}: got {room}, but an image takes {setup.image_tokens}; give more, or --image-views 0"
        )
    return setup


def _ranks(options: argparse.Namespace) -> tuple[int, int]:
    """(model-parallel, data-parallel) ranks, the latter with those that share rows.

    `--gpus` alone means model-parallel for inference, else data-parallel.
    """
    tp, dp, cp, gpus = options.tp, options.dp, options.cp or 1, options.gpus
    if gpus is None:
        return tp or 1, (dp or 1) * cp
    if options.finetune is None:
        tp, dp = tp or gpus, 1
    else:
        tp = tp or (gpus // (dp * cp) if dp and gpus % (dp * cp) == 0 else 1)
        dp = dp or max(1, gpus // (tp * cp))
    if tp * dp * cp > gpus:
        wanted = "".join(f" × --{name} {n}" for name, n in (("dp", dp), ("cp", cp)) if n > 1)
        raise InputError(f"--gpus: got {gpus}, but --tp {tp}{wanted} needs more")
    return tp, dp * cp


def as_json(made: Plan) -> dict[str, Any]:
    """The plan as plain values for JSON. Sizes are in bytes."""
    total, active = made.model.args.parameter_counts()
    return {
        "model": {
            "name": made.model.name,
            "parameters": total,
            "active_parameters": active,
            "image_encoders": made.encoder_parameters,
        },
        "setup": describe(made.setup),
        "gpu": {"moment": made.estimate.moment, "terms": made.estimate.terms, "total": made.estimate.total},
        "allocated": made.estimate.allocated,
        "card": None if made.card is None else vars(made.card),
        "fits": made.fits,
        "margin": made.margin,
        "host": made.host,
        "disk": made.disk,
        "smallest_setups": [
            {"card": f.card.name, **describe(f.setup), "total": f.estimate.total, "margin": f.margin}
            for f in made.setups
        ],
    }


def describe(setup: Setup) -> dict[str, Any]:
    """A set-up as plain values for JSON."""
    out: dict[str, Any] = {
        "gpus": setup.gpus,
        "model_parallel_size": setup.tp,
        "implementation": setup.implementation,
        "formats": setup.quant.to_dict(),
        "image_views": setup.views,
    }
    task = setup.task
    if isinstance(task, Inference):
        return out | vars(task)
    rank = setup.args.lora_rank if task.kind == "lora" else None
    return out | {
        "finetune": "qlora" if task.kind == "lora" and setup.quantized else task.kind,
        "lora_rank": rank,
        "data_parallel_size": setup.dp // setup.cp,
        "context_parallel_size": setup.cp,
        "expert_parallel_size": setup.ep,
        "data_parallel": task.data_parallel,
        "checkpointing": task.checkpointing,
        "batch_size": task.batch_size,
        "max_words": task.max_words,
        "accum_iter": task.accum_iter,
        "optimizer": task.optimizer,
        "offload": task.offload,
        "gradient_dtype": task.gradient_dtype,
    }
