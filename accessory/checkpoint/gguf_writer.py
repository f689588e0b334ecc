"""Plan a mixture as one GGUF file, with the names, metadata and types that llama.cpp's own converter writes.

Norms and routers are fp32; all other tensors have one type. q and k rows lie interleaved in GGUF, as they do here, so
they are written as they are. The `gguf` package writes the header and rounds to Q8_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.gguf import PLAIN, ROPE_FACTORS, is_kept_plain, llama3_scaling, spelling
from accessory.checkpoint.gguf_header import read_header
from accessory.checkpoint.lazy import Constant, Lazy
from accessory.checkpoint.writers import FilePlan, FolderPlan, Slot, refuse_companions
from accessory.config import ModelArgs
from accessory.errors import CheckpointError, ConfigError, MissingExtraError
from accessory.ops.rope import rope_frequencies
from accessory.parallel.sharding import expert_of

FILE_NAME = "model.gguf"  # in a folder
ROUNDED = (*PLAIN, "Q8_0")  # the types to which we can round
_KINDS = {dtype: kind for kind, dtype in PLAIN.items()} | {torch.uint8: "Q8_0"}
_FILE_TYPES = {"F16": 1, "BF16": 32, "Q8_0": 7}  # llama.cpp's numbers of what most tensors of a file are
_Q8_NUMBERS, _Q8_BYTES = 32, 34  # in a block
_ROUNDED_AT_ONCE = 2**18  # bytes of the source; intermediate values take some ten times as many
_ALIGNMENT = 32
_YARN = {"factor", "rope_type", "original_max_position_embeddings", "beta_fast", "beta_slow"}


def check_gguf() -> None:
    """Raise MissingExtraError without the gguf package."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("to: writing gguf needs gguf: pip install 'mixtral-accessory[gguf]'") from error


def plan_gguf(
    file_name: str, tensors: Mapping[str, Lazy], args: ModelArgs, kind: str, metadata: Mapping[str, Any]
) -> tuple[FolderPlan, dict[str, Lazy]]:
    """Plan a file of the canonical `tensors`, all matrices but routers of type `kind`: "F16", "BF16" or "Q8_0".

    `metadata` is added to what the network's sizes tell. Returns the plan, and `tensors` with what the file has beyond
    them. Raises CheckpointError for tensors that GGUF has no place for, and ConfigError for sizes or a rotary scaling
    that it cannot express.
    """
    refuse_companions("gguf", tensors)
    factors = _rope_factors(args)
    if factors is not None:
        tensors = {**tensors, ROPE_FACTORS: Constant(factors)}
    file = FilePlan(file_name)
    for name, tensor in tensors.items():
        stored = "F32" if len(tensor.shape) == 1 or is_kept_plain(name) else kind
        if stored == "Q8_0" and tensor.shape[-1] % _Q8_NUMBERS:
            raise ConfigError(
                f"type: q8_0 scales {_Q8_NUMBERS} numbers together, and {name} has rows of {tensor.shape[-1]}; "
                "give f16 or bf16"
            )
        cut = partial(_as_stored, kind=stored)
        part = cut(tensor)
        if expert_of(name) is None:
            theirs = name if name == ROPE_FACTORS else spelling(name)
            file.slots[theirs] = Slot(part.shape, part.dtype, [(name, cut)])
            continue
        slot = file.slots.setdefault(spelling(name), Slot((0, *part.shape), part.dtype, []))
        slot.parts.append((name, cut))
        slot.shape = (slot.shape[0] + 1, *part.shape)
    file.lay_out = partial(_lay_out, metadata={**_metadata(args, kind), **metadata})
    return FolderPlan([file], {}), dict(tensors)


def rounded(tensors: Mapping[str, Lazy], kind: str) -> dict[str, Lazy]:
    """What reading gives back of canonical `tensors` that were written to a file of this kind, one of ROUNDED.

    That is a cast for a plain type. Numbers of Q8_0 are rounded as in the file, and read as bfloat16.
    """
    if kind != "Q8_0":
        return {name: lazy.to(PLAIN[kind]) for name, lazy in tensors.items()}

    def is_kept(name: str, lazy: Lazy) -> bool:  # or too misshapen for blocks, which is told elsewhere
        return len(lazy.shape) != 2 or is_kept_plain(name) or lazy.shape[-1] % _Q8_NUMBERS != 0

    return {name: lazy.to(torch.bfloat16) if is_kept(name, lazy) else _Rounded(lazy) for name, lazy in tensors.items()}


def _as_stored(lazy: Lazy, kind: str) -> Lazy:
    return _Q8Blocks(lazy) if kind == "Q8_0" else lazy.to(PLAIN[kind])


class _Computed(Lazy):
    """A matrix that is computed of another one, block by block in row-major order."""

    piecewise = False

    def __init__(self, base: Lazy) -> None:
        self.base = base

    def load(self) -> Tensor:
        return torch.cat([block.clone() for block in self.blocks()]).view(self.shape)

    def _q8(self) -> Iterator[Any]:
        """Blocks of Q8_0, uint8 (1, bytes). Rows are whole blocks, so cutting anywhere between blocks changes nothing.

        The package takes 16 rows at a time, so long rows are quicker.
        """
        from gguf import GGMLQuantizationType, quants

        for block in self.base.blocks(_ROUNDED_AT_ONCE):
            yield quants.quantize(block.float().view(1, -1).numpy(), GGMLQuantizationType.Q8_0)


class _Q8Blocks(_Computed):
    """A matrix (rows, columns) as bytes of Q8_0, uint8 (rows, columns / 32 · 34)."""

    def __init__(self, base: Lazy) -> None:
        super().__init__(base)
        self.dtype = torch.uint8
        self.shape = (*base.shape[:-1], base.shape[-1] // _Q8_NUMBERS * _Q8_BYTES)

    def blocks(self, block_bytes: int = 0) -> Iterator[Tensor]:
        for blocks in self._q8():
            yield torch.from_numpy(blocks).view(-1)


class _Rounded(_Computed):
    """A matrix rounded to Q8_0, as bfloat16."""

    def __init__(self, base: Lazy) -> None:
        super().__init__(base)
        self.dtype, self.shape = torch.bfloat16, base.shape

    def blocks(self, block_bytes: int = 0) -> Iterator[Tensor]:
        from gguf import GGMLQuantizationType, quants

        for blocks in self._q8():
            yield torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType.Q8_0)).view(-1).to(self.dtype)


def _metadata(args: ModelArgs, kind: str) -> dict[str, Any]:
    from gguf import GGML_QUANT_VERSION

    return {
        "general.type": "model",
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": GGML_QUANT_VERSION,
        "llama.vocab_size": args.vocab_size,
        "llama.context_length": args.max_seq_len,
        "llama.embedding_length": args.dim,
        "llama.block_count": args.n_layers,
        "llama.feed_forward_length": args.hidden_dim,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.n_kv_heads,
        "llama.attention.key_length": args.head_dim,
        "llama.attention.value_length": args.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(args.norm_eps),
        "llama.rope.dimension_count": args.head_dim,
        "llama.rope.freq_base": float(args.rope_theta),
        "llama.expert_count": args.moe.num_experts,
        "llama.expert_used_count": args.moe.num_experts_per_tok,
        **_rope_metadata(args),
    }


def _rope_factors(args: ModelArgs) -> Tensor | None:
    """The divisor of each frequency (head_dim / 2,) with Llama 3's scaling, which GGUF stores as a tensor."""
    if args.rope_scaling is None or args.rope_scaling["rope_type"] != "llama3":
        return None
    plain, _ = rope_frequencies(args.head_dim, args.rope_theta)
    scaled, _ = rope_frequencies(args.head_dim, args.rope_theta, args.rope_scaling)
    factors = plain / scaled
    try:
        llama3_scaling(factors, args.rope_theta, Path("gguf"))  # what cannot be read again is not written
    except CheckpointError as error:
        raise ConfigError(f"rope_scaling: got {dict(args.rope_scaling)}, but {error}") from error
    return factors


def _rope_metadata(args: ModelArgs) -> dict[str, Any]:
    scaling = args.rope_scaling
    if scaling is None or scaling["rope_type"] == "llama3":
        return {}
    kind, begin = scaling["rope_type"], "llama.rope.scaling."
    out: dict[str, Any] = {begin + "type": kind, begin + "factor": float(scaling["factor"])}
    if kind == "linear":
        return out
    given = {key for key, value in scaling.items() if value is not None}
    if beyond := given - _YARN:
        raise ConfigError(f"rope_scaling: {sorted(beyond)[0]}: GGUF cannot say it; it knows {', '.join(sorted(_YARN))}")
    out[begin + "original_context_length"] = int(scaling.get("original_max_position_embeddings") or args.max_seq_len)
    betas = {key: float(scaling[key]) for key in ("beta_fast", "beta_slow") if scaling.get(key)}
    return out | {f"{begin}yarn_{key}": value for key, value in betas.items()}


def _lay_out(path: Path, file: FilePlan, metadata: Mapping[str, Any]) -> dict[str, int]:
    """Create the file in full size, with everything but tensor data; return the byte where each tensor begins."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    add: dict[type, Callable[[str, Any], None]]
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    size = 0
    for name, slot in file.slots.items():
        kind = gguf.GGMLQuantizationType[_KINDS[slot.dtype]]
        nbytes = math.prod(slot.shape) * slot.dtype.itemsize
        # Shapes of quantised tensors are given in bytes, and uint8 tells the writer so.
        like = np.dtype(np.uint8 if slot.dtype == torch.uint8 else np.float32)
        writer.add_tensor_info(name, slot.shape, like, nbytes, raw_dtype=kind)
        size += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as handle:
        begin = -(-handle.seek(0, 2) // _ALIGNMENT) * _ALIGNMENT
        handle.truncate(begin + size)
    return {name: entry.start for name, entry in read_header(path).entries.items()}
