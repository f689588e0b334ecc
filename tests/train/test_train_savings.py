"""What saves memory of trained parameters, in whole steps: learning curves, ranks, states, and what is refused."""

import functools

import pytest
import torch
from helpers import runs
from helpers.distributed import run_ranks
from helpers.training import ARGS, CLIP, batches, make_decoder, oracle_tensors

from accessory.errors import ConfigError, InputError
from accessory.parallel.local_shard import local
from accessory.parallel.mesh import DeviceMesh
from accessory.train.adamw_8bit import CODES, SCALES
from accessory.train.state import load_state, save_state, state_tensors
from accessory.train.trainer import LossWeights, Trainer

# A row is one block of moments in 8 bits. Two model-parallel ranks cut the wide one's rows into whole blocks.
BLOCK, WIDE = (ARGS.replace(dim=numbers, hidden_dim=numbers) for numbers in (256, 512))
BF16 = {"gradient_dtype": "bf16"}
EIGHT = {"optimizer": "adamw_8bit"}
HOST = {"offload": "optimizer"}
LORA = {"lora_rank": 16}
STEPS, LR = 20, 3e-4


@pytest.fixture(autouse=True)
def _bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: optim)")


@functools.cache
def tensors(wide=False):
    return oracle_tensors(WIDE if wide else BLOCK)


def made(mesh=None, mode="sdp", peft=None, values=None, gradient_dtype="fp32", wide=False, **choices):
    dtype = torch.bfloat16 if gradient_dtype == "bf16" else torch.float32
    values, args = values if values is not None else tensors(wide), WIDE if wide else BLOCK
    decoder = make_decoder("sparse", mesh, mode, peft=peft, tensors=values, args=args, gradient_dtype=dtype)
    return Trainer(decoder, mesh or DeviceMesh(), LossWeights(0.0), weight_decay=0.1, clip=CLIP, **choices)


def steps(trainer, first=0, last=STEPS, micro=1):
    """(loss, gradient norm) of each step. Two batches take turns, so that the loss falls."""
    mesh = trainer.mesh
    parts = (batches(step % 2, parts=mesh.data_size * micro) for step in range(first, last))
    records = (trainer.step(part[mesh.data_rank :: mesh.data_size], LR) for part in parts)
    return [(record["loss"], record["grad_norm"]) for record in records]


@functools.cache
def plain(lora=False, wide=False, last=STEPS):
    return steps(made(peft=LORA if lora else None, wide=wide), last=last)


def apart(curve, other):
    """The largest difference of two curves' losses, and of their norms, as a part of the value."""
    return tuple(max(abs(a[n] - b[n]) / b[n] for a, b in zip(curve, other, strict=True)) for n in (0, 1))


# --------------------------------------------------------------------------- curves


def test_the_curve_falls():
    losses = [loss for loss, _ in plain()]
    assert losses[-1] < 0.75 * losses[0]


def test_moments_on_the_host_change_no_bit():
    assert steps(made(**HOST)) == plain()


# (loss, norm): bf16 keeps 8 bits of a gradient, and adamw_8bit 4 to 7 bits of a moment.
BOUNDS = [
    pytest.param(BF16, (1e-3, 1e-2), marks=pytest.mark.slow),
    pytest.param(EIGHT, (2e-2, 2e-1), marks=pytest.mark.slow),
    (BF16 | EIGHT, (2e-2, 2e-1)),
]


@pytest.mark.parametrize(("choices", "bounds"), BOUNDS)
@pytest.mark.parametrize("lora", [False, True])
def test_curves_stay_near_fp32(choices, bounds, lora):
    got = apart(steps(made(peft=LORA if lora else None, **choices)), plain(lora))
    assert (got[0] < bounds[0], got[1] < bounds[1]) == (True, True), got
    assert got[0] > 0  # another way than fp32


def test_gradients_take_two_bytes_but_those_of_norms_and_routers():
    trainer = made(**BF16)
    trainer.forward_backward(batches(0, parts=2))
    for name, p in trainer.named:
        small = name.endswith(("norm.weight", "gate.weight"))
        assert p.grad.dtype == (torch.float32 if small else torch.bfloat16), name
    # Two micro-steps were summed in bf16.
    exact = made()
    exact.forward_backward(batches(0, parts=2))
    for (name, p), (_, q) in zip(trainer.named, exact.named, strict=True):
        assert (p.grad.float() - q.grad).norm() <= 2**-7 * q.grad.norm(), name


# --------------------------------------------------------------------------- ranks

# Gradients in bf16 are summed over two micro-steps and two ranks, which rounds three times more.
FEW = [(2, "sdp", None, EIGHT | BF16, (2e-2, 2e-1))]
OTHERS = [(1, "fsdp", None, BF16, (1e-2, 2e-2))]
MORE = [
    (1, "sdp", LORA, BF16, (1e-2, 2e-2)),
    (1, "fsdp", None, EIGHT, (2e-2, 2e-1)),
    (1, "sdp", None, HOST, (1e-4, 1e-3)),
    (2, "sdp", None, BF16, (1e-3, 1e-2)),
]
RANK_STEPS = 8


def on_ranks(rank, world, cases, values):
    import torch.distributed as dist

    from accessory.parallel.mesh import Ranks

    out = []
    for model, mode, peft, choices, _ in cases:
        mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), model, "cpu")
        trainer = made(mesh, mode, peft, values, wide=True, **choices)
        trainer.forward_backward(batches(0, parts=mesh.data_size * 2)[mesh.data_rank :: mesh.data_size])
        dtypes = {name: local(p.grad).dtype for name, p in trainer.named}
        trainer.optimizer.zero_grad()
        out.append((dtypes, steps(trainer, last=RANK_STEPS, micro=2 if model == 1 else 1)))
    return out


@pytest.mark.parametrize(
    "cases",
    [FEW, pytest.param(OTHERS, marks=pytest.mark.slow), pytest.param(MORE, marks=pytest.mark.long)],
    ids=["few", "others", "more"],
)
def test_ranks_follow_one_process(cases):
    for results in run_ranks(on_ranks, 2, cases, tensors(wide=True), timeout=300):
        for (model, mode, peft, choices, bounds), (dtypes, curve) in zip(cases, results, strict=True):
            got = apart(curve, plain(peft is not None, wide=True, last=RANK_STEPS))
            assert (got[0] < bounds[0], got[1] < bounds[1]) == (True, True), (model, mode, choices, got)
            for name, dtype in dtypes.items():
                narrow = "gradient_dtype" in choices and not name.endswith(("norm.weight", "gate.weight"))
                assert dtype == (torch.bfloat16 if narrow else torch.float32), (name, model, mode)


# --------------------------------------------------------------------------- states


def save(trainer, folder, step):
    return save_state(trainer, folder, step, {"updates": trainer.optimizer.updates, "loss_scale": [1.0, 0]}, 2)


@pytest.mark.parametrize(
    "choices",
    [BF16, EIGHT | BF16, *(pytest.param(choices, marks=pytest.mark.slow) for choices in (EIGHT, HOST))],
)
def test_a_resumed_run_makes_the_same_steps(tmp_path, choices):
    whole = made(**choices)
    steps(whole, last=3)
    folder = save(whole, tmp_path, 3)
    again = made(**choices)
    load_state(again, folder)
    assert again.optimizer.updates == 3
    assert steps(again, 3, 6) == steps(whole, 3, 6)


def test_codes_and_scales_are_saved_as_they_are(tmp_path):
    trainer = made(wide=True, **EIGHT)
    steps(trainer, last=2)
    saved = {name: tensor.load() for name, tensor in state_tensors(save(trainer, tmp_path, 2)).items()}
    w1 = "layers.1.feed_forward.experts.w1"
    (p,) = (p for name, p in trainer.named if name == w1)
    for key in (*CODES, *SCALES):
        assert torch.equal(saved[f"{key}.{w1}"], trainer.optimizer.state[p][key])
    assert saved[f"exp_avg_scale.{w1}"].shape == (4, 512, 2)
    assert saved[f"exp_avg_8bit.{w1}"].dtype == torch.uint8
    assert f"exp_avg.{w1}" not in saved
    assert saved["exp_avg.norm.weight"].dtype == torch.float32


def read_and_written(rank, world, cases, state, values, folder):
    import torch.distributed as dist

    from accessory.parallel.mesh import Ranks

    out = []
    for number, (model, mode) in enumerate(cases):
        mesh = DeviceMesh.of(Ranks.of(dist.group.WORLD), model, "cpu")
        trainer = made(mesh, mode, None, values, wide=True, **EIGHT)
        load_state(trainer, state)
        out.append(save(trainer, folder / f"{number}", 2))
    return out


def test_other_ranks_read_and_write_the_same_moments_in_8_bits(tmp_path):
    trainer = made(wide=True, **EIGHT)
    steps(trainer, last=2)
    state = save(trainer, tmp_path / "one", 2)
    wanted = {name: tensor.load() for name, tensor in state_tensors(state).items()}
    cases = [(1, "fsdp"), (2, "sdp")]
    for written in run_ranks(read_and_written, 2, cases, state, tensors(wide=True), tmp_path, timeout=200)[0]:
        got = {name: tensor.load() for name, tensor in state_tensors(written).items()}
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(got[name], tensor), (written, name)


# --------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("choices", [BF16, EIGHT, HOST])
def test_a_run_is_interrupted_and_resumed(inputs, tmp_path, choices):
    runs.finetune(inputs, tmp_path / "whole", max_steps=4, **choices)
    with runs.ended_after(2):
        runs.finetune(inputs, tmp_path / "parts", max_steps=4, **choices)
    runs.finetune(inputs, tmp_path / "parts", max_steps=4, resume="auto", **choices)
    assert runs.curve(tmp_path / "parts") == runs.curve(tmp_path / "whole")


def test_another_optimizer_is_not_gone_on_with(inputs, part, tmp_path):
    import shutil

    output = tmp_path / "run"
    shutil.copytree(part, output)
    runs.refused(inputs, output, "holds moments of optimizer adamw, here adamw_8bit", resume="auto", **EIGHT)


def test_a_host_without_room_is_refused_before_weights_are_read(inputs, tmp_path, monkeypatch):
    """The ranks of a machine share its memory: two of them have 2.5 GB each of 5."""
    from accessory.launch.memory import HOST as MACHINE
    from accessory.launch.memory import Room
    from accessory.train import memory
    from accessory.train.config import FinetuneConfig
    from accessory.train.source import open_source

    rooms = {"cpu": Room(5 * 10**9, MACHINE), "cuda": Room(10**12, "a card")}
    monkeypatch.setattr(memory, "room_for", lambda where, group=None: rooms[str(where)])
    config = FinetuneConfig(**runs.options(inputs, tmp_path / "run", **HOST))
    source = open_source(config)
    memory.check_memory(config, source, "cuda", world=2)
    rooms["cpu"] = Room(3 * 10**9, MACHINE)
    with pytest.raises(
        InputError, match=r"^offload: the moments take .* this machine has 1\.5 GB for each; give fewer"
    ):
        memory.check_memory(config, source, "cuda", world=2)
    memory.check_memory(config, source, "cpu", world=1)


def test_a_cut_inside_a_block_is_refused_before_weights_are_read(inputs, tmp_path):
    from accessory.train.config import FinetuneConfig
    from accessory.train.memory import check_memory
    from accessory.train.source import open_source

    wide = runs.write_model(tmp_path / "wide", dim=256)
    choices = {"pretrained_path": [str(wide)], "model_parallel_size": 2, **EIGHT}
    config = FinetuneConfig(**runs.options(inputs, tmp_path / "run", **choices))
    with pytest.raises(ConfigError, match="128 numbers of a row of tok_embeddings"):
        check_memory(config, open_source(config), "cpu", world=2)


def test_moments_in_8_bits_stay_on_the_gpu(inputs, tmp_path):
    runs.refused(inputs, tmp_path / "run", "offload: got optimizer, but adamw_8bit", **EIGHT, **HOST)
