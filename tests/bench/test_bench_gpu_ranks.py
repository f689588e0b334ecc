"""`benchmarks/gpu_ranks.py`: its commands are commands of the program, and what goes wrong is a row."""

from __future__ import annotations

import shlex
import sys

import pytest

from accessory.cli import _parser
from accessory.commands.bench_options import check_bench_options
from accessory.config import PRESETS
from accessory.errors import InputError
from accessory.planner.cards import card_of
from benchmarks import gpu_ranks
from benchmarks.gpu_ranks import Measurement


def printed(capsys, tmp_path, *words):
    """The parsed options of each command of a dry run, by the name of its JSON."""
    gpu_ranks.main(["--dry-run", "--out", str(tmp_path), *words])
    found = {}
    for line in capsys.readouterr().out.splitlines():
        launcher, _, command = line.partition(" -m accessory ")
        assert launcher.startswith("torchrun ")
        options = _parser().parse_args(shlex.split(command))
        check_bench_options(options)
        name = options.out.removeprefix(f"{tmp_path}/").removesuffix(".json")
        assert name not in found
        found[name] = options
    return found


@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_a_dry_run_prints_commands_of_the_program(capsys, tmp_path, monkeypatch, gpus, quick):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    found = printed(capsys, tmp_path, "--gpus", str(gpus), *quick)
    assert {options.what for options in found.values()} == {"decode", "prefill", "train", "allreduce"}
    steps = {(o.model_parallel_size, o.data_parallel) for name, o in found.items() if name.endswith("-layers")}
    assert {tp for tp, _ in steps} == {n for n in (1, 2, 4, 8) if n <= gpus}
    assert {(1, "sdp"), (1, "fsdp")} <= steps
    assert all(options.model_parallel_size <= gpus for options in found.values() if options.what == "train")
    assert ("train-full-all-layers" in found) == (gpus == 8)
    assert set(printed(capsys, tmp_path, "--gpus", str(gpus), *quick, "--only", "decode")) == {
        "decode-sparse", "decode-base"
    }  # fmt: skip


def test_a_full_step_has_as_many_layers_as_fit():
    """On four H200s, 8 layers took 60 GB of 140 (benchmarks/README.md). A layer has 1.45 B parameters of 16 bytes."""
    found = gpu_ranks.measurements(PRESETS["8x7b"], 4, card_of("H200"), quick=False)
    (fsdp,) = (m for m in found if m.name.startswith("train-full-fsdp-tp1"))
    assert 8 < int(fsdp.options[-1]) < 4 * 140 / (1.45 * 16)


@pytest.mark.parametrize(("words", "names"), [([], "--gpus: this machine"), (["--gpus", "2", "--only", "x"], "--only")])
def test_what_cannot_be_measured_is_told(monkeypatch, words, names):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match=names):
        gpu_ranks.main(["--dry-run", *words])


PRINTS = """
print("2 × a card: copy 3 TB/s; torch 2.11; 2 layers, 1.5 B parameters")
print("| who | what | ms | tokens/s | times the floor | times the peer's speed | peak, GB |")
print("| accessory sparse bf16 | decode, batch 1 | 2.82 | 354 | 1.87 | – | 26.0 |", flush=True)
"""


@pytest.mark.parametrize(
    ("then", "says"),
    [
        ("", None),
        ("import sys; sys.exit('accessory: error: no room')", "ended with 1: accessory: error: no room"),
        ("import time; time.sleep(60)", "over its limit of 1 s"),
    ],
)
def test_a_command_leaves_rows_whatever_becomes_of_it(monkeypatch, capsys, tmp_path, then, says):
    one = Measurement("decode", (), seconds=1)
    (tmp_path / "script.py").write_text(PRINTS + then)
    monkeypatch.setattr(Measurement, "command", lambda *_: ["torchrun", "-c", then])
    real = gpu_ranks.subprocess.Popen
    monkeypatch.setattr(
        gpu_ranks.subprocess, "Popen", lambda _, **how: real([sys.executable, str(tmp_path / "script.py")], **how)
    )
    gpu_ranks.carry_out([one], "8x7b", 2, tmp_path)
    whole = [(tmp_path / "table.md").read_text().splitlines()[2:], capsys.readouterr().out]
    assert whole[0][0] == "| decode | accessory sparse bf16 | decode, batch 1 | 2.82 | 354 | 1.87 | – | 26.0 |"
    assert whole[0][1:] == ([f"| decode | {says} |{' – |' * 6}"] if says else [])
    assert "\n2 × a card: copy 3 TB/s\n" in whole[1]
    assert whole[1].endswith("\n".join(whole[0]) + "\n")
    (tmp_path / "decode.json").write_text("{}")
    monkeypatch.setattr(gpu_ranks.subprocess, "Popen", None)  # it is not run again, but another command is
    assert gpu_ranks.measure(one, "8x7b", 2, tmp_path) == whole[0][:1]
    monkeypatch.setattr(Measurement, "command", lambda *_: ["torchrun", "other"])
    with pytest.raises(TypeError):
        gpu_ranks.measure(one, "8x7b", 2, tmp_path)
