"""A run's state on disk is written whole or not at all. Any number of ranks of either implementation can read it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.distributed import run_ranks
from helpers.training import batches, make_decoder, oracle_tensors
from safetensors import safe_open

from accessory.config import LORA_TARGETS
from accessory.errors import AccessoryError, CheckpointError
from accessory.parallel.mesh import DeviceMesh
from accessory.train import state as state_module
from accessory.train.adamw import MOMENTS
from accessory.train.state import (
    clean_states,
    complete_states,
    load_state,
    read_state_info,
    save_state,
    state_tensors,
    trained_tensors,
)
from accessory.train.trainer import LossWeights, Trainer

LORA = {"lora_rank": 4, "bias_tuning": True}


def trainer_of(implementation="sparse", mesh=None, steps=2, tensors=None, mode="sdp", micro=1, **peft):
    """A trainer after some steps. There is no balance loss, so micro-batches and ranks give the same result."""
    mesh = mesh or DeviceMesh()
    decoder = make_decoder(implementation, mesh, mode, peft=peft or None, tensors=tensors)
    trainer = Trainer(decoder, mesh, LossWeights(0.0), weight_decay=0.1, clip=1.0)
    for step in range(steps):
        trainer.step(batches(step, parts=mesh.data_size * micro)[mesh.data_rank :: mesh.data_size], 3e-3)
    return trainer


def values(trainer):
    return {"updates": trainer.optimizer.updates, "loss_scale": [1.0, 0]}


def save(trainer, folder, step=2, keep=2):
    return save_state(trainer, folder, step, values(trainer), keep)


def numbers(trainer):
    """Parameters and moments of one process by name."""
    out = {}
    for name, p in trainer.named:
        out[f"model.{name}"] = p.detach().clone()
        for moment in MOMENTS:
            if p in trainer.optimizer.state:
                out[f"{moment}.{name}"] = trainer.optimizer.state[p][moment].clone()
    return out


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


# --------------------------------------------------------------------------- one process


@pytest.mark.parametrize("peft", [{}, LORA], ids=["full", "lora and biases"])
def test_what_was_saved_is_what_is_loaded_bit_for_bit(tmp_path, peft):
    trainer = trainer_of("base", **peft)
    folder = save(trainer, tmp_path)
    assert folder.name == "step-00000002"
    same({name: tensor.load() for name, tensor in state_tensors(folder).items()}, numbers(trainer))
    assert dict(trained_tensors(folder)).keys() == dict(trainer.named).keys()
    for implementation in ("base", "sparse"):
        other = trainer_of(implementation, steps=0, **peft)
        load_state(other, folder)
        same(numbers(other), numbers(trainer))
        assert other.optimizer.updates == 2
    # The next step is the same too.
    again = trainer_of("base", steps=0, **peft)
    load_state(again, folder)
    one, two = (t.step(batches(2), 3e-3) for t in (trainer, again))
    assert (one["loss"], one["grad_norm"]) == (two["loss"], two["grad_norm"])
    same(numbers(again), numbers(trainer))


def test_files_are_plain_safetensors_and_described(tmp_path):
    folder = save(trainer_of(), tmp_path)
    described = json.loads((folder / "state.json").read_text())
    assert described["step"] == 2
    files = {p.name: p.stat().st_size for p in folder.glob("*.safetensors")}
    assert described["files"] == files
    names = {name for file in files for name in safe_open(folder / file, "pt").keys()}  # noqa: SIM118
    assert names == state_tensors(folder).keys()


def test_a_state_before_the_first_step_can_be_loaded(tmp_path):
    """A run whose very first loss is not finite leaves such a state."""
    folder = save(trainer_of(steps=0), tmp_path, step=0)
    other = trainer_of(steps=0)
    load_state(other, folder)
    assert other.optimizer.updates == 0
    one, two = other.step(batches(0), 3e-3), trainer_of(steps=0).step(batches(0), 3e-3)
    assert one["grad_norm"] == two["grad_norm"]


def test_no_file_is_large(tmp_path, monkeypatch):
    trainer = trainer_of()
    monkeypatch.setattr(state_module, "_FILE_BYTES", 50_000)
    folder = save(trainer, tmp_path)
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert all(f.stat().st_size < 80_000 for f in files)
    other = trainer_of(steps=0)
    load_state(other, folder)
    same(numbers(other), numbers(trainer))


def test_the_last_states_are_kept(tmp_path):
    trainer = trainer_of(steps=1)
    for step in range(1, 6):
        save(trainer, tmp_path, step, keep=3)
    assert [p.name for p in complete_states(tmp_path)] == [f"step-{n:08d}" for n in (3, 4, 5)]
    assert len(list(tmp_path.iterdir())) == 3


def test_unfinished_states_do_not_count_and_are_cleared(tmp_path):
    trainer = trainer_of(steps=1)
    for step in (1, 2, 3):
        save(trainer, tmp_path, step, keep=9)
    (tmp_path / "step-00000002" / "state.json").unlink()  # half removed
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "step-00000004.partial")  # not yet renamed
    (tmp_path / "step-00000005.partial").mkdir()
    (tmp_path / "notes").mkdir()  # not a state
    assert [p.name for p in complete_states(tmp_path)] == ["step-00000001", "step-00000003"]
    clean_states(tmp_path, later_than=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000001", "step-00000003"]
    clean_states(tmp_path, later_than=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000001"]
    clean_states(tmp_path / "nowhere", later_than=1)
    assert complete_states(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("peft", "told"),
    [
        ({}, "which is not trained here|holds no model"),
        (LORA | {"lora_targets": (*LORA_TARGETS, "gate")}, "holds no model.*gate.lora_a"),
        (LORA | {"norm_tuning": False}, "which is not trained here"),
        ({"lora_rank": 8, "bias_tuning": True}, r"lora_[ab].* is \("),
        ({"lora_rank": 4}, "which is not trained here"),
    ],
)
def test_another_runs_state_is_refused_before_anything_is_touched(tmp_path, peft, told):
    folder = save(trainer_of(**LORA), tmp_path)
    other = trainer_of(steps=0, **peft)
    before = {name: p.detach().clone() for name, p in other.named}
    with pytest.raises(CheckpointError, match=told) as caught:
        load_state(other, folder)
    assert str(folder) in str(caught.value)
    for name, p in other.named:
        assert torch.equal(p, before[name])


def test_what_is_no_state_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no state\.json"):
        read_state_info(tmp_path)
    folder = save(trainer_of(steps=1), tmp_path)
    told = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(told | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99 is not known"):
        read_state_info(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(AccessoryError, match="not valid JSON"):
        read_state_info(folder)


def test_a_disk_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    trainer = trainer_of(steps=1)
    save(trainer, tmp_path, 1, keep=1)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    for module, name in ((state_module.dcp, "save"), (state_module.os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(AccessoryError, match="No space left") as caught:
                save(trainer, tmp_path, 2, keep=1)
        assert "\n" not in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
        read_state_info(tmp_path / "step-00000001")


# --------------------------------------------------------------------------- ranks


def mesh_of(model):
    import torch.distributed as dist

    from accessory.parallel.mesh import Ranks

    return DeviceMesh.of(Ranks.of(dist.group.WORLD), model, "cpu")


def save_on_ranks(rank, world, folder, cases, tensors):
    """Save each case's state after two steps."""
    for number, (model, implementation, mode, peft) in enumerate(cases):
        trainer = trainer_of(implementation, mesh_of(model), tensors=tensors, mode=mode, **peft)
        save(trainer, Path(folder) / str(number))


def load_on_ranks(rank, world, folder, cases, tensors):
    """Load each case's state, and save what was loaded at once."""
    for number, (model, implementation, mode, peft) in enumerate(cases):
        trainer = trainer_of(implementation, mesh_of(model), steps=0, tensors=tensors, mode=mode, **peft)
        load_state(trainer, Path(folder) / str(number) / "step-00000002")
        save(trainer, Path(folder) / f"{number} again")


THREE, TWO = [(1, "sparse", "fsdp", {})], [(2, "sparse", "sdp", {})]  # few sizes here are divisible by three
MORE_OF_THREE, MORE_OF_TWO = [(1, "base", "sdp", LORA)], [(1, "sparse", "sdp", LORA)]
FOUR = [(2, "base", "fsdp", {}), (4, "base", "sdp", LORA), (2, "base", "fsdp", LORA)]
OTHERS = [(2, "sparse", "sdp", {}), (1, "sparse", "fsdp", LORA), (2, "sparse", "sdp", LORA)]


@pytest.mark.parametrize(
    ("writers", "cases", "readers", "others"),
    [
        pytest.param(3, THREE, 2, TWO, id="3 ranks, then 2"),
        pytest.param(3, MORE_OF_THREE, 2, MORE_OF_TWO, id="3 ranks, then 2, adapters", marks=pytest.mark.slow),
        pytest.param(4, FOUR, 2, OTHERS, id="4 ranks, then 2", marks=pytest.mark.slow),
    ],
)
def test_any_ranks_read_what_any_ranks_wrote(tmp_path, writers, cases, readers, others):
    run_ranks(save_on_ranks, writers, str(tmp_path), cases, oracle_tensors())
    run_ranks(load_on_ranks, readers, str(tmp_path), others, oracle_tensors())
    for number, (model, _, _, peft) in enumerate(cases):
        one, other = (
            {n: t.load() for n, t in state_tensors(tmp_path / name / "step-00000002").items()}
            for name in (str(number), f"{number} again")
        )
        same(other, one)
        alone = trainer_of("sparse", micro=writers // model, **peft)
        for name, tensor in numbers(alone).items():
            # In the first steps Adam uses little more than a gradient's sign. The sign of a tiny one (a key's bias,
            # a few entries of LoRA next to zeros) depends on rounding, so whole tensors are compared by their norm.
            if not name.endswith("wk.bias"):
                assert float((one[name] - tensor).norm()) <= 2e-3 * float(tensor.norm()), name
        reader = trainer_of("base", steps=0, **peft)
        load_state(reader, tmp_path / str(number) / "step-00000002")
        same(numbers(reader), one)


def fail_on_ranks(rank, world, folder, tensors):
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    trainer = trainer_of(mesh=mesh_of(1), steps=1, tensors=tensors)
    folder = Path(folder)
    save(trainer, folder, 1)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    said = []
    writer = dcp.HuggingFaceStorageWriter
    for of, (holder, name) in ((1, (writer, "write_data")), (0, (state_module.json, "dump")), (0, (Path, "mkdir"))):
        original = getattr(holder, name)
        if rank == of:
            setattr(holder, name, full)
        try:
            save(trainer, folder, 2)
            said.append("nothing")
        except AccessoryError as error:
            said.append(str(error))
        setattr(holder, name, original)
        dist.barrier()
        said.append(sorted(p.name for p in folder.iterdir()))
        dist.barrier()
    save(trainer, folder, 2)
    return said


def test_a_rank_that_cannot_write_ends_the_save_on_all(tmp_path):
    for said in run_ranks(fail_on_ranks, 2, str(tmp_path), oracle_tensors()):
        for message, left in zip(said[::2], said[1::2], strict=True):
            assert "No space left on device" in message
            assert "\n" not in message
            assert left == ["step-00000001"]
    assert [p.name for p in complete_states(tmp_path)] == ["step-00000001", "step-00000002"]
