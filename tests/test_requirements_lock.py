"""requirements.lock has the pins of constraints.txt, each with hashes."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def normalize_name(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_pin_has_hashes() -> None:
    locked: dict[tuple[str, str], int] = {}
    for block in re.split(r"\n(?=[a-zA-Z])", (ROOT / "requirements.lock").read_text()):
        if match := re.match(r"([\w.-]+)(?:\[[\w,]+\])?==(\S+)", block):
            locked[normalize_name(match[1]), match[2]] = len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block))
    assert all(locked.values()), [name for name, count in locked.items() if not count]
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().split()]
    missing = [f"{name}=={version}" for name, version in pins if (normalize_name(name), version) not in locked]
    assert not missing, "make requirements.lock anew by the command in its second line"
