"""What a model is loaded from and how: the arguments of `MetaModel.from_pretrained`, checked, and the files they name.

`MultiGpuWrapper` checks them in the driver too, so that no rank starts for arguments that cannot work.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from accessory.arguments import check_cache_dtype, check_cache_gb, check_max_seq_len
from accessory.build.adapters import check_adapters
from accessory.build.network import NetworkSpec
from accessory.checkpoint.chain import chained_args, chained_quant, open_chain, open_over
from accessory.checkpoint.hub import resolve
from accessory.config import LlamaType
from accessory.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, tokenizer_of
from accessory.engine.deterministic import check_deterministic
from accessory.errors import ConfigError, InputError
from accessory.formats import Quant
from accessory.launch.gpus import check_device, default_device
from accessory.limits import EXTRAPOLATION
from accessory.model.options import IMAGE_TRANSFORMS, NO_ADAPTER, torch_dtype
from accessory.parallel.sharding import check_ranks

log = logging.getLogger(__name__)

PathLike = str | Path
MAX_SEQ_LEN = 4096  # the default


@dataclass(kw_only=True)
class Loading:
    """The arguments of `MetaModel.from_pretrained`, checked before any file is opened.

    Paths become lists, names of dtypes become dtypes, and a device becomes its name. InputError and ConfigError name
    the argument.
    """

    pretrained_path: Any
    llama_type: str | None = None
    llama_config: Any = None
    tokenizer_path: PathLike | None = None
    with_visual: bool = False
    max_seq_len: int = MAX_SEQ_LEN
    dtype: Any = torch.bfloat16
    device: Any = None
    quant: bool | str = False
    quant_attention: str | None = None
    quant_output: str | None = None
    image_transform: str = IMAGE_TRANSFORMS[0]
    adapters: Any = None
    cache_dtype: Any = None
    cache_gb: Any = None
    deterministic: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        self.pretrained_path = _paths("pretrained_path", self.pretrained_path)
        if not self.pretrained_path:
            raise InputError("pretrained_path: got an empty list, but at least one folder is needed")
        self.llama_config = [] if self.llama_config is None else _paths("llama_config", self.llama_config)
        self.adapters = _named_paths("adapters", self.adapters)
        if self.tokenizer_path is not None:
            _check_path("tokenizer_path", self.tokenizer_path)
        if self.llama_type:
            LlamaType.parse(self.llama_type)
        if not isinstance(self.with_visual, bool):
            raise InputError(f"with_visual: got {self.with_visual!r:.60}, but it must be True or False")
        if self.image_transform not in (*IMAGE_TRANSFORMS, "random_resized_crop"):  # the last one is for training
            known = " or ".join(IMAGE_TRANSFORMS)
            raise InputError(f"image_transform: got {self.image_transform!r:.60}, but it must be {known}")
        check_max_seq_len(self.max_seq_len)
        check_cache_dtype(self.cache_dtype)
        check_cache_gb(self.cache_gb)
        if not isinstance(self.deterministic, bool):
            raise InputError(f"deterministic: got {self.deterministic!r:.60}, but it must be True or False")
        self.dtype = torch_dtype(self.dtype) or torch.bfloat16
        self.device = check_device(self.device, "device")
        if self.deterministic:
            on = torch.device(self.device or default_device())
            check_deterministic(on, self.dtype, self.cache_dtype == "fp8", "deterministic")
        self._quant = Quant.parse(self.quant, self.quant_attention, self.quant_output)

    def fetch(self) -> None:
        """Download what has to be downloaded, so that several ranks do not download it into the same place."""
        self.pretrained_path = [Path(resolve(path)) for path in self.pretrained_path]
        self.adapters = {name: Path(resolve(path)) for name, path in self.adapters.items()}

    def to_dict(self) -> dict[str, Any]:
        """The arguments of `MetaModel.from_pretrained` again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def open(self, ranks: int = 1) -> tuple[NetworkSpec, Tokenizer]:
        """Open the files, without reading weights, and check that they and the arguments fit `ranks` ranks."""
        checkpoints = open_chain(self.pretrained_path, self.llama_config)
        kind = LlamaType.parse(self.llama_type) if self.llama_type else checkpoints[-1].llama_type
        views = max(kind.image_views, 0 if self.llama_type else max(c.llama_type.image_views for c in checkpoints))
        if self.with_visual and not views:
            raise ConfigError(
                f"with_visual: got True, but {kind} takes no images; give llama_type {kind}_ens or {kind}_ens5, or "
                "leave it out"
            )
        own = self.tokenizer_path
        tokenizer = load_tokenizer(own) if own else tokenizer_of([c.path for c in checkpoints])
        args = chained_args(checkpoints)
        spec = NetworkSpec(
            checkpoints=checkpoints,
            args=args,
            implementation=kind.implementation,
            quant=chained_quant(checkpoints, self._quant),
            image_views=views if self.with_visual else 0,
            adapters={
                name: open_over(checkpoints, Path(resolve(path)), self.llama_config)
                for name, path in self.adapters.items()
            },
        )
        check_adapters(spec)
        check_vocabulary(tokenizer, args.vocab_size)
        _check_positions(self.max_seq_len, args.max_seq_len)
        if ranks > 1:
            check_ranks(args, kind.implementation, ranks)
        return spec, tokenizer


def _check_positions(asked: int, made_for: int) -> None:
    """Warn of more positions than the network was made for. InputError where no extrapolation reaches so far."""
    if asked > EXTRAPOLATION * max(made_for, MAX_SEQ_LEN):
        raise InputError(
            f"max_seq_len: got {asked}, but the model is made for {made_for} positions (max_seq_len, or "
            "max_position_embeddings, of its configuration); give at most that, or a llama_config that says more"
        )
    if asked > max(made_for, MAX_SEQ_LEN):
        log.warning("max_seq_len: got %d, but the model is made for %d positions; texts may get worse after those",
                    asked, made_for)  # fmt: skip


def _paths(name: str, given: Any) -> list[PathLike]:
    if isinstance(given, str | os.PathLike):
        given = [given]
    if not isinstance(given, Sequence):
        raise InputError(f"{name}: got {given!r:.60}, but it must be a path, or a list of paths")
    for path in given:
        _check_path(name, path)
    return list(given)


def _named_paths(name: str, given: Any) -> dict[str, PathLike]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InputError(f"{name}: got {given!r:.60}, but it must be a mapping of names to folders")
    for key, path in given.items():
        if not isinstance(key, str) or not key.strip() or key == NO_ADAPTER:
            raise InputError(f"{name}: got the name {key!r:.60}, but it must be a text other than {NO_ADAPTER!r}")
        _check_path(f"{name}: {key}", path)
    return dict(given)


def _check_path(name: str, path: Any) -> None:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise InputError(f"{name}: got {path!r:.60}, but it must be a path")
