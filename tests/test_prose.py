"""First lines of docstrings name the thing or the action; a private helper with a one-word name says what it does."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rdt.errors import USE_ANOTHER

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("megatron_rdt", "data_prep", "launch", "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
QUESTIONS = ("What", "Which", "Whether", "Where", "How", "Of")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def relative_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def documented_nodes(path: Path) -> Iterator[tuple[str, int, str | None]]:
    """Name, line and docstring of a module, its classes and its functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield "module", 1, ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS):
            yield node.name, node.lineno, ast.get_docstring(node)


def field_help(path: Path) -> Iterator[tuple[str, int, str]]:
    """Name, line and help text of the fields of the dataclasses that are options: the string below each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for first, second in (
            zip(getattr(node, "body", []), getattr(node, "body", [])[1:]) if isinstance(node, ast.ClassDef) else ()
        ):
            if (
                isinstance(first, ast.AnnAssign)
                and isinstance(second, ast.Expr)
                and isinstance(second.value, ast.Constant)
            ):
                yield ast.unparse(first.target), second.lineno, str(second.value.value)


@pytest.mark.parametrize("path", SOURCES, ids=relative_name)
def test_no_docstring_begins_with_a_question(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}: {text.splitlines()[0]}"
        for name, line, text in [*documented_nodes(path), *field_help(path)]
        if text and text.split(maxsplit=1)[0].rstrip(",:") in QUESTIONS
    ]
    assert not found, "name the thing with a noun or the action with a verb:\n" + "\n".join(found)


@pytest.mark.parametrize("path", [p for p in SOURCES if "tests" not in p.parts], ids=relative_name)
def test_private_one_word_functions_are_documented(path: Path) -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for name, line, text in documented_nodes(path)
        if name.startswith("_") and not name.startswith("__") and "_" not in name.strip("_") and not text
    ]
    assert not bare, "rename to a verb and its object, or add a docstring:\n" + "\n".join(bare)


def test_the_way_out_of_a_damaged_checkpoint_is_spelled_out_once() -> None:
    sources = [path for path in SOURCES if relative_name(path).startswith("megatron_rdt/")]
    assert [relative_name(path) for path in sources if USE_ANOTHER in path.read_text()] == ["megatron_rdt/errors.py"]
