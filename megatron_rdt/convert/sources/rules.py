"""Rules that make each weight of this project's model of weights of another project's.

Rules are data, from names and functions alone. So a conversion can be printed, checked against the names in the files,
and run weight by weight, whether the source is a dictionary in memory or files of any size.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

LISTED_NAMES = 3
MOST = 2**31 - 1  # of anything that a config counts
Value = TypeVar("Value")


def keep_weight(weight: Tensor) -> Tensor:
    """Return the weight as it is."""
    return weight


@dataclass(frozen=True)
class Rule:
    """Recipe of one weight.

    Attributes:
        names: of the weights that it is made of.
        make: returns the weight, given those in this order.
        note: what `make` does, for people; "" for a copy.
    """

    names: tuple[str, ...]
    make: Callable[..., Tensor] = keep_weight
    note: str = ""


Rules = dict[str, Rule]
"""The rule of every weight, by its name here."""


def copy_rules(names: Mapping[str, str], ours: str = "", theirs: str = "") -> Rules:
    """Return rules that copy each `theirs`OLD.weight to `ours`NEW.weight, for names given as new -> old."""
    return {f"{ours}{new}.weight": Rule((f"{theirs}{old}.weight",)) for new, old in names.items()}


def take_rows(weight: Tensor, start: int, end: int, total: int) -> Tensor:
    """Return rows start to end of a weight, as a tensor of their own; ValueError unless it has `total` rows."""
    if len(weight) != total:
        raise ValueError(f"it has {len(weight):,} rows, the config's network {total:,}")
    return weight[start:end].clone()


def row_rules(names: Iterable[str], sizes: Iterable[int], theirs: str) -> Rules:
    """Return rules for weights that are stacked row by row in the weight `theirs`, with these numbers of rows."""
    sizes = list(sizes)
    rules, start, total = {}, 0, sum(sizes)
    for name, size in zip(names, sizes, strict=True):
        end = start + size
        rules[name] = Rule(
            (theirs,), partial(take_rows, start=start, end=end, total=total), f"rows {start:,} to {end - 1:,}"
        )
        start = end
    return rules


def find_unused(rules: Rules, names: Iterable[str], ignored: str) -> list[str]:
    """Return the names of the source, sorted, that no rule uses and the regular expression `ignored` does not match."""
    used = {name for rule in rules.values() for name in rule.names}
    return sorted(name for name in names if name not in used and not re.fullmatch(ignored, name))


def check_names(rules: Rules, names: Iterable[str], ignored: str) -> None:
    """Raise ValueError unless rules and source have the same weights.

    Args:
        rules: of the conversion.
        names: of the weights in the source.
        ignored: regular expression of names without learned content: tables of rotary positions, tied copies.
    """
    there = set(names)
    missing = [name for name in dict.fromkeys(n for rule in rules.values() for n in rule.names) if name not in there]
    if missing:
        raise ValueError(
            f"the weights have no {_list_few(missing)}; the config describes another network, or a file is missing"
        )
    if unused := find_unused(rules, there, ignored):
        raise ValueError(f"{len(unused)} of the weights do not exist in the config's network: {_list_few(unused)}")


def _list_few(names: Sequence[str]) -> str:
    """Return the first names, with "..." where there are more."""
    return ", ".join(names[:LISTED_NAMES]) + " ..." * (len(names) > LISTED_NAMES)


def convert_state(rules: Rules, state: Mapping[str, Tensor], ignored: str) -> dict[str, Tensor]:
    """Apply rules to a whole state dict; a missing or an unused weight is a ValueError, see `check_names`."""
    check_names(rules, state, ignored)
    return {name: rule.make(*(state[source] for source in rule.names)) for name, rule in rules.items()}


def require_settings(settings: Mapping[str, object], kind: str, wanted: Mapping[str, object]) -> None:
    """Raise ValueError for the first setting that is there and differs from the one value that this model knows."""
    for name, value in wanted.items():
        found = settings.get(name, value)
        if found != value:
            raise ValueError(f"{name} is {found!r}; of {kind} only models with {name} {value!r} have an equal here")


def read_setting(settings: Mapping[str, object], kind: type[Value], *names: str) -> Value:
    """Return the first of these settings that is there, of type `kind`; ValueError if none is."""
    for name in names:
        value = settings.get(name)
        if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)  # type: ignore[call-arg]
        if value is not None:
            wanted = "true or false" if kind is bool else "a number or text"
            raise ValueError(f"the config's {name} is {value!r}, not {wanted} as it should be")
    raise ValueError(f"the config has no {names[0]}")


def read_count(settings: Mapping[str, object], *names: str) -> int:
    """Return the first of these settings that is there, a number of at least 1; ValueError if none is, or it is no such."""
    count = read_setting(settings, int, *names)
    if not 1 <= count <= MOST:
        name = next(name for name in names if settings.get(name) is not None)
        raise ValueError(f"the config's {name} is {count}; it must be from 1 to {MOST:,}")
    return count


def stack_weights(*weights: Tensor) -> Tensor:
    """Stack weights along a new first dimension."""
    return torch.stack(weights)


def join_weights(*weights: Tensor, dim: int = 0) -> Tensor:
    """Concatenate weights along `dim`."""
    return torch.cat(weights, dim=dim)
