"""docs/OPERATIONS.md shows no command that no test runs."""

import re

import pytest

from tests.operations_page import DEFAULT, PAGE, PLACES, ROOT, Block, make_script, read_blocks

EXAMPLE = """\
# Page
## Start
Use `rdt train`:
```bash
# one
rdt train --config a.yaml \\
    --nproc 2
wait $!  # exits with 75
```
### On Slurm
```bash
rdt submit --config a.yaml
```
## Watch
```text
rdt of the output
```
"""


def test_every_command_of_the_page_is_in_a_block_that_a_test_runs() -> None:
    blocks = read_blocks(PAGE.read_text(encoding="utf-8"))
    for file in (DEFAULT, *PLACES.values()):
        assert any(block.place == file for block in blocks), file
        assert f'run_blocks("{file}"' in (ROOT / file).read_text(encoding="utf-8")


def test_blocks_are_found_with_their_headings() -> None:
    first, second = read_blocks(EXAMPLE)
    assert first == Block(("Start",), 5, "# one\nrdt train --config a.yaml \\\n    --nproc 2\nwait $!  # exits with 75")
    assert (second.headings, second.place) == (("Start", "On Slurm"), PLACES["Slurm"])
    script = make_script([first])
    assert "if wait $!\nthen status=0; else status=$?; fi" in script
    assert '[ "$status" -eq 75 ]' in script
    assert len(read_blocks(EXAMPLE + "As after `rdt prep`, a name.\n")) == 2
    assert "rdt train --config a.yaml \\\n    --nproc 2\n" in script


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("Look with `rdt status --root elsewhere`.\n", "no block has `rdt status --root elsewhere`"),
        ("```\nrdt status\n```\n", "a block is of commands"),
        ("```sh\nrdt status\n```\n", "a block is of commands"),
    ],
)
def test_a_command_outside_of_the_blocks_is_found(added: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_blocks(EXAMPLE + added)


def test_every_row_of_the_fault_table_names_a_test() -> None:
    rows = [
        line for line in PAGE.read_text(encoding="utf-8").partition("\n## Faults\n")[2].splitlines() if line[:2] == "| "
    ]
    assert len(rows) > 10
    for row in rows[1:]:
        names = re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py)`", row.rstrip("| ").rpartition("|")[2])
        assert names, row
        for name in names:
            assert (ROOT / name).is_file() or (ROOT / "tests" / "faults" / name).is_file(), name
