"""Fill a network's parameters, or a rank's local shards of them, with the values of lazy canonical tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from accessory.checkpoint.lazy import Lazy
from accessory.checkpoint.packed import Quantized, quantized_blocks
from accessory.errors import CheckpointError, listed
from accessory.formats import GROUP
from accessory.nn.decoder import Decoder
from accessory.ops.quantized import Packed
from accessory.parallel.local_shard import LocalShard, local_tensors
from accessory.progress import progress_bar


def part_of(tensor: Lazy, shard: LocalShard) -> Lazy:
    """Cut the part for `shard` out of a whole canonical tensor."""
    for dim, (start, length) in enumerate(zip(shard.offsets, shard.tensor.shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def check_tensors(decoder: Decoder, tensors: Mapping[str, Lazy], where: str) -> None:
    """Raise CheckpointError if tensors are missing, unknown to `decoder` or misshapen; the message lists them.

    `where` names the checkpoints in the message.
    """
    wanted = {shard.name: tuple(shard.tensor.shape) for shard in local_tensors(decoder)}
    problems = []
    for problem, names in (
        ("missing", wanted.keys() - tensors.keys()),
        ("not part of the network", tensors.keys() - wanted.keys()),
    ):
        if names:
            problems.append(f"{len(names)} tensors {problem}: {listed(sorted(names))}")
    shapes = [
        f"{n} {tensors[n].shape} instead of {s}" for n, s in wanted.items() if n in tensors and tensors[n].shape != s
    ]
    if shapes:
        problems.append(f"{len(shapes)} tensors of another shape than the configuration says: {listed(sorted(shapes))}")
    if problems:
        raise CheckpointError(f"{where}: " + "; ".join(problems))


def fill(decoder: Decoder, tensors: Mapping[str, Lazy], *, progress: bool = False) -> None:
    """Copy every tensor, or the local shard of it, into its parameter. Parameters on the meta device get none.

    Several threads copy, because copies release Python's lock and overlap with reading. Tensors that must be quantised
    follow one after the other, so that only one at a time is in memory in 16 bits.
    """
    places = [shard for shard in local_tensors(decoder) if not getattr(shard.tensor, "is_meta", False)]
    copied = [shard for shard in places if _lies_as_wanted(tensors[shard.name], shard)]
    arriving = [shard for shard in places if not _lies_as_wanted(tensors[shard.name], shard)]
    total = sum(shard.tensor.nbytes for shard in places)
    shown = progress_bar(total, "loading", progress)
    workers = min(8, os.cpu_count() or 1)

    def copy(shard: LocalShard) -> int:
        part = part_of(tensors[shard.name], shard)
        if isinstance(shard.tensor, Tensor):
            part.copy_to(shard.tensor)
        elif isinstance(part, Quantized):
            part.copy_pieces_to(shard.tensor)
        return shard.tensor.nbytes

    with shown, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(copy, shard) for shard in copied]
        try:
            for shard in arriving:
                quantize_into(tensors[shard.name], shard)
                shown.update(shard.tensor.nbytes)
            for future in futures:
                shown.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    device = decoder.tok_embeddings.weight.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _lies_as_wanted(tensor: Lazy, shard: LocalShard) -> bool:
    """Whether `tensor` fits `shard` without quantising."""
    return isinstance(shard.tensor, Tensor) or (isinstance(tensor, Quantized) and tensor.format == shard.tensor.format)


def quantize_into(tensor: Lazy, shard: LocalShard) -> None:
    """Quantise the part for `shard` of a whole canonical tensor into place, some rows at a time.

    A rank must get the same numbers as if the whole tensor were quantised. So formats that scale rows quantise whole
    rows, even if the rank keeps only a part of each. nf4-dq subtracts the mean of all scales, so it quantises the whole
    tensor.
    """
    packed: Packed = shard.tensor
    (rows, columns), (first_row, first_column) = packed.shape, shard.offsets
    if packed.format != "nf4-dq":
        tensor, first_row = tensor.narrow(0, first_row, rows), 0
        if packed.format in GROUP:
            tensor, first_column = tensor.narrow(1, first_column, columns), 0
    start = 0
    for block in quantized_blocks(tensor, packed.format, packed.data.device):
        done = block.narrow(0, first_row, min(rows, block.shape[0] - first_row)).narrow(1, first_column, columns)
        for name, part in packed.tensors().items():
            part.narrow(0, start, len(done.data)).copy_(done.tensors()[name])
        start += len(done.data)
