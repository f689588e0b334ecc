"""How a setup describes itself, and that planning does not import torch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.plans import finetuning, running

import accessory.planner
from accessory.errors import ConfigError

MODULES = sorted(path.stem for path in Path(accessory.planner.__file__).parent.glob("*.py"))


def test_packed_rows_hold_as_many_images_as_fit():
    assert finetuning(batch_size=2, max_words=4096, packing=True, views=1).images == 2 * 14
    assert finetuning(batch_size=2, max_words=4096, packing=True, views=5).images == 2 * 2
    assert finetuning(batch_size=2, max_words=4096, packing=False, views=1).images == 2
    assert running(batch=3, views=5).images == 1  # one a step
    assert running(batch=3).images == running().image_tokens == 0


def test_ranks_that_share_rows_share_their_tokens():
    whole, shared = finetuning(batch_size=2, max_words=4096), finetuning(batch_size=2, max_words=4096, dp=4, cp=4)
    assert (whole.training_tokens, shared.training_tokens) == (8192, 2048)
    assert shared.gpus == 4
    with pytest.raises(ConfigError, match="cp: got 2, but it must divide the number of data-parallel ranks, 3"):
        finetuning(dp=3, cp=2)


def test_ranks_that_share_the_experts_hold_a_part_of_them():
    whole, spread = finetuning(dp=4), finetuning(dp=4, ep=4)
    assert (whole.experts, spread.experts, spread.gpus) == (8, 2, 4)
    for changes, told in (
        ({"dp": 3, "ep": 2}, "ep: got 2, but it must divide the number of data-parallel ranks, 3"),
        ({"dp": 16, "ep": 16}, "ep: got 16, but it must divide the number of experts, 8"),
        ({"dp": 2, "ep": 2, "tp": 2}, "ep: got 2, but tp = 2 cuts the experts already"),
    ):
        with pytest.raises(ConfigError, match=told):
            finetuning(**changes)


@pytest.mark.parametrize(
    ("choices", "keeps"),
    [
        ({"kind": "lora"}, True),
        ({"kind": "lora", "dp": 4}, True),
        ({"kind": "lora", "dp": 4, "data_parallel": "fsdp"}, False),
        ({"kind": "lora", "cuda_graphs": False}, False),
        ({"kind": "lora", "cuda_graphs": False, "accum_iter": 2}, True),
        ({"kind": "lora", "tp": 2}, True),
        ({"kind": "lora", "tp": 2, "implementation": "base"}, False),
        ({"kind": "lora", "implementation": "base"}, True),
        ({"kind": "full"}, False),
        ({"kind": "full", "cuda_graphs": True}, True),
    ],
    ids=str,
)
def test_gradients_are_kept_where_graphs_or_micro_steps_need_them(choices, keeps):
    assert finetuning(**choices).keeps_gradients is keeps


@pytest.mark.parametrize("changes", [{"device": "cpu"}, {"dense_bytes": 4}, {"views": 1}, {"dp": 2, "cp": 2}], ids=str)
def test_what_cannot_be_a_graph_keeps_no_gradients(changes):
    assert not replace(finetuning(kind="lora"), **changes).keeps_gradients


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_no_module_imports_torch():
    """Neither the planner's modules nor those that they import import torch."""
    for name in MODULES:
        done = run(f"import sys, accessory.planner.{name}; assert 'torch' not in sys.modules")
        assert done.returncode == 0, f"{name}: {done.stderr}"


@pytest.mark.parametrize(
    "task",
    [
        [],
        ["--quant", "int4"],
        ["--quant", "fp8", "--implementation", "base", "--batch", "6"],
        ["--image-views", "5"],
        *(["--finetune", kind] for kind in ("full", "lora", "qlora", "mm_stage1")),
    ],
    ids=" ".join,
)
def test_a_plan_needs_no_torch(task):
    code = (
        "import sys; sys.modules['torch'] = None; from accessory.cli import main; "
        f"sys.exit(main(['plan', '8x7b', '--memory', '2000', *{task}]))"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "fits" in done.stdout


@pytest.mark.parametrize(
    ("choices", "keeps"),
    [
        ({"kind": "lora"}, True),
        ({"kind": "full"}, False),
        ({"kind": "full", "accum_iter": 2}, False),
        ({"kind": "full", "cuda_graphs": True}, True),
        ({"kind": "full", "cuda_graphs": True, "checkpointing": True}, False),
    ],
    ids=str,
)
def test_copies_of_weights_are_kept_where_graphs_read_them(choices, keeps):
    assert finetuning(**choices).keeps_copies is keeps
