"""Times loading a checkpoint of Mixtral-8x7B's layer sizes onto one card, against reading the same files.

    python benchmarks/gpu_load.py --dir DIR [--layers 8]

Writes a Hugging Face folder of random bf16 weights into DIR (8 of 32 layers: 24 GB). Then it reads the files with
several threads into a buffer, and loads the folder onto the card in both implementations: first with a dropped page
cache (this needs root), then with a warm one. Some tensors are compared with what was written. Prints Markdown and
deletes the folder.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from accessory.build.network import NetworkSpec, build
from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.lazy import Computed, Lazy
from accessory.checkpoint.save import write_checkpoint
from accessory.config import PRESETS, ModelArgs
from accessory.nn.decoder import Decoder
from accessory.parallel.local_shard import local_tensors

READ_BYTES = 64 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--preset", default="8x7b", choices=PRESETS)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    args = PRESETS[options.preset].replace(n_layers=options.layers)
    folder = options.dir / "random-hf"
    try:
        started = time.perf_counter()
        tensors = random_tensors(args, options.device)
        write_checkpoint(folder, tensors, args, to="hf", verify=False, progress=False)
        files = sorted(folder.glob("*.safetensors"))
        size = sum(f.stat().st_size for f in files)
        print(f"{size / 1e9:.1f} GB written in {time.perf_counter() - started:.0f} s, {len(files)} files", flush=True)
        measure(folder, files, size, args, options.device, tensors)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def random_tensors(args: ModelArgs, device: str) -> dict[str, Lazy]:
    """Canonical tensors that are drawn on the card when they are loaded, with the same numbers each time."""
    with torch.device("meta"):
        decoder = Decoder(args, "sparse")
    lock = threading.Lock()

    def computed(number: int, shape: tuple[int, ...]) -> Computed:
        def draw() -> torch.Tensor:
            with lock:
                generator = torch.Generator(device).manual_seed(number)
                return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(0.02).cpu()

        return Computed(shape, torch.bfloat16, draw)

    return {name: computed(n, tuple(t.shape)) for n, (name, t) in enumerate(places_of(decoder).items())}


def places_of(decoder: Decoder) -> dict[str, torch.Tensor]:
    """The network's own tensors by their canonical names."""
    return {shard.name: shard.tensor for shard in local_tensors(decoder)}


def measure(folder: Path, files: list[Path], size: int, args: ModelArgs, device: str, tensors: dict[str, Lazy]) -> None:
    cards = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"\n{cards}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| page cache | what | s | GB/s | times reading | peak anonymous memory, GB |")
    print("|---|---|---|---|---|---|")
    for cache in ("cold", "warm"):
        if cache == "cold" and not drop_caches():
            continue
        reading = read_files(files)
        print(f"| {cache} | reading the files | {reading:.2f} | {size / reading / 1e9:.1f} | 1.00 | – |", flush=True)
        for implementation in ("sparse", "base"):
            if cache == "cold":
                drop_caches()
            with AnonymousPeak() as peak:
                started = time.perf_counter()
                checkpoint = open_checkpoint(folder)
                spec = NetworkSpec(checkpoints=[checkpoint], args=args, implementation=implementation)
                decoder = build(spec, device=device, dtype=torch.bfloat16)  # type: ignore[arg-type]
                seconds = time.perf_counter() - started
            print(
                f"| {cache} | loading, {implementation} | {seconds:.2f} | {size / seconds / 1e9:.1f} "
                f"| {seconds / reading:.2f} | {peak.gigabytes:.2f} |",
                flush=True,
            )
            check(decoder, tensors)
            del decoder, checkpoint  # closes the file mappings too, whose pages could not be dropped
            if device == "cuda":
                torch.cuda.empty_cache()


def check(decoder: Decoder, tensors: dict[str, Lazy]) -> None:
    """Compare a few tensors of every kind with the numbers that were drawn."""
    places = places_of(decoder)
    last, most = decoder.args.n_layers - 1, decoder.args.moe.num_experts - 1
    for name in (
        "tok_embeddings.weight",
        "output.weight",
        "layers.0.attention.wq.weight",
        f"layers.{last}.attention.wk.weight",
        f"layers.{last}.feed_forward.gate.weight",
        "layers.0.feed_forward.experts.0.w1.weight",
        f"layers.{last}.feed_forward.experts.{most}.w2.weight",
        f"layers.{last}.feed_forward.experts.{most}.w3.weight",
    ):
        assert torch.equal(places[name].cpu().float(), tensors[name].load().float()), name


def read_files(files: list[Path]) -> float:
    """Seconds to read every byte into memory once, with as many threads as the loader uses."""
    started = time.perf_counter()
    jobs = [(f, start) for f in files for start in range(0, f.stat().st_size, READ_BYTES)]
    local = threading.local()

    def read(job: tuple[Path, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(READ_BYTES)
        with open(job[0], "rb", buffering=0) as handle:
            handle.seek(job[1])
            handle.readinto(local.buffer)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(read, jobs))
    return time.perf_counter() - started


def drop_caches() -> bool:
    """Drop the page cache. False where that is not allowed, since it needs root."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


class AnonymousPeak:
    """How far anonymous memory rises above its value at the beginning, sampled every 10 ms: `gigabytes`, at the end."""

    def __enter__(self) -> AnonymousPeak:
        self._begin = self._most = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.gigabytes = (self._most - self._begin) / 1e9

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._most = max(self._most, self._now())

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
