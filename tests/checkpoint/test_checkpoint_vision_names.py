"""Tensor names of image encoders: the libraries that published weights and ours compute the same from them."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.vision import (
    CLIP,
    CONVNEXT,
    DINOV2,
    QFORMER,
    import_foreign,
    random_pixels,
    random_tower,
    randomise,
    tiny_clip,
    tiny_sphinx,
)
from hypothesis import given
from hypothesis import strategies as st

from accessory.checkpoint.lazy import Constant, Lazy
from accessory.checkpoint.names import is_encoder_tensor
from accessory.checkpoint.vision import fill
from accessory.checkpoint.vision_names import canonical, destinations, expected_shapes, parts_of
from accessory.errors import CheckpointError
from accessory.nn.vision import VisionTower, normalised, views_of
from accessory.vision_config import SPHINX, EncoderArgs, VisionArgs


def lazily(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, Lazy]:
    return {prefix + name: Constant(tensor) for name, tensor in state.items()}


def alone(encoder: EncoderArgs) -> VisionArgs:
    return VisionArgs(encoders=(encoder,)) if encoder.kind != "blip2" else VisionArgs(encoders=(CLIP,), query=encoder)


def tower_of(raw: dict[str, Lazy], args: VisionArgs) -> VisionTower:
    tower = VisionTower(args, 1)
    fill(destinations(tower), canonical(raw, args))
    return tower


def seen(encoder: EncoderArgs, pixels: torch.Tensor) -> torch.Tensor:
    return normalised(views_of(pixels, encoder.size, 1), encoder)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.std() > 0.1  # nearly constant outputs would prove nothing
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quick", [True, False])
def test_clip_computes_what_open_clip_does(quick):
    open_clip = import_foreign("open_clip")
    vision = open_clip.CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=14, image_size=28, mlp_ratio=2)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=16, width=16, heads=2, layers=1)
    theirs = open_clip.CLIP(24, vision, text, quick_gelu=quick).eval()
    randomise(theirs)
    encoder = EncoderArgs(
        name="clip", kind="clip", size=28, config=CLIP.config | {"hidden_act": "quick_gelu" if quick else "gelu"}
    )
    args = alone(encoder)
    tower = tower_of(lazily(theirs.state_dict(), "clip."), args)
    pixels = random_pixels(args, 2)
    visual = theirs.visual
    with torch.no_grad():  # as the original: the last norm for every token, and no projection
        x = visual.conv1(seen(encoder, pixels)).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(2, 1, -1), x], dim=1) + visual.positional_embedding
        expected = visual.ln_post(visual.transformer(visual.ln_pre(x)))
    close(tower.encode(pixels).visual_VTC, expected)


@pytest.mark.parametrize(("prefix", "within"), [("openclip_convnext_xxl.", ""), ("vision.convnext.", "visual.trunk.")])
def test_convnext_computes_what_timm_does(prefix, within):
    timm = import_foreign("timm")
    sizes = {"depths": CONVNEXT.config["depths"], "dims": CONVNEXT.config["hidden_sizes"]}
    theirs = timm.models.convnext.ConvNeXt(**sizes, norm_eps=1e-5, num_classes=10).eval()
    randomise(theirs)
    theirs.head.global_pool = theirs.head.flatten = theirs.head.fc = torch.nn.Identity()
    args = alone(CONVNEXT)
    tower = tower_of(lazily(theirs.state_dict(), prefix + within), args)
    pixels = random_pixels(args, 2)
    with torch.no_grad():
        tokens = theirs(seen(CONVNEXT, pixels)).flatten(2).transpose(1, 2)
    close(tower.encode(pixels).visual_VTC, torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1))


def test_the_ensembles_convnext_has_timms_epsilon():
    timm = import_foreign("timm")
    with torch.device("meta"):
        theirs = timm.create_model("convnext_xxlarge", num_classes=0)
        ours = VisionTower(alone(SPHINX.encoders[1]), 1).encoders["convnext"]
    norms = [[m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)] for model in (theirs, ours)]
    assert norms[0] == norms[1] == [1e-5] * len(norms[1])


def hub_dinov2(state: dict[str, torch.Tensor], pixels: torch.Tensor, heads: int, offset: float) -> torch.Tensor:
    """DINOv2 (SwiGLU) written out, with the tensor names of its hub's models."""

    def linear(x, name):
        return F.linear(x, state[name + ".weight"], state[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-6)

    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    h, w = x.shape[-2:]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    cls, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    n = math.isqrt(grid.shape[1])
    grid = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2)
    scale = ((h + offset) / n, (w + offset) / n)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1).reshape(1, h * w, -1)
    x = x + torch.cat([cls, grid], dim=1)
    for i in range(1 + max(int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)", name)))):
        at = f"blocks.{i}."
        q, k, v = linear(norm(x, at + "norm1"), at + "attn.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + state[at + "ls1.gamma"] * linear(y.transpose(1, 2).flatten(2), at + "attn.proj")
        gate, up = linear(norm(x, at + "norm2"), at + "mlp.w12").chunk(2, dim=-1)
        x = x + state[at + "ls2.gamma"] * linear(F.silu(gate) * up, at + "mlp.w3")
    return norm(x, "norm")


def hub_state(width: int, layers: int, positions: int) -> dict[str, torch.Tensor]:
    hidden = (width * 4 * 2 // 3 + 7) // 8 * 8
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, positions + 1, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(layers):
        sizes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        sizes |= {"mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden)}
        for name, shape in sizes.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (width,)
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    module = torch.nn.Module()
    state = {name.replace(".", "-"): torch.nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
    for name, parameter in state.items():
        module.register_parameter(name, parameter)
    randomise(module)
    return {name.replace("-", "."): p.detach() for name, p in state.items()}


def test_dinov2_computes_what_its_hubs_models_do():
    state = hub_state(48, 2, 25)
    args = alone(DINOV2)
    tower = tower_of(lazily(state, "dinov2_vitg14."), args)
    pixels = random_pixels(args, 2)
    expected = hub_dinov2(state, seen(DINOV2, pixels), heads=4, offset=0.1)
    close(tower.encode(pixels).visual_VTC, expected)
    elsewhere = hub_dinov2(state, seen(DINOV2, pixels), heads=4, offset=0.6)
    assert (elsewhere - expected).abs().max() > 1e-2  # so the positions' resampling matters here


def test_dinov2_computes_what_timm_does():
    timm = import_foreign("timm")
    native = EncoderArgs(name="dinov2", kind="dinov2", size=28, config=DINOV2.config | {"image_size": 28})
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=28,
        patch_size=14,
        embed_dim=48,
        depth=2,
        num_heads=4,
        init_values=1.0,
        mlp_ratio=2 * 128 / 48,  # timm counts gate and up together as hidden
        mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=torch.nn.SiLU,
        num_classes=0,
    ).eval()
    randomise(theirs)
    state = {
        re.sub(r"mlp\.fc1", "mlp.w12", re.sub(r"mlp\.fc2", "mlp.w3", name)): tensor
        for name, tensor in theirs.state_dict().items()
    }
    args = alone(native)
    pixels = random_pixels(args, 2)
    with torch.no_grad():
        expected = theirs.forward_features(seen(native, pixels))
    close(tower_of(lazily(state, "dinov2_vitg14."), args).encode(pixels).visual_VTC, expected)


def blip2_model():
    from transformers import Blip2Config, Blip2Model, OPTConfig

    config = Blip2Config(
        vision_config=QFORMER.config["vision"],
        qformer_config=QFORMER.config["qformer"],
        text_config=OPTConfig(
            vocab_size=16,
            hidden_size=16,
            num_hidden_layers=1,
            ffn_dim=16,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        ).to_dict(),
        num_query_tokens=3,
    )
    model = Blip2Model(config).eval()
    randomise(model)
    return model


def blip2_expected(model, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        image = model.vision_model(pixel_values=pixels).last_hidden_state
        mask = torch.ones(image.shape[:-1], dtype=torch.long)
        query = model.query_tokens.expand(len(image), -1, -1)
        return model.qformer(query, encoder_hidden_states=image, encoder_attention_mask=mask).last_hidden_state


def test_blip2_computes_what_transformers_whole_model_does():
    theirs = blip2_model()
    args = alone(QFORMER)
    raw = lazily(theirs.state_dict(), "qformer.") | lazily(
        random_tower(tiny_clip()).encoders["clip"].state_dict(), "vision.clip."
    )
    pixels = random_pixels(args, 2)
    features = tower_of(raw, args).encode(pixels)
    close(features.query_VQC, blip2_expected(theirs, seen(QFORMER, pixels)))


def test_blip2s_separate_biases_are_joined():
    theirs = blip2_model()
    state = dict(theirs.state_dict())
    for name in [n for n in state if n.endswith("qkv.bias")]:
        q, k, v = state.pop(name).chunk(3)
        k.zero_()  # k is a view, so this zeroes the bias of `theirs` as well
        state |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
    args = alone(QFORMER)
    raw = lazily(state, "qformer.") | lazily(random_tower(tiny_clip()).encoders["clip"].state_dict(), "vision.clip.")
    pixels = random_pixels(args, 1)
    close(tower_of(raw, args).encode(pixels).query_VQC, blip2_expected(theirs, seen(QFORMER, pixels)))


def to_old_dinov2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensor names that transformers used before 5.2x, as in the files on the Hub."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        old = name.replace("attention.o_proj", "attention.output.dense").replace("mlp.down_proj", "mlp.weights_out")
        for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
            old = old.replace(f"attention.{letter}_proj", f"attention.attention.{word}")
        if "gate_proj" in old:
            up = state[name.replace("gate_proj", "up_proj")]
            out[old.replace("gate_proj", "weights_in")] = torch.cat([tensor, up])
        elif "up_proj" not in old:
            out[old] = tensor
    return out


@pytest.mark.parametrize(
    ("encoder", "spell"),
    [
        (CLIP, lambda state: {f"vision_model.{n}": t for n, t in state.items()}),
        (CLIP, lambda state: state | {"embeddings.position_ids": torch.arange(5)[None]}),
        (CONVNEXT, lambda state: {f"convnext.{n}": t for n, t in state.items()}),
        (DINOV2, lambda state: to_old_dinov2(state) | {"embeddings.mask_token": torch.zeros(1, 48)}),
        (DINOV2, lambda state: {f"dinov2.{n}": t for n, t in to_old_dinov2(state).items()}),
        (DINOV2, dict),
    ],
)
def test_older_spellings_of_transformers_mean_the_same(encoder, spell):
    args = alone(encoder)
    tower = random_tower(args)
    canonical_state = {n.removeprefix(f"vision.{encoder.name}."): t for n, t in destinations(tower).items()}
    again = tower_of(lazily(spell(canonical_state), f"vision.{encoder.name}."), args)
    pixels = random_pixels(args)
    assert torch.equal(tower.encode(pixels).visual_VTC, again.encode(pixels).visual_VTC)


def test_encoder_tensors_are_told_from_the_networks():
    assert not any(
        map(is_encoder_tensor, ["qformer_proj.0.weight", "visual_proj.1.bias", "start_img", "tok_embeddings.weight"])
    )
    assert is_encoder_tensor("clip.visual.conv1.weight")
    assert is_encoder_tensor("vision.clip.post_layernorm.bias")


@pytest.mark.parametrize("args", [tiny_sphinx(), tiny_clip()])
def test_canonical_names_are_their_own(args):
    tower = random_tower(args)
    places = destinations(tower)
    assert len(canonical(lazily(places), args)) == len(places)
    for encoder in args.all:
        prefix = f"vision.{encoder.name}."
        assert all(
            parts_of(encoder.kind, n.removeprefix(prefix)) == (n.removeprefix(prefix),)
            for n in places
            if n.startswith(prefix)
        )


def test_encoders_without_any_tensor_are_left_out():
    tower = random_tower()
    raw = {n: t for n, t in lazily(destinations(tower)).items() if not n.startswith("vision.dinov2.")}
    raw |= lazily({"layers.0.ffn_norm.weight": torch.ones(4), "dinov2_vitb14.cls_token": torch.ones(1)})
    assert {n.split(".")[1] for n in canonical(raw, tiny_sphinx())} == {"clip", "convnext", "qformer"}


def test_of_two_encoders_of_a_kind_the_originals_names_mean_the_first():
    args = VisionArgs(encoders=(CLIP, EncoderArgs(name="other", kind="clip", size=28, config=CLIP.config)))
    within = random_tower(tiny_clip()).encoders["clip"].state_dict()
    found = canonical(lazily(within, "clip.") | lazily(within, "vision.other."), args)
    assert {n.split(".")[1] for n in found} == {"clip", "other"}


@pytest.fixture(scope="module")
def shapes():
    return expected_shapes(tiny_clip())


@given(st.data())
def test_what_is_wrong_with_an_encoder_is_named(shapes, data):
    good = lazily({n: torch.zeros(s) for n, s in shapes.items()})
    name = data.draw(st.sampled_from(sorted(good)))
    within = name.split(".", 2)[2]
    what = data.draw(st.sampled_from(["missing", "shape", "unknown", "twice"]))
    if what == "missing":
        del good[name]
        wanted = f"1 tensors missing: {within}"
    elif what == "shape":
        good[name] = Constant(torch.zeros(*shapes[name], 2))
        wanted = f"{within} {good[name].shape} instead of {shapes[name]}"
    elif what == "unknown":
        good[name + "_more"] = good[name]
        wanted = f"1 tensors unknown: {within}_more"
    else:
        good[f"clip.vision_model.{within}"] = good[name]
        wanted = f"1 tensors there twice, under different names: {within}"
    with pytest.raises(CheckpointError, match=re.escape(wanted)) as raised:
        canonical(good, tiny_clip(), shapes)
    assert "encoder clip" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_stack_that_cannot_be_cut_is_named():
    raw = lazily({"clip.visual.transformer.resblocks.0.attn.in_proj_bias": torch.zeros(95)})
    with pytest.raises(CheckpointError, match=r"in_proj_bias \(95,\)"):
        canonical(raw, tiny_clip())
