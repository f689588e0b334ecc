"""Kernels run on the card of their tensors: without a GPU, what the launchers ask of torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import accessory.ops
from accessory.ops.triton.card import on_its_card

KERNELS = sorted((Path(accessory.ops.__file__).parent / "triton").glob("*.py"))


@pytest.fixture
def current(monkeypatch):
    """torch with a current device 0, which `torch.cuda.device` changes."""
    state = SimpleNamespace(index=0, entered=0)

    @contextmanager
    def device(wanted):
        before, state.index = state.index, wanted.index
        state.entered += 1
        yield
        state.index = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.index)
    monkeypatch.setattr(torch.cuda, "device", device)
    return state


@pytest.mark.parametrize(("name", "card", "entered"), [("cuda:1", 1, 1), ("cuda:0", 0, 0), ("cpu", 0, 0)])
def test_a_launcher_runs_on_the_card_of_its_first_argument(current, name, card, entered):
    launch = on_its_card(lambda first, other, *, named: (current.index, other, named))
    assert launch(SimpleNamespace(device=torch.device(name)), 2, named=3) == (card, 2, 3)
    assert (current.index, current.entered) == (0, entered)


NAMES = """
import importlib, sys
from accessory.ops.triton.card import name_kernels
modules = [f"accessory.ops.triton.{name}" for name in sys.argv[1:]]
for name in modules:
    here = vars(importlib.import_module(name))
    name_kernels(name)
    for value in list(here.values())[::-1]:  # as if its last kernel were used first
        getattr(value, "cache_key", None)
kernels = {f"{name} {v}": v for name in modules for v in vars(sys.modules[name]).values() if hasattr(v, "cache_key")}
assert len(kernels) > 90, len(kernels)
print(*sorted(f"{name} {kernel.cache_key}" for name, kernel in kernels.items()), sep="\\n")
"""


def test_the_names_of_kernels_do_not_follow_from_which_one_comes_first():
    pytest.importorskip("triton")
    modules = [path.stem for path in KERNELS if path.stem not in ("__init__", "card")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    orders = [
        subprocess.Popen([sys.executable, "-c", NAMES, *order], env=environment, text=True, stdout=subprocess.PIPE)
        for order in (modules, ["grouped_experts", *modules[::-1]])
    ]
    one, other = (process.communicate()[0].splitlines() for process in orders)
    assert [process.returncode for process in orders] == [0, 0]
    assert one == other


def functions_that_launch(tree: ast.Module) -> dict[str, bool]:
    """Every function that launches a kernel, itself or through a function beside it; whether it runs on its card."""
    functions = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
    kernels = {n for n, f in functions.items() if any("jit" in ast.unparse(d) for d in f.decorator_list)}
    launching = {
        n
        for n, f in functions.items()
        if n not in kernels
        and any(isinstance(c, ast.Call) and isinstance(c.func, ast.Subscript) and "kernel" in ast.unparse(c.func)
                for c in ast.walk(f))
    }  # fmt: skip
    called = {n: {ast.unparse(c.func) for c in ast.walk(f) if isinstance(c, ast.Call)} for n, f in functions.items()}
    through = {n for n in functions if n not in kernels and called[n] & launching}
    return {
        n: any(ast.unparse(d) == "on_its_card" for d in functions[n].decorator_list)
        for n in launching | through
        if not n.startswith("_")
    }


def test_every_launcher_of_the_package_does():
    found = {f"{p.stem}.{n}": on for p in KERNELS for n, on in functions_that_launch(ast.parse(p.read_text())).items()}
    assert set(found) == {
        "decode_experts.decode_experts", "packed.dequantize", "packed.linear", "packed.decode_experts",
        "packed_grouped.product", "packed_grouped.gradient", "grouped.product", "low_rank.up_terms",
        "low_rank.down_terms", "low_rank.add_row_by_row", "paged_attention.attention",
        "paged_attention.fixed_attention", "paged_attention.rotate_and_write",
        "add_norm.add_rms_norm", "add_norm.add_norm_route",
        "rows.linear", "grouped_experts.sort_pairs", "grouped_experts.up",
        "grouped_experts.down", "grouped_experts.experts_in_tiles", "grouped_experts.linear", "prompt_experts.gate",
        "prompt_experts.combine", "prompt_experts.gate_backward", "grouped_tma.product", "grouped_tma.gradient",
        "grouped_tma.sum_of_terms",
        "grouped_tma.weight_gradient", "cross_entropy.cross_entropy", "norm_backward.norm_backward", "rope.turn",
        "adamw.update",
    }  # fmt: skip
    assert all(found.values()), found
