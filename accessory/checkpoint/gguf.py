"""GGUF files of Llama, Mistral and Mixtral: their sizes, and tensors that are dequantised when they are read.

The `gguf` package dequantises blocks. Only the requested parts of the mapped file are read. llama.cpp gives all these
networks the architecture "llama"; a mixture's file has `llama.expert_count`, and stacks the experts of a layer.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accessory.checkpoint.copying import copy_dense
from accessory.checkpoint.files import File
from accessory.checkpoint.gguf_header import Entry, GGUFFile, read_header
from accessory.checkpoint.lazy import Lazy, Stored
from accessory.config import ModelArgs, MoEArgs
from accessory.errors import CheckpointError, listed

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")

_DECODE_ELEMENTS = 2**18  # dequantised at once; intermediate values take about ten times as many bytes

_NAMES = {
    "token_embd.weight": "tok_embeddings.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "output.weight",
}
_ATTENTION = {
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
}
_DENSE = {**_ATTENTION, "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3"}
_MIXTURE = {**_ATTENTION, "ffn_gate_inp": "feed_forward.gate"}
_STACKS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}  # (E, rows, columns)
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GGUF:
    """An opened file. `tensors` maps canonical names to lazy tensors: of `accessory.convert.dense` if it is no mixture.

    `kind` is the type that most bytes have.
    """

    path: Path
    args: ModelArgs
    tensors: dict[str, Lazy]
    metadata: Mapping[str, Any]
    mixture: bool
    kind: str

    @property
    def quantized(self) -> bool:
        return self.kind in QUANTIZED


def read_gguf(path: str | Path, dtype: torch.dtype = torch.bfloat16, *, dense: bool = False) -> GGUF:
    """Open the GGUF file of a network of architecture "llama", dense or a mixture; no tensor is read.

    Quantised tensors have dtype `dtype`, plain ones (F32, F16, BF16) their own. q and k rows are already interleaved in
    the file. If there is no output.weight, the embedding is used for it (tied weights). The norms and routers of a
    mixture, which llama.cpp keeps in fp32, have the embedding's dtype.

    Raises CheckpointError for a file that is truncated, or of another kind, architecture or type, or that has tensors
    of no known name, and MissingExtraError without the gguf package. With `dense`, a mixture is a CheckpointError too.
    Missing tensors are the caller's matter.
    """
    file = read_header(Path(path))
    mixture = file.metadata.get("llama.expert_count", 0) > 0
    source = _Source(file.path, mixture)
    factors = file.entries.pop(ROPE_FACTORS, None)
    args = _model_args(file, None if factors is None else _lazy(file, factors, source, torch.float32).load())
    if mixture and dense:
        raise CheckpointError(f"{path}: already a mixture: llama.expert_count is {args.moe.num_experts}")
    tensors: dict[str, Lazy] = {}
    unknown = []
    for name, entry in file.entries.items():
        found = _canonical(entry, args.moe.num_experts if mixture else 0)
        tensors |= {canonical: _lazy(file, part, source, dtype) for canonical, part in found.items()}
        if not found:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{path}: holds tensors that a Mixtral cannot have: {listed(sorted(unknown))}")
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    if mixture:
        plain = tensors["tok_embeddings.weight"].dtype
        tensors = {name: lazy.to(plain) if is_kept_plain(name) else lazy for name, lazy in tensors.items()}
    nbytes: Counter[str] = Counter()
    for entry in file.entries.values():
        nbytes[entry.kind] += entry.nbytes
    return GGUF(file.path, args, tensors, file.metadata, mixture, nbytes.most_common(1)[0][0])


def is_kept_plain(name: str) -> bool:
    """Whether llama.cpp keeps a tensor of this canonical name in fp32, whatever the type of the others."""
    return name.endswith(("norm.weight", "feed_forward.gate.weight"))


class TensorCache:
    """Caches the last computed tensors, up to `limit` bytes: a mixture's writer reads one feed-forward per expert."""

    def __init__(self, limit: int = 256 * 2**20) -> None:
        self.limit = limit
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = Lock()  # so that two threads do not both compute one tensor

    def get(self, key: Hashable, nbytes: int, make: Callable[[], Tensor]) -> Tensor | None:
        """Return the tensor cached under `key`, after making it if needed; None if it is too large for the cache."""
        if nbytes > self.limit:
            return None
        with self._lock:
            if key not in self._kept:
                while self._kept and nbytes + sum(t.nbytes for t in self._kept.values()) > self.limit:
                    self._kept.popitem(last=False)
                self._kept[key] = make()
            self._kept.move_to_end(key)
            return self._kept[key]


class _Source:
    """The mapped file, and a cache of the last dequantised tensors: of a dense network, whose readers repeat them."""

    def __init__(self, path: Path, mixture: bool) -> None:
        self.file = File(path)
        self.cache = TensorCache(0) if mixture else TensorCache()

    def rows(self, entry: Entry) -> np.ndarray:
        """The tensor's bytes, uint8 (rows, bytes of a row), as a view of the mapped file."""
        return self.file.flat(torch.uint8, entry.start, entry.nbytes).view(entry.shape[0], -1).numpy()


class _Dequantized(Lazy):
    """A window of rows and columns of a quantised matrix."""

    def __init__(
        self, source: _Source, entry: Entry, dtype: torch.dtype, rows: range | None = None, cols: range | None = None
    ) -> None:
        self.source, self.entry, self.dtype = source, entry, dtype
        self.rows = range(entry.shape[0]) if rows is None else rows
        self.cols = range(entry.shape[1]) if cols is None else cols
        self.shape = (len(self.rows), len(self.cols))

    def load(self) -> Tensor:
        whole = self._whole()
        if whole is not None:
            return whole[self.rows.start : self.rows.stop, self.cols.start : self.cols.stop]
        out = torch.empty(self.shape, dtype=self.dtype)
        self.decode_into(out)
        return out

    def _copy_to(self, dst: Tensor) -> None:
        if self._whole() is not None:
            copy_dense(dst, self.load())
        else:
            self.decode_into(dst)

    def _whole(self) -> Tensor | None:
        """The whole tensor from the cache; None if it is too large for the cache."""

        def decode() -> Tensor:
            out = torch.empty(self.entry.shape, dtype=self.dtype)
            _Dequantized(self.source, self.entry, self.dtype).decode_into(out)
            return out

        return self.source.cache.get((self.entry.name, self.dtype), self.nbytes_whole, decode)

    @property
    def nbytes_whole(self) -> int:
        return math.prod(self.entry.shape) * self.dtype.itemsize

    def _narrow(self, dim: int, start: int, length: int) -> Lazy:
        cut = (self.rows, self.cols)[dim][start : start + length]
        rows, cols = (cut, self.cols) if dim == 0 else (self.rows, cut)
        return _Dequantized(self.source, self.entry, self.dtype, rows, cols)

    def decode_into(self, dst: Tensor) -> None:
        """Dequantise the blocks that the window touches, some rows at a time."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.entry.kind]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        first, last = self.cols.start // block, -(-self.cols.stop // block)
        skip = self.cols.start - first * block
        data = self.source.rows(self.entry)[:, first * block_bytes : last * block_bytes]
        step = max(1, _DECODE_ELEMENTS // max(1, (last - first) * block))
        for start in range(0, len(self.rows), step):
            rows = self.rows[start : start + step]
            values = torch.from_numpy(dequantize(np.ascontiguousarray(data[rows.start : rows.stop]), kind))
            dst[start : start + step].copy_(values[:, skip : skip + len(self.cols)].to(self.dtype))


def _lazy(file: GGUFFile, entry: Entry, source: _Source, dtype: torch.dtype) -> Lazy:
    if entry.kind in PLAIN:
        return Stored(source.file, entry.start, entry.shape, PLAIN[entry.kind])
    if entry.kind not in QUANTIZED:
        known = ", ".join((*PLAIN, *QUANTIZED))
        raise CheckpointError(f"{file.path}: {entry.name} is of type {entry.kind}; readable are {known}")
    if len(entry.shape) != 2:
        raise CheckpointError(f"{file.path}: {entry.name} has shape {entry.shape}, but only matrices can be quantised")
    return _Dequantized(source, entry, dtype)


def _canonical(entry: Entry, experts: int) -> dict[str, Entry]:
    """An entry under its canonical name; a stack of `experts` as an entry for each expert; {} for unknown names.

    `experts` is 0 for a dense network.
    """
    if entry.name in _NAMES:
        return {_NAMES[entry.name]: entry}
    parts = entry.name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or not parts[1].isdigit() or parts[3] != "weight":
        return {}
    inner = (_MIXTURE if experts else _DENSE).get(parts[2])
    if inner is not None:
        return {f"layers.{parts[1]}.{inner}.weight": entry}
    if not experts or parts[2] not in _STACKS or len(entry.shape) != 3 or entry.shape[0] != experts:
        return {}
    nbytes = entry.nbytes // experts
    return {
        f"layers.{parts[1]}.feed_forward.experts.{e}.{_STACKS[parts[2]]}.weight": replace(
            entry,
            name=f"{entry.name} of expert {e}",
            shape=entry.shape[1:],
            start=entry.start + e * nbytes,
            nbytes=nbytes,
        )
        for e in range(experts)
    }


def spelling(canonical: str) -> str:
    """A canonical name as GGUF spells it; for an expert's weight, the name of the stack that holds it."""
    for theirs, ours in _NAMES.items():
        if ours == canonical:
            return theirs
    _, layer, rest = canonical.removesuffix(".weight").split(".", 2)
    if rest.startswith("feed_forward.experts."):
        stack = next(theirs for theirs, ours in _STACKS.items() if ours == rest.rpartition(".")[2])
        return f"blk.{layer}.{stack}.weight"
    names = _DENSE | _MIXTURE
    return f"blk.{layer}.{next(theirs for theirs, ours in names.items() if ours == rest)}.weight"


def _model_args(file: GGUFFile, factors: Tensor | None) -> ModelArgs:
    data, path = file.metadata, file.path
    arch = data.get("general.architecture")
    if arch != "llama":
        raise CheckpointError(f"{path}: general.architecture is {arch!r}; only 'llama' (Llama, Mistral) can be read")
    if data.get("split.count", 1) > 1:
        raise CheckpointError(f"{path}: one of {data['split.count']} pieces; join them with llama-gguf-split --merge")

    def number(key: str, default: Any = None) -> Any:
        value = data.get(f"llama.{key}", default)
        if not isinstance(value, int | float):
            what = "is missing" if value is None else f"is {value!r}, but it must be one number for all layers"
            raise CheckpointError(f"{path}: llama.{key} {what}")
        return value

    heads = number("attention.head_count")
    head_dim = number(
        "attention.key_length", number("rope.dimension_count", number("embedding_length") // max(heads, 1))
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise CheckpointError(f"{path}: llama.{key} is {number(key)}, but heads of {head_dim} need {head_dim}")
    if "token_embd.weight" not in file.entries:
        raise CheckpointError(f"{path}: tensors are missing: token_embd.weight")
    theta = float(number("rope.freq_base", 10000.0))
    experts = number("expert_count", 0) or 1
    window, context = data.get("llama.attention.sliding_window") or 0, number("context_length")
    return ModelArgs(
        dim=number("embedding_length"),
        hidden_dim=number("feed_forward_length"),
        head_dim=head_dim,
        n_layers=number("block_count"),
        n_heads=heads,
        n_kv_heads=number("attention.head_count_kv", heads),
        vocab_size=file.entries["token_embd.weight"].shape[0],
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(data, path, factors, theta),
        # A Mixtral has no sliding window, so beyond its length the network would compute something else.
        max_seq_len=min(context, window) if window else context,
        moe=MoEArgs(num_experts=experts, num_experts_per_tok=number("expert_used_count", 0) or 1),
    )


def _rope_scaling(data: Mapping[str, Any], path: Path, factors: Tensor | None, theta: float) -> dict[str, Any] | None:
    kind = data.get("llama.rope.scaling.type", "linear" if "llama.rope.scale_linear" in data else "none")
    factor = float(data.get("llama.rope.scaling.factor", data.get("llama.rope.scale_linear", 1.0)) or 1.0)
    if factors is not None and not bool((factors == 1).all()):
        return llama3_scaling(factors, theta, path)
    if kind in ("none", "") or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = data.get("llama.rope.scaling.original_context_length")
    if kind != "yarn" or not original or data.get("llama.rope.scaling.attn_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: llama.rope.scaling.type {kind!r} with these parameters cannot be carried over")
    out = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original)}
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if f"llama.rope.scaling.{key}" in data:
            out[name] = data[f"llama.rope.scaling.{key}"]
    return out


def llama3_scaling(factors: Tensor, theta: float, path: Path) -> dict[str, Any]:
    """Recover Llama 3's scaling parameters from the divisors of each frequency (head_dim / 2,) that GGUF stores."""
    factor, low, high = float(factors.max()), 1.0, 4.0
    inverse = theta ** -(torch.arange(len(factors), dtype=torch.float64) / len(factors))
    for original in (8192, 4096, 2048, 16384, 32768):
        smooth = ((original * inverse / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        if torch.allclose(1 / ((1 - smooth) / factor + smooth), factors.double(), rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": round(factor, 4),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(
        f"{path}: rope_freqs.weight: its frequencies are not those of Llama 3's scaling, which is all we know"
    )
