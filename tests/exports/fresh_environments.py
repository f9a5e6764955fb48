"""Run the tests beside this file in environments of their own, with other versions of transformers and the tools around it.

`python -m tests.exports.fresh_environments FOLDER [NAME ...]`: the environments are made below FOLDER and kept there; what a
version range allows is upgraded at every run, so the package index has to be there. The tests are copied away, so that they
cannot import this project.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.exports.make_exports import write_exports

TOOLS = ("accelerate", "peft", "lm_eval")
ENVIRONMENTS = {
    "newest": ("transformers", *TOOLS, "trl", "datasets", "optimum-quanto"),
    "oldest": ("transformers==5.0.0", *TOOLS),
    "version4": ("transformers==4.57.6", *TOOLS),
}
# All environments see what is installed in this one: it is large, and the same for all.
BASE = (f"torch=={torch.__version__.partition('+')[0]}", "pytest", "pytest-timeout", "sentencepiece", "protobuf")
TIME_LIMIT = 1800  # a machine that is shared takes several times as long


class InstallError(Exception):
    """Packages could not be installed; the message says what to do."""


def make_environment(folder: Path, packages: tuple[str, ...], below: Path | None = None) -> Path:
    """Make or upgrade a virtual environment that also sees the packages of `below`; return its Python.

    Raises:
        InstallError: pip failed, as it does where the package index cannot be reached.
    """
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if below is not None:  # written at every run: an earlier one may have been killed before it, or the folder moved
        (libraries,) = folder.glob("lib/python*/site-packages")
        (shared,) = below.glob("lib/python*/site-packages")
        (libraries / "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", *packages]
    if subprocess.run(command, check=False).returncode != 0:
        raise InstallError(
            f"pip could not install {', '.join(packages)} into {folder}; its messages are above. These tests need the newest "
            "versions from the package index: connect this machine to one, and run make test-exports again."
        )
    return python


def run_tests(python: Path, exports: Path) -> int:
    """Run the tests on a folder of exports with a Python that does not have this project; return pytest's exit status.

    It is 1 too where they take longer than `TIME_LIMIT`.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"RDT_EXPORTS": str(exports), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-W", "ignore", "-o", "timeout=300"]
    with tempfile.TemporaryDirectory() as copies:
        for file in Path(__file__).resolve().parent.glob("*.py"):
            if file.name == "conftest.py" or file.name.startswith("test_"):
                shutil.copy(file, copies)
        try:
            return subprocess.run(command, cwd=copies, env=environment, timeout=TIME_LIMIT, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"the tests took more than {TIME_LIMIT} s and were ended", flush=True)
            return 1


def main(folder: Path, names: list[str]) -> int:
    """Make the environments and run the tests in each; return 1 if any failed, else 0."""
    folder = folder.resolve()  # the tests run in another directory
    folder.mkdir(parents=True, exist_ok=True)
    make_environment(folder / "base", BASE)
    failed = []
    with tempfile.TemporaryDirectory() as exports:
        write_exports(Path(exports))
        for name in names or ENVIRONMENTS:
            begin = time.monotonic()
            python = make_environment(folder / name, ENVIRONMENTS[name], folder / "base")
            version = "import transformers; print('transformers', transformers.__version__, flush=True)"
            subprocess.run([str(python), "-c", version], check=True)
            if run_tests(python, Path(exports)) != 0:
                failed.append(name)
            print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else f"all pass: {', '.join(names or ENVIRONMENTS)}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
    except InstallError as error:
        sys.exit(f"make test-exports: {error}")  # with the status 1
