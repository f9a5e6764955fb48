"""The sources of an export can be pasted into one file: their names are unique, and the project is imported at the top."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rdt.convert.hf_source import list_source_files, paste_model_source, split_source

PACKAGE = Path(__file__).resolve().parent.parent.parent / "megatron_rdt"
# Needed for training and planning only.
NOT_EXPORTED = {"model/compiling.py", "model/flops.py"}


def defined_names(text: str) -> Iterator[str]:
    """Names that a file defines at its top level: functions, classes and assigned names."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def clashes(files: dict[str, str]) -> list[str]:
    """A line for each top-level name that two or more of the files, by path, define or import as something else."""
    homes: dict[str, dict[str, str]] = defaultdict(dict)  # name -> file -> what it is there
    for path, text in files.items():
        for name in defined_names(text):
            homes[name][path] = path
        for statement in split_source(text)[0]:
            (node,) = ast.parse(statement).body
            assert isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names:
                origin = f"{getattr(node, 'module', '')}:{alias.name}"
                homes[alias.asname or alias.name.partition(".")[0]][path] = origin
    return [f"{name}: {' and '.join(found)}" for name, found in homes.items() if len(set(found.values())) > 1]


def test_top_level_names_are_unique() -> None:
    files = {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in list_source_files()}
    found = clashes(files)
    assert not found, "an export pastes these files into one namespace; rename one of:\n" + "\n".join(found)


def test_a_clash_names_both_files() -> None:
    first = '"""One."""\nimport math\nfrom a import b\n\ndef read() -> None: ...\nSIZE: int = 1\nLOW, HIGH = 0, 1\n'
    second = '"""Two."""\nfrom c import d as b\nimport math\n\nclass read: ...\nSIZE = 2\nHIGH = 3\n'
    assert clashes({"one.py": first, "two.py": second, "three.py": '"""Three."""\nother = 1\n'}) == [
        "read: one.py and two.py",
        "SIZE: one.py and two.py",
        "HIGH: one.py and two.py",
        "b: one.py and two.py",
    ]


def test_every_file_of_the_model_is_exported() -> None:
    """A new file of the model has its line in `PARTS`."""
    exported = {str(file.relative_to(PACKAGE)) for file in list_source_files()}
    files = {str(file.relative_to(PACKAGE)) for file in (PACKAGE / "model").rglob("*.py") if file.name != "__init__.py"}
    assert files - exported == NOT_EXPORTED


def test_the_pasted_file_imports_nothing_of_the_project() -> None:
    """Also within functions, where `split_source` does not look."""
    for node in ast.walk(ast.parse(paste_model_source())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if name.startswith("megatron_rdt")], ast.unparse(node)


def test_the_pasted_file_defines_names_before_their_use_at_import() -> None:
    transformers = pytest.importorskip("transformers")
    namespace: dict[str, object] = {"__name__": "modeling_rdt"}
    exec(compile(paste_model_source(), "modeling_rdt.py", "exec"), namespace)
    assert issubclass(namespace["RdtForCausalLM"], transformers.PreTrainedModel)  # type: ignore[arg-type]
