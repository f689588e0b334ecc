"""Whole runs: killed, stopped, resumed on other ranks, and with losses that are not finite."""

import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import run_faults, runs, started_runs

from accessory.errors import AccessoryError
from accessory.train import loop

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "bias_tuning": True}


def test_a_run_writes_all_that_it_promises(whole):
    assert [row[0] for row in runs.curve(whole)] == list(range(1, 13))
    assert [r["step"] for r in runs.records(whole, "eval")] == [0, 5, 10, 12]
    assert sorted(p.name for p in (whole / "states").iterdir()) == ["step-00000009", "step-00000012"]
    assert not runs.left_over(whole)
    assert runs.records(whole, "eval")[-1]["loss"] < runs.records(whole, "eval")[0]["loss"]


# --------------------------------------------------------------------------- killed


@pytest.mark.slow
def test_killed_while_saving_it_goes_on(inputs, whole, tmp_path):
    """Kills one run at each point where a file is half written, and starts it again until it ends."""
    fields = runs.options(inputs, tmp_path / "run", resume="auto", keep=1)
    for spot in run_faults.SPOTS:
        started = started_runs.start(fields, prepare=run_faults.die_at, arguments=(spot,))
        assert started.wait() == [-9], f"{spot}: {started.said()}"
        runs.check_folder(tmp_path / "run")
    started = started_runs.start(fields)
    assert started.wait() == [0], started.said()
    runs.same_curve(runs.curve(tmp_path / "run"), runs.curve(whole))
    runs.check_folder(tmp_path / "run")
    assert not runs.left_over(tmp_path / "run")


def killed_at_random(fields, ranks: int, kills: int, seed: int) -> list[int]:
    """Start and kill the run several times, then let it end. Returns the steps in the metrics file at each kill."""
    output, pick = Path(fields["output_dir"]), random.Random(seed)
    seen = []
    for _ in range(kills):
        started = started_runs.start(fields, ranks=ranks)
        before = runs.steps_written(output)
        end, until = time.monotonic() + 60, before + pick.randint(1, 8)
        # A kill while the model loads tests little, so wait until a random number of steps are written.
        while runs.steps_written(output) < until and started.running() and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(pick.random() * 0.1)
        started.kill()
        seen.append(runs.steps_written(output))
        runs.check_folder(output)
    started = started_runs.start(fields, ranks=ranks)
    assert started.wait() == [0] * ranks, started.said()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_ten_times_it_has_one_curve(inputs, tmp_path, ranks):
    changes = {"epochs": 12.0, "keep": 1, "save_iteration_interval": 2, "accum_iter": 2 // ranks}
    fields = runs.options(inputs, tmp_path / "run", resume="auto", **changes)
    straight = runs.options(inputs, tmp_path / "straight", **changes)
    assert started_runs.start(straight, ranks=ranks).wait() == [0] * ranks
    assert len(runs.curve(tmp_path / "straight")) == 72
    seen = killed_at_random(fields, ranks, kills=10, seed=ranks)
    assert len(set(seen)) > 5, f"killed at too few different moments: {seen}"
    runs.same_curve(runs.curve(tmp_path / "run"), runs.curve(tmp_path / "straight"), 1e-6 if ranks == 1 else 1e-5)
    runs.check_folder(tmp_path / "run")
    assert not runs.left_over(tmp_path / "run")
    for name, tensor in runs.final_tensors(tmp_path / "straight").items():
        torch.testing.assert_close(runs.final_tensors(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


# --------------------------------------------------------------------------- stopped


def test_sigterm_saves_and_ends_with_one_line(inputs, whole, tmp_path):
    fields = runs.options(inputs, tmp_path / "run", resume="auto", save_iteration_interval=None, save_interval=0)
    started = started_runs.start(fields, prepare=run_faults.signal_after, arguments=(2, signal.SIGTERM))
    assert started.wait() == [1]
    (line,) = started.errors()
    assert "stopped by a signal after step 2" in line
    assert "resume=auto" in line
    assert [p.name for p in (tmp_path / "run" / "states").iterdir()] == ["step-00000002"]
    assert started_runs.start(fields).wait() == [0]
    runs.same_curve(runs.curve(tmp_path / "run"), runs.curve(whole))


def test_a_signal_to_one_rank_stops_all_after_the_same_step(inputs, tmp_path):
    fields = runs.options(inputs, tmp_path / "run", save_iteration_interval=None, save_interval=0)
    started = started_runs.start(fields, ranks=2, prepare=run_faults.signal_rank, arguments=(1, 2, signal.SIGTERM))
    assert started.wait() == [1, 1]
    (line,) = started.errors()
    assert "stopped by a signal after step 2" in line
    runs.check_folder(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "states").iterdir()] == ["step-00000002"]


def test_a_killed_rank_ends_the_other_with_one_line(inputs, tmp_path):
    fields = runs.options(inputs, tmp_path / "run", save_iteration_interval=1)
    started = started_runs.start(fields, ranks=2, prepare=run_faults.signal_rank, arguments=(1, 3, signal.SIGKILL))
    assert started.wait() == [1, -9]
    assert started.errors() == ["accessory: error: another rank is gone in the middle of a step"]
    assert "Traceback" not in started.said()
    runs.check_folder(tmp_path / "run")


def test_the_second_ctrl_c_does_not_wait(inputs, tmp_path):
    fields = runs.options(inputs, tmp_path / "run", save_iteration_interval=None, save_interval=0)
    started = started_runs.start(fields, prepare=run_faults.signal_after, arguments=(2, signal.SIGINT, signal.SIGINT))
    assert started.wait() == [130]
    assert "interrupted" in started.said()
    assert not (tmp_path / "run" / "states").exists()


def test_records_are_durable_before_a_state_is(inputs, tmp_path, monkeypatch):
    """A power failure loses what was not synced. When a state appears, the lines of its steps must have been."""
    output, durable, states = tmp_path / "run", [0], []
    metrics = output / "metrics.jsonl"
    fsync, save = os.fsync, loop.StateSaver.save

    def note(file):
        fsync(file)
        if metrics.exists() and os.path.samestat(os.fstat(file), metrics.stat()):
            durable[0] = runs.steps_written(output)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(
        loop.StateSaver, "save", lambda self, step, n: (states.append((step, *durable)), save(self, step, n))
    )
    runs.finetune(inputs, output, max_steps=7)
    assert states == [(3, 3), (6, 6), (7, 7)]


# --------------------------------------------------------------------------- resumed elsewhere


@pytest.mark.slow
def test_fewer_ranks_and_the_other_implementation_go_on(inputs, tmp_path):
    """Two data-parallel ranks of base, then one of base, then one of sparse: same curve, moments and schedule."""
    stages = [(2, "mixtral", {}), (1, "mixtral", {}), (1, "mixtral_sparse", {})]
    goes_on(inputs, tmp_path, stages, {})


@pytest.mark.slow
@pytest.mark.parametrize("peft", [{}, LORA], ids=["full", "lora and biases"])
def test_four_ranks_two_ranks_one_rank(inputs, tmp_path, peft):
    end = "_peft" if peft else ""
    stages = [
        (4, f"mixtral{end}", {"model_parallel_size": 2}),
        (2, f"mixtral{end}", {"model_parallel_size": 2}),
        (2, f"mixtral_sparse{end}", {"data_parallel": "fsdp"}),
        (1, f"mixtral_sparse{end}", {}),
    ]
    goes_on(inputs, tmp_path, stages, peft)


@pytest.mark.slow
def test_ranks_that_share_rows_go_on_from_any_and_leave_states_for_any(inputs, tmp_path):
    """One rank, then two that share rows, then four in two groups, then one: same curve, moments and evaluations."""
    shared = {"context_parallel_size": 2}
    stages = [
        (1, "mixtral_sparse", {}),
        (2, "mixtral_sparse", shared),
        (4, "mixtral", shared | {"data_parallel": "fsdp"}),
        (1, "mixtral_sparse", {}),
    ]
    goes_on(inputs, tmp_path, stages, {"eval_data": str(inputs / "held.yaml"), "eval_interval": 1})
    losses = [
        [(record["step"], record["tokens"]) for record in runs.records(tmp_path / name, "eval")]
        for name in ("straight", "run")
    ]
    assert losses[0] == losses[1]
    wanted, got = ([record["loss"] for record in runs.records(tmp_path / name, "eval")] for name in ("straight", "run"))
    assert got == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("peft", [{}, LORA], ids=["full", "lora and biases"])
def test_ranks_with_different_experts_go_on_from_any_and_leave_states_for_any(inputs, tmp_path, peft):
    """Two ranks with half of the experts each, then one rank, four with each expert twice, and two of base."""
    end = "_peft" if peft else ""
    spread = {"expert_parallel_size": 2}
    stages = [
        (2, f"mixtral_sparse{end}", spread),
        (1, f"mixtral_sparse{end}", {}),
        (4, f"mixtral_sparse{end}", spread | {"data_parallel": "fsdp"}),
        (2, f"mixtral{end}", spread),
    ]
    goes_on(inputs, tmp_path, stages, peft)
    one, other = (runs.final_tensors(tmp_path / name) for name in ("straight", "run"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def goes_on(inputs, tmp_path, stages, peft):
    common = {"global_batch_statistics": True, "batch_size": 1, "accum_iter": 1, "packing": True, "epochs": 3.0, **peft}
    # A rank's rows in a micro-step depend on the number of ranks, and so does their balance loss. Without accumulation
    # and with global statistics it does not.
    common |= {"max_words": 96, "load_balancing_weight": 0.1}
    rows = 4
    straight = runs.options(inputs, tmp_path / "straight", **common | {"batch_size": rows, "llama_type": stages[0][1]})
    assert started_runs.start(straight).wait() == [0]
    steps = len(runs.curve(tmp_path / "straight"))
    assert steps >= 2 * len(stages)
    for number, (ranks, kind, options) in enumerate(stages, start=1):
        data_ranks = ranks // options.get("model_parallel_size", 1) // options.get("context_parallel_size", 1)
        fields = runs.options(
            inputs,
            tmp_path / "run",
            **common | options | {"batch_size": rows // data_ranks, "llama_type": kind, "resume": "auto"},
        )
        last = steps * number // len(stages)
        started = started_runs.start(fields, ranks=ranks, prepare=run_faults.end_in_step, arguments=(last,))
        assert started.wait() == [int(last < steps)] * ranks, started.said()
    runs.same_curve(runs.curve(tmp_path / "run"), runs.curve(tmp_path / "straight"), 1e-5)
    one, other = (runs.newest_state(tmp_path / name) for name in ("straight", "run"))
    assert one.keys() == other.keys()
    assert {name.split(".")[0] for name in one} == {"model", "exp_avg", "exp_avg_sq"}
    for name, tensor in one.items():
        # Adam divides a gradient by its own size. So a tiny gradient (a key's bias) moves a parameter as far as a large
        # one, and its rounding errors show. A hundredth of one update (lr = 3e-3) is tolerated there.
        allowed = 3e-5 if name.startswith("model.") else 2e-4 * float(tensor.abs().max())
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=allowed, msg=name)


def test_rows_that_new_ranks_cannot_share(inputs, part, tmp_path):
    shutil.copytree(part, tmp_path / "run")
    before = runs.snapshot(tmp_path / "run")
    fields = runs.options(inputs, tmp_path / "run", resume="auto", batch_size=1)
    started = started_runs.start(fields, ranks=3)
    assert started.wait() == [1] * 3
    (line,) = started.errors()
    assert "4 rows a step, which 3 data-parallel ranks cannot share" in line
    assert runs.snapshot(tmp_path / "run") == before


def test_other_micro_batches_are_the_same_steps(inputs, part, tmp_path):
    """A resumed run with more rows a micro-step divides the same rows differently. The balance loss is off."""
    whole = runs.options(inputs, tmp_path / "whole", load_balancing_weight=0.0)
    runs.finetune(inputs, tmp_path / "whole", load_balancing_weight=0.0)
    runs.interrupt(inputs, tmp_path / "run", 4, load_balancing_weight=0.0)
    runs.finetune(inputs, tmp_path / "run", load_balancing_weight=0.0, resume="auto", batch_size=3, accum_iter=1)
    assert whole["batch_size"] == 2
    wanted = [(step, ce) for step, ce, _, _ in runs.curve(tmp_path / "whole")]
    runs.same_curve([(step, ce) for step, ce, _, _ in runs.curve(tmp_path / "run")], wanted, 1e-5)


def test_an_earlier_state_is_gone_on_from_on_request(inputs, whole, tmp_path):
    """States and records of the steps that will be repeated are deleted, so that a kill leaves no gap."""
    shutil.copytree(whole, tmp_path / "run")
    runs.interrupt(inputs, tmp_path / "run", 10, resume=str(tmp_path / "run" / "states" / "step-00000009"))
    assert [p.name[-2:] for p in sorted((tmp_path / "run" / "states").iterdir())] == ["09", "10"]
    runs.same_curve(runs.curve(tmp_path / "run"), runs.curve(whole)[:10])


def test_another_runs_state_begins_a_new_folder(inputs, part, whole, tmp_path):
    runs.finetune(inputs, tmp_path / "run", resume=str(part))
    assert [row[0] for row in runs.curve(tmp_path / "run")] == list(range(5, 13))
    runs.same_curve(runs.curve(tmp_path / "run"), runs.curve(whole)[4:])
    runs.refused(inputs, tmp_path / "other", "has made all of 12 steps", resume=str(tmp_path / "run"))


def said_on_resuming(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "accessory.train.resume"]


def test_the_rate_ends_where_max_steps_ends_the_run(inputs, tmp_path, caplog):
    """The warm-up of 0.3 of 2 epochs, 1.8 of 12 steps, becomes 0.45 of 3. A step has the rate of its middle."""
    runs.finetune(inputs, tmp_path / "run", max_steps=3)
    rates = [record["lr"] for record in runs.records(tmp_path / "run")]
    assert rates == pytest.approx([1.5e-3 * (1 + math.cos(math.pi * (t - 0.45) / 2.55)) for t in (0.5, 1.5, 2.5)])
    assert not said_on_resuming(caplog)
    runs.finetune(inputs, tmp_path / "run", max_steps=5, resume="auto")
    (said,) = said_on_resuming(caplog)
    assert said.endswith("is of a run of 3 steps, and this one has 5: from step 4 on lr is that of a run of 5")
    rates = [record["lr"] for record in runs.records(tmp_path / "run")]
    assert rates[3:] == pytest.approx([1.5e-3 * (1 + math.cos(math.pi * (t - 0.75) / 4.25)) for t in (3.5, 4.5)])


# --------------------------------------------------------------------------- not finite


def poisoned(inputs, folder, times=1) -> tuple[Path, Path]:
    """(model, data): the model has an embedding row of infinities, and one or three items of the data use it."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    shutil.copytree(inputs / "model", folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    items = runs.dialogues()
    for bad in (3, 10, 23)[:times]:
        items[bad]["conversations"][1]["value"] += " ~"
    (token,) = set(tokenizer("~", add_special_tokens=False)["input_ids"])
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return folder / "model", runs.write_data(folder, items)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_loss_that_is_not_finite_stops_with_the_items(inputs, tmp_path, at_once):
    model, data = poisoned(inputs, tmp_path)
    output = tmp_path / "run"
    fields = {"pretrained_path": [str(model)], "data_config": str(data), "save_iteration_interval": None}
    fields |= {"save_interval": 0}
    if at_once:  # fails in the very first step, which has all items
        fields |= {"batch_size": 24, "accum_iter": 1}
    with pytest.raises(AccessoryError) as caught:
        runs.finetune(inputs, output, **fields)
    message = str(caught.value)
    step = int(message.removeprefix("step ").partition(":")[0])
    assert step == 1 if at_once else step > 1, message
    assert "\n" not in message
    assert "is nan" in message
    assert f"nan, in {data.with_suffix('.jsonl')}:4; the state" in message
    assert [row[0] for row in runs.curve(output)] == list(range(1, step))
    (state,) = (output / "states").iterdir()
    assert state.name == f"step-{step - 1:08d}"
    # The state is that after the last good step: another run that is ended there has the same.
    if not at_once:
        runs.interrupt(inputs, tmp_path / "until", step - 1, **fields)
        for name, tensor in runs.newest_state(tmp_path / "until").items():
            torch.testing.assert_close(runs.newest_state(output)[name], tensor, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(AccessoryError, match=f"step {step}: the loss is nan"):
        runs.finetune(inputs, output, **fields, resume="auto")


@pytest.mark.parametrize("packing", [False, True])
def test_the_item_at_fault_is_told_from_its_neighbours(inputs, tmp_path, packing):
    model, data = poisoned(inputs, tmp_path, times=3)
    changes = {"pretrained_path": [str(model)], "data_config": str(data), "packing": packing}
    with pytest.raises(AccessoryError) as caught:
        runs.finetune(inputs, tmp_path / "run", batch_size=24, accum_iter=1, **changes)
    file = data.with_suffix(".jsonl")
    assert f"in {file}:4, {file}:11, {file}:24; the state" in str(caught.value)


def test_a_gradient_that_is_not_finite_tells_the_steps_items(inputs, tmp_path, monkeypatch):
    from accessory.train import trainer

    monkeypatch.setattr(trainer, "squared_norm", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(AccessoryError, match=r"step 1: the gradient is inf, somewhere in .*data\.jsonl:\d+, "):
        runs.finetune(inputs, tmp_path / "run")


def test_ranks_stop_together_where_one_of_them_has_the_bad_item(inputs, tmp_path):
    model, data = poisoned(inputs, tmp_path)
    fields = runs.options(inputs, tmp_path / "run", pretrained_path=[str(model)], data_config=str(data))
    started = started_runs.start(fields, ranks=2)
    assert started.wait() == [1, 1]
    (line,) = started.errors()
    assert f"the loss is nan, in {data.with_suffix('.jsonl')}:4; " in line
    runs.check_folder(tmp_path / "run")


def test_ranks_that_share_rows_name_the_item_wherever_it_lies(inputs, tmp_path):
    model, data = poisoned(inputs, tmp_path, times=3)
    changes = {"pretrained_path": [str(model)], "data_config": str(data), "batch_size": 24, "accum_iter": 1}
    fields = runs.options(inputs, tmp_path / "run", context_parallel_size=2, packing=True, **changes)
    started = started_runs.start(fields, ranks=2)
    assert started.wait() == [1, 1]
    (line,) = started.errors()
    file = data.with_suffix(".jsonl")
    assert f"in {file}:4, {file}:11, {file}:24; the state" in line


def test_fp16_skips_what_overflows(inputs, tmp_path):
    """Halving the scale is no update. So the optimiser counts fewer updates than steps, also after a resume."""
    fields = {"precision": "fp16", "max_steps": 6, "save_iteration_interval": 2}
    started = started_runs.start(
        runs.options(inputs, tmp_path / "run", **fields), prepare=run_faults.scale_fp16, arguments=(2.0**40,)
    )
    assert started.wait() == [0], started.said()
    described = json.loads((tmp_path / "run/states/step-00000006/state.json").read_text())
    skipped = sum(r["grad_norm"] != r["grad_norm"] for r in runs.records(tmp_path / "run"))
    assert skipped > 0
    assert described["updates"] == 6 - skipped
    assert described["loss_scale"][0] == 2.0 ** (40 - skipped)
