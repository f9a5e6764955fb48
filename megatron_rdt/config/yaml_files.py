"""Read YAML and JSON files that a user wrote; each error is a sentence that names the file, the fault and the remedy."""

import difflib
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megatron_rdt.errors import ConfigError

SHIPPED = "configs"  # the folder of configs that come with the project
ENDINGS = (".yaml", ".yml", ".json")
MOST_ENTRIES = 1_000_000
SIMILAR = 0.6  # least likeness of two file names, from 0 to 1, to suggest one for the other


class UniqueKeys(yaml.SafeLoader):
    """YAML loader that refuses a mapping with a repeated key, where YAML would keep the last; reads 5e8 as a number.

    It refuses a text whose aliases (`*name`) repeat lists or mappings so often that they would fill the memory.
    """

    def compose_document(self) -> yaml.Node | None:
        """Return the document's tree; raise YAMLError if it is too large with every alias written out, or endless."""
        node = super().compose_document()
        if node is not None and (entries := _count_entries(node, {})) > MOST_ENTRIES:
            raise yaml.YAMLError(f"with its aliases written out it has {entries:,} entries or more")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return the mapping of `node`; raise YAMLError if a key is repeated, or is a list or a mapping."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable) or isinstance(key, tuple):
                raise yaml.YAMLError(f"line {line} has a list or a mapping where a key should be")
            if key in seen:
                raise yaml.YAMLError(f"key {key_node.value} is given twice, again in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count_entries(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the nodes of a tree with every alias written out; more than `MOST_ENTRIES` where one holds itself."""
    if id(node) not in known:
        known[id(node)] = MOST_ENTRIES + 1  # met again inside of itself
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        is_scalar = isinstance(node, yaml.ScalarNode)
        known[id(node)] = 1 + (0 if is_scalar else sum(_count_entries(part, known) for part in inner))
    return known[id(node)]


# YAML 1.1 takes 5e8 and 1e-5 for text: it wants a dot in every float and a sign in every exponent.
UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_plain_numbers(loader: Any) -> None:
    """Let a YAML loader class read 1000:30 and 010 as texts; YAML 1.1 takes them for numbers of base 60 and 8.

    An option that needs a number turns the text 010 into 10, as it stands; one that needs a text keeps its zeros.
    """
    loader.yaml_implicit_resolvers = {
        letter: [
            (
                tag,
                re.compile(f"(?!.*:|[-+]?0[0-9_]+$){known.pattern}", known.flags)
                if tag.endswith((":int", ":float"))
                else known,
            )
            for tag, known in resolvers
        ]
        for letter, resolvers in loader.yaml_implicit_resolvers.items()
    }


read_plain_numbers(UniqueKeys)


def _make_unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its keys and values; raise ValueError if a key is repeated."""
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"key {twice} is given twice")
    return dict(pairs)


def read_mapping(path: str, named: str = "config file", option: str = "--config") -> dict[Any, Any]:
    """Read the `key: value` lines of a YAML file, or the object of a JSON file.

    Args:
        path: the file; one that ends in .json is read as JSON.
        named: the user's word for the file, for messages.
        option: the option that names it, for messages.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    is_json = path.endswith(".json")
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_make_unique_object) if is_json else yaml.load(text, UniqueKeys)
    except RecursionError:
        raise ConfigError(f"{named} {path} is nested too deeply. Fix it.") from None
    except FileNotFoundError:
        near = _find_similar_file(Path(path))
        hint = f"Did you mean {near}?" if near else "Check the path."
        raise ConfigError(f"{named} {path} does not exist. {hint}") from None
    except OSError as error:
        raise ConfigError(f"{named} {path} cannot be read: {error.strerror}. Check the path.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{named} {path} is not UTF-8 text. Check the path.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: from JSON, or from a YAML date such as 2024-13-01
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError(f"{named} {path} is not valid {'JSON' if is_json else 'YAML'}: {reason}. Fix it.") from None
    if content is None:
        raise ConfigError(f"{named} {path} is empty. Write `key: value` lines, or omit {option}.")
    if not isinstance(content, dict):
        raise ConfigError(f"{named} {path} must hold `key: value` lines, it holds a {type(content).__name__}.")
    return content


def _find_similar_file(missing: Path) -> Path | None:
    """Return the file of the most similar name beside `missing` or below configs/; None if none is similar."""
    files = {*missing.parent.glob("*"), *Path(SHIPPED).rglob("*")}
    name = missing.stem if missing.suffix in ENDINGS else missing.name

    def likeness(file: Path) -> tuple[float, float, str]:
        # Of files of one name, the one whose whole path is the most similar.
        paths = difflib.SequenceMatcher(None, str(missing), str(file)).ratio()
        return difflib.SequenceMatcher(None, name, file.stem).ratio(), paths, str(file)

    likely = [file for file in files if file.suffix in ENDINGS and likeness(file)[0] >= SIMILAR]
    return max(likely, key=likeness, default=None)
