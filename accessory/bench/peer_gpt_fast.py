"""A peer: gpt-fast's mixtral-moe, from a folder that the user has. It runs in a process of its own.

Run as a program, this file makes the network with random weights, compiles a step as gpt-fast's generate.py does, and
prints one line of JSON. gpt-fast decodes one sequence, in bf16 or int8.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from accessory.bench import decode, floors
from accessory.bench.figures import Figure
from accessory.bench.job import Job
from accessory.errors import InputError
from accessory.formats import Quant

NAME = "gpt-fast"
MODES = {"none": "bf16", "int8": "int8"}  # by our name of the format
FILES = ("model.py", "quantize.py")
LONGEST = 900  # seconds, most of which are compilation


def check_folder(path: Path) -> None:
    """InputError where this is not gpt-fast's mixtral-moe."""
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise InputError(f"--gpt-fast-path: {path} has no {missing[0]}; give the folder mixtral-moe of gpt-fast")


def measure(job: Job, what: str) -> None:
    assert job.gpt_fast is not None, "the command asks for its folder"
    for format in job.formats:
        if format not in MODES or 1 not in job.batches:
            continue
        figure = Figure(who=f"{NAME} {MODES[format]}", what=decode.what_of(1), format=format, peer=True)
        command = [sys.executable, "-m", __name__, str(job.gpt_fast), json.dumps(_asked(job, MODES[format]))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.SubprocessError, ValueError, IndexError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            job.add(replace(figure, note=said[-1][:120] if said else type(error).__name__))
            continue
        number = job.dtype.itemsize
        # gpt-fast's int8 takes the head too, and no other part differs from ours.
        quant = Quant.parse(format)
        moved = floors.decode_bytes(job.args, quant, 1, job.context + job.tokens[0] / 2, number=number)
        note = f"compiled in {found['compiled']:.0f} s"
        job.add(replace(figure, seconds=found["seconds"], tokens=1, nbytes=moved, peak_gb=found["peak"], note=note))


def _asked(job: Job, mode: str) -> dict[str, Any]:
    args = job.args
    sizes = {
        "block_size": job.context + 2 * job.tokens[0] + 64,
        "n_layer": args.n_layers,
        "n_head": args.n_heads,
        "n_local_heads": args.n_kv_heads,
        "dim": args.dim,
        "intermediate_size": args.hidden_dim,
        "vocab_size": args.vocab_size,
        "rope_base": args.rope_theta,
        "num_experts": args.moe.num_experts,
        "num_activated_experts": args.moe.num_experts_per_tok,
    }
    return {
        "sizes": sizes, "mode": mode, "device": str(job.device), "prompt": job.context, "tokens": job.tokens[0]
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("asked", type=json.loads)
    options = parser.parse_args()
    print(json.dumps(run(options.folder, **options.asked)))


def run(folder: str, *, sizes: dict[str, Any], mode: str, device: str, prompt: int, tokens: int) -> dict[str, Any]:
    """Seconds of a token, seconds of compiling, and the peak of memory."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sys.path.insert(0, folder)
    import model as theirs
    import quantize

    cuda = device.startswith("cuda")
    with torch.device("meta"):
        network = theirs.Transformer(theirs.ModelArgs(**sizes)).to(torch.bfloat16)
        if mode == "int8":
            network = quantize.WeightOnlyBit8QuantHandler(network, torch.int8).convert_for_runtime()
    network = network.to_empty(device=device).eval()

    def decode_step(token: Any, position: Any) -> Any:
        return network(token, position)[:, -1:].argmax(-1)

    step = decode_step
    if cuda:
        import torch._inductor.config as inductor

        inductor.coordinate_descent_tuning = True
        step = torch.compile(decode_step, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.dtype == torch.int8:
                tensor.random_(-127, 128)
            elif "scales" in name:
                tensor.fill_(2e-4)
            elif tensor.dim() > 1:
                tensor.normal_(0, 0.02)
            else:
                tensor.fill_(1.0)
        with torch.device(device):
            network.setup_caches(max_batch_size=1, max_seq_length=prompt + 2 * tokens + 32)
        ids = torch.randint(0, sizes["vocab_size"], (1, prompt), device=device)
        token = decode_step(ids, torch.arange(prompt, device=device))
        position = torch.tensor([prompt], device=device)

        def many(count: int) -> float:
            nonlocal token
            began = time.perf_counter()
            for _ in range(count):
                token = step(token, position).clone()
                position.add_(1)
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - began

        compiled = many(6)
        seconds = many(tokens) / tokens
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    return {"seconds": seconds, "compiled": compiled, "peak": peak}


if __name__ == "__main__":
    main()
