"""Finetune with the flags of the original project: `python main_finetune.py …`, alone, under torchrun or under srun.

Every field of `FinetuneConfig` is a flag. Flags that are left out mean what they mean in the original, but for the
schedule (there 400 epochs at 0.001, which suits no mixture); and rows are packed unless --no_packing is given.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

if not __package__:  # started as a file: look for the package in this checkout, not for modules in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from accessory.errors import ConfigError
from accessory.train.config import FinetuneConfig, field_types, required_fields

# What the original does without these flags, where our own default is another.
ORIGINAL_DEFAULTS: dict[str, Any] = {
    "output_dir": "./output_dir",
    "batch_size": 16,
    "accum_iter": 4,
    "weight_decay": 0.02,
    "clip_grad": -1,
    "max_words": 1024,
    "dialog": False,
    "num_workers": 2,
    "save_iteration_interval": 5000,
}

# Flags of the original that have nothing to say here, and why.
IGNORED = {
    "pretrained_type": "every published layout is recognised by itself",
    "log_dir": "what happens is written to output_dir; --loggers tensorboard adds its files there",
    "world_size": "the launcher says how many ranks there are",
    "local_rank": "the launcher says it",
    "dist_url": "the launcher says where ranks meet",
    "dist_on_itp": "torchrun's and Slurm's variables are read by themselves",
}

HELP = {
    "pretrained_path": "folders or hf:// addresses, later ones (adapters) loaded over earlier ones",
    "llama_type": "mixtral or mixtral_sparse, with _peft appended for adapters; default: what the folder says",
    "llama_config": "JSON files whose keys win over the folder's own, later ones over earlier ones",
    "tokenizer_path": "default: the folder's",
    "no_visual": "train a model that takes images on text alone",
    "trainable_mode": "mm_stage1: train only what makes words of images; mm_stage2 or sg: all but the encoders",
    "quant": "weights that are not trained in fewer bits: nf4, nf4-dq, int4, int8 or fp8; alone: nf4",
    "quant_attention": "attention's own format, or none",
    "quant_output": "the output head's own format, or none",
    "data_config": "a YAML file with META, the list of data files",
    "dialog": "write single turns as dialogues",
    "template": "how dialogues are written: default, alpaca, mistral, chatml, none, or the tokenizer's own",
    "prompt_type": "how single turns are written whose file does not say: alpaca, shortqa, qg, caption, None",
    "max_words": "tokens of a row",
    "packing": "put several documents into a row, where they never see one another (on)",
    "eval_data": "a YAML file like data_config, of items that are held out",
    "eval_interval": "steps between evaluations of eval_data",
    "image_transform": "random_resized_crop, resized_center_crop or padded_resize",
    "broken_images": "fail, or skip items whose image cannot be read",
    "cache_ann_on_disk": "keep encoded items beside the data files",
    "num_workers": "threads that prepare batches",
    "pin_mem": "pin batches in memory (on)",
    "batch_size": "rows a data-parallel rank and micro-step",
    "accum_iter": "micro-steps a step",
    "epochs": "may be a fraction",
    "max_steps": "end after so many steps",
    "lr": "the highest learning rate",
    "min_lr": "the learning rate of the end",
    "warmup_epochs": "in which the learning rate rises from 0",
    "weight_decay": "of everything but norms and biases",
    "clip_grad": "the largest norm of a gradient; 0 or less: any",
    "seed": "of the order of the data and of new adapters",
    "load_balancing_weight": "of the load-balancing loss; default: the model's",
    "z_loss_weight": "of the routers' z-loss",
    "global_batch_statistics": "balance the batch of all ranks rather than each rank's own",
    "lora_rank": "of LoRA, beside the linears of lora_targets; -1: none",
    "lora_alpha": "LoRA's update is scaled by alpha / rank; default: by 1",
    "lora_targets": "some of wq wk wv wo w1 w2 w3 gate output; default: the first seven",
    "bias_tuning": "add and train biases; the result cannot become a Hugging Face Mixtral",
    "norm_tuning": "with adapters, train the norms too",
    "train_router": "with adapters, train the routers too",
    "model_parallel_size": "ranks that hold the model together",
    "data_parallel": "sdp keeps parameters whole between forward and backward, fsdp does not",
    "precision": "bf16, fp16, fp32 or tf32",
    "checkpointing": "compute activations again instead of keeping them",
    "device": "cpu, cuda or cuda:N; default: cuda where there is one",
    "output_dir": "where everything is written",
    "save_interval": "epochs between states",
    "save_iteration_interval": "steps between states",
    "keep": "states that are kept, the last ones",
    "only_save_trainable": "write only what was trained; the folder is then loaded behind the one it was trained on",
    "resume": "auto: go on with the newest state of output_dir; or the folder of a state or a run",
    "overwrite": "begin anew in an output_dir that holds a run",
    "loggers": "some of tensorboard wandb trackio, beside metrics.jsonl",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Finetune as the flags say; returns the exit status: 0 done, 1 failed, 2 misused, 130 interrupted."""
    from accessory.commands.outcome import outcome

    options, unknown = parser().parse_known_args(argv)
    return outcome(lambda: _run(options, unknown), debug=options.debug)


def _run(options: argparse.Namespace, unknown: Sequence[str]) -> int:
    from accessory.commands.finetune import carry_out

    config, notes = read_flags(options, unknown)
    print("\n".join(f"note: {note}" for note in notes), end="\n" if notes else "")
    return carry_out(config, dry_run=options.dry_run)


def parser() -> argparse.ArgumentParser:
    """A flag for every field, spelled with underscores or dashes; what is not given is absent from the result."""
    p = argparse.ArgumentParser(
        prog="main_finetune.py",
        description="Finetune Mixtral-8x7B and its relatives, alone, under torchrun or under srun.",
        usage="%(prog)s --pretrained_path PATH --data_config FILE [flag ...]",
        epilog="Switches that are on are turned off by --no_NAME. docs/ has a tutorial.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, hint in field_types().items():
        types = {get_origin(t) or t for t in (hint, *get_args(hint))}
        if bool in types:
            p.add_argument(*_spelled(name), action="store_const", const=True, help=_help(name))
            if not name.startswith("no_"):
                p.add_argument(
                    *_spelled(f"no_{name}"), dest=name, action="store_const", const=False, help=argparse.SUPPRESS
                )
        elif types & {list, tuple}:
            p.add_argument(*_spelled(name), nargs="+", metavar="X", help=_help(name))
        elif name == "quant":
            p.add_argument(*_spelled(name), nargs="?", const="true", metavar="TYPE", help=_help(name))
        else:
            p.add_argument(*_spelled(name), metavar="X", help=_help(name))
    for name in IGNORED:
        p.add_argument(*_spelled(name), nargs="?", help=argparse.SUPPRESS)
    p.add_argument(*_spelled("dry_run"), action="store_true", default=False, help="check and show, train nothing")
    p.add_argument("--debug", action="store_true", default=False, help="show tracebacks and what is going on")
    return p


def _spelled(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", "--" + name.replace("_", "-")]))


def _help(name: str) -> str:
    defaults = {f.name: f.default for f in fields(FinetuneConfig)} | ORIGINAL_DEFAULTS
    value = defaults[name]
    told = isinstance(value, int | float | str) and not isinstance(value, bool)
    return HELP[name] + (f" (default: {value})" if told else "")


def read_flags(options: argparse.Namespace, unknown: Sequence[str] = ()) -> tuple[FinetuneConfig, list[str]]:
    """The configuration that parsed flags make, and notes on those that say nothing here.

    Raises ConfigError for flags that do not exist, are missing or hold something else than they must.
    """
    given = {name: value for name, value in vars(options).items() if name in field_types()}
    for word in unknown:
        close = difflib.get_close_matches(word.split("=")[0], [f"--{name}" for name in field_types()], n=1)
        raise ConfigError(f"{word}: unknown" + (f"; did you mean {close[0]}?" if close else "; --help lists all flags"))
    values = ORIGINAL_DEFAULTS | given
    missing = [f"--{name}" for name in required_fields() if name not in values]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: missing; --help lists all flags")
    notes = [f"--{name} is ignored: {why}" for name, why in IGNORED.items() if name in options]
    return FinetuneConfig(**values), notes


if __name__ == "__main__":
    sys.exit(main())
