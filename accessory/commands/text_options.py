"""Options of `accessory generate` and `accessory chat`; like `cli`, this imports only the standard library."""

from __future__ import annotations

import argparse

IMAGE_TRANSFORMS = ("padded_resize", "resized_center_crop")


def add_image_arguments(command: argparse.ArgumentParser, several: bool) -> None:
    """`--image`, once for each prompt or once for a dialogue, and what belongs to it."""
    if several:
        help_ = "what the prompt is about; of several prompts, one each in their order, or none"
        command.add_argument("--image", action="append", default=[], metavar="PATH", help=help_)
    else:
        command.add_argument("--image", metavar="PATH", help="what the dialogue is about; /image PATH changes it")
    command.add_argument(
        "--image-transform",
        "--image_transform",
        choices=IMAGE_TRANSFORMS,
        default=IMAGE_TRANSFORMS[0],
        metavar="NAME",
        help="how an image becomes a square: padded_resize (the default) or resized_center_crop",
    )
    command.add_argument(
        "--with-visual", "--with_visual", action="store_true", help="load what the model sees with; --image does too"
    )


def add_sampling_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-gen-len",
        "--max_gen_len",
        type=int,
        default=512,
        metavar="N",
        help="tokens an answer may have (default: 512)",
    )
    command.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    command.add_argument(
        "--top-p", "--top_p", type=float, default=0.95, metavar="X", help="nucleus of sampling (default: 0.95)"
    )
    command.add_argument("--seed", type=int, metavar="N", help="makes sampling repeat")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
