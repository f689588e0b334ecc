"""Compares conversion with copying: the same bytes, the same disk, one run.

    python benchmarks/convert.py --dir /somewhere/roomy [--layers 3]

Makes a synthetic checkpoint of real layer sizes (2.8 GB a layer) in the torrent layout, copies it with `cp`, converts
and quantises it with and without checking what was written, verifies it, and prints a Markdown table. It needs three
times the checkpoint's size on the disk, and leaves nothing behind. The source is dropped from the page cache before
each run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from accessory.checkpoint.lazy import Computed, Lazy
from accessory.checkpoint.names import expected_shapes
from accessory.checkpoint.save import write_checkpoint
from accessory.config import MIXTRAL_8X7B, ModelArgs
from accessory.convert.convert import convert
from accessory.convert.quantize import quantize_checkpoint
from accessory.convert.verify import verify
from accessory.formats import Quant


def synthetic(args: ModelArgs) -> dict[str, Lazy]:
    """bf16 noise for every tensor: all read one bank of random numbers, from a start that depends on the name."""
    bank = torch.randn(2**24 + 3, generator=torch.Generator().manual_seed(0)).bfloat16()

    def make(name: str, shape: tuple[int, ...]) -> Lazy:
        count = torch.Size(shape).numel()

        def fill() -> torch.Tensor:
            turned = bank.roll(zlib.crc32(name.encode()) % bank.numel())
            return turned.repeat(-(-count // bank.numel()))[:count].view(shape)

        return Computed(shape, torch.bfloat16, fill)

    return {name: make(name, shape) for name, shape in expected_shapes(args).items()}


def anonymous_mb() -> float:
    """The anonymous memory of this process, in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1000


class Peak:
    """The highest anonymous memory of this process while the block runs."""

    def __enter__(self) -> Peak:
        self.mb, self._end = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.mb = max(self.mb, anonymous_mb())

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def drop_from_cache(folder: Path) -> None:
    """Write the files of a folder to the disk, and drop them from the page cache."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="where to work; a temporary folder is made in it")
    parser.add_argument("--layers", type=int, default=3, help="2.8 GB each")
    parser.add_argument("--to", nargs="+", default=["base", "sparse", "hf"])
    parser.add_argument("--quant", nargs="*", default=["int4", "int8"], metavar="FORMAT")
    options = parser.parse_args()
    args = MIXTRAL_8X7B.replace(n_layers=options.layers)
    with tempfile.TemporaryDirectory(dir=options.dir) as work:
        source, target = Path(work) / "torrent", Path(work) / "target"
        write_checkpoint(source, synthetic(args), args, to="torrent", verify=False)
        nbytes = sum(p.stat().st_size for p in source.iterdir())

        def timed(title: str, run: Callable[[], object], reference: float | None = None) -> float:
            shutil.rmtree(target, ignore_errors=True)
            drop_from_cache(source)
            with Peak() as peak:
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
            ratio = f"{reference / seconds:.2f}" if reference else "1"
            print(f"| {title} | {seconds:.1f} | {nbytes / seconds / 1e9:.2f} | {ratio} | {peak.mb:.0f} |", flush=True)
            return seconds

        def copy() -> None:
            subprocess.run(["cp", "-r", str(source), str(target)], check=True)
            drop_from_cache(target)  # cp returns before the data is on the disk; a conversion does not

        print(f"{nbytes / 1e9:.2f} GB, {os.cpu_count()} cores, torch {torch.__version__}\n")
        print("| what | s | GB/s | speed ÷ copy | peak anonymous MB |\n|---|---|---|---|---|")
        reference = timed("cp, synced", copy)
        for to in options.to:
            for check in (False, True):
                run = partial(convert, source, target, to=to, verify=check, progress=False)
                timed(f"convert --to {to}{'' if check else ' --no-verify'}", run, reference)
        for format in options.quant:
            for check in (False, True):
                quant = Quant.parse(format)
                run = partial(quantize_checkpoint, source, target, quant, verify=check, progress=False)
                timed(f"quantize --quant {format}{'' if check else ' --no-verify'}", run, reference)
        timed("verify", lambda: verify(source, progress=False), reference)
        timed("cp, synced, again", copy, reference)


if __name__ == "__main__":
    main()
