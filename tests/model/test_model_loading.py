"""Arguments that no model can be loaded with: one line each, before any file is opened or any rank is started."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from accessory.engine.rank_executor import RankExecutor
from accessory.engine.runner import About
from accessory.errors import AccessoryError
from accessory.launch.rank_processes import RankProcess
from accessory.model.loading import Loading
from accessory.model.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@pytest.fixture
def no_ranks(monkeypatch):
    def started(*_):
        raise AssertionError("a rank was started")

    monkeypatch.setattr(RankProcess, "__init__", started)


WRONG = [
    ({"pretrained_path": None}, "pretrained_path: got None"),
    ({"pretrained_path": 5}, "pretrained_path: got 5"),
    ({"pretrained_path": ["a", 5]}, "pretrained_path: got 5"),
    ({"pretrained_path": []}, "pretrained_path: got an empty list"),
    ({"pretrained_path": ""}, "pretrained_path: got ''"),
    ({"llama_config": 3}, "llama_config: got 3"),
    ({"tokenizer_path": 3}, "tokenizer_path: got 3"),
    ({"llama_type": "foo"}, "llama_type: got 'foo'"),
    ({"with_visual": "yes"}, "with_visual: got 'yes'"),
    ({"image_transform": "x"}, "image_transform: got 'x'"),
    ({"max_seq_len": "x"}, "max_seq_len: got 'x'"),
    ({"max_seq_len": True}, "max_seq_len: got True"),
    ({"dtype": "bf61"}, "dtype: got 'bf61'"),
    ({"dtype": torch.int8}, "dtype: got torch.int8"),
    ({"dtype": 16}, "dtype: got 16"),
    ({"device": "toaster"}, "device: got 'toaster'"),
    ({"device": "cuda:99"}, "device: got 'cuda:99'"),
    ({"device": 99}, "device: got 99"),
    ({"device": True}, "device: got True"),
    ({"device": torch.device("meta")}, "device: got device"),
    pytest.param({"device": "cuda"}, "device: got 'cuda'", marks=NO_GPU),
    ({"quant": 7}, "quant: got 7"),
    ({"quant": ["int8"]}, "quant: got ['int8']"),
    ({"quant_attention": "int3"}, "quant_attention: got 'int3'"),
    ({"cache_dtype": "bf16"}, "cache_dtype: got 'bf16'"),
    ({"cache_dtype": torch.float8_e4m3fn}, "cache_dtype: got torch.float8"),
    ({"cache_gb": 0}, "cache_gb: got 0"),
    ({"cache_gb": -1.5}, "cache_gb: got -1.5"),
    ({"cache_gb": float("nan")}, "cache_gb: got nan"),
    ({"cache_gb": float("inf")}, "cache_gb: got inf"),
    ({"cache_gb": True}, "cache_gb: got True"),
    ({"cache_gb": "all"}, "cache_gb: got 'all'"),
    ({"deterministic": 1}, "deterministic: got 1"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_one_line_names_the_argument(given, message, no_ranks):
    arguments = {"pretrained_path": Path("nowhere"), **given}
    for load in (MetaModel.from_pretrained, lambda **how: MultiGpuWrapper(**how, gpus=2)):
        with pytest.raises(AccessoryError) as error:
            load(**arguments)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["fp32", "float32", torch.float32])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_names_and_torchs_own_objects_both_do(speaking, dtype, device):
    model = MetaModel.from_pretrained(speaking, dtype=dtype, device=device)
    assert model.llma.tok_embeddings.weight.dtype == torch.float32
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus": 99}, "moe.num_experts: got 4, but it must be a multiple of the number of shards or ranks, 99"),
        ({"gpus": 99, "llama_type": "mixtral_sparse"}, "hidden_dim: got "),
        ({"gpus": 2, "max_seq_len": 10**8}, "max_seq_len: got 100000000, but the model is made for 512 positions"),
        ({"gpus": 2, "master_port": 99999999}, "master_port: got 99999999, but a port lies in 0 … 65535"),
        ({"gpus": 2, "master_port": -4}, "master_port: got -4, but a port lies in 0 … 65535"),
    ],
)
def test_no_rank_starts_for_what_cannot_work(speaking, given, message, no_ranks):
    with pytest.raises(AccessoryError) as error:
        MultiGpuWrapper(speaking, device="cpu", **{"llama_type": "mixtral", **given})
    assert str(error.value).startswith(message)


def test_more_ranks_than_cores_are_warned_of(speaking, monkeypatch, caplog):
    monkeypatch.setattr("accessory.model.multi_gpu_wrapper.cores", lambda: 1)
    monkeypatch.setattr(RankExecutor, "load", lambda self: About(2, 1, 1, on_cpu=True))
    with caplog.at_level(logging.WARNING):
        MultiGpuWrapper(speaking, gpus=2, device="cpu")
    assert "2 ranks share 1 cores" in caplog.text


def test_positions_far_beyond_the_models_are_refused_and_some_beyond_warned_of(speaking, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        Loading(pretrained_path=speaking, max_seq_len=4096).open()  # the default is no wish for more
        assert not caplog.text
        Loading(pretrained_path=speaking, max_seq_len=4097).open()
        assert "max_seq_len: got 4097, but the model is made for 512 positions" in caplog.text
        with pytest.raises(AccessoryError, match=r"^max_seq_len: got 200000, but the model is made for 512 positions"):
            Loading(pretrained_path=speaking, max_seq_len=200_000).open()
        (tmp_path / "longer.json").write_text('{"max_seq_len": 200000}')
        Loading(pretrained_path=speaking, max_seq_len=200_000, llama_config=tmp_path / "longer.json").open()


def test_on_a_cpu_the_cores_compute(speaking, monkeypatch):
    calls = []
    for module in ("meta", "multi_gpu_wrapper"):
        monkeypatch.setattr(f"accessory.model.{module}.use_cores", lambda: calls.append(1))
    monkeypatch.setattr(RankExecutor, "load", lambda self: About(2, 1, 1, on_cpu=True))
    MetaModel.from_pretrained(speaking, device="cpu")
    MultiGpuWrapper(speaking, gpus=2, device="cpu")
    assert calls == [1, 1]
