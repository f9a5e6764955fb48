"""What there is to read: files in a fixed order, cut into parts that do not depend on who reads them."""

import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.config import PrepConfig
from megatron_rdt.data.hugging_face import PREFIX
from megatron_rdt.errors import ConfigError, DataError

STDLIB = "stdlib"
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
COMPRESSED = (".gz", ".zst")
PARTS, FEWEST_PARTS = 256, 8
SMALLEST_PART, USUAL_PART, LARGEST_PART = 1_000_000, 2_000_000, 64_000_000


@dataclass(frozen=True)
class Input:
    """A file, or one shard of a Hugging Face dataset.

    Attributes:
        name: what the keys of its documents are made of: the same on every machine.
        path: where it is; of a dataset the words after `hf:`.
        bytes, mtime_ns: size and time of the last change; 0 for a dataset.
        valid: all of its documents go to the validation split.
    """

    name: str
    path: str
    bytes: int
    mtime_ns: int
    valid: bool


@dataclass(frozen=True)
class Part:
    """A piece of the input that one process reads at a time.

    Attributes:
        index: place in the order of the input.
        kind: lines of a .jsonl, whole text files, row groups of a Parquet file, or a shard of a dataset on the hub.
        inputs: the files; several for whole texts.
        start, end: lines that begin at these bytes of a plain .jsonl, row groups, or number of the shard and of all
            shards; end 0 is the end of the file.
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
        """`part-00017`."""
        return f"part-{self.index:05d}"

    @property
    def valid(self) -> bool:
        """Whether all of its documents go to the validation split."""
        return self.inputs[0].valid


def _sources(config: PrepConfig) -> Iterator[tuple[str, str, bool]]:
    """(source, name, valid) of each; names that several sources have are told apart by their place in the list."""
    sources = [*config.sources, *config.valid_sources]
    called = Counter(_source_name(source) for source in sources)
    for index, source in enumerate(sources):
        name = _source_name(source)
        yield source, f"{index}:{name}" if called[name] > 1 else name, index >= len(config.sources)


def _source_name(source: str) -> str:
    if source == STDLIB:
        return source
    if source.startswith(PREFIX) and not Path(source.removeprefix(PREFIX)).exists():
        return source
    return Path(source.removeprefix(PREFIX)).name


def input_files(config: PrepConfig) -> list[Input]:
    """Every file that the sources name, in a fixed order; names do not depend on the machine.

    A name begins with that of its source; where several sources have the same, their places in the list tell them apart.

    Raises:
        ConfigError: a source does not exist, or is a file with an ending that is not known.
        DataError: there is no file.
    """
    found: list[Input] = []
    for source, name, valid in _sources(config):
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
                    "to take the file as one plain text document."
                )
            found.append(_input(name, root, valid))
            continue
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if source == STDLIB and STDLIB_SKIPPED & set(inside.parts):
                continue
            if path.is_file() and path.name.lower().endswith(endings):
                found.append(_input(f"{name}/{inside.as_posix()}", path, valid))
    hub = any(source.startswith(PREFIX) for source in config.sources)
    if not hub and not any(not file.valid for file in found):
        raise DataError(
            f"no file with an ending of {config.extensions} in {config.sources}. Set --sources or --extensions."
        )
    return found


def _input(name: str, path: Path, valid: bool) -> Input:
    stat = path.stat()
    return Input(name, str(path), stat.st_size, stat.st_mtime_ns, valid)


def part_bytes(config: PrepConfig, files: list[Input]) -> int:
    """Bytes of input of a part, about."""
    total = sum(file.bytes for file in files)
    # A part costs a few synchronised writes, and what is left of the last ones leaves workers idle.
    smallest = min(max(total // FEWEST_PARTS, SMALLEST_PART), USUAL_PART)
    return config.part_bytes or min(max(total // PARTS, smallest), LARGEST_PART)


def cut_parts(config: PrepConfig, files: list[Input]) -> list[Part]:
    """The input as parts, in its order; datasets are asked for their number of shards."""
    size = part_bytes(config, files)
    pieces: list[tuple[Any, list[Input], int, int, int]] = []  # Part but for its index
    for file in files:
        kind = _kind(file)
        if kind == "texts":
            last = pieces[-1] if pieces else None
            if last and last[0] == "texts" and last[1][0].valid == file.valid and last[4] + file.bytes <= size:
                last[1].append(file)
                pieces[-1] = (kind, last[1], 0, 0, last[4] + file.bytes)
            else:
                pieces.append((kind, [file], 0, 0, file.bytes))
        elif kind == "parquet":
            pieces += [(kind, [file], *cut) for cut in _row_groups(file, size)]
        elif file.path.lower().endswith(COMPRESSED) or file.bytes <= size:
            pieces.append((kind, [file], 0, 0, file.bytes))
        else:
            starts = range(0, file.bytes, size)
            pieces += [(kind, [file], s, min(s + size, file.bytes), min(size, file.bytes - s)) for s in starts]
    for source, name, valid in _sources(config):
        if source.startswith(PREFIX):
            from data_prep.sources.hugging_face_files import shard_count

            words = source.removeprefix(PREFIX)
            shards = shard_count(words, config)
            pieces += [("hub", [Input(f"{name}/{i}", words, 0, 0, valid)], i, shards, 0) for i in range(shards)]
    return [Part(i, kind, tuple(inputs), *numbers) for i, (kind, inputs, *numbers) in enumerate(pieces)]


def _kind(file: Input) -> Literal["lines", "texts", "parquet"]:
    suffixes = [suffix.lower() for suffix in Path(file.path).suffixes]
    if ".jsonl" in suffixes:
        return "lines"
    return "parquet" if suffixes[-1:] == [".parquet"] else "texts"


def _row_groups(file: Input, size: int) -> list[tuple[int, int, int]]:
    """(first row group, end, bytes) of each part of a Parquet file; all of it where its footer cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            rows = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError):
        return [(0, 0, file.bytes)]  # reading it will say what is wrong
    cuts: list[tuple[int, int, int]] = []
    start, held = 0, 0
    for index, count in enumerate(rows):
        held += count
        share = held * file.bytes // max(1, sum(rows))
        if share >= size or index == len(rows) - 1:
            cuts.append((start, index + 1, share))
            start, held = index + 1, 0
    return cuts or [(0, 0, file.bytes)]
