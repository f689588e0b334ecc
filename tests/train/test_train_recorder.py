"""The recorder: the only writer of a run's output. Only the first rank writes."""

import pytest
from helpers.runs import records

from accessory.train.config import FinetuneConfig
from accessory.train.progress import CROWDED_STEPS
from accessory.train.recorder import open_recorder
from accessory.train.resume import Start


def record(step):
    """A step whose router sends everything to the first of four experts."""
    layers = {"balance": [4.0], "entropy": [0.0], "largest": [1.0], "share": [[1.0, 0.0, 0.0, 0.0]]}
    return {"kind": "train", "step": step, "loss": 1.0, "step_s": 1.0, "layers": layers}


@pytest.mark.parametrize("first", [True, False])
def test_the_first_rank_alone_writes_shows_and_warns(tmp_path, capsys, first):
    config = FinetuneConfig(pretrained_path=["m"], data_config="d", output_dir=str(tmp_path))
    with open_recorder(first, tmp_path, config, Start(), steps=CROWDED_STEPS, top_k=1) as recorder:
        for step in range(1, CROWDED_STEPS + 1):
            recorder.write(record(step))
        recorder.write({"kind": "eval", "step": CROWDED_STEPS, "loss": 2.0, "tokens": 3})
    said = capsys.readouterr()
    if not first:
        assert not list(tmp_path.iterdir())
        assert said == ("", "")
        return
    assert [r["step"] for r in records(tmp_path)] == list(range(1, CROWDED_STEPS + 1))
    assert [r["loss"] for r in records(tmp_path, "eval")] == [2.0]
    assert f"step 1/{CROWDED_STEPS}" in said.err
    assert f"step {CROWDED_STEPS}: the router has sent over 90%" in said.err
    assert f"step {CROWDED_STEPS}: held-out loss 2.0000" in said.err
