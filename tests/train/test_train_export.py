"""The finished folder gives the trainer's logits. It loads like any checkpoint, alone or after its base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import runs, started_runs

from accessory.checkpoint.folder import open_checkpoint
from accessory.convert.convert import convert
from accessory.convert.merge import merge
from accessory.errors import AccessoryError
from accessory.model.meta import MetaModel
from accessory.train.config import FinetuneConfig
from accessory.train.run import finetune

LORA = {"lora_rank": 4, "lora_alpha": 8.0}
TOKENS_BT = torch.arange(3, 43).view(2, 20)


@pytest.fixture
def trained(inputs, tmp_path, monkeypatch):
    """A function that runs with these changes and returns (the finished folder, the trainer's last logits)."""

    def run(name="run", **changes):
        from accessory.train import run as module

        kept = {}

        def keep(*arguments):
            kept["trainer"] = build_trainer(*arguments)
            return kept["trainer"]

        build_trainer = module._build_trainer
        with monkeypatch.context() as patch, runs.without_charts():
            patch.setattr(module, "_build_trainer", keep)
            final = finetune(FinetuneConfig(**runs.options(inputs, tmp_path / name, **{"epochs": 1.0, **changes})))
        decoder = kept["trainer"].decoder.eval()
        with torch.no_grad():
            return final, decoder(TOKENS_BT).logits

    return run


def logits(path, **options):
    model = MetaModel.from_pretrained(path, max_seq_len=64, device="cpu", dtype=torch.float32, **options)
    with torch.no_grad():
        return model.llma(TOKENS_BT).logits


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["mixtral", "mixtral_sparse"])
def test_a_full_finetune_is_a_checkpoint_like_any_other(inputs, trained, tmp_path, implementation):
    final, wanted = trained(llama_type=implementation)
    assert not torch.allclose(wanted, logits(str(inputs / "model")), atol=1e-2)  # it did learn
    close(logits(str(final)), wanted)
    for kind in ("mixtral", "mixtral_sparse"):
        close(logits(str(final), llama_type=kind), wanted)
    convert(final, tmp_path / "hf", to="hf", progress=False)
    close(logits(str(tmp_path / "hf")), wanted)
    from transformers import MixtralForCausalLM

    theirs = MixtralForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        close(theirs(TOKENS_BT).logits, wanted)


@pytest.mark.parametrize("kind", [pytest.param("mixtral_peft", marks=pytest.mark.slow), "mixtral_sparse_peft"])
def test_adapters_alone_are_loaded_behind_the_base(inputs, trained, tmp_path, kind):
    final, wanted = trained(llama_type=kind, **LORA)
    only, again = trained("only", llama_type=kind, only_save_trainable=True, **LORA)
    close(again, wanted)
    names = set(open_checkpoint(only, allow_partial=True).tensors)
    assert all("lora" in n or n.endswith("norm.weight") for n in names)
    assert names < set(open_checkpoint(final).tensors)
    base = str(inputs / "model")
    close(logits(str(final)), wanted)
    close(logits([base, str(only)]), wanted)
    for implementation in ("mixtral_peft", "mixtral_sparse_peft"):
        close(logits([base, str(only)], llama_type=implementation), wanted)
    merge([base, only], tmp_path / "merged", progress=False)
    assert not any("lora" in n for n in open_checkpoint(tmp_path / "merged").tensors)
    close(logits(str(tmp_path / "merged")), wanted)
    merge([final], tmp_path / "merged whole", progress=False)
    close(logits(str(tmp_path / "merged whole")), wanted)
    convert(tmp_path / "merged", tmp_path / "hf", to="hf", progress=False)
    close(logits(str(tmp_path / "hf")), wanted)


def test_biases_cannot_become_hugging_faces(inputs, trained, tmp_path, caplog):
    """A warning says so before the first step, and conversion fails. Inference and merging still work."""
    final, wanted = trained(bias_tuning=True, **LORA)
    (warning,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith("bias_tuning"))
    assert "Hugging Face" in warning
    close(logits(str(final)), wanted)
    with pytest.raises(AccessoryError, match="bias") as caught:
        convert(final, tmp_path / "hf", to="hf", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hf").exists()
    merge([final], tmp_path / "merged", progress=False)
    close(logits(str(tmp_path / "merged")), wanted)


def test_a_chain_is_gone_on_with(inputs, trained, tmp_path, caplog):
    """Training goes on with adapters, from a base and a folder with only the trained tensors."""
    base = str(inputs / "model")
    first, wanted = trained("first", llama_type="mixtral_sparse_peft", only_save_trainable=True, **LORA)
    chain = [base, str(first)]
    second, further = trained("second", pretrained_path=chain, only_save_trainable=True)
    assert not torch.allclose(further, wanted, atol=1e-3)
    close(logits([base, str(second)]), further)
    close(logits([*chain, str(second)]), further)
    said = [json.loads((Path(folder) / "meta.json").read_text())["trained_on"] for folder in (first, second)]
    assert said[0] == said[1] == {"name": base, "hash": said[0]["hash"]}
    assert "was trained on" not in caplog.text, "all these chains are right"


def test_the_dtype_is_that_of_the_network(trained):
    final, _ = trained(precision="bf16", max_steps=1, **LORA)
    only, _ = trained("only", precision="bf16", max_steps=1, only_save_trainable=True, **LORA)
    assert {t.dtype for t in open_checkpoint(final).tensors.values()} == {torch.bfloat16}
    assert {t.dtype for t in open_checkpoint(only, allow_partial=True).tensors.values()} == {torch.float32}


def test_model_parallel_ranks_write_a_shard_each(inputs, tmp_path):
    fields = runs.options(inputs, tmp_path / "two", max_steps=2, model_parallel_size=2, llama_type="mixtral")
    assert started_runs.start(fields, ranks=2).wait() == [0, 0]
    final = runs.finetune(inputs, tmp_path / "one", max_steps=2, llama_type="mixtral")
    shards = sorted(p.name for p in (tmp_path / "two" / "final").glob("consolidated.*"))
    assert shards == ["consolidated.00-of-02.model.pth", "consolidated.01-of-02.model.pth"]
    close(logits(str(tmp_path / "two" / "final")), logits(str(final)))


def test_the_tokenizer_that_was_learnt_with_comes_along(inputs, trained, tmp_path):
    shutil.copytree(inputs / "model", tmp_path / "other")
    config = (tmp_path / "other" / "tokenizer_config.json").read_text()
    (tmp_path / "other" / "tokenizer_config.json").write_text(config.replace("{", '{"mark": 1, ', 1))
    final, _ = trained(max_steps=1, tokenizer_path=str(tmp_path / "other"))
    assert '"mark"' in (final / "tokenizer_config.json").read_text()
    assert (final / "tokenizer.json").is_file()
