"""Passwords and tokens in a config, which would be saved with it in the run and in every checkpoint."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

# Kinds of secrets by a pattern that nothing else has: an address with a password, tokens with their prefix.
PATTERNS = {
    "a password in an address": r"://[^/\s:@]*:[^/\s:@]+@",
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{30,}",
    "a token of GitHub": r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{30,}",
    "a key of AWS": r"\bAKIA[0-9A-Z]{16}\b",
}


def find_secrets(value: Any, name: str = "") -> Iterator[str]:
    """Yield a sentence for each secret in the texts of a config, or of the part of it with this path; never the secret."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from find_secrets(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from find_secrets(inner, name)
    elif isinstance(value, str):
        for kind in (kind for kind, pattern in PATTERNS.items() if re.search(pattern, value)):
            yield (
                f"{name} holds {kind}, which would be saved in config.yaml and in every checkpoint. Leave it out, and log in, "
                "or set the variable that the library reads (HF_TOKEN, for example)."
            )
