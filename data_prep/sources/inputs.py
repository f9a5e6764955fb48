"""Input files in a fixed order, cut into parts that do not depend on which worker or machine reads them."""

import os
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from data_prep.config import STDLIB, PrepConfig
from data_prep.sources.file_kinds import COMPRESSED, Kind, find_kind, list_endings, name_ending
from data_prep.sources.folder_walk import FoundEntry, check_readable, identify_file, name_unreadable, walk_folder
from data_prep.sources.parquet_rows import count_group_rows
from data_prep.sources.prep_output import PREP_OUTPUT, is_prep_output, list_own_paths
from megatron_rdt.data.hugging_face import PREFIX, dataset_error, list_unread_files
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import escape_invalid_utf8

STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
BROKEN_LINK = "broken link"
NAMES_LISTED, ENDINGS_LISTED = 3, 8  # in messages and the manifest
MOST_PARTS, FEWEST_PARTS = 256, 8  # aimed at within the sizes below
SMALLEST_PART, USUAL_PART, LARGEST_PART = 1_000_000, 2_000_000, 64_000_000  # bytes
T = TypeVar("T")


@dataclass(frozen=True)
class Input:
    """A file, or one shard of a Hugging Face dataset.

    Attributes:
        name: the same on every machine; the order keys of its documents are made from it.
        path: of the file, or the dataset's name as after `hf:`.
        bytes, mtime_ns: size and modification time; 0 for a dataset.
        valid: whether all of its documents go to the validation split.
    """

    name: str
    path: str
    bytes: int
    mtime_ns: int
    valid: bool

    @property
    def shown_path(self) -> str:
        """The path for messages, in which bytes that are not UTF-8 are escaped."""
        return escape_invalid_utf8(self.path)


@dataclass(frozen=True)
class Part:
    """A piece of the input that one worker reads at a time.

    Attributes:
        index: number in the order of the input.
        kind: lines of a .jsonl, whole text files, row groups of a Parquet file, or a shard of a dataset on the hub.
        inputs: its file; several for whole text files.
        start, end: of a plain .jsonl, the byte range in which its lines begin; of a Parquet file, the range of row groups; of a
            dataset, the number of the shard and of all shards. An end of 0 is the end of the file.
        size: bytes of input, for progress.
    """

    index: int
    kind: Kind | Literal["hub"]
    inputs: tuple[Input, ...]
    start: int
    end: int
    size: int

    @property
    def name(self) -> str:
        """Name of its files in the working directory, such as `part-00017`."""
        return f"part-{self.index:05d}"

    @property
    def valid(self) -> bool:
        """True if all of its documents go to the validation split."""
        return self.inputs[0].valid


def _iterate_sources(config: PrepConfig) -> Iterator[tuple[str, str, bool]]:
    """Yield (source, name, valid) of each source; equal names get the number of the source as a prefix."""
    sources = [*config.sources, *config.valid_sources]
    counts = Counter(_source_name(source) for source in sources)
    for index, source in enumerate(sources):
        name = _source_name(source)
        yield source, f"{index}:{name}" if counts[name] > 1 else name, index >= len(config.sources)


def _source_name(source: str) -> str:
    """Return the last component of a source that is a path, also after `hf:`; any other source unchanged."""
    if source == STDLIB:
        return source
    if source.startswith(PREFIX) and not Path(source.removeprefix(PREFIX)).exists():
        return source
    return Path(source.removeprefix(PREFIX)).name


@dataclass
class NameSample:
    """A number of names, and the first few of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count a name, and keep it if it is one of the first."""
        self.count += 1
        if len(self.first) < NAMES_LISTED:
            self.first.append(name)


@dataclass
class SourceListing:
    """The files of the sources, and what is in the same folders and is not read.

    Attributes:
        files: in a fixed order, each file once.
        passed_over: names of the files that are not read, by ending; broken links under BROKEN_LINK, corpora and working
            directories of prep under PREP_OUTPUT.
        reached_again: names of files and folders that are read under another name already, because links lead to them, hard
            links included, or a source contains another.
    """

    files: list[Input] = field(default_factory=list)
    passed_over: defaultdict[str, NameSample] = field(default_factory=lambda: defaultdict(NameSample))
    reached_again: NameSample = field(default_factory=NameSample)

    def as_json(self) -> dict[str, Any]:
        """Return the fields for the manifest."""
        passed_over = {ending: asdict(names) for ending, names in sorted(self.passed_over.items())}
        return {"passed_over": passed_over, "reached_again": asdict(self.reached_again)}


def describe_unread(record: Mapping[str, Any]) -> list[str]:
    """Return lines that say what of the sources is not read, from `SourceListing.as_json` or a manifest with its fields."""

    def describe_names(names: Mapping[str, Any], kind: str = "") -> str:
        """Return `3 .bz2 (a.bz2, b.bz2 and more)`."""
        first = ", ".join(map(escape_invalid_utf8, names["first"]))
        more = " and more" if names["count"] > len(names["first"]) else ""
        return f"{names['count']:,} {kind}{' ' if kind else ''}({first}{more})"

    lines = []
    if record["passed_over"]:
        parts = (describe_names(names, ending) for ending, names in record["passed_over"].items())
        lines.append(f"not read: {'; '.join(parts)}")
    if record["reached_again"]["count"]:
        lines.append(f"read once, though reached again: {describe_names(record['reached_again'])}")
    return lines


def list_input_files(config: PrepConfig) -> list[Input]:
    """List the files of the sources; see `list_sources`."""
    return list_sources(config).files


def list_sources(config: PrepConfig) -> SourceListing:
    """Return every file of the sources in a fixed order, named alike on every machine, and what is not read.

    A name begins with that of its source. Sources of the same name are told apart by their number. A file that several paths
    lead to, or that has hard links, is listed once: as validation if one of these says so, then by a path without links,
    then by the first.

    Raises:
        ConfigError: a source does not exist, or is a file with an ending that is not in `extensions`.
        DataError: a source has no file, or something in it cannot be read.
    """
    listing = SourceListing()
    candidates: list[tuple[str, FoundEntry, bool]] = []
    for source, name, valid in _iterate_sources(config):
        if source.startswith(PREFIX):
            _add_unread_dataset_files(config, source.removeprefix(PREFIX), name, listing)
        else:
            candidates += [(inside, entry, valid) for inside, entry in _list_source(config, source, name, listing)]
    order = sorted(range(len(candidates)), key=lambda i: (not candidates[i][2], candidates[i][1].is_linked, i))
    identities = [identify_file(entry) for _, entry, _ in candidates]
    chosen: dict[tuple[int, int] | str, int] = {}
    for index in order:
        chosen.setdefault(identities[index], index)
    for index, (name, entry, valid) in enumerate(candidates):
        if chosen[identities[index]] == index:
            check_readable(entry.path)
            listing.files.append(_make_input(name, entry.path, valid))
        else:
            listing.reached_again.add(name)
    has_dataset = any(source.startswith(PREFIX) for source in config.sources)
    if not has_dataset and not any(not file.valid for file in listing.files):
        raise DataError(
            f"no file with an ending of {config.extensions} in {config.sources} that is not in {config.valid_sources} too. Set "
            "--sources or --valid_sources."
        )
    return listing


def _list_source(
    config: PrepConfig, source: str, name: str, listing: SourceListing
) -> Iterator[tuple[str, FoundEntry]]:
    """Yield (name, entry) of the files of one source that are to be read; add the others to `listing`."""
    root = Path(sysconfig.get_paths()["stdlib"]) if source == STDLIB else Path(source)
    if not root.exists():
        hint = " Patterns are not expanded." if set(source) & set("*?[") else ""
        raise ConfigError(
            f"source {source} does not exist.{hint} Name a file, a folder, hf:NAME or stdlib in --sources."
        )
    endings = list_endings((".py",) if source == STDLIB else config.extensions)
    if not root.is_dir():
        _check_file_source(root, endings, config.extensions)
        yield name, FoundEntry(root, os.path.realpath(root), root.is_symlink())
        return
    out = Path(os.path.realpath(config.out))
    own_paths, skipped = list_own_paths(out), []

    def is_left_out(path: Path, real: str) -> bool:
        """Return True for what prep wrote; note the name of a folder that other preps wrote."""
        if real in own_paths:
            return True
        if is_prep_output(real):
            skipped.append(f"{name}/{path.relative_to(root).as_posix()}/")
            return True
        return False

    entries, folders_again = walk_folder(root, is_left_out)
    if out.is_relative_to(os.path.realpath(root)) and source != STDLIB:
        # Whether it exists yet or not, so that an interrupted prep and one that was not have the same manifest.
        skipped.append(f"{name}/{out.relative_to(os.path.realpath(root)).as_posix()}/")
    passed_over, is_empty = Counter[str](), True
    for skipped_folder in sorted(skipped):
        listing.passed_over[PREP_OUTPUT].add(skipped_folder)
        passed_over[PREP_OUTPUT] += 1
    for entry in entries:
        if entry.real in own_paths:
            continue
        inside = entry.path.relative_to(root)
        has_ending = inside.name.lower().endswith(endings)
        if source == STDLIB and (not has_ending or entry.problem or STDLIB_SKIPPED & set(inside.parts)):
            continue  # `stdlib` means the modules alone
        path = f"{name}/{inside.as_posix()}"
        if entry.problem and (has_ending or entry.is_broken_link):
            _reject_entry(config, entry)
        if not has_ending or entry.problem:
            ending = BROKEN_LINK if entry.is_broken_link else name_ending(inside.name)
            listing.passed_over[ending].add(path)
            passed_over[ending] += 1
            continue
        is_empty = False
        yield path, entry
    if is_empty:
        endings_found = ", ".join(f"{count:,} {ending}" for ending, count in passed_over.most_common(ENDINGS_LISTED))
        raise DataError(
            f"no file with an ending of {config.extensions} in {source} (there: {endings_found or 'no file'}). Set --sources "
            "or --extensions."
        )
    for folder in folders_again:
        listing.reached_again.add(f"{name}/{folder.relative_to(root).as_posix()}/")


def _add_unread_dataset_files(config: PrepConfig, dataset: str, name: str, listing: SourceListing) -> None:
    """Add to `listing` the files in a dataset's local folder that the datasets library does not read."""
    if os.path.isdir(dataset) and Path(os.path.realpath(config.out)).is_relative_to(os.path.realpath(dataset)):
        raise ConfigError(
            f"out {config.out} is in the folder of {PREFIX}{dataset}, and the datasets library would read it as data. "
            "Set --out."
        )
    try:
        files = list_unread_files(dataset)
    except Exception as error:
        raise dataset_error(dataset, error, "--hf_split") from error
    for file in files:
        listing.passed_over[name_ending(file)].add(f"{name}/{file}")


def _check_file_source(root: Path, endings: tuple[str, ...], extensions: list[str]) -> None:
    """Raise ConfigError if a source that is not a folder cannot be read as a file."""
    if not root.is_file():
        raise ConfigError(
            f"source {root} is neither a file nor a folder. Text is read twice: write it to a file first."
        )
    if not root.name.lower().endswith(endings):
        raise ConfigError(
            f"{root} ends with none of {', '.join(extensions)}. Convert it, or name its ending in --extensions: .json and "
            ".ndjson are then read as lines of JSON, others as one plain text document per file."
        )


def _reject_entry(config: PrepConfig, entry: FoundEntry) -> None:
    """Raise DataError for an entry that cannot be read, unless it is a broken link and `on_bad` is to skip those."""
    if not entry.is_broken_link:
        raise DataError(f"{escape_invalid_utf8(entry.path)} is {entry.problem}, not a file. Move it elsewhere.")
    if config.on_bad != "skip":
        raise DataError(
            f"{escape_invalid_utf8(entry.path)} is {entry.problem}. Remove the link, or set --on_bad skip to pass over "
            "such links."
        )


def _make_input(name: str, path: Path, valid: bool) -> Input:
    """Return a file's Input, with its size and modification time as they are now."""
    stat = path.stat()
    return Input(name, str(path), stat.st_size, stat.st_mtime_ns, valid)


def describe_changed_input(
    recorded: Mapping[str, T], files: list[Input], has_changed: Callable[[Input, T], bool]
) -> str:
    """Return the first difference between files and their records: `NAME was added`, `was removed` or `has changed`.

    Args:
        recorded: records by name.
        files: the files as they are now.
        has_changed: compares a file with its record.

    Returns:
        The difference in words; "" if there is none.
    """
    now = {file.name: file for file in files}
    for name in sorted(now.keys() ^ recorded.keys()):
        return f"{escape_invalid_utf8(name)} was {'added' if name in now else 'removed'}"
    return next(
        (f"{escape_invalid_utf8(name)} has changed" for name, file in now.items() if has_changed(file, recorded[name])),
        "",
    )


def choose_part_bytes(config: PrepConfig, files: list[Input]) -> int:
    """Return the size to aim at for a part, in bytes of input."""
    total = sum(file.bytes for file in files)
    # Many small parts cost several synchronised writes each; few large ones leave workers idle while the last ones finish.
    smallest = min(max(total // FEWEST_PARTS, SMALLEST_PART), USUAL_PART)
    return config.part_bytes or min(max(total // MOST_PARTS, smallest), LARGEST_PART)


def cut_parts(config: PrepConfig, files: list[Input]) -> list[Part]:
    """Cut the input into parts, in its order; footers and first lines are read, and the hub is asked for shards."""
    size = choose_part_bytes(config, files)
    pieces: list[tuple[Any, list[Input], int, int, int]] = []  # the fields of Part after its index
    for file in files:
        kind = find_kind(Path(file.path), config.extensions)
        if kind == "texts":
            # Small text files are collected into one part, up to its size.
            last = pieces[-1] if pieces else None
            if last and last[0] == "texts" and last[1][0].valid == file.valid and last[4] + file.bytes <= size:
                last[1].append(file)
                pieces[-1] = (kind, last[1], 0, 0, last[4] + file.bytes)
            else:
                pieces.append((kind, [file], 0, 0, file.bytes))
        elif kind == "parquet":
            pieces += [(kind, [file], *cut) for cut in _cut_row_groups(file, size)]
        elif file.path.lower().endswith(COMPRESSED) or file.bytes <= size:
            # A compressed file can be read from its beginning only, so it is one part whatever its size.
            pieces.append((kind, [file], 0, 0, file.bytes))
        else:
            # Byte ranges; each owns the lines that begin in it, so no line is read twice or lost.
            starts = range(0, file.bytes, size)
            pieces += [(kind, [file], s, min(s + size, file.bytes), min(size, file.bytes - s)) for s in starts]
    for source, name, valid in _iterate_sources(config):
        if source.startswith(PREFIX):
            from data_prep.sources.hugging_face_files import count_dataset_shards

            dataset = source.removeprefix(PREFIX)
            shards = count_dataset_shards(dataset, config)
            pieces += [("hub", [Input(f"{name}/{i}", dataset, 0, 0, valid)], i, shards, 0) for i in range(shards)]
    return [Part(i, kind, tuple(inputs), *numbers) for i, (kind, inputs, *numbers) in enumerate(pieces)]


def _cut_row_groups(file: Input, size: int) -> list[tuple[int, int, int]]:
    """Return (first row group, end, bytes) of each part of a Parquet file; one part for all if its footer is damaged."""
    with name_unreadable(file.path):
        rows = count_group_rows(file.path)
    if rows is None:
        return [(0, 0, file.bytes)]  # reading the part reports the damage, under the policy for bad records
    cuts: list[tuple[int, int, int]] = []
    start, held = 0, 0
    for index, count in enumerate(rows):
        held += count
        share = held * file.bytes // max(1, sum(rows))
        if share >= size or index == len(rows) - 1:
            cuts.append((start, index + 1, share))
            start, held = index + 1, 0
    return cuts or [(0, 0, file.bytes)]
