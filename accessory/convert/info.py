"""`accessory info`: report what a folder holds, complete or not, from its headers alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accessory.checkpoint.folder import UNFINISHED, Checkpoint, survey_folder
from accessory.checkpoint.trained_on import Adapter
from accessory.config import LlamaType, ModelArgs
from accessory.counts import spell_parameters
from accessory.formats import Quant


@dataclass(frozen=True)
class Info:
    """What a folder holds. `parameters`: (all, used by one token), None without a configuration."""

    path: Path
    layout: str
    llama_type: LlamaType | None
    args: ModelArgs | None
    parameters: tuple[int, int] | None
    nbytes: int  # of the existing weight files
    dtype: str  # of most bytes; for a quantised folder, each format and dtype with its bytes
    shards: int
    files: list[Path]
    resources: list[Path]
    problems: list[str] = field(default_factory=list)  # why it is not `complete`
    quant: Quant | None = None
    encoders: int = 0  # parameters of the image encoders in the folder
    adapter: Adapter | None = None  # if the folder is one, and no whole model

    @property
    def complete(self) -> bool:
        return not self.problems

    def lines(self) -> list[str]:
        out = [f"path            {self.path}", f"layout          {self.layout}"]
        if self.llama_type is not None:
            out.append(f"implementation  {self.llama_type.implementation} (llama_type {self.llama_type})")
        if self.shards > 1:
            out.append(f"shards          {self.shards}")
        if self.adapter is not None:
            out.append(f"adapter         {self.adapter}")
            if self.adapter.trained_on is not None:
                out.append(f"hash            {self.adapter.trained_on.hash} (of its model's norms and routers)")
        elif self.parameters is not None:
            total, active = self.parameters
            out.append(f"parameters      {spell_parameters(total)}, of which a token uses {spell_parameters(active)}")
        if self.quant is not None:
            out.append(f"quantised       {self.quant}")
        if self.args is not None and self.llama_type is not None and self.llama_type.image_views:
            out.append(f"images          {_spell_images(self.args, self.llama_type.image_views, self.encoders)}")
        out.append(f"files           {len(self.files)}, {_spell_bytes(self.nbytes)}, {self.dtype}")
        out.append(f"resources       {', '.join(p.name for p in self.resources) or 'none'}")
        if self.args is not None:
            out.append(f"config          {_spell(self.args)}")
        if self.adapter is None:
            out.append(f"complete        {'yes' if self.complete else 'no'}")
        else:
            out.append(f"use it          {self.adapter.command('generate')}")
            out.append(f"merge it        {self.adapter.command('merge')} DST")
        return out + [f"  problem: {problem}" for problem in self.problems]

    def to_dict(self) -> dict[str, Any]:
        """What `lines` tells, as plain values for JSON. Sizes are in bytes."""
        total, active = (None, None) if self.adapter is not None or self.parameters is None else self.parameters
        return {
            "path": str(self.path),
            "layout": self.layout,
            "llama_type": None if self.llama_type is None else str(self.llama_type),
            "implementation": None if self.llama_type is None else self.llama_type.implementation,
            "shards": self.shards,
            "adapter": None if self.adapter is None else self.adapter.to_dict(),
            "parameters": total,
            "active_parameters": active,
            "quant": None if self.quant is None else self.quant.to_dict(),
            "images": self._images(),
            "files": [path.name for path in self.files],
            "nbytes": self.nbytes,
            "dtype": self.dtype,
            "resources": [path.name for path in self.resources],
            "config": None if self.args is None else self.args.to_dict(),
            "complete": self.complete,
            "problems": self.problems,
        }

    def _images(self) -> dict[str, Any] | None:
        if self.args is None or self.llama_type is None or not self.llama_type.image_views:
            return None
        views, vision = self.llama_type.image_views, self.args.sees_with
        return {
            "positions": vision.image_tokens(views),
            "views": views,
            "pixels": vision.pixels(views),
            "encoders": {encoder.name: encoder.size for encoder in vision.all},
            "encoder_parameters": self.encoders,
        }


def info(path: str | Path) -> Info:
    """Look at a folder (or hf:// address) without reading tensor data.

    Raises CheckpointError only if there is no checkpoint at all; `Info.problems` lists what is missing or wrong.
    """
    survey = survey_folder(path)
    if survey.adapter is not None:  # which lacks most of a model's tensors, and is whole for all that
        survey = survey_folder(path, allow_partial=True)
    checkpoint = survey.checkpoint
    return Info(
        path=survey.path,
        layout=survey.layout or "unknown",
        llama_type=survey.llama_type,
        args=survey.args,
        parameters=survey.args.parameter_counts() if survey.args else None,
        nbytes=sum(p.stat().st_size for p in survey.weights.present),
        dtype=_dtype(checkpoint) if checkpoint else "unknown dtype",
        shards=len(survey.weights.paths) if survey.weights.sharded else 1,
        files=survey.weights.present,
        resources=checkpoint.resources if checkpoint else [],
        problems=[UNFINISHED] * survey.unfinished + [str(p) for p in survey.problems],
        quant=survey.quant,
        encoders=sum(math.prod(t.shape) for t in checkpoint.vision.values()) if checkpoint else 0,
        adapter=survey.adapter,
    )


def _dtype(checkpoint: Checkpoint) -> str:
    if checkpoint.quant is None:
        return checkpoint.dtype_name
    from accessory.checkpoint.packed import Quantized  # here, because it imports torch

    nbytes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if isinstance(tensor, Quantized):
            nbytes[tensor.format] += tensor.stored_bytes
        else:
            nbytes[tensor.dtype_name] += tensor.nbytes
    return ", ".join(f"{kind} {_spell_bytes(size)}" for kind, size in nbytes.most_common())


def _spell_bytes(number: int) -> str:
    """Three digits and a prefix: 93.4 GB."""
    for prefix, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}B"
    return f"{number} B"


def _spell_images(args: ModelArgs, views: int, parameters: int) -> str:
    vision = args.sees_with
    names = ", ".join(f"{e.name} ({e.size} px)" for e in vision.all)
    encoders = (
        f"{spell_parameters(parameters)} parameters of encoders here" if parameters else "weights of encoders elsewhere"
    )
    seen = f"{views} view" + "s" * (views > 1)
    return f"{vision.image_tokens(views)} positions each, {seen} of {vision.pixels(views)} px by {names}; {encoders}"


def _spell(args: ModelArgs) -> str:
    parts = []
    for key, value in args.to_dict().items():
        if key == "vision":
            continue
        if isinstance(value, dict):
            value = "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
        parts.append(f"{key} {value}")
    return ", ".join(parts)
