"""What kernels can use on this machine: Triton with what it compiles with, and a CPU's AMX."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
from functools import cache

log = logging.getLogger(__name__)


@cache
def has_triton() -> bool:
    """Whether Triton is installed and finds what it compiles with; the other kernels run without it."""
    return importlib.util.find_spec("triton") is not None and triton_lacks() is None


@cache
def has_amx() -> bool:
    """Whether this machine's CPU has AMX, and the operating system lets programs use it."""
    import torch

    return torch.cpu._is_amx_tile_supported()


def triton_lacks() -> str | None:
    """What Triton needs to start its kernels and this machine lacks; None if nothing.

    Its own message is a traceback at the first product, after the weights are loaded.
    """
    if os.name == "nt":  # there, Triton brings a compiler
        return None
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler (install gcc, or name one in CC)"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "Python.h (install the headers of this Python: python3-dev, python3-devel)"
    return None


def warn_of_slow_kernels() -> None:
    """Warn where Triton is installed and its kernels cannot be used. Meant for a GPU, before the weights are loaded."""
    if importlib.util.find_spec("triton") is not None and (lacking := triton_lacks()) is not None:
        log.warning("Triton lacks %s: torch's own kernels are used, which are slower", lacking)
