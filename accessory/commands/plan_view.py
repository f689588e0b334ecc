"""The output of `accessory plan`: a table for one GPU, what host and disk need, and the smallest set-ups."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from accessory.commands.plan_result import Plan
from accessory.counts import spell_parameters
from accessory.formats import PARTS, Format, Quant
from accessory.planner.search import RESERVE, Fitting
from accessory.planner.setup import Inference, Setup, Training

SHOWN = 5_000_000  # bytes; a smaller term would show as 0.00
SAVINGS = {"optimizer": "8-bit moments", "offload": "moments on the host", "gradient_dtype": "bf16 gradients"}
A_MACHINE = 8  # the most GPUs for which `--n-gpus` is suggested; more need torchrun or srun


def show(made: Plan) -> None:
    console = Console(highlight=False, soft_wrap=True)
    total, active = map(spell_parameters, made.model.args.parameter_counts())
    line = f"[bold]{made.model.name}[/]: {total} parameters, of which a token uses {active}"
    if made.setup.views:
        line += f"; image encoders of {spell_parameters(made.encoder_parameters)}"
    console.print(line)
    console.print(f"task      {task_line(made.setup)}")
    console.print(f"set-up    {setup_line(made.setup)}")
    console.print(gpu_table(made))
    console.print(f"verdict   {verdict(made)}")
    console.print(f"host      {gb(made.host)} a machine while loading, beside the files' pages")
    console.print("disk      " + ", ".join(f"{name} {gb(n)}" for name, n in made.disk.items()))
    console.print()
    if made.setups:
        console.print(setups_table(made.setups))
    else:
        console.print("[red]no set-up of this task fits such cards[/]; fewer tokens at once, or larger cards, would do")


def gpu_table(made: Plan) -> Table:
    table = Table(title=f"each GPU, at its largest moment: {made.estimate.moment}", title_justify="left")
    table.add_column("what")
    table.add_column("GB", justify="right")
    for name, nbytes in sorted(made.estimate.terms.items(), key=lambda item: -item[1]):
        if nbytes >= SHOWN:
            table.add_row(name, f"{nbytes / 1e9:,.2f}")
    table.add_section()
    table.add_row("together", f"{made.estimate.total / 1e9:,.2f}", style="bold")
    return table


def verdict(made: Plan) -> str:
    card = made.card
    if card is None or made.margin is None:
        return "no GPU is here and none is named (--card H100, --memory 80): see below what would do"
    there = f"{card.name} with {gb(card.nbytes)}"
    if card.count is not None and made.setup.gpus > card.count:
        return f"[red]does not fit[/]: {made.setup.gpus} cards are wanted and {card.count} are there ({there})"
    if made.margin < 0:
        return f"[red]does not fit[/] {there}: {gb(-made.margin)} too much"
    word = "[green]fits[/]" if made.margin >= RESERVE * card.nbytes else "[yellow]fits, barely,[/]"
    return f"{word} {there}: {gb(made.margin)} to spare ({100 * made.margin / card.nbytes:.0f} %)"


def setups_table(found: list[Fitting]) -> Table:
    table = Table(title="the smallest set-ups that work", title_justify="left")
    for name, justify in (("cards", "right"), ("card", "left"), ("weights", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("GB a GPU", "to spare"):
        table.add_column(name, justify="right")
    table.add_column("how")
    for f in found:
        table.add_row(
            str(f.setup.gpus),
            f.card.name,
            formats_of(f.setup.quant),
            f"{f.estimate.total / 1e9:,.1f}",
            f"{f.margin / 1e9:,.1f}",
            how(f.setup),
        )
    return table


def how(setup: Setup) -> str:
    """The options that give this set-up: of `generate` and `chat`, or of `finetune`."""
    task = setup.task
    if isinstance(task, Inference):
        words = [f"--n-gpus {setup.gpus}"] if setup.gpus > 1 else []
        quant = setup.quant
        words += [f"--quant {quant.experts or 'none'}"] if setup.quantized else []
        if quant != _usual(quant.experts):
            words.append(f"--quant-attention {quant.attention or 'none'} --quant-output {quant.output or 'none'}")
        words += [f"--cache-dtype {task.cache_dtype}"] if task.cache_dtype else []
        return " ".join(words) or "–"
    words = [] if setup.gpus == 1 else [f"{'--n-gpus' if setup.gpus <= A_MACHINE else 'ranks:'} {setup.gpus}"]
    words += [f"model_parallel_size={setup.tp}"] if setup.tp > 1 else []
    words += [f"context_parallel_size={setup.cp}"] if setup.cp > 1 else []
    words += [f"expert_parallel_size={setup.ep}"] if setup.ep > 1 else []
    words += [f"data_parallel={task.data_parallel}"] if setup.dp > 1 else []
    words += ["trainable_mode=mm_stage1"] if task.kind == "mm_stage1" else []
    words += ["checkpointing=true"] if task.checkpointing else []
    words += [f"{field}={value}" for field, value in task.savings.items()]
    words += [f"quant={setup.quant.experts}"] if setup.quant.experts else []
    usual = _usual(setup.quant.experts)
    for part in ("attention", "output"):
        format = getattr(setup.quant, part)
        words += [f"quant_{part}={format or 'none'}"] if format != getattr(usual, part) else []
    return " ".join(words) or "–"


def task_line(setup: Setup) -> str:
    task = setup.task
    views = f"an image of {setup.views} view{'s' * (setup.views > 1)}, {setup.image_tokens:,} positions"
    if isinstance(task, Inference):
        prompt = "any part" if task.prompt is None else f"{task.prompt:,}"
        line = f"{task.batch} sequence{'s' * (task.batch > 1)} of {task.context:,} tokens, {prompt} of them the prompt"
        return f"{line}; in each {views}" if setup.views else line
    kinds = {"full": "full", "mm_stage1": "what makes words of images alone"}
    kind = kinds.get(task.kind) or f"{'Q' * setup.quantized}LoRA of rank {setup.args.lora_rank}"
    each = f"{setup.cp} GPUs" if setup.cp > 1 else "a GPU"
    rows = f"{task.batch_size} row{'s' * (task.batch_size > 1)} of {task.max_words:,} tokens {each} at once"
    more = f", {task.accum_iter} times a step" if task.accum_iter > 1 else ""
    images = f"; up to {setup.images} images there, each {views.removeprefix('an image ')}" if setup.views else ""
    return f"finetuning, {kind}: {rows}{more}{images}"


def setup_line(setup: Setup) -> str:
    parts = [f"{setup.gpus} GPU{'s' * (setup.gpus > 1)}", setup.implementation, f"weights {formats_of(setup.quant)}"]
    if setup.tp > 1:
        parts.insert(1, f"{setup.tp} hold the model together")
    if isinstance(setup.task, Inference) and setup.task.cache_dtype:
        parts.append(f"keys and values {setup.task.cache_dtype}")
    if isinstance(setup.task, Training):
        if setup.dp > 1:
            parts.insert(1, f"{setup.dp} data-parallel ({setup.task.data_parallel})")
        if setup.cp > 1:
            parts.insert(2, f"{setup.cp} of them share each row")
        if setup.ep > 1:
            parts.insert(2, f"{setup.ep} of them hold the experts together")
        parts.append("recomputing" if setup.task.checkpointing else "not recomputing")
        parts += [SAVINGS[field] for field in setup.task.savings]
    return ", ".join(parts)


def formats_of(quant: Quant) -> str:
    """One word where `--quant` alone gives these formats, else the format of each part."""
    if quant == _usual(quant.experts):
        return quant.experts or "bf16"
    return ", ".join(f"{part} {getattr(quant, part) or 'bf16'}" for part in PARTS)


def _usual(experts: Format | None) -> Quant:
    """The formats of all parts where `--quant` is given alone, with the experts' format."""
    return Quant.parse(experts) or Quant()


def gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB"
