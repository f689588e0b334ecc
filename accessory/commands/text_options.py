"""Options of `accessory generate` and `accessory chat` for images and sampling, and the others of `chat`.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib

from accessory.arguments import Named, check_max_gen_len, check_max_seq_len, check_stops, is_whole, option_of
from accessory.data.template_names import TEMPLATES
from accessory.errors import InputError
from accessory.model.options import NO_ADAPTER, add_image_transform, add_model_options, add_option

# The fields of `SamplingParams` that are options. `logprobs` is one of `generate` only.
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "logprobs",
)  # fmt: skip
# What /set changes in a chat.
SETTINGS = (*(name for name in SAMPLING if name != "logprobs"), "max_gen_len")
MAX_GEN_LEN = 512  # tokens of an answer, where nothing else is said


def add_image_arguments(command: argparse.ArgumentParser, several: bool) -> None:
    """Declare `--image`, once for each prompt (`several`) or once for a dialogue, and the other options for images."""
    if several:
        help_ = "what the prompt is about; of several prompts, one each in their order, or none"
        command.add_argument("--image", action="append", default=[], metavar="PATH", help=help_)
    else:
        command.add_argument("--image", metavar="PATH", help="what the dialogue is about; /image PATH changes it")
    add_image_transform(command)
    add_option(command, "with_visual", action="store_true", help="load what the model sees with; --image does too")


def add_sampling_arguments(command: argparse.ArgumentParser, several: bool) -> None:
    """Declare how an answer is written. several: there may be several prompts, each with an adapter of its own."""
    help_ = "tokens an answer may have (default: 512, at most half of --max-seq-len)"
    add_option(command, "max_gen_len", type=int, metavar="N", help=help_)
    command.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    add_option(command, "top_p", type=float, default=0.95, metavar="X", help="nucleus of sampling (default: 0.95)")
    add_option(command, "top_k", type=int, default=0, metavar="K", help="only the K likeliest tokens (default: 0, all)")
    help_ = "only tokens at least X times as likely as the likeliest (default: 0)"
    add_option(command, "min_p", type=float, default=0.0, metavar="X", help=help_)
    help_ = "more than 1 makes tokens of prompt and answer less likely (default: 1)"
    add_option(command, "repetition_penalty", type=float, default=1.0, metavar="X", help=help_)
    help_ = "subtracted from the logits of tokens that the answer has (default: 0)"
    add_option(command, "presence_penalty", type=float, default=0.0, metavar="X", help=help_)
    help_ = "the same, each time that the answer has the token (default: 0)"
    add_option(command, "frequency_penalty", type=float, default=0.0, metavar="X", help=help_)
    command.add_argument("--seed", type=int, metavar="N", help="makes sampling repeat")
    help_ = "the name of one given by --adapter"
    if several:
        help_ += ", for all prompts, or one each in their order; none for none"
        add_option(command, "use_adapter", action="append", metavar="NAME", help=help_)
    else:
        add_option(command, "use_adapter", metavar="NAME", help=help_)
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")


def add_chat_arguments(command: argparse.ArgumentParser) -> None:
    add_model_options(command, or_url=True)
    about = "default: the tokenizer's own, else the original's dialogue"
    command.add_argument("--template", choices=TEMPLATES, help=about)
    add_image_arguments(command, several=False)
    # The options so far are for a model that is loaded here: beside --url they are refused.
    shared = ("help", "debug", "pretrained_path")
    command.set_defaults(of_loading={a.dest: a.default for a in command._actions if a.dest not in shared})
    about = "talk to the model of a server of OpenAI's API instead: http://host:port"
    command.add_argument("--url", metavar="URL", help=about)
    command.add_argument("--model", metavar="NAME", help="with --url: which model or adapter (default: the only model)")
    help_ = "with --url: it holds the server's key; or the variable ACCESSORY_API_KEY"
    add_option(command, "api_key_file", metavar="FILE", help=help_)
    command.add_argument("--system", metavar="TEXT", help="a system message")
    add_sampling_arguments(command, several=False)


def named_adapters(options: argparse.Namespace) -> list[str | None]:
    """The adapters that --use-adapter names: one for all prompts, or one each."""
    names = [options.use_adapter] if isinstance(options.use_adapter, str) else options.use_adapter or [NO_ADAPTER]
    return [None if name == NO_ADAPTER else name for name in names]


def _check_adapters(options: argparse.Namespace) -> None:
    given = [name for name, _ in options.adapter or ()]
    if NO_ADAPTER in given:
        raise InputError(f"--adapter: got the name {NO_ADAPTER}, which stands for no adapter; give another one")
    used = [options.use_adapter] if isinstance(options.use_adapter, str) else options.use_adapter or []
    for name in used:
        if name not in (*given, NO_ADAPTER):
            known = f"it must be {' or '.join((*given, NO_ADAPTER))}" if given else "there is no --adapter NAME=PATH"
            raise InputError(f"--use-adapter: got {name!r}, but {known}")


def _check_url(options: argparse.Namespace) -> None:
    """InputError where a model is named twice or not at all, and for options that the other kind of chat has."""
    if options.url is None:
        for name in ("model", "api_key_file"):
            if getattr(options, name) is not None:
                raise InputError(f"{option_of(name)}: it is for a server's model; give --url too")
        if not options.pretrained_path:
            raise InputError("chat: there is no model; give a PATH, or --url http://host:port of a server")
        return
    if options.pretrained_path:
        raise InputError(f"--url: the PATH {options.pretrained_path[0]} is given too; give one of them")
    for name, default in options.of_loading.items():
        if getattr(options, name) != default:
            raise InputError(f"{option_of(name)}: it is for a model that is loaded here; leave it out, or --url")
    if options.use_adapter is not None:
        raise InputError(f"--use-adapter: a server has adapters as models; give --model {options.use_adapter}")


def check_text_options(options: argparse.Namespace) -> None:
    """Fill in what was left out. InputError for a value that the model would refuse, before anything is loaded."""
    if "url" in options:
        _check_url(options)
    check_max_seq_len(options.max_seq_len, option_of)
    _check_settings(options, option_of)
    check_stops(options.stop, option_of)
    _check_adapters(options)
    if getattr(options, "timing", False) and not (options.json or options.out):
        raise InputError("--timing: it comes in the lines of --json; give --json too, or --lines with --out")
    if options.sampling.logprobs is not None and not (options.json or options.out):
        raise InputError("--logprobs: they come in the lines of --json; give --json too, or --lines with --out")


def change_setting(options: argparse.Namespace, name: str, text: str) -> None:
    """Set one of `SETTINGS` as its option does. InputError for a value that is refused; nothing changes then."""
    command = argparse.ArgumentParser(add_help=False)
    add_sampling_arguments(command, several=False)
    action = next(action for action in command._actions if action.dest == name)
    value: object = text  # where it is no number, the check says what it must be
    if text == "none" and action.default is None:
        value = None
    elif callable(action.type):
        with contextlib.suppress(ValueError):
            value = action.type(text)
    changed = argparse.Namespace(**{**vars(options), name: value})
    _check_settings(changed, lambda name: name.replace("_", "-"))
    vars(options).update(vars(changed))


def _check_settings(options: argparse.Namespace, named: Named) -> None:
    """Fill in how long an answer may be, and how its tokens are drawn. InputError for a value that is refused."""
    from accessory.engine.sampling_params import SamplingParams  # here, because `--help` reads this file

    if getattr(options, "url", None) is not None:  # the server knows how long its context is
        if options.max_gen_len is not None and not (is_whole(options.max_gen_len) and options.max_gen_len >= 1):
            raise InputError(
                f"{named('max_gen_len')}: got {options.max_gen_len!r:.60}, but it must be a whole number of at least 1"
            )
    else:
        if options.max_gen_len is None:
            options.max_gen_len = min(MAX_GEN_LEN, options.max_seq_len // 2)
        check_max_gen_len(options.max_gen_len, options.max_seq_len, named)
    given = {name: getattr(options, name) for name in SAMPLING if hasattr(options, name)}
    try:
        options.sampling = SamplingParams(**given)
    except InputError as error:
        name, said = str(error).split(":", 1)
        raise InputError(f"{named(name)}:{said}") from error
