"""Ranks that die, hang, cannot load or lose their driver: one error, no process stays, and the next call works."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from helpers.rank_kills import SOON, gone, kill_in_step, rank_of, rank_processes

from accessory.errors import CheckpointError, RankError
from accessory.launch.rank_processes import RankProcess
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

PROMPT = "The best programming language in the world is"
HOW = {"max_seq_len": 8192, "dtype": torch.float32, "device": "cpu"}
LONG = {"max_gen_len": 8000, "temperature": 1.0, "seed": 1}

pytestmark = pytest.mark.usefixtures("no_hang")


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_is_one_error_and_the_next_call_works(wrapper, expected, victim):
    stream = wrapper.stream_generate(PROMPT, **LONG)
    next(stream)
    before = rank_processes()
    os.kill(rank_of(wrapper, victim)._process.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RankError, match=rf"rank {victim} was ended by signal 9") as error:
        for _ in stream:
            pass
    assert time.monotonic() - started < SOON
    assert "\n" not in str(error.value)
    assert gone(before)
    assert wrapper.generate([PROMPT], max_gen_len=4) == expected.generate([PROMPT], max_gen_len=4)


def score(wrapper):
    return wrapper.evaluate_examples([PROMPT])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "step"),
    [
        pytest.param(lambda wrapper: wrapper.generate([PROMPT], **LONG), 1, id="prompt"),
        pytest.param(lambda wrapper: wrapper.generate([[5] * 4000], max_gen_len=4), 2, id="chunk of a long prompt"),
        pytest.param(score, 1, id="scoring"),
    ],
)
def test_a_rank_killed_in_a_step_of_any_kind(wrapper, expected, monkeypatch, call, step):
    """The rank gets the step and is killed in it. Decoding is above, loading below, images are in test_model_images."""
    wrapper.generate(["A"], max_gen_len=2)  # starts the ranks where an earlier test ended them
    before = rank_processes()
    steps = kill_in_step(wrapper, monkeypatch, step)
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 was ended by signal 9 while (generating|scoring); the next call"):
        call(wrapper)
    assert time.monotonic() - started < SOON
    assert len(steps) == step
    monkeypatch.undo()
    assert gone(before)
    assert wrapper.generate([PROMPT], max_gen_len=4) == expected.generate([PROMPT], max_gen_len=4)


@pytest.mark.slow
def test_a_stuck_rank_is_one_error_and_the_next_call_works(wrapper, expected, monkeypatch):
    stream = wrapper.stream_generate(PROMPT, **LONG)
    next(stream)
    before = rank_processes()
    os.kill(rank_of(wrapper, 1)._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(wrapper._ranks, "_step_timeout", 2.0)
    with pytest.raises(RankError, match="ranks 0, 1 said nothing for 2 s"):
        list(stream)
    assert gone(before)
    assert wrapper.generate([PROMPT], max_gen_len=4) == expected.generate([PROMPT], max_gen_len=4)


@pytest.mark.slow
def test_a_rank_killed_between_calls_is_noticed_by_the_next(wrapper, expected):
    os.kill(rank_of(wrapper, 1)._process.pid, signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(RankError, match="rank 1 was ended"):
        wrapper.generate([PROMPT], max_gen_len=4)
    assert wrapper.generate([PROMPT], max_gen_len=4) == expected.generate([PROMPT], max_gen_len=4)


def test_ranks_that_cannot_load_say_why(cut_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(cut_folder, broken)
    shard = broken / "consolidated.01-of-02.model.pth"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    before = {p.pid for p in rank_processes()}
    with pytest.raises(CheckpointError, match="consolidated"):
        MultiGpuWrapper(broken, gpus=2, **HOW)
    assert {p.pid for p in rank_processes()} == before


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_all(cut_folder, monkeypatch):
    """One rank does not find the file. The others find it and would wait for that rank."""
    real = RankProcess.__init__

    def in_another_folder(self, module, place, gpu):
        here = os.getcwd()
        os.chdir("/" if place.rank else cut_folder.parent)
        try:
            real(self, module, place, gpu)
        finally:
            os.chdir(here)

    monkeypatch.setattr(RankProcess, "__init__", in_another_folder)
    before = {p.pid for p in rank_processes()}
    monkeypatch.chdir(cut_folder.parent)
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1, while loading: base: no such"):
        MultiGpuWrapper("base", gpus=2, **HOW)
    assert time.monotonic() - started < 2 * SOON  # starting and importing take time first
    assert {p.pid for p in rank_processes()} == before


def test_a_rank_that_cannot_even_start_says_why(cut_folder, monkeypatch):
    real = RankProcess.__init__

    def without_python(self, module, place, gpu):
        with monkeypatch.context() as patch:
            if place.rank:
                patch.setenv("PYTHONHOME", "/nowhere")
            real(self, module, place, gpu)

    monkeypatch.setattr(RankProcess, "__init__", without_python)
    before = {p.pid for p in rank_processes()}
    with pytest.raises(RankError, match=r"^rank 1 ended \(1\), saying .*[Ee]rror.*, before it could load$"):
        MultiGpuWrapper(cut_folder, gpus=2, **HOW)
    assert {p.pid for p in rank_processes()} == before


@pytest.mark.slow
def test_a_rank_killed_while_it_loads_is_one_error(cut_folder, monkeypatch):
    real = RankProcess.__init__

    def killed(self, module, place, gpu):
        real(self, module, place, gpu)
        if place.rank:
            threading.Timer(0.5, self._process.kill).start()

    monkeypatch.setattr(RankProcess, "__init__", killed)
    before = {p.pid for p in rank_processes()}
    with pytest.raises(RankError, match="rank 1 was ended by signal 9"):
        MultiGpuWrapper(cut_folder, gpus=2, **HOW)
    assert {p.pid for p in rank_processes()} == before


# A script without `if __name__ == "__main__"`, as people write them.
SCRIPT = """
import sys, torch
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper
model = MultiGpuWrapper(sys.argv[1], gpus=2, max_seq_len=8192, dtype=torch.float32, device="cpu")
try:
    for n, item in enumerate(model.stream_generate("A", max_gen_len=8000, temperature=1.0, seed=1)):
        if n == 2:
            print("streaming", flush=True)
except KeyboardInterrupt:
    print("interrupted", len(model.generate(["A"], max_gen_len=2)), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_signals_to_the_driver_leave_no_process_behind(cut_folder, number):
    command = [sys.executable, "-c", SCRIPT, str(cut_folder)]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert script.stdout.readline() == "streaming\n"
    ranks = psutil.Process(script.pid).children(recursive=True)
    assert len(ranks) >= 2
    script.send_signal(number)
    started = time.monotonic()
    out, err = script.communicate(timeout=2 * SOON)
    assert gone(ranks, SOON)
    assert time.monotonic() - started < SOON
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert out == "interrupted 1\n"
        assert script.returncode == 0


@pytest.mark.slow
def test_the_command_tells_of_a_killed_rank_in_one_line(cut_folder):
    command = [
        sys.executable,
        "-m",
        "accessory",
        "generate",
        str(cut_folder),
        "--n-gpus",
        "2",
        "--device",
        "cpu",
        "--stream",
    ]
    how = ["--prompt", "A", "--max-seq-len", "8192", "--max-gen-len", "8000", "--temperature", "1", "--seed", "1"]
    program = subprocess.Popen([*command, *how], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout.read(1)
    ranks = psutil.Process(program.pid).children(recursive=True)
    ranks[-1].kill()
    _, err = program.communicate(timeout=2 * SOON)
    assert gone(ranks)
    assert re.fullmatch(r"accessory: error: rank \d was ended by signal 9 while [^\n]*\n", err.decode())
    assert program.returncode == 1


@pytest.mark.slow
def test_closing_ends_the_ranks_and_a_later_call_starts_them(wrapper, expected):
    assert wrapper.generate([PROMPT], max_gen_len=4) == expected.generate([PROMPT], max_gen_len=4)
    ranks = [psutil.Process(rank._process.pid) for rank in wrapper._ranks._ranks]
    wrapper.close()
    assert gone(ranks)
    assert wrapper.generate([PROMPT], max_gen_len=4) == expected.generate([PROMPT], max_gen_len=4)


@pytest.mark.slow
@pytest.mark.parametrize("ways", [["close", "drop"], ["close in a call", "close"]])
def test_closing_or_dropping_ends_the_ranks_and_a_later_call_starts_them(cut_folder, expected, ways):
    wrapper = MultiGpuWrapper(cut_folder, gpus=2, **HOW)
    for leave in ways:
        assert wrapper.generate([PROMPT], max_gen_len=4) == expected.generate([PROMPT], max_gen_len=4)
        ranks = [psutil.Process(rank._process.pid) for rank in wrapper._ranks._ranks]
        if leave == "close":
            wrapper.close()
        elif leave == "close in a call":
            threading.Timer(0.2, wrapper.close).start()
            with pytest.raises(RankError, match="closed while generating"):
                wrapper.generate([PROMPT], **LONG)
        else:
            del wrapper
        assert gone(ranks)
