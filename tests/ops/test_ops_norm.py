import pytest
import torch

from accessory.ops.norm import rms_norm


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e4])
def test_norm_is_its_definition_with_and_without_gradients(rows, scale):
    x, w = torch.randn(1, rows, 24) * scale, torch.randn(24)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(rms_norm(x, w, 1e-5), exact.float())
