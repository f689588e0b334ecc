"""One process drives two ranks: they answer as one model does, and what they are given must make sense."""

import socket
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from helpers.rank_kills import SOON, rank_processes
from helpers.threads import generate_in_threads

from accessory.errors import InputError
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

PROMPT = "The best programming language in the world is"
HOW = {"max_seq_len": 8192, "dtype": torch.float32, "device": "cpu"}
LONG = {"max_gen_len": 8000, "temperature": 1.0, "seed": 1}

pytestmark = pytest.mark.usefixtures("no_hang")


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
    monkeypatch.setattr(wrapper._ranks, "_step_timeout", 1.0)
    end = time.monotonic() + 2
    assert wrapper.generate([PROMPT], cancelled=lambda: time.monotonic() > end, **LONG)[0]
    assert time.monotonic() >= end


def test_ranks_listen_on_this_machine_alone(wrapper):
    processes = [psutil.Process(), *rank_processes()]
    listening = [c for p in processes for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_threads_are_answered_at_once(wrapper, expected):
    """A short answer that is asked for in the middle of a long one comes before the long one ends."""
    long = wrapper.stream_generate(PROMPT, **LONG)
    lengths, stop = [], threading.Event()

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
    found = generate_in_threads(wrapper, PROMPT, (3, 5, 7))
    assert reader.is_alive()
    assert len(lengths) > began
    stop.set()
    reader.join(60)
    assert found == {n: expected.generate([PROMPT], max_gen_len=n) for n in (3, 5, 7)}


@pytest.mark.slow
def test_ranks_share_one_machine_s_memory_and_refuse_together(cut_folder, tmp_path):
    """The ranks take what cache there is memory for, and go on after a question that it could never hold."""
    (tmp_path / "long.json").write_text('{"max_seq_len": 1000000000000}')  # else so long a context is refused before
    how = HOW | {"max_seq_len": 10**12, "llama_config": tmp_path / "long.json"}
    with MultiGpuWrapper(cut_folder, gpus=2, **how) as wrapper:
        before = [rank._process.pid for rank in wrapper._ranks._ranks]
        with pytest.raises(InputError, match=r"need \d+ pages of 64 tokens, but the cache has \d+"):
            wrapper.generate([PROMPT], max_gen_len=10**11)
        assert len(wrapper.generate([PROMPT], max_gen_len=2)) == 1
        assert [rank._process.pid for rank in wrapper._ranks._ranks] == before


def test_an_address_of_another_machine_is_refused_at_once(cut_folder):
    with pytest.raises(InputError, match=r"master_addr.*cannot listen on 192\.0\.2\.7"):
        MultiGpuWrapper(cut_folder, gpus=2, master_addr="192.0.2.7", **HOW)


def test_a_port_in_use_is_named(cut_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"master_port: {port} .*in use"):
            MultiGpuWrapper(cut_folder, gpus=2, master_port=port, **HOW)


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
def test_how_many_ranks_must_make_sense(cut_folder, options, names):
    with pytest.raises(InputError, match=names):
        MultiGpuWrapper(cut_folder, **{**HOW, **options})
