"""Input files in a fixed order, cut into parts that do not depend on which worker or machine reads them."""

import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from data_prep.config import PrepConfig
from megatron_rdt.data.hugging_face import PREFIX
from megatron_rdt.errors import ConfigError, DataError

STDLIB = "stdlib"
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
COMPRESSED = (".gz", ".zst")
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
    kind: Literal["lines", "texts", "parquet", "hub"]
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
    """Name of a source without the folder that it lies in on this machine."""
    if source == STDLIB:
        return source
    if source.startswith(PREFIX) and not Path(source.removeprefix(PREFIX)).exists():
        return source
    return Path(source.removeprefix(PREFIX)).name


def list_input_files(config: PrepConfig) -> list[Input]:
    """List every file of the sources in a fixed order, with names that do not depend on the machine.

    A name begins with that of its source. Sources of the same name are told apart by their number.

    Raises:
        ConfigError: a source does not exist, or is a file with an ending that is not in `extensions`.
        DataError: there is no file.
    """
    found: list[Input] = []
    for source, name, valid in _iterate_sources(config):
        if source.startswith(PREFIX):
            continue
        root = Path(sysconfig.get_paths()["stdlib"]) if source == STDLIB else Path(source)
        if not root.exists():
            raise ConfigError(f"source {source} does not exist. Name a file, a folder, hf:NAME or stdlib in --sources.")
        extensions = tuple(e.lower() for e in ((".py",) if source == STDLIB else config.extensions))
        endings = extensions + tuple(e + c for e in extensions for c in COMPRESSED)
        if root.is_file():
            if not root.name.lower().endswith(endings):
                raise ConfigError(
                    f"{root} ends with none of {', '.join(extensions)}. Convert it, or name its ending in --extensions "
                    "to read the file as one plain text document."
                )
            found.append(_make_input(name, root, valid))
            continue
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if source == STDLIB and STDLIB_SKIPPED & set(inside.parts):
                continue
            if path.is_file() and path.name.lower().endswith(endings):
                found.append(_make_input(f"{name}/{inside.as_posix()}", path, valid))
    has_dataset = any(source.startswith(PREFIX) for source in config.sources)
    if not has_dataset and not any(not file.valid for file in found):
        raise DataError(
            f"no file with an ending of {config.extensions} in {config.sources}. Set --sources or --extensions."
        )
    return found


def _make_input(name: str, path: Path, valid: bool) -> Input:
    """Return the Input of a file."""
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
        return f"{name} was {'added' if name in now else 'removed'}"
    return next((f"{name} has changed" for name, file in now.items() if has_changed(file, recorded[name])), "")


def choose_part_bytes(config: PrepConfig, files: list[Input]) -> int:
    """Return the size to aim at for a part, in bytes of input."""
    total = sum(file.bytes for file in files)
    # Many small parts cost several synchronised writes each; few large ones leave workers idle while the last ones finish.
    smallest = min(max(total // FEWEST_PARTS, SMALLEST_PART), USUAL_PART)
    return config.part_bytes or min(max(total // MOST_PARTS, smallest), LARGEST_PART)


def cut_parts(config: PrepConfig, files: list[Input]) -> list[Part]:
    """Cut the input into parts, in its order; the hub is asked for the number of shards of datasets."""
    size = choose_part_bytes(config, files)
    pieces: list[tuple[Any, list[Input], int, int, int]] = []  # the fields of Part after its index
    for file in files:
        kind = _file_kind(file)
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


def _file_kind(file: Input) -> Literal["lines", "texts", "parquet"]:
    """Kind of the parts of a file, by its endings."""
    suffixes = [suffix.lower() for suffix in Path(file.path).suffixes]
    if ".jsonl" in suffixes:
        return "lines"
    return "parquet" if suffixes[-1:] == [".parquet"] else "texts"


def _cut_row_groups(file: Input, size: int) -> list[tuple[int, int, int]]:
    """Return (first row group, end, bytes) of each part of a Parquet file; one part for all if its footer is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            rows = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError):
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
