"""Adapters to and from PEFT's folder; peft and transformers are the oracle for logits and tensor names."""

import copy
import json

import pytest
import torch
from helpers import checkpoints as make
from helpers.adapters import SEVEN, peft_args, random_adapter, save_adapter
from helpers.checkpoints import ARGS
from helpers.random_models import canonical_from_hf, hf_mixtral
from safetensors.torch import load_file, save_file

from accessory.build.network import NetworkSpec, build
from accessory.checkpoint.chain import chained_args, open_chain, trained_on
from accessory.checkpoint.folder import open_checkpoint
from accessory.convert.merge import merge
from accessory.convert.peft_format import export_adapter, import_adapter
from accessory.convert.peft_reader import read_adapter
from accessory.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

MODEL = hf_mixtral(ARGS, std=0.1)
TENSORS = canonical_from_hf(MODEL)
EVERYWHERE = (*SEVEN, "gate", "output")
NORMS = {n: TENSORS[n] + 0.1 for n in TENSORS if n.endswith("norm.weight")}
WHOLE = NORMS | {n: TENSORS[n] * 1.3 for n in TENSORS if n.endswith((".gate.weight", "tok_embeddings.weight"))}
IDS = torch.randint(ARGS.vocab_size, (2, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module", autouse=True)
def peft_is_there():
    pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make.write_accessory(tmp_path_factory.mktemp("base") / "base", TENSORS, "sparse", world=2)


def ours(base, adapter, implementation="sparse"):
    checkpoints = open_chain([base, adapter])
    args = chained_args(checkpoints)
    spec = NetworkSpec(checkpoints=checkpoints, args=args, implementation=implementation)
    decoder = build(spec, dtype=torch.float32)
    with torch.no_grad():
        return decoder(IDS).logits


def theirs(folder):
    import peft

    model = peft.PeftModel.from_pretrained(copy.deepcopy(MODEL), str(folder)).eval()
    with torch.no_grad():
        return model(IDS).logits


def distance(a, b):
    return float((a - b).norm() / b.norm())


def read(folder):
    opened = open_checkpoint(folder, allow_partial=True)
    return {name: tensor.load() for name, tensor in opened.tensors.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(kind="lora", seed=5, **changes):
    """A PEFT model with random values in all trained parameters."""
    torch.manual_seed(seed)
    import peft

    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **changes})
    model = peft.get_peft_model(copy.deepcopy(MODEL), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
            elif "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rewritten(folder, change, **settings):
    """PEFT's folder with its tensors changed by `change` and its settings replaced."""
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file)
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# --------------------------------------------------------------------------- out


@pytest.mark.parametrize(
    ("targets", "more"),
    [
        (SEVEN, {}),
        (EVERYWHERE, NORMS),
        (("wq",), WHOLE),
        pytest.param(("wq", "wk", "wv", "wo"), NORMS, marks=pytest.mark.slow),
        pytest.param(("w1",), {}, marks=pytest.mark.slow),
        (("w3", "wo"), {}),
        pytest.param(("w2",), {}, marks=pytest.mark.slow),
        pytest.param(("w1", "w3"), {}, marks=pytest.mark.slow),
        pytest.param(("gate",), {}, marks=pytest.mark.slow),
        pytest.param(("output",), {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: ("+".join(value) if isinstance(value, tuple) else f"{len(value)} whole")[:24],
)
def test_peft_gives_our_logits_and_everything_comes_back(tmp_path, base, targets, more):
    tensors = random_adapter(targets=targets) | more
    args = peft_args(lora_targets=targets, norm_tuning=bool(more))
    adapter = save_adapter(tmp_path / "ours", tensors, args, to="base", shards=2)
    export_adapter(adapter, tmp_path / "peft", base=base)
    wanted = ours(base, adapter)
    assert distance(theirs(tmp_path / "peft"), wanted) <= 1e-5
    assert distance(ours(base, adapter, "base"), wanted) <= 1e-5
    with torch.no_grad():
        assert distance(MODEL(IDS).logits, wanted) > 0.01, "the adapter does something"
    import_adapter(tmp_path / "peft", tmp_path / "back", base=base, to="sparse", shards=2)
    assert equal(read(tmp_path / "back"), tensors)
    back = open_checkpoint(tmp_path / "back", allow_partial=True)
    assert back.args == args
    assert str(back.llama_type) == "mixtral_sparse_peft"
    assert back.trained_on == trained_on([open_checkpoint(base)], ())
    # PEFT has fused experts, and saves them fused.
    import peft

    peft.PeftModel.from_pretrained(copy.deepcopy(MODEL), str(tmp_path / "peft")).save_pretrained(tmp_path / "fused")
    import_adapter(tmp_path / "fused", tmp_path / "again", base=base, to="base")
    assert equal(read(tmp_path / "again"), tensors)


@pytest.mark.parametrize("alpha", [None, 0.7, 4.0])
def test_any_scale(tmp_path, base, alpha):
    args = peft_args(alpha=alpha, norm_tuning=False)
    adapter = save_adapter(tmp_path / "ours", random_adapter(std=0.2), args)
    export_adapter(adapter, tmp_path / "peft", base=base)
    assert distance(theirs(tmp_path / "peft"), ours(base, adapter)) <= 1e-5
    import_adapter(tmp_path / "peft", tmp_path / "back", base=base)
    scale = open_checkpoint(tmp_path / "back", allow_partial=True).args.lora_scale
    assert scale == args.lora_scale == (1 if alpha is None else alpha / 4)


def test_the_folder_by_hand(tmp_path, base):
    """The order of rows: the two rows of a rotary pair are adjacent in ours, half a head apart in PEFT's."""
    tensors = random_adapter(targets=("wq", "w2"), dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "ours", tensors, peft_args())
    lines = export_adapter(adapter, tmp_path / "peft", base=base)
    assert lines == ["LoRA of rank 4, scaled by 1.5, beside wq, w2"]
    out = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {t.dtype for t in out.values()} == {torch.bfloat16}
    key, name = "base_model.model.model.layers.1.self_attn.q_proj", "layers.1.attention.wq"
    theirs_b, ours_b = out[f"{key}.lora_B.weight"], tensors[f"{name}.lora_b.weight"]
    head, half = 3, 4
    for pair in range(half):
        assert torch.equal(theirs_b[head * 8 + pair], ours_b[head * 8 + 2 * pair])
        assert torch.equal(theirs_b[head * 8 + half + pair], ours_b[head * 8 + 2 * pair + 1])
    assert torch.equal(out[f"{key}.lora_A.weight"], tensors[f"{name}.lora_a.weight"])
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.7.w2"
    assert torch.equal(out[f"{key}.lora_B.weight"], tensors["layers.0.feed_forward.experts.7.w2.lora_b.weight"])
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6, ["q_proj", "w2"])
    assert config["modules_to_save"] is None


def test_one_folder_with_everything_exports_what_was_trained(tmp_path, base):
    tensors = TENSORS | NORMS | random_adapter()
    whole = make.write_accessory(tmp_path / "whole", tensors, "base", peft_args(), world=1)
    export_adapter(whole, tmp_path / "peft", base=base)
    assert distance(theirs(tmp_path / "peft"), ours(base, whole)) <= 1e-5
    out = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert sum("lora_" not in name for name in out) == len(NORMS)


def test_replacing_a_folder(tmp_path, base):
    adapter = save_adapter(tmp_path / "ours", random_adapter(), peft_args())
    export_adapter(adapter, tmp_path / "peft", base=base)
    with pytest.raises(CheckpointError, match="peft: is not empty; give --overwrite"):
        export_adapter(adapter, tmp_path / "peft", base=base)
    export_adapter(adapter, tmp_path / "peft", base=base, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(CheckpointError, match="is the source itself"):
        export_adapter(adapter, adapter, base=base, overwrite=True)
    with pytest.raises(CheckpointError, match="is the source itself"):
        import_adapter(tmp_path / "peft", tmp_path / "peft", base=base, overwrite=True)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (random_adapter(bias=True), r"attention\.wq\.bias: Hugging Face's Mixtral has no biases"),
        (
            random_adapter() | {"layers.0.attention.wk.weight": TENSORS["layers.0.attention.wk.weight"]},
            "LoRA beside it",
        ),
        (
            random_adapter(targets=("wq",)) | {"layers.0.attention.wk.weight": TENSORS["layers.0.attention.wk.weight"]},
            r"layers\.0\.attention\.wk\.weight: was trained whole; besides LoRA",
        ),
        (NORMS, "no LoRA in it"),
    ],
    ids=["bias", "both", "whole", "no LoRA"],
)
def test_what_cannot_be_exported(tmp_path, base, tensors, message):
    adapter = save_adapter(tmp_path / "ours", tensors, peft_args(bias_tuning="bias" in message))
    with pytest.raises(CheckpointError, match=message) as raised:
        export_adapter(adapter, tmp_path / "peft", base=base)
    assert "\n" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


# --------------------------------------------------------------------------- in


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True},
        {"target_modules": ["o_proj"], "target_parameters": ["gate.weight"]},
        {
            "target_modules": ["q_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"o_proj": 2, ".*gate_up_proj": 6},
            "alpha_pattern": {"layers.1.self_attn.o_proj": 16, ".*down_proj": 3},
        },
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["v_proj"], "modules_to_save": ["input_layernorm", "lm_head", "embed_tokens", "model.norm"]},
        {"target_modules": ["v_proj", "lm_head"]},
    ],
    ids=lambda settings: "+".join([*settings["target_modules"], *list(settings)[1:]]),
)
def test_what_peft_trained_is_what_we_compute(tmp_path, base, settings):
    model = trained(**settings)
    model.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        wanted = model(IDS).logits
        assert distance(MODEL(IDS).logits, wanted) > 0.01
    import_adapter(tmp_path / "peft", tmp_path / "ours", base=base, shards=2)
    for implementation in ("base", "sparse"):
        assert distance(ours(base, tmp_path / "ours", implementation), wanted) <= 1e-5
    merge([base, tmp_path / "ours"], tmp_path / "merged", certificate=False, verify=False, progress=False)
    assert distance(ours(base, tmp_path / "merged"), wanted) <= 1e-5


def test_other_spellings_of_the_same(tmp_path, base):
    """Keys without the prefix and with the adapter's name; tensors in a .bin."""
    adapter = save_adapter(tmp_path / "ours", random_adapter(targets=EVERYWHERE), peft_args(lora_targets=EVERYWHERE))
    export_adapter(adapter, tmp_path / "peft", base=base)

    def respelt(tensors):
        return {
            n.removeprefix("base_model.model.").replace(".weight", ".default.weight", 1): t for n, t in tensors.items()
        }

    rewritten(tmp_path / "peft", respelt)
    file = tmp_path / "peft" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    import_adapter(tmp_path / "peft", tmp_path / "back", base=base)
    file.unlink()
    import_adapter(tmp_path / "peft", tmp_path / "from bin", base=base)
    assert equal(read(tmp_path / "back"), read(adapter))
    assert equal(read(tmp_path / "from bin"), read(adapter))


def test_ranks_and_scales_become_one(tmp_path):
    model = trained(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 12})
    model.save_pretrained(tmp_path / "peft")
    tensors, args = read_adapter(tmp_path / "peft", ARGS)
    assert (args.lora_rank, args.lora_scale, args.lora_targets) == (4, 1.5, ("wq", "wv"))
    theirs_b = load_file(tmp_path / "peft" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    ]
    ours_b = tensors["layers.0.attention.wv.lora_b.weight"].load()
    assert torch.equal(ours_b[:, :2], theirs_b * 4)  # its scale is 12 / 2, written for 6 / 4
    assert not ours_b[:, 2:].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "adapter_config.json: use_dora: got True"),
        ({"bias": "lora_only"}, "bias: got 'lora_only', but only 'none'"),
        ({"lora_bias": True}, "lora_bias: got True"),
        ({"peft_type": "LOHA"}, "peft_type: got 'LOHA', but only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: got 'pissa_niter_4', which changes the base"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: got"),
        ({"r": -1}, r"adapter_config\.json: r: got -1, but it must be a whole number of at least 1"),
        ({"r": 0}, "r: got 0, but it must be"),
        ({"r": "4"}, "r: got '4', but it must be"),
        ({"r": True}, "r: got True, but it must be"),
        ({"r": None}, "r: got None, but it must be"),
        ({"r": 8}, r"r: got 8, but LoRA beside model\.layers\.0\.self_attn\.q_proj is of rank 4"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern: q_proj: got 2, but LoRA beside .*q_proj is of rank 4"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern: got .*, but it must be an object with whole numbers"),
        ({"rank_pattern": [4]}, r"rank_pattern: got \[4\], but it must be an object"),
        ({"rank_pattern": {"q_(": 4}}, r"rank_pattern: 'q_\(' is no regular expression"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern: got .*, but it must be an object with numbers above 0"),
        ({"lora_alpha": "16"}, "lora_alpha: got '16', but it must be a number above 0"),
        ({"lora_alpha": 0}, "lora_alpha: got 0, but"),
        ({"lora_alpha": None}, "lora_alpha: got None, but"),
        ({"lora_alpha": float("nan")}, "lora_alpha: got nan, but"),
        ({"use_rslora": "false"}, "use_rslora: got 'false', but it must be true or false"),
        ({"use_rslora": 1}, "use_rslora: got 1, but it must be true or false"),
        ({"bias": None}, "bias: got None, but only 'none'"),
        ({"target_modules": 3}, "target_modules: got 3, but it must be a text or a list of texts"),
        ({"target_modules": ["v_proj"]}, r"target_modules: got \['v_proj'\], but there is LoRA beside .*q_proj, which"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_we_do_not_have(tmp_path, base, settings, message):
    adapter = save_adapter(tmp_path / "ours", random_adapter(targets=("wq",)), peft_args())
    export_adapter(adapter, tmp_path / "peft", base=base)
    rewritten(tmp_path / "peft", lambda tensors: tensors, **settings)
    with pytest.raises(CheckpointError, match=message) as raised:
        import_adapter(tmp_path / "peft", tmp_path / "back", base=base)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "back").exists()


Q0 = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {Q0 + "lora_magnitude_vector.weight": torch.ones(32)}, "q_proj.lora_magnitude_vector.weight"),
        (lambda t: t | {Q0 + "weight": torch.ones(32, 48)}, r"self_attn\.q_proj\.weight: has no place"),
        (lambda t: t | {"base_model.model.score.weight": torch.ones(3, 48)}, r"score\.weight: has no place"),
        (lambda t: t | {Q0 + "lora_B.bias": torch.ones(32)}, r"lora_B\.bias: has no place"),
        (
            lambda t: {n: v for n, v in t.items() if n != Q0 + "lora_A.weight"},
            r"q_proj\.lora_A\.weight: missing; the adapter is incomplete",
        ),
        (lambda t: t | {Q0 + "lora_B.weight": torch.ones(32, 3)}, r"\(4, 48\), .* \(32, 3\): are of different rank"),
        (lambda t: t | {Q0 + "lora_B.weight": torch.ones(64, 4)}, r"shape \(64, 4\).*another model"),
        (
            lambda t: t | {Q0.replace("layers.0", "layers.9") + f"lora_{x}.weight": torch.ones(32, 32) for x in "AB"},
            r"LoRA beside layers\.9\.attention\.wq\.weight, which the base model does not have",
        ),
        (
            lambda t: t | {Q0.replace("self_attn.q", "mlp.x") + f"lora_{x}.weight": torch.ones(4, 4) for x in "AB"},
            "stands beside no linear of ours",
        ),
        (
            lambda t: (
                t | {f"base_model.model.model.layers.0.mlp.experts.lora_{x}.weight": torch.ones(16, 16) for x in "AB"}
            ),
            "beside neither gate_up_proj nor down_proj of 8 experts",
        ),
        (
            lambda t: (
                t | {f"base_model.model.model.layers.0.mlp.experts.lora_{x}.weight": torch.ones(80) for x in "AB"}
            ),
            "beside neither gate_up_proj nor down_proj of 8 experts",
        ),
        (lambda t: {n: torch.zeros_like(v) for n, v in t.items()}, "there is nothing to import"),
    ],
    ids=["dora", "whole", "score", "bias", "half", "ranks", "shape", "layer", "linear", "stack", "vector", "zeros"],
)
def test_tensors_that_we_do_not_have(tmp_path, base, change, message):
    adapter = save_adapter(tmp_path / "ours", random_adapter(targets=("wq",)), peft_args())
    export_adapter(adapter, tmp_path / "peft", base=base)
    rewritten(tmp_path / "peft", change)
    with pytest.raises(CheckpointError, match=message) as raised:
        import_adapter(tmp_path / "peft", tmp_path / "back", base=base)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "back").exists()


def test_folders_that_are_none(tmp_path, base):
    with pytest.raises(CheckpointError, match=r"no adapter of PEFT: adapter_config\.json is not in it"):
        import_adapter(base, tmp_path / "back", base=base)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors or adapter_model\.bin is missing"):
        import_adapter(tmp_path / "peft", tmp_path / "back", base=base)
    for text, message in (("[1]", "expected a JSON object, found list"), ("{", "not valid JSON")):
        (tmp_path / "peft" / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"adapter_config\.json: {message}"):
            import_adapter(tmp_path / "peft", tmp_path / "back", base=base)
