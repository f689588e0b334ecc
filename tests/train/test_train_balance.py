"""The balance loss and the z-loss of a step, against values worked out by hand, and gradients of the whole loss.

Most tests use a network whose router logits are known: in both layers, a token's router logits are its embedding.
This is so because attention and experts add nothing, each embedding has a root mean square of one, and the gate is the
identity.
"""

import math

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.training import make_decoder

from accessory.config import ModelArgs, MoEArgs
from accessory.data.batches import collate
from accessory.data.dataset import Example
from accessory.nn.decoder import Decoder, init_weights
from accessory.parallel.fsdp import apply_fsdp
from accessory.parallel.local_shard import local, local_tensors
from accessory.parallel.mesh import DeviceMesh
from accessory.train.trainer import LossWeights, Trainer

IMPLEMENTATIONS = ["base", "sparse"]
E, K = 4, 2
KNOWN = ModelArgs(
    dim=E,
    hidden_dim=8,
    n_layers=2,
    n_heads=1,
    n_kv_heads=1,
    vocab_size=8,
    max_seq_len=32,
    moe=MoEArgs(num_experts=E, num_experts_per_tok=K),
    norm_eps=1e-12,
)
# Router logits of each token; their squares sum to 4. Tokens 1 … 4 go to experts (0, 1), (1, 2), (2, 0), (2, 3).
# Token 4 is the only one that goes to expert 3. Token 0 is padding.
LOGITS = {
    0: (0.0, 0.0, 0.0, 2.0),
    1: (1.6, 1.2, 0.0, 0.0),
    2: (0.0, 1.6, 1.2, 0.0),
    3: (1.2, 0.0, 1.6, 0.0),
    4: (0.0, 0.0, 1.6, 1.2),
}
BALANCE, Z = 0.3, 0.05


def softmax(row):
    powers = [math.exp(x) for x in row]
    return [p / sum(powers) for p in powers]


def balance_of(tokens):
    """E / (T·K) · Σ_e count_e · mean_t p_te of these tokens."""
    counts, p = [0] * E, [softmax(LOGITS[t]) for t in tokens]
    for t in tokens:
        for e in sorted(range(E), key=lambda e: -LOGITS[t][e])[:K]:
            counts[e] += 1
    T = len(tokens)
    return E / (T * K) * sum(counts[e] * sum(row[e] for row in p) / T for e in range(E))


def z_of(tokens):
    return sum(math.log(sum(math.exp(x) for x in LOGITS[t])) ** 2 for t in tokens) / len(tokens)


def weighted(value, parts):
    """The mean of a value over parts, weighted by their tokens."""
    return sum(len(part) * value(part) for part in parts if part) / sum(map(len, parts))


def known(implementation, *, recompute=False, experts=False) -> Decoder:
    """The network described above. With `experts`, experts do add something, but the first router sees none of it."""
    decoder = Decoder(KNOWN, implementation)
    init_weights(decoder, seed=1, std=0.5)
    with torch.no_grad():
        for token, row in LOGITS.items():
            decoder.tok_embeddings.weight[token] = torch.tensor(row)
        for layer in decoder.layers:
            layer.attention.wo.weight.zero_()
            layer.feed_forward.gate.weight.copy_(torch.eye(E))
            layer.recompute = recompute
            if not experts:
                layer.feed_forward.experts.w2.zero_()
    return decoder


def document(*tokens):
    return Example(ids=list(tokens), learn=[True] * len(tokens))


def batch(*rows):
    return collate([list(row) for row in rows], [])


A, B, C = (1, 1, 2, 3, 1), (4, 2), (3, 3, 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_padding_packing_and_recomputation_count_nothing_twice(implementation, recompute):
    padded = batch([document(*A)], [document(*B)], [document(*C)])
    packed = batch([document(*A), document(*B)], [document(*C)])
    with_empty = batch([document(*A), document(*B), document(*C)], [])
    assert not padded.counted_BT.all()
    for micro in (padded, packed, with_empty):
        trainer = Trainer(known(implementation, recompute=recompute), DeviceMesh(), LossWeights(BALANCE, Z))
        record = trainer.forward_backward([micro])
        assert record["balance"] == pytest.approx(balance_of(A + B + C), rel=1e-6)
        assert record["z"] == pytest.approx(z_of(A + B + C), rel=1e-6)
        assert record["tokens"] == 10
        assert record["layers"]["balance"] == pytest.approx([balance_of(A + B + C)] * 2, rel=1e-6)
        # experts 0, 1, 2, 3 are chosen 7, 6, 6, 1 times
        for share in record["layers"]["share"]:
            assert share == pytest.approx([7 / 20, 6 / 20, 6 / 20, 1 / 20])
        assert record["layers"]["largest"] == pytest.approx([7 / 20] * 2)
        entropy = sum(-sum(p * math.log(p) for p in softmax(LOGITS[t])) for t in A + B + C) / 10
        assert record["layers"]["entropy"] == pytest.approx([entropy] * 2, rel=1e-6)


def test_accumulation_takes_the_token_weighted_mean_of_the_parts():
    parts = [A, B, C]
    trainer = Trainer(known("sparse"), DeviceMesh(), LossWeights(BALANCE, Z))
    record = trainer.forward_backward([batch([document(*part)]) for part in parts])
    assert record["balance"] == pytest.approx(weighted(balance_of, parts), rel=1e-6)
    assert record["balance"] != pytest.approx(balance_of(A + B + C), rel=1e-3)  # the value without accumulation
    assert record["z"] == pytest.approx(z_of(A + B + C), rel=1e-6)  # z is linear in the tokens


def test_a_micro_step_of_empty_rows_changes_nothing():
    alone = Trainer(known("sparse", experts=True), DeviceMesh(), LossWeights(BALANCE, Z))
    record = alone.forward_backward([batch([document(*A)])])
    padded = Trainer(known("sparse", experts=True), DeviceMesh(), LossWeights(BALANCE, Z))
    again = padded.forward_backward([batch([document(*A)]), batch([], [])])
    for key in ("loss", "balance", "z", "tokens"):
        assert again[key] == pytest.approx(record[key], rel=1e-6)
    for (name, a), (_, b) in zip(alone.named, padded.named, strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_idle_expert_has_a_zero_gradient(implementation):
    decoder = known(implementation, experts=True)
    with torch.no_grad():
        for layer in decoder.layers:  # the experts' outputs must not send a token to the last expert
            layer.feed_forward.experts.w2.mul_(0.01)
    trainer = Trainer(decoder, DeviceMesh(), LossWeights(BALANCE, Z))
    trainer.forward_backward([batch([document(*A)], [document(*C)])])
    for layer in decoder.layers:
        for kind in ("w1", "w2", "w3"):
            grad = layer.feed_forward.experts.get_parameter(kind).grad
            assert grad is not None
            assert not grad[3].any()
            assert all(grad[e].any() for e in range(3))


# --------------------------------------------------------------------------- ranks

ON_RANKS = {
    "both have tokens": (A, B + C),
    "one has nothing to learn": (A + B, ()),
    "one has no token of an expert": (A + C, B),
}


def rows_of(tokens):
    return batch([document(*tokens)] if tokens else [])


def on_two_ranks(rank, world):
    import torch.distributed as dist

    from accessory.parallel.mesh import Ranks

    mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), 1, "cpu")
    out = {}
    for name, parts in ON_RANKS.items():
        for implementation in IMPLEMENTATIONS:
            for everywhere in (False, True):
                decoder = known(implementation, experts=True)
                values = {n: p.detach().clone() for n, p in decoder.named_parameters()}
                apply_fsdp(decoder, mesh, "fsdp" if everywhere else "sdp", torch.float32)
                fill(decoder, values)
                trainer = Trainer(decoder, mesh, LossWeights(BALANCE, Z, everywhere))
                record = trainer.forward_backward([rows_of(parts[rank])])
                gradients = {n: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for n, p in trainer.named}
                out[name, implementation, everywhere] = (record, gradients)
    return out


def fill(decoder, values):
    from accessory.parallel.local_shard import local_parameters

    for held in local_parameters(decoder):
        source = values[held.name]
        for dim, (start, length) in enumerate(zip(held.offsets, held.tensor.shape, strict=True)):
            source = source.narrow(dim, start, length)
        held.tensor.copy_(source)


def test_data_parallel_ranks():
    """With global statistics, ranks equal one process with all rows in one micro-step.

    Without them, they equal one process that takes each rank's rows as a micro-step.
    """
    for results in run_ranks(on_two_ranks, 2):
        for (name, implementation, everywhere), (record, gradients) in results.items():
            parts = ON_RANKS[name]
            alone = Trainer(known(implementation, experts=True), DeviceMesh(), LossWeights(BALANCE, Z))
            rows = [document(*part) for part in parts if part]
            wanted = alone.forward_backward([batch(*[[r] for r in rows])] if everywhere else [batch([r]) for r in rows])
            told = f"{name}, {implementation}, global statistics {everywhere}"
            for key in ("loss", "balance", "z", "tokens"):
                assert record[key] == pytest.approx(wanted[key], rel=1e-5), f"{told}: {key}"
            # The first layer's router sees bare embeddings.
            by_hand = balance_of(sum(parts, ())) if everywhere else weighted(balance_of, parts)
            assert record["layers"]["balance"][0] == pytest.approx(by_hand, rel=1e-6), told
            for n, p in alone.named:
                torch.testing.assert_close(gradients[n], p.grad, rtol=1e-4, atol=1e-6, msg=f"{told}: {n}")


# --------------------------------------------------------------------------- finite differences

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "bias_tuning": True}


@pytest.mark.parametrize(
    ("implementation", "peft"),
    [
        ("base", None),
        ("sparse", LORA),
        pytest.param("base", LORA, marks=pytest.mark.slow),
        pytest.param("sparse", None, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_the_whole_loss_are_finite_differences(implementation, peft):
    """Moves each parameter along its own gradient: the slope of the loss must be the gradient's norm.

    If a token changes its experts, the loss jumps. Then the move was too long, and a shorter one is tried.
    """
    from helpers.training import batches

    decoder = make_decoder(implementation, peft=peft)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if p.requires_grad and peft:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
            if name.endswith("gate.weight"):
                p.mul_(4)
    trainer = Trainer(decoder, DeviceMesh(), LossWeights(0.5, 0.1))
    micro = batches(0, parts=2)
    trainer.forward_backward(micro)
    gradients = {name: p.grad.clone() for name, p in trainer.named}
    _, routing = loss_of(trainer, micro)
    checked = 0
    for name, p in trainer.named:
        length = float(gradients[name].norm())
        before = p.detach().clone()
        for step in (2e-3, 5e-4, 2e-4):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.copy_(before + sign * step / length * gradients[name])
                sides.append(loss_of(trainer, micro))
            if all(torch.equal(chosen, routing) for _, chosen in sides):
                slope = (sides[0][0] - sides[1][0]) / (2 * step)
                assert slope == pytest.approx(length, rel=2e-2, abs=1e-6 / step), name
                checked += 1
                break
        with torch.no_grad():
            p.copy_(before)
    assert checked > 0.8 * len(trainer.named)


@torch.no_grad()
def loss_of(trainer, micro):
    """The step's loss, and how many tokens each expert of each layer and micro-batch got."""
    loss, counts = 0.0, []
    for part, factors in zip(micro, trainer._factors(trainer._totals(micro)), strict=True):
        trainer.sums.clear()
        loss += float(trainer.loss(trainer.inputs(part, factors)))
        counts.append(trainer.sums.layers[:, :-2].clone())
    return loss, torch.stack(counts)


def test_held_gradients_cover_the_network():
    """Every canonical tensor of the network gets a gradient in a step, including those of idle experts."""
    decoder = known("base", experts=True)
    Trainer(decoder, DeviceMesh(), LossWeights(BALANCE)).forward_backward([batch([document(*A)])])
    assert all(p.grad is not None and local(p.grad).shape == local(p).shape for p in decoder.parameters())
    assert len(list(local_tensors(decoder))) == 2 * (2 + 4 + 1 + 3 * E) + 3
