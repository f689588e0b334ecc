"""`accessory bench` of a card: every `--what` on a CPU, its files, peers, ranks, and mistakes."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import pytest
from helpers.command_line import write_hf
from helpers.distributed import run_ranks

from accessory.cli import _parser, main
from accessory.config import PRESETS

CPU = ("--device", "cpu")
SHORT = {
    "decode": ["--context", "16", "--tokens", "6", "--batch", "1", "3"],
    "prefill": ["--prompt", "24", "--batch", "1", "2"],
    "layer": ["--tokens", "1", "9"],
    "train": ["--tokens", "8", "--batch", "1"],
}


@pytest.fixture(scope="module")
def card():
    import torch

    from accessory.bench import card

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "MULTIPLIED_CPU", 128)  # where a CPU has no product in bf16, 512 take seconds
        return card.measure_card(torch.device("cpu"), torch.bfloat16)


@pytest.fixture
def bench(capsys, tmp_path, monkeypatch, card):
    """Run the command; returns the status, what it wrote into --out, what it printed, and its errors.

    All runs share one measurement of this machine.
    """
    monkeypatch.setattr("accessory.commands.bench.measure_card", lambda device, dtype: card)

    def run(target: str, what: str, *options: str):
        out = tmp_path / "out.json"
        status = main(["bench", target, "--what", what, "--out", str(out), *options])
        return status, json.loads(out.read_text()) if out.exists() else None, *capsys.readouterr()

    return run


def check(found: dict) -> dict[tuple[str, str], dict]:
    """Check what every figure must fulfil; returns them by who and what."""
    card = found["card"]
    assert min(card["copy"], card["matmul"]) > 1e7
    for figure in found["figures"]:
        assert figure["seconds"] > 0, figure
        if figure["nbytes"] or figure["operations"]:
            floor = max(figure["nbytes"] / card["copy"], figure["operations"] / card["matmul"])
            floor += figure["moved"] / card["copy"]
            assert figure["floor_seconds"] == pytest.approx(floor)
            assert figure["times_floor"] == pytest.approx(figure["seconds"] / floor)
    return {(f["who"], f["what"]): f for f in found["figures"]}


@pytest.mark.parametrize(
    ("what", "works", "tokens"),
    [
        ("decode", ["decode, batch 1", "decode, batch 3"], [1, 3]),
        ("prefill", ["prefill, 1 × 24", "prefill, 2 × 24"], [24, 48]),
        ("layer", ["layer, 1 token", "layer, 9 tokens"], [1, 9]),
    ],
)
def test_all_formats_in_both_implementations(bench, what, works, tokens):
    how = ("--format", "none", "int8", "--implementation", "sparse", "base")
    status, found, out, err = bench("tiny", what, *how, *SHORT[what], *CPU)
    assert (status, err) == (0, "")
    by_name = check(found)
    who = [f"accessory {kind} {format}" for kind in ("sparse", "base") for format in ("bf16", "int8")]
    assert list(by_name) == [(name, work) for name in who for work in works]
    for name in who:
        assert [by_name[name, work]["tokens"] for work in works] == tokens
    # An int8 weight is half as many bytes, scales and the rest aside.
    halves = [by_name[f"accessory sparse {f}", works[0]]["nbytes"] for f in ("bf16", "int8")]
    assert 0.4 < halves[1] / halves[0] < 0.8
    assert len([line for line in out.splitlines() if line.startswith("| accessory ")]) == 8


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_both_ways_of_running_in_one_run(bench, what):
    status, found, *_ = bench("tiny", what, "--deterministic", *SHORT[what], *CPU)
    assert status == 0
    who = ["accessory sparse bf16"] * 2 + ["accessory sparse bf16, deterministic"] * 2
    assert [name for name, _ in check(found)] == who


def test_training_steps(bench):
    how = ("--part", "passes", "full", "lora", "--format", "none", "int8", "--recompute")
    _, found, *_ = bench("tiny", "train", *how, *SHORT["train"], *CPU)
    assert list(check(found)) == [
        ("accessory sparse bf16", "passes, 1 × 8, recomputing"),
        ("accessory sparse bf16", "full, 1 × 8, recomputing"),
        ("accessory sparse bf16", "lora, 1 × 8, recomputing"),
        ("accessory sparse int8", "qlora over int8, 1 × 8, recomputing"),
    ]
    passes, full, lora, qlora = found["figures"]
    assert passes["operations"] == 1.5 * lora["operations"]
    # AdamW reads four fp32 numbers a parameter and writes three.
    assert full["moved"] == 28 * PRESETS["tiny"].parameter_counts()[0]
    assert passes["moved"] == lora["moved"] == qlora["moved"] == 0


def test_a_full_step_with_moments_in_8_bits(bench):
    pytest.importorskip("bitsandbytes")
    how = ("--part", "full", "lora", "--optimizer", "adamw_8bit", "--gradient-dtype", "bf16")
    _, found, *_ = bench("tiny", "train", *how, *SHORT["train"], *CPU)
    assert [what for _, what in check(found)] == [
        f"{part}, 1 × 8, adamw_8bit, gradients in bf16" for part in ("full", "lora")
    ]
    # Weight and moments are read and written (4 + 1 + 1 bytes), an fp32 gradient is read.
    assert found["figures"][0]["moved"] == 16 * PRESETS["tiny"].parameter_counts()[0]
    assert "--optimizer adamw_8bit" in found["command"]


def test_many_requests_at_once(bench):
    _, found, *_ = bench("tiny", "decode", "--requests", "2", *SHORT["decode"], *CPU)
    many = found["figures"][-1]
    assert many["what"].startswith("2 requests of ")
    assert 2 * 32 <= many["tokens"] <= 2 * 512


@pytest.mark.parametrize("what", ["decode", "prefill", "train"])
def test_transformers_does_the_same_work(bench, what):
    status, found, *_ = bench("tiny", what, "--vs", "transformers", *SHORT[what], *CPU)
    assert status == 0
    theirs = [f for f in check(found).values() if f["peer"]]
    ours = [f for f in found["figures"] if not f["peer"]]
    assert {f["what"] for f in theirs} == {f["what"] for f in ours}
    for figure in ours:
        quickest = min(f["seconds"] for f in theirs if f["what"] == figure["what"])
        assert figure["times_peer_speed"] == pytest.approx(quickest / figure["seconds"])
        assert all(f["operations"] == figure["operations"] for f in theirs if f["what"] == figure["what"])


def test_grouped_mm_is_the_peer_of_a_layer(bench):
    _, found, *_ = bench("tiny", "layer", "--vs", "grouped_mm", *SHORT["layer"], *CPU)
    by_name = check(found)
    assert ("torch dense", "layer, 9 tokens, all by one expert") in by_name
    peer, ours = (by_name[who, "layer, 9 tokens"] for who in ("torch grouped_mm", "accessory sparse bf16"))
    assert ours["times_peer_speed"] == pytest.approx(peer["seconds"] / ours["seconds"])
    assert peer["nbytes"] == ours["nbytes"]


def test_grouped_mm_computes_what_ours_does():
    import torch

    from accessory.bench.layer import _grouped
    from accessory.ops.experts import grouped_experts

    torch.manual_seed(0)
    w13, w2 = torch.randn(4, 2 * 16, 8), torch.randn(4, 8, 16)
    x_TD, weight_TK = torch.randn(5, 8), torch.rand(5, 2)
    expert_TK = torch.rand(5, 4).topk(2)[1]
    w1, w3 = w13.chunk(2, 1)
    wanted = grouped_experts(x_TD, w1, w2, w3, weight_TK, expert_TK)
    got = _grouped(*(t.bfloat16() for t in (w13, w2, x_TD)), weight_TK, expert_TK)
    assert (got - wanted).norm() < 0.02 * wanted.norm()


THEIR_MODEL = """
from dataclasses import dataclass
import torch
@dataclass
class ModelArgs:
    block_size: int; n_layer: int; n_head: int; n_local_heads: int; dim: int; intermediate_size: int
    vocab_size: int; rope_base: float; num_experts: int; num_activated_experts: int
class Transformer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, self.seen = args, 0
        self.embedding = torch.nn.Embedding(args.vocab_size, args.dim)
    def setup_caches(self, max_batch_size, max_seq_length):
        self.longest = max_seq_length
    def forward(self, ids, position):
        assert int(position[-1]) < self.longest and len(position) == ids.shape[1]
        return self.embedding(ids) @ self.embedding.weight.T
"""


@pytest.mark.slow
def test_gpt_fast_runs_in_a_process_of_its_own(bench, tmp_path):
    """The folder holds a stand-in with gpt-fast's interface."""
    folder = tmp_path / "mixtral-moe"
    folder.mkdir()
    (folder / "model.py").write_text(THEIR_MODEL)
    (folder / "quantize.py").write_text("")
    how = ("--vs", "gpt-fast", "--gpt-fast-path", str(folder), *SHORT["decode"], *CPU)
    status, found, *_ = bench("tiny", "decode", *how)
    assert status == 0
    by_name = check(found)
    peer, ours = by_name["gpt-fast bf16", "decode, batch 1"], by_name["accessory sparse bf16", "decode, batch 1"]
    assert ours["times_peer_speed"] == pytest.approx(peer["seconds"] / ours["seconds"])
    assert "model" not in sys.modules
    assert str(folder) not in found["command"]


@pytest.mark.parametrize("process", ["stood in for", pytest.param("its own", marks=pytest.mark.slow)])
def test_a_peer_that_fails_is_a_line(bench, tmp_path, monkeypatch, process):
    def failed(command, **how):
        raise subprocess.CalledProcessError(1, command, stderr="Traceback …\nValueError: not today\n")

    if process == "stood in for":
        monkeypatch.setattr("accessory.bench.peer_gpt_fast.subprocess.run", failed)
    (tmp_path / "model.py").write_text("raise ValueError('not today')")
    (tmp_path / "quantize.py").write_text("")
    how = ("--vs", "gpt-fast", "--gpt-fast-path", str(tmp_path), *SHORT["decode"], *CPU)
    status, found, out, _ = bench("tiny", "decode", *how)
    assert status == 0
    assert "| gpt-fast bf16 | decode, batch 1 | ValueError: not today |" in out
    assert [f["who"] for f in found["figures"]].count("accessory sparse bf16") == 2


def test_a_checkpoint_is_measured_as_it_is(bench, tmp_path):
    folder = write_hf(tmp_path / "hf")
    _, found, *_ = bench(str(folder), "decode", *SHORT["decode"], *CPU)
    assert [f["what"] for f in check(found).values()] == ["decode, batch 1", "decode, batch 3"]
    assert main(["quantize", str(folder), str(tmp_path / "int8"), "--quant", "int8"]) == 0
    _, found, *_ = bench(str(tmp_path / "int8"), "decode", *SHORT["decode"], *CPU)
    assert found["figures"][0]["who"] == "accessory sparse stored"
    status, _, _, err = bench(str(tmp_path / "int8"), "decode", "--format", "int8", *SHORT["decode"], *CPU)
    assert status == 1
    assert "--format: the weights of" in err


# --------------------------------------------------------------------------- files


def test_the_section_of_a_page_and_the_line_of_a_log(bench, tmp_path):
    page, log = tmp_path / "README.md", tmp_path / "log.md"
    files = ("--readme", str(page), "--log", str(log), "--expected", "quicker", "--markdown")
    for _ in range(2):
        _, found, out, _ = bench("tiny", "layer", *SHORT["layer"], *CPU, *files)
    text = page.read_text(encoding="utf-8")
    assert text.count(f"    {found['command']}\n") == text.count("<!-- end of accessory bench -->") == 1
    ms = found["figures"][0]["seconds"] * 1e3
    assert f"{ms:.{4 if ms < 1 else 2 if ms < 100 else 1}f}" in text
    assert text.splitlines()[-3] in out
    rows = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith(" | quicker |")]
    assert len(rows) == 2
    assert f"`{found['command']}`" in rows[0]
    # The command that the page shows is one that the parser reads, and it says what was asked.
    options = _parser().parse_args(shlex.split(found["command"])[1:])
    assert (options.what, options.tokens, options.device) == ("layer", [1, 9], "cpu")
    assert options.readme is options.log is options.expected is options.out is None


# --------------------------------------------------------------------------- ranks


def ranks(*words: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "-m", "accessory", "bench", "tiny", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


WORDS = {
    "decode": ["decode", *SHORT["decode"], "--implementation", "sparse", "base"],
    "prefill": ["prefill", *SHORT["prefill"]],
    "layer": ["layer", *SHORT["layer"], "--implementation", "base", "sparse"],
    "allreduce": ["allreduce"],
}


def check_printed_once(found: dict, printed: str) -> None:
    assert found["ranks"] == 2
    figures = check(found)
    assert found["command"].startswith("torchrun --nproc-per-node 2 -m accessory bench tiny --what ")
    assert printed.count("| who | what |") == 1
    assert len([line for line in printed.splitlines() if line.startswith(("| accessory", "| gloo"))]) == len(figures)


@pytest.mark.slow
@pytest.mark.parametrize("what", WORDS)
def test_two_ranks_of_a_launcher_print_once(what, tmp_path):
    done = ranks("--what", *WORDS[what], "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    check_printed_once(json.loads((tmp_path / "out.json").read_text()), done.stdout)


def in_a_rank(rank: int, world: int, folder: str, card: Any) -> dict[str, str]:
    """What the rank prints in each run. Its group exists already."""
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accessory.commands.bench.measure_card", lambda device, dtype: card)
        for what, words in WORDS.items():
            with redirect_stdout(StringIO()) as out:
                assert main(["bench", "tiny", "--what", *words, "--out", f"{folder}/{what}.json", *CPU]) == 0
            printed[what] = out.getvalue()
    return printed


@pytest.mark.slow
def test_two_ranks_measure_everything_that_takes_ranks(tmp_path, card):
    first, second = run_ranks(in_a_rank, 2, str(tmp_path), card)
    assert set(second.values()) == {""}
    for what, printed in first.items():
        check_printed_once(json.loads((tmp_path / f"{what}.json").read_text()), printed)


# --------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("target", "what", "options", "said"),
    [
        ("tiny", "serve", [], "--what: got serve for tiny"),
        (
            "http://127.0.0.1:9",
            "decode",
            [],
            "--what: got decode for http://127.0.0.1:9, but a server takes --what serve",
        ),
        ("nowhere", "decode", [], "nowhere: no such file or folder, none of 8x7b, 8x22b, tiny, and no URL of a server"),
        ("tiny", "decode", ["--clients", "2"], "--clients: it is not for --what decode, but for serve"),
        ("tiny", "layer", ["--batch", "2"], "--batch: it is not for --what layer"),
        ("tiny", "decode", ["--batch", "0"], "--batch: got 0, but it must be at least 1"),
        (
            "tiny",
            "decode",
            ["--batch", "40", "--device", "cpu"],
            "--batch: got 40, but 32 sequences run at once on a cpu",
        ),
        ("tiny", "decode", ["--tokens", "2"], "--tokens: got 2, but the first and the last step do not count"),
        ("tiny", "decode", ["--tokens", "8", "9"], "--tokens: got 2 numbers, but --what decode takes one"),
        ("tiny", "decode", ["--format", "nf4", "--device", "cpu"], "--format nf4: quant: its rows of 96 numbers"),
        ("tiny", "decode", ["--kernels", "--device", "cpu"], "--kernels: it needs a GPU"),
        ("tiny", "layer", ["--vs", "transformers"], "--vs: transformers is not measured with --what layer"),
        ("tiny", "decode", ["--vs", "gpt-fast"], "--vs gpt-fast and --gpt-fast-path FOLDER need each other"),
        ("tiny", "decode", ["--vs", "gpt-fast", "--gpt-fast-path", "."], "--gpt-fast-path: . has no model.py"),
        ("tiny", "allreduce", ["--device", "cpu"], "--what allreduce: it needs several ranks; run torchrun"),
        ("tiny", "layer", ["--expected", "less"], "--expected: it is a part of the line of --log FILE"),
        ("tiny", "layer", ["--plot", "x.html"], "--plot: got x.html, but a roofline is a picture; name it *.png"),
        ("tiny", "layer", ["--readme", "nowhere/x.md"], "--readme: nowhere/x.md cannot be written"),
        (".", "decode", ["--layers", "2"], "--layers: . has its own"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_measured(bench, monkeypatch, target, what, options, said):
    monkeypatch.setattr("accessory.commands.bench.measure_card", lambda *_: pytest.fail("it was measured"))
    status, found, out, err = bench(target, what, *options)
    assert (status, found, out) == (1, None, "")
    assert err.startswith("accessory: error: ")
    assert said in err
    assert err.count("\n") == 1
