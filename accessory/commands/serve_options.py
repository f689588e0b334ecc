"""Options of `accessory serve`.

Only the standard library is imported here, so that `accessory --help` answers at once.
"""

from __future__ import annotations

import argparse
import math

from accessory.arguments import check_max_seq_len, check_port, option_of
from accessory.data.template_names import TEMPLATES
from accessory.errors import InputError
from accessory.model.options import add_image_transform, add_model_options, add_option, port_number

HOST, PORT = "127.0.0.1", 8000


def add_serve_arguments(command: argparse.ArgumentParser) -> None:
    add_model_options(command)
    command.add_argument("--host", default=HOST, metavar="HOST", help=f"where to listen (default: {HOST})")
    command.add_argument(
        "--port", type=port_number, default=PORT, metavar="PORT", help=f"default: {PORT}; 0: a free one"
    )
    help_ = "its first line is the key that clients must send"
    add_option(command, "api_key_file", metavar="FILE", help=help_ + "; or the variable ACCESSORY_API_KEY")
    add_option(command, "api_key", metavar="KEY", help="the key itself; other users of this machine can read it")
    add_option(command, "served_model_name", metavar="NAME", help="default: the name of the last PATH")
    about = "of dialogues (default: the tokenizer's own, else the original's)"
    command.add_argument("--template", choices=TEMPLATES, help=about)
    about = "seconds that open requests have after SIGTERM (default: 30)"
    add_option(command, "shutdown_timeout", type=float, default=30.0, metavar="S", help=about)
    add_option(command, "max_body_mb", type=int, default=32, metavar="MB", help="of a request (default: 32)")
    about = "write no line a request on standard error"
    add_option(command, "no_access_log", dest="access_log", action="store_false", help=about)
    about = "answer at once; on a GPU, the first requests then wait for kernels to be compiled"
    add_option(command, "no_warm_up", dest="warm_up", action="store_false", help=about)
    add_option(command, "page", action="store_true", help="also a page in the browser, at / of the same port")
    about = "a host from which images are fetched; may be given several times (default: none)"
    add_option(command, "image_host", action="append", default=[], metavar="HOST", help=about)
    add_image_transform(command)
    add_option(command, "with_visual", action="store_true", help="load what the model sees with")


def check_serve_options(options: argparse.Namespace) -> None:
    """InputError for a value that the server would refuse, before anything is loaded."""
    check_max_seq_len(options.max_seq_len, option_of)
    if options.port:
        check_port(options.port, "--port")
    if not 0 <= options.shutdown_timeout < math.inf:
        raise InputError(f"--shutdown-timeout: got {options.shutdown_timeout}, but it must be seconds, 0 or more")
    if options.max_body_mb < 1:
        raise InputError(f"--max-body-mb: got {options.max_body_mb}, but it must be at least 1")
    if options.api_key is not None and options.api_key_file is not None:
        raise InputError("--api-key: --api-key-file is given too; give one of them")
