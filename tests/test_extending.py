"""What docs/extending.md promises: a tiny extension of each kind works when it is added from outside the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"`((?:accessory|tests)/[\w/.]*)`", PAGE))
    assert len(named) >= 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_a_layout(tmp_path, monkeypatch):
    """The layout puts a prefix before every tensor name, and uses a file name of its own."""
    from helpers.checkpoints import ARGS, params_json, random_tensors, write_json
    from safetensors.torch import save_file

    from accessory.checkpoint import layouts, model_files
    from accessory.checkpoint.folder import open_checkpoint

    def read(raw, problems):
        return {name.removeprefix("net."): tensor for name, tensor in raw.items()}

    reader = layouts.Reader(lambda name: name.startswith("net."), read)
    monkeypatch.setattr(layouts, "READERS", {"prefixed": reader, **layouts.READERS})
    monkeypatch.setattr(model_files, "FORMS", (model_files.Form(single="net.safetensors"), *model_files.FORMS))
    tensors = random_tensors(ARGS)
    save_file({f"net.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "net.safetensors")
    write_json(tmp_path / "params.json", params_json(ARGS))
    found = open_checkpoint(tmp_path)
    assert found.layout == "prefixed"
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name].load(), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("implementation", ["base", "sparse"])
def test_a_quantized_format(implementation, monkeypatch):
    """The format keeps signs and each row's mean magnitude. It can be loaded, computes, and passes gradients on."""
    from helpers.random_models import canonical_from_hf, decoder_from_canonical, hf_mixtral
    from helpers.sizes import CUTTABLE
    from helpers.training import make_decoder

    from accessory import formats
    from accessory.ops import quantized
    from accessory.ops.quantized import Packed, Rounding, dequantize, quantize

    def signs(weight):
        return Packed("sign", weight.sign().to(torch.int8), weight.abs().mean(-1))

    def values(packed):
        return packed.data.float() * packed.scale[..., None]

    rounding = Rounding(quantized.ROUNDINGS["int8"].shapes, signs, values)
    monkeypatch.setitem(formats.STORAGE, "sign", formats.Storage(1, None, 4))
    monkeypatch.setitem(quantized.ROUNDINGS, "sign", rounding)
    tensors = {n: t.clone() for n, t in canonical_from_hf(hf_mixtral(CUTTABLE)).items()}
    quant = formats.Quant.parse("sign")
    meant = {n: dequantize(quantize(t, "sign")) if quant.format_of(n) else t for n, t in tensors.items()}
    ids = torch.tensor([[1, 5, 9, 2], [3, 3, 8, 1]])
    want = decoder_from_canonical(CUTTABLE, implementation, meant)(ids).logits
    peft = {"lora_rank": 2, "lora_targets": ("wq", "w1")}
    decoder = make_decoder(implementation, tensors=tensors, args=CUTTABLE, quant="sign", peft=peft)
    logits = decoder(ids).logits
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    learnt = [p.grad for name, p in decoder.named_parameters() if "lora_b" in name]
    assert learnt
    assert all(bool(grad.abs().sum() > 0) for grad in learnt)
    sizes = formats.Quant(experts="sign").nbytes(CUTTABLE)
    assert sizes < formats.Quant().nbytes(CUTTABLE)


def test_a_kernel(monkeypatch):
    """A row at the top of the kernel table takes over the products that it names."""
    from accessory.ops import dispatch, experts
    from accessory.ops.linear import grouped_linear

    calls = []

    def kernel(x, weight, count):
        calls.append(len(x))
        return torch.stack([x[0] @ weight[0].T])

    monkeypatch.setattr(experts, "of_ones_own", kernel, raising=False)
    row = dispatch.Kernel("grouped", "experts:of_ones_own", ("dense",), ("cpu",), rows=(1, 1))
    monkeypatch.setattr(dispatch, "TABLE", (row, *dispatch.TABLE))
    dispatch.find.cache_clear()
    try:
        weight = torch.randn(2, 5, 4)
        one, two = torch.randn(1, 4), torch.randn(2, 4)
        torch.testing.assert_close(grouped_linear(one, weight, torch.tensor([1, 0])), one @ weight[0].T)
        grouped_linear(two, weight, torch.tensor([1, 1]))
    finally:
        dispatch.find.cache_clear()
        dispatch._load.cache_clear()
    assert calls == [1]


def test_a_template(monkeypatch, tmp_path):
    from helpers.small_tokenizers import byte_level_folder

    from accessory.data import templates
    from accessory.data.template_base import Part, PartsTemplate
    from accessory.data.tokenizer import load_tokenizer

    class Arrow(PartsTemplate):
        name = "arrow"

        def turns(self, messages, tokenizer):
            return [Part(f"{m['role']}> {m['content']}\n", learn=m["role"] == "assistant") for m in messages]

        def header(self, messages):
            return [Part("assistant>")]

    monkeypatch.setitem(templates.TEMPLATE_CLASSES, "arrow", Arrow)
    template = templates.get_template("arrow")
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert template.text(dialogue[:1], prompt=True) == "user> Hi\nassistant>"
    tokenizer = load_tokenizer(byte_level_folder(tmp_path))
    ids, learn = template.encode(dialogue, tokenizer)
    assert tokenizer.decode([i for i, on in zip(ids, learn, strict=True) if on]) == "assistant> Ho\n"


def test_a_sampling_parameter():
    """The parameter forbids one token. Neither the runner nor the scheduler learns of it."""
    from dataclasses import dataclass

    from helpers.generating import answers, engine_over
    from helpers.sizes import TINY

    from accessory.engine.sampler import Sampler
    from accessory.engine.sampling_params import SamplingParams
    from accessory.nn.decoder import Decoder, init_weights

    @dataclass(frozen=True, kw_only=True)
    class Choosy(SamplingParams):
        never: int | None = None

    class Sampling(Sampler):
        def start(self, slot, params, *rest):
            super().start(slot, params, *rest)
            if params.never is not None:
                self._bias_S[slot] = {params.never: -torch.inf}

    decoder = Decoder(TINY, "sparse")
    init_weights(decoder, std=0.2)
    engine = engine_over(decoder.requires_grad_(False))
    runner = engine.executor.runner
    runner._sampler = Sampling(runner.about.max_running, TINY.vocab_size, "cpu")
    (free,) = answers(engine, [[1, 2, 3]], 4, Choosy())
    (held,) = answers(engine, [[1, 2, 3]], 4, Choosy(never=free[0]))
    logits_V = decoder(torch.tensor([[1, 2, 3]])).logits[0, -1]
    assert free[0] == int(logits_V.argmax())
    assert held[0] == int(logits_V.topk(2).indices[1])
    assert free[0] not in held


def test_a_field_of_a_recipe():
    from dataclasses import dataclass, fields

    from accessory.train.config import FinetuneConfig
    from accessory.train.options import NOT_NEGATIVE, option

    @dataclass(frozen=True, kw_only=True)
    class Longer(FinetuneConfig):
        patience: int = option(3, "evaluations without progress after which a run ends", NOT_NEGATIVE)

    config = Longer(pretrained_path=["m"], data_config="d.yaml", output_dir="o", patience=5)
    assert config.patience == 5
    assert next(f for f in fields(Longer) if f.name == "patience").metadata["help"].startswith("evaluations")
    with pytest.raises(ValueError, match=r"patience: got -1, but it must be at least 0"):
        Longer(pretrained_path=["m"], data_config="d.yaml", output_dir="o", patience=-1)


def test_a_loss_term():
    """The term pulls all trained parameters towards zero. Its gradient is known: 2 · weight · p."""
    from helpers.training import batches, make_decoder

    from accessory.parallel.mesh import DeviceMesh
    from accessory.train.trainer import LossWeights, Trainer

    class Pulled(Trainer):
        pull = 0.0

        def loss(self, *given):
            return super().loss(*given) + self.pull * sum(p.square().sum() for _, p in self.named)

    grads = []
    for pull in (0.0, 0.25):
        trainer = Pulled(make_decoder("sparse"), DeviceMesh(), LossWeights(0.01))
        trainer.pull = pull
        trainer.forward_backward(batches(0))
        grads.append({name: p.grad.clone() for name, p in trainer.named})
    for name, p in trainer.named:
        torch.testing.assert_close(grads[1][name], grads[0][name] + 0.5 * p.detach(), rtol=1e-4, atol=1e-6)


def test_a_logger(tmp_path, monkeypatch):
    from helpers import runs

    from accessory.train import loggers

    seen = []

    class Listed:
        def __init__(self, folder, config, resumed_at):
            seen.append(("opened", folder.name, resumed_at))

        def log(self, values, step):
            seen.append((step, "train/loss" in values))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(loggers.LOGGERS, "json", Listed)  # any package that is installed
    inputs = runs.write_inputs(tmp_path / "inputs")
    runs.finetune(inputs, tmp_path / "run", max_steps=1, loggers=["json"])
    assert seen == [("opened", "run", None), (1, True), "closed"]
