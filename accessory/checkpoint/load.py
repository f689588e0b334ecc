"""From an opened checkpoint, or several one over the other, to a network whose parameters hold the values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from accessory.adapt.peft import AdapterSpec, adapter_specs_of, add_adapters, initial_tensor
from accessory.adapt.quant import quantize_skeleton
from accessory.checkpoint.folder import Checkpoint
from accessory.checkpoint.lazy import Computed, Lazy
from accessory.checkpoint.names import companion_of, image_shapes, is_encoder_tensor, is_of_images
from accessory.checkpoint.packed import Quantized, quantized_blocks
from accessory.config import PEFT_FIELDS, Implementation, ModelArgs
from accessory.errors import CheckpointError, ConfigError
from accessory.formats import GROUP, Quant
from accessory.nn.decoder import Decoder
from accessory.ops.quantized import Packed
from accessory.parallel.apply import parallelize
from accessory.parallel.local_shard import LocalShard, local_tensors
from accessory.parallel.mesh import Ranks
from accessory.progress import progress_bar

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
    adapters: Mapping[str, AdapterSpec] | None = None,
    trainable: Callable[[str], bool] | None = None,
    seed: int = 0,
    wrap: Callable[[Decoder], None] | None = None,
    quant: Quant | None = None,
    sees: bool = False,
) -> Decoder:
    """A decoder on `device` in `dtype`, filled from any layout; tensors of later checkpoints replace earlier ones.

    With `ranks` it holds this rank's slices only, whatever number of files the checkpoint is cut into, and reads no
    more of them. What finetuning has put beside weights, LoRA and biases, follows from the checkpoints' tensors and
    from `beside` (by canonical linear); what only the latter names starts with the values that change nothing, drawn
    from `seed`. Parameters that `trainable` says (by name in the network) are kept in fp32 and need gradients; `dtype`
    is still what the network computes in. `quant` says which weights are quantised: copied as they lie where a
    checkpoint holds them so, else on arrival, a block of rows at a time, so that nothing of the network is ever held
    in 16 bits. `wrap` may cut the empty network further, as data parallelism does. `sees`: with projections for
    images, which start with values drawn from `seed` where they are to be trained and no checkpoint has them; without
    it, whatever is of images is left out. Values go from the file to their place in blocks, converted on the way:
    beside the parameters themselves, no tensor is held. Raises CheckpointError listing tensors that are missing, extra
    or of another shape than `args` says.
    """
    tensors: dict[str, Lazy] = {}
    for checkpoint in checkpoints:
        tensors.update(checkpoint.tensors)
    left_out = is_encoder_tensor if sees else is_of_images
    tensors = {name: tensor for name, tensor in tensors.items() if not left_out(name)}
    where = ", ".join(str(c.path) for c in checkpoints)
    with torch.device("meta"):
        decoder = Decoder(args, implementation, sees=sees)
        present = adapter_specs_of({name: tensor.shape for name, tensor in tensors.items()})
        wanted = {name: present.get(name, AdapterSpec()) | b for name, b in {**present, **(adapters or {})}.items()}
        add_adapters(decoder, wanted, args.lora_scale)
        decoder.cast(dtype).compute_in(dtype).requires_grad_(False)
        for name, parameter in decoder.named_parameters():
            if trainable is not None and trainable(name):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
    if adapters:
        for name, place in destinations(decoder):
            if name not in tensors and companion_of(name) is not None:
                shape = tuple(place.shape)
                tensors[name] = Computed(shape, torch.float32, partial(initial_tensor, name, shape, seed))
    if sees and trainable is not None:
        for name, shape in image_shapes(args).items():
            if trainable(name):
                tensors.setdefault(name, Computed(shape, torch.float32, partial(initial_tensor, name, shape, seed)))
    check_tensors(decoder, tensors, where)
    if ranks is not None and ranks.size > 1:
        parallelize(decoder, ranks)
    if quant is not None:
        quantize_skeleton(decoder, quant)
    if wrap is not None:
        wrap(decoder)
    decoder.to_empty(device=device)
    decoder.fuse()  # while the parameters are still empty, and this costs nothing
    fill(decoder, tensors, progress=progress)
    return decoder.eval()


def chained_args(checkpoints: Sequence[Checkpoint]) -> ModelArgs:
    """The configuration of checkpoints loaded one over the other: the first one's sizes, the adapters' own fields.

    CheckpointError where adapters that stay beside one another scale their LoRA differently.
    """
    args = checkpoints[0].args
    vision = next((c.args.vision for c in reversed(checkpoints) if c.args.vision is not None), None)
    published = any(c.args.load_pretrained_visual_encoder for c in checkpoints)
    args = args.replace(vision=vision, load_pretrained_visual_encoder=published)
    adapter: Checkpoint | None = None
    for checkpoint in checkpoints:
        lora = {name for name in checkpoint.tensors if name.endswith(".lora_a.weight")}
        if not lora and not any(companion_of(name) for name in checkpoint.tensors):
            continue
        own = checkpoint.args
        if adapter is not None and lora and own.lora_scale != args.lora_scale:
            left = [n for n in adapter.tensors if n.endswith(".lora_a.weight") and n not in lora]
            if left:
                raise CheckpointError(
                    f"{adapter.path}: scales LoRA by {args.lora_scale:g}, {checkpoint.path} by {own.lora_scale:g}; "
                    "merge the first into the weights before the second is loaded"
                )
        adapter = checkpoint
        args = args.replace(**{field: getattr(own, field) for field in PEFT_FIELDS})
    return args


def chained_quant(checkpoints: Sequence[Checkpoint], chosen: Quant | None) -> Quant | None:
    """The formats to load checkpoints in, one over the other: those of a quantised folder, else what was `chosen`.

    ConfigError where something else was chosen than the folder holds.
    """
    own = next((c for c in reversed(checkpoints) if c.quant is not None), None)
    if own is None or own.quant is None:
        return chosen
    if chosen not in (None, own.quant):
        raise ConfigError(
            f"quant: {own.path} is quantised already ({own.quant}), so it cannot be loaded as "
            f"{chosen or own.quant}; leave quant out, or give the folder that it was made from"
        )
    return own.quant


def destinations(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensor names and the parameters, or the parts of stacked parameters, that hold them (a rank's part)."""
    for shard in local_tensors(decoder):
        yield shard.name, shard.tensor


def part_of(tensor: Lazy, shard: LocalShard) -> Lazy:
    """The part of a whole canonical tensor that belongs into `held`."""
    for dim, (start, length) in enumerate(zip(shard.offsets, shard.tensor.shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


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
    """Copy every tensor, or what is held of it, to its place: several at a time, as copies leave Python's lock and
    overlap reading; those that have to be quantised one after the other, so that only one is there in 16 bits."""
    places = list(local_tensors(decoder))
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
    """Whether nothing has to be quantised for it."""
    return isinstance(shard.tensor, Tensor) or (isinstance(tensor, Quantized) and tensor.format == shard.tensor.format)


def quantize_into(tensor: Lazy, shard: LocalShard) -> None:
    """Quantise what `held` holds of a whole canonical tensor, some rows at a time, where it is to lie.

    Formats that scale rows need whole rows for it, even where only a part of each is kept, and nf4-dq, which centres
    its scales, the whole tensor: a rank's numbers are then those of the quantised whole.
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


def _listed(names: object) -> str:
    ordered = sorted(names)  # type: ignore[call-overload]
    more = len(ordered) - NAMES_SHOWN
    return ", ".join(ordered[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
