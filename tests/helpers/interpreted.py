"""Helpers for tests that run Triton kernels without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor


def interpret(test_file: str, statement: str) -> None:
    """Run `statement`, in which `t` is the test's own module, in Triton's interpreter.

    Triton decides at import whether it interprets, so the statement runs in a separate process.
    """
    test = Path(test_file)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        f"import torch, {test.stem} as t\n"
        f"{statement}\n"
    )  # fmt: skip
    command = [sys.executable, "-c", code, str(test.parent), str(test.parents[1])]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def others_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Values of a parameter, of which all but the `quick` ones are left to the slow tests: interpreting takes long."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def multiply_rows_alike() -> None:
    """Have Triton's interpreter give a row of a product the same bits at any place in its tile, as tensor cores do.

    BLAS sums a matrix's rows in different orders, by their places and the CPU. Sums in fp64 round to the same fp32.
    """
    import numpy

    matmul = numpy.matmul

    def rounded(a: numpy.ndarray, b: numpy.ndarray, dtype: type = numpy.float32) -> numpy.ndarray:
        return matmul(a, b, dtype=numpy.float64).astype(dtype)

    numpy.matmul = rounded


def relative(got: Tensor, want: Tensor) -> float:
    """The norm of the error divided by the norm of `want`, in fp64."""
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-9))
