"""What a finetuning run is to do: `FinetuneConfig`, read from YAML, command lines or Python, and checked at once.

Values may be text: a flag, `key=value`, or `1e-5`, which YAML calls text. A field's type decides how text is read.
A new field is one line of `FinetuneConfig`. Its flag, its line of `--help`, its key in YAML and its check follow.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from accessory.config import PEFT_FIELDS, LlamaType, ModelArgs
from accessory.data.system_prompt import SYSTEM_PROMPTS
from accessory.data.template_names import TEMPLATES
from accessory.errors import ConfigError
from accessory.planner.setup import GradientDtype, Offload, OptimizerKind
from accessory.train.loggers import LOGGERS
from accessory.train.options import AT_LEAST_ONE, COUNT, NOT_NEGATIVE, POSITIVE, Allowed, one_of, option, required
from accessory.train.values import check, convert, read_mapping, read_value

PACKAGE = Path(__file__).parents[1]
AUTO = "auto"  # resume: go on with the newest state of output_dir, or begin where there is none

DEVICE = Allowed(lambda name: re.fullmatch(r"cpu|cuda(:\d+)?", name) is not None, "cpu, cuda or cuda:N")
A_TOKEN_AND_THE_NEXT = Allowed(lambda n: 2 <= n < 2**31, "at least 2, a token and the next one, and less than 2^31")
SEED = Allowed(lambda n: 0 <= n < 2**63, "at least 0 and less than 2^63")
LORA_RANK = Allowed(lambda n: n == -1 or 1 <= n < 2**31, "at least 1 and less than 2^31, or -1 for no LoRA")
Quantized = Literal[False, "nf4", "nf4-dq", "int4", "int8", "fp8"]  # true is the first, as in the original
FORMAT_OR_NONE = one_of([*filter(None, get_args(Quantized)), "none"])


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that can be chosen about a run. The defaults suit a full finetune.

    Fields convert and check themselves: ConfigError names the field, what was given and what would do.
    A file named `configs/…` that is not there is looked for in the package.
    """

    # The model
    pretrained_path: list[str] = required("folders or hf:// addresses, later ones (adapters) loaded over earlier ones")
    llama_type: str | None = option(
        None, "mixtral or mixtral_sparse, with _peft appended for adapters; default: what the folder says"
    )
    llama_config: list[str] = option(
        [], "JSON files whose keys win over the folder's own, later ones over earlier ones"
    )
    tokenizer_path: str | None = option(None, "default: the folder's")
    no_visual: bool = option(False, "train a model that takes images on text alone")
    trainable_mode: Literal["sg", "mm_stage1", "mm_stage2"] | None = option(
        None, "mm_stage1: train only what makes words of images; mm_stage2 or sg: all but the encoders"
    )
    quant: Quantized = option(
        False, "weights that are not trained in fewer bits: nf4, nf4-dq, int4, int8 or fp8; alone: nf4"
    )
    # None: the format of `quant`; for the head, int8 with int8 and 16 bits with all others.
    quant_attention: str | None = option(None, "attention's own format, or none", FORMAT_OR_NONE)
    quant_output: str | None = option(None, "the output head's own format, or none", FORMAT_OR_NONE)

    # The data
    data_config: str = required("a data file, or a YAML file with META, the list of data files")
    dialog: bool = option(True, "write single turns as dialogues")  # False: as the prompt_type of their file
    template: str | None = option(
        None,
        "how dialogues are written: default, alpaca, mistral, chatml, none, or the tokenizer's own",
        one_of(TEMPLATES),
    )
    prompt_type: str | None = option(
        None,
        "how single turns are written whose file does not say: alpaca, shortqa, qg, caption, None",
        one_of(SYSTEM_PROMPTS),
    )
    max_words: int = option(4096, "tokens of a row", A_TOKEN_AND_THE_NEXT)
    packing: bool = option(True, "put several documents into a row, where they never see one another (on)")
    eval_data: str | None = option(None, "a file like data_config, of items that are held out")
    # 0: only before the first step and after the last one.
    eval_interval: int = option(0, "steps between evaluations of eval_data", NOT_NEGATIVE)
    image_transform: Literal["random_resized_crop", "resized_center_crop", "padded_resize"] = option(
        "random_resized_crop", "random_resized_crop, resized_center_crop or padded_resize"
    )
    broken_images: Literal["fail", "skip"] = option("fail", "fail, or skip items whose image cannot be read")
    cache_ann_on_disk: bool = option(False, "keep encoded items beside the data files")
    num_workers: int = option(0, "threads that prepare batches", NOT_NEGATIVE)
    pin_mem: bool = option(True, "pin batches in memory (on)")

    # The steps
    batch_size: int = option(4, "rows a data-parallel rank and micro-step", COUNT)
    accum_iter: int = option(1, "micro-steps a step", COUNT)
    epochs: float = option(1.0, "may be a fraction", POSITIVE)
    max_steps: int | None = option(
        None, "end after so many steps; warm-up and decay of lr shrink with the run", AT_LEAST_ONE
    )
    lr: float = option(5e-6, "the highest learning rate", POSITIVE)
    min_lr: float = option(0.0, "the learning rate of the end", NOT_NEGATIVE)
    warmup_epochs: float = option(0.1, "in which the learning rate rises from 0", NOT_NEGATIVE)
    weight_decay: float = option(0.0, "of everything but norms and biases", NOT_NEGATIVE)
    clip_grad: float = option(2.0, "the largest norm of a gradient; 0 or less: any")
    seed: int = option(0, "of the order of the data and of new adapters", SEED)

    # The loss
    load_balancing_weight: float | None = option(None, "of the load-balancing loss; default: the model's")
    z_loss_weight: float = option(0.0, "of the routers' z-loss", NOT_NEGATIVE)
    global_batch_statistics: bool = option(False, "balance the batch of all ranks rather than each rank's own")

    # What is trained. None: what llama_config and llama_type say.
    lora_rank: int | None = option(None, "of LoRA, beside the linears of lora_targets; -1: none", LORA_RANK)
    lora_alpha: float | None = option(None, "LoRA's update is scaled by alpha / rank; default: by 1")
    lora_targets: tuple[str, ...] | None = option(
        None, "some of wq wk wv wo w1 w2 w3 gate output; default: the first seven"
    )
    bias_tuning: bool | None = option(None, "add and train biases; the result cannot become a Hugging Face Mixtral")
    norm_tuning: bool | None = option(None, "with adapters, train the norms too")
    train_router: bool = option(False, "with adapters, train the routers too")

    # The ranks
    model_parallel_size: int = option(1, "ranks that hold the model together", COUNT)
    context_parallel_size: int = option(1, "ranks that share each row, a part of its tokens each", COUNT)
    expert_parallel_size: int = option(1, "data-parallel ranks that hold the experts together", COUNT)
    data_parallel: Literal["sdp", "fsdp"] = option(
        "sdp", "sdp keeps parameters whole between forward and backward, fsdp does not"
    )
    precision: Literal["bf16", "fp16", "fp32", "tf32"] = option("bf16", "bf16, fp16, fp32 or tf32")
    checkpointing: bool = option(False, "compute activations again instead of keeping them")
    optimizer: OptimizerKind = option("adamw", "adamw, or adamw_8bit: most moments in 8 bits, with bitsandbytes")
    offload: Offload = option("none", "none, or optimizer: AdamW's moments in host memory, where a GPU trains")
    gradient_dtype: GradientDtype = option("fp32", "fp32, or bf16: gradients of half the size, which add up in bf16")
    cuda_graphs: bool | None = option(
        None,
        "replay the passes as CUDA graphs; default: where adapters are trained; not with sharded weights or images",
    )
    device: str | None = option(None, "cpu, cuda or cuda:N; default: cuda where there is one", DEVICE)

    # What is written
    output_dir: str = required("where everything is written")
    save_interval: int = option(1, "epochs between states", NOT_NEGATIVE)  # 0: none at the end of an epoch
    save_iteration_interval: int | None = option(None, "steps between states", AT_LEAST_ONE)
    keep: int = option(2, "states that are kept, the last ones", AT_LEAST_ONE)
    only_save_trainable: bool = option(
        False, "write only what was trained; the folder is then loaded behind the one it was trained on"
    )
    resume: str | None = option(
        None, "auto: go on with the newest state of output_dir; or the folder of a state or a run"
    )
    overwrite: bool = option(False, "begin anew in an output_dir that holds a run")
    loggers: list[str] = option([], "some of tensorboard wandb trackio, beside metrics.jsonl", one_of(LOGGERS))

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            object.__setattr__(self, name, convert(name, getattr(self, name), hint))
        for name in ("data_config", "eval_data", "llama_config"):
            object.__setattr__(self, name, _packaged(getattr(self, name)))
        for f in fields(self):
            self._check_allowed(f.name, f.metadata["allowed"])
        self._check_network()
        self._check_against_each_other()

    def _check_allowed(self, name: str, allowed: Allowed) -> None:
        value = getattr(self, name)
        for one in value if isinstance(value, list | tuple) else [value]:
            check(one is None or allowed.passes(one), name, one, allowed.wanted)

    def _check_network(self) -> None:
        """The network's own classes check what is theirs."""
        if self.llama_type is not None:
            LlamaType.parse(self.llama_type)
        names = ("load_balancing_weight", *PEFT_FIELDS)
        ModelArgs(**{name: getattr(self, name) for name in names if getattr(self, name) is not None})

    def _check_against_each_other(self) -> None:
        check(bool(self.pretrained_path), "pretrained_path", self.pretrained_path, "at least one folder")
        check(self.min_lr <= self.lr, "min_lr", self.min_lr, f"at most lr = {self.lr}")
        check(self.warmup_epochs <= self.epochs, "warmup_epochs", self.warmup_epochs, f"at most epochs = {self.epochs}")
        if self.offload == "optimizer" and self.optimizer == "adamw_8bit":
            raise ConfigError("offload: got optimizer, but adamw_8bit keeps its moments on the GPU; give one of them")
        n = self.context_parallel_size
        if n > 1 and self.max_words % (2 * n):
            raise ConfigError(
                f"context_parallel_size: got {n}, but max_words = {self.max_words} must be a multiple of 2 × {n}, into "
                "so many parts a row is cut"
            )
        if self.expert_parallel_size > 1 and self.model_parallel_size > 1:
            raise ConfigError(
                f"expert_parallel_size: got {self.expert_parallel_size}, but model_parallel_size = "
                f"{self.model_parallel_size} cuts the experts already; set one of them to 1"
            )
        if self.eval_interval and self.eval_data is None:
            raise ConfigError(f"eval_interval: got {self.eval_interval}, but it needs eval_data, the held-out items")
        if self.resume is not None and self.resume != AUTO:
            check(Path(self.resume).is_dir(), "resume", self.resume, f"{AUTO!r} or a folder that is there")
            if self.overwrite:
                raise ConfigError(f"overwrite: begins anew, but resume = {self.resume} goes on; leave one of them out")

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
        """Read a YAML file of fields, then `key=value` texts, which win. Their values are YAML too.

        Raises ConfigError for a key that is unknown, repeated, missing or out of range, with its line or override.
        """
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for key, value, line in read_mapping(path):
            origin = f"{path}:{line}"
            cls._check_known(key, origin)
            if key in values:
                raise ConfigError(f"{origin}: {key} is there twice; remove one")
            values[key], origins[key] = value, origin
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals:
                raise ConfigError(f"{text!r}: expected key=value, for instance lr=1e-5")
            cls._check_known(key, text)
            values[key] = read_value(value, text)
            origins.pop(key, None)
        missing = [name for name in required_fields(cls) if name not in values]
        if missing:
            given = " ".join(f"{name}=…" for name in missing)
            raise ConfigError(f"{path}: {', '.join(missing)}: missing; write it in the file or give {given} after it")
        try:
            return cls(**values)
        except ConfigError as error:
            name = str(error).split(":")[0]
            if name not in origins:  # of an override, which the message names
                raise
            raise ConfigError(f"{origins[name]}: {error}") from error

    @classmethod
    def _check_known(cls, key: object, origin: str) -> None:
        known = [f.name for f in fields(cls)]
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "known are " + ", ".join(sorted(known))
            raise ConfigError(f"{origin}: unknown key {key!r}; {hint}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON and YAML know values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def as_yaml(self) -> str:
        """All fields, as `from_yaml` reads them."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=1000)

    @property
    def ranks_a_replica(self) -> int:
        """How many ranks have the same rows: they share the model, or the rows, or both."""
        return self.model_parallel_size * self.context_parallel_size

    @property
    def fewest_ranks(self) -> int:
        """The smallest number of ranks that carries the recipe out."""
        return self.model_parallel_size * math.lcm(self.context_parallel_size, self.expert_parallel_size)

    def data_parallel_size(self, world: int) -> int:
        """How many replicas `world` ranks hold, each with rows of its own; ConfigError where they do not fill whole
        ones."""
        if world < 1 or world % self.model_parallel_size:
            raise ConfigError(
                f"model_parallel_size: got {self.model_parallel_size}, but the number of ranks, {world}, must be a "
                "multiple of it"
            )
        if world % self.ranks_a_replica:
            raise ConfigError(
                f"context_parallel_size: got {self.context_parallel_size}, but the number of ranks, {world}, must be a "
                f"multiple of context_parallel_size × model_parallel_size = {self.ranks_a_replica}"
            )
        if world // self.model_parallel_size % self.expert_parallel_size:
            raise ConfigError(
                f"expert_parallel_size: got {self.expert_parallel_size}, but the number of data-parallel ranks, "
                f"{world // self.model_parallel_size}, must be a multiple of it"
            )
        return world // self.ranks_a_replica

    def check_files(self) -> None:
        """ConfigError for a file or folder that is not there."""
        for name in ("pretrained_path", "llama_config", "tokenizer_path", "data_config", "eval_data"):
            value = getattr(self, name)
            for path in value if isinstance(value, list) else [value]:
                there = path is None or "://" in path or Path(path).exists()
                check(there, name, path, "a file or folder that is there")


# --------------------------------------------------------------------------- fields


def field_types(config: type[FinetuneConfig]) -> Mapping[str, Any]:
    """The type of every field, by name."""
    return get_type_hints(config)


def required_fields(config: type[FinetuneConfig]) -> list[str]:
    """The fields without a default."""
    return [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]


def _packaged(value: Any) -> Any:
    if isinstance(value, list):
        return [_packaged(v) for v in value]
    if value is None or not value.startswith("configs/") or Path(value).exists() or not (PACKAGE / value).is_file():
        return value
    return str(PACKAGE / value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
