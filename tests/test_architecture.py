"""The house rules, read off the sources: who imports whom, what is imported when, and how long files are."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "accessory"
MODULES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))

# Imports point down only, and folders on one floor never import each other. docs/architecture.md shows the same table.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "__init__",
        "arguments",
        "command_line",
        "config",
        "counts",
        "errors",
        "formats",
        "limits",
        "progress",
        "vision_config",
    ),
    ("ops",),
    ("nn",),
    ("parallel", "adapt", "launch"),
    ("checkpoint", "data", "planner"),
    ("build",),
    ("engine", "train", "convert"),
    ("model",),
    ("server", "bench"),
    ("commands", "demos", "tools", "exps", "configs"),
)
# The doors: they may start anything, and nothing but another door may import them.
DOORS = ("cli", "__main__", "main_finetune")
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# Kernels need their language's decorators while the module is read; these modules are themselves imported in functions.
KERNELS = "ops/triton/"
SERVER = "server/"  # the same of routes and of the models of requests
# Modules that `accessory --help` reads: no third-party package, so that it answers at once.
LIGHT = (
    "__init__.py", "__main__.py", "arguments.py", "cli.py", "command_line.py", "config.py", "errors.py", "formats.py",
    "limits.py", "vision_config.py",
    "launch/__init__.py", "launch/ending.py", "launch/environment.py", "launch/gpus.py", "launch/speaking.py",
    "model/__init__.py", "model/options.py",
    "commands/__init__.py", "commands/bench_options.py", "commands/checkpoint_options.py", "commands/data_options.py",
    "commands/demo_options.py", "commands/finetune_options.py", "commands/interrupting.py", "commands/outcome.py",
    "commands/plan_options.py", "commands/serve_options.py", "commands/text_options.py",
    "data/template_names.py",
)  # fmt: skip
DISTRIBUTION_TO_IMPORT = {"pyyaml": "yaml"}
LINES = 400
EXCUSE = "longer than 400 lines because"


@dataclass(frozen=True)
class Import:
    module: str
    name: str  # `module` plus the imported name, which may be a module itself
    line: int
    at_module_level: bool  # run when the module is imported
    for_types: bool  # under `if TYPE_CHECKING:`


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix()


def imports_of(tree: ast.Module, package: str = "accessory") -> Iterator[Import]:
    """Yield every import in `tree`, a module that lies in `package`."""

    def visit(node: ast.AST, at_module_level: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, alias.name, node.lineno, at_module_level, for_types)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from accessory import nn` imports accessory.nn
                whole = f"{module}.{alias.name}" if module == "accessory" else module
                yield Import(whole, f"{module}.{alias.name}", node.lineno, at_module_level, for_types)
        inside = at_module_level and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types = for_types or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr):  # there is no import in an expression
                yield from visit(child, inside, types)

    yield from visit(tree, True, False)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@dataclass(frozen=True)
class Source:
    """What the tests ask of a file, which is parsed once for all of them."""

    lines: int
    docstring: str | None
    imports: list[Import]
    loads: list[ast.Call]  # calls of something that is called load


@functools.cache
def source_of(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return Source(
        len(text.splitlines()),
        ast.get_docstring(tree),
        list(imports_of(tree, ".".join(path.relative_to(ROOT).parts[:-1]))),
        [call for call in calls if getattr(call.func, "attr", None) == "load"],
    )


def own_imports(path: Path) -> list[Import]:
    return source_of(path).imports


def part_of(module: str) -> str:
    """The folder or module directly in the package that `accessory.…` belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (parts[1] in FLOOR or parts[1] in DOORS) else "__init__"


def top_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def core_packages() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower() for line in project["dependencies"]}
    return {DISTRIBUTION_TO_IMPORT.get(name, name.replace("-", "_")) for name in names}


# One test reads all files: a test of each would take longer to begin and to end than to run.


def test_imports_point_down():
    wrong = []
    for path in MODULES:
        here = top_of(path)
        for found in () if here in DOORS else own_imports(path):
            if found.module.split(".")[0] != "accessory":
                continue
            there = part_of(found.module)
            # Modules of floor 0 may import each other. On all other floors they may not.
            if there in DOORS or FLOOR[there] > FLOOR[here] or (there != here and FLOOR[there] == FLOOR[here] > 0):
                wrong.append(f"{name_of(path)}:{found.line}, floor {FLOOR[here]}, imports {found.module}")
    assert not wrong, "a module may import lower floors and its own folder only"


def graph_of_files() -> dict[str, set[str]]:
    """Map each module of the package to those it imports: at its top, inside functions, or for types."""
    known = {module_of(path): path for path in MODULES}
    graph = {}
    for module, path in known.items():
        found = {name for i in own_imports(path) for name in (i.module, i.name)}
        graph[module] = (found & known.keys()) - {module}
    return graph


def circles_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, directly or through others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            if (module := todo.pop()) not in seen:
                seen.add(module)
                todo += graph[module]
        reached[start] = seen
    circles = {tuple(sorted(n for n in graph if n in reached[m] and m in reached[n])) for m in graph if m in reached[m]}
    return [list(circle) for circle in sorted(circles)]


def test_files_make_no_circles():
    assert circles_of(graph_of_files()) == []


def test_a_circle_is_found_wherever_its_imports_stand():
    assert circles_of({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}) == [["b", "c"], ["d"]]
    inside = {i.name for i in imports_of(ast.parse("def f():\n    from accessory.nn import moe"), "accessory.ops")}
    assert inside == {"accessory.nn.moe"}


def test_every_folder_and_module_has_its_floor():
    lying = {top_of(path) for path in MODULES}
    assert lying <= set(FLOOR) | set(DOORS), "give it a floor here and in docs/architecture.md"


def test_what_help_reads_imports_only_the_standard_library():
    heavy = [
        f"{name}:{found.line} {found.module}"
        for name in LIGHT
        for found in own_imports(PACKAGE / name)
        if found.at_module_level
        and not found.for_types
        and not (found.module.split(".")[0] in sys.stdlib_module_names or found.module.split(".")[0] == "__future__")
        and not (found.module.startswith("accessory") and part_of(found.module) in (*FLOORS[0], *DOORS))
        and found.module.removeprefix("accessory.").replace(".", "/") + ".py" not in LIGHT
    ]
    assert not heavy


def test_the_package_imports_no_example():
    assert not [
        name_of(path) for path in MODULES for found in own_imports(path) if "examples" in found.module.split(".")
    ]


def test_optional_packages_are_imported_where_they_are_used():
    core = core_packages() | {"accessory", "__future__"}
    early = [
        f"{name_of(path)}:{found.line} {found.module}"
        for path in (*MODULES, *EXAMPLES)
        if not name_of(path).startswith((KERNELS, SERVER))
        for found in own_imports(path)
        if found.at_module_level
        and not found.for_types
        and (top := found.module.split(".")[0]) not in sys.stdlib_module_names
        and top not in core | {path.relative_to(ROOT).parts[0]}
    ]
    assert not early, f"import it in a function; at module level only {sorted(core)}"


def test_nothing_that_loads_a_model_waits_for_the_class_of_sharded_tensors():
    """torch takes nearly a second to import it. `parallel.sharded` may, and is itself imported where it shards."""
    found = {
        name_of(path)
        for path in MODULES
        for i in own_imports(path)
        if i.at_module_level and not i.for_types
        if i.name.startswith("torch.distributed.tensor") or i.module == "accessory.parallel.sharded"
    }
    assert found == {"parallel/sharded.py"}


def test_files_are_short_and_say_what_they_are():
    sources = {name_of(path): source_of(path) for path in (*MODULES, *EXAMPLES)}
    silent = [name for name, source in sources.items() if not source.docstring]
    assert not silent, "a module begins with what it is for"
    long = [name for name, source in sources.items() if source.lines > LINES and EXCUSE not in source.docstring]
    assert not long, f"split it, or say in its docstring: {EXCUSE} …"


def test_no_pickle_runs_code():
    unsafe = []
    for path in (*MODULES, *EXAMPLES):
        for call in source_of(path).loads:
            if ast.unparse(call.func) in ("torch.load", "torch.serialization.load"):
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
                unsafe += [] if safe else [f"{name_of(path)}:{call.lineno}: torch.load without weights_only=True"]
        for found in own_imports(path):
            if found.module.split(".")[0] in ("pickle", "dill", "joblib"):
                unsafe.append(f"{name_of(path)}:{found.line} {found.module}")
    assert not unsafe


def test_the_reader_of_imports_sees_what_it_should():
    source = """
import os, torch.nn as nn
from . import loader
from ..nn.moe import MoE
from accessory import nn, __version__
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from accessory.model.meta import MetaModel
try:
    import triton
except ImportError:
    pass
class A:
    import yaml
    def f(self):
        import gguf
"""
    found = {i.module: (i.at_module_level, i.for_types) for i in imports_of(ast.parse(source), "accessory.checkpoint")}
    assert found == {
        "os": (True, False),
        "torch.nn": (True, False),
        "accessory.checkpoint": (True, False),
        "accessory.nn.moe": (True, False),
        "accessory.nn": (True, False),
        "accessory.__version__": (True, False),
        "typing": (True, False),
        "accessory.model.meta": (True, True),
        "triton": (True, False),
        "yaml": (True, False),
        "gguf": (False, False),
    }
    assert [part_of(m) for m in ("accessory.nn.moe", "accessory.__version__", "accessory")] == ["nn"] + 2 * ["__init__"]


def test_core_packages_are_read_from_the_project_file():
    assert {"torch", "numpy", "yaml"} <= core_packages()
    assert not {"triton", "gguf", "transformers", "jinja2", "huggingface_hub", "gradio"} & core_packages()


@pytest.mark.parametrize("name", ["8x7b", "8x22b"])
def test_shipped_configurations_are_the_presets(name):
    from accessory.config import PRESETS, ModelArgs

    assert ModelArgs.from_files(PACKAGE / "configs" / f"{name}.json") == PRESETS[name]
