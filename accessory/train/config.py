"""What a finetuning run is to do: `FinetuneConfig`, read from YAML, command lines or Python, and checked at once.

Values may come as text (a flag, `key=value`, `1e-5`, which YAML calls text): the field's type decides what they are.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from accessory.config import PEFT_FIELDS, LlamaType, ModelArgs
from accessory.data.system_prompt import SYSTEM_PROMPTS
from accessory.data.template_names import TEMPLATES
from accessory.errors import ConfigError
from accessory.train.loggers import LOGGERS
from accessory.train.values import check, convert, read_mapping, read_value

PACKAGE = Path(__file__).parents[1]
AUTO = "auto"  # resume: go on with the newest state of output_dir, or begin where there is none


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that can be chosen about a run; the defaults are the learning rate and schedule of a full finetune.

    Fields convert and check themselves: ConfigError names the field, what was given and what would do.
    A file named `configs/…` that is not there is looked for in the package.
    """

    # The model
    pretrained_path: list[str]  # folders or hf:// addresses; later ones (adapters) are loaded over earlier ones
    llama_type: str | None = None  # None: what the folders say
    llama_config: list[str] = field(default_factory=list)  # JSON files; their keys win over the folders' own
    tokenizer_path: str | None = None  # None: that of the folders
    no_visual: bool = False  # train a model that sees (llama_type …_ens, …_ens5) on text alone, and without its eyes
    trainable_mode: Literal["sg", "mm_stage1", "mm_stage2"] | None = None  # mm_stage1: of images only what is projected
    quant: Literal[False, "nf4", "nf4-dq", "int4", "int8", "fp8"] = False  # true is nf4, as in the original
    quant_attention: str | None = None  # attention's own format, or none; None: as quant says
    quant_output: str | None = None  # the output head's; None: int8 with int8, else 16 bits

    # The data
    data_config: str  # YAML with META, a list of files
    dialog: bool = True  # single turns are dialogues of two messages; False: they follow their file's prompt_type
    template: str | None = None  # of dialogues; None: the original's
    prompt_type: str | None = None  # of single turns whose file names none
    max_words: int = 4096  # tokens of a row
    packing: bool = True  # several documents in a row, which never see one another
    eval_data: str | None = None  # like data_config, held out
    eval_interval: int = 0  # steps; 0: only before and after
    image_transform: Literal["random_resized_crop", "resized_center_crop", "padded_resize"] = "random_resized_crop"
    broken_images: Literal["fail", "skip"] = "fail"  # what becomes of items whose image cannot be read
    cache_ann_on_disk: bool = False
    num_workers: int = 0  # threads that prepare batches
    pin_mem: bool = True

    # The steps
    batch_size: int = 4  # rows a data-parallel rank and micro-step
    accum_iter: int = 1  # micro-steps a step
    epochs: float = 1.0
    max_steps: int | None = None
    lr: float = 5e-6
    min_lr: float = 0.0
    warmup_epochs: float = 0.1
    weight_decay: float = 0.0
    clip_grad: float = 2.0  # 0 or less: off
    seed: int = 0

    # The loss
    load_balancing_weight: float | None = None  # None: the model's
    z_loss_weight: float = 0.0
    global_batch_statistics: bool = False

    # What is trained; None: as llama_config and llama_type say
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    bias_tuning: bool | None = None
    norm_tuning: bool | None = None
    train_router: bool = False

    # The ranks
    model_parallel_size: int = 1
    data_parallel: Literal["sdp", "fsdp"] = "sdp"
    precision: Literal["bf16", "fp16", "fp32", "tf32"] = "bf16"
    checkpointing: bool = False
    device: str | None = None  # None: cuda where there is one

    # What is written
    output_dir: str
    save_interval: int = 1  # epochs; 0: never
    save_iteration_interval: int | None = None  # steps
    keep: int = 2  # states
    only_save_trainable: bool = False
    resume: str | None = None  # "auto", or the folder of a state or a run
    overwrite: bool = False  # begin anew in an output_dir that holds a run
    loggers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, hint in field_types().items():
            object.__setattr__(self, name, convert(name, getattr(self, name), hint))
        for name in ("data_config", "eval_data", "llama_config"):
            object.__setattr__(self, name, _packaged(getattr(self, name)))
        for name, (within, wanted) in _RANGES.items():
            value = getattr(self, name)
            check(value is None or within(value), name, value, wanted)
        self._check_names()
        self._check_against_each_other()

    def _check_names(self) -> None:
        if self.llama_type is not None:
            LlamaType.parse(self.llama_type)
        network = ("load_balancing_weight", *PEFT_FIELDS)
        ModelArgs(**{n: getattr(self, n) for n in network if getattr(self, n) is not None})
        for name, known in (("template", TEMPLATES), ("prompt_type", SYSTEM_PROMPTS)):
            value = getattr(self, name)
            check(value is None or value in known, name, value, "one of " + ", ".join(known))
        formats = [*filter(None, get_args(field_types()["quant"])), "none"]
        for name in ("quant_attention", "quant_output"):
            value = getattr(self, name)
            check(value is None or value in formats, name, value, "one of " + ", ".join(formats))
        for name in self.loggers:
            check(name in LOGGERS, "loggers", name, "one of " + ", ".join(LOGGERS))
        device = self.device or "cpu"
        check(re.fullmatch(r"cpu|cuda(:\d+)?", device) is not None, "device", device, "cpu, cuda or cuda:N")

    def _check_against_each_other(self) -> None:
        check(bool(self.pretrained_path), "pretrained_path", self.pretrained_path, "at least one folder")
        check(self.min_lr <= self.lr, "min_lr", self.min_lr, f"at most lr = {self.lr}")
        check(self.warmup_epochs <= self.epochs, "warmup_epochs", self.warmup_epochs, f"at most epochs = {self.epochs}")
        if self.eval_interval and self.eval_data is None:
            raise ConfigError(f"eval_interval: got {self.eval_interval}, but it needs eval_data, the held-out items")
        if self.resume is not None and self.resume != AUTO:
            check(Path(self.resume).is_dir(), "resume", self.resume, f"{AUTO!r} or a folder that is there")
            if self.overwrite:
                raise ConfigError(f"overwrite: begins anew, but resume = {self.resume} goes on; leave one of them out")

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
        """Read a YAML file of fields, then `key=value` texts, which win and whose values are YAML too.

        Raises ConfigError with the file and line, or the override, of what is unknown, repeated or out of range.
        """
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for key, value, line in read_mapping(path):
            origin = f"{path}:{line}"
            _check_known(key, origin)
            if key in values:
                raise ConfigError(f"{origin}: {key} is there twice; remove one")
            values[key], origins[key] = value, origin
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals:
                raise ConfigError(f"{text!r}: expected key=value, for instance lr=1e-5")
            _check_known(key, text)
            values[key] = read_value(value, text)
            origins.pop(key, None)
        missing = [name for name in required_fields() if name not in values]
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

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON and YAML know values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def as_yaml(self) -> str:
        """All fields, as `from_yaml` reads them."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=1000)

    def data_parallel_size(self, world: int) -> int:
        """How many replicas `world` ranks hold; ConfigError where they do not fill whole ones."""
        if world < 1 or world % self.model_parallel_size:
            raise ConfigError(
                f"model_parallel_size: got {self.model_parallel_size}, but the number of ranks, {world}, must be a "
                "multiple of it"
            )
        return world // self.model_parallel_size

    def check_files(self) -> None:
        """ConfigError for a file or folder that is not there, before anything slow is started."""
        for name in ("pretrained_path", "llama_config", "tokenizer_path", "data_config", "eval_data"):
            value = getattr(self, name)
            for path in value if isinstance(value, list) else [value]:
                there = path is None or "://" in path or Path(path).exists()
                check(there, name, path, "a file or folder that is there")


# --------------------------------------------------------------------------- fields


@functools.cache
def field_types() -> Mapping[str, Any]:
    """The type of every field, by name."""
    return get_type_hints(FinetuneConfig)


def required_fields() -> list[str]:
    """The fields without a default."""
    return [f.name for f in fields(FinetuneConfig) if f.default is MISSING and f.default_factory is MISSING]


def _check_known(key: object, origin: str) -> None:
    known = list(field_types())
    if key not in known:
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "known are " + ", ".join(sorted(known))
        raise ConfigError(f"{origin}: unknown key {key!r}; {hint}")


_Range = tuple[Callable[[Any], bool], str]
_AT_LEAST_ONE: _Range = (lambda n: n >= 1, "at least 1")
_NOT_NEGATIVE: _Range = (lambda n: n >= 0, "at least 0")
_POSITIVE: _Range = (lambda n: n > 0, "more than 0")
_RANGES: dict[str, _Range] = {
    "max_words": (lambda n: n >= 2, "at least 2, a token and the next one"),
    "epochs": _POSITIVE,
    "lr": _POSITIVE,
    **dict.fromkeys(
        ("batch_size", "accum_iter", "max_steps", "model_parallel_size", "save_iteration_interval", "keep"),
        _AT_LEAST_ONE,
    ),
    **dict.fromkeys(
        ("min_lr", "warmup_epochs", "weight_decay", "z_loss_weight", "eval_interval", "save_interval", "num_workers"),
        _NOT_NEGATIVE,
    ),
    "seed": (lambda n: 0 <= n < 2**32, "at least 0 and less than 2^32"),
}


def _packaged(value: Any) -> Any:
    if isinstance(value, list):
        return [_packaged(v) for v in value]
    if value is None or not value.startswith("configs/") or Path(value).exists() or not (PACKAGE / value).is_file():
        return value
    return str(PACKAGE / value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
