import pytest
import torch

from accessory.ops.attention import attention, attention_reference


def qkv(B, T, S, H, G, d=8, dtype=torch.float32):
    return [torch.randn(B, n, h, d).to(dtype) for n, h in ((T, H), (S, G), (S, G))]


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("T", "S"), [(1, 9), (5, 9)])
def test_masked_attention_is_the_definition(H, G, T, S):
    q, k, v = qkv(3, T, S, H, G)
    position = torch.tensor([S - T, 2, 0])[:, None] + torch.arange(T)
    mask = torch.arange(S) <= position[..., None]
    torch.testing.assert_close(attention(q, k, v, mask), attention_reference(q, k, v, mask))


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (6, 1)])
def test_no_mask_is_causal(H, G):
    q, k, v = qkv(2, 7, 7, H, G)
    mask = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 7, 7)
    torch.testing.assert_close(attention(q, k, v, None), attention_reference(q, k, v, mask))


def test_bf16_stays_close_to_the_definition():
    q, k, v = qkv(2, 6, 6, 4, 2, dtype=torch.bfloat16)
    mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 6, 6)
    torch.testing.assert_close(attention(q, k, v, None), attention_reference(q, k, v, mask), rtol=2e-2, atol=2e-2)
