"""How soon a started process answers: Mixtral-8x7B's real size with random weights, sparse, on one card.

    python benchmarks/gpu_start.py [--formats none int8 int4] [--layers 16] [--prompt 128]

Each format starts twice, in a process of its own: with an empty cache of Triton, so that every kernel is compiled, and
again with the cache that it left. Prints Markdown: seconds of the imports, of making the weights on the card, and from
then on to the second token, which is when both the prompt's and the steps' kernels have run and been captured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from accessory.config import PRESETS
from accessory.formats import Quant
from accessory.progress import progress_bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--size", default="8x7b", choices=PRESETS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        start(options)
        return
    print(f"{options.layers} layers, a prompt of {options.prompt} tokens; the card is the last column")
    print("\n| format | kernels compiled before | imports, s | weights, s | then to the second token, s | |")
    print("|---|---|---|---|---|---|")
    with progress_bar(2 * len(options.formats), "starts", unit=" starts") as bar:
        for format in options.formats:
            with tempfile.TemporaryDirectory() as cache:
                for compiled in ("no", "yes"):
                    *seconds, card = started(options, format, cache)
                    row = f"| {format} | {compiled} | {' | '.join(f'{s:.2f}' for s in seconds)} | {card} |"
                    print(row, flush=True)
                    bar.update()


def started(options: argparse.Namespace, format: str, cache: str) -> tuple[float, float, float, str]:
    """Seconds of the imports, the weights and the answer's beginning; the card's name."""
    how = ["--one", format, "--layers", str(options.layers), "--prompt", str(options.prompt), "--size", options.size]
    command = [sys.executable, __file__, *how]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "ACCESSORY_BEGAN": str(time.time())}
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    imports, weights, ready, card = json.loads(said.splitlines()[-1])
    return float(imports), float(weights), float(ready), card


def start(options: argparse.Namespace) -> None:
    import torch

    from accessory.bench.engines import decode, engine_over, room_for
    from accessory.bench.job import noise
    from accessory.build.network import NetworkSpec, build
    from accessory.parallel.mesh import DeviceMesh

    imported = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = PRESETS[options.size].replace(n_layers=options.layers, vocab_size=32000)
    quant = Quant.parse(options.one)
    spec = NetworkSpec(checkpoints=[noise(args)], args=args, implementation="sparse", quant=quant)
    decoder = build(spec, DeviceMesh(model=None, all=None), device=device, dtype=torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.synchronize()
    made = time.time()
    engine = engine_over(decoder, room_for(1, options.prompt + 16))
    ready = time.time() - made + decode(engine, args.vocab_size, 1, options.prompt, 16, rounds=1).ready
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(json.dumps([imported - float(os.environ["ACCESSORY_BEGAN"]), made - imported, ready, card]))


if __name__ == "__main__":
    main()
