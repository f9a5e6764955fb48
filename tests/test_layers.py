"""The tree keeps its shape: imports go down, files and functions stay short, everything public is documented."""

import ast
from pathlib import Path

import pytest

from megatron_rdt.config import ENGINES

ROOT = Path(__file__).resolve().parent.parent
# From the bottom up; a module may import its own layer and those before it.
LAYERS = [
    "megatron_rdt.errors",
    "megatron_rdt.files",
    "megatron_rdt.locks",
    "megatron_rdt.untrusted_files",
    "megatron_rdt.terminal",
    "megatron_rdt.output_paths",
    "megatron_rdt.environment",
    "megatron_rdt.devices",
    "megatron_rdt.object_collectives",
    "megatron_rdt.config",
    "megatron_rdt.run_directory",
    "megatron_rdt.depth",
    "megatron_rdt.model",
    "megatron_rdt.data",
    "megatron_rdt.parallel",
    "megatron_rdt.checkpoint",
    "megatron_rdt.convert",
    "megatron_rdt.vllm_plugin",
    "megatron_rdt.inference",
    "megatron_rdt.evaluate",
    "megatron_rdt.planner",
    "megatron_rdt.train",
    "megatron_rdt.compare",
    "data_prep",
    "launch",
]
PREP_MAY_IMPORT = (
    "megatron_rdt.data",
    "megatron_rdt.errors",
    "megatron_rdt.files",
    "megatron_rdt.locks",
    "megatron_rdt.output_paths",
    "megatron_rdt.environment",
    "megatron_rdt.terminal",
    "data_prep",
)
SOURCES = sorted(p for package in ("megatron_rdt", "data_prep", "launch") for p in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(name: str) -> int:
    for index, prefix in enumerate(LAYERS):
        if name == prefix or name.startswith(prefix + "."):
            return index
    raise AssertionError(f"{name} belongs to no layer: add it to LAYERS")


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [n for n in names if n.split(".")[0] in ("megatron_rdt", "data_prep", "launch")]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    name = module_name(path)
    if name == "megatron_rdt":  # its lazy `load` is the one public shortcut
        return
    for imported in imports(path):
        if imported == "megatron_rdt":  # for its version
            continue
        assert layer(imported) <= layer(name), f"{name} imports {imported}, which is above it"
        if name.startswith("data_prep"):
            assert imported.startswith(PREP_MAY_IMPORT), f"{name} may not import {imported}"


def test_dask_is_imported_in_one_place() -> None:
    for path in SOURCES:
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        found = {name.split(".")[0] for name in names} & {"dask", "distributed"}
        assert not found or module_name(path) == "data_prep.jobs.dask_cluster", path


def test_no_cycles() -> None:
    known = {module_name(p): p for p in SOURCES}
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = {n if n in known else n.rpartition(".")[0] for n in imports(path)} & set(known)
        # A package's __init__ gathers its own modules.
        graph[name] = {t for t in targets if t != name and not name.startswith(t + ".")}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_short_and_documented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert isinstance(node, ast.ClassDef) or node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    methods = [m for c in public if isinstance(c, ast.ClassDef) for m in c.body if isinstance(m, ast.FunctionDef)]
    for node in [*public, *(m for m in methods if not m.name.startswith("_"))]:
        if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
            continue  # the implementation has the docstring
        assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_environment_is_read_in_one_place() -> None:
    for path in SOURCES:
        if module_name(path) != "megatron_rdt.environment":
            assert "os.environ" not in path.read_text(encoding="utf-8"), path


def names_an_engine(node: ast.AST) -> bool:
    """Return True if `node` is the name of an engine, or a test for the beginning of DeepSpeed's names."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value in ENGINES
    return isinstance(node, ast.Call) and ast.unparse(node).endswith(".startswith('zero')")


def test_engines_are_known_by_name_in_one_table() -> None:
    tables = {"megatron_rdt.config.engines", "megatron_rdt.parallel"}  # properties, and classes
    for path in SOURCES:
        if module_name(path) not in tables:
            found = [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if names_an_engine(node)]
            assert not found, f"{path}:{found}: ask config.engines for a property of the engine instead of its name"
