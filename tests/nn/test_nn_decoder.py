"""The network against transformers' MixtralForCausalLM, and against itself with packing."""

import pytest
import torch
from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral

from accessory.config import ModelArgs, MoEArgs
from accessory.nn.decoder import Decoder, init_weights


def sizes(**changes):
    moe = MoEArgs(num_experts=changes.pop("experts", 4), num_experts_per_tok=changes.pop("k", 2))
    small = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 97}
    return ModelArgs(**{**small, "max_seq_len": 64, "moe": moe, **changes})


SHAPES = {
    "grouped heads": sizes(),
    "as many kv heads": sizes(n_kv_heads=4),
    "one kv head": sizes(n_kv_heads=1),
    "own head_dim": sizes(head_dim=6),
    "top-1": sizes(k=1),
    "top-3 of 7": sizes(experts=7, k=3),
    "odd experts": sizes(experts=5),
    "one expert": sizes(experts=1, k=1),
    "all experts": sizes(experts=3, k=3),
    "more experts than tokens": sizes(experts=40),
    "other theta and eps": sizes(rope_theta=1e4, norm_eps=1e-3),
    "linear scaling": sizes(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama3 scaling": sizes(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    ),
    "yarn scaling": sizes(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
}
IMPLEMENTATIONS = ("base", "sparse")


def relative_error(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_logits_are_those_of_transformers(shape, implementation):
    args = SHAPES[shape]
    oracle = hf_mixtral(args)
    tokens = torch.randint(0, args.vocab_size, (3, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = decoder_from_canonical(args, implementation, canonical_from_hf(oracle))(tokens).logits
        assert relative_error(ours, oracle(tokens).logits) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_close_to_transformers(dtype, implementation):
    args = sizes(dim=64, n_layers=3)
    oracle = hf_mixtral(args)
    with torch.no_grad():
        for layer in oracle.model.layers:  # decisive routers: at a near tie, rounding alone sends a token elsewhere
            layer.mlp.gate.weight.mul_(8)
        oracle.to(dtype)
        tokens = torch.randint(0, args.vocab_size, (4, 16), generator=torch.Generator().manual_seed(2))
        ours = decoder_from_canonical(args, implementation, canonical_from_hf(oracle), dtype)(tokens).logits
        theirs = oracle(tokens).logits
        exact = oracle.float()(tokens).logits
    assert ours.dtype == dtype
    assert relative_error(ours, exact) <= 2e-2
    assert relative_error(ours, theirs) <= 2e-2


def test_gradients_are_those_of_transformers(implementation):
    args = sizes(experts=5)
    oracle = hf_mixtral(args)
    ours = decoder_from_canonical(args, implementation, canonical_from_hf(oracle))
    tokens = torch.randint(0, args.vocab_size, (2, 11), generator=torch.Generator().manual_seed(3))
    probe = torch.randn(2, 11, args.vocab_size, generator=torch.Generator().manual_seed(4))
    (oracle(tokens).logits * probe).sum().backward()
    (ours(tokens).logits * probe).sum().backward()
    for ours_p, theirs_p in (
        (ours.tok_embeddings.weight, oracle.model.embed_tokens.weight),
        (ours.output.weight, oracle.lm_head.weight),
        (ours.layers[0].feed_forward.gate.weight, oracle.model.layers[0].mlp.gate.weight),
        (ours.layers[1].feed_forward.experts.w2, oracle.model.layers[1].mlp.experts.down_proj),
        (ours.layers[0].attention.wv.weight, oracle.model.layers[0].self_attn.v_proj.weight),
        (ours.layers[0].ffn_norm.weight, oracle.model.layers[0].post_attention_layernorm.weight),
    ):
        assert relative_error(ours_p.grad, theirs_p.grad) <= 1e-4


def test_idle_experts_get_zero_gradients(implementation):
    args = sizes(experts=40)
    decoder = Decoder(args, implementation)
    init_weights(decoder)
    decoder(torch.tensor([[3, 4]])).logits.sum().backward()
    grad = decoder.layers[0].feed_forward.experts.w1.grad
    assert grad is not None
    touched = grad.flatten(1).abs().sum(1) > 0
    assert 1 <= touched.sum() <= 4


@pytest.fixture
def decoder(implementation):
    decoder = Decoder(sizes(), implementation).eval()
    init_weights(decoder, std=0.2)
    return decoder.requires_grad_(False)


def test_logits_of_chosen_rows_are_those_of_all(decoder):
    tokens = torch.randint(0, 97, (2, 12))
    chosen = decoder(tokens, rows_N=torch.tensor([4, 23, 12])).logits
    torch.testing.assert_close(chosen, decoder(tokens).logits.flatten(0, 1)[[4, 23, 12]], rtol=1e-5, atol=1e-6)


def test_packed_documents_never_see_one_another(decoder):
    a, b = torch.randint(0, 97, (5,)), torch.randint(0, 97, (7,))
    packed = decoder(
        torch.cat([a, b])[None],
        torch.cat([torch.arange(5), torch.arange(7)])[None],
        documents_BT=torch.tensor([[0] * 5 + [1] * 7]),
    ).logits[0]
    alone = torch.cat([decoder(a[None]).logits[0], decoder(b[None]).logits[0]])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_statistics_leave_padding_out_and_agree_between_implementations():
    args = sizes()
    by_kind = {}
    tensors = canonical_from_hf(hf_mixtral(args))
    tokens = torch.randint(0, 97, (2, 10))
    counted = torch.ones(2, 10, dtype=torch.bool)
    counted[1, 6:] = False
    for kind in IMPLEMENTATIONS:
        decoder = decoder_from_canonical(args, kind, tensors)
        out = decoder(tokens, counted_BT=counted, statistics=True)
        assert len(out.router) == args.n_layers
        assert decoder(tokens).router == []
        row = decoder(tokens[1:, :6], statistics=True).router
        both = decoder(tokens[:1], statistics=True).router
        for layer, first, second in zip(out.router, both, row, strict=True):
            assert layer.tokens == 16
            torch.testing.assert_close(layer.count_E, first.count_E + second.count_E)
            torch.testing.assert_close(layer.probability_E, first.probability_E + second.probability_E)
        by_kind[kind] = out.router
    for a, b in zip(*by_kind.values(), strict=True):
        torch.testing.assert_close(a.probability_E, b.probability_E)
        assert torch.equal(a.count_E, b.count_E)


def test_both_implementations_have_one_state_dict():
    base, sparse = (Decoder(sizes(), kind).state_dict() for kind in IMPLEMENTATIONS)
    assert {k: v.shape for k, v in base.items()} == {k: v.shape for k, v in sparse.items()}


def test_experts_split_over_ranks_add_up():
    """Two ranks sum to the whole layer. Each holds half of the experts (base) or half of each expert (sparse)."""
    from accessory.nn.experts_base import BaseExperts
    from accessory.nn.experts_sparse import SparseExperts

    whole = SparseExperts(8, 12, 4)
    for p in whole.parameters():
        torch.nn.init.normal_(p)
    x, weight, expert = torch.randn(6, 8), torch.rand(6, 2), torch.randint(0, 4, (6, 2))
    expert[:, 1] = (expert[:, 0] + 1) % 4
    parts = []
    for rank in range(2):
        base, sparse = BaseExperts(8, 12, 4, first=2 * rank), SparseExperts(8, 6, 4)
        for name in ("w1", "w2", "w3"):
            w = getattr(whole, name).data
            getattr(base, name).data = w[2 * rank : 2 * rank + 2]
            getattr(sparse, name).data = w.chunk(2, dim=2 if name == "w2" else 1)[rank]
        parts.append((base(x, weight, expert), sparse(x, weight, expert)))
    expected = whole(x, weight, expert)
    for half in zip(*parts, strict=True):
        torch.testing.assert_close(sum(half), expected)
