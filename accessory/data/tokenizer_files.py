"""Which file of a folder is the tokenizer, and what the files beside it say of BOS, EOS and the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accessory.config import read_json
from accessory.errors import CheckpointError, ConfigError

Kind = Literal["sentencepiece", "huggingface"]

TEMPLATE_FILE = "chat_template.jinja"
WANTED = "tokenizer.model, tokenizer.model.v1 (v2, v3, …) or tokenizer.json"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of any form."""
    return any(folder.glob("tokenizer.model*")) or (folder / "tokenizer.json").exists()


def find_tokenizer(path: str | Path) -> tuple[Path, Kind]:
    """The tokenizer's file and its kind, for a folder or a file.

    A folder's `tokenizer.model` wins over its highest `tokenizer.model.vN`, and that over its `tokenizer.json`.
    CheckpointError says which files were looked for.
    """
    path = Path(path)
    if path.is_file():
        if path.name.startswith("tekken"):
            raise CheckpointError(f"{path}: tekken tokenizers are not supported; give {WANTED}")
        return path, "huggingface" if path.suffix == ".json" else "sentencepiece"
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; looked for {WANTED}")
    if (path / "tokenizer.model").is_file():
        return path / "tokenizer.model", "sentencepiece"
    versions = [p for p in path.glob("tokenizer.model.v*") if p.is_file() and _version(p)]
    if versions:
        return max(versions, key=_version), "sentencepiece"
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json", "huggingface"
    raise CheckpointError(f"{path}: no tokenizer in this folder; looked for {WANTED}")


def _version(path: Path) -> int:
    found = re.fullmatch(r"tokenizer\.model\.v(\d+)\w*", path.name)
    return int(found[1]) if found else 0


@dataclass(frozen=True)
class Settings:
    """Settings of the files beside a tokenizer. A field is None or empty where no file sets it."""

    bos_token: str | None = None
    eos_token: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # generation_config.json's list, else config.json's
    add_bos: bool | None = None
    legacy: bool = False
    chat_template: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # pad_token and the like, for the template
    added: dict[str, tuple[int, bool]] = field(default_factory=dict)  # content -> (id, is a control token)


def read_settings(folder: Path) -> Settings:
    """Read those that exist of six files beside a tokenizer.

    They are tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json, config.json and
    chat_template.jinja. Raises ConfigError naming the file, and the field where there is one.
    """
    config = _optional(folder / "tokenizer_config.json")
    special_map = _optional(folder / "special_tokens_map.json")
    generation = _optional(folder / "generation_config.json")
    network = _optional(folder / "config.json")

    def named(key: str) -> str | None:
        for name, source in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
            value = source.get(key)
            if isinstance(value, Mapping):
                value = value.get("content")
            if isinstance(value, str):
                return value
            if value is not None:
                raise ConfigError(f"{folder / name}: {key}: got {value!r}, but it must be a string")
        return None

    def ids(key: str) -> tuple[int, ...]:
        for name, source in (("generation_config.json", generation), ("config.json", network)):
            value = source.get(key)
            if value is None:
                continue
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
                raise ConfigError(f"{folder / name}: {key}: got {value!r}, but it must be an id or a list of ids")
            return tuple(v for v in values if v >= 0)
        return ()

    add_bos = config.get("add_bos_token")
    return Settings(
        bos_token=named("bos_token"),
        eos_token=named("eos_token"),
        bos_id=next(iter(ids("bos_token_id")), None),
        eos_ids=ids("eos_token_id"),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        legacy=config.get("legacy") is True,
        chat_template=_chat_template(folder, config),
        extra={key: text for key in ("pad_token", "unk_token") if (text := named(key)) is not None},
        added=_added_tokens(folder, config),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the entry in tokenizer_config.json. Of several named templates, "default" counts."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read as text ({error})") from error
    value = _field(config)
    if value is not None and not isinstance(value, str):
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: chat_template: got a {type(value).__name__}, "
            "but it must be a string or a list of named templates"
        )
    return value


def _field(config: Mapping[str, Any]) -> Any:
    value = config.get("chat_template")
    if isinstance(value, list):
        return {t.get("name"): t.get("template") for t in value if isinstance(t, Mapping)}.get("default")
    return value


def files_with_template(source: str, files: Iterable[Path]) -> dict[str, str]:
    """The files that make `source` the chat template of a folder with a tokenizer's `files`: name -> text.

    They replace files of their names. Older readers look into JSON files, so a template there gives way too.
    """
    texts = {TEMPLATE_FILE: source}
    for file in files:
        if file.name in ("tokenizer_config.json", "chat_template.json"):
            config = read_json(file)
            if "chat_template" in config and _field(config) != source:
                config["chat_template"] = source
                texts[file.name] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return texts


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    added: dict[str, tuple[int, bool]] = {}
    for content, number in _optional(folder / "added_tokens.json").items():
        if not isinstance(number, int):
            raise ConfigError(f"{folder / 'added_tokens.json'}: {content}: got {number!r}, but it must be an id")
        added[content] = (number, True)
    listed = config.get("added_tokens_decoder") or {}
    try:
        for number, token in listed.items():
            added[token["content"]] = (int(number), bool(token.get("special", False)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder: it must map ids to objects with content"
        ) from error
    return added
