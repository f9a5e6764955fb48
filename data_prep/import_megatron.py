"""Import .bin and .idx files that other tools wrote in Megatron's format: check and link them, write a manifest."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.import_evidence import check_against_sums, check_made_with
from data_prep.stages.write_manifest import make_split_record, make_tokenizer_record, print_splits
from megatron_rdt.data.shard_files.block_hashes import (
    SUFFIXES,
    hash_file,
    write_block_hashes,
)
from megatron_rdt.data.shard_files.corpus_manifest import FORMAT, MANIFEST, VERSION, load_manifest
from megatron_rdt.data.shard_files.indexed import REBUILD, IndexedDataset, prefix_path
from megatron_rdt.data.shard_files.side_files import (
    EXAMPLES,
    LABELS,
    MASK,
    SIDE_FILES,
    describe_example_fault,
)
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.data.tokenizer.tokenizer_files import copy_tokenizer_files
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import fsync_directory, fsync_file, write_text
from megatron_rdt.locks import check_locks, has_lost_lock, hold_lock
from megatron_rdt.output_paths import check_can_be_renamed_to, make_parent, resolve_output_directory
from megatron_rdt.terminal import show_progress

OTHER_VALIDATION = "The validation loss would be that of training text: name other files in one of them."
CHECKED_VALUES = 1 << 20  # values of a side file that are checked at a time
# Errors of a file that cannot be linked: another file system, one without links, no permission, too many links.
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class ImportedShard:
    """Counts and manifest record of one pair of .bin and .idx files that was checked.

    Attributes:
        record: of the manifest.
        dtype: of the tokens.
        ended: number of documents that end with EOS.
        documents: number of documents that are not empty.
    """

    record: dict[str, Any]
    dtype: np.dtype
    ended: int
    documents: int


def import_corpus(prefixes: Sequence[str], tokenizer: str, out: str, valid_prefixes: Sequence[str] = ()) -> Path:
    """Make a corpus of existing files, in which each prefix becomes one shard, in the order given; return its path.

    Files are hard-linked if the file system supports it, otherwise copied; the originals stay.

    Args:
        prefixes: paths of the training split's files without .bin and .idx.
        tokenizer: folder or model file of the tokenizer that made them.
        out: directory of the corpus; must not exist, or be empty.
        valid_prefixes: the same for the validation split.

    Raises:
        ConfigError: a path is wrong, or validation is training text.
        DataError: a file is damaged, was made with another tokenizer, or has another token type than the others.
    """
    target = resolve_output_directory(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{out} exists. Choose another --out.")
    for prefix in (*prefixes, *valid_prefixes):
        for suffix in (".bin", ".idx"):
            if not prefix_path(prefix, suffix).is_file():
                raise ConfigError(f"{prefix}{suffix} does not exist. Name prefixes: paths without .bin and .idx.")
    _check_prefixes_differ(prefixes, valid_prefixes)
    make_parent(target)
    check_can_be_renamed_to(target)
    work = target.with_name(f".{target.name}.import")
    message = f"another `rdt prep import` is writing {out}. Wait for it, or choose another --out."
    with hold_lock(target.with_name(f".{target.name}.lock"), message):
        shutil.rmtree(work, ignore_errors=True)  # left by an import that was killed
        try:
            _build_corpus(work, {"train": prefixes, "valid": valid_prefixes}, tokenizer)
            # The names of all files must be durable before the corpus appears under its own name.
            for folder in (*work.iterdir(), work):
                if folder.is_dir():
                    fsync_directory(folder)
            check_locks()
            work.rename(target)
            fsync_directory(target.parent)
        finally:
            if not has_lost_lock():  # then it is the new holder's, which builds here too
                shutil.rmtree(work, ignore_errors=True)
    return target


def _check_prefixes_differ(prefixes: Sequence[str], valid_prefixes: Sequence[str]) -> None:
    """Raise ConfigError if two prefixes name the same file, directly or through a link."""
    named: dict[tuple[int, int], tuple[str, str]] = {}
    for split, names in (("train", prefixes), ("valid", valid_prefixes)):
        for prefix in names:
            status = prefix_path(prefix, ".bin").stat()
            first, first_split = named.setdefault((status.st_dev, status.st_ino), (prefix, ""))
            what = prefix if first == prefix else f"{first}, the same file as {prefix},"
            if first_split == split:
                raise ConfigError(f"{what} is given twice. Give it once.")
            if first_split:
                raise ConfigError(f"{what} is given for training and in --valid_prefix. {OTHER_VALIDATION}")
            named[status.st_dev, status.st_ino] = (prefix, split)


def _check_contents_differ(imported: dict[str, list[ImportedShard]]) -> None:
    """Refuse a validation shard with the tokens of a training shard; print which shards of one split are the same.

    Raises:
        ConfigError: validation has the tokens of training.
    """
    first: dict[str, tuple[str, str]] = {}
    for split, shards in imported.items():
        for record in (shard.record for shard in shards):
            source, where = first.setdefault(record["bin_sha256"], (record["source"], split))
            if where != split:
                raise ConfigError(
                    f"{record['source']} in --valid_prefix has the same tokens as {source}. {OTHER_VALIDATION}"
                )
            if source != record["source"]:
                print(f"{record['source']} has the same tokens as {source}: every epoch reads them twice")


def _build_corpus(work: Path, splits: dict[str, Sequence[str]], tokenizer_path: str) -> None:
    """Copy the tokenizer, link and check the shards, write the manifest, all in `work`; print the sizes.

    Args:
        work: directory to make.
        splits: prefixes of each split's files.
        tokenizer_path: folder or model file of the tokenizer.
    """
    (work / "tokenizer").mkdir(parents=True)
    tokenizer = _copy_tokenizer_files(Path(tokenizer_path), work / "tokenizer")
    sizes = tokenizer.token_bytes()
    imported: dict[str, list[ImportedShard]] = {}
    prefixes = [prefix for names in splits.values() for prefix in names]
    check_made_with(tokenizer, prefixes)
    tasks = _find_tasks(prefixes)
    total = sum(
        path.stat().st_size for names in splits.values() for prefix in names for path in _existing_files(prefix)
    )
    with show_progress(total, "import", "B", scaled=True) as advance:
        for split, names in splits.items():
            (work / split).mkdir()
            imported[split] = []
            for number, prefix in enumerate(names):
                check_locks()
                shard = work / split / f"shard-{number:05d}"
                for path in _existing_files(prefix):
                    _link_or_copy(path, prefix_path(shard, path.suffix))
                imported[split].append(_check_shard(shard, prefix, tokenizer, sizes, len(tasks), advance))
    every = [one for found in imported.values() for one in found]
    dtypes = {one.dtype.name: one.record["source"] for one in every}
    if len(dtypes) > 1:
        (first, one), (second, two) = list(dtypes.items())[:2]
        raise DataError(f"{one} has tokens as {first}, {two} as {second}. Import them as separate corpora.")
    _check_side_files_of_all(every)
    _check_contents_differ(imported)
    # Without EOS at the end of every document, the manifest must not promise it.
    ended, documents = sum(one.ended for one in every), sum(one.documents for one in every)
    document = _make_manifest(tokenizer, every[0].dtype, imported, ended == documents, tasks)
    write_text(work / MANIFEST, json.dumps(document, indent=1) + "\n")
    print_splits(document)
    if ended < documents:
        print(
            f"EOS (id {tokenizer.eos}) ends {ended:,} of {documents:,} documents ({ended / max(1, documents):.1%}): "
            "in the others nothing tells the model that a document ends"
        )


def _check_side_files_of_all(shards: list[ImportedShard]) -> None:
    """Raise DataError if only some shards, of either split, have a kind of side file: losses would not be comparable."""
    for kind in SIDE_FILES:
        having = [one.record["source"] for one in shards if kind.hash_key in one.record]
        lacking = [one.record["source"] for one in shards if kind.hash_key not in one.record]
        if having and lacking:
            raise DataError(
                f"{having[0]} has {kind.plural} and {lacking[0]} has none. Put {lacking[0]}{kind.suffix} there, or remove the "
                f"{kind.suffix} files of all."
            )


def _find_tasks(prefixes: Sequence[str]) -> list[str]:
    """Return the task names that the .examples files of prefixes refer to, from the manifests of their corpora.

    Raises:
        ConfigError: there is no such manifest, or two list different tasks.
    """
    first: tuple[str, list[str]] | None = None
    for prefix in prefixes:
        file = prefix_path(prefix, EXAMPLES.suffix)
        if not file.is_file():
            continue
        corpus = Path(prefix).parent.parent
        if not (corpus / MANIFEST).is_file():
            raise ConfigError(
                f"{file} refers to tasks by number, and there is no {corpus / MANIFEST} to name them. Name shards in a "
                "corpus that `rdt prep` wrote, or remove the file."
            )
        tasks = load_manifest(corpus).tasks
        first = first or (prefix, tasks)
        if tasks != first[1]:
            raise ConfigError(
                f"{first[0]} is of a corpus with tasks {', '.join(first[1])}, {prefix} of one with {', '.join(tasks)}. "
                "Import them as separate corpora."
            )
    return first[1] if first else []


def _existing_files(prefix: str | Path) -> list[Path]:
    """List the .bin, .idx and side files of a prefix that exist. A .sum file is not imported, but written anew."""
    return [path for suffix in SUFFIXES if (path := prefix_path(prefix, suffix)).is_file()]


def _copy_tokenizer_files(source: Path, target: Path) -> Tokenizer:
    """Copy a tokenizer's files, write the byte length of each id; return the copy. ConfigError without EOS."""
    known = Tokenizer(source)
    if known.eos < 0:
        raise ConfigError(f"the tokenizer {source} has no EOS. Name the tokenizer that made these files.")
    copy_tokenizer_files(source, target)
    known.write_token_bytes(target)
    for file in target.iterdir():
        fsync_file(file)
    return Tokenizer(target)


def _link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if that is not possible."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        shutil.copyfile(source, target)
        fsync_file(target)


def _check_shard(
    prefix: Path, source: str, tokenizer: Tokenizer, sizes: np.ndarray, tasks: int, advance: Callable[[int], object]
) -> ImportedShard:
    """Read a shard once to check ids and side files; write its .sum file; return counts and hashes. DataError if wrong.

    Args:
        prefix: of the linked files.
        source: prefix of the original files, for messages.
        tokenizer: that made them.
        sizes: bytes that each id decodes to.
        tasks: number of tasks that example records may refer to.
        advance: called with the number of bytes that were read.
    """
    shard, starts = _open_shard(source)
    last_tokens = np.append(starts[1:], shard.tokens) - 1  # index of the last token of each document
    state = {"max_id": -1, "text_bytes": 0, "ended": 0}
    width = shard.dtype.itemsize

    def check_tokens(offset: int, block: bytes) -> None:
        """Raise DataError for an id that the tokenizer does not have; add a block of the .bin file to `state`."""
        tokens, begin = np.frombuffer(block, shard.dtype), offset // width
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= tokenizer.vocab_size:
            at = int(np.argmax((tokens < 0) | (tokens >= tokenizer.vocab_size)))
            raise DataError(
                f"{source}.bin: bytes {offset + at * width:,} to {offset + at * width + width - 1:,} hold id {tokens[at]}, "
                f"but the tokenizer has {tokenizer.vocab_size:,} pieces. Name the tokenizer that made these files."
            )
        state["max_id"] = max(state["max_id"], high)
        state["text_bytes"] += int(sizes[tokens].sum(dtype=np.int64))
        # Documents whose last token is in this block.
        first, end = np.searchsorted(last_tokens, (begin, begin + len(tokens)))
        state["ended"] += int((tokens[last_tokens[first:end] - begin] == tokenizer.eos).sum())
        advance(len(block))

    contents = {
        "bin": hash_file(prefix_path(prefix, ".bin"), check_tokens),
        "idx": hash_file(prefix_path(prefix, ".idx")),
    }
    advance(contents["idx"].size)
    for kind in shard.side_paths:
        contents[kind.name] = hash_file(prefix_path(prefix, kind.suffix))
        advance(contents[kind.name].size)
    check_against_sums(source, contents)
    _check_side_values(shard, source, tokenizer.vocab_size, tasks)
    shard.close()
    write_block_hashes(prefix, contents)
    record = {
        "name": prefix.name,
        "source": source,
        "tokens": shard.tokens,
        "documents": shard.document_count,
        "sequences": len(shard),
        "text_bytes": state["text_bytes"],
        "max_id": state["max_id"],
        "bin_bytes": contents["bin"].size,
        **{f"{name}_sha256": content.sha256 for name, content in contents.items()},
    }
    return ImportedShard(record, shard.dtype, state["ended"], len(last_tokens))


def _check_side_values(shard: IndexedDataset, source: str, vocab_size: int, tasks: int) -> None:
    """Raise DataError for a mask, label or example record that cannot be; reads the side files in blocks."""
    for start in range(0, shard.tokens, CHECKED_VALUES):
        count = min(CHECKED_VALUES, shard.tokens - start)
        if shard.has(MASK):
            shard.read_mask(start, count)  # raises DataError for a byte that is neither 0 nor 1
        if shard.has(LABELS):
            labels = shard.read_labels(start, count)
            wrong = np.flatnonzero((labels < 0) | (labels >= vocab_size))
            if len(wrong):
                raise DataError(
                    f"{source}{LABELS.suffix}: the label of token {start + wrong[0]:,} is {labels[wrong[0]]}, but the "
                    f"tokenizer has {vocab_size:,} pieces. Name the tokenizer that made these files."
                )
    if shard.has(EXAMPLES) and (fault := describe_example_fault(shard.read_examples(0, shard.document_count), tasks)):
        raise DataError(f"{source}{EXAMPLES.suffix}: {fault}. Write it again with the tool that made it.")


def _open_shard(source: str) -> tuple[IndexedDataset, np.ndarray]:
    """Open a pair of files; return it with the index of each document's first token. DataError if it is damaged or empty."""
    try:
        shard = IndexedDataset(source)
        starts = shard.document_starts
    except DataError as error:
        raise DataError(f"{str(error).removesuffix(REBUILD)}Write it again with the tool that made it.") from None
    if not len(starts):
        raise DataError(f"{source} has no documents. Omit it.")
    return shard, starts


def _make_manifest(
    tokenizer: Tokenizer, dtype: np.dtype, imported: dict[str, list[ImportedShard]], ended: bool, tasks: list[str]
) -> dict[str, Any]:
    """Return the manifest; `ended` says whether every document ends with EOS, `tasks` names those of the examples."""
    splits = {split: make_split_record([one.record for one in found]) for split, found in imported.items()}
    sources = [one.record["source"] for found in imported.values() for one in found]
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype.name,
        **make_tokenizer_record(tokenizer),
        "prep": {
            "options_sha256": hashlib.sha256("\n".join(["import", *sources]).encode()).hexdigest(),
            "options": {},
            "imported": sources,
            "append_eos": ended,
        },
        "inputs": [],
        **({"tasks": tasks} if tasks else {}),
        "splits": splits,
        "dropped": {},
    }
