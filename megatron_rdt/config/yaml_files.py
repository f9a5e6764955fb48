"""Reading YAML and JSON files that a user wrote: what is wrong with one is said in a sentence that names it."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megatron_rdt.errors import ConfigError


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping; YAML would forget the first. Takes 5e8 and 1e-5 for numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of `node`; YAMLError for a key that stands twice or is a list or a mapping."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable) or isinstance(key, tuple):
                raise yaml.YAMLError(f"line {line} has a list or a mapping where a key should be")
            if key in seen:
                raise yaml.YAMLError(f"key {key_node.value} stands twice, again in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in every float and a sign in every exponent.
UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ."""
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"key {twice} stands twice")
    return dict(pairs)


def read_mapping(path: str, named: str = "config file", option: str = "--config") -> dict[Any, Any]:
    """The `key: value` lines of a YAML file, or of a JSON file.

    Args:
        path: the file; one that ends in .json is read as JSON.
        named: what the file is to the user.
        option: which option named it.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    is_json = path.endswith(".json")
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_unique) if is_json else yaml.load(text, UniqueKeys)
    except OSError as error:
        raise ConfigError(f"{named} {path} cannot be read: {error.strerror}. Check the path.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{named} {path} is not UTF-8 text. Check the path.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of JSON; in YAML, a date such as 2024-13-01
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError(f"{named} {path} is not valid {'JSON' if is_json else 'YAML'}: {reason}. Mend it.") from None
    if content is None:
        raise ConfigError(f"{named} {path} is empty. Write `key: value` lines, or leave {option} out.")
    if not isinstance(content, dict):
        raise ConfigError(f"{named} {path} must hold `key: value` lines, it holds a {type(content).__name__}.")
    return content
