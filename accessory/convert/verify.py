"""`accessory verify`: check that a checkpoint is whole, and that it is the same model as another one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accessory.checkpoint.folder import UNFINISHED, Survey, survey_folder
from accessory.checkpoint.gguf_writer import ROUNDED, rounded
from accessory.checkpoint.hashing import Digest, digest_all, model_hash
from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.packed import Quantized
from accessory.errors import CheckpointError, listed


@dataclass(frozen=True)
class Side:
    """What was found in one folder. `hash` is "" when tensors are missing or broken, because there is no model then.

    `digests` are those of dequantised values, so the hash is that of the dequantised model. `pieces` are the digests of
    the stored tensors of quantised weights.
    """

    path: Path
    layout: str
    shards: int
    tensors: int
    dtypes: dict[str, int]  # dtype, or format of a quantised weight → tensors
    problems: list[str]
    hash: str
    digests: dict[str, Digest] = field(repr=False, default_factory=dict)
    pieces: dict[str, Digest] = field(repr=False, default_factory=dict)
    rounded_to: str = ""  # the type of a GGUF file to which the values were rounded before they were hashed

    def lines(self) -> list[str]:
        shards = f", {self.shards} shards" if self.shards > 1 else ""
        dtypes = " + ".join(f"{n} {dtype}" for dtype, n in self.dtypes.items())
        out = [f"{self.path}: {self.layout}{shards}, {self.tensors} tensors ({dtypes or 'none'})"]
        if self.rounded_to:
            out.append(f"  note: compared, and hashed, are its values as a GGUF file of {self.rounded_to} holds them")
        elif self.pieces:
            out.append("  note: quantised; the hash is that of what the numbers mean, as `accessory convert` writes it")
        elif len(self.dtypes) > 1:
            out.append("  note: dtypes are mixed within this model")
        return out + [f"  problem: {problem}" for problem in self.problems]

    def to_dict(self) -> dict[str, Any]:
        """What `lines` tells, and the hash, as plain values for JSON."""
        return {
            "path": str(self.path),
            "layout": self.layout,
            "shards": self.shards,
            "tensors": self.tensors,
            "dtypes": self.dtypes,
            "quantized": bool(self.pieces),
            "problems": self.problems,
            "hash": self.hash or None,
        }


@dataclass(frozen=True)
class Report:
    """`ok`: the models are whole and, if two were compared, equal. `hash`: that of the first, "" if it is not whole."""

    a: Side
    b: Side | None = None
    differences: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.a.problems or self.differences or (self.b is not None and self.b.problems))

    @property
    def hash(self) -> str:
        return self.a.hash

    def lines(self) -> list[str]:
        """Lines to print. The last word is the hash, or "none" if there is no whole model to hash."""
        out = self.a.lines()
        if self.b is None:
            return [*out, f"{'whole' if self.ok else 'NOT whole'}: {self.hash or 'none'}"]
        out += self.b.lines() + [f"  difference: {text}" for text in self.differences]
        if self.ok:
            return [*out, f"equal: {self.hash}"]
        return [*out, f"NOT equal: {self.a.hash or 'none'} {self.b.hash or 'none'}"]

    def to_dict(self) -> dict[str, Any]:
        """What `lines` tells, as plain values for JSON. ok: whole and, if two were compared, equal."""
        b = None if self.b is None else self.b.to_dict()
        return {"ok": self.ok, "a": self.a.to_dict(), "b": b, "differences": self.differences}


def verify(a: str | Path, b: str | Path | None = None, *, progress: bool = True) -> Report:
    """Read and hash every tensor of `a` (and `b`), and compare the two.

    The report lists tensors that are missing, extra, misshapen or not finite, and shards of different checkpoints. If
    one of two is a GGUF file, the other's values are rounded to its type before they are hashed.
    Raises CheckpointError only if there is no checkpoint to look at, or an adapter alone.
    """
    surveys = [_survey(path) for path in (a, b) if path is not None]
    kinds = [s.checkpoint.gguf.kind if s.checkpoint and s.checkpoint.gguf else "" for s in surveys]
    sides = [
        _look_at(survey, progress, "" if own or kind not in ROUNDED else kind)
        for survey, own, kind in zip(surveys, kinds, reversed(kinds), strict=True)
    ]
    if b is None:
        return Report(sides[0])
    return Report(sides[0], sides[1], _compare(sides[0], sides[1]))


def _survey(path: str | Path) -> Survey:
    survey = survey_folder(path, thorough=True)
    if survey.adapter is not None:
        raise CheckpointError(f"{survey.path}: {survey.adapter.alone()}")
    return survey


def _look_at(survey: Survey, progress: bool, rounded_to: str) -> Side:
    checkpoint = survey.checkpoint
    tensors = checkpoint.tensors if checkpoint else {}
    own_kinds = dict(Counter(map(_kind, tensors.values())).most_common())
    if rounded_to:
        tensors = rounded(tensors, rounded_to)
    problems = [str(p) for p in survey.problems]
    if survey.unfinished:
        problems.insert(0, UNFINISHED)
    made_of = {
        f"{name}.{piece}": lazy
        for name, tensor in tensors.items()
        if isinstance(tensor, Quantized)
        for piece, lazy in tensor.pieces.items()
    }
    found = digest_all({**tensors, **made_of}, progress=progress, title=f"reading {survey.path.name}")
    digests, pieces = ({name: found[name] for name in names} for names in (tensors, made_of))
    infinite = [name for name, digest in digests.items() if not digest.finite]
    # If a weight's scale is not finite, name the scale.
    infinite = [f"{n}.scale" if f"{n}.scale" in pieces and not pieces[f"{n}.scale"].finite else n for n in infinite]
    if infinite:
        problems.append(f"NaN or infinity in {listed(infinite)} ({len(infinite)} of {len(digests)} tensors)")
    return Side(
        path=survey.path,
        layout=survey.layout or "unknown layout",
        shards=checkpoint.shards if checkpoint else 1,
        tensors=len(tensors),
        dtypes=own_kinds,
        problems=problems,
        hash=model_hash(digests) if _is_model(survey) else "",
        digests=digests,
        pieces=pieces,
        rounded_to=rounded_to,
    )


def _kind(tensor: Lazy) -> str:
    return tensor.format if isinstance(tensor, Quantized) else str(tensor.dtype).removeprefix("torch.")


def _is_model(survey: Survey) -> bool:
    return survey.checkpoint is not None and not survey.problems and not survey.unfinished


def _compare(a: Side, b: Side) -> list[str]:
    out = []
    for one, other in ((a, b), (b, a)):
        only = [name for name in one.digests if name not in other.digests]
        if only:
            out.append(f"only in {one.path}: {listed(only)}")
    shared = [(name, digest, b.digests[name]) for name, digest in a.digests.items() if name in b.digests]
    for what, key in (("shape", "shape"), ("dtype", "dtype"), ("content", "sha256")):
        differ = [name for name, x, y in shared if getattr(x, key) != getattr(y, key)]
        if differ:
            out.append(f"{what} differs: {listed(differ)} ({len(differ)} of {len(shared)})")
            shared = [entry for entry in shared if entry[0] not in set(differ)]
    alike = {name for name, _, _ in shared}
    both = [name for name in a.pieces if name in b.pieces and name.rpartition(".")[0] in alike]
    differ = [name for name in both if a.pieces[name] != b.pieces[name]]
    if differ:  # so little that the dequantised values are the same
        out.append(f"stored content differs: {listed(differ)} ({len(differ)} of {len(both)})")
    return out
