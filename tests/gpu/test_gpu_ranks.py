"""One, two, four and eight cards of a host: the same texts and curves, and what follows a rank's death.

Ranks are real processes that talk over NCCL. With ACCESSORY_TEST_RANKS=2 (4, 8) they are as many processes of this
machine's CPU instead, over gloo: to try these tests out where there is no card.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from helpers import runs
from helpers.command_line import program
from helpers.random_models import decisive, hf_mixtral
from helpers.rank_kills import SOON, gone, rank_of, rank_processes
from helpers.sizes import SPEAKING

from accessory.config import MoEArgs
from accessory.convert.convert import convert
from accessory.data.tokenizer import MIXTRAL_TOKENIZER
from accessory.engine.sampling_params import SamplingParams
from accessory.errors import RankError
from accessory.model.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

ON_CPU = "ACCESSORY_TEST_RANKS" in os.environ
THERE_ARE = int(os.environ["ACCESSORY_TEST_RANKS"]) if ON_CPU else torch.cuda.device_count()
DEVICE = "cpu" if ON_CPU else "cuda"
pytestmark = pytest.mark.gpu
on_ranks = pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(n, id=f"{n}-ranks", marks=pytest.mark.skipif(n > THERE_ARE, reason=f"needs {n} CUDA devices"))
        for n in (2, 4, 8)
    ],
)
# Eight ranks can cut every size, and rows of experts and of wo in whole groups of 128.
ARGS = SPEAKING.replace(dim=256, hidden_dim=1024, n_heads=16, n_kv_heads=8, head_dim=64, moe=MoEArgs())
PROMPTS = [
    "The best programming language in the world is", "A", "Zwei", "Once upon a time", "def main():", "In 1969",
    "The capital of France is", "Water boils at", "To be, or not to be", "x = y + z, so z =", "Dear Sir or Madam", "I",
]  # fmt: skip
WAYS = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "quant": "int8"},
    "int4": {"dtype": torch.bfloat16, "quant": "int4"},
}
PATIENCE = {"load_timeout": 200, "step_timeout": 100}


# --------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Routers decide clearly, and so does the head: a few tokens' logits are four times as large as all others'."""
    root = tmp_path_factory.mktemp("texts")
    oracle = decisive(hf_mixtral(ARGS, std=0.05))
    with torch.no_grad():
        oracle.lm_head.weight[3::500].mul_(4)
    oracle.save_pretrained(root / "hf")
    shutil.copy(MIXTRAL_TOKENIZER, root / "hf" / "tokenizer.model")
    for layout in ("base", "sparse"):
        convert(root / "hf", root / layout, to=layout, shards=2, progress=False)
    return root


def said_by(model):
    """(answers of all prompts in the same steps and of one alone, logits of the prompts)."""
    how = {"max_gen_len": 16, "params": SamplingParams(logprobs=2)}
    answers = model.complete(PROMPTS, **how) + model.complete(PROMPTS[:1], **how)
    return answers, [logits.double().cpu() for logits in model.compute_logits(PROMPTS)]


@functools.cache
def said_alone(folder, way):
    return said_by(MetaModel.from_pretrained(folder, device=DEVICE, max_seq_len=256, **WAYS[way]))


@on_ranks
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["base", "sparse"])
def test_ranks_answer_as_one_card(folders, layout, way, ranks):
    wanted, wanted_logits = said_alone(folders / layout, way)
    with MultiGpuWrapper(
        folders / layout, gpus=ranks, device=DEVICE, max_seq_len=256, **PATIENCE, **WAYS[way]
    ) as model:
        assert len(rank_processes()) == ranks
        got, logits = said_by(model)
    if way == "fp32":
        assert [answer.token_ids for answer in got] == [answer.token_ids for answer in wanted]
        assert max(map(relative_error, logits, wanted_logits)) <= 1e-5
        return
    errors = [
        relative_error(*token)
        for ours, theirs in zip(logits, wanted_logits, strict=True)
        for token in zip(ours, theirs, strict=True)
    ]
    # In 16 bits a token may still go to another expert. All that its row says from there on differs rightly.
    assert torch.tensor(errors).quantile(0.9) <= 2e-2
    same = [clear_tokens(answer) for answer in wanted]
    assert sum(same) >= 2 * len(same), "too few clear tokens to compare"
    parted = [
        ours.text
        for n, ours, theirs in zip(same, got, wanted, strict=True)
        if ours.token_ids[:n] != theirs.token_ids[:n]
    ]
    assert len(parted) <= len(got) // 4, parted


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def clear_tokens(answer):
    """How many tokens come before the first that another one nearly equals.

    The large logits have a standard deviation of about 3. An error of 2% takes 0.3 from the distance of two of them
    hardly ever.
    """
    margins = [max(top.values()) - min(top.values()) for top in answer.top_logprobs]
    return next((n for n, margin in enumerate(margins) if margin < 0.3), len(margins))


@on_ranks
def test_a_rank_killed_in_a_stream_is_one_error_and_the_next_call_is_answered(folders, ranks):
    wanted = [answer.text for answer in said_alone(folders / "sparse", "fp32")[0][:1]]
    how = PATIENCE | WAYS["fp32"] | {"device": DEVICE, "max_seq_len": 8192}
    with MultiGpuWrapper(folders / "sparse", gpus=ranks, **how) as model:
        for victim in (0, ranks - 1):
            stream = model.stream_generate(PROMPTS[0], max_gen_len=8000, temperature=1.0, seed=1)
            next(stream)
            before = rank_processes()
            os.kill(rank_of(model, victim)._process.pid, signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(RankError, match=rf"rank {victim} was ended by signal 9") as error:
                list(stream)
            assert time.monotonic() - began < SOON
            assert "\n" not in str(error.value)
            assert gone(before)
            assert model.generate(PROMPTS[:1], max_gen_len=16) == wanted


# --------------------------------------------------------------------------- finetunes

STEPS, ROWS = 36, 8
FEW = 12  # steps of a run whose ranks change
CURVE = 1e-5 if ON_CPU else 1e-4  # cards sum in another order each time


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetunes")
    runs.write_model(folder / "model", dim=64, hidden_dim=128, n_heads=8, n_kv_heads=8, head_dim=8, moe=MoEArgs())
    runs.write_data(folder, runs.dialogues())
    return folder


def recipe(inputs, output, **changes):
    """A recipe of 36 steps of 8 rows. Its rate stays the same, so that a run may end early and go on."""
    fields = {"llama_type": "mixtral_sparse", "device": DEVICE, "lr": 3e-4, "min_lr": 3e-4, "warmup_epochs": 0}
    fields |= {"batch_size": ROWS, "accum_iter": 1, "epochs": 12.0, "resume": "auto", "save_iteration_interval": 4}
    fields |= {"global_batch_statistics": True, "load_balancing_weight": 0.1}
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(runs.options(inputs, output, **fields | changes)))
    return str(path)


def finetune(path, ranks, *fields):
    done = program("finetune", path, "--n-gpus", str(ranks), *fields, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def unbroken(inputs):
    finetune(recipe(inputs, inputs / "unbroken"), 1)
    curve = runs.curve(inputs / "unbroken")
    assert len(curve) == STEPS
    return curve


@on_ranks
@pytest.mark.parametrize("model_parallel", [1, 2])
@pytest.mark.parametrize("mode", ["sdp", "fsdp"])
def test_a_finetune_goes_on_on_fewer_ranks(inputs, unbroken, tmp_path, mode, model_parallel, ranks):
    """On all ranks, on half of them, on two; the last of them as base."""
    path = recipe(inputs, tmp_path / "run", data_parallel=mode)
    stages = list(dict.fromkeys([ranks, ranks // 2, min(2, ranks // 2)]))
    for number, size in enumerate(stages, start=1):
        together = min(model_parallel, size)
        kind = "mixtral" if number == len(stages) else "mixtral_sparse"
        cut = [f"model_parallel_size={together}", f"batch_size={ROWS * together // size}", f"llama_type={kind}"]
        finetune(path, size, *cut, f"max_steps={FEW * number // len(stages)}")
    runs.same_curve(runs.curve(tmp_path / "run"), unbroken[:FEW], CURVE)
    runs.check_folder(tmp_path / "run")
    assert not runs.left_over(tmp_path / "run")


@on_ranks
@pytest.mark.parametrize("mode", ["sdp", "fsdp"])
def test_a_rank_killed_in_training_is_one_line_and_the_run_goes_on(inputs, unbroken, tmp_path, mode, ranks):
    path = recipe(inputs, tmp_path / "run", data_parallel=mode, batch_size=ROWS // ranks)
    command = [sys.executable, "-m", "accessory", "finetune", path, "--n-gpus", str(ranks)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 100
        while (done := runs.steps_written(tmp_path / "run")) < 6 and run.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        assert done >= 6
        family = psutil.Process(run.pid).children(recursive=True)
        (victim,) = (p for p in family if p.environ().get("RANK") == str(ranks - 1))
        victim.kill()
        _, said = run.communicate(timeout=100)
    finally:
        run.kill()
    assert gone(family)
    assert run.returncode == 1
    (error,) = (line for line in said.splitlines() if line.startswith("accessory: error: "))
    assert error.endswith(f": rank {ranks - 1} was ended by signal 9; all ranks are ended")
    assert "Traceback" not in said
    runs.check_folder(tmp_path / "run")
    assert runs.steps_written(tmp_path / "run") < STEPS
    finetune(path, ranks)
    runs.same_curve(runs.curve(tmp_path / "run"), unbroken, CURVE)
    runs.check_folder(tmp_path / "run")
    assert not runs.left_over(tmp_path / "run")
