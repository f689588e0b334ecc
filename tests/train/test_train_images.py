"""Training with images on any ranks equals a plain loop over transformers' model, which gets the embeddings.

Whole runs test the stages, adapters and resuming.
"""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.distributed import run_ranks
from helpers.random_models import hf_mixtral
from helpers.runs import (
    curve,
    dialogues,
    ended_after,
    final_tensors,
    options,
    same_curve,
    without_charts,
    write_data,
    write_model,
)
from helpers.training import ARGS, CLIP, DECAY, LR, balance_by_definition, close, make_decoder, oracle_tensors
from helpers.vision import random_tower, tiny_clip

from accessory.checkpoint.names import image_shapes
from accessory.commands.finetune import carry_out
from accessory.data.batches import collate
from accessory.data.dataset import Example
from accessory.data.image_tokens import insert_image_tokens
from accessory.errors import CheckpointError, ConfigError
from accessory.model.meta import MetaModel
from accessory.train.config import FinetuneConfig
from accessory.train.run import finetune

SEEING = ARGS.replace(vision=tiny_clip())
WORDS = tiny_clip().image_tokens(1)
STEPS = 6
LORA = {"lora_rank": 4, "lora_alpha": 8.0}


def pixels(number):
    return torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(number))


def documents(step):
    """Four (ids, learnt, image). The first and third have an image; in every third step only the third has one."""
    generator = torch.Generator().manual_seed(50 + step)
    out = []
    for n in range(4):
        ids = torch.randint(3, 64, (int(torch.randint(4, 9, (1,), generator=generator)),), generator=generator)
        ids[0] = 1
        learn = torch.rand(len(ids), generator=generator) < 0.7
        learn[0], learn[1] = False, True  # the token after the image is learnt
        image = pixels(10 * step + n) if n == 2 or (n == 0 and step % 3) else None
        out.append((ids.tolist(), learn.tolist(), image))
    return out


def batches(step, parts):
    examples = []
    for ids, learn, image in documents(step):
        places = WORDS if image is not None else 0
        learn = [learn[0], *[False] * places, *learn[1:]] if places else learn
        examples.append((Example(ids=insert_image_tokens(ids, places, 1), learn=learn, places=places), image))
    per = len(examples) // parts
    out = []
    for i in range(parts):
        here = examples[i * per : (i + 1) * per]
        seen = [image for _, image in here if image is not None]
        out.append(collate([[e] for e, _ in here], list(range(per)), pixels=seen))
    return out


def projections():
    generator = torch.Generator().manual_seed(9)
    tensors = {}
    for name, shape in image_shapes(SEEING).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * noise if name.endswith(".1.weight") else 0.2 * noise
    return tensors


def by_transformers():
    """(cross-entropy, balance, gradient norm) of a plain loop that lays out token and image embeddings by hand."""
    model, tower = hf_mixtral(ARGS), random_tower(tiny_clip())
    own = {name: torch.nn.Parameter(t) for name, t in projections().items()}
    named = [*model.named_parameters(), *own.items()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if p.dim() > 1 and not n.endswith("_img")], "weight_decay": DECAY},
            {"params": [p for n, p in named if p.dim() == 1 or n.endswith("_img")], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(0.9, 0.95),
    )
    out = []
    for step in range(STEPS):
        rows, labels = [], []
        for ids, learn, image in documents(step):
            row = model.model.embed_tokens(torch.tensor(ids))
            label = torch.tensor(ids).where(torch.tensor(learn), torch.tensor(-100))
            if image is not None:
                seen = tower.encode(image[None]).visual_VTC[0]
                words = F.linear(seen, own["visual_proj.0.weight"], own["visual_proj.0.bias"])
                words = F.layer_norm(words, (32,), own["visual_proj.1.weight"], own["visual_proj.1.bias"])
                words = torch.cat([own["start_img"][0], words, own["end_img"][0]])
                row = torch.cat([row[:1], words, row[1:]])
                label = torch.cat([label[:1], torch.full((WORDS,), -100), label[1:]])
            rows.append(row)
            labels.append(label)
        x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        y = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        mask = torch.tensor([[1] * len(r) + [0] * (x.shape[1] - len(r)) for r in rows])
        result = model(inputs_embeds=x, attention_mask=mask, output_router_logits=True)
        ce = F.cross_entropy(result.logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100)
        balance = torch.stack([balance_by_definition(g, mask.bool()) for g in result.router_logits]).mean()
        optimizer.zero_grad()
        (ce + ARGS.load_balancing_weight * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], CLIP)
        optimizer.step()
        out.append((ce.item(), balance.item(), norm.item()))
    return out


@functools.cache
def oracle():
    return by_transformers()


def train(implementation, mesh=None, tensors=None, *, mode="sdp", peft=None, checkpointing=False):
    from accessory.parallel.mesh import DeviceMesh
    from accessory.train.trainer import LossWeights, Trainer

    mesh = mesh or DeviceMesh()
    tensors = tensors or oracle_tensors(ARGS) | projections()
    decoder = make_decoder(implementation, mesh, mode, checkpointing, peft, tensors, args=SEEING, sees=True)
    weights = LossWeights(ARGS.load_balancing_weight, global_statistics=True)
    trainer = Trainer(decoder, mesh, weights, weight_decay=DECAY, clip=CLIP, tower=random_tower(tiny_clip()))
    out = []
    for step in range(STEPS):
        record = trainer.step([batches(step, mesh.data_size)[mesh.data_rank]], LR)
        out.append((record["loss"], record["balance"], record["grad_norm"]))
    return out


CASES = {
    2: [((2, 1), {}), ((2, 1), {"mode": "fsdp"}), ((1, 2), {}), ((1, 2), {"peft": LORA})],
    4: [((4, 1), {"mode": "fsdp"}), ((2, 2), {"checkpointing": True}), ((1, 4), {}), ((2, 2), {"peft": LORA})],
}


def on_grids(rank, world, cases, tensors):
    import torch.distributed as dist

    from accessory.parallel.mesh import DeviceMesh, Ranks

    out = []
    for (_, model), how in cases:
        mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), model, "cpu")
        out.append([train(i, mesh, tensors, **how) for i in ("base", "sparse")])
    return out


@pytest.mark.parametrize("implementation", ["base", "sparse"])
def test_a_loop_over_transformers_learns_the_same(implementation):
    close(train(implementation), oracle())


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_learn_the_same(world):
    """In some steps one rank has an image and another has none. Neither may wait for the other's gradient."""
    tensors = oracle_tensors(ARGS) | projections()
    wanted = {False: oracle(), True: train("sparse", peft=LORA)}
    for results in run_ranks(on_grids, world, CASES[world], tensors, timeout=300):
        for (_, how), both in zip(CASES[world], results, strict=True):
            for got in both:
                close(got, wanted["peft" in how])


# --------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a text model, images, dialogues (two thirds have an image), and the encoder's weights."""
    from PIL import Image
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    for n in range(4):
        values = np.random.default_rng(n).integers(0, 256, (30, 34, 3), np.uint8)
        Image.fromarray(values).save(folder / f"{n}.png")
    items = [item | ({"image": str(folder / f"{n % 4}.png")} if n % 3 else {}) for n, item in enumerate(dialogues(24))]
    write_data(folder, items)
    tower = random_tower(tiny_clip())
    (folder / "encoder").mkdir()
    weights = {name.removeprefix("encoders.clip."): t.clone() for name, t in tower.state_dict().items()}
    save_file({n: t for n, t in weights.items() if t.is_floating_point()}, folder / "encoder" / "model.safetensors")
    vision = tiny_clip().to_dict()
    vision["encoders"][0]["path"] = str(folder / "encoder")
    (folder / "vision.json").write_text(json.dumps({"vision": vision}))
    return folder


def seeing_config(inputs, output, **changes):
    seeing = {
        "llama_type": "mixtral_sparse_ens",
        "llama_config": [str(inputs / "vision.json")],
        "image_transform": "padded_resize",
        "epochs": 1.0,
        "save_iteration_interval": None,
    }
    return FinetuneConfig(**options(inputs, output, **(seeing | changes)))


def run(inputs, output, **changes):
    with without_charts():
        finetune(seeing_config(inputs, output, **changes))
    return output


def test_a_dry_run_looks_for_the_encoders_weights(inputs, tmp_path, capsys):
    assert carry_out(seeing_config(inputs, tmp_path / "run"), dry_run=True) == 0
    assert "# 24 items, " in capsys.readouterr().out
    vision = tiny_clip().to_dict()
    vision["encoders"][0]["path"] = str(inputs / "model")
    (tmp_path / "vision.json").write_text(json.dumps({"vision": vision}))
    with pytest.raises(CheckpointError, match=r"vision: encoder clip \(clip\): 39 tensors missing"):
        carry_out(seeing_config(inputs, tmp_path / "run", llama_config=[str(tmp_path / "vision.json")]), dry_run=True)
    assert not (tmp_path / "run").exists()


IMAGE_NAMES = set(image_shapes(SEEING))


def changed(before, after):
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


def test_stage_1_then_stage_2(inputs, tmp_path):
    """Stage 1 trains only projections, start and end. Stage 2 trains all but the encoders. Each folder is complete."""
    base = {n: t.float() for n, t in _tensors(inputs / "model").items()}
    first = run(inputs, tmp_path / "one", trainable_mode="mm_stage1", lr=1e-2)
    one = final_tensors(first)
    encoders = {name for name in one if name.startswith("vision.")}
    assert encoders
    assert changed(base, one) == IMAGE_NAMES | encoders
    config = json.loads((first / "final" / "config.json").read_text())
    assert "trainable_mode" not in config  # otherwise stage 2 would train like stage 1
    assert json.loads((first / "final" / "meta.json").read_text()) == {"llama_type": "mixtral_sparse_ens"}
    second = run(
        inputs,
        tmp_path / "two",
        pretrained_path=[str(first / "final")],
        llama_type=None,
        llama_config=[],
        trainable_mode="mm_stage2",
        template="chatml",
    )
    moved = changed(one, final_tensors(second))
    assert moved >= IMAGE_NAMES
    assert "layers.0.attention.wq.weight" in moved
    assert not any(name.startswith("vision.") for name in moved)
    model = MetaModel.from_pretrained(second / "final", with_visual=True, device="cpu", max_seq_len=64)
    assert len(model.generate(["hello"], [inputs / "1.png"], max_gen_len=4)) == 1


def test_adapters_beside_a_quantized_network(inputs, tmp_path):
    """Trains LoRA, projections, start and end over an int8 base. Only these are saved, and loaded after the base."""
    output = run(inputs, tmp_path / "run", quant="int8", lora_rank=2, only_save_trainable=True)
    trained = final_tensors(output)
    assert set(trained) >= IMAGE_NAMES
    assert {"layers.0.attention.wq.lora_a.weight", "layers.1.feed_forward.experts.3.w2.lora_b.weight"} <= set(trained)
    assert "layers.0.attention.wq.weight" not in trained
    model = MetaModel.from_pretrained(
        [inputs / "model", output / "final"], with_visual=True, device="cpu", max_seq_len=64, quant="int8"
    )
    assert model.llma.sees
    assert torch.isfinite(model.compute_logits(["hello"], [inputs / "1.png"])[0]).all()


def test_a_run_goes_on_where_it_stopped(inputs, tmp_path):
    """A resumed run makes the same random crops of the same images."""
    crops = {"image_transform": "random_resized_crop", "epochs": 2.0, "lora_rank": 2, "save_iteration_interval": 5}
    whole = run(inputs, tmp_path / "whole", **crops)
    with ended_after(5):
        run(inputs, tmp_path / "parts", **crops)
    run(inputs, tmp_path / "parts", **crops, resume="auto")
    same_curve(curve(tmp_path / "parts"), curve(whole))


def test_text_alone_needs_no_eyes(inputs, tmp_path):
    with pytest.raises(
        ConfigError, match=r"trainable_mode: got mm_stage1, .*takes none; give llama_type mixtral_sparse"
    ):
        run(inputs, tmp_path / "run", llama_type="mixtral_sparse", trainable_mode="mm_stage1")


def test_ranks_do_not_share_rows_with_images(inputs, tmp_path):
    config = seeing_config(inputs, tmp_path / "run", context_parallel_size=2)
    with pytest.raises(
        ConfigError, match="context_parallel_size: got 2, but ranks cannot share rows with images; give 1"
    ):
        carry_out(config, dry_run=True, world=2)


def _tensors(folder):
    from accessory.checkpoint.folder import open_checkpoint

    return {n: t.load() for n, t in open_checkpoint(folder).tensors.items()}


def test_held_out_images_are_seen_whole(inputs, tmp_path, monkeypatch):
    """Only training crops images. Held-out images are transformed as for inference."""
    from accessory.data.transform import ImageLoader

    asked = []
    original = ImageLoader.of.__func__
    monkeypatch.setattr(
        ImageLoader, "of", classmethod(lambda cls, name, size: asked.append(name) or original(cls, name, size))
    )
    crops = {"image_transform": "random_resized_crop", "trainable_mode": "mm_stage1", "max_steps": 1}
    run(inputs, tmp_path / "run", eval_data=str(inputs / "data.yaml"), **crops)
    assert asked == ["random_resized_crop", "padded_resize"]
