"""Options that several benchmarks share, declared once, and the file that `--out` names."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
PRESETS = sorted(path.stem for path in MODELS.glob("*.yaml"))

SHARED: dict[str, dict[str, Any]] = {
    "loops": {"type": int, "nargs": "+", "help": "values of T"},
    "dim": {"type": int, "help": "width of the model"},
    "batch": {"type": int, "help": "sequences per step"},
    "sequence": {"type": int, "help": "tokens per sequence"},
    "rounds": {"type": int, "help": "rounds of measurements"},
    "threads": {"type": int, "help": "CPU threads"},
    "out": {"type": Path, "help": "write the numbers here as JSON"},
}


def make_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with a benchmark's docstring as its help, and those of the SHARED options that have a default here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, **SHARED[name])
    return parser


def make_preset_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of a benchmark that makes each preset's row in a process of its own: --preset, --world and --json."""
    parser = make_parser(description)
    parser.add_argument("--preset", choices=PRESETS, help="one preset only")
    parser.add_argument("--world", type=int, default=16_384, help="ranks")
    parser.add_argument("--json", action="store_true", help="print numbers as JSON")
    return parser


def repeat_options(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The words of a command line that give these options the same values again."""
    words: list[str] = []
    for name in names:
        value = getattr(options, name)
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def write_numbers(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """Write the options and numbers as JSON if `--out` names a file."""
    if options.out is not None:
        document = {"options": vars(options), **numbers}
        options.out.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
