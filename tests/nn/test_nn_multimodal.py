"""Images in the network, against transformers (which takes embeddings as inputs) and a plain computation."""

import pytest
import torch
import torch.nn.functional as F
from helpers.random_models import hf_mixtral
from helpers.sizes import TINY
from helpers.training import oracle_tensors
from helpers.vision import random_pixels, random_tower, tiny_clip, tiny_sphinx

from accessory.checkpoint.names import image_shapes
from accessory.config import LlamaType, ModelArgs
from accessory.data.image_tokens import insert_image_tokens
from accessory.nn.cache import PagedCache
from accessory.nn.decoder import Decoder, init_weights
from accessory.ops.paged_attention import PagedBatch
from accessory.parallel.local_shard import local_tensors
from accessory.vision_config import IMAGE_ID, SPHINX

ARGS = TINY


def seeing(implementation="sparse", vision=None, seed=3):
    """A decoder that takes images: the oracle's weights with random projections."""
    args = ARGS.replace(vision=vision or tiny_sphinx())
    decoder = Decoder(args, implementation, sees=True)
    init_weights(decoder, seed, std=0.5)
    tensors = oracle_tensors(ARGS)
    for held in local_tensors(decoder):
        if held.name in tensors:
            held.tensor.copy_(tensors[held.name])
    with torch.no_grad():  # with weight 1 and bias 0, a missing norm weight would not show
        decoder.visual_proj[1].weight += 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(5))
    return decoder.eval()


def plain_words(decoder, features):
    """The image embeddings, computed step by step: [start, queries, tokens, end] of each view."""
    rows = []
    for v in range(len(features.visual_VTC)):
        rows.append(decoder.start_img[0])
        for name, x in (("qformer_proj", features.query_VQC), ("visual_proj", features.visual_VTC)):
            if x is None:
                continue
            linear, norm = getattr(decoder, name)
            y = x[v] @ linear.weight.T + linear.bias
            y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            rows.append(y * norm.weight + norm.bias)
        rows.append(decoder.end_img[0])
    return torch.cat(rows)


@pytest.mark.parametrize("implementation", ["base", "sparse"])
@pytest.mark.parametrize(("vision", "views"), [(tiny_sphinx(), 1), (tiny_sphinx(), 5), (tiny_clip(), 1)])
def test_logits_are_those_of_transformers_given_the_embeddings(implementation, vision, views):
    """transformers' Mixtral gets embeddings that are laid out by hand: those of tokens and of two images."""
    decoder = seeing(implementation, vision)
    features = random_tower(vision, views).encode(random_pixels(vision, 2, views))
    words = vision.image_tokens(views)
    rows = [insert_image_tokens([1, 7, 9, 12], words, 1), insert_image_tokens([5, 8, 3, 2], words, 1)]
    assert rows[0][0] == 1  # image tokens follow BOS
    assert rows[1][0] == IMAGE_ID  # without BOS, image tokens come first
    with torch.no_grad():
        ours = decoder(torch.tensor(rows), images=features).logits
        model = hf_mixtral(ARGS)
        seen = plain_words(decoder, features).view(2, words, -1)
        embedded = model.model.embed_tokens(torch.tensor([[1, 7, 9, 12], [5, 8, 3, 2]]))
        first = torch.cat([embedded[0, :1], seen[0], embedded[0, 1:]])
        second = torch.cat([seen[1], embedded[1]])
        theirs = model(inputs_embeds=torch.stack([first, second])).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_text_is_bit_for_bit_what_a_network_without_eyes_says():
    decoder = seeing()
    blind = Decoder(ARGS, "sparse").eval()
    blind.load_state_dict(decoder.state_dict(), strict=False)
    tokens = torch.randint(0, 64, (3, 9))
    assert torch.equal(decoder(tokens).logits, blind(tokens).logits)


@pytest.mark.parametrize("vision", [tiny_sphinx(), tiny_clip()])
def test_rows_with_and_without_images_share_a_batch(vision):
    decoder = seeing(vision=vision)
    features = random_tower(vision).encode(random_pixels(vision, 1))
    row = insert_image_tokens([1, 7, 9], vision.image_tokens(1), 1)
    batch = torch.zeros(2, len(row), dtype=torch.int64)
    batch[0, :4], batch[1] = torch.tensor([1, 5, 6, 7]), torch.tensor(row)
    together = decoder(batch, images=features).logits
    torch.testing.assert_close(together[0, :4], decoder(batch[:1, :4]).logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1], decoder(batch[1:], images=features).logits[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_with_a_cache_and_without():
    vision = tiny_sphinx()
    decoder = seeing(vision=vision)
    features = random_tower(vision).encode(random_pixels(vision, 1))
    row = torch.tensor([insert_image_tokens([1, 7, 9, 4, 2], vision.image_tokens(1), 1)])
    whole = decoder(row, images=features).logits
    tokens = row.shape[1]
    pages = list(range(1, 2 + tokens // 64))
    cache = PagedCache(ARGS, 1 + len(pages), "cpu", torch.float32)
    first = tokens - 2
    positions = torch.arange(tokens)[None]
    cache.begin(PagedBatch.of([(first, first, pages)]))
    parts = [decoder(row[:, :first], positions[:, :first], cache=cache, images=features).logits]
    for t in range(first, tokens):
        cache.begin(PagedBatch.of([(1, t + 1, pages)]))
        parts.append(decoder(row[:, t : t + 1], positions[:, t : t + 1], cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_projections_without_an_image_have_zero_gradients_and_not_none():
    decoder = seeing()
    decoder(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    for name, parameter in decoder.named_parameters():
        if name.startswith(("visual_proj", "qformer_proj", "start", "end")):
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_gradients_by_finite_differences():
    vision = tiny_clip()
    decoder = seeing(vision=vision).double()
    tower = random_tower(vision, dtype=torch.float64)
    features = tower.encode(random_pixels(vision, 1))
    row = torch.tensor([insert_image_tokens([1, 7, 9], vision.image_tokens(1), 1)])
    label = torch.tensor([9])

    def loss():
        logits = decoder(row, images=features).logits
        return F.cross_entropy(logits[:, -2].double(), label)

    value = loss()
    value.backward()
    for name in ("visual_proj.0.weight", "visual_proj.1.weight", "start_img", "end_img"):
        parameter = decoder.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        slope = float((parameter.grad * direction).sum())
        step = 1e-3
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        # The residual stream is fp32, which limits how exact the differences are.
        assert float(above - below) / (2 * step) == pytest.approx(slope, rel=3e-2, abs=1e-4), name


def test_the_originals_numbers():
    """An image takes 291 positions, 1455 in high resolution. Channels: 5632 of three encoders, 768 of the Q-Former."""
    assert (SPHINX.image_tokens(1), SPHINX.image_tokens(5)) == (291, 1455)
    assert (SPHINX.pixels(1), SPHINX.pixels(5)) == (512, 1024)
    shapes = image_shapes(ModelArgs())
    assert shapes["visual_proj.0.weight"] == (4096, 5632)
    assert shapes["qformer_proj.0.weight"] == (4096, 768)
    assert shapes["start_img"] == (1, 1, 4096)
    assert LlamaType.parse("mixtral_sparse_ens5").image_views == 5
