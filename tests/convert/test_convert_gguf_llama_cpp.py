"""GGUF files of mixtures in llama.cpp itself: it reads our tokenizers as we do, and computes and writes the same.

llama-cpp-python must be installed, or its package lie on PYTHONPATH and llama.cpp's libraries in LLAMA_CPP_LIB_PATH.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import checkpoints as make
from helpers.random_models import write_speaking
from helpers.sizes import SPEAKING
from helpers.small_tokenizers import byte_level_folder, mixtral_json_folder

from accessory.config import ModelArgs, MoEArgs
from accessory.convert.convert import convert
from accessory.data.tokenizer import load_tokenizer
from accessory.model.meta import MetaModel

pytestmark = pytest.mark.long
pytest.importorskip("gguf")

ARGS = SPEAKING.replace(dim=64, hidden_dim=96, head_dim=8)
PROMPTS = ["The capital of France is", "def f(x):\n    return", "Größe, 你好 and 🙂", "don't  stop at 12345"]


@pytest.fixture(scope="module")
def llama():
    package = pytest.importorskip("llama_cpp", reason="llama.cpp is missing: pip install llama-cpp-python")
    if where := os.environ.get("LLAMA_CPP_LIB_PATH"):  # libraries built for any processor load its kernels from files
        for file in Path(where).glob("libggml.*"):
            load = getattr(ctypes.CDLL(str(file)), "ggml_backend_load_all_from_path", None)
            if load is not None:
                load(where.encode())
    return lambda file: package.Llama(str(file), n_ctx=256, n_threads=2, logits_all=True, verbose=False)


def write_fp16(folder: Path, args: ModelArgs) -> Path:
    """A random network whose numbers are exact in fp16; its logits are some units large."""
    write_speaking(folder / "fp32", args, std=0.1)
    convert(folder / "fp32", folder / "fp16", to="hf", dtype="fp16", progress=False)
    return folder / "fp16"


def difference_and_margin(theirs, ours: MetaModel, ids: list[int]) -> tuple[float, float]:
    """The largest difference between the logits of `ids`, and the smallest one between our two likeliest tokens."""
    theirs.reset()
    theirs.eval(ids)
    (logits_TV,) = ours.compute_logits([ids])
    first_T, second_T = logits_TV.topk(2).values.unbind(-1)
    return float(np.abs(theirs.scores[: len(ids)] - logits_TV.numpy()).max()), float((first_T - second_T).min())


def test_llama_cpp_computes_the_same_logits_and_writes_the_same(llama, tmp_path):
    source = write_fp16(tmp_path, ARGS)
    convert(source, tmp_path / "m.gguf", to="gguf", progress=False)
    theirs, ours = llama(tmp_path / "m.gguf"), MetaModel.from_pretrained(str(source), dtype="fp32", max_seq_len=256)
    same = []
    for prompt in PROMPTS:
        ids = ours.tokenizer.encode(prompt, True)
        assert theirs.tokenize(prompt.encode(), add_bos=True, special=False) == ids
        (answer,) = ours.complete([prompt], max_gen_len=16)
        difference, margin = difference_and_margin(theirs, ours, [*ids, *answer.token_ids])
        print(f"f16: largest difference {difference:.1e}, smallest margin {margin:.1e}")
        assert difference < 1e-2  # llama.cpp rounds activations and its cache to fp16
        text = theirs(prompt, max_tokens=16, temperature=0.0, repeat_penalty=1.0)["choices"][0]["text"]
        assert text == answer.text or margin < 2 * difference  # a random network nearly draws lots at times
        same.append(text == answer.text)
    assert sum(same) >= 2


@pytest.mark.parametrize(("type", "most"), [("bf16", 0.05), ("q8_0", 0.1)])
def test_other_types_compute_nearly_the_same(llama, tmp_path, type, most):
    # A token visits all experts, so that no rounding of activations can change which ones.
    source = write_fp16(tmp_path, ARGS.replace(moe=MoEArgs(num_experts=4, num_experts_per_tok=4)))
    convert(source, tmp_path / "m.gguf", to="gguf", type=type, progress=False)
    convert(tmp_path / "m.gguf", tmp_path / "again", to="hf", progress=False)
    ours = MetaModel.from_pretrained(str(tmp_path / "again"), dtype="fp32", max_seq_len=256)
    difference, _ = difference_and_margin(llama(tmp_path / "m.gguf"), ours, ours.tokenizer.encode(PROMPTS[0], True))
    print(f"{type}: largest difference {difference:.1e}")
    assert difference < most  # llama.cpp rounds activations as the weights are rounded


@pytest.mark.parametrize("form", [mixtral_json_folder, byte_level_folder])
def test_llama_cpp_reads_other_tokenizers_as_we_do(llama, tmp_path, form):
    folder = form(tmp_path / "source")
    rows = load_tokenizer(folder).vocab_size + 2
    args = make.ARGS.replace(vocab_size=rows)
    shutil.copytree(folder, tmp_path / "whole", dirs_exist_ok=True)
    make.write_hf(tmp_path / "whole", make.random_tensors(args), args)
    convert(tmp_path / "whole", tmp_path / "m.gguf", to="gguf", progress=False)
    theirs, ours = llama(tmp_path / "m.gguf"), load_tokenizer(folder)
    for text in PROMPTS:
        assert theirs.tokenize(text.encode(), add_bos=ours.add_bos, special=False) == ours.encode(text, ours.add_bos)
