"""Times decoding and start-up on a CPU: both implementations and transformers.

    python benchmarks/cpu_decode.py demo-model --quant int8 nf4

All have the same weights, dtype and threads, in one run. `--quant` adds formats of quantised weights, in base.
`demo-model` is the folder that `make demo` leaves (base and sparse). A Hugging Face copy for transformers is written
next to them. Their rounds are interleaved, so that other work on the machine slows all of them. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "The capital of France is"

# For the time from process start to first token: each script loads the folder and generates one token from fixed ids.
START_OURS = """
import sys, torch
from accessory.model.meta import MetaModel
model = MetaModel.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]), device="cpu", max_seq_len=512)
model.generate([[504, 3575, 282, 4649, 314]], max_gen_len=1)
"""
START_TRANSFORMERS = """
import sys, torch
from transformers import AutoTokenizer, MixtralForCausalLM
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = MixtralForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
ids = torch.tensor([[504, 3575, 282, 4649, 314]])
how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
tokenizer.decode(model.generate(ids, **how)[0])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--quant", nargs="+", default=[], help="formats that base is quantised to as well")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-start", action="store_true", help="leave the start-up times out")
    options = parser.parse_args()
    if not (options.folder / "hf").exists():
        from accessory.convert.convert import convert

        convert(options.folder / "base", options.folder / "hf", to="hf", progress=False)

    import torch
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads\n")
    print("| dtype | who | ms/token | tokens/s | times transformers' speed | start to first token, s |")
    print("|---|---|---|---|---|---|")
    for dtype in options.dtype:
        decode = decode_times(options.folder, dtype, options.quant, options.tokens, options.rounds)
        start = {} if options.no_start else start_times(options.folder, dtype, options.rounds)
        for who, times in decode.items():
            ms = statistics.median(times)
            begin = f"{statistics.median(start[who]):.2f}" if who in start else "–"
            ratio = statistics.median([t / o for t, o in zip(decode["transformers"], times, strict=True)])
            print(f"| {dtype} | {who} | {ms:.1f} | {1000 / ms:.1f} | {ratio:.2f} | {begin} |")


def decode_times(folder: Path, name: str, formats: list[str], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a token, without the first token: one figure a round, for transformers, base, sparse and formats."""
    import torch
    from transformers import MixtralForCausalLM

    from accessory.engine.sampling_params import SamplingParams
    from accessory.model.meta import MetaModel

    dtype = getattr(torch, name)
    theirs = MixtralForCausalLM.from_pretrained(folder / "hf", dtype=dtype).eval()
    theirs.generation_config.eos_token_id = None  # nobody stops early
    ours = {kind: MetaModel.from_pretrained(folder / kind, dtype=dtype, device="cpu") for kind in ("base", "sparse")}
    for quant in formats:
        ours[quant] = MetaModel.from_pretrained(folder / "base", dtype=dtype, device="cpu", quant=quant)
    ids = ours["base"].tokenizer.encode(PROMPT, bos=False)
    texts: dict[str, list[int]] = {}

    def run_theirs() -> float:
        def generate(n: int) -> float:
            started = time.perf_counter()
            options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
            prompt = torch.tensor([ids])
            out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            texts["transformers"] = out[0, len(ids) :].tolist()
            return time.perf_counter() - started

        first = generate(1)
        return (generate(tokens) - first) / (tokens - 1)

    def run_ours(kind: str) -> float:
        stamps: list[float] = []
        params = SamplingParams(ignore_eos=True)
        (answer,) = ours[kind].complete(
            [ids], max_gen_len=tokens, params=params, on_step=lambda _: stamps.append(time.perf_counter())
        )
        texts[kind] = answer.token_ids
        return (stamps[-1] - stamps[0]) / (tokens - 1)

    times: dict[str, list[float]] = {who: [] for who in ("transformers", *ours)}
    for n in range(rounds + 1):
        row = {"transformers": run_theirs(), **{kind: run_ours(kind) for kind in ours}}
        if n:  # the first round warms up
            for who, seconds in row.items():
                times[who].append(seconds * 1e3)
    if name == "float32" and len({tuple(texts[who]) for who in ("transformers", "base", "sparse")}) > 1:
        sys.exit(f"the texts differ: {texts}")
    return times


def start_times(folder: Path, dtype: str, rounds: int) -> dict[str, list[float]]:
    """Seconds from process start to first token: one figure a round, of at most 5 rounds after one that warms up."""
    scripts = {
        "transformers": (START_TRANSFORMERS, "hf"),
        "base": (START_OURS, "base"),
        "sparse": (START_OURS, "sparse"),
    }
    times: dict[str, list[float]] = {who: [] for who in scripts}
    for n in range(min(rounds, 5) + 1):
        for who, (script, layout) in scripts.items():
            started = time.perf_counter()
            command = [sys.executable, "-c", script, str(folder / layout), dtype]
            subprocess.run(command, check=True, capture_output=True)
            if n:
                times[who].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
