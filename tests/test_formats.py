"""The bytes of quantised formats, against the tensors that hold them."""

import itertools

import pytest
import torch

from accessory.errors import ConfigError
from accessory.formats import FORMATS, packed_bytes
from accessory.ops.quantized import packed_shapes


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 128), (7, 256), (96, 1024)])
def test_packed_bytes_are_those_of_the_tensors(format, shape):
    tensors = packed_shapes(format, shape).values()
    assert packed_bytes(format, *shape) == sum(torch.Size(s).numel() * dtype.itemsize for s, dtype in tensors)


def test_rows_without_whole_groups_are_refused_as_quantizing_does():
    for format, columns in itertools.product(FORMATS, (64, 96, 128, 192)):
        try:
            packed_shapes(format, (2, columns))
        except ConfigError:
            with pytest.raises(ConfigError, match=rf"^quant: {format} .* {columns}; use fewer ranks"):
                packed_bytes(format, 2, columns)
        else:
            packed_bytes(format, 2, columns)
