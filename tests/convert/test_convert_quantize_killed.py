"""A killed `accessory quantize` leaves a temporary folder next to its target; the next run removes it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import checkpoints as make
from helpers.random_models import canonical_from_hf, hf_mixtral

from accessory.checkpoint.folder import open_checkpoint
from accessory.config import ModelArgs, MoEArgs
from accessory.convert.quantize import quantize_checkpoint
from accessory.errors import CheckpointError
from accessory.formats import Quant

ARGS = ModelArgs(
    dim=128, hidden_dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=64,
    moe=MoEArgs(num_experts=4),
)  # fmt: skip
CALIBRATE = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))
# The process stops before the last layer's weights and waits to be killed.
RUN = """
import sys, time, torch
from accessory.formats import Quant
from accessory.convert import quantize
def weights(self, progress, own=quantize.Calibration.weights):
    for n, found in enumerate(own(self, progress)):
        yield found
        if n == 6:
            print("calibrating", flush=True)
            time.sleep(600)
quantize.Calibration.weights = weights
tokens = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))
quantize.quantize_checkpoint(sys.argv[1], sys.argv[2], Quant("int4"), calibrate=tokens, progress=False,
                             allow_unreached=True)
"""


@pytest.fixture
def source(tmp_path):
    tensors = {n: t.bfloat16() for n, t in canonical_from_hf(hf_mixtral(ARGS)).items()}
    return make.write_accessory(tmp_path / "source", tensors, "sparse", ARGS, world=1)


def start(source, out):
    process = subprocess.Popen([sys.executable, "-c", RUN, source, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "calibrating\n"
    return process


@pytest.mark.parametrize(
    "again",
    [{"calibrate": CALIBRATE, "allow_unreached": True}, pytest.param({"search": False}, marks=pytest.mark.slow)],
    ids=list,
)
def test_the_next_run_clears_away_what_a_killed_one_left(source, tmp_path, again):
    out = tmp_path / "out" / "int4"
    process = start(source, out)
    aside = out.with_name("int4.calibrating")
    try:
        assert len(list(aside.glob("layers.*"))) == 7
        with pytest.raises(CheckpointError, match=r"int4\.calibrating: another process is writing there"):
            quantize_checkpoint(source, out, Quant("int4"), progress=False, **again)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()
    assert aside.is_dir()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # the lock ends with the process, which may take a moment
        try:
            quantize_checkpoint(source, out, Quant("int4"), progress=False, **again)
            break
        except CheckpointError as error:
            if "another process" not in str(error):
                raise
    assert open_checkpoint(out).quant == Quant("int4")
    assert [p.name for p in out.parent.iterdir()] == ["int4"]


def test_what_is_not_ours_stays(source, tmp_path):
    aside = tmp_path / "int4.calibrating"
    aside.mkdir()
    (aside / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"int4\.calibrating: is in the way and not ours"):
        quantize_checkpoint(source, tmp_path / "int4", Quant("int4"), progress=False)
    assert (aside / "thesis.txt").read_text() == "mine"
