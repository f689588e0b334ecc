"""What a network is: its sizes (`ModelArgs`) and its kind (`LlamaType`), parsed once and checked at once.

Three spellings are in circulation for the same sizes: ours (and the original's `config.json`), Mistral's
`params.json`, and Hugging Face's `config.json`. `ModelArgs.from_dicts` accepts any of them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from accessory.errors import ConfigError
from accessory.vision_config import SPHINX, VisionArgs

Implementation = Literal["base", "sparse"]

# Short names of torch's dtypes on command lines.
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

ROPE_TYPES = ("linear", "llama3", "yarn")

# The linears that get LoRA by default. The router and the output head get it only if they are named.
LORA_TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
LORA_TARGETS_ON_REQUEST = ("gate", "output")
TRAINABLE_MODES = ("sg", "mm_stage1", "mm_stage2")


def _check(condition: bool, name: str, given: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: got {given!r}, but it must be {wanted}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class MoEArgs:
    """The mixture: `num_experts` (E) feed-forwards per layer; a token uses `num_experts_per_tok` (K) of them."""

    num_experts_per_tok: int = 2
    num_experts: int = 8

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            _check(_is_int(value) and value >= 1, f"moe.{f.name}", value, "a whole number of at least 1")
        _check(
            self.num_experts_per_tok <= self.num_experts,
            "moe.num_experts_per_tok",
            self.num_experts_per_tok,
            f"at most moe.num_experts = {self.num_experts}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The sizes of a Mixtral-like network; the defaults are Mixtral-8x7B's.

    Keys are those of the original project's `config.json`. `rope_scaling` is None, a factor (linear position
    interpolation, as in the original), or a mapping with `rope_type` "linear", "llama3" or "yarn" and that
    type's parameters as Hugging Face spells them.
    """

    dim: int = 4096
    hidden_dim: int = 14336
    head_dim: int = 0  # 0: dim / n_heads
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 8
    vocab_size: int = 32000
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: Any = None
    max_batch_size: int = 32
    max_seq_len: int = 32768
    moe: MoEArgs = field(default_factory=MoEArgs)
    load_balancing_weight: float = 0.1
    # Parameter-efficient finetuning
    lora_rank: int = -1  # -1: no LoRA
    lora_alpha: float | None = None  # the update is scaled by alpha / rank; None: by one, as the original does
    lora_targets: tuple[str, ...] = LORA_TARGETS
    bias_tuning: bool = False
    norm_tuning: bool = True
    # Images
    load_pretrained_visual_encoder: bool = False
    trainable_mode: str = "sg"  # or "mm_stage1": projections, start and end only; "mm_stage2": all but encoders
    vision: VisionArgs | None = None  # None: the original's ensemble, where llama_type asks for images

    def __post_init__(self) -> None:
        if isinstance(self.moe, Mapping):
            object.__setattr__(self, "moe", MoEArgs(**self.moe))
        for name in (
            "dim",
            "hidden_dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "vocab_size",
            "max_batch_size",
            "max_seq_len",
        ):
            value = getattr(self, name)
            _check(_is_int(value) and value >= 1, name, value, "a whole number of at least 1")
        if self.head_dim == 0:
            _check(
                self.dim % self.n_heads == 0,
                "dim",
                self.dim,
                f"a multiple of n_heads = {self.n_heads}, or give head_dim",
            )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        _check(
            _is_int(self.head_dim) and self.head_dim >= 2 and self.head_dim % 2 == 0,
            "head_dim",
            self.head_dim,
            "an even number (rotary embedding turns pairs)",
        )
        _check(
            self.n_heads % self.n_kv_heads == 0,
            "n_heads",
            self.n_heads,
            f"a multiple of n_kv_heads = {self.n_kv_heads}",
        )
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            _check(isinstance(value, int | float) and value > 0, name, value, "a positive number")
        _check(
            isinstance(self.load_balancing_weight, int | float) and self.load_balancing_weight >= 0,
            "load_balancing_weight",
            self.load_balancing_weight,
            "a number of at least 0",
        )
        self._check_rope_scaling()
        self._check_peft()

    def _check_peft(self) -> None:
        rank, alpha = self.lora_rank, self.lora_alpha
        _check(_is_int(rank) and (rank == -1 or rank >= 1), "lora_rank", rank, "at least 1, or -1 for no LoRA")
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        _check(alpha is None or (number and alpha > 0), "lora_alpha", alpha, "a positive number, or absent")
        known = (*LORA_TARGETS, *LORA_TARGETS_ON_REQUEST)
        given = self.lora_targets
        some = isinstance(given, list | tuple) and bool(given) and set(given) <= set(known)
        _check(some, "lora_targets", given, "some of " + ", ".join(known))
        object.__setattr__(self, "lora_targets", tuple(name for name in known if name in given))
        _check(
            self.trainable_mode in TRAINABLE_MODES,
            "trainable_mode",
            self.trainable_mode,
            "one of " + ", ".join(TRAINABLE_MODES),
        )
        object.__setattr__(self, "vision", VisionArgs.parse(self.vision))
        for name in ("bias_tuning", "norm_tuning"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")

    def _check_rope_scaling(self) -> None:
        scaling = self.rope_scaling
        if scaling is None:
            return
        if isinstance(scaling, int | float):
            _check(scaling >= 1, "rope_scaling", scaling, "a factor of at least 1")
            object.__setattr__(self, "rope_scaling", {"rope_type": "linear", "factor": float(scaling)})
            return
        _check(isinstance(scaling, Mapping), "rope_scaling", scaling, "a factor or a mapping with rope_type and factor")
        kind = scaling.get("rope_type", scaling.get("type"))
        _check(kind in ROPE_TYPES, "rope_scaling.rope_type", kind, "one of " + ", ".join(ROPE_TYPES))
        factor = scaling.get("factor")
        _check(isinstance(factor, int | float) and factor >= 1, "rope_scaling.factor", factor, "a number of at least 1")
        if kind == "llama3":
            for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                _check(
                    isinstance(scaling.get(name), int | float), f"rope_scaling.{name}", scaling.get(name), "a number"
                )
        normal = {k: v for k, v in scaling.items() if k != "type"}
        object.__setattr__(self, "rope_scaling", {**normal, "rope_type": kind})

    @classmethod
    def from_dicts(cls, *sources: Mapping[str, Any], origin: str = "config") -> ModelArgs:
        """Merge configurations in any of the three spellings; later ones override earlier ones.

        Raises ConfigError for a key that no spelling has, so that a typing mistake is not ignored. In Hugging Face's
        files unknown keys are allowed, because dozens of their keys do not concern the network.
        """
        merged: dict[str, Any] = {}
        moe: dict[str, Any] = {}
        for source in sources:
            if not isinstance(source, Mapping):
                raise ConfigError(f"{origin}: expected an object of keys and values, got {type(source).__name__}")
            own, own_moe = _canonical_keys(source, origin)
            merged.update(own)
            moe.update(own_moe)
        if moe:
            merged["moe"] = MoEArgs(**moe)
        return cls(**merged)

    @classmethod
    def from_files(cls, *paths: str | Path) -> ModelArgs:
        return cls.from_dicts(*(read_json(p) for p in paths), origin=", ".join(str(p) for p in paths))

    def to_dict(self) -> dict[str, Any]:
        """The original's `config.json`: all keys, but those of PEFT and images only if they differ from the default."""
        out = asdict(self)
        for name in _OPTIONAL_KEYS:
            if out[name] == type(self).__dataclass_fields__[name].default:
                del out[name]
        return out

    @property
    def sees_with(self) -> VisionArgs:
        """The image encoders of a model that takes images.

        With `load_pretrained_visual_encoder`, SPHINX's encoders without a path get the address where they are
        published. It is used if the checkpoint holds none of their weights.
        """
        vision = self.vision or SPHINX
        return vision.published() if self.load_pretrained_visual_encoder else vision

    @property
    def lora_scale(self) -> float:
        """The factor of the product of LoRA's two matrices (arXiv 2106.09685)."""
        return 1.0 if self.lora_alpha is None or self.lora_rank < 1 else self.lora_alpha / self.lora_rank

    def replace(self, **changes: Any) -> ModelArgs:
        return replace(self, **changes)

    def parameter_counts(self) -> tuple[int, int]:
        """(all parameters, those that one token uses: attention, router, K experts, norms and output head)."""
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        expert = 3 * self.dim * self.hidden_dim
        gate = self.moe.num_experts * self.dim
        head = self.vocab_size * self.dim
        norms = (2 * self.n_layers + 1) * self.dim
        total = self.n_layers * (attention + gate + self.moe.num_experts * expert) + 2 * head + norms
        active = self.n_layers * (attention + gate + self.moe.num_experts_per_tok * expert) + head + norms
        return total, active


PEFT_FIELDS = ("lora_rank", "lora_alpha", "lora_targets", "bias_tuning", "norm_tuning")
_OPTIONAL_KEYS = (*PEFT_FIELDS, "load_pretrained_visual_encoder", "trainable_mode", "vision")

# Other spellings -> ours: those of Mistral's params.json and its variants, and of Hugging Face's config.json.
_ALIASES = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
    "router_aux_loss_coef": "load_balancing_weight",
}
_MOE_ALIASES = {
    "num_experts_per_tok": "num_experts_per_tok",
    "num_experts_per_token": "num_experts_per_tok",
    "top_k_experts": "num_experts_per_tok",
    "num_experts": "num_experts",
    "num_local_experts": "num_experts",
}
# Keys of params.json and of the original's config.json that this network does not need.
_IGNORED = frozenset(
    "model_type architectures torch_dtype dtype transformers_version sliding_window vocab multiple_of "
    "ffn_dim_multiplier hidden_act initializer_range use_cache bos_token_id eos_token_id pad_token_id "
    "attention_dropout tie_word_embeddings output_router_logits router_jitter_noise attention_bias "
    "quantization use_biases".split()
)


def _canonical_keys(source: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from_hugging_face = "architectures" in source or "model_type" in source
    names = {f.name for f in fields(ModelArgs)}
    own: dict[str, Any] = {}
    moe: dict[str, Any] = {}
    for key, value in source.items():
        if key == "moe":
            if not isinstance(value, Mapping):
                raise ConfigError(f"{origin}: moe: got {value!r}, but it must hold num_experts and num_experts_per_tok")
            for inner, inner_value in value.items():
                if inner not in _MOE_ALIASES:
                    raise ConfigError(f"{origin}: moe.{inner}: unknown key; known are num_experts, num_experts_per_tok")
                moe[_MOE_ALIASES[inner]] = inner_value
        elif key in _MOE_ALIASES:
            moe[_MOE_ALIASES[key]] = value
        elif key == "rope_parameters":
            own.update(_rope_parameters(value))
        elif key == "rope_scaling":
            own["rope_scaling"] = _plain_rope_scaling(value)
        elif _ALIASES.get(key, key) in names:
            if value is not None:
                own[_ALIASES.get(key, key)] = value
        elif key not in _IGNORED and not from_hugging_face:
            known = sorted(names | set(_ALIASES) | set(_MOE_ALIASES))
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; known are " + ", ".join(sorted(names))
            raise ConfigError(f"{origin}: unknown key {key!r}{hint}")
    return own, moe


def _plain_rope_scaling(value: Any) -> Any:
    """Hugging Face writes an unscaled rotary embedding as rope_type "default"."""
    if (
        isinstance(value, Mapping)
        and value.get("rope_type", value.get("type")) in ("default", None)
        and "factor" not in value
    ):
        return None
    return value


def _rope_parameters(value: Any) -> dict[str, Any]:
    """transformers 5 puts theta and scaling together under `rope_parameters`."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"rope_parameters: got {value!r}, but it must be an object with rope_theta")
    out: dict[str, Any] = {}
    if "rope_theta" in value:
        out["rope_theta"] = value["rope_theta"]
    rest = {k: v for k, v in value.items() if k not in ("rope_theta", "partial_rotary_factor")}
    out["rope_scaling"] = _plain_rope_scaling(rest) if rest else None
    return out


@dataclass(frozen=True)
class LlamaType:
    """A parsed `llama_type`: the implementation, whether PEFT is used, and the views of an image (0: text only)."""

    implementation: Implementation
    peft: bool = False
    image_views: int = 0

    @classmethod
    def parse(cls, text: str) -> LlamaType:
        """Parse "mixtral" with any of "_sparse", "_peft" and "_ens" or "_ens5", in any order. ConfigError otherwise."""
        words = text.split("_") if isinstance(text, str) else [""]
        rest = words[1:]
        known = {"sparse", "peft", "ens", "ens5"}
        if (
            words[0] != "mixtral"
            or not set(rest) <= known
            or len(set(rest)) != len(rest)
            or {"ens", "ens5"} <= set(rest)
        ):
            raise ConfigError(
                f"llama_type: got {text!r}, but it must be mixtral or mixtral_sparse, "
                "with _peft and one of _ens, _ens5 appended where wanted"
            )
        return cls(
            implementation="sparse" if "sparse" in rest else "base",
            peft="peft" in rest,
            image_views=5 if "ens5" in rest else 1 if "ens" in rest else 0,
        )

    def __str__(self) -> str:
        views = {0: "", 1: "_ens", 5: "_ens5"}[self.image_views]
        return (
            "mixtral" + ("_sparse" if self.implementation == "sparse" else "") + ("_peft" if self.peft else "") + views
        )


MIXTRAL_8X7B = ModelArgs()
MIXTRAL_8X22B = ModelArgs(
    dim=6144, hidden_dim=16384, head_dim=128, n_layers=56, n_heads=48, n_kv_heads=8, vocab_size=32768, max_seq_len=65536
)
PRESETS: dict[str, ModelArgs] = {
    "8x7b": MIXTRAL_8X7B,
    "8x22b": MIXTRAL_8X22B,
    # For tests and a first try: it runs in a moment on any machine.
    "tiny": ModelArgs(
        dim=64,
        hidden_dim=96,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=256,
        max_seq_len=256,
        moe=MoEArgs(num_experts=4),
    ),
}


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file. ConfigError names the file if it is missing, broken or something else."""
    try:
        with open(path, encoding="utf-8") as handle:
            value = json.load(handle)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
