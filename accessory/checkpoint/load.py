"""From an opened checkpoint, or several one over the other, to a network whose parameters hold the values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

from accessory.checkpoint.folder import Checkpoint
from accessory.checkpoint.lazy import Lazy
from accessory.config import Implementation, ModelArgs
from accessory.errors import CheckpointError
from accessory.nn.decoder import Decoder
from accessory.parallel.apply import parallelize
from accessory.parallel.mesh import Ranks
from accessory.parallel.plan import rank_part

NAMES_SHOWN = 5


def load_decoder(
    checkpoints: Sequence[Checkpoint],
    args: ModelArgs,
    implementation: Implementation,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> Decoder:
    """A decoder on `device` in `dtype`, filled from any layout; tensors of later checkpoints replace earlier ones.

    With `ranks` it holds this rank's slices only, whatever number of files the checkpoint is cut into, and reads no
    more of them.
    Values go from the file to their place in blocks, converted on the way: beside the parameters themselves, no tensor
    is held. Raises CheckpointError listing tensors that are missing, extra or of another shape than `args` says.
    """
    tensors: dict[str, Lazy] = {}
    for checkpoint in checkpoints:
        tensors.update(checkpoint.tensors)
    where = ", ".join(str(c.path) for c in checkpoints)
    with torch.device("meta"):
        decoder = Decoder(args, implementation).cast(dtype)
    check_tensors(decoder, tensors, where)
    if ranks is not None and ranks.size > 1:
        parallelize(decoder, ranks)
        tensors = {name: _part(name, tensors[name], args, implementation, ranks) for name, _ in destinations(decoder)}
    decoder.to_empty(device=device)
    decoder.requires_grad_(False)
    decoder.join()  # while the parameters are still empty, and this costs nothing
    fill(decoder, tensors, progress=progress)
    return decoder.eval()


def destinations(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensor names and the parameters, or the parts of stacked parameters, that hold them."""
    for name, parameter in decoder.named_parameters():
        stack, _, kind = name.rpartition(".")
        if stack.endswith(".experts"):
            first = decoder.get_submodule(stack).first
            for e, part in enumerate(parameter.detach().unbind(), start=int(first)):  # type: ignore[arg-type]
                yield f"{stack}.{e}.{kind}.weight", part
        else:
            yield name, parameter.detach()


def _part(name: str, tensor: Lazy, args: ModelArgs, implementation: Implementation, ranks: Ranks) -> Lazy:
    part = rank_part(name, tensor.shape, args, implementation, ranks.rank, ranks.size)
    assert part is not None, f"{name} is another rank's"
    return tensor if part.dim is None else tensor.narrow(part.dim, part.start, part.length)


def check_tensors(decoder: Decoder, tensors: Mapping[str, Lazy], where: str) -> None:
    wanted = {name: tuple(t.shape) for name, t in destinations(decoder)}
    problems = []
    for problem, names in (
        ("missing", wanted.keys() - tensors.keys()),
        ("not part of the network", tensors.keys() - wanted.keys()),
    ):
        if names:
            problems.append(f"{len(names)} tensors {problem}: {_listed(names)}")
    shapes = [
        f"{n} {tensors[n].shape} instead of {s}" for n, s in wanted.items() if n in tensors and tensors[n].shape != s
    ]
    if shapes:
        problems.append(f"{len(shapes)} tensors of another shape than the configuration says: {_listed(shapes)}")
    if problems:
        raise CheckpointError(f"{where}: " + "; ".join(problems))


def fill(decoder: Decoder, tensors: Mapping[str, Lazy], *, progress: bool = False) -> None:
    """Copy every tensor to its place, several at a time: the copies leave Python's lock and overlap reading."""
    places = list(destinations(decoder))
    total = sum(place.nbytes for _, place in places)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress, leave=False)
    workers = min(8, os.cpu_count() or 1)

    def copy(name: str, place: Tensor) -> int:
        tensors[name].copy_to(place)
        return place.nbytes

    with bar, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(copy, name, place) for name, place in places]
        try:
            for future in futures:
                bar.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    device = places[0][1].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _listed(names: object) -> str:
    ordered = sorted(names)  # type: ignore[call-overload]
    more = len(ordered) - NAMES_SHOWN
    return ", ".join(ordered[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
