"""Lazy tensors go to a GPU in blocks, whatever their strides and dtypes."""

import pytest
import torch

from accessory.checkpoint import copying
from accessory.checkpoint.files import read_pickle
from accessory.checkpoint.lazy import concat, rotary_to_interleaved

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
        "rotary": (rotary_to_interleaved(lazy, 2), rotary_to_interleaved(lazy, 2).load()),
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
