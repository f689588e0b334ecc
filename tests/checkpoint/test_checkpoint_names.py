"""Where the configuration comes from, and what happens if its sources contradict each other or the tensors."""

import pytest
from helpers import checkpoints as make
from helpers.checkpoints import ARGS, random_tensors

from accessory.checkpoint.folder import open_checkpoint
from accessory.config import ModelArgs, MoEArgs
from accessory.errors import CheckpointError, ConfigError

TENSORS = random_tensors()


def test_sources_in_order_of_precedence(tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    make.write_json(folder / "params.json", {**make.params_json(), "rope_theta": 1.0, "norm_eps": 0.1})
    assert open_checkpoint(folder).args.rope_theta == 1.0
    make.write_json(folder / "config.json", {"rope_theta": 2.0, "load_balancing_weight": 0.5})
    make.write_json(tmp_path / "a.json", {"rope_theta": 3.0, "max_seq_len": 7})
    make.write_json(tmp_path / "b.json", {"rope_theta": 4.0})
    args = open_checkpoint(folder).args
    assert (args.rope_theta, args.norm_eps, args.load_balancing_weight) == (2.0, 0.1, 0.5)
    args = open_checkpoint(folder, [tmp_path / "a.json", tmp_path / "b.json"]).args
    assert (args.rope_theta, args.norm_eps, args.max_seq_len) == (4.0, 0.1, 7)


@pytest.mark.parametrize("spelling", ["mistral", "hugging face", "mixed"])
def test_spellings_of_params_json(spelling, tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    params = make.params_json()
    if spelling == "hugging face":
        params = {k: v for k, v in make.hf_config().items() if k not in ("architectures", "model_type")}
    elif spelling == "mixed":
        params = {**params, "intermediate_size": params.pop("hidden_dim"), "num_local_experts": 8}
        del params["moe"]
    make.write_json(folder / "params.json", params)
    args = open_checkpoint(folder).args
    assert (args.hidden_dim, args.head_dim, args.moe) == (40, 8, MoEArgs(num_experts=8))


def test_without_any_config_sizes_come_from_shapes(tmp_path, caplog):
    args = ARGS.replace(dim=64, head_dim=128, n_heads=4, n_kv_heads=2, vocab_size=72)
    folder = make.write_torrent(tmp_path / "c", random_tensors(args), args, params=False)
    found = open_checkpoint(folder).args
    assert found == ModelArgs(
        dim=64, hidden_dim=40, head_dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=72, rope_theta=1e6
    )
    assert "rope_theta" in caplog.text
    assert "head_dim" in caplog.text


def test_without_any_config_the_error_names_what_shapes_cannot_tell(tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS, params=False)
    with pytest.raises(ConfigError, match=r"n_heads, n_kv_heads, head_dim: .* 32 and 16; give a params\.json"):
        open_checkpoint(folder)
    make.write_json(folder / "params.json", {"n_heads": 4})
    args = open_checkpoint(folder).args
    assert (args.n_heads, args.n_kv_heads, args.head_dim) == (4, 2, 8)
    make.write_json(folder / "params.json", {"head_dim": 16})
    args = open_checkpoint(folder).args
    assert (args.n_heads, args.n_kv_heads, args.head_dim) == (2, 1, 16)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 96, r"vocab_size: params\.json says 96, but by tok_embeddings\.weight \(80, 48\) it is 80"),
        ("dim", 64, r"dim: params\.json says 64, but by .* it is 48"),
        ("hidden_dim", 48, r"hidden_dim: params\.json says 48, but by layers\.0\.feed_forward\.experts\.0\.w1"),
        ("n_heads", 8, r"n_heads × head_dim: params\.json says 64, but by layers\.0\.attention\.wq\.weight"),
        ("n_kv_heads", 4, r"n_kv_heads × head_dim: params\.json says 32, but by layers\.0\.attention\.wk\.weight"),
        ("n_layers", 1, r"n_layers: params\.json says 1, but by layers\.1\..* it is 2"),
        ("moe", {"num_experts": 4}, r"moe\.num_experts: params\.json says 4, but by layers\.0\.feed_forward\.gate"),
    ],
)
def test_config_and_tensors_that_disagree(key, value, message, tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    make.write_json(folder / "params.json", {**make.params_json(), key: value})
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(folder)


def test_more_layers_configured_than_there_are(tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    make.write_json(folder / "params.json", {**make.params_json(), "n_layers": 3})
    with pytest.raises(CheckpointError, match=r"missing tensors: layers\.2\.attention\.wq\.weight, .* and 28 more"):
        open_checkpoint(folder)


def test_broken_config_files_are_named(tmp_path):
    folder = make.write_torrent(tmp_path / "c", TENSORS)
    (folder / "params.json").write_text("{")
    with pytest.raises(ConfigError, match=r"params\.json: not valid JSON"):
        open_checkpoint(folder)
    make.write_json(folder / "params.json", {**make.params_json(), "hiden_dim": 3})
    with pytest.raises(ConfigError, match=r"params\.json: unknown key 'hiden_dim'; did you mean 'hidden_dim'"):
        open_checkpoint(folder)
    make.write_json(folder / "params.json", make.params_json())
    make.write_json(folder / "meta.json", {"llama_type": "mixtral_dense"})
    with pytest.raises(ConfigError, match=r"meta\.json: llama_type: got 'mixtral_dense'"):
        open_checkpoint(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot be read"):
        open_checkpoint(folder, ["nowhere.json"])
