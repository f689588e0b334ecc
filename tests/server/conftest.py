"""The tiny model of the server's tests, with an adapter, and a server of it for each module."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import SEVEN, peft_args, random_adapter, save_adapter
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING

MAX_SEQ_LEN = 256


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Paths of a model and of an adapter to it."""
    pytest.importorskip("fastapi", reason="the server needs fastapi: pip install 'mixtral-accessory[serve]'")
    root = tmp_path_factory.mktemp("served")
    write_speaking(root / "model", SPEAKING)
    tensors = random_adapter(SPEAKING, targets=SEVEN, rank=4, std=0.3, seed=1)
    save_adapter(root / "adapter", tensors, peft_args(SPEAKING, rank=4))
    return root / "model", root / "adapter"


@pytest.fixture(scope="session")
def model(folders):
    from accessory.model.meta import MetaModel

    base, adapter = folders
    how = {"dtype": torch.float32, "device": "cpu", "max_seq_len": MAX_SEQ_LEN}
    return MetaModel.from_pretrained(base, adapters={"pirate": adapter}, **how)


@pytest.fixture(scope="module")
def server(model):
    from helpers.serving import serving

    with serving(model) as made:
        yield made
