"""What a memory plan is asked for: a network, how it is cut over GPUs, and what it is to do.

The other modules of this folder take a `Setup` and count bytes. A GB is 10⁹ bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from accessory.config import Implementation, ModelArgs
from accessory.errors import ConfigError
from accessory.formats import CacheDtype, Quant
from accessory.parallel.sharding import attention_mode, check_ranks

# "lora" over quantised weights is QLoRA. "mm_stage1" trains only the projections of image features.
TrainingKind = Literal["full", "lora", "mm_stage1"]
# Memory that training may save; a recipe's keys.
OptimizerKind = Literal["adamw", "adamw_8bit"]
Offload = Literal["none", "optimizer"]
GradientDtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class ParameterBytes:
    """The bytes that each trained parameter takes."""

    weight: int = 4
    gradient: int = 4
    moments: int = 8  # AdamW's two, fp32 each
    copy: int = 2  # the 16-bit copy that products read


@dataclass(frozen=True, kw_only=True)
class Inference:
    """`batch` sequences at once, each of at most `context` tokens: prompt and answer together."""

    batch: int = 1
    context: int = 4096
    prompt: int | None = None  # tokens of the prompt; None: all of `context` but one
    cache_dtype: CacheDtype | None = None  # of keys and values; None: as dense numbers


@dataclass(frozen=True, kw_only=True)
class Training:
    """One step of a finetune. The defaults are those of `FinetuneConfig`."""

    kind: TrainingKind = "full"
    batch_size: int = 4
    max_words: int = 4096
    accum_iter: int = 1
    packing: bool = True
    checkpointing: bool = False
    data_parallel: Literal["sdp", "fsdp"] = "sdp"
    optimizer: OptimizerKind = "adamw"
    offload: Offload = "none"
    gradient_dtype: GradientDtype = "fp32"
    cuda_graphs: bool | None = None  # None: where adapters are trained
    parameter: ParameterBytes = field(default_factory=ParameterBytes)

    @property
    def savings(self) -> dict[str, str]:
        """The keys of a recipe that save memory of what is trained, where they have another value than the default."""
        chosen = {"optimizer": self.optimizer, "offload": self.offload, "gradient_dtype": self.gradient_dtype}
        return {key: value for key, value in chosen.items() if value not in ("adamw", "none", "fp32")}

    @property
    def gradient(self) -> int:
        """Bytes a number of a finished gradient. Those of norms and routers stay fp32."""
        return 2 if self.gradient_dtype == "bf16" else self.parameter.gradient


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A network, how it is cut over GPUs, and its task.

    `args` says which linears have LoRA, and of which rank. Raises ConfigError, which names the field and both numbers,
    where ranks cannot hold such a network.
    """

    args: ModelArgs
    task: Inference | Training
    implementation: Implementation = "sparse"
    quant: Quant = field(default_factory=Quant)
    tp: int = 1  # model-parallel ranks
    dp: int = 1  # data-parallel ranks: those that hold the same part of the network
    cp: int = 1  # how many of them share each row, a part of its tokens each
    ep: int = 1  # how many of them hold the experts together
    views: int = 0  # how many views of an image the encoders see; 0: text alone, no encoders
    device: Literal["cuda", "cpu"] = "cuda"
    dense_bytes: int = 2  # of a number that is neither quantised nor trained, and of keys and values

    def __post_init__(self) -> None:
        check_ranks(self.args, self.implementation, self.tp)
        for name in ("cp", "ep"):
            size = getattr(self, name)
            if self.dp % size:
                raise ConfigError(
                    f"{name}: got {size}, but it must divide the number of data-parallel ranks, {self.dp}"
                )
        if self.args.moe.num_experts % self.ep:
            raise ConfigError(
                f"ep: got {self.ep}, but it must divide the number of experts, {self.args.moe.num_experts}"
            )
        if self.ep > 1 and self.tp > 1:
            raise ConfigError(f"ep: got {self.ep}, but tp = {self.tp} cuts the experts already; set one of them to 1")

    @property
    def gpus(self) -> int:
        return self.tp * self.dp

    @property
    def fsdp(self) -> bool:
        """Whether anything of a training step is sharded. In sdp every rank has adapters whole."""
        assert isinstance(self.task, Training), "only training shards over data-parallel ranks"
        whole = self.task.kind == "lora" and self.task.data_parallel == "sdp" and self.ep == 1
        return self.dp > 1 and not whole

    @property
    def summed_gradient(self) -> int:
        """Bytes a number of a gradient while data-parallel ranks sum it: bf16's, where products are in 16 bits.

        With fp16 gradients are summed in fp32, which is not counted.
        """
        assert isinstance(self.task, Training), "prompts have no gradients"
        return min(self.dense_bytes, self.task.gradient)

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients lie in memory through the whole step: between micro-steps, and where CUDA graphs write."""
        assert isinstance(self.task, Training), "prompts have no gradients"
        return self.task.accum_iter > 1 or self.graphs

    @property
    def keeps_copies(self) -> bool:
        """Whether the 16-bit copies of trained weights lie in memory from step to step: see `train.passes`."""
        assert isinstance(self.task, Training), "prompts read the weights themselves"
        return self.graphs and not self.task.checkpointing

    @property
    def graphs(self) -> bool:
        """Whether a training step's passes are CUDA graphs."""
        assert isinstance(self.task, Training), "prompts have no such passes"
        wanted = self.task.kind == "lora" if self.task.cuda_graphs is None else self.task.cuda_graphs
        whole = self.tp == 1 or self.implementation == "sparse"  # the host of a rank of base counts its pairs
        narrow = self.dense_bytes == 2  # in fp32 the host takes the experts in turn
        possible = self.device == "cuda" and not self.views and self.cp == self.ep == 1 and whole and narrow
        return wanted and possible and not self.fsdp

    @property
    def training_tokens(self) -> int:
        """Tokens that a rank computes at once in a training step."""
        assert isinstance(self.task, Training), "prompts are computed in parts"
        return self.task.batch_size * self.task.max_words // self.cp

    @property
    def quantized(self) -> bool:
        """Whether any part of the network is quantised."""
        return self.quant != Quant()

    @property
    def image_tokens(self) -> int:
        """Positions that one image takes in a sequence."""
        return self.args.sees_with.image_tokens(self.views) if self.views else 0

    @property
    def images(self) -> int:
        """Images that a rank encodes at once: one a step or row; in a packed row as many as have room."""
        if not self.views:
            return 0
        if isinstance(self.task, Inference):
            return 1
        in_a_row = self.task.max_words // self.image_tokens if self.task.packing else 1
        return self.task.batch_size * max(1, in_a_row)

    # What one model-parallel rank holds.

    @property
    def experts(self) -> int:
        """Experts of a layer: base deals out whole experts, sparse gives each rank a slice of all. Data-parallel ranks
        may hold them together."""
        experts = self.args.moe.num_experts // self.ep
        return experts // self.tp if self.implementation == "base" else experts

    @property
    def expert_width(self) -> int:
        """How much of an expert's hidden dimension."""
        hidden = self.args.hidden_dim
        return hidden if self.implementation == "base" else hidden // self.tp

    @property
    def query_heads(self) -> int:
        whole = attention_mode(self.args, self.tp) == "whole"
        return self.args.n_heads if whole else self.args.n_heads // self.tp

    @property
    def kv_heads(self) -> int:
        """Key/value heads; where there are more ranks than heads, neighbouring ranks hold the same one."""
        whole = attention_mode(self.args, self.tp) == "whole"
        return self.args.n_kv_heads if whole else max(1, self.args.n_kv_heads // self.tp)
