"""Load a checkpoint, write an answer at once, then write it again token by token.

python examples/simple_inference.py path/to/converted

One process holds the whole model. The folder may be base, sparse or any other layout, or hf://owner/name[/folder].
"""

from __future__ import annotations

import argparse

import torch

from accessory.model.meta import MetaModel


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a checkpoint, generate, stream.")
    parser.add_argument("pretrained_path", help="a checkpoint folder, or hf://owner/name[/folder]")
    parser.add_argument("--prompt", default="The best programming language in the world is")
    parser.add_argument("--max_gen_len", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options = parser.parse_args()

    # To CUDA where there is one. llama_type="mixtral" or "mixtral_sparse" would choose the implementation;
    # without it the folder's meta.json does.
    model = MetaModel.from_pretrained(
        options.pretrained_path, max_seq_len=2048, dtype=getattr(torch, options.dtype), progress=True
    )

    response = model.generate([options.prompt], images=None, max_gen_len=options.max_gen_len)[0]
    print(options.prompt + response)

    print("\nAgain, token by token:\n" + options.prompt, end="")
    shown = ""
    for response_in_progress in model.stream_generate(options.prompt, image=None, max_gen_len=options.max_gen_len):
        text = response_in_progress["text"]  # all so far
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()


if __name__ == "__main__":
    main()
