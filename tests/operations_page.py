"""The commands of docs/OPERATIONS.md: found by section, and run in order by one shell, as an operator types them.

A block of bash is run by the tests of its place: where a heading above it has one of the words of PLACES, by that file, else by
DEFAULT. In a block, `# exits with 75` at the end of a command names the status that it has to have, if not 0. In the text,
a command in backticks has to be the beginning of one of a block; `rdt prep` alone is a name.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from launch.cli import COMMANDS
from megatron_rdt.config import load_config
from tests.distributed.launchers import BIN, start_command

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "OPERATIONS.md"
DEFAULT = "tests/faults/test_operations.py"
PLACES = {"Slurm": "tests/cluster/test_operations.py"}
PROGRAMS = "rdt|torchrun|deepspeed|srun|sbatch|squeue|scancel|scontrol|sinfo|python|kill|torchfrtrace|tensorboard"


@dataclass(frozen=True)
class Block:
    """A block of bash.

    Attributes:
        headings: above it, from the section inwards.
        line: number of its first line in the page.
        text: its lines.
    """

    headings: tuple[str, ...]
    line: int
    text: str

    @property
    def place(self) -> str:
        """The file of the tests that run it."""
        words = " ".join(self.headings)
        return next((file for word, file in PLACES.items() if word in words), DEFAULT)


def read_blocks(text: str) -> list[Block]:
    """Return the blocks of a page in order; ValueError if it shows commands that are in none."""
    blocks: list[Block] = []
    headings: list[str] = []
    first, language = 0, ""  # of the block that is open
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            if first:
                if language == "bash":
                    blocks.append(Block(tuple(headings), first, "\n".join(lines[first - 1 : number - 1])))
                first = 0
            else:
                first, language = number + 1, line[3:].strip()
                if language not in ("bash", "text"):
                    raise ValueError(f"line {number}: a block is of commands (```bash) or of output (```text)")
        elif not first and (found := re.match(r"(##+) (.*)", line)):
            headings[len(found[1]) - 2 :] = [found[2]]
    shown = [command for block in blocks for command in split_commands(block.text)]
    for number, line in enumerate(
        re.sub(r"```.*?```", lambda m: "\n" * m[0].count("\n"), text, flags=re.S).splitlines(), 1
    ):
        for command in re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", line):
            is_name = command.removeprefix("rdt ") in COMMANDS
            if not is_name and not any(each.startswith(command) for each in shown):
                raise ValueError(f"line {number}: no block has `{command}`: put it into one, which a test runs")
    return blocks


def split_commands(text: str) -> list[str]:
    """Return the commands of a block, without comments before them; one that goes on in the next line is one."""
    commands, open_lines = [], []
    for line in text.splitlines():
        if not open_lines and (not line.strip() or line.lstrip().startswith("#")):
            continue
        open_lines.append(line)
        if not line.endswith("\\"):
            commands.append("\n".join(open_lines))
            open_lines = []
    return [*commands, *(["\n".join(open_lines)] if open_lines else [])]


def make_script(blocks: list[Block]) -> str:
    """Return a script of bash that runs blocks in order and ends at the first command with another status than it should."""
    lines = ["set -euo pipefail"]
    for block in blocks:
        lines.append(f"echo '=== line {block.line} of {PAGE.name}'")
        for command in split_commands(block.text):
            found = re.search(r"\s+# exits with (\d+)$", command)
            if found is None:
                lines.append(command)
                continue
            lines += [f"if {command[: found.start()]}", "then status=0; else status=$?; fi"]
            lines.append(f'[ "$status" -eq {found[1]} ] || {{ echo "it exited with $status"; exit 1; }}')
    return "\n".join(lines) + "\n"


def run_blocks(place: str, folder: Path, text: Path, variables: Mapping[str, str], timeout_s: float) -> str:
    """Run the page's blocks of a place in a folder like the repository's root; return the output, or fail with it.

    Args:
        place: the file of the tests that call this, below the root.
        folder: where to run; gets links to configs and launch, and a corpus in data/stdlib.
        text: folder whose files the corpus has.
        variables: of the environment, besides this process's.
        timeout_s: for all blocks together.
    """
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    vocabulary = load_config(ROOT / "configs" / "smoke.yaml").model.vocab_size
    out = folder / "data" / "stdlib"
    prepare(
        PrepConfig(sources=[str(text)], out=str(out), vocab_size=vocabulary, valid_fraction=0.2, workers=1),
    )
    blocks = [block for block in read_blocks(PAGE.read_text(encoding="utf-8")) if block.place == place]
    assert blocks, f"{PAGE} has no command for {place}"
    environment = {**os.environ, **variables}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    with start_command(["bash", "-c", make_script(blocks)], folder / "output.txt", environment, folder) as shell:
        status = shell.wait(timeout_s)
        said = shell.read_output()
    assert status == 0, f"status {status}\n{said[-4000:]}"
    return said
