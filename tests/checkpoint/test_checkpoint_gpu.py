"""Lazy tensors go to a GPU in blocks, with any strides and dtype; quantised ones as they are stored."""

import pytest
import torch
from helpers.checkpoints import random_tensors, write_accessory

from accessory.build.network import NetworkSpec, build
from accessory.checkpoint import copying
from accessory.checkpoint.files import read_pickle
from accessory.checkpoint.folder import open_checkpoint
from accessory.checkpoint.lazy import concat
from accessory.checkpoint.rotary import to_interleaved
from accessory.config import ModelArgs, MoEArgs
from accessory.convert.quantize import quantize_checkpoint
from accessory.formats import FORMATS, Quant

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_bytes", [2**12, 2**23])
def test_copies_to_a_gpu_equal_the_file(tmp_path, dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(copying, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(copying, "_staging", copying._Staging())
    tensor = torch.randn(3 * 512, 700).bfloat16()
    torch.save({"a": tensor, "scalar": tensor[0, 0].clone(), "row": tensor[0].clone()}, tmp_path / "a.pth")
    read = read_pickle(tmp_path / "a.pth")
    lazy = read["a"]
    cases = {
        "plain": (lazy, tensor),
        "transposed": (lazy.t(), tensor.t()),
        "rows": (lazy.narrow(0, 100, 900), tensor[100:1000]),
        "columns, transposed": (lazy.narrow(1, 100, 300).t(), tensor[:, 100:400].t()),
        "joined": (concat([lazy, lazy.narrow(0, 3, 4)], 0).t(), torch.cat([tensor, tensor[3:7]]).t()),
        "rotary": (to_interleaved(lazy, 2), to_interleaved(lazy, 2).load()),
        "row": (read["row"], tensor[0]),
        "scalar": (read["scalar"], tensor[0, 0]),
    }
    for name, (view, expected) in cases.items():
        dst = torch.empty(expected.shape, dtype=dtype, device="cuda")
        view.copy_to(dst)
        assert torch.equal(dst.cpu(), expected.to(dtype)), name
        if expected.dim() == 2:
            turned = torch.empty(expected.shape[::-1], dtype=dtype, device="cuda")
            view.copy_to(turned.t())
            assert torch.equal(turned.cpu(), expected.t().to(dtype)), name


@pytest.mark.parametrize("implementation", ["base", "sparse"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_quantized_folder_is_what_quantizing_on_the_gpu_gives(tmp_path, format, implementation):
    """A folder that the CPU wrote holds what the GPU computes when it quantises the same weights while loading."""
    args = ModelArgs(
        dim=512, hidden_dim=768, n_layers=1, n_heads=8, n_kv_heads=4, vocab_size=64, moe=MoEArgs(num_experts=2)
    )
    tensors = random_tensors(args)
    source = write_accessory(tmp_path / "source", tensors, "sparse", args, world=1)
    quant = Quant.parse(format, output="int8")
    quantize_checkpoint(source, tmp_path / "out", quant, search=False, progress=False)
    opened, dense = open_checkpoint(tmp_path / "out"), open_checkpoint(source)

    def loaded(checkpoint, quant=None):
        spec = NetworkSpec(checkpoints=[checkpoint], args=args, implementation=implementation, quant=quant)
        return build(spec, device="cuda")

    stored = loaded(opened, quant=opened.quant)
    arrived = loaded(dense, quant=quant)
    for (name, one), (_, other) in zip(stored.named_parameters(), arrived.named_parameters(), strict=True):
        if name.endswith(("nested", "offset")):  # nf4-dq subtracts a mean, which a GPU sums in another order
            torch.testing.assert_close(one, other)
            continue
        alike = (one.view(torch.uint8) == other.view(torch.uint8)).float().mean()
        # int4: a GPU multiplies a group's span by 1/15. nf4-dq: a CPU rounds the scales on bitsandbytes' grid.
        assert alike == 1 or (format in ("int4", "nf4-dq") and alike > 0.99), (name, float(alike))
    meant = loaded(opened)
    tokens_BT = torch.arange(40, device="cuda").view(2, 20)
    with torch.inference_mode():
        want, got = meant(tokens_BT).logits, stored(tokens_BT).logits
    # Products in fp8 round their inputs too. If rounding sends a token to another expert, its logits truly differ.
    bound = 8e-2 if format == "fp8" else 2e-2
    error = (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1)
    assert error.median() <= bound, error
    assert (error <= 4 * bound).float().mean() >= 0.9, error
