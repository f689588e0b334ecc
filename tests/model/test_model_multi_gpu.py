"""One process driving two ranks, and everything that can go wrong between them."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from helpers.random_models import write_speaking
from helpers.rank_kills import kill_in_step, rank_of
from helpers.sizes import SPEAKING

from accessory.convert.convert import convert
from accessory.errors import CheckpointError, InputError, RankError
from accessory.launch.rank_processes import RankProcess
from accessory.model.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

ARGS = SPEAKING.replace(dim=64, hidden_dim=96, head_dim=8, max_seq_len=8192)
PROMPT = "The best programming language in the world is"
HOW = {"max_seq_len": 8192, "dtype": torch.float32, "device": "cpu"}
LONG = {"max_gen_len": 8000, "temperature": 1.0, "seed": 1}
SOON = 10.0  # seconds within which every failure must be reported and cleaned up


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrapper")
    write_speaking(root / "hf", ARGS)
    convert(root / "hf", root / "base", to="base", shards=2, progress=False)
    return root / "base"


@pytest.fixture(scope="module")
def expected(folder):
    return MetaModel.from_pretrained(folder, **HOW)


@pytest.fixture(scope="module")
def wrapper(folder):
    """A wrapper on a port of its own. Each new set of ranks must be able to open the same port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with MultiGpuWrapper(folder, gpus=2, master_port=port, **HOW) as wrapper:
        yield wrapper


@pytest.fixture(autouse=True)
def _no_test_hangs():
    def stuck(*_):
        raise TimeoutError("the test took more than 100 s")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def rank_processes():
    return [p for p in psutil.Process().children(recursive=True) if "rank_worker" in " ".join(p.cmdline())]


def gone(processes, patience=SOON):
    return not psutil.wait_procs(processes, timeout=patience)[1]


def test_every_method_is_metamodels(wrapper, expected):
    assert wrapper.generate([PROMPT, "A"], max_gen_len=8) == expected.generate([PROMPT, "A"], max_gen_len=8)
    stream = list(wrapper.stream_generate(PROMPT, max_gen_len=8))
    assert stream[-1] == list(expected.stream_generate(PROMPT, max_gen_len=8))[-1]
    ours, theirs = wrapper.compute_logits([PROMPT])[0], expected.compute_logits([PROMPT])[0]
    assert ((ours - theirs).norm() / theirs.norm()).item() <= 1e-5
    ours, theirs = (m.evaluate_examples([PROMPT], contexts=["The best"]) for m in (wrapper, expected))
    assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=1e-4)
    assert wrapper.tokenizer.encode("x", bos=True) == expected.tokenizer.encode("x", bos=True)


def test_sampling_repeats_under_a_seed_and_under_torchs(wrapper, expected):
    how = {"max_gen_len": 12, "temperature": 1.0}
    assert wrapper.generate([PROMPT], seed=3, **how) == expected.generate([PROMPT], seed=3, **how)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(wrapper.generate([PROMPT], **how))
    assert draws[0] == draws[1] != draws[2]


def test_bad_input_is_metamodels_error_and_the_ranks_live_on(wrapper):
    before = {p.pid for p in rank_processes()}
    for call, names in (
        (lambda: wrapper.generate([PROMPT], max_gen_len=0), "max_gen_len"),
        (lambda: next(wrapper.stream_generate("", max_gen_len=4)), r"prompts\[0\]"),
    ):
        with pytest.raises(InputError, match=names):
            call()
    assert len(wrapper.generate([PROMPT], max_gen_len=2)) == 1
    assert {p.pid for p in rank_processes()} == before


@pytest.mark.parametrize("leave", ["close", "drop", "cancelled"])
def test_a_client_that_walks_away_ends_the_stream_not_the_ranks(wrapper, leave):
    before = {p.pid for p in rank_processes()}
    asked = []
    stream = wrapper.stream_generate(PROMPT, cancelled=lambda: leave == "cancelled" and len(asked) > 2, **LONG)
    started = time.monotonic()
    for item in stream:
        asked.append(item)
        if leave != "cancelled" and len(asked) == 3:
            break
    if leave == "close":
        stream.close()
    del stream
    assert len(wrapper.generate([PROMPT], max_gen_len=2)) == 1
    assert time.monotonic() - started < SOON
    assert {p.pid for p in rank_processes()} == before


def test_prompts_may_be_arrays_and_what_cannot_be_sent_says_so(wrapper):
    ids = wrapper.tokenizer.encode(PROMPT, bos=True)
    for given in (torch.tensor(ids), np.array(ids), tuple(ids)):
        assert wrapper.generate([given], max_gen_len=3) == wrapper.generate([ids], max_gen_len=3)
    with pytest.raises(InputError, match=r"prompts\[0\]: got a function; give a string, or token ids"):
        wrapper.generate([lambda: PROMPT], max_gen_len=3)


def test_a_call_beside_a_half_read_stream_neither_hangs_nor_takes_from_it(wrapper, expected):
    stream = wrapper.stream_generate(PROMPT, max_gen_len=30)
    items = [next(stream)]
    assert wrapper.generate(["A"], max_gen_len=3) == expected.generate(["A"], max_gen_len=3)
    items += stream
    whole = list(expected.stream_generate(PROMPT, max_gen_len=30))
    assert items[-1] == whole[-1]
    assert all(item in whole for item in items)  # what was written meanwhile comes in one item


def test_a_long_answer_is_not_taken_for_a_stuck_rank(wrapper, monkeypatch):
    monkeypatch.setattr(wrapper._ranks, "_step_timeout", 1.5)
    end = time.monotonic() + 3
    assert wrapper.generate([PROMPT], cancelled=lambda: time.monotonic() > end, **LONG)[0]
    assert time.monotonic() >= end


def test_ranks_listen_on_this_machine_alone(wrapper):
    processes = [psutil.Process(), *rank_processes()]
    listening = [c for p in processes for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_threads_are_answered_at_once(wrapper, expected):
    """A short answer that is asked for in the middle of a long one comes before the long one ends."""
    long = wrapper.stream_generate(PROMPT, **LONG)
    lengths, found, stop = [], {}, threading.Event()

    def read():
        for item in long:
            lengths.append(len(item["text"]))
            if stop.is_set():
                return

    reader = threading.Thread(target=read)
    reader.start()
    while not lengths:
        time.sleep(0.01)
    began = len(lengths)
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: wrapper.generate([PROMPT], max_gen_len=n)}))
        for n in (3, 5, 7)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert reader.is_alive()
    assert len(lengths) > began
    stop.set()
    reader.join(60)
    assert found == {n: expected.generate([PROMPT], max_gen_len=n) for n in (3, 5, 7)}


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


def test_ranks_that_cannot_load_say_why(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shard = broken / "consolidated.01-of-02.model.pth"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    before = {p.pid for p in rank_processes()}
    with pytest.raises(CheckpointError, match="consolidated"):
        MultiGpuWrapper(broken, gpus=2, **HOW)
    assert {p.pid for p in rank_processes()} == before


def test_ranks_share_one_machine_s_memory_and_refuse_together(folder, tmp_path):
    """The ranks take what cache there is memory for, and go on after a question that it could never hold."""
    (tmp_path / "long.json").write_text('{"max_seq_len": 1000000000000}')  # else so long a context is refused before
    how = HOW | {"max_seq_len": 10**12, "llama_config": tmp_path / "long.json"}
    with MultiGpuWrapper(folder, gpus=2, **how) as wrapper:
        before = [rank._process.pid for rank in wrapper._ranks._ranks]
        with pytest.raises(InputError, match=r"need \d+ pages of 64 tokens, but the cache has \d+"):
            wrapper.generate([PROMPT], max_gen_len=10**11)
        assert len(wrapper.generate([PROMPT], max_gen_len=2)) == 1
        assert [rank._process.pid for rank in wrapper._ranks._ranks] == before


def test_a_rank_that_fails_alone_ends_all(folder, monkeypatch):
    """One rank does not find the file. The others find it and would wait for that rank."""
    real = RankProcess.__init__

    def in_another_folder(self, module, place, gpu):
        here = os.getcwd()
        os.chdir("/" if place.rank else folder.parent)
        try:
            real(self, module, place, gpu)
        finally:
            os.chdir(here)

    monkeypatch.setattr(RankProcess, "__init__", in_another_folder)
    before = {p.pid for p in rank_processes()}
    monkeypatch.chdir(folder.parent)
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1, while loading: base: no such"):
        MultiGpuWrapper("base", gpus=2, **HOW)
    assert time.monotonic() - started < 2 * SOON  # starting and importing take time first
    assert {p.pid for p in rank_processes()} == before


def test_a_rank_that_cannot_even_start_says_why(folder, monkeypatch):
    real = RankProcess.__init__

    def without_python(self, module, place, gpu):
        with monkeypatch.context() as patch:
            if place.rank:
                patch.setenv("PYTHONHOME", "/nowhere")
            real(self, module, place, gpu)

    monkeypatch.setattr(RankProcess, "__init__", without_python)
    before = {p.pid for p in rank_processes()}
    with pytest.raises(RankError, match=r"^rank 1 ended \(1\), saying .*[Ee]rror.*, before it could load$"):
        MultiGpuWrapper(folder, gpus=2, **HOW)
    assert {p.pid for p in rank_processes()} == before


@pytest.mark.slow
def test_a_rank_killed_while_it_loads_is_one_error(folder, monkeypatch):
    real = RankProcess.__init__

    def killed(self, module, place, gpu):
        real(self, module, place, gpu)
        if place.rank:
            threading.Timer(0.5, self._process.kill).start()

    monkeypatch.setattr(RankProcess, "__init__", killed)
    before = {p.pid for p in rank_processes()}
    with pytest.raises(RankError, match="rank 1 was ended by signal 9"):
        MultiGpuWrapper(folder, gpus=2, **HOW)
    assert {p.pid for p in rank_processes()} == before


def test_an_address_of_another_machine_is_refused_at_once(folder):
    with pytest.raises(InputError, match=r"master_addr.*cannot listen on 192\.0\.2\.7"):
        MultiGpuWrapper(folder, gpus=2, master_addr="192.0.2.7", **HOW)


def test_a_port_in_use_is_named(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"master_port: {port} .*in use"):
            MultiGpuWrapper(folder, gpus=2, master_port=port, **HOW)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"gpus": 0}, "gpus: got 0"),
        ({}, "gpus: got None"),
        ({"gpu_ids": [1, 1]}, "gpu_ids"),
        ({"gpus": 3, "gpu_ids": [0, 1]}, "gpus: got 3"),
        ({"gpus": 2, "device": "cuda:1"}, "device: got 'cuda:1'"),
    ],
)
def test_how_many_ranks_must_make_sense(folder, options, names):
    with pytest.raises(InputError, match=names):
        MultiGpuWrapper(folder, **{**HOW, **options})


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
def test_signals_to_the_driver_leave_no_process_behind(folder, number):
    command = [sys.executable, "-c", SCRIPT, str(folder)]
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
def test_the_command_tells_of_a_killed_rank_in_one_line(folder):
    command = [
        sys.executable,
        "-m",
        "accessory",
        "generate",
        str(folder),
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


@pytest.mark.parametrize(
    "ways",
    [
        ["close", "drop"],
        pytest.param(["close in a call", "close"], marks=pytest.mark.slow),
    ],
)
def test_closing_or_dropping_ends_the_ranks_and_a_later_call_starts_them(folder, expected, ways):
    wrapper = MultiGpuWrapper(folder, gpus=2, **HOW)
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
