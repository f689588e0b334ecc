"""`accessory generate` and `accessory chat`: a model on one rank or several, prompts in, text out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from accessory.config import SHORT_DTYPES
from accessory.data.conversation import Conversation, get_template
from accessory.errors import InputError
from accessory.model.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper
from accessory.parallel.collectives import share
from accessory.parallel.mesh import Ranks, from_environment, launch_of


def generate(options: argparse.Namespace) -> int:
    """Continue the prompts and print what was written; under a launcher, the first rank reads and prints."""
    launch = launch_of(dict(os.environ))
    prompts = _prompts(options) if launch is None or launch.rank == 0 else []
    if options.stream and len(prompts) > 1:
        raise InputError(f"--stream: got {len(prompts)} prompts, but only one can be streamed")
    with open_model(options) as (model, ranks):
        return _print_answers(options, model, share(prompts, ranks))


def _print_answers(options: argparse.Namespace, model: Any, prompts: list[str]) -> int:
    how = {
        "max_gen_len": options.max_gen_len,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "additional_stop_symbols": options.stop,
        "seed": options.seed,
    }
    if options.stream:
        _show(model.stream_generate(prompts[0], **how))
        return 0
    texts = model.generate(prompts, **how)
    for n, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
        if options.json:
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
        else:
            if len(prompts) > 1:
                last = (prompt.splitlines() or [""])[-1]
                print(f"# {n}/{len(prompts)}: {last[:70]}")
            print(text)
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    files = list(options.prompt_file)
    if not prompts and not files:
        if sys.stdin.isatty():
            raise InputError("--prompt: missing; give --prompt TEXT, --prompt-file FILE, or text on standard input")
        files = ["-"]
    for name in files:
        try:
            text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        # The newline that ends a text file is not part of the prompt: models continue worse after it.
        prompts += [line for line in text.splitlines() if line] if options.lines else [text.removesuffix("\n")]
    if not prompts:
        raise InputError("--lines: the input has no line with text")
    return prompts


def chat(options: argparse.Namespace) -> int:
    """Talk in the terminal until the input ends."""
    if launch_of(dict(os.environ)) is not None:
        raise InputError("chat: started as one of several ranks, which share no terminal; use --n-gpus N instead")
    with open_model(options) as (model, _):
        return _talk(options, model)


def _talk(options: argparse.Namespace, model: Any) -> int:
    template = get_template(options.template, model.tokenizer)
    conversation = Conversation(template, options.system)
    fixed = len(conversation.messages)
    print(f"Template {template.name}. /undo takes the last round back, /clear all; /quit or Ctrl-D ends.")
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            print()
            return 0
        if text in ("/quit", "/exit"):
            return 0
        if text in ("/undo", "/clear"):
            keep = fixed if text == "/clear" else max(fixed, len(conversation.messages) - 2)
            del conversation.messages[keep:]
            print("(forgotten)")
            continue
        if not text:
            continue
        conversation.add("user", text)
        answer = ""
        try:
            answer = _show(
                model.stream_generate(
                    conversation.prompt_ids(model.tokenizer),
                    max_gen_len=options.max_gen_len,
                    temperature=options.temperature,
                    top_p=options.top_p,
                    additional_stop_symbols=[*template.stop_strings, *options.stop],
                    seed=options.seed,
                ),
                template.reply,
            )
        except KeyboardInterrupt:  # stops this answer, not the chat; a half round would confuse the next
            print("\n(stopped; the round is forgotten)")
            conversation.messages.pop()
            continue
        conversation.add("assistant", answer)


def _show(stream: Any, tidy: Callable[[str], str] = str) -> str:
    """Print a stream as it grows; returns the whole text."""
    shown = whole = ""
    for item in stream:
        whole = tidy(item["text"])
        print(whole[len(shown) :], end="", flush=True)
        shown = whole
    print()
    return whole


@contextmanager
def open_model(options: argparse.Namespace) -> Iterator[tuple[MetaModel | MultiGpuWrapper, Ranks | None]]:
    """The model that the options name: on the ranks a launcher started, on `--n-gpus` of our own, or here."""
    loading = {
        "llama_type": options.llama_type,
        "llama_config": options.llama_config,
        "tokenizer_path": options.tokenizer_path,
        "max_seq_len": options.max_seq_len,
        "quant": options.quant or False,
        "quant_attention": options.quant_attention,
        "quant_output": options.quant_output,
        "dtype": getattr(torch, SHORT_DTYPES.get(options.dtype, options.dtype)),
        "device": _device(options.device),
        "progress": sys.stderr.isatty(),
    }
    own = {name: getattr(options, name) for name in ("gpu_ids", "master_addr", "master_port")}
    asked = options.n_gpus is not None or options.gpu_ids is not None
    if launch_of(dict(os.environ)) is not None:
        if asked:
            raise InputError("--n-gpus: this process is one of several that a launcher started; leave it out")
        ranks = from_environment()
        assert ranks is not None
        try:
            yield MetaModel.from_pretrained(options.path, mp_group=ranks.group, **loading), ranks
        finally:
            dist.destroy_process_group()
    elif asked and (options.n_gpus or len(options.gpu_ids or ())) != 1:
        with MultiGpuWrapper(options.path, gpus=options.n_gpus, **own, **loading) as wrapper:
            yield wrapper, None
    else:
        if options.gpu_ids:
            loading["device"] = _device(f"cuda:{options.gpu_ids[0]}")
        yield MetaModel.from_pretrained(options.path, **loading), None


def _device(name: str | None) -> str | None:
    """Checked here, because torch answers a device that is not there with a traceback in its own words."""
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device: got {name!r}, but it must be cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: got {name!r}, but it must be cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"--device: got {name!r}, but torch {torch.__version__} sees {count} CUDA devices here")
    return name
