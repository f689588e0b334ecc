"""`adapter_config.json` of Hugging Face's PEFT: read, checked, and compared with the tensors beside it.

A wrong number here is a wrong adapter without an error anywhere, since only `r` and `lora_alpha` say how strong it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from accessory.config import read_json
from accessory.errors import CheckpointError

# Settings that make an adapter more than two matrices per weight.
_UNSUPPORTED = (
    "use_dora use_qalora use_bdlora lora_bias layer_replication trainable_token_indices alora_invocation_tokens "
    "arrow_config kasa_config monteclora_config"
).split()
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True)
class PeftSettings:
    """What the tensors' meaning depends on. A pattern maps a regular expression, for ends of names, to a number."""

    path: Path
    rank: int | None  # None: not said, and the tensors say it
    alpha: float
    stabilised: bool  # the scale is alpha / √rank, not alpha / rank
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None  # ends of names; None: said in another way, which is not checked

    def scale(self, module: str, rank: int) -> float:
        """The factor of B·A beside `module`."""
        key = _matching(self.alpha_pattern, module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return alpha / math.sqrt(rank) if self.stabilised else alpha / rank

    def check_rank(self, module: str, *ranks: int) -> None:
        """CheckpointError unless the rank said for `module` is one of `ranks`, the first of which is the tensors'."""
        key = _matching(self.rank_pattern, module)
        said = self.rank if key is None else self.rank_pattern[key]
        if said is not None and said not in ranks:
            name = "r" if key is None else f"rank_pattern: {key}"
            raise CheckpointError(f"{self.path}: {name}: got {said}, but LoRA beside {module} is of rank {ranks[0]}")

    def check_target(self, module: str) -> None:
        """CheckpointError if `module` has LoRA, and `target_modules` does not name it: PEFT would drop that LoRA."""
        if self.targets is not None and not any(f".{module}".endswith(f".{target}") for target in self.targets):
            raise CheckpointError(
                f"{self.path}: target_modules: got {list(self.targets)}, but there is LoRA beside {module}, which none "
                "of them names"
            )


def read_settings(path: Path) -> PeftSettings:
    """Read adapter_config.json. CheckpointError, one line with the key, for all that is not plain LoRA or not valid."""
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type: got {kind!r}, but only LORA can be read")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise CheckpointError(f"{path}: {key}: got {config[key]!r}, but only plain LoRA can be read")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias: got {config['bias']!r}, but only 'none' can be read")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights: got {start!r}, which changes the base model too; let PEFT save it with "
            "path_initial_model_for_weight_conversion first"
        )
    stabilised = config.get("use_rslora")
    if stabilised not in (None, True, False) or isinstance(stabilised, int) != isinstance(stabilised, bool):
        _refuse(path, "use_rslora", stabilised, "true or false")
    if "r" in config and not _is_rank(config["r"]):
        _refuse(path, "r", config["r"], "a whole number of at least 1")
    alpha = config.get("lora_alpha", 8)
    if not _is_alpha(alpha):
        _refuse(path, "lora_alpha", alpha, "a number above 0")
    return PeftSettings(
        path=path,
        rank=config.get("r"),
        alpha=alpha,
        stabilised=bool(stabilised),
        rank_pattern=_pattern(config, "rank_pattern", _is_rank, "whole numbers of at least 1", path),
        alpha_pattern=_pattern(config, "alpha_pattern", _is_alpha, "numbers above 0", path),
        targets=_targets(config, path),
    )


def _matching(pattern: Mapping[str, Any], module: str) -> str | None:
    return next((key for key in pattern if re.fullmatch(rf"(.*\.)?({key})", module)), None)


def _pattern(
    config: Mapping[str, Any], key: str, valid: Callable[[Any], bool], what: str, path: Path
) -> dict[str, Any]:
    given = config.get(key)
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(map(valid, given.values())):
        _refuse(path, key, given, f"an object with {what}")
    for expression in given:
        try:
            re.compile(rf"(.*\.)?({expression})")
        except re.error as error:
            raise CheckpointError(f"{path}: {key}: {expression!r} is no regular expression ({error})") from error
    return given


def _targets(config: Mapping[str, Any], path: Path) -> tuple[str, ...] | None:
    """The ends of names in target_modules and target_parameters, where both are lists."""
    names: list[str] = []
    for key in ("target_modules", "target_parameters"):
        given = config.get(key)
        if given is not None and not isinstance(given, str | list):
            _refuse(path, key, given, "a text or a list of texts")
        if isinstance(given, list) and not all(isinstance(name, str) for name in given):
            _refuse(path, key, given, "a text or a list of texts")
        if isinstance(given, str):  # a regular expression or "all-linear"
            return None
        names += given or []
    return tuple(name.removesuffix(".weight") for name in names) or None


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _refuse(path: Path, key: str, given: Any, wanted: str) -> NoReturn:
    raise CheckpointError(f"{path}: {key}: got {given!r}, but it must be {wanted}")
