"""Times SPHINX's ensemble and Mixtral-8x7B together, at their real sizes with random weights, on one 80 GB card.

    python benchmarks/gpu_images.py [--quant int8] [--images 1 4] [--views 1 5] [--layers 32] [--encoders]

Encoders are in bf16, and the network is quantised. The floor of encoding is the larger of two times: of its operations,
which torch counts, at the measured bf16 matmul rate, and of reading all weights at the measured copy rate. `--encoders`
stops after encoding. Images are new in every run, so no features are cached; "again" is the same
image in the same prompt: then pages of the key/value cache are shared too. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from accessory.adapt.peft import trainable_rule
from accessory.bench.card import Card, free, measure_card, seconds_in_turn, seconds_of
from accessory.bench.engines import engine_over
from accessory.bench.job import Noise, noise
from accessory.build.network import NetworkSpec, TrainingSpec, build
from accessory.checkpoint.names import image_shapes
from accessory.config import PRESETS, ModelArgs
from accessory.data.batches import collate
from accessory.data.dataset import Example
from accessory.data.image_tokens import insert_image_tokens
from accessory.engine.engine import Engine
from accessory.engine.sampling_params import SamplingParams
from accessory.engine.sequence import ImageSpan
from accessory.engine.sequence import Sequence as Request
from accessory.formats import Quant
from accessory.nn.vision import VisionTower
from accessory.nn.vision_encoders import run_encoder
from accessory.parallel.mesh import DeviceMesh
from accessory.train.trainer import LossWeights, Trainer
from accessory.vision_config import SPHINX, VIEWS_A_GRAPH

DEVICE = torch.device("cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--step-images", type=int, default=8, help="of a stage 1 step, 128 tokens of text each")
    parser.add_argument("--encoders", action="store_true", help="time the encoders alone, without a network")
    options = parser.parse_args()
    args = PRESETS["8x7b"].replace(vision=SPHINX)
    args = args.replace(n_layers=options.layers or args.n_layers)
    card = measure_card(DEVICE, torch.bfloat16)
    print(f"{card}\n")
    print("| what | value | images/s | times the floor |\n|---|---|---|---|")
    for views in options.views:
        tower = random_tower(views)
        if views == options.views[0]:
            row("encoders resident, GB", f"{torch.cuda.memory_allocated() / 1e9:.2f}")
        for images in options.images:
            encoding(tower, images, card)
        if views == options.views[-1] and not options.encoders:
            answering(args, tower, options)
        del tower
        free(DEVICE)
    if not options.encoders:
        stage_1(args, options)


def random_tower(views: int) -> VisionTower:
    with torch.device("meta"):
        tower = VisionTower(SPHINX, views).to(torch.bfloat16)
    tower.to_empty(device="cuda")
    for parameter in tower.parameters():
        parameter.data.normal_(0, 0.02)
    return tower


def pixels(tower: VisionTower, images: int) -> torch.Tensor:
    return torch.randn(images, 3, tower.pixels, tower.pixels, device="cuda")


def encoding(tower: VisionTower, images: int, card: Card) -> None:
    """With and without a CUDA graph, and each encoder's part of one image."""
    x_I3PP = pixels(tower, images)
    floor = floor_of(tower, partial(tower.run, x_I3PP), card)
    for graphed in (False, True)[: 1 + (images * tower.views <= VIEWS_A_GRAPH)]:
        tower.graphed = graphed
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = seconds_of(partial(tower.run, x_I3PP), DEVICE)
        more = (torch.cuda.max_memory_allocated() - before) / 1e9
        way = "graph" if graphed else "plain"
        what = f"encoding {images} × {tower.views} views, {way}, ms (memory beside, GB; floor, ms)"
        row(what, f"{seconds * 1e3:.1f} ({more:.2f}; {floor * 1e3:.2f})", images / seconds, seconds / floor)
    if images > 1:
        return
    for encoder in tower.args.all:
        module = tower.encoders[encoder.name]
        x_V3SS = torch.randn(tower.views, 3, encoder.size, encoder.size, device=DEVICE, dtype=tower.dtype)
        run = torch.no_grad()(partial(run_encoder, encoder.kind, module, x_V3SS))
        floor = floor_of(module, run, card)
        seconds = seconds_in_turn([run], DEVICE, 5)
        row(f"of it {encoder.name}, ms (floor, ms)", f"{seconds * 1e3:.2f} ({floor * 1e3:.2f})", ratio=seconds / floor)


def floor_of(module: torch.nn.Module, run: Callable[[], object], card: Card) -> float:
    """Seconds that the operations of `run` must take, or the reading of the weights."""
    with FlopCounterMode(display=False) as counter:
        run()
    read = sum(p.nbytes for p in module.parameters())
    return max(counter.get_total_flops() / card.matmul, read / card.copy)


def answering(args: ModelArgs, tower: VisionTower, options: argparse.Namespace) -> None:
    checkpoint = noise(args)
    checkpoint.tensors.update(_projections(args))
    quant = Quant.parse(options.quant)
    spec = NetworkSpec(
        checkpoints=[checkpoint], args=args, implementation="sparse", quant=quant, image_views=tower.views
    )
    decoder = build(spec, device="cuda")
    row(f"encoders and {options.quant} network resident, GB", f"{torch.cuda.memory_allocated() / 1e9:.2f}")
    words = SPHINX.image_tokens(tower.views)
    images = pixels(tower, 8).cpu()
    tower.graphed = True
    engine = engine_over(decoder, 2**15, see=lambda several: tower.encode(torch.stack(list(several))))

    def first(image: int | None, seed: int) -> tuple[int, float]:
        """Positions and milliseconds of a first token. The same image and seed share pages with an earlier request."""
        g = torch.Generator().manual_seed(seed)
        text = [1, *torch.randint(3, args.vocab_size, (options.prompt,), generator=g).tolist()]
        ids = text if image is None else insert_image_tokens(text, words, 1)
        spans = [] if image is None else [ImageSpan(1, words, bytes([image]), images[image])]
        torch.cuda.synchronize()
        return len(ids), answer(engine, Request(ids, SamplingParams(), max_tokens=1, images=spans)) * 1e3

    first(None, 0)
    first(0, 0)
    for what, image, seed in (("new", 1, 1), ("again, pages shared", 1, 1), ("another, new", 2, 2)):
        positions, ms = first(image, seed)
        row(f"first token, {positions} positions, image {what}, ms", f"{ms:.0f}")
    positions, ms = first(None, 3)
    row(f"first token, {positions} positions, no image, ms", f"{ms:.0f}")


def answer(engine: Engine, request: Request) -> float:
    """Seconds until the request has ended."""
    began = time.perf_counter()
    engine.add(request)
    while not request.finished:
        engine.step()
    return time.perf_counter() - began


def stage_1(args: ModelArgs, options: argparse.Namespace) -> None:
    """Trains projections, start and end; network and encoders are frozen. Each image has one view and 128 tokens."""
    args = args.replace(trainable_mode="mm_stage1")
    tower = random_tower(1)
    torch.cuda.reset_peak_memory_stats()
    quant = Quant.parse("nf4")
    spec = NetworkSpec(checkpoints=[noise(args)], args=args, implementation="sparse", quant=quant, image_views=1)
    training = TrainingSpec(trainable=trainable_rule(args, peft=False), checkpointing=True)
    decoder = build(spec, device="cuda", training=training)
    trainer = Trainer(decoder, DeviceMesh(), LossWeights(0.0), clip=2.0, tower=tower)
    words, n = SPHINX.image_tokens(1), options.step_images

    def batch() -> object:
        texts = [[1, *torch.randint(3, args.vocab_size, (128,)).tolist()] for _ in range(n)]
        ids = [insert_image_tokens(text, words, 1) for text in texts]
        examples = [[Example(i, [False] * (words + 1) + [True] * 128, places=words)] for i in ids]
        return collate(examples, list(range(n)), pixels=list(pixels(tower, n).cpu()))

    batches = [batch() for _ in range(8)]
    seconds = seconds_of(lambda: trainer.step([batches.pop()], 1e-4), DEVICE, rounds=5)  # type: ignore[list-item]
    trained = sum(p.numel() for _, p in trainer.named) / 1e6
    peak = torch.cuda.max_memory_allocated() / 1e9
    row(f"stage 1 over nf4, {trained:.0f} million trained, peak, GB", f"{peak:.1f}")
    row(f"stage 1 step, {n} new images of {words} + 128 tokens, recomputing, ms", f"{seconds * 1e3:.0f}", n / seconds)


def _projections(args: ModelArgs) -> dict[str, object]:
    return {name: Noise(shape, 0, name.endswith(".1.weight")) for name, shape in image_shapes(args).items()}


def row(what: str, value: str, rate: float | None = None, ratio: float | None = None) -> None:
    numbers = f"{'–' if rate is None else f'{rate:,.1f}'} | {'–' if ratio is None else f'{ratio:.2f}'}"
    print(f"| {what} | {value} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
