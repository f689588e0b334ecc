"""On the second card of a machine, while the current device is the first: generation, commands and training."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING

from accessory.cli import main
from accessory.config import MoEArgs
from accessory.convert.convert import convert
from accessory.convert.quantize import quantize_checkpoint
from accessory.formats import Quant
from accessory.model.meta import MetaModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SECOND = "cuda:1"
PROMPT = "The best programming language in the world is"
ARGS = SPEAKING.replace(dim=256, hidden_dim=384, n_heads=8, n_kv_heads=2, head_dim=32, moe=MoEArgs())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("second")
    write_speaking(root / "hf", ARGS, std=0.05)
    for layout in ("base", "sparse"):
        convert(root / "hf", root / layout, to=layout, shards=2, progress=False)
    return root


@pytest.fixture(autouse=True)
def first_is_current():
    assert torch.cuda.current_device() == 0
    yield
    assert torch.cuda.current_device() == 0


def load(folder, device, **options):
    return MetaModel.from_pretrained(folder, device=device, max_seq_len=256, **options)


@pytest.mark.parametrize("layout", ["base", "sparse"])
@pytest.mark.parametrize("quant", [False, "int8", "nf4", "int4", "fp8", "nf4-dq"])
def test_a_model_answers_as_on_the_first_card(folders, layout, quant):
    """One prompt is decoded through graphs; four prompts and a long one take the grouped kernels."""
    first, second = (load(folders / layout, device, quant=quant) for device in ("cuda:0", SECOND))
    assert second.device == torch.device(SECOND)
    for prompts in ([PROMPT], [PROMPT, "A", "Zwei", "Drei"], [PROMPT * 12]):
        assert second.generate(prompts, max_gen_len=12) == first.generate(prompts, max_gen_len=12)
    streams = [[item["text"] for item in m.stream_generate(PROMPT, max_gen_len=12)] for m in (first, second)]
    assert streams[0] == streams[1]
    ours, theirs = (model.compute_logits([PROMPT])[0].cpu() for model in (second, first))
    assert torch.equal(ours, theirs)


def test_threads_use_a_card_each(folders):
    """Every thread begins with card 0 as its current device."""
    models = [load(folders / "sparse", device, quant="nf4") for device in ("cuda:0", SECOND)]
    expected = models[0].generate([PROMPT], max_gen_len=20)
    models[1].generate([PROMPT], max_gen_len=20)  # captures are not for several threads at once
    answers = {}
    threads = [
        threading.Thread(target=lambda n=n, m=m: answers.update({n: m.generate([PROMPT], max_gen_len=20)}))
        for n, m in enumerate(models)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {0: expected, 1: expected}


@pytest.mark.parametrize("options", [["--device", SECOND], ["--gpu-ids", "1"]])
def test_generate(folders, options, capsys):
    outs = []
    for where in (["--device", "cuda:0"], options):
        command = ["generate", str(folders / "base"), "--prompt", PROMPT, "--max-gen-len", "8", "--quant", "nf4"]
        assert main([*command, *where]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]


@pytest.mark.parametrize("format", ["int8", "int4", "nf4", "nf4-dq"])
def test_quantize(folders, format, tmp_path):
    assert main(["quantize", str(folders / "base"), str(tmp_path / "q"), "--quant", format, "--device", SECOND]) == 0
    quantize_checkpoint(folders / "base", tmp_path / "expected", Quant.parse(format), device="cuda:0")
    assert main(["verify", str(tmp_path / "q"), str(tmp_path / "expected")]) == 0


def test_calibrate(folders, tmp_path):
    (tmp_path / "text.txt").write_text("One two three four five six seven. " * 1000)
    command = ["quantize", str(folders / "base"), str(tmp_path / "q"), "--quant", "int4", "--device", SECOND]
    text = ["--calibrate", str(tmp_path / "text.txt"), "--calibrate-tokens", "2048", "--allow-unreached"]
    assert main([*command, *text]) == 0


@pytest.mark.parametrize("options", [[], ["quant=nf4"]], ids=["bf16", "nf4"])
def test_finetune_and_merge(folders, tmp_path, options):
    items = [{"instruction": f"Say {n}", "output": f"{n} and {n}"} for n in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(items))
    (tmp_path / "data.yaml").write_text(f"META:\n  - path: {tmp_path / 'data.json'}\n    type: text\n")
    recipe = {
        "llama_type": "mixtral_sparse_peft", "lora_rank": 8, "pretrained_path": [str(folders / "base")],
        "data_config": str(tmp_path / "data.yaml"), "output_dir": str(tmp_path / "run"), "max_words": 64,
        "batch_size": 2, "epochs": 1, "lr": 1e-4, "precision": "bf16", "device": SECOND, "only_save_trainable": True,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["finetune", str(tmp_path / "recipe.yaml"), *options]) == 0
    paths = [str(folders / "base"), str(tmp_path / "run" / "final"), str(tmp_path / "merged")]
    assert main(["merge", *paths, "--device", SECOND, "--allow-unchanged"]) == 0
    assert load(tmp_path / "merged", SECOND).generate([PROMPT], max_gen_len=4)
