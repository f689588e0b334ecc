"""Image encoders by hf:// addresses, from repositories with the same files as those of SPHINX's four encoders."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from helpers.hub_server import Repo, serve
from helpers.vision import CLIP, CONVNEXT, DINOV2, QFORMER, random_pixels, random_tower
from safetensors.torch import save

from accessory.checkpoint.vision import load_tower
from accessory.errors import CheckpointError
from accessory.vision_config import PUBLISHED, VisionArgs

NOTHING = b"not to be fetched" * 100
AROUND_TEXT = dict.fromkeys(["merges.txt", "vocab.json", "tokenizer.json", "special_tokens_map.json"], b"{}")


def pickled(state: dict[str, torch.Tensor]) -> bytes:
    file = BytesIO()
    torch.save(state, file)
    return file.getvalue()


def timm_name(name: str) -> str:
    """What timm calls a tensor of transformers' ConvNextModel."""
    for theirs, ours in (
        (r"embeddings\.patch_embeddings\.", "stem.0."),
        (r"embeddings\.layernorm\.", "stem.1."),
        (r"encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
        (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
        (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm\.", r"stages.\1.blocks.\2.norm."),
        (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.pwconv([12])\.", r"stages.\1.blocks.\2.mlp.fc\3."),
        (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_scale_parameter", r"stages.\1.blocks.\2.gamma"),
        (r"layernorm\.", "head.norm."),
    ):
        if re.match(theirs, name):
            return re.sub(theirs, ours, name, count=1)
    raise AssertionError(name)


def published(tower) -> dict[str, Repo]:
    """The four repositories: each has the weights in the form we read, and other files that must not be fetched."""
    states = {name: dict(tower.encoders[name].state_dict()) for name in tower.encoders}
    text = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    clip = {f"vision_model.{name}": t for name, t in states["clip"].items()} | text
    convnext = {f"visual.trunk.{timm_name(n)}": t for n, t in states["convnext"].items()}
    convnext |= {"visual.head.proj.weight": torch.ones(2), "token_embedding.weight": torch.ones(2), **text}
    blip2 = states["qformer"] | {"language_projection.weight": torch.ones(2, 2)}
    parts = sorted(blip2)[:9], sorted(blip2)[9:]
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = {"weight_map": {t: name for name, part in zip(names, parts, strict=False) for t in part}}
    index["weight_map"]["language_model.lm_head.weight"] = names[2]
    return {
        PUBLISHED["clip"]: Repo(
            {
                "config.json": b"{}",
                "model.safetensors": save(clip),
                **dict.fromkeys(["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"], NOTHING),
                **AROUND_TEXT,
            }
        ),
        PUBLISHED["convnext"]: Repo(
            {
                "open_clip_config.json": b"{}",
                "open_clip_model.safetensors": save(convnext),
                "open_clip_pytorch_model.bin": NOTHING,
                **AROUND_TEXT,
            }
        ),
        PUBLISHED["dinov2"]: Repo(
            {"config.json": b"{}", "model.safetensors": save(states["dinov2"]), "pytorch_model.bin": NOTHING}
        ),
        PUBLISHED["qformer"]: Repo(
            {
                "config.json": b"{}",
                "model.safetensors.index.json": json.dumps(index).encode(),
                **{name: save({t: blip2[t] for t in part}) for name, part in zip(names, parts, strict=False)},
                names[2]: NOTHING,  # has only the language model
                **dict.fromkeys(["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], NOTHING),
            }
        ),
    }


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    tower = random_tower()
    repos = {address.removeprefix("hf://"): repo for address, repo in published(tower).items()}
    with serve(repos) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server, tower


def addressed() -> VisionArgs:
    encoders = tuple(replace(e, path=PUBLISHED[e.name]) for e in (CLIP, CONVNEXT, DINOV2))
    return VisionArgs(encoders=encoders, query=replace(QFORMER, path=PUBLISHED["qformer"]))


def same(loaded, tower) -> None:
    pixels = random_pixels(tower.args)
    ours, theirs = loaded.encode(pixels), tower.encode(pixels)
    assert torch.equal(ours.visual_VTC, theirs.visual_VTC)
    assert torch.equal(ours.query_VQC, theirs.query_VQC)


def test_the_four_come_from_where_they_are_published(hub):
    server, tower = hub
    same(load_tower(addressed(), 1, {}, dtype=torch.float32), tower)
    unwanted = (".bin", ".h5", ".msgpack", "model-00003-of-00003.safetensors")
    assert not [name for name in server.downloads() if name.endswith(unwanted)]
    fetched = len(server.downloads())
    same(load_tower(addressed(), 1, {}, dtype=torch.float32), tower)
    assert len(server.downloads()) == fetched, "a second time from the cache"


def test_without_a_network_the_cache_serves(hub, monkeypatch):
    server, tower = hub
    load_tower(addressed(), 1, {}, dtype=torch.float32)
    server.repos.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    same(load_tower(addressed(), 1, {}, dtype=torch.float32), tower)


def test_a_repository_without_weights_is_named_with_its_encoder(hub):
    server, _ = hub
    name = PUBLISHED["dinov2"].removeprefix("hf://")
    server.repos[name] = Repo({"README.md": b"", "a.safetensors": b"", "b.safetensors": b""})
    with pytest.raises(CheckpointError, match=rf"^vision: encoder dinov2: hf://{name}: no checkpoint among the files"):
        load_tower(addressed(), 1, {})


@pytest.mark.parametrize("forms", [["open_clip_pytorch_model.bin"], ["open_clip_model.safetensors", "other.bin"]])
def test_a_folder_of_open_clip_loads(tmp_path, forms):
    tower = random_tower()
    state = {f"visual.trunk.{timm_name(n)}": t for n, t in tower.encoders["convnext"].state_dict().items()}
    for form in forms:
        (tmp_path / form).write_bytes(
            save(state) if form.endswith("safetensors") else pickled(state) if len(forms) == 1 else NOTHING
        )
    args = VisionArgs(encoders=(replace(CONVNEXT, path=str(tmp_path)),))
    loaded = load_tower(args, 1, {}, dtype=torch.float32)
    for name, tensor in tower.encoders["convnext"].state_dict().items():
        assert torch.equal(loaded.encoders["convnext"].state_dict()[name], tensor), name
