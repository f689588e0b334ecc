"""Quantised weights in files: read as what they mean or as they lie, and made out of dense ones.

A quantised folder holds, where a weight would be, the tensors that it is made of: `<canonical name>.data`, `.scale`
and, of int4, `.zero`, of nf4-dq `.nested` and `.offset`. Readers get one lazy tensor for them, so that whatever takes
dense tensors takes these too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.copying import copy_dense
from accessory.checkpoint.lazy import Computed, Constant, Lazy
from accessory.config import read_json
from accessory.errors import ConfigError
from accessory.formats import GROUP, Format, Quant
from accessory.limits import QUANTIZED_AT_ONCE_GPU
from accessory.ops.quantized import PIECES, Packed, dequantize, double_quantized, packed_shapes, quantize
from accessory.ops.quantized_search import search_int4

VERSION = 1
# Numbers of a weight that are quantised at a time: what a CPU's cache holds, and enough to keep a GPU busy.
BLOCK_CPU = 2**20


class Quantized(Lazy):
    """A weight that lies quantised: to readers it is what its numbers mean, in `dtype`. `pieces` are its tensors.

    Cuts along the reduction that go through a group read the whole group.
    """

    def __init__(self, format: Format, pieces: Mapping[str, Lazy], dtype: torch.dtype) -> None:
        # `Packed` knows how each format is cut; lazy tensors are cut as tensors are.
        lazies: dict[str, Any] = dict(pieces)
        self.packed: Any = Packed(format, **lazies)
        self.format, self.dtype = format, dtype
        self.shape = tuple(self.packed.shape)

    @property
    def pieces(self) -> dict[str, Lazy]:
        return self.packed.tensors()

    @property
    def stored_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces.values())

    def load(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(out)
        return out

    def copy_pieces_to(self, packed: Packed) -> None:
        """Write the tensors it is made of into those of a weight of the same format, as they are."""
        for name, tensor in packed.tensors().items():
            self.pieces[name].copy_to(tensor)

    def _copy_to(self, dst: Tensor) -> None:
        step = max(1, BLOCK_CPU // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            rows = self.packed.narrow(0, start, min(step, self.shape[0] - start))
            loaded = rows.map(lambda piece: piece.load())
            copy_dense(dst.narrow(0, start, rows.shape[0]), dequantize(loaded, self.dtype))

    def _narrow(self, dim: int, start: int, length: int) -> Lazy:
        group = GROUP.get(self.format, 1) if dim == 1 else 1
        first, last = start // group * group, -(-(start + length) // group) * group
        if (first, last) == (start, start + length):
            return Quantized(self.format, self._cut(dim, start, length), self.dtype)
        return Lazy._narrow(self.narrow(dim, first, last - first), dim, start - first, length)

    def _cut(self, dim: int, start: int, length: int) -> dict[str, Lazy]:
        """The pieces of a cut at whole groups."""
        pieces = self.pieces
        if dim == 0 or "nested" not in pieces:
            return self.packed.narrow(dim, start, length).tensors()
        # A lazy tensor can be cut but not picked from; this one is a two thousandth of the weight.
        nested, columns = pieces.pop("nested"), self.packed.columns_of_nested(start, length)
        picked = Computed((self.shape[0], len(columns)), nested.dtype, lambda: nested.load()[:, columns])
        rest = Packed("nf4", pieces["data"], pieces["scale"]).narrow(1, start, length)  # type: ignore[arg-type]
        return {"data": rest.data, "scale": rest.scale, "nested": picked, "offset": pieces["offset"]}  # type: ignore[dict-item]


class Quantizing(Lazy):
    """A dense weight on its way into a quantised folder: `blocks_of_rows` reads and quantises it once, row by row."""

    def __init__(
        self,
        base: Lazy,
        format: Format,
        dtype: torch.dtype,
        search: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.base, self.format, self.dtype, self.shape = base, format, dtype, base.shape
        self.search, self.device = search, device

    def blocks_of_rows(self) -> Iterator[Quantized]:
        for packed in quantized_blocks(self.base, self.format, self.device, self.search):
            yield Quantized(self.format, {n: Constant(t.cpu()) for n, t in packed.tensors().items()}, self.dtype)

    def load(self) -> Tensor:
        return torch.cat([block.load() for block in self.blocks_of_rows()])

    @property
    def pieces(self) -> dict[str, Lazy]:
        """What there will be, without the numbers."""
        shapes = packed_shapes(self.format, self.shape)
        return {n: Constant(torch.empty(size, dtype=dtype, device="meta")) for n, (size, dtype) in shapes.items()}


def quantized_blocks(
    tensor: Lazy, format: Format, device: torch.device | str = "cpu", search: bool = False
) -> Iterator[Packed]:
    """A dense weight quantised on `device`, some rows at a time: of what comes from a file, no more is held.

    nf4-dq comes in one piece, as its scales' mean is over all of them; no more than that and some rows is held.
    """
    if format == "nf4-dq":
        blocks = [block.tensors() for block in quantized_blocks(tensor, "nf4", device)]
        yield double_quantized(
            Packed("nf4", **{name: torch.cat([block[name] for block in blocks]) for name in blocks[0]})
        )
        return
    on_cpu = torch.device(device).type == "cpu"
    rows, columns = tensor.shape
    step = max(1, (BLOCK_CPU if on_cpu else QUANTIZED_AT_ONCE_GPU) // max(1, columns))
    if not tensor.piecewise:
        tensor, step = Constant(tensor.load()), step if on_cpu else max(1, rows)
    for start in range(0, rows, step):
        block = tensor.narrow(0, start, min(step, rows - start))
        values = torch.empty(block.shape, dtype=block.dtype, device=device)
        block.copy_to(values)
        yield search_int4(values) if search and format == "int4" else quantize(values, format)


def declared_quant(folder: Path) -> Quant | None:
    """What the folder's own config.json says about quantised weights; None where it says nothing (in our words).

    ConfigError for a later version of the format, and for formats that are not known.
    """
    config = folder / "config.json"
    said = read_json(config).get("quantization") if config.is_file() else None
    if not isinstance(said, dict) or "format_version" not in said:
        return None
    values = dict(said)
    version = values.pop("format_version")
    if version != VERSION:
        raise ConfigError(
            f"config.json: quantization.format_version: got {version!r}, but only {VERSION} is known here"
        )
    try:
        return Quant.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"config.json: {error}") from error


def declaration(quant: Quant) -> dict[str, Any]:
    """What goes into config.json as "quantization"."""
    return {"format_version": VERSION, **quant.to_dict()}


def is_quantized_piece(name: str) -> bool:
    """Whether a raw tensor's name is that of a quantised weight's piece."""
    weight, _, piece = name.rpartition(".")
    return piece in PIECES and weight.endswith(".weight") and weight.startswith(("layers.", "output."))


def read_quantized(raw: Mapping[str, Lazy], quant: Quant, problems: list[str]) -> dict[str, Lazy]:
    """Canonical tensors out of a quantised folder's, where `quant` says which weights lie in which format.

    What they mean is given in the dtype of the embedding, which is never quantised.
    """
    out = {name: tensor for name, tensor in raw.items() if not is_quantized_piece(name)}
    weights: dict[str, dict[str, Lazy]] = {}
    for name, tensor in raw.items():
        if name not in out:
            weight, _, piece = name.rpartition(".")
            weights.setdefault(weight, {})[piece] = tensor
    for name in out:
        if quant.format_of(name) is not None:
            problems.append(f"{name}: is not quantised, but config.json says {quant.format_of(name)}")
    dtype = out["tok_embeddings.weight"].dtype if "tok_embeddings.weight" in out else torch.bfloat16
    for weight, pieces in weights.items():
        format = quant.format_of(weight)
        problem = _problem(weight, pieces, format)
        if problem is not None:
            problems.append(problem)
        else:
            assert format is not None  # or there was a problem
            out[weight] = Quantized(format, pieces, dtype)
    return out


def _problem(weight: str, pieces: Mapping[str, Lazy], format: Format | None) -> str | None:
    """What is wrong with the pieces of one weight."""
    if format is None:
        return f"{weight}: is quantised, but config.json says that it is not"
    data = pieces.get("data")
    if data is None or len(data.shape) != 2:
        what = "missing, though its other pieces are there" if data is None else f"{data.shape} is no matrix"
        return f"{weight}.data: {what}"
    try:
        wanted = packed_shapes(format, (data.shape[0], data.shape[1] * (2 if format in GROUP else 1)))
    except ConfigError:
        return f"{weight}.data: rows of {data.shape[1]} bytes are no whole groups of {format}"
    for piece, (shape, dtype) in wanted.items():
        found = pieces.get(piece)
        if found is None:
            return f"{weight}.{piece}: missing, though {weight}.data is there"
        if found.shape != shape or found.dtype != dtype:
            text = f"{weight}.{piece}: is {found.shape} {found.dtype}, but {format} wants {shape} {dtype}"
            return text.replace("torch.", "")
    extra = sorted(pieces.keys() - wanted.keys())
    return f"{weight}.{extra[0]}: {format} has no such piece" if extra else None
