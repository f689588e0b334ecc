"""The tiny models of these tests, and ranks that hold one of them."""

from __future__ import annotations

import signal
import socket

import pytest
import torch
from helpers.random_models import hf_mixtral, write_speaking
from helpers.sizes import SPEAKING

from accessory.convert.convert import convert
from accessory.model.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

CUT = SPEAKING.replace(dim=64, hidden_dim=96, head_dim=8, max_seq_len=8192)
HOW = {"max_seq_len": 8192, "dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="session")
def oracle():
    """transformers' model of the weights in `speaking`. Nobody may change it."""
    return hf_mixtral(SPEAKING, std=0.2)


@pytest.fixture(scope="session")
def speaking(tmp_path_factory):
    """A folder of Hugging Face's layout. Nobody may change it."""
    path = tmp_path_factory.mktemp("speaking") / "hf"
    write_speaking(path, SPEAKING)
    return path


@pytest.fixture(scope="module")
def model(speaking):
    return MetaModel.from_pretrained(speaking, dtype=torch.float32, device="cpu", max_seq_len=256)


@pytest.fixture(scope="session")
def cut_folder(tmp_path_factory):
    """A model in two shards, of which each rank holds one. Nobody may change it."""
    root = tmp_path_factory.mktemp("wrapper")
    write_speaking(root / "hf", CUT)
    convert(root / "hf", root / "base", to="base", shards=2, progress=False)
    return root / "base"


@pytest.fixture(scope="session")
def expected(cut_folder):
    """The model of `wrapper` in this process."""
    return MetaModel.from_pretrained(cut_folder, **HOW)


@pytest.fixture(scope="session")
def wrapper(cut_folder):
    """A wrapper on a port of its own. Each new set of ranks must be able to open the same port.

    All modules share it, since starting ranks takes seconds. Who ends its ranks makes a call that starts them again.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with MultiGpuWrapper(cut_folder, gpus=2, master_port=port, **HOW) as wrapper:
        yield wrapper


@pytest.fixture
def no_hang():
    def stuck(*_):
        raise TimeoutError("the test took more than 100 s")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
