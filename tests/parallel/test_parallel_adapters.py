"""LoRA and biases on several ranks give the whole network's logits or loss and, after `plan`'s sums, its gradients."""

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.sizes import TINY

from accessory.config import LORA_TARGETS

ARGS = TINY.replace(
    lora_rank=4,
    lora_targets=(*LORA_TARGETS, "gate", "output"),
    bias_tuning=True,
)
TOKENS_BT = torch.arange(18).view(2, 9) * 3 % 64
LABEL_N = TOKENS_BT.flatten().roll(-1).where(torch.arange(18) % 5 > 0, -100)


def whole(implementation):
    """A network with random weights and adapters, and its tensors by canonical name."""
    from accessory.adapt.peft import adapter_specs_for, add_adapters
    from accessory.nn.decoder import Decoder, init_weights
    from accessory.parallel.local_shard import local_tensors

    decoder = Decoder(ARGS, implementation)
    add_adapters(decoder, adapter_specs_for(ARGS), ARGS.lora_scale)
    init_weights(decoder, std=0.2)
    # init_weights draws in the order of the network, which both implementations share
    return decoder, {shard.name: shard.tensor.clone() for shard in local_tensors(decoder)}


def gradients(decoder):
    out = {}
    from accessory.parallel.local_shard import local_tensors

    for name, p in decoder.named_parameters():
        p.data, p.grad = p.grad, None
        assert p.data is not None, name
    for shard in local_tensors(decoder):
        name, tensor = shard.name, shard.tensor
        out[name] = tensor.clone()
    return out


def outcome(decoder, learns):
    """What is compared, and backward from it: the loss, of which no rank gathers logits, or the logits."""
    if learns:
        decoder.gather_logits = None
        loss = decoder(TOKENS_BT, label_N=LABEL_N).loss
        loss.backward()
        return loss.detach()
    logits = decoder(TOKENS_BT).logits
    logits.square().sum().backward()
    return logits.detach()


def rank_main(rank, world, implementation, learns):
    import torch.distributed as dist

    from accessory.adapt.peft import adapter_specs_for, add_adapters
    from accessory.nn.decoder import Decoder
    from accessory.parallel import sharding
    from accessory.parallel.apply import parallelize
    from accessory.parallel.local_shard import local_tensors
    from accessory.parallel.mesh import Ranks

    ranks = Ranks.of(dist.group.WORLD)
    _, tensors = whole(implementation)
    with torch.device("meta"):
        decoder = Decoder(ARGS, implementation)
        add_adapters(decoder, adapter_specs_for(ARGS), ARGS.lora_scale)
    parallelize(decoder, ranks).to_empty(device="cpu")
    parts = {}
    for shard in local_tensors(decoder):
        name, place = shard.name, shard.tensor
        part = sharding.rank_part(name, tensors[name].shape, ARGS, implementation, rank, world)
        parts[name] = part
        source = tensors[name] if part.dim is None else tensors[name].narrow(part.dim, part.start, part.length)
        place.copy_(source)
    out = outcome(decoder, learns)
    found = gradients(decoder)
    for name, grad in found.items():
        sharers = sharding.gradient_sharers(name, ARGS, implementation, world)
        if sharers > 1:
            all_grads = [torch.empty_like(grad) for _ in range(world)]
            dist.all_gather(all_grads, grad.contiguous())
            first = rank // sharers * sharers
            found[name] = torch.stack(all_grads[first : first + sharers]).sum(0)
    return out, found, parts


@pytest.mark.parametrize("implementation", ["base", "sparse"])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("learns", [False, True])
def test_ranks_with_adapters_are_the_whole_network(implementation, world, learns):
    decoder, _ = whole(implementation)
    wanted = outcome(decoder, learns)
    expected = gradients(decoder)
    seen = set()
    for got, found, parts in run_ranks(rank_main, world, implementation, learns):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        for name, grad in found.items():
            part = parts[name]
            want = expected[name] if part.dim is None else expected[name].narrow(part.dim, part.start, part.length)
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4 * float(expected[name].abs().max()), msg=name)
            seen.add(name)
    assert seen == expected.keys()
