"""`accessory plan`: what it prints and refuses, and that nothing is downloaded, loaded or even imported for it."""

import json
import math
import re
import resource
import subprocess
import sys

import pytest
from helpers.hub_server import Repo, serve
from helpers.seeing import write_seeing

from accessory.checkpoint.names import expected_shapes
from accessory.cli import main
from accessory.commands import plan as command
from accessory.commands.plan_view import formats_of
from accessory.config import PRESETS
from accessory.formats import Quant
from accessory.planner.cards import CARDS, Card

HF_CONFIG = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 32768,
}


@pytest.fixture(autouse=True)
def no_card_here(monkeypatch):
    monkeypatch.setattr(command, "_has_driver", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def planned(capsys):
    def run(*words):
        status = main(["plan", *map(str, words)])
        return status, capsys.readouterr()

    return run


@pytest.fixture
def as_json(planned):
    def run(*words):
        status, printed = planned(*words, "--json")
        found = json.loads(printed.out)
        assert status == (1 if found["fits"] is False else 0)
        return found

    return run


# --------------------------------------------------------------------------- what is printed


def test_a_model_that_does_not_fit_and_what_would(planned):
    status, printed = planned("8x7b", "--card", "H100")
    assert status == 1
    assert "8x7b: 46.7 B parameters, of which a token uses 12.75 B" in printed.out
    assert re.search(r"│ weights +│ 93\.41 │", printed.out)
    assert re.search(r"│ key/value cache +│ +0\.55 │", printed.out)
    assert re.search(r"does not fit H100 with 84\.9 GB: 1\d\.\d GB too much", printed.out)
    assert re.search(r"│ +1 │ H100 │ int8 .*│ --quant int8 +│", printed.out)
    assert re.search(r"│ +2 │ H100 │ bf16 .*│ --n-gpus 2 +│", printed.out)
    assert "disk      model 93.4 GB" in printed.out


def test_a_model_that_fits_says_what_is_left(planned):
    status, printed = planned("8x7b", "--card", "h100", "--quant", "int4")
    assert status == 0
    assert re.search(r"verdict +fits H100 with 84\.9 GB: 5\d\.\d GB to spare \(6\d %\)", printed.out)
    status, printed = planned("8x7b", "--memory", "28.2", "--quant", "int4")
    assert status == 0
    assert "fits, barely, 28.2 GB with 28.2 GB" in printed.out


def test_without_cards_there_is_no_verdict_but_a_set_up_for_each_usual_card(planned):
    status, printed = planned("8x7b")
    assert status == 0
    assert "no GPU is here and none is named" in printed.out
    assert [re.search(rf"│ +(\d+) │ {card} ", printed.out)[1] for card in ("4090", "L40S", "H100", "H200")] == list(
        "2111"
    )


def test_a_finetune(planned):
    status, printed = planned("8x7b", "--finetune", "full", "--card", "H100", "--gpus", "8")
    assert status == 1
    assert "finetuning, full: 4 rows of 4,096 tokens a GPU at once" in printed.out
    assert "8 GPUs, 8 data-parallel (sdp), sparse, weights bf16, not recomputing" in printed.out
    for row in ("optimiser", "gradients", "whole weights, summed gradients", "activations"):
        assert row in printed.out
    assert "no set-up of this task fits such cards" in printed.out
    assert "states 1,681.3 GB" in printed.out  # 3 × 12 bytes × 46.7 B


def test_a_finetune_on_many_cards_is_not_started_by_n_gpus(planned):
    _, printed = planned("8x7b", "--finetune", "full", "--card", "H100")
    assert "ranks: 16 data_parallel=fsdp checkpointing=true" in printed.out


def test_what_saves_memory_of_what_is_trained(planned, as_json):
    asked = ["8x7b", "--finetune", "full", "--memory", 80, "--gpus", 8, "--data-parallel", "fsdp", "--checkpointing"]
    asked += ["--batch-size", 1]
    assert planned(*asked)[0] == 1
    status, printed = planned(*asked, "--optimizer", "adamw_8bit", "--gradient-dtype", "bf16")
    assert status == 0
    assert "recomputing, 8-bit moments, bf16 gradients" in printed.out
    assert "checkpointing=true optimizer=adamw_8bit gradient_dtype=bf16" in printed.out
    found = as_json(*asked, "--offload", "optimizer")
    assert found["setup"]["offload"] == found["smallest_setups"][0]["offload"] == "optimizer"
    assert found["host"] > 8 * 46_700_000_000
    _, printed = planned(*asked, "--optimizer", "adamw_8bit", "--offload", "optimizer")
    assert "--offload: got optimizer, but adamw_8bit keeps its moments on the GPU" in printed.err
    assert "--gradient-dtype: is for --finetune" in planned("8x7b", "--gradient-dtype", "bf16")[1].err


def test_json_says_the_same_in_bytes(as_json):
    found = as_json("8x7b", "--quant", "int8", "--card", "H100", "--context", 8192, "--prompt", 100)
    assert found["model"]["parameters"] == 46702792704
    assert found["gpu"]["terms"]["weights"] == 46872802304
    assert found["gpu"]["terms"]["key/value cache"] == (8192 + 64) * 128 * 1024
    assert found["gpu"]["total"] == sum(found["gpu"]["terms"].values())
    assert found["fits"] is True
    assert found["margin"] == found["card"]["nbytes"] - found["gpu"]["total"]
    assert found["setup"]["formats"] == {"experts": "int8", "attention": "int8", "output": "int8"}
    assert [s["gpus"] for s in found["smallest_setups"]] == [1, 1, 1, 1, 2]
    assert found["disk"] == {"model": 93405585408}


def test_keys_and_values_in_fp8(as_json, planned):
    found = as_json("8x7b", "--quant", "int8", "--card", "H100", "--context", 8192, "--cache-dtype", "fp8")
    assert found["gpu"]["terms"]["key/value cache"] == (8192 + 64) * 128 * 1024 * (128 + 4) // 256
    assert found["setup"]["cache_dtype"] == "fp8"
    _, printed = planned("8x7b", "--card", "H100", "--cache-dtype", "fp8")
    assert "keys and values fp8" in printed.out
    assert "--cache-dtype fp8" in printed.out


def test_json_of_a_finetune(as_json):
    found = as_json("8x7b", "--finetune", "qlora", "--memory", 80, "--max-words", 2048, "--batch-size", 1)
    assert found["setup"]["finetune"] == "qlora"
    assert found["setup"]["formats"]["experts"] == "nf4"
    assert found["setup"]["lora_rank"] == 16
    assert found["fits"] is True
    assert found["gpu"]["moment"]


@pytest.mark.parametrize(
    ("quant", "shown"),
    [
        (Quant(), "bf16"),
        (Quant("int4", "int4"), "int4"),
        (Quant("int8", "int8", "int8"), "int8"),
        (Quant("int4", "int8", "int8"), "experts int4, attention int8, output int8"),
        (Quant("int4"), "experts int4, attention bf16, output bf16"),
        (Quant(attention="int8"), "experts bf16, attention int8, output bf16"),
    ],
)
def test_formats_are_shown_as_options_say_them(quant, shown):
    assert formats_of(quant) == shown


# --------------------------------------------------------------------------- cards and ranks


def test_images(planned, as_json, tmp_path):
    status, printed = planned("8x7b", "--image-views", 5, "--quant", "int8", "--card", "H100")
    assert status == 0
    assert "image encoders of 3.374 B" in printed.out
    assert "in each an image of 5 views, 1,455 positions" in printed.out
    assert re.search(r"image encoders\s*│\s*6\.75", printed.out)
    found = as_json("8x7b", "--finetune", "mm_stage1", "--quant", "nf4")
    assert (found["setup"]["finetune"], found["setup"]["image_views"]) == ("mm_stage1", 1)
    assert found["model"]["image_encoders"] == found["gpu"]["terms"]["image encoders"] / 2
    assert as_json("8x7b")["model"]["image_encoders"] == as_json("8x7b")["setup"]["image_views"] == 0
    _, printed = planned("8x7b", "--finetune", "mm_stage1", "--quant", "nf4", "--card", "H100")
    assert "finetuning, what makes words of images alone: 4 rows of 4,096 tokens" in printed.out
    assert "up to 56 images there, each of 1 view, 291 positions" in printed.out
    assert "trainable_mode=mm_stage1" in printed.out


def test_a_folder_that_sees_is_planned_with_its_encoders(as_json, tmp_path):
    folder = write_seeing(tmp_path / "seeing", views=5)
    found = as_json(folder)
    assert found["setup"]["image_views"] == 5
    assert found["gpu"]["terms"]["image encoders"] == 2 * found["model"]["image_encoders"] > 0
    assert as_json(folder, "--image-views", 0)["model"]["image_encoders"] == 0


def test_cards_that_are_here_are_found(as_json, monkeypatch):
    monkeypatch.setattr(command, "_present", lambda gpus: Card("Some GPU", 30 * 10**9, gpus or 2))
    found = as_json("8x7b", "--quant", "int4")
    assert found["card"] == {"name": "Some GPU", "nbytes": 30 * 10**9, "count": 2}
    assert found["fits"] is True
    assert {s["gpus"] for s in found["smallest_setups"]} <= {1, 2}
    assert as_json("8x7b", "--quant", "int4", "--card", "A100-80")["card"]["name"] == "A100-80"
    dense = as_json("8x7b", "--finetune", "qlora", "--quant", "none", "--quant-attention", "int8", "--card", "H100")
    parts = as_json("8x7b", "--finetune", "qlora", "--quant-attention", "int8", "--card", "H100")
    assert (dense["setup"]["formats"], parts["setup"]["formats"]) == (
        {"experts": None, "attention": "int8", "output": None},
        {"experts": "nf4", "attention": "int8", "output": None},
    )
    assert as_json("8x7b", "--quant", "int4", "--tp", 4)["fits"] is False  # there are two


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ((), (1, 1)),
        (("--gpus", 4), (4, 1)),
        (("--tp", 2), (2, 1)),
        (("--tp", 2, "--gpus", 4), (2, 1)),
        (("--finetune", "lora", "--gpus", 8), (1, 8)),
        (("--finetune", "lora", "--gpus", 8, "--tp", 4), (4, 2)),
        (("--finetune", "lora", "--gpus", 8, "--dp", 4), (2, 4)),
        (("--finetune", "lora", "--tp", 2, "--dp", 3), (2, 3)),
        (("--finetune", "lora", "--tp", 2, "--dp", 3, "--cp", 4), (2, 3, 4)),
        (("--finetune", "lora", "--gpus", 8, "--cp", 2), (1, 4, 2)),
        (("--finetune", "lora", "--gpus", 8, "--dp", 2, "--cp", 2), (2, 2, 2)),
    ],
)
def test_how_gpus_become_ranks(as_json, words, ranks):
    setup = as_json("8x7b", *words)["setup"]
    context = setup.get("context_parallel_size", 1)
    sizes = setup["model_parallel_size"], setup.get("data_parallel_size", 1), context
    assert sizes == (*ranks, 1)[:3]
    assert setup["gpus"] == math.prod(sizes)


def test_ranks_that_share_rows_need_less_each(as_json):
    """Of the same 32,768 tokens a row, four ranks need less each, though each holds the keys of all."""
    words = ("8x7b", "--finetune", "qlora", "--max-words", 32768, "--batch-size", 1)
    alone, shared = (as_json(*words, *more)["gpu"]["terms"] for more in ((), ("--cp", 4)))
    assert alone["activations"] / 4 < shared["activations"] < alone["activations"] / 2


def test_ranks_that_share_the_experts(as_json):
    """Frozen experts are divided by the ranks that share them. Such ranks shard adapters, which all have whole else.

    The numbers of a full finetune are divided by all ranks in any case.
    """
    words = ("8x7b", "--finetune", "lora", "--dp", 8, "--batch-size", 1)
    whole, spread = (as_json(*words, *more) for more in ((), ("--ep", 8)))
    assert spread["setup"]["expert_parallel_size"] == 8
    experts = 32 * 8 * 3 * 4096 * 14336 * 2
    terms = [plan["gpu"]["terms"]["weights"] for plan in (whole, spread)]
    adapters = 32 * 16 * (8 * 3 * (4096 + 14336) + 2 * (4096 + 4096) + 2 * (4096 + 1024))  # of rank 16
    assert terms[0] - terms[1] == pytest.approx(7 / 8 * (experts + 4 * adapters), rel=1e-3)
    full = ("8x7b", "--finetune", "full", "--dp", 8, "--batch-size", 1, "--data-parallel", "fsdp")
    whole, spread = (as_json(*full, *more)["gpu"]["terms"]["optimiser"] for more in ((), ("--ep", 8)))
    assert spread == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nowhere",), "nowhere: no such file or folder, and none of 8x7b, 8x22b, tiny or hf://owner/name"),
        (("8x7b", "--card", "H1"), "card: got 'H1', but known are"),
        (("8x7b", "--card", "H100", "--memory", 80), "--card, --memory: both say"),
        (("8x7b", "--memory", 0), "--memory: got 0"),
        (("8x7b", "--batch", 0), "--batch: got 0, but it must be at least 1"),
        (("8x7b", "--prompt", 4096), "--prompt: got 4096, but it must be less than --context 4096"),
        (("8x7b", "--tp", 3), "hidden_dim: got 14336, but it must be a multiple of the number of shards or ranks, 3"),
        (("8x7b", "--tp", 8, "--gpus", 4), "--gpus: got 4, but --tp 8 needs more"),
        (("8x7b", "--dp", 2), "--dp: is for --finetune"),
        (("8x7b", "--cp", 2), "--cp: is for --finetune"),
        (("8x7b", "--finetune", "lora", "--cp", 3), "--cp: got 3, but --max-words 4096 must be a multiple of 2 × 3"),
        (("8x7b", "--checkpointing"), "--checkpointing: is for --finetune"),
        (("8x7b", "--finetune", "lora", "--context", 9), "--context: is for running a model"),
        (("8x7b", "--finetune", "lora", "--cache-dtype", "fp8"), "--cache-dtype: is for running a model"),
        (("8x7b", "--finetune", "full", "--quant", "nf4"), "--quant: --finetune full keeps weights in 16 bits"),
        (("8x7b", "--finetune", "lora", "--quant", "nf4"), "use qlora for nf4"),
        (("8x7b", "--finetune", "qlora", "--quant", "none"), "use --finetune lora"),
        (("8x7b", "--finetune", "mm_stage1", "--lora-rank", 4), "--lora-rank: is LoRA's, and --finetune mm_stage1"),
        (("8x7b", "--finetune", "mm_stage1", "--image-views", 0), "--image-views: got 0, but mm_stage1 trains"),
        (("8x7b", "--finetune", "mm_stage1", "--context", 9), "--context: is for running a model"),
        (("8x7b", "--image-views", 5, "--context", 1455), "--context: got 1455, but an image takes 1455"),
        (("8x7b", "--finetune", "lora", "--image-views", 1, "--max-words", 64), "--max-words: got 64, but an image"),
        (("tiny", "--quant", "int4"), "rows of 64 numbers are no whole groups of 128, which int4 scales together"),
    ],
)
def test_a_mistake_is_one_line(planned, words, told):
    status, printed = planned(*words)
    assert status == 1
    assert printed.out == ""
    assert re.fullmatch(r"accessory: error: [^\n]+\n", printed.err)
    assert told in printed.err


def test_every_named_card_can_be_planned_for(as_json):
    for name in CARDS:
        assert as_json("tiny", "--card", name)["fits"] is True


# --------------------------------------------------------------------------- what a path is


def huge_folder(folder):
    """Mixtral-8x7B in Hugging Face's layout: real headers, and a sparse file of 93 GB that takes no disk space."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    header, at = {}, 0
    for name, shape in expected_shapes(PRESETS["8x7b"]).items():
        size = 2 * math.prod(shape)
        header[hf_name(name)] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + at)
    return folder


def hf_name(name):
    for ours, theirs in {
        "tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
        "layers.": "model.layers.",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.w": "self_attn.",
        "feed_forward": "block_sparse_moe",
    }.items():
        name = name.replace(ours, theirs)
    name = re.sub(r"self_attn\.(\w)\.", r"self_attn.\1_proj.", name)
    return "model.norm.weight" if name == "norm.weight" else name


def test_a_folder_is_planned_by_its_headers(as_json, tmp_path):
    folder = huge_folder(tmp_path / "mixtral")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    found = as_json(folder, "--card", "H100")
    preset = as_json("8x7b", "--card", "H100")
    assert found["gpu"] == preset["gpu"]
    assert found["disk"]["model"] == (folder / "model.safetensors").stat().st_size > 93e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before < 2e6 / 512


def test_a_folder_whose_weights_are_still_to_come_and_a_configuration_alone(as_json, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    preset = as_json("8x7b")["gpu"]
    assert as_json(tmp_path)["gpu"] == preset
    assert as_json(tmp_path / "config.json")["gpu"] == preset


def test_of_an_address_only_the_configuration_is_fetched(as_json, planned, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    config = json.dumps(HF_CONFIG).encode()
    weights = bytes(2000)
    repos = {
        "who/mixtral": Repo({"config.json": config, "model.safetensors": weights, "sub/params.json": b"{}"}),
        "who/bare": Repo({"model.safetensors": weights}),
    }
    with serve(repos) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        found = as_json("hf://who/mixtral", "--card", "H100")
        assert [path for path in server.downloads() if path.endswith("safetensors")] == []
        assert [path for path in server.downloads() if path.endswith("config.json")] != []
        assert found["gpu"] == as_json("8x7b", "--card", "H100")["gpu"]
        status, printed = planned("hf://who/bare")
        assert status == 1
        assert "hf://who/bare: has no config.json or params.json" in printed.err
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert as_json("hf://who/mixtral", "--card", "H100") == found


# --------------------------------------------------------------------------- speed


def test_a_plan_for_a_named_card_imports_no_torch_and_takes_no_second():
    code = (
        "import sys; from accessory.cli import main; status = main(['plan', '8x7b', '--card', 'H200']); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "fits H200" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
