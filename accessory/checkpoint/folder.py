"""Open a checkpoint folder of any layout: its configuration, and its lazy tensors under canonical names."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.checkpoint.atomic import MARKER
from accessory.checkpoint.hub import resolve
from accessory.checkpoint.layouts import Layout, mixed_shards, read_shards, read_single, recognise
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.names import (
    configure,
    expected_shapes,
    field_problems,
    image_shapes,
    is_encoder_tensor,
    shape_problem,
)
from accessory.checkpoint.quantized_names import declared_quant
from accessory.checkpoint.rotary import rotary_from_hf
from accessory.checkpoint.trained_on import Adapter, TrainedOn, adapter_of, read_trained_on
from accessory.checkpoint.weight_files import WeightFiles, find_gguf, find_resources, find_weights
from accessory.config import Implementation, LlamaType, ModelArgs, read_json
from accessory.errors import AccessoryError, CheckpointError, ConfigError, listed
from accessory.formats import Quant

if TYPE_CHECKING:
    import torch

    from accessory.checkpoint.gguf import GGUF

log = logging.getLogger(__name__)

UNFINISHED = "unfinished: whatever was writing this folder has not ended, or not well; run it again"
IS_GGUF = "is a GGUF file; write it in another layout first: accessory convert {path} DST --to base"
_LISTED = 3  # how many problems or names one message spells out


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened folder. `tensors` maps canonical names to whole, unsharded lazy tensors (q and k rows interleaved).

    In a quantised folder, the weights that `quant` names are `packed.Quantized`: they give dequantised values, and the
    stored tensors as `pieces`.
    """

    path: Path
    layout: Layout
    args: ModelArgs
    llama_type: LlamaType  # what meta.json says; otherwise the layout's implementation, sparse for foreign layouts
    tensors: dict[str, Lazy]
    files: list[Path]  # the files that hold tensors
    resources: list[Path] = field(default_factory=list)  # tokenizer files and the like
    shards: int = 1  # model-parallel shards; 1 for layouts that have none
    partial: bool = False  # tensors are missing, as in a save of the trained tensors only
    quant: Quant | None = None  # the formats of a quantised folder
    name: str = ""  # the path or hf:// address as it was given
    trained_on: TrainedOn | None = None  # of an adapter that says so
    gguf: GGUF | None = None  # the file, if it is one

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def vision(self) -> dict[str, Lazy]:
        """The tensors of image encoders among `tensors`, under the names they have in their file."""
        return {name: tensor for name, tensor in self.tensors.items() if is_encoder_tensor(name)}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most bytes have."""
        import torch

        return getattr(torch, self.dtype_name)

    @property
    def dtype_name(self) -> str:
        """torch's name of `dtype`, told without torch."""
        count: Counter[str] = Counter()
        for tensor in self.tensors.values():
            count[tensor.dtype_name] += tensor.nbytes
        return max(count, key=lambda name: count[name]) if count else "float32"

    def warn_of_dequantizing(self) -> None:
        """Warn, if this folder is quantised, that a dense layout written from it holds dequantised values."""
        if self.gguf is not None and self.gguf.quantized:
            log.warning("%s is %s: written is what its numbers mean, %s", self.path, self.gguf.kind, self.dtype_name)
        if self.quant is not None:
            kind = self.tensors["tok_embeddings.weight"].dtype_name
            log.warning("%s is quantised (%s): written is what its numbers mean, %s", self.path, self.quant, kind)


@dataclass
class Survey:
    """What a folder was found to hold, whole or not. `checkpoint` is None if its layout or configuration is unclear."""

    path: Path
    weights: WeightFiles
    name: str = ""
    layout: Layout | None = None
    llama_type: LlamaType | None = None
    args: ModelArgs | None = None
    quant: Quant | None = None
    trained_on: TrainedOn | None = None
    adapter: Adapter | None = None  # if the folder is one, and no whole model
    checkpoint: Checkpoint | None = None
    missing: list[str] = field(default_factory=list)
    problems: list[AccessoryError] = field(default_factory=list)

    @property
    def unfinished(self) -> bool:
        return (self.path / MARKER).exists()

    def raise_problems(self) -> None:
        if not self.problems:
            return
        text = listed(map(str, self.problems), _LISTED, between="; ")
        raise type(self.problems[0])(f"{self.path}: {text}")


def open_checkpoint(
    path: str | Path,
    config_files: Sequence[str | Path] = (),
    *,
    allow_partial: bool = False,
    allow_gguf: bool = False,
) -> Checkpoint:
    """Recognise the layout of a folder (or hf:// address) and open it.

    The only tensor data it reads are small norms and routers of sharded layouts. `config_files` take precedence over
    the folder's config.json, and config.json over params.json; later `config_files` override earlier ones. A folder
    that lacks tensors (a save of trained tensors) opens only with `allow_partial` and is then `partial`. A folder that
    is being written, or that a killed writer left, does not open. A GGUF file, or a folder with one, opens only with
    `allow_gguf`: its tokenizer lies in no file, so most commands cannot use it.
    Raises CheckpointError or ConfigError naming the file, field or tensor that is missing, broken or contradictory.
    """
    survey = survey_folder(path, config_files, allow_partial=allow_partial)
    if survey.layout == "gguf" and not allow_gguf:
        raise CheckpointError(f"{survey.path}: {IS_GGUF.format(path=survey.path)}")
    if survey.unfinished:
        raise CheckpointError(f"{survey.path}: {UNFINISHED}")
    survey.raise_problems()
    assert survey.checkpoint is not None  # or there was a problem
    return survey.checkpoint


def survey_folder(
    path: str | Path, config_files: Sequence[str | Path] = (), *, allow_partial: bool = False, thorough: bool = False
) -> Survey:
    """Read all headers of a folder and collect every problem instead of raising the first one.

    `thorough` also compares all tensors that shards have in common. CheckpointError only if there is nothing to survey:
    no folder, or no weight files in it.
    """
    folder = Path(resolve(path))
    if (gguf := find_gguf(folder)) is not None:
        return _survey_gguf(gguf, str(path), config_files)
    if not folder.is_dir():
        what = "is a file; give the folder that holds it" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {what}")
    survey = Survey(folder, find_weights(folder), str(path))
    raw = survey.weights.read()
    survey.problems += map(CheckpointError, survey.weights.problems)
    readable = {file: tensors for file, tensors in raw.items() if tensors is not None}
    names = [name for tensors in readable.values() for name in tensors]
    survey.layout = recognise(names, survey.weights.sharded) if names else None
    if survey.layout is None:
        if not survey.problems:
            survey.problems.append(
                CheckpointError(f"no tensor of a Mixtral in {', '.join(raw)}; it holds {listed(names, _LISTED)}")
            )
        return survey
    found: list[str] = []
    if survey.weights.sharded:
        implementation: Implementation = "sparse" if survey.layout == "sparse" else "base"
        tensors = read_shards(implementation, list(raw.items()), found)
        mixed = mixed_shards(implementation, list(raw.items()), thorough=thorough)
        if mixed:
            found.insert(0, mixed)
    else:
        tensors = read_single(survey.layout, readable, found)
        try:
            tensors = _put_together(survey, tensors, found)
        except ConfigError as error:
            survey.problems.append(error)
            return survey
    survey.problems += map(CheckpointError, found)
    _configure(survey, tensors, config_files, allow_partial)
    return survey


def _survey_gguf(path: Path, name: str, config_files: Sequence[str | Path]) -> Survey:
    from accessory.checkpoint.gguf import read_gguf  # torch's

    survey = Survey(path, WeightFiles({path.name: path}), name, "gguf", LlamaType("sparse"))
    if config_files:
        survey.problems.append(ConfigError("config: a GGUF file has its own configuration; leave --config out"))
        return survey
    try:
        found = read_gguf(path)
    except (CheckpointError, ConfigError) as error:
        survey.problems.append(type(error)(str(error).removeprefix(f"{path}: ")))
        return survey
    args = survey.args = found.args
    layers, experts, count = args.n_layers, args.moe.num_experts, len(found.tensors)
    if not found.mixture:
        problem = "a dense network; make a mixture of it with `accessory upcycle`"
    elif layers * experts > count:  # before a damaged number makes us list millions of names
        problem = f"the metadata say {layers} layers of {experts} experts, which {count} tensors are not"
    else:
        problem = ""
    if problem:
        survey.problems.append(CheckpointError(problem))
        return survey
    expected = expected_shapes(args)
    wrong = [shape_problem(name, tensor, expected) for name, tensor in found.tensors.items()]
    survey.problems += [CheckpointError(p) for p in wrong if p]
    survey.missing = [name for name in expected if name not in found.tensors]
    if survey.missing:
        missing = f"{listed(survey.missing, _LISTED)} ({len(survey.missing)} of {len(expected)})"
        survey.problems.append(CheckpointError(f"missing tensors: {missing}"))
    survey.checkpoint = Checkpoint(
        path=path,
        layout="gguf",
        args=args,
        llama_type=LlamaType("sparse"),
        tensors={name: found.tensors[name] for name in expected if name in found.tensors},
        files=[path],
        partial=bool(survey.missing),
        name=name,
        gguf=found,
    )
    return survey


def _put_together(survey: Survey, tensors: dict[str, Lazy], problems: list[str]) -> dict[str, Lazy]:
    """Assemble the pieces of quantised weights into weights, in the formats that config.json says.

    ConfigError if there are pieces but config.json has no formats.
    """
    if survey.layout not in ("official", "quantized"):
        return tensors
    survey.quant = declared_quant(survey.path)
    if survey.quant is not None:
        from accessory.checkpoint.packed import read_quantized  # torch's: it assembles packed weights

        survey.layout = "quantized"
        return read_quantized(tensors, survey.quant, problems)
    if survey.layout == "quantized":
        raise ConfigError('config.json: has no "quantization", so nothing says in what formats these weights lie')
    return tensors


def _configure(
    survey: Survey, tensors: dict[str, Lazy], config_files: Sequence[str | Path], allow_partial: bool
) -> None:
    """Set the survey's llama_type, args and checkpoint, and check the tensors against the configuration."""
    folder, layout = survey.path, survey.layout
    assert layout is not None
    try:
        survey.llama_type = _llama_type(folder, layout)
        survey.trained_on = read_trained_on(folder)
        sources = _config_sources(folder, config_files)
        origin = ", ".join(name for name, _ in reversed(sources)) or "the tensors' shapes"
        contents = [content for _, content in sources]
        args = survey.args = configure(contents, tensors, origin=origin, partial=allow_partial)
    except ConfigError as error:
        survey.problems.append(error)
        return
    disagreements = field_problems(args, tensors, origin)
    tied = layout == "hf" and any(content.get("tie_word_embeddings") for content in contents)
    if tied and "tok_embeddings.weight" in tensors:
        tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    expected = expected_shapes(args)
    if any(name in tensors for name in ("start_img", "visual_proj.0.weight")):
        expected |= image_shapes(args)  # if none of these is there, loading with images reports it
    elif not survey.llama_type.image_views:
        survey.problems += [
            CheckpointError(f"unexpected tensor {name} {tensors[name].shape}")
            for name in tensors
            if is_encoder_tensor(name)
        ][:_LISTED]
    if disagreements:
        survey.problems += map(ConfigError, disagreements)
    else:
        wrong = [shape_problem(name, tensor, expected) for name, tensor in tensors.items()]
        survey.problems += [CheckpointError(p) for p in wrong if p]
    if layout == "hf":
        _interleave(tensors, args, survey.problems)
    odd = [f"{n} {t.dtype_name}" for n, t in tensors.items() if "float" not in t.dtype_name]
    odd += [f"{n} {t.dtype_name}" for n, t in tensors.items() if "float8" in t.dtype_name]
    if odd:
        survey.problems.append(CheckpointError(f"quantised tensors cannot be read here: {listed(odd, _LISTED)}"))
    survey.missing = [name for name in expected if name not in tensors]
    if survey.missing:
        survey.adapter = adapter_of(folder, tensors, survey.trained_on)
    if survey.adapter is not None and not allow_partial and not survey.problems:
        survey.problems.append(CheckpointError(survey.adapter.alone()))
    elif survey.missing and not allow_partial and not survey.problems:
        survey.problems.append(
            CheckpointError(
                f"missing tensors: {listed(survey.missing, _LISTED)} ({len(survey.missing)} of {len(expected)})"
            )
        )
    ordered = {name: tensors[name] for name in expected if name in tensors}
    ordered.update({name: tensor for name, tensor in tensors.items() if name not in ordered})
    survey.checkpoint = Checkpoint(
        path=folder,
        layout=layout,
        args=args,
        llama_type=survey.llama_type,
        tensors=ordered,
        files=survey.weights.present,
        resources=find_resources(folder),
        shards=len(survey.weights.paths) if survey.weights.sharded else 1,
        partial=bool(survey.missing),
        quant=survey.quant,
        name=survey.name,
        trained_on=survey.trained_on,
    )


def _llama_type(folder: Path, layout: Layout) -> LlamaType:
    meta = folder / "meta.json"
    if meta.is_file():
        declared = read_json(meta).get("llama_type")
        if declared is not None:
            try:
                return LlamaType.parse(declared)
            except ConfigError as error:
                raise ConfigError(f"meta.json: {error}") from error
    return LlamaType("base" if layout == "base" else "sparse")


def _config_sources(folder: Path, config_files: Sequence[str | Path]) -> list[tuple[str, Mapping[str, Any]]]:
    """Pairs (name, contents) in order of precedence, the highest last."""
    own = [name for name in ("params.json", "config.json") if (folder / name).is_file()]
    return [(name, read_json(folder / name)) for name in own] + [(str(p), read_json(p)) for p in config_files]


def _interleave(tensors: dict[str, Lazy], args: ModelArgs, problems: list[AccessoryError]) -> None:
    for name, tensor in tensors.items():
        try:
            tensors[name] = rotary_from_hf(name, tensor, args)
        except CheckpointError as error:
            if not problems:  # otherwise the earlier problems explain this one
                problems.append(error)
