"""The command line, for forked test processes."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tests.distributed.processes import forget_launcher


def command_line(words: Sequence[str], folder: Path, directory: Path) -> NoReturn:
    """Run `rdt WORDS` in `directory`, its streams redirected to the files stdout and stderr of `folder`."""
    from launch.cli import main

    forget_launcher()
    os.chdir(directory)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["rdt", *words]
    raise SystemExit(main())
