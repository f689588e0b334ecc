"""Quantised weights in files: read them dequantised or as stored, and make them from dense weights.

A quantised folder stores a weight as several tensors: `<canonical name>.data` and `.scale`, for int4 also `.zero`, for
nf4-dq also `.nested` and `.offset`. Readers get one lazy tensor for them, so code for dense tensors takes these too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.copying import copy_dense
from accessory.checkpoint.lazy import Computed, Constant, Lazy
from accessory.checkpoint.quantized_names import is_quantized_piece
from accessory.errors import ConfigError
from accessory.formats import GROUP, Format, Quant
from accessory.limits import QUANTIZED_AT_ONCE_GPU
from accessory.ops.quantized import Packed, dequantize, double_quantized, packed_shapes, quantize
from accessory.ops.quantized_search import search_int4

# Numbers of a weight that a CPU quantises or dequantises at a time: as many as its cache holds.
BLOCK_CPU = 2**20


class Quantized(Lazy):
    """A weight that is stored quantised. Reading gives dequantised values in `dtype`; `pieces` are its stored tensors.

    A cut of columns that begins or ends inside a group reads the whole group.
    """

    def __init__(self, format: Format, pieces: Mapping[str, Lazy], dtype: torch.dtype) -> None:
        # `Packed` knows how to cut each format, and lazy tensors have the methods of tensors that it calls.
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
        """Copy the stored tensors, unchanged, into those of `packed`, a weight of the same format."""
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
        """The pieces of a part that begins and ends at whole groups."""
        pieces = self.pieces
        if dim == 0 or "nested" not in pieces:
            return self.packed.narrow(dim, start, length).tensors()
        # A lazy tensor cannot pick columns, so all of `nested` is loaded; it is 1/2000 of the weight.
        nested, columns = pieces.pop("nested"), self.packed.columns_of_nested(start, length)
        picked = Computed((self.shape[0], len(columns)), nested.dtype, lambda: nested.load()[:, columns])
        rest = Packed("nf4", pieces["data"], pieces["scale"]).narrow(1, start, length)  # type: ignore[arg-type]
        return {"data": rest.data, "scale": rest.scale, "nested": picked, "offset": pieces["offset"]}  # type: ignore[dict-item]


class Quantizing(Lazy):
    """A dense weight to be written quantised: `blocks_of_rows` reads and quantises it once, some rows at a time."""

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
        """The tensors to be written, as meta tensors: they have shapes and dtypes but no values."""
        shapes = packed_shapes(self.format, self.shape)
        return {n: Constant(torch.empty(size, dtype=dtype, device="meta")) for n, (size, dtype) in shapes.items()}


def quantized_blocks(
    tensor: Lazy, format: Format, device: torch.device | str = "cpu", search: bool = False
) -> Iterator[Packed]:
    """Quantise a dense weight on `device`, and yield it some rows at a time.

    Of a weight in a file, only these rows are in memory. nf4-dq is yielded in one block, because it needs the mean of
    all scales; memory then holds the quantised weight and some dense rows.
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


def read_quantized(raw: Mapping[str, Lazy], quant: Quant, problems: list[str]) -> dict[str, Lazy]:
    """Assemble canonical tensors from those of a quantised folder; `quant` gives each weight's format.

    Dequantised values have the dtype of the embedding, which is never quantised. What is wrong goes into `problems`.
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
    """What is wrong with the pieces of one weight; None if nothing is."""
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
