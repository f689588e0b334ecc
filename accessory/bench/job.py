"""What a run of `accessory bench` measures: the network, how it is held, and where its figures go."""

from __future__ import annotations

import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from accessory.bench.card import Card
from accessory.bench.figures import OURS, Figure
from accessory.bench.kernels import Kernel
from accessory.build.network import NetworkSpec, TrainingSpec, build
from accessory.checkpoint.folder import Checkpoint
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.names import expected_shapes
from accessory.config import SHORT_DTYPES, Implementation, LlamaType, ModelArgs
from accessory.formats import Quant
from accessory.nn.decoder import Decoder
from accessory.parallel.fsdp import DataParallel
from accessory.parallel.mesh import DeviceMesh, Ranks
from accessory.planner.setup import OptimizerKind

STORED = "stored"  # in place of a format: the weights as the checkpoint has them


@dataclass(kw_only=True)
class Job:
    """What is asked, and the figures so far. On several ranks each has one, and only the first one's is read.

    checkpoint: None for random weights. tokens, batches, …: see the options of the command.
    """

    args: ModelArgs
    card: Card
    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint | None = None
    ranks: Ranks | None = None
    implementations: Sequence[Implementation] = ("sparse",)
    formats: Sequence[str] = ("none",)
    batches: Sequence[int] = (1,)
    tokens: Sequence[int] = (48,)
    context: int = 128
    prompt: int = 2048
    requests: int = 0
    kernels: bool = False
    deterministic: bool = False  # measure that way of running too
    parts: Sequence[str] = ("lora",)
    recompute: bool = False
    graphs: bool = True  # replay a training step's passes as CUDA graphs, where that is possible
    backward: bool = False  # of a layer
    data_parallel: DataParallel = "sdp"
    gradient_dtype: torch.dtype = torch.float32  # of trained weights
    optimizer: OptimizerKind = "adamw"
    model_parallel_size: int = 1  # while training; else all ranks hold the model together
    peers: Sequence[str] = ()
    gpt_fast: Path | None = None
    show: Callable[[Figure], None] = lambda figure: None  # a new figure
    begin: Callable[[str], None] = lambda name: None  # what is measured next
    figures: list[Figure] = field(default_factory=list)
    tables: dict[str, list[Kernel]] = field(default_factory=dict)  # of kernels, by title

    @property
    def first(self) -> bool:
        return self.ranks is None or self.ranks.rank == 0

    @property
    def size(self) -> int:
        return 1 if self.ranks is None else self.ranks.size

    def who(self, implementation: Implementation, format: str) -> str:
        """What a table calls a network of ours."""
        dense = next(short for short, name in SHORT_DTYPES.items() if f"torch.{name}" == str(self.dtype))
        return f"{OURS} {implementation} {dense if format == 'none' else format}"

    def ways(self, who: str) -> list[tuple[str, bool]]:
        """The ways in which a network's engine runs: what a table calls the network then, and whether it is
        deterministic."""
        return [(who, False), (f"{who}, deterministic", True)][: 1 + self.deterministic]

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        self.show(figure)

    def spec(self, format: str, implementation: Implementation, args: ModelArgs | None = None) -> NetworkSpec:
        """The network with weights of a format. args: other sizes than the job's, with random weights."""
        checkpoint = self.checkpoint if args is None and self.checkpoint is not None else noise(args or self.args)
        quant = checkpoint.quant if format == STORED else Quant.parse(format)
        return NetworkSpec(checkpoints=[checkpoint], args=checkpoint.args, implementation=implementation, quant=quant)

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The ranks while training."""
        return DeviceMesh.of(self.ranks, self.model_parallel_size, self.device.type)

    def build(self, spec: NetworkSpec, training: TrainingSpec | None = None) -> Decoder:
        mesh = DeviceMesh(model=self.ranks, all=self.ranks) if training is None else self.mesh
        return build(spec, mesh, device=self.device, dtype=self.dtype, training=training)


class Noise(Lazy):
    """Random numbers, drawn in the tensor that they are copied to. Norms are ones.

    All ranks draw the same numbers for the same tensor, because routers must agree.
    """

    def __init__(self, shape: Sequence[int], seed: int, norm: bool = False) -> None:
        self.shape, self.dtype, self.seed, self.norm = tuple(shape), torch.bfloat16, seed, norm

    def load(self) -> torch.Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        self._copy_to(out)
        return out

    def _narrow(self, dim: int, start: int, length: int) -> Lazy:
        return Noise((*self.shape[:dim], length, *self.shape[dim + 1 :]), self.seed + start, self.norm)

    def _copy_to(self, dst: torch.Tensor) -> None:
        if self.norm:
            dst.fill_(1.0)
        else:
            dst.normal_(0, 0.02, generator=torch.Generator(dst.device).manual_seed(self.seed))


def noise(args: ModelArgs) -> Checkpoint:
    """A checkpoint of random weights, without files."""
    tensors: dict[str, Lazy] = {
        name: Noise(shape, binascii.crc32(name.encode()), name.endswith("norm.weight"))
        for name, shape in expected_shapes(args).items()
    }
    return Checkpoint(
        path=Path("noise"), layout="hf", args=args, llama_type=LlamaType("sparse"), tensors=tensors, files=[]
    )
