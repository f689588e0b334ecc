"""Every layout, written by hand, reads back as the same canonical tensors, bit for bit."""

import json

import pytest
import torch
from helpers import checkpoints as make
from helpers.checkpoints import ARGS, companions, random_tensors

from accessory.checkpoint.folder import open_checkpoint
from accessory.config import LlamaType, MoEArgs
from accessory.errors import CheckpointError, ConfigError


def same(checkpoint, tensors) -> None:
    assert list(checkpoint.tensors) == list(tensors)
    for name, tensor in tensors.items():
        lazy = checkpoint.tensors[name]
        assert lazy.shape == tuple(tensor.shape)
        assert lazy.dtype == tensor.dtype
        assert torch.equal(lazy.load(), tensor), name


TENSORS = random_tensors()
FOLDERS = {
    "torrent": lambda d: make.write_torrent(d, TENSORS),
    "official.pth": lambda d: make.write_official(d, TENSORS),
    "official.pt": lambda d: make.write_official(d, TENSORS, form="pt"),
    "official.safetensors": lambda d: make.write_official(d, TENSORS, form="safetensors"),
    "hf single": lambda d: make.write_hf(d, TENSORS),
    "hf sharded": lambda d: make.write_hf(d, TENSORS, files=3),
    "hf sharded, no index": lambda d: make.write_hf(d, TENSORS, files=3, index=False),
    "hf fused": lambda d: make.write_hf(d, TENSORS, fused=True),
    "hf fused sharded": lambda d: make.write_hf(d, TENSORS, fused=True, files=2),
    "base 8": lambda d: make.write_accessory(d, TENSORS, "base"),
    "base 1": lambda d: make.write_accessory(d, TENSORS, "base", world=1),
    "base 4, bare, no prefix": lambda d: make.write_accessory(d, TENSORS, "base", world=4, nested=False, prefix=""),
    "base 2 safetensors": lambda d: make.write_accessory(d, TENSORS, "base", world=2, safetensors=True),
    "sparse 8": lambda d: make.write_accessory(d, TENSORS, "sparse"),
    "sparse 1": lambda d: make.write_accessory(d, TENSORS, "sparse", world=1),
    "sparse 4, bare, no prefix": lambda d: make.write_accessory(d, TENSORS, "sparse", world=4, nested=False, prefix=""),
    "sparse 2 safetensors": lambda d: make.write_accessory(d, TENSORS, "sparse", world=2, safetensors=True),
    "sparse 4, no meta.json": lambda d: make.write_accessory(d, TENSORS, "sparse", world=4, meta=False),
}


@pytest.mark.parametrize("which", FOLDERS)
def test_every_layout_reads_as_the_same_canonical_tensors(which, tmp_path):
    checkpoint = open_checkpoint(FOLDERS[which](tmp_path / "c"))
    layout = which.split()[0].split(".")[0]
    assert checkpoint.layout == layout
    assert checkpoint.llama_type == LlamaType("base" if layout == "base" else "sparse")
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.shards == (int(which.split()[1].strip(",")) if layout in ("base", "sparse") else 1)
    assert not checkpoint.partial
    assert (checkpoint.args.n_heads, checkpoint.args.head_dim, checkpoint.args.n_layers) == (4, 8, 2)
    same(checkpoint, TENSORS)


@pytest.mark.parametrize("files", [1, 2])
def test_older_hugging_face_folders_of_pickles(files, tmp_path):
    raw = make.hf_tensors(TENSORS)
    stems = ["pytorch_model"] if files == 1 else [f"pytorch_model-{i:05d}-of-00002" for i in (1, 2)]
    for i, stem in enumerate(stems):
        part = {n: t.clone() for k, (n, t) in enumerate(raw.items()) if k % files == i}
        torch.save(part, tmp_path / f"{stem}.bin")
    make.write_json(tmp_path / "config.json", make.hf_config())
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == "hf"
    same(checkpoint, TENSORS)


@pytest.mark.parametrize("unaligned", [True, False])
@pytest.mark.parametrize("pieces", [2, 10])
def test_pieces_read_like_the_whole_file(pieces, unaligned, tmp_path, monkeypatch):
    monkeypatch.setattr("accessory.checkpoint.files._UNALIGNED_IS_FINE", unaligned)
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    make.split_into_pieces(folder / "consolidated.00.pth", pieces)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layout == "torrent"
    assert len(checkpoint.files) == pieces
    same(checkpoint, TENSORS)


@pytest.mark.parametrize(("dim", "hidden", "experts"), [(64, 16, 4), (16, 16, 4), (24, 16, 3)])
def test_torrent_w2_is_transposed_block_by_block(dim, hidden, experts, tmp_path):
    """(E·F, D) of (F, D) blocks has as many elements as (E·D, F); if D = E·F or D = F, shapes mislead."""
    args = ARGS.replace(dim=dim, hidden_dim=hidden, moe=MoEArgs(num_experts=experts))
    tensors = random_tensors(args)
    for folder in (
        make.write_torrent(tmp_path / "torrent", tensors, args),
        make.write_accessory(tmp_path / "sparse", tensors, "sparse", args, world=4),
    ):
        checkpoint = open_checkpoint(folder)
        for e in range(experts):
            name = f"layers.1.feed_forward.experts.{e}.w2.weight"
            assert checkpoint.tensors[name].shape == (dim, hidden)
            assert torch.equal(checkpoint.tensors[name].load(), tensors[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtypes_stay(dtype, tmp_path):
    tensors = random_tensors(dtype=dtype)
    same(open_checkpoint(make.write_torrent(tmp_path / "a", tensors)), tensors)
    same(open_checkpoint(make.write_accessory(tmp_path / "b", tensors, "sparse", world=2)), tensors)


def test_tied_embeddings_serve_as_the_head(tmp_path):
    checkpoint = open_checkpoint(make.write_hf(tmp_path / "c", TENSORS, tied=True))
    assert torch.equal(checkpoint.tensors["output.weight"].load(), TENSORS["tok_embeddings.weight"])


def test_a_head_that_lacks_without_being_tied_is_missing(tmp_path):
    folder = make.write_hf(tmp_path / "c", TENSORS, tied=True)
    make.write_json(folder / "config.json", make.hf_config())
    with pytest.raises(CheckpointError, match=r"missing tensors: output\.weight \(1 of"):
        open_checkpoint(folder)


def test_what_transformers_saves_is_read(tmp_path):
    """A folder of save_pretrained reads as the model's state dict with q and k rows in the interleaved order."""
    from helpers.random_models import canonical_from_hf, hf_mixtral

    model = hf_mixtral(ARGS)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    expected = canonical_from_hf(model)
    for folder in ("one", "many"):
        checkpoint = open_checkpoint(tmp_path / folder)
        assert checkpoint.args.rope_theta == ARGS.rope_theta
        assert set(checkpoint.tensors) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.tensors[name].load(), tensor), name


@pytest.mark.parametrize("world", [1, 2, 8])
def test_biases_and_lora_join_over_base_shards(world, tmp_path):
    tensors = {**TENSORS, **companions()}
    folder = make.write_accessory(tmp_path / "c", tensors, "base", world=world)
    make.write_json(folder / "meta.json", {"llama_type": "mixtral_peft"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.llama_type == LlamaType("base", peft=True)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensors[name].load(), tensor), name


def test_a_save_of_the_trained_tensors_opens_only_when_asked_for(tmp_path):
    trained = {n: t for n, t in {**TENSORS, **companions()}.items() if "lora" in n or "bias" in n or "norm" in n}
    folder = make.write_accessory(tmp_path / "c", trained, "base", world=4)
    (folder / "consolidated.00-of-04.optimizer.pth").write_bytes(b"not ours to read")
    with pytest.raises(CheckpointError, match=r"is an adapter \(LoRA of rank 3, .*\) and no whole model"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, allow_partial=True)
    assert checkpoint.partial
    assert set(checkpoint.tensors) == set(trained)
    for name, tensor in trained.items():
        assert torch.equal(checkpoint.tensors[name].load(), tensor), name
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json: missing"):
        open_checkpoint(folder, allow_partial=True)
    assert open_checkpoint(folder, [tmp_path / "config.json"], allow_partial=True).args == ARGS


def test_the_tokenizer_comes_along(tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    for name in ("tokenizer.model", "tokenizer_config.json", "README.md", "generation_config.json"):
        (folder / name).write_text("{}")
    names = [p.name for p in open_checkpoint(folder).resources]
    assert names == ["generation_config.json", "tokenizer.model", "tokenizer_config.json"]


def test_one_of_several_forms_in_a_folder_is_taken(tmp_path):
    """mistralai's repository holds the Hugging Face files beside the original ones."""
    folder = make.write_hf(tmp_path / "c", TENSORS, files=2)
    make.write_official(folder, TENSORS, form="pt")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layout == "hf"
    assert len(checkpoint.files) == 2
    same(checkpoint, TENSORS)


def test_buffers_that_say_nothing_are_passed_over(tmp_path):
    from safetensors.torch import save_file

    folder = make.write_hf(tmp_path / "c", TENSORS)
    raw = make.hf_tensors(TENSORS) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(raw, folder / "model.safetensors")
    same(open_checkpoint(folder), TENSORS)


def test_meta_json_decides_the_declared_type(tmp_path):
    folder = make.write_accessory(tmp_path / "c", TENSORS, "sparse", world=2)
    (folder / "meta.json").write_text(json.dumps({"llama_type": "mixtral_sparse_ens5"}))
    assert open_checkpoint(folder).llama_type == LlamaType("sparse", image_views=5)


def test_a_torch_that_does_not_tell_places_in_a_file_still_reads(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("accessory.checkpoint.files._offsets_come_with_meta", lambda: False)
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    same(open_checkpoint(folder), TENSORS)
    assert "does not tell" in caplog.text
    make.split_into_pieces(folder / "consolidated.00.pth", 3)
    same(open_checkpoint(folder), TENSORS)
