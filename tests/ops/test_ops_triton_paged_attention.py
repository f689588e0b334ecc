"""The kernels of the paged cache against the definition, in Triton's interpreter. tests/gpu runs them on a GPU."""

import pytest
import torch
from helpers.interpreted import interpret, others_slow
from helpers.paging import KERNEL_CASES as CASES
from helpers.paging import check_kernels as check

__all__ = ["CASES", "check"]  # for the interpreter

pytest.importorskip("triton", reason="triton is missing (extra: gpu)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs the kernels here")
@pytest.mark.parametrize("case", others_slow(CASES, "decodes", "mixed"))
def test_pages_in_the_interpreter(case):
    interpret(__file__, f"for fp8 in (False, True): t.check(t.CASES[{case!r}], fp8=fp8)")
