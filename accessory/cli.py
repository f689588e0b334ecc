"""The command `accessory`. Only the standard library is imported here, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accessory import __version__
from accessory.command_line import Parser
from accessory.commands.bench_options import SERVE, add_bench_arguments, add_tune_arguments, check_bench_options
from accessory.commands.checkpoint_options import (
    add_adapter_arguments,
    add_convert_arguments,
    add_info_arguments,
    add_merge_arguments,
    add_quantize_arguments,
    add_upcycle_arguments,
    add_verify_arguments,
)
from accessory.commands.data_options import add_data_check_arguments
from accessory.commands.demo_options import add_demo_arguments, check_demo_options
from accessory.commands.finetune_options import add_finetune_arguments, is_init
from accessory.commands.plan_options import add_plan_arguments
from accessory.commands.serve_options import add_serve_arguments, check_serve_options
from accessory.commands.text_options import (
    add_chat_arguments,
    add_image_arguments,
    add_sampling_arguments,
    check_text_options,
)
from accessory.data.template_names import TEMPLATES
from accessory.model.options import add_json_option, add_model_options, torch_dtype

EPILOG = "A PATH is a folder in any published layout, or hf://owner/name[/folder]. docs/ has a tutorial."
# The arguments that name checkpoints to read. `accessory plan` has its own: its PATH may be a preset's name.
READ = ("pretrained_path", "a", "b", "src", "paths", "base")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0 done, 1 failed, 2 misused, 130 interrupted."""
    from accessory.commands.outcome import outcome

    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest:  # key=value after an option: a positional argument that argparse does not recognise there
        options.overrides += rest
    return outcome(lambda: _run(options), debug=options.debug)


def _run(options: argparse.Namespace) -> int:
    _check_paths(options)
    return options.run(options)


def _check_paths(options: argparse.Namespace) -> None:
    """CheckpointError where a checkpoint that a command reads is not there, before torch is imported for it."""
    from accessory.checkpoint.hub import check_there

    if getattr(options, "image", None):  # images are looked at before the model, and that takes torch
        return
    for _, path in getattr(options, "adapter", None) or []:
        check_there(path)
    for name in READ:
        given = getattr(options, name, None) or []
        for path in [given] if isinstance(given, str) else given:
            check_there(path)


# --------------------------------------------------------------------------- commands


def _generate(options: argparse.Namespace) -> int:
    check_text_options(options)
    from accessory.commands.generate import generate

    return generate(options)


def _chat(options: argparse.Namespace) -> int:
    check_text_options(options)
    if options.url is not None:
        from accessory.commands.remote_chat import chat as remote_chat

        return remote_chat(options)
    from accessory.commands.chat import chat

    return chat(options)


def _serve(options: argparse.Namespace) -> int:
    check_serve_options(options)
    from accessory.commands.serve import serve

    return serve(options)


def _bench(options: argparse.Namespace) -> int:
    check_bench_options(options)
    if options.what == SERVE:
        from accessory.commands.bench_serve import bench_serve

        return bench_serve(options)
    from accessory.commands.bench import bench

    return bench(options)


def _tune(options: argparse.Namespace) -> int:
    from accessory.commands.tune import tune

    return tune(options)


def _convert(options: argparse.Namespace) -> int:
    from accessory.convert.convert import convert

    convert(
        options.src,
        options.dst,
        to=options.to,
        type=options.type,
        shards=options.shards,
        dtype=torch_dtype(options.dtype),
        safetensors=options.safetensors,
        overwrite=options.overwrite,
        verify=options.verify,
        config_files=options.config,
    )
    _wrote(options)
    return 0


def _wrote(options: argparse.Namespace) -> None:
    print(f"{options.dst}: written" + (", read again and equal" if options.verify else ""))


def _upcycle(options: argparse.Namespace) -> int:
    from accessory.convert.upcycle import upcycle

    upcycle(
        options.src,
        options.dst,
        experts=options.experts,
        top_k=options.top_k,
        noise=options.noise,
        seed=options.seed or 0,
        to=options.to,
        shards=options.shards,
        dtype=torch_dtype(options.dtype),
        safetensors=options.safetensors,
        overwrite=options.overwrite,
        verify=options.verify,
    )
    _wrote(options)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from accessory.convert.verify import verify

    report = verify(_resolved(options.a), None if options.b is None else _resolved(options.b))
    _print_report(report, as_json=options.json)
    return 0 if report.ok else 1


def _info(options: argparse.Namespace) -> int:
    from accessory.convert.info import info

    _print_report(info(_resolved(options.path)), as_json=options.json)
    return 0


def _print_report(report: Any, *, as_json: bool) -> None:
    from accessory.commands.json_output import print_json

    if as_json:
        print_json(report.to_dict())
    else:
        print("\n".join(report.lines()))


def _quantize(options: argparse.Namespace) -> int:
    from accessory.commands.quantize import quantize

    return quantize(options)


def _plan(options: argparse.Namespace) -> int:
    from accessory.commands.plan import plan

    return plan(options)


def _merge(options: argparse.Namespace) -> int:
    from accessory.commands.adapters import merge

    return merge(options)


def _adapter(options: argparse.Namespace) -> int:
    from accessory.commands.adapters import adapter

    return adapter(options)


def _finetune(options: argparse.Namespace) -> int:
    if is_init(options):
        from accessory.commands.finetune_init import init

        return init(options)
    from accessory.commands.finetune import finetune

    return finetune(options)


def _data_check(options: argparse.Namespace) -> int:
    from accessory.commands.data import check

    return check(options)


def _report(options: argparse.Namespace) -> int:
    from accessory.train.report.write import write_report

    print(write_report(options.dir, options.title))
    return 0


def _demo(options: argparse.Namespace) -> int:
    check_demo_options(options)
    if options.serve:
        from accessory.demos.serve import serve_demo

        return serve_demo(Path(options.dir), options.question, options.max_gen_len)
    if options.finetune:
        # Set before torch reads it. Otherwise waiting threads spin, and on a busy machine they take most of the CPU.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from accessory.demos.finetune import finetune_demo

        return finetune_demo(Path(options.dir), options.question, options.max_gen_len)
    from accessory.demos.first_run import first_run

    return first_run(Path(options.dir), options.question, options.max_gen_len)


def _completion(options: argparse.Namespace) -> int:
    from accessory.commands.completion import script

    print(script(_parser(), options.shell))
    return 0


def _resolved(path: str) -> Path:
    from accessory.checkpoint.hub import resolve

    return resolve(path)


# --------------------------------------------------------------------------- arguments


def _parser() -> Parser:
    parser = Parser(
        prog="accessory", description="Run, finetune and convert Mixtral-8x7B and its relatives.", epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"accessory {__version__}")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    generate = _command(commands, "generate", _generate, "continue one prompt or several")
    add_model_options(generate)
    generate.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    generate.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="a prompt; - is stdin")
    generate.add_argument(
        "--template", choices=TEMPLATES, help="prompts are a user's messages (default: they are text)"
    )
    generate.add_argument("--system", metavar="TEXT", help="a system message before each, with --template")
    generate.add_argument("--lines", action="store_true", help="every line of --prompt-file or stdin is a prompt")
    about = "with --lines: a line of JSON a prompt, as it ends; run again, it goes on where it stopped"
    generate.add_argument("--out", metavar="FILE", help=about)
    add_image_arguments(generate, several=True)
    add_sampling_arguments(generate, several=True)
    generate.add_argument("--stream", action="store_true", help="show the text while it is written")
    add_json_option(generate, "one JSON object a prompt; with --stream, before it one a piece")
    about = "with --json: log-probabilities of the answer's tokens, and of the N likeliest ones"
    generate.add_argument("--logprobs", type=int, metavar="N", help=about)
    about = "with --json: the seconds that each answer took, and its tokens a second"
    generate.add_argument("--timing", action="store_true", help=about)

    chat = _command(commands, "chat", _chat, "talk to a model in the terminal")
    add_chat_arguments(chat)

    serve = _command(commands, "serve", _serve, "answer over HTTP, as OpenAI's API does")
    add_serve_arguments(serve)

    bench = _command(
        commands, "bench", _bench, "measure a card, against its own limits and other programs, or a server"
    )
    add_bench_arguments(bench)

    tune = _command(commands, "tune", _tune, "measure which tiles the kernels should take on this card")
    add_tune_arguments(tune)

    convert = _command(commands, "convert", _convert, "write a checkpoint in another layout")
    add_convert_arguments(convert)

    verify = _command(commands, "verify", _verify, "check every tensor; with two paths, prove them equal")
    add_verify_arguments(verify)

    info = _command(commands, "info", _info, "what a checkpoint is")
    add_info_arguments(info)

    quantize = _command(commands, "quantize", _quantize, "save a checkpoint quantised; it loads without --quant")
    add_quantize_arguments(quantize)

    plan = _command(commands, "plan", _plan, "what fits which GPUs, before anything is downloaded or loaded")
    add_plan_arguments(plan)

    upcycle = _command(commands, "upcycle", _upcycle, "grow a mixture from a dense Llama or Mistral (arXiv 2212.05055)")
    add_upcycle_arguments(upcycle)

    merge = _command(commands, "merge", _merge, "work adapters into the weights, and prove that nothing else happened")
    add_merge_arguments(merge)

    adapter = _command(commands, "adapter", _adapter, "exchange adapters with Hugging Face's PEFT")
    add_adapter_arguments(adapter)

    finetune = _command(commands, "finetune", _finetune, "train a model, or adapters for one, as a recipe says")
    add_finetune_arguments(finetune)

    data = commands.add_parser("data", help="look at finetuning data before a GPU is used", epilog=EPILOG)
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True, help="check")
    check = _command(actions, "check", _data_check, "validate every item, and show what a run would learn from them")
    add_data_check_arguments(check)

    report = _command(commands, "report", _report, "make report.html of a finetuning run, finished, running or dead")
    report.add_argument("dir", metavar="DIR", help="its output folder, which holds metrics.jsonl")
    report.add_argument("--title", metavar="TEXT", help="default: the folder's name")

    demo = _command(commands, "demo", _demo, "a real language model of this architecture, made and run here")
    add_demo_arguments(demo)

    completion = _command(commands, "completion", _completion, "print a script that completes commands for a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="docs/install.md says where to put it")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], help_: str) -> Parser:
    command = commands.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".", epilog=EPILOG)
    command.add_argument("--debug", action="store_true", help="show tracebacks and what is going on")
    command.set_defaults(run=run)
    return command


if __name__ == "__main__":
    sys.exit(main())
