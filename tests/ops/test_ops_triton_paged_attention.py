"""The kernels of the paged cache against the definition, in Triton's interpreter. tests/gpu runs them on a GPU."""

import pytest
import torch
from helpers.interpreted import interpret
from helpers.paging import KERNEL_CASES as CASES
from helpers.paging import check_kernels as check

__all__ = ["CASES", "check"]  # for the interpreter

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
@pytest.mark.parametrize("fp8", [False, True])
def test_pages_in_the_interpreter(fp8):
    interpret(__file__, f"for case in t.CASES.values(): t.check(case, fp8={fp8})")
