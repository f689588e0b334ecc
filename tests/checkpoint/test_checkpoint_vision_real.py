"""Names and shapes of the real ensemble, without weights: every tensor of the original's checkpoints has a place."""

from __future__ import annotations

import math

import torch

from accessory.checkpoint.lazy import Constant
from accessory.checkpoint.names import is_encoder_tensor
from accessory.checkpoint.vision_names import canonical, expected_shapes
from accessory.vision_config import SPHINX


def real_names() -> dict[str, tuple[int, ...]]:
    """Every encoder tensor of the original's checkpoints: names and shapes, taken from its libraries' sources."""
    shapes: dict[str, tuple[int, ...]] = {}

    def both(name: str, *shape: int) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = shape, shape[:1]

    at = "clip.visual."
    shapes |= {
        at + "conv1.weight": (1024, 3, 14, 14),
        at + "class_embedding": (1024,),
        at + "positional_embedding": (257, 1024),
        at + "proj": (1024, 768),
        "clip.logit_scale": (),
        "clip.positional_embedding": (77, 768),
        "clip.text_projection": (768, 768),
        "clip.token_embedding.weight": (49408, 768),
    }
    both(at + "ln_pre", 1024), both(at + "ln_post", 1024), both("clip.ln_final", 768)
    for i in range(24):
        block = f"{at}transformer.resblocks.{i}."
        shapes |= {block + "attn.in_proj_weight": (3072, 1024), block + "attn.in_proj_bias": (3072,)}
        both(block + "attn.out_proj", 1024, 1024), both(block + "ln_1", 1024), both(block + "ln_2", 1024)
        both(block + "mlp.c_fc", 4096, 1024), both(block + "mlp.c_proj", 1024, 4096)
    at, dims = "openclip_convnext_xxl.", (384, 768, 1536, 3072)
    both(at + "stem.0", 384, 3, 4, 4), both(at + "stem.1", 384), both(at + "head.norm", 3072)
    for stage, (depth, dim) in enumerate(zip((3, 4, 30, 3), dims, strict=True)):
        if stage:
            before = dims[stage - 1]
            (
                both(f"{at}stages.{stage}.downsample.0", before),
                both(f"{at}stages.{stage}.downsample.1", dim, before, 2, 2),
            )
        for i in range(depth):
            block = f"{at}stages.{stage}.blocks.{i}."
            shapes[block + "gamma"] = (dim,)
            both(block + "conv_dw", dim, 1, 7, 7), both(block + "norm", dim)
            both(block + "mlp.fc1", 4 * dim, dim), both(block + "mlp.fc2", dim, 4 * dim)
    at = "dinov2_vitg14."
    shapes |= {at + "cls_token": (1, 1, 1536), at + "pos_embed": (1, 1370, 1536), at + "mask_token": (1, 1536)}
    both(at + "patch_embed.proj", 1536, 3, 14, 14), both(at + "norm", 1536)
    for i in range(40):
        block = f"{at}blocks.{i}."
        shapes |= {block + "ls1.gamma": (1536,), block + "ls2.gamma": (1536,)}
        both(block + "norm1", 1536), both(block + "norm2", 1536)
        both(block + "attn.qkv", 4608, 1536), both(block + "attn.proj", 1536, 1536)
        both(block + "mlp.w12", 8192, 1536), both(block + "mlp.w3", 1536, 4096)
    at = "qformer.vision_model."
    shapes |= {
        "qformer.query_tokens": (1, 32, 768),
        at + "embeddings.class_embedding": (1, 1, 1408),
        at + "embeddings.position_embedding": (1, 257, 1408),
    }
    both(at + "embeddings.patch_embedding", 1408, 3, 14, 14), both(at + "post_layernorm", 1408)
    for i in range(39):
        block = f"{at}encoder.layers.{i}."
        both(block + "self_attn.qkv", 4224, 1408), both(block + "self_attn.projection", 1408, 1408)
        both(block + "layer_norm1", 1408), both(block + "layer_norm2", 1408)
        both(block + "mlp.fc1", 6144, 1408), both(block + "mlp.fc2", 1408, 6144)
    both("qformer.qformer.layernorm", 768)
    for i in range(12):
        block = f"qformer.qformer.encoder.layer.{i}."
        for attention, width in (("attention", 768), ("crossattention", 1408)) if i % 2 == 0 else (("attention", 768),):
            both(f"{block}{attention}.attention.query", 768, 768), both(f"{block}{attention}.output.dense", 768, 768)
            (
                both(f"{block}{attention}.attention.key", 768, width),
                both(f"{block}{attention}.attention.value", 768, width),
            )
            both(f"{block}{attention}.output.LayerNorm", 768)
        both(block + "intermediate_query.dense", 3072, 768), both(block + "output_query.dense", 768, 3072)
        both(block + "output_query.LayerNorm", 768)
    return shapes


def test_the_originals_checkpoints_fill_every_tensor_of_the_real_ensemble():
    raw = {name: Constant(torch.empty(shape, device="meta")) for name, shape in real_names().items()}
    assert all(map(is_encoder_tensor, raw))
    expected = expected_shapes(SPHINX)
    found = canonical(raw, SPHINX, expected)
    assert {name: tensor.shape for name, tensor in found.items()} == expected
    parameters = {
        e.name: sum(math.prod(s) for n, s in expected.items() if n.startswith(f"vision.{e.name}.")) for e in SPHINX.all
    }
    assert parameters == {
        "clip": 303_179_776,
        "convnext": 843_398_016,
        "dinov2": 1_136_479_232,
        "qformer": 1_091_114_496,
    }
