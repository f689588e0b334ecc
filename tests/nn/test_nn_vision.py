"""The tower of image encoders: against transformers' own models, and what it does with views, caches and dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.vision import CLIP, CONVNEXT, DINOV2, QFORMER, random_pixels, random_tower, tiny_clip, tiny_sphinx
from hypothesis import given
from hypothesis import strategies as st

from accessory.nn.vision import FeatureCache, Features, VisionTower, content_of, normalised, views_of
from accessory.nn.vision_encoders import resampled_positions
from accessory.vision_config import CLIP_MEAN, CLIP_STD, SPHINX, VISION_PRESETS, EncoderArgs, VisionArgs


def without(encoder: EncoderArgs, *keys: str) -> EncoderArgs:
    config = {k: v for k, v in encoder.config.items() if k not in keys}
    return EncoderArgs(name=encoder.name, kind=encoder.kind, size=encoder.size, config=config)


PLAIN = VisionArgs(encoders=(CLIP, without(CONVNEXT, "norm_eps"), without(DINOV2, "interpolate_offset")), query=QFORMER)
IMAGENET = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def plainly(tower: VisionTower, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each encoder's tokens of whole images, by transformers' classes, called as in their documentation."""
    import transformers as tf

    def same(model, name):
        model.load_state_dict(tower.encoders[name].state_dict(), strict=False)
        return model.eval()

    def sized(size):
        return F.interpolate(pixels, size=(size, size), mode="bicubic")

    configs = {e.name: e.config for e in tower.args.all}
    colours = sized(28) * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    with torch.no_grad():
        clip = same(tf.CLIPVisionModel(tf.CLIPVisionConfig(**configs["clip"])), "clip")
        convnext = same(tf.ConvNextModel(tf.ConvNextConfig(**configs["convnext"])), "convnext")
        dinov2 = same(tf.Dinov2Model(tf.Dinov2Config(**configs["dinov2"])), "dinov2")
        vision = tf.Blip2VisionModel(tf.Blip2VisionConfig(**configs["qformer"]["vision"])).eval()
        qformer = tf.Blip2QFormerModel(tf.Blip2QFormerConfig(**configs["qformer"]["qformer"])).eval()
        own = tower.encoders["qformer"].state_dict()
        for model, prefix in ((vision, "vision_model."), (qformer, "qformer.")):
            model.load_state_dict({n.removeprefix(prefix): t for n, t in own.items() if n.startswith(prefix)})
        grid = convnext.layernorm(convnext(sized(64)).last_hidden_state.permute(0, 2, 3, 1))
        seen = vision(sized(28)).last_hidden_state
        query = qformer(own["query_tokens"].expand(len(seen), -1, -1), encoder_hidden_states=seen)
        return {
            "clip": clip.post_layernorm(clip(sized(28)).last_hidden_state),
            "convnext": torch.cat([grid.mean((1, 2))[:, None], grid.flatten(1, 2)], dim=1),
            "dinov2": dinov2((colours - IMAGENET[0]) / IMAGENET[1]).last_hidden_state,
            "qformer": query.last_hidden_state,
        }


def test_each_encoder_gives_what_transformers_model_does_side_by_side():
    tower, pixels = random_tower(PLAIN), random_pixels(PLAIN, 2)
    expected = plainly(tower, pixels)
    features = tower.encode(pixels)
    assert min(t.std() for t in expected.values()) > 0.1
    clip, convnext, dinov2 = features.visual_VTC.split([32, 40, 48], dim=-1)
    for name, tokens in (("clip", clip), ("convnext", convnext), ("dinov2", dinov2), ("qformer", features.query_VQC)):
        torch.testing.assert_close(tokens, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "key"), [(CONVNEXT, "norm_eps"), (DINOV2, "interpolate_offset")], ids=["convnext", "dinov2"]
)
def test_what_the_published_weights_want_differs_from_transformers_own_way(encoder, key):
    ours, theirs = VisionArgs(encoders=(encoder,)), VisionArgs(encoders=(without(encoder, key),))
    pixels = random_pixels(ours)
    towers = [random_tower(args) for args in (ours, theirs)]
    if encoder is CONVNEXT:
        for tower in towers:  # a tiny variance, so that the epsilon shows
            tower.encoders["convnext"].embeddings.patch_embeddings.weight.mul_(1e-3)
            tower.encoders["convnext"].embeddings.patch_embeddings.bias.zero_()
    a, b = (tower.encode(pixels).visual_VTC for tower in towers)
    assert (a - b).abs().max() > 1e-2


def test_positions_are_resampled_at_the_hubs_scale():
    n, m, channels, offset = 7, 3, 2, 0.1
    positions = torch.randn(1, n * n + 1, channels, generator=torch.Generator().manual_seed(0))
    result = resampled_positions(positions, (m, m), offset)

    def weight(x: float) -> float:  # Keys' cubic, a = -0.75, as torch's bicubic
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = torch.zeros(m, n)
    for i in range(m):
        at = (i + 0.5) * n / (m + offset) - 0.5
        for j in range(int(at // 1) - 1, int(at // 1) + 3):
            matrix[i, min(max(j, 0), n - 1)] += weight(at - j)
    grid = torch.einsum("in,jm,nmc->ijc", matrix, matrix, positions[0, 1:].view(n, n, channels))
    torch.testing.assert_close(result[0, 1:], grid.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(result[:, 0], positions[:, 0])
    assert resampled_positions(positions, (n, n), offset) is positions


def test_token_counts_of_the_real_ensemble():
    assert (SPHINX.image_tokens(1), SPHINX.image_tokens(5)) == (291, 1455)
    assert (SPHINX.pixels(1), SPHINX.pixels(5)) == (512, 1024)
    assert [e.tokens for e in SPHINX.all] == [257, 257, 257, 32]
    assert SPHINX.channels == 1024 + 3072 + 1536


@pytest.mark.parametrize("views", [1, 5])
def test_a_small_ensemble_gives_as_many_tokens_as_its_configuration_says(views):
    args = tiny_sphinx()
    tower = random_tower(args, views)
    assert tower.pixels == (64 if views == 1 else 128)
    features = tower.encode(random_pixels(args, 2, views))
    assert features.visual_VTC.shape == (2 * views, 5, 120)
    assert features.query_VQC is not None
    assert features.query_VQC.shape == (2 * views, 3, 24)
    assert views * (5 + 3 + 2) == args.image_tokens(views)
    assert tower.empty().visual_VTC.shape == (0, 5, 120)
    assert tower.encode(torch.empty(0, 3, tower.pixels, tower.pixels)).query_VQC.shape == (0, 3, 24)


def test_the_small_preset_sees():
    args = VISION_PRESETS["small"]
    features = random_tower(args).encode(random_pixels(args))
    assert features.query_VQC is None
    tokens = features.visual_VTC
    assert tokens.shape == (1, 50, 1280)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    within = random_tower(args).encoders["efficientnet"](normalised(random_pixels(args), args.encoders[0]))
    torch.testing.assert_close(tokens[0, 1 + 7 * 2 + 3], within[0, :, 2, 3])  # positions in reading order


def test_five_views_are_the_whole_and_its_quarters():
    colours = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    image = colours.repeat_interleave(32, 0).repeat_interleave(32, 1).expand(1, 3, 64, 64)
    views = views_of(torch.cat([image, -image]), 16, 5)
    assert views.shape == (10, 3, 16, 16)
    for sign, group in ((1, views[:5]), (-1, views[5:])):
        whole, *quarters = group
        for quarter, colour in zip(quarters, colours.flatten(), strict=True):
            # Compare away from the edge, where bicubic resampling blurs and rings.
            torch.testing.assert_close(quarter[:, 4:-4, 4:-4], (sign * colour).expand(3, 8, 8))
        corners = whole[0, [2, 2, -3, -3], [2, -3, 2, -3]]
        torch.testing.assert_close(corners, sign * colours.flatten())


def test_views_are_resampled_without_smoothing_and_taken_from_the_image_at_twice_the_size():
    pixels = random_pixels(tiny_sphinx(), 2, 5)
    views = views_of(pixels, 28, 5)
    double = F.interpolate(pixels, size=(56, 56), mode="bicubic", align_corners=False, antialias=False)
    for i in range(2):
        parts = [
            F.interpolate(pixels[i : i + 1], size=(28, 28), mode="bicubic")[0],
            double[i, :, :28, :28],
            double[i, :, :28, 28:],
            double[i, :, 28:, :28],
            double[i, :, 28:, 28:],
        ]
        torch.testing.assert_close(views[5 * i : 5 * i + 5], torch.stack(parts))


def test_features_of_five_views_are_those_of_each_view():
    args = tiny_sphinx()
    five, one = random_tower(args, 5), random_tower(args, 1)
    pixels = random_pixels(args, 2, 5)
    features = five.encode(pixels)
    for image in range(2):
        for view in range(5):
            seen = {size: views_of(pixels, size, 5)[5 * image + view] for size in (28, 64)}
            alone = [one_of(one, encoder.name, encoder, seen[encoder.size]) for encoder in (*args.encoders, args.query)]
            visual, query = features.visual_VTC[5 * image + view], features.query_VQC[5 * image + view]
            torch.testing.assert_close(visual, torch.cat(alone[:3], dim=-1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(query, alone[3], rtol=1e-4, atol=1e-5)


def one_of(tower: VisionTower, name: str, encoder: EncoderArgs, view: torch.Tensor) -> torch.Tensor:
    from accessory.nn.vision_encoders import run_encoder

    with torch.no_grad():
        return run_encoder(encoder.kind, tower.encoders[name], normalised(view[None], encoder))[0]


@pytest.mark.parametrize("kind", ["clip", "convnext", "dinov2", "blip2", "efficientnet_lite0"])
def test_each_encoder_is_shown_the_colours_as_it_was_trained_with_them(kind):
    colour = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)
    mean, std = {"dinov2": (IMAGENET[0], IMAGENET[1]), "efficientnet_lite0": (127 / 255, 128 / 255)}.get(
        kind, (torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1))
    )
    encoder = {e.kind: e for e in (CLIP, CONVNEXT, DINOV2, QFORMER, *VISION_PRESETS["small"].encoders)}[kind]
    as_clip = (colour - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    torch.testing.assert_close(normalised(as_clip[None], encoder)[0], (colour - mean) / std)


def test_batched_equals_single():
    for views in (1, 5):
        tower = random_tower(views=views, cache_bytes=0)
        pixels = random_pixels(tower.args, 4, views)  # more views than are run at once
        together = tower.encode(pixels)
        single = [tower.encode(p[None]) for p in pixels]
        torch.testing.assert_close(together.visual_VTC, torch.cat([f.visual_VTC for f in single]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.query_VQC, torch.cat([f.query_VQC for f in single]), rtol=1e-4, atol=1e-5)


def test_an_image_is_run_once_whatever_tensor_it_comes_in():
    tower, never = random_tower(views=5), random_tower(views=5, cache_bytes=0)
    pixels = random_pixels(tower.args, 3, 5)
    first = tower.encode(pixels[:2])
    assert tower.runs == 2
    again = tower.encode(torch.stack([pixels[1].clone(), pixels[2], pixels[1], pixels[0]]))
    assert tower.runs == 3
    expected = never.encode(pixels)
    never.encode(pixels)
    assert never.runs == 6
    assert len(never.feature_cache) == 0
    for i, j in enumerate((1, 2, 1, 0)):
        torch.testing.assert_close(again.visual_VTC[5 * i : 5 * i + 5], expected.visual_VTC[5 * j : 5 * j + 5])
        torch.testing.assert_close(again.query_VQC[5 * i : 5 * i + 5], expected.query_VQC[5 * j : 5 * j + 5])
    assert torch.equal(again.visual_VTC[15:], first.visual_VTC[:5])
    first.visual_VTC.zero_()  # changes by the caller must not reach the cached features
    tower.encode(pixels[:1]).visual_VTC.zero_()
    assert torch.equal(tower.encode(pixels[:1]).visual_VTC, again.visual_VTC[15:])
    assert tower.runs == 3


def test_the_digest_is_of_the_content():
    a = random_pixels(tiny_clip())[0]
    assert content_of(a) == content_of(a.clone()) == content_of(a.transpose(1, 2).contiguous().transpose(1, 2))
    assert content_of(a) != content_of(a + 1e-6 * a)


def test_what_is_kept_is_bounded_and_the_least_recently_used_goes_first():
    size = random_tower().encode(random_pixels(tiny_sphinx())).nbytes
    tower = random_tower(cache_bytes=2 * size)
    a, b, c = random_pixels(tower.args, 3)[:, None]
    for image, runs in ((a, 1), (b, 2), (a, 2), (c, 3), (a, 3), (b, 4)):
        tower.encode(image)
        assert tower.runs == runs
        assert tower.feature_cache.nbytes <= 2 * size


@given(st.integers(0, 60), st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 9), st.booleans())))
def test_keeping_is_as_in_a_list_that_is_kept_in_order_of_use(limit, steps):
    kept, model = FeatureCache(limit), []
    for name, size, put in steps:
        entry = next((e for e in model if e[0] == name), None)
        if put:
            kept.put(name.encode(), Features(torch.full((1, 1, size), 1.0), None))
            model = [e for e in model if e[0] != name] + ([(name, 4 * size)] if 4 * size <= limit else [])
            while sum(e[1] for e in model) > limit:
                model.pop(0)
        else:
            found = kept.get(name.encode())
            assert (found is None) == (entry is None)
            if entry is not None:
                assert found.nbytes == entry[1]
                model = [e for e in model if e != entry] + [entry]
        assert kept.nbytes == sum(e[1] for e in model) <= limit
        assert len(kept) == len(model)


def test_nothing_stale_is_kept():
    tower, pixels = random_tower(), random_pixels(tiny_sphinx())
    before = tower.encode(pixels)
    tower.to(torch.bfloat16)
    assert tower.encode(pixels).visual_VTC.dtype == torch.bfloat16
    tower.float().load_state_dict(random_tower(seed=1).state_dict())
    after = tower.encode(pixels).visual_VTC
    assert (after - before.visual_VTC).abs().max() > 0.1
    assert torch.equal(copy.deepcopy(tower).encode(pixels).visual_VTC, after)


def test_a_tower_in_half_precision_computes_in_it_throughout():
    tower, pixels = random_tower(dtype=torch.bfloat16), random_pixels(tiny_sphinx())
    seen = []

    def look(module, args, output):
        tensors = [t for t in (*args, output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        seen.extend((type(module).__name__, t.dtype) for t in tensors if t.dtype != torch.bfloat16)

    for module in tower.modules():
        module.register_forward_hook(look)
    features = tower.encode(pixels)
    assert not seen
    assert features.visual_VTC.dtype == features.query_VQC.dtype == torch.bfloat16
    exact = random_tower().encode(pixels)
    assert F.cosine_similarity(features.visual_VTC.float(), exact.visual_VTC, dim=-1).min() > 0.99
    assert tower.encode(pixels.bfloat16()).visual_VTC.dtype == torch.bfloat16


def test_always_evaluating_and_never_trained():
    args = VisionArgs(encoders=(CLIP,), query=QFORMER)  # its Q-Former has dropout by default
    tower, pixels = random_tower(args, cache_bytes=0), random_pixels(args)
    before = tower.encode(pixels)
    torch.nn.Sequential(tower).train()
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    after = tower.encode(pixels)
    assert torch.equal(before.query_VQC, after.query_VQC)
    assert not after.visual_VTC.requires_grad


def test_features_from_generating_serve_in_training():
    tower, pixels = random_tower(), random_pixels(tiny_sphinx())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        generating = tower.encode(pixels)
    training = tower.encode(pixels)
    assert tower.runs == 1
    assert generating.visual_VTC.dtype == torch.float32
    assert not generating.visual_VTC.is_inference()
    weight = torch.ones(120, 2, requires_grad=True)
    (training.visual_VTC @ weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("args", [tiny_sphinx(), VISION_PRESETS["small"]], ids=["sphinx", "small"])
def test_built_on_meta_and_filled_it_is_as_built_at_once(args):
    direct = random_tower(args)
    with torch.device("meta"):
        tower = VisionTower(args, 1)
    assert all(t.is_meta for t in (*tower.parameters(), *tower.buffers()))
    tower.to_empty(device="cpu")
    tower.load_state_dict(direct.state_dict())
    ours, theirs = dict(tower.named_buffers()), dict(direct.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, buffer in theirs.items():  # also those that are in no state dict
        assert torch.equal(ours[name], buffer), name
    pixels = random_pixels(args)
    assert torch.equal(tower.encode(pixels).visual_VTC, direct.encode(pixels).visual_VTC)


def test_names_in_the_state_dict_are_transformers_own():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        names = set(VisionTower(tiny_clip(), 1).state_dict())
        theirs = CLIPVisionModel(CLIPVisionConfig(**CLIP.config)).state_dict()
    assert names == {f"encoders.clip.{name}" for name in theirs}
