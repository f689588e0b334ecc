"""Adapters that requests name: each answer is that of the model with this adapter loaded over it, alone."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from helpers.adapters import SEVEN, peft_args, random_adapter, save_adapter
from helpers.distributed import run_ranks
from helpers.random_models import hf_mixtral, write_speaking
from helpers.sizes import SPEAKING

from accessory.checkpoint.chain import open_chain, trained_on
from accessory.engine.sampling_params import SamplingParams
from accessory.errors import CheckpointError, InputError
from accessory.model.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

PROMPTS = ["The best programming language in the world is", "A mixture of experts", "Once upon a time there was a"]
HOW = {"dtype": torch.float32, "device": "cpu", "max_seq_len": 256}
NAMES = [None, "wide", "narrow", "norms", "router"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and adapters of several kinds: other ranks, other targets, other scales."""
    root = tmp_path_factory.mktemp("adapters")
    write_speaking(root / "model", SPEAKING)
    generator = torch.Generator().manual_seed(5)
    norms = {
        name: 1 + torch.randn(SPEAKING.dim, generator=generator)
        for name in ("norm.weight", "layers.0.ffn_norm.weight", "layers.1.attention_norm.weight")
    }
    shape = (SPEAKING.moe.num_experts, SPEAKING.dim)
    routers = {f"layers.{i}.feed_forward.gate.weight": torch.randn(shape, generator=generator) for i in range(2)}
    biases = {n: t for n, t in random_adapter(SPEAKING, bias=True, std=0.5, seed=2).items() if n.endswith(".bias")}
    kinds = {
        "wide": (random_adapter(SPEAKING, targets=(*SEVEN, "gate", "output"), rank=8, std=0.2, seed=1), 8, 6.0),
        "narrow": (random_adapter(SPEAKING, targets=("wq", "w2"), rank=3, std=0.3, seed=3), 3, 9.0),
        "norms": ({**norms, **biases}, 0, None),
        "router": (routers | random_adapter(SPEAKING, targets=("gate",), rank=2, seed=4), 2, None),
    }
    for name, (tensors, rank, alpha) in kinds.items():
        args = peft_args(SPEAKING, alpha=alpha, rank=rank or -1, bias_tuning=name == "norms")
        save_adapter(root / name, tensors, args)
    return root


def adapters_of(folders):
    return {name: folders / name for name in NAMES if name is not None}


def alone(folders, name, **how):
    return MetaModel.from_pretrained([folders / "model", *([folders / name] if name else [])], **{**HOW, **how})


@pytest.fixture(scope="module")
def expected(folders):
    """Greedy tokens with log-probabilities, by adapter and prompt."""
    params = SamplingParams(logprobs=0)
    models = {name: alone(folders, name) for name in NAMES}
    return {
        (name, prompt): model.complete([prompt], max_gen_len=24, params=params)[0]
        for name, model in models.items()
        for prompt in PROMPTS
    }


def check(model, expected):
    """All prompts with all adapters in one call."""
    asked = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    answers = model.complete(
        [prompt for _, prompt in asked],
        max_gen_len=24,
        params=SamplingParams(logprobs=0),
        adapter=[name for name, _ in asked],
    )
    for key, answer in zip(asked, answers, strict=True):
        assert answer.token_ids == expected[key].token_ids, key
        torch.testing.assert_close(answer.logprobs, expected[key].logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param("mixtral", marks=pytest.mark.slow), "mixtral_sparse"])
def test_each_request_of_a_batch_is_answered_with_its_adapter(folders, expected, kind):
    texts = {expected[name, PROMPTS[0]].text for name in NAMES}
    assert len(texts) == len(NAMES)  # every adapter changes the answer
    model = MetaModel.from_pretrained(folders / "model", kind, adapters=adapters_of(folders), **HOW)
    check(model, expected)
    check(model, expected)  # with pages that the first call left


def in_a_rank(rank, world, folders, expected):
    for kind in ("mixtral", "mixtral_sparse"):
        model = MetaModel.from_pretrained(
            folders / "model", kind, mp_group=dist.group.WORLD, adapters=adapters_of(folders), **HOW
        )
        check(model, expected)


def test_ranks_hold_their_parts_of_adapters(folders, expected):
    run_ranks(in_a_rank, 2, folders, expected)


@pytest.mark.slow
def test_ranks_of_a_driver_hold_their_parts_of_adapters(folders, expected):
    with MultiGpuWrapper(folders / "model", gpus=2, adapters=adapters_of(folders), **HOW) as model:
        check(model, expected)


def test_adapters_stand_beside_quantised_weights(folders):
    mixed = MetaModel.from_pretrained(folders / "model", quant="int8", adapters=adapters_of(folders), **HOW)
    got = mixed.generate([PROMPTS[0]] * len(NAMES), max_gen_len=16, adapter=NAMES)
    want = [alone(folders, name, quant="int8").generate([PROMPTS[0]], max_gen_len=16)[0] for name in NAMES]
    assert got == want


def test_two_adapters_share_no_page_and_one_content_does(folders):
    model = MetaModel.from_pretrained(
        folders / "model", adapters={**adapters_of(folders), "again": folders / "wide"}, **HOW
    )
    ids = [1] + [300 + n for n in range(150)]  # two whole pages

    def cached(adapter):
        (answer,) = model.complete([ids], max_gen_len=2, adapter=adapter)
        return answer.cached_tokens

    assert [cached(name) for name in (*NAMES, *NAMES, "again")] == [0] * len(NAMES) + [128] * (len(NAMES) + 1)


def test_a_stream_names_its_adapter(folders, expected):
    model = MetaModel.from_pretrained(folders / "model", adapters=adapters_of(folders), **HOW)
    *_, last = model.stream_generate(PROMPTS[1], max_gen_len=24, adapter="narrow")
    assert last["text"] == expected["narrow", PROMPTS[1]].text


@pytest.mark.parametrize(
    ("adapter", "error"),
    [
        ("no such", "adapter: got 'no such', but loaded: wide, narrow, norms, router"),
        (["wide"], "adapter: got 1 for 2 prompts; give one for each, or one for all"),
        ([3, None], "adapter: got 3, but loaded: wide, narrow, norms, router"),
    ],
)
def test_an_unknown_adapter_is_an_error(folders, adapter, error):
    model = MetaModel.from_pretrained(folders / "model", adapters=adapters_of(folders), **HOW)
    with pytest.raises(InputError) as raised:
        model.generate(PROMPTS[:2], adapter=adapter)
    assert str(raised.value) == error
    with pytest.raises(InputError, match="but the model was loaded without adapters"):
        alone(folders, None).generate(PROMPTS[:1], adapter="wide")


def test_what_cannot_stand_beside_the_model_is_refused_before_weights_are_read(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("accessory.model.meta.build", lambda *_, **__: pytest.fail("loaded weights"))

    def refused(match, adapters, path=folders / "model", error=CheckpointError):
        with pytest.raises(error, match=match):
            MetaModel.from_pretrained(path, adapters=adapters, **HOW)

    other = SPEAKING.replace(dim=64)
    save_adapter(tmp_path / "other", random_adapter(other), peft_args(other))
    refused("dim: got 64, but .* has 32: another model's", {"a": tmp_path / "other"})
    whole = {"layers.0.attention.wq.weight": torch.zeros(32, 32)}
    save_adapter(tmp_path / "whole", whole, SPEAKING)
    refused("1 of its tensors replace the model's", {"a": tmp_path / "whole"})
    half = {n: t for n, t in random_adapter(SPEAKING).items() if "lora_a" in n}
    save_adapter(tmp_path / "half", half, peft_args(SPEAKING))
    refused("tensors missing: .*lora_b", {"a": tmp_path / "half"})
    refused("has a LoRA adapter itself", adapters_of(folders), [folders / "model", folders / "wide"])
    refused("must be a mapping of names", [folders / "wide"], error=InputError)
    refused("got the name 'none'", {"none": folders / "wide"}, error=InputError)
    refused("no such file or folder", {"a": tmp_path / "nowhere"})


def test_an_adapter_of_another_model_of_the_same_sizes_is_named(folders, tmp_path, caplog):
    hf_mixtral(SPEAKING, seed=9).save_pretrained(tmp_path / "other")
    tensors = random_adapter(SPEAKING)
    said = trained_on(open_chain([tmp_path / "other"]), tensors)
    save_adapter(tmp_path / "adapter", tensors, peft_args(SPEAKING))
    meta = tmp_path / "adapter" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), **said.to_dict()}))
    MetaModel.from_pretrained(folders / "model", adapters={"a": tmp_path / "adapter"}, **HOW)
    assert "was trained on" in caplog.text
    assert "is another model" in caplog.text
