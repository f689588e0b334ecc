"""`FinetuneConfig`: accepted values, and that an error is one line with the field, what was given and what fits."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from helpers.examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.errors import ConfigError
from accessory.train.config import PACKAGE, FinetuneConfig

NEEDED = {"pretrained_path": ["model"], "data_config": "data.yaml", "output_dir": "out"}


def config(**fields):
    return FinetuneConfig(**{**NEEDED, **fields})


def test_the_defaults_are_the_ones_agreed_on():
    expected = {
        **NEEDED, "llama_type": None, "llama_config": [], "tokenizer_path": None, "dialog": True, "template": None,
        "prompt_type": None, "max_words": 4096, "packing": True, "eval_data": None, "eval_interval": 0, "batch_size": 4,
        "accum_iter": 1, "epochs": 1.0, "max_steps": None, "lr": 5e-6, "min_lr": 0.0, "warmup_epochs": 0.1,
        "weight_decay": 0.0, "clip_grad": 2.0, "load_balancing_weight": None, "z_loss_weight": 0.0,
        "global_batch_statistics": False, "lora_rank": None, "lora_alpha": None, "lora_targets": None,
        "bias_tuning": None, "norm_tuning": None, "train_router": False, "model_parallel_size": 1,
        "context_parallel_size": 1, "expert_parallel_size": 1, "cuda_graphs": None,
        "data_parallel": "sdp", "precision": "bf16", "checkpointing": False, "optimizer": "adamw", "offload": "none",
        "gradient_dtype": "fp32", "quant": False, "quant_attention": None,
        "quant_output": None, "no_visual": False, "trainable_mode": None, "broken_images": "fail",
        "image_transform": "random_resized_crop", "cache_ann_on_disk": False, "save_interval": 1,
        "save_iteration_interval": None, "keep": 2, "only_save_trainable": False, "resume": None, "seed": 0,
        "num_workers": 0, "pin_mem": True, "loggers": [], "device": None, "overwrite": False,
    }  # fmt: skip
    assert config().to_dict() == expected


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-5", 1e-5), ("lr", "5.0e-06", 5e-6), ("epochs", "3", 3.0), ("epochs", 2, 2.0),
        ("batch_size", "8", 8), ("packing", "no", False), ("packing", "True", True), ("bias_tuning", "on", True),
        ("max_steps", "", None), ("llama_type", "mixtral_sparse_peft", "mixtral_sparse_peft"),
        ("pretrained_path", "one", ["one"]), ("pretrained_path", Path("one"), ["one"]),
        ("pretrained_path", ("one", "two"), ["one", "two"]), ("quant", "true", "nf4"), ("quant", "false", False),
        ("quant", "int8", "int8"), ("quant", "nf4-dq", "nf4-dq"), ("quant_attention", "none", "none"),
        ("quant_output", "", None), ("lora_targets", ["wq", "gate"], ("wq", "gate")), ("lora_targets", "wq", ("wq",)),
        ("loggers", "wandb", ["wandb"]), ("clip_grad", "-1", -1.0), ("lora_rank", "-1", -1),
        ("device", "cuda:1", "cuda:1"), ("prompt_type", "None", "None"), ("template", "none", "none"),
    ],
)  # fmt: skip
def test_text_becomes_what_the_field_is(name, text, value):
    got = getattr(config(**{name: text}), name)
    assert (got, type(got)) == (value, type(value))


WRONG = {
    "pretrained_path": [[], [1], None, ""], "data_config": [None, "", 3], "output_dir": [None, ["a"]],
    "llama_type": ["llama", "mixtral_peft_peft"], "template": ["alpca"], "prompt_type": ["none"],
    "max_words": [0, 1, 2**31, "many", 1.5, True], "packing": ["maybe", 1], "eval_interval": [-1, 5],
    "batch_size": [0, 2**31, "4.0"],
    "accum_iter": [0, 2**31], "epochs": [0, -1, "nan", True], "max_steps": [0], "lr": [0, "fast", float("inf")],
    "min_lr": [-1e-6, 1e-3], "warmup_epochs": [-0.1, 1.5, "nan"], "weight_decay": [-1],
    "clip_grad": ["off", None, "nan"],
    "load_balancing_weight": [-1], "z_loss_weight": [-1], "lora_rank": [0, -2, "abc", 2**31], "lora_alpha": [0, "x"],
    "lora_targets": [["wx"], [], "experts"], "bias_tuning": ["some"], "model_parallel_size": [0],
    "context_parallel_size": [0, "two"], "expert_parallel_size": [0],
    "data_parallel": ["ddp", False], "precision": ["int8", "bfloat16"], "quant": ["nf3", 4],
    "quant_attention": ["nf3", True], "quant_output": [False, "int2"],
    "image_transform": ["crop"], "save_interval": [-1], "save_iteration_interval": [0], "keep": [0],
    "resume": ["no/such/folder"], "seed": [-1, 2**63, 1.5], "num_workers": [-1], "loggers": [["tensorbord"]],
    "device": ["gpu", "cuda:", "meta"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_refusal_names_field_given_and_wanted(name, value):
    with pytest.raises(ConfigError) as caught:
        config(**{name: value})
    text = str(caught.value)
    assert re.fullmatch(rf"{name}: got [^\n]+, but it [^\n]+", text), text


def test_resume_needs_a_folder_and_beginning_anew_forbids_it(tmp_path):
    assert config(resume="auto", overwrite=True).resume == "auto"
    assert config(resume=str(tmp_path)).resume == str(tmp_path)
    with pytest.raises(ConfigError, match="overwrite: begins anew"):
        config(resume=str(tmp_path), overwrite=True)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().lr = 1.0


# --------------------------------------------------------------------------- YAML


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


WHOLE = "pretrained_path: model\ndata_config: data.yaml\noutput_dir: out\n"


def test_overrides_win_and_are_yaml(recipe):
    path = recipe(WHOLE + "lr: 1e-5\nmax_steps: 7\nloggers: [wandb]\ndevice: null\n")
    overrides = ["lr=2e-5", "max_steps=null", "pretrained_path=[a, b]", "output_dir=007", "packing=false", "seed="]
    with pytest.raises(ConfigError, match="seed: got None, but it must be a whole number"):
        FinetuneConfig.from_yaml(path, overrides)
    got = FinetuneConfig.from_yaml(path, overrides[:-1])
    assert got == config(lr=2e-5, pretrained_path=["a", "b"], output_dir="007", packing=False, loggers=["wandb"])


def test_texts_that_yaml_takes_for_something_else_stay_texts(recipe):
    path = recipe("pretrained_path: [no, 2024-11-24, 1_000]\ndata_config: 1e3\noutput_dir: on\nresume: null\n")
    got = FinetuneConfig.from_yaml(path)
    assert (got.pretrained_path, got.data_config, got.output_dir) == (["no", "2024-11-24", "1_000"], "1e3", "on")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (WHOLE + "batchsize: 4\n", [], "{path}:4: unknown key 'batchsize'; did you mean 'batch_size'?"),
        (WHOLE + "\n# a comment\nlr: fast\n", [], "{path}:6: lr: got 'fast', but it must be a number"),
        (WHOLE + "min_lr: 1\n", [], "{path}:4: min_lr: got 1.0, but it must be at most lr = 5e-06"),
        (WHOLE + "min_lr: 0\n", ["min_lr=1"], "min_lr: got 1.0, but it must be at most lr = 5e-06"),
        (WHOLE + "lr: 1\nlr: 2\n", [], "{path}:5: lr is there twice; remove one"),
        (WHOLE, ["learning_rate=1"], "learning_rate=1: unknown key 'learning_rate'; "),
        (WHOLE, ["batch-size=1"], "batch-size=1: unknown key 'batch-size'; did you mean 'batch_size'?"),
        (WHOLE, ["fast"], "'fast': expected key=value, for instance lr=1e-5"),
        (WHOLE, ["loggers=[a"], "loggers=[a: not YAML ("),
        (WHOLE + "lr: [1\n", [], "{path}:5: not YAML ("),
        (WHOLE + "lr: !!python/object/apply:os.system [ls]\n", [], "{path}:4: not YAML (could not determine"),
        ("- lr\n", [], "{path}:1: expected lines of the form key: value"),
        ("lr: 1\n", ["output_dir=x"], "{path}: pretrained_path, data_config: missing; "),
        ("", [], "{path}: pretrained_path, data_config, output_dir: missing; "),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_place(recipe, text, overrides, message):
    path = recipe(text)
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig.from_yaml(path, overrides)
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"lr: \xff\n")
    with pytest.raises(ConfigError, match=r"x.yaml: not UTF-8 text"):
        FinetuneConfig.from_yaml(tmp_path / "x.yaml")


NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)


@given(
    st.fixed_dictionaries(
        {"pretrained_path": st.lists(NAMES, min_size=1, max_size=3), "data_config": NAMES, "output_dir": NAMES},
        optional={
            "lr": st.floats(1e-9, 1e3), "epochs": st.floats(0.5, 1e4), "clip_grad": st.floats(-1e6, 1e6),
            "max_steps": st.none() | st.integers(1, 10**12), "packing": st.booleans(),
            "quant": st.sampled_from([False, "int4"]),
            "lora_targets": st.none() | st.just(("w1", "gate")), "norm_tuning": st.none() | st.booleans(),
            "template": st.none() | st.just("none"), "loggers": st.lists(st.sampled_from(["wandb", "trackio"])),
        },
    )
)  # fmt: skip
@settings(max_examples=examples(100))
def test_what_is_written_down_is_read_again(tmp_path_factory, values):
    written = FinetuneConfig(**values)
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(written.as_yaml(), encoding="utf-8")
    assert FinetuneConfig.from_yaml(path) == written
    assert yaml.safe_load(written.as_yaml()) == written.to_dict()  # other YAML readers get the same values


# --------------------------------------------------------------------------- ranks and files


@given(st.integers(1, 64), st.integers(-4, 4096))
def test_ranks_fill_whole_replicas(model, world):
    it = config(model_parallel_size=model)
    if world > 0 and world % model == 0:
        assert it.data_parallel_size(world) * model == world
    else:
        with pytest.raises(ConfigError, match=rf"model_parallel_size: got {model}, .* {world},"):
            it.data_parallel_size(world)


def fits(it, world):
    try:
        it.data_parallel_size(world)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    ("fields", "world", "message"),
    [
        ({"context_parallel_size": 2}, 3, r"context_parallel_size: got 2, .* 3, .* model_parallel_size = 2"),
        (
            {"context_parallel_size": 2, "model_parallel_size": 2},
            6,
            r"context_parallel_size: got 2, .* 6, .* model_parallel_size = 4",
        ),
        (
            {"expert_parallel_size": 4},
            6,
            r"expert_parallel_size: got 4, but the number of data-parallel ranks, 6, must",
        ),
    ],
)
def test_ranks_that_share_something_are_in_whole_groups(fields, world, message):
    it = config(**fields)
    assert it.data_parallel_size(it.ranks_a_replica * 12) == 12
    assert it.fewest_ranks == min(n for n in range(1, 9) if fits(it, n))
    with pytest.raises(ConfigError, match=message):
        it.data_parallel_size(world)


def test_ranks_that_share_rows_divide_them():
    assert config(context_parallel_size=3, max_words=96).context_parallel_size == 3
    with pytest.raises(
        ConfigError, match=r"^context_parallel_size: got 3, but max_words = 100 must be a multiple of 2"
    ):
        config(context_parallel_size=3, max_words=100)


def test_experts_are_cut_in_one_way():
    with pytest.raises(
        ConfigError, match=r"^expert_parallel_size: got 2, but model_parallel_size = 4 cuts the experts"
    ):
        config(expert_parallel_size=2, model_parallel_size=4)


def test_files_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "sizes.json", "data.yaml"):
        (tmp_path / name).touch()
    config(llama_config=["sizes.json"], pretrained_path=["model", "hf://owner/name"]).check_files()
    for name in ("pretrained_path", "llama_config", "tokenizer_path", "data_config", "eval_data"):
        with pytest.raises(ConfigError, match=f"{name}: got 'absent', but it must be a file or folder that is there"):
            config(**{name: "absent"}).check_files()


def test_files_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/model/finetune/sg/llamaPeft_normBiasLora.json"
    assert config(llama_config=["own.json", name]).llama_config == ["own.json", str(PACKAGE / name)]
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert config(llama_config=[name]).llama_config == [name], "a file that is there is meant"
    assert config(data_config="configs/absent.yaml").data_config == "configs/absent.yaml"
