"""Documents are true: the README's commands run as written, links, anchors and paths exist, recipes match the code."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_rdt.config import check_config, load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("megatron_rdt/*/__init__.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def blocks(page: Path, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [content for kind, content in fences if kind == language]


@dataclass
class Recipe:
    """A recipe of CONTRIBUTING.md.

    Attributes:
        files: text of each new file, by path.
        edits: path, old text and new text of each change of a file.
    """

    title: str
    files: dict[str, str] = field(default_factory=dict)
    edits: list[tuple[str, str, str]] = field(default_factory=list)

    def apply(self, root: Path) -> None:
        """Write the files below `root` and change those that are there; each old text must occur once."""
        for path, old, new in self.edits:
            text = (root / path).read_text(encoding="utf-8")
            message = f"CONTRIBUTING.md, {self.title}: {path} has {text.count(old)} times, not once:\n{old}"
            assert text.count(old) == 1, message
            (root / path).write_text(text.replace(old, new), encoding="utf-8")
        for path, text in self.files.items():
            (root / path).write_text(text, encoding="utf-8")


def read_recipes() -> list[Recipe]:
    """Parse CONTRIBUTING.md: python blocks are new files, diff blocks are changes, both with their path on top."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipes = []
    for section in re.split(r"^### ", text.split("\n## Glossary")[0], flags=re.MULTILINE)[1:]:
        recipe = Recipe(section.splitlines()[0])
        for kind, path, content in re.findall(r"^```(python|diff)\n# (\S+)\n(.*?)^```$", section, re.M | re.S):
            if kind == "python":
                recipe.files[path] = content
                continue
            for hunk in split_changes(content):
                old = "\n".join(line[1:] for line in hunk if line[0] in "- ")
                new = "\n".join(line[1:] for line in hunk if line[0] in "+ ")
                recipe.edits.append((path, old, new))
        recipes.append(recipe)
    return recipes


def split_changes(content: str) -> list[list[str]]:
    """Split the lines of a diff block into changes: each has old lines (- or space) and at least one addition."""
    changes: list[list[str]] = [[]]
    for line in content.splitlines():
        done = any(each[0] == "+" for each in changes[-1]) and any(each[0] != "+" for each in changes[-1])
        if done and line[0] != "+":
            changes.append([])
        changes[-1].append(line)
    return changes


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_commands_run_as_written(tmp_path: Path) -> None:
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = "\n".join(blocks(ROOT / "README.md", "bash"))
    assert commands.count("\nrdt ") >= 8
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    for expected in ("done: 40 steps", "resumed from", "done: 60 steps", "bits/byte", "#SBATCH --nodes=2"):
        assert expected in result.stdout
    assert (tmp_path / "runs" / "smoke" / "report" / "index.html").is_file()
    assert (tmp_path / "exports" / "smoke" / "model.safetensors").is_file()
    assert (tmp_path / "exports" / "smoke2-zero" / "universal").is_dir()
    for script in blocks(ROOT / "README.md", "python"):
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=60, check=True)


def test_the_readme_yaml_is_a_configuration_that_works(tmp_path: Path) -> None:
    for number, text in enumerate(blocks(ROOT / "README.md", "yaml")):
        (tmp_path / f"{number}.yaml").write_text(text)
        check_config(load_config(tmp_path / f"{number}.yaml"), 2)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{linked.name} has no heading #{anchor}"
    for path in re.findall(r"`((?:launch|configs|benchmarks|docs|tests|data_prep|megatron_rdt)/[\w./-]*)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(rf"`((?:{'|'.join(PACKAGES)})/[\w/]+\.py)", text):
        assert (ROOT / "megatron_rdt" / path).exists(), path
    for target in re.findall(r"`?make ([a-z-]+)", text):
        if re.search(rf"`make {target}|^make {target}", text, re.MULTILINE):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), target


def find_test_problem(name: str) -> str:
    """Return why there is no test `FILE.py::FUNCTION`, with [CASE] behind it where it has cases; "" if there is one."""
    file, function, _, case = re.fullmatch(r"(\S+\.py)::(\w+)(\[(\w+)\])?", name).groups()  # type: ignore[union-attr]
    found = sorted((ROOT / "tests").rglob(file))
    if len(found) != 1:
        return f"{len(found)} files below tests are called {file}"
    tree = ast.parse(found[0].read_text(encoding="utf-8"))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    if not tests:
        return f"{found[0]} has no {function}"
    literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    if case and not (tests[0].decorator_list and case in literals):
        return f"{function} has no case {case}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path) -> None:
    names = re.findall(r"`(test_[^`\s]*::[^`\s]+)`", page.read_text(encoding="utf-8"))
    assert not [problem for name in names if (problem := find_test_problem(name))]


def test_each_row_of_the_conversions_names_a_test() -> None:
    """One for what can be done with the result, and one for its logits or the same as the row above."""
    text = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8").split("## What is read")[1]
    rows = [line.strip("|").split("|") for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 12
    for source, _, use, logits in rows:
        assert re.fullmatch(r" `test_\w+\.py::\w+(\[\w+\])?` ", use), source
        assert re.search(r"`tests?[_/]|same|bit for bit", logits), source


def test_a_test_that_does_not_exist_is_found() -> None:
    assert find_test_problem("test_docs.py::test_named_tests_exist") == ""
    assert find_test_problem("test_docs.py::test_of_nothing").endswith("has no test_of_nothing")
    assert find_test_problem("test_nothing.py::test_x") == "0 files below tests are called test_nothing.py"
    assert find_test_problem("test_import_dense.py::test_a_cut_model_is_used_and_trained[mistral]") == ""
    assert "has no case gpt" in find_test_problem("test_import_dense.py::test_a_cut_model_is_used_and_trained[gpt]")


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = next(block for block in blocks(ROOT / "README.md", "") if block.startswith("megatron_rdt/"))
    inner = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    packages = {p.name for p in (ROOT / "megatron_rdt").iterdir() if (p / "__init__.py").is_file()}
    assert inner == packages
    outer = {line.split()[0].rstrip("/") for line in tree.splitlines() if not line.startswith(" ")}
    assert all((ROOT / name).is_dir() for name in outer)


def test_architecture_lists_every_page() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "ARCHITECTURE.md" or f"]({page.name})" in text, page.name


@pytest.mark.parametrize("recipe", read_recipes(), ids=lambda recipe: recipe.title)
def test_recipes_change_texts_that_are_in_the_code(recipe: Recipe) -> None:
    assert recipe.files or recipe.edits
    for path, old, _ in recipe.edits:
        found = (ROOT / path).read_text(encoding="utf-8").count(old)
        assert found == 1, f"CONTRIBUTING.md, {recipe.title}: in {path} there is {found} times, not once:\n{old}"
