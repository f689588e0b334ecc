import pytest
import torch

from accessory.ops.rope import apply_rope, rope_frequencies, rotations

SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "attention_factor": 1.5},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s['rope_type']}-{s['factor']}")
def test_scaled_frequencies_are_those_of_transformers(scaling):
    from transformers import MixtralConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = MixtralConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_theta": 1e4, **scaling},
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    ours, our_factor = rope_frequencies(64, 1e4, scaling, 1024)
    torch.testing.assert_close(ours, theirs.float())
    assert our_factor == pytest.approx(factor)


def test_a_pair_turns_by_position_times_frequency():
    freq_c, _ = rope_frequencies(4, 100.0)
    torch.testing.assert_close(freq_c, torch.tensor([1.0, 0.1]))
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 4)
    y = apply_rope(x, x[:, :, :0], rotations(torch.tensor([[3]]), freq_c))[0].flatten()
    c, s = torch.cos, torch.sin
    angle = torch.tensor(3.0)
    expected = torch.stack([c(angle), s(angle), -2 * s(angle / 10), 2 * c(angle / 10)])
    torch.testing.assert_close(y, expected)


def test_scores_depend_on_distance_alone():
    freq_c, _ = rope_frequencies(8, 1e6)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(i, j):
        turned = [apply_rope(x, x, rotations(torch.tensor([[p]]), freq_c))[1] for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(40, 7), score(133, 100), rtol=1e-4, atol=1e-5)


def test_half_precision_is_turned_in_fp32():
    freq_c, _ = rope_frequencies(8, 1e4)
    x = torch.randn(2, 5, 3, 8)
    r = rotations(torch.arange(5).expand(2, 5) + 3000, freq_c)
    q, k = x.bfloat16().split((2, 1), dim=2)
    for half, whole in zip(apply_rope(q, k, r), apply_rope(q.float(), k.float(), r), strict=True):
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, whole.bfloat16())
