"""`accessory demo --finetune`: teaches the demo's model to answer briefly and as a machine, and shows the difference.

Commands can do each of its steps too. The folder has data, recipe, run and merged model, so that users can look at them
and change them. The data come from `accessory.demos.corpus`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from accessory.arguments import check_max_gen_len
from accessory.convert.merge import Report, merge
from accessory.data.conversation import Conversation
from accessory.data.templates import get_template
from accessory.demos.corpus import as_json_lines, corpus_folder, pairs, split
from accessory.demos.first_run import MAX_SEQ_LEN, make_base, program
from accessory.model.meta import MetaModel
from accessory.train.config import FinetuneConfig
from accessory.train.metrics import read_metrics
from accessory.train.report.write import REPORT_FILE
from accessory.train.run import finetune
from accessory.train.run_folder import FINAL

HELD_OUT = ("What is your mood?", "Do you ever get lonely?", "Why can you not eat?")
SHARE, SEED = 0.15, 0  # this share of the other questions is held out too
# About five minutes on two cores. CPUs multiply fp32 many times faster than bf16, unless they have bf16 instructions.
RECIPE: dict[str, Any] = {
    "llama_type": "mixtral_sparse_peft",
    "lora_rank": 8,
    "lora_alpha": 16.0,
    "norm_tuning": False,
    "template": "tokenizer",
    "max_words": 256,
    "packing": True,
    "batch_size": 2,
    "epochs": 2.0,
    "lr": 1e-3,
    "warmup_epochs": 0.1,
    "clip_grad": 1.0,
    "precision": "fp32",
    "device": "cpu",
    "eval_interval": 24,
    "only_save_trainable": True,
    "resume": "auto",
}
_COMMENTS = "# What `accessory demo --finetune` did; to do it again with other values:\n#   {} finetune {} {}\n"


def finetune_demo(folder: Path, question: str, max_gen_len: int) -> int:
    """Make the model if it is missing, write the data, train, merge, and ask questions before and after.

    Returns 0 when the held-out loss fell, else 1. A demo that was interrupted continues.
    """
    check_max_gen_len(max_gen_len, MAX_SEQ_LEN)
    console = Console(highlight=False, soft_wrap=True)  # commands to copy must stay on one line
    console.print(
        "[bold]SmolLM2-135M-Instruct, a mixture of 8 experts, learns to answer briefly, as the machine that it is[/]"
    )
    started = time.perf_counter()
    corpus = corpus_folder()  # before anything slow: it may not be installed
    base, home = folder / "base", folder / "finetune"
    console.print()
    make_base(console, base)
    recipe = _prepare(console, corpus, base, home)
    questions = [*HELD_OUT, question]
    before = _answers(base, questions, max_gen_len)

    console.print(f"\n3. Training, as [bold]{recipe}[/] says")
    config = FinetuneConfig.from_yaml(recipe)
    finetune(config)
    run, merged = Path(config.output_dir), folder / "finetuned"
    console.print(f"\n4. Merging into {merged}")
    console.print(_merged(merge([base, run / FINAL], merged, overwrite=True)))

    console.print("\n5. Nobody has told it these answers:")
    after = _answers(merged, questions, max_gen_len)
    for asked, was, now in zip(questions, before, after, strict=True):
        console.print(f"   [bold]> {escape(asked)}[/]\n     before: {escape(was)}\n      after: {escape(now)}")
    fell = _report(console, run)
    console.print(f"\nDone in {_minutes(time.perf_counter() - started)}. Try next:")
    for line in (
        f"chat {merged}",
        f"data check {recipe}",
        f"adapter export {run / FINAL} {folder / 'peft'} --base {base}",
        f"finetune {recipe} lora_rank=16 output_dir={home / 'rank16'}",
    ):
        console.print(f"   {program()} {line}")
    if (run / REPORT_FILE).exists():
        console.print(f"   and open {run / REPORT_FILE}")
    return 0 if fell else 1


def _prepare(console: Console, corpus: Path, base: Path, home: Path) -> Path:
    """Write the data and the recipe. Returns the recipe's path."""
    home.mkdir(parents=True, exist_ok=True)
    learnt, kept = split(pairs(corpus), HELD_OUT, SHARE, SEED)
    for name, some in (("train", learnt), ("held_out", kept)):
        (home / f"{name}.jsonl").write_text(as_json_lines(some), encoding="utf-8")
        (home / f"{name}.yaml").write_text(f"META:\n  - path: {name}.jsonl\n    type: text\n", encoding="utf-8")
    console.print(
        f"2. chatterbot-corpus: {len(learnt)} brief answers to learn from in {home / 'train.jsonl'}, "
        f"and {len(kept)} to other questions held out"
    )
    recipe = home / "recipe.yaml"
    values = {
        "pretrained_path": [str(base)],
        "data_config": str(home / "train.yaml"),
        "eval_data": str(home / "held_out.yaml"),
        "output_dir": str(home / "run"),
        **RECIPE,
    }
    comment = _COMMENTS.format(program(), recipe, f"lr=5e-4 output_dir={home / 'run2'}")
    recipe.write_text(comment + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return recipe


def _answers(path: Path, questions: Sequence[str], max_gen_len: int) -> list[str]:
    """The model's answer to each question, on one line, with … at the end of an unfinished answer."""
    model = MetaModel.from_pretrained(path, max_seq_len=MAX_SEQ_LEN, device="cpu")
    template = get_template(None, model.tokenizer)
    prompts = [Conversation(template).add("user", q).prompt_ids(model.tokenizer) for q in questions]
    stops = template.stop_strings
    # One at a time, because a CPU then reads the chosen experts in place.
    texts = [model.generate([p], max_gen_len=max_gen_len, additional_stop_symbols=stops)[0] for p in prompts]
    lines = [" ".join(template.reply(text).split()) for text in texts]
    return [line if line.endswith((".", "!", "?", '"')) else f"{line} …" for line in lines]


def _merged(report: Report) -> str:
    changed = len(report.effects) - len(report.unchanged)
    most = max(effect.size for effect in report.effects)
    text = f"   {changed:,} of {len(report.effects):,} weights changed, the most by {most:.1%} of its size"
    if report.certificate is None:
        return text
    exact = report.certificate.exact
    return f"{text}; beside them and merged, LoRA gives the same logits to {exact.largest:.0e}"


def _report(console: Console, run: Path) -> bool:
    """Print how the loss of the held-out answers and the routing changed. Returns whether the loss fell."""
    records = read_metrics(run)
    losses = [r["loss"] for r in records if r["kind"] == "eval"]
    steps = [r for r in records if r["kind"] == "train"]
    first, last = losses[0], losses[-1]
    console.print(
        f"\n6. Loss a token of the held-out answers: {first:.2f} before, [bold]{last:.2f}[/] after {len(steps)} steps:"
        f" {'−' if last < first else '+'}{abs(1 - last / first):.0%}"
    )
    for when, step in (("first", steps[0]), ("last", steps[-1])):
        entropy, largest = (sum(step["layers"][key]) / len(step["layers"][key]) for key in ("entropy", "largest"))
        console.print(
            f"   Routing in the {when} step, mean of the layers: entropy {entropy:.3f} nats, "
            f"largest share of an expert {largest:.1%}"
        )
    return last < first


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
