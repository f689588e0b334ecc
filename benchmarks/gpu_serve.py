"""What HTTP costs: a server over Mixtral-8x7B's real size with random weights, beside its engine alone, on one card.

    python benchmarks/gpu_serve.py [--quant int8] [--layers 32] [--clients 1 16 64] [--prompt 128] [--tokens 128]

The engine gets as many requests at once as there are clients, again when all are answered, in this process. The
server is that of `accessory serve`, and `accessory bench --what serve` asks it, in a process of its own. Then one
request a second comes, at random moments. On a GPU the model is warmed up before anything is timed, as the server does.
Prints Markdown, a row when it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from accessory.bench.card import measure_card
from accessory.bench.engines import random_request, serve_all
from accessory.bench.job import noise
from accessory.build.network import NetworkSpec, build
from accessory.config import PRESETS
from accessory.data.template_base import Template
from accessory.data.templates import get_template
from accessory.data.tokenizer import Tokenizer
from accessory.formats import Quant
from accessory.model.meta import MetaModel
from accessory.parallel.mesh import DeviceMesh
from accessory.server.answers import EngineThread
from accessory.server.app import make_app
from accessory.server.metrics import Metrics
from accessory.server.running import listen, run
from accessory.server.service import Limits, Service

TOKENIZER = Path(__file__).parents[1] / "accessory" / "data" / "assets" / "mixtral_tokenizer.model"
ROUNDS = 4  # of all clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--size", default="8x7b", choices=PRESETS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = measure_card(device, torch.bfloat16)
    model = model_of(options, device)
    began = time.perf_counter()
    model.warm_up(progress=True)
    what = f"{options.quant}, prompts of {options.prompt}, answers of {options.tokens} tokens"
    tell(f"{card}; {model.args.n_layers} layers, {what}; warmed up in {time.perf_counter() - began:.1f} s")
    alone: dict[int, float] = {}
    for clients in options.clients:
        alone[clients] = engine_alone(model, options, clients)
        print(f"the engine alone, {clients} at once: {alone[clients]:,.0f} tokens/s", file=sys.stderr, flush=True)
    tell("\n| clients | engine, tokens/s | over HTTP, tokens/s | ratio | first token p50, ms | p99, ms |")
    tell("|---|---|---|---|---|---|")

    def ask() -> None:
        try:
            for clients, engine in alone.items():
                found = asked(address, options, "--clients", clients, "--requests", ROUNDS * clients)
                over = found["output_tokens_per_second"]
                tell(f"| {clients} | {engine:,.0f} | {over:,.0f} | {over / engine:.3f} | {first_tokens(found)} |")
            found = asked(address, options, "--rate", 1, "--requests", 20)
            tell(f"| one a second | – | {found['output_tokens_per_second']:,.0f} | – | {first_tokens(found)} |")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with listen("127.0.0.1", 0) as listening:
        address = "http://127.0.0.1:{1}".format(*listening.getsockname())
        thread = EngineThread(model, Metrics())
        template: Template = get_template("none", model.tokenizer)
        service = Service(model, thread, name="model", template=template, limits=Limits())
        asking = threading.Thread(target=ask)
        run(make_app(service, most_bytes=2**20), listening, patience=5.0, ready=asking.start)
        asking.join()
        thread.close()


def tell(line: str) -> None:
    """Print a line at once: a file, or a pipe, would get it at the end."""
    print(line, flush=True)


def model_of(options: argparse.Namespace, device: torch.device) -> MetaModel:
    args = PRESETS[options.size]
    args = args.replace(n_layers=options.layers or args.n_layers, vocab_size=32000)
    checkpoint = noise(args)
    spec = NetworkSpec(checkpoints=[checkpoint], args=args, implementation="sparse", quant=Quant.parse(options.quant))
    decoder = build(spec, DeviceMesh(model=None, all=None), device=device, dtype=torch.bfloat16)
    room = 2 * max(options.clients) * (options.prompt + options.tokens) * bytes_a_token(args) / 1e9
    return MetaModel(decoder, Tokenizer(TOKENIZER), 2048, cache_gb=room + 0.1)


def bytes_a_token(args: Any) -> int:
    return 2 * 2 * args.n_layers * args.n_kv_heads * args.head_dim


def engine_alone(model: MetaModel, options: argparse.Namespace, clients: int) -> float:
    """Tokens a second; the first round warms up."""
    r, seconds = random.Random(clients), []
    for _ in range(ROUNDS + 1):
        requests = [random_request(r, model.args.vocab_size, options.prompt, options.tokens) for _ in range(clients)]
        seconds.append(serve_all(model.engine(), requests)[0])
    return clients * options.tokens / statistics.median(seconds[1:])


def asked(address: str, options: argparse.Namespace, *load: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        how = ["--prompt-tokens", options.prompt, "--max-tokens", options.tokens, "--out", out, *load]
        command = [sys.executable, "-m", "accessory", "bench", address, "--what", "serve", *map(str, how)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        figures: dict[str, Any] = json.loads(out.read_text())["figures"]
    return figures


def first_tokens(found: dict[str, Any]) -> str:
    return " | ".join(f"{found['time_to_first_token'][name] * 1e3:.1f}" for name in ("p50", "p99"))


if __name__ == "__main__":
    main()
