"""Written checkpoints, read by plain torch, safetensors and transformers, never by the package alone."""

import json

import pytest
import torch
from helpers import checkpoints as make
from helpers.checkpoints import ARGS, companions, random_tensors
from safetensors.torch import load_file

from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.lazy import Computed, Constant
from accessory.checkpoint.save import write_checkpoint
from accessory.config import MoEArgs
from accessory.convert.convert import convert
from accessory.convert.verify import verify
from accessory.errors import CheckpointError, ConfigError

TENSORS = random_tensors()
LAZY = {name: Constant(tensor) for name, tensor in TENSORS.items()}


def equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("implementation", ["base", "sparse"])
@pytest.mark.parametrize("world", [None, 1, 4])
@pytest.mark.parametrize("safetensors", [False, True])
def test_accessory_folders_hold_what_the_original_reads(implementation, world, safetensors, tmp_path):
    out, ending = tmp_path / "out", "safetensors" if safetensors else "pth"
    write_checkpoint(out, LAZY, ARGS, to=implementation, shards=world, safetensors=safetensors, progress=False)
    n = world or 8
    files = [f"consolidated.{r:02d}-of-{n:02d}.model.{ending}" for r in range(n)]
    assert names(out) == ["config.json", *files, "meta.json"]
    for rank, file in enumerate(files):
        expected = {"llma." + k: v for k, v in make.shard(TENSORS, implementation, rank, n).items()}
        if safetensors:
            equal(load_file(out / file), expected)
        else:
            content = torch.load(out / file, weights_only=True)
            assert list(content) == ["model"]
            equal(content["model"], expected)
    meta = {"llama_type": "mixtral" if implementation == "base" else "mixtral_sparse"}
    assert json.loads((out / "meta.json").read_text()) == meta
    assert json.loads((out / "config.json").read_text()) == ARGS.to_dict()


def test_torrent_folder(tmp_path):
    write_checkpoint(tmp_path / "out", LAZY, ARGS, to="torrent", progress=False)
    make.write_torrent(tmp_path / "expected", TENSORS)
    assert names(tmp_path / "out") == names(tmp_path / "expected")
    found, expected = (torch.load(tmp_path / d / "consolidated.00.pth", weights_only=True) for d in ("out", "expected"))
    equal(found, expected)
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    assert params == make.params_json() | {"max_seq_len": ARGS.max_seq_len}


@pytest.mark.parametrize("shards", [None, 3])
def test_hugging_face_folder(shards, tmp_path):
    out = tmp_path / "out"
    write_checkpoint(out, LAZY, ARGS, to="hf", shards=shards, progress=False)
    expected = make.hf_tensors(TENSORS)
    if shards is None:
        assert names(out) == ["config.json", "model.safetensors"]
        equal(load_file(out / "model.safetensors"), expected)
        return
    files = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names(out) == ["config.json", *files, "model.safetensors.index.json"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    found = {}
    for file in files:
        content = load_file(out / file)
        assert {n for n, f in index["weight_map"].items() if f == file} == content.keys()
        found |= content
    equal(found, expected)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}])
def test_transformers_loads_what_is_written(scaling, tmp_path):
    from helpers.random_models import hf_mixtral
    from transformers import AutoModelForCausalLM

    args = ARGS.replace(rope_theta=5e5, norm_eps=1e-6, rope_scaling=scaling)
    model = hf_mixtral(args)
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "sparse", to="sparse", shards=4, progress=False)
    convert(tmp_path / "sparse", tmp_path / "ours", to="hf", shards=2, progress=False)
    loaded, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(problems.values())
    equal(loaded.state_dict(), model.state_dict())
    assert loaded.dtype == torch.float32
    for key in ("rope_parameters", "rms_norm_eps", "num_experts_per_tok", "num_local_experts", "head_dim"):
        assert getattr(loaded.config, key) == getattr(model.config, key), key
    tokens = torch.arange(10).view(1, -1)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_special_ids_of_a_hugging_face_folder(tmp_path):
    for name, content, ids in (
        ("plain", None, (1, 2)),
        ("other", {"bos_token_id": 5, "eos_token_id": [6, 7], "temperature": 0.6}, (5, [6, 7])),
    ):
        folder = make.write_torrent(tmp_path / name, TENSORS)
        if content:
            make.write_json(folder / "generation_config.json", content)
        convert(folder, tmp_path / f"{name} hf", to="hf", progress=False)
        config = json.loads((tmp_path / f"{name} hf" / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == ids
        assert "temperature" not in config
        assert (config["torch_dtype"], config["model_type"]) == ("bfloat16", "mixtral")


def test_round_trip_through_every_layout_changes_no_bit(tmp_path):
    chain = [("base", None), ("hf", 3), ("sparse", 4), ("torrent", None)]
    folder = make.write_torrent(tmp_path / "torrent0", TENSORS)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    hashes = {verify(folder, progress=False).hash}
    for number, (to, shards) in enumerate(chain, 1):
        following = tmp_path / f"{to}{number}"
        convert(folder, following, to=to, shards=shards, progress=False)
        folder = following
        hashes.add(verify(folder, progress=False).hash)
        assert (folder / "tokenizer.model").read_bytes() == b"pieces"
    assert len(hashes) == 1
    raw = [torch.load(tmp_path / d / "consolidated.00.pth", weights_only=True) for d in ("torrent0", "torrent4")]
    equal(raw[1], raw[0])
    report = verify(tmp_path / "torrent0", tmp_path / "sparse3", progress=False)
    assert report.ok
    assert report.lines()[-1].split()[-1] == hashes.pop()


def test_dtype_converts_and_only_then(tmp_path):
    mixed = {n: Constant(t.float() if "norm" in n else t) for n, t in TENSORS.items()}
    write_checkpoint(tmp_path / "kept", mixed, ARGS, to="base", shards=2, progress=False)
    kept = open_checkpoint(tmp_path / "kept")
    assert {n: t.dtype for n, t in kept.tensors.items()} == {n: t.dtype for n, t in mixed.items()}
    convert(tmp_path / "kept", tmp_path / "half", to="sparse", dtype="fp16", progress=False)
    half = open_checkpoint(tmp_path / "half")
    for name, tensor in TENSORS.items():
        assert torch.equal(half.tensors[name].load(), tensor.half()), name
    with pytest.raises(ConfigError, match="dtype: got 'int3'"):
        convert(tmp_path / "kept", tmp_path / "x", to="sparse", dtype="int3", progress=False)


@pytest.mark.parametrize("implementation", ["base", "sparse"])
def test_biases_and_lora_are_written_and_read(implementation, tmp_path):
    tensors = {**TENSORS, **companions()}
    lazy = {n: Constant(t) for n, t in tensors.items()}
    write_checkpoint(tmp_path / "out", lazy, ARGS, to=implementation, shards=4, progress=False)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.llama_type.peft
    equal({n: t.load() for n, t in checkpoint.tensors.items()}, tensors)
    if implementation == "base":
        shard = torch.load(tmp_path / "out" / "consolidated.01-of-04.model.pth", weights_only=True)["model"]
        equal(shard, {"llma." + n: t for n, t in make.shard(tensors, "base", 1, 4).items()})
    for to in ("hf", "torrent"):
        with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wq\.bias: the .* merge them .*\(108 such"):
            convert(tmp_path / "out", tmp_path / to, to=to, progress=False)


def test_trained_tensors_alone(tmp_path):
    trained = {n: t for n, t in LAZY.items() if "norm" in n}
    with pytest.raises(CheckpointError, match=r"missing tensors: tok_embeddings\.weight"):
        write_checkpoint(tmp_path / "out", trained, ARGS, to="base", progress=False)
    write_checkpoint(tmp_path / "out", trained, ARGS, to="base", shards=2, allow_partial=True, progress=False)
    checkpoint = open_checkpoint(tmp_path / "out", allow_partial=True)
    assert checkpoint.partial
    assert set(checkpoint.tensors) == set(trained)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    for tensors, message in (
        ({**LAZY, "norm.weight": Constant(torch.ones(3))}, r"norm\.weight: shape \(3,\), but .* \(48\)"),
        ({**LAZY, "odd.weight": Constant(torch.ones(3))}, r"unexpected tensor odd\.weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(tmp_path / "out", tensors, ARGS, to="base", progress=False)
    assert not (tmp_path / "out").exists()


def test_shards_that_do_not_divide_name_field_and_both_numbers(tmp_path):
    for to, shards, message in (
        ("base", 16, r"moe\.num_experts: got 8, .* 16"),
        ("sparse", 3, r"hidden_dim: got 40, .* 3"),
        ("sparse", 20, r"n_kv_heads × head_dim: got 16, .* 20"),
        ("torrent", 2, "neither shards"),
        ("gguf", None, "to: got 'gguf', .* base, sparse, hf, torrent"),
        ("hf", 0, "shards: got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_checkpoint(tmp_path / "out", LAZY, ARGS, to=to, shards=shards, progress=False)
    args = ARGS.replace(moe=MoEArgs(num_experts=3))
    lazy = {n: Constant(t) for n, t in random_tensors(args).items()}
    write_checkpoint(tmp_path / "three", lazy, args, to="base", progress=False)
    assert open_checkpoint(tmp_path / "three").shards == 1
    write_checkpoint(tmp_path / "sparse", lazy, args, to="sparse", progress=False)
    assert open_checkpoint(tmp_path / "sparse").shards == 8


def test_a_computed_tensor_is_made_once(tmp_path):
    calls = []

    def made(name: str, tensor: torch.Tensor) -> Computed:
        def make_it() -> torch.Tensor:
            calls.append(name)
            return tensor

        return Computed(tuple(tensor.shape), tensor.dtype, make_it)

    lazy = {name: made(name, tensor) for name, tensor in TENSORS.items()}
    write_checkpoint(tmp_path / "out", lazy, ARGS, to="sparse", shards=8, progress=False)
    assert sorted(calls) == sorted(TENSORS)
    assert verify(tmp_path / "out", progress=False).ok
