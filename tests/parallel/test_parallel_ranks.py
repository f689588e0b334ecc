"""One model on 1, 2, 4 and 8 gloo ranks: the same logits and text from every layout, reading no more than its share."""

import pytest
import torch
import torch.distributed as dist
from helpers.distributed import run_ranks
from helpers.random_models import write_speaking

from accessory.config import ModelArgs, MoEArgs
from accessory.convert.convert import convert
from accessory.model.meta import MetaModel
from accessory.nn.decoder import Decoder, init_weights

ARGS = ModelArgs(
    dim=64, hidden_dim=96, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=32000, max_seq_len=256, moe=MoEArgs()
)
LAYOUTS = {
    "hf": {},
    "torrent": {"to": "torrent"},
    "base of 1": {"to": "base", "shards": 1},
    "base of 8": {"to": "base", "shards": 8},
    "sparse of 2": {"to": "sparse", "shards": 2},
    "sparse of 4": {"to": "sparse", "shards": 4, "safetensors": True},
}
# Few prompts, so that with 8 experts on 8 ranks some ranks often have no token in a decoding step.
PROMPTS = ["The best programming language in the world is", "A"]
GENERATE = {"max_gen_len": 12}
SAMPLE = {"max_gen_len": 12, "temperature": 1.0, "top_p": 0.9, "seed": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    write_speaking(root / "hf", ARGS)
    for name, how in LAYOUTS.items():
        if how:
            convert(root / "hf", root / name, progress=False, **how)
    return root


def answers(model):
    stream = [item["text"] for item in model.stream_generate(PROMPTS[0], **GENERATE)]
    return {
        "logits": [logits[:, ::97].clone() for logits in model.compute_logits(PROMPTS)],
        "greedy": model.generate(PROMPTS, **GENERATE),
        "sampled": model.generate(PROMPTS, **SAMPLE),
        "streamed": stream[-1],
    }


def load(path, **options):
    return MetaModel.from_pretrained(path, max_seq_len=64, dtype=torch.float32, device="cpu", **options)


@pytest.fixture(scope="module")
def alone(folders):
    return answers(load(folders / "hf"))


def of_layouts(rank, world, root, layouts):
    group = dist.new_group(ranks=list(range(world)))
    found = {}
    for layout in layouts:
        for llama_type in ("mixtral", "mixtral_sparse"):
            model = load(root / layout, llama_type=llama_type, mp_group=group)
            found[layout, llama_type] = answers(model), sum(p.numel() for p in model.parameters())
    return found


@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        (2, ["base of 8", "sparse of 2"]),
        pytest.param(2, list(LAYOUTS), marks=pytest.mark.slow),
        *(pytest.param(world, list(LAYOUTS), marks=pytest.mark.long) for world in (4, 8)),
    ],
)
def test_any_layout_on_any_number_of_ranks_gives_the_same(folders, alone, world, layouts):
    for found in run_ranks(of_layouts, world, folders, layouts, timeout=200):
        for what, (got, parameters) in found.items():
            for key in ("greedy", "sampled", "streamed"):
                assert got[key] == alone[key], (what, key)
            for ours, theirs in zip(got["logits"], alone["logits"], strict=True):
                assert ((ours - theirs).norm() / theirs.norm()).item() <= 1e-5, what
            assert parameters <= 1.1 * ARGS.parameter_counts()[0] / world + 2 * ARGS.dim * ARGS.head_dim * ARGS.n_layers


@pytest.mark.slow
def test_eight_ranks_from_two_layouts(folders, alone):
    """The quick part of 8 ranks: whole experts from 1 file, slices from 2, two ranks for each key/value head."""
    for found in run_ranks(two_layouts, 8, folders):
        for got in found:
            assert got["greedy"] == alone["greedy"]
            for ours, theirs in zip(got["logits"], alone["logits"], strict=True):
                assert ((ours - theirs).norm() / theirs.norm()).item() <= 1e-5


def two_layouts(rank, world, root):
    group = dist.new_group(ranks=list(range(world)))
    return [answers(load(root / layout, mp_group=group)) for layout in ("base of 1", "sparse of 2")]


def counted(rank, world, root, layouts):
    return [count(root / layout, "mixtral" if layout.startswith("base") else "mixtral_sparse") for layout in layouts]


def count(path, llama_type):
    """Bytes that this rank reads from files, bytes of its parameters, and the collectives of one decoding step."""
    from accessory.checkpoint import lazy

    touched = 0
    real = lazy.Stored.load

    def load_and_count(self):
        nonlocal touched
        touched += self.nbytes
        return real(self)

    group = dist.new_group()
    lazy.Stored.load = load_and_count
    model = load(path, llama_type=llama_type, mp_group=group)
    lazy.Stored.load = real
    held = sum(p.numel() * p.element_size() for p in model.parameters())

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "broadcast"):
            function = getattr(dist, name)
            patch.setattr(dist, name, lambda *a, f=function, n=name, **k: calls.append(n) or f(*a, **k))
        assert model.llma(torch.tensor([[5]])).logits.shape[-1] == ARGS.vocab_size
    return touched, held, calls


def test_a_rank_reads_its_share_and_sums_twice_a_layer(folders):
    found = run_ranks(counted, 4, folders, ["hf", "torrent", "base of 8", "sparse of 2"])
    for touched, held, calls in (one for rank in found for one in rank):
        # Opening reads small norms and gates of all shards to compare them. All other tensors are read once.
        small = 10 * 4 * ARGS.dim * (ARGS.moe.num_experts + 3)
        assert touched <= 1.1 * held + small
        # The only collectives: two sums a layer (gathered, because they are small), the embedding and the head.
        assert calls == ["all_gather"] * (2 * ARGS.n_layers + 2)


def idle(rank, world, implementation):
    """All tokens go to one expert. The other ranks have nothing to compute, and no rank hangs."""
    from accessory.parallel.apply import parallelize
    from accessory.parallel.mesh import Ranks

    args = ARGS.replace(vocab_size=64)
    whole = random_decoder(args, implementation)
    for layer in whole.layers:
        layer.feed_forward.gate.weight.data.zero_()
        layer.feed_forward.k = 1  # equal logits: every token takes the first expert
    ranks = Ranks.of(dist.group.WORLD)
    part = cut(whole, parallelize, ranks)
    tokens = torch.arange(12).view(2, 6)
    errors = [(part(tokens).logits - whole(tokens).logits).abs().max().item()]
    # Gradients: the same loss on every rank; each holds its slice of the whole gradient.
    part(tokens).logits.square().mean().backward()
    whole(tokens).logits.square().mean().backward()
    errors += gradient_errors(part, whole, ranks)
    return errors


def random_decoder(args, implementation):
    decoder = Decoder(args, implementation)
    init_weights(decoder, std=0.05)
    return decoder


def cut(whole, parallelize, ranks):
    """A parallel copy of `whole` that holds this rank's slices of its values."""
    from accessory.checkpoint.lazy import Constant
    from accessory.checkpoint.load import fill
    from accessory.parallel.local_shard import local_tensors

    part = parallelize(Decoder(whole.args, whole.implementation), ranks)
    for mine, theirs in zip(part.layers, whole.layers, strict=True):
        mine.feed_forward.k = theirs.feed_forward.k
    fill(part, {shard.name: Constant(shard.tensor.contiguous()) for shard in local_tensors(whole)})
    return part


def gradient_errors(part, whole, ranks):
    from accessory.parallel.sharding import rank_part

    errors = []
    theirs = dict(whole.named_parameters())
    for name, p in part.named_parameters():
        grad = theirs[name].grad
        if ".experts." in name:
            E = p.shape[0]
            if whole.implementation == "base":
                grad = grad[ranks.rank * E : (ranks.rank + 1) * E]
            else:
                grad = grad.chunk(ranks.size, 2 if name.endswith("w2") else 1)[ranks.rank]
        else:
            s = rank_part(name, grad.shape, whole.args, whole.implementation, ranks.rank, ranks.size)
            grad = grad if s.dim is None else grad.narrow(s.dim, s.start, s.length)
        assert p.grad is not None, name
        errors.append((p.grad - grad).abs().max().item())
    return errors


@pytest.mark.parametrize("implementation", ["base", "sparse"])
def test_ranks_without_a_token_neither_hang_nor_differ(implementation):
    for errors in run_ranks(idle, 2, implementation):
        assert max(errors) <= 1e-6


def gradients(rank, world, implementation):
    from accessory.parallel.apply import parallelize
    from accessory.parallel.mesh import Ranks

    args = ARGS.replace(vocab_size=64)
    whole = random_decoder(args, implementation)
    ranks = Ranks.of(dist.group.WORLD)
    part = cut(whole, parallelize, ranks)
    tokens = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    for decoder in (part, whole):
        out = decoder(tokens, statistics=True)
        (out.logits.square().mean() + sum(s.probability_E.square().mean() for s in out.router) * 1e-3).backward()
    return gradient_errors(part, whole, ranks)


@pytest.mark.parametrize("implementation", ["base", "sparse"])
def test_gradients_are_slices_of_the_whole_networks(implementation):
    for errors in run_ranks(gradients, 4, implementation):
        assert max(errors) <= 1e-6


def cancelling(rank, world, root):
    group = dist.new_group(ranks=list(range(world)))
    model = load(root / "sparse of 2", mp_group=group)
    asked = []

    def cancelled():
        asked.append(rank)
        return len(asked) > 3

    items = list(model.stream_generate(PROMPTS[0], max_gen_len=40, cancelled=cancelled))
    after = model.generate(PROMPTS, **GENERATE)
    return len(asked), items[-1]["end_of_content"], len(items), after


def test_the_first_rank_cancels_for_all_and_the_next_call_works(folders, alone):
    (asked, *rest), (other_asked, *other_rest) = run_ranks(cancelling, 2, folders)
    assert (asked, other_asked) == (4, 0)
    assert rest == other_rest
    assert rest[0] is True
    assert rest[1] <= 5
    assert rest[2] == alone["greedy"]
